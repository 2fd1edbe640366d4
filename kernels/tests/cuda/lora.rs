//! Low-rank updates of some rows.

use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{Float, Gpu, LoraGroup, LoraInput};
use hearth_kernels::lora::{self, Factors, Group, Input, Part, Update};

use crate::report::{POOL, Report, Tolerance, narrow, on_gpu};

/// `[n, k, rank]`
const SHAPES: &[[usize; 3]] = &[
    [1, 8, 1],
    [7, 16, 3],
    [65, 64, 5],
    [172, 264, 8],
    [130, 896, 13],
    [896, 1000, 16],
    [129, 1024, 33],
    [300, 72, 64],
    [128, 512, 130],
    [40, 2048, 512],
];
const F32: Tolerance = Tolerance::new(5e-5);
/// The rows are rounded after the gain and after each part.
const BF16: Tolerance = Tolerance { norm: 8e-3, each: 3e-2 };

/// Rows of y, and which of them have the adapters.
fn row_lists() -> Vec<(usize, Vec<u32>)> {
    vec![
        (1, vec![0]),
        (5, vec![3, 0]),
        (13, vec![12, 1, 2, 3, 5, 7, 11, 10]),
        (40, (0..40).rev().filter(|row| row % 7 != 3).collect()),
        (3, vec![]),
    ]
}

struct Case {
    factors: [Factors; 2],
    ratio: Vec<f32>,
    gain: Option<Vec<f32>>,
    /// `[m, k]`, or empty.
    x: Vec<f32>,
    ids: Vec<u32>,
    y: Vec<f32>,
    rows: Vec<u32>,
}

impl Case {
    fn new([n, k, rank]: [usize; 3], (m, rows): (usize, Vec<u32>), table: bool) -> Self {
        let factors = |rank: usize, seed: u64| {
            let a = randoms(rank * k, seed);
            let b = randoms(n * rank, seed + 1);
            match table {
                true => Factors::of_table(lora::Float::BF16, [n, k, rank], &a, &b),
                false => Factors::new(lora::Float::BF16, [n, k, rank], &a, &b),
            }
        };
        Self {
            factors: [factors(rank, 10), factors(rank.div_ceil(2), 20)],
            ratio: randoms(n, 5),
            gain: (m % 2 == 1).then(|| randoms(n, 6)),
            x: narrow(m * k, 7),
            ids: (0..m).map(|row| (row * row + 1) as u32 % k as u32).collect(),
            y: narrow(m * n, 8),
            rows,
        }
    }

    fn truth(&self, table: bool) -> Vec<f32> {
        let mut y = self.y.clone();
        let [one, two] = &self.factors;
        let parts = vec![
            Part { factors: one, weight: 0.5, ratio: None },
            Part { factors: two, weight: -2.0, ratio: Some(&self.ratio) },
        ];
        let groups = [Group { rows: &self.rows, gain: self.gain.as_deref(), parts }];
        let input = if table { Input::Ids(&self.ids) } else { Input::Rows(&self.x) };
        lora::add(&POOL, &mut [Update { input, y: &mut y, groups: &groups }]);
        y
    }

    fn run(
        &self,
        gpu: &Gpu,
        table: bool,
        [input, output]: [Float; 2],
    ) -> hearth_kernels::cuda::Result<Vec<f32>> {
        let m = self.ids.len();
        let x = gpu.rows_from(&self.x, m, input)?;
        let y = gpu.rows_from(&self.y, m, output)?;
        let [one, two] = &self.factors;
        let parts = [gpu.lora_part(one, 0.5, None)?, gpu.lora_part(two, -2.0, Some(&self.ratio))?];
        let gain = self.gain.as_ref().map(|gain| gpu.vector(gain)).transpose()?;
        let input = if table { LoraInput::Ids(&self.ids) } else { LoraInput::Rows(&x) };
        let group = LoraGroup { y: &y, rows: &self.rows, gain: gain.as_ref(), parts: &parts };
        gpu.add_lora(input, &[group])?;
        gpu.read(y)
    }
}

#[test]
fn updates() {
    on_gpu("lora", |gpu, report| {
        for &shape in SHAPES {
            for list in row_lists() {
                for table in [false, true] {
                    check(gpu, report, shape, &list, table);
                }
            }
        }
    });
}

fn check(gpu: &Gpu, report: &mut Report, shape: [usize; 3], list: &(usize, Vec<u32>), table: bool) {
    let case = Case::new(shape, list.clone(), table);
    let (m, rows) = list;
    let want = case.truth(table);
    for floats in [
        [Float::BF16, Float::F32],
        [Float::BF16, Float::BF16],
        [Float::F32, Float::F32],
        [Float::F32, Float::BF16],
    ] {
        let name = format!("{shape:?}, {} of {m} rows, table {table}, {floats:?}", rows.len());
        let Some(got) = report.ask(&name, || case.run(gpu, table, floats)) else { continue };
        let n = shape[0];
        let untouched = |i: &usize| !rows.contains(&((i / n) as u32));
        let others: Vec<usize> = (0..m * n).filter(untouched).collect();
        let at = |x: &[f32]| others.iter().map(|&i| x[i]).collect::<Vec<f32>>();
        report.same(&format!("{name}, other rows"), &at(&case.y), || Ok(at(&got)));
        let tolerance = if floats[1] == Float::F32 { F32 } else { BF16 };
        report.near(&name, tolerance, &want, || Ok(got));
    }
}

/// What the kernels cannot do is an error, not a wrong result.
#[test]
fn refusals() {
    on_gpu("lora refusals", |gpu, report| {
        let factors = |n: usize, k: usize, rank: usize| {
            let (a, b) = (vec![0.0; rank * k], vec![0.0; n * rank]);
            Factors::new(lora::Float::BF16, [n, k, rank], &a, &b)
        };
        report.holds("inputs in eights", gpu.lora_part(&factors(8, 12, 4), 1.0, None).is_err());
        report.holds("rank", gpu.lora_part(&factors(8, 16, 513), 1.0, None).is_err());
        let part = report.ask("part", || gpu.lora_part(&factors(8, 16, 4), 1.0, None));
        let rows = report.ask("rows", || {
            Ok((
                gpu.rows_from(&[0.0; 32], 2, Float::BF16)?,
                gpu.rows_from(&[0.0; 16], 2, Float::BF16)?,
            ))
        });
        let (Some(part), Some((x, y))) = (part, rows) else { return };
        let input = LoraInput::Rows(&x);
        let parts = &[part];
        let of = |y, rows| [LoraGroup { y, rows, gain: None, parts }];
        let beyond = gpu.add_lora(input, &of(&y, &[2]));
        report.holds("a row beyond", beyond.is_err());
        let wide = gpu.add_lora(input, &of(&x, &[0]));
        report.holds("a wider output", wide.is_err());
        let ids = gpu.add_lora(LoraInput::Ids(&[0, 16]), &of(&y, &[0]));
        report.holds("an id beyond", ids.is_err());
    });
}
