//! What a tile computes: the partials of its lines, chunk by chunk, and what these come to.

use super::CHUNK;
use super::chunk::{self, AHEAD, Chunk, Form, LINE, Scratch, Work};
use super::plan::{LINES, Ragged, Row, Tile};
use crate::LANES;
use crate::kv::KvShape;
use crate::parts::Parts;
use crate::simd::{Kernel, Simd, exp};
use std::cell::RefCell;
use std::ops::Range;

/// What all tasks of one call share.
pub(super) struct Call<'a, E> {
    pub(super) q: &'a [f32],
    pub(super) elements: &'a [E],
    pub(super) of: Ragged<'a>,
    /// Of the plan.
    pub(super) rows: &'a [Row],
    pub(super) out: Parts<'a, f32>,
}

/// Numbers of the partial of one line: `[largest score, sum of weights, weighted sum of V]`.
pub(super) fn partial_numbers(shape: KvShape) -> usize {
    2 + shape.padded_head_dim()
}

/// Everything that a tile needs, on one thread.
pub(super) struct WholeTile<'a, E> {
    pub(super) call: &'a Call<'a, E>,
    pub(super) tile: &'a Tile,
    pub(super) scratch: &'a mut Scratch,
}

impl<E: Form> Kernel for WholeTile<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WholeTile { call, tile, scratch } = self;
        let Scratch { work, sums, partials } = scratch;
        let numbers = partial_numbers(call.of.shape);
        let len = tile.lines.len() * numbers;
        ask_for(simd, call, tile);
        load_queries(simd, call, tile, &mut work.queries);
        E::prepare(simd, work);
        sums.resize(len, 0.0);
        partials.resize(len, 0.0);
        begin(call, tile, sums);
        for chunk in tile.chunks() {
            partials_of_chunk(simd, call, tile, chunk, work, partials);
            merge(simd, sums, partials, numbers);
        }
        write_out(simd, call, tile, sums);
    }
}

/// The partials of some chunks of a tile, `[chunks, lines, partial_numbers]`.
pub(super) struct PartialsOfChunks<'a, E> {
    pub(super) call: &'a Call<'a, E>,
    pub(super) tile: &'a Tile,
    pub(super) chunks: Range<usize>,
    pub(super) out: &'a mut [f32],
    pub(super) scratch: &'a mut Scratch,
}

impl<E: Form> Kernel for PartialsOfChunks<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let PartialsOfChunks { call, tile, chunks, out, scratch } = self;
        let Scratch { work, .. } = scratch;
        load_queries(simd, call, tile, &mut work.queries);
        E::prepare(simd, work);
        let numbers = tile.lines.len() * partial_numbers(call.of.shape);
        for (chunk, out) in chunks.zip(out.chunks_exact_mut(numbers)) {
            partials_of_chunk(simd, call, tile, chunk, work, out);
        }
    }
}

/// Merges the partials of all chunks of some lines.
pub(super) struct FinishTile<'a, E> {
    pub(super) call: &'a Call<'a, E>,
    pub(super) tile: &'a Tile,
    /// Of every part, from the first chunk to the last: `[chunks, lines, partial_numbers]`, how
    /// many lines that are, and which of them is the first of this tile.
    pub(super) pieces: &'a mut dyn Iterator<Item = (&'a [f32], usize, usize)>,
}

impl<E: Form> Kernel for FinishTile<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let numbers = partial_numbers(self.call.of.shape);
        let mut sums = vec![0.0; self.tile.lines.len() * numbers];
        begin(self.call, self.tile, &mut sums);
        for (partials, lines, first) in self.pieces {
            for chunk in partials.chunks_exact(lines * numbers) {
                let own = &chunk[first * numbers..][..sums.len()];
                merge(simd, &mut sums, own, numbers);
            }
        }
        write_out(simd, self.call, self.tile, &sums);
    }
}

