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
use crate::simd::{Kernel, Map, Simd, run, sum, zip_map};
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
        let (chunks, tail) = self.x.as_chunks::<LANES>();
        let mut squares = simd.splat(0.0);
        for chunk in chunks {
            let x = simd.load(chunk);
            squares = simd.mul_add(x, x, squares);
        }
        if !tail.is_empty() {
            let x = simd.load_part(tail, 0.0);
            squares = simd.mul_add(x, x, squares);
        }
        let mean = sum(simd, squares) / self.x.len() as f32;
        zip_map(simd, self.x, self.weight, self.out, Scale(1.0 / (mean + self.eps).sqrt()));
    }
}

struct Scale(f32);

impl Map for Scale {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, x: S::V, weight: S::V) -> S::V {
        simd.mul(simd.mul(x, simd.splat(self.0)), weight)
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
}
