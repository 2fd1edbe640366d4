//! Rows of the one table that everything here prints.

use std::error::Error;

/// One measurement.
pub struct Row {
    model: String,
    what: String,
    ms: Option<f64>,
    tokens: Option<f64>,
    rate: String,
    part: String,
    target: String,
}

impl Row {
    /// The names of the columns.
    pub fn head() {
        println!("| model | what | ms | tokens/s | rate | of what is possible | target (H200) |");
        println!("|---|---|---|---|---|---|---|");
    }

    pub fn new(model: &str, what: impl Into<String>) -> Self {
        let (rate, part, target) = Default::default();
        Self { model: model.into(), what: what.into(), ms: None, tokens: None, rate, part, target }
    }

    pub fn ms(self, ms: f64) -> Self {
        Self { ms: Some(ms), ..self }
    }

    pub fn tokens(self, per_s: f64) -> Self {
        Self { tokens: Some(per_s), ..self }
    }

    pub fn rate(self, rate: String) -> Self {
        Self { rate, ..self }
    }

    pub fn part(self, part: String) -> Self {
        Self { part, ..self }
    }

    /// What was wanted, and whether it was reached.
    pub fn target(self, wanted: &str, reached: bool) -> Self {
        let outcome = if reached { "met" } else { "missed" };
        Self { target: format!("{wanted}: {outcome}"), ..self }
    }

    pub fn print(self) {
        let number = |x: Option<f64>| x.map_or_else(String::new, digits);
        let (ms, tokens) = (number(self.ms), number(self.tokens));
        let Self { model, what, rate, part, target, .. } = self;
        println!("| {model} | {what} | {ms} | {tokens} | {rate} | {part} | {target} |");
    }

    /// There is no number.
    pub fn failed(self, error: &dyn Error) {
        self.part(format!("failed: {error}")).print();
    }
}

/// Three digits, or all before the point.
pub fn digits(x: f64) -> String {
    match x {
        x if x < 10.0 => format!("{x:.2}"),
        x if x < 100.0 => format!("{x:.1}"),
        x => format!("{x:.0}"),
    }
}

/// The middle one; of an empty list, not a number.
pub fn median(times: &[f64]) -> f64 {
    percentile(times, 50)
}

/// The value that so many percent do not exceed.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len => values[(len - 1) * percent / 100],
    }
}
