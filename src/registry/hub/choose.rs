//! Which files of a repository make one model: a pure function over their names.

use super::HubError;
use crate::registry::source::HubId;

/// The index of sharded SafeTensors, and the one file when they are not sharded.
pub(super) const SHARD_INDEX: &str = "model.safetensors.index.json";
const ONE_FILE: &str = "model.safetensors";

/// Small files that a SafeTensors model needs beside its weights, where the repository has them.
const COMPANIONS: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
];

/// The files to have, and what to open.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Open the folder. With [`SHARD_INDEX`] among `files`, the shards it lists are needed too.
    Folder { files: Vec<String> },
    /// Open the first; the others are its later parts.
    Gguf { files: Vec<String> },
}

impl Choice {
    pub(super) fn files(&self) -> &[String] {
        match self {
            Self::Folder { files } | Self::Gguf { files } => files,
        }
    }
}

/// Chooses among the files of a repository (or of what a cache has of it).
pub(super) fn choose(id: &HubId, files: &[String]) -> Result<Choice, HubError> {
    let models = gguf_models(files);
    let Some(pick) = &id.pick else {
        return match (safetensors(files), &models[..]) {
            (Some(files), _) => Ok(Choice::Folder { files }),
            (None, [_]) => gguf(id, &models[0], files),
            (None, []) => Err(refused(id, "it has neither SafeTensors nor GGUF weights", files)),
            (None, _) => Err(refused(id, "it has several GGUF models, choose one", &models)),
        };
    };
    if models.is_empty() {
        return Err(refused(id, &format!("it has no GGUF file to match `{pick}`"), files));
    }
    if pick.to_ascii_lowercase().ends_with(".gguf") {
        let named = files.iter().find(|file| *file == pick);
        let named = named.ok_or_else(|| refused(id, &format!("it has no `{pick}`"), &models))?;
        return gguf(id, named, files);
    }
    let matching: Vec<String> =
        models.iter().filter(|file| has_word(file, pick)).cloned().collect();
    match &matching[..] {
        [one] => gguf(id, one, files),
        [] => Err(refused(id, &format!("none of its GGUF files is `{pick}`"), &models)),
        _ => Err(refused(id, &format!("`{pick}` is more than one of its files"), &matching)),
    }
}

fn refused(id: &HubId, reason: &str, available: &[String]) -> HubError {
    let mut available = available.to_vec();
    available.sort();
    HubError::Choice { repo: id.repo.clone(), reason: reason.to_owned(), available }
}

fn safetensors(files: &[String]) -> Option<Vec<String>> {
    let has = |name: &str| files.iter().any(|file| file == name);
    let weights = [SHARD_INDEX, ONE_FILE].into_iter().find(|name| has(name))?;
    let companions = COMPANIONS.into_iter().filter(|name| has(name));
    Some(companions.chain([weights]).map(str::to_owned).collect())
}

/// Every GGUF model once: a split one by its first part. Projectors of vision models are no models.
fn gguf_models(files: &[String]) -> Vec<String> {
    let is_model = |file: &&String| {
        let name = file.rsplit('/').next().unwrap_or(file).to_ascii_lowercase();
        name.ends_with(".gguf")
            && !name.starts_with("mmproj")
            && part(file).is_none_or(|p| p.no == 1)
    };
    files.iter().filter(is_model).cloned().collect()
}

/// A file with all parts that belong to it.
fn gguf(id: &HubId, file: &str, files: &[String]) -> Result<Choice, HubError> {
    let Some(Part { stem, count, .. }) = part(file) else {
        return Ok(Choice::Gguf { files: vec![file.to_owned()] });
    };
    let parts: Vec<String> =
        (1..=count).map(|no| format!("{stem}-{no:05}-of-{count:05}.gguf")).collect();
    match parts.iter().find(|part| !files.contains(part)) {
        Some(missing) => Err(refused(id, &format!("the part `{missing}` is missing"), files)),
        None => Ok(Choice::Gguf { files: parts }),
    }
}

/// `stem-00002-of-00003.gguf`.
struct Part<'a> {
    stem: &'a str,
    /// From 1.
    no: u32,
    count: u32,
}

