//! Tokens out of logits: the CPU's.

use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{Float, Gpu, Pick};
use hearth_kernels::sampling::{SamplingParams, Scratch, sample};

use crate::report::{Report, on_gpu};

/// Sums of weights are in another order, so a draw may fall on the other side of a border: at most
/// this share of them.
const OTHERS: f64 = 0.002;

fn all_params() -> Vec<SamplingParams> {
    let base = SamplingParams::default();
    vec![
        base,
        SamplingParams { temperature: 0.7, ..base },
        SamplingParams { temperature: 3.0, ..base },
        SamplingParams { temperature: 0.01, ..base },
        SamplingParams { temperature: 2.0, top_k: 5, ..base },
        SamplingParams { top_k: 40, ..base },
        SamplingParams { top_k: 1000, ..base },
        SamplingParams { top_k: usize::MAX, ..base },
        SamplingParams { top_p: 0.5, ..base },
        SamplingParams { top_p: 0.95, ..base },
        SamplingParams { top_p: 0.0, ..base },
        SamplingParams { min_p: 0.3, ..base },
        SamplingParams { min_p: 0.02, ..base },
        SamplingParams { temperature: 1.5, top_k: 20, top_p: 0.8, min_p: 0.1, ..base },
        SamplingParams { temperature: 0.8, top_k: 500, top_p: 0.9, ..base },
        SamplingParams { top_k: 1000, top_p: 0.999, ..base },
    ]
}

/// Rows of a shape: peaked, flat, with equals, and with tokens ruled out.
fn logits(width: usize, row: u64) -> Vec<f32> {
    let mut x = randoms(width, row);
    match row % 5 {
        0 => x.iter_mut().for_each(|x| *x *= 12.0),
        1 => x.iter_mut().for_each(|x| *x *= 2.0),
        2 => x.iter_mut().for_each(|x| *x = (*x * 6.0).round()),
        3 => x.iter_mut().for_each(|x| *x *= 0.01),
        _ => x.iter_mut().for_each(|x| *x = *x * *x * *x * 20.0),
    }
    if row % 3 == 1 {
        x.iter_mut().step_by(3).for_each(|x| *x = f32::NEG_INFINITY);
    }
    if row % 7 == 6 {
        x[width / 2] = f32::NAN;
    }
    x
}

/// What a grammar would allow in every third row: about half of the tokens, one in sixteen, one
/// alone, all, or none of those beyond the first words.
fn mask(row: usize, vocab: usize) -> Option<Vec<u32>> {
    let words = vocab.div_ceil(32);
    let random = |seed: u64| -> Vec<u32> {
        randoms(words, seed).iter().map(|x| (x * 2e9) as i32 as u32).collect()
    };
    let seed = row as u64;
    let (one, two) = (random(seed), random(seed + 1));
    (row % 3 == 2).then(|| match row / 3 % 5 {
        0 => one,
        1 => {
            one.iter().zip(&two).map(|(a, b)| a & b & a.rotate_left(7) & b.rotate_left(3)).collect()
        }
        2 => {
            let only = row * 7919 % vocab;
            (0..words).map(|word| if word == only / 32 { 1 << (only % 32) } else { 0 }).collect()
        }
        3 => vec![u32::MAX; words],
        _ => one[..words.div_ceil(2)].to_vec(),
    })
}

