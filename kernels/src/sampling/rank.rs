//! The best tokens of a row without sorting it.
//!
//! Weights are in [0, 1], and the bits of such floats order as the floats do. Dropping the low 20
//! bits leaves about a thousand buckets, eight for each power of two: one pass counts them, a walk
//! over the buckets finds the one where the last kept token is, and only that one is sorted.

use super::softmax;
use crate::Isa;

/// Memory for one row at a time, to be used again.
#[derive(Default)]
pub struct Scratch {
    /// Of every token, relative to the best one, which has 1.
    weights: Vec<f32>,
    /// Tokens that are left, ascending.
    kept: Vec<u32>,
    /// Tokens of one bucket.
    bucket: Vec<u32>,
    /// Of the tokens in each bucket: how many, and the sum of their weights.
    histogram: Vec<(usize, f64)>,
}

impl Scratch {
    /// No memory yet.
    pub fn new() -> Scratch {
        Scratch::default()
    }

    /// Takes a row. Tokens of weight 0 are out.
    pub(super) fn weigh(&mut self, isa: Isa, logits: &[f32], largest: f32, temperature: f32) {
        self.weights.resize(logits.len(), 0.0);
        softmax::weights(isa, logits, largest, temperature, &mut self.weights);
        self.kept.clear();
        let ids = 0..logits.len() as u32;
        self.kept.extend(ids.filter(|id| self.weights[*id as usize] > 0.0));
    }

    /// Keeps the `count` best.
    pub(super) fn keep_count(&mut self, count: usize) {
        if count < self.kept.len() {
            self.keep_until(|tokens, _| tokens >= count);
        }
    }

    /// Keeps the fewest best tokens that have this share of the weight that is left; at least one.
    pub(super) fn keep_mass(&mut self, share: f64) {
        let goal = share * self.total();
        self.keep_until(|_, mass| mass >= goal);
    }

    /// Keeps the tokens that have at least this weight relative to the best one; at least that one.
    pub(super) fn keep_weight(&mut self, least: f32) {
        let weights = &self.weights;
        let least = least.min(1.0);
        self.kept.retain(|id| weights[*id as usize] >= least);
    }

    /// Takes the token at a place in [0, 1) when the kept ones lie side by side in order of id,
    /// each as wide as its weight.
    pub(super) fn draw(&self, place: f64) -> Option<u32> {
        let target = place * self.total();
        let mut sum = 0.0;
        let hit = |id: &&u32| {
            sum += f64::from(self.weights[**id as usize]);
            sum > target
        };
        self.kept.iter().find(hit).or(self.kept.last()).copied()
    }

    fn total(&self) -> f64 {
        self.kept.iter().map(|id| f64::from(self.weights[*id as usize])).sum()
    }

    /// Keeps the best tokens up to the first at which `enough(tokens, their weight)` holds.
    fn keep_until(&mut self, enough: impl Fn(usize, f64) -> bool) {
        let Scratch { weights, kept, bucket, histogram } = self;
        let weight = |id: u32| weights[id as usize];
        histogram.clear();
        histogram.resize(bucket_of(0.0) + 1, (0, 0.0));
        for id in kept.iter() {
            let (tokens, mass) = &mut histogram[bucket_of(weight(*id))];
            *tokens += 1;
            *mass += f64::from(weight(*id));
        }
        let (mut tokens, mut mass) = (0, 0.0);
        let crossing = histogram.iter().position(|(more_tokens, more_mass)| {
            let crossed = enough(tokens + more_tokens, mass + more_mass);
            if !crossed {
                (tokens, mass) = (tokens + more_tokens, mass + more_mass);
            }
            crossed
        });
        // Rounding may leave the sum of all just below the goal: then everything is kept.
        let Some(crossing) = crossing else { return };
        bucket.clear();
        bucket.extend(kept.iter().filter(|id| bucket_of(weight(**id)) == crossing));
        let better = |a: &u32, b: &u32| weight(*b).total_cmp(&weight(*a)).then(a.cmp(b));
        bucket.sort_unstable_by(better);
        let last = bucket.iter().find(|id| {
            (tokens, mass) = (tokens + 1, mass + f64::from(weight(**id)));
            enough(tokens, mass)
        });
        // The same weights in another order may sum to a little less: then the bucket is kept.
        if let Some(last) = last.or(bucket.last()) {
            kept.retain(|id| better(id, last).is_le());
        }
    }
}

/// 0 for the weight 1; larger for smaller weights.
fn bucket_of(weight: f32) -> usize {
    (1.0f32.to_bits().saturating_sub(weight.to_bits()) >> 20) as usize
}
