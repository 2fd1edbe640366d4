//! Weights on the device and products with them: `cuda/linear.cu`, `cuda/quantized.cu` for the few
//! rows of a decode step, cuBLAS for many, from weights in bf16 or made so piece by piece
//! (`cuda/dequantize.cu`).

use std::borrow::Cow;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::PoisonError;

use cudarc::cublas::{result as blas, sys as cublas};
use cudarc::driver::{CudaEvent, PinnedHostSlice, result, sys};

use super::attention::ENDED;
use super::gpu::{Arg, Grid};
use super::memory::Buffer;
use super::{Error, Float, Gpu, Result, Rows, Step};
use crate::quant::DType;

/// Weights `[n, k]` of products, as a file has them: in bf16, or in blocks.
pub struct Matrix {
    buffer: Buffer,
    dtype: DType,
    n: usize,
    k: usize,
}

/// Weights that scale or shift, in f32. `[n]`
pub struct Vector {
    buffer: Buffer,
    len: usize,
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
struct Names {
    linear: [&'static str; 4],
    wide: [&'static str; 2],
    /// Bytes of a row of W in shared memory, in a wide product.
    slot: usize,
    dequantize: &'static str,
    gather: &'static str,
}

macro_rules! formats {
    ($($dtype:ident $text:literal $slot:literal),* $(,)?) => {
        fn names(dtype: DType) -> Option<Names> {
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
                    slot: $slot,
                    dequantize: concat!("dequantize_", $text),
                    gather: concat!("gather_", $text),
                }),)*
                _ => None,
            }
        }
    };
}
formats! {
    Q4_0 "q4_0" 160,
    Q4_1 "q4_1" 224,
    Q5_0 "q5_0" 224,
    Q5_1 "q5_1" 224,
    Q8_0 "q8_0" 288,
    Q2K "q2_k" 96,
    Q3K "q3_k" 160,
    Q4K "q4_k" 160,
    Q5K "q5_k" 224,
    Q6K "q6_k" 224,
    IQ4NL "iq4_nl" 160,
    IQ4XS "iq4_xs" 160,
    MXFP4 "mxfp4" 160,
}

/// Bytes of a matrix on their way to the device.
const PIECE: usize = 8 << 20;
/// Elements of a matrix in blocks that are made numbers at once.
const NUMBERS: usize = 64 << 20;
/// Up to so many rows weights in blocks are read once, as they are, which is faster than to make
/// them numbers first; weights in bf16 up to sixteen rows.
const FEW_ROWS: usize = 32;
const FEW_ROWS_BF16: usize = 16;
/// Rows of W of a block of a wide product.
const TALL: usize = 64;
/// Blocks of 64 rows that keep a device busy: two for each of its processors.
const BUSY: usize = 264;

impl Matrix {
    /// In which format the device keeps weights of a file, if it keeps them as they are.
    pub fn stored_as(dtype: DType) -> Option<DType> {
        (dtype == DType::BF16 || names(dtype).is_some()).then_some(dtype)
    }

    fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.k).expect("checked when it was made; this is a bug")
    }
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

/// Weights, their bias, and where their product goes.
type Each<'a> = (&'a Matrix, Option<&'a Vector>, &'a Rows);

/// An input in bytes with a scale for each 32.
struct Codes {
    bytes: Buffer,
    scales: Buffer,
}

/// Shared memory of a wide product of so many rows of x, in bytes.
fn wide_shared(names: &Names, rows: usize) -> usize {
    3 * (TALL * names.slot + 512 * rows) + 128 * TALL
}

