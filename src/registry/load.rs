//! Files to a [`ServedModel`]: weights, tokenizer, template, defaults, memory, engine.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use hearth_models::weights::{Metadata, Mix};
use hearth_models::{Compute, KvDType, ModelFile};
use serde_json::Value;

use super::plan::{self, Demand, PlanError};
use super::{Details, ServedModel};
use crate::config::PlanOptions;
use crate::engine::handle::{DraftModel, Keep, Limits, Speculation};
use crate::shelf::{Digest, Shelf};
use crate::text::{ChatTemplate, GgufVocab, Harmony, TextError, Tokenizer};
use crate::types::{SamplingOverrides, TokenId};

/// How to load.
pub struct LoadOptions<'a> {
    /// The id that requests name.
    pub id: String,
    /// Where to compute.
    pub compute: Compute,
    /// Bounds, from [`plan::plan`].
    pub limits: Limits,
    /// Element type of keys and values.
    pub kv_dtype: KvDType,
    /// What guesses how answers go on.
    pub speculation: Speculation,
    /// Where blocks of keys and values go that memory has no room for.
    pub shelf: Option<Arc<Shelf>>,
    /// Told bytes loaded and bytes in all.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// A model that is opened and understood, and not loaded yet.
pub struct OpenModel {
    file: ModelFile,
    text: TextParts,
}

/// Why a model is not served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Weights or configuration.
    #[error("{}", in_file(path, source))]
    Model {
        /// What was opened.
        path: PathBuf,
        /// Why.
        source: hearth_models::Error,
    },
    /// Tokenizer or template.
    #[error("{}", in_file(path, source))]
    Text {
        /// What was opened.
        path: PathBuf,
        /// Why.
        source: TextError,
    },
    /// Memory.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A JSON file beside the weights.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// `path: error`, or the error alone where it names the file already.
fn in_file(path: &Path, error: &dyn std::error::Error) -> String {
    let (path, error) = (path.display().to_string(), error.to_string());
    if error.contains(&path) { error } else { format!("{path}: {error}") }
}

/// Tokenizer, template and defaults of a model.
struct TextParts {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    stop_ids: Vec<TokenId>,
    defaults: SamplingOverrides,
}

/// Understands an opened file: its tokenizer, template and defaults.
pub fn open(file: ModelFile) -> Result<OpenModel, LoadError> {
    let text = text_parts(&file)?;
    Ok(OpenModel { file, text })
}

