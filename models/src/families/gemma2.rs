//! Gemma 2: a window in every second layer, norms behind attention and MLP too, scores and logits
//! under a soft bound.
//!
//! Gemma Team 2024, "Improving Open Language Models at a Practical Size".

use super::{Family, WINDOW_BY_DEFAULT, gemma};
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "gemma2",
    model_types: &["gemma2"],
    gguf_architectures: &["gemma2"],
    gguf_interleaved_qk: false,
    tied_by_default: true,
    gguf_always_tied: true,
    head_dim_by_default: Some(256),
    kv_heads_by_default: Some(4),
    local_rope: false,
    experts: None,
    gguf_yarn_truncates: true,
    says_its_rope: false,
    knobs: |raw: &RawConfig| Knobs {
        post_norms: true,
        query_scale: gemma::query_scale(raw, 46),
        attention_softcap: raw.attn_logit_softcapping.unwrap_or(Some(50.0)).map(|cap| cap as f32),
        logit_softcap: raw.final_logit_softcapping.unwrap_or(Some(30.0)).map(|cap| cap as f32),
        ..gemma::knobs(raw)
    },
    windows: |raw, layers| {
        let window = match raw.is_gguf() {
            true => raw.sliding_window.flatten().unwrap_or(WINDOW_BY_DEFAULT),
            false => gemma::window_of_json(raw)?,
        };
        // A `config.json` says it by kinds of layers or not at all.
        let pattern = raw.sliding_window_pattern.filter(|_| raw.is_gguf());
        gemma::windows(raw, layers, Some(window), pattern.unwrap_or(2))
    },
};
