//! What the bytes of a record mean, as registers of 8 columns.

use std::arch::x86_64::*;

use super::super::Activations;
use super::super::layout::{BRAIN, WIDE, book};
use super::dots::{FOURS, is_signed};

/// The scales of a step as [`Step`](super::dots::Step) wants them, each twice in 16 bits or once in
/// 32: one for every column, or two for the halves of the step.
///
/// # Safety
/// `pair` points to the 16 scale bytes of 8 columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn step_scales<const WITH: u8, const OFFSET: i32, const SUB: usize>(
    pair: *const u8,
    step: usize,
) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    let pairs = unsafe { scale_pairs::<OFFSET, SUB>(pair) };
    let spread = |at: i32| {
        if WITH == FOURS {
            let high = if at == 0 { _mm256_slli_epi32::<16>(pairs) } else { pairs };
            return _mm256_srai_epi32::<16>(high);
        }
        let (low, high) = (at | (at + 1) << 8, (at + 4) | (at + 5) << 8);
        let (low, high) = (low | low << 16, high | high << 16);
        let order = _mm256_add_epi8(
            _mm256_setr_epi32(low, high, low, high, low, high, low, high),
            _mm256_setr_epi64x(0, 0x0808_0808_0808_0808, 0, 0x0808_0808_0808_0808),
        );
        _mm256_shuffle_epi8(pairs, order)
    };
    if SUB == 32 {
        let scale = if step % 2 == 1 { spread(2) } else { spread(0) };
        [scale, scale]
    } else {
        [spread(0), spread(2)]
    }
}

/// 8 pairs of scales as i16.
///
/// # Safety
/// `pair` points to 16 scale bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale_pairs<const OFFSET: i32, const SUB: usize>(pair: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    let bytes = unsafe { _mm_loadu_si128(pair.cast()) };
    match (SUB, OFFSET) {
        (16, 0) => _mm256_cvtepu8_epi16(_mm_and_si128(bytes, _mm_set1_epi8(15))),
        _ => _mm256_cvtepi8_epi16(bytes),
    }
}

/// What the sums of x are multiplied by: 8 pairs of minima, or of scales under an offset.
///
/// # Safety
/// `scales` points to the scale bytes of a record, moved on to a half; there is such a pair.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn min_pairs<const OFFSET: i32, const SUB: usize>(
    scales: *const u8,
    pair: usize,
) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        if OFFSET != 0 {
            return scale_pairs::<OFFSET, SUB>(scales.add(32 * pair));
        }
        let at = if SUB == 32 { 128 } else { 0 };
        let bytes = _mm_loadu_si128(scales.add(at + 32 * pair).cast());
        if SUB == 32 {
            return _mm256_cvtepu8_epi16(bytes);
        }
        _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15)))
    }
}

/// The groups of a step of 8 columns as bytes: codes, or levels where the offset is that of a book;
/// made signed where [`is_signed`].
///
/// # Safety
/// `step` points to a step of this shape, moved on to a half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn unpack<const WITH: u8, const LO: usize, const HI: usize, const OFFSET: i32>(
    step: *const u8,
) -> [__m256i; 8] {
    // SAFETY: the caller's promise; there are LO + HI planes.
    let plane = |i: usize| unsafe { _mm256_loadu_si256(step.add(64 * i).cast()) };
    let low_mask = _mm256_set1_epi8((0xff_u32 >> (8 - LO)) as i8);
    let mut w = [_mm256_setzero_si256(); 8];
    for (g, w) in w.iter_mut().enumerate() {
        *w = plane(g % LO);
        if LO < 8 {
            *w = _mm256_and_si256(shifted(*w, -((g / LO * LO) as i32)), low_mask);
        }
        if HI > 0 {
            let high = shifted(plane(LO + g % HI), LO as i32 - (g / HI * HI) as i32);
            let mask = _mm256_set1_epi8((((1 << HI) - 1) << LO) as i8);
            *w = _mm256_or_si256(_mm256_and_si256(high, mask), *w);
        }
        if let Some(book) = book(LO, OFFSET) {
            // SAFETY: a book has sixteen bytes.
            let book = unsafe { _mm_loadu_si128(book.as_ptr().cast()) };
            *w = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(book), *w);
        }
        if is_signed(WITH, OFFSET) {
            *w = _mm256_xor_si256(*w, _mm256_set1_epi8(-128));
        }
    }
    w
}

/// Shifts 16-bit lanes left (right when negative) by a number known after inlining.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shifted(v: __m256i, by: i32) -> __m256i {
    match by {
        4 => _mm256_slli_epi16::<4>(v),
        3 => _mm256_slli_epi16::<3>(v),
        2 => _mm256_slli_epi16::<2>(v),
        1 => _mm256_slli_epi16::<1>(v),
        0 => v,
        -1 => _mm256_srli_epi16::<1>(v),
        -2 => _mm256_srli_epi16::<2>(v),
        -3 => _mm256_srli_epi16::<3>(v),
        -4 => _mm256_srli_epi16::<4>(v),
        -5 => _mm256_srli_epi16::<5>(v),
        _ => _mm256_srli_epi16::<6>(v),
    }
}

/// d and m of 8 columns of a block of 32.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    d: __m256,
    m: __m256,
}

impl Scales {
    /// # Safety
    /// `record` points to a record that has such a step.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn of<const OFFSET: i32, const D: u8>(
        record: *const u8,
        step: usize,
        half: usize,
    ) -> Scales {
        // SAFETY: the caller's promise.
        unsafe {
            let d = scale::<D>(record, step, half);
            let m = if OFFSET == 0 { halves(record.add(32 + 16 * half)) } else { d };
            Scales { d, m }
        }
    }

    /// Adds a block of a row to its float sums; `at` is its place in the activations.
    ///
    /// # Safety
    /// The activations have this place.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn add_block<const WITH: u8, const OFFSET: i32>(
        &self,
        acts: &Activations,
        at: usize,
        dot: __m256i,
        acc: &mut __m256,
    ) {
        // SAFETY: the caller's promise.
        let (s, sum) = unsafe { (*acts.scales.as_ptr().add(at), *acts.sums.as_ptr().add(at)) };
        let s = _mm256_set1_ps(s);
        let shift = if is_signed(WITH, OFFSET) { 0 } else { OFFSET * sum };
        let dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot, _mm256_set1_epi32(shift)));
        *acc = _mm256_fmadd_ps(_mm256_mul_ps(self.d, s), dot, *acc);
        if OFFSET == 0 {
            *acc = _mm256_fmadd_ps(_mm256_mul_ps(self.m, s), _mm256_set1_ps(sum as f32), *acc);
        }
    }
}

/// The scales of 8 columns in a step.
///
/// # Safety
/// `head` points to the head of a record that has such a step.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale<const D: u8>(head: *const u8, step: usize, half: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        match D {
            WIDE => _mm256_loadu_ps(head.add(32 * half).cast()),
            BRAIN => {
                let bits = _mm_loadu_si128(head.add(32 * step + 16 * half).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
            }
            _ => halves(head.add(32 * step + 16 * half)),
        }
    }
}

/// 8 half floats, widened.
///
/// # Safety
/// `p` points to 16 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn halves(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
}
