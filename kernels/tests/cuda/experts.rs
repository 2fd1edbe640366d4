//! Mixture of experts, against the CPU's routing and products in f64.

use half::bf16;
use hearth_kernels::activation::{Gate, gate_mul};
use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{ExpertWeights, Float, Gpu, Matrix, Result};
use hearth_kernels::experts::{Routing, combine, gather, route};
use hearth_kernels::quant::DType;

use crate::blocks::{Weights, formats, upload_all};
use crate::linear::{in_bytes, product};
use crate::report::{POOL, Report, Tolerance, narrow, on_gpu, rounded};

/// Four roundings to bf16, and of weights in blocks an input that becomes bytes: a number on the
/// border between two goes the other way.
const EXPERTS: Tolerance = Tolerance { norm: 1e-2, each: 6e-2 };

/// Gate, up and down of every expert, on both sides.
struct Case {
    weights: [Vec<Weights>; 3],
    /// `[experts, n]` of each, where there are some.
    biases: Option<[Vec<f32>; 3]>,
    routing: Routing,
    activation: Gate,
}

impl Case {
    fn new(dtypes: [DType; 3], [hidden, ffn]: [usize; 2], routing: Routing, gate: Gate) -> Self {
        let shapes = [[ffn, hidden], [ffn, hidden], [hidden, ffn]];
        let of = |which: usize| {
            let one = |e| Weights::new(dtypes[which], shapes[which], (17 * e + which + 1) as u64);
            (0..routing.count).map(one).collect()
        };
        let biases = (gate == Gate::ClampedSwiglu).then(|| {
            let bias = |which: usize| randoms(routing.count * shapes[which][0], 90 + which as u64);
            [bias(0), bias(1), bias(2)]
        });
        Self { weights: [of(0), of(1), of(2)], biases, routing, activation: gate }
    }

    fn upload(&self, gpu: &Gpu) -> Result<[Vec<Matrix>; 3]> {
        let [gate, up, down] = &self.weights;
        Ok([upload_all(gpu, gate)?, upload_all(gpu, up)?, upload_all(gpu, down)?])
    }

    fn run(
        &self,
        gpu: &Gpu,
        on: &[Vec<Matrix>; 3],
        x: &[f32],
        scores: &Scores,
    ) -> Result<Vec<f32>> {
        let m = scores.values.len() / self.routing.count;
        let x = gpu.rows_from(x, m, Float::BF16)?;
        let scores = gpu.rows_from(&scores.values, m, scores.float)?;
        let [gate, up, down] = on;
        let (routing, activation) = (self.routing, self.activation);
        let biases = self.biases.iter().flatten().map(|bias| gpu.vector(bias));
        let biases = biases.collect::<Result<Vec<_>>>()?;
        let biases = if let [a, b, c] = &biases[..] { Some([a, b, c]) } else { None };
        let of = ExpertWeights { gate, up, down, biases, routing, activation };
        gpu.read(gpu.experts(&x, &scores, &of)?)
    }

    /// Rounded where the device rounds.
    fn truth(&self, x: &[f32], scores: &[f32]) -> Vec<f32> {
        let (hidden, ffn) = (self.weights[0][0].k, self.weights[0][0].n);
        let routes = route(scores, &self.routing);
        let mut picked = vec![0.0; routes.rows.len() * hidden];
        gather(&POOL, x, hidden, &routes, &mut picked);
        let products = |which: usize, x: &[f32], k: usize| -> Vec<f32> {
            let of = |(expert, rows): &(usize, std::ops::Range<usize>)| {
                let w = &self.weights[which][*expert];
                let x = &x[rows.start * k..rows.end * k];
                let x = if w.dtype == DType::BF16 { x.to_vec() } else { in_bytes(x) };
                let bias = self.biases.as_ref().map(|all| &all[which][expert * w.n..][..w.n]);
                rounded(product(&x, &w.values, k, bias))
            };
            routes.groups.iter().flat_map(of).collect()
        };
        let (mut opened, up) = (products(0, &picked, hidden), products(1, &picked, hidden));
        gate_mul(&POOL, self.activation, &mut opened, &up);
        let brought = products(2, &rounded(opened), ffn);
        let mut out = vec![0.0; x.len()];
        combine(&POOL, &brought, hidden, &routes, &mut out);
        out
    }
}

