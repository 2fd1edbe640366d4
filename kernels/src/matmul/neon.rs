//! NEON: a tile is four registers of 4 columns, two at a time ("half") go through a step.
//!
//! Codes become signed bytes as they are unpacked: those of eight bits and the levels of a book
//! lose their offset of 128, the others are below 128. So one signed product (`dots.rs`, which has
//! three) serves every format. The codes of a step for 8 columns are 16 registers, and stay in them
//! while the rows pass; a single row keeps its sums in registers as well.
//!
//! There are no prefetches, since nothing was measured: this has run under an emulator only.

mod dots;

use std::arch::aarch64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::layout::{BRAIN, COLUMNS, HALF, HEAD, Record, STEP, Storage, WIDE, book, scale_bytes};
use super::{Job, ROWS_MAX, activations::SUB_SUMS};
use crate::quant::Scale::F32;
use crate::simd::widen;
use dots::{Codes, Half, arranged, dots};
pub(super) use dots::{DOT, MATRIX, PLAIN};

/// The offset that is gone when a byte of a code is taken as signed.
const SIGNED: i32 = 128;

/// Float sums of the 16 columns of a row: halves of two registers.
type Sums = [[float32x4_t; 2]; 2];

/// Computes the columns of `tiles` for `rows` (at most [`ROWS_MAX`]), with the products `ONE` for a
/// single row and `MANY` for more.
///
/// # Safety
/// The processor has these products; `tiles` and `rows` lie within the job, and nobody else touches
/// these columns of these rows of y. The weights are quantised.
#[target_feature(enable = "neon")]
pub(super) unsafe fn run<const ONE: u8, const MANY: u8>(
    job: &Job,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    debug_assert!(rows.len() <= ROWS_MAX);
    for tile in tiles {
        // SAFETY: passed on from the caller.
        unsafe {
            match rows.len() {
                1 => run_tile::<ONE, 1>(job, tile, rows.clone()),
                _ => run_tile::<MANY, ROWS_MAX>(job, tile, rows.clone()),
            }
        }
    }
}

