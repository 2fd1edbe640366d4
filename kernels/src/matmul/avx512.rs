//! AVX-512 with VNNI: a tile is one register of 16 columns, `vpdpbusd` takes four codes of each.
//!
//! ```text
//! for each tile, for each step (32 weights of 16 columns):  unpack to 8 registers
//!     for each row:  dot = 8 x vpdpbusd with four codes of x in every lane
//!                    scale it and add it to the row's sum, which lies in the first cache
//! ```
//! The weights stay in registers while the rows pass, so unpacking is paid once per 64 rows, and
//! any number of rows runs the same code; a single row keeps its sums in registers as well. One
//! tile at a time means one stream from memory, prefetched by hand: two were a fifth slower where
//! memory is the limit, and no faster elsewhere.

mod codes;
mod float;

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::layout::{BRAIN, COLUMNS, HALF, HEAD, Record, STEP, Storage, WIDE, scale_bytes};
use super::{Job, ROWS_MAX, activations::SUB_SUMS};
use crate::quant::Scale::F32;
use codes::unpack;
use float::{floats, scale};

/// Distance of prefetches, in bytes. They bring lines to the second cache, which waits for more of
/// them at once than the first. Eight rows take 54 to 82 % of the time that they take without. A
/// single row reads so steadily that the hardware does better alone (10 to 20 %), unless the codes
/// have two parts.
const AHEAD: usize = 6144;

/// Rows whose integer sums are in flight together: a chain of `vpdpbusd` has a latency of four or
/// five, and one or two start per cycle.
const ROWS_AT_ONCE: usize = 4;

/// Computes the columns of `tiles` for `rows` (at most [`ROWS_MAX`]).
///
/// # Safety
/// The processor has the features; `tiles` and `rows` lie within the job, and nobody else touches
/// these columns of these rows of y.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn run(job: &Job, tiles: Range<usize>, rows: Range<usize>) {
    debug_assert!(rows.len() <= ROWS_MAX);
    // SAFETY: passed on from the caller; the constants are those of the record.
    unsafe {
        match &job.w.storage {
            Storage::F32 => floats::<{ float::F32 }>(job, tiles, rows),
            Storage::F16 => floats::<{ float::F16 }>(job, tiles, rows),
            Storage::BF16 => floats::<{ float::BF16 }>(job, tiles, rows),
            Storage::Blocks(r) => match (r.codes.lo, r.codes.hi, r.codes.offset, r.codes.scale) {
                (8, 0, 128, F32) => each_tile(tiles, rows, Blocks::<8, 0, 128, WIDE>(job, r)),
                (8, 0, 128, _) => each_tile(tiles, rows, Blocks::<8, 0, 128, HALF>(job, r)),
                (4, 0, 128, _) => each_tile(tiles, rows, Blocks::<4, 0, 128, HALF>(job, r)),
                (4, 0, 12, _) => each_tile(tiles, rows, Blocks::<4, 0, 12, BRAIN>(job, r)),
                (4, 0, 8, _) => each_tile(tiles, rows, Blocks::<4, 0, 8, HALF>(job, r)),
                (4, 0, 0, _) => each_tile(tiles, rows, Blocks::<4, 0, 0, HALF>(job, r)),
                (4, 1, 16, _) => each_tile(tiles, rows, Blocks::<4, 1, 16, HALF>(job, r)),
                (4, 1, 0, _) => each_tile(tiles, rows, Blocks::<4, 1, 0, HALF>(job, r)),
                _ => super::scalar::run(job, tiles, rows),
            },
            Storage::Supers(r) => match (r.codes.lo, r.codes.hi, r.codes.offset, r.codes.sub) {
                (4, 0, 128, 32) => each_tile(tiles, rows, Supers::<4, 0, 128, 32>(job, r)),
                (4, 0, 0, 32) => each_tile(tiles, rows, Supers::<4, 0, 0, 32>(job, r)),
                (4, 1, 0, 32) => each_tile(tiles, rows, Supers::<4, 1, 0, 32>(job, r)),
                (4, 2, 32, 16) => each_tile(tiles, rows, Supers::<4, 2, 32, 16>(job, r)),
                (2, 1, 4, 16) => each_tile(tiles, rows, Supers::<2, 1, 4, 16>(job, r)),
                (2, 0, 0, 16) => each_tile(tiles, rows, Supers::<2, 0, 0, 16>(job, r)),
                _ => super::scalar::run(job, tiles, rows),
            },
        }
    }
}

