//! AVX2: a tile is two registers of 8 columns; both go through a step before the next one.
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

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::layout::{BRAIN, COLUMNS, HALF, HEAD, Record, STEP, Storage, WIDE, book, scale_bytes};
use super::{Job, ROWS_MAX, activations::SUB_SUMS};
use crate::quant::Scale::F32;

/// The offset that makes a signed byte of a code.
const SIGNED: i32 = 128;

/// Distance of prefetches, in bytes.
const AHEAD: usize = 4096;

/// Float sums of the 16 columns of a row.
type Sums = [__m256; 2];

/// Computes the columns of `tiles` for `rows` (at most [`ROWS_MAX`]).
///
/// # Safety
/// The processor has the features; `tiles` and `rows` lie within the job, and nobody else touches
/// these columns of these rows of y. The weights are quantised.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run(job: &Job, tiles: Range<usize>, rows: Range<usize>) {
    debug_assert!(rows.len() <= ROWS_MAX);
    for tile in tiles {
        // SAFETY: passed on from the caller.
        unsafe {
            match rows.len() {
                1 => run_tile::<1>(job, tile, rows.clone()),
                _ => run_tile::<ROWS_MAX>(job, tile, rows.clone()),
            }
        }
    }
}

/// One tile for `ROWS` rows, or for at most [`ROWS_MAX`]. The sums of a single row stay in
/// registers: in memory every step would wait for the one before it.
///
/// # Safety
/// As [`run`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_tile<const ROWS: usize>(job: &Job, tile: usize, rows: Range<usize>) {
    // SAFETY: passed on from the caller; the constants are those of the record.
    unsafe {
        match &job.w.storage {
            Storage::Blocks(r) => match (r.codes.lo, r.codes.hi, r.codes.offset, r.codes.scale) {
                (8, 0, 128, F32) => blocks::<8, 0, 128, WIDE, ROWS>(job, r, tile, rows),
                (8, 0, 128, _) => blocks::<8, 0, 128, HALF, ROWS>(job, r, tile, rows),
                (4, 0, 128, _) => blocks::<4, 0, 128, HALF, ROWS>(job, r, tile, rows),
                (4, 0, 12, _) => blocks::<4, 0, 12, BRAIN, ROWS>(job, r, tile, rows),
                (4, 0, 8, _) => blocks::<4, 0, 8, HALF, ROWS>(job, r, tile, rows),
                (4, 0, 0, _) => blocks::<4, 0, 0, HALF, ROWS>(job, r, tile, rows),
                (4, 1, 16, _) => blocks::<4, 1, 16, HALF, ROWS>(job, r, tile, rows),
                (4, 1, 0, _) => blocks::<4, 1, 0, HALF, ROWS>(job, r, tile, rows),
                _ => super::scalar::run(job, tile..tile + 1, rows),
            },
            Storage::Supers(r) => match (r.codes.lo, r.codes.hi, r.codes.offset, r.codes.sub) {
                (4, 0, 128, 32) => supers::<4, 0, 128, 32, ROWS>(job, r, tile, rows),
                (4, 0, 0, 32) => supers::<4, 0, 0, 32, ROWS>(job, r, tile, rows),
                (4, 1, 0, 32) => supers::<4, 1, 0, 32, ROWS>(job, r, tile, rows),
                (4, 2, 32, 16) => supers::<4, 2, 32, 16, ROWS>(job, r, tile, rows),
                (2, 1, 4, 16) => supers::<2, 1, 4, 16, ROWS>(job, r, tile, rows),
                (2, 0, 0, 16) => supers::<2, 0, 0, 16, ROWS>(job, r, tile, rows),
                _ => super::scalar::run(job, tile..tile + 1, rows),
            },
            _ => super::scalar::run(job, tile..tile + 1, rows),
        }
    }
}

/// Blocks of 32; `OFFSET` 0 means that there is a minimum.
///
/// # Safety
/// As [`run_tile`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blocks<
    const LO: usize,
    const HI: usize,
    const OFFSET: i32,
    const D: u8,
    const ROWS: usize,
