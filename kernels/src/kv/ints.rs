//! K and V as integers: the head of a token is `scale * integer`.
//!
//! ```text
//! unit = scales [16 tokens] of K, then of V        f32
//!        K [words of the head][16 tokens][N]       transposed, as floats are
//!        V [words of 16 tokens][head_dim][N]       padded with zeroes, as floats are
//! ```
//! A word is 32 bits, N four bytes or two i16: so many are multiplied and added at once. One
//! scale a head and token lets a score be one exact sum of integers, and the weighted sum of V of a
//! chunk another.
//!
//! A token is rounded by itself: its integers depend on nothing beside it. A head that holds a NaN
//! or an infinity is NaN as a whole.

use super::{Element, KvShape, WriteHead};
use crate::LANES;
use crate::simd::{self, Kernel, Simd, round, sum};

/// Bytes of the scales of a unit.
const SCALES: usize = 2 * LANES * size_of::<f32>();

/// Numbers that are all below this are zeroes: their scale would be no normal number.
const SMALLEST: f32 = 1e-30;

/// An integer that K and V are stored in.
pub(crate) trait Whole: Element {
    /// Of the scales of a unit.
    const SCALES: usize = SCALES / size_of::<Self>();
    /// Numbers of a word.
    const IN_WORD: usize = 4 / size_of::<Self>();
    /// Of K, and of queries.
    const K: Span;
    const V: Span;
    /// What is added to the numbers of K.
    const K_BIAS: i16;
    /// The lower bits.
    fn stored(x: i16) -> Self;
    fn number(self) -> i16;
}

/// Where the integers of a head end.
#[derive(Clone, Copy)]
pub(crate) enum Span {
    /// At this: the largest number of the head becomes it.
    Largest(f32),
    /// Nowhere, but this is the length of the head, the root of the sum of its squares. A product
    /// of two heads is below the square of it then, however many numbers they have.
    Length(f32),
}

impl Whole for i8 {
    const K: Span = Span::Largest(127.0);
    const V: Span = Span::Largest(127.0);
    /// Unsigned bytes are multiplied with signed ones.
    const K_BIAS: i16 = 128;

    #[inline(always)]
    fn stored(x: i16) -> i8 {
        x as i8
    }

    #[inline(always)]
    fn number(self) -> i16 {
        self.into()
    }
}

impl Whole for i16 {
    /// The widest head, of [`MOST_VECTORS`], is 64 longer at most when it is rounded; the square
    /// of that is below 2^30, so sums and what they have on the way fit 32 bits.
    const K: Span = Span::Length(32_700.0);
    /// 13 bits: V meets weights that have sums of 18.
    const V: Span = Span::Largest(8191.0);
    const K_BIAS: i16 = 0;

    #[inline(always)]
    fn stored(x: i16) -> i16 {
        x
    }

    #[inline(always)]
    fn number(self) -> i16 {
        self
    }
}

/// Vectors of the widest head: the sums of its products are exact.
pub(crate) const MOST_VECTORS: usize = 1 << 10;

/// Elements of a unit.
pub(super) fn unit_len<E: Whole>(shape: &KvShape) -> usize {
    v_start::<E>(shape.head_dim) + LANES * shape.padded_head_dim()
}

/// Where V begins in a unit.
pub(crate) fn v_start<E: Whole>(head_dim: usize) -> usize {
    E::SCALES + LANES * head_dim.next_multiple_of(E::IN_WORD)
}

impl Kernel for WriteHead<'_, i8> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        write(simd, self);
    }
}

impl Kernel for WriteHead<'_, i16> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        write(simd, self);
    }
}

