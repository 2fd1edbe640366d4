//! What integers that attention multiplies have in common: words of 32 bits, in which processors
//! multiply and add four bytes, or two i16, to one sum.

use super::CHUNK;
use crate::LANES;
use crate::kv::ints::Whole;
use crate::simd::{CUBIC, QUARTIC, Simd, coarse_exps};
use bytemuck::Pod;

/// Integers that are multiplied and added a word at a time.
pub(super) trait Words: Whole {
    /// Of one lane.
    type Lane: Pod;
    /// A word of a query, or of weights.
    type Word<S: Simd>: Pod;
    /// One vector of these, an array of words.
    type Vector<S: Simd>: Pod + AsRef<[Self::Word<S>]>;
    /// Sixteen lanes of K, or of V.
    type K<S: Simd>: Copy;
    type V<S: Simd>: Copy;

    fn store<S: Simd>(simd: S, v: S::V, out: &mut Self::Vector<S>);
    fn load_k<S: Simd>(simd: S, k: &[Self::Lane; LANES]) -> Self::K<S>;
    fn load_v<S: Simd>(simd: S, v: &[Self::Lane; LANES]) -> Self::V<S>;
    fn dot_k<S: Simd>(simd: S, k: Self::K<S>, q: &Self::Word<S>, sums: S::Ints) -> S::Ints;
    fn dot_v<S: Simd>(simd: S, v: Self::V<S>, weight: &Self::Word<S>, sums: S::Ints) -> S::Ints;

    /// Exponentials, as exact as the integers that they become.
    fn exps<S: Simd, const N: usize>(simd: S, x: [S::V; N]) -> [S::V; N];
    /// What one stands for among the integers of a line: of its weights times scales of V, the
    /// largest and the sum are given.
    fn weight_step(largest: f32, sum: f32) -> f32;
}

impl Words for i8 {
    type Lane = [i8; 4];
    type Word<S: Simd> = S::Quad;
    type Vector<S: Simd> = [S::Quad; 4];
    type K<S: Simd> = S::Quads;
    type V<S: Simd> = S::Quads;

    #[inline(always)]
    fn store<S: Simd>(simd: S, v: S::V, out: &mut [S::Quad; 4]) {
        simd.store_quads(v, out);
    }

    #[inline(always)]
    fn load_k<S: Simd>(simd: S, k: &[[i8; 4]; LANES]) -> S::Quads {
        simd.load_unsigned(bytemuck::cast_ref(k))
    }

    #[inline(always)]
    fn load_v<S: Simd>(simd: S, v: &[[i8; 4]; LANES]) -> S::Quads {
        simd.load_signed(v)
    }

    #[inline(always)]
    fn dot_k<S: Simd>(simd: S, k: S::Quads, q: &S::Quad, sums: S::Ints) -> S::Ints {
        simd.dot_unsigned(k, q, sums)
    }

    #[inline(always)]
    fn dot_v<S: Simd>(simd: S, v: S::Quads, weight: &S::Quad, sums: S::Ints) -> S::Ints {
        simd.dot_signed(v, weight, sums)
    }

    #[inline(always)]
    fn exps<S: Simd, const N: usize>(simd: S, x: [S::V; N]) -> [S::V; N] {
        coarse_exps(simd, x, CUBIC)
    }

    #[inline(always)]
    fn weight_step(largest: f32, _: f32) -> f32 {
        largest / 255.0
    }
}

impl Words for i16 {
    type Lane = [i16; 2];
    type Word<S: Simd> = [i16; 2];
    type Vector<S: Simd> = [[i16; 2]; 8];
    type K<S: Simd> = S::Pairs;
    type V<S: Simd> = S::Pairs;

    #[inline(always)]
    fn store<S: Simd>(simd: S, v: S::V, out: &mut [[i16; 2]; 8]) {
        simd.store_pairs(v, out);
    }

    #[inline(always)]
    fn load_k<S: Simd>(simd: S, k: &[[i16; 2]; LANES]) -> S::Pairs {
        simd.load_pairs(k)
    }

    #[inline(always)]
    fn load_v<S: Simd>(simd: S, v: &[[i16; 2]; LANES]) -> S::Pairs {
        simd.load_pairs(v)
    }

    #[inline(always)]
    fn dot_k<S: Simd>(simd: S, k: S::Pairs, q: &[i16; 2], sums: S::Ints) -> S::Ints {
        simd.dot_pairs(k, q, sums)
    }

    #[inline(always)]
    fn dot_v<S: Simd>(simd: S, v: S::Pairs, weight: &[i16; 2], sums: S::Ints) -> S::Ints {
        simd.dot_pairs(v, weight, sums)
    }

    #[inline(always)]
    fn exps<S: Simd, const N: usize>(simd: S, x: [S::V; N]) -> [S::V; N] {
        coarse_exps(simd, x, QUARTIC)
    }

    #[inline(always)]
    fn weight_step(largest: f32, sum: f32) -> f32 {
        const SUM: i64 = 261_800;
        // With what rounding adds, times the largest number of V.
        const { assert!((SUM + CHUNK as i64) * 8191 < 1 << 31, "a sum beyond an i32") };
        let (by_largest, by_sum) = (largest / 32_700.0, sum / SUM as f32);
        if by_largest > by_sum { by_largest } else { by_sum }
    }
}
