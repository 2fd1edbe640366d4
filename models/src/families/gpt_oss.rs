//! gpt-oss: experts with biases and a bounded gate, a window in every other layer, and sinks: each
//! head may look at nothing.
//!
//! OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card"; sinks after Xiao et al. 2023. Experts of
//! published folders are MXFP4 (OCP Microscaling Formats 1.0), codes and scales apart.

use hearth_kernels::activation::Gate;

use super::{Family, gemma};
use crate::Error;
use crate::config::{Knobs, Naming, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "gpt_oss",
    model_types: &["gpt_oss"],
    gguf_architectures: &["gpt-oss"],
    gguf_interleaved_qk: false,
    tied_by_default: false,
    gguf_always_tied: false,
    head_dim_by_default: Some(64),
    kv_heads_by_default: Some(8),
    local_rope: false,
    experts: Some("intermediate_size"),
    gguf_yarn_truncates: false,
    says_its_rope: true,
    knobs: |raw: &RawConfig| Knobs {
        qkv_bias: raw.attention_bias.unwrap_or(true),
        out_bias: raw.attention_bias.unwrap_or(true),
        mlp_bias: true,
        gate: Gate::ClampedSwiglu,
        sinks: true,
        naming: Naming::GptOss,
        ..Knobs::default()
    },
    windows: |raw, layers| {
        let missing = || Error::config("sliding_window", "is missing");
        let window = raw.sliding_window.unwrap_or(Some(128)).ok_or_else(missing)?;
        gemma::windows(raw, layers, Some(window), raw.sliding_window_pattern.unwrap_or(2))
    },
};
