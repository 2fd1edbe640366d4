//! Architectures and weights.
//!
//! A model is opened with [`open`] and spoken to through [`Model`]: a [`ForwardBatch`] goes in,
//! logits come out, keys and values stay in a [`KvStore`]; an [`Adapter`] changes a model for the
//! sequences that ask for it. An encoder is a [`TextEncoder`]: an
//! [`EncoderBatch`] goes in, hidden states come out, nothing stays. The way through the house:
//! `weights` (files to named tensors) -> `config` and `families` (numbers and switches) ->
//! `decoder`, `encoder` and `layers` (the paper) -> `backend` (candle, or our kernels).
//!
//! Deliberately absent: text, requests, scheduling. Block ids are only numbers here.

#![deny(unsafe_code)]

use std::sync::Arc;

pub mod adapter;
pub mod backend;
pub mod batch;
pub mod config;
pub mod decoder;
pub mod encoder;
mod export;
mod families;
pub mod kv_store;
pub mod layers;
mod open;
pub mod parallel;
pub mod tiny;
pub mod train;
pub mod weights;

pub use adapter::Adapter;
pub use batch::{
    ForwardBatch, Kept, LoraSlot, Made, Output, Pass, Pick, RowOutput, TokenEdit, Walk, Wanted,
};
pub use config::{EncoderConfig, ModelConfig};
pub use encoder::EncoderBatch;
pub use export::Export;
pub use hearth_kernels::Pool;
pub use kv_store::{KvDType, KvGeometry, KvStore};
pub use open::{AnyFile, Compute, EncoderFile, ModelFile, open, open_any, open_bytes};

/// A causal language model.
pub trait Model: Send {
    /// What it is.
    fn config(&self) -> &ModelConfig;

    /// Storage for keys and values in the form that `forward` reads.
    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore>;

    /// Whether [`Model::launch`] returns before its pass is done. Such a model chooses a token
    /// wherever a pick asks for it, keeps the tokens of the last pass for [`ForwardBatch::chosen`],
    /// and has at most two passes under way: the one before them has been waited for.
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Asks for a pass that computes every row of `batch`, writes its keys and values to `kv`, and
    /// gives what became of `batch.logit_rows`: their logits, or what `wanted` says of them where
    /// the device can do it. That is asked once at most, when the rows themselves have been asked
    /// for: what becomes known meanwhile counts. It is empty (all logits) or has one entry for each
    /// logit row. Passes are computed in the order in which they are asked for.
    ///
    /// The caller has passed `batch` through [`ForwardBatch::check`].
    fn launch(
        &self,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Pass>;

    /// Begins a pass that stops in front of each layer: there another one may be computed, which
    /// neither reads nor writes the same slots, before [`Model::go_on`]. Both give what they give
    /// alone. `None` where the model computes a pass as a whole.
    fn walk(&self, batch: &ForwardBatch, kv: &mut KvStore) -> Result<Option<Walk>> {
        let _ = (batch, kv);
        Ok(None)
    }

    /// Computes the next layer of a pass; behind the last one, and the head, the pass is done and
    /// all its logits are read out. A pass that failed does not go on.
    fn go_on(&self, walk: &mut Walk, kv: &mut KvStore) -> Result<Option<Pass>> {
        let _ = (walk, kv);
        Err(Error::Batch("this model has no such pass".into()))
    }

    /// [`Model::launch`], waited for.
    fn step(&self, batch: &ForwardBatch, kv: &mut KvStore, wanted: &[Wanted]) -> Result<Output> {
        self.launch(batch, kv, &mut || wanted.to_vec())?.wait()
    }

    /// [`Model::step`] for the logits of all rows. `[logit_rows, vocab]`
    fn forward(&self, batch: &ForwardBatch, kv: &mut KvStore) -> Result<Vec<f32>> {
        self.step(batch, kv, &[]).map(Output::into_logits)
    }

    /// Makes adapters known under a number that a batch may name: the sum of their updates, each
    /// times its weight. One adapter of weight 1 is the model it was trained as, none is the base.
    ///
    /// # Errors
    /// An adapter of another model, or a number that is taken.
    fn put_adapters(&mut self, slot: LoraSlot, adapters: &[(Arc<Adapter>, f32)]) -> Result<()>;

    /// Forgets what is known under a number.
    fn drop_adapters(&mut self, slot: LoraSlot);
}

/// A bidirectional encoder.
pub trait TextEncoder: Send {
    /// What it is.
    fn config(&self) -> &EncoderConfig;

    /// The last hidden state of every row. `[T, hidden]`
    ///
    /// # Errors
    /// A token or a position beyond the tables.
    fn forward(&self, batch: &EncoderBatch) -> Result<Vec<f32>>;
}

/// What can go wrong between a file and its logits.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file itself.
    #[error(transparent)]
    Weights(#[from] weights::Error),
    /// A number or a word in the configuration.
    #[error("{key} {what}")]
    Config {
        /// The key, as the file has it.
        key: String,
        /// What is wrong.
        what: String,
    },
    /// A tensor that does not fit the configuration.
    #[error("tensor `{name}` {what}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A batch that the model cannot run.
    #[error("batch: {0}")]
    Batch(String),
    /// A device that this build does not have.
    #[error("{0}")]
    Device(String),
    /// Candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn config(key: &str, what: impl Into<String>) -> Self {
        Self::Config { key: key.to_owned(), what: what.into() }
    }
}

/// Short for this crate's errors.
pub type Result<T> = std::result::Result<T, Error>;
