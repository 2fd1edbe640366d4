//! `cap * tanh(x / cap)`: logits that stay below a bound (Bello et al. 2016; Gemma Team 2024).
//!
//! Against f64 within `2e-7 * cap`; all instruction sets agree bit by bit.

use super::run_pieces;
use crate::pool::Parts;
use crate::simd::{Kernel, Map, Simd, run, softcaps, zip_map};
use crate::{Isa, Pool};

/// `out = cap * tanh(x / cap)`, element by element; `cap` is positive.
pub fn softcap(pool: &Pool, cap: f32, x: &[f32], out: &mut [f32]) {
    softcap_with(Isa::best(), pool, cap, x, out);
}

/// [`softcap`] with a chosen instruction set.
pub fn softcap_with(isa: Isa, pool: &Pool, cap: f32, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "x and out have one shape");
    assert!(cap > 0.0, "a cap of nothing");
    let len = out.len();
    let out = Parts::new(out);
    run_pieces(pool, len, &|piece| {
        // SAFETY: pieces do not overlap.
        let out = unsafe { out.take(piece.clone()) };
        run(isa, Piece { cap, x: &x[piece], out });
    });
}

struct Piece<'a> {
    cap: f32,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Piece<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        zip_map(simd, self.x, self.x, self.out, Softcap(self.cap));
    }
}

struct Softcap(f32);

impl Map for Softcap {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, x: S::V, _: S::V) -> S::V {
        let [y] = softcaps(simd, [x], self.0);
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    #[test]
    fn near_the_truth_and_equal_to_scalar() {
        for (&len, cap) in
            cases::LENGTHS.iter().chain(&[100_003]).zip([30.0, 50.0].into_iter().cycle())
        {
            let x: Vec<f32> = cases::randoms(len, 16).iter().map(|x| x * 200.0).collect();
            let mut scalar = vec![0.0; len];
            softcap_with(Isa::Scalar, &Pool::new(1), cap, &x, &mut scalar);
            for (x, y) in x.iter().zip(&scalar) {
                let truth = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
                let error = (truth - f64::from(*y)).abs();
                assert!(error < 2e-7 * f64::from(cap), "{x}: {error:e}");
            }
            for isa in Isa::available() {
                let mut out = vec![9.0; len];
                softcap_with(*isa, &Pool::new(3), cap, &x, &mut out);
                cases::assert_same_bits(&scalar, &out, isa.name());
            }
        }
    }

    #[test]
    fn what_is_extreme_ends_at_the_cap() {
        let (x, mut out) = ([-f32::INFINITY, -1e30, 0.0, 1e30, f32::INFINITY], [9.0; 5]);
        for isa in Isa::available() {
            softcap_with(*isa, &Pool::new(1), 30.0, &x, &mut out);
            assert_eq!(out, [-30.0, -30.0, 0.0, 30.0, 30.0]);
        }
    }
}