/// [`run`], of bf16 and with the instruction that multiplies two of them.
///
/// # Safety
/// As [`run`], and the processor has AVX512_BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn pairs(job: &Job, tiles: Range<usize>, rows: Range<usize>) {
    debug_assert!(job.acts.in_pairs && matches!(job.w.storage, Storage::BF16));
    // SAFETY: passed on from the caller.
    unsafe { floats::<{ float::PAIRS }>(job, tiles, rows) };
}

/// A kernel for one tile; `R` is 1 for a single row, else [`ROWS_MAX`].
trait Kernel {
    /// # Safety
    /// As [`run`].
    unsafe fn call<const R: usize>(&self, tile: usize, rows: Range<usize>);
}

/// # Safety
/// As [`run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn each_tile(tiles: Range<usize>, rows: Range<usize>, kernel: impl Kernel) {
    for tile in tiles {
        // SAFETY: passed on from the caller.
        unsafe {
            match rows.len() {
                1 => kernel.call::<1>(tile, rows.clone()),
                _ => kernel.call::<ROWS_MAX>(tile, rows.clone()),
            }
        }
    }
}

/// Blocks of 32; `OFFSET` 0 means that there is a minimum.
struct Blocks<'a, const LO: usize, const HI: usize, const OFFSET: i32, const D: u8>(
    &'a Job<'a>,
    &'a Record,
);

impl<const LO: usize, const HI: usize, const OFFSET: i32, const D: u8> Kernel
    for Blocks<'_, LO, HI, OFFSET, D>
{
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn call<const R: usize>(&self, tile: usize, rows: Range<usize>) {
        let Blocks(job, record) = self;
        let count = if R == 1 { 1 } else { rows.len() };
        let together = if R == 1 { 0 } else { count / ROWS_AT_ONCE * ROWS_AT_ONCE };
        let tile_start = job.w.tile(tile).as_ptr();
        let mut acc = sums::<1, R>(count);
        // What the offset takes from the sums of a block, which begin with it.
        let mut begin = [0; R];
        let steps = if OFFSET == 0 || D == WIDE { 1 } else { 2 };
        debug_assert_eq!((steps, 64 * (LO + HI)), (record.steps, record.step_bytes));
        let record_bytes = HEAD + steps * 64 * (LO + HI);
        for block in 0..job.acts.k / STEP {
            let step = block % steps;
            let at = block * job.acts.m + rows.start;
            // SAFETY: block, step and rows lie within the tile and the activations; `acc` is
            // initialised up to `count`.
            unsafe {
                let record = tile_start.add(block / steps * record_bytes);
                let head = record;
                if R > 1 || HI > 0 {
                    prefetch(record, step, steps, record_bytes);
                }
                let d = scale::<D>(head, step);
                let m = if OFFSET == 0 { halves(head.add(32)) } else { _mm512_setzero_ps() };
                let w = unpack::<LO, HI, OFFSET>(record.add(HEAD + step * 64 * (LO + HI)));
                if OFFSET != 0 {
                    let sums = job.acts.sums.as_ptr().add(at);
                    for (r, begin) in begin[..count].iter_mut().enumerate() {
                        *begin = -OFFSET * *sums.add(r);
                    }
                }
                for r in (0..together).step_by(ROWS_AT_ONCE) {
                    let (begin, acc) = (&begin[r..], &mut acc[r..r + ROWS_AT_ONCE]);
                    self.add_block::<ROWS_AT_ONCE>(&w, d, m, begin, at + r, acc);
                }
                for r in together..count {
                    self.add_block::<1>(&w, d, m, &begin[r..], at + r, &mut acc[r..r + 1]);
                }
            }
        }
        // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
        unsafe { store(job, tile, rows, &acc) };
    }
}

