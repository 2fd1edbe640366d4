//! What the weights of an encoder are for: their names in both formats, their shapes, their order.
//!
//! Two spellings of SafeTensors are about: names with the prefix of the family (`bert.`) where the
//! file was saved with a head, and `gamma`, `beta` for the parts of a norm where it was converted
//! from the first release. The configuration knows which; see [`EncoderConfig`].

use super::{Format, Layout};
use crate::config::EncoderConfig;

/// What a tensor is for. The number is the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the part of the encoder they belong to")]
pub enum EncoderRole {
    Tokens,
    Positions,
    Types,
    Norm,
    Q(usize),
    K(usize),
    V(usize),
    Out(usize),
    AttentionNorm(usize),
    Up(usize),
    Down(usize),
    OutputNorm(usize),
}

use EncoderRole::*;

impl EncoderRole {
    fn is_table(self) -> bool {
        matches!(self, Tokens | Positions | Types)
    }

    fn is_norm(self) -> bool {
        matches!(self, Norm | AttentionNorm(_) | OutputNorm(_))
    }

    /// Stem of the tensor's name in SafeTensors and in GGUF; `{}` is the layer.
    fn stems(self) -> (Option<usize>, &'static str, &'static str) {
        match self {
            Tokens => (None, "embeddings.word_embeddings", "token_embd"),
            Positions => (None, "embeddings.position_embeddings", "position_embd"),
            Types => (None, "embeddings.token_type_embeddings", "token_types"),
            Norm => (None, "embeddings.LayerNorm", "token_embd_norm"),
            Q(l) => (Some(l), "encoder.layer.{}.attention.self.query", "blk.{}.attn_q"),
            K(l) => (Some(l), "encoder.layer.{}.attention.self.key", "blk.{}.attn_k"),
            V(l) => (Some(l), "encoder.layer.{}.attention.self.value", "blk.{}.attn_v"),
            Out(l) => (Some(l), "encoder.layer.{}.attention.output.dense", "blk.{}.attn_output"),
            AttentionNorm(l) => {
                (Some(l), "encoder.layer.{}.attention.output.LayerNorm", "blk.{}.attn_output_norm")
            }
            Up(l) => (Some(l), "encoder.layer.{}.intermediate.dense", "blk.{}.ffn_up"),
            Down(l) => (Some(l), "encoder.layer.{}.output.dense", "blk.{}.ffn_down"),
            OutputNorm(l) => {
                (Some(l), "encoder.layer.{}.output.LayerNorm", "blk.{}.layer_output_norm")
            }
        }
    }
}

impl Layout for EncoderConfig {
    type Role = EncoderRole;

    fn roles(&self) -> Vec<EncoderRole> {
        let mut all = vec![Tokens, Positions, Types, Norm];
        for l in 0..self.layer_count {
            all.extend([Q(l), K(l), V(l), Out(l), AttentionNorm(l)]);
            all.extend([Up(l), Down(l), OutputNorm(l)]);
        }
        all
    }

    fn shape(&self, role: EncoderRole) -> Vec<usize> {
        let (hidden, ffn) = (self.hidden_len, self.ffn_len);
        match role {
            Tokens => vec![self.vocab_len, hidden],
            Positions => vec![self.context_len, hidden],
            Types => vec![self.type_count, hidden],
            Q(_) | K(_) | V(_) | Out(_) => vec![hidden, hidden],
            Up(_) => vec![ffn, hidden],
            Down(_) => vec![hidden, ffn],
            Norm | AttentionNorm(_) | OutputNorm(_) => vec![hidden],
        }
    }

    fn name(&self, role: EncoderRole, format: Format, suffix: &str) -> String {
        let (layer, hf, ggml) = role.stems();
        let number = |stem: &str| stem.replace("{}", &layer.unwrap_or_default().to_string());
        if format == Format::Gguf {
            return format!("{}.{suffix}", number(ggml));
        }
        let suffix = match suffix {
            "weight" if self.names.gamma_beta && role.is_norm() => "gamma",
            "bias" if self.names.gamma_beta && role.is_norm() => "beta",
            suffix => suffix,
        };
        format!("{}{}.{suffix}", self.names.prefix, number(hf))
    }

    fn may_have_bias(&self, role: EncoderRole) -> bool {
        !role.is_table()
    }

    fn needs_bias(&self, role: EncoderRole) -> bool {
        !role.is_table()
    }

    /// What only training used: the pooler, heads, a range of positions that was saved too.
    fn ignores(&self, name: &str) -> bool {
        let bare = name.strip_prefix(self.names.prefix).unwrap_or(name);
        bare == "embeddings.position_ids" || bare.starts_with("pooler.") || name.starts_with("cls.")
    }
}
