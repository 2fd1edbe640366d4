//! Where keys and values live: by layer and block. Knows block ids only as numbers.
//!
//! Who owns a block, who shares it and when it is free is the runtime's business.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use hearth_kernels::kv::{KvShape, KvSlab};
use hearth_kernels::{Isa, Pool};

use crate::{Error, Result};

/// Element type of stored keys and values.
pub use hearth_kernels::kv::KvType as KvDType;

/// Other numbers of the same weights have another one. 2: weights in bf16 meet activations in bf16.
const NUMBERS: u32 = 2;

/// How much KV to store, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    /// Layers.
    pub layer_count: usize,
    /// Blocks of each layer.
    pub block_count: usize,
    /// Tokens of a block.
    pub block_len: usize,
    /// Key and value heads.
    pub kv_head_count: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDType,
}

impl KvGeometry {
    /// Bytes of all blocks of all layers, K and V, as the fused path stores them. (The plain path
    /// keeps what candle has no tensors of in f32.)
    pub fn bytes(&self) -> usize {
        self.layer_count * self.slab_shape().bytes(self.dtype)
    }

    /// The same with what these take of memory beside that, at most.
    pub fn resident_bytes(&self) -> usize {
        self.slab_shape().resident_bytes(self.dtype, self.layer_count)
    }

    /// One layer of it.
    pub(crate) fn slab_shape(&self) -> KvShape {
        KvShape {
            n_blocks: self.block_count,
            block_len: self.block_len,
            n_kv_heads: self.kv_head_count,
            head_dim: self.head_dim,
        }
    }
}

/// KV of all layers, in the form that a backend reads.
pub enum KvStore {
    /// Nothing is stored: every sequence must be whole in its batch (training, scoring).
    Nothing,
    /// The fused CPU path: one slab a layer, and who computes with them.
    Slabs(Vec<KvSlab>, Arc<Pool>),
    /// The plain path.
    Tensors(TensorKv),
    /// Of every rank of a divided model, in their order.
    Ranks(Vec<KvStore>),
    /// On a GPU.
    #[cfg(feature = "cuda")]
    Device(crate::backend::CudaKv),
}

