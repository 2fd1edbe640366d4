//! The causal decoder: one for every family, every weight format and both backends.
//!
//! Reads like the paper. What differs between families is in [`ModelConfig`]; what differs between
//! devices is in the backend. Deliberately absent: KV bookkeeping, sampling, any device `match`.

use crate::backend::{AttentionParams, Backend};
use crate::batch::ForwardBatch;
use crate::config::ModelConfig;
use crate::kv_store::{KvGeometry, KvStore};
use crate::layers::attention::Attention;
use crate::layers::linear::Linear;
use crate::layers::mlp::Mlp;
use crate::layers::rotary::Rotary;
use crate::weights::{Loader, Role};
use crate::{Model, Result};

/// A decoder with its weights.
pub struct Decoder<B: Backend> {
    config: ModelConfig,
    ops: B,
    rotary: Rotary,
    /// `[vocab, hidden]`
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    /// `[hidden]`
    norm: B::Vector,
    /// `[vocab, hidden]`; absent when tied to the embedding.
    head: Option<Linear<B>>,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    attention: Attention<B>,
    mlp_norm: B::Vector,
    mlp: Mlp<B>,
}

impl<B: Backend> Decoder<B> {
    /// Takes every weight out of the file, once. A tensor that the architecture has no use for is
    /// an error: a model that is not understood is not loaded.
    pub fn load(config: ModelConfig, loader: &mut Loader<'_>, ops: B) -> Result<Self> {
        loader.check()?;
        let embedding = loader.matrix(Role::Embedding, |source| ops.matrix(source))?;
        let layers = (0..config.layer_count)
            .map(|layer| Layer::load(&config, layer, loader, &ops))
            .collect::<Result<_>>()?;
        let norm = ops.vector(loader.vector(Role::Norm)?)?;
        let head = match config.tied {
            true => None,
            false => Some(Linear::load(loader, &ops, Role::Head)?),
        };
        let rotary = Rotary::new(&config.rope);
        Ok(Self { rotary, embedding, layers, norm, head, config, ops })
    }
}

impl<B: Backend> Model for Decoder<B> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore> {
        self.ops.kv_store(geometry)
    }

    fn forward(&self, batch: &ForwardBatch, kv: &mut KvStore) -> Result<Vec<f32>> {
        let ops = &self.ops;
        let rope = self.rotary.table(&batch.positions);
        let mut hidden = ops.embed(&self.embedding, &batch.tokens)?;
        for layer in &self.layers {
            let x = ops.rms_norm(&hidden, &layer.attention_norm, self.config.norm_eps)?;
            hidden = ops.add(hidden, &layer.attention.forward(ops, &x, &rope, batch, kv)?)?;
            let x = ops.rms_norm(&hidden, &layer.mlp_norm, self.config.norm_eps)?;
            hidden = ops.add(hidden, &layer.mlp.forward(ops, &x)?)?;
        }
        if batch.logit_rows.is_empty() {
            return Ok(Vec::new());
        }
        let hidden = ops.select(&hidden, &batch.logit_rows)?;
        let hidden = ops.rms_norm(&hidden, &self.norm, self.config.norm_eps)?;
        let logits = match &self.head {
            Some(head) => head.forward(ops, &hidden)?,
            None => {
                let [logits] = ops.linear(&hidden, [(&self.embedding, None)])?;
                logits
            }
        };
        ops.read(logits)
    }
}

impl<B: Backend> Layer<B> {
    fn load(c: &ModelConfig, layer: usize, loader: &mut Loader<'_>, ops: &B) -> Result<Self> {
        use Role::*;
        let mut linear = |role| Linear::load(loader, ops, role);
        let attention = Attention {
            q: linear(Q(layer))?,
            k: linear(K(layer))?,
            v: linear(V(layer))?,
            out: linear(Out(layer))?,
            qk_norm: None,
            norm_eps: c.norm_eps,
            params: AttentionParams {
                layer,
                head_count: c.head_count,
                kv_head_count: c.kv_head_count,
                head_dim: c.head_dim,
                scale: 1.0 / (c.head_dim as f32).sqrt(),
                window: c.windows[layer],
            },
        };
        let mlp =
            Mlp { gate: linear(Gate(layer))?, up: linear(Up(layer))?, down: linear(Down(layer))? };
        let mut vector = |role| ops.vector(loader.vector(role)?);
        let qk_norm = match c.knobs.qk_norm {
            true => Some((vector(QNorm(layer))?, vector(KNorm(layer))?)),
            false => None,
        };
        Ok(Self {
            attention_norm: vector(AttentionNorm(layer))?,
            attention: Attention { qk_norm, ..attention },
            mlp_norm: vector(MlpNorm(layer))?,
            mlp,
        })
    }
}
