//! The arithmetic of slabs of integers: both products of a chunk are exact sums of integers.
//!
//! Queries and weights become integers too, on a grid of their own. That of a query is as those of
//! K. That of the weights of a line, times the scales of V, is as fine as the largest of them in
//! the chunk lets it be, and the sum of all: a key that matters little because its V is small takes
//! no room. Processors multiply and add four bytes, or two i16, in a lane where floats have one.
//!
//! Rounding bytes to the nearest would make nothing of all weights below a 510th of the largest,
//! which may be many: so each is rounded up or down at a threshold that goes with the place of its
//! key among sixteen, and of many that are alike about the right part is rounded up (ordered
//! dither, Bayer 1973). What is below an 8,160th of the largest is lost, a thirtieth of a chunk at
//! most.

use super::CHUNK;
use super::chunk::{AHEAD, Chunk, Form, GROUPS, Weights, Work, stripes, vectors_of_a_stripe};
use super::plan::LINES;
use super::words::Words;
use crate::LANES;
use crate::kv::ints::{MOST_VECTORS, Seen, v_start};
use crate::simd::{self, EXPS, Simd, nearest, sum};
use std::ops::Range;

/// Memory that a thread uses again.
pub(super) struct Ints {
    /// `[vectors of the head][LINES]`, see [`Words::Vector`]. The room is that of the largest.
    queries: Vec<Room>,
    /// `[LINES]`
    query_scales: [f32; LINES],
    /// What the bias of K adds to the products of a line. `[LINES]`
    query_biases: [i32; LINES],
    /// `[LINES][vectors of the chunk]`
    weights: Vec<Room>,
    /// `[LINES]`
    weight_scales: [f32; LINES],
}

/// Of one vector of integers, in any form that they are multiplied in.
type Room = [u64; 4];

impl Default for Ints {
    fn default() -> Self {
        Ints {
            queries: Vec::new(),
            query_scales: [0.0; LINES],
            query_biases: [0; LINES],
            weights: vec![[0; 4]; LINES * CHUNK / LANES],
            weight_scales: [0.0; LINES],
        }
    }
}

/// [`Form`] of integers: a blanket implementation would overlap with that of floats.
macro_rules! forms {
    ($($element:ty),*) => {$(
        impl Form for $element {
            fn v_start(head_dim: usize) -> usize {
                v_start::<$element>(head_dim)
            }

            #[inline(always)]
            fn prepare<S: Simd>(simd: S, work: &mut Work) {
                prepare::<S, $element>(simd, work);
            }

            #[inline(always)]
            fn scores<S: Simd>(simd: S, chunk: &Chunk<'_, $element>, work: &mut Work) {
                all_scores(simd, chunk, work);
            }

            #[inline(always)]
            fn weigh<S: Simd>(
                simd: S,
                chunk: &Chunk<'_, $element>,
                work: &mut Work,
                out: &mut [f32],
            ) {
                weigh_all(simd, chunk, work, out);
            }

            #[inline(always)]
            fn values<S: Simd>(
                simd: S,
                chunk: &Chunk<'_, $element>,
                work: &mut Work,
                out: &mut [f32],
            ) {
                all_values(simd, chunk, &work.ints, out);
            }
        }
    )*};
}

forms!(i8, i16);

/// [`Form::prepare`].
#[inline(always)]
fn prepare<S: Simd, E: Words>(simd: S, work: &mut Work) {
    let vectors = work.queries.len();
    assert!(vectors <= MOST_VECTORS, "sums of a head this wide are not exact");
    let ints = &mut work.ints;
    ints.queries.resize(vectors * LINES, [0; 4]);
    let places = words_mut::<S, E>(&mut ints.queries, vectors * LINES);
    let places = places.as_chunks_mut::<LINES>().0;
    for line in 0..LINES {
        let mut seen = Seen::nothing(simd);
        for q in &work.queries {
            seen = seen.and(simd, simd.load(&q[line]));
        }
        let grid = seen.grid(simd, E::K, vectors);
        ints.query_scales[line] = grid.scale;
        let (inverse, mut total) = (simd.splat(grid.inverse), simd.splat(0.0));
        for (q, places) in work.queries.iter().zip(places.iter_mut()) {
            let x = nearest(simd, simd.mul(simd.load(&q[line]), inverse));
            E::store(simd, x, &mut places[line]);
            total = simd.add(total, x);
        }
        if E::K_BIAS != 0 {
            ints.query_biases[line] = i32::from(E::K_BIAS) * sum(simd, total) as i32;
        }
    }
}

