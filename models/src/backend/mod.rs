//! Two paths, one answer: the operations that models are written in.
//!
//! [`Plain`] is candle on any device: the reference, the accelerator fallback, the training path.
//! [`Fused`] is our own kernels on the CPU: packed weights, one thread pool, one KV slab. The
//! models and their layers are generic over this trait, so both walk the same lines of the same
//! file and differ in arithmetic only; golden tests hold them equal. Deliberately absent: any
//! knowledge of layers, files or requests.

mod fused;
mod plain;

pub use fused::{Fused, FusedDelta};
pub use hearth_kernels::activation::Gelu;
pub use hearth_kernels::attention::Heads;
pub use plain::{Plain, PlainDelta};

use crate::Result;
use crate::adapter::Delta;
use crate::batch::ForwardBatch;
use crate::kv_store::{KvGeometry, KvStore};
use crate::layers::rotary::RopeTable;
use crate::weights::MatrixSource;

/// The operations. `T` is rows of the batch, widths are elements.
pub trait Backend: Send + Sized {
    /// Activations. `[T, width]`, f32 in the fused path.
    type Rows: Sized;
    /// A weight that multiplies: `[n, k]`, possibly quantised.
    type Matrix: Send;
    /// A weight that scales or shifts: `[n]`.
    type Vector: Send;
    /// What adapters add to one projection.
    type Delta: Send;

    /// Takes a matrix out of a file, once.
    fn matrix(&self, source: &MatrixSource<'_>) -> Result<Self::Matrix>;

    /// Takes a vector out of a file.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector>;

    /// Storage for the keys and values of `layers` layers.
    fn kv_store(&self, shape: KvGeometry) -> Result<KvStore>;

    /// Rows of `table`, one for each id.
    fn embed(&self, table: &Self::Matrix, ids: &[u32]) -> Result<Self::Rows>;

    /// `y_i = x W_i^T (+ b_i)`, for several weights that read the same input.
    fn linear<const N: usize>(
        &self,
        x: &Self::Rows,
        weights: [(&Self::Matrix, Option<&Self::Vector>); N],
    ) -> Result<[Self::Rows; N]>;

    /// Takes the updates of one projection, each with its weight.
    fn delta(&self, parts: &[(&Delta, f32)]) -> Result<Self::Delta>;

    /// Adds to `y_i`, which are products without a bias, what the adapters of each group make of
    /// the input of its rows. Other rows keep their bits.
    fn add_deltas<const N: usize>(
        &self,
        x: DeltaInput<'_, Self::Rows>,
        ys: [Self::Rows; N],
        groups: [Vec<DeltaGroup<'_, Self::Delta>>; N],
    ) -> Result<[Self::Rows; N]>;

    /// `x + bias` for every row.
    fn add_bias(&self, x: Self::Rows, bias: &Self::Vector) -> Result<Self::Rows>;

    /// `x / sqrt(mean(x^2) + eps) * weight` over groups of `weight.len()` elements (a whole row, or
    /// each head of it).
    fn rms_norm(&self, x: &Self::Rows, weight: &Self::Vector, eps: f32) -> Result<Self::Rows>;

    /// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over whole rows.
    fn layer_norm(
        &self,
        x: &Self::Rows,
        weight: &Self::Vector,
        bias: &Self::Vector,
        eps: f32,
    ) -> Result<Self::Rows>;

    /// Rotates every head of every row.
    fn rope(&self, x: Self::Rows, table: &RopeTable, head_dim: usize) -> Result<Self::Rows>;

    /// Writes `k` and `v` to the store and attends from `q` to everything of each row's sequence.
    fn attention(
        &self,
        q: &Self::Rows,
        k: &Self::Rows,
        v: &Self::Rows,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        params: &AttentionParams,
    ) -> Result<Self::Rows>;

    /// Attends from every row of `q` to all rows of its sequence, nothing kept. Sequence `s` has
    /// the rows `cu_q[s]..cu_q[s + 1]`.
    fn bidirectional(
        &self,
        qkv: [&Self::Rows; 3],
        cu_q: &[u32],
        heads: &Heads,
    ) -> Result<Self::Rows>;

    /// `x * Phi(x)`.
    fn gelu(&self, x: Self::Rows, kind: Gelu) -> Result<Self::Rows>;

    /// `silu(gate) * up`.
    fn silu_mul(&self, gate: Self::Rows, up: &Self::Rows) -> Result<Self::Rows>;

    /// `x + y`.
    fn add(&self, x: Self::Rows, y: &Self::Rows) -> Result<Self::Rows>;

    /// Some rows of `x`, in the order given.
    fn select(&self, x: &Self::Rows, rows: &[u32]) -> Result<Self::Rows>;

    /// The numbers themselves. `[T * width]`
    fn read(&self, x: Self::Rows) -> Result<Vec<f32>>;
}

/// What adapters read.
pub enum DeltaInput<'a, R> {
    /// What the projection reads. `[T, k]`
    Rows(&'a R),
    /// Ids that are looked up in a table. `[T]`
    Ids(&'a [u32]),
}

/// Rows that run with the same adapters, ascending, and what those add to the projection.
pub type DeltaGroup<'a, D> = (&'a [u32], &'a D);

/// Attention of one layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    /// Which layer of the store.
    pub layer: usize,
    /// Query heads.
    pub head_count: usize,
    /// Key and value heads.
    pub kv_head_count: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Keys each row sees, itself included; `None` is all.
    pub window: Option<usize>,
}
