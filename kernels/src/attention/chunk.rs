//! One chunk of keys for the lines of a tile: scores, weights, weighted sum of V.
//!
//! The two products are register tiles. A score tile holds L lines times B groups of sixteen keys,
//! a value tile L lines times D vectors of the head; L, B and D only say how many independent
//! chains run side by side, each chain has the same steps for every choice.

use super::CHUNK;
use super::ints::Ints;
use super::plan::LINES;
use crate::LANES;
use crate::kv::{Element, Number};
use crate::simd::{EXPS, Simd, exps, softcap, sum};
use std::ops::Range;

/// Groups that are asked for before they are used. Half of a unit is 4 KiB in f16, and the
/// hardware stops at the end of a page: left alone, every half begins with a wait for memory.
pub(super) const AHEAD: usize = 4;

/// Bytes that a prefetch brings.
pub(super) const LINE: usize = 64;

/// Memory that a thread uses again.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) work: Work,
    /// `[LINES, partial_numbers]`, of all chunks so far.
    pub(super) sums: Vec<f32>,
    /// The same, of one chunk.
    pub(super) partials: Vec<f32>,
}

/// The lines of a tile.
#[derive(Default)]
pub(super) struct Work {
    /// Scaled queries, `[vectors of the head][LINES]`, 0 beyond the head.
    pub(super) queries: Vec<[[f32; LANES]; LINES]>,
    /// Scores, then weights; over integers these times the scales of V.
    pub(super) weights: Weights,
    /// Both as integers, where slabs are of integers.
    pub(super) ints: Ints,
}

/// Scores, then weights, `[LINES][CHUNK]`.
pub(super) struct Weights(pub(super) Box<[[f32; CHUNK]; LINES]>);

impl Default for Weights {
    fn default() -> Self {
        Weights(Box::new([[0.0; CHUNK]; LINES]))
    }
}

/// Keys of one chunk. Positions count from the start of the chunk.
pub(super) struct Chunk<'a, E> {
    /// K and V of each group of sixteen keys; empty outside `keys`. The last [`AHEAD`] are the
    /// first groups of the next chunk.
    pub(super) units: &'a [&'a [E]; CHUNK / LANES + AHEAD],
    /// Keys that some line sees.
    pub(super) keys: Range<usize>,
    /// Keys that each line sees.
    pub(super) visible: &'a [Range<usize>],
    pub(super) head_dim: usize,
    /// Bounds the scores.
    pub(super) softcap: Option<f32>,
}

