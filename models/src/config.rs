//! What a model is, in numbers: `config.json` or GGUF metadata -> one validated [`ModelConfig`].
//!
//! Two steps, two types. [`RawConfig`] holds what the file says, nothing checked; the family
//! (`families/*.rs`) turns it into knobs; `ModelConfig::new` checks every number that a layer will
//! later rely on. Deliberately absent: tensors, devices, tokenizers.

use serde::Deserialize;
use serde_json::Value;

use crate::families::{self, Family};
use crate::kv_store::KvGeometry;
use crate::weights::{Array, Metadata, safetensors};
use crate::{Error, KvDType, Result};

/// A decoder, validated. Lengths count elements.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Name of the family, as its file in `families/` has it.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden_len: usize,
    /// Width inside the MLP.
    pub ffn_len: usize,
    /// Decoder layers.
    pub layer_count: usize,
    /// Query heads.
    pub head_count: usize,
    /// Key and value heads; divides `head_count`.
    pub kv_head_count: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Rows of the embedding, padding included.
    pub vocab_len: usize,
    /// Positions the model was made for.
    pub context_len: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Keys each layer looks back at, itself included; `None` is all. One entry a layer.
    pub windows: Vec<Option<usize>>,
    /// The switches of the family.
    pub knobs: Knobs,
    /// The output projection is the embedding.
    pub tied: bool,
    /// Beginning of text.
    pub bos_id: Option<u32>,
    /// Ends of text.
    pub eos_ids: Vec<u32>,
}

/// What one family does and another does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Knobs {
    /// Q, K and V projections must have a bias.
    pub qkv_bias: bool,
    /// The output projection of attention must have a bias.
    pub out_bias: bool,
    /// Gate, up and down must have a bias.
    pub mlp_bias: bool,
    /// RMS norm of every query and key head.
    pub qk_norm: bool,
    /// The file stores Q and K rows for rotation of adjacent pairs (GGUF of the Llama type).
    pub interleaved_qk: bool,
}

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
        /// Multiplies cos and sin; `None` is the paper's `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
        /// Round the ramp's ends to whole dimensions.
        truncate: bool,
    },
    /// One divisor per frequency, as the file's `rope_freqs.weight` has them.
    Divisors(Vec<f32>),
}

/// What the file says, unchecked. Field names are those of `config.json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[allow(missing_docs, reason = "named by the format")]
pub struct RawConfig {
    pub model_type: Option<String>,
    pub hidden_size: Option<usize>,
    pub intermediate_size: Option<usize>,
    pub num_hidden_layers: Option<usize>,
    pub num_attention_heads: Option<usize>,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub vocab_size: Option<usize>,
    pub max_position_embeddings: Option<usize>,
    pub rms_norm_eps: Option<f64>,
    pub rope_theta: Option<f64>,
    pub rope_scaling: Option<Value>,
    pub rope_parameters: Option<Value>,
    pub partial_rotary_factor: Option<f64>,
    pub hidden_act: Option<String>,
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
    pub tie_word_embeddings: Option<bool>,
    pub sliding_window: Option<usize>,
    pub use_sliding_window: Option<bool>,
    pub max_window_layers: Option<usize>,
    pub layer_types: Option<Vec<String>>,
    pub bos_token_id: Option<Value>,
    pub eos_token_id: Option<Value>,
    #[serde(skip)]
    pub rope_divisors: Option<Vec<f32>>,
}