impl OpenModel {
    /// What it asks of the memory.
    pub fn demand(&self, compute: &Compute) -> Demand<'_> {
        Demand {
            config: self.file.config(),
            vocab_len: self.text.tokenizer.vocab_len(),
            weight_bytes: self.file.weight_bytes(compute),
            draft: None,
            ranks: compute.ranks(),
        }
    }

    /// Refuses devices among which it cannot be divided.
    pub fn check(&self, compute: &Compute) -> Result<(), LoadError> {
        let path = || self.file.path().to_owned();
        self.file.check(compute).map_err(|source| LoadError::Model { path: path(), source })
    }

    /// The file's or folder's name, without the ending of a weight file.
    pub fn name(&self) -> String {
        name_of(self.file.path())
    }

    /// What its files say, where its floats are quantised to `mix` or not at all.
    pub fn details(&self, mix: Option<Mix>) -> Details {
        Details::of_decoder(&self.file, &self.text.tokenizer, self.text.template.as_ref(), mix)
    }

    /// The file behind it.
    pub fn file(&self) -> &ModelFile {
        &self.file
    }

    /// [`OpenModel::load`] of the only model of a process, under its own name.
    pub fn load_alone(
        self,
        compute: &Compute,
        options: &PlanOptions,
    ) -> Result<ServedModel, LoadError> {
        let limits =
            plan::plan(&[self.demand(compute)], options, plan::budget(compute), 0).remove(0)?;
        let options = LoadOptions {
            id: self.name(),
            compute: compute.clone(),
            limits,
            kv_dtype: options.kv_dtype,
            speculation: Speculation::default(),
            shelf: None,
            progress: &mut |_, _| {},
        };
        self.load(options)
    }

    /// Whether it can guess for `model`: their tokens must be the same.
    pub fn check_draft_of(&self, model: &Self, compute: &Compute) -> Result<(), LoadError> {
        let (own, other) = (&self.text.tokenizer, &model.text.tokenizer);
        let usable = |open: &Self| {
            let demand = open.demand(compute);
            demand.vocab_len.min(demand.config.vocab_len)
        };
        let (few, all) = (usable(self), usable(model));
        let differs = (0..all as TokenId).find(|&id| own.token_bytes(id) != other.token_bytes(id));
        let what = match differs {
            _ if few != all => format!("it has {few} tokens and {} has {all}", model.name()),
            Some(id) => format!("token {id} is another in {}", model.name()),
            None => return Ok(()),
        };
        let what = format!("{what}; a draft model has the vocabulary of the model it guesses for");
        Err(LoadError::File { path: self.file.path().to_owned(), what })
    }

    /// Loads the weights of a model that guesses for another.
    pub fn load_draft(
        self,
        compute: &Compute,
        limits: Limits,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<DraftModel, LoadError> {
        let (mut done, total) = (0, self.file.weights().tensor_bytes());
        let loaded = self.file.load(compute, &mut |bytes: usize| {
            done += bytes as u64;
            progress(done, total);
        });
        let path = self.file.path().to_owned();
        let model = loaded.map_err(|source| LoadError::Model { path, source })?;
        Ok(DraftModel { model, limits })
    }

    /// Loads the weights and starts the engine.
    pub fn load(self, options: LoadOptions<'_>) -> Result<ServedModel, LoadError> {
        let Self { file, mut text } = self;
        let LoadOptions { id, compute, limits, kv_dtype, speculation, shelf, progress } = options;
        let model_error = |source| LoadError::Model { path: file.path().to_owned(), source };
        let (mut done, total) = (0, file.weights().tensor_bytes());
        let mut report = |bytes: usize| {
            done += bytes as u64;
            progress(done, total);
        };
        let fingerprint = fingerprint(&file);
        let content = |file: &ModelFile| Digest::of(|listener| file.tell(listener));
        let keep = shelf.map(|shelf| Keep { shelf, content: content(&file) });
        let model = file.load(&compute, &mut report).map_err(model_error)?;
        text.stop_ids.retain(|&id| (id as usize) < limits.vocab_len);
        let spawned = crate::engine::spawn(model, kv_dtype, limits, speculation, keep);
        let (engine, thread) = spawned.map_err(model_error)?;
        Ok(ServedModel {
            id,
            fingerprint,
            file: Arc::new(file),
            engine,
            thread: Mutex::new(Some(thread)),
            vocabulary: OnceLock::new(),
            style: text.template.as_ref().map(ChatTemplate::style),
            harmony: text.template.as_ref().and_then(|t| Harmony::of(t, &text.tokenizer)),
            tokenizer: text.tokenizer,
            template: text.template,
            stop_ids: text.stop_ids,
            defaults: text.defaults,
        })
    }
}

pub(super) fn name_of(path: &Path) -> String {
    // `.` and the like have no name; a link keeps its own.
    let named = match path.file_name() {
        Some(_) => path.to_owned(),
        None => fs::canonicalize(path).unwrap_or_default(),
    };
    let name = named.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = name.strip_suffix(".gguf").or_else(|| name.strip_suffix(".safetensors"));
    stem.unwrap_or(&name).to_owned()
}

/// Program version, and of every tensor its name, type, size and first bytes: two models of one
/// shape differ too.
fn fingerprint(file: &ModelFile) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut mix = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    mix(env!("CARGO_PKG_VERSION").as_bytes());
    for (name, info) in file.weights().infos() {
        mix(name.as_bytes());
        mix(info.ty.name().as_bytes());
        mix(&(info.len_bytes() as u64).to_le_bytes());
        let bytes = file.weights().bytes(name);
        mix(&bytes[..bytes.len().min(32)]);
        file.weights().release(name); // a touch maps up to 2 MiB
    }
    format!("fp_{:012x}", hash >> 16)
}

