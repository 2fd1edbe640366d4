//! The arithmetic of slabs of bytes: both products of a chunk are exact sums of integers.
//!
//! Queries and weights become i16 on a grid of their own: a query on that of its largest number,
//! the weights of a line, times the scales of V, on that of the largest of them in the chunk. That
//! is 2^-16 of the largest, a hundredth of what the bytes of K and V leave out. i16 times i8 in
//! pairs is what processors multiply and add, two products to a lane where floats have one.

use super::CHUNK;
use super::chunk::{AHEAD, Chunk, Form, GROUPS, LINE, Weights, Work, stripes, vectors_of_a_stripe};
use super::plan::LINES;
use crate::LANES;
use crate::kv::q8;
use crate::simd::{Simd, round, sum};
use std::ops::Range;

/// Memory that a thread uses again.
pub(super) struct Ints {
    /// `[vectors of the head][LINES]`, in pairs.
    queries: Vec<[[[i16; 2]; LANES / 2]; LINES]>,
    /// `[LINES]`
    query_scales: [f32; LINES],
    /// `[LINES][CHUNK / 2]`
    weights: Box<[[[i16; 2]; CHUNK / 2]; LINES]>,
    /// `[LINES]`
    weight_scales: [f32; LINES],
}

impl Default for Ints {
    fn default() -> Self {
        Ints {
            queries: Vec::new(),
            query_scales: [0.0; LINES],
            weights: Box::new([[[0; 2]; CHUNK / 2]; LINES]),
            weight_scales: [0.0; LINES],
        }
    }
}

impl Form for i8 {
    fn v_start(head_dim: usize) -> usize {
        q8::v_start(head_dim)
    }

    #[inline(always)]
    fn prepare<S: Simd>(simd: S, work: &mut Work) {
        let (ints, zero) = (&mut work.ints, simd.splat(0.0));
        // A sum over the head must fit an i32.
        let limit = (i32::MAX / 128) as f32 / (work.queries.len() * LANES) as f32;
        let limit = limit.min(LARGEST);
        ints.queries.resize(work.queries.len(), [[[0; 2]; LANES / 2]; LINES]);
        for (line, scale) in ints.query_scales.iter_mut().enumerate() {
            let (mut largest, mut poison) = (zero, zero);
            for q in &work.queries {
                let q = simd.load(&q[line]);
                largest = simd.max(simd.max(q, simd.sub(zero, q)), largest);
                poison = simd.add(poison, simd.sub(q, q));
            }
            let largest = greatest(simd, largest);
            let inverse = simd.splat(if largest > SMALLEST { limit / largest } else { 0.0 });
            *scale = largest / limit + sum(simd, poison);
            for (q, out) in work.queries.iter().zip(&mut ints.queries) {
                let rounded = round(simd, simd.mul(simd.load(&q[line]), inverse));
                out[line].as_flattened_mut().copy_from_slice(&rounded);
            }
        }
    }

    #[inline(always)]
    fn scores<S: Simd>(simd: S, chunk: &Chunk<'_, i8>, work: &mut Work) {
        let lines = chunk.visible.len();
        for groups in stripes(chunk.groups(), GROUPS) {
            let mut line = 0;
            while line < lines {
                let groups = groups.clone();
                line += match lines - line {
                    5.. if S::WIDE => scores::<S, 8, 2>(simd, chunk, work, line, groups),
                    3.. if S::WIDE => scores::<S, 4, 4>(simd, chunk, work, line, groups),
                    3.. => scores::<S, 4, 1>(simd, chunk, work, line, groups),
                    2 if S::WIDE => scores::<S, 2, 4>(simd, chunk, work, line, groups),
                    2 => scores::<S, 2, 2>(simd, chunk, work, line, groups),
                    _ => scores::<S, 1, 4>(simd, chunk, work, line, groups),
                };
            }
        }
    }

    #[inline(always)]
    fn values<S: Simd>(simd: S, chunk: &Chunk<'_, i8>, work: &mut Work, out: &mut [f32]) {
        let lines = chunk.visible.len();
        let ints = &mut work.ints;
        for line in 0..lines {
            let (weights, places) = (&work.weights.0[line], &mut ints.weights[line]);
            ints.weight_scales[line] = round_weights(simd, chunk, weights, places);
        }
        let vectors = 0..chunk.head_dim.div_ceil(LANES);
        for vectors in stripes(vectors, vectors_of_a_stripe(lines)) {
            let mut line = 0;
            while line < lines {
                let vectors = vectors.clone();
                line += match lines - line {
                    5.. if S::WIDE => values::<S, 8, 2>(simd, chunk, ints, line, vectors, out),
                    3.. if S::WIDE => values::<S, 4, 4>(simd, chunk, ints, line, vectors, out),
                    3.. => values::<S, 4, 1>(simd, chunk, ints, line, vectors, out),
                    2 if S::WIDE => values::<S, 2, 8>(simd, chunk, ints, line, vectors, out),
                    2 => values::<S, 2, 2>(simd, chunk, ints, line, vectors, out),
                    _ if S::WIDE => values::<S, 1, 8>(simd, chunk, ints, line, vectors, out),
                    _ => values::<S, 1, 4>(simd, chunk, ints, line, vectors, out),
                };
            }
        }
    }
}

