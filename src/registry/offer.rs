//! From a configuration to what can be served: models named one by one and models found in a
//! folder, opened, understood and planned, none of them loaded.
//!
//! A model is opened to learn what it needs and closed again; [`Offered::entry`] keeps the way back
//! to its files, so that it can be loaded at any time, and any number of times.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hearth_models::weights::Mix;
use hearth_models::{AnyFile, Compute};

use super::load::name_of;
use super::plan::{self, Demand};
use super::{
    Card, Details, Entry, Kind, LoadError, LoadOptions, Loaded, OpenEmbedding, OpenModel, builtin,
    load,
};
use crate::config::PlanOptions;
use crate::embeddings::Bounds;
use crate::engine::handle::{Limits, Speculation};
use crate::shelf::Shelf;
use crate::types::unix_now_s;

/// Where the files of a model are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file or a folder.
    Path(PathBuf),
    /// This program.
    Builtin,
}

/// A model that somebody wants to be served.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The id to serve it under; `None`: its own name.
    pub id: Option<String>,
    /// Where it is.
    pub place: Place,
}

/// A model, opened.
pub enum Opened {
    /// It generates text.
    Text(Box<OpenModel>),
    /// It embeds.
    Embedding(Box<OpenEmbedding>),
}

/// How models are opened, planned and loaded.
#[derive(Clone)]
pub struct Terms {
    /// Where to compute.
    pub compute: Compute,
    /// What holds for every engine.
    pub plan: PlanOptions,
    /// Weights in floats are quantised to these types.
    pub mix: Option<Mix>,
    /// Answers are read for what they quote.
    pub lookup: bool,
    /// The model that guesses for those that generate text.
    pub draft: Option<Place>,
    /// Bytes that models may take together; `None` where nothing is known.
    pub budget_bytes: Option<u64>,
    /// Where blocks of keys and values go that memory has no room for.
    pub shelf: Option<Arc<Shelf>>,
}

/// A model that can be served: what it is, and what it takes.
pub struct Offered {
    /// What it is served under.
    pub id: String,
    /// As it was opened.
    pub opened: Opened,
    /// What it does.
    pub kind: Kind,
    /// Its bounds.
    pub bounds: ModelBounds,
    /// What it takes in memory at most, with the model that guesses for it.
    pub bytes: u64,
    draft: Option<OpenModel>,
    place: Place,
    terms: Terms,
}

/// Bounds of a model of either kind.
#[derive(Clone, Debug)]
pub enum ModelBounds {
    /// Of an engine.
    Text(Limits),
    /// Of an encoder.
    Embedding(Bounds),
}

/// A model that cannot be served.
#[derive(Debug)]
pub struct Refused {
    /// What it would have been served under.
    pub id: String,
    /// Why not.
    pub error: Box<LoadError>,
}

/// How far a load has come, in bytes.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// Bytes loaded.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Bytes in all; 0 before anything is known.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    fn set(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }
}

/// The models in a folder: `.gguf` files (of a split one the first part), and folders with a
/// `config.json`; by name, hidden ones left out.
pub fn models_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let is_model = |path: &Path| {
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let later_part = || {
            let stem = name.strip_suffix(".gguf").and_then(|stem| stem.rsplit_once("-of-"));
            let number = stem.and_then(|(first, _)| first.rsplit_once('-')).map(|(_, n)| n);
            let digits = |n: &&str| n.len() == 5 && n.bytes().all(|b| b.is_ascii_digit());
            number.filter(digits).is_some_and(|n| n != "00001")
        };
        match path.is_dir() {
            _ if name.starts_with('.') => false,
            true => path.join("config.json").is_file(),
            false => name.ends_with(".gguf") && !later_part(),
        }
    };
    let mut found = Vec::new();
    for item in fs::read_dir(folder)? {
        found.extend(Some(item?.path()).filter(|path| is_model(path)));
    }
    found.sort();
    Ok(found)
}

impl Place {
    /// What errors call it.
    fn path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Builtin => PathBuf::from(builtin::NAME),
        }
    }

    /// Opens what is there and understands it; loads nothing.
    pub fn open(&self, mix: Option<Mix>) -> Result<Opened, LoadError> {
        let file = match self {
            Self::Path(path) => hearth_models::open_any(path)
                .map_err(|source| LoadError::Model { path: path.clone(), source })?,
            Self::Builtin => {
                let path = || PathBuf::from(builtin::NAME);
                let what = "this build carries no model (feature `builtin-model`)".to_owned();
                let file = builtin::open().ok_or(LoadError::File { path: path(), what })?;
                let file = file.map_err(|source| LoadError::Model { path: path(), source })?;
                AnyFile::Decoder(file)
            }
        };
        match (file, mix) {
            (AnyFile::Encoder(file), _) => {
                OpenEmbedding::new(file).map(Box::new).map(Opened::Embedding)
            }
            (AnyFile::Decoder(file), None) => load::open(file).map(Box::new).map(Opened::Text),
            (AnyFile::Decoder(file), Some(mix)) => {
                let path = file.path().to_owned();
                let file = file
                    .quantized(mix)
                    .map_err(|e| LoadError::File { path, what: format!("--quantize: {e}") })?;
                load::open(file).map(Box::new).map(Opened::Text)
            }
        }
    }
}

