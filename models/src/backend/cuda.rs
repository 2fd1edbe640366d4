//! Our kernels on an NVIDIA GPU: weights as the file has them, activations in bf16, the residual
//! stream and the logits in f32, keys and values in blocks as on the CPU.
//!
//! A pass is asked for without waiting; whoever wants its end waits, for a few tokens or for
//! logits, while the next pass may be under way and read these tokens where they are. A pass in
//! which every sequence brings one row is padded to one of a few shapes, recorded at its second
//! appearance and replayed as one graph from then on, with its adapters until one of them goes.
//! Mixed passes and first appearances run operation by operation, and so does every pass of a rank
//! of several: what NCCL adds up is not recorded.

mod output;
mod rope;
mod weights;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hearth_kernels::cuda::{
    self, AttentionShape, Buffer, ExpertWeights, Float, Gpu, Graph, KvKind, LoraPart, Matrix, Rows,
    Span, StepShape, Vector,
};

use self::rope::Ropes;
use super::{
    AttentionParams, Backend, DeltaGroup, DeltaInput, Experts, Gate, Gelu, Heads, OfHeads,
};
use crate::adapter::Delta;
use crate::batch::{ForwardBatch, LoraRows, LoraSlot, Output, Pass, Wanted};
use crate::config::ModelConfig;
use crate::kv_store::{KvDType, KvGeometry, KvStore};
use crate::layers::rotary::Rotaries;
use crate::parallel::Seat;
use crate::weights::{MatrixSource, TensorInfo, TensorType};
use crate::{Error, Result};

/// Our kernels on one device.
pub struct Cuda {
    gpu: Arc<Gpu>,
    ropes: Mutex<Option<Arc<Ropes>>>,
    passes: Mutex<Passes>,
    /// As one rank of several.
    seat: Option<Seat>,
}

/// What was recorded, and what was seen once.
#[derive(Default)]
struct Passes {
    seen: HashSet<PassKey>,
    recorded: HashMap<PassKey, Recorded>,
}

/// A recorded pass, its logits, and the lists that it reads.
struct Recorded {
    graph: Graph,
    logits: Rows,
    _lists: Vec<Buffer>,
}

/// A recorded pass is of use for a batch of this shape over this store.
#[derive(Clone, PartialEq, Eq, Hash)]
struct PassKey {
    shape: StepShape,
    kv: u64,
    /// Of the memory in which the batch's numbers and the rotations are.
    generation: u64,
    positions: usize,
    /// Adapters of each row; empty where none has any.
    lora: Vec<Option<LoraSlot>>,
}

/// Passes that are kept; beyond them all are forgotten.
const PASSES: usize = 128;
/// Rows of recorded passes.
const BUCKETS: [usize; 14] = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];

impl Cuda {
    /// Every operation runs on `gpu`.
    pub fn new(gpu: Arc<Gpu>) -> Self {
        Self { gpu, ropes: Mutex::default(), passes: Mutex::default(), seat: None }
    }

    /// The same as one rank of several.
    #[cfg(feature = "nccl")]
    pub fn seated(self, seat: Seat) -> Self {
        Self { seat: Some(seat), ..self }
    }

    /// The device with this number, with a stream of its own.
    pub fn on(index: usize) -> Result<Self> {
        Ok(Self::new(Arc::new(Gpu::new(index)?)))
    }

    /// How keys and values of this type are stored there.
    ///
    /// # Errors
    /// A type that has no kernels.
    pub fn check_kv(dtype: KvDType) -> Result<KvKind> {
        match dtype {
            KvDType::BF16 => Ok(KvKind::BF16),
            KvDType::F16 => Ok(KvKind::F16),
            KvDType::Q8_0 => Ok(KvKind::Q8),
            KvDType::Fp8 => Ok(KvKind::Fp8),
            KvDType::F32 | KvDType::Q16_0 => {
                let what = format!("keys and values of {} are not stored on a GPU", dtype.name());
                Err(Error::Device(format!("{what}; choose f16, bf16, q8_0 or fp8")))
            }
        }
    }

    /// Refuses a model whose experts have no kernels there.
    ///
    /// # Errors
    /// What it is that they have not.
    pub fn check_experts(config: &ModelConfig) -> Result<()> {
        weights::check_experts(config)
    }

