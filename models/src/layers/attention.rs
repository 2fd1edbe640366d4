//! Grouped-query attention with rotary positions over the paged KV store.
//!
//! Vaswani et al. 2017; Ainslie et al. 2023 (GQA); Su et al. 2021 (rotary).

use super::linear::Linear;
use crate::Result;
use crate::backend::{AttentionParams, Backend, OfHeads};
use crate::batch::LoraRows;
use crate::kv_store::KvStore;

/// Attention of one layer.
pub struct Attention<B: Backend> {
    /// `[heads * dim, hidden]`
    pub q: Linear<B>,
    /// `[kv_heads * dim, hidden]`
    pub k: Linear<B>,
    /// `[kv_heads * dim, hidden]`
    pub v: Linear<B>,
    /// `[hidden, heads * dim]`
    pub out: Linear<B>,
    /// Norms of every query and key head, `[dim]` each.
    pub qk_norm: Option<(B::Vector, B::Vector)>,
    /// A score of each query head that has no value. `[heads]`
    pub sinks: Option<B::Vector>,
    /// Epsilon of those norms.
    pub norm_eps: f32,
    /// Heads, window, place in the store.
    pub params: AttentionParams,
}

impl<B: Backend> Attention<B> {
    /// `x [T, hidden]` to what the heads bring, `[T, heads * dim]`; keys and values of the rows go
    /// to the store.
    pub fn mix(
        &self,
        ops: &B,
        x: &B::Rows,
        step: &B::Step,
        lora: &LoraRows,
        kv: &mut KvStore,
    ) -> Result<B::Rows> {
        let qkv = Linear::forward_many(ops, x, [&self.q, &self.k, &self.v], lora)?;
        let norms = self.qk_norm.as_ref().map(|(q, k)| (q, k, self.norm_eps));
        let heads = OfHeads { norms, sinks: self.sinks.as_ref() };
        ops.attend(qkv, heads, step, kv, &self.params)
    }

    /// What [`mix`](Self::mix) brings, to `[rows, hidden]`.
    pub fn project(&self, ops: &B, mixed: &B::Rows, lora: &LoraRows) -> Result<B::Rows> {
        ops.reduce(self.out.forward(ops, mixed, lora)?)
    }
}
