//! A weight matrix in the kernel layout.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::Shared;
use super::layout::{COLUMNS, HEAD, Record, STEP, Storage};
use crate::Pool;
use crate::buffer::HugeBuf;
use crate::quant::{DType, Parts, decode};

/// W, `n` rows of `k` weights, packed once into tiles of 16 rows. Takes about the bytes of the file
/// (Q5_1 and Q8_0 exactly, Q8_K 1 % less, Q4_K 3 %, Q3_K and MXFP4 6 % more).
#[derive(Debug)]
pub struct Packed {
    dtype: DType,
    n: usize,
    k: usize,
    pub(super) storage: Storage,
    tile_bytes: usize,
    /// Its tiles, and those of the matrices that it was stacked with.
    data: Arc<HugeBuf<u8>>,
    /// The first of its own.
    first: usize,
}

/// Where the rows of a matrix come from while it is packed.
pub trait Rows: Sync {
    /// The bytes of row `row`, asked for once, by any thread.
    fn row(&self, row: usize) -> Cow<'_, [u8]>;

    /// Told that these rows are packed, so that their source can be let go of.
    fn packed(&self, rows: Range<usize>) {
        let _ = rows;
    }
}

/// Rows that lie one after the other.
struct InOrder<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
}

impl Rows for InOrder<'_> {
    fn row(&self, row: usize) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes[row * self.row_bytes..][..self.row_bytes])
    }
}

impl Packed {
    /// Packs `rows`, the `n` rows of a file in file order.
    ///
    /// # Panics
    /// If `k` is not a whole number of blocks or `rows` is not exactly `n` rows.
    pub fn pack(pool: &Pool, dtype: DType, n: usize, k: usize, rows: &[u8]) -> Packed {
        let row_bytes = row_bytes(dtype, k);
        assert_eq!(Some(rows.len()), n.checked_mul(row_bytes), "bytes of [{n}, {k}] {dtype}");
        Packed::pack_with(pool, dtype, n, k, &InOrder { bytes: rows, row_bytes })
    }

    /// Packs the rows that `source` returns for `0..n`: rows in another order, those of several
    /// matrices one after the other, or such as are made on the way.
    ///
    /// # Panics
    /// If `k` is not a whole number of blocks or a row has another length than `k` weights.
    pub fn pack_with(pool: &Pool, dtype: DType, n: usize, k: usize, source: &impl Rows) -> Packed {
        let stacked = Packed::stack(pool, dtype, n, k, &[source]);
        stacked.into_iter().next().expect("one for each source; this is a bug")
    }

    /// Several matrices of one shape in one piece of memory, so that small ones lie in huge pages
    /// too.
    ///
    /// # Panics
    /// As [`Packed::pack_with`].
    pub fn stack<R: Rows>(
        pool: &Pool,
        dtype: DType,
        n: usize,
        k: usize,
        sources: &[&R],
    ) -> Vec<Packed> {
        let row_bytes = row_bytes(dtype, k);
        let storage = Storage::of(dtype);
        let tile_bytes = storage.tile_bytes(k);
        let each = n.div_ceil(COLUMNS);
        let tiles = each.checked_mul(sources.len()).expect("too many matrices");
        let mut data = HugeBuf::zeroed(tiles.checked_mul(tile_bytes).expect("a matrix too large"));
        let shared = Shared(data.as_mut_ptr());
        // Whole megabytes per task: a huge page is faulted in by one thread.
        let per_task = ((1 << 20) / tile_bytes.max(1)).max(1);
        pool.run(tiles.div_ceil(per_task), &|task| {
            let mine = task * per_task..((task + 1) * per_task).min(tiles);
            for tile in mine.clone() {
                // SAFETY: a tile lies in `data`, which outlives the run; one task writes it.
                let out = unsafe {
                    std::slice::from_raw_parts_mut(shared.at(tile * tile_bytes), tile_bytes)
                };
                let (source, tile) = (sources[tile / each], tile % each);
                let columns = COLUMNS.min(n - tile * COLUMNS);
                let rows = (0..columns).map(|column| source.row(tile * COLUMNS + column));
                let rows: Vec<_> = rows.collect();
                for bytes in &rows {
                    assert_eq!(bytes.len(), row_bytes, "bytes of a row of {k} {dtype}");
                }
                pack_tile(dtype, &storage, &rows, out);
            }
            for (i, source) in sources.iter().enumerate() {
                let own = mine.start.max(i * each)..mine.end.min((i + 1) * each);
                if !own.is_empty() {
                    let [start, end] = [own.start, own.end].map(|tile| (tile - i * each) * COLUMNS);
                    source.packed(start..n.min(end));
                }
            }
        });
        let data = Arc::new(data);
        let one = |i| Packed {
            dtype,
            n,
            k,
            storage,
            tile_bytes,
            data: Arc::clone(&data),
            first: i * each,
        };
        (0..sources.len()).map(one).collect()
    }