/// Scores as the device has them.
struct Scores {
    values: Vec<f32>,
    float: Float,
}

impl Scores {
    /// Few numbers in bf16, so that many are equal.
    fn new(len: usize, float: Float, seed: u64) -> Self {
        let some = randoms(len, seed).into_iter().map(|x| 4.0 * x);
        let values = match float {
            Float::F32 => some.collect(),
            Float::BF16 => some.map(|x| bf16::from_f32((4.0 * x).round() / 4.0).to_f32()).collect(),
        };
        Self { values, float }
    }
}

fn check(gpu: &Gpu, report: &mut Report, name: &str, case: &Case, rows: &[usize]) {
    let hidden = case.weights[0][0].k;
    let Some(on) = report.ask(name, || case.upload(gpu)) else { return };
    for (i, &m) in rows.iter().enumerate() {
        let float = [Float::F32, Float::BF16][i % 2];
        let scores = Scores::new(m * case.routing.count, float, i as u64);
        let x = narrow(m * hidden, 50 + i as u64);
        let want = case.truth(&x, &scores.values);
        report
            .near(&format!("{name}, {m} rows"), EXPERTS, &want, || case.run(gpu, &on, &x, &scores));
    }
}

#[test]
fn every_format() {
    on_gpu("experts", |gpu, report| {
        for (i, dtype) in formats().into_iter().enumerate() {
            let routing = Routing { count: 6, used: 2, normalized: i % 2 == 0 };
            let gate = [Gate::Silu, Gate::GeluTanh, Gate::ClampedSwiglu][i % 3];
            let case = Case::new([dtype; 3], [512, 256], routing, gate);
            check(gpu, report, dtype.name(), &case, &[1, 2, 9, 40]);
        }
    });
}

/// As files mix them, and more experts than a warp has lanes.
#[test]
fn many_experts_of_several_formats() {
    use DType::*;
    on_gpu("experts of several formats", |gpu, report| {
        for (dtypes, count, used) in [
            ([Q4K, Q4K, Q6K], 70, 8),
            ([Q4K, Q6K, Q4K], 33, 4),
            ([BF16, BF16, BF16], 128, 8),
            ([BF16, Q8_0, BF16], 3, 3),
            ([Q8_0, Q8_0, BF16], 1, 1),
        ] {
            let routing = Routing { count, used, normalized: true };
            let case = Case::new(dtypes, [256, 256], routing, Gate::Silu);
            let name = format!("{dtypes:?}, {used} of {count}");
            check(gpu, report, &name, &case, &[1, 5, 16, 130]);
        }
    });
}

/// A row has the same bits in any company, and what is no number stays in its row.
#[test]
fn company_changes_no_bit() {
    on_gpu("experts in company", |gpu, report| {
        for dtype in [DType::BF16, DType::Q4K, DType::Q8_0] {
            let routing = Routing { count: 5, used: 2, normalized: true };
            let case = Case::new([dtype; 3], [256, 512], routing, Gate::Silu);
            let Some(on) = report.ask(dtype.name(), || case.upload(gpu)) else { continue };
            let (x, all) = (narrow(60 * 256, 3), Scores::new(60 * 5, Float::F32, 4));
            let run = || case.run(gpu, &on, &x, &all);
            let Some(together) = report.ask(dtype.name(), run) else { continue };
            for (first, rows) in [(0, 1), (7, 1), (20, 3), (30, 17), (59, 1)] {
                let part = |x: &[f32], k: usize| x[first * k..(first + rows) * k].to_vec();
                let some = Scores { values: part(&all.values, 5), float: Float::F32 };
                let name = format!("{dtype}, {rows} rows from {first} on");
                report.same(&name, &part(&together, 256), || {
                    case.run(gpu, &on, &part(&x, 256), &some)
                });
            }
            let mut broken = x.clone();
            broken[3 * 256 + 9] = f32::NAN;
            let mut scores = Scores { values: all.values.clone(), float: Float::F32 };
            scores.values[5 * 5..6 * 5].fill(f32::NAN);
            let run = || case.run(gpu, &on, &broken, &scores);
            let Some(got) = report.ask(dtype.name(), run) else { continue };
            let right = |(i, y): (usize, &f32)| y.is_nan() == matches!(i / 256, 3 | 5);
            report.holds(&format!("{dtype}, NaN"), got.iter().enumerate().all(right));
        }
    });
}
