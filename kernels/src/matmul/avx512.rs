//! AVX-512 with VNNI: 16 columns per register, `vpdpbusd` for four codes of each.
//!
//! ```text
//! for each step (32 weights of 16 or 32 columns):  unpack to 8 registers per tile
//!     for each row:  dot = 8 x vpdpbusd with 4 codes of x in every lane
//!                    scale it and add it to the row's sum, which lies in the first cache
//! ```
//! The weights stay in registers while the rows pass, so unpacking is paid once per 64 rows, and
//! any number of rows runs the same code. A single row keeps its sums in registers as well.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::layout::{COLUMNS, Record, STEP, Storage, TAIL};
use super::{FLOAT_CHUNK, Job, ROWS_MAX, activations::SUB_SUMS};

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Rows of a register tile of floats.
const FLOAT_ROWS: usize = 6;

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
            Storage::F32 => floats::<F32>(job, tiles, rows),
            Storage::F16 => floats::<F16>(job, tiles, rows),
            Storage::BF16 => floats::<BF16>(job, tiles, rows),
            Storage::Blocks(record) => {
                match (record.codes.lo, record.codes.hi, record.codes.offset) {
                    (8, 0, 128) => each_pair(tiles, rows, Blocks::<8, 0, 128>(job, record)),
                    (4, 0, 8) => each_pair(tiles, rows, Blocks::<4, 0, 8>(job, record)),
                    (4, 0, 0) => each_pair(tiles, rows, Blocks::<4, 0, 0>(job, record)),
                    (4, 1, 16) => each_pair(tiles, rows, Blocks::<4, 1, 16>(job, record)),
                    (4, 1, 0) => each_pair(tiles, rows, Blocks::<4, 1, 0>(job, record)),
                    _ => super::scalar::run(job, tiles, rows),
                }
            }
            Storage::Supers(record) => {
                match (record.codes.lo, record.codes.hi, record.codes.offset) {
                    (4, 0, 0) => each_pair(tiles, rows, Supers::<4, 0, 0, 32>(job, record)),
                    (4, 1, 0) => each_pair(tiles, rows, Supers::<4, 1, 0, 32>(job, record)),
                    (4, 2, 32) => each_pair(tiles, rows, Supers::<4, 2, 32, 16>(job, record)),
                    (2, 1, 4) => each_pair(tiles, rows, Supers::<2, 1, 4, 16>(job, record)),
                    (2, 0, 0) => each_pair(tiles, rows, Supers::<2, 0, 0, 16>(job, record)),
                    _ => super::scalar::run(job, tiles, rows),
                }
            }
        }
    }
}

/// A kernel for `C` tiles from `tile` on and `rows`; `R` is 1 for a single row, else [`ROWS_MAX`].
trait Kernel {
    /// # Safety
    /// As [`run`].
    unsafe fn call<const C: usize, const R: usize>(&self, tile: usize, rows: Range<usize>);
}

/// # Safety
/// As [`run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn each_pair(tiles: Range<usize>, rows: Range<usize>, kernel: impl Kernel) {
    for tile in tiles.clone().step_by(2) {
        let rows = rows.clone();
        // SAFETY: passed on from the caller.
        unsafe {
            match (tiles.end - tile, rows.len()) {
                (1, 1) => kernel.call::<1, 1>(tile, rows),
                (1, _) => kernel.call::<1, ROWS_MAX>(tile, rows),
                (_, 1) => kernel.call::<2, 1>(tile, rows),
                (_, _) => kernel.call::<2, ROWS_MAX>(tile, rows),
            }
        }
    }
}

/// Blocks of 32; `OFFSET` 0 means that there is a minimum.
struct Blocks<'a, const LO: usize, const HI: usize, const OFFSET: i32>(&'a Job<'a>, &'a Record);