impl ModelConfig {
    /// From the text of `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        let unreadable = |e| Error::config("config.json", format!("cannot be read: {e}"));
        let json: Value = serde_json::from_str(text).map_err(unreadable)?;
        if let Some(method) = safetensors::unreadable_quantization(&json) {
            let what = format!("`{method}` cannot be read by this build");
            return Err(Error::config("quantization_config", what));
        }
        let raw: RawConfig = serde_json::from_value(json).map_err(unreadable)?;
        let model_type = raw.model_type.as_deref().unwrap_or_default();
        let family = families::by_model_type(model_type).ok_or_else(|| {
            Error::config(
                "model_type",
                format!("`{model_type}` is not supported; known: {}", families::known()),
            )
        })?;
        Self::new(family, &raw, false)
    }

    /// From GGUF metadata; `rope_divisors` are the values of `rope_freqs.weight`, where it exists.
    pub fn from_gguf(meta: &Metadata, rope_divisors: Option<Vec<f32>>) -> Result<Self> {
        let arch = meta.get::<&str>("general.architecture")?;
        let family = families::by_gguf_architecture(arch).ok_or_else(|| {
            Error::config(
                "general.architecture",
                format!("`{arch}` is not supported; known: {}", families::known()),
            )
        })?;
        let raw = raw_from_gguf(meta, arch, rope_divisors)?;
        Self::new(family, &raw, true)
    }

    fn new(family: &Family, raw: &RawConfig, gguf: bool) -> Result<Self> {
        let need = |name: &'static str, value: Option<usize>| match value {
            Some(0) => Err(Error::config(name, "must not be 0")),
            Some(n) if n > 1 << 24 => Err(Error::config(name, format!("{n} is absurd"))),
            Some(n) => Ok(n),
            None => Err(Error::config(name, "is missing")),
        };
        let hidden_len = need("hidden_size", raw.hidden_size)?;
        let head_count = need("num_attention_heads", raw.num_attention_heads)?;
        let head_dim = need("head_dim", raw.head_dim.or(Some(hidden_len / head_count)))?;
        let layer_count = need("num_hidden_layers", raw.num_hidden_layers)?;
        let mut knobs = (family.knobs)(raw);
        knobs.interleaved_qk = gguf && family.gguf_interleaved_qk;
        let config = Self {
            family: family.name,
            hidden_len,
            ffn_len: need("intermediate_size", raw.intermediate_size)?,
            layer_count,
            head_count,
            kv_head_count: need(
                "num_key_value_heads",
                raw.num_key_value_heads.or(Some(head_count)),
            )?,
            head_dim,
            vocab_len: need("vocab_size", raw.vocab_size)?,
            context_len: need("max_position_embeddings", raw.max_position_embeddings)?,
            norm_eps: raw.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope: rope_config(raw, head_dim)?,
            windows: (family.windows)(raw, layer_count),
            knobs,
            tied: raw.tie_word_embeddings.unwrap_or(family.tied_by_default),
            bos_id: ids(raw.bos_token_id.as_ref()).first().copied(),
            eos_ids: ids(raw.eos_token_id.as_ref()),
        };
        config.check(raw)?;
        Ok(config)
    }

    fn check(&self, raw: &RawConfig) -> Result<()> {
        if let Some(act) = raw.hidden_act.as_deref().filter(|a| *a != "silu") {
            return Err(Error::config("hidden_act", format!("`{act}` is not supported here")));
        }
        if !self.head_count.is_multiple_of(self.kv_head_count) {
            let (heads, kv) = (self.head_count, self.kv_head_count);
            return Err(Error::config(
                "num_key_value_heads",
                format!("{kv} does not divide num_attention_heads {heads}"),
            ));
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim > 1024 {
            return Err(Error::config(
                "head_dim",
                format!("{} is not an even number up to 1024", self.head_dim),
            ));
        }
        if self.layer_count > 4096 {
            return Err(Error::config(
                "num_hidden_layers",
                format!("{} is absurd", self.layer_count),
            ));
        }
        if self.windows.len() != self.layer_count || self.windows.contains(&Some(0)) {
            return Err(Error::config("sliding_window", "does not fit the layers"));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(Error::config("rms_norm_eps", "is not a number >= 0"));
        }
        Ok(())
    }

    /// How keys and values are laid out, given the blocks.
    pub fn kv_geometry(&self, block_count: usize, block_len: usize, dtype: KvDType) -> KvGeometry {
        KvGeometry {
            layer_count: self.layer_count,
            block_count,
            block_len,
            kv_head_count: self.kv_head_count,
            head_dim: self.head_dim,
            dtype,
        }
    }

    /// Width of all query heads together.
    pub fn q_len(&self) -> usize {
        self.head_count * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_len(&self) -> usize {
        self.kv_head_count * self.head_dim
    }
}

/// `None`, one id, or a list of ids.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(v) => id(v).into_iter().collect(),
        None => Vec::new(),
    }
}

fn rope_config(raw: &RawConfig, head_dim: usize) -> Result<RopeConfig> {
    let scaling = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    let scaling = scaling.filter(|v| !v.is_null());
    let number = |name: &str| scaling.and_then(|v| v.get(name)).and_then(Value::as_f64);
    let base = raw.rope_theta.or(number("rope_theta")).unwrap_or(10_000.0);
    let partial = raw.partial_rotary_factor.or(number("partial_rotary_factor")).unwrap_or(1.0);
    let dim = (head_dim as f64 * partial) as usize;
    if !(base.is_finite() && base > 0.0) {
        return Err(Error::config("rope_theta", format!("{base} is not a positive number")));
    }
    if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
        return Err(Error::config(
            "partial_rotary_factor",
            format!("{partial} of head_dim {head_dim} is not an even width inside a head"),
        ));
    }
    let scaling = match (&raw.rope_divisors, scaling) {
        (Some(divisors), _) => RopeScaling::Divisors(check_divisors(divisors, dim)?),
        (None, Some(value)) => rope_scaling(raw, value)?,
        (None, None) => RopeScaling::None,
    };
    Ok(RopeConfig { base, dim, scaling })
}

