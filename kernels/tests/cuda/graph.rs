//! Recorded work gives the bits of work that is asked for one by one.

use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{
    AttentionShape, DeviceKv, Float, Gpu, HostStep, KvKind, Matrix, Result, RopeTable, Rows, Span,
    Step, Turn, Vector,
};
use hearth_kernels::quant::DType;

use crate::blocks::Weights;
use crate::report::on_gpu;

const DIM: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const WIDTH: usize = HEADS * DIM;
const VOCAB: usize = 515;
const BLOCK_LEN: usize = 16;
const EPS: f32 = 1e-6;

/// One layer of a model.
struct Layer {
    table: Matrix,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    head: Matrix,
    norm: Vector,
    rope: RopeTable,
}

impl Layer {
    fn new(gpu: &Gpu) -> Result<Self> {
        let of = |dtype: DType, n: usize, k: usize, seed: u64| {
            Weights::new(dtype, [n, k], seed).upload(gpu)
        };
        let angles = randoms(512 * DIM / 2, 40);
        let cos: Vec<f32> = angles.iter().map(|x| x.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|x| x.sin()).collect();
        Ok(Self {
            table: of(DType::Q8_0, VOCAB, WIDTH, 1)?,
            q: of(DType::Q4K, WIDTH, WIDTH, 2)?,
            k: of(DType::Q4K, KV_HEADS * DIM, WIDTH, 3)?,
            v: of(DType::Q6K, KV_HEADS * DIM, WIDTH, 4)?,
            o: of(DType::BF16, WIDTH, WIDTH, 5)?,
            head: of(DType::Q6K, VOCAB, WIDTH, 6)?,
            norm: gpu.vector(&randoms(WIDTH, 7))?,
            rope: gpu.rope_table(&cos, &sin, DIM / 2)?,
        })
    }

    /// Logits in f32.
    fn forward(&self, gpu: &Gpu, step: &Step, kv: &mut DeviceKv) -> Result<Rows> {
        let x = gpu.gather_tokens(&self.table, step)?;
        let normed = gpu.rms_norm(&x, &self.norm, EPS)?;
        let inputs = [(&self.q, None), (&self.k, None), (&self.v, None)];
        let [q, k, v] = gpu.linear(&normed, inputs)?;
        let turn = Turn { table: &self.rope, norms: None };
        let q = gpu.rope_and_store(q, [&k, &v], step, (kv, 0), &turn)?;
        let (layer, heads, scale) = (0, HEADS, 0.01);
        let shape = AttentionShape { layer, heads, scale, softcap: 0.0, window: 0, sinks: None };
        let attended = gpu.attention(&q, step, kv, &shape)?;
        let [o] = gpu.linear(&attended, [(&self.o, None)])?;
        let (x, normed) = gpu.add_rms_norm(x, &o, &self.norm, EPS)?;
        drop(x);
        let last = gpu.select_logit_rows(&normed, step)?;
        let [logits] = gpu.linear(&last, [(&self.head, None)])?;
        gpu.convert(logits, Float::F32)
    }
}

/// Three sequences of blocks of their own, and how far they are.
struct Batches {
    blocks: [Vec<u32>; 3],
    lens: [usize; 3],
    tokens: u64,
}

impl Batches {
    fn new() -> Self {
        let blocks = [vec![4, 1, 9, 3], vec![0, 7, 2, 11], vec![5, 10, 6, 8]];
        Self { blocks, lens: [0; 3], tokens: 100 }
    }

    /// `rows` more of each, uploaded.
    fn step(&mut self, gpu: &Gpu, rows: [usize; 3]) -> Result<Step> {
        let (mut positions, mut slots, mut spans, mut logit_rows) =
            (vec![], vec![], vec![], vec![]);
        for (i, rows) in rows.into_iter().enumerate() {
            let (first, end) = (self.lens[i], self.lens[i] + rows);
            let slot = |position: usize| {
                self.blocks[i][position / BLOCK_LEN] * BLOCK_LEN as u32
                    + (position % BLOCK_LEN) as u32
            };
            let row = positions.len();
            positions.extend((first..end).map(|position| position as u32));
            slots.extend((first..end).map(slot));
            let blocks = &self.blocks[i][..];
            spans.push(Span { row, rows, context: end, blocks });
            logit_rows.push((row + rows) as u32 - 1);
            self.lens[i] = end;
        }
        self.tokens += 1;
        let token = |x: &f32| ((x + 1.0) * 0.5 * VOCAB as f32) as u32 % VOCAB as u32;
        let tokens: Vec<u32> = randoms(positions.len(), self.tokens).iter().map(token).collect();
        let (tokens, positions, slots) = (&tokens[..], &positions[..], &slots[..]);
        let (chosen, logit_rows) = (&[], &logit_rows[..]);
        let host = HostStep { tokens, chosen, positions, slots, logit_rows, spans };
        gpu.step(&host, host.shape())
    }
}

