//! x rounded to bf16, by two.

use half::bf16;

use super::Shared;
use super::activations::grow;
use crate::simd::{self, Kernel, Simd};
use crate::{Isa, Pool};

/// A number in which a bf16 is kept.
pub(super) trait Keeps: Copy + Default + Send {
    fn brain(bits: u16) -> Self;
}

impl Keeps for bf16 {
    #[inline(always)]
    fn brain(bits: u16) -> bf16 {
        bf16::from_bits(bits)
    }
}

impl Keeps for f32 {
    #[inline(always)]
    fn brain(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }
}

/// `out[row][i]` becomes the elements `2 * i` and `2 * i + 1` of the row; the last is beside a zero
/// where `k` is odd.
pub(super) fn round_rows<T: Keeps>(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    m: usize,
    k: usize,
    out: &mut Vec<[T; 2]>,
) {
    let pairs = k.div_ceil(2);
    grow(out, m * pairs);
    let out = Shared(out.as_mut_ptr());
    // At least 16 Ki elements per task: less is not worth waking a thread.
    let per_task = (16384 / k.max(1)).max(1);
    pool.run(m.div_ceil(per_task), &|task| {
        for row in task * per_task..((task + 1) * per_task).min(m) {
            let x = &x[row * k..(row + 1) * k];
            // SAFETY: the row lies within what was grown, and belongs to one task.
            let out = unsafe { std::slice::from_raw_parts_mut(out.at(row * pairs), pairs) };
            simd::run(isa, Row { x, out });
        }
    });
}

struct Row<'a, T> {
    x: &'a [f32],
    out: &'a mut [[T; 2]],
}

impl<T: Keeps> Kernel for Row<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (twos, last) = self.x.as_chunks::<2>();
        for (x, out) in twos.iter().zip(&mut *self.out) {
            *out = [T::brain(nearest(x[0])), T::brain(nearest(x[1]))];
        }
        if let [x] = last {
            self.out[twos.len()] = [T::brain(nearest(*x)), T::default()];
        }
    }
}

/// The bits of the nearest bf16, ties to even. A number below 2^-126 is zero, as it is for the
/// instruction that multiplies them.
#[inline(always)]
fn nearest(x: f32) -> u16 {
    let bits = x.to_bits();
    let (upper, magnitude) = (bits >> 16, bits & 0x7fff_ffff);
    let rounded = bits.wrapping_add(0x7fff + (upper & 1)) >> 16;
    // A NaN must not become an infinity, so it is not rounded.
    let finite = if magnitude > 0x7f80_0000 { upper | 0x40 } else { rounded };
    (if magnitude < 0x0080_0000 { 0 } else { finite }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_one_is_taken() {
        let edges = [0, 1, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0x7f_ffff, 0x80_0000, 0x7f7f_ffff];
        let edges = edges.into_iter().chain([0x7f80_0000, 0x7f80_0001, 0x7fff_ffff]);
        let all = edges.chain((0..2_000_000).map(|i: u32| i.wrapping_mul(2_654_435_761)));
        for bits in all.flat_map(|bits| [bits, bits ^ 0x8000_0000]) {
            let x = f32::from_bits(bits);
            let want = if x.abs() < f32::MIN_POSITIVE { bf16::ZERO } else { bf16::from_f32(x) };
            assert_eq!(nearest(x), want.to_bits(), "{bits:#x}");
        }
    }

    #[test]
    fn every_isa_rounds_every_row() {
        let (pool, m, k) = (Pool::new(3), 41, 801);
        let x = crate::cases::randoms(m * k, 7);
        for &isa in Isa::available() {
            let (mut pairs, mut floats) = (Vec::<[bf16; 2]>::new(), Vec::<[f32; 2]>::new());
            round_rows(isa, &pool, &x, m, k, &mut pairs);
            round_rows(isa, &pool, &x, m, k, &mut floats);
            for (row, x) in x.chunks_exact(k).enumerate() {
                let at = row * k.div_ceil(2);
                for (i, two) in x.chunks(2).enumerate() {
                    let want = [two[0], *two.get(1).unwrap_or(&0.0)].map(bf16::from_f32);
                    assert_eq!(pairs[at + i], want, "{}, row {row}, pair {i}", isa.name());
                    assert_eq!(floats[at + i], want.map(bf16::to_f32), "row {row}, pair {i}");
                }
            }
        }
    }
}
