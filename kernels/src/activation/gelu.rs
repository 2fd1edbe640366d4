//! GELU without a gate: `x * Phi(x)`, Phi the distribution function of the standard normal.
//!
//! Hendrycks and Gimpel 2016, in both forms that models are trained with. The exact form is
//! computed as `max(x, 0) - |x| Q(|x|)` with the tail `Q(a) = erfc(a / sqrt 2) / 2`, so that
//! nothing cancels on either side; erfc is the approximation 7.1.26 of Abramowitz and Stegun
//! (1964), whose error of 1.5e-7 is multiplied by `|x| / 2`. Against f64 both forms are within
//! 1e-6 (1 + |x|).

use std::f32::consts::FRAC_1_SQRT_2;

use super::{gelu_tanh, run_pieces};
use crate::parts::Parts;
use crate::simd::{Kernel, Map, Simd, exp, run, zip_map};
use crate::{Isa, Pool};

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// The exact one, through the error function.
    Erf,
    /// The approximation through tanh.
    Tanh,
}

/// `out = gelu(x)`, element by element.
pub fn gelu(pool: &Pool, kind: Gelu, x: &[f32], out: &mut [f32]) {
    gelu_with(Isa::best(), pool, kind, x, out);
}

/// [`gelu`] with a chosen instruction set.
pub fn gelu_with(isa: Isa, pool: &Pool, kind: Gelu, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "x and out have one shape");
    let len = out.len();
    let out = Parts::new(out);
    run_pieces(pool, len, &|piece| {
        // SAFETY: pieces do not overlap.
        let out = unsafe { out.take(piece.clone()) };
        run(isa, Piece { kind, x: &x[piece], out });
    });
}

struct Piece<'a> {
    kind: Gelu,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Piece<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.kind {
            Gelu::Erf => zip_map(simd, self.x, self.x, self.out, Erf),
            Gelu::Tanh => zip_map(simd, self.x, self.x, self.out, Tanh),
        }
    }
}

struct Tanh;

impl Map for Tanh {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, x: S::V, _: S::V) -> S::V {
        gelu_tanh(simd, x)
    }
}

struct Erf;

impl Map for Erf {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, x: S::V, _: S::V) -> S::V {
        // Halves of a5, a4, ... a1 of 7.1.26, whose erfc is the polynomial times e^(-z^2).
        const FACTORS: [f32; 4] = [-0.726_576_03, 0.710_706_9, -0.142_248_37, 0.127_414_8];
        const A5: f32 = 0.530_702_7;
        const P: f32 = 0.327_591_1 * FRAC_1_SQRT_2;
        let (zero, one) = (simd.splat(0.0), simd.splat(1.0));
        let size = simd.max(x, simd.sub(zero, x));
        let t = simd.div(one, simd.mul_add(size, simd.splat(P), one));
        let mut tail = simd.splat(A5);
        for factor in FACTORS {
            tail = simd.mul_add(tail, t, simd.splat(factor));
        }
        let bell = exp(simd, simd.mul(simd.mul(size, size), simd.splat(-0.5)));
        let tail = simd.mul(simd.mul(tail, t), bell);
        simd.sub(simd.max(x, zero), simd.mul(size, tail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    /// The distribution function by its series (converges for every x, here to 1e-15 for |x| < 8).
    fn phi(x: f64) -> f64 {
        let (mut term, mut sum, mut n) = (x, x, 1.0);
        while term.abs() > 1e-18 {
            n += 2.0;
            term *= x * x / n;
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
    }

    fn truth(kind: Gelu, x: f32) -> f64 {
        let x = f64::from(x);
        match kind {
            Gelu::Erf => x * phi(x),
            Gelu::Tanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
        }
    }

    #[test]
    fn both_forms_are_near_the_truth_and_equal_to_scalar() {
        let pool = Pool::new(3);
        for &len in cases::LENGTHS.iter().chain(&[100_003]) {
            let x: Vec<f32> = cases::randoms(len, 20).iter().map(|x| x * 7.0).collect();
            for kind in [Gelu::Erf, Gelu::Tanh] {
                let mut scalar = vec![0.0; len];
                gelu_with(Isa::Scalar, &Pool::new(1), kind, &x, &mut scalar);
                for i in 0..len {
                    let error = (truth(kind, x[i]) - f64::from(scalar[i])).abs();
                    let limit = 1e-6 * (1.0 + f64::from(x[i].abs()));
                    assert!(error < limit, "{kind:?}({}) {error:e}", x[i]);
                }
                for isa in Isa::available() {
                    let mut out = vec![9.0; len];
                    gelu_with(*isa, &pool, kind, &x, &mut out);
                    cases::assert_same_bits(&scalar, &out, isa.name());
                }
            }
        }
    }

    #[test]
    fn the_two_forms_differ_and_extremes_stay_finite() {
        let x = [-1e30, -100.0, -0.0, 0.0, 2.0, 100.0, 1e18];
        let (mut erf, mut tanh) = ([9.0; 7], [9.0; 7]);
        gelu(&Pool::new(1), Gelu::Erf, &x, &mut erf);
        gelu(&Pool::new(1), Gelu::Tanh, &x, &mut tanh);
        assert!((erf[4] - tanh[4]).abs() > 5e-5, "{} {}", erf[4], tanh[4]);
        for out in [erf, tanh] {
            // The tanh form ends a rounding away from zero.
            assert!(out[..4].iter().all(|y| y.abs() < 1e-8), "{out:?}");
            assert_eq!([out[5], out[6]], [100.0, 1e18]);
        }
        let mut out = [0.0];
        for kind in [Gelu::Erf, Gelu::Tanh] {
            gelu(&Pool::new(1), kind, &[f32::NAN], &mut out);
            assert!(out[0].is_nan());
        }
    }
}
