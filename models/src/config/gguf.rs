//! GGUF metadata under the names of `config.json`, and what the tensors say of the configuration.

use hearth_kernels::quant::{self, DType};
use serde_json::Value as Json;

use super::{RawConfig, RopeConfig, RopeScaling, yarn_temperature};
use crate::families::Family;
use crate::weights::{self, Metadata, TensorType, Value, Weights};
use crate::{Error, Result};

/// Keys of `config.json` and what GGUF calls them, after the architecture.
const KEYS: [(&str, &str); 19] = [
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("num_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("max_position_embeddings", "context_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("rope_theta", "rope.freq_base"),
    ("partial_rotary_factor", "rope.dimension_count"),
    ("sliding_window", "attention.sliding_window"),
    ("sliding_window_pattern", "attention.sliding_window_pattern"),
    ("layer_types", "attention.sliding_window_pattern"),
    ("rope_local_base_freq", "rope.freq_base_swa"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
];
/// Largest `rope_freqs.weight`: half of the widest head.
const DIVISORS_MAX: usize = 512;

/// An error about a key, with the key as the file has it.
pub(super) fn in_its_words(error: Error, arch: &str) -> Error {
    match error {
        Error::Config { key, what } => match KEYS.iter().find(|(name, _)| *name == key) {
            Some((_, gguf)) => Error::Config { key: format!("{arch}.{gguf}"), what },
            None => Error::Config { key, what },
        },
        other => other,
    }
}

/// Everything that a GGUF file says.
pub(super) fn raw(
    weights: &Weights,
    meta: &Metadata,
    arch: &str,
    family: &Family,
) -> Result<RawConfig> {
    let keys = Keys { meta, arch };
    if family.experts.is_none() && keys.named("num_experts")?.is_some_and(|experts| experts > 0) {
        return Err(keys.wrong("expert_count", "experts are not supported in this architecture"));
    }
    for (key, harmless) in
        [("expert_shared_count", 0.0), ("expert_weights_scale", 1.0), ("expert_group_count", 1.0)]
    {
        let number = match keys.meta.value(&keys.of(key))? {
            Some(Value::F32(_)) => keys.number(key)?,
            _ => keys.count(key)?.map(|count| count as f64),
        };
        if number.is_some_and(|number| number != 0.0 && number != harmless) {
            return Err(keys.wrong(key, "is not supported"));
        }
    }
    let of_chosen = match keys.count("expert_gating_func")? {
        None | Some(0 | 1) => None, // a softmax of all
        Some(3) => Some(true),      // of those chosen
        Some(_) => return Err(keys.wrong("expert_gating_func", "is not supported")),
    };
    let head_dim = keys.named("head_dim")?;
    if let (Some(k), Some(v)) = (head_dim, keys.count("attention.value_length")?)
        && k != v
    {
        return Err(keys.wrong("attention.value_length", format!("{v} differs from {k}")));
    }
    let (hidden, heads) = (keys.named("hidden_size")?, keys.named("num_attention_heads")?);
    // Absent numbers are named by who needs them.
    let width = head_dim.unwrap_or(hidden.unwrap_or(0) / heads.unwrap_or(1).max(1));
    let id = |key: &str| -> Result<Option<Json>> {
        Ok(meta.get_opt::<u32>(&format!("tokenizer.ggml.{key}"))?.map(Json::from))
    };
    let (every, kinds) = keys.pattern()?;
    Ok(RawConfig {
        hidden_size: hidden,
        intermediate_size: keys.named("intermediate_size")?,
        moe_intermediate_size: keys.named("moe_intermediate_size")?,
        num_experts: keys.named("num_experts")?,
        num_experts_per_tok: keys.named("num_experts_per_tok")?,
        norm_topk_prob: of_chosen.or(meta.get_opt::<bool>(&keys.of("expert_weights_norm"))?),
        num_hidden_layers: keys.named("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: Some(keys.named("num_key_value_heads")?),
        head_dim,
        // A `vocab_size` key may be older than the tensor.
        vocab_size: Some(rows(weights, "token_embd.weight")?),
        max_position_embeddings: keys.named("max_position_embeddings")?,
        rms_norm_eps: keys.number("attention.layer_norm_rms_epsilon")?,
        sliding_window: Some(keys.named("sliding_window")?),
        sliding_window_pattern: every,
        layer_types: kinds,
        rope_local_base_freq: keys.either("rope.freq_base_swa", "rope.local.freq_base")?,
        attn_logit_softcapping: keys.number("attn_logit_softcapping")?.map(Some),
        final_logit_softcapping: keys.number("final_logit_softcapping")?.map(Some),
        bos_token_id: id("bos_token_id")?,
        eos_token_id: id("eos_token_id")?,
        tie_word_embeddings: Some(!weights.has("output.weight")),
        gguf_rope: Some(rope(weights, &keys, width, family)?),
        ..RawConfig::default()
    })
}

/// Rows of a table.
pub(super) fn rows(weights: &Weights, name: &str) -> Result<usize> {
    weights.readable(name)?;
    Ok(weights.info(name).map_or(0, |info| info.shape[0]))
}

/// Rotary positions; `head_dim` is what an absent width means.
fn rope(
    weights: &Weights,
    keys: &Keys<'_>,
    head_dim: usize,
    family: &Family,
) -> Result<RopeConfig> {
    let dim = keys.named("partial_rotary_factor")?.unwrap_or(head_dim);
    for key in ["rope.freq_base", "rope.scaling.type"] {
        if family.says_its_rope && keys.meta.value(&keys.of(key))?.is_none() {
            return Err(keys.wrong(key, "is missing"));
        }
    }
    let scaling = match (divisors(weights, dim)?, scaling(keys, family)?) {
        (None, scaling) => scaling,
        (Some(divisors), RopeScaling::None) => RopeScaling::Divisors(divisors),
        (Some(_), _) => {
            return Err(keys.wrong("rope.scaling.type", "stands beside `rope_freqs.weight`"));
        }
    };
    let base = keys.either("rope.freq_base", "rope.global.freq_base")?;
    Ok(RopeConfig { base: base.unwrap_or(10_000.0), dim, scaling })
}

/// The values of `rope_freqs.weight`, where it exists.
fn divisors(weights: &Weights, dim: usize) -> Result<Option<Vec<f32>>> {
    const NAME: &str = "rope_freqs.weight";
    let Some(info) = weights.info(NAME) else { return Ok(None) };
    let wrong = |what: String| Error::Tensor { name: NAME.to_owned(), what };
    let len = info.elements();
    if info.ty != TensorType::Readable(DType::F32) || len > DIVISORS_MAX || len != dim / 2 {
        let (ty, half) = (info.ty.name(), dim / 2);
        return Err(wrong(format!("is {len} numbers of {ty}, not {half} divisors of F32")));
    }
    let mut values = vec![0.0; len];
    quant::dequantize(DType::F32, weights.tensor(NAME)?.bytes, &mut values);
    match values.iter().find(|d| !(d.is_finite() && **d > 0.0)) {
        Some(bad) => Err(wrong(format!("holds {bad}, which is not a positive divisor"))),
        None => Ok(Some(values)),
    }
}

/// How the file stretches frequencies: a factor without a type is linear, a factor of 0 is none.
fn scaling(keys: &Keys<'_>, family: &Family) -> Result<RopeScaling> {
    const TYPE: &str = "rope.scaling.type";
    const FACTOR: &str = "rope.scaling.factor";
    let kind = keys.meta.get_opt::<&str>(&keys.of(TYPE))?;
    let factor = match keys.number(FACTOR)? {
        // The key of the first files.
        None => keys.number("rope.scale_linear")?,
        factor => factor,
    };
    let factor = factor.filter(|f| *f != 0.0);
    if let Some(f) = factor.filter(|f| !(f.is_finite() && *f > 0.0)) {
        return Err(keys.wrong(FACTOR, format!("{f} is not a positive number")));
    }
    let kind = kind.unwrap_or("linear");
    // -1 asks for what the type asks for.
    let ext_factor = if kind == "yarn" { 1.0 } else { 0.0 };
    for (key, harmless) in [
        ("rope.scaling.yarn_ext_factor", [-1.0, ext_factor]),
        ("rope.scaling.yarn_log_multiplier", [0.0, 0.0]),
        ("rope.scaling.yarn_attn_factor", [1.0, 1.0]),
    ] {
        if let Some(value) = keys.number(key)?.filter(|v| !harmless.contains(v)) {
            return Err(keys.wrong(key, format!("{value} is not supported")));
        }
    }
    match (kind, factor) {
        ("none", _) | ("linear", None | Some(1.0)) => Ok(RopeScaling::None),
        ("linear", Some(factor)) => Ok(RopeScaling::Linear { factor }),
        ("yarn", Some(factor)) => yarn(keys, factor, family.gguf_yarn_truncates),
        ("yarn", None) => Err(keys.wrong(FACTOR, "is missing")),
        (other, _) => Err(keys.wrong(TYPE, format!("`{other}` is not supported"))),
    }
}

fn yarn(keys: &Keys<'_>, factor: f64, truncate: bool) -> Result<RopeScaling> {
    let positive = |key: &str| -> Result<Option<f64>> {
        let value = keys.number(key)?.filter(|v| *v != 0.0);
        match value.filter(|v| !(v.is_finite() && *v > 0.0)) {
            Some(bad) => Err(keys.wrong(key, format!("{bad} is not a positive number"))),
            None => Ok(value),
        }
    };
    // GGUF's factor multiplies YaRN's own temperature, that of `config.json` replaces it.
    let attention = positive("rope.scaling.attn_factor")?;
    Ok(RopeScaling::Yarn {
        factor,
        original_context_len: match positive("rope.scaling.original_context_length")? {
            Some(len) => len,
            None => keys.number("context_length")?.unwrap_or(1.0).max(1.0),
        },
        beta_fast: positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: attention.map(|f| f * yarn_temperature(factor, 1.0)),
        truncate,
    })
}

/// The keys of one architecture.
pub(super) struct Keys<'a> {
    pub(super) meta: &'a Metadata,
    pub(super) arch: &'a str,
}

impl Keys<'_> {
    pub(super) fn of(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    pub(super) fn wrong(&self, key: &str, what: impl Into<String>) -> Error {
        Error::config(&self.of(key), what)
    }

    fn count(&self, key: &str) -> weights::Result<Option<usize>> {
        Ok(self.meta.get_opt::<u32>(&self.of(key))?.map(|n| n as usize))
    }

    pub(super) fn number(&self, key: &str) -> weights::Result<Option<f64>> {
        Ok(self.meta.get_opt::<f32>(&self.of(key))?.map(f64::from))
    }

    /// A number under one of two names; the second is that of Ollama's files.
    fn either(&self, key: &str, other: &str) -> weights::Result<Option<f64>> {
        match self.number(key)? {
            None => self.number(other),
            found => Ok(found),
        }
    }

    /// Which layers have a window: all but every so-many-th, or the kind of each.
    fn pattern(&self) -> Result<(Option<usize>, Option<Vec<String>>)> {
        let key = self.of("attention.sliding_window_pattern");
        if !matches!(self.meta.value(&key)?, Some(Value::Array(_))) {
            return Ok((self.count("attention.sliding_window_pattern")?, None));
        }
        let kind = |slides: weights::Result<bool>| match slides? {
            true => Ok("sliding_attention".to_owned()),
            false => Ok("full_attention".to_owned()),
        };
        let kinds: weights::Result<_> = self.meta.get_array(&key)?.map(kind).collect();
        Ok((None, Some(kinds?)))
    }

    /// A count, by its name in `config.json`.
    pub(super) fn named(&self, name: &str) -> weights::Result<Option<usize>> {
        let key = KEYS.iter().find(|(json, _)| *json == name);
        self.count(key.expect("asked for by a name of the table; this is a bug").1)
    }
}