/// One tile for `ROWS` rows, or for at most [`ROWS_MAX`].
///
/// # Safety
/// As [`run`].
#[target_feature(enable = "neon")]
unsafe fn run_tile<const WITH: u8, const ROWS: usize>(job: &Job, tile: usize, rows: Range<usize>) {
    // SAFETY: passed on from the caller; the constants are those of the record.
    unsafe {
        match &job.w.storage {
            Storage::Blocks(r) => match (r.codes.lo, r.codes.hi, r.codes.offset, r.codes.scale) {
                (8, 0, 128, F32) => blocks::<8, 0, 128, WIDE, WITH, ROWS>(job, r, tile, rows),
                (8, 0, 128, _) => blocks::<8, 0, 128, HALF, WITH, ROWS>(job, r, tile, rows),
                (4, 0, 128, _) => blocks::<4, 0, 128, HALF, WITH, ROWS>(job, r, tile, rows),
                (4, 0, 12, _) => blocks::<4, 0, 12, BRAIN, WITH, ROWS>(job, r, tile, rows),
                (4, 0, 8, _) => blocks::<4, 0, 8, HALF, WITH, ROWS>(job, r, tile, rows),
                (4, 0, 0, _) => blocks::<4, 0, 0, HALF, WITH, ROWS>(job, r, tile, rows),
                (4, 1, 16, _) => blocks::<4, 1, 16, HALF, WITH, ROWS>(job, r, tile, rows),
                (4, 1, 0, _) => blocks::<4, 1, 0, HALF, WITH, ROWS>(job, r, tile, rows),
                _ => super::scalar::run(job, tile..tile + 1, rows),
            },
            Storage::Supers(r) => match (r.codes.lo, r.codes.hi, r.codes.offset, r.codes.sub) {
                (4, 0, 128, 32) => supers::<4, 0, 128, 32, WITH, ROWS>(job, r, tile, rows),
                (4, 0, 0, 32) => supers::<4, 0, 0, 32, WITH, ROWS>(job, r, tile, rows),
                (4, 1, 0, 32) => supers::<4, 1, 0, 32, WITH, ROWS>(job, r, tile, rows),
                (4, 2, 32, 16) => supers::<4, 2, 32, 16, WITH, ROWS>(job, r, tile, rows),
                (2, 1, 4, 16) => supers::<2, 1, 4, 16, WITH, ROWS>(job, r, tile, rows),
                (2, 0, 0, 16) => supers::<2, 0, 0, 16, WITH, ROWS>(job, r, tile, rows),
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
#[target_feature(enable = "neon")]
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
            let codes = record.add(HEAD + step * 64 * (LO + HI));
            let q = acts.codes.as_ptr().add(at * STEP);
            for half in 0..2 {
                let d = scale::<D>(record, step, half);
                let m = if OFFSET == 0 { halves(record.add(32 + 16 * half)) } else { d };
                let w = arranged::<WITH>(unpack::<LO, HI, OFFSET>(codes.add(32 * half)));
                for r in (0..count).step_by(dots::rows(WITH)) {
                    let next = (r + 1).min(count - 1);
                    let (q, next) = (q.add(r * STEP), q.add(next * STEP));
                    let dots = dots::<WITH>(&w, q, next, 0..2);
                    for (r, dot) in (r..r + dots::rows(WITH)).zip(&dots) {
                        if r < count {
                            let (s, sum) = (acts.scales.as_ptr().add(at + r), acts.sums.as_ptr());
                            let acc = &mut acc[r].assume_init_mut()[half];
                            add_block::<OFFSET>(d, m, *s, *sum.add(at + r), dot, acc);
                        }
                    }
                }
            }
        }
    }
    // SAFETY: `acc` is initialised up to `count`; the rest is passed on from the caller.
    unsafe { store(job, tile, rows, &acc) };
}

/// Adds a block of 8 columns of a row, with scale `s` and the sum of its codes, to the float sums.
#[inline]
#[target_feature(enable = "neon")]
fn add_block<const OFFSET: i32>(
    d: [float32x4_t; 2],
    m: [float32x4_t; 2],
    s: f32,
    sum: i32,
    dot: &Half,
    acc: &mut [float32x4_t; 2],
) {
    let shift = if OFFSET == SIGNED { 0 } else { OFFSET * sum };
    for c in 0..2 {
        let dot = vcvtq_f32_s32(vsubq_s32(dot[c], vdupq_n_s32(shift)));
        acc[c] = vfmaq_f32(acc[c], vmulq_n_f32(d[c], s), dot);
        if OFFSET == 0 {
            acc[c] = vfmaq_n_f32(acc[c], vmulq_n_f32(m[c], s), sum as f32);
        }
    }
}

/// Blocks of 256 with `SUB` weights per scale; `OFFSET` 0 means that there is a minimum.
///
/// # Safety
/// As [`run_tile`].
#[target_feature(enable = "neon")]
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
) {
    let count = if ROWS == ROWS_MAX { rows.len() } else { ROWS };
    debug_assert_eq!((64 * (LO + HI), SUB), (record.step_bytes, record.codes.sub));
    let tile_start = job.w.tile(tile).as_ptr();
    let mut acc = [const { MaybeUninit::uninit() }; ROWS];
    zero(&mut acc[..count]);
    let mut isum = [const { MaybeUninit::<[Half; 2]>::uninit() }; ROWS];
    let scale_bytes = scale_bytes(SUB, OFFSET == 0);
    let record_bytes = HEAD + scale_bytes + 8 * 64 * (LO + HI);
    for block in 0..job.acts.k / 256 {
        let at = block * job.acts.m + rows.start;
        for isum in &mut isum[..count] {
            isum.write([[vdupq_n_s32(0); 2]; 2]);
        }
        // SAFETY: block and rows lie within the tile and the activations; `isum` and `acc` are
        // initialised up to `count`.
        unsafe {
            let record = tile_start.add(block * record_bytes);
            let scales = record.add(HEAD);
            let codes = record.add(HEAD + scale_bytes);
            for step in 0..8 {
                let q = job.acts.codes.as_ptr().add(at * 256 + step * STEP);
                for half in 0..2 {
                    let w = unpack::<LO, HI, OFFSET>(codes.add(step * 64 * (LO + HI) + 32 * half));
                    let w = arranged::<WITH>(w);
                    let pair = scales.add(32 * (step * 16 / SUB) + 16 * half);
                    let scale = step_scales::<OFFSET, SUB>(pair, step);
                    let isum = &mut isum[..count];
                    add_step::<SUB, WITH>(&w, &scale, q, isum, half);
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

/// Adds a step of 8 columns to the integer sums of rows.
///
/// # Safety
/// The processor has the products `WITH`; `q` points to 32 codes of each row, 256 apart; `isum` is
/// initialised.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_step<const SUB: usize, const WITH: u8>(
    w: &Codes,
    scale: &[Half; 2],
    q: *const i8,
    isum: &mut [MaybeUninit<[Half; 2]>],
    half: usize,
) {
    let count = isum.len();
    for r in (0..count).step_by(dots::rows(WITH)) {
        let next = (r + 1).min(count - 1);
        for (i, scale) in scale[..32 / SUB].iter().enumerate() {
            let parts = i * SUB / 16..(i + 1) * SUB / 16;
            // SAFETY: the caller's promise.
            let dots = unsafe { dots::<WITH>(w, q.add(256 * r), q.add(256 * next), parts) };
            for (r, dot) in (r..r + dots::rows(WITH)).zip(&dots) {
                if r < count {
                    // SAFETY: the caller's promise.
                    let isum = unsafe { &mut isum[r].assume_init_mut()[half] };
                    isum[0] = vmlaq_s32(isum[0], dot[0], scale[0]);
                    isum[1] = vmlaq_s32(isum[1], dot[1], scale[1]);
                }
            }
        }
    }
}

/// The scales of a step for 8 columns: one for every column, or two for the halves of the step.
///
/// # Safety
/// `pair` points to the 16 scale bytes of 8 columns.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn step_scales<const OFFSET: i32, const SUB: usize>(
    pair: *const u8,
    step: usize,
) -> [Half; 2] {
    // SAFETY: the caller's promise.
    let [a, b] = unsafe { scale_pairs::<OFFSET, SUB>(pair) };
    let first = [vmovl_s16(vget_low_s16(a)), vmovl_high_s16(a)];
    let second = [vmovl_s16(vget_low_s16(b)), vmovl_high_s16(b)];
    if SUB == 32 && step % 2 == 1 { [second, second] } else { [first, second] }
}

/// 8 pairs of scales: the first of each, and the second.
///
/// # Safety
/// `pair` points to 16 scale bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn scale_pairs<const OFFSET: i32, const SUB: usize>(pair: *const u8) -> [int16x8_t; 2] {
    // SAFETY: the caller's promise.
    let bytes = unsafe { vld1q_u8(pair) };
    match (SUB, OFFSET) {
        (16, 0) => split(vandq_u8(bytes, vdupq_n_u8(15))),
        _ => {
            let pairs = vreinterpretq_s16_u8(bytes);
            [vshrq_n_s16::<8>(vshlq_n_s16::<8>(pairs)), vshrq_n_s16::<8>(pairs)]
        }
    }
}

/// 8 pairs of unsigned bytes: the first of each, and the second.
#[inline]
#[target_feature(enable = "neon")]
fn split(pairs: uint8x16_t) -> [int16x8_t; 2] {
    let pairs = vreinterpretq_u16_u8(pairs);
    let (first, second) = (vandq_u16(pairs, vdupq_n_u16(255)), vshrq_n_u16::<8>(pairs));
    [vreinterpretq_s16_u16(first), vreinterpretq_s16_u16(second)]
}

/// What the sums of x are multiplied by: 8 pairs of minima, or of scales under an offset.
///
/// # Safety
/// `scales` points to the scale bytes of a record, moved on to a half; there is such a pair.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn min_pairs<const OFFSET: i32, const SUB: usize>(
    scales: *const u8,
    pair: usize,
) -> [int16x8_t; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        match (OFFSET, SUB) {
            (0, 32) => split(vld1q_u8(scales.add(128 + 32 * pair))),
            (0, _) => split(vshrq_n_u8::<4>(vld1q_u8(scales.add(32 * pair)))),
            _ => scale_pairs::<OFFSET, SUB>(scales.add(32 * pair)),
        }
    }
}

