//! Sampling against a truth that sorts, and against probabilities.

use super::*;
use crate::cases;

/// Tokens that the filters leave with their probabilities, best first, by sorting in f64.
fn truth(logits: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
    let weight = |x: &f32| (f64::from(*x) / f64::from(params.temperature)).exp();
    let mut all: Vec<(u32, f64)> =
        logits.iter().enumerate().map(|(id, x)| (id as u32, weight(x))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        all.truncate(params.top_k);
    }
    let total: f64 = all.iter().map(|t| t.1).sum();
    let mut sum = 0.0;
    let goal = f64::from(params.top_p) * total;
    let kept = all.iter().take_while(|t| {
        let before = sum;
        sum += t.1;
        before == 0.0 || before < goal
    });
    let mut kept: Vec<(u32, f64)> = kept.copied().collect();
    let least = f64::from(params.min_p) * kept[0].1;
    kept.retain(|t| t.1 >= least);
    let total: f64 = kept.iter().map(|t| t.1).sum();
    kept.iter().map(|(id, w)| (*id, w / total)).collect()
}

fn filters() -> Vec<SamplingParams> {
    let base = SamplingParams::default();
    vec![
        base,
        SamplingParams { temperature: 0.7, ..base },
        SamplingParams { temperature: 2.0, top_k: 5, ..base },
        SamplingParams { top_p: 0.5, ..base },
        SamplingParams { min_p: 0.3, ..base },
        SamplingParams { temperature: 1.5, top_k: 20, top_p: 0.8, min_p: 0.1, ..base },
        SamplingParams { top_p: 0.0, ..base },
        SamplingParams { top_k: 1000, top_p: 0.999, ..base },
    ]
}

#[test]
fn draws_follow_the_probabilities_of_the_sorting_truth() {
    const DRAWS: usize = 20_000;
    let logits: Vec<f32> = cases::randoms(40, 1).iter().map(|x| x * 4.0).collect();
    for params in filters() {
        let expected = truth(&logits, &params);
        let mut counts = vec![0usize; logits.len()];
        let mut scratch = Scratch::new();
        for position in 0..DRAWS as u64 {
            let token = sample(&logits, &params, 9, position, &mut scratch).expect("a token");
            counts[token as usize] += 1;
        }
        for (id, count) in counts.iter().enumerate() {
            let p = expected.iter().find(|t| t.0 == id as u32).map_or(0.0, |t| t.1);
            let sigma = (p * (1.0 - p) / DRAWS as f64).sqrt();
            let off = (*count as f64 / DRAWS as f64 - p).abs();
            assert!(off <= 4.5 * sigma, "{params:?}: token {id}, p {p}, {count} draws");
        }
    }
}

#[test]
fn a_large_vocabulary_keeps_what_the_truth_keeps() {
    let logits: Vec<f32> = cases::randoms(151_936, 2).iter().map(|x| x * 12.0).collect();
    for params in filters().into_iter().filter(|p| p.top_k > 0 || p.top_p < 1.0 || p.min_p > 0.0) {
        let mut expected: Vec<u32> = truth(&logits, &params).iter().map(|t| t.0).collect();
        expected.sort_unstable();
        let mut scratch = Scratch::new();
        let mut drawn = Vec::new();
        for position in 0..300 {
            drawn.extend(sample(&logits, &params, 5, position, &mut scratch));
        }
        assert_eq!(drawn.len(), 300);
        assert!(drawn.iter().all(|id| expected.binary_search(id).is_ok()), "{params:?}");
    }
}

