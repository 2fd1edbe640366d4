//! What was said and is to be remembered: stored chat completions, responses, conversations.
//!
//! Objects are kept in the form in which they are shown, so that a newer version shows an old one
//! unchanged. Everything here blocks on the disk; nothing here knows HTTP or how text is made.

mod completions;
mod conversations;
mod responses;

use std::sync::Arc;

pub use responses::Reply;

pub use crate::store::{Document, Listing, Page};
use crate::store::{Kind, Store};

/// The memory of one data directory.
pub struct History {
    store: Arc<Store>,
}

impl History {
    /// Over an open store.
    pub fn new(store: Arc<Store>) -> Self {
        Self { store }
    }
}