/// What K and V are stored in, and the arithmetic of the two products.
pub(super) trait Form: Element {
    /// Where V begins in a unit.
    fn v_start(head_dim: usize) -> usize;
    /// Readies the queries of a tile.
    fn prepare<S: Simd>(simd: S, work: &mut Work);
    /// Scores of all lines with all keys of a chunk.
    fn scores<S: Simd>(simd: S, chunk: &Chunk<'_, Self>, work: &mut Work);
    /// Turns the scores of each line into weights relative to its largest score, 0 for keys that it
    /// does not see. Writes the largest score (minus infinity for no keys) and the sum of the
    /// weights (0 for no keys), the first two of `[lines, 2 + padded head_dim]`.
    fn weigh<S: Simd>(simd: S, chunk: &Chunk<'_, Self>, work: &mut Work, out: &mut [f32]);
    /// Weighted sums of V, `[lines, 2 + padded head_dim]` without the first two.
    fn values<S: Simd>(simd: S, chunk: &Chunk<'_, Self>, work: &mut Work, out: &mut [f32]);
}

impl<E: Form> Chunk<'_, E> {
    pub(super) fn groups(&self) -> Range<usize> {
        self.keys.start / LANES..self.keys.end.div_ceil(LANES)
    }

    /// Numbers of the partial of a line.
    pub(super) fn numbers(&self) -> usize {
        2 + self.head_dim.next_multiple_of(LANES)
    }

    /// Finds the largest score of a line, minus infinity for no keys. Those of keys that it does
    /// not see become minus infinity.
    #[inline(always)]
    pub(super) fn largest<S: Simd>(
        &self,
        simd: S,
        visible: &Range<usize>,
        scores: &mut [f32; CHUNK],
    ) -> f32 {
        const LANE_NUMBERS: [f32; LANES] =
            [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        let nothing = simd.splat(f32::NEG_INFINITY);
        let mut largest = nothing;
        let vectors = scores.as_chunks_mut::<LANES>().0;
        for (group, vector) in self.groups().zip(&mut vectors[self.groups()]) {
            let key = group * LANES;
            let mut x = simd.load(vector);
            if key < visible.start || key + LANES > visible.end {
                let keys = simd.add(simd.splat(key as f32), simd.load(&LANE_NUMBERS));
                x = simd.if_less(keys, simd.splat(visible.end as f32), x, nothing);
                x = simd.if_less(keys, simd.splat(visible.start as f32), nothing, x);
                simd.store(x, vector);
            }
            largest = simd.max(largest, x);
        }
        crate::simd::largest(simd, largest)
    }

    /// Where the half unit begins that is read `distance` halves after the half `half`. Halves
    /// count from the first group: all K, all V, then K of the next chunk. Null beyond.
    #[inline(always)]
    pub(super) fn ahead(&self, half: usize, distance: usize) -> *const E {
        let (groups, half) = (self.groups(), half + distance);
        let (group, start) = match half {
            _ if half < groups.len() => (groups.start + half, 0),
            _ if half < 2 * groups.len() => {
                (groups.start + half - groups.len(), E::v_start(self.head_dim))
            }
            _ => (CHUNK / LANES + half - 2 * groups.len(), 0),
        };
        let unit = self.units.get(group).and_then(|unit| unit.get(start..));
        unit.map_or(std::ptr::null(), <[E]>::as_ptr)
    }
}

impl<'a, E: Number> Chunk<'a, E> {
    /// K of a group, `[head_dim][16 keys]`.
    #[inline(always)]
    fn k(&self, group: usize) -> &'a [[E; LANES]] {
        self.units[group][..self.head_dim * LANES].as_chunks::<LANES>().0
    }

    /// V of a group, `[16 keys][vectors of the head]`.
    #[inline(always)]
    fn v(&self, group: usize) -> &'a [[E; LANES]] {
        self.units[group][self.head_dim * LANES..].as_chunks::<LANES>().0
    }
}

/// Writes the partials of a chunk, `[lines, 2 + padded head_dim]`.
#[inline(always)]
pub(super) fn partials<S: Simd, E: Form>(
    simd: S,
    chunk: &Chunk<'_, E>,
    work: &mut Work,
    out: &mut [f32],
) {
    E::scores(simd, chunk, work);
    if let Some(cap) = chunk.softcap {
        for line in &mut work.weights.0[..chunk.visible.len()] {
            let vectors = &mut line.as_chunks_mut::<LANES>().0[chunk.groups()];
            softcap(simd, vectors, cap);
        }
    }
    E::weigh(simd, chunk, work, out);
    E::values(simd, chunk, work, out);
}

impl<E: Number> Form for E {
    fn v_start(head_dim: usize) -> usize {
        LANES * head_dim
    }

    #[inline(always)]
    fn prepare<S: Simd>(_: S, _: &mut Work) {}

    #[inline(always)]
    fn scores<S: Simd>(simd: S, chunk: &Chunk<'_, E>, work: &mut Work) {
        let (lines, q) = (chunk.visible.len(), &work.queries[..]);
        let out = &mut *work.weights.0;
        for groups in stripes(chunk.groups(), GROUPS) {
            let mut line = 0;
            while line < lines {
                let groups = groups.clone();
                line += match lines - line {
                    13.. if S::WIDE => scores::<S, E, 16, 1>(simd, chunk, q, line, groups, out),
                    5.. if S::WIDE => scores::<S, E, 8, 2>(simd, chunk, q, line, groups, out),
                    6 | 11.. => scores::<S, E, 6, 1>(simd, chunk, q, line, groups, out),
                    5 | 9.. => scores::<S, E, 5, 1>(simd, chunk, q, line, groups, out),
                    3.. if S::WIDE => scores::<S, E, 4, 4>(simd, chunk, q, line, groups, out),
                    3.. => scores::<S, E, 4, 1>(simd, chunk, q, line, groups, out),
                    2 if S::WIDE => scores::<S, E, 2, 4>(simd, chunk, q, line, groups, out),
                    2 => scores::<S, E, 2, 2>(simd, chunk, q, line, groups, out),
                    _ => scores::<S, E, 1, 4>(simd, chunk, q, line, groups, out),
                };
            }
        }
    }

    #[inline(always)]
    fn weigh<S: Simd>(simd: S, chunk: &Chunk<'_, E>, work: &mut Work, out: &mut [f32]) {
        let rows = out.chunks_exact_mut(chunk.numbers());
        for ((line, visible), out) in work.weights.0.iter_mut().zip(chunk.visible).zip(rows) {
            (out[0], out[1]) = softmax(simd, chunk, visible, line);
        }
    }

