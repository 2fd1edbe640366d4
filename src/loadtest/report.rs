//! From records to figures: one point for each pressure, in JSON and in words.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::request::Record;
use super::stats::Percentiles;
use super::{Pressure, Server};
use crate::client::Failed;

/// What a request must reach to count as good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Slo {
    /// Longest time to the first token in milliseconds.
    pub ttft_ms: Option<f64>,
    /// Longest mean time of a later token in milliseconds.
    pub itl_ms: Option<f64>,
}

/// All points of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Version of this program.
    pub hearth: &'static str,
    /// Base URL of the server.
    pub url: String,
    /// The model that was asked.
    pub model: String,
    /// `chat/completions` or `completions`.
    pub endpoint: &'static str,
    /// Tokens of an answer at most.
    pub max_tokens: usize,
    /// Seconds that a client of a closed loop thinks before a question, on average.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub think_s: Option<f64>,
    /// Seconds between the first questions of the clients of a closed loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stagger_s: Option<f64>,
    /// What was to be reached.
    pub slo: Slo,
    /// In the order in which they were measured.
    pub points: Vec<Point>,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Of a closed loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clients: Option<usize>,
    /// Requests a second of an open loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Sent or due, answered or not.
    pub requests: usize,
    /// Answered to the end.
    pub answered: usize,
    /// Others, by kind.
    pub errors: BTreeMap<String, ErrorCount>,
    /// From the start to the last answer.
    pub wall_s: f64,
    /// Answered requests by wall time.
    pub requests_per_s: f64,
    /// Tokens of answers by wall time.
    pub output_tokens_per_s: f64,
    /// Mean of the answered; absent where the server does not say.
    pub prompt_tokens_mean: Option<f64>,
    /// Mean of the answered.
    pub output_tokens_mean: f64,
    /// Answered requests within the objective, by wall time.
    pub goodput_per_s: f64,
    /// Part of all requests that were answered within the objective, 0 to 1.
    pub good_share: f64,
    /// To the first token.
    pub ttft_ms: Option<Percentiles>,
    /// Between pieces of an answer.
    pub itl_ms: Option<Percentiles>,
    /// To the end.
    pub e2e_ms: Option<Percentiles>,
}

/// Errors of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ErrorCount {
    /// How many.
    pub count: usize,
    /// What the first one said.
    pub message: String,
}

impl Report {
    /// Without points.
    pub fn new(server: &Server, slo: Slo) -> Self {
        Self {
            hearth: env!("CARGO_PKG_VERSION"),
            url: server.url().to_owned(),
            model: server.model.clone(),
            endpoint: if server.completions { "completions" } else { "chat/completions" },
            max_tokens: server.max_tokens,
            think_s: None,
            stagger_s: None,
            slo,
            points: Vec::new(),
        }
    }
}

impl Slo {
    fn holds(&self, record: &Record) -> bool {
        let within = |limit_ms: Option<f64>, s: Option<f64>| match (limit_ms, s) {
            (Some(limit_ms), Some(s)) => s * 1e3 <= limit_ms,
            _ => true,
        };
        within(self.ttft_ms, Some(record.ttft_s())) && within(self.itl_ms, record.token_s())
    }
}

impl Point {
    /// The figures of one measurement.
    pub fn of(pressure: Pressure, records: &[Record], wall_s: f64, slo: &Slo) -> Self {
        let answered: Vec<&Record> = records.iter().filter(|r| r.failed.is_none()).collect();
        let mean = |sum: usize, of: usize| sum as f64 / of.max(1) as f64;
        let (clients, rate) = match pressure {
            Pressure::Clients(clients) => (Some(clients), None),
            Pressure::Rate(rate) => (None, Some(rate)),
        };
        let ms = |values: Vec<f64>| Percentiles::of(values.iter().map(|s| s * 1e3).collect());
        let prompts: Vec<usize> = answered.iter().filter_map(|r| r.prompt_tokens).collect();
        let output: usize = answered.iter().map(|r| r.output_tokens).sum();
        let good = answered.iter().filter(|record| slo.holds(record)).count();
        Self {
            clients,
            rate,
            requests: records.len(),
            answered: answered.len(),
            errors: errors(records.iter().filter_map(|r| r.failed.as_ref())),
            wall_s,
            requests_per_s: answered.len() as f64 / wall_s,
            output_tokens_per_s: output as f64 / wall_s,
            prompt_tokens_mean: (!prompts.is_empty())
                .then(|| mean(prompts.iter().sum(), prompts.len())),
            output_tokens_mean: mean(output, answered.len()),
            goodput_per_s: good as f64 / wall_s,
            good_share: mean(good, records.len()),
            ttft_ms: ms(answered.iter().map(|r| r.ttft_s()).collect()),
            itl_ms: ms(answered.iter().flat_map(|r| r.gaps_s()).collect()),
            e2e_ms: ms(answered.iter().map(|r| r.e2e_s()).collect()),
        }
    }

