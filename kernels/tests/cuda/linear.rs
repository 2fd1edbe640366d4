//! Products with weights of every format, and rows of tables.
//!
//! A product of few rows with weights in blocks turns its input into bytes; so does the truth here,
//! and what is left is the order of sums in f32.

use std::borrow::Cow;

use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{Float, Gpu, Matrix, Result, Vector};
use hearth_kernels::quant::DType;

use crate::blocks::{Weights, formats};
use crate::report::{
    FLOATS, NARROWED, ROUNDED, Report, TENSOR, TWICE, Tolerance, narrow, on_gpu, rounded,
};

const ROWS: &[usize] = &[1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 130, 270];
const MOST: usize = 270;
/// Up to so many rows the input becomes bytes.
const FEW: usize = 8;
/// As [`FEW`], of bf16: rows that have the same bits in any company.
const FEW_BF16: usize = 16;

/// `[n, k]`: odd numbers of blocks, and rows longer than what a warp has on its way at once.
fn shapes(dtype: DType) -> &'static [[usize; 2]] {
    match (dtype, dtype.block_len()) {
        (DType::BF16, _) => {
            &[[5, 8], [7, 33], [16, 40], [37, 264], [130, 1000], [24, 1096], [9, 5128]]
        }
        (_, 32) => &[[5, 32], [8, 64], [37, 96], [130, 480], [24, 1056], [9, 5472]],
        _ => &[[5, 256], [16, 512], [37, 768], [130, 256], [24, 1280], [9, 5376]],
    }
}

/// `x w^T + bias`, in f64.
pub fn product(x: &[f32], w: &[f32], k: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let n = w.len() / k;
    let mut y = Vec::with_capacity(x.len() / k * n);
    for x in x.chunks_exact(k) {
        for (i, w) in w.chunks_exact(k).enumerate() {
            let mut sums = [0f64; 8];
            for (x, w) in x.chunks(8).zip(w.chunks(8)) {
                for ((sum, x), w) in sums.iter_mut().zip(x).zip(w) {
                    *sum += f64::from(*x) * f64::from(*w);
                }
            }
            let bias = bias.map_or(0.0, |bias| f64::from(bias[i]));
            y.push((sums.iter().sum::<f64>() + bias) as f32);
        }
    }
    y
}

/// What is left of an input in bytes with a scale for each 32.
pub fn in_bytes(x: &[f32]) -> Vec<f32> {
    let block = |x: &[f32]| -> Vec<f32> {
        let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        x.iter().map(|x| (x * inverse).round_ties_even() * (most / 127.0)).collect()
    };
    x.chunks(32).flat_map(block).collect()
}

/// An input and what each path makes of it.
struct Input {
    x: Vec<f32>,
    float: Float,
    k: usize,
    bytes: Vec<f32>,
    narrow: Vec<f32>,
}

impl Input {
    fn new(float: Float, k: usize, seed: u64) -> Self {
        let x = match float {
            Float::F32 => randoms(MOST * k, seed),
            Float::BF16 => narrow(MOST * k, seed),
        };
        Self { float, k, bytes: in_bytes(&x), narrow: rounded(x.clone()), x }
    }

    fn tolerance(&self, dtype: DType, m: usize) -> Tolerance {
        match self.float {
            Float::F32 if dtype == DType::BF16 => TENSOR,
            Float::F32 if m > FEW => NARROWED,
            Float::F32 => FLOATS,
            Float::BF16 => ROUNDED,
        }
    }

    /// All rows, for few and for many.
    fn truth(&self, w: &Weights, bias: Option<&[f32]>) -> [Vec<f32>; 2] {
        let many = product(&self.narrow, &rounded(w.values.clone()), self.k, bias);
        match w.dtype {
            DType::BF16 => [many.clone(), many],
            _ => [product(&self.bytes, &w.values, self.k, bias), many],
        }
    }
}

#[test]
fn every_format_and_number_of_rows() {
    on_gpu("linear", |gpu, report| {
        for dtype in formats() {
            for (i, &[n, k]) in shapes(dtype).iter().enumerate() {
                let w = Weights::new(dtype, [n, k], 31 * i as u64 + n as u64);
                let bias = (i % 2 == 0).then(|| randoms(n, 1));
                for float in [Float::BF16, Float::F32] {
                    one(gpu, report, &w, bias.as_deref(), &Input::new(float, k, i as u64));
                }
            }
        }
    });
}

