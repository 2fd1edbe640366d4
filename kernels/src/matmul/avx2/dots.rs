//! Sums over a step: R rows times H halves of a tile, side by side.
//!
//! ```text
//! PAIRS   vpmaddubsw, vpaddw   two products of an unsigned and a signed byte, summed in 16 bits
//! FOURS   vpdpbusd             four of them, added to a sum of 32 bits (AVX-VNNI)
//! ```
//! `vpmaddubsw` adds two products in 16 bits, and saturates. Codes of six bits or fewer stay below
//! that, even summed over several groups:
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
//!
//! `vpdpbusd` does not saturate, and a step of 32 products stays below 32 * 255 * 127, so every
//! format takes it as it lies: no signs, no widening, no biases, and offsets go with the sums of x
//! afterwards, as with AVX-512. Counted, not measured: instructions for 256 products in 16 columns
//! of one row of a tile of four, without what all rows share (unpacking) and the end of a block of
//! 256:
//!
//! ```text
//!         PAIRS  FOURS
//! Q4_K    384    288
//! Q6_K    448    336
//! Q4_0    544    360    a float sum every step
//! Q8_0    760    360    a float sum every step; from 17 rows on
//! ```

#![allow(clippy::needless_range_loop)] // rows and halves are numbers

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::layout::{STEP, book};
use super::SIGNED;
use super::codes::unpack;
use super::prepare::{BIAS_STEP, WIDE_STEP, widen};

pub(in crate::matmul) const PAIRS: u8 = 0;
pub(in crate::matmul) const FOURS: u8 = 1;

/// The codes of a step for H times 8 columns, and their scales.
pub(super) struct Step<const H: usize> {
    /// As bytes, by group. Signed ones and both halves, in 16 bits: the first and third code of
    /// each group, then the second and fourth.
    codes: [[__m256i; H]; 16],
    /// Of either half of the step: each twice in 16 bits for PAIRS, once in 32 for FOURS.
    pub(super) scales: [[__m256i; H]; 2],
}

impl<const H: usize> Step<H> {
    /// Unpacks a step, from half `first` of its columns on.
    ///
    /// # Safety
    /// The processor has AVX2; `step` points to a step of this shape.
    #[inline(always)]
    pub(super) unsafe fn new<
        const WITH: u8,
        const LO: usize,
        const HI: usize,
        const OFFSET: i32,
    >(
        step: *const u8,
        first: usize,
        scales: [[__m256i; H]; 2],
    ) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let mut codes = [[_mm256_setzero_si256(); H]; 16];
            for half in 0..H {
                let bytes = unpack::<WITH, LO, HI, OFFSET>(step.add(32 * (first + half)));
                for (g, bytes) in bytes.into_iter().enumerate() {
                    if is_signed(WITH, OFFSET) && H == 2 {
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

    /// The same rows with what `prepare` has made of them for PAIRS, `at` steps of rows further on.
    pub(super) fn prepared<const WITH: u8, const OFFSET: i32, const SUB: usize>(
        self,
        made: *const i8,
        at: usize,
    ) -> Input {
        match OFFSET {
            _ if WITH != PAIRS => self,
            SIGNED => Input { q: made.wrapping_add(at * WIDE_STEP), stride: WIDE_STEP, ..self },
            _ if is_biased(OFFSET, SUB) => {
                Input { bias: made.wrapping_add(at * BIAS_STEP), ..self }
            }
            _ => self,
        }
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
/// The processor has AVX2 and the products `WITH`; `x` has R rows.
#[inline(always)]
pub(super) unsafe fn dots<
    const WITH: u8,
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
        if WITH == FOURS {
            return dots_of_fours::<SUB, R, H>(step, x);
        }
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

/// [`dots`] with FOURS.
///
/// # Safety
/// The processor has AVX-VNNI; `x` has R rows.
#[inline(always)]
unsafe fn dots_of_fours<const SUB: usize, const R: usize, const H: usize>(
    step: &Step<H>,
    x: Input,
) -> [[__m256i; H]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut dots = [[_mm256_setzero_si256(); H]; R];
        for first in (0..STEP / 4).step_by(SUB / 4) {
            let mut sums = [[_mm256_setzero_si256(); H]; R];
            // Written one after the other: a loop of them would remain a loop.
            macro_rules! add {
                ($($group:literal)*) => {
                    $(add_group(&mut sums, step, x, first + $group);)*
                };
            }
            add!(0 1 2 3);
            if SUB == STEP {
                add!(4 5 6 7);
            }
            for r in 0..R {
                for h in 0..H {
                    let scaled = _mm256_mullo_epi32(sums[r][h], step.scales[first * 4 / SUB][h]);
                    dots[r][h] = _mm256_add_epi32(dots[r][h], scaled);
                }
            }
        }
        dots
    }
}

/// Adds one group of each row and half.
///
/// # Safety
/// As [`dots_of_fours`]; there is such a group.
#[inline(always)]
unsafe fn add_group<const R: usize, const H: usize>(
    sums: &mut [[__m256i; H]; R],
    step: &Step<H>,
    x: Input,
    group: usize,
) {
    for r in 0..R {
        // SAFETY: the caller's promise.
        unsafe {
            let four = x.four(r, group);
            for h in 0..H {
                sums[r][h] = add_fours(sums[r][h], step.codes[group][h], four);
            }
        }
    }
}

/// Adds to every lane four products of an unsigned byte of `w` and a signed one of `q`.
///
/// Written out, since an intrinsic comes into a function only where the function has its feature:
/// so the functions of AVX2 serve both kinds of products.
///
/// # Safety
/// The processor has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_fours(sum: __m256i, w: __m256i, q: __m256i) -> __m256i {
    let mut sum = sum;
    // SAFETY: the caller's promise; only `sum` changes.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sum}, {w}, {q}",
            sum = inout(ymm_reg) sum,
            w = in(ymm_reg) w,
            q = in(ymm_reg) q,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Adds to every lane two products of signed numbers of 16 bits.
///
/// # Safety
/// The processor has the products `WITH`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn add_pairs<const WITH: u8>(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
    if WITH == PAIRS {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    }
    let mut sum = sum;
    // SAFETY: the caller's promise; only `sum` changes.
    unsafe {
        asm!(
            "{{vex}} vpdpwssd {sum}, {a}, {b}",
            sum = inout(ymm_reg) sum,
            a = in(ymm_reg) a,
            b = in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Scales that change nothing.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn ones<const WITH: u8>() -> __m256i {
    if WITH == FOURS { _mm256_set1_epi32(1) } else { _mm256_set1_epi16(1) }
}

/// Whether codes are made signed bytes, so that their offset is gone.
pub(super) const fn is_signed(with: u8, offset: i32) -> bool {
    with == PAIRS && offset == SIGNED
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