fn kv(gpu: &Gpu) -> Result<DeviceKv> {
    gpu.kv(1, [12, BLOCK_LEN, KV_HEADS, DIM], KvKind::F16)
}

/// Answers of the prompt and of each step after it.
fn one_by_one(gpu: &Gpu, layer: &Layer, steps: usize) -> Result<Vec<Vec<f32>>> {
    let (mut kv, mut batches) = (kv(gpu)?, Batches::new());
    let mut answers = Vec::new();
    for i in 0..steps {
        let step = batches.step(gpu, if i == 0 { [17, 5, 30] } else { [1; 3] })?;
        answers.push(gpu.read(layer.forward(gpu, &step, &mut kv)?)?);
    }
    Ok(answers)
}

/// The same, from a recording of the second step. Other work goes on between the steps.
fn replayed(gpu: &Gpu, layer: &Layer, steps: usize) -> Result<Vec<Vec<f32>>> {
    let (mut kv, mut batches) = (kv(gpu)?, Batches::new());
    let prompt = batches.step(gpu, [17, 5, 30])?;
    let mut answers = vec![gpu.read(layer.forward(gpu, &prompt, &mut kv)?)?];
    let mut recorded = None;
    for _ in 1..steps {
        let step = batches.step(gpu, [1; 3])?;
        let key = (step.generation, step.shape);
        let (graph, logits, made_for) = match recorded.take() {
            Some(recorded) => recorded,
            None => {
                let (graph, logits) = gpu.record(|| layer.forward(gpu, &step, &mut kv))?;
                (graph, logits, key)
            }
        };
        assert_eq!(made_for, key, "a recording of this shape and place");
        graph.replay()?;
        answers.push(gpu.read(logits.alias())?);
        let noise = gpu.rows_from(&randoms(3 * WIDTH, 3), 3, Float::BF16)?;
        gpu.read(gpu.gelu(noise, true)?)?;
        recorded = Some((graph, logits, made_for));
    }
    Ok(answers)
}

/// What is of one pass is not recorded, and the device goes on after that, and after a panic.
#[test]
fn what_cannot_be_recorded_leaves_no_trace() {
    on_gpu("no graph", |gpu, report| {
        let rows = || gpu.rows_from(&[1.0; 64], 2, Float::F32);
        report.holds("a copy is refused", gpu.record(rows).is_err());
        let panics = || gpu.record(|| -> Result<()> { panic!("on purpose") }).is_ok();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics));
        report.holds("a panic comes through", caught.is_err());
        report.same("afterwards", &[1.0; 64], || gpu.read(rows()?));
    });
}

#[test]
fn a_recording_gives_the_bits_of_its_work() {
    on_gpu("graph", |gpu, report| {
        let steps = 14;
        let Some(layer) = report.ask("weights", || Layer::new(gpu)) else { return };
        let Some(want) = report.ask("one by one", || one_by_one(gpu, &layer, steps)) else {
            return;
        };
        let finite = want.iter().flatten().all(|x| x.is_finite());
        report.holds("logits are numbers", finite);
        report.holds("steps differ", want[1..].windows(2).all(|two| two[0] != two[1]));
        let Some(again) = report.ask("again", || one_by_one(gpu, &layer, steps)) else { return };
        let Some(got) = report.ask("replayed", || replayed(gpu, &layer, steps)) else { return };
        for (i, want) in want.iter().enumerate() {
            report.same(&format!("step {i}, asked again"), want, || Ok(again[i].clone()));
            report.same(&format!("step {i}, replayed"), want, || Ok(got[i].clone()));
        }
    });
}