impl KvStore {
    /// Copies all tokens of a block, in every layer.
    pub fn copy_block(&mut self, from: u32, to: u32) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Slabs(slabs, _) => {
                slabs.iter_mut().for_each(|slab| slab.copy_block(from, to));
                Ok(())
            }
            Self::Tensors(store) => store.copy_block(from as usize, to as usize),
            Self::Ranks(stores) => stores.iter_mut().try_for_each(|s| s.copy_block(from, to)),
            #[cfg(feature = "cuda")]
            Self::Device(store) => store.copy_block(from as usize, to as usize),
        }
    }

    /// Has the system provide memory of the first `blocks` blocks now, and not as they are first
    /// written: one huge page for each thread. False when they have all. A GPU has provided it;
    /// tensors are left to candle ([`crate::Compute::check_kv_prefault`]).
    pub fn provide(&mut self, blocks: usize) -> bool {
        match self {
            Self::Slabs(slabs, pool) => {
                let lacking = slabs.iter_mut().filter(|slab| slab.lacks(blocks)).map(Mutex::new);
                let lacking: Vec<_> = lacking.take(pool.threads()).collect();
                let provide = |i: usize| {
                    lacking[i].lock().unwrap_or_else(PoisonError::into_inner).provide(blocks);
                };
                pool.run(lacking.len(), &provide);
                !lacking.is_empty()
            }
            Self::Ranks(stores) => stores.iter_mut().any(|store| store.provide(blocks)),
            Self::Nothing | Self::Tensors(_) => false,
            #[cfg(feature = "cuda")]
            Self::Device(_) => false,
        }
    }

    /// The same for all blocks, by the calling thread alone: others may be answering.
    pub fn prefault(&mut self) {
        match self {
            Self::Slabs(slabs, _) => slabs.iter_mut().for_each(|slab| {
                while slab.lacks(usize::MAX) {
                    slab.provide(usize::MAX);
                }
            }),
            Self::Ranks(stores) => stores.iter_mut().for_each(KvStore::prefault),
            Self::Nothing | Self::Tensors(_) => {}
            #[cfg(feature = "cuda")]
            Self::Device(_) => {}
        }
    }

    /// What the bytes of a block mean, for whoever keeps them: another text, other numbers. It
    /// names all that the numbers of a given model follow from, the instruction set too. `None`
    /// where blocks do not leave the store.
    pub fn layout(&self) -> Option<String> {
        match self {
            Self::Nothing | Self::Ranks(_) => None,
            Self::Slabs(slabs, _) => {
                let (shape, isa) = (slabs.first()?.shape(), Isa::best().name());
                let KvShape { n_blocks: _, block_len, n_kv_heads, head_dim } = shape;
                let kv_type = slabs[0].kv_type().name();
                let layers = slabs.len();
                // Of an earlier order of bytes there are files too.
                let order = if slabs[0].kv_type() == KvDType::Q8_0 { " by fours" } else { "" };
                let sizes = format!("{layers} x {block_len} x {n_kv_heads} x {head_dim}");
                Some(format!("slabs {kv_type}{order} {sizes} {isa} {NUMBERS}"))
            }
            Self::Tensors(store) => {
                let (dtype, block_len) = (store.dtype.name(), store.block_len);
                let (k, layers) = (&store.layers.first()?.0, store.layers.len());
                let (width, device) = (k.dims().last()?, k.device().location());
                let head_dim = store.head_dim;
                Some(format!(
                    "tensors {dtype} {layers} x {block_len} x {width} / {head_dim} {device:?}"
                ))
            }
            #[cfg(feature = "cuda")]
            Self::Device(_) => None,
        }
    }

    /// Bytes of a block in all layers, as [`KvStore::export_block`] gives them.
    pub fn block_bytes(&self) -> usize {
        match self {
            Self::Nothing | Self::Ranks(_) => 0,
            Self::Slabs(slabs, _) => slabs.iter().map(|slab| slab.block(0).len()).sum(),
            Self::Tensors(store) => store.block_bytes(),
            #[cfg(feature = "cuda")]
            Self::Device(_) => 0,
        }
    }

    /// Adds the bytes of a block to `out`: everything that [`KvStore::import_block`] needs.
    ///
    /// # Errors
    /// Blocks do not leave this store.
    pub fn export_block(&self, block: u32, out: &mut Vec<u8>) -> Result<()> {
        match self {
            Self::Slabs(slabs, _) => {
                slabs.iter().for_each(|slab| out.extend_from_slice(slab.block(block)));
                Ok(())
            }
            Self::Tensors(store) => store.export_block(block as usize, out),
            _ => Err(Error::Batch("blocks do not leave this KV store".into())),
        }
    }

    /// Fills a block with what [`KvStore::export_block`] gave for it, or for another one, in a
    /// store of the same layout.
    ///
    /// # Errors
    /// Bytes of another length, or blocks do not enter this store.
    pub fn import_block(&mut self, block: u32, bytes: &[u8]) -> Result<()> {
        if bytes.len() != self.block_bytes() {
            return Err(Error::Batch(format!("{} bytes are no block of KV", bytes.len())));
        }
        match self {
            Self::Slabs(slabs, _) => {
                let mut rest = bytes;
                for slab in slabs {
                    let place = slab.block_mut(block);
                    let (own, after) = rest.split_at(place.len());
                    place.copy_from_slice(own);
                    rest = after;
                }
                Ok(())
            }
            Self::Tensors(store) => store.import_block(block as usize, bytes),
            _ => Err(Error::Batch("blocks do not enter this KV store".into())),
        }
    }

    /// Those of every rank.
    pub(crate) fn ranks(&mut self) -> Result<&mut [KvStore]> {
        match self {
            Self::Ranks(stores) => Ok(stores),
            _ => Err(Error::Batch("this KV store was made for another backend".into())),
        }
    }

    /// What lies on a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn device(&mut self) -> Option<&mut crate::backend::CudaKv> {
        match self {
            Self::Device(store) => Some(store),
            _ => None,
        }
    }

    /// The slab of one layer, for the fused path.
    pub(crate) fn slab(&mut self, layer: usize) -> Result<&mut KvSlab> {
        match self {
            Self::Slabs(slabs, _) => Ok(&mut slabs[layer]),
            _ => Err(Error::Batch("this KV store was made for another backend".into())),
        }
    }

    /// The tensors of one layer, for the plain path; `None` when nothing is stored.
    pub(crate) fn tensors(&mut self, layer: usize) -> Result<Option<LayerKv<'_>>> {
        match self {
            Self::Nothing => Ok(None),
            Self::Tensors(store) => {
                let (k, v) = &store.layers[layer];
                let (dtype, head_dim, block_len) = (store.dtype, store.head_dim, store.block_len);
                Ok(Some(LayerKv { k, v, dtype, head_dim, block_len }))
            }
            _ => Err(Error::Batch("this KV store was made for another backend".into())),
        }
    }
}

