//! Sixteen lanes as two registers of eight.

use super::{Kernel, Simd};
use crate::LANES;
use half::{bf16, f16};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx2(()))
}

/// Proof that the processor has AVX2, FMA and F16C: [`run`] makes the only one.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

#[derive(Clone, Copy)]
pub(super) struct Pair(__m256, __m256);

#[derive(Clone, Copy)]
pub(super) struct IntPair(__m256i, __m256i);

/// The first and the third byte of sixteen quads as i16, and the second and the fourth.
#[derive(Clone, Copy)]
pub(super) struct QuadPair {
    even: IntPair,
    odd: IntPair,
}

/// Both halves, with intrinsics that this processor has.
macro_rules! both {
    ($f:ident, $($v:ident),+) => {
        // SAFETY: `Avx2` exists only where AVX2, FMA and F16C do.
        unsafe { Pair($f($($v.0),+), $f($($v.1),+)) }
    };
}

impl Simd for Avx2 {
    type V = Pair;
    type Ints = IntPair;
    type Quads = QuadPair;
    /// The first and the third, then the second and the fourth.
    type Quad = [[i16; 2]; 2];
    type Pairs = IntPair;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: `Avx2` exists only where AVX2 does.
        unsafe { Pair(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Pair {
        // SAFETY: AVX2 is here; the array holds two registers.
        unsafe { Pair(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Pair {
        let x = x.as_ptr().cast::<__m128i>();
        // SAFETY: F16C is here; the array holds two registers of eight halves.
        unsafe {
            let low = _mm256_cvtph_ps(_mm_loadu_si128(x));
            Pair(low, _mm256_cvtph_ps(_mm_loadu_si128(x.add(1))))
        }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Pair {
        let x = x.as_ptr().cast::<__m128i>();
        // SAFETY: AVX2 is here; the array holds two registers of eight halves.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(x));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.add(1)));
            let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low));
            Pair(low, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)))
        }
    }

    #[inline(always)]
    fn load_firsts(self, x: &[[bf16; 2]; LANES]) -> Pair {
        let x = x.as_ptr().cast::<__m256i>();
        // SAFETY: AVX2 is here; the array holds two registers.
        unsafe {
            let low = _mm256_slli_epi32::<16>(_mm256_loadu_si256(x));
            let high = _mm256_slli_epi32::<16>(_mm256_loadu_si256(x.add(1)));
            Pair(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
        }
    }

    #[inline(always)]
    fn load_seconds(self, x: &[[bf16; 2]; LANES]) -> Pair {
        let x = x.as_ptr().cast::<__m256i>();
        // SAFETY: AVX2 is here; the array holds two registers.
        unsafe {
            let upper = _mm256_set1_epi32(-0x1_0000);
            let low = _mm256_and_si256(_mm256_loadu_si256(x), upper);
            let high = _mm256_and_si256(_mm256_loadu_si256(x.add(1)), upper);
            Pair(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
        }
    }

    #[inline(always)]
    fn store_f16(self, v: Pair, out: &mut [f16; LANES]) {
        let out = out.as_mut_ptr().cast::<__m128i>();
        // SAFETY: F16C is here; the array holds two registers of eight halves.
        unsafe {
            _mm_storeu_si128(out, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
            _mm_storeu_si128(out.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
        }
    }

    #[inline(always)]
    fn store(self, v: Pair, out: &mut [f32; LANES]) {
        // SAFETY: AVX2 is here; the array holds two registers.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v.1);
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_add_ps, a, b)
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_sub_ps, a, b)
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_mul_ps, a, b)
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_div_ps, a, b)
    }

    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, c: Pair) -> Pair {
        both!(_mm256_fmadd_ps, a, b, c)
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_max_ps, a, b)
    }

    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_min_ps, a, b)
    }

    #[inline(always)]
    fn if_less(self, a: Pair, b: Pair, yes: Pair, no: Pair) -> Pair {
        // SAFETY: `Avx2` exists only where AVX2 does.
        unsafe {
            let less =
                Pair(_mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0), _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1));
            let low = _mm256_blendv_ps(no.0, yes.0, less.0);
            Pair(low, _mm256_blendv_ps(no.1, yes.1, less.1))
        }
    }

    #[inline(always)]
    fn exponent(self, v: Pair) -> Pair {
        // SAFETY: `Avx2` exists only where AVX2 does.
        unsafe {
            let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(v.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(v.1));
            let low = _mm256_castsi256_ps(_mm256_add_epi32(low, one));
            Pair(low, _mm256_castsi256_ps(_mm256_add_epi32(high, one)))
        }
    }

    #[inline(always)]
    fn splat_ints(self, x: i32) -> IntPair {
        // SAFETY: `Avx2` exists only where AVX2 does.
        unsafe { IntPair(_mm256_set1_epi32(x), _mm256_set1_epi32(x)) }
    }

    #[inline(always)]
    fn load_unsigned(self, x: &[[u8; 4]; LANES]) -> QuadPair {
        let x = x.as_ptr().cast::<__m256i>();
        // SAFETY: AVX2 is here; the array holds two registers.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1)));
            let first = _mm256_set1_epi16(255);
            let even = IntPair(_mm256_and_si256(low, first), _mm256_and_si256(high, first));
            let odd = IntPair(_mm256_srli_epi16::<8>(low), _mm256_srli_epi16::<8>(high));
            QuadPair { even, odd }
        }
    }

    #[inline(always)]
    fn load_signed(self, x: &[[i8; 4]; LANES]) -> QuadPair {
        let x = x.as_ptr().cast::<__m256i>();
        // SAFETY: AVX2 is here; the array holds two registers.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1)));
            let even = IntPair(_mm256_slli_epi16::<8>(low), _mm256_slli_epi16::<8>(high));
            let even = IntPair(_mm256_srai_epi16::<8>(even.0), _mm256_srai_epi16::<8>(even.1));
            let odd = IntPair(_mm256_srai_epi16::<8>(low), _mm256_srai_epi16::<8>(high));
            QuadPair { even, odd }
        }
    }

    #[inline(always)]
    fn store_quads(self, v: Pair, out: &mut [[[i16; 2]; 2]; LANES / 4]) {
        // SAFETY: AVX2 is here; the array is one register.
        unsafe {
            let ordered = halves(v);
            let half = _mm256_shufflelo_epi16::<0b11_01_10_00>(ordered);
            let both = _mm256_shufflehi_epi16::<0b11_01_10_00>(half);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), both);
        }
    }

    #[inline(always)]
    fn dot_unsigned(self, a: QuadPair, b: &[[i16; 2]; 2], sums: IntPair) -> IntPair {
        self.dot_signed(a, b, sums)
    }

    #[inline(always)]
    fn dot_signed(self, a: QuadPair, b: &[[i16; 2]; 2], sums: IntPair) -> IntPair {
        let mut sums = sums;
        // SAFETY: `Avx2` exists only where AVX2 does.
        unsafe {
            for (a, b) in [(a.even, &b[0]), (a.odd, &b[1])] {
                let b = _mm256_set1_epi32(bytemuck::cast(*b));
                sums.0 = _mm256_add_epi32(sums.0, _mm256_madd_epi16(a.0, b));
                sums.1 = _mm256_add_epi32(sums.1, _mm256_madd_epi16(a.1, b));
            }
        }
        sums
    }

    #[inline(always)]
    fn load_pairs(self, x: &[[i16; 2]; LANES]) -> IntPair {
        let x = x.as_ptr().cast::<__m256i>();
        // SAFETY: AVX2 is here; the array holds two registers.
        unsafe { IntPair(_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1))) }
    }

    #[inline(always)]
    fn store_pairs(self, v: Pair, out: &mut [[i16; 2]; LANES / 2]) {
        // SAFETY: AVX2 is here; the array is one register.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), halves(v)) }
    }

    #[inline(always)]
    fn dot_pairs(self, a: IntPair, b: &[i16; 2], sums: IntPair) -> IntPair {
        // SAFETY: `Avx2` exists only where AVX2 does.
        unsafe {
            let b = _mm256_set1_epi32(bytemuck::cast(*b));
            let low = _mm256_add_epi32(sums.0, _mm256_madd_epi16(a.0, b));
            IntPair(low, _mm256_add_epi32(sums.1, _mm256_madd_epi16(a.1, b)))
        }
    }

    #[inline(always)]
    fn to_floats(self, v: IntPair) -> Pair {
        // SAFETY: `Avx2` exists only where AVX2 does.
        unsafe { Pair(_mm256_cvtepi32_ps(v.0), _mm256_cvtepi32_ps(v.1)) }
    }

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // Into the second cache: what is asked for is more than half of a first one of 32 KiB.
        // SAFETY: SSE is here; a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
}

/// The nearest integers, in order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(v: Pair) -> __m256i {
    let (low, high) = (_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high))
}
