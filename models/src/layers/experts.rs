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
    /// `[ffn, hidden]` and `[hidden, ffn]` of each, and their biases.
    pub experts: Experts<B::Matrix, B::Vector>,
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
        let (gate, up) = (all(Role::ExpertGate)?, all(Role::ExpertUp)?);
        let down = all(Role::ExpertDown)?;
        let experts = Experts {
            gate,
            up,
            down,
            biases: biases(c, layer, loader, ops)?,
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

/// What an expert's part is for: its layer, and its number.
type ExpertRole = fn(usize, usize) -> Role;

/// Biases of gate, up and down of every expert of a layer.
fn biases<B: Backend>(
    c: &ModelConfig,
    layer: usize,
    loader: &mut Loader<'_>,
    ops: &B,
) -> Result<Option<[Vec<B::Vector>; 3]>> {
    const PARTS: [ExpertRole; 3] = [Role::ExpertGate, Role::ExpertUp, Role::ExpertDown];
    if !c.knobs.mlp_bias {
        return Ok(None);
    }
    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for (role, all) in PARTS.into_iter().zip(&mut all) {
        for expert in 0..c.experts.map_or(0, |routing| routing.count) {
            let role = role(layer, expert);
            // Ranks after the first add nothing to a sum.
            let bias = loader.bias(role)?.unwrap_or_else(|| vec![0.0; role.shape(c)[0]]);
            all.push(bias);
        }
    }
    let [gate, up, down] = all;
    Ok(Some([ops.vectors(gate)?, ops.vectors(up)?, ops.vectors(down)?]))
}
