//! Norms, sums, activations, conversions, and rows by number.

use half::bf16;
use hearth_kernels::activation::{self, Gate, Gelu};
use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{Float, Gpu, Result};
use hearth_kernels::norm::{LayerNorm, layer_norm, rms_norm};

use crate::report::{self, POOL, ROUNDED, Report, narrow, on_gpu, rounded};

/// Narrow groups and wide ones, in eights and not; more than fits into registers.
const DIMS: &[usize] = &[
    8, 9, 16, 31, 32, 33, 63, 64, 65, 80, 127, 128, 200, 255, 256, 257, 264, 512, 896, 1000, 1001,
    2047, 2048, 4096, 4097, 5120, 8192, 8200, 9001,
];
const EPS: f32 = 1e-5;
const FLOATS: [Float; 2] = [Float::F32, Float::BF16];
/// Rows and width.
const SHAPES: &[[usize; 2]] =
    &[[1, 1], [1, 7], [3, 7], [2, 8], [5, 172], [2, 1001], [7, 896], [33, 4864], [1, 2049]];

fn input(float: Float, len: usize, seed: u64) -> Vec<f32> {
    match float {
        Float::F32 => randoms(len, seed),
        Float::BF16 => narrow(len, seed),
    }
}

#[test]
fn rms_norms() {
    on_gpu("rms_norm", |gpu, report| {
        for (i, &dim) in DIMS.iter().enumerate() {
            for (groups, together) in [(1, 1), (5, 1), (9, 1), (18, 3)] {
                for float in FLOATS {
                    let x: Vec<f32> = input(float, groups * dim, i as u64);
                    let x: Vec<f32> = x.iter().map(|x| x * 4.0).collect();
                    let weight = randoms(dim, 99);
                    let mut want = vec![0.0; x.len()];
                    rms_norm(&POOL, &x, &weight, EPS, groups, dim, &mut want);
                    let case = format!("{groups} groups of {dim}, {together} a row, {float:?}");
                    report.near(&case, ROUNDED, &want, || {
                        let (x, weight) =
                            (gpu.rows_from(&x, groups / together, float)?, gpu.vector(&weight)?);
                        gpu.read(gpu.rms_norm(&x, &weight, EPS)?)
                    });
                }
            }
        }
    });
}

#[test]
fn add_rms_norms() {
    on_gpu("add_rms_norm", |gpu, report| {
        for (i, &dim) in DIMS.iter().enumerate() {
            for rows in [1, 4] {
                for float in FLOATS {
                    let (x, y) =
                        (input(float, rows * dim, i as u64), narrow(rows * dim, 50 + i as u64));
                    let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
                    let sum = if float == Float::BF16 { rounded(sum) } else { sum };
                    let weight = randoms(dim, 98);
                    let mut want = vec![0.0; x.len()];
                    rms_norm(&POOL, &sum, &weight, EPS, rows, dim, &mut want);
                    let case = format!("{rows} rows of {dim}, {float:?}");
                    let both = || {
                        let x = gpu.rows_from(&x, rows, float)?;
                        let (y, weight) =
                            (gpu.rows_from(&y, rows, Float::BF16)?, gpu.vector(&weight)?);
                        let (x, normed) = gpu.add_rms_norm(x, &y, &weight, EPS)?;
                        Ok((gpu.read(x)?, gpu.read(normed)?))
                    };
                    if let Some((x, normed)) = report.ask(&case, both) {
                        report.same(&format!("{case}, the sum"), &sum, || Ok(x));
                        report.near(&case, ROUNDED, &want, || Ok(normed));
                    }
                }
            }
        }
    });
}

#[test]
fn layer_norms() {
    on_gpu("layer_norm", |gpu, report| {
        for (i, &dim) in DIMS.iter().enumerate() {
            for rows in [1, 6] {
                for float in FLOATS {
                    let x = input(float, rows * dim, 7 + i as u64);
                    let x = x.iter().map(|x| x + 0.5).collect();
                    let x = if float == Float::BF16 { rounded(x) } else { x };
                    let (weight, bias) = (randoms(dim, 97), randoms(dim, 96));
                    let mut want = vec![0.0; x.len()];
                    let norm = LayerNorm { weight: &weight, bias: &bias, eps: EPS };
                    layer_norm(&POOL, &x, &norm, &mut want);
                    report.near(&format!("{rows} x {dim}, {float:?}"), ROUNDED, &want, || {
                        let (weight, bias) = (gpu.vector(&weight)?, gpu.vector(&bias)?);
                        let x = gpu.rows_from(&x, rows, float)?;
                        gpu.read(gpu.layer_norm(&x, &weight, &bias, EPS)?)
                    });
                }
            }
        }
    });
}

/// One rounding each, so the bits are known.
#[test]
fn sums_are_exact() {
    on_gpu("add", |gpu, report| {
        for (i, &[rows, width]) in SHAPES.iter().enumerate() {
            let (len, seed) = (rows * width, 10 * i as u64);
            for (a, b) in
                [(Float::F32, Float::BF16), (Float::BF16, Float::BF16), (Float::F32, Float::F32)]
            {
                let (x, y) = (input(a, len, seed), input(b, len, seed + 1));
                let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
                let want = if a == Float::BF16 { rounded(sum) } else { sum };
                report.same(&format!("{rows} x {width}, {a:?} += {b:?}"), &want, || {
                    let (x, y) = (gpu.rows_from(&x, rows, a)?, gpu.rows_from(&y, rows, b)?);
                    gpu.read(gpu.add(x, &y)?)
                });
            }
            for float in FLOATS {
                let (x, bias) = (input(float, len, seed + 2), randoms(width, seed + 3));
                let sum: Vec<f32> =
                    x.iter().enumerate().map(|(i, x)| x + bias[i % width]).collect();
                let want = if float == Float::BF16 { rounded(sum) } else { sum };
                report.same(&format!("{rows} x {width}, {float:?} + bias"), &want, || {
                    let (x, bias) = (gpu.rows_from(&x, rows, float)?, gpu.vector(&bias)?);
                    gpu.read(gpu.add_bias(x, &bias)?)
                });
            }
        }
        let refused = || {
            let (x, y) =
                (gpu.rows_from(&[1.0], 1, Float::BF16)?, gpu.rows_from(&[1.0], 1, Float::F32)?);
            Ok(gpu.add(x, &y).is_err())
        };
        let refused = report.ask("bf16 += f32", refused);
        report.holds("bf16 += f32 is refused", refused == Some(true));
    });
}

