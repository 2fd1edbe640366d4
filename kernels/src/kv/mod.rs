//! Storage of K and V for one layer, in blocks of tokens.
//!
//! A block is `block_len / 16` consecutive groups of sixteen tokens. A group holds, head by head,
//! one unit that attention reads front to back:
//!
//! ```text
//! unit = K [head_dim][16 tokens]   transposed: sixteen scores grow in sixteen lanes
//!        V [16 tokens][head_dim]   rows padded with zeroes to a multiple of sixteen numbers
//! ```
//! A slot, `block * block_len + offset`, names the place of one token. Finite numbers beyond the
//! range of f16, bf16 or fp8 are stored as its largest, so one huge activation does not become
//! infinite. What differs where numbers are integers with scales says `ints.rs`.
//!
//! Deliberately absent: which block belongs to whom, reference counts, and layers.

pub mod fp8;
pub(crate) mod ints;

use crate::buffer::{HugeBuf, lead};
use crate::parts::Parts;
use crate::simd::{Kernel, Simd, run};
use crate::{Isa, LANES, Pool};
use bytemuck::Pod;
use half::{bf16, f16};
use std::ops::Range;

/// How a number of K and V is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Four bytes, as computed: reference tests.
    F32,
    /// Two bytes, IEEE half precision: 11 bits.
    F16,
    /// Two bytes, the upper half of an f32: its range, 8 bits.
    BF16,
    /// Two bytes, an integer, and one f32 scale for each head of a token: as exact as f16 where the
    /// numbers of a head are of one size, and multiplied faster than floats.
    #[default]
    Q16_0,
    /// One byte, and one f32 scale for each head of a token: half the memory of f16.
    Q8_0,
    /// One byte, E4M3: half the memory of f16, 4 bits.
    Fp8,
}

impl KvType {
    /// Every one.
    pub const ALL: [KvType; 6] =
        [KvType::F32, KvType::F16, KvType::BF16, KvType::Q16_0, KvType::Q8_0, KvType::Fp8];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::BF16 => "bf16",
            KvType::Q16_0 => "q16_0",
            KvType::Q8_0 => "q8_0",
            KvType::Fp8 => "fp8",
        }
    }

    /// Bytes of one number, scales apart.
    fn size(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 | KvType::BF16 | KvType::Q16_0 => 2,
            KvType::Q8_0 | KvType::Fp8 => 1,
        }
    }
}

/// Sizes of the storage of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Blocks.
    pub n_blocks: usize,
    /// Tokens per block, a multiple of 16.
    pub block_len: usize,
    /// Heads of K and of V.
    pub n_kv_heads: usize,
    /// Numbers per head.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes that a slab of this shape occupies.
    pub fn bytes(&self, kv_type: KvType) -> usize {
        let units = self.slots() / LANES * self.n_kv_heads;
        units * self.unit_len(kv_type) * kv_type.size()
    }

    /// Bytes of memory that slabs of this shape take, one for each of `of` layers: with what lies
    /// before each in its first huge page.
    pub fn resident_bytes(&self, kv_type: KvType, of: usize) -> usize {
        let bytes = self.bytes(kv_type);
        (0..of).map(|index| bytes + lead(bytes, index, of)).sum()
    }

    /// `head_dim` rounded up to whole vectors.
    pub(crate) fn padded_head_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of a unit: K and V of one head for sixteen tokens.
    pub(crate) fn unit_len(&self, kv_type: KvType) -> usize {
        match kv_type {
            KvType::Q16_0 => ints::unit_len::<i16>(self),
            KvType::Q8_0 => ints::unit_len::<i8>(self),
            _ => LANES * (self.head_dim + self.padded_head_dim()),
        }
    }

    /// Which unit is that of a head, for the group that holds `slot`.
    pub(crate) fn unit(&self, slot: usize, head: usize) -> usize {
        slot / LANES * self.n_kv_heads + head
    }

    fn slots(&self) -> usize {
        self.n_blocks * self.block_len
    }
}

/// K and V of one layer.
pub struct KvSlab {
    shape: KvShape,
    kv_type: KvType,
    memory: HugeBuf<u8>,
    /// Bytes for which [`KvSlab::provide`] was asked.
    provided: usize,
}

