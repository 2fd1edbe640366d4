//! Mistral 7B and its successors: Llama with a sliding window (v0.1) and a free head width (Nemo).
//!
//! Jiang et al. 2023. GGUF files of this family say `llama`.

use super::{Family, WINDOW_BY_DEFAULT};
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "mistral",
    model_types: &["mistral"],
    gguf_architectures: &[],
    gguf_interleaved_qk: true,
    tied_by_default: false,
    gguf_always_tied: false,
    head_dim_by_default: None,
    kv_heads_by_default: Some(8),
    local_rope: false,
    experts: None,
    gguf_yarn_truncates: true,
    says_its_rope: false,
    knobs: |_: &RawConfig| Knobs::default(),
    windows: |raw, layers| Ok(vec![raw.sliding_window.unwrap_or(Some(WINDOW_BY_DEFAULT)); layers]),
};
