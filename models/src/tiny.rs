//! Random models in memory, for tests and benchmarks: every family, every weight format, no file.
//!
//! Values depend on the seed and the tensor's name alone. They mean nothing, but they exercise
//! every layer and every batch shape in microseconds.

use std::collections::BTreeMap;

use hearth_kernels::quant::{self, DType};

use crate::config::{Knobs, ModelConfig, RopeConfig, RopeScaling};
use crate::open::Compute;
use crate::weights::{Loader, TensorSource, TensorView};
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
    let weights = RandomWeights::new(config, dtype, seed);
    let mut progress = |_| {};
    let mut loader = Loader::new(&weights, config, &mut progress);
    compute.load(config.clone(), &mut loader)
}

/// Tensors of a decoder, under the names of a SafeTensors folder.
pub struct RandomWeights {
    tensors: BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>,
}

impl RandomWeights {
    /// All tensors that `config` asks for.
    pub fn new(config: &ModelConfig, dtype: DType, seed: u64) -> Self {
        let mut made = Self { tensors: BTreeMap::new() };
        let c = config;
        let mut add = |name: &str, shape: &[usize]| made.add(name, shape, dtype, seed);
        add("model.embed_tokens.weight", &[c.vocab_len, c.hidden_len]);
        add("model.norm.weight", &[c.hidden_len]);
        if !c.tied {
            add("lm_head.weight", &[c.vocab_len, c.hidden_len]);
        }
        for layer in 0..c.layer_count {
            let mut add = |name: &str, shape: &[usize]| {
                add(&format!("model.layers.{layer}.{name}"), shape);
            };
            let mut linear = |name: &str, n: usize, k: usize, bias: bool| {
                add(&format!("{name}.weight"), &[n, k]);
                if bias {
                    add(&format!("{name}.bias"), &[n]);
                }
            };
            let knobs = &c.knobs;
            linear("self_attn.q_proj", c.q_len(), c.hidden_len, knobs.qkv_bias);
            linear("self_attn.k_proj", c.kv_len(), c.hidden_len, knobs.qkv_bias);
            linear("self_attn.v_proj", c.kv_len(), c.hidden_len, knobs.qkv_bias);
            linear("self_attn.o_proj", c.hidden_len, c.q_len(), knobs.out_bias);
            linear("mlp.gate_proj", c.ffn_len, c.hidden_len, knobs.mlp_bias);
            linear("mlp.up_proj", c.ffn_len, c.hidden_len, knobs.mlp_bias);
            linear("mlp.down_proj", c.hidden_len, c.ffn_len, knobs.mlp_bias);
            add("input_layernorm.weight", &[c.hidden_len]);
            add("post_attention_layernorm.weight", &[c.hidden_len]);
            if knobs.qk_norm {
                add("self_attn.q_norm.weight", &[c.head_dim]);
                add("self_attn.k_norm.weight", &[c.head_dim]);
            }
        }
        made
    }

    fn add(&mut self, name: &str, shape: &[usize], dtype: DType, seed: u64) {
        let mut state = name.bytes().fold(seed | 1, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
        });
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        // Matrices keep the variance of their input; norms stand around 1, biases around 0.
        let count = shape.iter().product();
        let (centre, spread) = match (shape, name.ends_with("norm.weight")) {
            ([_, k], _) => (0.0, (3.0 / *k as f32).sqrt()),
            (_, true) => (1.0, 0.2),
            (_, false) => (0.0, 0.2),
        };
        let values: Vec<f32> = (0..count).map(|_| centre + spread * uniform()).collect();
        let dtype = if shape.len() == 2 { dtype } else { DType::F32 };
        let bytes = quant::quantize(dtype, &values);
        self.tensors.insert(name.to_owned(), (dtype, shape.to_vec(), bytes));
    }
}

impl TensorSource for RandomWeights {
    fn is_gguf(&self) -> bool {
        false
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let found = self.tensors.get_key_value(name);
        let (name, (dtype, shape, bytes)) = found.ok_or_else(|| Error::Tensor {
            name: name.to_owned(),
            what: "was not made".to_owned(),
        })?;
        Ok(TensorView { name, dtype: *dtype, shape: shape.clone(), bytes })
    }

    fn release(&self, _: &str) {}
}
