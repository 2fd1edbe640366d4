//! Passes over a whole row: the largest logit, weights, log-probabilities.

use crate::simd::{Kernel, Map, Simd, exp, run, sum, zip_map};
use crate::{Isa, LANES};

/// Log-probabilities of a row, natural logarithm.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbs {
    /// Of the token that was asked for.
    pub chosen: f32,
    /// The best tokens and theirs, best first.
    pub top: Vec<(u32, f32)>,
}

/// Log-softmax of a row, for one token and for the `top` best ones (at most 20 in OpenAI's API; the
/// cost grows with it).
///
/// # Panics
/// When the token is outside the row.
pub fn log_probs(logits: &[f32], token: u32, top: usize) -> LogProbs {
    log_probs_with(Isa::best(), logits, token, top)
}

/// [`log_probs`] with a chosen instruction set.
pub fn log_probs_with(isa: Isa, logits: &[f32], token: u32, top: usize) -> LogProbs {
    let largest = largest(isa, logits);
    let total = run(isa, SumExp { logits, largest });
    let log_total = f64::from(largest) + total.ln();
    let log_prob = |logit: f32| (f64::from(logit) - log_total) as f32;
    let best = best(logits, top).into_iter();
    LogProbs {
        chosen: log_prob(logits[token as usize]),
        top: best.map(|(id, logit)| (id, log_prob(logit))).collect(),
    }
}

/// The largest logit; minus infinity when there is none. NaN counts as minus infinity.
pub(super) fn largest(isa: Isa, logits: &[f32]) -> f32 {
    run(isa, Largest { logits })
}

/// `out = e^((logits - largest) / temperature)`, 0 for NaN.
pub(super) fn weights(isa: Isa, logits: &[f32], largest: f32, temperature: f32, out: &mut [f32]) {
    run(isa, Weights { logits, weight: Weight { largest, temperature }, out });
}

/// The `count` largest logits with their ids, largest first, the lowest id among equals.
fn best(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, logit) in logits.iter().enumerate() {
        let worst = if best.len() < count { f32::NEG_INFINITY } else { threshold(&best) };
        if *logit > worst {
            let place = best.partition_point(|(_, other)| other >= logit);
            best.insert(place, (id as u32, *logit));
            best.truncate(count);
        }
    }
    best
}

/// What a logit has to exceed to enter a full list. An empty one is full when none is asked for.
fn threshold(best: &[(u32, f32)]) -> f32 {
    best.last().map_or(f32::INFINITY, |(_, logit)| *logit)
}

struct Largest<'a> {
    logits: &'a [f32],
}

impl Kernel for Largest<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let (chunks, tail) = self.logits.as_chunks::<LANES>();
        let mut largest = simd.splat(f32::NEG_INFINITY);
        for chunk in chunks {
            largest = simd.max(simd.load(chunk), largest);
        }
        largest = simd.max(simd.load_part(tail, f32::NEG_INFINITY), largest);
        let mut lanes = [0.0; LANES];
        simd.store(largest, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Sum of e^(logit - largest): f32 within 64 vectors, f64 from there on.
struct SumExp<'a> {
    logits: &'a [f32],
    largest: f32,
}

impl Kernel for SumExp<'_> {
    type Out = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        let shift = simd.splat(self.largest);
        let nothing = simd.splat(f32::NEG_INFINITY);
        let mut total = 0.0;
        for block in self.logits.chunks(64 * LANES) {
            let (chunks, tail) = block.as_chunks::<LANES>();
            let mut part = simd.splat(0.0);
            for chunk in chunks {
                let x = simd.max(simd.sub(simd.load(chunk), shift), nothing);
                part = simd.add(part, exp(simd, x));
            }
            let x = simd.sub(simd.load_part(tail, f32::NEG_INFINITY), shift);
            part = simd.add(part, exp(simd, simd.max(x, nothing)));
            total += f64::from(sum(simd, part));
        }
        total
    }
}

struct Weights<'a> {
    logits: &'a [f32],
    weight: Weight,
    out: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        zip_map(simd, self.logits, self.logits, self.out, self.weight);
    }
}

struct Weight {
    largest: f32,
    temperature: f32,
}

impl Map for Weight {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, logit: S::V, _: S::V) -> S::V {
        let below = simd.sub(logit, simd.splat(self.largest));
        let scaled = simd.div(below, simd.splat(self.temperature));
        exp(simd, simd.max(scaled, simd.splat(f32::NEG_INFINITY)))
    }
}
