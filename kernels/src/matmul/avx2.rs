//! AVX2: a tile is two registers of 8 columns; both go through a step before the next one. With
//! AVX-VNNI the same, but for the products of bytes (`dots.rs` has both) and what they want to be
//! given: codes stay unsigned, and x needs no preparation.

#![allow(clippy::needless_range_loop)] // rows and halves are numbers

mod codes;
mod dots;
mod prepare;

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::layout::{BRAIN, COLUMNS, HALF, HEAD, Record, STEP, Storage, WIDE, scale_bytes};
use super::{Job, ROWS_MAX, activations::SUB_SUMS};
use crate::quant::Scale::F32;
use codes::{Scales, halves, min_pairs, step_scales};
pub(super) use dots::{FOURS, PAIRS};
use dots::{Input, Step, add_pairs, dots, is_biased, is_signed, ones};
use prepare::prepare;

/// The offset that is gone when a byte of a code is made a signed one.
const SIGNED: i32 = 128;

/// Distances of prefetches, in bytes. A single row, bound by memory, asks for lines in the second
/// cache, which waits for more of them at once than the first (the time of six bits is 10 to 18 %
/// less); many rows, which are slower than memory here, want them in the first (4 to 8 %).
const FAR: usize = 6144;
const NEAR: usize = 4096;

/// Rows for which codes of eight bits are not widened (by PAIRS), and for which others are not
/// unpacked into memory first.
const FEW: usize = 16;
const FEWER: usize = 3;

/// Float sums of the 16 columns of a row.
type Sums = [__m256; 2];

/// Computes the columns of `tiles` for `rows` (at most [`ROWS_MAX`]), with the products `WITH`.
///
/// # Safety
/// The processor has the features and these products; `tiles` and `rows` lie within the job, and
/// nobody else touches these columns of these rows of y. The weights are quantised.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<const WITH: u8>(job: &Job, tiles: Range<usize>, rows: Range<usize>) {
    thread_local! {
        static PREPARED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    }
    debug_assert!(rows.len() <= ROWS_MAX);
    let few = match &job.w.storage {
        Storage::Blocks(r) | Storage::Supers(r) if is_signed(WITH, r.codes.offset) => FEW,
        _ => FEWER,
    };
    PREPARED.with_borrow_mut(|prepared| {
        // SAFETY: passed on from the caller.
        unsafe {
            if WITH == PAIRS && rows.len() > few {
                prepare(job, rows.clone(), prepared);
            }
            for tile in tiles {
                match rows.len() {
                    1 => run_tile::<WITH, 1>(job, tile, rows.clone(), prepared),
                    n if n <= few => run_tile::<WITH, FEW>(job, tile, rows.clone(), prepared),
                    _ => run_tile::<WITH, ROWS_MAX>(job, tile, rows.clone(), prepared),
                }
            }
        }
    });
}

/// One tile for one row, for at most [`FEW`], or for at most [`ROWS_MAX`]. The sums of a single row
/// stay in registers: in memory every step would wait for the one before it. `prepared` is what
/// [`prepare`] has made of many rows, for PAIRS.
///
/// # Safety
/// As [`run`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_tile<const WITH: u8, const ROWS: usize>(
    job: &Job,
    tile: usize,
    rows: Range<usize>,
    prepared: &[u64],
) {
    let x = prepared.as_ptr().cast();
    // SAFETY: passed on from the caller; the constants are those of the record.
    unsafe {
        match &job.w.storage {
            Storage::Blocks(r) => match (r.codes.lo, r.codes.hi, r.codes.offset, r.codes.scale) {
                (8, 0, 128, F32) => blocks::<8, 0, 128, WIDE, WITH, ROWS>(job, r, tile, rows, x),
                (8, 0, 128, _) => blocks::<8, 0, 128, HALF, WITH, ROWS>(job, r, tile, rows, x),
                (4, 0, 128, _) => blocks::<4, 0, 128, HALF, WITH, ROWS>(job, r, tile, rows, x),
                (4, 0, 12, _) => blocks::<4, 0, 12, BRAIN, WITH, ROWS>(job, r, tile, rows, x),
                (4, 0, 8, _) => blocks::<4, 0, 8, HALF, WITH, ROWS>(job, r, tile, rows, x),
                (4, 0, 0, _) => blocks::<4, 0, 0, HALF, WITH, ROWS>(job, r, tile, rows, x),
                (4, 1, 16, _) => blocks::<4, 1, 16, HALF, WITH, ROWS>(job, r, tile, rows, x),
                (4, 1, 0, _) => blocks::<4, 1, 0, HALF, WITH, ROWS>(job, r, tile, rows, x),
                _ => super::scalar::run(job, tile..tile + 1, rows),
            },
            Storage::Supers(r) => match (r.codes.lo, r.codes.hi, r.codes.offset, r.codes.sub) {
                (4, 0, 128, 32) => supers::<4, 0, 128, 32, WITH, ROWS>(job, r, tile, rows, x),
                (4, 0, 0, 32) => supers::<4, 0, 0, 32, WITH, ROWS>(job, r, tile, rows, x),
                (4, 1, 0, 32) => supers::<4, 1, 0, 32, WITH, ROWS>(job, r, tile, rows, x),
                (4, 2, 32, 16) => supers::<4, 2, 32, 16, WITH, ROWS>(job, r, tile, rows, x),
                (2, 1, 4, 16) => supers::<2, 1, 4, 16, WITH, ROWS>(job, r, tile, rows, x),
                (2, 0, 0, 16) => supers::<2, 0, 0, 16, WITH, ROWS>(job, r, tile, rows, x),
                _ => super::scalar::run(job, tile..tile + 1, rows),
            },
            _ => super::scalar::run(job, tile..tile + 1, rows),
        }
    }
}

