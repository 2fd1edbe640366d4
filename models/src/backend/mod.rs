//! Two paths, one answer: the operations that models are written in.
//!
//! [`Plain`] is candle on any device: the reference, the accelerator fallback, the training path.
//! [`Fused`] is our own kernels on the CPU: packed weights, one thread pool, one KV slab. `Cuda` is
//! our own kernels on a GPU, of the same kind. The models and their layers are generic over this
//! trait, so all walk the same lines of the same file and differ in arithmetic only; golden tests
//! hold them equal. Deliberately absent: any knowledge of layers, files or requests.

#[cfg(feature = "cuda")]
mod cuda;
mod fused;
mod plain;

#[cfg(feature = "cuda")]
pub use cuda::{Cuda, CudaKv};
pub use fused::{Fused, FusedDelta};
pub use hearth_kernels::activation::{Gate, Gelu};
pub use hearth_kernels::attention::Heads;
pub use hearth_kernels::experts::Routing;
pub use plain::{Plain, PlainDelta};

use crate::Result;
use crate::adapter::Delta;
use crate::batch::{ForwardBatch, LoraSlot, Output, Pass, Wanted};
use crate::kv_store::{KvGeometry, KvStore};
use crate::layers::rotary::{RopeTable, Rotaries, Rotary};
use crate::weights::MatrixSource;

