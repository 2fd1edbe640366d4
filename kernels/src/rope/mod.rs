//! Rotary embedding with half-split pairs (the GPT-NeoX and Hugging Face order): element `i` and
//! element `i + rotary_dim / 2` of a head turn together; elements beyond `rotary_dim` stay.
//!
//! Products are not fused, so every instruction set gives the bits of the plain formula.
//!
//! Deliberately absent: the tables. Scaling of frequencies and positions is the model's business.

use crate::parts::Parts;
use crate::pool::run_rows;
use crate::simd::{Kernel, Simd, run};
use crate::{Isa, LANES, Pool};

/// Turns every head of `x` in place.
///
/// `x` is `[rows, n_heads, head_dim]`; `cos` and `sin` are `[rows, rotary_dim / 2]`: the angles of
/// each row's position.
pub fn rope(
    pool: &Pool,
    x: &mut [f32],
    cos: &[f32],
    sin: &[f32],
    n_heads: usize,
    head_dim: usize,
    rotary_dim: usize,
) {
    rope_with(Isa::best(), pool, x, cos, sin, n_heads, head_dim, rotary_dim);
}

/// [`rope`] with a chosen instruction set.
pub fn rope_with(
    isa: Isa,
    pool: &Pool,
    x: &mut [f32],
    cos: &[f32],
    sin: &[f32],
    n_heads: usize,
    head_dim: usize,
    rotary_dim: usize,
) {
    let (row_len, half) = (n_heads * head_dim, rotary_dim / 2);
    assert!(
        rotary_dim <= head_dim && rotary_dim.is_multiple_of(2),
        "rotary_dim is even, <= head_dim"
    );
    if x.is_empty() || half == 0 {
        return;
    }
    let rows = x.len() / row_len;
    assert_eq!(x.len(), rows * row_len, "x is [rows, n_heads, head_dim]");
    assert_eq!(cos.len(), rows * half, "cos is [rows, rotary_dim / 2]");
    assert_eq!(sin.len(), rows * half, "sin is [rows, rotary_dim / 2]");
    let x = Parts::new(x);
    run_rows(pool, rows, row_len, &|range| {
        for row in range {
            // SAFETY: every row is visited by one task only.
            let x = unsafe { x.take(row * row_len..(row + 1) * row_len) };
            let angles = row * half..(row + 1) * half;
            run(isa, Turn { x, cos: &cos[angles.clone()], sin: &sin[angles], head_dim });
        }
    });
}

/// One row: all heads turn by the same angles.
struct Turn<'a> {
    x: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    head_dim: usize,
}

impl Kernel for Turn<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.cos.len();
        let (cos, cos_tail) = self.cos.as_chunks::<LANES>();
        let (sin, sin_tail) = self.sin.as_chunks::<LANES>();
        for head in self.x.chunks_exact_mut(self.head_dim) {
            let (first, second) = head[..2 * half].split_at_mut(half);
            let (first, first_tail) = first.as_chunks_mut::<LANES>();
            let (second, second_tail) = second.as_chunks_mut::<LANES>();
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let (x, y) = (simd.load(a), simd.load(b));
                let (cos, sin) = (simd.load(cos), simd.load(sin));
                simd.store(simd.sub(simd.mul(x, cos), simd.mul(y, sin)), a);
                simd.store(simd.add(simd.mul(y, cos), simd.mul(x, sin)), b);
            }
            let tails = first_tail.iter_mut().zip(second_tail).zip(cos_tail).zip(sin_tail);
            for (((a, b), cos), sin) in tails {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    #[test]
    fn every_isa_gives_the_bits_of_the_formula() {
        let pool = Pool::new(2);
        for &head_dim in cases::HEAD_DIMS {
            for rotary_dim in [head_dim, head_dim / 2, 0] {
                for (rows, n_heads) in [(0, 2), (1, 1), (3, 5), (90, 4)] {
                    check(&pool, rows, n_heads, head_dim, rotary_dim);
                }
            }
        }
    }

    fn check(pool: &Pool, rows: usize, n_heads: usize, head_dim: usize, rotary_dim: usize) {
        let half = rotary_dim / 2;
        let x = cases::randoms(rows * n_heads * head_dim, 8);
        let angles: Vec<f32> = cases::randoms(rows * half, 9).iter().map(|x| x * 100.0).collect();
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let mut expected = x.clone();
        for (i, head) in expected.chunks_exact_mut(head_dim).enumerate() {
            for j in 0..half {
                let at = i / n_heads * half + j;
                let (a, b) = (head[j], head[j + half]);
                head[j] = a * cos[at] - b * sin[at];
                head[j + half] = b * cos[at] + a * sin[at];
            }
        }
        for isa in Isa::available() {
            let mut got = x.clone();
            rope_with(*isa, pool, &mut got, &cos, &sin, n_heads, head_dim, rotary_dim);
            cases::assert_same_bits(&expected, &got, isa.name());
        }
    }
}
