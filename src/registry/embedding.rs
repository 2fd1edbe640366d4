//! Files to an [`EmbeddingModel`]: weights, tokenizer, and what sentence-transformers keeps beside
//! them about pooling, normalisation and length.
//!
//! `modules.json` lists the steps of a model; a step that this build does not run (a dense layer
//! behind the pooling) is refused by name. Without it a model is pooled by the mean and normalised.

use std::path::{Component, Path};

use hearth_models::{Compute, EncoderFile};
use serde_json::Value;

use super::LoadError;
use super::load::{self, gguf_vocab};
use crate::embeddings::{Bounds, Dimensions, EmbeddingModel, Pooling, Settings};
use crate::text::Tokenizer;

/// An encoder that is opened and understood, and not loaded yet.
pub struct OpenEmbedding {
    file: EncoderFile,
    tokenizer: Tokenizer,
    settings: Settings,
}

impl OpenEmbedding {
    /// Understands an opened file: its tokenizer and its settings.
    pub fn new(file: EncoderFile) -> Result<Self, LoadError> {
        let (tokenizer, settings) = match file.weights().metadata() {
            Some(_) => from_gguf(&file)?,
            None => from_folder(&file)?,
        };
        let (ids, rows) = (tokenizer.vocab_len(), file.config().vocab_len);
        if ids > rows {
            let what = format!("its tokenizer has {ids} tokens, and the model {rows}");
            return Err(LoadError::File { path: file.path().to_owned(), what });
        }
        Ok(Self { file, tokenizer, settings })
    }

    /// The file behind it.
    pub fn file(&self) -> &EncoderFile {
        &self.file
    }

    /// The file's or folder's name, without the ending of a weight file.
    pub fn name(&self) -> String {
        load::name_of(self.file.path())
    }

    /// Tokens of one text.
    pub fn context_len(&self) -> usize {
        self.settings.context_len
    }

    /// What its weights take.
    pub fn weight_bytes(&self, compute: &Compute) -> u64 {
        compute.weight_bytes(self.file.weights())
    }

