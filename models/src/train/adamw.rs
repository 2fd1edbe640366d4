//! AdamW (Loshchilov and Hutter 2019): Adam with weight decay beside the gradient, not in it.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::Result;

/// What does not change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct AdamWOptions {
    /// Memory of the gradient.
    pub beta1: f64,
    /// Memory of its square.
    pub beta2: f64,
    /// Keeps the division finite.
    pub eps: f64,
    /// Pull towards 0, times the learning rate; matrices only.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.98, eps: 1e-9, weight_decay: 0.05 }
    }
}

/// Variables with their moments.
pub struct AdamW {
    options: AdamWOptions,
    slots: Vec<Slot>,
    step: i32,
}

struct Slot {
    var: Var,
    mean: Tensor,
    square: Tensor,
}

impl AdamW {
    /// Moments of 0 for every variable.
    pub fn new(vars: Vec<Var>, options: AdamWOptions) -> Result<Self> {
        let slot = |var: Var| {
            let mean = var.as_tensor().zeros_like()?.detach();
            Ok(Slot { square: mean.clone(), mean, var })
        };
        Ok(Self { slots: vars.into_iter().map(slot).collect::<Result<_>>()?, options, step: 0 })
    }

    /// Moves every variable that has a gradient; `scale` multiplies all gradients (clipping).
    pub fn step(&mut self, grads: &GradStore, rate: f64, scale: f64) -> Result<()> {
        let AdamWOptions { beta1, beta2, eps, weight_decay } = self.options;
        self.step += 1;
        let (unbias1, unbias2) = (1.0 - beta1.powi(self.step), 1.0 - beta2.powi(self.step));
        for Slot { var, mean, square } in &mut self.slots {
            let Some(grad) = grads.get(var.as_tensor()) else { continue };
            let grad = (grad.detach() * scale)?;
            *mean = ((&*mean * beta1)? + (&grad * (1.0 - beta1))?)?;
            *square = ((&*square * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
            let down = ((&*square / unbias2)?.sqrt()? + eps)?;
            let step = ((&*mean / unbias1)? / down)?;
            let decay = if var.rank() > 1 { weight_decay } else { 0.0 };
            let kept = (var.as_tensor().detach() * (1.0 - rate * decay))?;
            var.set(&(kept - (step * rate)?)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn the_first_step_is_the_rate_against_the_sign() {
        let var = Var::from_vec(vec![1f32, -2.0], 2, &Device::Cpu).unwrap();
        let mut adam = AdamW::new(vec![var.clone()], AdamWOptions::default()).unwrap();
        let loss = var.as_tensor().sqr().unwrap().sum_all().unwrap();
        adam.step(&loss.backward().unwrap(), 0.1, 0.5).unwrap();
        let got: Vec<f32> = var.to_vec1().unwrap();
        assert!((got[0] - 0.9).abs() < 1e-5 && (got[1] + 1.9).abs() < 1e-5, "{got:?}");
    }

    #[test]
    fn matrices_decay_and_vectors_do_not() {
        let options = AdamWOptions { weight_decay: 1.0, ..AdamWOptions::default() };
        for (shape, want) in [(vec![1, 1], 0.9f32), (vec![1], 1.0)] {
            let var = Var::ones(shape, DType::F32, &Device::Cpu).unwrap();
            let mut adam = AdamW::new(vec![var.clone()], options).unwrap();
            let loss = (var.as_tensor() * 1e-15).unwrap().sum_all().unwrap();
            adam.step(&loss.backward().unwrap(), 0.1, 1.0).unwrap();
            let got: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
            assert!((got[0] - want).abs() < 1e-6, "{got:?}");
        }
    }
}