    /// Clients, or requests a second.
    pub fn pressure(&self) -> f64 {
        self.rate.or(self.clients.map(|n| n as f64)).unwrap_or_default()
    }
}

fn errors<'a>(failures: impl Iterator<Item = &'a Failed>) -> BTreeMap<String, ErrorCount> {
    let mut errors = BTreeMap::new();
    for failed in failures {
        let message = failed.message.clone();
        let entry = errors.entry(failed.kind.clone()).or_insert(ErrorCount { count: 0, message });
        entry.count += 1;
    }
    errors
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = self.requests - self.answered;
        match (self.clients, self.rate) {
            (Some(clients), _) => write!(f, "{clients} clients: ")?,
            (None, rate) => write!(f, "{} requests/s: ", rate.unwrap_or_default())?,
        }
        writeln!(f, "{} answered, {failed} failed in {:.1} s", self.answered, self.wall_s)?;
        let prompt = self.prompt_tokens_mean.map_or("?".to_owned(), |n| format!("{n:.0}"));
        writeln!(
            f,
            "  {:.1} output tokens/s, {:.2} requests/s ({prompt} tokens in, {:.0} out each)",
            self.output_tokens_per_s, self.requests_per_s, self.output_tokens_mean
        )?;
        writeln!(
            f,
            "  {:.2} requests/s within the objective, {:.1} % of all",
            self.goodput_per_s,
            self.good_share * 100.0
        )?;
        let heads = ["mean", "p50", "p90", "p95", "p99", "max"];
        write!(f, "  {:<20}", "ms")?;
        heads.iter().try_for_each(|head| write!(f, "{head:>10}"))?;
        let rows = [
            ("to the first token", &self.ttft_ms),
            ("between tokens", &self.itl_ms),
            ("to the end", &self.e2e_ms),
        ];
        for (name, spread) in rows {
            let Some(p) = spread else { continue };
            write!(f, "\n  {name:<20}")?;
            let values = [p.mean, p.p50, p.p90, p.p95, p.p99, p.max];
            values.iter().try_for_each(|value| write!(f, "{value:>10.1}"))?;
        }
        for (kind, error) in &self.errors {
            let message = error.message.escape_debug();
            write!(f, "\n  {} x {kind}: {message}", error.count)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(due_s: f64, pieces_s: &[f64], end_s: f64) -> Record {
        Record {
            due_s,
            pieces_s: pieces_s.to_vec(),
            end_s,
            output_tokens: pieces_s.len(),
            prompt_tokens: Some(10),
            failed: None,
        }
    }

    #[test]
    fn figures_are_those_of_the_records() {
        let records = [
            answer(0.0, &[0.1, 0.2, 0.3], 0.3),
            answer(1.0, &[1.5, 1.6], 1.6),
            Record::failed(1.0, Failed::new("status 429", "later")),
            Record::failed(1.0, Failed::new("status 429", "later still")),
            Record::failed(1.0, Failed::new("timeout", "")),
        ];
        let slo = Slo { ttft_ms: Some(200.0), itl_ms: Some(100.1) };
        let point = Point::of(Pressure::Clients(2), &records, 2.0, &slo);
        assert_eq!((point.requests, point.answered), (5, 2));
        assert_eq!(point.errors["status 429"], ErrorCount { count: 2, message: "later".into() });
        assert_eq!((point.output_tokens_per_s, point.requests_per_s), (2.5, 1.0));
        assert_eq!((point.goodput_per_s, point.good_share), (0.5, 0.2));
        let near = |value: f64, expected: f64| (value - expected).abs() < 1e-9;
        assert!(near(point.ttft_ms.unwrap().p50, 300.0) && near(point.e2e_ms.unwrap().max, 600.0));
        assert!(near(point.itl_ms.unwrap().p99, 100.0), "{point:?}");
        let text = point.to_string();
        assert!(text.contains("2 answered, 3 failed") && text.contains("2 x status 429: later"));
    }

    #[test]
    fn the_objective_looks_at_both_limits() {
        let record = answer(0.0, &[0.1, 0.3], 0.3);
        let holds = |ttft_ms, itl_ms| Slo { ttft_ms, itl_ms }.holds(&record);
        assert!(holds(None, None) && holds(Some(101.0), Some(201.0)));
        assert!(!holds(Some(99.0), None) && !holds(None, Some(199.0)));
        // One token has no gap to be late in.
        let one = answer(0.0, &[0.1], 0.1);
        assert!(Slo { ttft_ms: None, itl_ms: Some(0.001) }.holds(&one));
    }

    #[test]
    fn nothing_answered_is_a_point_too() {
        let records = [Record::failed(0.0, Failed::new("connect", "refused"))];
        let point = Point::of(Pressure::Rate(2.0), &records, 1.0, &Slo::default());
        assert_eq!((point.ttft_ms, point.good_share, point.pressure()), (None, 0.0, 2.0));
        assert!(point.to_string().contains("1 x connect: refused"));
    }
}
