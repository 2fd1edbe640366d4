//! Sequences whose keys and values are stored on both sides.

use hearth_kernels::Isa;
use hearth_kernels::attention::{AttentionBatch, AttentionParams, attention, scalar};
use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{
    AttentionShape, DeviceKv, Float, Gpu, HostStep, KvKind, Result, RopeTable, Span, StepShape,
    Turn, Vector,
};
use hearth_kernels::kv::{KvShape, KvSlab, KvType};
use hearth_kernels::norm::rms_norm;
use hearth_kernels::rope;

use crate::report::{POOL, narrow, rounded};

/// What a model says about its heads.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub dim: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Numbers of a head that turn.
    pub rot: usize,
    /// Whether queries and keys have norms.
    pub norms: bool,
    /// A soft bound of scores.
    pub softcap: Option<f32>,
    /// Sinks of query heads are within 3 of this.
    pub sinks: Option<f32>,
    pub kind: KvKind,
}

const BLOCK_LEN: usize = 16;
const LAYERS: usize = 2;
/// The layer that is used.
const LAYER: usize = 1;
const POSITIONS: usize = 1024;
const EPS: f32 = 1e-6;

/// Sequences in shuffled blocks of one store; whatever nobody has stored is NaN on the device.
pub struct World {
    pub heads: Heads,
    device: DeviceKv,
    slab: KvSlab,
    cos: Vec<f32>,
    sin: Vec<f32>,
    table: RopeTable,
    /// Norms of queries and keys.
    norms: [(Vec<f32>, Vector); 2],
    sinks: Option<(Vec<f32>, Vector)>,
    /// Blocks and length of each sequence.
    pub seqs: Vec<(Vec<u32>, usize)>,
    seed: u64,
}

/// New rows of some sequences, and what becomes of them.
pub struct Batch {
    rows: usize,
    /// Sequence, rows and context of each part.
    parts: Vec<[usize; 3]>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// `q`, turned.
    turned: Vec<f32>,
}

impl Batch {
    /// The last rows of a part, as a batch of their own.
    pub fn last_rows(&self, part: usize, rows: usize, heads: &Heads) -> Self {
        let end: usize = self.parts[..=part].iter().map(|part| part[1]).sum();
        let [seq, _, context] = self.parts[part];
        let cut = |x: &[f32], heads_of: usize| {
            let width = heads_of * heads.dim;
            x[(end - rows) * width..end * width].to_vec()
        };
        Self {
            rows,
            parts: vec![[seq, rows, context]],
            positions: self.positions[end - rows..end].to_vec(),
            slots: self.slots[end - rows..end].to_vec(),
            q: cut(&self.q, heads.heads),
            k: cut(&self.k, heads.kv_heads),
            v: cut(&self.v, heads.kv_heads),
            turned: cut(&self.turned, heads.heads),
        }
    }
}

impl World {
    /// Room for sequences of these lengths, and for two blocks more.
    pub fn new(gpu: &Gpu, heads: Heads, lens: &[usize]) -> Result<Self> {
        let counts: Vec<usize> = lens.iter().map(|len| len.div_ceil(BLOCK_LEN)).collect();
        let n_blocks = counts.iter().sum::<usize>() + 2;
        let (kv_heads, dim) = (heads.kv_heads, heads.dim);
        let mut ids: Vec<u32> = (0..n_blocks as u32).collect();
        for i in (1..ids.len()).rev() {
            ids.swap(i, i * 7919 % (i + 1));
        }
        let seqs = counts.iter().map(|&count| (ids.drain(..count).collect(), 0)).collect();
        let half = heads.rot / 2;
        let angle = |i: usize| {
            let (position, pair) = ((i / half) as f64, (i % half) as f64);
            position * 1e4f64.powf(-pair / half as f64)
        };
        let cos: Vec<f32> = (0..POSITIONS * half).map(|i| angle(i).cos() as f32).collect();
        let sin: Vec<f32> = (0..POSITIONS * half).map(|i| angle(i).sin() as f32).collect();
        let kv_type = match heads.kind {
            KvKind::BF16 => KvType::BF16,
            KvKind::F16 => KvType::F16,
            KvKind::Q8 => KvType::Q8_0,
            KvKind::Fp8 => KvType::Fp8,
        };
        let norm = |seed: u64| -> Result<(Vec<f32>, Vector)> {
            let weight: Vec<f32> = randoms(dim, seed).iter().map(|x| 1.0 + 0.5 * x).collect();
            let vector = gpu.vector(&weight)?;
            Ok((weight, vector))
        };
        let sink = |at: f32| -> Result<(Vec<f32>, Vector)> {
            let sinks: Vec<f32> = randoms(heads.heads, 203).iter().map(|x| at + 3.0 * x).collect();
            let vector = gpu.vector(&sinks)?;
            Ok((sinks, vector))
        };
        let shape = KvShape { n_blocks, block_len: BLOCK_LEN, n_kv_heads: kv_heads, head_dim: dim };
        let mut world = Self {
            heads,
            device: gpu.kv(LAYERS, [n_blocks, BLOCK_LEN, kv_heads, dim], heads.kind)?,
            slab: KvSlab::new(shape, kv_type),
            table: gpu.rope_table(&cos, &sin, half)?,
            cos,
            sin,
            norms: [norm(201)?, norm(202)?],
            sinks: heads.sinks.map(sink).transpose()?,
            seqs,
            seed: 0,
        };
        world.poison(gpu, n_blocks * BLOCK_LEN)?;
        Ok(world)
    }

