//! Sums over a step: R rows times H halves of a tile, side by side.
//!
//! `vpmaddubsw` adds two products of an unsigned and a signed byte in 16 bits, and saturates. Codes
//! of six bits or fewer stay below that, even summed over several groups:
//!
//! ```text
//! bits   largest pair          groups summed in 16 bits
//! 2, 3    7 * 127 * 2          8
//! 4      15 * 127 * 2 =  3810  8
//! 5      31 * 127 * 2 =  7874  4
//! 6      63 * 127 * 2 = 16002  2
//! 8     128 * 127 * 2 = 32512  1, as |w| * (q with the sign of w): the offset is gone already
//! 4, looked up in a book: those of its levels, 5 (MXFP4) or 8 bits (IQ4)
//! ```
//! Few rows do that with eight bits too. Many have them widened to 16 bits on both sides
//! (`vpmaddwd`): a sum less for every product. Four codes of x are brought to all columns once for
//! both halves: two halves of up to four rows are as many sums as there are registers for. Blocks
//! of 32 with fewer bits go by halves in any case, since theirs are scaled after every step.

#![allow(clippy::needless_range_loop)] // rows and halves are numbers

use std::arch::x86_64::*;

use super::super::layout::{STEP, book};
use super::SIGNED;
use super::codes::unpack;
use super::prepare::{BIAS_STEP, WIDE_STEP, widen};

/// The codes of a step for H times 8 columns, and their scales.
pub(super) struct Step<const H: usize> {
    /// As bytes, by group. With an offset of 128 and both halves in 16 bits: the first and third
    /// code of each group, then the second and fourth.
    codes: [[__m256i; H]; 16],
    /// Each twice in 16 bits, of either half of the step.
    pub(super) scales: [[__m256i; H]; 2],
}

impl<const H: usize> Step<H> {
    /// Unpacks a step, from half `first` of its columns on.
    ///
    /// # Safety
    /// The processor has AVX2; `step` points to a step of this shape.
    #[inline(always)]
    pub(super) unsafe fn new<const LO: usize, const HI: usize, const OFFSET: i32>(
        step: *const u8,
        first: usize,
        scales: [[__m256i; H]; 2],
    ) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let mut codes = [[_mm256_setzero_si256(); H]; 16];
            for half in 0..H {
                let bytes = unpack::<LO, HI, OFFSET>(step.add(32 * (first + half)));
                for (g, bytes) in bytes.into_iter().enumerate() {
                    if OFFSET == SIGNED && H == 2 {
                        [codes[g][half], codes[g + 8][half]] = widen(bytes);
                    } else {
                        codes[g][half] = bytes;
                    }
                }
            }
            Self { codes, scales }
        }
    }
}

/// Where the codes of some rows lie.
#[derive(Clone, Copy)]
pub(super) struct Input {
    /// The 32 codes of the first row; 16 pairs of them in 16 bits where [`Step`] has them so.
    q: *const i8,
    /// Bytes from one row to the next.
    stride: usize,
    /// Biases of the first row, where sums begin with them.
    bias: *const i8,
}

impl Input {
    /// Codes of 8 bits, without biases.
    pub(super) fn new(q: *const i8, stride: usize) -> Input {
        Input { q, stride, bias: std::ptr::null() }
    }

    /// Moved on by some rows.
    pub(super) fn skip(self, rows: usize) -> Input {
        let q = self.q.wrapping_add(rows * self.stride);
        Input { q, bias: self.bias.wrapping_add(rows * BIAS_STEP), ..self }
    }

    /// The same rows with 16 bits a code.
    pub(super) fn wide(self, q: *const i8) -> Input {
        Input { q, stride: WIDE_STEP, ..self }
    }

    /// The same rows with biases.
    pub(super) fn biased(self, bias: *const i8) -> Input {
        Input { bias, ..self }
    }

    /// Four bytes of a row, in all columns.
    ///
    /// # Safety
    /// The processor has AVX2; the row has these bytes.
    #[inline(always)]
    unsafe fn four(self, row: usize, index: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe {
            let four = self.q.add(row * self.stride).cast::<i32>().add(index);
            _mm256_set1_epi32(four.read_unaligned())
        }
    }
}

/// The sums over a step, times its scales (those of 16 bits per code are without).
///
/// # Safety
/// The processor has AVX2; `x` has R rows.
#[inline(always)]
pub(super) unsafe fn dots<
    const LO: usize,
    const HI: usize,
    const OFFSET: i32,
    const SUB: usize,
    const R: usize,
    const H: usize,
>(
    step: &Step<H>,
    x: Input,
) -> [[__m256i; H]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut dots = [[_mm256_setzero_si256(); H]; R];
        if OFFSET == SIGNED && H == 2 {
            for (i, w) in step.codes.iter().enumerate() {
                for r in 0..R {
                    let two = x.four(r, i);
                    for h in 0..H {
                        let products = _mm256_madd_epi16(w[h], two);
                        dots[r][h] = _mm256_add_epi32(dots[r][h], products);
                    }
                }
            }
            return dots;
        }
        let biased = H == 2 && is_biased(OFFSET, SUB);
        let run = if biased { SUB / 4 } else { groups_in_16_bits(LO, HI, OFFSET).min(SUB / 4) };
        for first in (0..STEP / 4).step_by(run) {
            let mut short = [[_mm256_setzero_si256(); H]; R];
            if biased {
                for r in 0..R {
                    let bias = x.bias.add(r * BIAS_STEP).cast::<i32>().add(first * 4 / SUB);
                    short[r] = [_mm256_set1_epi32(bias.read_unaligned()); H];
                }
            }
            for g in first..first + run {
                for r in 0..R {
                    let four = x.four(r, g);
                    for h in 0..H {
                        let products = products::<OFFSET>(step.codes[g][h], four);
                        short[r][h] = _mm256_add_epi16(short[r][h], products);
                    }
                }
            }
            for r in 0..R {
                for h in 0..H {
                    let scaled = _mm256_madd_epi16(short[r][h], step.scales[first * 4 / SUB][h]);
                    dots[r][h] = _mm256_add_epi32(dots[r][h], scaled);
                }
            }
        }
        dots
    }
}

/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn products<const OFFSET: i32>(w: __m256i, q: __m256i) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        match OFFSET {
            SIGNED => _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w)),
            _ => _mm256_maddubs_epi16(w, q),
        }
    }
}

/// Whether many rows begin the sums of a scale with what the offset takes away. These are sums of
/// four groups, at most 8 * 32 * 127 = 32512 once they are complete, so what overflows before comes
/// back.
pub(super) const fn is_biased(offset: i32, sub: usize) -> bool {
    sub == 16 && offset != 0 && offset <= 32
}

const fn groups_in_16_bits(lo: usize, hi: usize, offset: i32) -> usize {
    let bits = match book(lo, offset) {
        Some(_) if offset == SIGNED => 8,
        Some(_) => 5, // levels up to 24
        None => lo + hi,
    };
    [8, 8, 8, 8, 8, 4, 2, 1, 1][bits]
}
