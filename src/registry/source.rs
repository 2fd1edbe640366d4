//! Where a model comes from: a path on this machine, an id on the hub, or the binary itself.
//!
//! Only the spelling is decided here. Files are opened by `hearth_models`, downloads are `hub`'s.

use std::fmt;
use std::path::{Path, PathBuf};

/// What `--model` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A `.gguf` or `.safetensors` file, or a folder, that exists.
    Path(PathBuf),
    /// A repository on the hub.
    Hub(HubId),
    /// The model that the binary carries.
    Builtin,
}

/// A model on the hub: `org/name`, `org/name@revision`, `org/name:Q4_K_M`, `org/name:file.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit; `None` is `main`.
    pub revision: Option<String>,
    /// A quantisation or the name of a GGUF file.
    pub pick: Option<String>,
}

/// Why a string names no model.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SourceError {
    /// It can only be a path, and nothing is there.
    #[error("there is no file or folder `{0}`")]
    NoSuchPath(String),
    /// It is neither.
    #[error(
        "`{text}` is neither an existing path nor a hub id ({reason}); give a .gguf or \
         .safetensors file, a folder, `org/name`, `org/name:Q4_K_M`, `org/name:file.gguf` or \
         `org/name@revision`"
    )]
    Malformed {
        /// What was given.
        text: String,
        /// Why it is no hub id.
        reason: &'static str,
    },
}

impl ModelSource {
    /// Reads a path, the name of the built-in model or a hub id. A path that exists wins.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let path = Path::new(text);
        if !text.is_empty() && path.exists() {
            return Ok(Self::Path(path.to_owned()));
        }
        if text == super::builtin::NAME {
            return Ok(Self::Builtin);
        }
        if looks_like_path(text) {
            return Err(SourceError::NoSuchPath(text.to_owned()));
        }
        HubId::parse(text).map(Self::Hub)
    }
}

impl HubId {
    /// Reads `org/name`, then `@revision` and `:pick`, each at most once.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let malformed = |reason| SourceError::Malformed { text: text.to_owned(), reason };
        let end = text.find(['@', ':']).unwrap_or(text.len());
        let (repo, mut rest) = text.split_at(end);
        let (org, name) = repo.split_once('/').ok_or(malformed("it has no `/`"))?;
        if !is_repo_part(org) || !is_repo_part(name) {
            return Err(malformed("organisation and name are letters, digits, `-`, `_` and `.`"));
        }
        let (mut revision, mut pick) = (None, None);
        while let Some(mark) = rest.chars().next() {
            let body = &rest[1..];
            let end = body.find(['@', ':']).unwrap_or(body.len());
            let (word, after) = body.split_at(end);
            let slot = if mark == '@' { &mut revision } else { &mut pick };
            if word.is_empty() || slot.replace(word.to_owned()).is_some() {
                return Err(malformed("`@` and `:` are followed by one word each"));
            }
            rest = after;
        }
        let words = [&revision, &pick];
        if words.into_iter().flatten().any(|word| !is_plain(word)) {
            return Err(malformed("a revision or file name has unusual characters"));
        }
        Ok(Self { repo: repo.to_owned(), revision, pick })
    }

    /// The revision to ask for.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(pick) = &self.pick {
            write!(f, ":{pick}")?;
        }
        Ok(())
    }
}

/// What a file in `folder` means by the name of a model: a path in it begins at that folder.
pub fn relative_to(folder: &Path, text: &str) -> String {
    let path = folder.join(text);
    let is_path = !text.is_empty() && (looks_like_path(text) || path.exists());
    match is_path && !text.starts_with('~') {
        true => path.to_string_lossy().into_owned(),
        false => text.to_owned(),
    }
}

/// Spellings that no hub id has.
fn looks_like_path(text: &str) -> bool {
    let is_file = [".gguf", ".safetensors"].iter().any(|ending| text.ends_with(ending));
    text.starts_with(['.', '/', '~', '\\'])
        || text.ends_with(['/', '\\'])
        || (is_file && !text.contains([':', '@']))
}

