//! K and V as bytes: the head of a token is `scale * byte`, its largest number is 127.
//!
//! ```text
//! unit = scales [16 tokens] of K, then of V        f32
//!        K [fours of the head][16 tokens][4]       transposed, as floats are
//!        V [4 fours of tokens][head_dim][4]        padded with zeroes, as floats are
//! ```
//! Numbers stand in fours because processors multiply and add bytes in fours, unsigned ones with
//! signed ones: those of K have 128 added to them, and a product takes that back. One scale a head
//! and token lets a score be one exact sum of integers, and the weighted sum of V of a chunk
//! another.
//!
//! A token is rounded by itself: its bytes depend on nothing beside it. A head that holds a NaN or
//! an infinity is NaN as a whole.

use super::{KvShape, WriteHead};
use crate::LANES;
use crate::simd::{Kernel, Simd, round, sum};

/// Bytes of the scales of a unit.
pub(crate) const SCALES: usize = 2 * LANES * size_of::<f32>();

/// The largest byte.
const LARGEST: f32 = 127.0;

/// What is added to the bytes of K.
pub(crate) const BIAS: u8 = 128;

/// A head whose largest number is below this is stored as zeroes: its scale would be no normal
/// number.
const SMALLEST: f32 = 1e-30;

/// Bytes of a unit.
pub(super) fn unit_len(shape: &KvShape) -> usize {
    v_start(shape.head_dim) + LANES * shape.padded_head_dim()
}

/// Where V begins in a unit.
pub(crate) fn v_start(head_dim: usize) -> usize {
    SCALES + LANES * head_dim.next_multiple_of(4)
}

impl Kernel for WriteHead<'_, i8> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WriteHead { shape, numbers, head, k, v, slots } = self;
        let (dim, padded) = (shape.head_dim, shape.padded_head_dim());
        let len = unit_len(&shape);
        for (row, &slot) in slots.iter().enumerate() {
            let (start, lane) = (shape.unit(slot as usize, head) * len, slot as usize % LANES);
            // SAFETY: a unit belongs to one head, and a head is written by one task, one unit at
            // a time.
            let unit = unsafe { numbers.take(start..start + len) };
            let (scales, unit) = unit.split_at_mut(SCALES);
            let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
            let (unit_k, unit_v) = unit.split_at_mut(v_start(dim) - SCALES);
            let at = (row * shape.n_kv_heads + head) * dim;

            let x = &k[at..at + dim];
            let grid = Grid::of(simd, x);
            scales[lane] = grid.scale;
            for (x, places) in x.chunks(LANES).zip(unit_k.chunks_mut(LANES * LANES)) {
                let mut bytes = grid.bytes(simd, x);
                for byte in &mut bytes {
                    *byte = (*byte as u8).wrapping_add(BIAS) as i8;
                }
                let quads = bytes.as_chunks::<4>().0;
                for (place, quad) in places.as_chunks_mut::<{ 4 * LANES }>().0.iter_mut().zip(quads)
                {
                    place[4 * lane..][..4].copy_from_slice(quad);
                }
            }

            let x = &v[at..at + dim];
            let grid = Grid::of(simd, x);
            scales[LANES + lane] = grid.scale;
            let places = &mut unit_v[lane / 4 * 4 * padded..][..4 * padded];
            for (x, places) in x.chunks(LANES).zip(places.chunks_mut(4 * LANES)) {
                for (place, byte) in places.chunks_exact_mut(4).zip(grid.bytes(simd, x)) {
                    place[lane % 4] = byte;
                }
            }
        }
    }
}

/// Reads K and V of one head and token of a unit.
pub(super) fn read(unit: &[i8], lane: usize, k: &mut [f32], v: &mut [f32]) {
    let padded = v.len().next_multiple_of(LANES);
    let (scales, unit) = unit.split_at(SCALES);
    let scales: &[f32] = bytemuck::cast_slice(scales);
    let (unit_k, unit_v) = unit.split_at(v_start(k.len()) - SCALES);
    for (d, x) in k.iter_mut().enumerate() {
        let byte = unit_k[(d / 4 * LANES + lane) * 4 + d % 4] as u8;
        *x = scales[lane] * f32::from(byte.wrapping_sub(BIAS) as i8);
    }
    for (d, x) in v.iter_mut().enumerate() {
        *x = scales[LANES + lane] * f32::from(unit_v[(lane / 4 * padded + d) * 4 + lane % 4]);
    }
}

/// How a head of a token is rounded.
struct Grid {
    scale: f32,
    inverse: f32,
}

impl Grid {
    #[inline(always)]
    fn of<S: Simd>(simd: S, x: &[f32]) -> Grid {
        let zero = simd.splat(0.0);
        let (mut largest, mut poison) = (zero, zero);
        for x in x.chunks(LANES) {
            let x = load(simd, x);
            largest = simd.max(simd.max(x, simd.sub(zero, x)), largest);
            // 0 for a number, NaN for what is none.
            poison = simd.add(poison, simd.sub(x, x));
        }
        let mut lanes = [0.0; LANES];
        simd.store(largest, &mut lanes);
        let largest = lanes.into_iter().fold(0.0, |a, b| if a > b { a } else { b });
        if sum(simd, poison) != 0.0 {
            Grid { scale: f32::NAN, inverse: 0.0 }
        } else if largest < SMALLEST {
            Grid { scale: 0.0, inverse: 0.0 }
        } else {
            Grid { scale: largest / LARGEST, inverse: LARGEST / largest }
        }
    }

    /// Up to sixteen numbers, and zeroes beyond them.
    #[inline(always)]
    fn bytes<S: Simd>(&self, simd: S, x: &[f32]) -> [i8; LANES] {
        round(simd, simd.mul(load(simd, x), simd.splat(self.inverse))).map(|x| x as i8)
    }
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
    fn bytes_hold_any_finite_head_and_poison_only_their_own() {
        let shape = KvShape { n_blocks: 1, block_len: 16, n_kv_heads: 2, head_dim: 4 };
        let mut slab = KvSlab::new(shape, KvType::Q8_0);
        let rows = [
            [f32::MAX, f32::MIN, 1.0, 0.0, 1e-31, -1e-31, 0.0, -0.0],
            [f32::NAN, 1.0, 2.0, 3.0, 1.0, -127.0, 0.5, 1.5],
            [1.0, f32::NEG_INFINITY, 2.0, 3.0, 1e-29, 5e-30, 0.0, -1e-29],
        ];
        slab.write(&Pool::new(1), rows.as_flattened(), rows.as_flattened(), &[2, 3, 4]);
        let read = |slot| {
            let (mut k, mut v) = ([0.0_f32; 8], [0.0_f32; 8]);
            slab.read(slot, &mut k, &mut v);
            assert_eq!(k.map(f32::to_bits), v.map(f32::to_bits));
            k
        };
        let huge = f32::MAX / 127.0 * 127.0;
        assert_eq!(read(2), [huge, -huge, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert!(read(3)[..4].iter().all(|x| x.is_nan()));
        assert_eq!(read(3)[4..], [1.0, -127.0, 0.0, 2.0]);
        assert!(read(4)[..4].iter().all(|x| x.is_nan()));
        let near = |(got, want): (&f32, f32)| (got - want).abs() <= 1e-29 / 254.0 * 1.001;
        assert!(read(4)[4..].iter().zip([1e-29, 5e-30, 0.0, -1e-29]).all(near));
    }
}
