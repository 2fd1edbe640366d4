//! Attention of an encoder: every row of a sequence sees all of its rows, and nothing is kept.
//!
//! Rows of all sequences stand one behind the other, without padding; `cu_q` says where each one
//! begins. A head of a sequence is an *item*: its K is turned into groups of sixteen keys and its V
//! into whole vectors, both in a scratch of the thread, and then four rows at a time are scored,
//! weighted and summed. Long sequences are cut into several items, each with a part of the rows.
//!
//! # Order of arithmetic
//! A score is one chain of fused multiply-adds over the head, times the scale; the weights of a row
//! have sixteen partial sums; the weighted sum is one chain over the keys, divided at the end. So a
//! row has the same bits whatever is computed beside it, with any number of threads and for every
//! instruction set. Against sums in f64: 2e-5 for inputs in [-1, 1].
//!
//! Deliberately absent: masks, windows, grouped heads, a cache.

use std::cell::RefCell;
use std::ops::Range;

use crate::parts::Parts;
use crate::simd::{Kernel, Simd, exp, run, sum};
use crate::{Isa, LANES, Pool};

/// The heads of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// How many.
    pub count: usize,
    /// Width of one.
    pub dim: usize,
    /// Scores are `scale * q.k`.
    pub scale: f32,
}

/// Rows of one item: the packing of K and V is a small part of the work.
const ITEM_ROWS: usize = 128;
/// Products of a task: less is not worth the trip to another thread.
const TASK_PRODUCTS: usize = 64 * 1024;

/// `out = softmax(scale * q k^T) v` within each sequence and head. `q`, `k`, `v` and `out` are
/// `[rows, heads.count, heads.dim]`; sequence `s` has the rows `cu_q[s] .. cu_q[s + 1]`. The output
/// of a row that no sequence owns is left alone.
///
/// # Panics
/// When shapes contradict each other: the caller checks input.
pub fn bidirectional(
    pool: &Pool,
    isa: Isa,
    [q, k, v]: [&[f32]; 3],
    cu_q: &[u32],
    heads: &Heads,
    out: &mut [f32],
) {
    let row = heads.count * heads.dim;
    assert!(row > 0 && q.len().is_multiple_of(row), "q is [rows, heads, dim]");
    assert!(q.len() == k.len() && q.len() == v.len(), "q, k and v have one shape");
    assert_eq!(q.len(), out.len(), "q and out have one shape");
    assert!(cu_q.is_sorted(), "cu_q grows");
    assert!(cu_q.last().is_none_or(|end| *end as usize * row <= q.len()), "cu_q ends inside q");
    let items = items(cu_q, heads);
    let tasks = tasks(&items, heads);
    let call = Call { q, k, v, heads, out: Parts::new(out) };
    let work = |task: Range<usize>| {
        for item in &items[task] {
            with_scratch(|scratch| run(isa, WholeItem { call: &call, item, scratch }));
        }
    };
    pool.run(tasks.len(), &|i| work(tasks[i].clone()));
}

/// One head of one sequence, and some of its rows.
struct Item {
    head: usize,
    /// Rows of the sequence: the keys.
    keys: Range<usize>,
    /// Rows to compute.
    rows: Range<usize>,
}

fn items(cu_q: &[u32], heads: &Heads) -> Vec<Item> {
    let mut items = Vec::new();
    for bounds in cu_q.windows(2) {
        let keys = bounds[0] as usize..bounds[1] as usize;
        for first in keys.clone().step_by(ITEM_ROWS) {
            let rows = first..keys.end.min(first + ITEM_ROWS);
            let item = |head| Item { head, keys: keys.clone(), rows: rows.clone() };
            items.extend((0..heads.count).map(item));
        }
    }
    items
}

/// Neighbouring items, enough for a task.
fn tasks(items: &[Item], heads: &Heads) -> Vec<Range<usize>> {
    let mut tasks = Vec::new();
    let (mut first, mut products) = (0, 0);
    for (i, item) in items.iter().enumerate() {
        products += item.rows.len() * item.keys.len() * heads.dim;
        if products >= TASK_PRODUCTS || i + 1 == items.len() {
            tasks.push(first..i + 1);
            (first, products) = (i + 1, 0);
        }
    }
    tasks
}

/// What all tasks share.
struct Call<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    heads: &'a Heads,
    out: Parts<'a, f32>,
}