/// KV as candle tensors, `[block_count * block_len, kv_heads * head_dim]` for each layer.
pub struct TensorKv {
    layers: Vec<(Tensor, Tensor)>,
    dtype: KvDType,
    head_dim: usize,
    block_len: usize,
}

impl TensorKv {
    pub(crate) fn new(shape: KvGeometry, device: &Device) -> Result<Self> {
        let dtype = stored_as(shape.dtype, device.is_cpu())?;
        let size = (shape.block_count * shape.block_len, shape.kv_head_count * shape.head_dim);
        let layer =
            |_| Ok((Tensor::zeros(size, dtype, device)?, Tensor::zeros(size, dtype, device)?));
        let layers = (0..shape.layer_count).map(layer).collect::<Result<_>>()?;
        let KvGeometry { dtype, head_dim, block_len, .. } = shape;
        Ok(Self { layers, dtype, head_dim, block_len })
    }

    fn block_bytes(&self) -> usize {
        let of = |t: &Tensor| t.elem_count() / t.dims()[0] * self.block_len;
        self.layers.iter().map(|(k, v)| (of(k) + of(v)) * k.dtype().size_in_bytes()).sum()
    }

    fn export_block(&self, block: usize, out: &mut Vec<u8>) -> Result<()> {
        for stored in self.layers.iter().flat_map(|(k, v)| [k, v]) {
            let rows = stored.narrow(0, block * self.block_len, self.block_len)?.flatten_all()?;
            match stored.dtype() {
                DType::F16 => out.extend(bytemuck::cast_slice(&rows.to_vec1::<f16>()?)),
                DType::BF16 => out.extend(bytemuck::cast_slice(&rows.to_vec1::<bf16>()?)),
                _ => out.extend(bytemuck::cast_slice(&rows.to_vec1::<f32>()?)),
            }
        }
        Ok(())
    }

    fn import_block(&mut self, block: usize, mut bytes: &[u8]) -> Result<()> {
        for stored in self.layers.iter().flat_map(|(k, v)| [k, v]) {
            let size = (self.block_len, stored.elem_count() / stored.dims()[0]);
            let len = size.0 * size.1 * stored.dtype().size_in_bytes();
            let (own, after) = bytes.split_at(len);
            let rows =
                Tensor::from_raw_buffer(own, stored.dtype(), &[size.0, size.1], stored.device())?;
            stored.slice_set(&rows, 0, block * self.block_len)?;
            bytes = after;
        }
        Ok(())
    }

