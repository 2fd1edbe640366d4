//! The MLP as a mixture of experts: a router scores them for every row, and the row is the weighed
//! sum of what the few highest make of it.
//!
//! Shazeer et al. 2017; Fedus et al. 2022. No row is dropped, and every row is computed alone.

use super::linear::Linear;
use crate::Result;
use crate::backend::{Backend, Experts};
use crate::config::ModelConfig;
use crate::weights::{Loader, Role};

/// Router and experts of one layer.
pub struct MixtureOfExperts<B: Backend> {
    /// `[experts, hidden]`
    pub router: Linear<B>,
    /// `[ffn, hidden]` and `[hidden, ffn]` of each.
    pub experts: Experts<B::Matrix>,
}

impl<B: Backend> MixtureOfExperts<B> {
    /// Takes the weights of a layer.
    pub fn load(c: &ModelConfig, layer: usize, loader: &mut Loader<'_>, ops: &B) -> Result<Self> {
        let routing = c.experts.expect("a layer with experts; this is a bug");
        let router = Linear::load(loader, ops, Role::Router(layer))?;
        let mut all = |role: fn(usize, usize) -> Role| {
            let roles: Vec<Role> = (0..routing.count).map(|expert| role(layer, expert)).collect();
            loader.matrices(&roles, |sources| ops.matrices(sources))
        };
        let experts = Experts {
            gate: all(Role::ExpertGate)?,
            up: all(Role::ExpertUp)?,
            down: all(Role::ExpertDown)?,
            routing,
            activation: c.knobs.gate,
        };
        Ok(Self { router, experts })
    }

    /// `[T, hidden]` to `[T, hidden]`.
    pub fn forward(&self, ops: &B, x: &B::Rows) -> Result<B::Rows> {
        let scores = ops.scores(x, (&self.router.weight, self.router.bias.as_ref()))?;
        ops.reduce(ops.experts(x, scores, &self.experts)?)
    }
}
