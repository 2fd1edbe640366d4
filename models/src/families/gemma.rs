//! Gemma: Llama with GELU in its gate, norms that are stored as what is added to one, embeddings
//! multiplied by the root of their width, and a free head width.
//!
//! Gemma Team 2024. GGUF files of this family have their norms whole.

use hearth_kernels::activation::Gate;

use super::{Family, WINDOW_BY_DEFAULT};
use crate::config::{Knobs, RawConfig};
use crate::{Error, Result};

pub(super) const FAMILY: Family = Family {
    name: "gemma",
    model_types: &["gemma"],
    gguf_architectures: &["gemma"],
    gguf_interleaved_qk: false,
    tied_by_default: true,
    gguf_always_tied: true,
    head_dim_by_default: Some(256),
    kv_heads_by_default: Some(16),
    local_rope: false,
    experts: None,
    gguf_yarn_truncates: true,
    says_its_rope: false,
    knobs,
    windows: |_, layers| Ok(vec![None; layers]),
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
///
/// # Errors
/// Kinds of layers that are unknown or too few, a pattern of nothing.
pub(super) fn windows(
    raw: &RawConfig,
    layers: usize,
    window: Option<usize>,
    pattern: usize,
) -> Result<Vec<Option<usize>>> {
    let Some(types) = &raw.layer_types else {
        if pattern == 0 {
            return Err(Error::config("sliding_window_pattern", "must not be 0"));
        }
        let slides = |layer: &usize| !(layer + 1).is_multiple_of(pattern);
        return Ok((0..layers).map(|layer| window.filter(|_| slides(&layer))).collect());
    };
    if types.len() != layers {
        let what = format!("has {} kinds for {layers} layers", types.len());
        return Err(Error::config("layer_types", what));
    }
    let of = |kind: &String| match kind.as_str() {
        "sliding_attention" => Ok(window),
        "full_attention" => Ok(None),
        other => Err(Error::config("layer_types", format!("`{other}` is not supported here"))),
    };
    types.iter().map(of).collect()
}

/// The window of a `config.json`, which layers with one must have.
pub(super) fn window_of_json(raw: &RawConfig) -> Result<usize> {
    match raw.sliding_window {
        None => Ok(WINDOW_BY_DEFAULT),
        Some(Some(window)) => Ok(window),
        Some(None) => Err(Error::config("sliding_window", "is missing")),
    }
}