impl Call<'_> {
    /// Where the numbers of a row's head are.
    fn place(&self, row: usize, head: usize) -> Range<usize> {
        let start = (row * self.heads.count + head) * self.heads.dim;
        start..start + self.heads.dim
    }
}

/// Memory that a thread uses again.
#[derive(Default)]
struct Scratch {
    /// `[groups][dim]`, each sixteen keys; 0 beyond the last key.
    keys: Vec<[f32; LANES]>,
    /// `[keys][vectors of the head]`, 0 beyond the head.
    values: Vec<[f32; LANES]>,
    /// Scores, then weights, `[lines][groups]`.
    weights: Vec<[f32; LANES]>,
}

/// Calls `f` with the thread's scratch. A kernel is run inside `f`: code inside a closure that is
/// not inlined would be compiled without the instruction set.
fn with_scratch(f: impl FnOnce(&mut Scratch)) {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
    }
    SCRATCH.with_borrow_mut(f);
}

struct WholeItem<'a> {
    call: &'a Call<'a>,
    item: &'a Item,
    scratch: &'a mut Scratch,
}

impl Kernel for WholeItem<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WholeItem { call, item, scratch } = self;
        pack(call, item, scratch);
        let mut row = item.rows.start;
        while row < item.rows.end {
            row += match item.rows.end - row {
                4.. if S::WIDE => lines::<S, 4, 4>(simd, call, item, row, scratch),
                4.. => lines::<S, 4, 1>(simd, call, item, row, scratch),
                _ if S::WIDE => lines::<S, 1, 8>(simd, call, item, row, scratch),
                _ => lines::<S, 1, 4>(simd, call, item, row, scratch),
            };
        }
    }
}

/// K as groups of sixteen keys, V as whole vectors.
fn pack(call: &Call<'_>, item: &Item, scratch: &mut Scratch) {
    let dim = call.heads.dim;
    let vectors = dim.div_ceil(LANES);
    scratch.keys.clear();
    scratch.keys.resize(item.keys.len().div_ceil(LANES) * dim, [0.0; LANES]);
    scratch.values.clear();
    scratch.values.resize(item.keys.len() * vectors, [0.0; LANES]);
    for (key, row) in item.keys.clone().enumerate() {
        let place = call.place(row, item.head);
        let group = &mut scratch.keys[key / LANES * dim..][..dim];
        for (lanes, x) in group.iter_mut().zip(&call.k[place.clone()]) {
            lanes[key % LANES] = *x;
        }
        let value = scratch.values[key * vectors..][..vectors].as_flattened_mut();
        value[..dim].copy_from_slice(&call.v[place]);
    }
}

/// L rows from `row` on, with N vectors side by side in each product. Returns L.
#[inline(always)]
fn lines<S: Simd, const L: usize, const N: usize>(
    simd: S,
    call: &Call<'_>,
    item: &Item,
    row: usize,
    scratch: &mut Scratch,
) -> usize {
    let (dim, keys) = (call.heads.dim, item.keys.len());
    let (groups, vectors) = (keys.div_ceil(LANES), dim.div_ceil(LANES));
    let Scratch { keys: packed, values, weights } = scratch;
    weights.resize(L * groups, [0.0; LANES]);
    let queries: [&[f32]; L] = std::array::from_fn(|l| &call.q[call.place(row + l, item.head)]);
    let mut group = 0;
    while group < groups {
        group += match groups - group {
            left if left >= N => {
                scores::<S, L, N>(simd, &queries, packed, group, call.heads.scale, weights)
            }
            _ => scores::<S, L, 1>(simd, &queries, packed, group, call.heads.scale, weights),
        };
    }
    let mut totals = [0.0; L];
    for (total, weights) in totals.iter_mut().zip(weights.chunks_exact_mut(groups)) {
        *total = softmax(simd, keys, weights);
    }
    let mut vector = 0;
    while vector < vectors {
        let place = Sums { call, head: item.head, row, vector, totals };
        vector += match vectors - vector {
            4.. if S::WIDE => sums::<S, L, 4>(simd, &place, keys, values, weights),
            2.. if S::WIDE => sums::<S, L, 2>(simd, &place, keys, values, weights),
            _ => sums::<S, L, 1>(simd, &place, keys, values, weights),
        };
    }
    L
}

