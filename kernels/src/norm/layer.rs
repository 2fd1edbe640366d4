//! Layer norm: `out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`, row by row.
//!
//! Ba et al. 2016. Two passes over the row, so that a mean far from zero costs no digits: the mean
//! first, then the squares of the differences. Both sums have sixteen partial sums, as in RMS norm;
//! against sums in f64 the result is within 4e-6 for inputs of size 1.

use crate::parts::Parts;
use crate::pool::run_rows;
use crate::simd::{Kernel, Simd, run, sum};
use crate::{Isa, LANES, Pool};

/// What a layer norm is made of; `weight` and `bias` are `[dim]`.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// Scales.
    pub weight: &'a [f32],
    /// Shifts.
    pub bias: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
}

/// `out[r] = norm(x[r])`; `x` and `out` are `[rows, dim]`.
pub fn layer_norm(pool: &Pool, x: &[f32], norm: &LayerNorm<'_>, out: &mut [f32]) {
    layer_norm_with(Isa::best(), pool, x, norm, out);
}

/// [`layer_norm`] with a chosen instruction set.
pub fn layer_norm_with(isa: Isa, pool: &Pool, x: &[f32], norm: &LayerNorm<'_>, out: &mut [f32]) {
    let dim = norm.weight.len();
    let rows = x.len() / dim.max(1);
    assert_eq!(norm.bias.len(), dim, "weight and bias are [dim]");
    assert_eq!(x.len(), rows * dim, "x is [rows, dim]");
    assert_eq!(out.len(), x.len(), "x and out have one shape");
    let out = Parts::new(out);
    run_rows(pool, rows, dim, &|range| {
        for row in range {
            let numbers = row * dim..(row + 1) * dim;
            // SAFETY: every row is visited by one task only.
            let out = unsafe { out.take(numbers.clone()) };
            run(isa, Row { x: &x[numbers], norm, out });
        }
    });
}

struct Row<'a> {
    x: &'a [f32],
    norm: &'a LayerNorm<'a>,
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let count = self.x.len() as f32;
        let (chunks, tail) = self.x.as_chunks::<LANES>();
        let mut total = simd.splat(0.0);
        for chunk in chunks {
            total = simd.add(total, simd.load(chunk));
        }
        total = simd.add(total, simd.load_part(tail, 0.0));
        let mean = sum(simd, total) / count;

        let middle = simd.splat(mean);
        let mut squares = simd.splat(0.0);
        for chunk in chunks {
            let apart = simd.sub(simd.load(chunk), middle);
            squares = simd.mul_add(apart, apart, squares);
        }
        // Lanes beyond the row stand at the mean.
        let apart = simd.sub(simd.load_part(tail, mean), middle);
        squares = simd.mul_add(apart, apart, squares);
        let scale = simd.splat(1.0 / (sum(simd, squares) / count + self.norm.eps).sqrt());

        let (weights, weight_tail) = self.norm.weight.as_chunks::<LANES>();
        let (biases, bias_tail) = self.norm.bias.as_chunks::<LANES>();
        let (out, out_tail) = self.out.as_chunks_mut::<LANES>();
        for (((x, weight), bias), out) in chunks.iter().zip(weights).zip(biases).zip(out) {
            let apart = simd.mul(simd.sub(simd.load(x), middle), scale);
            simd.store(simd.mul_add(apart, simd.load(weight), simd.load(bias)), out);
        }
        if !tail.is_empty() {
            let apart = simd.mul(simd.sub(simd.load_part(tail, 0.0), middle), scale);
            let (weight, bias) = (simd.load_part(weight_tail, 0.0), simd.load_part(bias_tail, 0.0));
            simd.store_part(simd.mul_add(apart, weight, bias), out_tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    fn truth(x: &[f32], norm: &LayerNorm<'_>) -> Vec<f32> {
        let mut out = Vec::new();
        for row in x.chunks_exact(norm.weight.len().max(1)) {
            let count = row.len() as f64;
            let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
            let squares = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
            let scale = 1.0 / (squares / count + f64::from(norm.eps)).sqrt();
            for ((x, weight), bias) in row.iter().zip(norm.weight).zip(norm.bias) {
                let apart = (f64::from(*x) - mean) * scale;
                out.push((apart * f64::from(*weight) + f64::from(*bias)) as f32);
            }
        }
        out
    }

    #[test]
    fn every_isa_is_near_the_truth_and_equal_to_scalar() {
        let pool = Pool::new(3);
        for (&dim, &rows) in
            cases::LENGTHS.iter().flat_map(|d| cases::ROWS.iter().map(move |r| (d, r)))
        {
            // Far from zero: one pass over f32 squares would lose half of the digits.
            let x: Vec<f32> = cases::randoms(rows * dim, 3).iter().map(|x| x + 3.0).collect();
            let (weight, bias) = (cases::randoms(dim, 4), cases::randoms(dim, 5));
            let norm = LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 };
            let truth = truth(&x, &norm);
            let mut scalar = vec![0.0; rows * dim];
            layer_norm_with(Isa::Scalar, &Pool::new(1), &x, &norm, &mut scalar);
            let limit = if dim == 2 { 2e-4 } else { 4e-6 };
            let error = cases::max_abs_diff(&truth, &scalar);
            assert!(error < limit, "dim {dim}: {error:e}");
            for isa in Isa::available() {
                let mut out = vec![9.0; rows * dim];
                layer_norm_with(*isa, &pool, &x, &norm, &mut out);
                cases::assert_same_bits(&scalar, &out, isa.name());
            }
        }
    }

    #[test]
    fn a_row_of_one_value_becomes_the_bias() {
        let norm = LayerNorm { weight: &[2.0; 33], bias: &[0.5; 33], eps: 1e-12 };
        let mut out = [9.0; 33];
        layer_norm(&Pool::new(1), &[7.25; 33], &norm, &mut out);
        assert_eq!(out, [0.5; 33]);
    }
}
