//! Gemma 3 (text): a window in five of six layers, which rotate at frequencies of their own; norms
//! of every query and key head in place of the bounds of Gemma 2.
//!
//! Gemma Team 2025. A `config.json` of the models that read pictures too has another `model_type`
//! and is refused, as are GGUF files with tensors for pictures; llama.cpp's have these in a file
//! apart. `attn_logit_softcapping` says nothing here, as in transformers.

use super::{Family, gemma};
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "gemma3",
    model_types: &["gemma3_text"],
    gguf_architectures: &["gemma3"],
    gguf_interleaved_qk: false,
    tied_by_default: true,
    gguf_always_tied: false,
    head_dim_by_default: Some(256),
    kv_heads_by_default: Some(4),
    local_rope: true,
    experts: None,
    gguf_yarn_truncates: true,
    says_its_rope: false,
    knobs: |raw: &RawConfig| Knobs {
        qk_norm: true,
        post_norms: true,
        query_scale: gemma::query_scale(raw, 62),
        logit_softcap: raw.final_logit_softcapping.flatten().map(|cap| cap as f32),
        ..gemma::knobs(raw)
    },
    windows: |raw, layers| {
        // A GGUF file without one has none in any layer.
        let window = match raw.is_gguf() {
            true => raw.sliding_window.flatten().filter(|window| *window > 0),
            false => Some(gemma::window_of_json(raw)?),
        };
        gemma::windows(raw, layers, window, raw.sliding_window_pattern.unwrap_or(6))
    },
};