/// Calls `add!(first, rows)` for groups of two to four of at least two rows: none is left alone.
macro_rules! by_rows {
    ($count:expr, $add:ident) => {{
        let mut r = 0;
        while r < $count {
            r += match $count - r {
                2 => $add!(r, 2),
                3 | 5 => $add!(r, 3),
                _ => $add!(r, 4),
            };
        }
    }};
}

/// Blocks of 32; `OFFSET` 0 means that there is a minimum.
///
/// # Safety
/// As [`run_tile`]; `prepared` points to its `prepared`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blocks<
    const LO: usize,
    const HI: usize,
    const OFFSET: i32,
    const D: u8,
    const WITH: u8,
    const ROWS: usize,
>(
    job: &Job,
    record: &Record,
    tile: usize,
    rows: Range<usize>,
    prepared: *const i8,
) {
    let count = if ROWS == 1 { 1 } else { rows.len() };
    let acts = job.acts;
    let tile_start = job.w.tile(tile).as_ptr();
    let mut acc = [const { MaybeUninit::uninit() }; ROWS];
    zero(&mut acc[..count]);
    let steps = if OFFSET == 0 || D == WIDE { 1 } else { 2 };
    debug_assert_eq!((steps, 64 * (LO + HI)), (record.steps, record.step_bytes));
    let record_bytes = HEAD + steps * 64 * (LO + HI);
    let ones = ones::<WITH>();
    for block in 0..acts.k / STEP {
        let step = block % steps;
        let at = block * acts.m + rows.start;
        let q = acts.codes.as_ptr().wrapping_add(at * STEP);
        let x = Input::new(q, STEP);
        let acc = &mut acc[..count];
        // SAFETY: block, step and rows lie within the tile and the activations; `acc` is
        // initialised.
        unsafe {
            let record = tile_start.add(block / steps * record_bytes);
            prefetch::<ROWS>(record, step, steps, record_bytes);
            let codes = record.add(HEAD + step * 64 * (LO + HI));
            let scales = |half| Scales::of::<OFFSET, D>(record, step, half);
            if ROWS < ROWS_MAX || WITH == PAIRS && OFFSET != SIGNED {
                for half in 0..2 {
                    let w = Step::<1>::new::<WITH, LO, HI, OFFSET>(codes, half, [[ones]; 2]);
                    let scales = scales(half);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let [[dot]] = dots::<WITH, LO, HI, OFFSET, STEP, 1, 1>(&w, x.skip(r));
                        let acc = &mut acc.assume_init_mut()[half];
                        scales.add_block::<WITH, OFFSET>(acts, at + r, dot, acc);
                    }
                }
                continue;
            }
            let w = Step::<2>::new::<WITH, LO, HI, OFFSET>(codes, 0, [[ones; 2]; 2]);
            let scales = [scales(0), scales(1)];
            let x = x.prepared::<WITH, OFFSET, STEP>(prepared, block * count);
            macro_rules! add {
                ($r:expr, $rows:literal) => {{
                    let dots = dots::<WITH, LO, HI, OFFSET, STEP, $rows, 2>(&w, x.skip($r));
                    for (i, dots) in dots.into_iter().enumerate() {
                        let (acc, at) = (acc[$r + i].assume_init_mut(), at + $r + i);
                        for half in 0..2 {
                            let (dot, acc) = (dots[half], &mut acc[half]);
                            scales[half].add_block::<WITH, OFFSET>(acts, at, dot, acc);
                        }
                    }
                    $rows
                }};
            }
            by_rows!(count, add);
        }
    }
    // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
    unsafe { store(job, tile, rows, &acc) };
}

