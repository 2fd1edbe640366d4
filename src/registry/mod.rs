//! What can be served: base models by id, each with its engine, tokenizer and defaults; and models
//! that embed.
//!
//! `source` says where a model comes from, `hub` fetches it, `load` turns files into a
//! [`ServedModel`], `embedding` to one that embeds, `plan` divides the memory. Filled once at
//! start, read from any thread.

pub mod builtin;
mod convert;
mod embedding;
pub mod hub;
mod load;
pub mod plan;
pub mod source;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use convert::write_gguf;
pub use embedding::OpenEmbedding;
pub use load::{LoadError, LoadOptions, OpenModel, gguf_vocab, open};

use crate::embeddings::EmbeddingModel;
use crate::engine::handle::EngineHandle;
use crate::error::Error;
use crate::text::{ChatTemplate, TextError, Tokenizer, ToolStyle, Vocabulary};
use crate::types::{SamplingOverrides, TokenId};

/// A model that answers.
pub struct ServedModel {
    id: String,
    created_s: u64,
    fingerprint: String,
    engine: EngineHandle,
    thread: Mutex<Option<JoinHandle<()>>>,
    tokenizer: Tokenizer,
    vocabulary: OnceLock<Vocabulary>,
    template: Option<ChatTemplate>,
    tool_style: Option<ToolStyle>,
    stop_ids: Vec<TokenId>,
    defaults: SamplingOverrides,
}

/// All models of this process.
#[derive(Default)]
pub struct Registry {
    models: Vec<Arc<ServedModel>>,
    embedders: Vec<Arc<EmbeddingModel>>,
    /// Other names: name and id.
    aliases: Vec<(String, String)>,
}

impl Registry {
    /// Over loaded models, in the order in which `/v1/models` lists them.
    pub fn new(models: Vec<ServedModel>) -> Self {
        Self { models: models.into_iter().map(Arc::new).collect(), ..Self::default() }
    }

    /// The same with other names for its models, those that embed too, each a name and an id.
    ///
    /// # Errors
    /// A name that is an id already, or an id that nothing is served under.
    pub fn with_aliases(mut self, aliases: Vec<(String, String)>) -> Result<Self, String> {
        let served = |id: &str| {
            self.models.iter().any(|m| m.id == id) || self.embedders.iter().any(|m| m.id() == id)
        };
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

    /// Other names of models: name and id.
    pub fn aliases(&self) -> &[(String, String)] {
        &self.aliases
    }

    /// The same with models that embed.
    pub fn with_embedders(self, embedders: Vec<EmbeddingModel>) -> Self {
        Self { embedders: embedders.into_iter().map(Arc::new).collect(), ..self }
    }

    /// All that generate text.
    pub fn models(&self) -> &[Arc<ServedModel>] {
        &self.models
    }

    /// All that embed.
    pub fn embedders(&self) -> &[Arc<EmbeddingModel>] {
        &self.embedders
    }

    /// One that generates text, by its id or another name of it.
    pub fn get(&self, id: &str) -> Option<Arc<ServedModel>> {
        let id = self.id_of(id);
        self.models.iter().find(|m| m.id == id).cloned()
    }

    /// [`Registry::get`], or why not.
    pub fn generator(&self, id: &str) -> Result<Arc<ServedModel>, Error> {
        self.get(id).ok_or_else(|| match self.embedder(id) {
            Ok(_) => Error::invalid(
                "model",
                format!("The model `{id}` embeds text and generates none; see /v1/embeddings."),
            ),
            Err(error) => error,
        })
    }

    /// One that embeds, or why not.
    pub fn embedder(&self, id: &str) -> Result<Arc<EmbeddingModel>, Error> {
        let own = self.id_of(id);
        let found = self.embedders.iter().find(|m| m.id() == own).cloned();
        found.ok_or_else(|| match self.get(id) {
            Some(_) => Error::invalid(
                "model",
                format!("The model `{id}` generates text and does not embed it."),
            ),
            None => Error::ModelNotFound(id.to_owned()),
        })
    }

    /// The id that a name stands for.
    fn id_of<'a>(&'a self, name: &'a str) -> &'a str {
        self.aliases.iter().find(|(alias, _)| alias == name).map_or(name, |(_, id)| id)
    }

    /// Lets every engine finish what it has; waits at most `limit`. True when all are done.
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.models.iter().for_each(|m| m.engine.drain());
        self.embedders.iter().for_each(|m| m.queue().drain());
        self.models.iter().all(|m| m.wait(deadline))
            && self.embedders.iter().all(|m| m.wait(deadline))
    }
}

impl ServedModel {
    /// The id that requests name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// When it was loaded, in seconds of Unix time.
    pub fn created_s(&self) -> u64 {
        self.created_s
    }

    /// Changes when weights, format or program change.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Its engine.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Tokens of one request, prompt and completion together.
    pub fn context_len(&self) -> usize {
        self.engine.limits().context_len
    }

    /// Text to ids and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Its tokens as grammars see them. The first call takes up to a second.
    pub fn vocabulary(&self) -> Result<&Vocabulary, TextError> {
        if let Some(vocabulary) = self.vocabulary.get() {
            return Ok(vocabulary);
        }
        let vocab_len = self.engine.limits().vocab_len;
        let vocabulary = Vocabulary::new(&self.tokenizer, vocab_len, &self.stop_ids)?;
        // Whoever came first has built the same.
        Ok(self.vocabulary.get_or_init(|| vocabulary))
    }

    /// Conversation to text; a base model may have none.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// How its template treats tools.
    pub fn tool_style(&self) -> Option<ToolStyle> {
        self.tool_style
    }

    /// Tokens that end an answer.
    pub fn stop_ids(&self) -> &[TokenId] {
        &self.stop_ids
    }

    /// Sampling as the model's own generation config has it.
    pub fn defaults(&self) -> &SamplingOverrides {
        &self.defaults
    }

    /// Its engine's thread runs.
    pub fn is_alive(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    fn wait(&self, deadline: Instant) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return true };
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        thread.join().is_ok()
    }
}