fn check_divisors(divisors: &[f32], dim: usize) -> Result<Vec<f32>> {
    if divisors.len() != dim / 2 || divisors.iter().any(|d| !d.is_finite() || *d == 0.0) {
        return Err(Error::config("rope_freqs.weight", format!("is not {} divisors", dim / 2)));
    }
    Ok(divisors.to_vec())
}

fn rope_scaling(raw: &RawConfig, value: &Value) -> Result<RopeScaling> {
    let kind = value.get("rope_type").or_else(|| value.get("type")).and_then(Value::as_str);
    let number = |name: &str| value.get(name).and_then(Value::as_f64);
    let need = |name: &str| {
        number(name).filter(|n| n.is_finite() && *n > 0.0).ok_or_else(|| {
            Error::config("rope_scaling", format!("`{name}` is missing or not a positive number"))
        })
    };
    // YaRN files that do not say what they extend extend the context they declare.
    let original = || match number("original_max_position_embeddings") {
        Some(n) => n,
        None => raw.max_position_embeddings.unwrap_or(1) as f64,
    };
    Ok(match kind.unwrap_or("default") {
        "default" | "none" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_context_len: need("original_max_position_embeddings")?,
        },
        "yarn" => RopeScaling::Yarn {
            factor: need("factor")?,
            original_context_len: original(),
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            attention_factor: number("attention_factor"),
            truncate: value.get("truncate").and_then(Value::as_bool).unwrap_or(true),
        },
        other => {
            return Err(Error::config("rope_scaling", format!("type `{other}` is not supported")));
        }
    })
}

/// Puts GGUF metadata under the names of `config.json`.
fn raw_from_gguf(
    meta: &Metadata,
    arch: &str,
    rope_divisors: Option<Vec<f32>>,
) -> Result<RawConfig> {
    let usize_of = |key: &str| -> Result<Option<usize>> {
        Ok(meta.get_opt::<u32>(&format!("{arch}.{key}"))?.map(|n| n as usize))
    };
    let f64_of = |key: &str| -> Result<Option<f64>> {
        Ok(meta.get_opt::<f32>(&format!("{arch}.{key}"))?.map(f64::from))
    };
    let head_dim = usize_of("attention.key_length")?;
    if let (Some(k), Some(v)) = (head_dim, usize_of("attention.value_length")?)
        && k != v
    {
        return Err(Error::config("attention.value_length", format!("{v} differs from {k}")));
    }
    let tokens = meta.get_opt::<Array<'_>>("tokenizer.ggml.tokens")?.map(|a| a.len());
    let mut raw = RawConfig {
        model_type: Some(arch.to_owned()),
        hidden_size: usize_of("embedding_length")?,
        intermediate_size: usize_of("feed_forward_length")?,
        num_hidden_layers: usize_of("block_count")?,
        num_attention_heads: usize_of("attention.head_count")?,
        num_key_value_heads: usize_of("attention.head_count_kv")?,
        head_dim,
        vocab_size: usize_of("vocab_size")?.or(tokens),
        max_position_embeddings: usize_of("context_length")?,
        rms_norm_eps: f64_of("attention.layer_norm_rms_epsilon")?,
        rope_theta: f64_of("rope.freq_base")?,
        sliding_window: usize_of("attention.sliding_window")?,
        bos_token_id: meta.get_opt::<u32>("tokenizer.ggml.bos_token_id")?.map(Value::from),
        eos_token_id: meta.get_opt::<u32>("tokenizer.ggml.eos_token_id")?.map(Value::from),
        tie_word_embeddings: Some(false),
        rope_divisors,
        ..RawConfig::default()
    };
    if let (Some(dim), Some(hidden), Some(heads)) =
        (usize_of("rope.dimension_count")?, raw.hidden_size, raw.num_attention_heads)
    {
        let head_dim = raw.head_dim.unwrap_or(hidden / heads.max(1)).max(1);
        raw.partial_rotary_factor = Some(dim as f64 / head_dim as f64);
    }
    if let Some(kind) = meta.get_opt::<&str>(&format!("{arch}.rope.scaling.type"))? {
        let factor = f64_of("rope.scaling.factor")?;
        // GGUF's factor multiplies YaRN's own temperature, that of `config.json` replaces it.
        let temperature = 0.1 * factor.unwrap_or(1.0).max(1.0).ln() + 1.0;
        raw.rope_scaling = Some(serde_json::json!({
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": usize_of("rope.scaling.original_context_length")?,
            "attention_factor": f64_of("rope.scaling.attn_factor")?.map(|f| f * temperature),
            "beta_fast": f64_of("rope.scaling.yarn_beta_fast")?,
            "beta_slow": f64_of("rope.scaling.yarn_beta_slow")?,
        }));
    }
    Ok(raw)
}
