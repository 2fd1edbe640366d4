//! What the kernels of many rows want of x beside its codes, once for all tiles of a task.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::Job;
use super::super::layout::{STEP, Storage};
use super::SIGNED;
use super::dots::is_biased;

/// Bytes of the 32 codes of a step in 16 bits.
pub(super) const WIDE_STEP: usize = 64;
/// Bytes of the biases of a step.
pub(super) const BIAS_STEP: usize = 8;

/// Prepares some rows:
///
/// ```text
/// offset 128            the codes in 16 bits, as Step has its own     (k / 32, rows, 8 numbers)
/// offset, scales of 16  the biases of both halves of each step        (k / 32, rows, 1 number)
/// ```
///
/// # Safety
/// The processor has AVX2; the rows are those of the job.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn prepare(job: &Job, rows: Range<usize>, out: &mut Vec<u64>) {
    let (Storage::Blocks(record) | Storage::Supers(record)) = &job.w.storage else { return };
    let (acts, offset, count) = (job.acts, record.codes.offset, rows.len());
    let numbers = match offset {
        SIGNED => WIDE_STEP / 8,
        _ if is_biased(offset, record.codes.sub) => BIAS_STEP / 8,
        _ => return,
    };
    let wanted = acts.k / STEP * count * numbers;
    if out.len() < wanted {
        out.resize(wanted, 0);
    }
    let per_block = if record.codes.sub == 0 { 1 } else { 256 / STEP };
    for (step, out) in out[..wanted].chunks_exact_mut(count * numbers).enumerate() {
        let first = step / per_block * acts.m * per_block + step % per_block;
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(numbers)) {
            // SAFETY: 32 codes of a row, and room for so many numbers.
            unsafe {
                let codes = acts.codes.as_ptr().add((first + row * per_block) * STEP);
                let bytes = _mm256_loadu_si256(codes.cast());
                if offset == SIGNED {
                    let [even, odd] = widen(bytes);
                    _mm256_storeu_si256(out.as_mut_ptr().cast(), even);
                    _mm256_storeu_si256(out.as_mut_ptr().add(4).cast(), odd);
                } else {
                    out[0] = biases(bytes, offset);
                }
            }
        }
    }
}

/// Signed bytes in 16 bits: the even ones, and the odd ones.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub(super) unsafe fn widen(bytes: __m256i) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(bytes));
        [even, _mm256_srai_epi16::<8>(bytes)]
    }
}

/// The biases of the halves of a step: minus the offset times the codes of x, the first and second
/// of each group in 16 bits, the third and fourth in 16 bits.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn biases(codes: __m256i, offset: i32) -> u64 {
    // SAFETY: the caller's promise.
    unsafe {
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
        let sums = _mm256_add_epi16(pairs, _mm256_shuffle_epi32::<0b01_00_11_10>(pairs));
        let sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32::<0b10_11_00_01>(sums));
        let biases = _mm256_mullo_epi16(sums, _mm256_set1_epi16(-offset as i16));
        let first = _mm_cvtsi128_si32(_mm256_castsi256_si128(biases)) as u32;
        let second = _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(biases)) as u32;
        u64::from(first) | u64::from(second) << 32
    }
}
