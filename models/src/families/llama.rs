//! Llama 2, 3, 3.1, 3.2 and everything that kept the shape (TinyLlama, SmolLM2, llama2.c models).
//!
//! Touvron et al. 2023. GGUF calls Mistral v0.1-v0.3 `llama` too, and files of v0.1 carry its
//! window: it is kept where the key is present, though llama.cpp attends to everything. In a
//! `config.json` of this family a `sliding_window` is left over from elsewhere and means nothing.

use super::Family;
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "llama",
    model_types: &["llama"],
    gguf_architectures: &["llama"],
    gguf_interleaved_qk: true,
    tied_by_default: false,
    gguf_always_tied: false,
    head_dim_by_default: None,
    kv_heads_by_default: None,
    local_rope: false,
    experts: None,
    gguf_yarn_truncates: true,
    says_its_rope: false,
    knobs: |raw: &RawConfig| Knobs {
        qkv_bias: raw.attention_bias == Some(true),
        out_bias: raw.attention_bias == Some(true),
        mlp_bias: raw.mlp_bias == Some(true),
        ..Knobs::default()
    },
    windows: |raw, layers| {
        Ok(vec![raw.sliding_window.flatten().filter(|window| raw.is_gguf() && *window > 0); layers])
    },
};