#[inline(always)]
fn write<S: Simd, E: Whole>(simd: S, write: WriteHead<'_, E>) {
    let WriteHead { shape, numbers, head, k, v, slots } = write;
    let (dim, padded) = (shape.head_dim, shape.padded_head_dim());
    let len = unit_len::<E>(&shape);
    for (row, &slot) in slots.iter().enumerate() {
        let (start, lane) = (shape.unit(slot as usize, head) * len, slot as usize % LANES);
        // SAFETY: a unit belongs to one head, and a head is written by one task, one unit at a
        // time.
        let unit = unsafe { numbers.take(start..start + len) };
        let (scales, unit) = unit.split_at_mut(E::SCALES);
        let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
        let (unit_k, unit_v) = unit.split_at_mut(v_start::<E>(dim) - E::SCALES);
        let at = (row * shape.n_kv_heads + head) * dim;

        let x = &k[at..at + dim];
        let grid = grid_of(simd, x, E::K);
        scales[lane] = grid.scale;
        for (x, places) in x.chunks(LANES).zip(unit_k.chunks_mut(LANES * LANES)) {
            let mut stored = [E::zeroed(); LANES];
            for (stored, x) in stored.iter_mut().zip(integers(simd, &grid, x)) {
                *stored = E::stored(x.wrapping_add(E::K_BIAS));
            }
            let words = stored.chunks_exact(E::IN_WORD);
            for (place, word) in places.chunks_exact_mut(E::IN_WORD * LANES).zip(words) {
                place[E::IN_WORD * lane..][..E::IN_WORD].copy_from_slice(word);
            }
        }

        let x = &v[at..at + dim];
        let grid = grid_of(simd, x, E::V);
        scales[LANES + lane] = grid.scale;
        let places = &mut unit_v[lane / E::IN_WORD * E::IN_WORD * padded..];
        for (x, places) in x.chunks(LANES).zip(places.chunks_exact_mut(E::IN_WORD * LANES)) {
            let words = places.chunks_exact_mut(E::IN_WORD);
            for (word, x) in words.zip(integers(simd, &grid, x)) {
                word[lane % E::IN_WORD] = E::stored(x);
            }
        }
    }
}

/// Reads K and V of one head and token of a unit.
pub(super) fn read<E: Whole>(unit: &[E], lane: usize, k: &mut [f32], v: &mut [f32]) {
    let (n, padded) = (E::IN_WORD, v.len().next_multiple_of(LANES));
    let (scales, unit) = unit.split_at(E::SCALES);
    let scales: &[f32] = bytemuck::cast_slice(scales);
    let (unit_k, unit_v) = unit.split_at(v_start::<E>(k.len()) - E::SCALES);
    for (d, x) in k.iter_mut().enumerate() {
        let stored = unit_k[(d / n * LANES + lane) * n + d % n];
        *x = scales[lane] * f32::from(E::stored(stored.number().wrapping_sub(E::K_BIAS)).number());
    }
    for (d, x) in v.iter_mut().enumerate() {
        let stored = unit_v[(lane / n * padded + d) * n + lane % n];
        *x = scales[LANES + lane] * f32::from(stored.number());
    }
}

/// How the numbers of a head are rounded: to multiples of a scale.
pub(crate) struct Grid {
    /// NaN where one of them is no finite number.
    pub(crate) scale: f32,
    /// What makes them integers; 0 where they are all too small, or one is no finite number.
    pub(crate) inverse: f32,
}

/// What is known of some numbers.
pub(crate) struct Seen<S: Simd> {
    largest: S::V,
    squares: S::V,
    /// 0, or NaN where one is no finite number.
    poison: S::V,
}

impl<S: Simd> Seen<S> {
    #[inline(always)]
    pub(crate) fn nothing(simd: S) -> Self {
        let zero = simd.splat(0.0);
        Seen { largest: zero, squares: zero, poison: zero }
    }

    #[inline(always)]
    pub(crate) fn and(self, simd: S, x: S::V) -> Self {
        let zero = simd.splat(0.0);
        Seen {
            largest: simd.max(simd.max(x, simd.sub(zero, x)), self.largest),
            squares: simd.mul_add(x, x, self.squares),
            poison: simd.mul_add(x, zero, self.poison),
        }
    }

    /// The grid of these numbers, at most `vectors` vectors.
    #[inline(always)]
    pub(crate) fn grid(self, simd: S, span: Span, vectors: usize) -> Grid {
        let largest = simd::largest(simd, self.largest);
        if sum(simd, self.poison) != 0.0 {
            return Grid { scale: f32::NAN, inverse: 0.0 };
        } else if largest < SMALLEST {
            return Grid { scale: 0.0, inverse: 0.0 };
        }
        let grid = match span {
            Span::Largest(end) => Grid { scale: largest / end, inverse: end / largest },
            Span::Length(end) => {
                let squares = sum(simd, self.squares);
                // Where squares are no normal numbers: no head is longer than of the largest alone.
                let (unit, length) = match (1e-30..=f32::MAX).contains(&squares) {
                    true => (1.0, squares.sqrt()),
                    false => (largest, ((vectors * LANES) as f32).sqrt()),
                };
                Grid { scale: length / end * unit, inverse: end / length / unit }
            }
        };
        // The largest number that there is comes back finite: no larger than the largest, which
        // the quotient may be rounded up to be.
        let most = (grid.inverse * largest).round_ties_even();
        match (grid.scale * most).is_finite() {
            true => grid,
            false => Grid { scale: f32::from_bits((f32::MAX / most).to_bits() - 1), ..grid },
        }
    }
}

