//! Float weights: register tiles of up to 6 rows and 64 columns, weights widened on load, or of 12
//! and 32, weights multiplied two at a time as bf16; and the scales of quantised ones.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::{FLOAT_CHUNK, Job, ROWS_MAX};
use super::{halves, store, sums};
use crate::matmul::layout::{BRAIN, WIDE};

pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
/// By f32, of each pair the second first.
pub(super) const BF16: u8 = 2;
/// By `vdpbf16ps`.
pub(super) const PAIRS: u8 = 3;

/// Rows and tiles of columns of a register tile: 24 of 32 registers hold sums. Pairs are so quick
/// that weights had better pass once for eight rows.
const fn shape(w: u8) -> (usize, usize) {
    if w == PAIRS { (12, 2) } else { (6, 4) }
}

/// Float weights of kind `W`.
///
/// # Safety
/// As [`super::run`], and as [`super::pairs`] for [`PAIRS`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::matmul) unsafe fn floats<const W: u8>(
    job: &Job,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    let (mut tile, together) = (tiles.start, shape(W).1);
    while tile < tiles.end {
        let some = if tile + together <= tiles.end { together } else { 1 };
        // SAFETY: passed on from the caller.
        unsafe {
            match some {
                4 => float_tiles::<W, 4>(job, tile, rows.clone()),
                2 => float_tiles::<W, 2>(job, tile, rows.clone()),
                _ => float_tiles::<W, 1>(job, tile, rows.clone()),
            }
        }
        tile += some;
    }
}

/// # Safety
/// As [`floats`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_tiles<const W: u8, const C: usize>(job: &Job, tile: usize, rows: Range<usize>) {
    let tiles: [*const u8; C] = std::array::from_fn(|c| job.w.tile(tile + c).as_ptr());
    let mut acc = sums::<C, ROWS_MAX>(rows.len());
    // A unit of x has four bytes: a float, or a pair. A unit of weights meets `each` of them.
    let (floats, stride) = job.acts.floats();
    let (x, stride) = match W {
        PAIRS => (job.acts.pairs.as_ptr().cast::<i32>(), stride / 2),
        _ => (floats.as_ptr().cast::<i32>(), stride),
    };
    let (each, chunk_units) = (each(W), FLOAT_CHUNK / if W == PAIRS { 2 } else { 1 });
    for from in (0..stride).step_by(chunk_units) {
        let chunk = from / each..stride.min(from + chunk_units) / each;
        // The first rows of a chunk ask for the next one, of these tiles or of those behind them.
        let next = match chunk.end < stride / each {
            true => chunk.len() * line(W),
            false => C * job.w.tile(tile).len() - chunk.start * line(W),
        };
        for first in (0..rows.len()).step_by(shape(W).0) {
            let count = shape(W).0.min(rows.len() - first);
            // SAFETY: the rows and the chunk lie within x, the chunk within the tiles, and `acc` is
            // initialised for the rows.
            unsafe {
                let x = x.add((rows.start + first) * stride);
                let acc = &mut acc[first..first + count];
                let asks = first == 0 && rows.len() > 1;
                let (chunk, next) = (chunk.clone(), if asks { next } else { 0 });
                macro_rules! part {
                    ($($count:literal)*) => {
                        match count {
                            $($count => {
                                float_part::<W, C, $count>(&tiles, x, stride, chunk, next, acc);
                            })*
                            _ => unreachable!("more rows than a tile has; this is a bug"),
                        }
                    };
                }
                part!(1 2 3 4 5 6 7 8 9 10 11 12);
            }
        }
    }
    // SAFETY: `acc` is initialised for `rows`; the rest is passed on from the caller.
    unsafe { store(job, tile, rows, &acc) };
}

/// Units of x that one of weights of kind `w` meets.
const fn each(w: u8) -> usize {
    if w == BF16 { 2 } else { 1 }
}

/// Bytes of a unit of weights of sixteen columns.
const fn line(w: u8) -> usize {
    if w == F16 { 32 } else { 64 }
}

/// Adds the partial sums over the units of `chunk` of `R` rows, `stride` apart from `x` on. Asks
/// for the lines that are `next` bytes further on, if that is not 0.
///
/// # Safety
/// Tiles and rows have these elements; `acc` has `R` initialised rows. The processor has the
/// instruction for [`PAIRS`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_part<const W: u8, const C: usize, const R: usize>(
    tiles: &[*const u8; C],
    x: *const i32,
    stride: usize,
    chunk: Range<usize>,
    next: usize,
    acc: &mut [MaybeUninit<[__m512; C]>],
) {
    let mut part = [[_mm512_setzero_ps(); C]; R];
    for i in chunk {
        if next > 0 {
            for tile in tiles {
                _mm_prefetch::<_MM_HINT_T1>(tile.wrapping_add(line(W) * i + next).cast());
            }
        }
        for of in (0..each(W)).rev() {
            let mut w = [_mm512_setzero_ps(); C];
            for c in 0..C {
                // SAFETY: the caller's promise.
                w[c] = unsafe { unit::<W>(tiles[c], i, of) };
            }
            for (r, part) in part.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let x = unsafe { x.add(r * stride + each(W) * i + of).read_unaligned() };
                let x = _mm512_castsi512_ps(_mm512_set1_epi32(x));
                for c in 0..C {
                    part[c] = match W {
                        // SAFETY: the caller's promise.
                        PAIRS => unsafe { dot_brains(x, w[c], part[c]) },
                        _ => _mm512_fmadd_ps(x, w[c], part[c]),
                    };
                }
            }
        }
    }
    for (acc, part) in acc.iter_mut().zip(&part) {
        // SAFETY: the caller's promise.
        let acc = unsafe { acc.assume_init_mut() };
        for c in 0..C {
            acc[c] = _mm512_add_ps(acc[c], part[c]);
        }
    }
}

/// Unit `i` of sixteen columns: floats, number `of` of two, or both as they are.
///
/// # Safety
/// The tile has it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unit<const W: u8>(tile: *const u8, i: usize, of: usize) -> __m512 {
    if W == F16 {
        // SAFETY: the caller's promise.
        return unsafe { halves(tile.add(line(W) * i)) };
    }
    // SAFETY: as above.
    let bits = unsafe { _mm512_loadu_si512(tile.add(line(W) * i).cast()) };
    _mm512_castsi512_ps(match (W, of) {
        (BF16, 0) => _mm512_slli_epi32::<16>(bits),
        (BF16, _) => _mm512_and_si512(bits, _mm512_set1_epi32(-0x1_0000)),
        _ => bits,
    })
}

/// `vdpbf16ps`: adds the products of two bf16 in every lane, that of the second first.
///
/// # Safety
/// The processor has the instruction (AVX512_BF16).
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn dot_brains(a: __m512, b: __m512, mut sums: __m512) -> __m512 {
    // SAFETY: the caller's promise; only the sums change.
    unsafe {
        asm!(
            "vdpbf16ps {sums}, {a}, {b}",
            sums = inout(zmm_reg) sums,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// The scales of a step.
///
/// # Safety
/// `head` points to the head of a record that has such a step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn scale<const D: u8>(head: *const u8, step: usize) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match D {
            WIDE => _mm512_loadu_ps(head.cast()),
            BRAIN => {
                let bits = _mm256_loadu_si256(head.add(32 * step).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
            }
            _ => halves(head.add(32 * step)),
        }
    }
}
