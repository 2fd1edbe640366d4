//! Qwen2 and Qwen2.5: Llama with biases on Q, K and V.
//!
//! Yang et al. 2024.

use super::{Family, qwen_windows};
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "qwen2",
    model_types: &["qwen2"],
    gguf_architectures: &["qwen2"],
    gguf_interleaved_qk: false,
    tied_by_default: false,
    gguf_always_tied: false,
    head_dim_by_default: None,
    kv_heads_by_default: None,
    local_rope: false,
    experts: None,
    gguf_yarn_truncates: true,
    says_its_rope: false,
    knobs: |_: &RawConfig| Knobs { qkv_bias: true, ..Knobs::default() },
    windows: qwen_windows,
};