    /// What a matrix of this type and shape will take, in bytes.
    pub fn bytes_of(dtype: DType, n: usize, k: usize) -> usize {
        n.div_ceil(COLUMNS) * Storage::of(dtype).tile_bytes(k)
    }

    /// Rows of W: the width of the output.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Weights per row: the width of the input.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The format of the file it was packed from.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        Self::bytes_of(self.dtype, self.n, self.k)
    }

    /// Row `r` of W as floats, the same bits as [`dequantize`] gives: an embedding gather, so that
    /// tied weights need one copy.
    ///
    /// # Panics
    /// If there is no such row or `out` has not `k` elements.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        assert!(r < self.n, "row {r} of {}", self.n);
        assert_eq!(out.len(), self.k, "elements of a row");
        let (tile, column) = (self.tile(r / COLUMNS), r % COLUMNS);
        let halves = || {
            let at = |i| self.storage.half_at(i, column);
            (0..self.k).map(move |i| [tile[at(i)], tile[at(i) + 1]])
        };
        match &self.storage {
            Storage::F32 => {
                for (y, row) in out.iter_mut().zip(tile.chunks_exact(64)) {
                    let at = 4 * column;
                    *y = f32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]);
                }
            }
            Storage::F16 => {
                for (y, bytes) in out.iter_mut().zip(halves()) {
                    *y = f16::from_le_bytes(bytes).to_f32();
                }
            }
            Storage::BF16 => {
                for (y, bytes) in out.iter_mut().zip(halves()) {
                    *y = bf16::from_le_bytes(bytes).to_f32();
                }
            }
            Storage::Blocks(record) => {
                let mut parts = Parts::default();
                for (step, y) in out.chunks_exact_mut(STEP).enumerate() {
                    let (at, step) = record.place(step);
                    record.block(&tile[at..at + record.bytes], step, column, &mut parts);
                    parts.values(self.dtype, y);
                }
            }
            Storage::Supers(record) => {
                let mut parts = Parts::default();
                for (y, bytes) in out.chunks_exact_mut(256).zip(tile.chunks_exact(record.bytes)) {
                    record.super_block(bytes, column, &mut parts);
                    parts.values(self.dtype, y);
                }
            }
        }
    }

    /// The bytes of one tile.
    pub(super) fn tile(&self, tile: usize) -> &[u8] {
        &self.data[(self.first + tile) * self.tile_bytes..][..self.tile_bytes]
    }
}

fn row_bytes(dtype: DType, k: usize) -> usize {
    let bytes = dtype.row_bytes(k);
    bytes.unwrap_or_else(|| panic!("rows of {k} weights in blocks of {dtype}"))
}