#[inline(always)]
fn grid_of<S: Simd>(simd: S, x: &[f32], span: Span) -> Grid {
    let mut seen = Seen::nothing(simd);
    for x in x.chunks(LANES) {
        seen = seen.and(simd, load(simd, x));
    }
    seen.grid(simd, span, x.len().div_ceil(LANES))
}

/// Up to sixteen numbers, and zeroes beyond them.
#[inline(always)]
fn integers<S: Simd>(simd: S, grid: &Grid, x: &[f32]) -> [i16; LANES] {
    round(simd, simd.mul(load(simd, x), simd.splat(grid.inverse)))
}

#[inline(always)]
fn load<S: Simd>(simd: S, x: &[f32]) -> S::V {
    match x.try_into() {
        Ok(whole) => simd.load(whole),
        Err(_) => simd.load_part(x, 0.0),
    }
}

#[cfg(test)]
mod tests {
    use crate::Pool;
    use crate::kv::{KvShape, KvSlab, KvType};

    #[test]
    fn integers_hold_any_finite_head_and_poison_only_their_own() {
        let shape = KvShape { n_blocks: 1, block_len: 16, n_kv_heads: 2, head_dim: 4 };
        // A number is off by half of a step at most; of K it may be one of a longer grid.
        let rows = [
            [f32::MAX, f32::MIN, 1.0, 0.0, 1e-31, -1e-31, 0.0, -0.0],
            [f32::NAN, 1.0, 2.0, 3.0, 1.0, -127.0, 0.5, 1.5],
            [1.0, f32::NEG_INFINITY, 2.0, 3.0, 1e-29, 5e-30, 0.0, -1e-29],
        ];
        for kv_type in [KvType::Q8_0, KvType::Q16_0] {
            let mut slab = KvSlab::new(shape, kv_type);
            slab.write(&Pool::new(1), rows.as_flattened(), rows.as_flattened(), &[2, 3, 4]);
            let (least, most) = match kv_type {
                KvType::Q8_0 => (1.0 / 254.0, 1.0 / 254.0),
                _ => (1.0 / 16382.0, 4.0 / 65400.0),
            };
            for (slot, row) in [2, 3, 4].into_iter().zip(&rows) {
                let (mut k, mut v) = ([0.0_f32; 8], [0.0_f32; 8]);
                slab.read(slot, &mut k, &mut v);
                for (head, x) in row.chunks(4).enumerate() {
                    let [k, v] = [&k, &v].map(|got| &got[4 * head..][..4]);
                    let largest = x.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
                    let finite = x.iter().all(|x| x.is_finite());
                    for (got, error) in [(k, most), (v, least)] {
                        let off = |(got, x): (&f32, &f32)| match largest < 1e-30 {
                            true => *got == 0.0,
                            false => (got / largest - x / largest).abs() <= error * 1.001,
                        };
                        let near = got.iter().zip(x).all(off);
                        let poison = got.iter().all(|x| x.is_nan());
                        assert_eq!((near, poison), (finite, !finite), "{kv_type:?} {x:?}: {got:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_number_comes_back_in_heads_of_any_size() {
        for (kv_type, head_dim) in [KvType::Q8_0, KvType::Q16_0]
            .into_iter()
            .flat_map(|t| [1, 4, 6, 32, 64, 80, 112, 128, 256].map(|d| (t, d)))
        {
            let shape = KvShape { n_blocks: 1, block_len: 16, n_kv_heads: 1, head_dim };
            let mut slab = KvSlab::new(shape, kv_type);
            for fill in [0.0, f32::MAX] {
                let mut head = vec![fill; head_dim];
                head[0] = f32::MIN;
                slab.write(&Pool::new(1), &head, &head, &[5]);
                let (mut k, mut v) = (vec![0.0; head_dim], vec![0.0; head_dim]);
                slab.read(5, &mut k, &mut v);
                for got in [k, v] {
                    let off = |(got, x): (&f32, &f32)| (got / f32::MAX - x / f32::MAX).abs();
                    let near = got.iter().zip(&head).all(|pair| off(pair) < 0.005);
                    assert!(near, "{kv_type:?}, head {head_dim}: {got:?}");
                }
            }
        }
    }
}