fn one(gpu: &Gpu, report: &mut Report, w: &Weights, bias: Option<&[f32]>, input: &Input) {
    let (dtype, n, k, float) = (w.dtype, w.n, w.k, input.float);
    let name = format!("{dtype} [{n}, {k}] {float:?}, bias {}", bias.is_some());
    let [few, many] = input.truth(w, bias);
    let upload = || -> Result<(Matrix, Option<Vector>)> {
        Ok((w.upload(gpu)?, bias.map(|bias| gpu.vector(bias)).transpose()?))
    };
    let Some((matrix, bias)) = report.ask(&name, upload) else { return };
    let limit = if dtype == DType::BF16 { FEW_BF16 } else { FEW };
    let mut alike: Option<Vec<f32>> = None;
    for &m in ROWS {
        let case = format!("{name}, {m} rows");
        let run = || {
            let x = gpu.rows_from(&input.x[..m * k], m, float)?;
            let [y] = gpu.linear(&x, [(&matrix, bias.as_ref())])?;
            gpu.read(y)
        };
        let Some(got) = report.ask(&case, run) else { continue };
        let want = if m <= FEW { &few } else { &many };
        // A bias after the product of many is a second rounding.
        let twice = float == Float::BF16 && bias.is_some() && (m > limit || k % 8 != 0);
        let tolerance = if twice { TWICE } else { input.tolerance(dtype, m) };
        report.near(&case, tolerance, &want[..m * n], || Ok(got.clone()));
        if m <= limit && k % 8 == 0 {
            let before = alike.as_deref().unwrap_or_default();
            let shared = before.len().min(got.len());
            report.same(&format!("{case}, bits"), &before[..shared], || Ok(got[..shared].to_vec()));
            alike = Some(got);
        }
    }
}

/// Two and three matrices that read one input, of one format and of several.
#[test]
fn several_matrices_at_once() {
    use DType::*;
    let threes = [
        [Q4K, Q4K, Q6K],
        [Q6K, Q4K, Q4K],
        [Q4K, Q6K, Q4K],
        [Q8_0, Q8_0, Q8_0],
        [BF16, Q5_0, BF16],
        [BF16, BF16, BF16],
        [Q2K, Q3K, Q5K],
        [IQ4XS, IQ4NL, MXFP4],
        [Q4_0, Q4_1, Q5_1],
    ];
    on_gpu("linear of several", |gpu, report| {
        for (i, three) in threes.iter().enumerate() {
            let k = [256, 768, 1280][i % 3];
            for (j, sizes) in [[24, 8, 8], [5, 3, 11], [67, 1, 16]].into_iter().enumerate() {
                let float = if (i + j) % 2 == 0 { Float::BF16 } else { Float::F32 };
                let weight = |part: usize| {
                    Weights::new(three[part], [sizes[part], k], (100 * i + 10 * j + part) as u64)
                };
                let weights = [weight(0), weight(1), weight(2)];
                several(gpu, report, &weights, &Input::new(float, k, i as u64));
            }
        }
    });
}