/// The first vectors of what has room for so many.
#[inline(always)]
fn words<S: Simd, E: Words>(room: &[Room], vectors: usize) -> &[E::Vector<S>] {
    const { assert!(size_of::<E::Vector<S>>() <= size_of::<Room>()) };
    &bytemuck::cast_slice(room)[..vectors]
}

/// As [`words`].
#[inline(always)]
fn words_mut<S: Simd, E: Words>(room: &mut [Room], vectors: usize) -> &mut [E::Vector<S>] {
    const { assert!(size_of::<E::Vector<S>>() <= size_of::<Room>()) };
    &mut bytemuck::cast_slice_mut(room)[..vectors]
}

/// [`Form::scores`].
#[inline(always)]
fn all_scores<S: Simd, E: Words + Form>(simd: S, chunk: &Chunk<'_, E>, work: &mut Work) {
    let lines = chunk.visible.len();
    for groups in stripes(chunk.groups(), GROUPS) {
        let mut line = 0;
        while line < lines {
            let groups = groups.clone();
            line += match lines - line {
                5.. if S::WIDE => scores::<S, E, 8, 2>(simd, chunk, work, line, groups),
                3.. if S::WIDE => scores::<S, E, 4, 4>(simd, chunk, work, line, groups),
                3.. => scores::<S, E, 4, 1>(simd, chunk, work, line, groups),
                2 if S::WIDE => scores::<S, E, 2, 4>(simd, chunk, work, line, groups),
                2 => scores::<S, E, 2, 2>(simd, chunk, work, line, groups),
                _ => scores::<S, E, 1, 4>(simd, chunk, work, line, groups),
            };
        }
    }
}

/// [`Form::weigh`].
#[inline(always)]
fn weigh_all<S: Simd, E: Words + Form>(
    simd: S,
    chunk: &Chunk<'_, E>,
    work: &mut Work,
    out: &mut [f32],
) {
    // Step by step for all lines: each step of one waits for the end of the one before.
    let scales = &mut work.ints.weight_scales;
    let numbers = chunk.numbers();
    let rows = work.weights.0.iter_mut().zip(chunk.visible);
    for ((scores, visible), out) in rows.zip(out.chunks_exact_mut(numbers)) {
        out[0] = chunk.largest(simd, visible, scores);
    }
    let rows = work.weights.0.iter_mut().zip(chunk.visible);
    let outs = out.chunks_exact_mut(numbers).zip(scales.iter_mut());
    for ((scores, visible), (out, step)) in rows.zip(outs) {
        (out[1], *step) = weigh_line(simd, chunk, visible, out[0], scores);
    }
    let places = words_mut::<S, E>(&mut work.ints.weights, LINES * CHUNK / LANES);
    let places = places.chunks_exact_mut(CHUNK / LANES);
    let rows = work.weights.0[..chunk.visible.len()].iter().zip(places);
    for ((weights, places), step) in rows.zip(scales) {
        let inverse = if *step < SMALLEST { 0.0 } else { 1.0 / *step };
        let (inverse, dither) = (simd.splat(inverse), simd.load(&DITHER));
        let vectors = &weights.as_chunks::<LANES>().0[chunk.groups()];
        for (x, place) in vectors.iter().zip(&mut places[chunk.groups()]) {
            E::store(simd, simd.mul_add(simd.load(x), inverse, dither), place);
        }
    }
}

/// [`Form::values`].
#[inline(always)]
fn all_values<S: Simd, E: Words + Form>(
    simd: S,
    chunk: &Chunk<'_, E>,
    ints: &Ints,
    out: &mut [f32],
) {
    let lines = chunk.visible.len();
    let vectors = 0..chunk.head_dim.div_ceil(LANES);
    for vectors in stripes(vectors, vectors_of_a_stripe(lines)) {
        let mut line = 0;
        while line < lines {
            let vectors = vectors.clone();
            line += match lines - line {
                5.. if S::WIDE => values::<S, E, 8, 2>(simd, chunk, ints, line, vectors, out),
                3.. if S::WIDE => values::<S, E, 4, 4>(simd, chunk, ints, line, vectors, out),
                3.. => values::<S, E, 4, 1>(simd, chunk, ints, line, vectors, out),
                2 if S::WIDE => values::<S, E, 2, 8>(simd, chunk, ints, line, vectors, out),
                2 => values::<S, E, 2, 2>(simd, chunk, ints, line, vectors, out),
                _ if S::WIDE => values::<S, E, 1, 8>(simd, chunk, ints, line, vectors, out),
                _ => values::<S, E, 1, 4>(simd, chunk, ints, line, vectors, out),
            };
        }
    }
}

