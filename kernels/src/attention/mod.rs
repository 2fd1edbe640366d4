//! Causal attention of a ragged batch over paged K and V.
//!
//! Row `i` of a sequence that brings `n_new` rows sees the keys
//! `0 ..= context_len - n_new + i`, or the last `window` of them. Prefill and decode are one case.
//!
//! # Order of arithmetic
//! Keys are taken in chunks of [`CHUNK`], counted from position 0. A chunk gives every query head
//! of every row a partial: the largest score, the sum of the weights, the weighted sum of V.
//! Partials are merged from the first chunk to the last, behind that of the head's sink. Inside a
//! chunk a score is one chain of fused multiply-adds over the head, the weights have sixteen
//! partial sums, the weighted sum is one chain over the keys. None of this depends on the batch, on
//! how a prompt was cut into steps, on blocks, or on threads, so the result of a row is the same,
//! bit by bit, whatever is computed beside it, and for every instruction set. Where K and V are
//! integers, queries and weights become such too, and both chains are exact sums: see `ints.rs`.
//!
//! # Division of work
//! The rows of a sequence times the query heads that share a KV head are *lines*. Up to sixteen
//! lines are a tile, which reads each K and V once. Tiles are the tasks; when there are too few of
//! them for the threads (decode over a long context), a few chunks of a tile are a task, and the
//! partials are merged in a second run. So they are where sequences of few rows begin with the same
//! blocks: as far as these go, rows of several sequences are lines of one tile (see `plan.rs`).
//!
//! Tolerance against [`scalar`], which sums in f64 over what is stored: 2e-5 for inputs in [-1, 1];
//! 2e-2 over bytes, where a score is off by a 250th of its largest terms, and weights by a 255th;
//! 5e-4 over i16.
//!
//! Encoders, which have no cache, attend in `bidirectional.rs`.
//! Deliberately absent: masks other than causal and window, dropout, ALiBi.

mod bidirectional;
mod chunk;
mod ints;
mod plan;
pub mod scalar;
mod tile;
mod words;

pub use bidirectional::{Heads, bidirectional};

use crate::kv::{KvSlab, KvType};
use crate::parts::Parts;
use crate::simd::run;
use crate::{Isa, Pool};
use chunk::Form;
use half::{bf16, f16};
use plan::{End, Plan, Ragged, Tile};
use std::ops::Range;
use tile::{Call, FinishTile, PartialsOfChunks, WholeTile, with_scratch};

/// Keys that are reduced together; chunks begin at multiples of this position.
pub const CHUNK: usize = 256;

/// Which rows belong to which sequence, and where its K and V are.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBatch<'a> {
    /// `[n_seqs + 1]`: sequence `s` brings the rows `cu_q[s] .. cu_q[s + 1]`.
    pub cu_q: &'a [u32],
    /// `[n_seqs]`: keys of each sequence, those of its new rows included.
    pub context_len: &'a [u32],
    /// `[n_seqs]`: the blocks of each sequence, in order of position.
    pub block_tables: &'a [&'a [u32]],
}

/// What a layer says about its attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams<'a> {
    /// Query heads, a multiple of the slab's KV heads. Head `h` reads KV head `h / group`.
    pub n_heads: usize,
    /// Scores are `scale * q.k`.
    pub scale: f32,
    /// Scores are `softcap * tanh(scale * q.k / softcap)` then; positive (Gemma Team 2024).
    pub softcap: Option<f32>,
    /// A row sees at most this many keys, itself included.
    pub window: Option<usize>,
    /// `[n_heads]`: a score of each query head that stands in its softmax beside those of the keys
    /// and has no value (Xiao et al. 2023, OpenAI 2025); neither scaled nor bounded.
    pub sinks: Option<&'a [f32]>,
}

/// `out = softmax(scale * q k^T) v` for every row and head; `q` and `out` are
/// `[rows, n_heads, head_dim]`; scores are bounded before the softmax where there is a softcap. K
/// and V of the new rows are in `kv` already. The output of a row that no sequence owns is left
/// alone.
///
/// # Panics
/// When the batch contradicts itself or names a block outside the slab: the caller checks input.
pub fn attention(
    pool: &Pool,
    isa: Isa,
    q: &[f32],
    kv: &KvSlab,
    batch: &AttentionBatch<'_>,
    params: &AttentionParams<'_>,
    out: &mut [f32],
) {
    check(q, kv, batch, params, out);
    match kv.kv_type() {
        KvType::F32 => attention_as::<f32>(pool, isa, q, kv, batch, params, out),
        KvType::F16 => attention_as::<f16>(pool, isa, q, kv, batch, params, out),
        KvType::BF16 => attention_as::<bf16>(pool, isa, q, kv, batch, params, out),
        KvType::Q16_0 => attention_as::<i16>(pool, isa, q, kv, batch, params, out),
        KvType::Q8_0 => attention_as::<i8>(pool, isa, q, kv, batch, params, out),
        KvType::Fp8 => attention_as::<u8>(pool, isa, q, kv, batch, params, out),
    }
}

