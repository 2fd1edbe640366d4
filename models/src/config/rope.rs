//! Rotary positions: the words of `config.json`, as Hugging Face reads them, checked.

use serde_json::{Map, Value};

use super::RawConfig;
use crate::{Error, Result};

/// Rotary position embedding (Su et al. 2021, RoFormer), half-split pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// theta.
    pub base: f64,
    /// Leading elements of a head that rotate.
    pub dim: usize,
    /// How frequencies are stretched for contexts longer than trained.
    pub scaling: RopeScaling,
}

/// Stretching of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by the factor (position interpolation).
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: long waves divided, short ones kept, smooth between.
    Llama3 {
        /// Divisor of long waves.
        factor: f64,
        /// Waves longer than `original / low` are long.
        low_freq_factor: f64,
        /// Waves shorter than `original / high` are short.
        high_freq_factor: f64,
        /// Context the model was trained with.
        original_context_len: f64,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Extension of the context.
        factor: f64,
        /// Context the model was trained with.
        original_context_len: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which it is interpolated.
        beta_slow: f64,
        /// Multiplies cos and sin; `None` is [`yarn_temperature`] of the factor.
        attention_factor: Option<f64>,
        /// Round the ramp's ends to whole dimensions.
        truncate: bool,
    },
    /// One divisor per frequency, as the file's `rope_freqs.weight` has them.
    Divisors(Vec<f32>),
}

/// How much YaRN sharpens attention: the paper's `0.1 ln(factor) + 1`, its logarithm weighted.
pub fn yarn_temperature(factor: f64, weight: f64) -> f64 {
    0.1 * weight * factor.max(1.0).ln() + 1.0
}

/// Rotary positions of all layers.
pub(super) fn global(raw: &RawConfig, head_dim: usize) -> Result<RopeConfig> {
    match &raw.gguf_rope {
        Some(rope) => Ok(rope.clone()),
        None => from_json(raw, head_dim),
    }
}

/// Rotary positions of layers that look back at everything, and of those with a window: in
/// `rope_parameters` by the kind of layer, or with the base of the second ones beside them.
pub(super) fn global_and_local(
    raw: &RawConfig,
    head_dim: usize,
) -> Result<(RopeConfig, Option<RopeConfig>)> {
    let kind = |kind: &str| raw.rope_parameters.as_ref()?.get(kind)?.as_object().cloned();
    let of = |base: Option<f64>, words: Option<Map<String, Value>>| RawConfig {
        rope_theta: base,
        rope_scaling: None,
        rope_parameters: words,
        ..raw.clone()
    };
    let base = raw.rope_theta.or(Some(1e6));
    let local = of(raw.rope_local_base_freq, kind("sliding_attention"));
    let global = match (kind("full_attention"), kind("sliding_attention")) {
        (None, None) => RawConfig { rope_theta: base, ..raw.clone() },
        (full, _) => {
            // What stands beside the kinds of layers is of those without a window.
            let mut words = full.unwrap_or_default();
            words.extend(raw.rope_scaling.clone().unwrap_or_default());
            of(base, Some(words))
        }
    };
    Ok((self::global(&global, head_dim)?, Some(from_json(&local, head_dim)?)))
}

/// Refuses a `config.json` that leaves base or scaling to be guessed.
pub(super) fn is_said(raw: &RawConfig) -> Result<()> {
    let words = dictionary(raw)?;
    let kind = words.words.contains_key("rope_type") || words.words.contains_key("type");
    let base = words.number("rope_theta")?.or(raw.rope_theta);
    match (kind, base) {
        (false, _) => Err(words.wrong("is missing")),
        (_, None) => Err(Error::config("rope_theta", "is missing")),
        _ => Ok(()),
    }
}

/// Rotary positions of a `config.json`.
///
/// A `rope_scaling` with something in it stands for the newer `rope_parameters`, and what either of
/// them says of `rope_theta` and `partial_rotary_factor` beats the same key outside.
fn from_json(raw: &RawConfig, head_dim: usize) -> Result<RopeConfig> {
    let words = dictionary(raw)?;
    let base = words.number("rope_theta")?.or(raw.rope_theta).unwrap_or(10_000.0);
    let partial = words.number("partial_rotary_factor")?.or(raw.partial_rotary_factor);
    let dim = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    let scaling = match words.kind() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: words.need("factor")? },
        "llama3" => llama3(&words)?,
        "yarn" => yarn(&words, raw.max_position_embeddings.unwrap_or(1) as f64)?,
        other => return Err(words.wrong(&format!("type `{other}` is not supported"))),
    };
    Ok(RopeConfig { base, dim, scaling })
}