impl<const LO: usize, const HI: usize, const OFFSET: i32, const D: u8>
    Blocks<'_, LO, HI, OFFSET, D>
{
    /// Adds a block of `R` rows to their sums.
    ///
    /// # Safety
    /// `at` is the index of the block in the activations for the first row, and `R - 1` more
    /// follow; `begin` has what their sums begin with, `acc` has `R` initialised elements.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add_block<const R: usize>(
        &self,
        w: &[__m512i; 8],
        d: __m512,
        m: __m512,
        begin: &[i32],
        at: usize,
        acc: &mut [MaybeUninit<[__m512; 1]>],
    ) {
        let acts = self.0.acts;
        let mut dots = [_mm512_setzero_si512(); R];
        for (dot, &begin) in dots.iter_mut().zip(&begin[..R]) {
            *dot = _mm512_set1_epi32(begin);
        }
        // SAFETY: the caller's promise.
        unsafe { add_dots(w, acts.codes.as_ptr().add(at * STEP), STEP, 0..8, &mut dots) };
        for (r, (acc, dot)) in acc.iter_mut().zip(dots).enumerate() {
            // SAFETY: the caller's promise.
            let (acc, s) = unsafe {
                let s = acts.scales.as_ptr().add(at + r);
                (&mut acc.assume_init_mut()[0], _mm512_set1_ps(*s))
            };
            let dot = _mm512_cvtepi32_ps(dot);
            *acc = _mm512_fmadd_ps(_mm512_mul_ps(d, s), dot, *acc);
            if OFFSET == 0 {
                // SAFETY: the caller's promise.
                let sum = _mm512_set1_epi32(unsafe { *acts.sums.as_ptr().add(at + r) });
                *acc = _mm512_fmadd_ps(_mm512_mul_ps(m, s), _mm512_cvtepi32_ps(sum), *acc);
            }
        }
    }
}

/// Blocks of 256 with `SUB` weights per scale; `OFFSET` 0 means that there is a minimum.
struct Supers<'a, const LO: usize, const HI: usize, const OFFSET: i32, const SUB: usize>(
    &'a Job<'a>,
    &'a Record,
);

impl<const LO: usize, const HI: usize, const OFFSET: i32, const SUB: usize> Kernel
    for Supers<'_, LO, HI, OFFSET, SUB>
{
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn call<const R: usize>(&self, tile: usize, rows: Range<usize>) {
        let Supers(job, record) = self;
        debug_assert_eq!((64 * (LO + HI), SUB), (record.step_bytes, record.codes.sub));
        let count = if R == 1 { 1 } else { rows.len() };
        let together = if R == 1 { 0 } else { count / ROWS_AT_ONCE * ROWS_AT_ONCE };
        let tile_start = job.w.tile(tile).as_ptr();
        let mut acc = sums::<1, R>(count);
        let mut isum = [const { MaybeUninit::<__m512i>::uninit() }; R];
        for isum in &mut isum[..count] {
            isum.write(_mm512_setzero_si512());
        }
        let scale_bytes = scale_bytes(SUB, OFFSET == 0);
        let record_bytes = HEAD + scale_bytes + 8 * 64 * (LO + HI);
        for block in 0..job.acts.k / 256 {
            let at = block * job.acts.m + rows.start;
            // SAFETY: block and rows lie within the tile and the activations; `isum` and `acc` are
            // initialised up to `count`.
            unsafe {
                let record = tile_start.add(block * record_bytes);
                let scales = record.add(HEAD);
                let codes = record.add(HEAD + scale_bytes);
                for step in 0..8 {
                    if R > 1 || HI > 0 {
                        prefetch(record, step, 8, record_bytes);
                    }
                    let w = unpack::<LO, HI, OFFSET>(codes.add(step * 64 * (LO + HI)));
                    let scale = Self::scales(scales, step);
                    let q = job.acts.codes.as_ptr().add(at * 256 + step * STEP);
                    for r in (0..together).step_by(ROWS_AT_ONCE) {
                        let isum = &mut isum[r..r + ROWS_AT_ONCE];
                        Self::add_step::<ROWS_AT_ONCE>(&w, scale, q.add(256 * r), isum);
                    }
                    for r in together..count {
                        Self::add_step::<1>(&w, scale, q.add(256 * r), &mut isum[r..r + 1]);
                    }
                }
                self.add_block(scales, at, &mut isum[..count], &mut acc[..count]);
            }
        }
        // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
        unsafe { store(job, tile, rows, &acc) };
    }
}