impl KvSlab {
    /// Zeroed storage. The system provides pages as they are first written.
    ///
    /// # Panics
    /// When `block_len` is not a multiple of 16 or either is 0.
    pub fn new(shape: KvShape, kv_type: KvType) -> KvSlab {
        KvSlab::layer(shape, kv_type, 0, 1)
    }

    /// The same for one of several layers: they do not need new pages at the same token.
    pub fn layer(shape: KvShape, kv_type: KvType, index: usize, of: usize) -> KvSlab {
        assert!(
            shape.block_len > 0 && shape.block_len.is_multiple_of(LANES),
            "block_len: multiple of 16"
        );
        assert!(shape.head_dim > 0, "head_dim: at least 1");
        let memory = HugeBuf::staggered(shape.bytes(kv_type), index, of);
        KvSlab { shape, kv_type, memory, provided: 0 }
    }

    /// Sizes.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// How numbers are stored.
    pub fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.shape.bytes(self.kv_type)
    }

    /// Stores rows of K and V, both `[rows, n_kv_heads, head_dim]`, row `r` at `slots[r]`. Of rows
    /// with one slot the last one stays.
    ///
    /// # Panics
    /// When a slice has another length or a slot is outside the slab.
    pub fn write(&mut self, pool: &Pool, k: &[f32], v: &[f32], slots: &[u32]) {
        self.write_with(Isa::best(), pool, k, v, slots);
    }

    /// [`KvSlab::write`] with a chosen instruction set.
    pub fn write_with(&mut self, isa: Isa, pool: &Pool, k: &[f32], v: &[f32], slots: &[u32]) {
        let numbers = slots.len() * self.shape.n_kv_heads * self.shape.head_dim;
        assert_eq!(k.len(), numbers, "k is [rows, n_kv_heads, head_dim]");
        assert_eq!(v.len(), numbers, "v is [rows, n_kv_heads, head_dim]");
        let inside = |slot: &u32| (*slot as usize) < self.shape.slots();
        assert!(slots.iter().all(inside), "a slot outside the slab");
        match self.kv_type {
            KvType::F32 => self.write_as::<f32>(isa, pool, k, v, slots),
            KvType::F16 => self.write_as::<f16>(isa, pool, k, v, slots),
            KvType::BF16 => self.write_as::<bf16>(isa, pool, k, v, slots),
            KvType::Q16_0 => self.write_as::<i16>(isa, pool, k, v, slots),
            KvType::Q8_0 => self.write_as::<i8>(isa, pool, k, v, slots),
            KvType::Fp8 => self.write_as::<u8>(isa, pool, k, v, slots),
        }
    }

    /// Copies all tokens of a block.
    ///
    /// # Panics
    /// When a block is outside the slab.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let (from, to) = (from as usize, to as usize);
        assert!(from.max(to) < self.shape.n_blocks, "a block outside the slab");
        let len = self.bytes() / self.shape.n_blocks;
        self.memory.copy_within(from * len..(from + 1) * len, to * len);
    }

    /// Whether [`KvSlab::provide`] was not asked yet for all memory of the first `blocks` blocks.
    pub fn lacks(&self, blocks: usize) -> bool {
        self.provided < self.until(blocks)
    }

    /// Has the system provide memory that the first `blocks` blocks lack, of one huge page:
    /// zeroing one may take as long as a layer. What is stored stays.
    pub fn provide(&mut self, blocks: usize) {
        let until = self.until(blocks);
        if self.provided < until {
            self.provided = self.memory.provide(self.provided, until);
        }
    }

    /// Bytes of so many blocks, or of all that there are.
    fn until(&self, blocks: usize) -> usize {
        let count = self.shape.n_blocks;
        self.bytes() / count.max(1) * blocks.min(count)
    }

    /// All tokens of a block, as they are stored.
    ///
    /// # Panics
    /// When the block is outside the slab.
    pub fn block(&self, block: u32) -> &[u8] {
        &self.memory[self.block_range(block)]
    }

    /// The same, to be filled with what a slab of the same shape and type had there.
    ///
    /// # Panics
    /// When the block is outside the slab.
    pub fn block_mut(&mut self, block: u32) -> &mut [u8] {
        let range = self.block_range(block);
        &mut self.memory[range]
    }

    fn block_range(&self, block: u32) -> Range<usize> {
        let block = block as usize;
        assert!(block < self.shape.n_blocks, "a block outside the slab");
        let len = self.bytes() / self.shape.n_blocks;
        block * len..(block + 1) * len
    }

    /// Reads K and V of one token, both `[n_kv_heads, head_dim]`.
    ///
    /// # Panics
    /// When a slice has another length or the slot is outside the slab.
    pub fn read(&self, slot: u32, out_k: &mut [f32], out_v: &mut [f32]) {
        let numbers = self.shape.n_kv_heads * self.shape.head_dim;
        assert_eq!(out_k.len(), numbers, "out_k is [n_kv_heads, head_dim]");
        assert_eq!(out_v.len(), numbers, "out_v is [n_kv_heads, head_dim]");
        assert!((slot as usize) < self.shape.slots(), "a slot outside the slab");
        let heads = out_k.chunks_exact_mut(self.shape.head_dim);
        let heads = heads.zip(out_v.chunks_exact_mut(self.shape.head_dim));
        for (head, (k, v)) in heads.enumerate() {
            let (unit, lane) = (self.shape.unit(slot as usize, head), slot as usize % LANES);
            match self.kv_type {
                KvType::F32 => read_floats(self.unit::<f32>(unit), lane, k, v),
                KvType::F16 => read_floats(self.unit::<f16>(unit), lane, k, v),
                KvType::BF16 => read_floats(self.unit::<bf16>(unit), lane, k, v),
                KvType::Q16_0 => ints::read::<i16>(self.unit(unit), lane, k, v),
                KvType::Q8_0 => ints::read::<i8>(self.unit(unit), lane, k, v),
                KvType::Fp8 => read_floats(self.unit::<u8>(unit), lane, k, v),
            }
        }
    }

    /// All elements, as they are stored.
    ///
    /// # Panics
    /// When `E` is not the type of this slab.
    pub(crate) fn elements<E: Element>(&self) -> &[E] {
        assert_eq!(E::TYPE, self.kv_type, "read as another type than stored");
        bytemuck::cast_slice(&self.memory)
    }

    fn unit<E: Element>(&self, unit: usize) -> &[E] {
        let len = self.shape.unit_len(self.kv_type);
        &self.elements()[unit * len..][..len]
    }

    /// A task is a head: heads share no unit.
    fn write_as<E>(&mut self, isa: Isa, pool: &Pool, k: &[f32], v: &[f32], slots: &[u32])
    where
        E: Element,
        for<'a> WriteHead<'a, E>: Kernel<Out = ()>,
    {
        /// Numbers below which a second thread is not worth waking.
        const SMALL: usize = 16 * 1024;
        let shape = self.shape;
        let numbers: Parts<E> = Parts::new(bytemuck::cast_slice_mut(&mut self.memory));
        let heads = |heads: Range<usize>| {
            for head in heads {
                run(isa, WriteHead { shape, numbers: &numbers, head, k, v, slots });
            }
        };
        match k.len() < SMALL {
            true => heads(0..shape.n_kv_heads),
            false => pool.run(shape.n_kv_heads, &|head| heads(head..head + 1)),
        }
    }
}