    fn poison(&mut self, gpu: &Gpu, slots: usize) -> Result<()> {
        let Heads { dim, heads, kv_heads, .. } = self.heads;
        let numbers: Vec<u32> = (0..slots as u32).collect();
        let batch = Batch {
            rows: slots,
            parts: Vec::new(),
            positions: vec![0; slots],
            slots: numbers,
            q: vec![0.0; slots * heads * dim],
            k: vec![f32::NAN; slots * kv_heads * dim],
            v: vec![f32::NAN; slots * kv_heads * dim],
            turned: Vec::new(),
        };
        self.run(gpu, &batch, |exact| exact, None).map(drop)
    }

    fn slot(&self, seq: usize, position: usize) -> u32 {
        let block = self.seqs[seq].0[position / BLOCK_LEN];
        block * BLOCK_LEN as u32 + (position % BLOCK_LEN) as u32
    }

    /// New rows for `(sequence, rows)`, in order; the CPU has stored them afterwards.
    pub fn batch(&mut self, parts: &[(usize, usize)]) -> Batch {
        let Heads { dim, heads, kv_heads, .. } = self.heads;
        let (mut all, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        for &(seq, rows) in parts {
            let first = self.seqs[seq].1;
            positions.extend((first..first + rows).map(|position| position as u32));
            slots.extend((first..first + rows).map(|position| self.slot(seq, position)));
            self.seqs[seq].1 += rows;
            all.push([seq, rows, first + rows]);
        }
        let rows = positions.len();
        self.seed += 3;
        let q = narrow(rows * heads * dim, self.seed);
        let (k, v) = (
            narrow(rows * kv_heads * dim, self.seed + 1),
            narrow(rows * kv_heads * dim, self.seed + 2),
        );
        let turned = rounded(self.turned(&q, &positions, 0));
        self.slab.write(&POOL, &self.turned(&k, &positions, 1), &v, &slots);
        Batch { rows, parts: all, positions, slots, q, k, v, turned }
    }

    /// Queries (0) or keys (1) after norm and rotation.
    fn turned(&self, x: &[f32], positions: &[u32], which: usize) -> Vec<f32> {
        let Heads { dim, rot, norms, .. } = self.heads;
        let (mut out, half) = (x.to_vec(), rot / 2);
        if norms {
            let weight = &self.norms[which].0;
            rms_norm(&POOL, x, weight, EPS, x.len() / dim, dim, &mut out);
        }
        let angles = |table: &[f32]| -> Vec<f32> {
            let row = |&p: &u32| &table[p as usize * half..][..half];
            positions.iter().flat_map(row).copied().collect()
        };
        let (cos, sin) = (angles(&self.cos), angles(&self.sin));
        let angles = rope::Angles { cos: &cos, sin: &sin, rotary_dim: rot, head_dim: dim };
        let heads = [rope::Heads { x: &mut out, norm: None }];
        rope::rope(&POOL, positions.len(), heads, angles);
        out
    }

    fn scale(&self) -> f32 {
        2.0 / (self.heads.dim as f32).sqrt()
    }

    /// What the CPU makes of a batch that it has stored: without more rounding, which over bytes
    /// only the slow path does.
    pub fn truth(&self, batch: &Batch, window: usize) -> Vec<f32> {
        let mut cu_q = vec![0];
        cu_q.extend(batch.parts.iter().scan(0, |end, part| {
            *end += part[1] as u32;
            Some(*end)
        }));
        let contexts: Vec<u32> = batch.parts.iter().map(|part| part[2] as u32).collect();
        let tables: Vec<&[u32]> =
            batch.parts.iter().map(|part| &self.seqs[part[0]].0[..]).collect();
        let of = AttentionBatch { cu_q: &cu_q, context_len: &contexts, block_tables: &tables };
        let params = AttentionParams {
            n_heads: self.heads.heads,
            scale: self.scale(),
            softcap: self.heads.softcap,
            window: (window > 0).then_some(window),
            sinks: self.sinks.as_ref().map(|(sinks, _)| sinks.as_slice()),
        };
        let mut out = vec![0.0; batch.turned.len()];
        match self.slab.kv_type() {
            KvType::Q8_0 => scalar::attention(&batch.turned, &self.slab, &of, &params, &mut out),
            _ => attention(&POOL, Isa::best(), &batch.turned, &self.slab, &of, &params, &mut out),
        }
        out
    }

    /// Stores a batch on the device, in the shape that `pad` makes of its own, and attends through
    /// a window unless there is none. Gives the rows of the batch; without a window its queries.
    pub fn run(
        &mut self,
        gpu: &Gpu,
        batch: &Batch,
        pad: impl Fn(StepShape) -> StepShape,
        window: Option<usize>,
    ) -> Result<Vec<f32>> {
        let mut row = 0;
        let span = |&[seq, rows, context]: &[usize; 3]| {
            row += rows;
            let blocks = &self.seqs[seq].0[..context.div_ceil(BLOCK_LEN)];
            Span { row: row - rows, rows, context, blocks }
        };
        let host = HostStep {
            tokens: &vec![0; batch.rows],
            chosen: &[],
            positions: &batch.positions,
            slots: &batch.slots,
            logit_rows: &[],
            spans: batch.parts.iter().map(span).collect(),
        };
        let shape = pad(host.shape());
        let step = gpu.step(&host, shape)?;
        let rows = |x: &[f32]| {
            let mut x = x.to_vec();
            x.resize(x.len() / batch.rows * shape.rows, 0.5);
            gpu.rows_from(&x, shape.rows, Float::BF16)
        };
        let [(_, q_norm), (_, k_norm)] = &self.norms;
        let norms = self.heads.norms.then_some((q_norm, k_norm, EPS));
        let turn = Turn { table: &self.table, norms };
        let (q, k, v) = (rows(&batch.q)?, rows(&batch.k)?, rows(&batch.v)?);
        let q = gpu.rope_and_store(q, [&k, &v], &step, (&mut self.device, LAYER), &turn)?;
        let out = match window {
            Some(window) => {
                let (heads, scale) = (self.heads.heads, self.scale());
                let softcap = self.heads.softcap.unwrap_or(0.0);
                let sinks = self.sinks.as_ref().map(|(_, sinks)| sinks);
                let shape = AttentionShape { layer: LAYER, heads, scale, softcap, window, sinks };
                gpu.attention(&q, &step, &self.device, &shape)?
            }
            None => q,
        };
        let mut out = gpu.read(out)?;
        out.truncate(batch.q.len());
        Ok(out)
    }

    /// Queries of a batch as they meet the keys.
    pub fn queries<'a>(&self, batch: &'a Batch) -> &'a [f32] {
        &batch.turned
    }

    /// Copies a block on both sides, into one that no sequence has.
    pub fn copy_block(&mut self, gpu: &Gpu, from: u32) -> Result<u32> {
        let used = |id: &u32| self.seqs.iter().any(|(blocks, _)| blocks.contains(id));
        let to = (0u32..).find(|id| !used(id)).expect("two blocks are free");
        self.slab.copy_block(from, to);
        gpu.copy_block(&self.device, from as usize, to as usize)?;
        Ok(to)
    }
}