    #[inline(always)]
    fn values<S: Simd>(simd: S, chunk: &Chunk<'_, E>, work: &mut Work, out: &mut [f32]) {
        let (lines, w) = (chunk.visible.len(), &*work.weights.0);
        let vectors = 0..chunk.head_dim.div_ceil(LANES);
        for vectors in stripes(vectors, vectors_of_a_stripe(lines)) {
            let mut line = 0;
            while line < lines {
                let vectors = vectors.clone();
                line += match lines - line {
                    13.. if S::WIDE => values::<S, E, 16, 1>(simd, chunk, w, line, vectors, out),
                    5.. if S::WIDE => values::<S, E, 8, 2>(simd, chunk, w, line, vectors, out),
                    6 | 11.. => values::<S, E, 6, 1>(simd, chunk, w, line, vectors, out),
                    5 | 9.. => values::<S, E, 5, 1>(simd, chunk, w, line, vectors, out),
                    3.. if S::WIDE => values::<S, E, 4, 4>(simd, chunk, w, line, vectors, out),
                    3.. => values::<S, E, 4, 1>(simd, chunk, w, line, vectors, out),
                    2 if S::WIDE => values::<S, E, 2, 8>(simd, chunk, w, line, vectors, out),
                    2 => values::<S, E, 2, 2>(simd, chunk, w, line, vectors, out),
                    _ if S::WIDE => values::<S, E, 1, 8>(simd, chunk, w, line, vectors, out),
                    _ => values::<S, E, 1, 4>(simd, chunk, w, line, vectors, out),
                };
            }
        }
    }
}

/// Groups whose K stays in the first cache while all lines read it, and no fewer than the most of a
/// score tile.
pub(super) const GROUPS: usize = 4;

/// As [`GROUPS`], of V: two vectors of halves are a cache line, and 256 of these half a cache. Few
/// lines read V once in any case, and want wide tiles.
pub(super) fn vectors_of_a_stripe(lines: usize) -> usize {
    if lines <= 4 { 8 } else { 2 }
}

/// A range in parts of `len`, the last one as long as it is.
pub(super) fn stripes(all: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    all.clone().step_by(len).map(move |start| start..all.end.min(start + len))
}

/// Scores of L lines with some groups of keys, B at a time. Returns L.
#[inline(always)]
fn scores<S: Simd, E: Number, const L: usize, const B: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    queries: &[[[f32; LANES]; LINES]],
    line: usize,
    groups: Range<usize>,
    out: &mut [[f32; CHUNK]; LINES],
) -> usize {
    let mut group = groups.start;
    while group + B <= groups.end {
        score_tile::<S, E, L, B>(simd, chunk, queries, line, group, out);
        group += B;
    }
    while group < groups.end {
        score_tile::<S, E, L, 1>(simd, chunk, queries, line, group, out);
        group += 1;
    }
    L
}

#[inline(always)]
fn score_tile<S: Simd, E: Number, const L: usize, const B: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    queries: &[[[f32; LANES]; LINES]],
    line: usize,
    group: usize,
    out: &mut [[f32; CHUNK]; LINES],
) {
    assert!(line <= LINES - L, "a line outside the tile; this is a bug");
    let k: [&[[E; LANES]]; B] = std::array::from_fn(|b| chunk.k(group + b));
    let mut acc = [[simd.splat(0.0); B]; L];
    let (half, first) = (group - chunk.groups().start, line == 0);
    let mut ahead = [std::ptr::null(); B];
    if first {
        ahead = std::array::from_fn(|b| chunk.ahead(half + b, B.max(AHEAD)));
    }
    for (vector, q) in queries.iter().enumerate() {
        let q: &[[f32; LANES]; L] = q[line..line + L].try_into().expect("L lines; this is a bug");
        let start = vector * LANES;
        let k: [&[[E; LANES]]; B] =
            std::array::from_fn(|b| &k[b][start..chunk.head_dim.min(start + LANES)]);
        for d in 0..LANES.min(chunk.head_dim - start) {
            if first && d.is_multiple_of(LINE / (LANES * size_of::<E>())) {
                for ahead in ahead {
                    simd.prefetch(ahead.wrapping_add(LANES * (start + d)).cast());
                }
            }
            // One vector at a time: more of them beside the sums are more than AVX2 has registers.
            for b in 0..B {
                let k = E::load(simd, &k[b][d]);
                for l in 0..L {
                    acc[l][b] = simd.mul_add(simd.splat(q[l][d]), k, acc[l][b]);
                }
            }
        }
    }
    for l in 0..L {
        let out = &mut out[line + l].as_chunks_mut::<LANES>().0[group..group + B];
        for b in 0..B {
            simd.store(acc[l][b], &mut out[b]);
        }
    }
}

