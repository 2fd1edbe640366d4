//! The plain path: candle operations that carry gradients, on any device.
//!
//! Slow and obvious on purpose. Weights become floats of one dtype; nothing is fused; each
//! sequence attends on its own, except that whole sequences of one length attend together; scores
//! and their softmax are f32 at least. `candle_nn`'s fast `rope`, `rms_norm` and `softmax_last_dim`
//! drop gradients without a word, so only the spelled-out forms appear here.

mod delta;
mod experts;

use candle_core::{D, DType, Device, Shape, Tensor, Var};
use candle_nn::ops;

pub use delta::PlainDelta;
use delta::PlainPart;

use super::{
    AttentionParams, Backend, DeltaGroup, DeltaInput, Experts, Gate, Gelu, Heads, HostStep, OfHeads,
};
use crate::Result;
use crate::adapter::Delta;
use crate::batch::{ForwardBatch, Sequence};
use crate::kv_store::{KvGeometry, KvStore, TensorKv};
use crate::layers::rotary::{RopeTable, Rotaries};
use crate::parallel::Seat;
use crate::weights::MatrixSource;

/// Candle on one device.
#[derive(Clone, Debug)]
pub struct Plain {
    device: Device,
    dtype: DType,
    trainable: bool,
    seat: Option<Seat>,
}

impl Plain {
    /// Weights and activations of `dtype` on `device`.
    pub fn new(device: Device, dtype: DType) -> Self {
        Self { device, dtype, trainable: false, seat: None }
    }

    /// The same with weights that are candle variables: gradients reach them.
    pub fn trainable(self) -> Self {
        Self { trainable: true, ..self }
    }

    /// The same as one rank of several.
    pub fn seated(self, seat: Seat) -> Self {
        Self { seat: Some(seat), ..self }
    }

    /// A weight on its device.
    fn weight(&self, values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
        let tensor = Tensor::from_vec(values, shape, &self.device)?.to_dtype(self.dtype)?;
        Ok(match self.trainable {
            true => Var::from_tensor(&tensor)?.into_inner(),
            false => tensor,
        })
    }

    /// The reference that everything else is compared with.
    pub fn reference() -> Self {
        Self::new(Device::Cpu, DType::F32)
    }