/// Packs up to 16 rows; columns without a row keep their zeros.
fn pack_tile(dtype: DType, storage: &Storage, rows: &[Cow<'_, [u8]>], out: &mut [u8]) {
    let elements = |width: usize, rows: &[Cow<'_, [u8]>], out: &mut [u8]| {
        for (column, row) in rows.iter().enumerate() {
            let targets = out.chunks_exact_mut(COLUMNS * width);
            for (target, element) in targets.zip(row.chunks(width)) {
                target[column * width..][..element.len()].copy_from_slice(element);
            }
        }
    };
    match storage {
        Storage::F16 => elements(2, rows, out),
        // Two of bf16 are one element.
        Storage::F32 | Storage::BF16 => elements(4, rows, out),
        Storage::Blocks(record) => pack_blocks(dtype, record, rows, out),
        Storage::Supers(record) => pack_supers(dtype, record, rows, out),
    }
}

fn pack_blocks(dtype: DType, record: &Record, rows: &[Cow<'_, [u8]>], out: &mut [u8]) {
    // A block of the file is one step, or eight.
    let (width, len) = (dtype.block_bytes(), dtype.block_len() / STEP);
    let mut parts = Parts::default();
    // Columns that have a row are written anew in every block.
    let mut groups = [[[0; 64]; 8]; 8];
    for block in 0..rows[0].len() / width {
        for (column, row) in rows.iter().enumerate() {
            decode(dtype, &row[block * width..][..width], &mut parts);
            for (i, codes) in parts.codes.chunks_exact(STEP).take(len).enumerate() {
                scatter(codes, column, &mut groups[i]);
                let (at, step) = record.place(block * len + i);
                record.put_d_m(&mut out[at..], step, column, parts.d, parts.m);
            }
        }
        for (i, groups) in groups[..len].iter().enumerate() {
            let (at, step) = record.place(block * len + i);
            record.put_codes(groups, &mut out[at + record.step_at(step)..][..record.step_bytes]);
        }
    }
}

fn pack_supers(dtype: DType, record: &Record, rows: &[Cow<'_, [u8]>], out: &mut [u8]) {
    let width = dtype.block_bytes();
    let mut parts = Parts::default();
    let mut groups = [[[0; 64]; 8]; 8];
    for (block, out) in out.chunks_exact_mut(record.bytes).enumerate() {
        for (column, row) in rows.iter().enumerate() {
            decode(dtype, &row[block * width..][..width], &mut parts);
            for (codes, groups) in parts.codes.chunks_exact(STEP).zip(&mut groups) {
                scatter(codes, column, groups);
            }
            for sub in 0..256 / record.codes.sub {
                record.put_scale(out, sub, column, parts.scales[sub], parts.mins[sub]);
            }
            record.put_d_m(out, 0, column, parts.d, parts.m);
        }
        let steps = out[record.step_at(0)..].chunks_exact_mut(record.step_bytes);
        for (groups, out) in groups.iter().zip(steps) {
            record.put_codes(groups, out);
        }
    }
}

/// Puts 32 codes of a column into their places in the groups of a step.
fn scatter(codes: &[u8], column: usize, groups: &mut [[u8; 64]; 8]) {
    for (codes, group) in codes.chunks_exact(4).zip(groups) {
        group[4 * column..4 * column + 4].copy_from_slice(codes);
    }
}

impl Record {
    /// Where in a tile the record of a block of 32 starts, and which of its steps the block is.
    fn place(&self, block: usize) -> (usize, usize) {
        (block / self.steps * self.bytes, block % self.steps)
    }

    /// Sub-scale and sub-minimum of a column.
    pub(super) fn scale_min(&self, record: &[u8], sub: usize, column: usize) -> (i8, u8) {
        let at = HEAD + 32 * (sub / 2) + 2 * column + sub % 2;
        match (self.codes.sub, self.codes.has_min) {
            (_, false) => (record[at] as i8, 0),
            (32, true) => (record[at] as i8, record[at + 128]),
            (_, true) => ((record[at] & 15) as i8, record[at] >> 4),
        }
    }

    fn put_scale(&self, record: &mut [u8], sub: usize, column: usize, scale: i8, min: u8) {
        let at = HEAD + 32 * (sub / 2) + 2 * column + sub % 2;
        match (self.codes.sub, self.codes.has_min) {
            (_, false) => record[at] = scale as u8,
            (32, true) => (record[at], record[at + 128]) = (scale as u8, min),
            (_, true) => record[at] = scale as u8 | min << 4,
        }
    }

    /// Block `step` of a record of blocks of 32.
    fn block(&self, record: &[u8], step: usize, column: usize, parts: &mut Parts) {
        let codes = self.step(record, step);
        for (i, code) in parts.codes[..STEP].iter_mut().enumerate() {
            *code = self.code(codes, column, i);
        }
        (parts.d, parts.m) = self.d_m(record, step, column);
    }

    /// The block of 256 of one column.
    fn super_block(&self, record: &[u8], column: usize, parts: &mut Parts) {
        for (step, codes) in parts.codes.chunks_exact_mut(STEP).enumerate() {
            let step = self.step(record, step);
            for (i, code) in codes.iter_mut().enumerate() {
                *code = self.code(step, column, i);
            }
        }
        for sub in 0..256 / self.codes.sub {
            (parts.scales[sub], parts.mins[sub]) = self.scale_min(record, sub, column);
        }
        (parts.d, parts.m) = self.d_m(record, 0, column);
    }
}