/// As the engine lays a mask over logits.
fn forbid(row: &mut [f32], mask: &[u32]) {
    for (id, logit) in row.iter_mut().enumerate() {
        if mask.get(id / 32).is_none_or(|word| word >> (id % 32) & 1 == 0) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Draws of the device and of the CPU that differ, of how many.
fn differing(
    gpu: &Gpu,
    report: &mut Report,
    [rows, vocab, width]: [usize; 3],
    params: impl Fn(usize) -> SamplingParams,
    name: &str,
) -> Option<(Vec<String>, usize)> {
    let all: Vec<Vec<f32>> = (0..rows as u64).map(|row| logits(width, row)).collect();
    let picks: Vec<Option<Pick>> = (0..rows)
        .map(|i| {
            let (seed, position) = (0x1234_5678_9abc * i as u64 + 7, (i * i) as u64);
            let (params, edits, mask) = (params(i), Vec::new(), mask(i, vocab));
            (i % 17 != 13).then_some(Pick { params, edits, seed, position, mask })
        })
        .collect();
    let got = report.ask(name, || {
        let logits = gpu.rows_from(&all.concat(), rows, Float::F32)?;
        gpu.choose(&logits, vocab, &picks)?.open()
    })?;
    let mut scratch = Scratch::new();
    let mut others = Vec::new();
    for (i, (pick, got)) in picks.iter().zip(&got).enumerate() {
        let mut row = all[i][..vocab].to_vec();
        if let Some(Pick { mask: Some(mask), .. }) = pick {
            forbid(&mut row, mask);
        }
        let want = pick.as_ref().map(|p| sample(&row, &p.params, p.seed, p.position, &mut scratch));
        if want != *got {
            others.push(format!("row {i}: {got:?} for {want:?}, {pick:?}"));
        }
    }
    Some((others, rows))
}

#[test]
fn draws_are_those_of_the_cpu() {
    on_gpu("choose", |gpu, report| {
        let all = all_params();
        let (mut others, mut draws) = (Vec::new(), 0);
        for (j, shape) in [
            [640, 40, 40],
            [320, 1000, 1003],
            [320, 32_000, 32_064],
            [64, 151_936, 151_936],
            [80, 1, 1],
            [80, 7, 9],
        ]
        .into_iter()
        .enumerate()
        {
            let params = |i: usize| all[(i / 5 + j) % all.len()];
            let name = format!("{shape:?}");
            let Some((some, count)) = differing(gpu, report, shape, params, &name) else {
                continue;
            };
            println!("choose {shape:?}: {} of {count} differ", some.len());
            others.extend(some.into_iter().map(|one| format!("{shape:?} {one}")));
            draws += count;
        }
        let share = others.len() as f64 / f64::from(draws.max(1) as u32);
        others.truncate(25);
        report.holds(&format!("{share:.4} differ:\n    {}", others.join("\n    ")), share < OTHERS);
    });
}

#[test]
fn the_best_token_is_exact() {
    on_gpu("choose the best", |gpu, report| {
        let base = SamplingParams::default();
        let greedy = [
            SamplingParams { temperature: 0.0, ..base },
            SamplingParams { temperature: -1.0, top_p: 0.3, ..base },
            SamplingParams { top_k: 1, temperature: 1.7, ..base },
        ];
        for shape in
            [[100, 40, 40], [100, 1001, 1001], [100, 32_000, 32_001], [20, 151_936, 151_936]]
        {
            let params = |i: usize| greedy[i / 5 % 3];
            let name = format!("{shape:?}");
            if let Some((others, _)) = differing(gpu, report, shape, params, &name) {
                let shown = others[..others.len().min(5)].join("\n    ");
                report
                    .holds(&format!("{name}: {} differ: {shown}", others.len()), others.is_empty());
            }
        }
    });
}

/// Rows with nothing to choose from, one token to choose, and infinities.
#[test]
fn rows_without_a_choice() {
    on_gpu("choose of nothing", |gpu, report| {
        let (none, width) = (f32::NEG_INFINITY, 300);
        let with = |changes: &[(usize, f32)], rest: f32| {
            let mut row = vec![rest; width];
            changes.iter().for_each(|&(i, x)| row[i] = x);
            row
        };
        let rows = [
            with(&[], none),
            with(&[], f32::NAN),
            with(&[(299, -50.0)], none),
            with(&[(0, -1e38)], f32::NAN),
            with(&[(17, f32::INFINITY), (90, f32::INFINITY)], 0.0),
            with(&[], 1.5),
            with(&[(5, 3e38), (6, -3e38)], 0.0),
        ];
        let base = SamplingParams::default();
        for params in [
            base,
            SamplingParams { temperature: 0.0, ..base },
            SamplingParams { top_k: 3, top_p: 0.9, min_p: 0.1, ..base },
            SamplingParams { temperature: 1e-30, ..base },
            SamplingParams { temperature: 1e30, ..base },
        ] {
            let pick = |i: usize| {
                Some(Pick { params, edits: Vec::new(), seed: i as u64, position: 3, mask: None })
            };
            let picks: Vec<_> = (0..rows.len()).map(pick).collect();
            let got = report.ask(&format!("{params:?}"), || {
                let logits = gpu.rows_from(&rows.concat(), rows.len(), Float::F32)?;
                gpu.choose(&logits, width, &picks)?.open()
            });
            let Some(got) = got else { continue };
            for (i, row) in rows.iter().enumerate() {
                let want = sample(row, &params, i as u64, 3, &mut Scratch::new());
                let case = format!("row {i}: {:?} for {want:?}, {params:?}", got[i]);
                report.holds(&case, got[i] == Some(want));
            }
        }
    });
}
