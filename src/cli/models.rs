//! `hearth models`: fetch, list, inspect.

use std::io::{self, Write};

use clap::Subcommand;
use hearth_models::AnyFile;
use hearth_models::weights::{Value, Weights};

use super::Failure;
use super::common::Common;
use super::open::{self, Offer};
use crate::config::{CapacityArgs, EngineArgs, MemoryArgs, ModelArgs, RawConfig};
use crate::registry::hub::{self, Bars, HubOptions};
use crate::registry::source::{HubId, ModelSource};
use crate::registry::{Kind, builtin};

#[derive(Clone, Debug, Subcommand)]
pub(super) enum ModelsCommand {
    /// Download a model from the hub into the cache; what is there already stays.
    Pull {
        /// `org/name`, `org/name:Q4_K_M`, `org/name:file.gguf`, `org/name@revision`.
        model: String,
    },
    /// Show what a server with this configuration would offer, and what the cache has.
    List(Box<Common<ListArgs>>),
    /// Show what is inside a model: configuration, metadata, tensors. Loads no weight.
    Inspect {
        /// A file, a folder or a hub id.
        model: String,
        /// Every tensor, not only the count of each type.
        #[arg(long)]
        tensors: bool,
    },
}

/// Flags that change what a server would offer.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    capacity: CapacityArgs,
    #[command(flatten)]
    memory: MemoryArgs,
}

impl From<ListArgs> for RawConfig {
    fn from(ListArgs { model, engine, capacity, memory }: ListArgs) -> Self {
        Self { model, engine, capacity, memory, ..Self::default() }
    }
}

pub(super) fn run(command: ModelsCommand) -> Result<(), Failure> {
    let out = &mut io::stdout().lock();
    match command {
        ModelsCommand::Pull { model } => {
            let id = HubId::parse(&model)?;
            let path = hub::resolve(&id, &HubOptions::from_env(), &mut Bars::default())?;
            writeln!(out, "{}", path.display())?;
            Ok(())
        }
        ModelsCommand::List(common) => list(out, *common),
        ModelsCommand::Inspect { model, tensors } => inspect(out, &model, tensors),
    }
}

fn list(out: &mut impl Write, common: Common<ListArgs>) -> Result<(), Failure> {
    match offered(common) {
        Ok(offer) => show_offer(out, &offer)?,
        Err(error) => writeln!(out, "a server would not start: {error}")?,
    }
    let cache = HubOptions::from_env().cache;
    if let Some(bytes) = builtin::bytes() {
        let (name, size) = (builtin::NAME, bytes.len().div_ceil(1 << 20));
        writeln!(out, "{name} in this binary, {size} MB (for demonstration)")?;
    }
    let models = hub::list(&cache);
    writeln!(out, "{} models in {}", models.len(), cache.display())?;
    for model in models {
        writeln!(out, "{}", model.repo)?;
        for (name, bytes) in model.weights {
            writeln!(out, "  {name:<50} {:>8} MB", bytes.div_ceil(1 << 20))?;
        }
    }
    Ok(())
}

/// Nothing is fetched for a list.
fn offered(common: Common<ListArgs>) -> Result<Offer, Failure> {
    let config = common.validate()?;
    let hub = HubOptions { offline: true, ..HubOptions::from_env() };
    open::offer(&config, &open::compute(&config)?, &hub, None)
}

fn show_offer(out: &mut impl Write, offer: &Offer) -> Result<(), Failure> {
    let told = offer.budget_bytes.map_or("unknown".into(), |bytes| format!("{} MB", bytes >> 20));
    writeln!(out, "a server would offer, in a memory budget of {told}:")?;
    for planned in &offer.models {
        let model = &planned.offered;
        let what = match model.kind {
            Kind::Text { context_len } => format!("context {context_len}"),
            Kind::Embedding { vector_len, .. } => format!("embeds, {vector_len} numbers"),
        };
        let (mb, when) = (model.bytes.div_ceil(1 << 20), planned.when());
        writeln!(out, "  {:<40} {mb:>8} MB  {when:<20}  {what}", model.id)?;
    }
    for (_, why) in &offer.refused {
        writeln!(out, "  not offered: {why}")?;
    }
    Ok(())
}

fn inspect(out: &mut impl Write, name: &str, every_tensor: bool) -> Result<(), Failure> {
    // A model that cannot be run can still be looked into.
    let (weights, config) = match ModelSource::parse(name)? {
        ModelSource::Builtin => {
            let bytes = builtin::bytes().ok_or("this build carries no model")?;
            let file = hearth_models::open_bytes(name, bytes).map(AnyFile::Decoder);
            (Weights::from_bytes(name, bytes)?, file)
        }
        source => {
            let path = open::path_of(source, &HubOptions::from_env())?;
            (Weights::open(&path)?, hearth_models::open_any(&path))
        }
    };
    let path = weights.path();
    writeln!(out, "{} ({:?}, {} bytes)", path.display(), weights.format(), weights.file_bytes())?;
    for file in weights.files() {
        writeln!(out, "  file {}", file.display())?;
    }
    if let Some(meta) = weights.metadata() {
        for key in meta.keys() {
            writeln!(out, "  {key} = {}", show(meta.value(key)?))?;
        }
    }
    let mut counts = std::collections::BTreeMap::<&str, (usize, usize)>::new();
    for (name, info) in weights.infos() {
        let count = counts.entry(info.ty.name()).or_default();
        *count = (count.0 + 1, count.1 + info.len_bytes());
        if every_tensor {
            writeln!(out, "  {name} {:?} {}", info.shape, info.ty.name())?;
        }
    }
    for (ty, (count, bytes)) in counts {
        writeln!(out, "  {count} tensors of {ty}, {bytes} bytes")?;
    }
    match config {
        Ok(AnyFile::Decoder(file)) => writeln!(out, "{:#?}", file.config())?,
        Ok(AnyFile::Encoder(file)) => writeln!(out, "{:#?}", file.config())?,
        Err(error) => writeln!(out, "cannot be run: {error}")?,
    }
    Ok(())
}

/// A value on one line: long texts are cut, arrays only counted.
fn show(value: Option<Value<'_>>) -> String {
    match value {
        Some(Value::Array(array)) => format!("{} x {:?}", array.len(), array.element_type()),
        Some(Value::Str(text)) if text.chars().count() > 60 => {
            format!("{:?}...", text.chars().take(60).collect::<String>())
        }
        Some(value) => format!("{value:?}"),
        None => String::new(),
    }
}