fn text_parts(file: &ModelFile) -> Result<TextParts, LoadError> {
    let mut parts = match file.weights().metadata() {
        Some(meta) => from_gguf(file.path(), meta)?,
        None => from_folder(file.path())?,
    };
    let ends = &mut parts.stop_ids;
    ends.extend(parts.tokenizer.end_ids());
    ends.extend(&file.config().eos_ids);
    if let Some(template) = &parts.template {
        ends.extend(template.stop_ids(&parts.tokenizer));
        if let Some(harmony) = Harmony::of(template, &parts.tokenizer) {
            harmony.mend_ends(ends);
        }
    }
    ends.sort_unstable();
    ends.dedup();
    Ok(parts)
}

/// `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json`.
fn from_folder(path: &Path) -> Result<TextParts, LoadError> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let text_error = |source| LoadError::Text { path: folder.to_owned(), source };
    let config = json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let tokenizer = folder_tokenizer(folder, &config)?;
    let jinja = optional(&folder.join("chat_template.jinja"))?.map(|bytes| {
        String::from_utf8_lossy(&bytes).into_owned() // a template is text, or refused below
    });
    let template =
        ChatTemplate::from_tokenizer_config(&config, jinja.as_deref()).map_err(text_error)?;
    let generation = json(&folder.join("generation_config.json"))?.unwrap_or_default();
    let stop_ids = match &generation["eos_token_id"] {
        Value::Array(ids) => ids.iter().filter_map(token_id).collect(),
        id => token_id(id).into_iter().collect(),
    };
    let defaults = checked(defaults(&generation), folder)?;
    Ok(TextParts { tokenizer, template, stop_ids, defaults })
}

/// `tokenizer.json`, with BOS and EOS as `tokenizer_config.json` names them.
pub(super) fn folder_tokenizer(folder: &Path, config: &Value) -> Result<Tokenizer, LoadError> {
    let word = |key: &str| match &config[key] {
        Value::String(text) => Some(text.clone()),
        object => object["content"].as_str().map(str::to_owned),
    };
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"));
    let tokenizer =
        tokenizer.map_err(|source| LoadError::Text { path: folder.to_owned(), source })?;
    Ok(tokenizer.with_bos_eos(word("bos_token").as_deref(), word("eos_token").as_deref()))
}

fn from_gguf(path: &Path, meta: &Metadata) -> Result<TextParts, LoadError> {
    let model_error = |e: hearth_models::weights::Error| LoadError::Model {
        path: path.to_owned(),
        source: e.into(),
    };
    let text_error = |source| LoadError::Text { path: path.to_owned(), source };
    let vocab = gguf_vocab(meta).map_err(model_error)?;
    let tokenizer = Tokenizer::from_gguf(&vocab).map_err(text_error)?;
    let spelled = |id: Option<u32>| id.and_then(|id| vocab.tokens.get(id as usize));
    let template = vocab.chat_template.as_deref().map(|source| {
        let (bos, eos) = (spelled(vocab.bos), spelled(vocab.eos));
        ChatTemplate::new(source, bos.map(String::as_str), eos.map(String::as_str))
    });
    let template = template.transpose().map_err(text_error)?;
    let number = |name: &str| meta.get_opt::<f32>(&format!("general.sampling.{name}"));
    let top_k = meta.get_opt::<i32>("general.sampling.top_k").map_err(model_error)?;
    let defaults = SamplingOverrides {
        temperature: number("temp").map_err(model_error)?,
        top_p: number("top_p").map_err(model_error)?,
        top_k: top_k.and_then(|k| usize::try_from(k).ok()),
        min_p: number("min_p").map_err(model_error)?,
        repetition_penalty: number("penalty_repeat").map_err(model_error)?,
        ..SamplingOverrides::default()
    };
    let defaults = checked(defaults, path)?;
    Ok(TextParts { tokenizer, template, stop_ids: Vec::new(), defaults })
}

