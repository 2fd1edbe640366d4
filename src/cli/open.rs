//! From a configuration to models: what is offered, and what is loaded at the start, with progress
//! on the terminal.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use hearth_kernels::Pool;
use hearth_models::weights::Mix;
use hearth_models::{Adapter, Compute, ModelFile};
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;
use crate::config::{Config, Speculate};
use crate::registry::hub::{self, Bars, HubOptions};
use crate::registry::offer::{self, Offered, Opened, Place, Refused, Terms, Wanted};
use crate::registry::source::ModelSource;
use crate::registry::{Bounds, LoadError, Registry, builtin, plan, watch};
use crate::shelf::Shelf;

pub(super) const NO_BUILTIN: &str = "this build carries no model (feature `builtin-model`); \
    name one:\n  \
    --model path/to/model.gguf      a GGUF file\n  \
    --model path/to/folder          config.json, tokenizer.json and *.safetensors\n  \
    --model org/name:Q4_K_M         from the Hugging Face hub";

/// What a configuration offers.
pub(super) struct Offer {
    /// Models that can be served, those that were named before those of the folder.
    pub models: Vec<Planned>,
    /// Ids of models in the folder that cannot, and why.
    pub refused: Vec<(String, String)>,
    /// What models may take together.
    pub budget_bytes: Option<u64>,
}

/// A model, and when it is loaded.
pub(super) struct Planned {
    pub offered: Offered,
    pub at_start: bool,
    pub pinned: bool,
}

impl Planned {
    pub(super) fn when(&self) -> &'static str {
        match (self.pinned, self.at_start) {
            (true, _) => "pinned",
            (false, true) => "loaded at the start",
            (false, false) => "loaded on demand",
        }
    }
}

/// Opens every model, divides the memory among them, and says which are loaded at the start: those
/// that are pinned, and of those that were named as many as fit beside each other. Loads nothing.
pub(super) fn offer(
    config: &Config,
    compute: &Compute,
    hub: &HubOptions,
    shelf: Option<Arc<Shelf>>,
) -> Result<Offer, Failure> {
    let budget_bytes = config.memory.budget_bytes.or_else(|| plan::budget(compute));
    let (plan, mix) = (config.plan, config.quantize);
    let lookup = config.speculate == Speculate::Ngram;
    let draft = match &config.speculate {
        Speculate::Draft(name) => Some(place(ModelSource::parse(name)?, hub)?),
        Speculate::Off | Speculate::Ngram => None,
    };
    let compute = compute.clone();
    let terms = Terms { compute, plan, mix, lookup, draft, budget_bytes, shelf };
    let mut wanted = named_models(config, hub)?;
    let named = wanted.len();
    wanted.extend(models_of_folder(config, &wanted)?);
    if wanted.is_empty() {
        return Err("--models-dir: there is no model in that folder".into());
    }
    let (mut offered, mut refused, mut ids) = (Vec::new(), Vec::new(), HashSet::new());
    for (index, one) in offer::offer(wanted, &terms).into_iter().enumerate() {
        let was_named = index < named;
        match one {
            Ok(one) if !ids.insert(one.id.clone()) => {
                if was_named {
                    let id = one.id;
                    return Err(format!("two models would be served as `{id}`; use --alias").into());
                }
            }
            Ok(one) => match one.never_fits() {
                Some((needed, budget)) => {
                    let why = too_large(&one.id, needed, budget);
                    if was_named {
                        return Err(why.into());
                    }
                    refused.push((one.id, why));
                }
                None => offered.push((was_named, one)),
            },
            Err(Refused { error, .. }) if was_named => return Err(error.into()),
            Err(Refused { id, error }) => {
                if ids.insert(id.clone()) {
                    let why = format!("The model `{id}` cannot be served: {error}.");
                    refused.push((id, why));
                }
            }
        }
    }
    let writes = |(_, one): &&(bool, Offered)| matches!(one.opened, Opened::Text(_));
    let count = offered.iter().filter(writes).count();
    if matches!(config.speculate, Speculate::Draft(_)) && count != 1 {
        let text = format!("--draft-model guesses for one language model, and {count} are offered");
        return Err(text.into());
    }
    let models = at_start(config, offered, budget_bytes)?;
    Ok(Offer { models, refused, budget_bytes })
}

