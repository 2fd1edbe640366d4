//! Keys and values on the device, and attention over them (`cuda/attention_decode.cu`,
//! `cuda/attention_prefill.cu`, `cuda/attention_any.cu`).

mod names;

use self::names::{any_name, decode_name, decode_shared, prefill_name, rope_name};
use super::gpu::{Arg, Grid};
use super::memory::Buffer;
use super::rows::{bf16, same_shape};
use super::{Error, Float, Gpu, Result, Rows, Step, Vector};

/// Keys of one part of a context: what a block of the decode kernel reads.
pub(super) const CHUNK: usize = 256;
/// Rows of one tile of the prefill kernel.
pub(super) const TILE: usize = 128;

/// Counters of chunks that have ended: for each row and its heads that read one key head.
pub(super) const ENDED: usize = 1 << 20;

/// The most that parts of contexts take, in bytes, unless those of one row do.
const PARTIAL: usize = 256 << 20;

/// The widest head that the kernels of rotation and attention hold in their registers.
const MAX_DIM: usize = 256;

/// Element type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvKind {
    /// The type of activations.
    BF16,
    /// Three more digits.
    F16,
    /// Bytes, and a scale for each head of a slot.
    Q8,
    /// Bytes of E4M3.
    Fp8,
}

impl KvKind {
    /// Of a number, scales apart.
    fn bytes(self) -> usize {
        match self {
            Self::BF16 | Self::F16 => 2,
            Self::Q8 | Self::Fp8 => 1,
        }
    }
}

/// Slots whose scales of one head stand beside each other.
const SCALES: usize = 16;

/// Keys or values of a layer.
struct Stored {
    /// `[slot][kv_heads][dim]`, slot by slot.
    numbers: Buffer,
    /// `[slot / 16][kv_heads][16]`, where numbers have scales.
    scales: Option<Buffer>,
}

impl Stored {
    fn scales(&self) -> Arg {
        self.scales.as_ref().map_or(Arg::NULL, |scales| scales.at(0).into())
    }
}

/// Keys and values of all layers.
pub struct DeviceKv {
    layers: Vec<[Stored; 2]>,
    kind: KvKind,
    slots: usize,
    block_len: usize,
    kv_heads: usize,
    dim: usize,
    /// Tells two stores apart, whatever their addresses.
    pub id: u64,
}

/// Attention of one layer.
#[derive(Clone, Copy)]
pub struct AttentionShape<'a> {
    /// Which layer of the store.
    pub layer: usize,
    /// Query heads.
    pub heads: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Then bounds them: `softcap * tanh(score / softcap)`; 0 does not.
    pub softcap: f32,
    /// Keys each row sees, itself included; 0 is all.
    pub window: usize,
    /// A score of each query head that takes part in the softmax and brings no value. `[heads]`
    pub sinks: Option<&'a Vector>,
}

impl AttentionShape<'_> {
    fn sinks(&self) -> Arg {
        self.sinks.map_or(Arg::NULL, Vector::at)
    }
}

/// How queries and keys are turned before they meet.
pub struct Turn<'a> {
    /// `[positions][rot / 2]`, cosines and sines.
    pub table: &'a RopeTable,
    /// Norms of every query and key head, with their epsilon.
    pub norms: Option<(&'a Vector, &'a Vector, f32)>,
}

/// Cosines and sines of every position of a model.
pub struct RopeTable {
    cos: Rows,
    sin: Rows,
}

impl DeviceKv {
    /// Keys and values of a layer, and the scales of both.
    fn layer(&self, layer: usize) -> [Arg; 4] {
        let [k, v] = &self.layers[layer];
        [k.numbers.at(0).into(), v.numbers.at(0).into(), k.scales(), v.scales()]
    }

    /// Bytes of a block of one layer's keys (or values), and of its scales.
    fn block_bytes(&self) -> [usize; 2] {
        let heads = self.block_len * self.kv_heads;
        [heads * self.dim * self.kind.bytes(), heads * size_of::<f32>()]
    }
}

