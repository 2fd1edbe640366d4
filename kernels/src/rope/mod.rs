//! Rotary embedding with half-split pairs (the GPT-NeoX and Hugging Face order): element `i` and
//! element `i + rotary_dim / 2` of a head turn together; elements beyond `rotary_dim` stay. A head
//! may have an RMS norm of its own before (Qwen3, Gemma 3), while it is in the cache.
//!
//! Products of a rotation are not fused with their sums, so every instruction set gives the bits of
//! the plain formula.
//!
//! Deliberately absent: the tables. Scaling of frequencies and positions is the model's business.

use crate::norm::rms_norm_in_place;
use crate::parts::Parts;
use crate::pool::run_rows;
use crate::simd::{Kernel, Simd, run};
use crate::{Isa, LANES, Pool};

/// Heads that turn: the queries of some rows, or their keys.
pub struct Heads<'a> {
    /// `[rows, heads, head_dim]`
    pub x: &'a mut [f32],
    /// What every head is multiplied with behind its norm, `[head_dim]`, and the epsilon.
    pub norm: Option<(&'a [f32], f32)>,
}

/// By how much they turn.
#[derive(Clone, Copy)]
pub struct Angles<'a> {
    /// `[rows, rotary_dim / 2]`: of each row's position.
    pub cos: &'a [f32],
    /// `[rows, rotary_dim / 2]`
    pub sin: &'a [f32],
    /// Numbers of a head that turn.
    pub rotary_dim: usize,
    /// Numbers of a head.
    pub head_dim: usize,
}

/// Normalises every head where it has a norm, and turns it, in place.
///
/// # Panics
/// When a slice has another length than its shape.
pub fn rope<const N: usize>(pool: &Pool, rows: usize, heads: [Heads<'_>; N], angles: Angles<'_>) {
    rope_with(Isa::best(), pool, rows, heads, angles);
}

/// [`rope`] with a chosen instruction set.
pub fn rope_with<const N: usize>(
    isa: Isa,
    pool: &Pool,
    rows: usize,
    heads: [Heads<'_>; N],
    angles: Angles<'_>,
) {
    let Angles { cos, sin, rotary_dim, head_dim } = angles;
    assert!(
        rotary_dim <= head_dim && rotary_dim.is_multiple_of(2),
        "rotary_dim is even, <= head_dim"
    );
    let half = rotary_dim / 2;
    assert_eq!((cos.len(), sin.len()), (rows * half, rows * half), "[rows, rotary_dim / 2]");
    let heads = heads.map(|Heads { x, norm }| {
        let row_len = x.len() / rows.max(1);
        assert_eq!(x.len(), rows * row_len, "x is [rows, heads, head_dim]");
        assert!(row_len.is_multiple_of(head_dim), "x is [rows, heads, head_dim]");
        assert!(norm.is_none_or(|(weight, _)| weight.len() == head_dim), "the norm of a head");
        (Parts::new(x), row_len, norm)
    });
    run_rows(pool, rows, heads.iter().map(|(_, row_len, _)| row_len).sum(), &|range| {
        for row in range {
            let angles = row * half..(row + 1) * half;
            let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
            for (x, row_len, norm) in &heads {
                // SAFETY: every row is visited by one task only.
                let x = unsafe { x.take(row * row_len..(row + 1) * row_len) };
                run(isa, Turn { x, norm: *norm, cos, sin, head_dim });
            }
        }
    });
}

/// One row: all heads turn by the same angles.
struct Turn<'a> {
    x: &'a mut [f32],
    norm: Option<(&'a [f32], f32)>,
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
            if let Some((weight, eps)) = self.norm {
                rms_norm_in_place(simd, head, weight, eps);
            }
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
    use crate::{cases, norm};

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

    /// Queries with a norm and keys without one.
    fn check(pool: &Pool, rows: usize, n_heads: usize, head_dim: usize, rotary_dim: usize) {
        let half = rotary_dim / 2;
        let q = cases::randoms(rows * n_heads * head_dim, 8);
        let (k, weight) = (cases::randoms(rows * head_dim, 10), cases::randoms(head_dim, 11));
        let turns: Vec<f32> = cases::randoms(rows * half, 9).iter().map(|x| x * 100.0).collect();
        let cos: Vec<f32> = turns.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = turns.iter().map(|a| a.sin()).collect();
        let turned = |mut x: Vec<f32>, n_heads: usize| {
            for (i, head) in x.chunks_exact_mut(head_dim).enumerate() {
                for j in 0..half {
                    let at = i / n_heads * half + j;
                    let (a, b) = (head[j], head[j + half]);
                    head[j] = a * cos[at] - b * sin[at];
                    head[j + half] = b * cos[at] + a * sin[at];
                }
            }
            x
        };
        let mut normed = vec![0.0; q.len()];
        norm::rms_norm(pool, &q, &weight, 1e-6, rows * n_heads, head_dim, &mut normed);
        let (want_q, want_k) = (turned(normed, n_heads), turned(k.clone(), 1));
        let angles = Angles { cos: &cos, sin: &sin, rotary_dim, head_dim };
        for isa in Isa::available() {
            let (mut q, mut k) = (q.clone(), k.clone());
            let heads =
                [Heads { x: &mut q, norm: Some((&weight, 1e-6)) }, Heads { x: &mut k, norm: None }];
            rope_with(*isa, pool, rows, heads, angles);
            cases::assert_same_bits(&want_q, &q, isa.name());
            cases::assert_same_bits(&want_k, &k, isa.name());
        }
    }
}
