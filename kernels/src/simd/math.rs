//! Functions of vectors, in terms of the arithmetic of [`Simd`].

use super::Simd;
use crate::LANES;
use std::f32::consts::LOG2_E;

/// 1.5 * 2^23: a sum with it is rounded to an integer.
const ROUND: f32 = 12_582_912.0;

/// Below this, e^x is 0.
const LOWEST: f32 = -87.3;

/// e^x, relative error below 2e-7 where the result is a normal number. Below -87.3 it is exactly
/// 0, above 88.37 it stays at 2.4e38; NaN stays NaN.
///
/// x = n ln 2 + r with n an integer and |r| <= ln 2 / 2; e^r is its Taylor polynomial of degree 7
/// (the remainder is below 6e-9); 2^n is put together from bits. Adding 1.5 * 2^23 rounds to an
/// integer and leaves that integer in the low bits, so n needs no conversion.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::V) -> S::V {
    let [y] = exps(simd, [x]);
    y
}

/// [`exp`] of N vectors side by side: one alone is a long chain of steps that wait for each other.
#[inline(always)]
pub(crate) fn exps<S: Simd, const N: usize>(simd: S, x: [S::V; N]) -> [S::V; N] {
    const HIGHEST: f32 = 88.37;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const FACTORS: [f32; 7] =
        [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0];
    macro_rules! c {
        ($value:expr) => {
            simd.splat($value)
        };
    }
    let (mut shifted, mut r, mut y) = (x, x, [c!(1.0 / 5040.0); N]);
    for i in 0..N {
        let clamped = simd.min(c!(HIGHEST), simd.max(c!(LOWEST), x[i]));
        shifted[i] = simd.mul_add(clamped, c!(LOG2_E), c!(ROUND));
        let n = simd.sub(shifted[i], c!(ROUND));
        r[i] = simd.mul_add(n, c!(-LN2_HIGH), clamped);
        r[i] = simd.mul_add(n, c!(-LN2_LOW), r[i]);
    }
    for factor in FACTORS {
        for i in 0..N {
            y[i] = simd.mul_add(y[i], r[i], c!(factor));
        }
    }
    for i in 0..N {
        let scaled = simd.mul(y[i], simd.exponent(shifted[i]));
        y[i] = simd.if_less(x[i], c!(LOWEST), c!(0.0), scaled);
    }
    y
}

/// 2^f for |f| <= 1/2, from the highest power to the lowest: the cubic polynomial whose largest
/// relative error is the least, 7.5e-5 (found by Remez exchange).
pub(crate) const CUBIC: [f32; 4] = [0.055_171_67, 0.242_611_12, 0.693_260_97, 0.999_928_06];

/// The same of degree 4: 2.6e-6.
pub(crate) const QUARTIC: [f32; 5] =
    [0.009_570_102, 0.055_917_86, 0.240_247_44, 0.693_121_8, 0.999_999_3];

/// [`exps`] of numbers that are 0 or less, for weights that become integers: the relative error is
/// that of the polynomial and 5e-6 more. Of a larger number it is no exponential.
///
/// x / ln 2 = n + f with n an integer and |f| <= 1/2.
#[inline(always)]
pub(crate) fn coarse_exps<S: Simd, const N: usize, const D: usize>(
    simd: S,
    x: [S::V; N],
    polynomial: [f32; D],
) -> [S::V; N] {
    let (mut shifted, mut f, mut y) = (x, x, [simd.splat(polynomial[0]); N]);
    for i in 0..N {
        let clamped = simd.max(simd.splat(LOWEST), x[i]);
        shifted[i] = simd.mul_add(clamped, simd.splat(LOG2_E), simd.splat(ROUND));
        let minus_n = simd.sub(simd.splat(ROUND), shifted[i]);
        f[i] = simd.mul_add(clamped, simd.splat(LOG2_E), minus_n);
    }
    for factor in &polynomial[1..] {
        for i in 0..N {
            y[i] = simd.mul_add(y[i], f[i], simd.splat(*factor));
        }
    }
    for i in 0..N {
        let scaled = simd.mul(y[i], simd.exponent(shifted[i]));
        y[i] = simd.if_less(x[i], simd.splat(LOWEST), simd.splat(0.0), scaled);
    }
    y
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(simd: S, x: S::V) -> S::V {
    let one = simd.splat(1.0);
    let e = exp(simd, simd.sub(simd.splat(0.0), x));
    simd.div(one, simd.add(one, e))
}

/// Vectors whose exponentials are computed side by side.
pub(crate) const EXPS: usize = 4;

/// `x = cap * tanh(x / cap)`, within `2e-7 * cap`.
#[inline(always)]
pub(crate) fn softcap<S: Simd>(simd: S, x: &mut [[f32; LANES]], cap: f32) {
    let (many, rest) = x.as_chunks_mut::<EXPS>();
    for vectors in many {
        softcaps(simd, vectors, cap);
    }
    for vectors in rest.as_chunks_mut::<1>().0 {
        softcaps(simd, vectors, cap);
    }
}

/// [`softcap`] of N vectors side by side.
#[inline(always)]
fn softcaps<S: Simd, const N: usize>(simd: S, x: &mut [[f32; LANES]; N], cap: f32) {
    let (one, slope, cap) = (simd.splat(1.0), simd.splat(-2.0 / cap), simd.splat(cap));
    let mut e = [one; N];
    for i in 0..N {
        e[i] = simd.mul(simd.load(&x[i]), slope);
    }
    let e = exps(simd, e);
    for i in 0..N {
        let tanh = simd.div(simd.sub(one, e[i]), simd.add(one, e[i]));
        simd.store(simd.mul(cap, tanh), &mut x[i]);
    }
}

/// The nearest integers, ties to even, of numbers below 2^22.
#[inline(always)]
pub(crate) fn nearest<S: Simd>(simd: S, x: S::V) -> S::V {
    simd.sub(simd.add(x, simd.splat(ROUND)), simd.splat(ROUND))
}

/// The nearest integers, ties to even, of numbers that fit an i16: adding 1.5 * 2^23 leaves them in
/// the low bits. NaN gives some number.
#[inline(always)]
pub(crate) fn round<S: Simd>(simd: S, x: S::V) -> [i16; LANES] {
    let mut lanes = [0.0; LANES];
    simd.store(simd.add(x, simd.splat(ROUND)), &mut lanes);
    lanes.map(|x: f32| x.to_bits() as i16)
}

/// The largest lane; which one it is among NaN is not said.
#[inline(always)]
pub(crate) fn largest<S: Simd>(simd: S, v: S::V) -> f32 {
    let mut lanes = [0.0; LANES];
    simd.store(v, &mut lanes);
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            let (a, b) = (lanes[i], lanes[i + width]);
            lanes[i] = if a > b { a } else { b };
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of the lanes, as a fixed tree: halves are added to each other.
#[inline(always)]
pub(crate) fn sum<S: Simd>(simd: S, v: S::V) -> f32 {
    let mut lanes = [0.0; LANES];
    simd.store(v, &mut lanes);
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
