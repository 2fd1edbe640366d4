//! From a role in the architecture to numbers: names, shapes, row order, page release.
//!
//! Every tensor is read once, in the order the decoder asks, and its pages are let go as soon as
//! the backend has taken them, so resident memory stays at one copy of the weights.

use std::collections::HashSet;

use hearth_kernels::quant::{self, DType};

use super::{Format, TensorView, Weights};
use crate::config::ModelConfig;
use crate::{Error, Result};

/// What a tensor is for. The number is the layer.
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
    MlpNorm(usize),
    Gate(usize),
    Up(usize),
    Down(usize),
}

impl Role {
    /// Stem of the tensor's name in a SafeTensors folder and in a GGUF file; `{}` is the layer.
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
            Self::MlpNorm(l) => {
                (Some(l), "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm")
            }
            Self::Gate(l) => (Some(l), "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
            Self::Up(l) => (Some(l), "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
            Self::Down(l) => (Some(l), "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
        }
    }

    /// The tensor's name in a SafeTensors folder or in a GGUF file; `suffix` is `weight` or `bias`.
    pub fn name(self, gguf: bool, suffix: &str) -> String {
        let (layer, hf, ggml) = self.stems();
        let stem = if gguf { ggml } else { hf };
        match layer {
            Some(layer) => format!("{}.{suffix}", stem.replace("{}", &layer.to_string())),
            None => format!("{stem}.{suffix}"),
        }
    }
}

/// A matrix on its way from a file to a backend. `W [n, k]`, `y = x W^T`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixSource<'a> {
    /// Element or block type.
    pub dtype: DType,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Rows as the file has them.
    pub bytes: &'a [u8],
    /// Head width, when the file has the rows of each head in the order of adjacent pairs.
    pub interleaved: Option<usize>,
}

impl<'a> MatrixSource<'a> {
    /// Bytes of output `row`.
    ///
    /// GGUF files of the Llama type store row `s * half + j` of a head at `2 j + s`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let source = match self.interleaved {
            Some(head_dim) => {
                let (head, r) = (row / head_dim, row % head_dim);
                let (s, j) = (r / (head_dim / 2), r % (head_dim / 2));
                head * head_dim + 2 * j + s
            }
            None => row,
        };
        let len = self.bytes.len() / self.n;
        &self.bytes[source * len..(source + 1) * len]
    }

    /// All rows as floats, in order. `[n * k]`
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        for (row, out) in out.chunks_exact_mut(self.k).enumerate() {
            quant::dequantize(self.dtype, self.row(row), out);
        }
        out
    }
}

/// Hands out the tensors of one model.
pub struct Loader<'a> {
    weights: &'a Weights,
    interleaved: Option<usize>,
    used: HashSet<String>,
    progress: &'a mut dyn FnMut(usize),
}

impl<'a> Loader<'a> {
    /// `progress` is told the bytes of every tensor as it is taken.
    pub fn new(
        weights: &'a Weights,
        config: &ModelConfig,
        progress: &'a mut dyn FnMut(usize),
    ) -> Self {
        let interleaved = config.knobs.interleaved_qk.then_some(config.head_dim);
        Self { weights, interleaved, used: HashSet::new(), progress }
    }

    /// Whether the file has this weight.
    pub fn has(&self, role: Role) -> bool {
        self.weights.has(&self.name(role, "weight"))
    }

    /// Gives the matrix to `take` and then lets its pages go.
    pub fn matrix<T>(
        &mut self,
        role: Role,
        n: usize,
        k: usize,
        take: impl FnOnce(&MatrixSource<'_>) -> Result<T>,
    ) -> Result<T> {
        let name = self.name(role, "weight");
        let view = self.view(&name, &[n, k])?;
        let interleaved = self.rotated(role);
        let source = MatrixSource { dtype: view.dtype, n, k, bytes: view.bytes, interleaved };
        let taken = take(&source)?;
        self.weights.release(&name);
        Ok(taken)
    }

    /// A norm.
    pub fn vector(&mut self, role: Role, n: usize) -> Result<Vec<f32>> {
        let name = self.name(role, "weight");
        let view = self.view(&name, &[n])?;
        Ok(to_f32(&view, n))
    }

    /// The bias of a projection; absent is an error only when `required`.
    pub fn bias(&mut self, role: Role, n: usize, required: bool) -> Result<Option<Vec<f32>>> {
        let name = self.name(role, "bias");
        if !required && !self.weights.has(&name) {
            return Ok(None);
        }
        let view = self.view(&name, &[n])?;
        if view.dtype.block_len() > 1 {
            return Err(Error::Tensor { name, what: "a bias cannot be quantised".into() });
        }
        let interleaved = self.rotated(role);
        let source = MatrixSource { dtype: view.dtype, n, k: 1, bytes: view.bytes, interleaved };
        Ok(Some(source.to_f32()))
    }

    /// Fails when the file holds a tensor that nothing asked for.
    pub fn finish(&self) -> Result<()> {
        let ignored = |name: &str| {
            // Recomputed from the configuration, read with it, or the second copy of a tied head.
            name.ends_with("rotary_emb.inv_freq")
                || name == "rope_freqs.weight"
                || name == "lm_head.weight"
        };
        let unknown = |name: &&str| !self.used.contains(*name) && !ignored(name);
        let left: Vec<&str> = self.weights.names().filter(unknown).collect();
        match left.first() {
            None => Ok(()),
            Some(first) => Err(Error::Tensor {
                name: (*first).to_owned(),
                what: format!(
                    "has no place in this architecture ({} such tensors); \
                     the model would not be what it claims",
                    left.len()
                ),
            }),
        }
    }

    fn name(&self, role: Role, suffix: &str) -> String {
        role.name(self.weights.format() == Format::Gguf, suffix)
    }

    fn rotated(&self, role: Role) -> Option<usize> {
        self.interleaved.filter(|_| matches!(role, Role::Q(_) | Role::K(_)))
    }

    fn view<'n>(&mut self, name: &'n str, shape: &[usize]) -> Result<TensorView<'n>>
    where
        'a: 'n,
    {
        let view = self.weights.tensor(name)?;
        if view.shape != shape {
            return Err(Error::Tensor {
                name: name.to_owned(),
                what: format!("has shape {:?}, the configuration says {shape:?}", view.shape),
            });
        }
        (self.progress)(view.bytes.len());
        self.used.insert(name.to_owned());
        Ok(view)
    }
}

fn to_f32(view: &TensorView<'_>, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n];
    quant::dequantize(view.dtype, view.bytes, &mut out);
    out
}
