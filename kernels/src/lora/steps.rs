//! Shrink, gain and expand, in sixteen lanes.
//!
//! Register tiles hold sums of one row and four ranks (or four chunks of columns), and of four rows
//! where there are registers for sixteen sums. A sum is the same in every tile that holds it.

use std::ops::Range;

use super::factors::{COLUMNS, Element};
use super::{Factors, Part};
use crate::LANES;
use crate::parts::Parts;
use crate::simd::{Kernel, Simd, sum};

/// Rows and sums of a row in a register tile.
const ROWS: usize = 4;
const SUMS: usize = COLUMNS / LANES;

/// `h = weight * A x` for some rows and ranks.
pub(super) struct Shrink<'a, E> {
    /// `[m, k]`
    pub x: &'a [f32],
    pub rows: &'a [u32],
    pub factors: &'a Factors,
    /// `[rank, k]`
    pub a: &'a [E],
    pub ranks: Range<usize>,
    pub weight: f32,
    pub h: &'a Parts<'a, f32>,
    /// Where `h` of the first row begins.
    pub start: usize,
}

impl<E: Element> Kernel for Shrink<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut first = 0;
        while first < self.rows.len() {
            let rows = if S::WIDE && first + ROWS <= self.rows.len() { ROWS } else { 1 };
            let mut rank = self.ranks.start;
            while rank < self.ranks.end {
                let ranks = if rank + SUMS <= self.ranks.end { SUMS } else { 1 };
                match (rows, ranks) {
                    (ROWS, SUMS) => self.tile::<S, ROWS, SUMS>(simd, first, rank),
                    (ROWS, _) => self.tile::<S, ROWS, 1>(simd, first, rank),
                    (_, SUMS) => self.tile::<S, 1, SUMS>(simd, first, rank),
                    _ => self.tile::<S, 1, 1>(simd, first, rank),
                }
                rank += ranks;
            }
            first += rows;
        }
    }
}

impl<E: Element> Shrink<'_, E> {
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const J: usize>(&self, simd: S, first: usize, rank: usize) {
        let k = self.factors.k();
        let mut x: [(&[[f32; LANES]], &[f32]); R] = [(&[], &[]); R];
        for (r, x) in x.iter_mut().enumerate() {
            let row = self.rows[first + r] as usize;
            *x = self.x[row * k..(row + 1) * k].as_chunks();
        }
        let mut a: [(&[[E; LANES]], &[E]); J] = [(&[], &[]); J];
        for (j, a) in a.iter_mut().enumerate() {
            *a = self.a[(rank + j) * k..(rank + j + 1) * k].as_chunks();
        }
        let mut sums = [[simd.splat(0.0); R]; J];
        for chunk in 0..k / LANES {
            let mut xs = [simd.splat(0.0); R];
            for (to, x) in xs.iter_mut().zip(&x) {
                *to = simd.load(&x.0[chunk]);
            }
            for (sums, a) in sums.iter_mut().zip(&a) {
                let a = E::load(simd, &a.0[chunk]);
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = simd.mul_add(x, a, *sum);
                }
            }
        }
        if !k.is_multiple_of(LANES) {
            for (sums, a) in sums.iter_mut().zip(&a) {
                let mut lanes = [E::ZERO; LANES];
                lanes[..a.1.len()].copy_from_slice(a.1);
                let a = E::load(simd, &lanes);
                for (sum, x) in sums.iter_mut().zip(&x) {
                    *sum = simd.mul_add(simd.load_part(x.1, 0.0), a, *sum);
                }
            }
        }
        for r in 0..R {
            let at = self.start + (first + r) * self.factors.rank() + rank;
            // SAFETY: tasks have rows and ranks of their own.
            let h = unsafe { self.h.take(at..at + J) };
            for (h, sums) in h.iter_mut().zip(&sums) {
                *h = self.weight * sum(simd, sums[r]);
            }
        }
    }
}

/// `y += gain * y` for some rows, in some tiles of columns.
pub(super) struct Gain<'a> {
    pub rows: &'a [u32],
    /// `[n]`
    pub gain: &'a [f32],
    pub tiles: Range<usize>,
    /// `[m, n]`
    pub y: &'a Parts<'a, f32>,
}

impl Kernel for Gain<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let n = self.gain.len();
        let columns = self.tiles.start * COLUMNS..n.min(self.tiles.end * COLUMNS);
        for &row in self.rows {
            let start = row as usize * n;
            // SAFETY: tasks have columns of their own.
            let y = unsafe { self.y.take(start + columns.start..start + columns.end) };
            for (y, gain) in y.chunks_mut(LANES).zip(self.gain[columns.clone()].chunks(LANES)) {
                let (old, gain) = (simd.load_part(y, 0.0), simd.load_part(gain, 0.0));
                simd.store_part(simd.mul_add(gain, old, old), y);
            }
        }
    }
}

/// `y += ratio * (B h)` for some rows, in some tiles of columns.
pub(super) struct Expand<'a, E> {
    pub rows: &'a [u32],
    pub part: &'a Part<'a>,
    /// `[n / 64, rank, 64]`
    pub b: &'a [E],
    /// `[rows, rank]`
    pub h: &'a [f32],
    pub tiles: Range<usize>,
    /// `[m, n]`
    pub y: &'a Parts<'a, f32>,
}

impl<E: Element> Kernel for Expand<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rank = self.part.factors.rank();
        for tile in self.tiles.clone() {
            let b = &self.b[tile * rank * COLUMNS..(tile + 1) * rank * COLUMNS];
            let mut first = 0;
            while first < self.rows.len() {
                if S::WIDE && first + ROWS <= self.rows.len() {
                    self.tile::<S, ROWS>(simd, tile, b, first);
                    first += ROWS;
                } else {
                    self.tile::<S, 1>(simd, tile, b, first);
                    first += 1;
                }
            }
        }
    }
}

impl<E: Element> Expand<'_, E> {
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&self, simd: S, tile: usize, b: &[E], first: usize) {
        let rank = self.part.factors.rank();
        let (b, _) = b.as_chunks::<LANES>();
        let mut sums = [[simd.splat(0.0); SUMS]; R];
        for (j, b) in b.chunks_exact(SUMS).enumerate() {
            let mut columns = [simd.splat(0.0); SUMS];
            for (column, b) in columns.iter_mut().zip(b) {
                *column = E::load(simd, b);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let h = simd.splat(self.h[(first + r) * rank + j]);
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = simd.mul_add(h, column, *sum);
                }
            }
        }
        let n = self.part.factors.n();
        let columns = tile * COLUMNS..n.min((tile + 1) * COLUMNS);
        for (r, sums) in sums.iter().enumerate() {
            let start = self.rows[first + r] as usize * n;
            // SAFETY: tasks have columns of their own.
            let y = unsafe { self.y.take(start + columns.start..start + columns.end) };
            for (c, (y, sum)) in y.chunks_mut(LANES).zip(sums).enumerate() {
                let mut update = *sum;
                if let Some(ratio) = self.part.ratio {
                    let ratio = &ratio[columns.start + c * LANES..][..y.len()];
                    update = simd.mul(update, simd.load_part(ratio, 0.0));
                }
                let old = simd.load_part(y, 0.0);
                simd.store_part(simd.add(old, update), y);
            }
        }
    }
}
