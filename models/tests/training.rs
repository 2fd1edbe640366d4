//! The trainer: gradients are those of the loss, parts add up, and a small model learns.

use hearth_models::train::{Batch, Example, Rng, Trainer, random};
use hearth_models::weights::Weights;
use hearth_models::{Compute, ForwardBatch, KvStore, Model, ModelConfig, tiny};

use candle_core::{DType, Device, Var};
use hearth_models::backend::Plain;
use hearth_models::config::Knobs;
use hearth_models::decoder::Decoder;
use hearth_models::weights::Loader;

fn config() -> ModelConfig {
    let mut config = tiny::config();
    (config.family, config.vocab_len) = ("qwen3", 48);
    (config.hidden_len, config.ffn_len) = (32, 64);
    (config.head_count, config.kv_head_count, config.head_dim, config.rope.dim) = (4, 2, 16, 16);
    config.knobs = Knobs { qk_norm: true, ..Knobs::default() };
    config
}

fn weights(seed: u64) -> Weights {
    let bytes = random(&config(), seed).expect("a random model");
    Weights::from_bytes("random.gguf", bytes).expect("a GGUF file")
}

fn trainer(seed: u64) -> Trainer {
    let compute = Compute::Plain(Device::Cpu, DType::F32);
    Trainer::new(config(), &weights(seed), &compute, Default::default()).expect("a trainer")
}

fn decoder(seed: u64) -> Decoder<Plain> {
    let (weights, mut progress) = (weights(seed), |_| {});
    let config = config();
    let mut loader = Loader::new(&weights, &config, &mut progress);
    Decoder::load(config.clone(), &mut loader, Plain::reference().trainable()).expect("a decoder")
}

/// `count` sequences of `len` random tokens; the second half repeats the first and is learned.
fn copies(rng: &mut Rng, count: usize, len: usize) -> Vec<Example> {
    let copy = |rng: &mut Rng| {
        let half: Vec<u32> = (0..len / 2).map(|_| 1 + rng.below(47) as u32).collect();
        let weights = (0..len).map(|i| if i > len / 2 { 1.0 } else { 0.0 }).collect();
        Example { tokens: [half.clone(), half].concat(), weights }
    };
    (0..count).map(|_| copy(rng)).collect()
}

#[test]
fn sequences_of_one_length_attend_together_as_they_do_alone() {
    let (decoder, mut rng) = (decoder(1), Rng::new(2));
    let examples = copies(&mut rng, 3, 10);
    let mut batch = Batch::new(&examples).forward;
    batch.logit_rows = (0..30).collect();
    assert!(batch.is_even());
    let together = decoder.forward(&batch, &mut KvStore::Nothing).expect("logits");
    let alone: Vec<f32> = (examples.iter())
        .flat_map(|e| {
            let batch = ForwardBatch::whole(&e.tokens, 0, 16);
            decoder.forward(&batch, &mut KvStore::Nothing).expect("logits")
        })
        .collect();
    for (i, (a, b)) in together.iter().zip(&alone).enumerate() {
        assert!((a - b).abs() < 1e-4, "logit {i}: {a} together, {b} alone");
    }
}

#[test]
fn every_weight_has_the_gradient_of_the_loss() {
    let (decoder, mut rng) = (decoder(3), Rng::new(4));
    let batch = Batch::new(&copies(&mut rng, 2, 8)).forward;
    let value = || {
        let logits = decoder.logits(&batch, &mut KvStore::Nothing).expect("logits");
        logits.sin().and_then(|x| x.sum_all()).expect("a scalar")
    };
    let grads = value().backward().expect("gradients");
    for named in decoder.tensors() {
        let var = Var::from_tensor(&named.tensor).expect("a variable");
        let shape = var.shape().clone();
        let slope = grads.get(&named.tensor).unwrap_or_else(|| panic!("{:?}: none", named.role));
        let slope: Vec<f32> = slope.flatten_all().and_then(|g| g.to_vec1()).expect("numbers");
        let start: Vec<f32> = var.flatten_all().and_then(|g| g.to_vec1()).expect("numbers");
        // Along the sign of the gradient, so that what is measured is far above the noise of f32.
        let step = 1e-3 / (start.len() as f32).sqrt();
        let at = |sign: f32| {
            let moved: Vec<f32> = (start.iter().zip(&slope))
                .map(|(x, g)| x + sign * step * g.signum() * f32::from(u8::from(*g != 0.0)))
                .collect();
            var.set(&candle_core::Tensor::from_vec(moved, &shape, &Device::Cpu).expect("a tensor"))
                .expect("set");
            f64::from(value().to_scalar::<f32>().expect("a number"))
        };
        let measured = (at(1.0) - at(-1.0)) / (2.0 * f64::from(step));
        at(0.0);
        let expected: f64 = slope.iter().map(|g| f64::from(g.abs())).sum();
        let error = (measured - expected).abs() / expected.max(1e-3);
        assert!(error < 0.05, "{:?}: {expected} computed, {measured} measured", named.role);
    }
}

#[test]
fn a_batch_in_parts_teaches_what_it_teaches_whole() {
    let examples = copies(&mut Rng::new(5), 4, 12);
    let losses = [1, 2, 4].map(|parts: usize| {
        let mut trainer = trainer(6);
        let batch: Vec<Batch> = examples.chunks(4 / parts).map(Batch::new).collect();
        (0..5).map(|_| trainer.step(&batch, 1e-2).expect("a step").loss).collect::<Vec<_>>()
    });
    for parts in &losses[1..] {
        for (whole, cut) in losses[0].iter().zip(parts) {
            assert!((whole - cut).abs() < 1e-3, "{:?} and {parts:?}", losses[0]);
        }
    }
}

#[test]
fn a_small_model_learns_its_batch() {
    let mut trainer = trainer(7);
    let batch = [Batch::new(&copies(&mut Rng::new(8), 4, 12))];
    let before = trainer.loss(&batch).expect("a loss");
    assert!((before - 48f64.ln()).abs() < 0.3, "it knows nothing yet: {before}");
    for _ in 0..150 {
        trainer.step(&batch, 1e-2).expect("a step");
    }
    let after = trainer.loss(&batch).expect("a loss");
    assert!(after < 0.1, "from {before} to {after}");
}

#[test]
fn nothing_to_learn_from_is_an_error() {
    assert!(trainer(9).step(&[], 1e-3).is_err());
}