>(
    job: &Job,
    record: &Record,
    tile: usize,
    rows: Range<usize>,
) {
    let count = if ROWS == ROWS_MAX { rows.len() } else { ROWS };
    let acts = job.acts;
    let tile_start = job.w.tile(tile).as_ptr();
    let mut acc = [const { MaybeUninit::uninit() }; ROWS];
    zero(&mut acc[..count]);
    let steps = if OFFSET == 0 || D == WIDE { 1 } else { 2 };
    debug_assert_eq!((steps, 64 * (LO + HI)), (record.steps, record.step_bytes));
    let record_bytes = HEAD + steps * 64 * (LO + HI);
    for block in 0..acts.k / STEP {
        let step = block % steps;
        let at = block * acts.m + rows.start;
        // SAFETY: block, step and rows lie within the tile and the activations; `acc` is
        // initialised up to `count`.
        unsafe {
            let record = tile_start.add(block / steps * record_bytes);
            prefetch(record, step, steps, record_bytes);
            for half in 0..2 {
                let d = scale::<D>(record, step, half);
                let m = record.add(32 + 16 * half);
                let m = if OFFSET == 0 { halves(m) } else { _mm256_setzero_ps() };
                let w =
                    unpack::<LO, HI, OFFSET>(record.add(HEAD + step * 64 * (LO + HI) + 32 * half));
                for (r, acc) in acc[..count].iter_mut().enumerate() {
                    let acc = &mut acc.assume_init_mut()[half];
                    let q = acts.codes.as_ptr().add((at + r) * STEP);
                    let dot = dot::<LO, HI, OFFSET>(&w, q, 0..8, _mm256_set1_epi16(1));
                    let s = _mm256_set1_ps(*acts.scales.as_ptr().add(at + r));
                    let sum = *acts.sums.as_ptr().add(at + r);
                    let shift = if OFFSET == SIGNED { 0 } else { OFFSET * sum };
                    let dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(shift));
                    let dot = _mm256_cvtepi32_ps(dot);
                    *acc = _mm256_fmadd_ps(_mm256_mul_ps(d, s), dot, *acc);
                    if OFFSET == 0 {
                        let sum = _mm256_set1_ps(sum as f32);
                        *acc = _mm256_fmadd_ps(_mm256_mul_ps(m, s), sum, *acc);
                    }
                }
            }
        }
    }
    // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
    unsafe { store(job, tile, rows, &acc) };
}

/// Blocks of 256 with `SUB` weights per scale; `OFFSET` 0 means that there is a minimum.
///
/// # Safety
/// As [`run_tile`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn supers<
    const LO: usize,
    const HI: usize,
    const OFFSET: i32,
    const SUB: usize,
    const ROWS: usize,
>(
    job: &Job,
    record: &Record,
    tile: usize,
    rows: Range<usize>,
) {
    let count = if ROWS == ROWS_MAX { rows.len() } else { ROWS };
    debug_assert_eq!((64 * (LO + HI), SUB), (record.step_bytes, record.codes.sub));
    let tile_start = job.w.tile(tile).as_ptr();
    let mut acc = [const { MaybeUninit::uninit() }; ROWS];
    zero(&mut acc[..count]);
    let mut isum = [const { MaybeUninit::<[__m256i; 2]>::uninit() }; ROWS];
    let scale_bytes = scale_bytes(SUB, OFFSET == 0);
    let record_bytes = HEAD + scale_bytes + 8 * 64 * (LO + HI);
    for block in 0..job.acts.k / 256 {
        let at = block * job.acts.m + rows.start;
        // SAFETY: block and rows lie within the tile and the activations; `acc` is initialised up
        // to `count`, and `isum` by the first step.
        unsafe {
            let record = tile_start.add(block * record_bytes);
            let scales = record.add(HEAD);
            let codes = record.add(HEAD + scale_bytes);
            for step in 0..8 {
                prefetch(record, step, 8, record_bytes);
                let q = job.acts.codes.as_ptr().add(at * 256 + step * STEP);
                for half in 0..2 {
                    let w = unpack::<LO, HI, OFFSET>(codes.add(step * 64 * (LO + HI) + 32 * half));
                    let pair = scales.add(32 * (step * 16 / SUB) + 16 * half);
                    let scale = step_scales::<OFFSET, SUB>(pair, step);
                    for (r, isum) in isum[..count].iter_mut().enumerate() {
                        let isum = isum.as_mut_ptr().cast::<__m256i>().add(half);
                        let mut sum = if step == 0 { _mm256_setzero_si256() } else { isum.read() };
                        for (i, &scale) in scale[..32 / SUB].iter().enumerate() {
                            let groups = i * SUB / 4..(i + 1) * SUB / 4;
                            let dot = dot::<LO, HI, OFFSET>(&w, q.add(256 * r), groups, scale);
                            sum = _mm256_add_epi32(sum, dot);
                        }
                        isum.write(sum);
                    }
                }
            }
            for half in 0..2 {
                let (isum, acc) = (&isum[..count], &mut acc[..count]);
                add_super::<OFFSET, SUB>(job, scales, half, at, isum, acc);
            }
        }
    }
    // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
    unsafe { store(job, tile, rows, &acc) };
}

