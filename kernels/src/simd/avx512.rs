//! Sixteen lanes as one register.

use super::{Kernel, Simd};
use crate::LANES;
use half::{bf16, f16};
use std::arch::{asm, x86_64::*};

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512(()))
}

/// Proof that the processor has AVX-512 F, BW, DQ, VL and VNNI: [`run`] makes the only one.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// One intrinsic without memory operands.
macro_rules! pure {
    ($call:expr) => {
        // SAFETY: `Avx512` exists only where AVX-512 F, BW, DQ, VL and VNNI do.
        unsafe { $call }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    type Ints = __m512i;
    type Quads = __m512i;
    type Quad = [u8; 4];
    type Pairs = __m512i;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        pure!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: AVX-512 is here; the array is one register.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> __m512 {
        // SAFETY: AVX-512 is here; the array is one register of sixteen halves.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> __m512 {
        // SAFETY: AVX-512 is here; the array is one register of sixteen halves.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn load_firsts(self, x: &[[bf16; 2]; LANES]) -> __m512 {
        // SAFETY: AVX-512 is here; the array is one register.
        unsafe {
            let pairs = _mm512_loadu_si512(x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))
        }
    }

    #[inline(always)]
    fn load_seconds(self, x: &[[bf16; 2]; LANES]) -> __m512 {
        // SAFETY: AVX-512 is here; the array is one register.
        unsafe {
            let pairs = _mm512_loadu_si512(x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000)))
        }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; LANES]) {
        // SAFETY: AVX-512 is here; the array is one register.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn store_f16(self, v: __m512, out: &mut [f16; LANES]) {
        // SAFETY: AVX-512 is here; the array is one register of sixteen halves.
        unsafe {
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), halves);
        }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        pure!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn if_less(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        pure!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes))
    }

    #[inline(always)]
    fn exponent(self, v: __m512) -> __m512 {
        pure!({
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(v));
            let one = _mm512_castps_si512(_mm512_set1_ps(1.0));
            _mm512_castsi512_ps(_mm512_add_epi32(shifted, one))
        })
    }

    #[inline(always)]
    fn splat_ints(self, x: i32) -> __m512i {
        pure!(_mm512_set1_epi32(x))
    }

    #[inline(always)]
    fn load_unsigned(self, x: &[[u8; 4]; LANES]) -> __m512i {
        // SAFETY: AVX-512 is here; the array is one register.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_signed(self, x: &[[i8; 4]; LANES]) -> __m512i {
        // SAFETY: AVX-512 is here; the array is one register.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_quads(self, v: __m512, out: &mut [[u8; 4]; LANES / 4]) {
        // SAFETY: AVX-512 is here; the array is a register of sixteen bytes.
        unsafe {
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn dot_unsigned(self, a: __m512i, b: &[u8; 4], sums: __m512i) -> __m512i {
        pure!(_mm512_dpbusd_epi32(sums, a, _mm512_set1_epi32(bytemuck::cast(*b))))
    }

    #[inline(always)]
    fn dot_signed(self, a: __m512i, b: &[u8; 4], sums: __m512i) -> __m512i {
        pure!(_mm512_dpbusd_epi32(sums, _mm512_set1_epi32(bytemuck::cast(*b)), a))
    }

    #[inline(always)]
    fn load_pairs(self, x: &[[i16; 2]; LANES]) -> __m512i {
        // SAFETY: AVX-512 is here; the array is one register.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_pairs(self, v: __m512, out: &mut [[i16; 2]; LANES / 2]) {
        // SAFETY: AVX-512 is here; the array is a register of sixteen i16.
        unsafe {
            let halves = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), halves);
        }
    }

    #[inline(always)]
    fn dot_pairs(self, a: __m512i, b: &[i16; 2], sums: __m512i) -> __m512i {
        pure!(dot_pairs(a, _mm512_set1_epi32(bytemuck::cast(*b)), sums))
    }

    #[inline(always)]
    fn to_floats(self, v: __m512i) -> __m512 {
        pure!(_mm512_cvtepi32_ps(v))
    }

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // Into the second cache, which waits for more lines at once than the first.
        // SAFETY: SSE is here; a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
}

/// `vpdpwssd`, written out: the compiler knows that it is a product and a sum, and makes two
/// instructions of it.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_pairs(a: __m512i, b: __m512i, mut sums: __m512i) -> __m512i {
    // SAFETY: the processor has the instruction; only the sums change.
    unsafe {
        asm!(
            "vpdpwssd {sums}, {a}, {b}",
            sums = inout(zmm_reg) sums,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
