//! The fused path: our own kernels on the CPU.
//!
//! Weights are packed once and embedded from the packed form; activations are f32 buffers that go
//! round in an arena; K and V live in one slab a layer. No candle operation runs here.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hearth_kernels::attention::{self, AttentionBatch};
use hearth_kernels::experts::{self, Routes};
use hearth_kernels::kv::KvSlab;
use hearth_kernels::matmul::{
    self, ActivationBuffers, ActivationKind, Activations, Grouped, Packed, Product,
};
use hearth_kernels::{Isa, Pool, activation, lora, norm, rope};

use super::{
    AttentionParams, Backend, DeltaGroup, DeltaInput, Experts, Gate, Gelu, Heads, HostStep, OfHeads,
};
use crate::Result;
use crate::adapter::Delta;
use crate::batch::ForwardBatch;
use crate::kv_store::{KvGeometry, KvStore};
use crate::layers::rotary::Rotaries;
use crate::parallel::Seat;
use crate::weights::MatrixSource;

/// Our kernels on one thread pool.
pub struct Fused {
    pool: Arc<Pool>,
    arena: Arc<Arena>,
    /// Memory of inputs that were prepared before.
    prepared: Mutex<Vec<ActivationBuffers>>,
    seat: Option<Seat>,
}

impl Fused {
    /// Every operation runs on `pool`.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self { pool, arena: Arc::default(), prepared: Mutex::default(), seat: None }
    }

    /// The same as one rank of several.
    pub fn seated(self, seat: Seat) -> Self {
        Self { seat: Some(seat), ..self }
    }

    /// A buffer with whatever was in it before: the caller writes every element.
    fn rows(&self, count: usize, width: usize) -> Rows {
        let mut buffer = self.arena.take(count * width);
        if buffer.len() < count * width {
            buffer.resize(count * width, 0.0);
        }
        Rows { buffer, count, width, arena: Arc::clone(&self.arena) }
    }

    /// `x` as weights of one kind want it, in memory that was used before.
    fn prepare<'x>(&self, x: &'x Rows, kind: ActivationKind) -> Activations<'x> {
        let buffers = lock(&self.prepared).pop().unwrap_or_default();
        Activations::new_in(buffers, &self.pool, x, x.count, x.width, kind)
    }

    /// `x` as each of these weights wants it: those of one kind read one prepared (quantised)
    /// input.
    fn prepare_for<'x, const N: usize>(
        &self,
        x: &'x Rows,
        weights: [&Packed; N],
    ) -> Vec<Activations<'x>> {
        let mut prepared: Vec<Activations<'_>> = Vec::with_capacity(N);
        for kind in weights.map(Packed::activation_kind) {
            if prepared.iter().all(|acts| acts.kind() != kind) {
                prepared.push(self.prepare(x, kind));
            }
        }
        prepared
    }

    /// Products of rows in the order of their experts with a matrix of each, for several that read
    /// the same rows.
    fn grouped<const N: usize>(
        &self,
        x: &Rows,
        routes: &Routes,
        weights: [&[Packed]; N],
    ) -> [Rows; N] {
        let prepared = self.prepare_for(x, weights.map(|all| &all[0]));
        let groups = weights.map(|all| {
            let of = |(expert, rows): &(usize, Range<usize>)| (rows.clone(), &all[*expert]);
            routes.groups.iter().map(of).collect::<Vec<_>>()
        });
        let mut outs = weights.map(|all| self.rows(x.count, all[0].n()));
        let mut parts = groups.iter().zip(&mut outs);
        let products = weights.map(|all| {
            let (groups, y) = parts.next().expect("N of them; this is a bug");
            Grouped { acts: input_of(&prepared, &all[0]), groups, y }
        });
        matmul::grouped(&self.pool, products);
        lock(&self.prepared).extend(prepared.into_iter().map(Activations::into_buffers));
        outs
    }
}

/// The one of some prepared inputs that a matrix reads.
fn input_of<'a, 'x>(prepared: &'a [Activations<'x>], w: &Packed) -> &'a Activations<'x> {
    let found = prepared.iter().find(|acts| acts.kind() == w.activation_kind());
    found.expect("prepared for it; this is a bug")
}

/// Activations, `[count, width]`, at the start of a buffer that may be longer.
pub struct Rows {
    buffer: Vec<f32>,
    count: usize,
    width: usize,
    arena: Arc<Arena>,
}

impl Deref for Rows {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[..self.count * self.width]
    }
}

impl DerefMut for Rows {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.count * self.width]
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        self.arena.give(std::mem::take(&mut self.buffer));
    }
}

