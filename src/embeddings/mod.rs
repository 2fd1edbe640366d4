//! Text to vectors: encoder models, each with its tokenizer, its settings and a thread of its own.
//!
//! `queue` is the bounded way in and the thread behind it, `batch` decides which texts are computed
//! together, `pooling` makes one vector of a text's hidden states. The registry reads the files and
//! fills [`Settings`]. May import: `hearth_models` (the encoder that the thread owns) and `text`.
//! Deliberately absent: files, requests, the wire, and KV: an encoder keeps nothing.

mod batch;
mod pooling;
mod queue;

use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hearth_models::TextEncoder;

pub use pooling::{Pooling, cut};
pub use queue::{Bounds, Queue, Stats, SubmitError, Vectors};

use crate::text::Tokenizer;

/// How a model was trained to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Hidden states to one vector.
    pub pooling: Pooling,
    /// Vectors are brought to length 1.
    pub normalize: bool,
    /// Tokens of one text, special ones included.
    pub context_len: usize,
    /// Which shorter vectors are as good as cut ones.
    pub dimensions: Dimensions,
}

/// Lengths to which a vector may be cut: the first numbers of a model that was trained so carry
/// most of the meaning (Kusupati et al. 2022, Matryoshka).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dimensions {
    /// Only the whole vector.
    Whole,
    /// Any.
    Any,
    /// These, and the whole vector.
    Of(Vec<usize>),
}

/// A model that embeds.
pub struct EmbeddingModel {
    id: String,
    tokenizer: Tokenizer,
    settings: Settings,
    vocab_len: usize,
    vector_len: usize,
    queue: Queue,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl EmbeddingModel {
    /// Starts the thread of a loaded encoder. `bounds` are derived by the caller.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(
        id: String,
        model: Box<dyn TextEncoder>,
        tokenizer: Tokenizer,
        settings: Settings,
        bounds: Bounds,
    ) -> std::io::Result<Self> {
        let (vocab_len, vector_len) = (model.config().vocab_len, model.config().hidden_len);
        let (queue, thread) = queue::start(model, settings.clone(), bounds)?;
        Ok(Self {
            id,
            tokenizer,
            settings,
            vocab_len,
            vector_len,
            queue,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The id that requests name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Text to ids.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How it was trained to be used.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Ids below this one may be asked for.
    pub fn vocab_len(&self) -> usize {
        self.vocab_len
    }

    /// Numbers of a whole vector.
    pub fn vector_len(&self) -> usize {
        self.vector_len
    }

    /// The way to its thread.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Its thread runs.
    pub fn is_alive(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Waits until its thread, told to drain, has ended. False at the deadline.
    pub fn wait(&self, deadline: Instant) -> bool {
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
