//! The plain path carries a gradient to every parameter, and it is the right one: the derivative
//! of a loss along a random direction of each parameter equals a central finite difference.
//!
//! `Training` is the plain path in f64 with every weight as a `Var`; it keeps the logits as a
//! tensor, because a [`Model`] hands out numbers only.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor, Var};
use hearth_kernels::quant;
use hearth_models::backend::{AttentionParams, Backend, Plain};
use hearth_models::config::{Knobs, ModelConfig};
use hearth_models::decoder::Decoder;
use hearth_models::layers::rotary::RopeTable;
use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::{Loader, MatrixSource, Weights};
use hearth_models::{ForwardBatch, KvGeometry, KvStore, Model, Result, tiny};

/// What a test sees of a model that trains.
#[derive(Clone, Default)]
struct Tape {
    vars: Arc<Mutex<Vec<Var>>>,
    logits: Arc<Mutex<Option<Tensor>>>,
}

struct Training {
    plain: Plain,
    tape: Tape,
}

impl Training {
    fn var(&self, tensor: &Tensor) -> Result<Tensor> {
        let var = Var::from_tensor(tensor)?;
        let tensor = var.as_tensor().clone();
        self.tape.vars.lock().unwrap().push(var);
        Ok(tensor)
    }
}

impl Backend for Training {
    type Rows = Tensor;
    type Matrix = Tensor;
    type Vector = Tensor;

    fn matrix(&self, source: &MatrixSource<'_>) -> Result<Tensor> {
        self.var(&self.plain.matrix(source)?)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        self.var(&self.plain.vector(values)?)
    }

    fn kv_store(&self, shape: KvGeometry) -> Result<KvStore> {
        self.plain.kv_store(shape)
    }

    fn embed(&self, table: &Tensor, ids: &[u32]) -> Result<Tensor> {
        self.plain.embed(table, ids)
    }

    fn linear<const N: usize>(
        &self,
        x: &Tensor,
        weights: [(&Tensor, Option<&Tensor>); N],
    ) -> Result<[Tensor; N]> {
        self.plain.linear(x, weights)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        self.plain.rms_norm(x, weight, eps)
    }

    fn rope(&self, x: Tensor, table: &RopeTable, head_dim: usize) -> Result<Tensor> {
        self.plain.rope(x, table, head_dim)
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        self.plain.attention(q, k, v, batch, kv, params)
    }

    fn silu_mul(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        self.plain.silu_mul(gate, up)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.plain.add(x, y)
    }

    fn select(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        self.plain.select(x, rows)
    }

    fn read(&self, x: &Tensor) -> Result<Vec<f32>> {
        *self.tape.logits.lock().unwrap() = Some(x.clone());
        self.plain.read(x)
    }
}

/// Every kind of parameter that a decoder can have, small enough for f64 differences.
fn config() -> ModelConfig {
    let mut config = tiny::config();
    config.knobs =
        Knobs { qkv_bias: true, out_bias: true, mlp_bias: true, qk_norm: true, ..config.knobs };
    config.tied = false;
    (config.hidden_len, config.ffn_len, config.vocab_len) = (16, 24, 32);
    (config.head_count, config.kv_head_count, config.head_dim, config.rope.dim) = (4, 2, 8, 6);
    config.windows = vec![Some(3), None];
    config
}
