//! The gated MLP: `down(activation(gate(x)) * up(x))` (Shazeer 2020, SwiGLU and GEGLU).

use super::experts::MixtureOfExperts;
use super::linear::Linear;
use crate::Result;
use crate::backend::{Backend, Gate};
use crate::batch::LoraRows;
use crate::config::ModelConfig;
use crate::weights::{Loader, Role};

/// What stands behind attention.
pub enum FeedForward<B: Backend> {
    /// One MLP for every row.
    Dense(Mlp<B>),
    /// A few of many.
    Experts(MixtureOfExperts<B>),
}

impl<B: Backend> FeedForward<B> {
    /// Takes the weights of a layer.
    pub fn load(c: &ModelConfig, layer: usize, loader: &mut Loader<'_>, ops: &B) -> Result<Self> {
        if c.experts.is_some() {
            return Ok(Self::Experts(MixtureOfExperts::load(c, layer, loader, ops)?));
        }
        let mut linear = |role| Linear::load(loader, ops, role);
        Ok(Self::Dense(Mlp {
            gate: linear(Role::Gate(layer))?,
            up: linear(Role::Up(layer))?,
            down: linear(Role::Down(layer))?,
            activation: c.knobs.gate,
        }))
    }

    /// `[T, hidden]` to `[T, hidden]`.
    pub fn forward(&self, ops: &B, x: &B::Rows, lora: &LoraRows) -> Result<B::Rows> {
        match self {
            Self::Dense(mlp) => mlp.forward(ops, x, lora),
            Self::Experts(experts) => experts.forward(ops, x),
        }
    }

    /// The one MLP, where there is one.
    pub fn dense(&mut self) -> Option<&mut Mlp<B>> {
        match self {
            Self::Dense(mlp) => Some(mlp),
            Self::Experts(_) => None,
        }
    }
}

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
