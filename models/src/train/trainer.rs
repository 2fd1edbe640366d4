//! One optimiser step: parts of a batch forward and backward on their threads, gradients added,
//! clipped, applied.

use std::thread;

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Tensor, Var};

use super::adamw::{AdamW, AdamWOptions};
use super::data::Batch;
use super::muon::{Muon, MuonOptions};
use crate::backend::Plain;
use crate::decoder::{Decoder, NamedTensor};
use crate::weights::{Loader, Role, Weights};
use crate::{Compute, Error, KvStore, Model, ModelConfig, Result};

/// A decoder that learns.
pub struct Trainer {
    decoder: Decoder<Plain>,
    vars: Vec<Var>,
    /// Moves the matrices between embedding and head.
    muon: Muon,
    /// Moves everything else.
    adamw: AdamW,
    /// Gradients longer than this (over all variables) are shortened to it.
    pub clip: f64,
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Mean loss, in nats for a token of weight 1.
    pub loss: f64,
    /// Length of the gradient before clipping.
    pub gradient_norm: f64,
}

impl Trainer {
    /// Starts from `weights` with an optimiser that remembers nothing: give the schedule a few
    /// steps of warm-up.
    pub fn new(
        config: ModelConfig,
        weights: &Weights,
        compute: &Compute,
        (adamw, muon): (AdamWOptions, MuonOptions),
    ) -> Result<Self> {
        let mut progress = |_| {};
        let mut loader = Loader::new(weights, &config, &mut progress);
        let decoder = Decoder::load(config.clone(), &mut loader, compute.trainable()?)?;
        let (mut inner, mut outer) = (Vec::new(), Vec::new());
        for named in decoder.tensors() {
            let edge = matches!(named.role, Role::Embedding | Role::Head);
            let vars = if edge || named.tensor.rank() != 2 { &mut outer } else { &mut inner };
            vars.push(Var::from_tensor(&named.tensor)?);
        }
        let vars = [inner.clone(), outer.clone()].concat();
        let (muon, adamw) = (Muon::new(inner, muon)?, AdamW::new(outer, adamw)?);
        Ok(Self { decoder, vars, muon, adamw, clip: 1.0 })
    }

    /// Every weight as it is now.
    pub fn tensors(&self) -> Vec<NamedTensor> {
        self.decoder.tensors()
    }

    /// What it is.
    pub fn config(&self) -> &ModelConfig {
        self.decoder.config()
    }

    /// Learns from one batch, each of its parts on a thread of its own.
    pub fn step(&mut self, parts: &[Batch], rate: f64) -> Result<StepReport> {
        let total: f32 = parts.iter().map(Batch::weight).sum();
        let backward = |part: &Batch| -> Result<(f64, GradStore)> {
            let loss = (loss_sum(&self.decoder, part)? / f64::from(total))?;
            Ok((f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?), loss.backward()?))
        };
        let mut done = on_threads(parts, backward)?.into_iter();
        let Some((mut loss, mut grads)) = done.next() else {
            return Err(Error::Batch("there is nothing to learn from".into()));
        };
        for (part_loss, part_grads) in done {
            loss += part_loss;
            for var in &self.vars {
                let Some(grad) = part_grads.get(var) else { continue };
                let sum = match grads.get(var) {
                    Some(other) => (other + grad)?,
                    None => grad.clone(),
                };
                grads.insert(var, sum);
            }
        }
        let gradient_norm = norm(&self.vars, &grads)?;
        if !(loss.is_finite() && gradient_norm.is_finite()) {
            return Err(Error::Batch(format!("the loss is {loss}; lower the learning rate")));
        }
        let scale = (self.clip / gradient_norm.max(1e-12)).min(1.0);
        self.muon.step(&grads, rate, scale, parts.len())?;
        self.adamw.step(&grads, rate, scale)?;
        Ok(StepReport { loss, gradient_norm })
    }

    /// Mean loss on batches that are not learned from.
    pub fn loss(&self, batches: &[Batch]) -> Result<f64> {
        let sum = |batch: &Batch| -> Result<f64> {
            Ok(f64::from(loss_sum(&self.decoder, batch)?.to_scalar::<f32>()?))
        };
        let losses = batches.iter().map(sum).collect::<Result<Vec<_>>>()?;
        let weight: f32 = batches.iter().map(Batch::weight).sum();
        Ok(losses.iter().sum::<f64>() / f64::from(weight))
    }
}

/// Cross-entropy of every target, weighted and added up. A scalar.
fn loss_sum(decoder: &Decoder<Plain>, batch: &Batch) -> Result<Tensor> {
    let logits = decoder.logits(&batch.forward, &mut KvStore::Nothing)?.to_dtype(DType::F32)?;
    let device = logits.device();
    let targets = Tensor::new(batch.targets.as_slice(), device)?.unsqueeze(1)?;
    let weights = Tensor::new(batch.weights.as_slice(), device)?;
    let top = logits.max_keepdim(D::Minus1)?.detach();
    let logits = logits.broadcast_sub(&top)?;
    let total = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let losses = (total - logits.gather(&targets, 1)?)?.squeeze(1)?;
    Ok((losses * weights)?.sum_all()?)
}

/// Runs `work` on every part at once; the first on this thread.
fn on_threads<T: Send>(
    parts: &[Batch],
    work: impl Fn(&Batch) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let Some((first, rest)) = parts.split_first() else { return Ok(Vec::new()) };
    thread::scope(|scope| {
        let work = &work;
        let others: Vec<_> = rest.iter().map(|part| scope.spawn(move || work(part))).collect();
        let mut done = vec![work(first)?];
        for other in others {
            done.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(done)
    })
}

/// Euclidean length of all gradients together.
fn norm(vars: &[Var], grads: &GradStore) -> Result<f64> {
    // Added up on the device: one number comes back, not one for each variable.
    let mut sum: Option<Tensor> = None;
    for grad in vars.iter().filter_map(|var| grads.get(var)) {
        let square = grad.detach().sqr()?.sum_all()?;
        sum = Some(match sum {
            Some(sum) => (sum + square)?,
            None => square,
        });
    }
    let sum = sum.map_or(Ok(0.0), |sum| sum.to_scalar::<f32>())?;
    Ok(f64::from(sum).sqrt())
}
