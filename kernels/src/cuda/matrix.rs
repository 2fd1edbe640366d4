//! Weights on the device: how they come there, and their rows by number (`cuda/dequantize.cu`).

use std::borrow::Cow;
use std::ops::Range;
use std::sync::PoisonError;

use cudarc::driver::{CudaEvent, PinnedHostSlice, result};

use super::gpu::{Arg, Grid};
use super::memory::Buffer;
use super::{Error, Float, Gpu, Result, Rows, Step};
use crate::quant::DType;

/// Weights `[n, k]` of products, as a file has them: in bf16, or in blocks.
pub struct Matrix {
    pub(super) buffer: Buffer,
    pub(super) dtype: DType,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Weights that scale or shift, in f32. `[n]`
pub struct Vector {
    pub(super) buffer: Buffer,
    pub(super) len: usize,
}

impl Vector {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn at(&self) -> Arg {
        self.buffer.at(0).into()
    }
}

/// What the kernels of one format are called.
pub(super) struct Names {
    pub linear: [&'static str; 4],
    pub wide: [&'static str; 2],
    pub tall: [&'static str; 2],
    /// Bytes of a row of W in shared memory, in a wide and in a tall product.
    pub slots: [usize; 2],
    /// Two scales are those of 64 weights.
    pub one_pair: bool,
    pub dequantize: &'static str,
    pub gather: &'static str,
    pub experts: &'static str,
}

macro_rules! formats {
    ($($dtype:ident $text:literal $wide:literal $tall:literal),* $(,)?) => {
        pub(super) fn names(dtype: DType) -> Option<Names> {
            match dtype {
                $(DType::$dtype => Some(Names {
                    linear: [
                        concat!("linear_", $text, "_m1"),
                        concat!("linear_", $text, "_m2"),
                        concat!("linear_", $text, "_m4"),
                        concat!("linear_", $text, "_m8"),
                    ],
                    wide: [
                        concat!("linear_", $text, "_w16"),
                        concat!("linear_", $text, "_w32"),
                    ],
                    tall: [
                        concat!("linear_", $text, "_t64"),
                        concat!("linear_", $text, "_t128"),
                    ],
                    slots: [$wide, $tall],
                    one_pair: matches!(DType::$dtype, DType::Q4K | DType::Q5K),
                    dequantize: concat!("dequantize_", $text),
                    gather: concat!("gather_", $text),
                    experts: concat!("experts_", $text),
                }),)*
                _ => None,
            }
        }
    };
}
formats! {
    Q4_0 "q4_0" 160 176,
    Q4_1 "q4_1" 224 176,
    Q5_0 "q5_0" 224 208,
    Q5_1 "q5_1" 224 208,
    Q8_0 "q8_0" 288 304,
    Q2K "q2_k" 96 112,
    Q3K "q3_k" 160 144,
    Q4K "q4_k" 160 144,
    Q5K "q5_k" 224 176,
    Q6K "q6_k" 224 240,
    IQ4NL "iq4_nl" 160 176,
    IQ4XS "iq4_xs" 160 144,
    MXFP4 "mxfp4" 160 176,
}

/// Bytes of a matrix on their way to the device.
const PIECE: usize = 8 << 20;
impl Matrix {
    /// In which format the device keeps weights of a file, if it keeps them as they are.
    pub fn stored_as(dtype: DType) -> Option<DType> {
        (dtype == DType::BF16 || names(dtype).is_some()).then_some(dtype)
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.k).expect("checked when it was made; this is a bug")
    }

    /// From one of several that were taken together to the next, in bytes.
    pub(super) fn stride(&self) -> usize {
        stride(self.n, self.row_bytes())
    }
}

/// Matrices begin at 16 bytes.
fn stride(n: usize, row_bytes: usize) -> usize {
    (n * row_bytes).next_multiple_of(16)
}

/// Page-locked memory on the way to the device: a half is filled while the other is copied.
pub(super) struct Staging {
    /// With the end of its last copy.
    halves: [(PinnedHostSlice<u8>, CudaEvent); 2],
    turn: usize,
    /// Bytes of this turn.
    filled: usize,
}

impl Staging {
    fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let half = || -> Result<(PinnedHostSlice<u8>, CudaEvent)> {
            // SAFETY: every byte that is copied is written first.
            let memory = unsafe { gpu.context.alloc_pinned(bytes)? };
            Ok((memory, gpu.context.new_event(None)?))
        };
        Ok(Self { halves: [half()?, half()?], turn: 0, filled: 0 })
    }

    fn len(&self) -> usize {
        self.halves[0].0.len()
    }

    /// So many bytes that nothing reads any more.
    fn next(&mut self, bytes: usize) -> Result<&mut [u8]> {
        self.turn = 1 - self.turn;
        self.filled = bytes;
        let (memory, copied) = &mut self.halves[self.turn];
        copied.synchronize()?;
        Ok(&mut memory.as_mut_slice()?[..bytes])
    }

    /// Asks for them to be copied so far into `buffer`.
    fn send(&mut self, gpu: &Gpu, buffer: &Buffer, place: usize) -> Result<()> {
        assert!(place + self.filled <= buffer.bytes(), "a copy into the buffer");
        let (memory, copied) = &self.halves[self.turn];
        let bytes = &memory.as_slice()?[..self.filled];
        // SAFETY: the buffer has room, as asserted; `next` waits before the bytes change.
        unsafe { result::memcpy_htod_async(buffer.at(place), bytes, gpu.stream.cu_stream())? };
        Ok(copied.record(&gpu.stream)?)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for (memory, copied) in &self.halves {
            memory.context().record_err(copied.synchronize());
        }
    }
}

impl Gpu {
    /// Takes a matrix, row by row. `taken` is told which rows are no longer needed.
    pub fn matrix<'a>(
        &self,
        dtype: DType,
        shape: [usize; 2],
        row: impl Fn(usize) -> Cow<'a, [u8]>,
        taken: impl Fn(Range<usize>),
    ) -> Result<Matrix> {
        let one = self.matrices(dtype, shape, 1, |_, i| row(i), |_, rows| taken(rows))?;
        Ok(one.into_iter().next().expect("one was asked for; this is a bug"))
    }