impl<const LO: usize, const HI: usize, const OFFSET: i32> Kernel for Blocks<'_, LO, HI, OFFSET> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn call<const C: usize, const R: usize>(&self, tile: usize, rows: Range<usize>) {
        let Blocks(job, record) = self;
        let count = if R == 1 { 1 } else { rows.len() };
        let tiles: [*const u8; C] = std::array::from_fn(|c| job.w.tile(tile + c).as_ptr());
        let mut acc = sums::<C, R>(count);
        let steps = if OFFSET == 0 { 1 } else { 2 };
        let step_bytes = 64 * (LO + HI);
        let record_bytes = steps * step_bytes + TAIL;
        debug_assert_eq!(record_bytes, record.bytes);
        for block in 0..job.acts.k / STEP {
            let step = block % steps;
            let at = block * job.acts.m + rows.start;
            // SAFETY: block, step and row lie within the tile and the activations; `acc` is
            // initialised up to `count`.
            unsafe {
                let mut w = [[_mm512_setzero_si512(); 8]; C];
                let (mut d, mut m) = ([_mm512_setzero_ps(); C], [_mm512_setzero_ps(); C]);
                for c in 0..C {
                    let record = tiles[c].add(block / steps * record_bytes);
                    w[c] = unpack::<LO, HI>(record.add(step * step_bytes));
                    let tail = record.add(record_bytes - TAIL);
                    d[c] = halves(tail.add(32 * step));
                    if OFFSET == 0 {
                        m[c] = halves(tail.add(32));
                    }
                }
                let mut q = job.acts.codes.as_ptr().add(at * STEP);
                let scales = job.acts.scales.as_ptr().add(at);
                let sums = job.acts.sums.as_ptr().add(at);
                for r in 0..count {
                    let acc = acc[r].assume_init_mut();
                    let dot = dots::<C>(&w, q, 0..8);
                    let (s, sum) =
                        (_mm512_set1_ps(*scales.add(r)), _mm512_set1_epi32(*sums.add(r)));
                    let shift = _mm512_mullo_epi32(sum, _mm512_set1_epi32(OFFSET));
                    for c in 0..C {
                        let dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot[c], shift));
                        acc[c] = _mm512_fmadd_ps(_mm512_mul_ps(d[c], s), dot, acc[c]);
                        if OFFSET == 0 {
                            let sum = _mm512_cvtepi32_ps(sum);
                            acc[c] = _mm512_fmadd_ps(_mm512_mul_ps(m[c], s), sum, acc[c]);
                        }
                    }
                    q = q.add(STEP);
                }
            }
        }
        // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
        unsafe { store(job, tile, rows, &acc) };
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
    unsafe fn call<const C: usize, const R: usize>(&self, tile: usize, rows: Range<usize>) {
        let Supers(job, record) = self;
        let count = if R == 1 { 1 } else { rows.len() };
        let tiles: [*const u8; C] = std::array::from_fn(|c| job.w.tile(tile + c).as_ptr());
        let mut acc = sums::<C, R>(count);
        let mut isum = [const { MaybeUninit::<[__m512i; C]>::uninit() }; R];
        let step_bytes = 64 * (LO + HI);
        for block in 0..job.acts.k / 256 {
            let at = block * job.acts.m + rows.start;
            let offset = block * record.bytes;
            for isum in &mut isum[..count] {
                isum.write([_mm512_setzero_si512(); C]);
            }
            for step in 0..8 {
                // SAFETY: block, step and row lie within the tile and the activations; `isum` is
                // initialised up to `count`.
                unsafe {
                    let mut w = [[_mm512_setzero_si512(); 8]; C];
                    let mut scale = [[_mm512_setzero_si512(); 2]; C];
                    for c in 0..C {
                        let record = tiles[c].add(offset);
                        w[c] = unpack::<LO, HI>(record.add(step * step_bytes));
                        let scales = record.add(8 * step_bytes);
                        scale[c] = Self::scales(scales, step);
                    }
                    let mut q = job.acts.codes.as_ptr().add(at * 256 + step * STEP);
                    for isum in &mut isum[..count] {
                        let isum = isum.assume_init_mut();
                        if SUB == 32 {
                            let dot = dots::<C>(&w, q, 0..8);
                            for c in 0..C {
                                let scaled = _mm512_mullo_epi32(dot[c], scale[c][0]);
                                isum[c] = _mm512_add_epi32(isum[c], scaled);
                            }
                        } else {
                            let dot = [dots::<C>(&w, q, 0..4), dots::<C>(&w, q, 4..8)];
                            for c in 0..C {
                                let first = _mm512_mullo_epi32(dot[0][c], scale[c][0]);
                                let second = _mm512_mullo_epi32(dot[1][c], scale[c][1]);
                                let scaled = _mm512_add_epi32(first, second);
                                isum[c] = _mm512_add_epi32(isum[c], scaled);
                            }
                        }
                        q = q.add(256);
                    }
                }
            }
            // SAFETY: as above; `acc` is initialised up to `count`.
            unsafe {
                let records = tiles.map(|tile| tile.add(offset));
                self.add_block::<C>(records, at, &isum[..count], &mut acc[..count]);
            }
        }
        // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
        unsafe { store(job, tile, rows, &acc) };
    }
}