impl Gpu {
    /// Storage of `blocks` blocks for every layer, all zeros.
    pub fn kv(
        &self,
        layers: usize,
        [blocks, block_len, kv_heads, dim]: [usize; 4],
        kind: KvKind,
    ) -> Result<DeviceKv> {
        if dim > MAX_DIM {
            return Err(Error::Missing(format!("heads of {dim}: at most {MAX_DIM} on a GPU")));
        }
        if kind == KvKind::Q8 && !block_len.is_multiple_of(SCALES) {
            return Err(Error::Missing(format!("blocks of {block_len}: not of {SCALES}s")));
        }
        let slots = blocks * block_len;
        let zeros = |bytes: usize| -> Result<Buffer> {
            let buffer = Buffer::new(&self.context, bytes)?;
            self.zero(&buffer)?;
            Ok(buffer)
        };
        let one = || -> Result<Stored> {
            let scales = (kind == KvKind::Q8).then(|| zeros(slots * kv_heads * size_of::<f32>()));
            let numbers = zeros(slots * kv_heads * dim * kind.bytes())?;
            Ok(Stored { numbers, scales: scales.transpose()? })
        };
        let layers = (0..layers).map(|_| Ok([one()?, one()?])).collect::<Result<_>>()?;
        let id = self.next_id();
        Ok(DeviceKv { layers, kind, slots, block_len, kv_heads, dim, id })
    }

    /// Copies all tokens of a block, in every layer.
    pub fn copy_block(&self, kv: &DeviceKv, from: usize, to: usize) -> Result<()> {
        let [bytes, scales] = kv.block_bytes();
        assert!(from.max(to) * kv.block_len < kv.slots, "a block that does not exist");
        for stored in kv.layers.iter().flatten() {
            self.copy(&stored.numbers, from * bytes, to * bytes, bytes)?;
            if let Some(buffer) = &stored.scales {
                self.copy(buffer, from * scales, to * scales, scales)?;
            }
        }
        Ok(())
    }

    /// The table of a model's rotations. `[positions][half]` each.
    pub fn rope_table(&self, cos: &[f32], sin: &[f32], half: usize) -> Result<RopeTable> {
        assert_eq!(cos.len(), sin.len(), "as many cosines as sines");
        let table = |values: &[f32]| -> Result<Rows> {
            let buffer = self.upload(values)?;
            Ok(Rows {
                buffer,
                count: values.len() / half,
                width: half,
                float: Float::F32,
                wide: false,
            })
        };
        Ok(RopeTable { cos: table(cos)?, sin: table(sin)? })
    }

    /// Turns `q` in place; turns `k` and stores it and `v` where the batch says.
    pub fn rope_and_store(
        &self,
        q: Rows,
        [k, v]: [&Rows; 2],
        step: &Step,
        (kv, layer): (&mut DeviceKv, usize),
        turn: &Turn<'_>,
    ) -> Result<Rows> {
        same_shape(k, v)?;
        [&q, k, v].into_iter().try_for_each(bf16)?;
        let heads = q.width / kv.dim;
        let fits = q.width == heads * kv.dim && k.width == kv.kv_heads * kv.dim;
        if !fits || q.count != step.shape.rows || k.count != step.shape.rows {
            return Err(Error::Missing("queries and keys of the heads of the store".into()));
        }
        let [keys, values, k_scales, v_scales] = kv.layer(layer);
        let (q_norm, k_norm, eps) = match turn.norms {
            Some((q, k, eps)) if q.len() == kv.dim && k.len() == kv.dim => (q.at(), k.at(), eps),
            Some(_) => return Err(Error::Missing("norms as wide as a head".into())),
            None => (Arg::NULL, Arg::NULL, 0.0),
        };
        let args = [
            q.at(),
            k.at(),
            v.at(),
            keys,
            values,
            k_scales,
            v_scales,
            step.slots(),
            step.positions(),
            turn.table.cos.at(),
            turn.table.sin.at(),
            q_norm,
            k_norm,
            eps.into(),
            step.shape.rows.into(),
            heads.into(),
            kv.kv_heads.into(),
            kv.dim.into(),
            (2 * turn.table.cos.width).into(),
        ];
        let name = rope_name(kv.kind);
        let warps = step.shape.rows * (heads + kv.kv_heads);
        // SAFETY: rows and heads as checked; the slots are below the store's by the contract of
        // whoever made the step.
        unsafe { self.launch(name, Grid::new(warps.div_ceil(8), 256), &args)? };
        Ok(q)
    }

