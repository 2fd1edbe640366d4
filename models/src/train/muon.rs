//! Muon (Jordan et al. 2024): momentum whose matrix is made orthogonal before it moves a weight,
//! so that rare directions of a gradient move as far as frequent ones. For the matrices inside a
//! decoder; embeddings and vectors belong to [`AdamW`](super::AdamW).
//!
//! The step has the size that Adam's would have (0.2 of the rate in each element: Liu et al. 2025,
//! "Muon is scalable"), so one schedule serves both.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::Result;

/// What does not change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct MuonOptions {
    /// Memory of the gradient.
    pub momentum: f64,
    /// Pull towards 0, times the learning rate.
    pub weight_decay: f64,
}

impl Default for MuonOptions {
    fn default() -> Self {
        Self { momentum: 0.95, weight_decay: 0.05 }
    }
}

/// Matrices with their momentum.
pub struct Muon {
    options: MuonOptions,
    slots: Vec<Slot>,
}

struct Slot {
    var: Var,
    momentum: Tensor,
}

impl Muon {
    /// No momentum yet; every variable is a matrix.
    pub fn new(vars: Vec<Var>, options: MuonOptions) -> Result<Self> {
        let slot = |var: Var| Ok(Slot { momentum: var.as_tensor().zeros_like()?.detach(), var });
        Ok(Self { slots: vars.into_iter().map(slot).collect::<Result<_>>()?, options })
    }

    /// Moves every matrix that has a gradient, on `threads` threads; `scale` multiplies all
    /// gradients (clipping).
    pub fn step(&mut self, grads: &GradStore, rate: f64, scale: f64, threads: usize) -> Result<()> {
        let options = self.options;
        let share = self.slots.len().div_ceil(threads.max(1)).max(1);
        std::thread::scope(|scope| {
            let work = |slots: &mut [Slot]| {
                slots.iter_mut().try_for_each(|slot| slot.step(grads, rate, scale, options))
            };
            let mut parts = self.slots.chunks_mut(share);
            let first = parts.next();
            let others: Vec<_> = parts.map(|slots| scope.spawn(move || work(slots))).collect();
            first.map_or(Ok(()), work)?;
            for other in others {
                other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok(())
        })
    }
}

impl Slot {
    fn step(
        &mut self,
        grads: &GradStore,
        rate: f64,
        scale: f64,
        options: MuonOptions,
    ) -> Result<()> {
        let Some(grad) = grads.get(self.var.as_tensor()) else { return Ok(()) };
        let beta = options.momentum;
        let fresh = (grad.detach() * (scale * (1.0 - beta)))?;
        self.momentum = ((&self.momentum * beta)? + &fresh)?;
        // Nesterov's: the momentum as it will be after the next like gradient.
        let ahead = ((&self.momentum * beta)? + fresh)?;
        let (rows, columns) = ahead.dims2()?;
        let size = 0.2 * (rows.max(columns) as f64).sqrt();
        let kept = (self.var.as_tensor().detach() * (1.0 - rate * options.weight_decay))?;
        Ok(self.var.set(&(kept - (orthogonal(&ahead)? * (rate * size))?)?)?)
    }
}

/// The nearest matrix whose singular values are all about 1 (0.7 to 1.2), by five Newton-Schulz
/// steps of the fifth order with the coefficients of Jordan et al.
fn orthogonal(x: &Tensor) -> Result<Tensor> {
    const A: f64 = 3.4445;
    const B: f64 = -4.7750;
    const C: f64 = 2.0315;
    let (rows, columns) = x.dims2()?;
    let tall = rows > columns;
    let x = if tall { x.t()?.contiguous()? } else { x.clone() };
    // Stays on the device: nothing waits for it.
    let length = (x.sqr()?.sum_all()?.sqrt()? + 1e-7)?;
    let mut x = x.broadcast_div(&length)?;
    for _ in 0..5 {
        let square = x.matmul(&x.t()?)?;
        let mixed = ((&square * B)? + (square.matmul(&square)? * C)?)?;
        x = ((&x * A)? + mixed.matmul(&x)?)?;
    }
    Ok(if tall { x.t()?.contiguous()? } else { x })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn singular_values_become_about_one() {
        for (rows, columns) in [(3, 8), (8, 3), (5, 5)] {
            let x = Tensor::randn(0f32, 3.0, (rows, columns), &Device::Cpu).unwrap();
            let x = orthogonal(&x).unwrap();
            assert_eq!(x.dims2().unwrap(), (rows, columns));
            let small =
                if rows < columns { x.matmul(&x.t().unwrap()) } else { x.t().unwrap().matmul(&x) };
            let squares: Vec<Vec<f32>> = small.unwrap().to_vec2().unwrap();
            let trace: f32 = (0..squares.len()).map(|i| squares[i][i]).sum();
            let mean = trace / squares.len() as f32;
            assert!((0.4..1.5).contains(&mean), "{rows} x {columns}: {mean}");
        }
    }

    #[test]
    fn a_step_goes_against_the_gradient_as_far_as_the_rate_says() {
        let var = Var::from_vec(vec![1f32, 0.0, 0.0, 4.0], (2, 2), &Device::Cpu).unwrap();
        let options = MuonOptions { weight_decay: 0.0, ..MuonOptions::default() };
        let mut muon = Muon::new(vec![var.clone()], options).unwrap();
        let grads = (var.as_tensor().sqr().unwrap() * 0.5).unwrap().sum_all().unwrap();
        muon.step(&grads.backward().unwrap(), 0.1, 1.0, 2).unwrap();
        let got: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
        // The gradient is the matrix itself; both of its directions move alike, 0.1 * 0.2 * 2^0.5.
        for (got, was) in [(got[0], 1.0), (got[3], 4.0)] {
            let moved = (was - got) / (0.1 * 0.2 * 2f32.sqrt());
            assert!((0.6..1.3).contains(&moved), "{moved}");
        }
        assert!(got[1].abs() < 1e-6 && got[2].abs() < 1e-6);
    }
}
