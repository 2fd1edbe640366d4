//! What can be served: models that answer and models that embed, by id, in memory or not.
//!
//! `source` says where a model comes from, `hub` fetches it, `load` turns files into a
//! [`ServedModel`], `embedding` to one that embeds, `plan` divides the memory, `offer` makes an
//! [`Entry`] of each. `residency` decides who is in memory, `keeper` does it: whoever asks for a
//! model gets a [`Lease`], after a load where that is needed. Read and asked from any thread.

pub mod adapters;
pub mod builtin;
mod convert;
mod details;
mod embedding;
pub mod hub;
mod keeper;
mod lease;
mod load;
mod loaded;
pub mod offer;
pub mod plan;
mod residency;
mod served;
pub mod source;
mod standing;
#[cfg(test)]
mod tests;
pub mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

pub use adapters::{AdapterCard, Adapters, NewAdapter, Weighted};
pub use convert::write_gguf;
pub use details::{Details, Skills};
pub use embedding::OpenEmbedding;
pub use keeper::Bounds;
pub use lease::Lease;
pub use load::{LoadError, LoadOptions, OpenModel, gguf_vocab, open};
pub use loaded::Loaded;
pub use residency::{State, Stays};
pub use served::ServedModel;
pub use standing::{Counts, Standing};
pub use watch::Watched;

use self::keeper::Keeper;
use self::offer::Progress;
use crate::embeddings::EmbeddingModel;
use crate::error::Error;
use crate::types::{KeepAlive, Tenant, unix_now_s};

/// What is known of a model whether it is in memory or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// The id that requests name.
    pub id: String,
    /// Since when it is offered, in seconds of Unix time.
    pub created_s: u64,
    /// What it does.
    pub kind: Kind,
    /// What its files say.
    pub details: Arc<Details>,
}

/// What a model does. Lengths in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It generates text.
    Text {
        /// Prompt and completion together.
        context_len: usize,
    },
    /// It embeds.
    Embedding {
        /// One text.
        context_len: usize,
        /// Numbers of a vector.
        vector_len: usize,
    },
}

/// Brings a model into memory, each time anew. Called on a thread of its own.
pub type Load = Box<dyn Fn() -> Result<Loaded, LoadError> + Send + Sync>;

/// A model that can be asked for.
pub struct Entry {
    /// What is known of it.
    pub card: Card,
    /// What it takes in memory at most.
    pub bytes: u64,
    /// Once in memory, it stays.
    pub pinned: bool,
    /// Where it is in memory from the beginning.
    pub loaded: Option<Loaded>,
    /// `None` for one that is there already and cannot be brought in twice.
    pub load: Option<Load>,
    /// How far a load has come.
    pub progress: Arc<Progress>,
}

/// All models of this process.
pub struct Registry {
    keeper: Keeper,
    /// Other names: name and id.
    aliases: Vec<(String, String)>,
    /// Ids of models that can never be loaded here, and why.
    refused: Vec<(String, String)>,
    adapters: Adapters,
}