impl<const LO: usize, const HI: usize, const OFFSET: i32, const SUB: usize>
    Supers<'_, LO, HI, OFFSET, SUB>
{
    /// Adds a step of `R` rows to their integer sums.
    ///
    /// # Safety
    /// `q` points to 32 codes of each row, 256 apart; `isum` has `R` initialised elements.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add_step<const R: usize>(
        w: &[__m512i; 8],
        scale: [__m512i; 2],
        q: *const i8,
        isum: &mut [MaybeUninit<__m512i>],
    ) {
        for (half, &scale) in scale[..32 / SUB].iter().enumerate() {
            let groups = half * SUB / 4..(half + 1) * SUB / 4;
            let mut dots = [_mm512_setzero_si512(); R];
            // SAFETY: the caller's promise.
            unsafe { add_dots(w, q, 256, groups, &mut dots) };
            for (isum, dot) in isum.iter_mut().zip(dots) {
                // SAFETY: the caller's promise.
                let isum = unsafe { isum.assume_init_mut() };
                *isum = _mm512_add_epi32(*isum, _mm512_mullo_epi32(dot, scale));
            }
        }
    }

    /// The scales of a step as integers: one, or two for the halves of the step.
    ///
    /// # Safety
    /// `scales` points to the scale bytes of a record.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn scales(scales: *const u8, step: usize) -> [__m512i; 2] {
        // SAFETY: pair `step` (or `step / 2`) lies within the scale bytes.
        let pairs = unsafe { Self::scale_pairs(scales.add(32 * (step * 16 / SUB))) };
        let first = _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pairs));
        let second = _mm512_srai_epi32::<16>(pairs);
        if SUB == 32 && step % 2 == 1 { [second, second] } else { [first, second] }
    }

    /// 16 pairs of scales as i16.
    ///
    /// # Safety
    /// `pair` points to 32 scale bytes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn scale_pairs(pair: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        let bytes = unsafe { _mm256_loadu_si256(pair.cast()) };
        match (SUB, OFFSET) {
            (16, 0) => _mm512_cvtepu8_epi16(_mm256_and_si256(bytes, _mm256_set1_epi8(15))),
            _ => _mm512_cvtepi8_epi16(bytes),
        }
    }

    /// What the sums of x are multiplied by: 16 pairs of minima, or of what an offset takes away.
    ///
    /// # Safety
    /// `scales` points to the scale bytes of a record, and there is such a pair.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn min_pairs(scales: *const u8, pair: usize) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            if OFFSET != 0 {
                let pairs = Self::scale_pairs(scales.add(32 * pair));
                return _mm512_mullo_epi16(pairs, _mm512_set1_epi16(-OFFSET as i16));
            }
            let at = if SUB == 32 { 128 } else { 0 };
            let bytes = _mm256_loadu_si256(scales.add(at + 32 * pair).cast());
            if SUB == 32 {
                return _mm512_cvtepu8_epi16(bytes);
            }
            let high = _mm256_srli_epi16::<4>(bytes);
            _mm512_cvtepu8_epi16(_mm256_and_si256(high, _mm256_set1_epi8(15)))
        }
    }

    /// Ends a block: subtracts offsets or minima and adds the block to the float sums. The integer
    /// sums are zero again.
    ///
    /// # Safety
    /// `scales` are the scale bytes of the record, `at` is the index of the block in the
    /// activations for the first row; `isum` and `acc` are initialised.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add_block(
        &self,
        scales: *const u8,
        at: usize,
        isum: &mut [MaybeUninit<__m512i>],
        acc: &mut [MaybeUninit<[__m512; 1]>],
    ) {
        let acts = self.0.acts;
        let pairs = 128 / SUB;
        let mut mins = [_mm512_setzero_si512(); 8];
        // SAFETY: the caller's promise.
        unsafe {
            for (pair, mins) in mins[..pairs].iter_mut().enumerate() {
                *mins = Self::min_pairs(scales, pair);
            }
            let (d, dmin) = (halves(scales.sub(HEAD)), halves(scales.sub(HEAD - 32)));
            let first_sum = if SUB == 32 { 16 } else { 0 };
            for (r, (place, acc)) in isum.iter_mut().zip(acc).enumerate() {
                let (isum, acc) = (place.assume_init_read(), &mut acc.assume_init_mut()[0]);
                place.write(_mm512_setzero_si512());
                let s = _mm512_set1_ps(*acts.scales.as_ptr().add(at + r));
                let sums =
                    acts.sub_sums.as_ptr().add((at + r) * SUB_SUMS + first_sum).cast::<i32>();
                let mut msum = if OFFSET == 0 { _mm512_setzero_si512() } else { isum };
                for (pair, mins) in mins[..pairs].iter().enumerate() {
                    let two = _mm512_set1_epi32(sums.add(pair).read_unaligned());
                    msum = _mm512_dpwssd_epi32(msum, *mins, two);
                }
                let sum = _mm512_cvtepi32_ps(if OFFSET == 0 { isum } else { msum });
                *acc = _mm512_fmadd_ps(_mm512_mul_ps(d, s), sum, *acc);
                if OFFSET == 0 {
                    let msum = _mm512_cvtepi32_ps(msum);
                    *acc = _mm512_fnmadd_ps(_mm512_mul_ps(dmin, s), msum, *acc);
                }
            }
        }
    }
}