/// What follows the input in the arguments of a product of `m` rows from `first` on.
fn of_matrices(x: &Rows, [first, m]: [usize; 2], each: &[Each<'_>]) -> Vec<Arg> {
    let list = |of: &dyn Fn(&Each<'_>) -> Arg, absent: Arg| {
        [0, 1, 2].map(|i| each.get(i).map_or(absent, of))
    };
    let mut args = vec![Arg::from(m), Arg::from(x.width)];
    args.extend(list(&|(w, _, _)| w.buffer.at(0).into(), Arg::NULL));
    args.extend(list(&|(w, _, _)| w.n.into(), Arg::from(0i32)));
    let y = |(w, _, y): &Each<'_>| y.buffer.at(first * w.n * y.float.bytes()).into();
    args.extend(list(&y, Arg::NULL));
    args.extend(list(&|(_, bias, _)| bias.map_or(Arg::NULL, Vector::at), Arg::NULL));
    args.push(i32::from(x.product() == Float::F32).into());
    args
}

impl Gpu {
    /// Takes a matrix, row by row. `taken` is told which rows are no longer needed.
    pub fn matrix<'a>(
        &self,
        dtype: DType,
        [n, k]: [usize; 2],
        row: impl Fn(usize) -> Cow<'a, [u8]>,
        taken: impl Fn(Range<usize>),
    ) -> Result<Matrix> {
        let row_bytes = dtype.row_bytes(k).filter(|_| Matrix::stored_as(dtype).is_some());
        let Some(row_bytes) = row_bytes else {
            return Err(Error::Missing(format!("no products with {dtype} weights of width {k}")));
        };
        // Kernels read whole 16 bytes at the end.
        let buffer = Buffer::new(&self.context, n * row_bytes + 16)?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let staging = match &mut *staging {
            Some(staging) if staging.len() >= row_bytes => staging,
            other => other.insert(Staging::new(self, PIECE.max(row_bytes))?),
        };
        let rows = staging.len() / row_bytes.max(1);
        for first in (0..n).step_by(rows.max(1)) {
            let these = first..n.min(first + rows);
            let piece = staging.next(these.len() * row_bytes)?;
            for (i, place) in these.clone().zip(piece.chunks_exact_mut(row_bytes.max(1))) {
                place.copy_from_slice(&row(i));
            }
            taken(these);
            staging.send(self, &buffer, first * row_bytes)?;
        }
        Ok(Matrix { buffer, dtype, n, k })
    }

    /// Takes a vector.
    pub fn vector(&self, values: &[f32]) -> Result<Vector> {
        Ok(Vector { buffer: self.upload(values)?, len: values.len() })
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

    /// `y_i = x W_i^T (+ b_i)`, in the type of `x` or f32 where it is widened, for up to three
    /// weights that read one input.
    pub fn linear<const N: usize>(
        &self,
        x: &Rows,
        weights: [(&Matrix, Option<&Vector>); N],
    ) -> Result<[Rows; N]> {
        let wrong =
            |(w, b): &(&Matrix, Option<&Vector>)| w.k != x.width || b.is_some_and(|b| b.len != w.n);
        if N > 3 || weights.iter().any(wrong) {
            return Err(Error::Missing("products of one width with their input".into()));
        }
        let mut outs = Vec::with_capacity(N);
        for (w, _) in &weights {
            outs.push(self.rows(x.count, w.n, x.product())?);
        }
        let mut done = [false; N];
        // Weights of several formats read one input in bytes.
        let mut codes = None;
        for i in 0..N {
            let dtype = weights[i].0.dtype;
            if done[i] {
                continue;
            }
            let alike: Vec<usize> = (i..N).filter(|&j| weights[j].0.dtype == dtype).collect();
            alike.iter().for_each(|&j| done[j] = true);
            let few = self.few(dtype);
            if x.count <= few && x.width.is_multiple_of(8) {
                let each = alike.iter().map(|&j| (weights[j].0, weights[j].1, &outs[j]));
                self.few_rows(x, dtype, &each.collect::<Vec<_>>(), &mut codes)?;
                continue;
            }
            for j in alike {
                self.many_rows(x, weights[j].0, &outs[j])?;
                if let Some(bias) = weights[j].1 {
                    let out = outs[j].alias();
                    self.add_bias(out, bias)?;
                }
            }
        }
        Ok(outs.try_into().ok().expect("one output for each weight; this is a bug"))
    }

    /// Rows up to which weights of a format are multiplied as they lie: those of the wide product
    /// where the device has the shared memory for it.
    fn few(&self, dtype: DType) -> usize {
        match names(dtype) {
            None => FEW_ROWS_BF16,
            Some(names) if wide_shared(&names, 32) <= self.shared_most => FEW_ROWS,
            Some(_) => 8,
        }
    }

    /// Weights of one format, read once for a few rows at a time. `codes` keeps the input in bytes
    /// for weights of another format.
    fn few_rows(
        &self,
        x: &Rows,
        dtype: DType,
        each: &[Each<'_>],
        codes: &mut Option<Codes>,
    ) -> Result<()> {
        let n: usize = each.iter().map(|(w, _, _)| w.n).sum();
        let Some(names) = names(dtype) else {
            let narrow = self.as_bf16(x)?;
            let input = narrow.as_ref().unwrap_or(x);
            for first in (0..x.count).step_by(FEW_ROWS_BF16) {
                let m = FEW_ROWS_BF16.min(x.count - first);
                let (name, rows) = match m {
                    1 => ("linear_bf16_m1", 8),
                    2 => ("linear_bf16_m2", 8),
                    3..=4 => ("linear_bf16_m4", 16),
                    5..=8 => ("linear_bf16_m8", 16),
                    _ => ("linear_bf16_m16", 16),
                };
                let mut args = vec![input.buffer.at(first * x.width * 2).into()];
                args.extend(of_matrices(x, [first, m], each));
                // SAFETY: the contract of the kernel; shapes were compared by `linear`, and there
                // are `m` rows from `first` on.
                unsafe { self.launch(name, Grid::new(n.div_ceil(rows), 256), &args)? };
            }
            return Ok(());
        };
        if x.count > 8 {
            return self.wide_rows(x, &names, each);
        }
        let codes = match codes {
            Some(codes) => codes,
            none => none.insert(self.codes(x)?),
        };
        let size = x.count.next_power_of_two();
        let eight = size <= 2 || matches!(dtype, DType::Q4K | DType::Q6K);
        let rows = if eight { 8 } else { 16 };
        let mut args = vec![codes.bytes.at(0).into(), codes.scales.at(0).into()];
        args.extend(of_matrices(x, [0, x.count], each));
        let name = names.linear[size.ilog2() as usize];
        // SAFETY: as above.
        unsafe { self.launch(name, Grid::new(n.div_ceil(rows), 128), &args) }
    }

    /// Weights in blocks on the tensor cores, read once for up to 32 rows. Where few blocks would
    /// work, each takes a part of k; how many depends on the weights alone.
    fn wide_rows(&self, x: &Rows, names: &Names, each: &[Each<'_>]) -> Result<()> {
        let narrow = self.as_bf16(x)?;
        let (m, size) = (x.count, usize::from(x.count > 16));
        let blocks: usize = each.iter().map(|(w, _, _)| w.n.div_ceil(TALL)).sum();
        if blocks > ENDED {
            return Err(Error::Missing(format!("{blocks} blocks of one product")));
        }
        let splits = (BUSY / blocks).min(x.width.div_ceil(256) / 4).clamp(1, 8);
        let sums = if splits > 1 { splits * m * blocks * TALL } else { 0 };
        let parts = self.arena.take(4 * sums)?;
        let mut args = vec![narrow.as_ref().unwrap_or(x).at()];
        args.extend(of_matrices(x, [0, m], each));
        args.splice(3..3, [parts.at(0).into(), self.ended.at(0).into()]);
        let shared = wide_shared(names, [16, 32][size]);
        let grid = Grid::of((blocks, splits, 1), 256, shared as u32);
        // SAFETY: the contract of the kernel; shapes were compared by `linear`, and there is room
        // for the parts of all sums.
        unsafe { self.launch(names.wide[size], grid, &args) }
    }

    /// `x` in bf16, where it is not.
    pub(super) fn as_bf16(&self, x: &Rows) -> Result<Option<Rows>> {
        match x.float {
            Float::BF16 => Ok(None),
            Float::F32 => self.convert(x.alias(), Float::BF16).map(Some),
        }
    }

    /// `x` in bytes with a scale for each 32.
    fn codes(&self, x: &Rows) -> Result<Codes> {
        if !x.width.is_multiple_of(32) {
            return Err(Error::Missing("inputs in whole blocks".into()));
        }
        let bytes = self.arena.take(x.len())?;
        let scales = self.arena.take(x.len() / 32 * 8)?;
        let name = match x.float {
            Float::F32 => "quantize_rows_f32",
            Float::BF16 => "quantize_rows_bf16",
        };
        let args = [x.at(), bytes.at(0).into(), scales.at(0).into(), Arg::long(x.len() as u64)];
        let blocks = x.len().div_ceil(4 * 256);
        // SAFETY: a byte for each element and 8 bytes for each 32.
        unsafe { self.launch(name, Grid::new(blocks, 256), &args)? };
        Ok(Codes { bytes, scales })
    }

    /// cuBLAS, over pieces of weights that are not numbers yet.
    fn many_rows(&self, x: &Rows, w: &Matrix, y: &Rows) -> Result<()> {
        let input = self.as_bf16(x)?;
        let x = input.as_ref().unwrap_or(x);
        let Some(names) = names(w.dtype) else {
            return self.product(x, w.buffer.at(0), [0, w.n], w.n, y);
        };
        let rows = (NUMBERS / w.k).max(1).min(w.n);
        let numbers = self.arena.take(rows * w.k * 2)?;
        for first in (0..w.n).step_by(rows) {
            let count = rows.min(w.n - first);
            let args = [
                w.buffer.at(0).into(),
                numbers.at(0).into(),
                Arg::long(first as u64),
                Arg::long(count as u64),
                w.k.into(),
            ];
            let blocks = (count * w.k).div_ceil(32 * 256).clamp(1, 16 * 132);
            debug_assert!((first + count) * w.row_bytes() <= w.buffer.bytes());
            // SAFETY: rows of the matrix; room for as many in bf16.
            unsafe { self.launch(names.dequantize, Grid::new(blocks, 256), &args)? };
            self.product(x, numbers.at(0), [first, count], w.n, y)?;
        }
        Ok(())
    }

    /// Columns `first..first + count` of `y [m, n]`: `x` times as many rows of bf16 at `w`.
    fn product(
        &self,
        x: &Rows,
        w: sys::CUdeviceptr,
        [first, count]: [usize; 2],
        n: usize,
        y: &Rows,
    ) -> Result<()> {
        let int = |size: usize| i32::try_from(size).expect("a size that cuBLAS can count");
        let (one, zero) = (1f32, 0f32);
        let number = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        let kind = match y.float {
            Float::F32 => cublas::cudaDataType::CUDA_R_32F,
            Float::BF16 => cublas::cudaDataType::CUDA_R_16BF,
        };
        let bf16 = cublas::cudaDataType::CUDA_R_16BF;
        self.context.bind_to_thread()?;
        // SAFETY: in cuBLAS' order of columns: y^T [n, m] = w [count, k] x^T [k, m], written into
        // rows `first..` of n. All three are as long as that, by the callers' checks.
        unsafe {
            blas::gemm_ex(
                *self.blas.handle(),
                cublas::cublasOperation_t::CUBLAS_OP_T,
                cublas::cublasOperation_t::CUBLAS_OP_N,
                int(count),
                int(x.count),
                int(x.width),
                number(&one),
                w as *const c_void,
                bf16,
                int(x.width),
                x.buffer.at(0) as *const c_void,
                bf16,
                int(x.width),
                number(&zero),
                y.buffer.at(first * y.float.bytes()) as *mut c_void,
                kind,
                int(n),
                cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )?;
        }
        Ok(())
    }
}
