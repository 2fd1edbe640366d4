//! The truth: sixteen lanes as an array.

use super::Simd;
use crate::LANES;
use half::{bf16, f16};
use std::array::from_fn;

#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Simd for Scalar {
    type V = [f32; LANES];
    type Ints = [i32; LANES];
    type Quads = [[i32; 4]; LANES];
    type Quad = [i16; 4];
    type Pairs = [[i16; 2]; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        *x
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::V {
        x.map(f16::to_f32)
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V {
        x.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }

    #[inline(always)]
    fn load_firsts(self, x: &[[bf16; 2]; LANES]) -> Self::V {
        x.map(|[first, _]| f32::from_bits(u32::from(first.to_bits()) << 16))
    }

    #[inline(always)]
    fn load_seconds(self, x: &[[bf16; 2]; LANES]) -> Self::V {
        x.map(|[_, second]| f32::from_bits(u32::from(second.to_bits()) << 16))
    }

    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32; LANES]) {
        *out = v;
    }

    #[inline(always)]
    fn store_f16(self, v: Self::V, out: &mut [f16; LANES]) {
        *out = v.map(f16::from_f32);
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn if_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }

    #[inline(always)]
    fn exponent(self, v: Self::V) -> Self::V {
        v.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }

    #[inline(always)]
    fn splat_ints(self, x: i32) -> Self::Ints {
        [x; LANES]
    }

    #[inline(always)]
    fn load_unsigned(self, x: &[[u8; 4]; LANES]) -> Self::Quads {
        x.map(|quad| quad.map(i32::from))
    }

    #[inline(always)]
    fn load_signed(self, x: &[[i8; 4]; LANES]) -> Self::Quads {
        x.map(|quad| quad.map(i32::from))
    }

    #[inline(always)]
    fn store_quads(self, v: Self::V, out: &mut [[i16; 4]; LANES / 4]) {
        for (out, x) in out.as_flattened_mut().iter_mut().zip(v) {
            *out = x.round_ties_even() as i16;
        }
    }

    #[inline(always)]
    fn dot_unsigned(self, a: Self::Quads, b: &[i16; 4], sums: Self::Ints) -> Self::Ints {
        self.dot_signed(a, b, sums)
    }

    #[inline(always)]
    fn dot_signed(self, a: Self::Quads, b: &[i16; 4], sums: Self::Ints) -> Self::Ints {
        let dot = |a: [i32; 4]| a.iter().zip(b).map(|(a, b)| a * i32::from(*b)).sum::<i32>();
        from_fn(|i| sums[i] + dot(a[i]))
    }

    #[inline(always)]
    fn load_pairs(self, x: &[[i16; 2]; LANES]) -> Self::Pairs {
        *x
    }

    #[inline(always)]
    fn store_pairs(self, v: Self::V, out: &mut [[i16; 2]; LANES / 2]) {
        for (out, x) in out.as_flattened_mut().iter_mut().zip(v) {
            *out = x.round_ties_even() as i16;
        }
    }

    #[inline(always)]
    fn dot_pairs(self, a: Self::Pairs, b: &[i16; 2], sums: Self::Ints) -> Self::Ints {
        let [first, second] = b.map(i32::from);
        // Sums that nobody reads may be beyond an i32: they wrap everywhere.
        let dot = |[a, b]: [i16; 2]| (i32::from(a) * first).wrapping_add(i32::from(b) * second);
        from_fn(|i| sums[i].wrapping_add(dot(a[i])))
    }

    #[inline(always)]
    fn to_floats(self, v: Self::Ints) -> Self::V {
        v.map(|x| x as f32)
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