/// Adds to the sums of `R` rows, over some groups of a step: codes of W times the codes at `q`, the
/// rows `stride` apart.
///
/// # Safety
/// `q` points to 32 codes of each row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn add_dots<const R: usize>(
    w: &[__m512i; 8],
    q: *const i8,
    stride: usize,
    groups: Range<usize>,
    dots: &mut [__m512i; R],
) {
    for g in groups {
        for (r, dot) in dots.iter_mut().enumerate() {
            // SAFETY: four codes within the 32 of a row.
            let four = unsafe { q.add(r * stride).cast::<i32>().add(g).read_unaligned() };
            *dot = _mm512_dpbusd_epi32(*dot, w[g], _mm512_set1_epi32(four));
        }
    }
}

/// Asks for part `step` of the bytes that lie [`AHEAD`] after a record, in order and evenly spread
/// over its steps. A tile is followed by the next tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prefetch(record: *const u8, step: usize, steps: usize, record_bytes: usize) {
    let lines = record_bytes / 64;
    for line in step * lines / steps..(step + 1) * lines / steps {
        _mm_prefetch::<_MM_HINT_T1>(record.wrapping_add(AHEAD + 64 * line).cast());
    }
}

/// 16 half floats, widened.
///
/// # Safety
/// `p` points to 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn halves(p: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(p.cast()) })
}

/// Float sums of `count` rows, zero; the others are not touched.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn sums<const C: usize, const R: usize>(count: usize) -> [MaybeUninit<[__m512; C]>; R] {
    let mut sums = [const { MaybeUninit::uninit() }; R];
    for sum in &mut sums[..count] {
        sum.write([_mm512_setzero_ps(); C]);
    }
    sums
}

/// Writes the sums to y, without the columns beyond `n`.
///
/// # Safety
/// `acc` is initialised for `rows`; else as [`run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn store<const C: usize>(
    job: &Job,
    tile: usize,
    rows: Range<usize>,
    acc: &[MaybeUninit<[__m512; C]>],
) {
    for (row, acc) in rows.zip(acc) {
        // SAFETY: the caller's promise.
        let acc = unsafe { acc.assume_init_ref() };
        for (c, acc) in acc.iter().enumerate() {
            let first = (tile + c) * COLUMNS;
            let columns = COLUMNS.min(job.w.n() - first);
            let mask = (0xffff_u32 >> (COLUMNS - columns)) as __mmask16;
            // SAFETY: the masked columns are within row `row` of y, and ours.
            unsafe { _mm512_mask_storeu_ps(job.y.at(row * job.w.n() + first), mask, *acc) };
        }
    }
}