/// Weights whose step is below this are zeroes: it would hardly be a normal number. That of a lone
/// key over i16 is a 268,000,000th of the largest number of its V.
const SMALLEST: f32 = 1e-37;

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

impl<'a, E: Words + Form> Chunk<'a, E> {
    /// Scales of a group: of K, of V.
    #[inline(always)]
    fn scales(&self, group: usize) -> &'a [[f32; LANES]] {
        let scales: &[f32] = bytemuck::cast_slice(&self.units[group][..E::SCALES]);
        scales.as_chunks::<LANES>().0
    }

    /// K of a group, `[words of the head][16 keys]`.
    #[inline(always)]
    fn k_words(&self, group: usize) -> &'a [[E::Lane; LANES]] {
        let k = &self.units[group][E::SCALES..v_start::<E>(self.head_dim)];
        bytemuck::cast_slice::<E, E::Lane>(k).as_chunks::<LANES>().0
    }

    /// V of a group, `[words of sixteen keys][vectors of the head]`.
    #[inline(always)]
    fn v_words(&self, group: usize) -> &'a [[E::Lane; LANES]] {
        let v = &self.units[group][v_start::<E>(self.head_dim)..];
        bytemuck::cast_slice::<E, E::Lane>(v).as_chunks::<LANES>().0
    }
}

/// Scores of L lines with some groups of keys, B at a time. Returns L.
#[inline(always)]
fn scores<S: Simd, E: Words + Form, const L: usize, const B: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    work: &mut Work,
    line: usize,
    groups: Range<usize>,
) -> usize {
    let mut group = groups.start;
    while group + B <= groups.end {
        score_tile::<S, E, L, B>(simd, chunk, &work.ints, line, group, &mut work.weights);
        group += B;
    }
    while group < groups.end {
        score_tile::<S, E, L, 1>(simd, chunk, &work.ints, line, group, &mut work.weights);
        group += 1;
    }
    L
}

