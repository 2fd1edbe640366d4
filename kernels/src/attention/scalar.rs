//! The truth: one score after the other, in f64, over a plain copy of K and V.

use super::{AttentionBatch, AttentionParams};
use crate::kv::KvSlab;

/// [`attention`](super::attention), slowly and exactly.
pub fn attention(
    q: &[f32],
    kv: &KvSlab,
    batch: &AttentionBatch<'_>,
    params: &AttentionParams<'_>,
    out: &mut [f32],
) {
    let shape = kv.shape();
    let (dim, group) = (shape.head_dim, params.n_heads / shape.n_kv_heads);
    for (seq, table) in batch.block_tables.iter().enumerate() {
        let context = batch.context_len[seq] as usize;
        let rows = batch.cu_q[seq] as usize..batch.cu_q[seq + 1] as usize;
        let (k, v) = contiguous(kv, table, context);
        let n_new = rows.len();
        for (i, row) in rows.enumerate() {
            let end = context - n_new + i + 1;
            let start = params.window.map_or(0, |window| end.saturating_sub(window));
            for head in 0..params.n_heads {
                let at = (row * params.n_heads + head) * dim;
                let key = |j: usize| (j * shape.n_kv_heads + head / group) * dim;
                let scores: Vec<f64> = (start..end)
                    .map(|j| score(&q[at..at + dim], &k[key(j)..key(j) + dim], params))
                    .collect();
                let sink = params.sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
                let largest = scores.iter().copied().fold(sink, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum::<f64>() + (sink - largest).exp();
                for d in 0..dim {
                    let values = (start..end).map(|j| f64::from(v[key(j) + d]));
                    let sum: f64 = weights.iter().zip(values).map(|(w, v)| w * v).sum();
                    out[at + d] = (sum / total) as f32;
                }
            }
        }
    }
}

fn score(q: &[f32], k: &[f32], params: &AttentionParams<'_>) -> f64 {
    let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
    let score = dot * f64::from(params.scale);
    match params.softcap.map(f64::from) {
        Some(cap) => cap * (score / cap).tanh(),
        None => score,
    }
}

/// K and V of one sequence, both `[context, n_kv_heads, head_dim]`.
fn contiguous(kv: &KvSlab, table: &[u32], context: usize) -> (Vec<f32>, Vec<f32>) {
    let shape = kv.shape();
    let row = shape.n_kv_heads * shape.head_dim;
    let (mut k, mut v) = (vec![0.0; context * row], vec![0.0; context * row]);
    let rows = k.chunks_exact_mut(row).zip(v.chunks_exact_mut(row));
    for (position, (k, v)) in rows.enumerate() {
        let slot = table[position / shape.block_len] as usize * shape.block_len
            + position % shape.block_len;
        kv.read(slot as u32, k, v);
    }
    (k, v)
}
