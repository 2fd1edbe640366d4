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
    type Pairs = [[i8; 2]; LANES];
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
    fn zero_ints(self) -> Self::Ints {
        [0; LANES]
    }

    #[inline(always)]
    fn load_pairs(self, x: &[[i8; 2]; LANES]) -> Self::Pairs {
        *x
    }

    #[inline(always)]
    fn dot_pairs(self, a: Self::Pairs, b: [i16; 2], sums: Self::Ints) -> Self::Ints {
        let product = |x: i8, y: i16| i32::from(x) * i32::from(y);
        from_fn(|i| sums[i] + product(a[i][0], b[0]) + product(a[i][1], b[1]))
    }

    #[inline(always)]
    fn to_floats(self, v: Self::Ints) -> Self::V {
        v.map(|x| x as f32)
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
