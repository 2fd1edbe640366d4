//! Percentiles, by one definition everywhere.

use serde::Serialize;

/// How values of one kind are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Arithmetic mean.
    pub mean: f64,
    /// Half are below.
    pub p50: f64,
    /// 90 of 100 are below.
    pub p90: f64,
    /// 95 of 100 are below.
    pub p95: f64,
    /// 99 of 100 are below.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Percentiles {
    /// `None` of no value at all.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        let at = |p| percentile(&values, p);
        Some(Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(50.0),
            p90: at(90.0),
            p95: at(95.0),
            p99: at(99.0),
            max,
        })
    }
}

/// The value below which `p` percent of the `sorted` values lie, between neighbours in proportion:
/// the definition of NumPy and R (type 7 of Hyndman and Fan, 1996). NaN of no value.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = last as f64 * p / 100.0;
    let below = (place as usize).min(last);
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_numpy() {
        // numpy.percentile([15, 20, 35, 40, 50], [0, 5, 30, 40, 95, 99, 100])
        let values = [15.0, 20.0, 35.0, 40.0, 50.0];
        for (p, expected) in [
            (0.0, 15.0),
            (5.0, 16.0),
            (30.0, 23.0),
            (40.0, 29.0),
            (50.0, 35.0),
            (95.0, 48.0),
            (99.0, 49.6),
            (100.0, 50.0),
        ] {
            assert!((percentile(&values, p) - expected).abs() < 1e-9, "{p}");
        }
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert!(percentile(&[], 50.0).is_nan());
    }

    #[test]
    fn a_hundred_and_one_values_are_their_own_percentiles() {
        let values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        let spread = Percentiles::of(values).unwrap();
        let expected =
            Percentiles { mean: 50.0, p50: 50.0, p90: 90.0, p95: 95.0, p99: 99.0, max: 100.0 };
        assert_eq!(spread, expected);
        assert_eq!(Percentiles::of(Vec::new()), None);
    }
}