/// The largest i16 of a grid.
const LARGEST: f32 = 32767.0;

/// Numbers that are all below this are zeroes: their scale would be no normal number.
const SMALLEST: f32 = 1e-30;

impl<'a> Chunk<'a, i8> {
    /// Scales of a group: of K, of V.
    #[inline(always)]
    fn scales(&self, group: usize) -> &'a [[f32; LANES]] {
        let scales: &[f32] = bytemuck::cast_slice(&self.units[group][..q8::SCALES]);
        scales.as_chunks::<LANES>().0
    }

    /// K of a group, `[pairs of the head][16 keys]`.
    #[inline(always)]
    fn k_pairs(&self, group: usize) -> &'a [[[i8; 2]; LANES]] {
        let k = &self.units[group][q8::SCALES..q8::v_start(self.head_dim)];
        k.as_chunks::<2>().0.as_chunks::<LANES>().0
    }

    /// V of a group, `[8 pairs of keys][vectors of the head]`.
    #[inline(always)]
    fn v_pairs(&self, group: usize) -> &'a [[[i8; 2]; LANES]] {
        let v = &self.units[group][q8::v_start(self.head_dim)..];
        v.as_chunks::<2>().0.as_chunks::<LANES>().0
    }
}

/// The largest lane, or 0.
#[inline(always)]
fn greatest<S: Simd>(simd: S, v: S::V) -> f32 {
    let mut lanes = [0.0; LANES];
    simd.store(v, &mut lanes);
    lanes.into_iter().fold(0.0, |a, b| if a > b { a } else { b })
}

/// Scores of L lines with some groups of keys, B at a time. Returns L.
#[inline(always)]
fn scores<S: Simd, const L: usize, const B: usize>(
    simd: S,
    chunk: &Chunk<'_, i8>,
    work: &mut Work,
    line: usize,
    groups: Range<usize>,
) -> usize {
    let mut group = groups.start;
    while group + B <= groups.end {
        score_tile::<S, L, B>(simd, chunk, &work.ints, line, group, &mut work.weights);
        group += B;
    }
    while group < groups.end {
        score_tile::<S, L, 1>(simd, chunk, &work.ints, line, group, &mut work.weights);
        group += 1;
    }
    L
}

#[inline(always)]
fn score_tile<S: Simd, const L: usize, const B: usize>(
    simd: S,
    chunk: &Chunk<'_, i8>,
    ints: &Ints,
    line: usize,
    group: usize,
    out: &mut Weights,
) {
    assert!(line <= LINES - L, "a line outside the tile; this is a bug");
    let pairs = chunk.head_dim.div_ceil(2);
    let k: [&[[[i8; 2]; LANES]]; B] = std::array::from_fn(|b| chunk.k_pairs(group + b));
    let mut acc = [[simd.zero_ints(); B]; L];
    let half = group - chunk.groups().start;
    let ahead: [*const i8; B] = std::array::from_fn(|b| chunk.ahead(half + b, B.max(AHEAD)));
    for (vector, q) in ints.queries.iter().enumerate() {
        let q: &[[[i16; 2]; LANES / 2]; L] =
            q[line..line + L].try_into().expect("L lines; this is a bug");
        let start = vector * LANES / 2;
        let k: [&[[[i8; 2]; LANES]]; B] =
            std::array::from_fn(|b| &k[b][start..pairs.min(start + LANES / 2)]);
        for pair in 0..(LANES / 2).min(pairs - start) {
            if line == 0 && pair.is_multiple_of(LINE / (2 * LANES)) {
                for ahead in ahead {
                    simd.prefetch(ahead.wrapping_add(2 * LANES * (start + pair)).cast());
                }
            }
            for b in 0..B {
                let k = simd.load_pairs(&k[b][pair]);
                for l in 0..L {
                    acc[l][b] = simd.dot_pairs(k, q[l][pair], acc[l][b]);
                }
            }
        }
    }
    for (l, acc) in acc.into_iter().enumerate() {
        let scale = simd.splat(ints.query_scales[line + l]);
        let out = &mut out.0[line + l].as_chunks_mut::<LANES>().0[group..group + B];
        for b in 0..B {
            let scale = simd.mul(simd.load(&chunk.scales(group + b)[0]), scale);
            simd.store(simd.mul(simd.to_floats(acc[b]), scale), &mut out[b]);
        }
    }
}