fn attention_as<E: Form>(
    pool: &Pool,
    isa: Isa,
    q: &[f32],
    kv: &KvSlab,
    batch: &AttentionBatch<'_>,
    params: &AttentionParams<'_>,
    out: &mut [f32],
) {
    /// Products below which a second thread is not worth waking.
    const SMALL: usize = 64 * 1024;
    let of = Ragged { batch, params, shape: kv.shape() };
    let mut plan = Plan::new(of);
    let products = |tile: &Tile| tile.lines.len() * tile.keys.len() * of.shape.head_dim;
    let alone = plan.tiles().map(products).sum::<usize>() < SMALL || pool.threads() == 1;
    let few = plan.tiles().count() < 4 * pool.threads();
    if !alone && few && plan.tiles().any(|tile| tile.chunks().len() > 1) {
        plan.split();
    }
    let out = Parts::new(out);
    let call = Call { q, elements: kv.elements::<E>(), of, rows: &plan.rows, out };
    compute((!alone).then_some(pool), isa, &call, &plan);
}

/// Runs the tasks of a plan: whole tiles, and some neighbouring chunks of each part; then brings
/// together what the parts have. Without a pool on this thread alone.
fn compute<E: Form>(pool: Option<&Pool>, isa: Isa, call: &Call<'_, E>, plan: &Plan) {
    const TASKS_PER_THREAD: usize = 8;
    let threads = pool.map_or(1, Pool::threads);
    let run_all = |tasks: usize, f: &(dyn Fn(usize) + Sync)| match pool {
        Some(pool) => pool.run(tasks, f),
        None => (0..tasks).for_each(f),
    };
    let numbers = tile::partial_numbers(call.of.shape);
    let all: usize = plan.parts.iter().map(|tile| tile.chunks().len()).sum();
    let each = (all / (TASKS_PER_THREAD * threads)).max(1);
    let mut tasks: Vec<(usize, Range<usize>, Range<usize>)> = Vec::new(); // part, chunks, partials
    let mut places: Vec<Range<usize>> = Vec::new(); // of the partials of each part
    let mut end = 0;
    for (i, tile) in plan.parts.iter().enumerate() {
        let first = end;
        for chunk in tile.chunks().step_by(each) {
            let chunks = chunk..tile.chunks().end.min(chunk + each);
            let start = end;
            end += chunks.len() * tile.lines.len() * numbers;
            tasks.push((i, chunks, start..end));
        }
        places.push(first..end);
    }
    let mut partials = vec![0.0; end];
    let shares = Parts::new(&mut partials);
    let whole = plan.whole.len();
    run_all(whole + tasks.len(), &|i| {
        // Later rows see more keys: the long tasks go first.
        let Some(i) = i.checked_sub(whole) else {
            let tile = &plan.whole[whole - 1 - i];
            return with_scratch(|scratch| run(isa, WholeTile { call, tile, scratch }));
        };
        let (part, chunks, place) = &tasks[i];
        // SAFETY: the places of different tasks do not overlap.
        let out = unsafe { shares.take(place.clone()) };
        let (tile, chunks) = (&plan.parts[*part], chunks.clone());
        with_scratch(|scratch| run(isa, PartialsOfChunks { call, tile, chunks, out, scratch }));
    });
    let partials = &partials;
    run_all(plan.ends.len(), &|i| {
        let End { tile, pieces } = &plan.ends[i];
        let piece = |&(part, line): &(usize, usize)| {
            (&partials[places[part].clone()], plan.parts[part].lines.len(), line)
        };
        run(isa, FinishTile { call, tile, pieces: &mut pieces.iter().map(piece) });
    });
}

fn check(
    q: &[f32],
    kv: &KvSlab,
    batch: &AttentionBatch<'_>,
    params: &AttentionParams<'_>,
    out: &[f32],
) {
    let shape = kv.shape();
    let row = params.n_heads * shape.head_dim;
    let n_seqs = batch.context_len.len();
    assert!(
        params.n_heads > 0 && params.n_heads.is_multiple_of(shape.n_kv_heads),
        "groups of heads"
    );
    assert!(params.window != Some(0), "a window of no keys");
    assert!(params.softcap.is_none_or(|cap| cap > 0.0), "a cap of nothing");
    let whole = |sinks: &[f32]| sinks.len() == params.n_heads;
    assert!(params.sinks.is_none_or(whole), "a sink of every head");
    assert_eq!(q.len(), out.len(), "q and out have one shape");
    assert_eq!(q.len() % row, 0, "q is [rows, n_heads, head_dim]");
    assert_eq!(batch.block_tables.len(), n_seqs, "one block table per sequence");
    assert_eq!(batch.cu_q.len(), n_seqs + 1, "cu_q is [n_seqs + 1]");
    assert!(batch.cu_q.is_sorted(), "cu_q grows");
    assert!(batch.cu_q[n_seqs] as usize * row <= q.len(), "cu_q ends inside q");
    for (s, table) in batch.block_tables.iter().enumerate() {
        let n_new = (batch.cu_q[s + 1] - batch.cu_q[s]) as usize;
        let keys = batch.context_len[s] as usize;
        assert!(n_new <= keys, "the context of a sequence includes its new rows");
        assert!(keys <= table.len() * shape.block_len, "the block table covers the context");
        let used = &table[..keys.div_ceil(shape.block_len)];
        assert!(used.iter().all(|b| (*b as usize) < shape.n_blocks), "a block outside the slab");
    }
}

#[cfg(test)]
mod tests;