/// Asks for the lines of the cache that hold the queries, and those that the result is written to:
/// heads of several rows lie far apart, and each would be waited for.
#[inline(always)]
fn ask_for<S: Simd, E>(simd: S, call: &Call<'_, E>, tile: &Tile) {
    const NUMBERS: usize = LINE / size_of::<f32>();
    let dim = call.of.shape.head_dim;
    let out = call.out.as_ptr();
    for line in tile.lines.clone() {
        let start = query_start(call, tile, line);
        for at in (start..start + dim).step_by(NUMBERS) {
            simd.prefetch(call.q.as_ptr().wrapping_add(at).cast());
            simd.prefetch(out.wrapping_add(at).cast());
        }
    }
}

/// Partials of no keys: those of the sinks, where there are some.
fn begin<E>(call: &Call<'_, E>, tile: &Tile, sums: &mut [f32]) {
    sums.fill(0.0);
    let sums = sums.chunks_exact_mut(partial_numbers(call.of.shape));
    for (sum, line) in sums.zip(tile.lines.clone()) {
        [sum[0], sum[1]] = match call.of.params.sinks {
            None => [f32::NEG_INFINITY, 0.0],
            Some(sinks) => [sinks[head_of(call, tile, line)], 1.0],
        };
    }
}

/// Adds the partials of the next chunk to those of the chunks before it, both of all lines. One of
/// no keys changes nothing, not even a bit.
#[inline(always)]
fn merge<S: Simd>(simd: S, sums: &mut [f32], next: &[f32], numbers: usize) {
    /// Lines whose two factors are one vector.
    const TOGETHER: usize = LANES / 2;
    let parts = sums.chunks_mut(TOGETHER * numbers).zip(next.chunks(TOGETHER * numbers));
    for (sums, next) in parts {
        let mut factors = [0.0; LANES];
        let lines = sums.chunks_exact(numbers).zip(next.chunks_exact(numbers));
        for ((sum, next), factors) in lines.zip(factors.as_chunks_mut::<2>().0) {
            let largest = if sum[0] > next[0] { sum[0] } else { next[0] };
            *factors = [sum[0] - largest, next[0] - largest];
        }
        let exponents = simd.load(&factors);
        simd.store(exp(simd, exponents), &mut factors);
        let lines = sums.chunks_exact_mut(numbers).zip(next.chunks_exact(numbers));
        for ((sum, next), [old, new]) in lines.zip(factors.as_chunks::<2>().0) {
            // Of some keys the sum is 1 or more, or no number.
            if next[1] != 0.0 {
                merge_line(simd, sum, next, *old, *new);
            }
        }
    }
}

#[inline(always)]
fn merge_line<S: Simd>(simd: S, sum: &mut [f32], next: &[f32], old: f32, new: f32) {
    sum[0] = if sum[0] > next[0] { sum[0] } else { next[0] };
    sum[1] = old.mul_add(sum[1], new * next[1]);
    let (old, new) = (simd.splat(old), simd.splat(new));
    let next = next[2..].as_chunks::<LANES>().0;
    for (sum, next) in sum[2..].as_chunks_mut::<LANES>().0.iter_mut().zip(next) {
        let added = simd.mul(new, simd.load(next));
        simd.store(simd.mul_add(old, simd.load(sum), added), sum);
    }
}

/// Divides by the sum of the weights. Adding 0 turns -0 into 0: keys that a line does not see may
/// have added a zero of either sign.
#[inline(always)]
fn write_out<S: Simd, E: Form>(simd: S, call: &Call<'_, E>, tile: &Tile, sums: &[f32]) {
    let dim = call.of.shape.head_dim;
    let numbers = partial_numbers(call.of.shape);
    for (line, sum) in tile.lines.clone().zip(sums.chunks_exact(numbers)) {
        let start = query_start(call, tile, line);
        // SAFETY: a line belongs to one tile, and a tile is written by one task.
        let out = unsafe { call.out.take(start..start + dim) };
        let (scale, zero) = (simd.splat(1.0 / sum[1]), simd.splat(0.0));
        let (vectors, _) = sum[2..].as_chunks::<LANES>();
        for (out, x) in out.chunks_mut(LANES).zip(vectors) {
            let y = simd.add(simd.mul(simd.load(x), scale), zero);
            match out.try_into() {
                Ok(whole) => simd.store(y, whole),
                Err(_) => simd.store_part(y, out),
            }
        }
    }
}