/// Blocks of 256 with `SUB` weights per scale; `OFFSET` 0 means that there is a minimum.
///
/// # Safety
/// As [`run_tile`]; `prepared` points to its `prepared`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn supers<
    const LO: usize,
    const HI: usize,
    const OFFSET: i32,
    const SUB: usize,
    const WITH: u8,
    const ROWS: usize,
>(
    job: &Job,
    record: &Record,
    tile: usize,
    rows: Range<usize>,
    prepared: *const i8,
) {
    let count = if ROWS == 1 { 1 } else { rows.len() };
    debug_assert_eq!((64 * (LO + HI), SUB), (record.step_bytes, record.codes.sub));
    let tile_start = job.w.tile(tile).as_ptr();
    let mut acc = [const { MaybeUninit::uninit() }; ROWS];
    zero(&mut acc[..count]);
    let mut isum = [const { MaybeUninit::<[__m256i; 2]>::uninit() }; ROWS];
    let scale_bytes = scale_bytes(SUB, OFFSET == 0);
    let record_bytes = HEAD + scale_bytes + 8 * 64 * (LO + HI);
    for block in 0..job.acts.k / 256 {
        let at = block * job.acts.m + rows.start;
        // SAFETY: block and rows lie within the tile and the activations; `acc` is initialised,
        // and `isum` by the first step.
        unsafe {
            let record = tile_start.add(block * record_bytes);
            let (scales, codes) = (record.add(HEAD), record.add(HEAD + scale_bytes));
            for step in 0..8 {
                prefetch::<ROWS>(record, step, 8, record_bytes);
                let codes = codes.add(step * 64 * (LO + HI));
                let x = Input::new(job.acts.codes.as_ptr().add(at * 256 + step * STEP), 256);
                let pair = scales.add(32 * (step * 16 / SUB));
                let scale = |half| step_scales::<WITH, OFFSET, SUB>(pair.add(16 * half), step);
                if ROWS < ROWS_MAX {
                    for half in 0..2 {
                        let scales = scale(half).map(|s| [s]);
                        let w = Step::<1>::new::<WITH, LO, HI, OFFSET>(codes, half, scales);
                        for (r, isum) in isum[..count].iter_mut().enumerate() {
                            let [[dot]] = dots::<WITH, LO, HI, OFFSET, SUB, 1, 1>(&w, x.skip(r));
                            add_step(isum, half, step == 0, dot);
                        }
                    }
                    continue;
                }
                let scale = paired(scale(0), scale(1));
                let w = Step::<2>::new::<WITH, LO, HI, OFFSET>(codes, 0, scale);
                let steps = (8 * block + step) * count;
                let x = x.prepared::<WITH, OFFSET, SUB>(prepared, steps);
                macro_rules! add {
                    ($r:expr, $rows:literal) => {{
                        let dots = dots::<WITH, LO, HI, OFFSET, SUB, $rows, 2>(&w, x.skip($r));
                        let isum = &mut isum[$r..$r + $rows];
                        add_steps::<WITH, OFFSET, $rows>(isum, &scale[0], step == 0, dots);
                        $rows
                    }};
                }
                by_rows!(count, add);
            }
            let biased = WITH == PAIRS && ROWS == ROWS_MAX && is_biased(OFFSET, SUB);
            let (done, isum) = (is_signed(WITH, OFFSET) || biased, &isum[..count]);
            add_super::<WITH, OFFSET, SUB>(job, scales, at, done, isum, &mut acc[..count]);
        }
    }
    // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
    unsafe { store(job, tile, rows, &acc) };
}

/// First and second scales of two halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn paired(one: [__m256i; 2], other: [__m256i; 2]) -> [[__m256i; 2]; 2] {
    [[one[0], other[0]], [one[1], other[1]]]
}

/// Adds a step to the integer sums of a half of a row: the first one begins them.
///
/// # Safety
/// `isum` is initialised, but for the first step.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_step(isum: &mut MaybeUninit<[__m256i; 2]>, half: usize, first: bool, dot: __m256i) {
    // SAFETY: the caller's promise; `half` is 0 or 1.
    unsafe {
        let isum = isum.as_mut_ptr().cast::<__m256i>().add(half);
        isum.write(if first { dot } else { _mm256_add_epi32(isum.read(), dot) });
    }
}

/// Adds a step of some rows; codes in 16 bits are scaled here.
///
/// # Safety
/// As [`add_step`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_steps<const WITH: u8, const OFFSET: i32, const ROWS: usize>(
    isum: &mut [MaybeUninit<[__m256i; 2]>],
    scale: &[__m256i; 2],
    first: bool,
    dots: [[__m256i; 2]; ROWS],
) {
    for (isum, dots) in isum.iter_mut().zip(dots) {
        for half in 0..2 {
            let mut dot = dots[half];
            if is_signed(WITH, OFFSET) {
                dot = _mm256_mullo_epi32(dot, _mm256_srai_epi32::<16>(scale[half]));
            }
            // SAFETY: the caller's promise.
            unsafe { add_step(isum, half, first, dot) };
        }
    }
}

