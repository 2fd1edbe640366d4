//! What the weights of a decoder are for: their names in both formats, their shapes, their order.
//!
//! The only place that knows which tensors a configuration asks for. Deliberately absent: bytes.

use crate::config::{ModelConfig, Naming};

/// What a tensor is for. The number is the layer, a second one the expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the part of the decoder they belong to")]
pub enum Role {
    Embedding,
    Norm,
    Head,
    AttentionNorm(usize),
    Q(usize),
    K(usize),
    V(usize),
    Out(usize),
    QNorm(usize),
    KNorm(usize),
    Sinks(usize),
    PostAttentionNorm(usize),
    MlpNorm(usize),
    /// The same between two norms behind attention and MLP, where files name it otherwise.
    PreMlpNorm(usize),
    PostMlpNorm(usize),
    Gate(usize),
    Up(usize),
    Down(usize),
    Router(usize),
    ExpertGate(usize, usize),
    ExpertUp(usize, usize),
    ExpertDown(usize, usize),
}

impl Role {
    /// Every weight that `config` asks for, in the order in which the decoder takes them.
    pub fn all(config: &ModelConfig) -> Vec<Self> {
        let mut all = vec![Self::Embedding];
        for l in 0..config.layer_count {
            all.extend([Self::Q(l), Self::K(l), Self::V(l), Self::Out(l)]);
            match config.experts {
                None => all.extend([Self::Gate(l), Self::Up(l), Self::Down(l)]),
                Some(routing) => {
                    all.push(Self::Router(l));
                    all.extend((0..routing.count).map(|e| Self::ExpertGate(l, e)));
                    all.extend((0..routing.count).map(|e| Self::ExpertUp(l, e)));
                    all.extend((0..routing.count).map(|e| Self::ExpertDown(l, e)));
                }
            }
            if config.knobs.qk_norm {
                all.extend([Self::QNorm(l), Self::KNorm(l)]);
            }
            all.extend(config.knobs.sinks.then_some(Self::Sinks(l)));
            match config.knobs.post_norms {
                false => all.extend([Self::AttentionNorm(l), Self::MlpNorm(l)]),
                true => {
                    all.extend([Self::PostAttentionNorm(l), Self::PostMlpNorm(l)]);
                    all.extend([Self::AttentionNorm(l), Self::PreMlpNorm(l)]);
                }
            }
        }
        all.push(Self::Norm);
        all.extend((!config.tied).then_some(Self::Head));
        all
    }

