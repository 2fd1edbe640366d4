//! Gates of the feed-forward layers, and element-wise addition.
//!
//! All instruction sets agree bit by bit; against f64 the gates are within 1e-6 relative.
//! `silu(x) = x / (1 + e^-x)`; `gelu_tanh(x)` is the usual approximation
//! `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, which equals
//! `x * sigmoid(2 sqrt(2 / pi) * (x + 0.044715 x^3))` and is computed so. The gate of gpt-oss is
//! bounded: see [`Gate::ClampedSwiglu`].
//!
//! GELU without a gate, for encoders, is in `gelu.rs`; the soft bound of logits in `softcap.rs`.

mod gelu;
mod softcap;

pub use gelu::{Gelu, gelu, gelu_with};
pub use softcap::{softcap, softcap_with};

use crate::parts::Parts;
use crate::pool::run_rows;
use crate::simd::{Kernel, Map, Simd, run, sigmoid, zip_into};
use crate::{Isa, Pool};
use std::ops::Range;

/// The activation on the gate half of a gated feed-forward layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gate {
    /// `silu(gate) * up`
    #[default]
    Silu,
    /// `gelu_tanh(gate) * up`
    GeluTanh,
    /// `g * sigmoid(1.702 g) * (u + 1)` with `g = min(gate, 7)` and `u` between -7 and 7
    /// (OpenAI 2025, gpt-oss)
    ClampedSwiglu,
}

/// `gate = activation(gate) * up`, element by element.
pub fn gate_mul(pool: &Pool, kind: Gate, gate: &mut [f32], up: &[f32]) {
    gate_mul_with(Isa::best(), pool, kind, gate, up);
}

/// [`gate_mul`] with a chosen instruction set.
pub fn gate_mul_with(isa: Isa, pool: &Pool, kind: Gate, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up have one shape");
    let len = gate.len();
    let gate = Parts::new(gate);
    run_pieces(pool, len, &|piece| {
        // SAFETY: pieces do not overlap.
        let gate = unsafe { gate.take(piece.clone()) };
        run(isa, GateMul { kind, gate, up: &up[piece] });
    });
}

/// `x += y`, element by element.
pub fn add(pool: &Pool, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "x and y have one shape");
    let len = x.len();
    let x = Parts::new(x);
    run_pieces(pool, len, &|piece| {
        // SAFETY: pieces do not overlap.
        let x = unsafe { x.take(piece.clone()) };
        add_to(x, &y[piece]);
    });
}

/// `x *= factor`, element by element.
pub fn scale(pool: &Pool, x: &mut [f32], factor: f32) {
    let len = x.len();
    let x = Parts::new(x);
    run_pieces(pool, len, &|piece| {
        // SAFETY: pieces do not overlap.
        let x = unsafe { x.take(piece) };
        x.iter_mut().for_each(|x| *x *= factor);
    });
}

/// `x[r] += bias` for every row; `x` is `[rows, dim]`, `bias` is `[dim]`.
pub fn add_bias(pool: &Pool, x: &mut [f32], bias: &[f32]) {
    let dim = bias.len();
    let rows = x.len() / dim.max(1);
    assert_eq!(x.len(), rows * dim, "x is [rows, dim]");
    let x = Parts::new(x);
    run_rows(pool, rows, dim, &|range| {
        for row in range {
            // SAFETY: every row is visited by one task only.
            add_to(unsafe { x.take(row * dim..(row + 1) * dim) }, bias);
        }
    });
}

/// One addition per element: every instruction set gives the same bits.
fn add_to(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Element-wise work, cut without regard to rows. A piece is a multiple of the vector width.
fn run_pieces(pool: &Pool, len: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    const PIECE: usize = 1024;
    run_rows(pool, len.div_ceil(PIECE), PIECE, &|pieces| {
        f(pieces.start * PIECE..len.min(pieces.end * PIECE));
    });
}

struct GateMul<'a> {
    kind: Gate,
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for GateMul<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.kind {
            Gate::Silu => zip_into(simd, self.gate, self.up, Silu),
            Gate::GeluTanh => zip_into(simd, self.gate, self.up, GeluTanh),
            Gate::ClampedSwiglu => zip_into(simd, self.gate, self.up, ClampedSwiglu),
        }
    }
}

struct Silu;

impl Map for Silu {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, gate: S::V, up: S::V) -> S::V {
        simd.mul(simd.mul(gate, sigmoid(simd, gate)), up)
    }
}

struct GeluTanh;

