//! `hearth bench`: prefill and decode speed of a model, without scheduler and server.

mod serve;

use std::io::{self, Write};
use std::time::Instant;

use hearth_models::{ForwardBatch, KvStore, Model};
use serde::Serialize;

use super::common::Common;
use super::{Failure, open};
use crate::config::ModelArgs;
use crate::registry::plan::BLOCK_LEN;

#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    /// Prompt lengths in tokens.
    #[arg(long, short = 'p', value_delimiter = ',', default_values_t = [128, 512])]
    prefill: Vec<usize>,
    /// Rows of a prompt in one step, at most.
    #[arg(long, default_value_t = 512)]
    batch_tokens: usize,
    /// Sequences that decode at once.
    #[arg(long, short = 'b', value_delimiter = ',', default_values_t = [1, 8])]
    batch: Vec<usize>,
    /// Keys before the first decoded token.
    #[arg(long, short = 'd', value_delimiter = ',', default_values_t = [0])]
    depth: Vec<usize>,
    /// Rows of each sequence in a step of decoding: the newest token, and tokens that are proposed.
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    rows: Vec<usize>,
    /// Steps of decoding.
    #[arg(long, short = 'n', default_value_t = 64)]
    decode: usize,
    /// Runs of each; the median is shown.
    #[arg(long, short = 'r', default_value_t = 5)]
    repeat: usize,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    common: Common<ModelArgs>,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum BenchCommand {
    /// Load a server that speaks the OpenAI API, and measure what its clients feel.
    Serve(serve::ServeArgs),
}

/// One measured cell.
#[derive(Debug, Serialize)]
struct Row {
    model: String,
    test: &'static str,
    /// Sequences.
    batch: usize,
    /// Rows of each of them in a step, at most.
    rows: usize,
    /// Tokens computed by each sequence in a run.
    tokens: usize,
    /// Keys of each sequence before.
    depth: usize,
    /// All sequences together, median of the runs.
    tokens_per_s: f64,
    tokens_per_s_min: f64,
    tokens_per_s_max: f64,
    /// Median of the runs.
    ms_per_step: f64,
}

impl Row {
    /// One line.
    fn write(&self, out: &mut impl Write, json: bool) -> Result<(), Failure> {
        if json {
            return Ok(writeln!(out, "{}", serde_json::to_string(self)?)?);
        }
        let Self { test, batch, rows, depth, tokens, tokens_per_s, ms_per_step, .. } = self;
        let (min, max) = (self.tokens_per_s_min, self.tokens_per_s_max);
        write!(out, "{test:<8} {batch:>6} {rows:>5} {depth:>7} {tokens:>7} {tokens_per_s:>10.1}")?;
        Ok(writeln!(out, "  [{min:.1}, {max:.1}]  {ms_per_step:.2} ms")?)
    }
}

pub(super) fn run(mut args: BenchArgs) -> Result<(), Failure> {
    match args.command.take() {
        Some(BenchCommand::Serve(args)) => serve::run(args),
        None => model(args),
    }
}

/// The model alone.
fn model(args: BenchArgs) -> Result<(), Failure> {
    let config = args.common.clone().validate_one()?;
    args.check_counts()?;
    let name = &open::names(&config)?[0];
    let out = &mut io::stdout().lock();
    let compute = open::compute(&config)?;
    let file = open::named(name, config.quantize)?;
    args.check_lengths(file.config().context_len)?;
    let started = Instant::now();
    let model = file.load(&compute, &mut |_| {})?;
    if !args.json {
        let load_s = started.elapsed().as_secs_f64();
        writeln!(out, "{name}, {}, loaded in {load_s:.2} s", compute.describe())?;
        writeln!(
            out,
            "{:<8} {:>6} {:>5} {:>7} {:>7} {:>10}  [least, most]  of a step",
            "test", "batch", "rows", "depth", "tokens", "tokens/s"
        )?;
    }
    let mut measure = |work: Work| -> Result<(), Failure> {
        let case = Case::new(&*model, config.plan.kv_dtype, work.batch, work.depth + work.tokens)?;
        work.measure(case, name, args.repeat)?.write(out, args.json)
    };
    for &tokens in &args.prefill {
        let rows = tokens.min(args.batch_tokens);
        measure(Work { test: "prefill", batch: 1, rows, depth: 0, tokens })?;
    }
    for &depth in &args.depth {
        for &batch in &args.batch {
            for &rows in &args.rows {
                let tokens = rows * args.decode;
                measure(Work { test: "decode", batch, rows, depth, tokens })?;
            }
        }
    }
    Ok(())
}

/// One cell to measure.
#[derive(Clone, Copy)]
struct Work {
    test: &'static str,
    /// Sequences.
    batch: usize,
    /// Rows of each of them in a step, at most.
    rows: usize,
    /// Keys of each sequence before.
    depth: usize,
    /// Tokens computed by each sequence in a run.
    tokens: usize,
}