    /// Attends from every row of `q` to everything of its sequence that is stored.
    pub fn attention(
        &self,
        q: &Rows,
        step: &Step,
        kv: &DeviceKv,
        shape: &AttentionShape<'_>,
    ) -> Result<Rows> {
        bf16(q)?;
        if q.width != shape.heads * kv.dim || !shape.heads.is_multiple_of(kv.kv_heads) {
            return Err(Error::Missing("queries in groups of the store's heads".into()));
        }
        if shape.sinks.is_some_and(|sinks| sinks.len() != shape.heads) {
            return Err(Error::Missing("a sink for each query head".into()));
        }
        let out = self.rows(q.count, q.width, Float::BF16)?;
        self.decode(q, &out, step, kv, shape)?;
        self.prefill(q, &out, step, kv, shape)?;
        Ok(out)
    }

    /// Rows that are the only new one of their sequence.
    fn decode(
        &self,
        q: &Rows,
        out: &Rows,
        step: &Step,
        kv: &DeviceKv,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        let items = step.shape.items;
        if items == 0 {
            return Ok(());
        }
        if !matches!(kv.dim, 64 | 128 | 256) {
            let source = Source::of_layer(kv, shape.layer);
            return self.tiles(q, out, &source, &Tiles::of_items(step), shape, true);
        }
        // One long context makes as many parts of all: those of few items at a time, then.
        let of_item = shape.heads * step.shape.chunks * kv.dim * size_of::<f32>();
        let together = (PARTIAL / of_item.max(1)).max(1);
        for first in (0..items).step_by(together) {
            let count = together.min(items - first);
            self.decode_items(q, out, step, [first, count], kv, shape)?;
        }
        Ok(())
    }

    /// Some of these.
    fn decode_items(
        &self,
        q: &Rows,
        out: &Rows,
        step: &Step,
        [first, items]: [usize; 2],
        kv: &DeviceKv,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        let [row, table, context] = step.items(first);
        let chunks = step.shape.chunks;
        let group = shape.heads / kv.kv_heads;
        let together = group.next_power_of_two().min(8);
        let partial = self.rows(items * shape.heads * chunks, kv.dim, Float::F32)?;
        let stats = self.rows(items * shape.heads * chunks, 2, Float::F32)?;
        let [keys, values, k_scales, v_scales] = kv.layer(shape.layer);
        let per_item = kv.kv_heads * group.div_ceil(together);
        if items * per_item > ENDED {
            return Err(Error::Missing(format!("{items} rows in one attention")));
        }
        let args = [
            out.at(),
            partial.at(),
            stats.at(),
            self.ended.at(0).into(),
            q.at(),
            keys,
            values,
            k_scales,
            v_scales,
            row,
            table,
            context,
            step.tables(),
            shape.sinks(),
            shape.heads.into(),
            kv.kv_heads.into(),
            kv.block_len.into(),
            shape.scale.into(),
            shape.softcap.into(),
            shape.window.into(),
        ];
        let grid = (chunks, per_item, items);
        let name = decode_name(kv.kind, kv.dim, together);
        let shared = (decode_shared(kv.kind, kv.dim) + 1040 * together) as u32;
        // SAFETY: the contract of the kernel; the numbers of the step are those of a checked batch.
        unsafe { self.launch(name, Grid::of(grid, 2 * kv.dim as u32, shared), &args) }
    }

    /// Rows of sequences with several.
    fn prefill(
        &self,
        q: &Rows,
        out: &Rows,
        step: &Step,
        kv: &DeviceKv,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        if step.shape.tiles == 0 {
            return Ok(());
        }
        let source = Source::of_layer(kv, shape.layer);
        self.tiles(q, out, &source, &Tiles::of_tiles(step), shape, true)
    }

