//! The plain path carries a gradient to every parameter, and it is the right one: the derivative
//! of a loss along a random direction of each parameter equals a central finite difference.
//!
//! `Training` is the plain path in f64 with every weight as a `Var`; it keeps the logits as a
//! tensor, because a [`Model`] hands out numbers only.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor, Var};
use hearth_models::adapter::Delta;
use hearth_models::backend::{AttentionParams, Backend, Heads, HostStep, OfHeads, Plain};
use hearth_models::backend::{DeltaGroup, DeltaInput, Experts, Gate, Gelu, PlainDelta, Routing};
use hearth_models::config::{Knobs, ModelConfig};
use hearth_models::decoder::Decoder;
use hearth_models::layers::rotary::Rotaries;
use hearth_models::weights::{Loader, MatrixSource};
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
    type Delta = PlainDelta;
    type Step = HostStep;

    fn begin(&self, batch: &ForwardBatch, rotaries: &Rotaries) -> Result<HostStep> {
        self.plain.begin(batch, rotaries)
    }

    fn embed_tokens(&self, table: &Tensor, step: &HostStep) -> Result<Tensor> {
        self.plain.embed_tokens(table, step)
    }

    fn select_logit_rows(&self, x: &Tensor, step: &HostStep) -> Result<Tensor> {
        self.plain.select_logit_rows(x, step)
    }

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

    fn delta(&self, parts: &[(&Delta, f32)]) -> Result<PlainDelta> {
        self.plain.delta(parts)
    }

    fn add_deltas<const N: usize>(
        &self,
        x: DeltaInput<'_, Tensor>,
        ys: [Tensor; N],
        groups: [Vec<DeltaGroup<'_, PlainDelta>>; N],
    ) -> Result<[Tensor; N]> {
        self.plain.add_deltas(x, ys, groups)
    }

    fn add_bias(&self, x: Tensor, bias: &Tensor) -> Result<Tensor> {
        self.plain.add_bias(x, bias)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        self.plain.rms_norm(x, weight, eps)
    }

    fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
        self.plain.layer_norm(x, weight, bias, eps)
    }

    fn bidirectional(&self, qkv: [&Tensor; 3], cu_q: &[u32], heads: &Heads) -> Result<Tensor> {
        self.plain.bidirectional(qkv, cu_q, heads)
    }

    fn gelu(&self, x: Tensor, kind: Gelu) -> Result<Tensor> {
        self.plain.gelu(x, kind)
    }

    fn attend(
        &self,
        qkv: [Tensor; 3],
        heads: OfHeads<'_, Tensor>,
        step: &HostStep,
        kv: &mut KvStore,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        self.plain.attend(qkv, heads, step, kv, params)
    }

    fn gate_mul(&self, kind: Gate, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        self.plain.gate_mul(kind, gate, up)
    }

    fn experts(&self, x: &Tensor, scores: Tensor, of: &Experts<Tensor, Tensor>) -> Result<Tensor> {
        self.plain.experts(x, scores, of)
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        self.plain.scale(x, factor)
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        self.plain.softcap(x, cap)
    }

    fn trims(&self) -> bool {
        self.plain.trims()
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.plain.add(x, y)
    }

    fn read(&self, x: Tensor) -> Result<Vec<f32>> {
        *self.tape.logits.lock().unwrap() = Some(x.clone());
        self.plain.read(x)
    }
}

/// Every kind of parameter that a decoder can have, small enough for f64 differences.
fn config(tied: bool) -> ModelConfig {
    let mut config = tiny::config();
    config.knobs =
        Knobs { qkv_bias: true, out_bias: true, mlp_bias: true, qk_norm: true, ..config.knobs };
    config.tied = tied;
    (config.hidden_len, config.ffn_len, config.vocab_len) = (16, 24, 32);
    (config.head_count, config.kv_head_count, config.head_dim, config.rope.dim) = (4, 2, 8, 6);
    config.windows = vec![Some(3), None];
    config
}