impl Map for GeluTanh {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, gate: S::V, up: S::V) -> S::V {
        simd.mul(gelu_tanh(simd, gate), up)
    }
}

struct ClampedSwiglu;

impl Map for ClampedSwiglu {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, gate: S::V, up: S::V) -> S::V {
        let (low, high) = (simd.splat(-7.0), simd.splat(7.0));
        let gate = simd.if_less(high, gate, high, gate);
        let up = simd.if_less(high, up, high, simd.if_less(up, low, low, up));
        let open = sigmoid(simd, simd.mul(simd.splat(1.702), gate));
        simd.mul(simd.mul(gate, open), simd.add(up, simd.splat(1.0)))
    }
}

#[inline(always)]
fn gelu_tanh<S: Simd>(simd: S, x: S::V) -> S::V {
    let twice = simd.splat(2.0 * 0.797_884_6); // 2 sqrt(2 / pi)
    let cubic = simd.mul(simd.splat(0.044_715), simd.mul(x, x));
    let inner = simd.mul(twice, simd.mul_add(cubic, x, x));
    simd.mul(x, sigmoid(simd, inner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    fn truth(kind: Gate, gate: f32, up: f32) -> f64 {
        let x = f64::from(gate);
        let activated = match kind {
            Gate::Silu => x / (1.0 + (-x).exp()),
            Gate::ClampedSwiglu => {
                let (x, up) = (x.min(7.0), f64::from(up).clamp(-7.0, 7.0));
                return x / (1.0 + (-1.702 * x).exp()) * (up + 1.0);
            }
            Gate::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
        };
        activated * f64::from(up)
    }

    const GATES: [Gate; 3] = [Gate::Silu, Gate::GeluTanh, Gate::ClampedSwiglu];

    #[test]
    fn gates_are_near_the_truth_and_equal_to_scalar() {
        let pool = Pool::new(3);
        for &len in cases::LENGTHS.iter().chain(&[100_003]) {
            let gate: Vec<f32> = cases::randoms(len, 10).iter().map(|x| x * 12.0).collect();
            let up: Vec<f32> = cases::randoms(len, 11).iter().map(|x| x * 9.0).collect();
            for kind in GATES {
                let mut scalar = gate.clone();
                gate_mul_with(Isa::Scalar, &Pool::new(1), kind, &mut scalar, &up);
                for i in 0..len {
                    let truth = truth(kind, gate[i], up[i]);
                    let error = (truth - f64::from(scalar[i])).abs();
                    assert!(error < 1e-6 * (1.0 + truth.abs()), "{kind:?}({}) {error:e}", gate[i]);
                }
                for isa in Isa::available() {
                    let mut out = gate.clone();
                    gate_mul_with(*isa, &pool, kind, &mut out, &up);
                    cases::assert_same_bits(&scalar, &out, isa.name());
                }
            }
        }
    }

    #[test]
    fn extreme_gates_stay_finite() {
        let pool = Pool::new(1);
        let gate = [-1e30, -100.0, -0.0, 0.0, 100.0, 1e18];
        for isa in Isa::available() {
            for kind in GATES {
                let mut out = gate;
                gate_mul_with(*isa, &pool, kind, &mut out, &[1.0; 6]);
                assert!(out.iter().all(|x| x.is_finite()), "{kind:?} {out:?}");
                let open = if kind == Gate::ClampedSwiglu { 14.0 } else { 100.0 };
                assert!((out[4] - open).abs() < 1e-3, "{kind:?} {out:?}");
            }
        }
    }

    #[test]
    fn scaled() {
        for &len in cases::LENGTHS.iter().chain(&[100_003]) {
            let x = cases::randoms(len, 15);
            let expected: Vec<f32> = x.iter().map(|x| x * 48.5).collect();
            let mut got = x;
            scale(&Pool::new(2), &mut got, 48.5);
            cases::assert_same_bits(&expected, &got, "scale");
        }
    }

    #[test]
    fn additions() {
        let pool = Pool::new(2);
        for &len in cases::LENGTHS.iter().chain(&[100_003]) {
            let (x, y) = (cases::randoms(len, 13), cases::randoms(len, 14));
            let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            let mut got = x.clone();
            add(&pool, &mut got, &y);
            cases::assert_same_bits(&expected, &got, "add");
            let (mut got, three) = ([x.clone(), x.clone(), x].concat(), expected.repeat(3));
            add_bias(&pool, &mut got, &y);
            cases::assert_same_bits(&three, &got, "add_bias");
        }
    }
}
