//! The gated MLP: `down(activation(gate(x)) * up(x))` (Shazeer 2020, SwiGLU and GEGLU).

use super::linear::Linear;
use crate::Result;
use crate::backend::{Backend, Gate};
use crate::batch::LoraRows;

/// MLP of one layer.
pub struct Mlp<B: Backend> {
    /// `[ffn, hidden]`
    pub gate: Linear<B>,
    /// `[ffn, hidden]`
    pub up: Linear<B>,
    /// `[hidden, ffn]`
    pub down: Linear<B>,
    /// What opens the gate.
    pub activation: Gate,
}

impl<B: Backend> Mlp<B> {
    /// `[T, hidden]` to `[T, hidden]`.
    pub fn forward(&self, ops: &B, x: &B::Rows, lora: &LoraRows) -> Result<B::Rows> {
        let [gate, up] = Linear::forward_many(ops, x, [&self.gate, &self.up], lora)?;
        let opened = ops.gate_mul(self.activation, gate, &up)?;
        ops.reduce(self.down.forward(ops, &opened, lora)?)
    }
}