/// What adapters add to one projection: their own numbers, shared with whoever holds them.
pub struct FusedDelta {
    parts: Vec<FusedPart>,
    /// `[n]`
    gain: Option<Vec<f32>>,
}

struct FusedPart {
    factors: Arc<lora::Factors>,
    weight: f32,
    /// `[n]`
    ratio: Option<Vec<f32>>,
}

impl FusedDelta {
    fn group<'a>(&'a self, rows: &'a [u32]) -> lora::Group<'a> {
        let part = |part: &'a FusedPart| lora::Part {
            factors: &part.factors,
            weight: part.weight,
            ratio: part.ratio.as_deref(),
        };
        let (gain, parts) = (self.gain.as_deref(), self.parts.iter().map(part).collect());
        lora::Group { rows, gain, parts }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Buffers between two uses: a forward pass no larger than one before finds all that it needs.
#[derive(Default)]
struct Arena(Mutex<Vec<Vec<f32>>>);

impl Arena {
    /// The smallest buffer that holds `len` numbers, else the largest, which will grow.
    fn take(&self, len: usize) -> Vec<f32> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that fit come first, small ones before large ones; then the others, large first.
        let rank = |buffer: &Vec<f32>| match buffer.capacity() {
            room if room >= len => (false, room),
            room => (true, usize::MAX - room),
        };
        let best = (0..free.len()).min_by_key(|&i| rank(&free[i]));
        best.map(|i| free.swap_remove(i)).unwrap_or_default()
    }

    fn give(&self, buffer: Vec<f32>) {
        if buffer.capacity() > 0 {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        }
    }
}

/// The parts of operations.
impl Fused {
    /// Writes `k` and `v` to the store and attends from `q` to everything of each row's sequence.
    fn attention(
        &self,
        q: &Rows,
        k: &Rows,
        v: &Rows,
        (batch, kv): (&ForwardBatch, &mut KvStore),
        params: &AttentionParams,
        sinks: Option<&Vec<f32>>,
    ) -> Result<Rows> {
        let slab = kv.slab(params.layer)?;
        slab.write(&self.pool, k, v, &batch.slot_mapping);
        let mut out = self.rows(q.count, q.width);
        let tables: Vec<&[u32]> = batch.block_tables.iter().map(Vec::as_slice).collect();
        let sequences = AttentionBatch {
            cu_q: &batch.cu_q,
            context_len: &batch.context_len,
            block_tables: &tables,
        };
        let params = attention::AttentionParams {
            n_heads: params.head_count,
            scale: params.scale,
            softcap: params.softcap,
            window: params.window,
            sinks: sinks.map(Vec::as_slice),
        };
        attention::attention(&self.pool, Isa::best(), q, slab, &sequences, &params, &mut out);
        Ok(out)
    }

    /// Some rows of `x`, in the order given.
    fn select(&self, x: &Rows, rows: &[u32]) -> Result<Rows> {
        let mut out = self.rows(rows.len(), x.width);
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(x.width)) {
            let start = row as usize * x.width;
            out.copy_from_slice(&x[start..start + x.width]);
        }
        Ok(out)
    }
}

impl Backend for Fused {
    type Rows = Rows;
    type Matrix = Packed;
    type Vector = Vec<f32>;
    type Delta = FusedDelta;
    type Step = HostStep;

    fn begin(&self, batch: &ForwardBatch, rotaries: &Rotaries) -> Result<HostStep> {
        Ok(HostStep::new(batch, rotaries))
    }

    fn matrix(&self, source: &MatrixSource<'_>) -> Result<Packed> {
        Ok(Packed::pack_with(&self.pool, source.dtype, source.n, source.k, source))
    }

