//! Gemma: Llama with GELU in its gate, norms that are stored as what is added to one, embeddings
//! multiplied by the root of their width, and a free head width.
//!
//! Gemma Team 2024. GGUF files of this family have their norms whole.

use super::Family;
use crate::backend::Gate;
use crate::config::{Knobs, RawConfig};

pub(super) const FAMILY: Family = Family {
    name: "gemma",
    model_types: &["gemma"],
    gguf_architectures: &["gemma"],
    gguf_interleaved_qk: false,
    tied_by_default: true,
    kv_heads_by_default: None,
    local_rope: false,
    knobs,
    windows: |_, layers| vec![None; layers],
};

/// What all generations have in common.
pub(super) fn knobs(raw: &RawConfig) -> Knobs {
    let biased = raw.attention_bias == Some(true);
    Knobs {
        qkv_bias: biased,
        out_bias: biased,
        norms_from_one: !raw.is_gguf(),
        gate: Gate::GeluTanh,
        embedding_scale: raw.hidden_size.map(|len| (len as f64).sqrt() as f32),
        ..Knobs::default()
    }
}

/// What multiplies scores from the second generation on: one over the root of
/// `query_pre_attn_scalar`, which GGUF does not have. There it is the width of a head, and in the
/// largest model, known by its layers, what the hidden width has for each head.
pub(super) fn query_scale(raw: &RawConfig, largest: usize) -> Option<f32> {
    let each = raw.hidden_size.zip(raw.num_attention_heads);
    let each = each.and_then(|(hidden, heads)| hidden.checked_div(heads));
    let scalar = match (raw.query_pre_attn_scalar, raw.is_gguf()) {
        (Some(scalar), _) => scalar,
        (None, false) => 256.0,
        (None, true) if raw.num_hidden_layers == Some(largest) => each? as f64,
        (None, true) => return None,
    };
    Some(scalar.powf(-0.5) as f32)
}

/// Windows of the layers that `layer_types` names, or else of all but every `pattern`-th.
pub(super) fn windows(
    raw: &RawConfig,
    layers: usize,
    window: Option<usize>,
    pattern: usize,
) -> Vec<Option<usize>> {
    let slides = |layer: usize| match &raw.layer_types {
        Some(types) => types.get(layer).is_some_and(|t| t == "sliding_attention"),
        None => (layer + 1) % pattern.max(1) != 0,
    };
    (0..layers).map(|layer| window.filter(|_| slides(layer))).collect()
}