impl RopeConfig {
    /// `key` is what the base is called.
    pub(super) fn check(&self, key: &str, head_dim: usize) -> Result<()> {
        let (base, dim) = (self.base, self.dim);
        if !(base.is_finite() && base > 0.0) {
            return Err(Error::config(key, format!("{base} is not a positive number")));
        }
        if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
            let what = format!("rotates {dim} of the {head_dim} elements of a head");
            return Err(Error::config("partial_rotary_factor", what));
        }
        Ok(())
    }
}

fn llama3(words: &Dictionary) -> Result<RopeScaling> {
    let (low, high) = (words.need("low_freq_factor")?, words.need("high_freq_factor")?);
    if low >= high {
        return Err(words.wrong(&format!("`low_freq_factor` {low} is not below {high}")));
    }
    Ok(RopeScaling::Llama3 {
        factor: words.need("factor")?,
        low_freq_factor: low,
        high_freq_factor: high,
        original_context_len: words.need("original_max_position_embeddings")?,
    })
}

fn yarn(words: &Dictionary, context_len: f64) -> Result<RopeScaling> {
    // Files that do not say what they extend extend the context that they declare.
    let original = words.number("original_max_position_embeddings")?.unwrap_or(context_len);
    // A `null` asks for the quotient; no key at all is a mistake.
    let factor = match words.words.get("factor") {
        Some(Value::Null) => context_len / original,
        _ => words.need("factor")?,
    };
    let mscale = words.number_or_zero("mscale")?.zip(words.number_or_zero("mscale_all_dim")?);
    let of_both = |(one, all)| yarn_temperature(factor, one) / yarn_temperature(factor, all);
    Ok(RopeScaling::Yarn {
        factor,
        original_context_len: original,
        beta_fast: words.number_or_zero("beta_fast")?.unwrap_or(32.0),
        beta_slow: words.number_or_zero("beta_slow")?.unwrap_or(1.0),
        attention_factor: words.number("attention_factor")?.or(mscale.map(of_both)),
        truncate: match words.words.get("truncate") {
            None => true,
            Some(value) => {
                value.as_bool().ok_or_else(|| words.wrong("`truncate` is not true or false"))?
            }
        },
    })
}

/// `rope_scaling` or `rope_parameters`, and which of them it is.
struct Dictionary {
    words: Map<String, Value>,
    key: &'static str,
}

/// The dictionary that holds; two that ask for different scalings are refused.
fn dictionary(raw: &RawConfig) -> Result<Dictionary> {
    let filled = |words: &Option<Map<String, Value>>, key| {
        let words = words.clone().filter(|words| !words.is_empty())?;
        Some(Dictionary { words, key })
    };
    let older = filled(&raw.rope_scaling, "rope_scaling");
    let newer = filled(&raw.rope_parameters, "rope_parameters");
    if let (Some(a), Some(b)) = (&older, &newer) {
        let both_scale = a.kind() != "default" && b.kind() != "default";
        if both_scale && a.words != b.words {
            return Err(a.wrong("and `rope_parameters` ask for different scalings"));
        }
    }
    let none = Dictionary { words: Map::new(), key: "rope_scaling" };
    let found = older.or(newer).unwrap_or(none);
    match found.words.values().any(Value::is_object) {
        true => Err(found.wrong("differs between kinds of layers, which is not supported")),
        false => Ok(found),
    }
}

impl Dictionary {
    fn wrong(&self, what: &str) -> Error {
        Error::config(self.key, what)
    }

    fn kind(&self) -> &str {
        let kind = self.words.get("rope_type").or_else(|| self.words.get("type"));
        kind.and_then(Value::as_str).unwrap_or("default")
    }

    /// A positive number; absent and `null` are `None`.
    fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.words.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|n| n.is_finite() && *n > 0.0) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(&format!("`{name}`: {value} is not a positive number"))),
            },
        }
    }

    /// Like `number`, but 0 too is `None`: Hugging Face takes it for an absent key.
    fn number_or_zero(&self, name: &str) -> Result<Option<f64>> {
        match self.words.get(name).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => self.number(name),
        }
    }

    fn need(&self, name: &str) -> Result<f64> {
        let missing = || self.wrong(&format!("`{name}` is missing"));
        self.number(name)?.ok_or_else(missing)
    }
}
