//! Gemma 3 (text): a window in five of six layers, which rotate at frequencies of their own; norms
//! of every query and key head in place of the bounds of Gemma 2.
//!
//! Gemma Team 2025. The models that read pictures are another `model_type` and are refused; GGUF
//! files have the text part alone.

use super::{Family, WINDOW_BY_DEFAULT, gemma};
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "gemma3",
    model_types: &["gemma3_text"],
    gguf_architectures: &["gemma3"],
    gguf_interleaved_qk: false,
    tied_by_default: true,
    kv_heads_by_default: Some(4),
    local_rope: true,
    knobs: |raw: &RawConfig| Knobs {
        qk_norm: true,
        post_norms: true,
        query_scale: gemma::query_scale(raw, 62),
        attention_softcap: raw.attn_logit_softcapping.flatten().map(|cap| cap as f32),
        logit_softcap: raw.final_logit_softcapping.flatten().map(|cap| cap as f32),
        ..gemma::knobs(raw)
    },
    windows: |raw, layers| {
        let window = raw.sliding_window.unwrap_or(Some(WINDOW_BY_DEFAULT));
        gemma::windows(raw, layers, window, raw.sliding_window_pattern.unwrap_or(6))
    },
};