impl Work {
    /// `repeat` runs behind one that does not count.
    fn measure(self, mut case: Case<'_>, model: &str, repeat: usize) -> Result<Row, Failure> {
        let Self { test, batch, rows, depth, tokens } = self;
        case.fill(0, depth, BenchArgs::FILL, 1)?;
        let mut speeds = Vec::new();
        for counted in 0..=repeat {
            let started = Instant::now();
            let wanted = if test == "prefill" { 1 } else { rows };
            case.fill(depth, tokens, rows, wanted)?;
            if counted > 0 {
                speeds.push((batch * tokens) as f64 / started.elapsed().as_secs_f64());
            }
        }
        speeds.sort_by(f64::total_cmp);
        let median = speeds[speeds.len() / 2];
        Ok(Row {
            model: model.to_owned(),
            test,
            batch,
            rows,
            tokens,
            depth,
            tokens_per_s: median,
            tokens_per_s_min: speeds[0],
            tokens_per_s_max: speeds[speeds.len() - 1],
            ms_per_step: (batch * rows) as f64 * 1e3 / median,
        })
    }
}

impl BenchArgs {
    /// Rows of a step that fills the keys before what is measured.
    const FILL: usize = 512;

    /// Counts are at least 1.
    fn check_counts(&self) -> Result<(), Failure> {
        let counts = [
            ("--prefill", &*self.prefill),
            ("--batch-tokens", &[self.batch_tokens]),
            ("--batch", &*self.batch),
            ("--rows", &*self.rows),
            ("--decode", &[self.decode]),
            ("--repeat", &[self.repeat]),
        ];
        match counts.into_iter().find(|(_, counts)| counts.contains(&0)) {
            Some((flag, _)) => Err(format!("{flag} is at least 1").into()),
            None => Ok(()),
        }
    }

    /// What is measured fits into a context of `context_len` tokens.
    fn check_lengths(&self, context_len: usize) -> Result<(), Failure> {
        let depth = self.depth.iter().max().copied().unwrap_or(0);
        let rows = self.rows.iter().max().copied().unwrap_or(1);
        let decoded = depth.saturating_add(self.decode.saturating_mul(rows));
        let longest = self.prefill.iter().copied().chain([decoded]).max().unwrap_or(decoded);
        if longest > context_len {
            return Err(format!(
                "a sequence of {longest} tokens is longer than the {context_len} that this model \
                 was made for; lower --prefill, --depth or --decode"
            )
            .into());
        }
        Ok(())
    }
}

/// Sequences of one length side by side, each with its own blocks.
struct Case<'a> {
    model: &'a dyn Model,
    kv: KvStore,
    /// Blocks of each sequence.
    tables: Vec<Vec<u32>>,
}

impl<'a> Case<'a> {
    fn new(
        model: &'a dyn Model,
        kv_dtype: hearth_models::KvDType,
        batch: usize,
        len: usize,
    ) -> Result<Self, Failure> {
        let blocks = len.div_ceil(BLOCK_LEN).max(1);
        let kv = model.kv_store(model.config().kv_geometry(batch * blocks, BLOCK_LEN, kv_dtype))?;
        let table = |s: usize| (s * blocks..(s + 1) * blocks).map(|b| b as u32).collect();
        Ok(Self { model, kv, tables: (0..batch).map(table).collect() })
    }

    /// `len` tokens of every sequence from position `start`, in steps of at most `rows`; each has
    /// the logits of its last `wanted`.
    fn fill(
        &mut self,
        start: usize,
        len: usize,
        rows: usize,
        wanted: usize,
    ) -> Result<(), Failure> {
        let mut steps = (0..len).step_by(rows);
        steps.try_for_each(|at| self.step(start + at, rows.min(len - at), wanted))
    }

    /// `rows` tokens of every sequence from position `start`; logits of the last `wanted` of them.
    fn step(&mut self, start: usize, rows: usize, wanted: usize) -> Result<(), Failure> {
        let vocab = self.model.config().vocab_len;
        let mut batch = ForwardBatch::empty();
        for (s, table) in self.tables.iter().enumerate() {
            let token = |i: usize| ((s * 31 + (start + i) * 7) % vocab) as u32;
            let tokens: Vec<u32> = (0..rows).map(token).collect();
            batch.push(&tokens, start, table.clone(), BLOCK_LEN);
            let end = batch.row_count();
            batch.logit_rows.extend((end - wanted..end).map(|row| row as u32));
        }
        self.model.forward(&batch, &mut self.kv)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> BenchArgs {
        use clap::{Args, FromArgMatches};
        let command = BenchArgs::augment_args(clap::Command::new("bench"));
        BenchArgs::from_arg_matches(&command.get_matches_from(["bench"])).unwrap()
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        assert!(args().check_lengths(512).is_ok());
        let error = args().check_lengths(511).unwrap_err().to_string();
        assert!(error.contains("512 tokens") && error.contains("511"), "{error}");
        let deep = BenchArgs { depth: vec![0, 480], ..args() };
        assert!(deep.check_lengths(512).unwrap_err().to_string().contains("544"));
        assert!(BenchArgs { depth: vec![usize::MAX], ..args() }.check_lengths(512).is_err());
        for (bad, flag) in [
            (BenchArgs { batch: vec![1, 0], ..args() }, "--batch"),
            (BenchArgs { prefill: vec![0], ..args() }, "--prefill"),
            (BenchArgs { batch_tokens: 0, ..args() }, "--batch-tokens"),
            (BenchArgs { rows: vec![0], ..args() }, "--rows"),
            (BenchArgs { decode: 0, ..args() }, "--decode"),
            (BenchArgs { repeat: 0, ..args() }, "--repeat"),
        ] {
            assert!(bad.check_counts().unwrap_err().to_string().starts_with(flag));
        }
    }
}
