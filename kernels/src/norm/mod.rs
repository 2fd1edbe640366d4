//! RMS norm: `out = x / sqrt(mean(x^2) + eps) * weight`, row by row.
//!
//! The sum of squares has sixteen partial sums, lane i taking the elements i, i + 16, ...; they are
//! then added as a tree. All instruction sets agree bit by bit; against a sum in f64 the result is
//! within 2e-6 relative for the sizes of real models.
//!
//! The mean-subtracting layer norm of encoders is in `layer.rs`. Deliberately absent: weights
//! stored as `w - 1` (the loader adds the 1).

mod layer;

pub use layer::{LayerNorm, layer_norm, layer_norm_with};

use crate::parts::Parts;
use crate::pool::run_rows;
use crate::simd::{Kernel, Map, Simd, run, sum, zip_into, zip_map};
use crate::{Isa, LANES, Pool};

/// `out[r] = rms_norm(x[r]) * weight`; `x` and `out` are `[rows, dim]`, `weight` is `[dim]`.
pub fn rms_norm(
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    rows: usize,
    dim: usize,
    out: &mut [f32],
) {
    rms_norm_with(Isa::best(), pool, x, weight, eps, rows, dim, out);
}

/// [`rms_norm`] with a chosen instruction set.
pub fn rms_norm_with(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    rows: usize,
    dim: usize,
    out: &mut [f32],
) {
    assert_eq!(x.len(), rows * dim, "x is [rows, dim]");
    assert_eq!(out.len(), rows * dim, "out is [rows, dim]");
    assert_eq!(weight.len(), dim, "weight is [dim]");
    let out = Parts::new(out);
    run_rows(pool, rows, dim, &|range| {
        for row in range {
            let numbers = row * dim..(row + 1) * dim;
            // SAFETY: every row is visited by one task only.
            let out = unsafe { out.take(numbers.clone()) };
            run(isa, RmsNorm { x: &x[numbers], weight, eps, out });
        }
    });
}

/// `x += y`, and `out[r] = rms_norm(x[r]) * weight` while the row is in the cache; all but `weight`
/// are `[rows, dim]`, `weight` is `[dim]`.
pub fn add_rms_norm(
    pool: &Pool,
    x: &mut [f32],
    y: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    add_rms_norm_with(Isa::best(), pool, x, y, weight, eps, out);
}

/// [`add_rms_norm`] with a chosen instruction set.
pub fn add_rms_norm_with(
    isa: Isa,
    pool: &Pool,
    x: &mut [f32],
    y: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let dim = weight.len();
    let rows = x.len() / dim.max(1);
    assert_eq!(x.len(), rows * dim, "x is [rows, dim]");
    assert_eq!((y.len(), out.len()), (x.len(), x.len()), "x, y and out have one shape");
    let (x, out) = (Parts::new(x), Parts::new(out));
    run_rows(pool, rows, dim, &|range| {
        for row in range {
            let numbers = row * dim..(row + 1) * dim;
            // SAFETY: every row is visited by one task only.
            let (x, out) = unsafe { (x.take(numbers.clone()), out.take(numbers.clone())) };
            run(isa, AddRmsNorm { x, y: &y[numbers], weight, eps, out });
        }
    });
}

/// One row.
struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = Scale(inverse_rms(simd, self.x, self.eps));
        zip_map(simd, self.x, self.weight, self.out, scale);
    }
}

/// One row.
struct AddRmsNorm<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for AddRmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let AddRmsNorm { x, y, weight, eps, out } = self;
        zip_into(simd, x, y, Sum);
        RmsNorm { x, weight, eps, out }.run(simd);
    }
}

/// `x = x / sqrt(mean(x^2) + eps) * weight`, one row or head.
#[inline(always)]
pub(crate) fn rms_norm_in_place<S: Simd>(simd: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = Scale(inverse_rms(simd, x, eps));
    zip_into(simd, x, weight, scale);
}

#[inline(always)]
fn inverse_rms<S: Simd>(simd: S, x: &[f32], eps: f32) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut squares = simd.splat(0.0);
    for chunk in chunks {
        let x = simd.load(chunk);
        squares = simd.mul_add(x, x, squares);
    }
    if !tail.is_empty() {
        let x = simd.load_part(tail, 0.0);
        squares = simd.mul_add(x, x, squares);
    }
    1.0 / (sum(simd, squares) / x.len() as f32 + eps).sqrt()
}

struct Scale(f32);

impl Map for Scale {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, x: S::V, weight: S::V) -> S::V {
        simd.mul(simd.mul(x, simd.splat(self.0)), weight)
    }
}

struct Sum;

impl Map for Sum {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, x: S::V, y: S::V) -> S::V {
        simd.add(x, y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    fn truth(x: &[f32], weight: &[f32], eps: f32, dim: usize) -> Vec<f32> {
        let mut out = Vec::new();
        for row in x.chunks_exact(dim.max(1)) {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            let scaled = |(x, w): (&f32, &f32)| (f64::from(*x) * scale * f64::from(*w)) as f32;
            out.extend(row.iter().zip(weight).map(scaled));
        }
        out
    }

    #[test]
    fn every_isa_is_near_the_truth_and_equal_to_scalar() {
        let pool = Pool::new(3);
        for (&dim, &rows) in
            cases::LENGTHS.iter().flat_map(|d| cases::ROWS.iter().map(move |r| (d, r)))
        {
            let (x, weight) = (cases::randoms(rows * dim, 3), cases::randoms(dim, 4));
            let truth = truth(&x, &weight, 1e-5, dim);
            let mut scalar = vec![0.0; rows * dim];
            rms_norm_with(Isa::Scalar, &Pool::new(1), &x, &weight, 1e-5, rows, dim, &mut scalar);
            assert!(cases::max_abs_diff(&truth, &scalar) < 4e-6, "dim {dim}");
            for isa in Isa::available() {
                let mut out = vec![9.0; rows * dim];
                rms_norm_with(*isa, &pool, &x, &weight, 1e-5, rows, dim, &mut out);
                cases::assert_same_bits(&scalar, &out, isa.name());
            }
        }
    }

    #[test]
    fn a_sum_and_its_norm_are_those_of_two_steps() {
        let pool = Pool::new(3);
        for (&dim, &rows) in
            cases::LENGTHS.iter().flat_map(|d| cases::ROWS.iter().map(move |r| (d, r)))
        {
            let (x, y) = (cases::randoms(rows * dim, 3), cases::randoms(rows * dim, 5));
            let weight = cases::randoms(dim, 4);
            let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            let mut normed = vec![0.0; rows * dim];
            rms_norm(&pool, &sum, &weight, 1e-5, rows, dim, &mut normed);
            for isa in Isa::available() {
                let (mut x, mut out) = (x.clone(), vec![9.0; rows * dim]);
                add_rms_norm_with(*isa, &pool, &mut x, &y, &weight, 1e-5, &mut out);
                cases::assert_same_bits(&sum, &x, isa.name());
                cases::assert_same_bits(&normed, &out, isa.name());
            }
        }
    }
}
