//! A model that answers: its engine, and what turns text into tokens and back.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hearth_models::ModelFile;

use super::Details;
use crate::engine::handle::EngineHandle;
use crate::text::{ChatStyle, ChatTemplate, Harmony, TextError, Tokenizer, Vocabulary};
use crate::types::{SamplingOverrides, TokenId};

/// A model that answers. Its engine's thread owns weights, keys and values, and ends when it has
/// drained.
pub struct ServedModel {
    pub(super) id: String,
    pub(super) fingerprint: String,
    pub(super) file: Arc<ModelFile>,
    pub(super) engine: EngineHandle,
    pub(super) thread: Mutex<Option<JoinHandle<()>>>,
    pub(super) tokenizer: Tokenizer,
    pub(super) vocabulary: OnceLock<Vocabulary>,
    pub(super) template: Option<ChatTemplate>,
    pub(super) style: Option<ChatStyle>,
    pub(super) harmony: Option<Harmony>,
    pub(super) stop_ids: Vec<TokenId>,
    pub(super) defaults: SamplingOverrides,
}

impl ServedModel {
    /// The id that requests name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Changes when weights, format or program change.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Its files, for adapters that are made for it.
    pub fn file(&self) -> &ModelFile {
        &self.file
    }

    /// What its files say.
    pub(super) fn details(&self) -> Details {
        Details::of_decoder(&self.file, &self.tokenizer, self.template.as_ref(), None)
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

    /// How its template treats messages and tools.
    pub fn style(&self) -> Option<ChatStyle> {
        self.style
    }

    /// The marks of its messages, where it speaks OpenAI's harmony format.
    pub fn harmony(&self) -> Option<Harmony> {
        self.harmony
    }

    /// Its answers may begin with a thought.
    pub fn thinks(&self) -> bool {
        self.harmony.is_some() || self.template().is_some_and(ChatTemplate::tags_thought)
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

    /// Waits until its thread, told to drain, has ended. False at the deadline.
    pub(super) fn wait(&self, deadline: Instant) -> bool {
        while self.is_alive() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.is_none_or(|thread| thread.join().is_ok())
    }
}
