//! What the file says, unchecked.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::RopeConfig;

/// The keys of `config.json`, under their names there; those of GGUF arrive under the same names.
#[derive(Clone, Debug, Default, Deserialize)]
#[allow(missing_docs, reason = "named by the format")]
pub struct RawConfig {
    pub model_type: Option<String>,
    pub hidden_size: Option<usize>,
    pub intermediate_size: Option<usize>,
    pub moe_intermediate_size: Option<usize>,
    pub num_experts: Option<usize>,
    pub num_local_experts: Option<usize>,
    pub num_experts_per_tok: Option<usize>,
    pub norm_topk_prob: Option<bool>,
    pub decoder_sparse_step: Option<usize>,
    pub mlp_only_layers: Option<Vec<usize>>,
    pub num_hidden_layers: Option<usize>,
    pub num_attention_heads: Option<usize>,
    #[serde(default, deserialize_with = "present")]
    pub num_key_value_heads: Present<usize>,
    pub head_dim: Option<usize>,
    pub vocab_size: Option<usize>,
    pub max_position_embeddings: Option<usize>,
    pub rms_norm_eps: Option<f64>,
    pub rope_theta: Option<f64>,
    pub rope_scaling: Option<Map<String, Value>>,
    pub rope_parameters: Option<Map<String, Value>>,
    pub partial_rotary_factor: Option<f64>,
    pub rope_local_base_freq: Option<f64>,
    pub hidden_act: Option<String>,
    pub hidden_activation: Option<String>,
    pub query_pre_attn_scalar: Option<f64>,
    #[serde(default, deserialize_with = "present")]
    pub attn_logit_softcapping: Present<f64>,
    #[serde(default, deserialize_with = "present")]
    pub final_logit_softcapping: Present<f64>,
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
    pub swiglu_alpha: Option<f64>,
    pub swiglu_limit: Option<f64>,
    pub tie_word_embeddings: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    pub sliding_window: Present<usize>,
    pub use_sliding_window: Option<bool>,
    pub max_window_layers: Option<usize>,
    pub sliding_window_pattern: Option<usize>,
    pub layer_types: Option<Vec<String>>,
    /// `false` everywhere, but where every token sees those behind it (EmbeddingGemma).
    pub use_bidirectional_attention: Option<Value>,
    pub bos_token_id: Option<Value>,
    pub eos_token_id: Option<Value>,
    /// Rotary positions of a GGUF file, which has words of its own for them.
    #[serde(skip)]
    pub gguf_rope: Option<RopeConfig>,
}

impl RawConfig {
    /// Whether a GGUF file says it, not a `config.json`.
    pub(crate) fn is_gguf(&self) -> bool {
        self.gguf_rope.is_some()
    }
}

/// A key whose absence is not its `null`: `None` is absent, `Some(None)` is null.
pub type Present<T> = Option<Option<T>>;

fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    value: D,
) -> std::result::Result<Present<T>, D::Error> {
    Option::deserialize(value).map(Some)
}