/// Scores of L queries with N groups of keys. Returns N.
#[inline(always)]
fn scores<S: Simd, const L: usize, const N: usize>(
    simd: S,
    queries: &[&[f32]; L],
    packed: &[[f32; LANES]],
    group: usize,
    scale: f32,
    out: &mut [[f32; LANES]],
) -> usize {
    let dim = queries[0].len();
    let keys: [&[[f32; LANES]]; N] =
        std::array::from_fn(|n| &packed[(group + n) * dim..(group + n + 1) * dim]);
    let mut acc = [[simd.splat(0.0); N]; L];
    for d in 0..dim {
        let mut k = [simd.splat(0.0); N];
        for n in 0..N {
            k[n] = simd.load(&keys[n][d]);
        }
        for l in 0..L {
            let q = simd.splat(queries[l][d]);
            for n in 0..N {
                acc[l][n] = simd.mul_add(q, k[n], acc[l][n]);
            }
        }
    }
    let (scale, groups) = (simd.splat(scale), out.len() / L);
    for (acc, out) in acc.iter().zip(out.chunks_exact_mut(groups)) {
        for (acc, out) in acc.iter().zip(&mut out[group..group + N]) {
            simd.store(simd.mul(*acc, scale), out);
        }
    }
    N
}

/// Turns the scores of a row into weights relative to its largest, 0 beyond the last key. Returns
/// the sum of the weights.
#[inline(always)]
fn softmax<S: Simd>(simd: S, keys: usize, weights: &mut [[f32; LANES]]) -> f32 {
    weights.as_flattened_mut()[keys..].fill(f32::NEG_INFINITY);
    let mut largest = simd.splat(f32::NEG_INFINITY);
    for vector in weights.iter() {
        largest = simd.max(largest, simd.load(vector));
    }
    let mut lanes = [0.0; LANES];
    simd.store(largest, &mut lanes);
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b });
    let shift = simd.splat(largest);
    let mut total = simd.splat(0.0);
    for vector in weights {
        let weight = exp(simd, simd.sub(simd.load(vector), shift));
        total = simd.add(total, weight);
        simd.store(weight, vector);
    }
    sum(simd, total)
}

/// Where weighted sums go.
struct Sums<'a, const L: usize> {
    call: &'a Call<'a>,
    head: usize,
    row: usize,
    /// The first vector of the head.
    vector: usize,
    /// Sums of the weights.
    totals: [f32; L],
}

