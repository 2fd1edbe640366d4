//! Random models in memory, for tests and benchmarks: every family, every weight format, no file.
//!
//! Values depend on the seed and the tensor's name alone. They mean nothing, but they exercise
//! every layer and every batch shape in microseconds.

use std::io;

use hearth_kernels::quant::{self, DType};

use crate::config::{Knobs, ModelConfig, RopeConfig, RopeScaling};
use crate::open::Compute;
use crate::weights::gguf_writer::GgufWriter;
use crate::weights::{Loader, Weights};
use crate::{Error, Model, Result};

/// A small Llama with grouped heads: two layers, 8 query heads, 2 key heads, 512 tokens.
pub fn config() -> ModelConfig {
    ModelConfig {
        family: "llama",
        hidden_len: 256,
        ffn_len: 512,
        layer_count: 2,
        head_count: 8,
        kv_head_count: 2,
        head_dim: 32,
        vocab_len: 512,
        context_len: 1024,
        norm_eps: 1e-5,
        rope: RopeConfig { base: 10_000.0, dim: 32, scaling: RopeScaling::None },
        windows: vec![None; 2],
        knobs: Knobs::default(),
        tied: true,
        bos_id: Some(1),
        eos_ids: vec![2],
    }
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

/// The random weights of [`load`], for who brings a backend of its own.
pub fn weights(config: &ModelConfig, dtype: DType, seed: u64) -> Result<Weights> {
    let bytes = gguf(config, dtype, seed).map_err(|e| Error::config("tiny", e.to_string()))?;
    Ok(Weights::from_bytes("tiny.gguf", bytes)?)
}

/// A GGUF file with every tensor that `config` asks for and no metadata.
fn gguf(config: &ModelConfig, dtype: DType, seed: u64) -> io::Result<Vec<u8>> {
    let mut tensors = Vec::new();
    for (name, shape) in shapes(config) {
        let dtype = if shape.len() == 2 { dtype } else { DType::F32 };
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
pub(crate) fn shapes(c: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("token_embd.weight".to_owned(), vec![c.vocab_len, c.hidden_len]),
        ("output_norm.weight".to_owned(), vec![c.hidden_len]),
    ];
    if !c.tied {
        all.push(("output.weight".to_owned(), vec![c.vocab_len, c.hidden_len]));
    }
    for layer in 0..c.layer_count {
        let mut add = |name: &str, shape: &[usize]| {
            all.push((format!("blk.{layer}.{name}"), shape.to_vec()));
        };
        let mut linear = |name: &str, n: usize, k: usize, bias: bool| {
            add(&format!("{name}.weight"), &[n, k]);
            if bias {
                add(&format!("{name}.bias"), &[n]);
            }
        };
        let knobs = &c.knobs;
        linear("attn_q", c.q_len(), c.hidden_len, knobs.qkv_bias);
        linear("attn_k", c.kv_len(), c.hidden_len, knobs.qkv_bias);
        linear("attn_v", c.kv_len(), c.hidden_len, knobs.qkv_bias);
        linear("attn_output", c.hidden_len, c.q_len(), knobs.out_bias);
        linear("ffn_gate", c.ffn_len, c.hidden_len, knobs.mlp_bias);
        linear("ffn_up", c.ffn_len, c.hidden_len, knobs.mlp_bias);
        linear("ffn_down", c.hidden_len, c.ffn_len, knobs.mlp_bias);
        add("attn_norm.weight", &[c.hidden_len]);
        add("ffn_norm.weight", &[c.hidden_len]);
        if knobs.qk_norm {
            add("attn_q_norm.weight", &[c.head_dim]);
            add("attn_k_norm.weight", &[c.head_dim]);
        }
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
    let (centre, spread) = match (shape, name.ends_with("norm.weight")) {
        ([_, k], _) => (0.0, (3.0 / *k as f32).sqrt()),
        (_, true) => (1.0, 0.2),
        (_, false) => (0.0, 0.2),
    };
    (0..shape.iter().product()).map(|_| centre + spread * uniform()).collect()
}