#[inline(always)]
fn score_tile<S: Simd, E: Words + Form, const L: usize, const B: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    ints: &Ints,
    line: usize,
    group: usize,
    out: &mut Weights,
) {
    assert!(line <= LINES - L, "a line outside the tile; this is a bug");
    let in_word = E::IN_WORD;
    let all = chunk.head_dim.div_ceil(in_word);
    let k: [&[[E::Lane; LANES]]; B] = std::array::from_fn(|b| chunk.k_words(group + b));
    let mut acc = [[simd.splat_ints(0); B]; L];
    for (acc, bias) in acc.iter_mut().zip(&ints.query_biases[line..]) {
        if E::K_BIAS != 0 {
            *acc = [simd.splat_ints(-bias); B];
        }
    }
    let (half, first) = (group - chunk.groups().start, line == 0);
    let mut ahead = [std::ptr::null(); B];
    if first {
        ahead = std::array::from_fn(|b| chunk.ahead(half + b, B.max(AHEAD)));
        for ahead in ahead {
            // What is behind as many lines as words: as many as the scales, of which V has none.
            let end = ahead.wrapping_add(in_word * LANES * all);
            simd.prefetch(end.cast());
            simd.prefetch(end.wrapping_add(in_word * LANES).cast());
        }
    }
    let vectors = chunk.head_dim.div_ceil(LANES);
    let queries = words::<S, E>(&ints.queries, vectors * LINES).as_chunks::<LINES>().0;
    let per_vector = LANES / in_word;
    for (start, q) in (0..all).step_by(per_vector).zip(queries) {
        let q: &[E::Vector<S>; L] = q[line..line + L].try_into().expect("L lines; this is a bug");
        let k: [&[[E::Lane; LANES]]; B] =
            std::array::from_fn(|b| &k[b][start..all.min(start + per_vector)]);
        for word in 0..per_vector.min(all - start) {
            if first {
                for ahead in ahead {
                    simd.prefetch(ahead.wrapping_add(in_word * LANES * (start + word)).cast());
                }
            }
            for b in 0..B {
                let k = E::load_k(simd, &k[b][word]);
                for l in 0..L {
                    acc[l][b] = E::dot_k(simd, k, &q[l].as_ref()[word], acc[l][b]);
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
/// alone, and the step of the grid of the products.
#[inline(always)]
fn weigh_line<S: Simd, E: Words + Form>(
    simd: S,
    chunk: &Chunk<'_, E>,
    visible: &Range<usize>,
    largest: f32,
    scores: &mut [f32; CHUNK],
) -> (f32, f32) {
    let (groups, zero) = (chunk.groups(), simd.splat(0.0));
    let shift = simd.splat(largest);
    let mut line = Line { shift, total: zero, largest: zero, products: zero };
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
    // What is no number among the products shall be none in the sum.
    let poison = simd.mul(line.products, zero);
    let step = E::weight_step(simd::largest(simd, line.largest), sum(simd, line.products));
    (sum(simd, simd.add(line.total, poison)), step)
}

/// What is known of the weights of a line so far.
struct Line<S: Simd> {
    /// The largest score.
    shift: S::V,
    /// The sum of the weights.
    total: S::V,
    /// The largest weight times its scale of V.
    largest: S::V,
    /// The sum of these products.
    products: S::V,
}

/// Turns the scores of N groups into weights times the scales of V. A key of weight 0 may be one
/// that the line does not see, whose scale may be anything.
#[inline(always)]
fn weigh<S: Simd, E: Words + Form, const N: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    group: usize,
    vectors: &mut [[f32; LANES]; N],
    line: &mut Line<S>,
) {
    let zero = simd.splat(0.0);
    let mut x = [zero; N];
    for i in 0..N {
        x[i] = simd.sub(simd.load(&vectors[i]), line.shift);
    }
    let weights = E::exps(simd, x);
    for i in 0..N {
        line.total = simd.add(line.total, weights[i]);
        let scaled = simd.mul(weights[i], simd.load(&chunk.scales(group + i)[1]));
        let scaled = simd.if_less(zero, weights[i], scaled, zero);
        line.largest = simd.max(scaled, line.largest);
        line.products = simd.add(line.products, scaled);
        simd.store(scaled, &mut vectors[i]);
    }
}

/// Weighted sums of V for L lines and some vectors of the head, D at a time. Returns L.
#[inline(always)]
fn values<S: Simd, E: Words + Form, const L: usize, const D: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    ints: &Ints,
    line: usize,
    vectors: Range<usize>,
    out: &mut [f32],
) -> usize {
    let mut vector = vectors.start;
    while vector + D <= vectors.end {
        value_tile::<S, E, L, D>(simd, chunk, ints, line, vector, out);
        vector += D;
    }
    while D > 4 && vector + 4 <= vectors.end {
        value_tile::<S, E, L, 4>(simd, chunk, ints, line, vector, out);
        vector += 4;
    }
    while vector < vectors.end {
        value_tile::<S, E, L, 1>(simd, chunk, ints, line, vector, out);
        vector += 1;
    }
    L
}

#[inline(always)]
fn value_tile<S: Simd, E: Words + Form, const L: usize, const D: usize>(
    simd: S,
    chunk: &Chunk<'_, E>,
    ints: &Ints,
    line: usize,
    vector: usize,
    out: &mut [f32],
) {
    assert!(line <= LINES - L, "a line outside the tile; this is a bug");
    let vectors = chunk.head_dim.div_ceil(LANES);
    let weights = words::<S, E>(&ints.weights, LINES * CHUNK / LANES);
    let weights = weights.as_chunks::<{ CHUNK / LANES }>().0;
    let weights: &[[E::Vector<S>; CHUNK / LANES]; L] =
        weights[line..line + L].try_into().expect("L lines; this is a bug");
    let mut acc = [[simd.splat_ints(0); D]; L];
    let (groups, first) = (chunk.groups(), line == 0 && vector == 0);
    for group in groups.clone() {
        let half = groups.len() + group - groups.start;
        let mut ahead = if first { chunk.ahead(half, AHEAD) } else { std::ptr::null() };
        let rows = &chunk.v_words(group)[vector..];
        for word in 0..LANES / E::IN_WORD {
            if first {
                for at in 0..vectors {
                    simd.prefetch(ahead.wrapping_add(E::IN_WORD * LANES * at).cast());
                }
                ahead = ahead.wrapping_add(E::IN_WORD * LANES * vectors);
            }
            let row = &rows[word * vectors..][..D];
            for d in 0..D {
                let v = E::load_v(simd, &row[d]);
                for l in 0..L {
                    let weight = &weights[l][group].as_ref()[word];
                    acc[l][d] = E::dot_v(simd, v, weight, acc[l][d]);
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