/// The weights of a line times the scales of V, on a grid; returns its scale. A key of weight 0 is
/// one that the line does not see, and its scale may be anything.
#[inline(always)]
fn round_weights<S: Simd>(
    simd: S,
    chunk: &Chunk<'_, i8>,
    weights: &[f32; CHUNK],
    out: &mut [[i16; 2]; CHUNK / 2],
) -> f32 {
    let zero = simd.splat(0.0);
    let vectors = weights.as_chunks::<LANES>().0;
    let (mut largest, mut poison) = (zero, zero);
    for group in chunk.groups() {
        let x = scaled(simd, chunk, group, &vectors[group]);
        largest = simd.max(x, largest);
        poison = simd.add(poison, simd.sub(x, x));
    }
    let largest = greatest(simd, largest);
    let inverse = simd.splat(if largest < SMALLEST { 0.0 } else { LARGEST / largest });
    let pairs = out.as_chunks_mut::<{ LANES / 2 }>().0;
    for group in chunk.groups() {
        let x = scaled(simd, chunk, group, &vectors[group]);
        pairs[group].as_flattened_mut().copy_from_slice(&round(simd, simd.mul(x, inverse)));
    }
    largest / LARGEST + sum(simd, poison)
}

#[inline(always)]
fn scaled<S: Simd>(simd: S, chunk: &Chunk<'_, i8>, group: usize, weights: &[f32; LANES]) -> S::V {
    let (zero, weights) = (simd.splat(0.0), simd.load(weights));
    let x = simd.mul(weights, simd.load(&chunk.scales(group)[1]));
    simd.if_less(zero, weights, x, zero)
}

/// Weighted sums of V for L lines and some vectors of the head, D at a time. Returns L.
#[inline(always)]
fn values<S: Simd, const L: usize, const D: usize>(
    simd: S,
    chunk: &Chunk<'_, i8>,
    ints: &Ints,
    line: usize,
    vectors: Range<usize>,
    out: &mut [f32],
) -> usize {
    let mut vector = vectors.start;
    while vector + D <= vectors.end {
        value_tile::<S, L, D>(simd, chunk, ints, line, vector, out);
        vector += D;
    }
    while D > 4 && vector + 4 <= vectors.end {
        value_tile::<S, L, 4>(simd, chunk, ints, line, vector, out);
        vector += 4;
    }
    while vector < vectors.end {
        value_tile::<S, L, 1>(simd, chunk, ints, line, vector, out);
        vector += 1;
    }
    L
}

#[inline(always)]
fn value_tile<S: Simd, const L: usize, const D: usize>(
    simd: S,
    chunk: &Chunk<'_, i8>,
    ints: &Ints,
    line: usize,
    vector: usize,
    out: &mut [f32],
) {
    assert!(line <= LINES - L, "a line outside the tile; this is a bug");
    let vectors = chunk.head_dim.div_ceil(LANES);
    let weights: &[[[i16; 2]; CHUNK / 2]; L] =
        ints.weights[line..line + L].try_into().expect("L lines; this is a bug");
    let mut acc = [[simd.zero_ints(); D]; L];
    let groups = chunk.groups();
    for group in groups.clone() {
        let first = group * LANES / 2;
        let mut ahead = chunk.ahead(groups.len() + group - groups.start, AHEAD);
        for (pair, row) in (first..CHUNK / 2).zip(chunk.v_pairs(group).chunks_exact(vectors)) {
            if line == 0 && vector == 0 {
                for at in (0..2 * vectors * LANES).step_by(LINE) {
                    simd.prefetch(ahead.wrapping_add(at).cast());
                }
                ahead = ahead.wrapping_add(2 * vectors * LANES);
            }
            for (d, bytes) in row[vector..vector + D].iter().enumerate() {
                let v = simd.load_pairs(bytes);
                for l in 0..L {
                    acc[l][d] = simd.dot_pairs(v, weights[l][pair], acc[l][d]);
                }
            }
        }
    }
    let numbers = 2 + vectors * LANES;
    for l in 0..L {
        // Lines beyond the tile have no place: their accumulators are dropped.
        if line + l < chunk.visible.len() {
            let scale = simd.splat(ints.weight_scales[line + l]);
            let out = &mut out[(line + l) * numbers + 2..].as_chunks_mut::<LANES>().0[vector..];
            for d in 0..D {
                simd.store(simd.mul(simd.to_floats(acc[l][d]), scale), &mut out[d]);
            }
        }
    }
}