/// Ends a block of 8 columns: subtracts offsets or minima and adds it to the float sums.
///
/// # Safety
/// `scales` are the scale bytes of the record, `at` is the index of the block in the activations
/// for the first row; `isum` and `acc` are initialised.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_super<const OFFSET: i32, const SUB: usize>(
    job: &Job,
    scales: *const u8,
    half: usize,
    at: usize,
    isum: &[MaybeUninit<[Half; 2]>],
    acc: &mut [MaybeUninit<Sums>],
) {
    let acts = job.acts;
    let pairs = if OFFSET == SIGNED { 0 } else { 128 / SUB };
    let mut mins = [[vdupq_n_s16(0); 2]; 8];
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
            let s = *acts.scales.as_ptr().add(at + r);
            let sums = acts.sub_sums.as_ptr().add((at + r) * SUB_SUMS + first_sum);
            let mut msum = [vdupq_n_s32(0); 2];
            for (pair, mins) in mins[..pairs].iter().enumerate() {
                for (i, mins) in mins.iter().enumerate() {
                    let sum = *sums.add(2 * pair + i);
                    msum[0] = vmlal_n_s16(msum[0], vget_low_s16(*mins), sum);
                    msum[1] = vmlal_high_n_s16(msum[1], *mins, sum);
                }
            }
            let offset = if OFFSET == SIGNED { 0 } else { OFFSET };
            for c in 0..2 {
                let sum = vcvtq_f32_s32(vmlsq_n_s32(isum[c], msum[c], offset));
                acc[c] = vfmaq_f32(acc[c], vmulq_n_f32(d[c], s), sum);
                if OFFSET == 0 {
                    let msum = vcvtq_f32_s32(msum[c]);
                    acc[c] = vfmsq_f32(acc[c], vmulq_n_f32(dmin[c], s), msum);
                }
            }
        }
    }
}