impl<const LO: usize, const HI: usize, const OFFSET: i32, const SUB: usize>
    Supers<'_, LO, HI, OFFSET, SUB>
{
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

    /// What the sums of x are multiplied by: 16 pairs of minima, or of scales under an offset.
    ///
    /// # Safety
    /// `scales` points to the scale bytes of a record, and there is such a pair.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn min_pairs(scales: *const u8, pair: usize) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            if OFFSET != 0 {
                return Self::scale_pairs(scales.add(32 * pair));
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

    /// Ends a block: subtracts offsets or minima and adds the block to the float sums.
    ///
    /// # Safety
    /// `records` are the records of the block, `at` is its index in the activations for the first
    /// row; `isum` and `acc` are initialised.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add_block<const C: usize>(
        &self,
        records: [*const u8; C],
        at: usize,
        isum: &[MaybeUninit<[__m512i; C]>],
        acc: &mut [MaybeUninit<[__m512; C]>],
    ) {
        let Supers(job, record) = self;
        let mut mins = [[_mm512_setzero_si512(); 8]; C];
        let (mut d, mut dmin) = ([_mm512_setzero_ps(); C], [_mm512_setzero_ps(); C]);
        let pairs = 128 / SUB;
        // SAFETY: the caller's promise.
        unsafe {
            for c in 0..C {
                let scales = records[c].add(8 * 64 * (LO + HI));
                for pair in 0..pairs {
                    mins[c][pair] = Self::min_pairs(scales, pair);
                }
                let tail = records[c].add(record.bytes - TAIL);
                (d[c], dmin[c]) = (halves(tail), halves(tail.add(32)));
            }
            let scales = job.acts.scales.as_ptr().add(at);
            let sums =
                job.acts.sub_sums.as_ptr().add(at * SUB_SUMS + if SUB == 32 { 16 } else { 0 });
            for (r, (isum, acc)) in isum.iter().zip(acc).enumerate() {
                let (isum, acc) = (isum.assume_init_ref(), acc.assume_init_mut());
                let s = _mm512_set1_ps(*scales.add(r));
                let sums = sums.add(r * SUB_SUMS).cast::<i32>();
                let mut msum = [_mm512_setzero_si512(); C];
                for pair in 0..pairs {
                    let two = _mm512_set1_epi32(sums.add(pair).read_unaligned());
                    for c in 0..C {
                        msum[c] = _mm512_dpwssd_epi32(msum[c], mins[c][pair], two);
                    }
                }
                for c in 0..C {
                    let shift = _mm512_mullo_epi32(msum[c], _mm512_set1_epi32(OFFSET));
                    let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(isum[c], shift));
                    acc[c] = _mm512_fmadd_ps(_mm512_mul_ps(d[c], s), sum, acc[c]);
                    if OFFSET == 0 {
                        let msum = _mm512_cvtepi32_ps(msum[c]);
                        acc[c] = _mm512_fnmadd_ps(_mm512_mul_ps(dmin[c], s), msum, acc[c]);
                    }
                }
            }
        }
    }
}

/// Sums of a row in `C` tiles, for some groups of a step: codes of W times the codes at `q`.
///
/// # Safety
/// `q` points to 32 codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dots<const C: usize>(
    w: &[[__m512i; 8]; C],
    q: *const i8,
    groups: Range<usize>,
) -> [__m512i; C] {
    let mut dot = [_mm512_setzero_si512(); C];
    for g in groups {
        // SAFETY: four codes within the 32.
        let four = _mm512_set1_epi32(unsafe { q.cast::<i32>().add(g).read_unaligned() });
        for c in 0..C {
            dot[c] = _mm512_dpbusd_epi32(dot[c], w[c][g], four);
        }
    }
    dot
}

/// The groups of a step as bytes.
///
/// # Safety
/// `step` points to a step of this shape.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unpack<const LO: usize, const HI: usize>(step: *const u8) -> [__m512i; 8] {
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

/// Float weights of kind `W`: register tiles of up to 6 rows and 4 tiles of columns.
///
/// # Safety
/// As [`run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn floats<const W: u8>(job: &Job, tiles: Range<usize>, rows: Range<usize>) {
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
/// As [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_tiles<const W: u8, const C: usize>(job: &Job, tile: usize, rows: Range<usize>) {
    let tiles: [*const u8; C] = std::array::from_fn(|c| job.w.tile(tile + c).as_ptr());
    let mut acc = sums::<C, ROWS_MAX>(rows.len());
    let k = job.acts.k;
    for from in (0..k).step_by(FLOAT_CHUNK) {
        let chunk = from..k.min(from + FLOAT_CHUNK);
        for first in (0..rows.len()).step_by(FLOAT_ROWS) {
            let count = FLOAT_ROWS.min(rows.len() - first);
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
                    _ => float_part::<W, C, FLOAT_ROWS>(&tiles, x, k, chunk.clone(), acc),
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
