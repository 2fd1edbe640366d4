//! Llama 2, 3, 3.1, 3.2 and everything that kept the shape (TinyLlama, SmolLM2, llama2.c models).
//!
//! Touvron et al. 2023. GGUF calls Mistral v0.1-v0.3 `llama` too; those files carry the window.

use super::Family;
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "llama",
    model_types: &["llama"],
    gguf_architectures: &["llama"],
    gguf_interleaved_qk: true,
    tied_by_default: false,
    knobs: |raw: &RawConfig| Knobs {
        qkv_bias: raw.attention_bias == Some(true),
        out_bias: raw.attention_bias == Some(true),
        mlp_bias: raw.mlp_bias == Some(true),
        ..Knobs::default()
    },
    windows: |raw, layers| vec![raw.sliding_window; layers],
};
