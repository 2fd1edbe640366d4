//! A model in use.

use std::any::Any;
use std::ops::Deref;
use std::sync::Arc;

use super::keeper::Hold;

/// A model in use; it stays in memory as long as this lives.
pub struct Lease<M> {
    model: Arc<M>,
    hold: Arc<Hold>,
}

impl<M> Lease<M> {
    pub(super) fn new(model: Arc<M>, hold: Hold) -> Self {
        Self { model, hold: Arc::new(hold) }
    }

    /// The model, and what keeps it in memory. Who only has to tell what it has said needs the
    /// first alone, and may be long about it.
    pub fn parts(&self) -> (&Arc<M>, Arc<dyn Any + Send + Sync>) {
        (&self.model, Arc::<Hold>::clone(&self.hold))
    }
}

impl<M> Clone for Lease<M> {
    fn clone(&self) -> Self {
        Self { model: Arc::clone(&self.model), hold: Arc::clone(&self.hold) }
    }
}

impl<M> Deref for Lease<M> {
    type Target = M;
    fn deref(&self) -> &M {
        &self.model
    }
}
