//! The scale (and minimum) under which the codes of a block come closest to its weights.
//!
//! Rounding to the nearest code under the obvious scale (the one that just reaches the peak) is
//! rarely best. So some scales around it are tried; the codes that each yields have a best scale
//! of their own in closed form, and the least weighted error wins:
//!
//! ```text
//! E(d) = sum w (x - d q)^2     least for d = sum w x q / sum w q^2
//! ```
//! A weight counts by its own magnitude over that of its block ([`importance`]): large weights move
//! the output more. Sums run in eight lanes, so their order is fixed.

use super::Book;

/// Lanes of a sum.
const LANES: usize = 8;

/// How much each weight of a block counts: the block's root mean square plus its own magnitude.
#[inline(always)]
pub(super) fn importance<const N: usize>(x: &[f32]) -> [f32; N] {
    let rms = (sum(N, |i| x[i] * x[i]) / N as f32).sqrt();
    std::array::from_fn(|i| rms + x[i].abs())
}

/// The nearest whole number in a range, ties to even.
#[inline(always)]
pub(super) fn round(x: f32, low: f32, high: f32) -> f32 {
    // In 2^23 .. 2^24 floats are whole numbers.
    const WHOLE: f32 = 12_582_912.0;
    (x.clamp(low - 1.0, high + 1.0) + WHOLE - WHOLE).clamp(low, high)
}

/// d for codes `-offset..offset`: x is about d * code. Negative where the peak is positive, so that
/// the peak gets the code that is farthest out.
#[inline(always)]
pub(super) fn scale<const N: usize>(x: &[f32], weights: &[f32; N], offset: f32) -> f32 {
    let peak = x.iter().fold(0.0_f32, |peak, &x| if x.abs() > peak.abs() { x } else { peak });
    let (mut best, mut most) = (0.0, 0.0);
    if peak == 0.0 {
        return best;
    }
    for step in -9..=9 {
        let inverse = (0.1 * step as f32 - offset) / peak;
        let codes: [f32; N] = std::array::from_fn(|i| round(x[i] * inverse, -offset, offset - 1.0));
        let xq = sum(N, |i| weights[i] * x[i] * codes[i]);
        let qq = sum(N, |i| weights[i] * codes[i] * codes[i]);
        // The error falls by xq^2 / qq.
        if qq > 0.0 && xq * xq > most * qq {
            (best, most) = (xq / qq, xq * xq / qq);
        }
    }
    best
}

/// d and m >= 0 for codes `0..=high`: x is about d * code - m.
#[inline(always)]
pub(super) fn scale_and_min<const N: usize>(
    x: &[f32],
    weights: &[f32; N],
    high: f32,
) -> (f32, f32) {
    let (low, top) = x.iter().fold((0.0_f32, f32::MIN), |(l, t), &x| (l.min(x), t.max(x)));
    if top <= low {
        return (0.0, -low);
    }
    let w = sum(N, |i| weights[i]);
    let wx = sum(N, |i| weights[i] * x[i]);
    let (mut best, mut least) = ((0.0, -low), f32::INFINITY);
    for step in 0..=20 {
        let inverse = (high - 1.0 + 0.1 * step as f32) / (top - low);
        let codes: [f32; N] = std::array::from_fn(|i| round((x[i] - low) * inverse, 0.0, high));
        let q = sum(N, |i| weights[i] * codes[i]);
        let qq = sum(N, |i| weights[i] * codes[i] * codes[i]);
        let xq = sum(N, |i| weights[i] * x[i] * codes[i]);
        let det = w * qq - q * q;
        let (d, min) = match det > 0.0 {
            true => ((w * xq - wx * q) / det, (qq * wx - q * xq) / det),
            false => continue,
        };
        // A minimum above zero cannot be written.
        let (d, min) = if min > 0.0 { (xq / qq, 0.0) } else { (d, min) };
        let error = sum(N, |i| {
            let miss = d * codes[i] + min - x[i];
            weights[i] * miss * miss
        });
        if error < least && d >= 0.0 {
            (best, least) = ((d, -min), error);
        }
    }
    best
}

/// d for the levels of a book (less its offset): x is about d * level.
#[inline(always)]
pub(super) fn book_scale(x: &[f32], weights: &[f32; 32], book: &Book, offset: f32) -> f32 {
    let peak = x.iter().fold(0.0_f32, |peak, &x| if x.abs() > peak.abs() { x } else { peak });
    let (mut best, mut most) = (0.0, 0.0);
    if peak == 0.0 {
        return best;
    }
    // The peak near the lowest level, or near the highest.
    for end in [book[0], book[15]] {
        for step in -7..=7 {
            let inverse = (f32::from(end) - offset) * (1.0 + 0.01 * step as f32) / peak;
            let levels: [f32; 32] =
                std::array::from_fn(|i| nearest_level(x[i] * inverse, book, offset).1);
            let xq = sum(32, |i| weights[i] * x[i] * levels[i]);
            let qq = sum(32, |i| weights[i] * levels[i] * levels[i]);
            if qq > 0.0 && xq * xq > most * qq {
                (best, most) = (xq / qq, xq * xq / qq);
            }
        }
    }
    best
}

/// Code and level (less the offset) nearest to x; a book in ascending order.
#[inline(always)]
pub(super) fn nearest_level(x: f32, book: &Book, offset: f32) -> (u8, f32) {
    let mut found = (0, f32::from(book[0]) - offset);
    for code in 1..16 {
        let level = f32::from(book[code]) - offset;
        let middle = (level + f32::from(book[code - 1]) - offset) / 2.0;
        if x > middle {
            found = (code as u8, level);
        }
    }
    found
}

/// The sum of `count` terms in [`LANES`] lanes; `count` is a multiple of them.
#[inline(always)]
fn sum(count: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for first in (0..count).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(first + lane);
        }
    }
    lanes.iter().sum()
}