    /// Memory that a tensor takes there.
    pub fn stored_bytes(info: &TensorInfo) -> u64 {
        let elements = info.elements() as u64;
        let row = info.shape.last().copied().unwrap_or(1);
        // Codes and scales of MXFP4, in folders of gpt-oss.
        let TensorType::Readable(dtype) = info.ty else { return info.len_bytes() as u64 };
        // In GGUF the matrices of all experts are one tensor.
        let matrix = info.shape.len() >= 2;
        let kept = Matrix::stored_as(dtype).filter(|_| matrix);
        match kept.and_then(|dtype| dtype.row_bytes(row)) {
            Some(bytes) => elements / row.max(1) as u64 * bytes as u64,
            None if matrix => 2 * elements,
            None => 4 * elements,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A batch on the device.
pub struct CudaStep {
    step: cuda::Step,
    ropes: Arc<Ropes>,
    /// Logit rows, without the padding.
    logits: usize,
    /// It may be recorded, with these adapters.
    repeats: Option<Vec<Option<LoraSlot>>>,
    lora: LoraRows,
}

/// Keys and values on the device, with the device.
pub struct CudaKv {
    gpu: Arc<Gpu>,
    kv: cuda::DeviceKv,
}

impl CudaKv {
    /// Copies all tokens of a block, in every layer.
    pub fn copy_block(&mut self, from: usize, to: usize) -> Result<()> {
        Ok(self.gpu.copy_block(&self.kv, from, to)?)
    }
}

/// What adapters add to one projection.
pub struct CudaDelta {
    parts: Vec<LoraPart>,
    gain: Option<Vector>,
}

impl From<cuda::Error> for Error {
    fn from(error: cuda::Error) -> Self {
        Self::Device(error.to_string())
    }
}

/// Whether every sequence brings one row and wants its logits: the shape of most passes.
fn is_decode(batch: &ForwardBatch) -> bool {
    let rows = batch.row_count();
    rows == batch.sequence_count()
        && rows == batch.logit_rows.len()
        && rows <= BUCKETS[BUCKETS.len() - 1]
}

/// The shape that stands for a batch of single rows.
fn padded(shape: StepShape) -> StepShape {
    let rows = BUCKETS.into_iter().find(|&b| b >= shape.rows).unwrap_or(shape.rows);
    let chunks = shape.chunks.next_power_of_two();
    StepShape { rows, logits: rows, items: rows, tiles: 0, chunks }
}

impl Backend for Cuda {
    type Rows = Rows;
    type Matrix = Matrix;
    type Vector = Vector;
    type Delta = CudaDelta;
    type Step = CudaStep;

    const RUNS_AHEAD: bool = true;

    fn begin<'a>(&self, batch: &'a ForwardBatch, rotaries: &Rotaries) -> Result<CudaStep> {
        let positions = batch.positions.iter().max().map_or(0, |&p| p as usize + 1);
        let ropes = Ropes::reaching(&mut lock(&self.ropes), &self.gpu, rotaries, positions)?;
        let span = |s: crate::batch::Sequence<'a>| Span {
            row: s.rows.start,
            rows: s.rows.len(),
            context: s.context_len,
            blocks: s.blocks,
        };
        let host = cuda::HostStep {
            tokens: &batch.tokens,
            chosen: &batch.chosen,
            positions: &batch.positions,
            slots: &batch.slot_mapping,
            logit_rows: &batch.logit_rows,
            spans: batch.sequences().map(span).collect(),
        };
        let (exact, repeats) = (host.shape(), self.seat.is_none() && is_decode(batch));
        let step = self.gpu.step(&host, if repeats { padded(exact) } else { exact })?;
        let lora = batch.lora_rows();
        let none = || lora.groups().next().is_none();
        let repeats = repeats.then(|| match none() {
            true => Vec::new(),
            false => batch.lora_slot.clone(),
        });
        Ok(CudaStep { step, ropes, logits: batch.logit_rows.len(), repeats, lora })
    }

    fn run(
        &self,
        step: &CudaStep,
        kv: &mut KvStore,
        work: impl Fn(&mut KvStore) -> Result<Rows>,
    ) -> Result<Rows> {
        let logits = |rows: Rows| rows.first(step.logits);
        let (Some(store), Some(lora)) = (kv.device().map(|kv| kv.kv.id), &step.repeats) else {
            return work(kv).map(logits);
        };
        let key = PassKey {
            shape: step.step.shape,
            kv: store,
            generation: step.step.generation,
            positions: step.ropes.positions,
            lora: lora.clone(),
        };
        let mut passes = lock(&self.passes);
        if passes.seen.len() >= 32 * PASSES {
            passes.seen.clear();
        }
        if passes.seen.insert(key.clone()) {
            return work(kv).map(logits);
        }
        if !passes.recorded.contains_key(&key) {
            // Of another store, or of memory that moved: never of use again.
            passes.recorded.retain(|old, _| old.kv == store && old.generation == key.generation);
            if passes.recorded.len() >= PASSES {
                *passes = Passes::default();
            }
            let lists = self.gpu.send_lists(step.lora.groups().map(|(_, rows)| rows))?;
            let Ok((graph, logits)) = self.gpu.record(|| work(kv)) else {
                // Another thread's work on the device can spoil a record; the pass is none the
                // worse, and is recorded another time.
                return work(kv).map(|rows| rows.first(step.logits));
            };
            passes.recorded.insert(key.clone(), Recorded { graph, logits, _lists: lists });
        }
        let pass = &passes.recorded[&key];
        pass.graph.replay()?;
        Ok(logits(pass.logits.alias()))
    }

    fn forget(&self, slot: LoraSlot) {
        let mut passes = lock(&self.passes);
        let knows = |key: &PassKey| key.lora.contains(&Some(slot));
        passes.seen.retain(|key| !knows(key));
        if passes.recorded.keys().any(knows) {
            // None of them is under way when it goes. An error is told to whoever asks next.
            let _ = self.gpu.synchronize();
            passes.recorded.retain(|key, _| !knows(key));
        }
    }

    fn output(&self, logits: Rows, wanted: &mut dyn FnMut() -> Vec<Wanted>) -> Result<Pass> {
        output::of(&self.gpu, logits, wanted())
    }

    fn finish(&self) -> Result<Pass> {
        let nothing = self.gpu.fetch_nothing()?;
        Ok(Pass::new(move || Ok(Output::of_logits(nothing.open()?))))
    }

    fn matrix(&self, source: &MatrixSource<'_>) -> Result<Matrix> {
        let one = weights::matrices(&self.gpu, std::slice::from_ref(source))?;
        Ok(one.into_iter().next().expect("one was asked for; this is a bug"))
    }

    fn matrices(&self, sources: &[MatrixSource<'_>]) -> Result<Vec<Matrix>> {
        weights::matrices(&self.gpu, sources)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vector> {
        Ok(self.gpu.vector(&values)?)
    }

    fn kv_store(&self, shape: KvGeometry) -> Result<KvStore> {
        let kind = Self::check_kv(shape.dtype)?;
        let sizes = [shape.block_count, shape.block_len, shape.kv_head_count, shape.head_dim];
        let kv = self.gpu.kv(shape.layer_count, sizes, kind)?;
        Ok(KvStore::Device(CudaKv { gpu: Arc::clone(&self.gpu), kv }))
    }

    fn embed(&self, table: &Matrix, ids: &[u32]) -> Result<Rows> {
        // What an encoder adds up and normalises; its rows are those of products.
        Ok(self.gpu.convert(self.gpu.gather(table, ids)?, Float::BF16)?)
    }

    fn embed_tokens(&self, table: &Matrix, step: &CudaStep) -> Result<Rows> {
        Ok(self.gpu.gather_tokens(table, &step.step)?)
    }

    fn select_logit_rows(&self, x: &Rows, step: &CudaStep) -> Result<Rows> {
        Ok(self.gpu.select_logit_rows(x, &step.step)?)
    }

    fn widen(&self, x: Rows) -> Result<Rows> {
        Ok(x.widened())
    }

    fn linear<const N: usize>(
        &self,
        x: &Rows,
        weights: [(&Matrix, Option<&Vector>); N],
    ) -> Result<[Rows; N]> {
        Ok(self.gpu.linear(x, weights)?)
    }

    fn delta(&self, parts: &[(&Delta, f32)]) -> Result<CudaDelta> {
        let mut gain: Option<Vec<f32>> = None;
        let mut taken = Vec::with_capacity(parts.len());
        for &(delta, weight) in parts {
            let ratio = delta.dora.as_ref().map(|dora| {
                let ratio = dora.ratio();
                let gain = gain.get_or_insert_with(|| vec![0.0; ratio.len()]);
                gain.iter_mut().zip(&ratio).for_each(|(g, ratio)| *g += weight * (ratio - 1.0));
                ratio
            });
            let ratio = ratio.as_deref();
            taken.push(self.gpu.lora_part(&delta.factors, weight * delta.scale, ratio)?);
        }
        let gain = gain.map(|gain| self.gpu.vector(&gain)).transpose()?;
        Ok(CudaDelta { parts: taken, gain })
    }

    fn add_deltas<const N: usize>(
        &self,
        x: DeltaInput<'_, Rows>,
        ys: [Rows; N],
        groups: [Vec<DeltaGroup<'_, CudaDelta>>; N],
    ) -> Result<[Rows; N]> {
        let input = match x {
            DeltaInput::Rows(x) => cuda::LoraInput::Rows(x),
            DeltaInput::Ids(ids) => cuda::LoraInput::Ids(ids),
        };
        let all = ys.iter().zip(&groups).flat_map(|(y, groups)| {
            groups.iter().map(move |(rows, delta)| cuda::LoraGroup {
                y,
                rows,
                gain: delta.gain.as_ref(),
                parts: &delta.parts,
            })
        });
        self.gpu.add_lora(input, &all.collect::<Vec<_>>())?;
        Ok(ys)
    }

    fn add_bias(&self, x: Rows, bias: &Vector) -> Result<Rows> {
        Ok(self.gpu.add_bias(x, bias)?)
    }

    fn rms_norm(&self, x: &Rows, weight: &Vector, eps: f32) -> Result<Rows> {
        Ok(self.gpu.rms_norm(x, weight, eps)?)
    }

    fn layer_norm(&self, x: &Rows, weight: &Vector, bias: &Vector, eps: f32) -> Result<Rows> {
        Ok(self.gpu.layer_norm(x, weight, bias, eps)?)
    }

    fn add_norm(&self, x: Rows, y: &Rows, weight: &Vector, eps: f32) -> Result<(Rows, Rows)> {
        Ok(self.gpu.add_rms_norm(x, y, weight, eps)?)
    }

    fn attend(
        &self,
        [q, k, v]: [Rows; 3],
        heads: OfHeads<'_, Vector>,
        step: &CudaStep,
        kv: &mut KvStore,
        params: &AttentionParams,
    ) -> Result<Rows> {
        let device = kv
            .device()
            .ok_or_else(|| Error::Batch("a GPU attends over stored keys and values only".into()))?;
        let turn = cuda::Turn { table: step.ropes.of(params), norms: heads.norms };
        let place = (&mut device.kv, params.layer);
        let q = self.gpu.rope_and_store(q, [&k, &v], &step.step, place, &turn)?;
        let shape = AttentionShape {
            layer: params.layer,
            heads: params.head_count,
            scale: params.scale,
            softcap: params.softcap.unwrap_or(0.0),
            window: params.window.map_or(0, |w| i32::try_from(w).map_or(0, |w| w as usize)),
            sinks: heads.sinks,
        };
        Ok(self.gpu.attention(&q, &step.step, &device.kv, &shape)?)
    }

    fn bidirectional(&self, qkv: [&Rows; 3], cu_q: &[u32], heads: &Heads) -> Result<Rows> {
        Ok(self.gpu.bidirectional(qkv, cu_q, (heads.count, heads.dim), heads.scale)?)
    }

    fn gelu(&self, x: Rows, kind: Gelu) -> Result<Rows> {
        Ok(self.gpu.gelu(x, kind == Gelu::Erf)?)
    }

    fn gate_mul(&self, kind: Gate, gate: Rows, up: &Rows) -> Result<Rows> {
        Ok(self.gpu.gate_mul(kind, gate, up)?)
    }

    fn scores(&self, x: &Rows, router: (&Matrix, Option<&Vector>)) -> Result<Rows> {
        let [scores] = self.gpu.linear(&x.alias().widened(), [router])?;
        Ok(scores)
    }

    fn experts(&self, x: &Rows, scores: Rows, of: &Experts<Matrix, Vector>) -> Result<Rows> {
        let Experts { gate, up, down, biases, routing, activation } = of;
        let biases = biases.as_ref().map(|[gate, up, down]| [gate, up, down]);
        let (routing, activation) = (*routing, *activation);
        let of = ExpertWeights { gate, up, down, biases, routing, activation };
        Ok(self.gpu.experts(x, &scores, &of)?)
    }

    fn scale(&self, x: Rows, factor: f32) -> Result<Rows> {
        Ok(self.gpu.scale(x, factor)?)
    }

    fn softcap(&self, x: Rows, cap: f32) -> Result<Rows> {
        Ok(self.gpu.softcap(x, cap)?)
    }

    fn add(&self, x: Rows, y: &Rows) -> Result<Rows> {
        Ok(self.gpu.add(x, y)?)
    }

    fn trims(&self) -> bool {
        self.seat.is_none()
    }

    #[cfg(feature = "nccl")]
    fn reduce(&self, x: Rows) -> Result<Rows> {
        match &self.seat {
            None => Ok(x),
            Some(seat) => seat.sum_rows(x),
        }
    }

    fn read(&self, x: Rows) -> Result<Vec<f32>> {
        Ok(self.gpu.read(x)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_rows_are_padded_and_others_are_not() {
        let exact = StepShape { rows: 5, logits: 5, items: 5, tiles: 0, chunks: 3 };
        let padded = padded(exact);
        assert_eq!((padded.rows, padded.items, padded.logits, padded.chunks), (8, 8, 8, 4));
        let mut batch = ForwardBatch::empty();
        batch.push(&[1], 4, vec![0], 16);
        batch.push(&[2], 9, vec![1], 16);
        batch.logit_rows = vec![0, 1];
        assert!(is_decode(&batch));
        batch.push(&[2, 3], 0, vec![2], 16);
        assert!(!is_decode(&batch), "a prompt is among them");
    }
}
