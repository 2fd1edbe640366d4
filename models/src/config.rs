//! What a model is, in numbers: `config.json` or GGUF metadata -> one validated [`ModelConfig`].
//!
//! Two steps, two types. [`RawConfig`] holds what the file says, nothing checked; the family
//! (`families/*.rs`) turns it into knobs; `ModelConfig::new` checks every number that a layer will
//! later rely on. Deliberately absent: the values of weights, devices, tokenizers.

mod encoder;
mod gguf;
mod raw;
mod rope;

pub use encoder::{EncoderConfig, TensorNames};
pub use raw::{Present, RawConfig};
pub use rope::{RopeConfig, RopeScaling, yarn_temperature};

use hearth_kernels::activation::Gate;
use hearth_kernels::experts::Routing;
use serde_json::Value;

use crate::families::{self, Family};
use crate::kv_store::KvGeometry;
use crate::weights::{Weights, safetensors};
use crate::{Error, KvDType, Result};

/// A decoder, validated. Lengths count elements.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Name of the family, as its file in `families/` has it.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden_len: usize,
    /// Width inside the MLP, or inside each of its experts.
    pub ffn_len: usize,
    /// How rows are given to experts, where the MLP of every layer has some.
    pub experts: Option<Routing>,
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
    /// That of layers with a window, where it is another one.
    pub local_rope: Option<RopeConfig>,
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
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Knobs {
    /// Q, K and V projections must have a bias.
    pub qkv_bias: bool,
    /// The output projection of attention must have a bias.
    pub out_bias: bool,
    /// Gate, up and down must have a bias, and routers beside experts.
    pub mlp_bias: bool,
    /// RMS norm of every query and key head.
    pub qk_norm: bool,
    /// RMS norm of what attention and the MLP bring, before it is added.
    pub post_norms: bool,
    /// The file stores every norm as what is to be added to one (SafeTensors of Gemma).
    pub norms_from_one: bool,
    /// What opens the gate of the MLP.
    pub gate: Gate,
    /// Multiplies the embeddings.
    pub embedding_scale: Option<f32>,
    /// Multiplies the scores of attention in place of `1 / sqrt(head_dim)`.
    pub query_scale: Option<f32>,
    /// Bounds the scores of attention.
    pub attention_softcap: Option<f32>,
    /// Bounds the logits.
    pub logit_softcap: Option<f32>,
    /// The file stores Q and K rows for rotation of adjacent pairs (GGUF of the Llama type).
    pub interleaved_qk: bool,
    /// Attention has a sink for every query head.
    pub sinks: bool,
    /// How files name and lay out the parts.
    pub naming: Naming,
}

/// Names and layouts of tensors that most families share, and others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Naming {
    /// Those of Llama, and of Qwen3 with experts.
    #[default]
    Usual,
    /// Those of gpt-oss.
    GptOss,
}

