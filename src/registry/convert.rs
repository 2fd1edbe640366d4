//! A model to a GGUF file: weights by `hearth_models`, vocabulary by `text`, and what else a folder
//! says (template, defaults) as metadata.

use std::io;
use std::path::Path;

use hearth_models::Export;
use hearth_models::weights::Value as Meta;
use hearth_models::weights::gguf_writer::GgufWriter;
use serde_json::Value;

use super::load::{self, LoadError};
use crate::text::{self, GgufVocab};

/// Writes `export` to `path`; `progress` is told the bytes of the source as they are taken.
pub fn write_gguf(
    export: &Export<'_>,
    path: &Path,
    progress: &mut dyn FnMut(usize),
) -> Result<(), LoadError> {
    let source = export.file.path();
    let failed = |source_error| LoadError::Model { path: source.to_owned(), source: source_error };
    if export.file.weights().metadata().is_some() {
        // The vocabulary is in the metadata, which is copied.
        return export.write(path, &mut |_| Ok(()), progress).map_err(failed);
    }
    let folder = if source.is_dir() { source } else { source.parent().unwrap_or(source) };
    let parts = FolderText::read(folder, export.file.config().vocab_len)?;
    let name = source.file_name().map(|name| name.to_string_lossy().into_owned());
    let put = &mut |writer: &mut GgufWriter| {
        if let Some(name) = &name {
            writer.put("general.name", Meta::Str(name))?;
        }
        parts.put(writer)
    };
    export.write(path, put, progress).map_err(failed)
}

/// What a folder says beside its weights.
struct FolderText {
    vocab: GgufVocab,
    /// Name and text; the first is the default.
    templates: Vec<(String, String)>,
    generation: Value,
}

impl FolderText {
    fn read(folder: &Path, rows: usize) -> Result<Self, LoadError> {
        let text_error = |source| LoadError::Text { path: folder.to_owned(), source };
        let config = load::json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let tokenizer = load::folder_tokenizer(folder, &config)?;
        let json = load::optional(&folder.join("tokenizer.json"))?.unwrap_or_default();
        let vocab = text::export(&json, &tokenizer, rows).map_err(text_error)?;
        let jinja = load::optional(&folder.join("chat_template.jinja"))?
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let templates = match (jinja.as_deref(), &config["chat_template"]) {
            (Some(text), _) => vec![("default".to_owned(), text.to_owned())],
            (None, Value::String(text)) => vec![("default".to_owned(), text.clone())],
            (None, Value::Array(list)) => list
                .iter()
                .filter_map(|entry| {
                    let text = |key: &str| entry[key].as_str().map(str::to_owned);
                    Some((text("name")?, text("template")?))
                })
                .collect(),
            _ => Vec::new(),
        };
        let generation = load::json(&folder.join("generation_config.json"))?.unwrap_or_default();
        Ok(Self { vocab, templates, generation })
    }

    fn put(&self, writer: &mut GgufWriter) -> io::Result<()> {
        put_vocab(writer, &self.vocab)?;
        for (name, text) in &self.templates {
            let key = match name.as_str() {
                "default" => "tokenizer.chat_template".to_owned(),
                name => format!("tokenizer.chat_template.{name}"),
            };
            writer.put(&key, Meta::Str(text))?;
        }
        let others: Vec<&String> =
            self.templates.iter().map(|(name, _)| name).filter(|name| *name != "default").collect();
        if !others.is_empty() {
            writer.put_strings("tokenizer.chat_templates", &others)?;
        }
        let defaults = load::defaults(&self.generation);
        let numbers = [
            ("temp", defaults.temperature),
            ("top_p", defaults.top_p),
            ("min_p", defaults.min_p),
            ("penalty_repeat", defaults.repetition_penalty),
        ];
        for (name, number) in numbers {
            if let Some(number) = number {
                writer.put(&format!("general.sampling.{name}"), Meta::F32(number))?;
            }
        }
        if let Some(top_k) = defaults.top_k.and_then(|k| i32::try_from(k).ok()) {
            writer.put("general.sampling.top_k", Meta::I32(top_k))?;
        }
        Ok(())
    }
}

fn put_vocab(writer: &mut GgufWriter, vocab: &GgufVocab) -> io::Result<()> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    writer.put(&key("model"), Meta::Str(&vocab.model))?;
    if let Some(pre) = &vocab.pre {
        writer.put(&key("pre"), Meta::Str(pre))?;
    }
    writer.put_strings(&key("tokens"), &vocab.tokens)?;
    if let Some(scores) = &vocab.scores {
        writer.put_f32s(&key("scores"), scores)?;
    }
    if let Some(types) = &vocab.token_types {
        writer.put_i32s(&key("token_type"), types)?;
    }
    if let Some(merges) = &vocab.merges {
        writer.put_strings(&key("merges"), merges)?;
    }
    for (name, id) in [("bos", vocab.bos), ("eos", vocab.eos), ("unknown", vocab.unk)] {
        if let Some(id) = id {
            writer.put(&key(&format!("{name}_token_id")), Meta::U32(id))?;
        }
    }
    for (name, flag) in [
        ("add_bos_token", vocab.add_bos),
        ("add_eos_token", vocab.add_eos),
        ("add_space_prefix", vocab.add_space_prefix),
    ] {
        if let Some(flag) = flag {
            writer.put(&key(name), Meta::Bool(flag))?;
        }
    }
    Ok(())
}