/// The scales of a step, each twice in 16 bits, as [`dot`] wants them: one for every column, or
/// two for the halves of the step.
///
/// # Safety
/// `pair` points to the 16 scale bytes of 8 columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step_scales<const OFFSET: i32, const SUB: usize>(
    pair: *const u8,
    step: usize,
) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    let pairs = unsafe { scale_pairs::<OFFSET, SUB>(pair) };
    let twice = |at: i32| {
        let (low, high) = (at | (at + 1) << 8, (at + 4) | (at + 5) << 8);
        let (low, high) = (low | low << 16, high | high << 16);
        let order = _mm256_add_epi8(
            _mm256_setr_epi32(low, high, low, high, low, high, low, high),
            _mm256_setr_epi64x(0, 0x0808_0808_0808_0808, 0, 0x0808_0808_0808_0808),
        );
        _mm256_shuffle_epi8(pairs, order)
    };
    if SUB == 32 {
        let scale = if step % 2 == 1 { twice(2) } else { twice(0) };
        [scale, scale]
    } else {
        [twice(0), twice(2)]
    }
}

/// 8 pairs of scales as i16.
///
/// # Safety
/// `pair` points to 16 scale bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale_pairs<const OFFSET: i32, const SUB: usize>(pair: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    let bytes = unsafe { _mm_loadu_si128(pair.cast()) };
    match (SUB, OFFSET) {
        (16, 0) => _mm256_cvtepu8_epi16(_mm_and_si128(bytes, _mm_set1_epi8(15))),
        _ => _mm256_cvtepi8_epi16(bytes),
    }
}

/// What the sums of x are multiplied by: 8 pairs of minima, or of scales under an offset.
///
/// # Safety
/// `scales` points to the scale bytes of a record, moved on to a half; there is such a pair.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn min_pairs<const OFFSET: i32, const SUB: usize>(
    scales: *const u8,
    pair: usize,
) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        if OFFSET != 0 {
            return scale_pairs::<OFFSET, SUB>(scales.add(32 * pair));
        }
        let at = if SUB == 32 { 128 } else { 0 };
        let bytes = _mm_loadu_si128(scales.add(at + 32 * pair).cast());
        if SUB == 32 {
            return _mm256_cvtepu8_epi16(bytes);
        }
        _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15)))
    }
}

/// Ends a block of 8 columns: subtracts offsets or minima and adds it to the float sums.
///
/// # Safety
/// `scales` are the scale bytes of the record, `at` is the index of the block in the activations
/// for the first row; `isum` and `acc` are initialised.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_super<const OFFSET: i32, const SUB: usize>(
    job: &Job,
    scales: *const u8,
    half: usize,
    at: usize,
    isum: &[MaybeUninit<[__m256i; 2]>],
    acc: &mut [MaybeUninit<Sums>],
) {
    let acts = job.acts;
    let pairs = 128 / SUB;
    let mut mins = [_mm256_setzero_si256(); 8];
    // SAFETY: the caller's promise.
    unsafe {
        for (pair, mins) in mins[..pairs].iter_mut().enumerate() {
            *mins = min_pairs::<OFFSET, SUB>(scales.add(16 * half), pair);
        }
        let head = scales.sub(HEAD).add(16 * half);
        let (d, dmin) = (halves(head), halves(head.add(32)));
        let first_sum = if SUB == 32 { 16 } else { 0 };
        for (r, (isum, acc)) in isum.iter().zip(acc).enumerate() {
            let (isum, acc) = (isum.assume_init_ref()[half], &mut acc.assume_init_mut()[half]);
            let s = _mm256_set1_ps(*acts.scales.as_ptr().add(at + r));
            let sums = acts.sub_sums.as_ptr().add((at + r) * SUB_SUMS + first_sum).cast::<i32>();
            let mut msum = _mm256_setzero_si256();
            for (pair, mins) in mins[..pairs].iter().enumerate() {
                let two = _mm256_set1_epi32(sums.add(pair).read_unaligned());
                msum = _mm256_add_epi32(msum, _mm256_madd_epi16(*mins, two));
            }
            let offset = if OFFSET == SIGNED { 0 } else { OFFSET };
            let shift = _mm256_mullo_epi32(msum, _mm256_set1_epi32(offset));
            let sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(isum, shift));
            *acc = _mm256_fmadd_ps(_mm256_mul_ps(d, s), sum, *acc);
            if OFFSET == 0 {
                let msum = _mm256_cvtepi32_ps(msum);
                *acc = _mm256_fnmadd_ps(_mm256_mul_ps(dmin, s), msum, *acc);
            }
        }
    }
}