    /// `[n]` of a norm, `[n, k]` of a matrix with n outputs and k inputs.
    pub fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let (hidden, ffn) = (config.hidden_len, config.ffn_len);
        match self {
            Self::Embedding | Self::Head => vec![config.vocab_len, hidden],
            Self::Q(_) => vec![config.q_len(), hidden],
            Self::K(_) | Self::V(_) => vec![config.kv_len(), hidden],
            Self::Out(_) => vec![hidden, config.q_len()],
            Self::Gate(_) | Self::Up(_) => vec![ffn, hidden],
            Self::ExpertGate(..) | Self::ExpertUp(..) => vec![ffn, hidden],
            Self::Down(_) | Self::ExpertDown(..) => vec![hidden, ffn],
            Self::Router(_) => vec![config.experts.map_or(0, |routing| routing.count), hidden],
            Self::QNorm(_) | Self::KNorm(_) => vec![config.head_dim],
            Self::Sinks(_) => vec![config.head_count],
            Self::Norm | Self::AttentionNorm(_) | Self::PostAttentionNorm(_) => vec![hidden],
            Self::MlpNorm(_) | Self::PreMlpNorm(_) | Self::PostMlpNorm(_) => vec![hidden],
        }
    }

    /// Whether it may stand beside a bias of its own, which is then as long as its outputs.
    pub(super) fn may_have_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Q(_) | Self::K(_) | Self::V(_) | Self::Out(_) | Self::Head => true,
            Self::Gate(_) | Self::Up(_) | Self::Down(_) => true,
            Self::Embedding | Self::Norm | Self::QNorm(_) | Self::KNorm(_) => false,
            Self::Sinks(_) => false,
            Self::Router(_) => config.knobs.mlp_bias,
            Self::ExpertGate(..) | Self::ExpertUp(..) | Self::ExpertDown(..) => {
                config.knobs.mlp_bias
            }
            Self::AttentionNorm(_) | Self::PostAttentionNorm(_) => false,
            Self::MlpNorm(_) | Self::PreMlpNorm(_) | Self::PostMlpNorm(_) => false,
        }
    }

    /// Whether it scales what was normalised.
    pub fn is_norm(self) -> bool {
        match self {
            Self::Embedding | Self::Head => false,
            Self::Q(_) | Self::K(_) | Self::V(_) | Self::Out(_) => false,
            Self::Gate(_) | Self::Up(_) | Self::Down(_) | Self::Router(_) => false,
            Self::Sinks(_) => false,
            Self::ExpertGate(..) | Self::ExpertUp(..) | Self::ExpertDown(..) => false,
            Self::Norm | Self::QNorm(_) | Self::KNorm(_) | Self::AttentionNorm(_) => true,
            Self::MlpNorm(_) | Self::PreMlpNorm(_) => true,
            Self::PostAttentionNorm(_) | Self::PostMlpNorm(_) => true,
        }
    }

    /// Which of how many matrices of its kind it is, where a layer has one for each expert.
    pub fn expert(self, config: &ModelConfig) -> Option<[usize; 2]> {
        match self {
            Self::ExpertGate(_, e) | Self::ExpertUp(_, e) | Self::ExpertDown(_, e) => {
                Some([e, config.experts.map_or(0, |routing| routing.count)])
            }
            _ => None,
        }
    }

    /// Whether the family has a bias here that must not be missing.
    pub fn needs_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Q(_) | Self::K(_) | Self::V(_) => config.knobs.qkv_bias,
            Self::Out(_) => config.knobs.out_bias,
            Self::Gate(_) | Self::Up(_) | Self::Down(_) => config.knobs.mlp_bias,
            Self::Router(_) => config.knobs.mlp_bias,
            Self::ExpertGate(..) | Self::ExpertUp(..) | Self::ExpertDown(..) => {
                config.knobs.mlp_bias
            }
            _ => false,
        }
    }

    /// Stem of the tensor's name in a SafeTensors folder and in a GGUF file; `{}` is the layer,
    /// `{e}` the expert. In GGUF the matrices of all experts are one tensor.
    fn stems(self) -> (Option<usize>, &'static str, &'static str) {
        match self {
            Self::Embedding => (None, "model.embed_tokens", "token_embd"),
            Self::Norm => (None, "model.norm", "output_norm"),
            Self::Head => (None, "lm_head", "output"),
            Self::AttentionNorm(l) => {
                (Some(l), "model.layers.{}.input_layernorm", "blk.{}.attn_norm")
            }
            Self::Q(l) => (Some(l), "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
            Self::K(l) => (Some(l), "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
            Self::V(l) => (Some(l), "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
            Self::Out(l) => (Some(l), "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
            Self::QNorm(l) => (Some(l), "model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
            Self::KNorm(l) => (Some(l), "model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
            Self::Sinks(l) => (Some(l), "model.layers.{}.self_attn.sinks", "blk.{}.attn_sinks"),
            Self::MlpNorm(l) => {
                (Some(l), "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm")
            }
            Self::PostAttentionNorm(l) => {
                let json = "model.layers.{}.post_attention_layernorm";
                (Some(l), json, "blk.{}.post_attention_norm")
            }
            Self::PreMlpNorm(l) => {
                (Some(l), "model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm")
            }
            Self::PostMlpNorm(l) => {
                (Some(l), "model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm")
            }
            Self::Gate(l) => (Some(l), "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
            Self::Up(l) => (Some(l), "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
            Self::Down(l) => (Some(l), "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
            Self::Router(l) => (Some(l), "model.layers.{}.mlp.gate", "blk.{}.ffn_gate_inp"),
            Self::ExpertGate(l, _) => {
                (Some(l), "model.layers.{}.mlp.experts.{e}.gate_proj", "blk.{}.ffn_gate_exps")
            }
            Self::ExpertUp(l, _) => {
                (Some(l), "model.layers.{}.mlp.experts.{e}.up_proj", "blk.{}.ffn_up_exps")
            }
            Self::ExpertDown(l, _) => {
                (Some(l), "model.layers.{}.mlp.experts.{e}.down_proj", "blk.{}.ffn_down_exps")
            }
        }
    }

    /// The same in files of gpt-oss, where it is another one.
    fn stems_of_gpt_oss(self) -> Option<(Option<usize>, &'static str, &'static str)> {
        let (layer, _, ggml) = self.stems();
        let json = match self {
            Self::MlpNorm(l) => return Some(Self::PostAttentionNorm(l).stems()),
            Self::Router(_) => "model.layers.{}.mlp.router",
            Self::ExpertGate(..) | Self::ExpertUp(..) => "model.layers.{}.mlp.experts.gate_up_proj",
            Self::ExpertDown(..) => "model.layers.{}.mlp.experts.down_proj",
            _ => return None,
        };
        Some((layer, json, ggml))
    }

    /// Its name in a file of a configuration; `suffix` is `weight` or `bias`.
    pub fn name_in(self, naming: Naming, gguf: bool, suffix: &str) -> String {
        let bare = matches!(self, Self::ExpertGate(..) | Self::ExpertUp(..) | Self::ExpertDown(..));
        let stems = self.stems_of_gpt_oss().filter(|_| naming == Naming::GptOss);
        match (self, stems) {
            (Self::Sinks(_), _) if !gguf => self.written(self.stems(), gguf, ""),
            (_, Some(stems)) if bare && !gguf => match suffix {
                "weight" => self.written(stems, gguf, ""),
                suffix => self.written(stems, gguf, &format!("_{suffix}")),
            },
            (_, stems) => {
                let stems = stems.unwrap_or(self.stems());
                self.written(stems, gguf, &format!(".{suffix}"))
            }
        }
    }

    /// The same where names are the usual ones.
    pub fn name(self, gguf: bool, suffix: &str) -> String {
        self.name_in(Naming::Usual, gguf, suffix)
    }

    fn written(
        self,
        (layer, hf, ggml): (Option<usize>, &str, &str),
        gguf: bool,
        suffix: &str,
    ) -> String {
        let mut stem = if gguf { ggml } else { hf }.to_owned();
        if let Some(layer) = layer {
            stem = stem.replace("{}", &layer.to_string());
        }
        match self {
            Self::ExpertGate(_, e) | Self::ExpertUp(_, e) | Self::ExpertDown(_, e) => {
                stem = stem.replace("{e}", &e.to_string());
            }
            _ => {}
        }
        stem + suffix
    }
}
