//! The causal decoder: one for every family, every weight format and both backends.
//!
//! Reads like the paper. What differs between families is in [`ModelConfig`]; what differs between
//! devices is in the backend. Deliberately absent: KV bookkeeping, sampling, any device `match`.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::Tensor;

use crate::adapter::{self, Adapter};
use crate::backend::{AttentionParams, Backend, Experts, Plain};
use crate::batch::{ForwardBatch, LoraRows, LoraSlot, Pass, Walk, Wanted};
use crate::config::ModelConfig;
use crate::kv_store::{KvGeometry, KvStore};
use crate::layers::attention::Attention;
use crate::layers::linear::{Deltas, Linear, embed, project};
use crate::layers::mlp::FeedForward;
use crate::layers::rotary::Rotaries;
use crate::weights::{Loader, Role};
use crate::{Error, Model, Result};

/// A decoder with its weights.
pub struct Decoder<B: Backend> {
    config: ModelConfig,
    ops: B,
    rotaries: Rotaries,
    /// `[vocab, hidden]`
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    /// `[hidden]`
    norm: B::Vector,
    /// `[vocab, hidden]`; absent when tied to the embedding.
    head: Option<Linear<B>>,
    /// What adapters add to the embedding, and to a head that is tied to it.
    embedding_deltas: Deltas<B>,
    tied_deltas: Deltas<B>,
    /// Lists of adapters that are known.
    slots: BTreeSet<LoraSlot>,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    attention: Attention<B>,
    mlp_norm: B::Vector,
    mlp: FeedForward<B>,
    /// Of what attention and MLP bring, before it is added.
    post_norms: Option<[B::Vector; 2]>,
}

/// What a pass is about.
struct On<'a, B: Backend> {
    batch: &'a ForwardBatch,
    step: &'a B::Step,
    lora: &'a LoraRows,
}

impl<B: Backend> Clone for On<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for On<'_, B> {}

/// The residual stream in front of a layer, or behind the last one.
struct Stream<B: Backend> {
    layer: usize,
    /// `[T, hidden]`
    hidden: B::Rows,
    /// What the layer before added: added where the next one reads it.
    update: Option<B::Rows>,
}