    /// Causal attention of `count` sequences of one length: `q [count * n, heads * dim]`,
    /// `k, v [count * context, kv_heads * dim]`.
    fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        count: usize,
        (params, sinks): (&AttentionParams, Option<&Tensor>),
    ) -> Result<Tensor> {
        let (n, context) = (q.dims2()?.0 / count, k.dims2()?.0 / count);
        let mask = self.mask(n, context, params.window)?;
        self.attend_where(q, k, v, count, (params, sinks), &mask)
    }

    /// [`Plain::attend`] with what is added to the scores. `[n, context]`
    fn attend_where(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        count: usize,
        (params, sinks): (&AttentionParams, Option<&Tensor>),
        mask: &Tensor,
    ) -> Result<Tensor> {
        let (n, context) = (q.dims2()?.0 / count, k.dims2()?.0 / count);
        let (kv, dim) = (params.kv_head_count, params.head_dim);
        let group = params.head_count / kv;
        // (count * kv, group * n, dim): the heads that share a key stand together.
        let q = (q.reshape((count, n, kv, group, dim))? * f64::from(params.scale))?;
        let q = q.permute((0, 2, 3, 1, 4))?.contiguous()?.reshape((count * kv, group * n, dim))?;
        let k = k.reshape((count, context, kv, dim))?.permute((0, 2, 3, 1))?.contiguous()?;
        let k = k.reshape((count * kv, dim, context))?;
        let v = v.reshape((count, context, kv, dim))?.transpose(1, 2)?.contiguous()?;
        let v = v.reshape((count * kv, context, dim))?;
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let scores = q.to_dtype(wide)?.matmul(&k.to_dtype(wide)?)?;
        let mut scores = scores.reshape((count * kv * group, n, context))?;
        if let Some(cap) = params.softcap {
            scores = capped(&scores, cap)?;
        }
        let scores = scores.broadcast_add(&mask.to_dtype(wide)?)?;
        // A softmax does not depend on what is subtracted, so no gradient flows through it.
        let top = scores.max_keepdim(D::Minus1)?.detach();
        let weights = scores.broadcast_sub(&top)?.exp()?;
        let mut total = weights.sum_keepdim(D::Minus1)?;
        if let Some(sinks) = sinks {
            let sinks = sinks.to_dtype(wide)?.reshape((1, kv * group, 1, 1))?;
            let sinks = sinks.broadcast_as((count, kv * group, n, 1))?.contiguous()?;
            let sinks = sinks.reshape((count * kv * group, n, 1))?;
            total = (total + (sinks - top)?.exp()?)?;
        }
        let weights = weights.broadcast_div(&total)?;
        let weights = weights.reshape((count * kv, group * n, context))?.to_dtype(self.dtype)?;
        let out = weights.matmul(&v)?.reshape((count, kv, group, n, dim))?;
        let out = out.permute((0, 3, 1, 2, 4))?.contiguous()?;
        Ok(out.reshape((count * n, kv * group * dim))?)
    }

    /// 0 where a row may look, minus infinity where it may not. `[n, context]`
    fn mask(&self, n: usize, context: usize, window: Option<usize>) -> Result<Tensor> {
        let visible = |row: usize, key: usize| {
            let position = context - n + row;
            key <= position && window.is_none_or(|w| position - key < w)
        };
        let values: Vec<f32> = (0..n * context)
            .map(|i| if visible(i / context, i % context) { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        Ok(Tensor::from_vec(values, (n, context), &self.device)?)
    }

    /// Keys (or values) of a sequence, in the dtype of the store where there is one: what it holds
    /// of earlier rows, then the new ones.
    fn context(
        stored: Option<&Tensor>,
        new: &Tensor,
        seq: &Sequence,
        len: usize,
    ) -> Result<Tensor> {
        let earlier = seq.context_len - seq.rows.len();
        let Some(stored) = stored.filter(|_| earlier > 0) else {
            return Ok(new.clone());
        };
        let slot = |p: usize| seq.blocks[p / len] * len as u32 + (p % len) as u32;
        let slots: Vec<u32> = (0..earlier).map(slot).collect();
        let slots = Tensor::from_vec(slots, earlier, stored.device())?;
        let cached = stored.index_select(&slots, 0)?;
        Ok(Tensor::cat(&[&cached, new], 0)?)
    }
}

/// The parts of operations.
impl Plain {
    /// Rotates every head of every row.
    fn rope(&self, x: Tensor, table: &RopeTable, head_dim: usize) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let (heads, half) = (width / head_dim, table.dim / 2);
        let angle = |values: &[f32]| -> Result<Tensor> {
            let values = Tensor::from_slice(values, (rows, 1, half), &self.device)?;
            Ok(values.to_dtype(self.dtype)?)
        };
        let (cos, sin) = (angle(&table.cos)?, angle(&table.sin)?);
        let x = x.reshape((rows, heads, head_dim))?;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let rest = x.narrow(2, table.dim, head_dim - table.dim)?;
        let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[&turned_a, &turned_b, &rest], 2)?.reshape((rows, width))?)
    }

    /// Writes `k` and `v` to the store and attends from `q` to everything of each row's sequence.
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        (batch, kv): (&ForwardBatch, &mut KvStore),
        of: (&AttentionParams, Option<&Tensor>),
    ) -> Result<Tensor> {
        let params = of.0;
        let mut store = kv.tensors(params.layer)?;
        if store.is_none() && batch.is_even() {
            return self.attend(q, k, v, batch.sequence_count(), of);
        }
        let mut rows = Vec::with_capacity(batch.sequence_count());
        for seq in batch.sequences() {
            let new = |x: &Tensor| x.narrow(0, seq.rows.start, seq.rows.len());
            // A row is seen as a later one will see it, rounded; without a store it is exact and
            // carries its gradient.
            let (new_k, new_v) = match &store {
                Some(store) => store.narrow(&new(k)?, &new(v)?)?,
                None => (new(k)?, new(v)?),
            };
            let block_len = store.as_ref().map_or(1, |s| s.block_len);
            let (old_k, old_v) = (store.as_ref().map(|s| s.k), store.as_ref().map(|s| s.v));
            let keys = Self::context(old_k, &new_k, &seq, block_len)?.to_dtype(self.dtype)?;
            let values = Self::context(old_v, &new_v, &seq, block_len)?.to_dtype(self.dtype)?;
            rows.push(self.attend(&new(q)?, &keys, &values, 1, of)?);
            if let Some(store) = &mut store {
                store.write(&new_k, &new_v, &batch.slot_mapping[seq.rows.clone()])?;
            }
        }
        Ok(Tensor::cat(&rows, 0)?)
    }

    /// Some rows of `x`, in the order given.
    fn select(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        Ok(x.index_select(&Tensor::new(rows, &self.device)?, 0)?)
    }
}