impl Terms {
    /// The model that guesses for this one, opened. Their tokens are the same.
    fn draft_of(&self, opened: &Opened) -> Result<Option<OpenModel>, LoadError> {
        let (Some(place), Opened::Text(model)) = (&self.draft, opened) else { return Ok(None) };
        match place.open(self.mix)? {
            Opened::Text(draft) => {
                draft.check(&self.compute)?;
                draft.check_draft_of(model, &self.compute)?;
                Ok(Some(*draft))
            }
            Opened::Embedding(_) => {
                let what = "it embeds; a draft model generates text".to_owned();
                Err(LoadError::File { path: place.path(), what })
            }
        }
    }
}

impl Opened {
    /// The file's or folder's name, without the ending of a weight file.
    pub fn name(&self) -> String {
        match self {
            Self::Text(model) => model.name(),
            Self::Embedding(model) => model.name(),
        }
    }

    /// What its weights take.
    pub fn weight_bytes(&self, compute: &Compute) -> u64 {
        match self {
            Self::Text(model) => model.demand(compute).weight_bytes,
            Self::Embedding(model) => model.weight_bytes(compute),
        }
    }

    fn details(&self, mix: Option<Mix>) -> Details {
        match self {
            Self::Text(model) => model.details(mix),
            Self::Embedding(model) => Details::of_encoder(model.file()),
        }
    }

    fn demand(&self, compute: &Compute) -> Option<Demand<'_>> {
        match self {
            Self::Text(model) => Some(model.demand(compute)),
            Self::Embedding(_) => None,
        }
    }
}

/// What comes of models that are wanted, in their order: an offer, or an id and why not.
pub fn offer(wanted: Vec<Wanted>, terms: &Terms) -> Vec<Result<Offered, Refused>> {
    let open = |Wanted { id, place }: Wanted| {
        let name = || match &place {
            Place::Path(path) => name_of(path),
            Place::Builtin => builtin::NAME.to_owned(),
        };
        let opened = place.open(terms.mix).and_then(|opened| {
            if let Opened::Text(model) = &opened {
                model.check(&terms.compute)?;
            }
            Ok((terms.draft_of(&opened)?, opened))
        });
        match opened {
            Ok((draft, opened)) => Ok((id.unwrap_or_else(|| opened.name()), place, opened, draft)),
            Err(error) => Err(Refused { id: id.unwrap_or_else(name), error: Box::new(error) }),
        }
    };
    let opened: Vec<_> = wanted.into_iter().map(open).collect();
    let (compute, batch_tokens) = (&terms.compute, terms.plan.batch_tokens);
    let bounds = Bounds { queue_len: terms.plan.queue_len, batch_tokens };
    let encoder_bytes = |opened: &Opened| match opened {
        Opened::Text(_) => 0,
        Opened::Embedding(model) => {
            let rows = batch_tokens.max(model.file().config().context_len);
            plan::encoder_bytes(model.file().config(), model.weight_bytes(compute), rows)
        }
    };
    let whole = || opened.iter().flatten().map(|(_, _, opened, draft)| (opened, draft));
    let others = whole().map(|(opened, _)| encoder_bytes(opened)).sum();
    let demands = whole().filter_map(|(opened, draft)| {
        let draft = draft.as_ref().map(|draft| draft.demand(compute));
        let draft = draft.map(|draft| (draft.config, draft.weight_bytes));
        Some(Demand { draft, ..opened.demand(compute)? })
    });
    let demands: Vec<_> = demands.collect();
    let kv_dtype = compute.kv_room(terms.plan.kv_dtype);
    let options = PlanOptions { kv_dtype, ..terms.plan };
    let limits = plan::plan(&demands, &options, terms.budget_bytes, others);
    let bytes = |(demand, limits): (&Demand<'_>, Result<Limits, _>)| {
        limits.map(|limits| (plan::bytes(demand, &options, &limits), limits))
    };
    let mut planned = demands.iter().zip(limits).map(bytes).collect::<Vec<_>>().into_iter();
    let finish = |one: Result<(String, Place, Opened, Option<OpenModel>), _>| {
        let (id, place, opened, draft) = one?;
        let (bytes, kind, bounds) = match &opened {
            Opened::Embedding(model) => {
                let vector_len = model.file().config().hidden_len;
                let kind = Kind::Embedding { context_len: model.context_len(), vector_len };
                (encoder_bytes(&opened), kind, ModelBounds::Embedding(bounds))
            }
            Opened::Text(_) => match planned.next().expect("one for each; this is a bug") {
                Ok((bytes, limits)) => {
                    let kind = Kind::Text { context_len: limits.context_len };
                    (bytes, kind, ModelBounds::Text(limits))
                }
                Err(error) => return Err(Refused { id, error: Box::new(error.into()) }),
            },
        };
        Ok(Offered { id, opened, kind, bounds, bytes, draft, place, terms: terms.clone() })
    };
    opened.into_iter().map(finish).collect()
}

