//! Packed codes as bytes in registers.

use std::arch::x86_64::*;

use crate::matmul::layout::book;

/// The groups of a step as bytes: codes, or levels where the offset is that of a book.
///
/// # Safety
/// `step` points to a step of this shape.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn unpack<const LO: usize, const HI: usize, const OFFSET: i32>(
    step: *const u8,
) -> [__m512i; 8] {
    // SAFETY: the caller's promise; there are LO + HI planes.
    let plane = |i: usize| unsafe { _mm512_loadu_si512(step.add(64 * i).cast()) };
    let low_mask = _mm512_set1_epi8((0xff_u32 >> (8 - LO)) as i8);
    let mut w = [_mm512_setzero_si512(); 8];
    for (g, w) in w.iter_mut().enumerate() {
        *w = plane(g % LO);
        if LO < 8 {
            *w = _mm512_and_si512(shifted(*w, -((g / LO * LO) as i32)), low_mask);
        }
        if HI > 0 {
            let high = shifted(plane(LO + g % HI), LO as i32 - (g / HI * HI) as i32);
            let mask = _mm512_set1_epi8((((1 << HI) - 1) << LO) as i8);
            *w = _mm512_ternarylogic_epi32::<{ (0xf0 & 0xcc) | 0xaa }>(high, mask, *w);
        }
        if let Some(book) = book(LO, OFFSET) {
            // SAFETY: a book has sixteen bytes.
            let book = unsafe { _mm_loadu_si128(book.as_ptr().cast()) };
            *w = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(book), *w);
        }
    }
    w
}

/// Shifts 16-bit lanes left (right when negative) by a number known after inlining.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn shifted(v: __m512i, by: i32) -> __m512i {
    match by {
        4 => _mm512_slli_epi16::<4>(v),
        3 => _mm512_slli_epi16::<3>(v),
        2 => _mm512_slli_epi16::<2>(v),
        1 => _mm512_slli_epi16::<1>(v),
        0 => v,
        -1 => _mm512_srli_epi16::<1>(v),
        -2 => _mm512_srli_epi16::<2>(v),
        -3 => _mm512_srli_epi16::<3>(v),
        -4 => _mm512_srli_epi16::<4>(v),
        -5 => _mm512_srli_epi16::<5>(v),
        _ => _mm512_srli_epi16::<6>(v),
    }
}