impl Backend for Plain {
    type Rows = Tensor;
    type Matrix = Tensor;
    type Vector = Tensor;
    type Delta = PlainDelta;
    type Step = HostStep;

    fn begin(&self, batch: &ForwardBatch, rotaries: &Rotaries) -> Result<HostStep> {
        Ok(HostStep::new(batch, rotaries))
    }

    fn matrix(&self, source: &MatrixSource<'_>) -> Result<Tensor> {
        self.weight(source.to_f32(), (source.n, source.k))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let n = values.len();
        self.weight(values, n)
    }

    fn kv_store(&self, shape: KvGeometry) -> Result<KvStore> {
        Ok(KvStore::Tensors(TensorKv::new(shape, &self.device)?))
    }

    fn embed(&self, table: &Tensor, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(ids, &self.device)?;
        Ok(table.index_select(&ids, 0)?)
    }

    fn embed_tokens(&self, table: &Tensor, step: &HostStep) -> Result<Tensor> {
        self.embed(table, &step.batch.tokens)
    }

    fn select_logit_rows(&self, x: &Tensor, step: &HostStep) -> Result<Tensor> {
        self.select(x, &step.batch.logit_rows)
    }

    fn linear<const N: usize>(
        &self,
        x: &Tensor,
        weights: [(&Tensor, Option<&Tensor>); N],
    ) -> Result<[Tensor; N]> {
        let mut out = Vec::with_capacity(N);
        for (weight, bias) in weights {
            let y = x.matmul(&weight.t()?)?;
            out.push(match bias {
                Some(bias) => y.broadcast_add(bias)?,
                None => y,
            });
        }
        Ok(out.try_into().expect("one output for each weight; this is a bug"))
    }

    fn delta(&self, parts: &[(&Delta, f32)]) -> Result<PlainDelta> {
        let part = |&(delta, weight): &(&Delta, f32)| -> Result<PlainPart> {
            let f = &delta.factors;
            let dora = match &delta.dora {
                None => None,
                Some(dora) => {
                    let norm = Tensor::new(&dora.norm[..], &self.device)?.to_dtype(self.dtype)?;
                    Some((self.vector(dora.magnitude.clone())?, norm))
                }
            };
            let a = self.weight(f.to_a(), (f.rank(), f.k()))?;
            let b = self.weight(f.to_b(), (f.n(), f.rank()))?;
            let (scale, weight) = (f64::from(delta.scale), f64::from(weight));
            Ok(PlainPart { a, b, dora, scale, weight })
        };
        Ok(PlainDelta { parts: parts.iter().map(part).collect::<Result<_>>()? })
    }

    fn add_deltas<const N: usize>(
        &self,
        x: DeltaInput<'_, Tensor>,
        ys: [Tensor; N],
        groups: [Vec<DeltaGroup<'_, PlainDelta>>; N],
    ) -> Result<[Tensor; N]> {
        let mut out = Vec::with_capacity(N);
        for (mut y, groups) in ys.into_iter().zip(groups) {
            for (rows, delta) in groups {
                let index = Tensor::new(rows, &self.device)?;
                let own = y.index_select(&index, 0)?;
                let update = match x {
                    DeltaInput::Rows(x) => {
                        delta.of(&DeltaInput::Rows(&x.index_select(&index, 0)?), &own)?
                    }
                    DeltaInput::Ids(ids) => {
                        let ids: Vec<u32> = rows.iter().map(|&row| ids[row as usize]).collect();
                        delta.of(&DeltaInput::Ids(&ids), &own)?
                    }
                };
                y = y.index_add(&index, &update, 0)?;
            }
            out.push(y);
        }
        Ok(out.try_into().expect("one output for each input; this is a bug"))
    }

    fn add_bias(&self, x: Tensor, bias: &Tensor) -> Result<Tensor> {
        Ok(x.broadcast_add(bias)?)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let dim = weight.dims1()?;
        let x = x.reshape((rows * width / dim, dim))?;
        Ok(ops::rms_norm_slow(&x, weight, eps)?.reshape((rows, width))?)
    }

    fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
        let apart = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = apart.sqr()?.mean_keepdim(D::Minus1)?;
        let even = apart.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?;
        Ok(even.broadcast_mul(weight)?.broadcast_add(bias)?)
    }

    fn attend(
        &self,
        [mut q, mut k, v]: [Tensor; 3],
        heads: OfHeads<'_, Tensor>,
        step: &HostStep,
        kv: &mut KvStore,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        if let Some((q_norm, k_norm, eps)) = heads.norms {
            q = self.rms_norm(&q, q_norm, eps)?;
            k = self.rms_norm(&k, k_norm, eps)?;
        }
        let q = self.rope(q, step.rope(params), params.head_dim)?;
        let k = self.rope(k, step.rope(params), params.head_dim)?;
        self.attention(&q, &k, &v, (&step.batch, kv), (params, heads.sinks))
    }

