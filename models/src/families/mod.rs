//! What each family sets. A family is a row of this table, not a second decoder.

mod bert;
mod gemma;
mod gemma2;
mod gemma3;
mod gpt_oss;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use crate::Result;
use crate::config::{Knobs, RawConfig};

/// One family.
pub(crate) struct Family {
    /// Name in logs and in `/v1/models`.
    pub name: &'static str,
    /// `model_type` values of `config.json`.
    pub model_types: &'static [&'static str],
    /// `general.architecture` values of GGUF.
    pub gguf_architectures: &'static [&'static str],
    /// GGUF stores Q and K rows for rotation of adjacent pairs.
    pub gguf_interleaved_qk: bool,
    /// What an absent `tie_word_embeddings` means.
    pub tied_by_default: bool,
    /// GGUF readers know no output of its own.
    pub gguf_always_tied: bool,
    /// What an absent `head_dim` means in a `config.json`; `None` is the width of a head.
    pub head_dim_by_default: Option<usize>,
    /// What an absent `num_key_value_heads` means; `None` is all heads.
    pub kv_heads_by_default: Option<usize>,
    /// Layers with a window rotate at frequencies of their own.
    pub local_rope: bool,
    /// The MLP of every layer has experts; the key of a `config.json` for their width.
    pub experts: Option<&'static str>,
    /// GGUF has no word for it: bounds of YaRN are whole numbers.
    pub gguf_yarn_truncates: bool,
    /// Files must say base and scaling of rotary frequencies: what is usual elsewhere is not here.
    pub says_its_rope: bool,
    /// Switches.
    pub knobs: fn(&RawConfig) -> Knobs,
    /// Attention window of each layer.
    pub windows: fn(&RawConfig, usize) -> Result<Vec<Option<usize>>>,
}

const FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &qwen3_moe::FAMILY,
    &gemma::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &gpt_oss::FAMILY,
];

/// One family of encoders.
pub(crate) struct EncoderFamily {
    /// Name in logs.
    pub name: &'static str,
    /// `model_type` values of `config.json`.
    pub model_types: &'static [&'static str],
    /// `general.architecture` values of GGUF.
    pub gguf_architectures: &'static [&'static str],
    /// Before every tensor name of a SafeTensors file that was saved with a head.
    pub prefix: &'static str,
}

const ENCODERS: &[&EncoderFamily] = &[&bert::FAMILY];

/// The encoder family of a `config.json`.
pub(crate) fn encoder_by_model_type(model_type: &str) -> Option<&'static EncoderFamily> {
    ENCODERS.iter().copied().find(|f| f.model_types.contains(&model_type))
}

/// The encoder family of a GGUF file.
pub(crate) fn encoder_by_gguf_architecture(arch: &str) -> Option<&'static EncoderFamily> {
    ENCODERS.iter().copied().find(|f| f.gguf_architectures.contains(&arch))
}

/// The family of a `config.json`.
pub(crate) fn by_model_type(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|f| f.model_types.contains(&model_type))
}

/// The family of a GGUF file.
pub(crate) fn by_gguf_architecture(arch: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|f| f.gguf_architectures.contains(&arch))
}

/// The family of a [`ModelConfig`](crate::ModelConfig).
pub(crate) fn by_name(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|f| f.name == name)
}

/// All names, for an error.
pub(crate) fn known() -> String {
    let encoders = ENCODERS.iter().map(|f| f.name);
    FAMILIES.iter().map(|f| f.name).chain(encoders).collect::<Vec<_>>().join(", ")
}

/// Window of a `config.json` that switches it on and does not say how wide it is.
const WINDOW_BY_DEFAULT: usize = 4096;

/// Qwen: a window only when it is switched on, and then where `layer_types` says, or in the layers
/// from `max_window_layers` on (28 where the file does not say).
fn qwen_windows(raw: &RawConfig, layers: usize) -> Result<Vec<Option<usize>>> {
    if raw.use_sliding_window != Some(true) {
        return Ok(vec![None; layers]);
    }
    let window = raw.sliding_window.unwrap_or(Some(WINDOW_BY_DEFAULT));
    let slides = |layer: usize| match &raw.layer_types {
        Some(types) => types.get(layer).is_some_and(|t| t == "sliding_attention"),
        None => layer >= raw.max_window_layers.unwrap_or(28),
    };
    Ok((0..layers).map(|layer| window.filter(|_| slides(layer))).collect())
}
