//! What was said and is to be remembered: stored chat completions, responses, conversations.
//!
//! Objects are kept in the form in which they are shown, so that a newer version shows an old one
//! unchanged. Answers have an end, where the operator says so; what one follows lives as long as
//! it. Everything here blocks on the disk; nothing here knows HTTP or how text is made.

mod completions;
mod conversations;
mod responses;

use std::sync::Arc;
use std::time::Duration;

pub use responses::Reply;

pub use crate::store::{Document, Listing, Page};
use crate::store::{Kind, Store};
use crate::types::unix_now_s;

/// The memory of one data directory.
pub struct History {
    store: Arc<Store>,
    /// How long an answer is remembered; `None` is for ever.
    lifetime: Option<Duration>,
}

impl History {
    /// Over an open store. Nothing is forgotten.
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, lifetime: None }
    }

    /// Responses and chat completions that are kept from now on are forgotten after that time.
    /// Conversations are not: their clients say when.
    pub fn forgetting(self, lifetime: Option<Duration>) -> Self {
        Self { lifetime, ..self }
    }

    /// The end of what is kept now.
    fn end(&self) -> Option<u64> {
        self.lifetime.map(|lifetime| unix_now_s().saturating_add(lifetime.as_secs()))
    }
}
