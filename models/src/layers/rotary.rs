//! Rotary position embedding: frequencies once, cosines and sines for the rows of a batch.
//!
//! Angles are computed in f64 from the position, so a row's table depends on its position alone.
//! Layers with a window may turn at frequencies of their own (Gemma 3).

use crate::config::{ModelConfig, RopeConfig, RopeScaling, yarn_temperature};

/// Frequencies of all layers.
#[derive(Clone, Debug)]
pub struct Rotaries {
    /// Of layers that look back at everything, and of the others where these have none.
    pub global: Rotary,
    /// Of layers with a window.
    pub local: Option<Rotary>,
}

impl Rotaries {
    /// The frequencies that a model asks for.
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            global: Rotary::new(&config.rope),
            local: config.local_rope.as_ref().map(Rotary::new),
        }
    }
}

/// Frequencies of some layers.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// Radians per position. `[dim / 2]`
    frequencies: Vec<f64>,
    /// Multiplies cosines and sines (YaRN's temperature).
    scale: f64,
}

/// Cosines and sines of the rows of one batch. `[T, dim / 2]` each.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
    /// Elements of a head that rotate.
    pub dim: usize,
}

impl Rotary {
    /// The frequencies that a configuration asks for.
    pub fn new(config: &RopeConfig) -> Self {
        let half = config.dim / 2;
        let plain: Vec<f64> =
            (0..half).map(|i| config.base.powf(-((2 * i) as f64) / config.dim as f64)).collect();
        let mut scale = 1.0;
        let frequencies = match &config.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain.iter().map(|f| f / factor).collect(),
            RopeScaling::Divisors(divisors) => {
                plain.iter().zip(divisors).map(|(f, d)| f / f64::from(*d)).collect()
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context_len,
            } => plain
                .iter()
                .map(|f| {
                    let waves = original_context_len * f / std::f64::consts::TAU;
                    let keep = (waves - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    blend(f / factor, *f, keep)
                })
                .collect(),
            &RopeScaling::Yarn {
                factor,
                original_context_len,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                scale = attention_factor.unwrap_or(yarn_temperature(factor, 1.0));
                // The dimension that makes this many rotations over the original context.
                let dimension = |rotations: f64| {
                    let wave = original_context_len / (rotations * std::f64::consts::TAU);
                    config.dim as f64 * wave.ln() / (2.0 * config.base.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min((config.dim - 1) as f64));
                let width = if high > low { high - low } else { 0.001 };
                let ramp = |i: usize| 1.0 - (i as f64 - low) / width;
                plain.iter().enumerate().map(|(i, f)| blend(f / factor, *f, ramp(i))).collect()
            }
        };
        Self { frequencies, scale }
    }

    /// Tables for rows at these positions.
    pub fn table(&self, positions: &[u32]) -> RopeTable {
        let half = self.frequencies.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for &position in positions {
            for frequency in &self.frequencies {
                let (s, c) = (f64::from(position) * frequency).sin_cos();
                cos.push((c * self.scale) as f32);
                sin.push((s * self.scale) as f32);
            }
        }
        RopeTable { cos, sin, dim: half * 2 }
    }
}

/// By what each frequency is divided. `[dim / 2]`
pub(crate) fn divisors(config: &RopeConfig) -> Vec<f32> {
    let plain = Rotary::new(&RopeConfig { scaling: RopeScaling::None, ..config.clone() });
    let scaled = Rotary::new(config);
    let pairs = plain.frequencies.iter().zip(&scaled.frequencies);
    pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect()
}

/// `low` at weight 0, `high` at weight 1, a line between, flat outside.
fn blend(low: f64, high: f64, weight: f64) -> f64 {
    let weight = weight.clamp(0.0, 1.0);
    low * (1.0 - weight) + high * weight
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotary(scaling: RopeScaling) -> Rotary {
        Rotary::new(&RopeConfig { base: 10_000.0, dim: 8, scaling })
    }

    #[test]
    fn plain_frequencies_are_powers_of_the_base() {
        let got = rotary(RopeScaling::None).frequencies;
        for (i, want) in [1.0, 0.1, 0.01, 0.001].into_iter().enumerate() {
            assert!((got[i] - want).abs() < 1e-12, "{i}: {} != {want}", got[i]);
        }
    }

    #[test]
    fn llama3_keeps_short_waves_and_divides_long_ones() {
        let got = rotary(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context_len: 64.0,
        })
        .frequencies;
        assert_eq!(got[0], 1.0, "64 positions are ten waves: kept");
        assert!((got[2] - 0.01 / 8.0).abs() < 1e-12, "a tenth of a wave: divided");
        assert!(got[1] < 0.1 && got[1] > 0.1 / 8.0 - 1e-12);
    }

    #[test]
    fn yarn_scales_cosines_by_its_temperature() {
        let yarn = rotary(RopeScaling::Yarn {
            factor: 4.0,
            original_context_len: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            truncate: true,
        });
        let table = yarn.table(&[0]);
        assert!((f64::from(table.cos[0]) - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-6);
        assert_eq!(table.sin[0], 0.0);
    }
}
