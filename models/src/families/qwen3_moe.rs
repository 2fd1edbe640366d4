//! Qwen3 with experts: the attention of Qwen3, and in every layer an MLP of which each row uses a
//! few of many.
//!
//! Yang et al. 2025.

use super::{Family, WINDOW_BY_DEFAULT, qwen3};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    gguf_architectures: &["qwen3moe"],
    kv_heads_by_default: Some(4),
    experts: Some("moe_intermediate_size"),
    // A window is that of every layer.
    windows: |raw, layers| {
        let window = raw.sliding_window.unwrap_or(Some(WINDOW_BY_DEFAULT));
        Ok(vec![window.filter(|_| raw.use_sliding_window == Some(true)); layers])
    },
    ..qwen3::FAMILY
};
