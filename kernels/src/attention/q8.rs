//! The arithmetic of slabs of bytes: both products of a chunk are exact sums of integers.
//!
//! Queries and weights become bytes on a grid of their own. That of a query ends at its largest
//! number, 127. That of the weights of a line, times the scales of V, ends at the largest of them
//! in the chunk, 255: a key that matters little because its V is small takes no room. Processors
//! multiply and add bytes in fours, four products to a lane where floats have one.
//!
//! Rounding to the nearest would make nothing of all weights below a 510th of the largest, which
//! may be many: so each is rounded up or down at a threshold that goes with the place of its key
//! among sixteen, and of many that are alike about the right part is rounded up (ordered dither,
//! Bayer 1973). What is below an 8,160th of the largest is lost, a thirtieth of a chunk at most.

use super::CHUNK;
use super::chunk::{AHEAD, Chunk, Form, GROUPS, Weights, Work, stripes, vectors_of_a_stripe};
use super::plan::LINES;
use crate::LANES;
use crate::kv::q8;
use crate::simd::{self, EXPS, Simd, coarse_exps, nearest, sum};
use std::ops::Range;

/// Memory that a thread uses again.
pub(super) struct Ints {
    /// `[vectors of the head]`, see [`Queries`].
    queries: Vec<u64>,
    /// `[LINES]`
    query_scales: [f32; LINES],
    /// What the bias of K adds to the products of a line. `[LINES]`
    query_biases: [i32; LINES],
    /// `[LINES]`, see [`QuadWeights`].
    weights: Vec<u64>,
    /// `[LINES]`
    weight_scales: [f32; LINES],
}

impl Default for Ints {
    fn default() -> Self {
        Ints {
            queries: Vec::new(),
            query_scales: [0.0; LINES],
            query_biases: [0; LINES],
            weights: vec![0; LINES * CHUNK / QUAD],
            weight_scales: [0.0; LINES],
        }
    }
}

/// Bytes that are multiplied and added at once. What stands for them has the room of a u64.
const QUAD: usize = 4;
/// Of a vector.
const QUADS: usize = LANES / QUAD;

/// One vector of the head of the queries of all lines.
type Queries<S> = [[<S as Simd>::Quad; QUADS]; LINES];
/// Weights of a line.
type QuadWeights<S> = [[<S as Simd>::Quad; QUADS]; CHUNK / LANES];

impl Form for i8 {
    fn v_start(head_dim: usize) -> usize {
        q8::v_start(head_dim)
    }