/// The vocabulary that a GGUF file carries.
pub fn gguf_vocab(meta: &Metadata) -> Result<GgufVocab, hearth_models::weights::Error> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let id = |name: &str| meta.get_opt::<u32>(&key(name));
    let flag = |name: &str| meta.get_opt::<bool>(&key(name));
    let text = |name: &str| -> Result<_, hearth_models::weights::Error> {
        Ok(meta.get_opt::<&str>(name)?.map(str::to_owned))
    };
    let strings = |name: &str| -> Result<Option<Vec<String>>, hearth_models::weights::Error> {
        let name = key(name);
        if !meta.has(&name) {
            return Ok(None);
        }
        meta.get_array::<&str>(&name)?
            .map(|t| t.map(str::to_owned))
            .collect::<Result<_, _>>()
            .map(Some)
    };
    let optional = |name: &str| meta.has(&key(name)).then(|| key(name));
    let scores = optional("scores").map(|k| meta.get_array::<f32>(&k)?.collect()).transpose()?;
    let types = optional("token_type").map(|k| meta.get_array::<i32>(&k)?.collect()).transpose()?;
    Ok(GgufVocab {
        model: meta.get::<&str>("tokenizer.ggml.model")?.to_owned(),
        pre: text("tokenizer.ggml.pre")?,
        tokens: strings("tokens")?.unwrap_or_default(),
        scores,
        token_types: types,
        merges: strings("merges")?,
        bos: id("bos_token_id")?,
        eos: id("eos_token_id")?,
        unk: id("unknown_token_id")?,
        pad: id("padding_token_id")?,
        sep: id("seperator_token_id")?,
        cls: id("cls_token_id")?,
        mask: id("mask_token_id")?,
        eot: id("eot_token_id")?,
        eom: id("eom_token_id")?,
        add_bos: flag("add_bos_token")?,
        add_eos: flag("add_eos_token")?,
        add_space_prefix: flag("add_space_prefix")?,
        remove_extra_whitespaces: flag("remove_extra_whitespaces")?,
        precompiled_charsmap: None,
        chat_template: text("tokenizer.chat_template")?,
    })
}

/// `generation_config.json`: greedy when it says not to sample.
pub(super) fn defaults(config: &Value) -> SamplingOverrides {
    let number = |key: &str| config[key].as_f64().map(|n| n as f32);
    let temperature = match config["do_sample"].as_bool() {
        Some(false) => Some(0.0),
        _ => number("temperature"),
    };
    SamplingOverrides {
        temperature,
        top_p: number("top_p"),
        top_k: config["top_k"].as_u64().map(|n| n as usize),
        min_p: number("min_p"),
        repetition_penalty: number("repetition_penalty"),
        ..SamplingOverrides::default()
    }
}

/// What a model brings is held to the ranges that clients are held to.
fn checked(defaults: SamplingOverrides, path: &Path) -> Result<SamplingOverrides, LoadError> {
    let wrong = |what: &str, value: f32| LoadError::File {
        path: path.to_owned(),
        what: format!("its generation defaults have {what} {value}"),
    };
    let ranges = [
        ("temperature", defaults.temperature, 0.0..=100.0),
        ("top_p", defaults.top_p, 0.0..=1.0),
        ("min_p", defaults.min_p, 0.0..=1.0),
        ("repetition_penalty", defaults.repetition_penalty, 1e-3..=1e3),
    ];
    for (name, value, range) in ranges {
        if let Some(value) = value.filter(|value| !range.contains(value)) {
            return Err(wrong(name, value));
        }
    }
    Ok(defaults)
}

fn token_id(value: &Value) -> Option<TokenId> {
    value.as_u64().and_then(|id| TokenId::try_from(id).ok())
}

/// A JSON file that may be absent.
pub(super) fn json(path: &Path) -> Result<Option<Value>, LoadError> {
    let parse = |bytes: Vec<u8>| {
        serde_json::from_slice(&bytes)
            .map_err(|e| LoadError::File { path: path.to_owned(), what: e.to_string() })
    };
    optional(path)?.map(parse).transpose()
}

/// A file that may be absent.
pub(super) fn optional(path: &Path) -> Result<Option<Vec<u8>>, LoadError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(LoadError::File { path: path.to_owned(), what: e.to_string() }),
    }
}
