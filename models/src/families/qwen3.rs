//! Qwen3 (dense): no biases, an RMS norm on every query and key head, a free head width.
//!
//! Yang et al. 2025.

use super::{Family, qwen_windows};
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "qwen3",
    model_types: &["qwen3"],
    gguf_architectures: &["qwen3"],
    gguf_interleaved_qk: false,
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
        qk_norm: true,
        ..Knobs::default()
    },
    windows: qwen_windows,
};
