//! From a configuration to loaded models, with progress on the terminal.

use std::path::PathBuf;
use std::sync::Arc;

use hearth_kernels::Pool;
use hearth_models::weights::Mix;
use hearth_models::{Compute, ModelFile};
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;
use crate::config::Config;
use crate::engine::handle::Limits;
use crate::registry::hub::{self, Bars, HubOptions};
use crate::registry::source::ModelSource;
use crate::registry::{
    self, LoadError, LoadOptions, OpenModel, Registry, ServedModel, builtin, plan,
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
}

/// Opens every model and divides the memory among them; loads nothing.
pub(super) fn open(config: &Config, compute: &Compute) -> Result<Opened, Failure> {
    let mut models = Vec::new();
    for (index, name) in names(config)?.iter().enumerate() {
        let source = ModelSource::parse(name)?;
        // A folder of the hub's cache is named after a commit: nobody would ask for that.
        let hub_name = matches!(source, ModelSource::Hub(_)).then(|| name.clone());
        let alias = config.aliases.get(index).cloned().or(hub_name);
        models.push((alias, registry::open(opened(source, config.quantize)?)?));
    }
    let demands: Vec<_> = models.iter().map(|(_, model)| model.demand(compute)).collect();
    let limits = plan::plan(&demands, &config.plan, plan::free_bytes())?;
    Ok(Opened { models, limits })
}

impl Opened {
    /// What was opened, with its bounds.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&OpenModel, &Limits)> {
        self.models.iter().map(|(_, model)| model).zip(&self.limits)
    }
}

/// Loads every model of the configuration.
pub(super) fn models(config: &Config) -> Result<Registry, Failure> {
    let compute = compute(config)?;
    let opened = open(config, &compute)?;
    let mut served: Vec<ServedModel> = Vec::new();
    for ((alias, model), limits) in opened.models.into_iter().zip(opened.limits) {
        let id = alias.unwrap_or_else(|| model.name());
        if served.iter().any(|m| m.id() == id) {
            return Err(format!("two models would be served as `{id}`; use --alias").into());
        }
        served.push(load(model, id, limits, &compute, config)?);
    }
    let aliases = config.model_aliases.clone();
    Ok(Registry::new(served).with_aliases(aliases).map_err(|e| format!("--model-alias: {e}"))?)
}

/// What to load: what the configuration names, or else the model that the binary carries.
pub(super) fn names(config: &Config) -> Result<Vec<String>, Failure> {
    match (config.models.is_empty(), builtin::bytes()) {
        (false, _) => Ok(config.models.clone()),
        (true, Some(_)) => Ok(vec![builtin::NAME.to_owned()]),
        (true, None) => Err(NO_BUILTIN.into()),
    }
}

/// Threads and device.
pub(super) fn compute(config: &Config) -> Result<Compute, Failure> {
    let pool = Arc::new(Pool::new(config.threads));
    Compute::parse(&config.device, &pool).map_err(|e| format!("--device: {e}").into())
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

/// Opens a model, wherever it comes from, to be quantised while it is loaded if so asked.
pub(super) fn opened(source: ModelSource, mix: Option<Mix>) -> Result<ModelFile, Failure> {
    let file = match source {
        ModelSource::Builtin => builtin::open().ok_or(NO_BUILTIN)??,
        source => {
            let path = path_of(source)?;
            hearth_models::open(&path).map_err(|source| LoadError::Model { path, source })?
        }
    };
    match mix {
        None => Ok(file),
        Some(mix) => file.quantized(mix).map_err(|e| format!("--quantize: {e}").into()),
    }
}

/// [`opened`] what the operator wrote.
pub(super) fn named(name: &str, mix: Option<Mix>) -> Result<ModelFile, Failure> {
    opened(ModelSource::parse(name)?, mix)
}

fn load(
    model: OpenModel,
    id: String,
    limits: Limits,
    compute: &Compute,
    config: &Config,
) -> Result<ServedModel, Failure> {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("  loading {bar:32} {bytes}/{total_bytes} {eta}");
    bar.set_style(style.expect("the template is fixed; this is a bug"));
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let options = LoadOptions {
        id,
        compute: compute.clone(),
        limits,
        kv_dtype: config.plan.kv_dtype,
        progress: &mut progress,
    };
    let model = model.load(options);
    bar.finish_and_clear();
    Ok(model?)
}