fn several(gpu: &Gpu, report: &mut Report, weights: &[Weights; 3], input: &Input) {
    let name = weights.iter().map(|w| format!("{} {}", w.dtype, w.n)).collect::<Vec<_>>();
    let name = format!("{} of {}, {:?}", name.join(" + "), input.k, input.float);
    let biases = [randoms(weights[0].n, 5), randoms(weights[1].n, 6)];
    let truth = [
        input.truth(&weights[0], Some(&biases[0])),
        input.truth(&weights[1], None),
        input.truth(&weights[2], Some(&vec![0.25; weights[2].n])),
    ];
    let upload = || {
        let [a, b, c] = weights;
        let matrices = [a.upload(gpu)?, b.upload(gpu)?, c.upload(gpu)?];
        Ok((matrices, gpu.vector(&biases[0])?, gpu.vector(&vec![0.25; c.n])?))
    };
    let Some(([a, b, c], first, last)) = report.ask(&name, upload) else { return };
    for m in [1, 2, 4, 7, 16, 33, 270] {
        let run = || {
            let x = gpu.rows_from(&input.x[..m * input.k], m, input.float)?;
            let [one, two, three] =
                gpu.linear(&x, [(&a, Some(&first)), (&b, None), (&c, Some(&last))])?;
            let [four, five] = gpu.linear(&x, [(&a, Some(&first)), (&b, None)])?;
            let outs = [one, two, three, four, five];
            outs.into_iter().map(|out| gpu.read(out)).collect::<Result<Vec<_>>>()
        };
        let case = format!("{name}, {m} rows");
        let Some(outs) = report.ask(&case, run) else { continue };
        for (i, out) in outs.into_iter().enumerate() {
            let [few, many] = &truth[i % 3];
            let want = if m <= FEW { few } else { many };
            let twice = m > FEW_BF16 && input.float == Float::BF16;
            let tolerance = if twice { TWICE } else { input.tolerance(weights[i % 3].dtype, m) };
            let want = &want[..m * weights[i % 3].n];
            report.near(&format!("{case}, output {i}"), tolerance, want, || Ok(out));
        }
    }
}

/// More bytes than one upload, and more weights than are made numbers at once.
#[test]
fn a_matrix_in_pieces() {
    on_gpu("linear in pieces", |gpu, report| {
        let (n, k, own) = (70_001, 1024, 61);
        let w = Weights::new(DType::Q4_0, [own, k], 4);
        let row_bytes = w.dtype.row_bytes(k).expect("whole blocks");
        let row = |i: usize| Cow::Borrowed(&w.bytes[i % own * row_bytes..][..row_bytes]);
        let input = Input::new(Float::BF16, k, 9);
        let [few, many] = input.truth(&w, None);
        let matrix = report.ask("upload", || gpu.matrix(w.dtype, [n, k], row, |_| {}));
        let Some(matrix) = matrix else { return };
        for (m, truth) in [(1, &few), (33, &many), (270, &many)] {
            let want: Vec<f32> = (0..m * n).map(|i| truth[i / n * own + i % n % own]).collect();
            // An odd number of outputs has cuBLAS round sums of parts.
            let tolerance = if m == 270 { TWICE } else { ROUNDED };
            report.near(&format!("{m} rows"), tolerance, &want, || {
                let x = gpu.rows_from(&input.x[..m * k], m, Float::BF16)?;
                let [y] = gpu.linear(&x, [(&matrix, None)])?;
                gpu.read(y)
            });
        }
    });
}

/// A NaN in the input reaches the outputs of its row, and of no other.
#[test]
fn a_nan_stays_in_its_row() {
    on_gpu("linear of NaN", |gpu, report| {
        for dtype in formats() {
            let w = Weights::new(dtype, [19, 512], 3);
            for m in [3, 12, 40, 260] {
                let mut x = narrow(m * 512, 8);
                x[512 + 77] = f32::NAN;
                let case = format!("{dtype}, {m} rows");
                let run = || {
                    let x = gpu.rows_from(&x, m, Float::BF16)?;
                    let [y] = gpu.linear(&x, [(&w.upload(gpu)?, None)])?;
                    gpu.read(y)
                };
                let Some(y) = report.ask(&case, run) else { continue };
                let right = |(i, y): (usize, &f32)| y.is_nan() == (i / 19 == 1);
                report.holds(&case, y.iter().enumerate().all(right));
            }
        }
    });
}

#[test]
fn rows_of_tables_are_exact() {
    on_gpu("gather", |gpu, report| {
        for dtype in formats() {
            for &[n, k] in shapes(dtype) {
                let w = Weights::new(dtype, [n, k], 77);
                let all: Vec<u32> = (0..41).map(|i| (i * i + 3) % n as u32).collect();
                for ids in [&all[..], &all[..1], &[n as u32 - 1, 0]] {
                    let row = |&id: &u32| &w.values[id as usize * k..][..k];
                    let want: Vec<f32> = ids.iter().flat_map(row).copied().collect();
                    let case = format!("{dtype} [{n}, {k}], {} ids", ids.len());
                    report.same(&case, &want, || gpu.read(gpu.gather(&w.upload(gpu)?, ids)?));
                }
            }
        }
    });
}