impl Registry {
    /// Over models, in the order in which `/v1/models` lists them.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(entries: Vec<Entry>, bounds: Bounds) -> std::io::Result<Self> {
        let keeper = Keeper::start(entries, bounds)?;
        let (aliases, refused, adapters) = (Vec::new(), Vec::new(), Adapters::default());
        Ok(Self { keeper, aliases, refused, adapters })
    }

    /// Over models that are loaded already, and stay.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn of(models: Vec<Loaded>) -> std::io::Result<Self> {
        Self::new(models.into_iter().map(Entry::from).collect(), Bounds::default())
    }

    /// The same with other names for its models, each a name and an id.
    ///
    /// # Errors
    /// A name that is an id already, or an id that nothing is served under.
    pub fn with_aliases(mut self, aliases: Vec<(String, String)>) -> Result<Self, String> {
        let served = |id: &str| self.cards().any(|card| card.id == id);
        for (name, id) in &aliases {
            if served(name) {
                return Err(format!("`{name}` is the id of a model; it cannot name another"));
            }
            if !served(id) {
                return Err(format!("`{name}` stands for `{id}`, which is not served"));
            }
        }
        self.aliases = aliases;
        Ok(self)
    }

    /// The same with ids that are refused, and why.
    pub fn with_refused(self, refused: Vec<(String, String)>) -> Self {
        Self { refused, ..self }
    }

    /// The same with adapters, which may take so many bytes while nobody uses them. One without a
    /// base is for the only model that generates text. Their files are not read yet.
    ///
    /// # Errors
    /// An id that is taken, or a base that is not served.
    pub fn with_adapters(
        self,
        budget_bytes: u64,
        list: Vec<(Option<String>, String, PathBuf)>,
    ) -> Result<Self, Error> {
        let served = Self { adapters: Adapters::new(budget_bytes), ..self };
        for (base, id, path) in list {
            let base = served.base_of_adapter(base.as_deref())?.id.clone();
            served.is_free(&id)?;
            served.adapters.put(NewAdapter { id, base, path, pinned: false }, false)?;
        }
        Ok(served)
    }

    /// Registers what lies in a folder, to be watched. Without a base it is for the only model that
    /// generates text.
    ///
    /// # Errors
    /// As [`Registry::with_adapters`], or a folder that cannot be listed.
    pub fn folder_of_adapters(
        &self,
        base: Option<&str>,
        folder: PathBuf,
    ) -> Result<Watched, Error> {
        let base = self.base_of_adapter(base)?.id.clone();
        Watched::open(self, base, folder)
    }

    /// The model that an adapter is for: the one that is named, or the only one.
    pub fn base_of_adapter(&self, name: Option<&str>) -> Result<&Card, Error> {
        let text = |card: &&Card| matches!(card.kind, Kind::Text { .. });
        let mut all = self.cards().filter(text);
        match (name, all.next(), all.next()) {
            (Some(name), ..) => {
                self.generates(name).map_err(|e| Error::invalid("base_model_name", e.to_string()))
            }
            (None, Some(one), None) => Ok(one),
            _ => {
                let message = "Several models are served: name the one that the adapter is for.";
                Err(Error::invalid("base_model_name", message))
            }
        }
    }

    /// Reads an adapter and registers it while models are served; `model` is its base. It waits for
    /// the disk.
    pub fn load_adapter(
        &self,
        new: NewAdapter,
        model: &ServedModel,
        replace: bool,
    ) -> Result<(), Error> {
        self.is_free(&new.id)?;
        self.adapters.load(new, model.file(), replace)
    }

    /// No model has this name.
    fn is_free(&self, id: &str) -> Result<(), Error> {
        match self.slot_of(id) {
            None => Ok(()),
            Some(_) => {
                let message = format!("`{id}` is the name of a model; an adapter cannot have it.");
                Err(Error::invalid("lora_name", message))
            }
        }
    }

    /// All adapters.
    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// What an answer calls its model: the id of the adapter that the name asks for, or of the
    /// model.
    pub fn title(&self, name: &str) -> Result<String, Error> {
        let (slot, adapter) = self.resolve(name)?;
        Ok(adapter.unwrap_or_else(|| self.keeper.entries()[slot].card.id.clone()))
    }

    /// The adapters that a request runs with: the one that its model's name asks for, and those
    /// that it lists.
    pub fn wanted(&self, name: &str, listed: &[Weighted]) -> Result<Vec<Weighted>, Error> {
        let named = self.resolve(name)?.1.map(|id| Weighted { id, weight: 1.0 });
        let all: Vec<Weighted> = named.into_iter().chain(listed.iter().cloned()).collect();
        let twice = |(i, one): (usize, &Weighted)| all[..i].iter().any(|other| other.id == one.id);
        if all.len() > adapters::COMPOSED_MAX || all.iter().enumerate().any(twice) {
            let max = adapters::COMPOSED_MAX;
            let message = format!("Invalid 'adapters': at most {max}, each of them once.");
            return Err(Error::invalid("adapters", message));
        }
        Ok(all)
    }

    /// Other names of models: name and id.
    pub fn aliases(&self) -> &[(String, String)] {
        &self.aliases
    }

    /// Every model that can be asked for.
    pub fn cards(&self) -> impl Iterator<Item = &Card> {
        self.keeper.entries().iter().map(|entry| &entry.card)
    }

    /// One of them, by its id or another name of it, or why not.
    pub fn card(&self, name: &str) -> Result<&Card, Error> {
        Ok(&self.keeper.entries()[self.find(name)?].card)
    }

    /// One that generates text, or why not.
    pub fn generates(&self, name: &str) -> Result<&Card, Error> {
        let card = self.card(name)?;
        match card.kind {
            Kind::Text { .. } => Ok(card),
            Kind::Embedding { .. } => Err(Error::invalid(
                "model",
                format!("The model `{name}` embeds text and generates none; see /v1/embeddings."),
            )),
        }
    }

    /// One that embeds, or why not.
    pub fn embeds(&self, name: &str) -> Result<&Card, Error> {
        let card = self.card(name)?;
        match card.kind {
            Kind::Embedding { .. } => Ok(card),
            Kind::Text { .. } => Err(Error::invalid(
                "model",
                format!("The model `{name}` generates text and does not embed it."),
            )),
        }
    }

    /// A lease on one that generates text; the last request says how long it is kept. A model that
    /// is not in memory is loaded first. Dropping the future leaves its line.
    pub async fn generator(
        &self,
        name: &str,
        tenant: Tenant,
        keep_alive: Option<KeepAlive>,
    ) -> Result<Lease<ServedModel>, Error> {
        self.generates(name)?;
        match self.keeper.lease(self.find(name)?, tenant, keep_alive).await? {
            (Loaded::Text(model), hold) => Ok(Lease::new(model, hold)),
            (Loaded::Embedding(_), _) => Err(other_kind(name)),
        }
    }

    /// The same of one that embeds.
    pub async fn embedder(
        &self,
        name: &str,
        tenant: Tenant,
        keep_alive: Option<KeepAlive>,
    ) -> Result<Lease<EmbeddingModel>, Error> {
        self.embeds(name)?;
        match self.keeper.lease(self.find(name)?, tenant, keep_alive).await? {
            (Loaded::Embedding(model), hold) => Ok(Lease::new(model, hold)),
            (Loaded::Text(_), _) => Err(other_kind(name)),
        }
    }

    /// Brings a model in on demand of the operator. Dropping the future changes its mind.
    pub async fn load(&self, name: &str) -> Result<(), Error> {
        self.keeper.lease(self.find(name)?, Tenant::default(), None).await.map(drop)
    }

    /// The same, on a thread that waits; `progress` is told bytes loaded and bytes in all.
    pub fn load_blocking(
        &self,
        name: &str,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Error> {
        const LOOK: Duration = Duration::from_millis(5);
        let slot = self.find(name)?;
        let told = &self.keeper.entries()[slot].progress;
        thread::scope(|scope| {
            let load = scope.spawn(|| self.keeper.lease_blocking(slot).map(drop));
            while !load.is_finished() {
                progress(told.done(), told.total());
                thread::sleep(LOOK);
            }
            load.join().unwrap_or_else(|_| Err(Error::Internal("the load panicked".to_owned())))
        })
    }

    /// Begins to take a model out, if nothing keeps it.
    pub fn unload(&self, name: &str) -> Result<(), Error> {
        let id = self.card(name)?.id.clone();
        let why = match self.keeper.dismiss(self.find(name)?) {
            Ok(()) => return Ok(()),
            Err(Stays::Pinned) => "it is pinned".to_owned(),
            Err(Stays::Loading) => "it is being loaded".to_owned(),
            Err(Stays::Busy(n)) => format!("{n} requests use it or wait for it"),
        };
        Err(Error::Stays { id, why })
    }

    /// How every model stands, in the order of the cards.
    pub fn standings(&self) -> Vec<Standing> {
        self.keeper.standings()
    }

    /// What is in memory.
    pub fn loaded(&self) -> Vec<Loaded> {
        self.keeper.loaded()
    }

    /// Takes nothing new and lets every model finish what it has; waits at most `limit`. True when
    /// all are done.
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.keeper.close();
        let loaded = self.loaded();
        loaded.iter().for_each(Loaded::stop);
        loaded.iter().all(|model| model.wait(deadline))
    }

    /// The place of the model that a name stands for.
    fn find(&self, name: &str) -> Result<usize, Error> {
        Ok(self.resolve(name)?.0)
    }

    /// The id that a name stands for.
    fn id_of<'a>(&'a self, name: &'a str) -> &'a str {
        self.aliases.iter().find(|(alias, _)| alias == name).map_or(name, |(_, id)| id)
    }

    /// The place of a model, by its own name.
    fn slot_of(&self, name: &str) -> Option<usize> {
        let id = self.id_of(name);
        self.cards().position(|card| card.id == id)
    }

    /// The place of a model, and the adapter of it that a name asks for: `MODEL`, `ADAPTER` or
    /// `MODEL:ADAPTER`.
    fn resolve(&self, name: &str) -> Result<(usize, Option<String>), Error> {
        if let Some(slot) = self.slot_of(name) {
            return Ok((slot, None));
        }
        let whole = self.adapters.card(name);
        if let Some((slot, card)) = whole.and_then(|c| Some((self.slot_of(&c.base)?, c))) {
            return Ok((slot, Some(card.id)));
        }
        for (at, _) in name.match_indices(':') {
            let Some(slot) = self.slot_of(&name[..at]) else { continue };
            let base = &self.keeper.entries()[slot].card.id;
            if let Some(card) = self.adapters.card(&name[at + 1..]).filter(|c| c.base == *base) {
                return Ok((slot, Some(card.id)));
            }
        }
        let id = self.id_of(name);
        match self.refused.iter().find(|(refused, _)| refused == id) {
            Some((_, why)) => Err(Error::invalid("model", why.clone())),
            None => Err(Error::ModelNotFound(name.to_owned())),
        }
    }
}

/// The files of a model were exchanged for those of another kind, and its load did not see it.
fn other_kind(name: &str) -> Error {
    Error::Internal(format!("the model `{name}` is not what it was at the start"))
}

/// One that is there, and stays.
impl From<Loaded> for Entry {
    fn from(loaded: Loaded) -> Self {
        let details = Arc::new(match &loaded {
            Loaded::Text(model) => model.details(),
            Loaded::Embedding(_) => Details::default(), // its files are closed
        });
        let (id, kind) = (loaded.id().to_owned(), loaded.kind());
        let card = Card { id, created_s: unix_now_s(), kind, details };
        let (loaded, progress) = (Some(loaded), Arc::default());
        Self { card, bytes: 0, pinned: true, loaded, load: None, progress }
    }
}