/// [`Form::weigh`] of a line; returns what that writes.
#[inline(always)]
fn softmax<S: Simd, E: Form>(
    simd: S,
    chunk: &Chunk<'_, E>,
    visible: &Range<usize>,
    weights: &mut [f32; CHUNK],
) -> (f32, f32) {
    if visible.is_empty() {
        weights.as_chunks_mut::<LANES>().0[chunk.groups()].as_flattened_mut().fill(0.0);
        return (f32::NEG_INFINITY, 0.0);
    }
    let largest = chunk.largest(simd, visible, weights);
    let (shift, mut total) = (simd.splat(largest), simd.splat(0.0));
    let vectors = &mut weights.as_chunks_mut::<LANES>().0[chunk.groups()];
    let (many, rest) = vectors.as_chunks_mut::<EXPS>();
    for vectors in many {
        total = weigh(simd, vectors, shift, total);
    }
    for vectors in rest.as_chunks_mut::<1>().0 {
        total = weigh(simd, vectors, shift, total);
    }
    (largest, sum(simd, total))
}

/// Turns the scores of N vectors into weights; returns their sum with `total`.
#[inline(always)]
fn weigh<S: Simd, const N: usize>(
    simd: S,
    vectors: &mut [[f32; LANES]; N],
    shift: S::V,
    total: S::V,
) -> S::V {
    let mut x = [total; N];
    for i in 0..N {
        x[i] = simd.sub(simd.load(&vectors[i]), shift);
    }
    let (weights, mut total) = (exps(simd, x), total);
    for i in 0..N {
        total = simd.add(total, weights[i]);
        simd.store(weights[i], &mut vectors[i]);
    }
    total
}

/// Weighted sums of V for L lines and some vectors of the head, D at a time. Returns L.
#[inline(always)]
fn values<S: Simd, E: Number, const L: usize, const D: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    weights: &[[f32; CHUNK]; LINES],
    line: usize,
    vectors: Range<usize>,
    out: &mut [f32],
) -> usize {
    let mut vector = vectors.start;
    while vector + D <= vectors.end {
        value_tile::<S, E, L, D>(simd, chunk, weights, line, vector, out);
        vector += D;
    }
    while D > 4 && vector + 4 <= vectors.end {
        value_tile::<S, E, L, 4>(simd, chunk, weights, line, vector, out);
        vector += 4;
    }
    while vector < vectors.end {
        value_tile::<S, E, L, 1>(simd, chunk, weights, line, vector, out);
        vector += 1;
    }
    L
}

#[inline(always)]
fn value_tile<S: Simd, E: Number, const L: usize, const D: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    weights: &[[f32; CHUNK]; LINES],
    line: usize,
    vector: usize,
    out: &mut [f32],
) {
    let weights: &[[f32; CHUNK]; L] =
        weights[line..line + L].try_into().expect("L lines; this is a bug");
    let vectors = chunk.head_dim.div_ceil(LANES);
    let mut acc = [[simd.splat(0.0); D]; L];
    let (groups, first) = (chunk.groups(), line == 0 && vector == 0);
    for group in groups.clone() {
        let half = groups.len() + group - groups.start;
        let mut ahead = if first { chunk.ahead(half, AHEAD) } else { std::ptr::null() };
        let rows = &chunk.v(group)[vector..];
        // Places beyond the last key may hold anything, even NaN of another sequence.
        for key in 0..LANES.min(chunk.keys.end - group * LANES) {
            if first {
                for at in (0..vectors * LANES).step_by(LINE / size_of::<E>()) {
                    simd.prefetch(ahead.wrapping_add(at).cast());
                }
                ahead = ahead.wrapping_add(vectors * LANES);
            }
            let row = &rows[key * vectors..][..D];
            let mut v = [simd.splat(0.0); D];
            for d in 0..D {
                v[d] = E::load(simd, &row[d]);
            }
            for l in 0..L {
                let weight = simd.splat(weights[l][group * LANES + key]);
                for d in 0..D {
                    acc[l][d] = simd.mul_add(weight, v[d], acc[l][d]);
                }
            }
        }
    }
    let numbers = chunk.numbers();
    for l in 0..L {
        // Lines beyond the tile have no place: their accumulators are dropped.
        if line + l < chunk.visible.len() {
            let out = &mut out[(line + l) * numbers + 2..].as_chunks_mut::<LANES>().0[vector..];
            for d in 0..D {
                simd.store(acc[l][d], &mut out[d]);
            }
        }
    }
}