/// Reads K and V of one head and token of a unit.
fn read_floats<E: Number>(unit: &[E], lane: usize, k: &mut [f32], v: &mut [f32]) {
    let padded = v.len().next_multiple_of(LANES);
    let (unit_k, unit_v) = unit.split_at(LANES * k.len());
    for (x, place) in k.iter_mut().zip(unit_k.chunks_exact(LANES)) {
        *x = place[lane].widen();
    }
    for (x, place) in v.iter_mut().zip(&unit_v[lane * padded..]) {
        *x = place.widen();
    }
}

/// One head of some rows.
struct WriteHead<'a, E> {
    shape: KvShape,
    numbers: &'a Parts<'a, E>,
    head: usize,
    /// `[rows, n_kv_heads, head_dim]`
    k: &'a [f32],
    v: &'a [f32],
    /// Inside the slab.
    slots: &'a [u32],
}

impl<E: Number> Kernel for WriteHead<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WriteHead { shape, numbers, head, k, v, slots } = self;
        let (dim, padded) = (shape.head_dim, shape.padded_head_dim());
        for (row, &slot) in slots.iter().enumerate() {
            let len = shape.unit_len(E::TYPE);
            let (start, lane) = (shape.unit(slot as usize, head) * len, slot as usize % LANES);
            // SAFETY: a unit belongs to one head, and a head is written by one task, one unit at
            // a time.
            let unit = unsafe { numbers.take(start..start + len) };
            let (unit_k, unit_v) = unit.split_at_mut(LANES * dim);
            let at = (row * shape.n_kv_heads + head) * dim;
            let mut narrow = [E::zeroed(); LANES];
            let places = unit_k.chunks_mut(LANES * LANES);
            for (x, places) in k[at..at + dim].chunks(LANES).zip(places) {
                E::narrow(simd, x, &mut narrow);
                for (place, x) in places.as_chunks_mut::<LANES>().0.iter_mut().zip(narrow) {
                    place[lane] = x;
                }
            }
            let places = unit_v[lane * padded..][..padded].as_chunks_mut::<LANES>().0;
            for (x, place) in v[at..at + dim].chunks(LANES).zip(places) {
                E::narrow(simd, x, place);
            }
        }
    }
}