/// A pass between two layers.
struct Between<B: Backend> {
    batch: ForwardBatch,
    step: B::Step,
    lora: LoraRows,
    /// `None` once a layer failed.
    stream: Option<Stream<B>>,
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
        let rotaries = Rotaries::new(&config);
        let (embedding_deltas, tied_deltas) = (Deltas::default(), Deltas::default());
        let slots = BTreeSet::new();
        Ok(Self {
            rotaries,
            embedding,
            layers,
            norm,
            head,
            config,
            ops,
            embedding_deltas,
            tied_deltas,
            slots,
        })
    }

    /// What [`Model::forward`] reads out, still on the device; in the plain path it carries
    /// gradients. `[logit_rows, vocab]`
    pub fn logits(&self, batch: &ForwardBatch, kv: &mut KvStore) -> Result<B::Rows> {
        let (step, lora) = (self.ops.begin(batch, &self.rotaries)?, batch.lora_rows());
        let on = On { batch, step: &step, lora: &lora };
        let head = |kv: &mut KvStore| {
            let hidden = self.hidden(on, kv)?;
            self.head(hidden.ok_or_else(|| Error::Batch("no logits are wanted".into()))?, on)
        };
        self.ops.run(&step, kv, head)
    }

    /// The residual stream behind the last layer, of the rows whose logits are wanted; none where
    /// none are. `[logit_rows, hidden]`
    fn hidden(&self, on: On<'_, B>, kv: &mut KvStore) -> Result<Option<B::Rows>> {
        let mut stream = self.enter(on)?;
        while stream.layer < self.layers.len() {
            stream = self.layer(stream, on, kv)?;
        }
        self.leave(stream, on)
    }

    /// The stream in front of the first layer: embeddings.
    fn enter(&self, on: On<'_, B>) -> Result<Stream<B>> {
        if !B::RUNS_AHEAD && !on.batch.chosen.is_empty() {
            return Err(Error::Batch("no token is kept from one pass to the next".into()));
        }
        if let Some((slot, _)) = on.lora.groups().find(|(slot, _)| !self.slots.contains(slot)) {
            return Err(Error::Batch(format!("adapter slot {} is not known", slot.0)));
        }
        let table = (&self.embedding, &self.embedding_deltas);
        let mut hidden = embed(&self.ops, table, (on.step, &on.batch.tokens), on.lora)?;
        if let Some(factor) = self.config.knobs.embedding_scale {
            hidden = self.ops.scale(hidden, factor)?;
        }
        Ok(Stream { layer: 0, hidden, update: None })
    }

    /// Through the layer that it is in front of. In the last one, rows of which nothing more is
    /// wanted end with their keys and values.
    fn layer(&self, stream: Stream<B>, on: On<'_, B>, kv: &mut KvStore) -> Result<Stream<B>> {
        let (ops, eps) = (&self.ops, self.config.norm_eps);
        let Stream { layer: index, mut hidden, update } = stream;
        let (layer, next) = (&self.layers[index], index + 1);
        let x = match update {
            None => ops.rms_norm(&hidden, &layer.attention_norm, eps)?,
            Some(y) => {
                let (sum, x) = ops.add_norm(hidden, &y, &layer.attention_norm, eps)?;
                hidden = sum;
                x
            }
        };
        let mut mixed = layer.attention.mix(ops, &x, on.step, on.lora, kv)?;
        let selected;
        let mut lora = on.lora;
        if self.trims(on.batch) && next == self.layers.len() {
            if on.batch.logit_rows.is_empty() {
                return Ok(Stream { layer: next, hidden, update: None });
            }
            hidden = ops.select_logit_rows(&hidden, on.step)?;
            mixed = ops.select_logit_rows(&mixed, on.step)?;
            selected = on.lora.selected(&on.batch.logit_rows);
            lora = &selected;
        }
        let mut mixed = layer.attention.project(ops, &mixed, lora)?;
        if let Some([norm, _]) = &layer.post_norms {
            mixed = ops.rms_norm(&mixed, norm, eps)?;
        }
        let (hidden, x) = ops.add_norm(hidden, &mixed, &layer.mlp_norm, eps)?;
        let mut update = layer.mlp.forward(ops, &x, lora)?;
        if let Some([_, norm]) = &layer.post_norms {
            update = ops.rms_norm(&update, norm, eps)?;
        }
        Ok(Stream { layer: next, hidden, update: Some(update) })
    }

    /// The stream behind the last layer.
    fn leave(&self, stream: Stream<B>, on: On<'_, B>) -> Result<Option<B::Rows>> {
        if on.batch.logit_rows.is_empty() {
            return Ok(None);
        }
        let hidden = match stream.update {
            Some(y) => self.ops.add(stream.hidden, &y)?,
            None => stream.hidden,
        };
        match self.trims(on.batch) {
            true => Ok(Some(hidden)),
            false => self.ops.select_logit_rows(&hidden, on.step).map(Some),
        }
    }

    /// Rows of which nothing more is wanted are left out.
    fn trims(&self, batch: &ForwardBatch) -> bool {
        self.ops.trims() && batch.logit_rows.len() < batch.row_count()
    }

    /// Logits of the stream behind the last layer.
    fn head(&self, hidden: B::Rows, on: On<'_, B>) -> Result<B::Rows> {
        let ops = &self.ops;
        let hidden = ops.widen(ops.rms_norm(&hidden, &self.norm, self.config.norm_eps)?)?;
        let lora = on.lora.selected(&on.batch.logit_rows);
        let logits = match &self.head {
            Some(head) => head.forward(ops, &hidden, &lora)?,
            None => {
                let tied = [(&self.embedding, None, &self.tied_deltas)];
                let [logits] = project(ops, &hidden, tied, &lora)?;
                logits
            }
        };
        match self.config.knobs.logit_softcap {
            Some(cap) => ops.softcap(logits, cap),
            None => Ok(logits),
        }
    }

    /// What adapters add to a weight.
    fn deltas(&mut self, role: Role) -> Option<&mut Deltas<B>> {
        let linear = match role {
            Role::Embedding => return Some(&mut self.embedding_deltas),
            Role::Head if self.head.is_none() => return Some(&mut self.tied_deltas),
            Role::Head => self.head.as_mut()?,
            Role::Q(l) => &mut self.layers.get_mut(l)?.attention.q,
            Role::K(l) => &mut self.layers.get_mut(l)?.attention.k,
            Role::V(l) => &mut self.layers.get_mut(l)?.attention.v,
            Role::Out(l) => &mut self.layers.get_mut(l)?.attention.out,
            Role::Gate(l) => &mut self.layers.get_mut(l)?.mlp.dense()?.gate,
            Role::Up(l) => &mut self.layers.get_mut(l)?.mlp.dense()?.up,
            Role::Down(l) => &mut self.layers.get_mut(l)?.mlp.dense()?.down,
            Role::Router(_) => return None,
            Role::ExpertGate(..) | Role::ExpertUp(..) | Role::ExpertDown(..) => return None,
            Role::Norm | Role::AttentionNorm(_) | Role::PostAttentionNorm(_) => return None,
            Role::MlpNorm(_) | Role::PreMlpNorm(_) | Role::PostMlpNorm(_) => return None,
            Role::QNorm(_) | Role::KNorm(_) | Role::Sinks(_) => return None,
        };
        Some(&mut linear.deltas)
    }
}