    fn copy_block(&mut self, from: usize, to: usize) -> Result<()> {
        for (k, v) in &self.layers {
            for stored in [k, v] {
                // A tensor cannot be written from a view of itself.
                let rows = stored.narrow(0, from * self.block_len, self.block_len)?;
                stored.slice_set(&rows.force_contiguous()?, 0, to * self.block_len)?;
            }
        }
        Ok(())
    }
}

/// Whether only slabs store a type: candle has no tensors of it.
pub(crate) fn in_slabs_alone(dtype: KvDType) -> bool {
    matches!(dtype, KvDType::Q16_0 | KvDType::Q8_0 | KvDType::Fp8)
}

/// The tensors that stand for a type: where there are none, what it says is kept in f32, as the
/// reference of the fused path.
pub(crate) fn stored_as(dtype: KvDType, on_cpu: bool) -> Result<DType> {
    match dtype {
        KvDType::F32 => Ok(DType::F32),
        KvDType::F16 => Ok(DType::F16),
        KvDType::BF16 => Ok(DType::BF16),
        _ if on_cpu => Ok(DType::F32),
        _ => {
            let what = format!("keys and values of {} are not stored on this device", dtype.name());
            Err(Error::Device(format!("{what}; choose f16, bf16 or f32")))
        }
    }
}

/// One layer of a [`TensorKv`].
pub(crate) struct LayerKv<'a> {
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub dtype: KvDType,
    pub head_dim: usize,
    pub block_len: usize,
}

impl LayerKv<'_> {
    /// K and V of some rows in the dtype of the store, as the fused path narrows them: finite
    /// numbers stay finite.
    pub(crate) fn narrow(&self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (k, v) = (k.detach().to_dtype(DType::F32)?, v.detach().to_dtype(DType::F32)?);
        let largest = match self.dtype {
            KvDType::F32 => return Ok((k, v)),
            KvDType::F16 => f16::MAX.to_f32(),
            KvDType::BF16 => bf16::MAX.to_f32(),
            _ => return self.as_in_a_slab(&k, &v),
        };
        let narrow = |rows: &Tensor| -> Result<Tensor> {
            let finite = rows.abs()?.le(f32::MAX)?;
            let within = rows.clamp(-largest, largest)?;
            Ok(finite.where_cond(&within, rows)?.to_dtype(self.k.dtype())?)
        };
        Ok((narrow(&k)?, narrow(&v)?))
    }

    /// What a slab would give back of rows.
    fn as_in_a_slab(&self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (count, width) = k.dims2()?;
        let (head_dim, n_kv_heads) = (self.head_dim, width / self.head_dim);
        const BLOCK_LEN: usize = 16;
        let n_blocks = count.div_ceil(BLOCK_LEN);
        let shape = KvShape { n_blocks, block_len: BLOCK_LEN, n_kv_heads, head_dim };
        let mut slab = KvSlab::new(shape, self.dtype);
        let mut k = k.flatten_all()?.to_vec1::<f32>()?;
        let mut v = v.flatten_all()?.to_vec1::<f32>()?;
        slab.write(&Pool::new(1), &k, &v, &(0..count as u32).collect::<Vec<_>>());
        let rows = k.chunks_exact_mut(width).zip(v.chunks_exact_mut(width));
        for (slot, (k, v)) in rows.enumerate() {
            slab.read(slot as u32, k, v);
        }
        let tensor = |x: &[f32]| Tensor::from_slice(x, (count, width), self.k.device());
        Ok((tensor(&k)?, tensor(&v)?))
    }

    /// Writes narrowed rows to their slots, run by run of neighbouring slots.
    pub(crate) fn write(&mut self, k: &Tensor, v: &Tensor, slots: &[u32]) -> Result<()> {
        let mut row = 0;
        for run in slots.chunk_by(|a, b| a + 1 == *b) {
            for (stored, new) in [(self.k, k), (self.v, v)] {
                let new = new.narrow(0, row, run.len())?;
                stored.slice_set(&new.contiguous()?, 0, run[0] as usize)?;
            }
            row += run.len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
