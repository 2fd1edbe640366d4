//! Weights in every format, of random bytes: all codes and scales that there are.

use std::borrow::Cow;

use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{Gpu, Matrix, Result};
use hearth_kernels::quant::{DType, dequantize};

/// Every format that the device multiplies by.
pub fn formats() -> Vec<DType> {
    let all: Vec<DType> = DType::all().filter(|&d| Matrix::stored_as(d).is_some()).collect();
    assert_eq!(all.len(), 14, "bf16 and thirteen formats of blocks");
    all
}

/// A matrix on both sides.
pub struct Weights {
    pub dtype: DType,
    pub n: usize,
    pub k: usize,
    pub bytes: Vec<u8>,
    /// What the bytes mean. `[n, k]`
    pub values: Vec<f32>,
}

impl Weights {
    pub fn new(dtype: DType, [n, k]: [usize; 2], seed: u64) -> Self {
        let bytes = random_bytes(dtype, n * k, seed);
        let mut values = vec![0.0; n * k];
        dequantize(dtype, &bytes, &mut values);
        Self { dtype, n, k, bytes, values }
    }

    pub fn upload(&self, gpu: &Gpu) -> Result<Matrix> {
        let row_bytes = self.dtype.row_bytes(self.k).expect("whole blocks");
        let row = |i: usize| Cow::Borrowed(&self.bytes[i * row_bytes..][..row_bytes]);
        gpu.matrix(self.dtype, [self.n, self.k], row, |_| {})
    }
}

/// Matrices of one shape and format, together.
pub fn upload_all(gpu: &Gpu, all: &[Weights]) -> Result<Vec<Matrix>> {
    let Weights { dtype, n, k, .. } = all[0];
    let row_bytes = dtype.row_bytes(k).expect("whole blocks");
    let row = |of: usize, i: usize| Cow::Borrowed(&all[of].bytes[i * row_bytes..][..row_bytes]);
    gpu.matrices(dtype, [n, k], all.len(), row, |_, _| {})
}

/// Blocks of `len` weights with sane scales.
fn random_bytes(dtype: DType, len: usize, seed: u64) -> Vec<u8> {
    if dtype == DType::BF16 {
        let values = randoms(len, seed).into_iter();
        return values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect();
    }
    let count = len / dtype.block_len() * dtype.block_bytes();
    let random = randoms(count, seed);
    let mut bytes: Vec<u8> = random.iter().map(|x| ((x + 1.0) * 128.0) as u8).collect();
    for (i, block) in bytes.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        for (j, &place) in scale_places(dtype).iter().enumerate() {
            let x = random[(7 * i + j) % count];
            let sign = if (i + j) % 5 == 4 { -1.0 } else { 1.0 };
            let scale = half::f16::from_f32(sign * (0.02 + 0.01 * x));
            block[place..place + 2].copy_from_slice(&scale.to_le_bytes());
        }
        if dtype == DType::MXFP4 {
            block[0] = 118 + block[0] % 6;
        }
    }
    bytes
}

/// Where a block has numbers in f16.
fn scale_places(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        DType::Q2K => &[80, 82],
        DType::Q3K => &[108],
        DType::Q6K => &[208],
        DType::MXFP4 => &[],
        _ => &[0],
    }
}
