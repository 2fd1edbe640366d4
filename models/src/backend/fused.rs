//! The fused path: our own kernels on the CPU.
//!
//! Weights are packed once and embedded from the packed form; activations are f32 buffers that go
//! round in an arena; K and V live in one slab a layer. No candle operation runs here.

use std::sync::{Arc, Mutex, PoisonError};

use hearth_kernels::attention::{self, AttentionBatch};
use hearth_kernels::kv::KvSlab;
use hearth_kernels::matmul::{self, Activations, Packed};
use hearth_kernels::{Isa, Pool, activation, norm, rope};

use super::{AttentionParams, Backend};
use crate::Result;
use crate::batch::ForwardBatch;
use crate::kv_store::{KvGeometry, KvStore};
use crate::layers::rotary::RopeTable;
use crate::weights::MatrixSource;

/// Our kernels on one thread pool.
pub struct Fused {
    pool: Arc<Pool>,
    arena: Arc<Arena>,
}

impl Fused {
    /// Every operation runs on `pool`.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self { pool, arena: Arc::default() }
    }

    /// A buffer with whatever was in it before: the caller writes every element.
    fn rows(&self, count: usize, width: usize) -> Rows {
        let mut data = self.arena.take(count * width);
        data.resize(count * width, 0.0);
        Rows { data, count, width, arena: Arc::clone(&self.arena) }
    }
}

/// Activations. `[count, width]`
pub struct Rows {
    data: Vec<f32>,
    count: usize,
    width: usize,
    arena: Arc<Arena>,
}

impl Drop for Rows {
    fn drop(&mut self) {
        self.arena.give(std::mem::take(&mut self.data));
    }
}

/// Buffers between two uses: a forward pass no larger than one before asks for little more than
/// its logits, which leave with the caller.
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

impl Backend for Fused {
    type Rows = Rows;
    type Matrix = Packed;
    type Vector = Vec<f32>;

    fn matrix(&self, source: &MatrixSource<'_>) -> Result<Packed> {
        Ok(Packed::pack_with(&self.pool, source.dtype, source.n, source.k, source))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore> {
        let slab = |_| KvSlab::new(geometry.slab_shape(), geometry.dtype);
        Ok(KvStore::Slabs((0..geometry.layer_count).map(slab).collect()))
    }

    fn embed(&self, table: &Packed, ids: &[u32]) -> Result<Rows> {
        let mut out = self.rows(ids.len(), table.k());
        for (&id, row) in ids.iter().zip(out.data.chunks_exact_mut(table.k())) {
            table.row(id as usize, row);
        }
        Ok(out)
    }

    fn linear<const N: usize>(
        &self,
        x: &Rows,
        weights: [(&Packed, Option<&Vec<f32>>); N],
    ) -> Result<[Rows; N]> {
        // Weights of one kind read one prepared (quantised) input.
        let mut prepared: Option<Activations> = None;
        Ok(weights.map(|(weight, bias)| {
            let kind = weight.activation_kind();
            if prepared.as_ref().is_none_or(|p| p.kind() != kind) {
                prepared = Some(Activations::new(&self.pool, &x.data, x.count, x.width, kind));
            }
            let acts = prepared.as_ref().expect("prepared above; this is a bug");
            let mut y = self.rows(x.count, weight.n());
            matmul::matmul_prepared(&self.pool, acts, weight, &mut y.data);
            if let Some(bias) = bias {
                activation::add_bias(&self.pool, &mut y.data, bias);
            }
            y
        }))
    }

    fn rms_norm(&self, x: &Rows, weight: &Vec<f32>, eps: f32) -> Result<Rows> {
        let mut out = self.rows(x.count, x.width);
        let groups = x.data.len() / weight.len();
        norm::rms_norm(&self.pool, &x.data, weight, eps, groups, weight.len(), &mut out.data);
        Ok(out)
    }

    fn rope(&self, mut x: Rows, table: &RopeTable, head_dim: usize) -> Result<Rows> {
        let heads = x.width / head_dim;
        rope::rope(&self.pool, &mut x.data, &table.cos, &table.sin, heads, head_dim, table.dim);
        Ok(x)
    }

    fn attention(
        &self,
        q: &Rows,
        k: &Rows,
        v: &Rows,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        params: &AttentionParams,
    ) -> Result<Rows> {
        let slab = kv.slab(params.layer)?;
        slab.write(&k.data, &v.data, &batch.slot_mapping);
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
            window: params.window,
        };
        attention::attention(
            &self.pool,
            Isa::best(),
            &q.data,
            slab,
            &sequences,
            &params,
            &mut out.data,
        );
        Ok(out)
    }

    fn silu_mul(&self, gate: Rows, up: &Rows) -> Result<Rows> {
        let mut out = self.rows(gate.count, gate.width);
        activation::silu_mul(&self.pool, &gate.data, &up.data, &mut out.data);
        Ok(out)
    }

    fn add(&self, mut x: Rows, y: &Rows) -> Result<Rows> {
        activation::add(&self.pool, &mut x.data, &y.data);
        Ok(x)
    }

    fn select(&self, x: &Rows, rows: &[u32]) -> Result<Rows> {
        let mut out = self.rows(rows.len(), x.width);
        for (&row, out) in rows.iter().zip(out.data.chunks_exact_mut(x.width)) {
            let start = row as usize * x.width;
            out.copy_from_slice(&x.data[start..start + x.width]);
        }
        Ok(out)
    }

    fn read(&self, mut x: Rows) -> Result<Vec<f32>> {
        Ok(std::mem::take(&mut x.data))
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
    fn what_is_read_leaves_the_arena() {
        let fused = Fused::new(Arc::new(Pool::new(1)));
        for _ in 0..3 {
            let (small, large) = (fused.rows(2, 8), fused.rows(2, 500));
            assert_eq!(fused.read(large).unwrap().len(), 1000);
            drop(small);
        }
        assert!(capacities(&fused.arena).iter().all(|room| *room < 1000));
    }
}