/// What a slab is made of.
pub(crate) trait Element: Pod + Send + Sync {
    /// The name of slabs made of it.
    const TYPE: KvType;
}

macro_rules! elements {
    ($($element:ty: $type:ident),*) => {
        $(impl Element for $element { const TYPE: KvType = KvType::$type; })*
    };
}

elements!(f32: F32, f16: F16, bf16: BF16, i16: Q16_0, i8: Q8_0, u8: Fp8);

/// A float that K and V are stored in.
pub(crate) trait Number: Element {
    /// Stores up to sixteen numbers, and zeroes in the places beyond them.
    fn narrow<S: Simd>(simd: S, x: &[f32], out: &mut [Self; LANES]);
    fn widen(self) -> f32;
    fn load<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V;
}

/// Up to sixteen numbers as a vector, finite ones between `-largest` and `largest`.
#[inline(always)]
fn load_finite<S: Simd>(simd: S, x: &[f32], largest: f32) -> S::V {
    let x = match x.try_into() {
        Ok(whole) => simd.load(whole),
        Err(_) => simd.load_part(x, 0.0),
    };
    let (low, high) = (simd.splat(-largest), simd.splat(largest));
    let within = simd.min(high, simd.max(low, x));
    // Infinities stay what they are.
    let (lowest, highest) = (simd.splat(f32::MIN), simd.splat(f32::MAX));
    simd.if_less(x, lowest, x, simd.if_less(highest, x, x, within))
}

impl Number for f32 {
    #[inline(always)]
    fn narrow<S: Simd>(_: S, x: &[f32], out: &mut [f32; LANES]) {
        out[..x.len()].copy_from_slice(x);
        out[x.len()..].fill(0.0);
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[f32; LANES]) -> S::V {
        simd.load(x)
    }
}

impl Number for f16 {
    #[inline(always)]
    fn narrow<S: Simd>(simd: S, x: &[f32], out: &mut [f16; LANES]) {
        simd.store_f16(load_finite(simd, x, f16::MAX.to_f32_const()), out);
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[f16; LANES]) -> S::V {
        simd.load_f16(x)
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn narrow<S: Simd>(simd: S, x: &[f32], out: &mut [bf16; LANES]) {
        let mut finite = [0.0; LANES];
        simd.store(load_finite(simd, x, bf16::MAX.to_f32_const()), &mut finite);
        *out = finite.map(bf16::from_f32);
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[bf16; LANES]) -> S::V {
        simd.load_bf16(x)
    }
}

impl Number for u8 {
    #[inline(always)]
    fn narrow<S: Simd>(_: S, x: &[f32], out: &mut [u8; LANES]) {
        out.fill(0);
        out.iter_mut().zip(x).for_each(|(out, x)| *out = fp8::from_f32(*x));
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        fp8::to_f32(self)
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[u8; LANES]) -> S::V {
        let mut wide = [0.0; LANES];
        for (wide, byte) in wide.iter_mut().zip(x) {
            *wide = fp8::to_f32(*byte);
        }
        simd.load(&wide)
    }
}

#[cfg(test)]
mod tests;