    /// Takes several of one shape, which lie one after the other in the memory of the first: it
    /// outlives them. `row` and `taken` are told which of them first.
    pub fn matrices<'a>(
        &self,
        dtype: DType,
        [n, k]: [usize; 2],
        count: usize,
        row: impl Fn(usize, usize) -> Cow<'a, [u8]>,
        taken: impl Fn(usize, Range<usize>),
    ) -> Result<Vec<Matrix>> {
        let row_bytes = dtype.row_bytes(k).filter(|_| Matrix::stored_as(dtype).is_some());
        let Some(row_bytes) = row_bytes else {
            return Err(Error::Missing(format!("no products with {dtype} weights of width {k}")));
        };
        let stride = stride(n, row_bytes);
        // Kernels read whole 16 bytes at the end.
        let buffer = Buffer::new(&self.context, count * stride + 16)?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let staging = match &mut *staging {
            Some(staging) if staging.len() >= row_bytes => staging,
            other => other.insert(Staging::new(self, PIECE.max(row_bytes))?),
        };
        let rows = staging.len() / row_bytes.max(1);
        for (of, first) in
            (0..count).flat_map(|of| (0..n).step_by(rows.max(1)).map(move |first| (of, first)))
        {
            let these = first..n.min(first + rows);
            let piece = staging.next(these.len() * row_bytes)?;
            for (i, place) in these.clone().zip(piece.chunks_exact_mut(row_bytes.max(1))) {
                place.copy_from_slice(&row(of, i));
            }
            taken(of, these);
            staging.send(self, &buffer, of * stride + first * row_bytes)?;
        }
        let parts: Vec<Buffer> = (1..count).map(|of| buffer.part(of * stride)).collect();
        let buffers = std::iter::once(buffer).chain(parts).take(count);
        Ok(buffers.map(|buffer| Matrix { buffer, dtype, n, k }).collect())
    }

    /// Takes a vector.
    pub fn vector(&self, values: &[f32]) -> Result<Vector> {
        Ok(Vector { buffer: self.upload(values)?, len: values.len() })
    }

    /// Takes several of one length, which lie one after the other in the memory of the first: it
    /// outlives them.
    pub fn vectors(&self, all: &[Vec<f32>]) -> Result<Vec<Vector>> {
        let len = all.first().map_or(0, Vec::len);
        assert!(all.iter().all(|values| values.len() == len), "vectors of one length");
        let buffer = self.upload(&all.concat())?;
        let parts: Vec<Buffer> = (1..all.len()).map(|i| buffer.part(4 * len * i)).collect();
        let buffers = std::iter::once(buffer).chain(parts).take(all.len());
        Ok(buffers.map(|buffer| Vector { buffer, len }).collect())
    }

    /// Rows of `table`, one for each id, in f32.
    pub fn gather(&self, table: &Matrix, ids: &[u32]) -> Result<Rows> {
        assert!(ids.iter().all(|&id| (id as usize) < table.n), "an id that the table has not");
        let list = self.send(ids)?;
        self.gather_at(table, list.at(0).into(), ids.len())
    }

    /// The same for the tokens of a batch.
    pub fn gather_tokens(&self, table: &Matrix, step: &Step) -> Result<Rows> {
        self.gather_at(table, step.tokens(), step.shape.rows)
    }

    fn gather_at(&self, table: &Matrix, ids: Arg, count: usize) -> Result<Rows> {
        let name = names(table.dtype).map_or("gather_bf16", |names| names.gather);
        let out = self.rows(count, table.k, Float::F32)?;
        let args = [table.buffer.at(0).into(), ids, out.at(), table.k.into(), count.into()];
        let blocks = out.len().div_ceil(32 * 256).clamp(1, 4096);
        // SAFETY: ids are rows of the table, by the callers' checks.
        unsafe { self.launch(name, Grid::new(blocks, 256), &args)? };
        Ok(out)
    }

    /// The rows of the batch whose logits are wanted.
    pub fn select_logit_rows(&self, x: &Rows, step: &Step) -> Result<Rows> {
        self.select_at(x, step.logit_rows(), step.shape.logits)
    }
}