/// A weight of a decoder, by what it is for.
pub struct NamedTensor {
    /// What it is for.
    pub role: Role,
    /// A bias, not the weight. Those of all experts are one, under the role of the first.
    pub bias: bool,
    /// The tensor; a variable where the backend is [`Plain::trainable`].
    pub tensor: Tensor,
}

impl Decoder<Plain> {
    /// What can learn of the adapters under a number, by the weight that it updates; variables
    /// where the backend is [`Plain::trainable`].
    pub fn adapter_tensors(&mut self, slot: LoraSlot) -> Vec<(Role, Vec<Tensor>)> {
        let roles = adapter::targets(&self.config);
        let of = |role| Some((role, self.deltas(role)?.get(slot)?.tensors()));
        roles.into_iter().filter_map(of).collect()
    }

    /// Every weight: what an optimiser moves and a file keeps.
    pub fn tensors(&self) -> Vec<NamedTensor> {
        let mut all = Vec::new();
        let mut add = |role, bias, tensor: &Tensor| {
            all.push(NamedTensor { role, bias, tensor: tensor.clone() });
        };
        add(Role::Embedding, false, &self.embedding);
        add(Role::Norm, false, &self.norm);
        let mut linears: Vec<(Role, &Linear<Plain>)> = Vec::new();
        linears.extend(self.head.as_ref().map(|head| (Role::Head, head)));
        for (l, layer) in self.layers.iter().enumerate() {
            let attention = &layer.attention;
            add(Role::AttentionNorm(l), false, &layer.attention_norm);
            match &layer.post_norms {
                None => add(Role::MlpNorm(l), false, &layer.mlp_norm),
                Some([attention, mlp]) => {
                    add(Role::PostAttentionNorm(l), false, attention);
                    add(Role::PreMlpNorm(l), false, &layer.mlp_norm);
                    add(Role::PostMlpNorm(l), false, mlp);
                }
            }
            if let Some((q, k)) = &attention.qk_norm {
                add(Role::QNorm(l), false, q);
                add(Role::KNorm(l), false, k);
            }
            if let Some(sinks) = &attention.sinks {
                add(Role::Sinks(l), false, sinks);
            }
            linears.extend([
                (Role::Q(l), &attention.q),
                (Role::K(l), &attention.k),
                (Role::V(l), &attention.v),
                (Role::Out(l), &attention.out),
            ]);
            match &layer.mlp {
                FeedForward::Dense(mlp) => linears.extend([
                    (Role::Gate(l), &mlp.gate),
                    (Role::Up(l), &mlp.up),
                    (Role::Down(l), &mlp.down),
                ]),
                FeedForward::Experts(moe) => {
                    linears.push((Role::Router(l), &moe.router));
                    let Experts { gate, up, down, biases, .. } = &moe.experts;
                    let mut each = |role: fn(usize, usize) -> Role, all: &[Tensor]| {
                        all.iter().enumerate().for_each(|(e, t)| add(role(l, e), false, t));
                    };
                    each(Role::ExpertGate, gate);
                    each(Role::ExpertUp, up);
                    each(Role::ExpertDown, down);
                    if let Some([gate, up, down]) = biases {
                        add(Role::ExpertGate(l, 0), true, gate);
                        add(Role::ExpertUp(l, 0), true, up);
                        add(Role::ExpertDown(l, 0), true, down);
                    }
                }
            }
        }
        for (role, linear) in linears {
            add(role, false, &linear.weight);
            if let Some(bias) = &linear.bias {
                add(role, true, bias);
            }
        }
        all
    }
}