/// The operations. `T` is rows of the batch, widths are elements.
pub trait Backend: Send + Sized + 'static {
    /// Activations. `[T, width]`, f32 in the fused path.
    type Rows: Send + 'static;
    /// A weight that multiplies: `[n, k]`, possibly quantised.
    type Matrix: Send;
    /// A weight that scales or shifts: `[n]`.
    type Vector: Send;
    /// What adapters add to one projection.
    type Delta: Send;
    /// A batch as the operations read it.
    type Step: Send + 'static;

    /// Operations are asked for, not waited for; see [`Model::runs_ahead`](crate::Model).
    const RUNS_AHEAD: bool = false;

    /// Prepares a batch for its pass.
    fn begin(&self, batch: &ForwardBatch, rotaries: &Rotaries) -> Result<Self::Step>;

    /// Runs a pass that ends in logits. A backend may keep what it asked its device for and ask
    /// for it again, without `work`, when a batch of the same shape comes.
    fn run(
        &self,
        step: &Self::Step,
        kv: &mut KvStore,
        work: impl Fn(&mut KvStore) -> Result<Self::Rows>,
    ) -> Result<Self::Rows> {
        let _ = step;
        work(kv)
    }

    /// What adapters under this number add is about to go: nothing that was kept may read it.
    fn forget(&self, slot: LoraSlot) {
        let _ = slot;
    }

    /// The end of a pass: logits, or what is `wanted` of them where a backend can do that; see
    /// [`Model::launch`](crate::Model).
    fn output(&self, logits: Self::Rows, wanted: &mut dyn FnMut() -> Vec<Wanted>) -> Result<Pass> {
        let _ = wanted;
        Ok(Pass::done(Output::of_logits(self.read(logits)?)))
    }

    /// The end of a pass from which nothing is wanted.
    fn finish(&self) -> Result<Pass> {
        Ok(Pass::done(Output::default()))
    }

    /// Takes a matrix out of a file, once.
    fn matrix(&self, source: &MatrixSource<'_>) -> Result<Self::Matrix>;

    /// Takes several matrices of one shape and type.
    fn matrices(&self, sources: &[MatrixSource<'_>]) -> Result<Vec<Self::Matrix>> {
        sources.iter().map(|source| self.matrix(source)).collect()
    }

    /// Takes a vector out of a file.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector>;

    /// Takes several vectors of one length.
    fn vectors(&self, all: Vec<Vec<f32>>) -> Result<Vec<Self::Vector>> {
        all.into_iter().map(|values| self.vector(values)).collect()
    }

    /// Storage for the keys and values of `layers` layers.
    fn kv_store(&self, shape: KvGeometry) -> Result<KvStore>;

    /// Rows of `table`, one for each id.
    fn embed(&self, table: &Self::Matrix, ids: &[u32]) -> Result<Self::Rows>;

    /// Rows of `table`, one for each token of the batch.
    fn embed_tokens(&self, table: &Self::Matrix, step: &Self::Step) -> Result<Self::Rows>;

    /// The rows of the batch whose logits are wanted.
    fn select_logit_rows(&self, x: &Self::Rows, step: &Self::Step) -> Result<Self::Rows>;

    /// Rows whose products are as exact as the backend can make them: the last ones of a model.
    fn widen(&self, x: Self::Rows) -> Result<Self::Rows> {
        Ok(x)
    }

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

    /// The sum `x + y`, and its [`Backend::rms_norm`].
    fn add_norm(
        &self,
        x: Self::Rows,
        y: &Self::Rows,
        weight: &Self::Vector,
        eps: f32,
    ) -> Result<(Self::Rows, Self::Rows)> {
        let sum = self.add(x, y)?;
        let normed = self.rms_norm(&sum, weight, eps)?;
        Ok((sum, normed))
    }

    /// Normalises every head of `q` and `k` where the model does so, rotates them, writes `k` and
    /// `v` to the store, and attends from `q` to everything of each row's sequence, and to the sink
    /// of its head.
    fn attend(
        &self,
        qkv: [Self::Rows; 3],
        heads: OfHeads<'_, Self::Vector>,
        step: &Self::Step,
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

    /// `activation(gate) * up`.
    fn gate_mul(&self, kind: Gate, gate: Self::Rows, up: &Self::Rows) -> Result<Self::Rows>;

    /// A product that decides, as exact as the backend can make it: scores of experts.
    fn scores(
        &self,
        x: &Self::Rows,
        router: (&Self::Matrix, Option<&Self::Vector>),
    ) -> Result<Self::Rows> {
        let [scores] = self.linear(x, [router])?;
        Ok(scores)
    }

    /// The weighed sum of what the chosen experts make of each row. `scores [T, experts]`
    fn experts(
        &self,
        x: &Self::Rows,
        scores: Self::Rows,
        experts: &Experts<Self::Matrix, Self::Vector>,
    ) -> Result<Self::Rows>;

    /// `x * factor`.
    fn scale(&self, x: Self::Rows, factor: f32) -> Result<Self::Rows>;

    /// `cap * tanh(x / cap)`.
    fn softcap(&self, x: Self::Rows, cap: f32) -> Result<Self::Rows>;

    /// `x + y`.
    fn add(&self, x: Self::Rows, y: &Self::Rows) -> Result<Self::Rows>;

    /// Whether rows of which nothing more is wanted may be left out of a pass. Not by a rank of a
    /// divided model: only the first of them knows what is wanted.
    fn trims(&self) -> bool;

    /// Sums that are complete where every rank of a divided model has a part of them.
    fn reduce(&self, x: Self::Rows) -> Result<Self::Rows> {
        Ok(x)
    }

    /// The numbers themselves. `[T * width]`
    fn read(&self, x: Self::Rows) -> Result<Vec<f32>>;
}

/// What a layer has for its heads.
pub struct OfHeads<'a, V> {
    /// Norms of every query and key head, and their epsilon.
    pub norms: Option<(&'a V, &'a V, f32)>,
    /// Scores without a value, one for each query head, beside those of the keys.
    pub sinks: Option<&'a V>,
}

/// A batch where nothing has to travel: itself, and the rotations of its rows.
pub struct HostStep {
    /// The batch.
    pub batch: ForwardBatch,
    /// Cosines and sines of its rows,
    global: RopeTable,
    /// and those for layers with a window, where they differ.
    local: Option<RopeTable>,
}

impl HostStep {
    fn new(batch: &ForwardBatch, rotaries: &Rotaries) -> Self {
        let table = |rotary: &Rotary| rotary.table(&batch.positions);
        let (global, local) = (table(&rotaries.global), rotaries.local.as_ref().map(table));
        Self { batch: batch.clone(), global, local }
    }

    /// Cosines and sines of its rows in a layer.
    fn rope(&self, params: &AttentionParams) -> &RopeTable {
        self.local.as_ref().filter(|_| params.window.is_some()).unwrap_or(&self.global)
    }
}

/// Gated MLPs of which each row uses a few.
pub struct Experts<M, V> {
    /// `[ffn, hidden]` of each.
    pub gate: Vec<M>,
    /// `[ffn, hidden]` of each.
    pub up: Vec<M>,
    /// `[hidden, ffn]` of each.
    pub down: Vec<M>,
    /// Of gate, up and down, where these have some.
    pub biases: Option<[Vec<V>; 3]>,
    /// Which are chosen, and how they are weighed.
    pub routing: Routing,
    /// What opens the gate.
    pub activation: Gate,
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
    /// Then bounds them: `softcap * tanh(score / softcap)`.
    pub softcap: Option<f32>,
    /// Keys each row sees, itself included; `None` is all.
    pub window: Option<usize>,
}
