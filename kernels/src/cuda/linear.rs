//! Products with weights: `cuda/linear.cu` and `cuda/quantized.cu` for the few rows of a decode
//! step, `cuda/quantized_wide.cu` and `cuda/quantized_tall.cu` for more rows of weights in blocks,
//! cuBLAS for many, from weights in bf16 or made so piece by piece (`cuda/dequantize.cu`).

use std::ffi::c_void;

use cudarc::cublas::{result as blas, sys as cublas};
use cudarc::driver::sys;

use super::gpu::{Arg, Grid};
use super::matrix::names;
use super::memory::Buffer;
use super::{Error, Float, Gpu, Matrix, Result, Rows, Vector};
use crate::quant::DType;

/// Elements of a matrix in blocks that are made numbers at once.
const NUMBERS: usize = 64 << 20;
/// Rows up to which weights are read once, as they are: in bf16; in blocks, multiplied in bytes.
const FEW_ROWS_BF16: usize = 16;
const FEW_ROWS: usize = 8;

/// Weights, their bias, and where their product goes.
pub(super) type Each<'a> = (&'a Matrix, Option<&'a Vector>, &'a Rows);

/// An input in bytes with a scale for each 32.
pub(super) struct Codes {
    pub bytes: Buffer,
    pub scales: Buffer,
}

/// What follows the input in the arguments of a product of `m` rows from `first` on.
pub(super) fn of_matrices(x: &Rows, [first, m]: [usize; 2], each: &[Each<'_>]) -> Vec<Arg> {
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
            let each: Vec<Each<'_>> =
                alike.iter().map(|&j| (weights[j].0, weights[j].1, &outs[j])).collect();
            let blocks = names(dtype);
            let tensor = blocks.as_ref().and_then(|names| self.tensor_shape(names, x.count));
            let few = if blocks.is_some() { FEW_ROWS } else { FEW_ROWS_BF16 };
            if x.width.is_multiple_of(8) && x.count <= few {
                self.few_rows(x, dtype, &each, &mut codes)?;
                continue;
            }
            if let Some(shape) = tensor.filter(|_| x.width.is_multiple_of(8)) {
                self.tensor_rows(x, &shape, &each)?;
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

    /// `x` in bf16, where it is not.
    pub(super) fn as_bf16(&self, x: &Rows) -> Result<Option<Rows>> {
        match x.float {
            Float::BF16 => Ok(None),
            Float::F32 => self.convert(x.alias(), Float::BF16).map(Some),
        }
    }

    /// `x` in bytes with a scale for each 32.
    pub(super) fn codes(&self, x: &Rows) -> Result<Codes> {
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
