//! What an encoder is, in numbers: `config.json` or GGUF metadata -> one validated
//! [`EncoderConfig`].

use hearth_kernels::activation::Gelu;
use hearth_kernels::attention::Heads;
use serde::Deserialize;

use super::gguf::{self, Keys};
use super::{counted, counted_up_to};
use crate::families::{self, EncoderFamily};
use crate::weights::Weights;
use crate::{Error, Result};

/// An encoder, validated. Lengths count elements.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    /// Name of the family, as its file in `families/` has it.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden_len: usize,
    /// Width inside the MLP.
    pub ffn_len: usize,
    /// Layers.
    pub layer_count: usize,
    /// Heads; divides `hidden_len`.
    pub head_count: usize,
    /// Rows of the token embedding.
    pub vocab_len: usize,
    /// Rows of the position embedding: tokens of one text.
    pub context_len: usize,
    /// Rows of the embedding of segment types.
    pub type_count: usize,
    /// Epsilon of every layer norm.
    pub norm_eps: f32,
    /// Which GELU.
    pub gelu: Gelu,
    /// How the file spells names.
    pub names: TensorNames,
}

/// Spellings of tensor names that are about in SafeTensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorNames {
    /// Before every name: empty, or the family with a dot.
    pub prefix: &'static str,
    /// The parts of a norm are `gamma` and `beta`, not `weight` and `bias`.
    pub gamma_beta: bool,
}

/// The keys of `config.json`, under their names there, nothing checked.
#[derive(Clone, Debug, Default, Deserialize)]
struct Raw {
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    type_vocab_size: Option<usize>,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    position_embedding_type: Option<String>,
    is_decoder: Option<bool>,
    add_cross_attention: Option<bool>,
}

impl EncoderConfig {
    /// From the text of `config.json`, where it is of an encoder family; how names are spelled,
    /// from the weights beside it.
    pub(crate) fn from_json(text: &str, weights: &Weights) -> Result<Option<Self>> {
        #[derive(Deserialize)]
        struct Kind {
            model_type: Option<String>,
        }
        // What cannot be read is reported by who reads it as a decoder's.
        let Ok(Kind { model_type: Some(kind) }) = serde_json::from_str(text) else {
            return Ok(None);
        };
        let Some(family) = families::encoder_by_model_type(&kind) else { return Ok(None) };
        let raw: Raw = serde_json::from_str(text)
            .map_err(|e| Error::config("config.json", format!("cannot be read: {e}")))?;
        let has = |name: &str| weights.names().any(|tensor| tensor == name);
        let tokens = "embeddings.word_embeddings.weight";
        let prefix = match has(&format!("{}{tokens}", family.prefix)) {
            true => family.prefix,
            false => "",
        };
        let gamma_beta = has(&format!("{prefix}embeddings.LayerNorm.gamma"));
        Self::new(family, &raw, TensorNames { prefix, gamma_beta }).map(Some)
    }

    /// From the metadata of a GGUF file and the shapes of its tensors, where it is of an encoder
    /// family.
    pub(crate) fn from_gguf(weights: &Weights) -> Result<Option<Self>> {
        let Some(meta) = weights.metadata() else { return Ok(None) };
        let arch = meta.get::<&str>("general.architecture")?;
        let Some(family) = families::encoder_by_gguf_architecture(arch) else { return Ok(None) };
        let keys = Keys { meta, arch };
        if meta.get_opt::<bool>(&keys.of("attention.causal"))? == Some(true) {
            return Err(keys.wrong("attention.causal", "an encoder looks both ways"));
        }
        let raw = Raw {
            hidden_size: keys.named("hidden_size")?,
            intermediate_size: keys.named("intermediate_size")?,
            num_hidden_layers: keys.named("num_hidden_layers")?,
            num_attention_heads: keys.named("num_attention_heads")?,
            vocab_size: Some(gguf::rows(weights, "token_embd.weight")?),
            max_position_embeddings: keys.named("max_position_embeddings")?,
            type_vocab_size: Some(gguf::rows(weights, "token_types.weight")?),
            layer_norm_eps: keys.number("attention.layer_norm_epsilon")?,
            ..Raw::default()
        };
        let config = Self::new(family, &raw, TensorNames::default());
        config.map(Some).map_err(|e| gguf::in_its_words(e, arch))
    }

    fn new(family: &EncoderFamily, raw: &Raw, names: TensorNames) -> Result<Self> {
        for (key, set) in
            [("is_decoder", raw.is_decoder), ("add_cross_attention", raw.add_cross_attention)]
        {
            if set == Some(true) {
                return Err(Error::config(key, "is true, and this build runs encoders alone"));
            }
        }
        if let Some(kind) = raw.position_embedding_type.as_deref().filter(|k| *k != "absolute") {
            let what = format!("`{kind}` is not supported");
            return Err(Error::config("position_embedding_type", what));
        }
        let config = Self {
            family: family.name,
            hidden_len: counted("hidden_size", raw.hidden_size)?,
            ffn_len: counted("intermediate_size", raw.intermediate_size)?,
            layer_count: counted_up_to(4096, "num_hidden_layers", raw.num_hidden_layers)?,
            head_count: counted("num_attention_heads", raw.num_attention_heads)?,
            vocab_len: counted("vocab_size", raw.vocab_size)?,
            context_len: counted("max_position_embeddings", raw.max_position_embeddings)?,
            type_count: counted("type_vocab_size", raw.type_vocab_size.or(Some(2)))?,
            norm_eps: raw.layer_norm_eps.unwrap_or(1e-12) as f32,
            gelu: gelu(raw.hidden_act.as_deref().unwrap_or("gelu"))?,
            names,
        };
        let heads = config.head_count;
        if !config.hidden_len.is_multiple_of(heads) || config.hidden_len / heads > 1024 {
            let what = format!("{heads} does not cut {} into heads", config.hidden_len);
            return Err(Error::config("num_attention_heads", what));
        }
        if !(config.norm_eps.is_finite() && config.norm_eps >= 0.0) {
            return Err(Error::config("layer_norm_eps", "is not a number >= 0"));
        }
        Ok(config)
    }

    /// The heads of every layer.
    pub fn heads(&self) -> Heads {
        let dim = self.hidden_len / self.head_count;
        Heads { count: self.head_count, dim, scale: 1.0 / (dim as f32).sqrt() }
    }
}

/// The names that Hugging Face has for the two forms.
fn gelu(name: &str) -> Result<Gelu> {
    match name {
        "gelu" | "gelu_python" => Ok(Gelu::Erf),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Ok(Gelu::Tanh),
        other => Err(Error::config("hidden_act", format!("`{other}` is not supported here"))),
    }
}