fn part(file: &str) -> Option<Part<'_>> {
    let number = |digits: &str| (digits.len() == 5).then(|| digits.parse().ok()).flatten();
    let (rest, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, no) = rest.rsplit_once('-')?;
    Some(Part { stem, no: number(no)?, count: number(count)? })
}

/// Whether `word` stands in `name` with no letter, digit or `_` beside it, in any case: `Q4_K` is
/// not in `x-Q4_K_M.gguf`, and `F16` is not in `x-BF16.gguf`.
fn has_word(name: &str, word: &str) -> bool {
    let (name, word) = (name.to_ascii_lowercase(), word.to_ascii_lowercase());
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    name.match_indices(&word).any(|(at, _)| {
        !name[..at].ends_with(inside) && !name[at + word.len()..].starts_with(inside)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(id: &str, files: &[&str]) -> Result<Vec<String>, String> {
        let files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
        let id = HubId::parse(id).expect("a hub id");
        choose(&id, &files).map(|c| c.files().to_vec()).map_err(|e| e.to_string())
    }

    const QUANTS: [&str; 7] = [
        "README.md",
        "m-BF16.gguf",
        "m-F16.gguf",
        "m-Q4_K_M.gguf",
        "m-Q4_K_S.gguf",
        "m-q8_0.gguf",
        "mmproj-F16.gguf",
    ];

    #[test]
    fn one_quantisation_in_any_case() {
        assert_eq!(chosen("o/m:q4_k_m", &QUANTS).unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(chosen("o/m:Q8_0", &QUANTS).unwrap(), ["m-q8_0.gguf"]);
        assert_eq!(chosen("o/m:F16", &QUANTS).unwrap(), ["m-F16.gguf"]);
        assert_eq!(chosen("o/m:m-BF16.gguf", &QUANTS).unwrap(), ["m-BF16.gguf"]);
    }

    #[test]
    fn what_is_not_clear_lists_what_there_is() {
        let absent = chosen("o/m:Q4_K", &QUANTS).unwrap_err();
        assert!(absent.contains("none of its GGUF files is `Q4_K`"), "{absent}");
        assert!(absent.contains("m-Q4_K_M.gguf") && absent.contains("m-Q4_K_S.gguf"), "{absent}");
        let open = chosen("o/m", &QUANTS).unwrap_err();
        assert!(open.contains("several") && open.contains("m-q8_0.gguf"), "{open}");
        assert!(!open.contains("mmproj"), "{open}");
        let twice = chosen("o/m:Q2_K", &["a-Q2_K.gguf", "b-Q2_K.gguf"]).unwrap_err();
        assert!(twice.contains("`Q2_K` is more than one"), "{twice}");
        assert!(chosen("o/m:n.gguf", &QUANTS).unwrap_err().contains("it has no `n.gguf`"));
        assert!(chosen("o/m", &["pytorch_model.bin"]).unwrap_err().contains("neither"));
        assert!(chosen("o/m:Q4_0", &["model.safetensors"]).unwrap_err().contains("no GGUF file"));
    }

    #[test]
    fn a_split_model_is_all_its_parts() {
        let files = ["q/m-Q4_0-00002-of-00002.gguf", "q/m-Q4_0-00001-of-00002.gguf"];
        let parts = ["q/m-Q4_0-00001-of-00002.gguf", "q/m-Q4_0-00002-of-00002.gguf"];
        assert_eq!(chosen("o/m", &files).unwrap(), parts);
        assert_eq!(chosen("o/m:Q4_0", &files).unwrap(), parts);
        let missing = chosen("o/m", &files[1..]).unwrap_err();
        assert!(missing.contains("`q/m-Q4_0-00002-of-00002.gguf` is missing"), "{missing}");
    }

    #[test]
    fn safetensors_with_what_stands_beside_them() {
        let files = ["model.safetensors", "config.json", "x.gguf", "tokenizer.json", "tf_model.h5"];
        let wanted = ["config.json", "tokenizer.json", "model.safetensors"];
        assert_eq!(chosen("o/m", &files).unwrap(), wanted);
        let files = ["model.safetensors.index.json", "model-00001-of-00001.safetensors"];
        assert_eq!(chosen("o/m", &files).unwrap(), [SHARD_INDEX]);
    }
}