fn is_repo_part(part: &str) -> bool {
    // Two dots would leave the cache folder, two dashes would blur its name.
    let whole =
        !part.is_empty() && part.len() <= 96 && !part.contains("..") && !part.contains("--");
    let edges = !part.starts_with(['.', '-']) && !part.ends_with(['.', '-']);
    whole && edges && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// A revision or a file in the repository: no way out of the folder it will be stored in.
fn is_plain(word: &str) -> bool {
    word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./+ ".contains(&b))
        && word.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(text: &str) -> (String, Option<String>, Option<String>) {
        match ModelSource::parse(text) {
            Ok(ModelSource::Hub(id)) => {
                assert_eq!(HubId::parse(&id.to_string()), Ok(id.clone()), "it prints as it reads");
                (id.repo, id.revision, id.pick)
            }
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn hub_ids() {
        let some = |s: &str| Some(s.to_owned());
        let repo = "Qwen/Qwen3-0.6B".to_owned();
        assert_eq!(hub("Qwen/Qwen3-0.6B"), (repo.clone(), None, None));
        assert_eq!(hub("Qwen/Qwen3-0.6B@v1.0"), (repo.clone(), some("v1.0"), None));
        assert_eq!(hub("Qwen/Qwen3-0.6B@refs/pr/1"), (repo.clone(), some("refs/pr/1"), None));
        assert_eq!(hub("Qwen/Qwen3-0.6B:q4_k_m"), (repo.clone(), None, some("q4_k_m")));
        assert_eq!(hub("Qwen/Qwen3-0.6B:a/b.gguf"), (repo.clone(), None, some("a/b.gguf")));
        assert_eq!(hub("Qwen/Qwen3-0.6B@main:Q8_0"), (repo.clone(), some("main"), some("Q8_0")));
        assert_eq!(hub("Qwen/Qwen3-0.6B:Q8_0@main"), (repo, some("main"), some("Q8_0")));
    }

    #[test]
    fn neither_path_nor_id() {
        for text in [
            "",
            "gpt2",
            "a/b/c",
            "a//b",
            "/",
            "a b/c",
            "org/..",
            "org/.x",
            "o--x/y",
            "org/name@",
            "org/name:",
            "org/name@a@b",
            "org/name:../x.gguf",
            "org/name@../..",
            "http://x/y",
        ] {
            assert!(ModelSource::parse(text).is_err() || Path::new(text).exists(), "{text}");
        }
    }

    #[test]
    fn a_missing_path_says_so() {
        for text in
            ["./none", "/none/x", "~/none", "none.gguf", "a/b.gguf", "none/", "x.safetensors"]
        {
            let missing = SourceError::NoSuchPath(text.to_owned());
            assert_eq!(ModelSource::parse(text), Err(missing), "{text}");
        }
    }

    #[test]
    fn the_built_in_model_has_a_name() {
        assert_eq!(ModelSource::parse("hearth-tiny"), Ok(ModelSource::Builtin));
    }

    #[test]
    fn a_path_in_a_file_begins_at_its_folder() {
        let in_folder = |text| relative_to(Path::new("src"), text);
        assert_eq!(in_folder("none.gguf"), "src/none.gguf");
        assert_eq!(in_folder("./none"), "src/./none");
        assert_eq!(in_folder("registry/hub"), "src/registry/hub");
        for other in ["org/name", "org/name:a.gguf", "hearth-tiny", "/tmp/x.gguf", "~/x", ""] {
            assert_eq!(in_folder(other), other);
        }
    }

    #[test]
    fn an_existing_path_wins() {
        // Tests run in the package's folder.
        for text in ["Cargo.toml", "src", "src/registry", "./src"] {
            assert_eq!(ModelSource::parse(text), Ok(ModelSource::Path(text.into())));
        }
    }
}