fn too_large(id: &str, needed: u64, budget: u64) -> String {
    let (needed, budget) = (needed.div_ceil(1 << 20), budget >> 20);
    format!("The model `{id}` needs {needed} MB, more than the memory budget of {budget} MB.")
}

/// Pinned ones have their place in any case.
fn at_start(
    config: &Config,
    offered: Vec<(bool, Offered)>,
    budget_bytes: Option<u64>,
) -> Result<Vec<Planned>, Failure> {
    let pins = &config.memory.pins;
    if let Some(pin) = pins.iter().find(|pin| offered.iter().all(|(_, one)| one.id != **pin)) {
        return Err(format!("--pin: `{pin}` is not the id of a model that is offered").into());
    }
    let is_pinned = |one: &Offered| pins.contains(&one.id);
    let pinned: u64 = offered.iter().filter(|(_, o)| is_pinned(o)).map(|(_, o)| o.bytes).sum();
    let mut free = budget_bytes.unwrap_or(u64::MAX).checked_sub(pinned).ok_or_else(|| {
        let budget = budget_bytes.unwrap_or(u64::MAX) >> 20;
        let pinned = pinned.div_ceil(1 << 20);
        format!("--pin: these models need {pinned} MB, more than the memory budget of {budget} MB")
    })?;
    let plan = |(named, offered): (bool, Offered)| {
        let pinned = is_pinned(&offered);
        let fits = named && !pinned && offered.bytes <= free;
        free -= if fits { offered.bytes } else { 0 };
        Planned { offered, at_start: pinned || fits, pinned }
    };
    Ok(offered.into_iter().map(plan).collect())
}

/// The models that the configuration names, or else the one that the binary carries.
fn named_models(config: &Config, hub: &HubOptions) -> Result<Vec<Wanted>, Failure> {
    let wanted = |(index, name): (usize, &String)| {
        let source = ModelSource::parse(name)?;
        // A folder of the hub's cache is named after a commit: nobody would ask for that.
        let hub_name = matches!(source, ModelSource::Hub(_)).then(|| name.clone());
        let id = config.aliases.get(index).cloned().or(hub_name);
        Ok(Wanted { id, place: place(source, hub)? })
    };
    names(config)?.iter().enumerate().map(wanted).collect()
}

fn place(source: ModelSource, hub: &HubOptions) -> Result<Place, Failure> {
    Ok(match source {
        ModelSource::Builtin => Place::Builtin,
        source => Place::Path(path_of(source, hub)?),
    })
}

/// The models of the folder, those left out that were named.
fn models_of_folder(config: &Config, named: &[Wanted]) -> Result<Vec<Wanted>, Failure> {
    let Some(folder) = &config.memory.models_dir else { return Ok(Vec::new()) };
    let found = offer::models_in(folder);
    let mut found = found.map_err(|e| format!("--models-dir: {}: {e}", folder.display()))?;
    let whole = |path: &PathBuf| path.canonicalize().ok();
    let is_named = |path: &PathBuf| {
        named.iter().any(|w| matches!(&w.place, Place::Path(own) if whole(own) == whole(path)))
    };
    found.retain(|path| !is_named(path));
    Ok(found.into_iter().map(|path| Wanted { id: None, place: Place::Path(path) }).collect())
}

/// A registry of everything that is offered, with what belongs there at the start loaded.
pub(super) fn models(config: &Config) -> Result<Registry, Failure> {
    serve(config, offer(config, &compute(config)?, &HubOptions::from_env(), None)?)
}

/// The same of what was offered already.
pub(super) fn serve(config: &Config, offer: Offer) -> Result<Registry, Failure> {
    let bounds = Bounds {
        budget_bytes: offer.budget_bytes,
        queue_len: config.plan.queue_len,
        queue_timeout: config.plan.queue_timeout,
        keep_alive: config.memory.keep_alive,
    };
    let first = offer.models.iter().filter(|planned| planned.at_start);
    let first: Vec<String> = first.map(|planned| planned.offered.id.clone()).collect();
    let entry = |planned: Planned| planned.offered.entry(planned.pinned, planned.at_start);
    let registry = Registry::new(offer.models.into_iter().map(entry).collect(), bounds)?;
    let registry = registry.with_refused(offer.refused);
    let aliases = config.model_aliases.clone();
    let registry = registry.with_aliases(aliases).map_err(|e| format!("--model-alias: {e}"))?;
    let registry = with_loras(registry, config)?;
    for id in first {
        with_bar(|progress| registry.load_blocking(&id, progress))?;
    }
    Ok(registry)
}

