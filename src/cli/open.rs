//! From a configuration to loaded models, with progress on the terminal.

use std::path::PathBuf;
use std::sync::Arc;

use hearth_kernels::Pool;
use hearth_models::{Compute, ModelFile};
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;
use crate::config::Config;
use crate::registry::hub::{self, Bars, HubOptions};
use crate::registry::source::ModelSource;
use crate::registry::{self, LoadOptions, Registry, ServedModel, builtin, plan};

const NO_BUILTIN: &str = "this build carries no model (feature `builtin-model`); name one:\n  \
    --model path/to/model.gguf      a GGUF file\n  \
    --model path/to/folder          config.json, tokenizer.json and *.safetensors\n  \
    --model org/name:Q4_K_M         from the Hugging Face hub";

/// Loads every model of the configuration.
pub(super) fn models(config: &Config) -> Result<Registry, Failure> {
    let names = names(config)?;
    let compute = compute(config)?;
    let mut served: Vec<ServedModel> = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let source = ModelSource::parse(name)?;
        // A folder of the hub's cache is named after a commit: nobody would ask for that.
        let hub_name = matches!(source, ModelSource::Hub(_)).then(|| name.clone());
        let alias = config.aliases.get(index).cloned().or(hub_name);
        // KV of earlier models is promised, and free memory until it is used; what is left is
        // divided evenly among the models still to come.
        let promised: u64 = served.iter().map(ServedModel::kv_bytes).sum();
        let left = (names.len() - index) as u64;
        let free_bytes = plan::free_bytes().saturating_sub(promised) / left;
        let model = load(&opened(source)?, alias, &compute, config, free_bytes)?;
        if served.iter().any(|m| m.id() == model.id()) {
            let id = model.id();
            return Err(format!("two models would be served as `{id}`; use --alias").into());
        }
        served.push(model);
    }
    Ok(Registry::new(served))
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
    Ok(Compute::parse(&config.device, &pool)?)
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

/// Opens a model, wherever it comes from.
pub(super) fn opened(source: ModelSource) -> Result<ModelFile, Failure> {
    match source {
        ModelSource::Builtin => Ok(builtin::open().ok_or(NO_BUILTIN)??),
        source => {
            let path = path_of(source)?;
            hearth_models::open(&path).map_err(|e| format!("{}: {e}", path.display()).into())
        }
    }
}

/// [`opened`] what the operator wrote.
pub(super) fn named(name: &str) -> Result<ModelFile, Failure> {
    opened(ModelSource::parse(name)?)
}

fn load(
    file: &ModelFile,
    alias: Option<String>,
    compute: &Compute,
    config: &Config,
    free_bytes: u64,
) -> Result<ServedModel, Failure> {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("  loading {bar:32} {bytes}/{total_bytes} {eta}");
    bar.set_style(style.expect("the template is fixed; this is a bug"));
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let options = LoadOptions {
        alias,
        compute: compute.clone(),
        plan: config.plan,
        free_bytes,
        progress: &mut progress,
    };
    let model = registry::load_file(file, options);
    bar.finish_and_clear();
    Ok(model?)
}
