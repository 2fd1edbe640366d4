//! A model in memory, of either kind.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Kind, ServedModel};
use crate::embeddings::EmbeddingModel;

/// A model in memory.
#[derive(Clone)]
pub enum Loaded {
    /// It generates text.
    Text(Arc<ServedModel>),
    /// It embeds.
    Embedding(Arc<EmbeddingModel>),
}

impl Loaded {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Text(model) => model.id(),
            Self::Embedding(model) => model.id(),
        }
    }

    /// Its thread runs.
    pub fn is_alive(&self) -> bool {
        match self {
            Self::Text(model) => model.is_alive(),
            Self::Embedding(model) => model.is_alive(),
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Text(model) => Kind::Text { context_len: model.context_len() },
            Self::Embedding(model) => Kind::Embedding {
                context_len: model.settings().context_len,
                vector_len: model.vector_len(),
            },
        }
    }

    /// Some who use it wait for their clients to read, and hold it as long as these like.
    pub(super) fn waits_for_readers(&self) -> bool {
        match self {
            Self::Text(model) => model.engine().stats().aside.load(Ordering::Acquire) > 0,
            Self::Embedding(_) => false,
        }
    }

    /// Lets its thread finish what it has and end.
    pub(super) fn stop(&self) {
        match self {
            Self::Text(model) => model.engine().drain(),
            Self::Embedding(model) => model.queue().drain(),
        }
    }

    /// Waits for that. False at the deadline.
    pub(super) fn wait(&self, deadline: Instant) -> bool {
        match self {
            Self::Text(model) => model.wait(deadline),
            Self::Embedding(model) => model.wait(deadline),
        }
    }
}

impl From<ServedModel> for Loaded {
    fn from(model: ServedModel) -> Self {
        Self::Text(Arc::new(model))
    }
}

impl From<EmbeddingModel> for Loaded {
    fn from(model: EmbeddingModel) -> Self {
        Self::Embedding(Arc::new(model))
    }
}
