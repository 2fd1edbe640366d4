//! The three products of signed bytes that Arm has, and what each wants to be given.
//!
//! ```text
//! PLAIN    smull, smlal, sadalp   bytes times bytes, summed in 16 bits, then in pairs in 32
//! DOT      sdot                   4 columns of four codes, times four codes of a row
//! MATRIX   smmla                  2 columns of eight codes, times eight codes of 2 rows
//! ```
//! `sdot` and `smmla` are written out: Rust has no stable names for them.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

pub(in crate::matmul) const PLAIN: u8 = 0;
pub(in crate::matmul) const DOT: u8 = 1;
pub(in crate::matmul) const MATRIX: u8 = 2;

/// Integer sums of 8 columns.
pub(super) type Half = [int32x4_t; 2];

/// The codes of a step for 8 columns: by sixteen weights, four columns, four weights.
pub(super) type Codes = [[[int8x16_t; 4]; 2]; 2];

/// Rows that are computed together.
pub(super) const fn rows(with: u8) -> usize {
    if with == MATRIX { 2 } else { 1 }
}

/// Codes as [`dots`] wants them. For MATRIX, four registers that hold four weights of 4 columns
/// each become, of the same 4 columns:
///
/// ```text
/// columns 0, 1   weights 0..8        columns 2, 3   weights 0..8
/// columns 0, 1   weights 8..16       columns 2, 3   weights 8..16
/// ```
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn arranged<const WITH: u8>(codes: Codes) -> Codes {
    let mut codes = codes;
    if WITH == MATRIX {
        for w in codes.as_flattened_mut() {
            let (first, second) = (zip_fours(w[0], w[1]), zip_fours(w[2], w[3]));
            *w = [first[0], first[1], second[0], second[1]];
        }
    }
    codes
}

/// Four bytes of one, four of the other, and so on.
#[inline]
#[target_feature(enable = "neon")]
fn zip_fours(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b));
    [vreinterpretq_s8_s32(vzip1q_s32(a, b)), vreinterpretq_s8_s32(vzip2q_s32(a, b))]
}

/// Sums over some parts (0, 1) of sixteen weights of a step: codes of 8 columns times the
/// codes at `q`, and for MATRIX also times those at `next`.
///
/// # Safety
/// `q` and `next` point to 32 codes; the processor has the products `WITH`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn dots<const WITH: u8>(
    w: &Codes,
    q: *const i8,
    next: *const i8,
    parts: Range<usize>,
) -> [Half; 2] {
    // By registers of columns; for MATRIX by pairs of columns, else the second remain zero.
    let mut sums = [[vdupq_n_s32(0); 2]; 2];
    for part in parts {
        // SAFETY: sixteen codes of the 32.
        let (q, next) = unsafe { (vld1q_s8(q.add(16 * part)), vld1q_s8(next.add(16 * part))) };
        for (sums, w) in sums.iter_mut().zip(&w[part]) {
            // SAFETY: the caller's promise.
            unsafe {
                match WITH {
                    PLAIN => sums[0] = vaddq_s32(sums[0], plain(w, q)),
                    DOT => sums[0] = dot(sums[0], w, q),
                    _ => *sums = matrix(*sums, w, [q, next]),
                }
            }
        }
    }
    if WITH == MATRIX {
        for sums in &mut sums {
            let a = vreinterpretq_s64_s32(sums[0]);
            let b = vreinterpretq_s64_s32(sums[1]);
            sums[0] = vreinterpretq_s32_s64(vzip1q_s64(a, b));
            sums[1] = vreinterpretq_s32_s64(vzip2q_s64(a, b));
        }
    }
    [[sums[0][0], sums[1][0]], [sums[0][1], sums[1][1]]]
}

/// Sixteen weights of 4 columns, with what every Armv8 processor has.
///
/// A lane of 16 bits has room for two products (2 * 128 * 127 = 32512).
#[inline]
#[target_feature(enable = "neon")]
fn plain(w: &[int8x16_t; 4], q: int8x16_t) -> int32x4_t {
    let q = vreinterpretq_s32_s8(q);
    let q = [
        vdupq_laneq_s32::<0>(q),
        vdupq_laneq_s32::<1>(q),
        vdupq_laneq_s32::<2>(q),
        vdupq_laneq_s32::<3>(q),
    ];
    let mut sums = [vdupq_n_s32(0); 2];
    for first in [0, 2] {
        let (q, more) = (vreinterpretq_s8_s32(q[first]), vreinterpretq_s8_s32(q[first + 1]));
        let (w, after) = (w[first], w[first + 1]);
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(q));
        let low = vmlal_s8(low, vget_low_s8(after), vget_low_s8(more));
        let high = vmlal_high_s8(vmull_high_s8(w, q), after, more);
        sums = [vpadalq_s16(sums[0], low), vpadalq_s16(sums[1], high)];
    }
    vpaddq_s32(sums[0], sums[1])
}

/// Sixteen weights of 4 columns, added to `sums`.
///
/// # Safety
/// The processor has `dotprod`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot(sums: int32x4_t, w: &[int8x16_t; 4], q: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        let sums = sdot::<0>(sums, w[0], q);
        let sums = sdot::<1>(sums, w[1], q);
        let sums = sdot::<2>(sums, w[2], q);
        sdot::<3>(sums, w[3], q)
    }
}

/// Sixteen weights of 4 columns and 2 rows, added to `sums`: of the first two columns and of the
/// others, of the first row and of the second.
///
/// # Safety
/// The processor has `i8mm`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn matrix(sums: [int32x4_t; 2], w: &[int8x16_t; 4], q: [int8x16_t; 2]) -> [int32x4_t; 2] {
    let q = [vreinterpretq_s64_s8(q[0]), vreinterpretq_s64_s8(q[1])];
    let first = vreinterpretq_s8_s64(vzip1q_s64(q[0], q[1]));
    let second = vreinterpretq_s8_s64(vzip2q_s64(q[0], q[1]));
    // SAFETY: the caller's promise.
    unsafe {
        let low = smmla(smmla(sums[0], first, w[0]), second, w[2]);
        [low, smmla(smmla(sums[1], first, w[1]), second, w[3])]
    }
}

/// Adds to every lane the product of four bytes of `w` with four of `q`, those of lane `LANE`.
///
/// # Safety
/// The processor has `dotprod`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn sdot<const LANE: i32>(sums: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: the caller's promise; only `sums` changes.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {w:v}.16b, {q:v}.4b[{lane}]",
            sums = inout(vreg) sums,
            w = in(vreg) w,
            q = in(vreg) q,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Adds the product of two matrices of 2 rows of eight bytes, the second transposed.
///
/// # Safety
/// The processor has `i8mm`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn smmla(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: the caller's promise; only `sums` changes.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