impl ModelConfig {
    /// From the text of `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        let unreadable = |e| Error::config("config.json", format!("cannot be read: {e}"));
        let json: Value = serde_json::from_str(text).map_err(unreadable)?;
        let quantization = safetensors::unreadable_quantization(&json);
        let raw: RawConfig = serde_json::from_value(json).map_err(unreadable)?;
        let model_type = raw.model_type.as_deref().unwrap_or_default();
        let family = families::by_model_type(model_type).ok_or_else(|| {
            Error::config(
                "model_type",
                format!("`{model_type}` is not supported; known: {}", families::known()),
            )
        })?;
        // Codes and scales of experts, which the loader knows.
        let known = (family.name == "gpt_oss").then_some("mxfp4");
        if let Some(method) = quantization.filter(|method| Some(method.as_str()) != known) {
            let what = format!("`{method}` cannot be read by this build");
            return Err(Error::config("quantization_config", what));
        }
        Self::new(family, &raw)
    }

    /// From the metadata of a GGUF file, and from what its tensors say better: how large the
    /// vocabulary is, whether the output is tied, which divisors the rotary frequencies have.
    pub fn from_gguf(weights: &Weights) -> Result<Self> {
        const ARCHITECTURE: &str = "general.architecture";
        let Some(meta) = weights.metadata() else {
            return Err(Error::config(ARCHITECTURE, "is missing: this is no GGUF file"));
        };
        let arch = meta.get::<&str>(ARCHITECTURE)?;
        let family = families::by_gguf_architecture(arch).ok_or_else(|| {
            let known = families::known();
            Error::config(ARCHITECTURE, format!("`{arch}` is not supported; known: {known}"))
        })?;
        let raw = gguf::raw(weights, meta, arch, family)?;
        Self::new(family, &raw).map_err(|e| gguf::in_its_words(e, arch))
    }

    fn new(family: &Family, raw: &RawConfig) -> Result<Self> {
        let hidden_len = counted("hidden_size", raw.hidden_size)?;
        let head_count = counted("num_attention_heads", raw.num_attention_heads)?;
        let by_default = family.head_dim_by_default.filter(|_| !raw.is_gguf());
        let by_default = by_default.or(Some(hidden_len / head_count));
        let head_dim = counted("head_dim", raw.head_dim.or(by_default))?;
        let layer_count = counted_up_to(4096, "num_hidden_layers", raw.num_hidden_layers)?;
        let kv_heads = raw.num_key_value_heads.unwrap_or(family.kv_heads_by_default);
        let mut knobs = (family.knobs)(raw);
        knobs.interleaved_qk = raw.is_gguf() && family.gguf_interleaved_qk;
        if family.says_its_rope && !raw.is_gguf() {
            rope::is_said(raw)?;
        }
        let (rope, local_rope) = match family.local_rope {
            true => rope::global_and_local(raw, head_dim)?,
            false => {
                let rope = rope::global(raw, head_dim)?;
                if raw.rope_local_base_freq.is_some_and(|base| base != rope.base) {
                    let what = "differs between kinds of layers, which is not supported here";
                    return Err(Error::config("rope_local_base_freq", what));
                }
                (rope, None)
            }
        };
        let bidirectional = raw.use_bidirectional_attention.as_ref();
        if bidirectional.is_some_and(|all| !matches!(all, Value::Bool(false) | Value::Null)) {
            let what = "tokens that see those behind them are not supported";
            return Err(Error::config("use_bidirectional_attention", what));
        }
        let config = Self {
            family: family.name,
            hidden_len,
            ffn_len: match family.experts {
                Some(MOE_WIDTH) => counted(MOE_WIDTH, raw.moe_intermediate_size)?,
                Some(_) if raw.is_gguf() => counted(MOE_WIDTH, raw.moe_intermediate_size)?,
                key => counted(key.unwrap_or("intermediate_size"), raw.intermediate_size)?,
            },
            experts: family.experts.map(|_| routing(raw, &knobs)).transpose()?,
            layer_count,
            head_count,
            kv_head_count: counted("num_key_value_heads", kv_heads.or(Some(head_count)))?,
            head_dim,
            vocab_len: counted("vocab_size", raw.vocab_size)?,
            context_len: counted("max_position_embeddings", raw.max_position_embeddings)?,
            norm_eps: raw.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope,
            local_rope,
            windows: (family.windows)(raw, layer_count)?,
            knobs,
            tied: raw.tie_word_embeddings.unwrap_or(family.tied_by_default),
            bos_id: ids(raw.bos_token_id.as_ref()).first().copied(),
            eos_ids: ids(raw.eos_token_id.as_ref()),
        };
        config.check(raw)?;
        Ok(config)
    }

    fn check(&self, raw: &RawConfig) -> Result<()> {
        self.knobs.check(raw)?;
        if !self.head_count.is_multiple_of(self.kv_head_count) {
            let (heads, kv) = (self.head_count, self.kv_head_count);
            let what = format!("{kv} does not divide the {heads} attention heads");
            return Err(Error::config("num_key_value_heads", what));
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim > 1024 {
            let what = format!("{} is not an even number up to 1024", self.head_dim);
            return Err(Error::config("head_dim", what));
        }
        self.rope.check("rope_theta", self.head_dim)?;
        if let Some(local) = &self.local_rope {
            local.check("rope_local_base_freq", self.head_dim)?;
        }
        if self.windows.len() != self.layer_count || self.windows.contains(&Some(0)) {
            return Err(Error::config("sliding_window", "does not fit the layers"));
        }
        let experts = self.experts.map_or(0, |routing| routing.count * self.layer_count);
        if experts > EXPERTS_MAX {
            let what = format!("{experts} in all layers are absurd");
            return Err(Error::config("num_experts", what));
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

    /// One of `size` ranks that divide the model: fewer heads, a narrower MLP, the rest as it is.
    ///
    /// # Errors
    /// Heads or widths that cannot be divided evenly, by name.
    pub fn divided(&self, size: usize) -> Result<Self> {
        let even = |key: &str, what: &str, count: usize| match size > 0
            && count.is_multiple_of(size)
        {
            true => Ok(count / size),
            false => {
                let what = format!("{count}: the {what} cannot be divided among {size} devices");
                Err(Error::config(key, what))
            }
        };
        Ok(Self {
            head_count: even("num_attention_heads", "query heads", self.head_count)?,
            kv_head_count: even("num_key_value_heads", "key and value heads", self.kv_head_count)?,
            ffn_len: match self.experts {
                None => even("intermediate_size", "width of the MLP", self.ffn_len)?,
                Some(_) => {
                    let key = families::by_name(self.family).and_then(|family| family.experts);
                    even(key.unwrap_or(MOE_WIDTH), "width of an expert", self.ffn_len)?
                }
            },
            ..self.clone()
        })
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

impl Knobs {
    /// What multiplies the scores of attention.
    pub fn query_scale(&self, head_dim: usize) -> f32 {
        self.query_scale.unwrap_or((head_dim as f64).powf(-0.5) as f32)
    }

    fn check(&self, raw: &RawConfig) -> Result<()> {
        if self.gate == Gate::ClampedSwiglu {
            // GGUF has no words for them.
            for (key, number, fixed) in
                [("swiglu_alpha", raw.swiglu_alpha, 1.702), ("swiglu_limit", raw.swiglu_limit, 7.0)]
            {
                if number.is_some_and(|number| number != fixed) {
                    return Err(Error::config(key, format!("other than {fixed} is not supported")));
                }
            }
        }
        // In the first files of Gemma `hidden_act` says `gelu` and means the approximation.
        let (known, other): (&[&str], &[&str]) = match self.gate {
            Gate::Silu | Gate::ClampedSwiglu => (&["silu"], &["silu"]),
            Gate::GeluTanh => (&["gelu_pytorch_tanh", "gelu"], &["gelu_pytorch_tanh"]),
        };
        for (key, activation, known) in [
            ("hidden_act", &raw.hidden_act, known),
            ("hidden_activation", &raw.hidden_activation, other),
        ] {
            // From the second generation of Gemma on only the newer key is read.
            if key == "hidden_act" && self.post_norms && raw.hidden_activation.is_some() {
                continue;
            }
            if let Some(strange) = activation.as_deref().filter(|name| !known.contains(name)) {
                return Err(Error::config(key, format!("`{strange}` is not supported here")));
            }
        }
        for (key, number) in [
            ("query_pre_attn_scalar", self.query_scale),
            ("attn_logit_softcapping", self.attention_softcap),
            ("final_logit_softcapping", self.logit_softcap),
        ] {
            if number.is_some_and(|number| !(number.is_finite() && number > 0.0)) {
                return Err(Error::config(key, "is not a positive number"));
            }
        }
        Ok(())
    }
}

/// In all layers; the largest models have some 25,000.
const EXPERTS_MAX: usize = 1 << 18;

const MOE_WIDTH: &str = "moe_intermediate_size";

/// How rows are given to experts.
fn routing(raw: &RawConfig, knobs: &Knobs) -> Result<Routing> {
    const USED: &str = "num_experts_per_tok";
    let key = match raw.num_local_experts {
        Some(_) => "num_local_experts",
        None => "num_experts",
    };
    let count = counted_up_to(4096, key, raw.num_experts.or(raw.num_local_experts))?;
    let used = counted(USED, raw.num_experts_per_tok)?;
    if used > count {
        return Err(Error::config(USED, format!("{used} is more than the {count} experts")));
    }
    if raw.decoder_sparse_step.is_some_and(|step| step != 1) {
        let what = "layers without experts between others are not supported";
        return Err(Error::config("decoder_sparse_step", what));
    }
    if raw.mlp_only_layers.as_ref().is_some_and(|layers| !layers.is_empty()) {
        let what = "layers without experts between others are not supported";
        return Err(Error::config("mlp_only_layers", what));
    }
    // GGUF has no word for it: its readers normalise. gpt-oss has none either, and does.
    let normalized = match knobs.naming {
        Naming::Usual => raw.norm_topk_prob.unwrap_or(raw.is_gguf()),
        Naming::GptOss => true,
    };
    Ok(Routing { count, used, normalized })
}

/// A count that must be there and can be believed.
fn counted(name: &str, value: Option<usize>) -> Result<usize> {
    counted_up_to(1 << 24, name, value)
}

fn counted_up_to(max: usize, name: &str, value: Option<usize>) -> Result<usize> {
    match value {
        Some(0) => Err(Error::config(name, "must not be 0")),
        Some(n) if n > max => Err(Error::config(name, format!("{n} is absurd"))),
        Some(n) => Ok(n),
        None => Err(Error::config(name, "is missing")),
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
