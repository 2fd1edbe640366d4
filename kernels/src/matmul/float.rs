//! Float weights: register tiles of up to 6 rows and 16 columns, weights widened on load. AVX-512
//! has wider ones of its own.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::{bf16, f16};

use super::layout::{COLUMNS, Storage};
use super::{FLOAT_CHUNK, Job, ROWS_MAX};
use crate::simd::{self, Kernel, Simd};
use crate::{Isa, LANES};

/// Rows of a register tile: their sums are 12 of the 16 registers of AVX2, 24 of the 32 of NEON.
const ROWS: usize = 6;

/// Distance of prefetches, in bytes.
const AHEAD: usize = 4096;

/// Computes the columns of `tiles` for `rows` (at most [`ROWS_MAX`]).
///
/// # Safety
/// `tiles` and `rows` lie within the job, and nobody else touches these columns of these rows of y.
///
/// # Panics
/// When the weights are not floats.
pub(super) unsafe fn run(isa: Isa, job: &Job, tiles: Range<usize>, rows: Range<usize>) {
    debug_assert!(rows.len() <= ROWS_MAX);
    for tile in tiles {
        let rows = rows.clone();
        match &job.w.storage {
            Storage::F32 => simd::run(isa, Tile::<f32> { job, tile, rows, of: PhantomData }),
            Storage::F16 => simd::run(isa, Tile::<f16> { job, tile, rows, of: PhantomData }),
            Storage::BF16 => simd::run(isa, Tile::<[bf16; 2]> { job, tile, rows, of: PhantomData }),
            Storage::Blocks(_) | Storage::Supers(_) => unreachable!("codes; this is a bug"),
        }
    }
}

/// What a column is stored as: a number, or two of them.
trait Unit: Copy {
    /// Numbers in one.
    const LEN: usize;
    /// Number `part` of sixteen.
    fn load<S: Simd>(simd: S, w: &[Self; LANES], part: usize) -> S::V;
}

impl Unit for f32 {
    const LEN: usize = 1;

    #[inline(always)]
    fn load<S: Simd>(simd: S, w: &[f32; LANES], _: usize) -> S::V {
        simd.load(w)
    }
}

impl Unit for f16 {
    const LEN: usize = 1;

    #[inline(always)]
    fn load<S: Simd>(simd: S, w: &[f16; LANES], _: usize) -> S::V {
        simd.load_f16(w)
    }
}

impl Unit for [bf16; 2] {
    const LEN: usize = 2;

    #[inline(always)]
    fn load<S: Simd>(simd: S, w: &[[bf16; 2]; LANES], part: usize) -> S::V {
        if part == 0 { simd.load_firsts(w) } else { simd.load_seconds(w) }
    }
}

/// One tile, stored as units of type `E`. Who makes one promises what [`run`] asks for.
struct Tile<'a, E> {
    job: &'a Job<'a>,
    tile: usize,
    rows: Range<usize>,
    of: PhantomData<E>,
}

impl<E: Unit> Kernel for Tile<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Tile { job, tile, rows, .. } = self;
        let w = job.w.tile(tile).as_ptr().cast::<[E; LANES]>();
        let mut acc = [const { MaybeUninit::uninit() }; ROWS_MAX];
        for acc in &mut acc[..rows.len()] {
            acc.write(simd.splat(0.0));
        }
        let (x, k) = job.acts.floats();
        for from in (0..k).step_by(FLOAT_CHUNK) {
            let chunk = from / E::LEN..k.min(from + FLOAT_CHUNK) / E::LEN;
            for first in (0..rows.len()).step_by(ROWS) {
                let count = ROWS.min(rows.len() - first);
                // SAFETY: the rows and the chunk lie within x, the chunk within the tile, and `acc`
                // is initialised for the rows.
                unsafe {
                    let x = x.as_ptr().add((rows.start + first) * k);
                    let acc = &mut acc[first..first + count];
                    match count {
                        1 => part::<S, E, 1>(simd, w, x, k, chunk.clone(), acc),
                        2 => part::<S, E, 2>(simd, w, x, k, chunk.clone(), acc),
                        3 => part::<S, E, 3>(simd, w, x, k, chunk.clone(), acc),
                        4 => part::<S, E, 4>(simd, w, x, k, chunk.clone(), acc),
                        5 => part::<S, E, 5>(simd, w, x, k, chunk.clone(), acc),
                        _ => part::<S, E, ROWS>(simd, w, x, k, chunk.clone(), acc),
                    }
                }
            }
        }
        let first = tile * COLUMNS;
        let columns = COLUMNS.min(job.w.n() - first);
        for (row, acc) in rows.zip(&acc) {
            // SAFETY: `acc` is initialised for `rows`; these columns are within row `row` of y, and
            // ours.
            unsafe {
                let y = std::slice::from_raw_parts_mut(job.y.at(row * job.w.n() + first), columns);
                simd.store_part(acc.assume_init_read(), y);
            }
        }
    }
}

/// Adds the partial sums over the units of `chunk` of `R` rows, `k` apart from `x` on; of each unit
/// the last number first.
///
/// # Safety
/// Tile and rows have these elements; `acc` has `R` initialised rows.
#[inline(always)]
unsafe fn part<S: Simd, E: Unit, const R: usize>(
    simd: S,
    w: *const [E; LANES],
    x: *const f32,
    k: usize,
    chunk: Range<usize>,
    acc: &mut [MaybeUninit<S::V>],
) {
    let mut part = [simd.splat(0.0); R];
    for i in chunk {
        if R == 1 {
            // A single row waits for nothing but its weights; a tile is followed by the next one.
            simd.prefetch(w.wrapping_add(i).cast::<u8>().wrapping_add(AHEAD));
        }
        for of in (0..E::LEN).rev() {
            // SAFETY: the caller's promise.
            let (w, x) = unsafe { (E::load(simd, &*w.add(i), of), x.add(E::LEN * i + of)) };
            for (r, part) in part.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let x = unsafe { *x.add(r * k) };
                *part = simd.mul_add(simd.splat(x), w, *part);
            }
        }
    }
    for (acc, part) in acc.iter_mut().zip(part) {
        // SAFETY: the caller's promise.
        let acc = unsafe { acc.assume_init_mut() };
        *acc = simd.add(*acc, part);
    }
}