/// Numbers between -1 and 1 that depend on `salt` alone.
fn random(shape: &[usize], salt: u64) -> Tensor {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A random linear function of the logits of two packed sequences.
fn loss(model: &dyn Model, tape: &Tape) -> Tensor {
    let mut batch = ForwardBatch::whole(&[3, 1, 4, 1, 5, 9, 2], 0, 16);
    batch.push(&[6, 5, 3, 5, 8], 0, vec![1], 16);
    batch.logit_rows.extend(7..12);
    batch.check(model.config().vocab_len, 16, 2).unwrap();
    model.forward(&batch, &mut KvStore::Nothing).unwrap();
    let logits = tape.logits.lock().unwrap().take().unwrap();
    (&logits * random(logits.dims(), 1)).unwrap().sum_all().unwrap()
}

fn scalar(tensor: &Tensor) -> f64 {
    tensor.to_scalar().unwrap()
}

#[test]
fn every_parameter_has_its_gradient() {
    check(&config(false));
}

/// What Gemma has beside.
#[test]
fn norms_behind_layers_and_bounds_have_theirs() {
    let mut config = config(true);
    let knobs = &mut config.knobs;
    (knobs.post_norms, knobs.gate, knobs.embedding_scale) = (true, Gate::GeluTanh, Some(4.0));
    (knobs.attention_softcap, knobs.logit_softcap) = (Some(1.5), Some(2.0));
    check(&config);
}

/// The embedding is read twice, so its gradient is a sum.
#[test]
fn routers_and_experts_have_theirs() {
    for normalized in [true, false] {
        let mut config = config(false);
        config.experts = Some(Routing { count: 4, used: 2, normalized });
        check(&config);
    }
}

/// What gpt-oss has beside. Gate and up are made large, so that some are beyond their bounds.
#[test]
fn sinks_and_bounded_gates_have_theirs() {
    let mut config = config(false);
    (config.knobs.sinks, config.knobs.gate) = (true, Gate::ClampedSwiglu);
    config.experts = Some(Routing { count: 4, used: 2, normalized: true });
    check_with(&config, 6.0);
}

#[test]
fn tied_embeddings_have_theirs() {
    check(&config(true));
}

fn check(config: &ModelConfig) {
    check_with(config, 1.0);
}

/// With gate and up of experts so many times as large as what comes to them.
fn check_with(config: &ModelConfig, large: f64) {
    const STEP: f64 = 1e-5;
    let tape = Tape::default();
    let weights = tiny::weights(config, hearth_kernels::quant::DType::F32, 11).unwrap();
    let ops = Training { plain: Plain::new(Device::Cpu, DType::F64), tape: tape.clone() };
    let mut progress = |_| {};
    let mut loader = Loader::new(&weights, config, &mut progress);
    let model = Decoder::load(config.clone(), &mut loader, ops).unwrap();
    let vars = tape.vars.lock().unwrap().clone();
    let each =
        |name: &str, shape: &[usize]| if name.contains("_exps.weight") { shape[0] } else { 1 };
    let all: usize = weights.infos().map(|(name, info)| each(name, &info.shape)).sum();
    assert_eq!(vars.len(), all, "every tensor of the file is a parameter");

    for var in vars.iter().filter(|var| var.dims() == [config.ffn_len, config.hidden_len]) {
        var.set(&(var.as_tensor().copy().unwrap() * large).unwrap()).unwrap();
    }
    let gradients = loss(&model, &tape).backward().unwrap();
    for (index, var) in vars.iter().enumerate() {
        let what = format!("parameter {index} {:?}", var.dims());
        let gradient = gradients.get(var).unwrap_or_else(|| panic!("{what} has no gradient"));
        let direction = random(var.dims(), 100 + index as u64);
        let want = scalar(&(gradient * &direction).unwrap().sum_all().unwrap());
        let here = var.as_tensor().copy().unwrap();
        let at = |step: f64| {
            var.set(&(&here + (&direction * step).unwrap()).unwrap()).unwrap();
            scalar(&loss(&model, &tape))
        };
        let got = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        var.set(&here).unwrap();
        println!("{what:<28} {want:>12.6} {got:>12.6}");
        assert!(want.abs() > 1e-4, "{what}: the gradient is nothing");
        assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{what}: {want} against {got}");
    }
}