/// Weighted sums of N vectors of V for L rows. Returns N.
#[inline(always)]
fn sums<S: Simd, const L: usize, const N: usize>(
    simd: S,
    place: &Sums<'_, L>,
    keys: usize,
    values: &[[f32; LANES]],
    weights: &[[f32; LANES]],
) -> usize {
    let (dim, groups) = (place.call.heads.dim, weights.len() / L);
    let vectors = dim.div_ceil(LANES);
    let weights: [&[f32]; L] =
        std::array::from_fn(|l| &weights[l * groups..(l + 1) * groups].as_flattened()[..keys]);
    let mut acc = [[simd.splat(0.0); N]; L];
    for (key, row) in values.chunks_exact(vectors).enumerate().take(keys) {
        let mut v = [simd.splat(0.0); N];
        for n in 0..N {
            v[n] = simd.load(&row[place.vector + n]);
        }
        for l in 0..L {
            let weight = simd.splat(weights[l][key]);
            for n in 0..N {
                acc[l][n] = simd.mul_add(weight, v[n], acc[l][n]);
            }
        }
    }
    for l in 0..L {
        // SAFETY: a head of a row belongs to one item, and an item to one task.
        let out = unsafe { place.call.out.take(place.call.place(place.row + l, place.head)) };
        let total = simd.splat(place.totals[l]);
        let out = out.chunks_mut(LANES).skip(place.vector);
        for (out, acc) in out.zip(acc[l]) {
            let y = simd.div(acc, total);
            match out.try_into() {
                Ok(whole) => simd.store(y, whole),
                Err(_) => simd.store_part(y, out),
            }
        }
    }
    N
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    /// The truth: one score after the other, in f64.
    fn truth([q, k, v]: [&[f32]; 3], cu_q: &[u32], heads: &Heads, out: &mut [f32]) {
        let place = |row: usize, head: usize| (row * heads.count + head) * heads.dim;
        for bounds in cu_q.windows(2) {
            let keys = bounds[0] as usize..bounds[1] as usize;
            for (row, head) in keys.clone().flat_map(|r| (0..heads.count).map(move |h| (r, h))) {
                let q = &q[place(row, head)..][..heads.dim];
                let score = |key: usize| {
                    let k = &k[place(key, head)..][..heads.dim];
                    let products = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k));
                    products.sum::<f64>() * f64::from(heads.scale)
                };
                let scores: Vec<f64> = keys.clone().map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..heads.dim {
                    let value = |key: usize| f64::from(v[place(key, head) + d]);
                    let sum: f64 =
                        weights.iter().zip(keys.clone()).map(|(w, k)| w * value(k)).sum();
                    out[place(row, head) + d] = (sum / total) as f32;
                }
            }
        }
    }

    /// q, k and v of these sequences.
    fn inputs(lens: &[usize], heads: &Heads) -> ([Vec<f32>; 3], Vec<u32>) {
        let mut cu_q = vec![0];
        for len in lens {
            cu_q.push(cu_q[cu_q.len() - 1] + *len as u32);
        }
        let numbers = lens.iter().sum::<usize>() * heads.count * heads.dim;
        (std::array::from_fn(|i| cases::randoms(numbers, 30 + i as u64)), cu_q)
    }

    fn heads(count: usize, dim: usize) -> Heads {
        Heads { count, dim, scale: 3.0 / (dim as f32).sqrt() }
    }

    fn output(pool: &Pool, isa: Isa, x: [&[f32]; 3], cu_q: &[u32], heads: &Heads) -> Vec<f32> {
        let mut out = vec![9.0; x[0].len()];
        bidirectional(pool, isa, x, cu_q, heads, &mut out);
        out
    }

    #[test]
    fn every_isa_is_near_the_truth_and_equal_to_scalar() {
        let pool = Pool::new(3);
        let lens = [1, 15, 0, 16, 17, 33, 70, 131, 300];
        for heads in [heads(1, 8), heads(3, 12), heads(2, 16), heads(2, 32), heads(2, 80)] {
            let ([q, k, v], cu_q) = inputs(&lens, &heads);
            let x = [&q[..], &k, &v];
            let mut wanted = vec![9.0; q.len()];
            truth(x, &cu_q, &heads, &mut wanted);
            let scalar = output(&Pool::new(1), Isa::Scalar, x, &cu_q, &heads);
            let error = cases::max_abs_diff(&wanted, &scalar);
            assert!(error < 2e-5, "{heads:?}: {error:e}");
            for isa in Isa::available() {
                let got = output(&pool, *isa, x, &cu_q, &heads);
                cases::assert_same_bits(&scalar, &got, isa.name());
            }
        }
    }

    #[test]
    fn a_sequence_alone_has_the_bits_it_has_in_any_company() {
        let (pool, heads) = (Pool::new(3), heads(2, 32));
        let ([q, k, v], cu_q) = inputs(&[5, 140, 31, 64], &heads);
        let all = output(&pool, Isa::best(), [&q, &k, &v], &cu_q, &heads);
        let row = heads.count * heads.dim;
        for bounds in cu_q.windows(2) {
            let part = bounds[0] as usize * row..bounds[1] as usize * row;
            let x = [&q[part.clone()], &k[part.clone()], &v[part.clone()]];
            let alone = output(&Pool::new(1), Isa::best(), x, &[0, bounds[1] - bounds[0]], &heads);
            cases::assert_same_bits(&all[part], &alone, "alone");
        }
    }

    #[test]
    fn rows_of_nobody_are_left_alone_and_reach_nobody() {
        let heads = heads(1, 8);
        let ([mut q, mut k, mut v], _) = inputs(&[20], &heads);
        for x in [&mut q, &mut k, &mut v] {
            x[18 * 8..].fill(f32::NAN);
        }
        let got = output(&Pool::new(2), Isa::best(), [&q, &k, &v], &[0, 18], &heads);
        assert!(got[..18 * 8].iter().all(|x| x.is_finite()));
        assert_eq!(got[18 * 8..], [9.0; 16]);
        assert_eq!(output(&Pool::new(2), Isa::best(), [&[], &[], &[]], &[0], &heads), [0.0; 0]);
    }
}
