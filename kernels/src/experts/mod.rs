//! Mixture of experts: which experts a row goes to, and the sum of what they make of it.
//!
//! Shazeer et al. 2017; Fedus et al. 2022. A router scores every expert for every row; the `used`
//! highest are chosen, the first of equals, and weighed by the softmax of the scores. Rows are put
//! in the order of their experts, so that each expert is one product
//! ([`grouped`](crate::matmul::grouped)), and what comes back is added up row by row.
//!
//! # Contract
//! The choice and the weights of a row follow from its scores alone, in f64; its sum runs over its
//! experts in ascending order, in f32. So a row has the same bits whatever the other rows are.
//!
//! Deliberately absent: the products, capacities (no row is dropped), experts that all rows share.

use std::ops::Range;

use crate::Pool;
use crate::parts::Parts;

/// How rows are given to experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// Experts.
    pub count: usize,
    /// Of them, those that a row goes to.
    pub used: usize,
    /// The weights of a row add up to 1; else they are what the softmax over all experts says.
    pub normalized: bool,
}

/// Where the rows of a batch go.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes {
    used: usize,
    /// Rows in the order of their experts, each `used` times.
    pub rows: Vec<u32>,
    /// Experts that have rows, ascending, and which of `rows` these are.
    pub groups: Vec<(usize, Range<usize>)>,
    /// Of each row, by its experts in ascending order: places in `rows`, and weights.
    /// `[m, used]`
    parts: Vec<(u32, f32)>,
}

/// Chooses for every row. `scores` is `[m, count]`.
///
/// # Panics
/// If scores are not whole rows, or more experts are used than there are.
pub fn route(scores: &[f32], routing: &Routing) -> Routes {
    let Routing { count, used, normalized } = *routing;
    assert!((1..=count).contains(&used), "{used} of {count} experts");
    assert_eq!(scores.len() % count, 0, "scores of {count} experts");
    let m = scores.len() / count;
    let (mut chosen, mut best) = (Vec::with_capacity(m * used), Vec::with_capacity(used + 1));
    let mut lens = vec![0; count];
    for scores in scores.chunks_exact(count) {
        highest(scores, used, &mut best);
        let top = f64::from(scores[best[0]]);
        let weight = |expert: usize| (f64::from(scores[expert]) - top).exp();
        let total: f64 = match normalized {
            true => best.iter().map(|&expert| weight(expert)).sum(),
            false => (0..count).map(weight).sum(),
        };
        best.sort_unstable();
        for &expert in &best {
            lens[expert] += 1;
            chosen.push((expert, (weight(expert) / total) as f32));
        }
    }
    let (mut groups, mut next) = (Vec::new(), vec![0; count]);
    let mut start = 0;
    for (expert, len) in lens.into_iter().enumerate().filter(|(_, len)| *len > 0) {
        next[expert] = start;
        groups.push((expert, start..start + len));
        start += len;
    }
    let mut rows = vec![0; m * used];
    let parts = chosen.iter().enumerate().map(|(i, &(expert, weight))| {
        let place = next[expert];
        next[expert] += 1;
        rows[place] = (i / used) as u32;
        (place as u32, weight)
    });
    let parts = parts.collect();
    Routes { used, rows, groups, parts }
}

/// The places of the `used` highest scores, highest first; what is no number comes last.
fn highest(scores: &[f32], used: usize, best: &mut Vec<usize>) {
    let beats = |a: f32, b: f32| a > b || (b.is_nan() && !a.is_nan());
    best.clear();
    for (expert, &score) in scores.iter().enumerate() {
        if best.len() == used && !beats(score, scores[best[used - 1]]) {
            continue;
        }
        let place = best.iter().position(|&other| beats(score, scores[other]));
        best.insert(place.unwrap_or(best.len()), expert);
        best.truncate(used);
    }
}

/// Rows per task: less is not worth waking a thread.
fn rows_each(width: usize) -> usize {
    (16384 / width.max(1)).max(1)
}

/// Rows of `x`, `[m, k]`, in the order of their experts: `out` is `[m * used, k]`.
///
/// # Panics
/// If a slice has another length than its shape.
pub fn gather(pool: &Pool, x: &[f32], k: usize, routes: &Routes, out: &mut [f32]) {
    assert_eq!(x.len() * routes.used, out.len(), "as many rows as are chosen");
    assert_eq!(out.len(), routes.rows.len() * k, "rows of {k}");
    let each = rows_each(k);
    let tasks = Parts::new(out);
    pool.run(routes.rows.len().div_ceil(each), &|task| {
        let mine = task * each..routes.rows.len().min((task + 1) * each);
        // SAFETY: tasks have rows of their own.
        let out = unsafe { tasks.take(mine.start * k..mine.end * k) };
        for (&row, out) in routes.rows[mine].iter().zip(out.chunks_exact_mut(k)) {
            out.copy_from_slice(&x[row as usize * k..][..k]);
        }
    });
}

/// Adds to each row what its expert's projection adds: `y` is `[m * used, n]` in the order of
/// experts, `biases` is `[experts, n]`.
///
/// # Panics
/// If a slice has another length than its shape.
pub fn add_biases(pool: &Pool, y: &mut [f32], n: usize, routes: &Routes, biases: &[f32]) {
    assert_eq!(y.len(), routes.rows.len() * n, "rows of {n}");
    let each = rows_each(n);
    let tasks = Parts::new(y);
    pool.run(routes.rows.len().div_ceil(each), &|task| {
        let mine = task * each..routes.rows.len().min((task + 1) * each);
        // SAFETY: tasks have rows of their own.
        let y = unsafe { tasks.take(mine.start * n..mine.end * n) };
        for (place, y) in mine.zip(y.chunks_exact_mut(n)) {
            let group = routes.groups.partition_point(|(_, places)| places.end <= place);
            let bias = &biases[routes.groups[group].0 * n..][..n];
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    });
}

/// The weighed sum of what the experts of each row brought: `y` is `[m * used, n]` in the order of
/// experts, `out` is `[m, n]`.
///
/// # Panics
/// If a slice has another length than its shape.
pub fn combine(pool: &Pool, y: &[f32], n: usize, routes: &Routes, out: &mut [f32]) {
    assert_eq!(y.len(), routes.rows.len() * n, "rows of {n}");
    assert_eq!(y.len(), out.len() * routes.used, "as many rows as are chosen");
    let m = routes.rows.len() / routes.used;
    let each = rows_each(n * routes.used);
    let tasks = Parts::new(out);
    pool.run(m.div_ceil(each), &|task| {
        let mine = task * each..m.min((task + 1) * each);
        // SAFETY: tasks have rows of their own.
        let out = unsafe { tasks.take(mine.start * n..mine.end * n) };
        for (row, out) in mine.zip(out.chunks_exact_mut(n)) {
            out.fill(0.0);
            for &(place, weight) in &routes.parts[row * routes.used..][..routes.used] {
                let y = &y[place as usize * n..][..n];
                out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
            }
        }
    });
}

#[cfg(test)]
mod tests;