#[test]
fn every_isa_draws_the_same_tokens() {
    for &len in cases::LENGTHS.iter().filter(|len| **len > 0) {
        let logits: Vec<f32> = cases::randoms(len, 3).iter().map(|x| x * 20.0).collect();
        for params in filters() {
            let draws = |isa: Isa| -> Vec<Option<u32>> {
                let mut scratch = Scratch::new();
                let at = |p| sample_with(isa, &logits, &params, 1, p, &mut scratch);
                (0..50).map(at).collect()
            };
            let first = draws(Isa::Scalar);
            assert!(first.iter().all(Option::is_some));
            for isa in Isa::available() {
                assert_eq!(first, draws(*isa), "{} {params:?}", isa.name());
            }
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_equals_and_ignores_nan() {
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let mut scratch = Scratch::new();
    let mut logits = vec![0.5; 40];
    (logits[3], logits[20], logits[37], logits[39]) = (f32::NAN, 2.0, 2.0, f32::NAN);
    assert_eq!(sample(&logits, &greedy, 0, 0, &mut scratch), Some(20));
    logits[20] = f32::NEG_INFINITY;
    assert_eq!(sample(&logits, &greedy, 0, 0, &mut scratch), Some(37));
    logits[5] = f32::INFINITY;
    assert_eq!(sample(&logits, &SamplingParams::default(), 0, 0, &mut scratch), Some(5));
}

#[test]
fn tokens_that_are_ruled_out_are_never_drawn() {
    let mut scratch = Scratch::new();
    let mut logits = cases::randoms(100, 4);
    forbid_from(&mut logits, 90);
    forbid(&mut logits, &[0, 7]);
    logits[11] = f32::NAN;
    let mut mask = vec![u32::MAX; 3];
    mask[1] = 0x0000_ffff;
    allow_only(&mut logits, &mask);
    for position in 0..3000 {
        let hot = SamplingParams { temperature: 50.0, ..SamplingParams::default() };
        let id = sample(&logits, &hot, 3, position, &mut scratch).expect("some are left") as usize;
        assert!(id < 90 && ![0, 7, 11].contains(&id) && !(48..64).contains(&id), "token {id}");
    }
    let nothing = vec![f32::NEG_INFINITY; 20];
    assert_eq!(sample(&nothing, &SamplingParams::default(), 0, 0, &mut scratch), None);
    assert_eq!(sample(&[f32::NAN; 3], &SamplingParams::default(), 0, 0, &mut scratch), None);
    assert_eq!(sample(&[], &SamplingParams::default(), 0, 0, &mut scratch), None);
    let short = [1u32];
    let mut logits = vec![1.0; 40];
    allow_only(&mut logits, &short);
    assert_eq!(logits.iter().filter(|x| x.is_finite()).count(), 1);
}

#[test]
fn a_tiny_temperature_is_greedy() {
    let mut scratch = Scratch::new();
    let logits = cases::randoms(1000, 6);
    for temperature in [1e-4, 1e-30, f32::MIN_POSITIVE / 8.0] {
        let cold = SamplingParams { temperature, ..SamplingParams::default() };
        for position in 0..20 {
            assert_eq!(sample(&logits, &cold, 1, position, &mut scratch), argmax(&logits));
        }
    }
}

#[test]
fn penalties_and_bias() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..SamplingParams::default()
    };
    let mut logits = vec![4.0, -4.0, 4.0, 1.0];
    let seen = [(0, 0), (1, 0), (2, 3)].map(|(token, in_output)| Seen { token, in_output });
    penalise(&mut logits, &params, &seen);
    assert_eq!(logits, [2.0, -8.0, 2.0 - 0.5 - 0.75, 1.0]);
    bias(&mut logits, &[(3, -100.0), (1, 8.0)]);
    assert_eq!(logits, [2.0, 0.0, 0.75, -99.0]);
}

#[test]
fn log_probabilities_are_those_of_f64() {
    for (len, padding) in [(1, 0), (17, 3), (151_936, 271)] {
        let mut logits: Vec<f32> = cases::randoms(len, 7).iter().map(|x| x * 15.0).collect();
        let real = len - padding;
        forbid_from(&mut logits, real);
        let total: f64 = logits[..real].iter().map(|x| f64::from(*x).exp()).sum();
        let log_prob = |id: u32| f64::from(logits[id as usize]) - total.ln();
        let mut sorted: Vec<u32> = (0..real as u32).collect();
        sorted.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        let token = real as u32 / 2;
        for isa in Isa::available() {
            let got = log_probs_with(*isa, &logits, token, 5);
            assert!((f64::from(got.chosen) - log_prob(token)).abs() < 4e-6, "{got:?}");
            assert_eq!(got, log_probs_with(Isa::Scalar, &logits, token, 5));
            let ids: Vec<u32> = got.top.iter().map(|t| t.0).collect();
            assert_eq!(ids, sorted[..5.min(real)]);
            for (id, got) in &got.top {
                assert!((f64::from(*got) - log_prob(*id)).abs() < 4e-6);
            }
            assert!(log_probs_with(*isa, &logits, token, 0).top.is_empty());
        }
    }
}
