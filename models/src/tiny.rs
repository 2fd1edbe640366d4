//! Random models in memory, for tests and benchmarks: every family, every weight format, no file.
//!
//! Values depend on the seed and the tensor's name alone. They mean nothing, but they exercise
//! every layer and every batch shape in microseconds.

use std::io;
use std::sync::Arc;

use hearth_kernels::Pool;
use hearth_kernels::lora::{Factors, Float};
use hearth_kernels::quant::{self, DType};

use crate::adapter::{self, Adapter, Delta};
use crate::config::{Knobs, ModelConfig, RopeConfig, RopeScaling};
use crate::open::Compute;
use crate::weights::gguf_writer::GgufWriter;
use crate::weights::{Format, Layout, Loader, Role, Weights};
use crate::{Error, Model, Result};

/// A small Llama with grouped heads: two layers, 8 query heads, 2 key heads, 512 tokens.
pub fn config() -> ModelConfig {
    ModelConfig {
        family: "llama",
        hidden_len: 256,
        ffn_len: 512,
        experts: None,
        layer_count: 2,
        head_count: 8,
        kv_head_count: 2,
        head_dim: 32,
        vocab_len: 512,
        context_len: 1024,
        norm_eps: 1e-5,
        rope: RopeConfig { base: 10_000.0, dim: 32, scaling: RopeScaling::None },
        local_rope: None,
        windows: vec![None; 2],
        knobs: Knobs::default(),
        tied: true,
        bos_id: Some(1),
        eos_ids: vec![2],
    }
}

/// Our kernels on so many threads of their own.
pub fn compute(threads: usize) -> Compute {
    Compute::Fused(Arc::new(Pool::new(threads)))
}

/// Loads random weights for `config`, matrices in `dtype`, onto `compute`.
pub fn load(
    config: &ModelConfig,
    dtype: DType,
    seed: u64,
    compute: &Compute,
) -> Result<Box<dyn Model>> {
    let weights = weights(config, dtype, seed)?;
    let mut progress = |_| {};
    let mut loader = Loader::new(&weights, config, &mut progress);
    compute.load(config.clone(), &mut loader)
}

/// A random adapter of everything that one can update, its numbers in `float`.
pub fn adapter(config: &ModelConfig, rank: usize, float: Float, seed: u64) -> Result<Adapter> {
    let mut deltas = Vec::new();
    for role in adapter::targets(config) {
        let [n, k] = adapter::shape(role, config).expect("a target is a matrix; this is a bug");
        let name = role.name(false, "lora");
        // A keeps the variance of its input, B halves it.
        let a = values(&name, &[rank, k], seed);
        let b = values(&name, &[n, rank], seed + 1);
        let factors = match adapter::is_table(role) {
            true => Factors::of_table(float, [n, k, rank], &a, &b),
            false => Factors::new(float, [n, k, rank], &a, &b),
        };
        deltas.push((role, Delta { factors: Arc::new(factors), scale: 0.5, dora: None }));
    }
    Adapter::from_deltas(config, deltas)
}

/// The random weights of [`load`], for who brings a backend of its own.
pub fn weights(config: &ModelConfig, dtype: DType, seed: u64) -> Result<Weights> {
    let bytes = gguf(config, dtype, seed).map_err(|e| Error::config("tiny", e.to_string()))?;
    Ok(Weights::from_bytes("tiny.gguf", bytes)?)
}

/// A GGUF file with every tensor that `config` asks for and no metadata.
fn gguf(config: &ModelConfig, dtype: DType, seed: u64) -> io::Result<Vec<u8>> {
    let mut tensors = Vec::new();
    for (name, shape) in shapes(config) {
        let matrix = shape.len() >= 2 && !name.ends_with(".bias");
        let dtype = if matrix { dtype } else { DType::F32 };
        let bytes = quant::quantize(dtype, &values(&name, &shape, seed));
        let bytes = bytes.ok_or_else(|| io::Error::other(format!("no quantiser for {dtype}")))?;
        tensors.push((name, shape, dtype, bytes));
    }
    let mut writer = GgufWriter::new();
    for (name, shape, dtype, _) in &tensors {
        writer.tensor(name, shape, *dtype)?;
    }
    let mut body = writer.write_header(Vec::new())?;
    for (_, _, _, bytes) in &tensors {
        body.write_tensor(bytes)?;
    }
    body.finish()
}

/// Names and shapes of all tensors, as a GGUF file has them.
pub(crate) fn shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    for role in Role::all(config) {
        if role.expert(config).is_some_and(|[index, _]| index > 0) {
            continue; // a part of the tensors of the first
        }
        let mut shape = role.shape(config);
        if role.needs_bias(config) {
            let stack = role.expert(config).map(|[_, count]| count);
            let shape = stack.into_iter().chain([shape[0]]).collect();
            all.push((config.name(role, Format::Gguf, "bias"), shape));
        }
        if let Some([_, count]) = role.expert(config) {
            shape.insert(0, count);
        }
        all.push((config.name(role, Format::Gguf, "weight"), shape));
    }
    all
}

/// Matrices keep the variance of their input; norms stand around 1, biases around 0.
fn values(name: &str, shape: &[usize], seed: u64) -> Vec<f32> {
    let mut state = name.bytes().fold(seed | 1, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
    });
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let (centre, spread) = match (shape, name) {
        (_, name) if name.ends_with(".bias") => (0.0, 0.2),
        ([.., _, k], _) => (0.0, (3.0 / *k as f32).sqrt()),
        (_, name) if name.ends_with("norm.weight") => (1.0, 0.2),
        _ => (0.0, 0.2),
    };
    (0..shape.iter().product()).map(|_| centre + spread * uniform()).collect()
}
