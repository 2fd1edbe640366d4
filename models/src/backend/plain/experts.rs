//! A mixture of experts where gradients flow through experts and weights.

use candle_core::{DType, Tensor};
use hearth_kernels::experts::route;

use super::Plain;
use crate::Result;
use crate::backend::{Backend, Experts};

impl Plain {
    /// Which experts a row has is decided by numbers; how much they weigh carries gradients.
    pub(super) fn mixture(
        &self,
        x: &Tensor,
        scores: Tensor,
        experts: &Experts<Tensor, Tensor>,
    ) -> Result<Tensor> {
        let (t, count) = scores.dims2()?;
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let scores = scores.to_dtype(wide)?;
        let top = scores.max_keepdim(1)?.detach();
        let mut weights = scores.broadcast_sub(&top)?.exp()?;
        let routes = route(&self.read(scores)?, &experts.routing);
        let mut of_total = weights.clone();
        if experts.routing.normalized {
            let mut chosen = vec![0_f32; t * count];
            for (expert, places) in &routes.groups {
                for &row in &routes.rows[places.clone()] {
                    chosen[row as usize * count + expert] = 1.0;
                }
            }
            let chosen = Tensor::from_vec(chosen, (t, count), &self.device)?.to_dtype(wide)?;
            of_total = (of_total * chosen)?;
        }
        weights = weights.broadcast_div(&of_total.sum_keepdim(1)?)?;
        let mut out = Tensor::zeros_like(x)?;
        for (expert, places) in routes.groups {
            let rows = Tensor::new(&routes.rows[places], &self.device)?;
            let own = x.index_select(&rows, 0)?;
            let bias = |part: usize, n: usize| -> Result<Option<Tensor>> {
                let all = experts.biases.as_ref().map(|all| &all[part]);
                Ok(all.map(|all| all.narrow(0, expert * n, n)).transpose()?)
            };
            let (gate, up) = (&experts.gate[expert], &experts.up[expert]);
            let ffn = gate.dims2()?.0;
            let (bias0, bias1) = (bias(0, ffn)?, bias(1, ffn)?);
            let [gate, up] = self.linear(&own, [(gate, bias0.as_ref()), (up, bias1.as_ref())])?;
            let opened = self.gate_mul(experts.activation, gate, &up)?;
            let bias2 = bias(2, x.dims2()?.1)?;
            let [brought] = self.linear(&opened, [(&experts.down[expert], bias2.as_ref())])?;
            let weight = weights.narrow(1, expert, 1)?.contiguous()?.index_select(&rows, 0)?;
            let weighed = brought.broadcast_mul(&weight.to_dtype(self.dtype)?)?;
            out = out.index_add(&rows, &weighed, 0)?;
        }
        Ok(out)
    }
}