    fn matrices(&self, sources: &[MatrixSource<'_>]) -> Result<Vec<Packed>> {
        let all: Vec<&MatrixSource<'_>> = sources.iter().collect();
        let Some(first) = all.first() else { return Ok(Vec::new()) };
        Ok(Packed::stack(&self.pool, first.dtype, first.n, first.k, &all))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore> {
        let (shape, of) = (geometry.slab_shape(), geometry.layer_count);
        let slab = |layer| KvSlab::layer(shape, geometry.dtype, layer, of);
        Ok(KvStore::Slabs((0..of).map(slab).collect(), Arc::clone(&self.pool)))
    }

    fn embed(&self, table: &Packed, ids: &[u32]) -> Result<Rows> {
        let mut out = self.rows(ids.len(), table.k());
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(table.k())) {
            table.row(id as usize, row);
        }
        Ok(out)
    }

    fn embed_tokens(&self, table: &Packed, step: &HostStep) -> Result<Rows> {
        self.embed(table, &step.batch.tokens)
    }

    fn select_logit_rows(&self, x: &Rows, step: &HostStep) -> Result<Rows> {
        self.select(x, &step.batch.logit_rows)
    }

    fn linear<const N: usize>(
        &self,
        x: &Rows,
        weights: [(&Packed, Option<&Vec<f32>>); N],
    ) -> Result<[Rows; N]> {
        let prepared = self.prepare_for(x, weights.map(|(weight, _)| weight));
        let mut outs = weights.map(|(weight, _)| self.rows(x.count, weight.n()));
        let mut ys = outs.iter_mut();
        let products = weights.map(|(w, _)| Product {
            acts: input_of(&prepared, w),
            w,
            y: ys.next().expect("N of them; this is a bug"),
        });
        matmul::products(&self.pool, products);
        for ((_, bias), y) in weights.iter().zip(&mut outs) {
            if let Some(bias) = bias {
                activation::add_bias(&self.pool, y, bias);
            }
        }
        lock(&self.prepared).extend(prepared.into_iter().map(Activations::into_buffers));
        Ok(outs)
    }

    fn delta(&self, parts: &[(&Delta, f32)]) -> Result<FusedDelta> {
        let mut gain: Option<Vec<f32>> = None;
        let part = |&(delta, weight): &(&Delta, f32)| {
            let ratio = delta.dora.as_ref().map(|dora| {
                let ratio = dora.ratio();
                let gain = gain.get_or_insert_with(|| vec![0.0; ratio.len()]);
                gain.iter_mut().zip(&ratio).for_each(|(g, ratio)| *g += weight * (ratio - 1.0));
                ratio
            });
            let factors = Arc::clone(&delta.factors);
            FusedPart { factors, weight: weight * delta.scale, ratio }
        };
        let parts = parts.iter().map(part).collect();
        Ok(FusedDelta { parts, gain })
    }

    fn add_deltas<const N: usize>(
        &self,
        x: DeltaInput<'_, Rows>,
        mut ys: [Rows; N],
        groups: [Vec<DeltaGroup<'_, FusedDelta>>; N],
    ) -> Result<[Rows; N]> {
        let input = match x {
            DeltaInput::Rows(x) => lora::Input::Rows(x),
            DeltaInput::Ids(ids) => lora::Input::Ids(ids),
        };
        let groups: [Vec<lora::Group<'_>>; N] =
            groups.map(|all| all.into_iter().map(|(rows, delta)| delta.group(rows)).collect());
        let updates = ys.iter_mut().zip(&groups);
        let updates = updates.map(|(y, groups)| lora::Update { input, y: &mut *y, groups });
        lora::add(&self.pool, &mut updates.collect::<Vec<_>>());
        Ok(ys)
    }

    fn add_bias(&self, mut x: Rows, bias: &Vec<f32>) -> Result<Rows> {
        activation::add_bias(&self.pool, &mut x, bias);
        Ok(x)
    }

    fn rms_norm(&self, x: &Rows, weight: &Vec<f32>, eps: f32) -> Result<Rows> {
        let mut out = self.rows(x.count, x.width);
        let groups = x.len() / weight.len();
        norm::rms_norm(&self.pool, x, weight, eps, groups, weight.len(), &mut out);
        Ok(out)
    }

    fn add_norm(&self, mut x: Rows, y: &Rows, weight: &Vec<f32>, eps: f32) -> Result<(Rows, Rows)> {
        let mut out = self.rows(x.count, x.width);
        norm::add_rms_norm(&self.pool, &mut x, y, weight, eps, &mut out);
        Ok((x, out))
    }

    fn layer_norm(&self, x: &Rows, weight: &Vec<f32>, bias: &Vec<f32>, eps: f32) -> Result<Rows> {
        let mut out = self.rows(x.count, x.width);
        let params = norm::LayerNorm { weight, bias, eps };
        norm::layer_norm(&self.pool, x, &params, &mut out);
        Ok(out)
    }

    fn attend(
        &self,
        [mut q, mut k, v]: [Rows; 3],
        heads: OfHeads<'_, Vec<f32>>,
        step: &HostStep,
        kv: &mut KvStore,
        params: &AttentionParams,
    ) -> Result<Rows> {
        let (rows, table) = (q.count, step.rope(params));
        let [q_norm, k_norm] = match heads.norms {
            Some((q, k, eps)) => [Some((&q[..], eps)), Some((&k[..], eps))],
            None => [None, None],
        };
        let angles = rope::Angles {
            cos: &table.cos,
            sin: &table.sin,
            rotary_dim: table.dim,
            head_dim: params.head_dim,
        };
        let turning =
            [rope::Heads { x: &mut q, norm: q_norm }, rope::Heads { x: &mut k, norm: k_norm }];
        rope::rope(&self.pool, rows, turning, angles);
        self.attention(&q, &k, &v, (&step.batch, kv), params, heads.sinks)
    }

    fn bidirectional(&self, qkv: [&Rows; 3], cu_q: &[u32], heads: &Heads) -> Result<Rows> {
        let mut out = self.rows(qkv[0].count, qkv[0].width);
        let qkv = qkv.map(|rows| &rows[..]);
        attention::bidirectional(&self.pool, Isa::best(), qkv, cu_q, heads, &mut out);
        Ok(out)
    }

    fn gelu(&self, x: Rows, kind: Gelu) -> Result<Rows> {
        let mut out = self.rows(x.count, x.width);
        activation::gelu(&self.pool, kind, &x, &mut out);
        Ok(out)
    }

    fn gate_mul(&self, kind: Gate, mut gate: Rows, up: &Rows) -> Result<Rows> {
        activation::gate_mul(&self.pool, kind, &mut gate, up);
        Ok(gate)
    }

    fn experts(&self, x: &Rows, scores: Rows, of: &Experts<Packed, Vec<f32>>) -> Result<Rows> {
        let routes = experts::route(&scores, &of.routing);
        let mut picked = self.rows(routes.rows.len(), x.width);
        experts::gather(&self.pool, x, x.width, &routes, &mut picked);
        let biased = |y: &mut Rows, part: usize| {
            let (width, biases) = (y.width, of.biases.iter().map(|all| &all[part]));
            biases.for_each(|all| experts::add_biases(&self.pool, y, width, &routes, all));
        };
        let [mut gate, mut up] = self.grouped(&picked, &routes, [&of.gate, &of.up]);
        biased(&mut gate, 0);
        biased(&mut up, 1);
        let opened = self.gate_mul(of.activation, gate, &up)?;
        let [mut brought] = self.grouped(&opened, &routes, [&of.down]);
        biased(&mut brought, 2);
        let mut out = self.rows(x.count, brought.width);
        experts::combine(&self.pool, &brought, brought.width, &routes, &mut out);
        Ok(out)
    }

    fn scale(&self, mut x: Rows, factor: f32) -> Result<Rows> {
        activation::scale(&self.pool, &mut x, factor);
        Ok(x)
    }

    fn softcap(&self, mut x: Rows, cap: f32) -> Result<Rows> {
        activation::softcap(&self.pool, cap, &mut x);
        Ok(x)
    }

    fn add(&self, mut x: Rows, y: &Rows) -> Result<Rows> {
        activation::add(&self.pool, &mut x, y);
        Ok(x)
    }

    fn trims(&self) -> bool {
        self.seat.is_none()
    }

    fn reduce(&self, mut x: Rows) -> Result<Rows> {
        if let Some(seat) = &self.seat {
            seat.sum(&mut x)?;
        }
        Ok(x)
    }

    /// Copied: a buffer that left with the caller would be made again, and cleared, by the next.
    fn read(&self, x: Rows) -> Result<Vec<f32>> {
        Ok(x.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capacities(arena: &Arena) -> Vec<usize> {
        let mut all: Vec<usize> = arena.0.lock().unwrap().iter().map(Vec::capacity).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn arena_gives_the_smallest_buffer_that_fits() {
        let arena = Arena::default();
        assert_eq!(arena.take(10).capacity(), 0);
        for room in [100, 10, 1000] {
            arena.give(Vec::with_capacity(room));
        }
        assert_eq!(arena.take(11).capacity(), 100);
        assert_eq!(arena.take(5000).capacity(), 1000, "nothing fits: the largest grows");
        assert_eq!(arena.take(0).capacity(), 10);
        arena.give(Vec::new());
        assert_eq!(capacities(&arena), [0; 0]);
    }

    #[test]
    fn a_pass_finds_the_buffers_of_the_one_before() {
        let fused = Fused::new(Arc::new(Pool::new(1)));
        let pass = |rows: usize| {
            let (small, large) = (fused.rows(rows, 8), fused.rows(rows, 500));
            assert_eq!(fused.read(large).unwrap().len(), rows * 500);
            drop(small);
            capacities(&fused.arena)
        };
        let first = pass(4);
        assert_eq!(first.len(), 2);
        for rows in [1, 4, 2, 3, 4] {
            assert_eq!(pass(rows), first, "{rows} rows");
        }
    }
}
