//! From a configuration to loaded models, with progress on the terminal.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use hearth_kernels::Pool;
use hearth_models::weights::Mix;
use hearth_models::{AnyFile, Compute, ModelFile};
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;
use crate::config::Config;
use crate::embeddings::{Bounds, EmbeddingModel};
use crate::engine::handle::Limits;
use crate::registry::hub::{self, Bars, HubOptions};
use crate::registry::source::ModelSource;
use crate::registry::{
    self, LoadError, LoadOptions, OpenEmbedding, OpenModel, Registry, ServedModel, builtin, plan,
};

pub(super) const NO_BUILTIN: &str = "this build carries no model (feature `builtin-model`); \
    name one:\n  \
    --model path/to/model.gguf      a GGUF file\n  \
    --model path/to/folder          config.json, tokenizer.json and *.safetensors\n  \
    --model org/name:Q4_K_M         from the Hugging Face hub";

/// Models of the configuration, opened, with the ids under which they will be served.
pub(super) struct Opened {
    models: Vec<(Option<String>, OpenModel)>,
    limits: Vec<Limits>,
    embedders: Vec<(Option<String>, OpenEmbedding)>,
}

/// Opens every model and divides the memory among them; loads nothing.
pub(super) fn open(config: &Config, compute: &Compute) -> Result<Opened, Failure> {
    let (mut models, mut embedders) = (Vec::new(), Vec::new());
    for (index, name) in names(config)?.iter().enumerate() {
        let source = ModelSource::parse(name)?;
        // A folder of the hub's cache is named after a commit: nobody would ask for that.
        let hub_name = matches!(source, ModelSource::Hub(_)).then(|| name.clone());
        let alias = config.aliases.get(index).cloned().or(hub_name);
        match any(source)? {
            AnyFile::Decoder(file) => {
                let file = as_asked(file, config.quantize)?;
                models.push((alias, registry::open(file)?));
            }
            AnyFile::Encoder(file) => embedders.push((alias, OpenEmbedding::new(file)?)),
        }
    }
    let taken: u64 = embedders.iter().map(|(_, model)| model.weight_bytes(compute)).sum();
    let free = plan::free_bytes().map(|free| free.saturating_sub(taken));
    let demands: Vec<_> = models.iter().map(|(_, model)| model.demand(compute)).collect();
    let limits = plan::plan(&demands, &config.plan, free)?;
    Ok(Opened { models, limits, embedders })
}

impl Opened {
    /// What was opened, with its bounds.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&OpenModel, &Limits)> {
        self.models.iter().map(|(_, model)| model).zip(&self.limits)
    }

    /// The encoders among it.
    pub(super) fn embedders(&self) -> impl Iterator<Item = &OpenEmbedding> {
        self.embedders.iter().map(|(_, model)| model)
    }
}

/// Loads every model of the configuration.
pub(super) fn models(config: &Config) -> Result<Registry, Failure> {
    let compute = compute(config)?;
    let opened = open(config, &compute)?;
    let mut ids = HashSet::new();
    let mut once = |id: String| match ids.insert(id.clone()) {
        true => Ok(id),
        false => Err(format!("two models would be served as `{id}`; use --alias")),
    };
    let mut served: Vec<ServedModel> = Vec::new();
    for ((alias, model), limits) in opened.models.into_iter().zip(opened.limits) {
        let id = once(alias.unwrap_or_else(|| model.name()))?;
        served.push(load(model, id, limits, &compute, config)?);
    }
    let mut embedders: Vec<EmbeddingModel> = Vec::new();
    let bounds =
        Bounds { queue_len: config.plan.queue_len, batch_tokens: config.plan.batch_tokens };
    for (alias, model) in opened.embedders {
        let id = once(alias.unwrap_or_else(|| model.name()))?;
        let loaded = with_bar(|progress| model.load(id, &compute, bounds, progress));
        embedders.push(loaded?);
    }
    let registry = Registry::new(served).with_embedders(embedders);
    let aliases = config.model_aliases.clone();
    Ok(registry.with_aliases(aliases).map_err(|e| format!("--model-alias: {e}"))?)
}

/// What to load: what the configuration names, or else the model that the binary carries.
pub(super) fn names(config: &Config) -> Result<Vec<String>, Failure> {
    match (config.models.is_empty(), builtin::bytes()) {
        (false, _) => Ok(config.models.clone()),
        (true, Some(_)) => Ok(vec![builtin::NAME.to_owned()]),
        (true, None) => Err(NO_BUILTIN.into()),
    }
}

/// Threads and device, which stores K and V as was asked.
pub(super) fn compute(config: &Config) -> Result<Compute, Failure> {
    let pool = Arc::new(Pool::new(config.threads));
    let compute = Compute::parse(&config.device, &pool).map_err(|e| format!("--device: {e}"))?;
    compute.check_kv(config.plan.kv_dtype).map_err(|e| format!("--kv-dtype: {e}"))?;
    Ok(compute)
}

/// Where the files of a model lie; fetches them first when it is a hub id.
pub(super) fn path_of(source: ModelSource) -> Result<PathBuf, Failure> {
    match source {
        ModelSource::Path(path) => Ok(path),
        ModelSource::Hub(id) => {
            Ok(hub::resolve(&id, &HubOptions::from_env(), &mut Bars::default())?)
        }
        ModelSource::Builtin => Err("the built-in model is not a file".into()),
    }
}

/// Opens a model of any kind, wherever it comes from.
fn any(source: ModelSource) -> Result<AnyFile, Failure> {
    match source {
        ModelSource::Builtin => opened(source).map(AnyFile::Decoder),
        source => {
            let path = path_of(source)?;
            hearth_models::open_any(&path)
                .map_err(|source| LoadError::Model { path, source }.into())
        }
    }
}

/// Opens a language model, wherever it comes from.
fn opened(source: ModelSource) -> Result<ModelFile, Failure> {
    match source {
        ModelSource::Builtin => Ok(builtin::open().ok_or(NO_BUILTIN)??),
        source => {
            let path = path_of(source)?;
            hearth_models::open(&path).map_err(|source| LoadError::Model { path, source }.into())
        }
    }
}

/// To be quantised while it is loaded, if so asked.
fn as_asked(file: ModelFile, mix: Option<Mix>) -> Result<ModelFile, Failure> {
    match mix {
        None => Ok(file),
        Some(mix) => file.quantized(mix).map_err(|e| format!("--quantize: {e}").into()),
    }
}

/// The language model that the operator wrote.
pub(super) fn named(name: &str, mix: Option<Mix>) -> Result<ModelFile, Failure> {
    as_asked(opened(ModelSource::parse(name)?)?, mix)
}

fn load(
    model: OpenModel,
    id: String,
    limits: Limits,
    compute: &Compute,
    config: &Config,
) -> Result<ServedModel, Failure> {
    let (compute, kv_dtype) = (compute.clone(), config.plan.kv_dtype);
    let loaded =
        with_bar(|progress| model.load(LoadOptions { id, compute, limits, kv_dtype, progress }));
    Ok(loaded?)
}

/// Calls `load` with something that moves a bar on the terminal.
fn with_bar<T>(load: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("  loading {bar:32} {bytes}/{total_bytes} {eta}");
    bar.set_style(style.expect("the template is fixed; this is a bug"));
    let loaded = load(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    loaded
}