#[test]
fn activations() {
    on_gpu("gates and gelu", |gpu, report| {
        for (i, &[rows, width]) in SHAPES.iter().enumerate() {
            let (len, seed) = (rows * width, 20 * i as u64);
            let wide = |seed: u64| -> Vec<f32> {
                rounded(randoms(len, seed).iter().map(|x| x * 8.0).collect())
            };
            let (gate, up) = (wide(seed), narrow(len, seed + 1));
            for kind in [Gate::Silu, Gate::GeluTanh, Gate::ClampedSwiglu] {
                let mut want = gate.clone();
                activation::gate_mul(&POOL, kind, &mut want, &up);
                report.near(&format!("{kind:?} {rows} x {width}"), ROUNDED, &want, || {
                    let gate = gpu.rows_from(&gate, rows, Float::BF16)?;
                    let up = gpu.rows_from(&up, rows, Float::BF16)?;
                    gpu.read(gpu.gate_mul(kind, gate, &up)?)
                });
            }
            for (kind, erf) in [(Gelu::Erf, true), (Gelu::Tanh, false)] {
                let x = wide(seed + 2);
                let mut want = vec![0.0; len];
                activation::gelu(&POOL, kind, &x, &mut want);
                report.near(&format!("{kind:?} {rows} x {width}"), ROUNDED, &want, || {
                    gpu.read(gpu.gelu(gpu.rows_from(&x, rows, Float::BF16)?, erf)?)
                });
            }
        }
        let extremes = rounded(vec![-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30]);
        let want = rounded(vec![0.0, 0.0, 0.0, 0.0, 0.0, 90.0, 200.0, 1e30]);
        let ones = vec![1.0; extremes.len()];
        report.near("silu of extremes", ROUNDED, &want, || {
            let x = gpu.rows_from(&extremes, 1, Float::BF16)?;
            gpu.read(gpu.gate_mul(Gate::Silu, x, &gpu.rows_from(&ones, 1, Float::BF16)?)?)
        });
        for erf in [true, false] {
            report.near(&format!("gelu {erf} of extremes"), ROUNDED, &want, || {
                gpu.read(gpu.gelu(gpu.rows_from(&extremes, 1, Float::BF16)?, erf)?)
            });
        }
    });
}

/// What Gemma has beside: embeddings that are multiplied, logits with a soft bound.
#[test]
fn scales_and_soft_bounds() {
    on_gpu("scale and softcap", |gpu, report| {
        for (i, &[rows, width]) in SHAPES.iter().enumerate() {
            let x: Vec<f32> =
                randoms(rows * width, 30 + i as u64).iter().map(|x| x * 30.0).collect();
            let rows_of = || gpu.rows_from(&x, rows, Float::F32);
            let want: Vec<f32> = x.iter().map(|x| x * 33.9).collect();
            report.same(&format!("scale {rows} x {width}"), &want, || {
                gpu.read(gpu.scale(rows_of()?, 33.9)?)
            });
            let mut want = x.clone();
            activation::softcap(&POOL, 7.5, &mut want);
            report.near(&format!("softcap {rows} x {width}"), report::FLOATS, &want, || {
                gpu.read(gpu.softcap(rows_of()?, 7.5)?)
            });
        }
    });
}

#[test]
fn conversions_are_exact() {
    on_gpu("convert", |gpu, report| {
        let special = vec![
            0.0,
            -0.0,
            1.0,
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN_POSITIVE,
            1e-40,
            -1e-45,
            257.0 / 256.0,
            259.0 / 256.0,
            1.003_906_4,
        ];
        let mut cases = vec![special];
        cases.extend(SHAPES.iter().map(|[rows, width]| randoms(rows * width, 5)));
        for x in cases {
            let case = format!("{} numbers", x.len());
            report.same(&format!("{case}, f32"), &x, || {
                gpu.read(gpu.rows_from(&x, 1, Float::F32)?)
            });
            let want: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            report.same(&format!("{case}, bf16"), &want, || {
                gpu.read(gpu.rows_from(&x, 1, Float::BF16)?)
            });
        }
    });
}

#[test]
fn selections_are_exact() {
    on_gpu("select", |gpu, report| {
        for &[rows, width] in SHAPES {
            for float in FLOATS {
                select(gpu, report, [rows, width], float);
            }
        }
    });
}

fn select(gpu: &Gpu, report: &mut Report, [rows, width]: [usize; 2], float: Float) {
    let x = input(float, rows * width, 3);
    let some: Vec<u32> = (0..11).map(|i| (i * 7 + 2) % rows as u32).collect();
    for list in [&some[..], &some[..1], &[]] {
        let row = |&row: &u32| &x[row as usize * width..][..width];
        let want: Vec<f32> = list.iter().flat_map(row).copied().collect();
        let case = format!("{} of {rows} x {width}, {float:?}", list.len());
        let got = || -> Result<Vec<f32>> {
            gpu.read(gpu.select(&gpu.rows_from(&x, rows, float)?, list)?)
        };
        report.same(&case, &want, got);
    }
}