/// The adapters that are named. What is not there is told now, what is in it when it is read.
fn with_loras(registry: Registry, config: &Config) -> Result<Registry, Failure> {
    let loras = config.loras.clone();
    for (_, id, path) in &loras {
        Adapter::is_at(path).map_err(|e| format!("--lora: {id}: {}: {e}", path.display()))?;
    }
    let registry = registry.with_adapters(config.lora_bytes, loras);
    registry.map_err(|e| format!("--lora: {e}").into())
}

/// Folders of adapters, whose adapters are registered now and followed from then on.
pub(super) fn watch_loras(registry: &Arc<Registry>, config: &Config) -> Result<(), Failure> {
    let open = |(base, dir): &(Option<String>, PathBuf)| {
        let watched = registry.folder_of_adapters(base.as_deref(), dir.clone());
        watched.map_err(|e| format!("--lora-dir: {}: {e}", dir.display()))
    };
    let folders = config.lora_dirs.iter().map(open).collect::<Result<_, _>>()?;
    Ok(watch::watch(registry, folders)?)
}

/// What is named: by the configuration, or where it names nothing, not even a folder, the model
/// that the binary carries.
pub(super) fn names(config: &Config) -> Result<Vec<String>, Failure> {
    match (config.models.is_empty(), builtin::bytes()) {
        (true, _) if config.memory.models_dir.is_some() => Ok(Vec::new()),
        (false, _) => Ok(config.models.clone()),
        (true, Some(_)) => Ok(vec![builtin::NAME.to_owned()]),
        (true, None) => Err(NO_BUILTIN.into()),
    }
}

/// Threads and devices, which store K and V as was asked.
pub(super) fn compute(config: &Config) -> Result<Compute, Failure> {
    let pool = Arc::new(Pool::new(config.threads));
    let compute = Compute::parse(&config.device, &pool).map_err(|e| format!("--device: {e}"))?;
    let compute = compute.divided(config.tensor_parallel);
    let compute = compute.map_err(|e| format!("--tensor-parallel: {e}"))?;
    compute.check_kv(config.plan.kv_dtype).map_err(|e| format!("--kv-dtype: {e}"))?;
    if config.plan.kv_prefault {
        compute.check_kv_prefault().map_err(|e| format!("--kv-prefault: {e}"))?;
    }
    Ok(compute)
}

/// Takes the folder for keys and values into use, where there is one and blocks leave the device.
pub(super) fn shelf(
    config: &Config,
    compute: &Compute,
    realm: String,
) -> Result<Option<Arc<Shelf>>, Failure> {
    let Some((folder, bytes_max)) = &config.kv_store else { return Ok(None) };
    compute.check_kv_leaves().map_err(|e| format!("--kv-store: {e}"))?;
    let shelf = Shelf::open(folder, *bytes_max, realm).map_err(|e| format!("--kv-store: {e}"))?;
    Ok(Some(Arc::new(shelf)))
}

/// Where the files of a model lie; fetches them first when it is a hub id.
pub(super) fn path_of(source: ModelSource, hub: &HubOptions) -> Result<PathBuf, Failure> {
    match source {
        ModelSource::Path(path) => Ok(path),
        ModelSource::Hub(id) => Ok(hub::resolve(&id, hub, &mut Bars::default())?),
        ModelSource::Builtin => Err("the built-in model is not a file".into()),
    }
}

/// The language model that the operator wrote, opened, to be quantised while it is loaded.
pub(super) fn named(name: &str, mix: Option<Mix>) -> Result<ModelFile, Failure> {
    let file = match ModelSource::parse(name)? {
        ModelSource::Builtin => builtin::open().ok_or(NO_BUILTIN)??,
        source => {
            let path = path_of(source, &HubOptions::from_env())?;
            hearth_models::open(&path).map_err(|source| LoadError::Model { path, source })?
        }
    };
    match mix {
        None => Ok(file),
        Some(mix) => file.quantized(mix).map_err(|e| format!("--quantize: {e}").into()),
    }
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
