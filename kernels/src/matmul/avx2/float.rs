//! Float weights: register tiles of up to 6 rows and 16 columns, weights widened on load.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::{FLOAT_CHUNK, Job, ROWS_MAX};
use super::{Sums, halves, store, zero};

pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
pub(super) const BF16: u8 = 2;

/// Rows of a register tile: 12 of 16 registers hold sums.
const ROWS: usize = 6;

/// One tile of float weights of kind `W`.
///
/// # Safety
/// As [`super::run`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn floats<const W: u8>(job: &Job, tile: usize, rows: Range<usize>) {
    let tile_start = job.w.tile(tile).as_ptr();
    let mut acc = [const { MaybeUninit::uninit() }; ROWS_MAX];
    zero(&mut acc[..rows.len()]);
    let k = job.acts.k;
    for from in (0..k).step_by(FLOAT_CHUNK) {
        let chunk = from..k.min(from + FLOAT_CHUNK);
        for first in (0..rows.len()).step_by(ROWS) {
            let count = ROWS.min(rows.len() - first);
            // SAFETY: the rows and the chunk lie within x, the chunk within the tile, and `acc` is
            // initialised for the rows.
            unsafe {
                let x = job.acts.x.as_ptr().add((rows.start + first) * k);
                let acc = &mut acc[first..first + count];
                match count {
                    1 => part::<W, 1>(tile_start, x, k, chunk.clone(), acc),
                    2 => part::<W, 2>(tile_start, x, k, chunk.clone(), acc),
                    3 => part::<W, 3>(tile_start, x, k, chunk.clone(), acc),
                    4 => part::<W, 4>(tile_start, x, k, chunk.clone(), acc),
                    5 => part::<W, 5>(tile_start, x, k, chunk.clone(), acc),
                    _ => part::<W, ROWS>(tile_start, x, k, chunk.clone(), acc),
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
/// Tile and rows have these elements; `acc` has `R` initialised rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn part<const W: u8, const R: usize>(
    tile: *const u8,
    x: *const f32,
    k: usize,
    chunk: Range<usize>,
    acc: &mut [MaybeUninit<Sums>],
) {
    let mut part = [[_mm256_setzero_ps(); 2]; R];
    for i in chunk {
        // SAFETY: the caller's promise.
        unsafe {
            let mut w = [_mm256_setzero_ps(); 2];
            for (half, w) in w.iter_mut().enumerate() {
                *w = match W {
                    F32 => _mm256_loadu_ps(tile.add(64 * i + 32 * half).cast()),
                    F16 => halves(tile.add(32 * i + 16 * half)),
                    _ => {
                        let bits = _mm_loadu_si128(tile.add(32 * i + 16 * half).cast());
                        let wide = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits));
                        _mm256_castsi256_ps(wide)
                    }
                };
            }
            for (r, part) in part.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*x.add(r * k + i));
                for half in 0..2 {
                    part[half] = _mm256_fmadd_ps(x, w[half], part[half]);
                }
            }
        }
    }
    for (acc, part) in acc.iter_mut().zip(&part) {
        // SAFETY: the caller's promise.
        let acc = unsafe { acc.assume_init_mut() };
        for half in 0..2 {
            acc[half] = _mm256_add_ps(acc[half], part[half]);
        }
    }
}