/// Sum over some groups of a step: codes of 8 columns times the codes at `q`, times a scale that
/// stands twice in 16 bits for every column.
///
/// # Safety
/// `q` points to 32 codes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<const LO: usize, const HI: usize, const OFFSET: i32>(
    w: &[__m256i; 8],
    q: *const i8,
    groups: Range<usize>,
    scale: __m256i,
) -> __m256i {
    let bits = match book(LO, OFFSET) {
        Some(_) if OFFSET == SIGNED => 8,
        Some(_) => 5, // levels up to 24
        None => LO + HI,
    };
    let run = [8, 8, 8, 8, 8, 4, 2, 1, 1][bits];
    let mut dot = _mm256_setzero_si256();
    for first in groups.clone().step_by(run) {
        let mut short = _mm256_setzero_si256();
        for (i, &w) in w[first..groups.end.min(first + run)].iter().enumerate() {
            // SAFETY: four codes within the 32.
            let four = unsafe { q.cast::<i32>().add(first + i).read_unaligned() };
            let four = _mm256_set1_epi32(four);
            let products = if OFFSET == SIGNED {
                let signed = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(four, signed))
            } else {
                _mm256_maddubs_epi16(w, four)
            };
            short = _mm256_add_epi16(short, products);
        }
        dot = _mm256_add_epi32(dot, _mm256_madd_epi16(short, scale));
    }
    dot
}

/// The groups of a step of 8 columns as bytes: codes, or levels where the offset is that of a book.
///
/// # Safety
/// `step` points to a step of this shape, moved on to a half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<const LO: usize, const HI: usize, const OFFSET: i32>(
    step: *const u8,
) -> [__m256i; 8] {
    // SAFETY: the caller's promise; there are LO + HI planes.
    let plane = |i: usize| unsafe { _mm256_loadu_si256(step.add(64 * i).cast()) };
    let low_mask = _mm256_set1_epi8((0xff_u32 >> (8 - LO)) as i8);
    let mut w = [_mm256_setzero_si256(); 8];
    for (g, w) in w.iter_mut().enumerate() {
        *w = plane(g % LO);
        if LO < 8 {
            *w = _mm256_and_si256(shifted(*w, -((g / LO * LO) as i32)), low_mask);
        }
        if HI > 0 {
            let high = shifted(plane(LO + g % HI), LO as i32 - (g / HI * HI) as i32);
            let mask = _mm256_set1_epi8((((1 << HI) - 1) << LO) as i8);
            *w = _mm256_or_si256(_mm256_and_si256(high, mask), *w);
        }
        if let Some(book) = book(LO, OFFSET) {
            // SAFETY: a book has sixteen bytes.
            let book = unsafe { _mm_loadu_si128(book.as_ptr().cast()) };
            *w = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(book), *w);
        }
    }
    w
}

/// Asks for part `step` of the bytes that lie [`AHEAD`] after a record, in order and evenly spread
/// over its steps. A tile is followed by the next tile.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch(record: *const u8, step: usize, steps: usize, record_bytes: usize) {
    let lines = record_bytes / 64;
    for line in step * lines / steps..(step + 1) * lines / steps {
        _mm_prefetch::<_MM_HINT_T0>(record.wrapping_add(AHEAD + 64 * line).cast());
    }
}

/// Shifts 16-bit lanes left (right when negative) by a number known after inlining.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shifted(v: __m256i, by: i32) -> __m256i {
    match by {
        4 => _mm256_slli_epi16::<4>(v),
        3 => _mm256_slli_epi16::<3>(v),
        2 => _mm256_slli_epi16::<2>(v),
        1 => _mm256_slli_epi16::<1>(v),
        0 => v,
        -1 => _mm256_srli_epi16::<1>(v),
        -2 => _mm256_srli_epi16::<2>(v),
        -3 => _mm256_srli_epi16::<3>(v),
        -4 => _mm256_srli_epi16::<4>(v),
        -5 => _mm256_srli_epi16::<5>(v),
        _ => _mm256_srli_epi16::<6>(v),
    }
}

/// The scales of 8 columns in a step.
///
/// # Safety
/// `head` points to the head of a record that has such a step.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale<const D: u8>(head: *const u8, step: usize, half: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        match D {
            WIDE => _mm256_loadu_ps(head.add(32 * half).cast()),
            BRAIN => {
                let bits = _mm_loadu_si128(head.add(32 * step + 16 * half).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
            }
            _ => halves(head.add(32 * step + 16 * half)),
        }
    }
}

/// 8 half floats, widened.
///
/// # Safety
/// `p` points to 16 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
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