/// Where the numbers of a line are in `q` and in `out`.
fn query_start<E>(call: &Call<'_, E>, tile: &Tile, line: usize) -> usize {
    let (group, head) = (call.of.group(), head_of(call, tile, line));
    (call.rows[line / group].at * call.of.params.n_heads + head) * call.of.shape.head_dim
}

/// The query head of a line.
fn head_of<E>(call: &Call<'_, E>, tile: &Tile, line: usize) -> usize {
    let group = call.of.group();
    tile.kv_head * group + line % group
}

/// Scaled queries of a tile; lines beyond the tile are 0.
#[inline(always)]
fn load_queries<S: Simd, E>(
    simd: S,
    call: &Call<'_, E>,
    tile: &Tile,
    queries: &mut Vec<[[f32; LANES]; LINES]>,
) {
    let dim = call.of.shape.head_dim;
    if tile.lines.len() < LINES {
        queries.clear();
    }
    queries.resize(dim.div_ceil(LANES), [[0.0; LANES]; LINES]);
    let scale = simd.splat(call.of.params.scale);
    for (i, line) in tile.lines.clone().enumerate() {
        let start = query_start(call, tile, line);
        let vectors = call.q[start..start + dim].chunks(LANES);
        for (place, x) in queries.iter_mut().zip(vectors) {
            let x = match x.try_into() {
                Ok(whole) => simd.load(whole),
                Err(_) => simd.load_part(x, 0.0),
            };
            simd.store(simd.mul(x, scale), &mut place[i]);
        }
    }
}

#[inline(always)]
fn partials_of_chunk<S: Simd, E: Form>(
    simd: S,
    call: &Call<'_, E>,
    tile: &Tile,
    chunk: usize,
    work: &mut Work,
    out: &mut [f32],
) {
    let shape = call.of.shape;
    let base = chunk * CHUNK;
    let local = |keys: Range<usize>| {
        keys.start.clamp(base, base + CHUNK) - base..keys.end.clamp(base, base + CHUNK) - base
    };
    let keys = local(tile.keys.clone());
    let table = call.of.batch.block_tables[tile.seq];
    let mut units: [&[E]; CHUNK / LANES + AHEAD] = [&[]; CHUNK / LANES + AHEAD];
    let last = tile.keys.end.min(base + CHUNK + AHEAD * LANES) - base;
    let groups = keys.start / LANES..last.div_ceil(LANES);
    for (unit, group) in units[groups.clone()].iter_mut().zip(groups) {
        let position = base + group * LANES;
        let block = table[position / shape.block_len] as usize;
        let slot = block * shape.block_len + position % shape.block_len;
        let len = shape.unit_len(E::TYPE);
        *unit = &call.elements[shape.unit(slot, tile.kv_head) * len..][..len];
    }
    let group = call.of.group();
    let mut visible: [Range<usize>; LINES] = Default::default();
    for (keys, line) in visible.iter_mut().zip(tile.lines.clone()) {
        *keys = local(call.rows[line / group].keys.clone());
    }
    let chunk = Chunk {
        units: &units,
        keys,
        visible: &visible[..tile.lines.len()],
        head_dim: shape.head_dim,
        softcap: call.of.params.softcap,
    };
    chunk::partials(simd, &chunk, work, out);
}

/// Calls `f` with the memory that this thread uses again. A kernel is run inside `f`: code inside a
/// closure that is not inlined would be compiled without the instruction set.
pub(super) fn with_scratch(f: impl FnOnce(&mut Scratch)) {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
    }
    SCRATCH.with_borrow_mut(f);
}