impl<B: Backend> Model for Decoder<B> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore> {
        self.ops.kv_store(geometry)
    }

    fn runs_ahead(&self) -> bool {
        B::RUNS_AHEAD
    }

    fn launch(
        &self,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Pass> {
        batch.copies.iter().try_for_each(|&(from, to)| kv.copy_block(from, to))?;
        if batch.logit_rows.is_empty() {
            let (step, lora) = (self.ops.begin(batch, &self.rotaries)?, batch.lora_rows());
            self.hidden(On { batch, step: &step, lora: &lora }, kv)?;
            return self.ops.finish();
        }
        self.ops.output(self.logits(batch, kv)?, wanted)
    }

    fn walk(&self, batch: &ForwardBatch, kv: &mut KvStore) -> Result<Option<Walk>> {
        if B::RUNS_AHEAD {
            return Ok(None);
        }
        batch.copies.iter().try_for_each(|&(from, to)| kv.copy_block(from, to))?;
        let (step, lora) = (self.ops.begin(batch, &self.rotaries)?, batch.lora_rows());
        let stream = Some(self.enter(On { batch, step: &step, lora: &lora })?);
        Ok(Some(Walk::new(Between::<B> { batch: batch.clone(), step, lora, stream })))
    }

    fn go_on(&self, walk: &mut Walk, kv: &mut KvStore) -> Result<Option<Pass>> {
        let Between { batch, step, lora, stream } = walk.of::<Between<B>>()?;
        let on = On { batch, step, lora };
        let left = stream.take().ok_or_else(|| Error::Batch("this pass has ended".into()))?;
        if left.layer < self.layers.len() {
            *stream = Some(self.layer(left, on, kv)?);
            return Ok(None);
        }
        let pass = match self.leave(left, on)? {
            Some(hidden) => self.ops.output(self.head(hidden, on)?, &mut Vec::new)?,
            None => self.ops.finish()?,
        };
        Ok(Some(pass))
    }

    fn put_adapters(&mut self, slot: LoraSlot, adapters: &[(Arc<Adapter>, f32)]) -> Result<()> {
        adapters.iter().try_for_each(|(adapter, _)| adapter.check(&self.config))?;
        if !self.slots.insert(slot) {
            return Err(Error::Batch(format!("adapter slot {} is taken", slot.0)));
        }
        for role in adapter::targets(&self.config) {
            // A weight of 0 adds nothing, not even a zero.
            let acting = adapters.iter().filter(|(_, weight)| *weight != 0.0);
            let parts: Vec<(&adapter::Delta, f32)> = acting
                .filter_map(|(adapter, weight)| Some((adapter.get(role)?, *weight)))
                .collect();
            if parts.is_empty() {
                continue;
            }
            let delta = self.ops.delta(&parts)?;
            let deltas = self.deltas(role).expect("a target has its place; this is a bug");
            deltas.put(slot, delta);
        }
        Ok(())
    }

    fn drop_adapters(&mut self, slot: LoraSlot) {
        if self.slots.remove(&slot) {
            self.ops.forget(slot);
            for role in adapter::targets(&self.config) {
                if let Some(deltas) = self.deltas(role) {
                    deltas.drop(slot);
                }
            }
        }
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
            sinks: None,
            norm_eps: c.norm_eps,
            params: AttentionParams {
                layer,
                head_count: c.head_count,
                kv_head_count: c.kv_head_count,
                head_dim: c.head_dim,
                scale: c.knobs.query_scale(c.head_dim),
                softcap: c.knobs.attention_softcap,
                window: c.windows[layer],
            },
        };
        let mlp = FeedForward::load(c, layer, loader, ops)?;
        let mut vector = |role| ops.vector(loader.vector(role)?);
        let qk_norm = match c.knobs.qk_norm {
            true => Some((vector(QNorm(layer))?, vector(KNorm(layer))?)),
            false => None,
        };
        let sinks = c.knobs.sinks.then(|| vector(Sinks(layer))).transpose()?;
        let (mlp_norm, post_norms) = match c.knobs.post_norms {
            false => (MlpNorm(layer), None),
            true => {
                let norms = [vector(PostAttentionNorm(layer))?, vector(PostMlpNorm(layer))?];
                (PreMlpNorm(layer), Some(norms))
            }
        };
        Ok(Self {
            attention_norm: vector(AttentionNorm(layer))?,
            attention: Attention { qk_norm, sinks, ..attention },
            mlp_norm: vector(mlp_norm)?,
            mlp,
            post_norms,
        })
    }
}