    #[inline(always)]
    fn prepare<S: Simd>(simd: S, work: &mut Work) {
        const { assert!(size_of::<S::Quad>() <= size_of::<u64>()) };
        assert!(work.queries.len() <= HEAD_VECTORS, "sums of a head this wide are not exact");
        let (ints, zero) = (&mut work.ints, simd.splat(0.0));
        ints.queries.resize(work.queries.len() * LINES * QUADS, 0);
        let places: &mut [Queries<S>] = bytemuck::cast_slice_mut(&mut ints.queries);
        for line in 0..LINES {
            let (mut largest, mut poison) = (zero, zero);
            for q in &work.queries {
                let q = simd.load(&q[line]);
                largest = simd.max(simd.max(q, simd.sub(zero, q)), largest);
                poison = simd.mul_add(q, zero, poison);
            }
            let largest = simd::largest(simd, largest);
            let inverse = if largest > SMALLEST { LARGEST / largest } else { 0.0 };
            ints.query_scales[line] = largest / LARGEST + sum(simd, poison);
            let (inverse, mut total) = (simd.splat(inverse), zero);
            for (q, places) in work.queries.iter().zip(places.iter_mut()) {
                let x = nearest(simd, simd.mul(simd.load(&q[line]), inverse));
                simd.store_quads(x, &mut places[line]);
                total = simd.add(total, x);
            }
            ints.query_biases[line] = i32::from(q8::BIAS) * sum(simd, total) as i32;
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
    fn weigh<S: Simd>(simd: S, chunk: &Chunk<'_, i8>, work: &mut Work, out: &mut [f32]) {
        // Step by step for all lines: each step of one waits for the end of the one before.
        let scales = &mut work.ints.weight_scales;
        let numbers = chunk.numbers();
        let rows = work.weights.0.iter_mut().zip(chunk.visible);
        for ((scores, visible), out) in rows.zip(out.chunks_exact_mut(numbers)) {
            out[0] = chunk.largest(simd, visible, scores);
        }
        let rows = work.weights.0.iter_mut().zip(chunk.visible);
        let outs = out.chunks_exact_mut(numbers).zip(scales.iter_mut());
        for ((scores, visible), (out, largest)) in rows.zip(outs) {
            (out[1], *largest) = weigh_line(simd, chunk, visible, out[0], scores);
        }
        let places: &mut [QuadWeights<S>] = bytemuck::cast_slice_mut(&mut work.ints.weights);
        let rows = work.weights.0[..chunk.visible.len()].iter().zip(places);
        for ((weights, places), largest) in rows.zip(scales) {
            let inverse = if *largest < SMALLEST { 0.0 } else { LARGEST_WEIGHT / *largest };
            let (inverse, dither) = (simd.splat(inverse), simd.load(&DITHER));
            let vectors = &weights.as_chunks::<LANES>().0[chunk.groups()];
            for (x, place) in vectors.iter().zip(&mut places[chunk.groups()]) {
                simd.store_quads(simd.mul_add(simd.load(x), inverse, dither), place);
            }
            *largest /= LARGEST_WEIGHT;
        }
    }

    #[inline(always)]
    fn values<S: Simd>(simd: S, chunk: &Chunk<'_, i8>, work: &mut Work, out: &mut [f32]) {
        let (lines, ints) = (chunk.visible.len(), &work.ints);
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

/// Vectors of the widest head: its sums, with the bias of K, are below 2^31, and those of f32 that
/// count the bias below 2^24.
const HEAD_VECTORS: usize = 1 << 10;

/// The largest byte of a query.
const LARGEST: f32 = 127.0;

/// The largest byte of a weight.
const LARGEST_WEIGHT: f32 = 255.0;

/// Numbers that are all below this are zeroes: their scale would be no normal number.
const SMALLEST: f32 = 1e-30;

/// What is added to each of sixteen weights before it is rounded to the nearest: between -1/2 and
/// 1/2, neighbours far from each other.
const DITHER: [f32; LANES] = {
    let mut dither = [0.0; LANES];
    let mut i = 0;
    while i < LANES {
        // The four bits of i from the last to the first (van der Corput).
        let reversed = (i as u8).reverse_bits() >> 4;
        dither[i] = (reversed as f32 + 0.5) / LANES as f32 - 0.5;
        i += 1;
    }
    dither
};

impl<'a> Chunk<'a, i8> {
    /// Scales of a group: of K, of V.
    #[inline(always)]
    fn scales(&self, group: usize) -> &'a [[f32; LANES]] {
        let scales: &[f32] = bytemuck::cast_slice(&self.units[group][..q8::SCALES]);
        scales.as_chunks::<LANES>().0
    }

    /// K of a group, `[fours of the head][16 keys]`.
    #[inline(always)]
    fn k_quads(&self, group: usize) -> &'a [[[u8; QUAD]; LANES]] {
        let k = &self.units[group][q8::SCALES..q8::v_start(self.head_dim)];
        let k: &[u8] = bytemuck::cast_slice(k);
        k.as_chunks::<QUAD>().0.as_chunks::<LANES>().0
    }

    /// V of a group, `[4 fours of keys][vectors of the head]`.
    #[inline(always)]
    fn v_quads(&self, group: usize) -> &'a [[[i8; QUAD]; LANES]] {
        let v = &self.units[group][q8::v_start(self.head_dim)..];
        v.as_chunks::<QUAD>().0.as_chunks::<LANES>().0
    }
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
    let quads = chunk.head_dim.div_ceil(QUAD);
    let k: [&[[[u8; QUAD]; LANES]]; B] = std::array::from_fn(|b| chunk.k_quads(group + b));
    let mut acc = [[simd.splat_ints(0); B]; L];
    for (acc, bias) in acc.iter_mut().zip(&ints.query_biases[line..]) {
        *acc = [simd.splat_ints(-bias); B];
    }
    let (half, first) = (group - chunk.groups().start, line == 0);
    let mut ahead = [std::ptr::null(); B];
    if first {
        ahead = std::array::from_fn(|b| chunk.ahead(half + b, B.max(AHEAD)));
    }
    let queries: &[Queries<S>] = bytemuck::cast_slice(&ints.queries);
    for (start, q) in (0..quads).step_by(QUADS).zip(queries) {
        let q: &[[S::Quad; QUADS]; L] =
            q[line..line + L].try_into().expect("L lines; this is a bug");
        let k: [&[[[u8; QUAD]; LANES]]; B] =
            std::array::from_fn(|b| &k[b][start..quads.min(start + QUADS)]);
        for quad in 0..QUADS.min(quads - start) {
            if first {
                for ahead in ahead {
                    simd.prefetch(ahead.wrapping_add(QUAD * LANES * (start + quad)).cast());
                }
            }
            for b in 0..B {
                let k = simd.load_unsigned(&k[b][quad]);
                for l in 0..L {
                    acc[l][b] = simd.dot_unsigned(k, &q[l][quad], acc[l][b]);
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

/// Turns the scores of a line into weights times the scales of V. Returns the sum of the weights
/// alone, and the largest of the products.
#[inline(always)]
fn weigh_line<S: Simd>(
    simd: S,
    chunk: &Chunk<'_, i8>,
    visible: &Range<usize>,
    largest: f32,
    scores: &mut [f32; CHUNK],
) -> (f32, f32) {
    let (groups, zero) = (chunk.groups(), simd.splat(0.0));
    let mut line = Line { shift: simd.splat(largest), total: zero, largest: zero, poison: zero };
    let vectors = &mut scores.as_chunks_mut::<LANES>().0[groups.clone()];
    if visible.is_empty() {
        vectors.as_flattened_mut().fill(0.0);
        return (0.0, 0.0);
    }
    let (many, rest) = vectors.as_chunks_mut::<EXPS>();
    let mut group = groups.start;
    for vectors in many {
        weigh(simd, chunk, group, vectors, &mut line);
        group += EXPS;
    }
    for vectors in rest.as_chunks_mut::<1>().0 {
        weigh(simd, chunk, group, vectors, &mut line);
        group += 1;
    }
    (sum(simd, simd.add(line.total, line.poison)), simd::largest(simd, line.largest))
}

/// What is known of the weights of a line so far.
struct Line<S: Simd> {
    /// The largest score.
    shift: S::V,
    /// The sum of the weights.
    total: S::V,
    /// The largest weight times its scale of V.
    largest: S::V,
    /// 0, or NaN where one of these products is, which the sum of the weights becomes too.
    poison: S::V,
}

/// Turns the scores of N groups into weights times the scales of V. A key of weight 0 may be one
/// that the line does not see, whose scale may be anything.
#[inline(always)]
fn weigh<S: Simd, const N: usize>(
    simd: S,
    chunk: &Chunk<'_, i8>,
    group: usize,
    vectors: &mut [[f32; LANES]; N],
    line: &mut Line<S>,
) {
    let zero = simd.splat(0.0);
    let mut x = [zero; N];
    for i in 0..N {
        x[i] = simd.sub(simd.load(&vectors[i]), line.shift);
    }
    let weights = coarse_exps(simd, x);
    for i in 0..N {
        line.total = simd.add(line.total, weights[i]);
        let scaled = simd.mul(weights[i], simd.load(&chunk.scales(group + i)[1]));
        let scaled = simd.if_less(zero, weights[i], scaled, zero);
        line.largest = simd.max(scaled, line.largest);
        line.poison = simd.mul_add(scaled, zero, line.poison);
        simd.store(scaled, &mut vectors[i]);
    }
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
    let weights: &[QuadWeights<S>] = bytemuck::cast_slice(&ints.weights);
    let weights: &[QuadWeights<S>; L] =
        weights[line..line + L].try_into().expect("L lines; this is a bug");
    let mut acc = [[simd.splat_ints(0); D]; L];
    let (groups, first) = (chunk.groups(), line == 0 && vector == 0);
    for group in groups.clone() {
        let half = groups.len() + group - groups.start;
        let mut ahead = if first { chunk.ahead(half, AHEAD) } else { std::ptr::null() };
        let rows = &chunk.v_quads(group)[vector..];
        for quad in 0..QUADS {
            if first {
                for at in 0..vectors {
                    simd.prefetch(ahead.wrapping_add(QUAD * LANES * at).cast());
                }
                ahead = ahead.wrapping_add(QUAD * LANES * vectors);
            }
            let row = &rows[quad * vectors..][..D];
            for d in 0..D {
                let v = simd.load_signed(&row[d]);
                for l in 0..L {
                    acc[l][d] = simd.dot_signed(v, &weights[l][group][quad], acc[l][d]);
                }
            }
        }
    }
    let numbers = chunk.numbers();
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