    fn bidirectional(&self, qkv: [&Tensor; 3], cu_q: &[u32], heads: &Heads) -> Result<Tensor> {
        let params = AttentionParams {
            layer: 0,
            head_count: heads.count,
            kv_head_count: heads.count,
            head_dim: heads.dim,
            scale: heads.scale,
            softcap: None,
            window: None,
        };
        let mut rows = Vec::with_capacity(cu_q.len() - 1);
        for bounds in cu_q.windows(2).filter(|bounds| bounds[0] < bounds[1]) {
            let (start, len) = (bounds[0] as usize, (bounds[1] - bounds[0]) as usize);
            let [q, k, v] = qkv.map(|x| x.narrow(0, start, len));
            let open = Tensor::zeros((len, len), DType::F32, &self.device)?;
            rows.push(self.attend_where(&q?, &k?, &v?, 1, (&params, None), &open)?);
        }
        Ok(Tensor::cat(&rows, 0)?)
    }

    fn gelu(&self, x: Tensor, kind: Gelu) -> Result<Tensor> {
        Ok(match kind {
            Gelu::Erf => x.gelu_erf()?,
            Gelu::Tanh => x.gelu()?,
        })
    }

    fn gate_mul(&self, kind: Gate, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        let open = match kind {
            Gate::Silu => gate.silu()?,
            Gate::GeluTanh => gate.gelu()?,
            Gate::ClampedSwiglu => {
                let gate = gate.minimum(7.0)?;
                let open = (&gate * ops::sigmoid(&(&gate * 1.702)?)?)?;
                return Ok((open * (up.clamp(-7.0, 7.0)? + 1.0)?)?);
            }
        };
        Ok((open * up)?)
    }

    fn experts(
        &self,
        x: &Tensor,
        scores: Tensor,
        experts: &Experts<Tensor, Tensor>,
    ) -> Result<Tensor> {
        self.mixture(x, scores, experts)
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        Ok((x * f64::from(factor))?)
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        capped(&x, cap)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        Ok((x + y)?)
    }

    fn trims(&self) -> bool {
        self.seat.is_none()
    }

    fn reduce(&self, x: Tensor) -> Result<Tensor> {
        let Some(seat) = &self.seat else { return Ok(x) };
        let shape = x.shape().clone();
        let mut numbers = self.read(x)?;
        seat.sum(&mut numbers)?;
        Ok(Tensor::from_vec(numbers, shape, &self.device)?.to_dtype(self.dtype)?)
    }

    fn read(&self, x: Tensor) -> Result<Vec<f32>> {
        Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// `cap * tanh(x / cap)`.
fn capped(x: &Tensor, cap: f32) -> Result<Tensor> {
    let cap = f64::from(cap);
    Ok(((x / cap)?.tanh()? * cap)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMS: AttentionParams = AttentionParams {
        layer: 0,
        head_count: 1,
        kv_head_count: 1,
        head_dim: 16,
        scale: 0.25,
        softcap: None,
        window: None,
    };

    /// 16 products of 100 * 100 are beyond f16; a key a little larger than the others stands out
    /// only where scores keep their digits.
    #[test]
    fn scores_have_the_range_and_the_digits_of_f32() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let plain = Plain::new(Device::Cpu, dtype);
            let tensor = |values: Vec<f32>| {
                let n = values.len() / 16;
                Tensor::from_vec(values, (n, 16), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
            };
            let q = tensor(vec![100.0; 16]);
            let mut keys = vec![100.0; 32];
            keys[16] = 100.5;
            let values = [vec![0.0; 16], vec![1.0; 16]].concat();
            let out = plain.attend(&q, &tensor(keys), &tensor(values), 1, (&PARAMS, None)).unwrap();
            let got = plain.read(out).unwrap()[0];
            // The second score is larger by 100 * 0.5 / 4.
            assert!((got - 1.0).abs() < 1e-3, "{dtype:?}: {got}");
        }
    }

    #[test]
    fn no_window_is_too_wide() {
        let mask = Plain::reference().mask(2, 3, Some(usize::MAX)).unwrap();
        let want = [[0.0, 0.0, f32::NEG_INFINITY], [0.0, 0.0, 0.0]];
        assert_eq!(mask.to_vec2::<f32>().unwrap(), want);
    }
}
