//! `cap * tanh(x / cap)`: logits that stay below a bound (Bello et al. 2016; Gemma Team 2024).
//!
//! Against f64 within `2e-7 * cap`; all instruction sets agree bit by bit.

use super::run_pieces;
use crate::parts::Parts;
use crate::simd::{self, Kernel, Simd, run};
use crate::{Isa, LANES, Pool};

/// `x = cap * tanh(x / cap)`, element by element; `cap` is positive.
pub fn softcap(pool: &Pool, cap: f32, x: &mut [f32]) {
    softcap_with(Isa::best(), pool, cap, x);
}

/// [`softcap`] with a chosen instruction set.
pub fn softcap_with(isa: Isa, pool: &Pool, cap: f32, x: &mut [f32]) {
    assert!(cap > 0.0, "a cap of nothing");
    let len = x.len();
    let x = Parts::new(x);
    run_pieces(pool, len, &|piece| {
        // SAFETY: pieces do not overlap.
        let x = unsafe { x.take(piece) };
        run(isa, Piece { cap, x });
    });
}

struct Piece<'a> {
    cap: f32,
    x: &'a mut [f32],
}

impl Kernel for Piece<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (vectors, tail) = self.x.as_chunks_mut::<LANES>();
        simd::softcap(simd, vectors, self.cap);
        if !tail.is_empty() {
            let mut last = [0.0; LANES];
            last[..tail.len()].copy_from_slice(tail);
            simd::softcap(simd, std::slice::from_mut(&mut last), self.cap);
            tail.copy_from_slice(&last[..tail.len()]);
        }
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
            let mut scalar = x.clone();
            softcap_with(Isa::Scalar, &Pool::new(1), cap, &mut scalar);
            for (x, y) in x.iter().zip(&scalar) {
                let truth = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
                let error = (truth - f64::from(*y)).abs();
                assert!(error < 2e-7 * f64::from(cap), "{x}: {error:e}");
            }
            for isa in Isa::available() {
                let mut out = x.clone();
                softcap_with(*isa, &Pool::new(3), cap, &mut out);
                cases::assert_same_bits(&scalar, &out, isa.name());
            }
        }
    }

    #[test]
    fn what_is_extreme_ends_at_the_cap() {
        for isa in Isa::available() {
            let mut out = [-f32::INFINITY, -1e30, 0.0, 1e30, f32::INFINITY];
            softcap_with(*isa, &Pool::new(1), 30.0, &mut out);
            assert_eq!(out, [-30.0, -30.0, 0.0, 30.0, 30.0]);
        }
    }
}