/// Ends a block: subtracts minima, or offsets that are not gone (`done`), and adds it to the float
/// sums.
///
/// # Safety
/// The processor has the products `WITH`; `scales` are the scale bytes of the record, `at` is the
/// index of the block in the activations for the first row; `isum` and `acc` are initialised.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_super<const WITH: u8, const OFFSET: i32, const SUB: usize>(
    job: &Job,
    scales: *const u8,
    at: usize,
    done: bool,
    isum: &[MaybeUninit<[__m256i; 2]>],
    acc: &mut [MaybeUninit<Sums>],
) {
    let acts = job.acts;
    let pairs = if done { 0 } else { 128 / SUB };
    let mut mins = [[_mm256_setzero_si256(); 2]; 8];
    // SAFETY: the caller's promise.
    unsafe {
        for (pair, mins) in mins[..pairs].iter_mut().enumerate() {
            *mins = [0, 16].map(|at| min_pairs::<OFFSET, SUB>(scales.add(at), pair));
        }
        let head = scales.sub(HEAD);
        let (d, dmin) = ([0, 16].map(|at| halves(head.add(at))), head.add(32));
        let dmin = [0, 16].map(|at| halves(dmin.add(at)));
        let first_sum = if SUB == 32 { 16 } else { 0 };
        for (r, (isum, acc)) in isum.iter().zip(acc).enumerate() {
            let (isum, acc) = (isum.assume_init_ref(), acc.assume_init_mut());
            let s = _mm256_set1_ps(*acts.scales.as_ptr().add(at + r));
            let sums = acts.sub_sums.as_ptr().add((at + r) * SUB_SUMS + first_sum).cast::<i32>();
            let mut msum = [_mm256_setzero_si256(); 2];
            for (pair, mins) in mins[..pairs].iter().enumerate() {
                let two = _mm256_set1_epi32(sums.add(pair).read_unaligned());
                for half in 0..2 {
                    msum[half] = add_pairs::<WITH>(msum[half], mins[half], two);
                }
            }
            for half in 0..2 {
                let mut sum = isum[half];
                if OFFSET != 0 && !done {
                    let shift = _mm256_mullo_epi32(msum[half], _mm256_set1_epi32(OFFSET));
                    sum = _mm256_sub_epi32(sum, shift);
                }
                let sum = _mm256_cvtepi32_ps(sum);
                acc[half] = _mm256_fmadd_ps(_mm256_mul_ps(d[half], s), sum, acc[half]);
                if OFFSET == 0 {
                    let msum = _mm256_cvtepi32_ps(msum[half]);
                    acc[half] = _mm256_fnmadd_ps(_mm256_mul_ps(dmin[half], s), msum, acc[half]);
                }
            }
        }
    }
}

/// Asks for part `step` of the bytes that lie some way after a record, in order and evenly spread
/// over its steps. A tile is followed by the next tile.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch<const ROWS: usize>(record: *const u8, step: usize, steps: usize, record_bytes: usize) {
    let lines = record_bytes / 64;
    for line in step * lines / steps..(step + 1) * lines / steps {
        let line = record.wrapping_add(64 * line);
        match ROWS {
            1 => _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(FAR).cast()),
            _ => _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(NEAR).cast()),
        }
    }
}

/// Zeroes float sums, where they lie: returned by value they would be copied, all 64 rows of them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn zero(sums: &mut [MaybeUninit<Sums>]) {
    for sum in sums {
        sum.write([_mm256_setzero_ps(); 2]);
    }
}

/// Writes the sums to y, without the columns beyond `n`.
///
/// # Safety
/// `acc` is initialised for `rows`; else as [`run`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store(job: &Job, tile: usize, rows: Range<usize>, acc: &[MaybeUninit<Sums>]) {
    let first = tile * COLUMNS;
    let columns = COLUMNS.min(job.w.n() - first);
    for (row, acc) in rows.zip(acc) {
        // SAFETY: the caller's promise; these columns are within row `row` of y, and ours.
        unsafe {
            let acc = acc.assume_init_ref();
            let y = job.y.at(row * job.w.n() + first);
            if columns == COLUMNS {
                _mm256_storeu_ps(y, acc[0]);
                _mm256_storeu_ps(y.add(8), acc[1]);
                continue;
            }
            let mut values = [0.0_f32; COLUMNS];
            _mm256_storeu_ps(values.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), acc[1]);
            std::ptr::copy_nonoverlapping(values.as_ptr(), y, columns);
        }
    }
}
