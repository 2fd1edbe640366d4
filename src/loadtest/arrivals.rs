//! Random moments and numbers that are the same for the same seed.

use std::time::Duration;

/// SplitMix64 (Steele, Lea, Flood, 2014): one addition and three mixes for a number.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Above 0, at most 1.
    fn share(&mut self) -> f64 {
        ((self.number() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Below `n`, which is at least 1.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.number() % n as u64) as usize
    }
}

/// Moments since the start, `rate` a second on average, each independent of all others.
pub(super) fn poisson(rate: f64, seed: u64) -> impl Iterator<Item = Duration> {
    let (mut dice, mut moment) = (Dice::new(seed), 0.0);
    std::iter::repeat_with(move || {
        moment -= dice.share().ln() / rate;
        Duration::try_from_secs_f64(moment).unwrap_or(Duration::MAX)
    })
}

/// How long client number `client` thinks each time, `mean` on average and exponentially
/// distributed: people are not in step, and clients that thought equally long would come together
/// for ever when they came together once.
pub(super) fn thinking(mean: Duration, seed: u64, client: u64) -> impl Iterator<Item = Duration> {
    let mut dice = Dice::new(seed.wrapping_mul(0x1_0000_0001) ^ client);
    // Two neighbouring clients would else begin alike.
    dice.number();
    std::iter::repeat_with(move || mean.mul_f64(-dice.share().ln()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_those_of_a_poisson_process() {
        let moments: Vec<f64> = poisson(50.0, 7).take(20_000).map(|m| m.as_secs_f64()).collect();
        let gaps: Vec<f64> = moments.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // Exponential gaps: the deviation is as large as the mean, and e^-1 of them exceed it.
        let longer = gaps.iter().filter(|gap| **gap > mean).count() as f64 / gaps.len() as f64;
        assert!((mean * 50.0 - 1.0).abs() < 0.03, "{mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.04, "{variance}");
        assert!((longer - (-1.0f64).exp()).abs() < 0.015, "{longer}");
    }

    #[test]
    fn clients_think_as_long_as_asked_and_not_in_step() {
        let mean = Duration::from_secs(3);
        let of = |client| thinking(mean, 1, client).map(|t| t.as_secs_f64());
        let of_one = of(0).take(20_000).sum::<f64>() / 20_000.0;
        let of_first = (0..20_000).filter_map(|client| of(client).next()).collect::<Vec<_>>();
        let longer = of_first.iter().filter(|s| **s > 3.0).count() as f64 / 20_000.0;
        assert!((of_one - 3.0).abs() < 0.1, "{of_one}");
        assert!((of_first.iter().sum::<f64>() / 20_000.0 - 3.0).abs() < 0.1);
        assert!((longer - (-1.0f64).exp()).abs() < 0.015, "{longer}");
        assert_eq!(thinking(Duration::ZERO, 1, 0).next(), Some(Duration::ZERO));
    }

    #[test]
    fn a_seed_is_a_sequence() {
        let first = |seed| poisson(1.0, seed).take(5).collect::<Vec<_>>();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }
}