    /// Loads the weights and starts the thread. `progress` is told bytes loaded and bytes in all.
    pub fn load(
        self,
        id: String,
        compute: &Compute,
        bounds: Bounds,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<EmbeddingModel, LoadError> {
        let Self { file, tokenizer, settings } = self;
        let path = file.path().to_owned();
        let (mut done, total) = (0, file.weights().tensor_bytes());
        let mut report = |bytes: usize| {
            done += bytes as u64;
            progress(done, total);
        };
        let model = file.load(compute, &mut report);
        let model = model.map_err(|source| LoadError::Model { path: path.clone(), source })?;
        let batch_tokens = bounds.batch_tokens.max(settings.context_len);
        EmbeddingModel::start(id, model, tokenizer, settings, Bounds { batch_tokens, ..bounds })
            .map_err(|e| LoadError::File { path, what: format!("its thread has no place: {e}") })
    }
}

fn from_gguf(file: &EncoderFile) -> Result<(Tokenizer, Settings), LoadError> {
    let path = file.path();
    let model_error = |e: hearth_models::weights::Error| LoadError::Model {
        path: path.to_owned(),
        source: e.into(),
    };
    let wrong = |what: String| LoadError::File { path: path.to_owned(), what };
    let meta = file.weights().metadata().ok_or_else(|| wrong("has no metadata".to_owned()))?;
    let vocab = gguf_vocab(meta).map_err(model_error)?;
    let tokenizer = Tokenizer::from_gguf(&vocab);
    let tokenizer =
        tokenizer.map_err(|source| LoadError::Text { path: path.to_owned(), source })?;
    let key = format!("{}.pooling_type", file.config().family);
    let pooling = match meta.get_opt::<u32>(&key).map_err(model_error)? {
        None | Some(1) => Pooling::Mean,
        Some(2) => Pooling::Cls,
        Some(other) => return Err(wrong(format!("its {key} is {other}, which is not supported"))),
    };
    let context_len = file.config().context_len;
    let settings =
        Settings { pooling, normalize: true, context_len, dimensions: Dimensions::Whole };
    Ok((tokenizer, settings))
}

fn from_folder(file: &EncoderFile) -> Result<(Tokenizer, Settings), LoadError> {
    let path = file.path();
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let text_error = |source| LoadError::Text { path: folder.to_owned(), source };
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json")).map_err(text_error)?;
    let (pooling, normalize) = steps(folder)?;
    let limit = load::json(&folder.join("sentence_bert_config.json"))?.unwrap_or_default();
    let rows = file.config().context_len;
    let asked = limit["max_seq_length"].as_u64().map(|n| n as usize);
    let config = load::json(&folder.join("config.json"))?.unwrap_or_default();
    let settings = Settings {
        pooling,
        normalize,
        context_len: asked.filter(|n| (1..=rows).contains(n)).unwrap_or(rows),
        dimensions: dimensions(&config),
    };
    Ok((tokenizer, settings))
}

/// How `modules.json` and the pooling's own file say that states become a vector.
fn steps(folder: &Path) -> Result<(Pooling, bool), LoadError> {
    let path = folder.join("modules.json");
    let Some(modules) = load::json(&path)? else { return Ok((Pooling::Mean, true)) };
    let wrong = |what: String| LoadError::File { path: path.clone(), what };
    let modules = modules.as_array().ok_or_else(|| wrong("is not a list".to_owned()))?;
    let (mut pooling_of_model, mut normalize) = (Pooling::Mean, false);
    for module in modules {
        let kind = module["type"].as_str().unwrap_or_default();
        match kind.rsplit('.').next() {
            Some("Transformer") => {}
            Some("Normalize") => normalize = true,
            Some("Pooling") => {
                let part = Path::new(module["path"].as_str().unwrap_or_default());
                let inside = |c: Component<'_>| matches!(c, Component::Normal(_));
                if !part.components().all(inside) {
                    return Err(wrong(format!("`{}` is not beside it", part.display())));
                }
                pooling_of_model = pooling(&folder.join(part).join("config.json"))?;
            }
            _ => return Err(wrong(format!("its module `{kind}` is not supported"))),
        }
    }
    Ok((pooling_of_model, normalize))
}

/// The one way of pooling that its file switches on; the mean where there is no file.
fn pooling(path: &Path) -> Result<Pooling, LoadError> {
    let Some(config) = load::json(path)? else { return Ok(Pooling::Mean) };
    let wrong = |what: String| LoadError::File { path: path.to_owned(), what };
    let on = |(key, value): (&String, &Value)| {
        let name = key.strip_prefix("pooling_mode_")?;
        (value == true).then(|| name.to_owned())
    };
    let mut modes: Vec<String> = config.as_object().into_iter().flatten().filter_map(on).collect();
    modes.extend(config["pooling_mode"].as_str().map(str::to_owned));
    match modes.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] | ["mean_tokens" | "mean"] => Ok(Pooling::Mean),
        ["cls_token" | "cls"] => Ok(Pooling::Cls),
        ["max_tokens" | "max"] => Ok(Pooling::Max),
        _ => Err(wrong(format!("pooling by {} is not supported", modes.join(" and ")))),
    }
}

/// What `config.json` declares of vectors that may be cut.
fn dimensions(config: &Value) -> Dimensions {
    let listed = config["matryoshka_dimensions"]
        .as_array()
        .map(|list| list.iter().filter_map(|n| n.as_u64().map(|n| n as usize)).collect::<Vec<_>>());
    match listed {
        Some(list) if !list.is_empty() => Dimensions::Of(list),
        _ if config["is_matryoshka"] == true => Dimensions::Any,
        _ => Dimensions::Whole,
    }
}