impl Offered {
    /// What it needs and what there is, where the first is more.
    pub fn never_fits(&self) -> Option<(u64, u64)> {
        let budget = self.terms.budget_bytes?;
        (self.bytes > budget).then_some((self.bytes, budget))
    }

    /// The model as the registry wants it. What is about to be loaded is kept open until then; the
    /// files of the others are closed.
    pub fn entry(self, pinned: bool, keep_open: bool) -> Entry {
        let details = Arc::new(self.opened.details(self.terms.mix));
        let (id, kind) = (self.id.clone(), self.kind);
        let card = Card { id, created_s: unix_now_s(), kind, details };
        let (bytes, progress) = (self.bytes, Arc::<Progress>::default());
        let told = Arc::clone(&progress);
        let recipe = Recipe {
            weight_bytes: self.opened.weight_bytes(&self.terms.compute),
            draft_bytes: weight_bytes(self.draft.as_ref(), &self.terms.compute),
            vocab_len: self.opened.demand(&self.terms.compute).map(|demand| demand.vocab_len),
            id: self.id,
            place: self.place,
            bounds: self.bounds,
            terms: self.terms,
            opened: Mutex::new(keep_open.then_some(self.opened)),
        };
        let load = Box::new(move || recipe.load(&told));
        Entry { card, bytes, pinned, loaded: None, load: Some(load), progress }
    }
}

/// What it takes to load a model again and again.
struct Recipe {
    id: String,
    place: Place,
    bounds: ModelBounds,
    terms: Terms,
    /// As it was when the memory was divided.
    weight_bytes: u64,
    draft_bytes: u64,
    vocab_len: Option<usize>,
    /// For the first time.
    opened: Mutex<Option<Opened>>,
}

impl Recipe {
    fn load(&self, progress: &Progress) -> Result<Loaded, LoadError> {
        progress.set(0, 0);
        let first = self.opened.lock().unwrap_or_else(PoisonError::into_inner).take();
        let opened = first.map_or_else(|| self.place.open(self.terms.mix), Ok)?;
        let draft = self.terms.draft_of(&opened)?;
        let (compute, progress) = (&self.terms.compute, &mut |done, all| progress.set(done, all));
        let vocab_len = opened.demand(compute).map(|demand| demand.vocab_len);
        let same = opened.weight_bytes(compute) == self.weight_bytes
            && weight_bytes(draft.as_ref(), compute) == self.draft_bytes
            && vocab_len == self.vocab_len;
        match (opened, &self.bounds) {
            (Opened::Text(model), ModelBounds::Text(limits)) if same => {
                let draft = draft.map(|draft| {
                    let limits = plan::draft_limits(draft.file().config(), limits);
                    draft.load_draft(compute, limits, progress)
                });
                let (lookup, draft) = (self.terms.lookup, draft.transpose()?);
                let options = LoadOptions {
                    id: self.id.clone(),
                    compute: compute.clone(),
                    limits: limits.clone(),
                    kv_dtype: self.terms.plan.kv_dtype,
                    speculation: Speculation { lookup, draft, price: None },
                    shelf: self.terms.shelf.clone(),
                    progress,
                };
                model.load(options).map(Loaded::from)
            }
            (Opened::Embedding(model), ModelBounds::Embedding(bounds)) if same => {
                model.load(self.id.clone(), compute, *bounds, progress).map(Loaded::from)
            }
            _ => Err(LoadError::File {
                path: self.place.path(),
                what: "is not what it was when the memory was divided; start the server again"
                    .to_owned(),
            }),
        }
    }
}

/// What the weights of a model take that may not be there.
fn weight_bytes(model: Option<&OpenModel>, compute: &Compute) -> u64 {
    model.map_or(0, |model| model.demand(compute).weight_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_the_models_that_lie_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["b.gguf", "a.gguf", ".c.gguf", "notes.txt", "a-house-of-x.gguf"] {
            fs::write(at(name), "").unwrap();
        }
        for part in ["s-00001-of-00002.gguf", "s-00002-of-00002.gguf"] {
            fs::write(at(part), "").unwrap();
        }
        fs::create_dir_all(at("model")).unwrap();
        fs::write(at("model/config.json"), "{}").unwrap();
        fs::create_dir_all(at("empty")).unwrap();
        let found = models_in(folder.path()).unwrap();
        let want = ["a-house-of-x.gguf", "a.gguf", "b.gguf", "model", "s-00001-of-00002.gguf"];
        assert_eq!(found, want.map(at));
        assert!(models_in(&at("none")).is_err());
    }
}