/// The codes of a step of 8 columns as signed bytes; levels where the offset is that of a book.
///
/// # Safety
/// `step` points to a step of this shape, moved on to a half.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn unpack<const LO: usize, const HI: usize, const OFFSET: i32>(step: *const u8) -> Codes {
    let mut w = [[[vdupq_n_s8(0); 4]; 2]; 2];
    for g in 0..8 {
        for (c, w) in w[g / 4].iter_mut().enumerate() {
            // SAFETY: the caller's promise; there are LO + HI planes.
            let plane = |i: usize| unsafe { vld1q_u8(step.add(64 * i + 16 * c)) };
            let low_mask = vdupq_n_u8((0xff_u32 >> (8 - LO)) as u8);
            let mut codes = vandq_u8(shifted(plane(g % LO), -((g / LO * LO) as i32)), low_mask);
            if HI > 0 {
                let high = shifted(plane(LO + g % HI), LO as i32 - (g / HI * HI) as i32);
                let mask = vdupq_n_u8((((1 << HI) - 1) << LO) as u8);
                codes = vorrq_u8(vandq_u8(high, mask), codes);
            }
            if let Some(book) = book(LO, OFFSET) {
                // SAFETY: a book has sixteen bytes.
                codes = vqtbl1q_u8(unsafe { vld1q_u8(book.as_ptr()) }, codes);
            }
            if OFFSET == SIGNED {
                codes = veorq_u8(codes, vdupq_n_u8(128));
            }
            w[g % 4] = vreinterpretq_s8_u8(codes);
        }
    }
    w
}

/// Shifts bytes left (right when negative) by a number known after inlining.
#[inline]
#[target_feature(enable = "neon")]
fn shifted(v: uint8x16_t, by: i32) -> uint8x16_t {
    match by {
        4 => vshlq_n_u8::<4>(v),
        3 => vshlq_n_u8::<3>(v),
        2 => vshlq_n_u8::<2>(v),
        1 => vshlq_n_u8::<1>(v),
        0 => v,
        -1 => vshrq_n_u8::<1>(v),
        -2 => vshrq_n_u8::<2>(v),
        -3 => vshrq_n_u8::<3>(v),
        -4 => vshrq_n_u8::<4>(v),
        -5 => vshrq_n_u8::<5>(v),
        _ => vshrq_n_u8::<6>(v),
    }
}

/// The scales of 8 columns in a step.
///
/// # Safety
/// `head` points to the head of a record that has such a step.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn scale<const D: u8>(head: *const u8, step: usize, half: usize) -> [float32x4_t; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        match D {
            WIDE => {
                let d = head.add(32 * half).cast();
                [vld1q_f32(d), vld1q_f32(d.add(4))]
            }
            BRAIN => {
                let bits = vld1q_u16(head.add(32 * step + 16 * half).cast());
                let (low, high) = (vmovl_u16(vget_low_u16(bits)), vmovl_high_u16(bits));
                let (low, high) = (vshlq_n_u32::<16>(low), vshlq_n_u32::<16>(high));
                [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
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
#[target_feature(enable = "neon")]
unsafe fn halves(p: *const u8) -> [float32x4_t; 2] {
    // SAFETY: the caller's promise.
    widen(unsafe { vld1q_u16(p.cast()) })
}

/// Zeroes float sums, where they lie: returned by value they would be copied, all 64 rows of them.
#[inline]
#[target_feature(enable = "neon")]
fn zero(sums: &mut [MaybeUninit<Sums>]) {
    for sum in sums {
        sum.write([[vdupq_n_f32(0.0); 2]; 2]);
    }
}

/// Writes the sums to y, without the columns beyond `n`.
///
/// # Safety
/// `acc` is initialised for `rows`; else as [`run`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(job: &Job, tile: usize, rows: Range<usize>, acc: &[MaybeUninit<Sums>]) {
    let first = tile * COLUMNS;
    let columns = COLUMNS.min(job.w.n() - first);
    for (row, acc) in rows.zip(acc) {
        let mut values = [0.0_f32; COLUMNS];
        // SAFETY: the caller's promise; these columns are within row `row` of y, and ours.
        unsafe {
            for (c, acc) in acc.assume_init_ref().as_flattened().iter().enumerate() {
                vst1q_f32(values.as_mut_ptr().add(4 * c), *acc);
            }
            let y = job.y.at(row * job.w.n() + first);
            std::ptr::copy_nonoverlapping(values.as_ptr(), y, columns);
        }
    }
}
