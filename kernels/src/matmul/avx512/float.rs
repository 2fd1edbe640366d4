//! Float weights: register tiles of up to 6 rows and 64 columns, weights widened on load; and the
//! scales of quantised ones.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::{FLOAT_CHUNK, Job, ROWS_MAX};
use super::{halves, store, sums};
use crate::matmul::layout::{BRAIN, WIDE};

pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
pub(super) const BF16: u8 = 2;

/// Rows of a register tile: 24 of 32 registers hold sums.
const ROWS: usize = 6;

/// Float weights of kind `W`: register tiles of up to 6 rows and 4 tiles of columns.
///
/// # Safety
/// As [`super::run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::matmul) unsafe fn floats<const W: u8>(
    job: &Job,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    let mut tile = tiles.start;
    // SAFETY: passed on from the caller.
    unsafe {
        while tile + 4 <= tiles.end {
            float_tiles::<W, 4>(job, tile, rows.clone());
            tile += 4;
        }
        while tile < tiles.end {
            float_tiles::<W, 1>(job, tile, rows.clone());
            tile += 1;
        }
    }
}

/// # Safety
/// As [`super::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_tiles<const W: u8, const C: usize>(job: &Job, tile: usize, rows: Range<usize>) {
    let tiles: [*const u8; C] = std::array::from_fn(|c| job.w.tile(tile + c).as_ptr());
    let mut acc = sums::<C, ROWS_MAX>(rows.len());
    let k = job.acts.k;
    for from in (0..k).step_by(FLOAT_CHUNK) {
        let chunk = from..k.min(from + FLOAT_CHUNK);
        for first in (0..rows.len()).step_by(ROWS) {
            let count = ROWS.min(rows.len() - first);
            // SAFETY: the rows and the chunk lie within x, the chunk within the tiles, and `acc` is
            // initialised for the rows.
            unsafe {
                let x = job.acts.x.as_ptr().add((rows.start + first) * k);
                let acc = &mut acc[first..first + count];
                match count {
                    1 => float_part::<W, C, 1>(&tiles, x, k, chunk.clone(), acc),
                    2 => float_part::<W, C, 2>(&tiles, x, k, chunk.clone(), acc),
                    3 => float_part::<W, C, 3>(&tiles, x, k, chunk.clone(), acc),
                    4 => float_part::<W, C, 4>(&tiles, x, k, chunk.clone(), acc),
                    5 => float_part::<W, C, 5>(&tiles, x, k, chunk.clone(), acc),
                    _ => float_part::<W, C, ROWS>(&tiles, x, k, chunk.clone(), acc),
                }
            }
        }
    }
    // SAFETY: `acc` is initialised for `rows`; the rest is passed on from the caller.
    unsafe { store(job, tile, rows, &acc) };
}

/// Adds the partial sums over `chunk` of `R` rows, `k` apart from `x` on.
///
/// # Safety
/// Tiles and rows have these elements; `acc` has `R` initialised rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_part<const W: u8, const C: usize, const R: usize>(
    tiles: &[*const u8; C],
    x: *const f32,
    k: usize,
    chunk: Range<usize>,
    acc: &mut [MaybeUninit<[__m512; C]>],
) {
    let mut part = [[_mm512_setzero_ps(); C]; R];
    for i in chunk {
        // SAFETY: the caller's promise.
        unsafe {
            let mut w = [_mm512_setzero_ps(); C];
            for c in 0..C {
                w[c] = match W {
                    F32 => _mm512_loadu_ps(tiles[c].add(64 * i).cast()),
                    F16 => halves(tiles[c].add(32 * i)),
                    _ => {
                        let bits = _mm256_loadu_si256(tiles[c].add(32 * i).cast());
                        let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits));
                        _mm512_castsi512_ps(wide)
                    }
                };
            }
            for (r, part) in part.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*x.add(r * k + i));
                for c in 0..C {
                    part[c] = _mm512_fmadd_ps(x, w[c], part[c]);
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
