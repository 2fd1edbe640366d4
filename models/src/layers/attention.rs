//! Grouped-query attention with rotary positions over the paged KV store.
//!
//! Vaswani et al. 2017; Ainslie et al. 2023 (GQA); Su et al. 2021 (rotary).

use super::linear::Linear;
use super::rotary::RopeTable;
use crate::Result;
use crate::backend::{AttentionParams, Backend};
use crate::batch::{ForwardBatch, LoraRows};
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
    /// Epsilon of those norms.
    pub norm_eps: f32,
    /// Heads, window, place in the store.
    pub params: AttentionParams,
}

impl<B: Backend> Attention<B> {
    /// `x [T, hidden]` to `[T, hidden]`; keys and values of the rows go to the store.
    pub fn forward(
        &self,
        ops: &B,
        x: &B::Rows,
        rope: &RopeTable,
        batch: &ForwardBatch,
        lora: &LoraRows,
        kv: &mut KvStore,
    ) -> Result<B::Rows> {
        let [mut q, mut k, v] = Linear::forward_many(ops, x, [&self.q, &self.k, &self.v], lora)?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = ops.rms_norm(&q, q_norm, self.norm_eps)?;
            k = ops.rms_norm(&k, k_norm, self.norm_eps)?;
        }
        let q = ops.rope(q, rope, self.params.head_dim)?;
        let k = ops.rope(k, rope, self.params.head_dim)?;
        let mixed = ops.attention(&q, &k, &v, batch, kv, &self.params)?;
        self.out.forward(ops, &mixed, lora)
    }
}