    fn tiles(
        &self,
        q: &Rows,
        out: &Rows,
        source: &Source,
        tiles: &Tiles,
        shape: &AttentionShape<'_>,
        causal: bool,
    ) -> Result<()> {
        let mut args = vec![out.at(), q.at()];
        args.extend(source.layer);
        args.extend(tiles.lists);
        args.extend([
            tiles.tables,
            shape.sinks(),
            shape.heads.into(),
            source.kv_heads.into(),
            source.block_len.into(),
            shape.scale.into(),
            shape.softcap.into(),
            shape.window.into(),
            i32::from(causal).into(),
        ]);
        let (name, grid) = match prefill_name(source.kind, source.dim) {
            Some((name, shared)) => {
                let parts = if source.dim > 128 { 2 } else { 1 };
                (name, Grid::of((shape.heads, tiles.count, parts), PREFILL_THREADS, shared))
            }
            None => {
                args.push(source.dim.into());
                let name = any_name(source.kind);
                (name, Grid::of((tiles.rows, shape.heads, tiles.count), 32, 0))
            }
        };
        // SAFETY: the contract of the kernels; the numbers are those of a checked batch.
        unsafe { self.launch(name, grid, &args) }
    }

    /// Attends from every row to all rows of its sequence, nothing kept. Sequence `s` has the rows
    /// `cu_q[s]..cu_q[s + 1]`.
    pub fn bidirectional(
        &self,
        [q, k, v]: [&Rows; 3],
        cu_q: &[u32],
        (heads, dim): (usize, usize),
        scale: f32,
    ) -> Result<Rows> {
        [q, k, v].into_iter().try_for_each(bf16)?;
        same_shape(q, k)?;
        same_shape(k, v)?;
        if dim > MAX_DIM || q.width != heads * dim || cu_q.last().copied() != Some(q.count as u32) {
            return Err(Error::Missing("rows of the heads and sequences given".into()));
        }
        let mut lists: [Vec<u32>; 5] = Default::default();
        for bounds in cu_q.windows(2) {
            let (start, end) = (bounds[0], bounds[1]);
            for row in (start..end).step_by(TILE) {
                let rows = (end - row).min(TILE as u32);
                let tile = [row, rows, row - start, start, end - start];
                lists.iter_mut().zip(tile).for_each(|(list, number)| list.push(number));
            }
        }
        let count = lists[0].len();
        let sent = lists.iter().map(|list| self.send(list)).collect::<Result<Vec<_>>>()?;
        let tiles = Tiles {
            lists: std::array::from_fn(|i| sent[i].at(0).into()),
            tables: Arg::NULL,
            count,
            rows: TILE,
        };
        let out = self.rows(q.count, q.width, Float::BF16)?;
        let (kind, block_len) = (KvKind::BF16, 1);
        let layer = [k.at(), v.at(), Arg::NULL, Arg::NULL];
        let source = Source { layer, kind, block_len, kv_heads: heads, dim };
        let shape = AttentionShape { layer: 0, heads, scale, softcap: 0.0, window: 0, sinks: None };
        self.tiles(q, &out, &source, &tiles, &shape, false)?;
        Ok(out)
    }
}

/// Where keys and values are.
struct Source {
    /// Keys, values, and the scales of both.
    layer: [Arg; 4],
    kind: KvKind,
    block_len: usize,
    kv_heads: usize,
    dim: usize,
}

impl Source {
    fn of_layer(kv: &DeviceKv, layer: usize) -> Self {
        Self {
            layer: kv.layer(layer),
            kind: kv.kind,
            block_len: kv.block_len,
            kv_heads: kv.kv_heads,
            dim: kv.dim,
        }
    }
}

/// Rows that attend.
struct Tiles {
    /// First row, rows, first position, table, keys.
    lists: [Arg; 5],
    tables: Arg,
    count: usize,
    /// The most rows that one has.
    rows: usize,
}

impl Tiles {
    fn of_tiles(step: &Step) -> Self {
        Self { lists: step.tiles(), tables: step.tables(), count: step.shape.tiles, rows: TILE }
    }

    /// Items as tiles of one row.
    fn of_items(step: &Step) -> Self {
        Self {
            lists: step.items_as_tiles(),
            tables: step.tables(),
            count: step.shape.items,
            rows: 1,
        }
    }
}

/// Threads of a block of the prefill kernel.
const PREFILL_THREADS: u32 = 128;
