//! The engine under load, on a real model: what a shared prefix saves, and what a long prompt costs
//! those who are being answered. `cargo bench --bench engine -- MODEL.gguf [prefix] [gap] [q8_0]`:
//! the last word is the type of keys and values, q16_0 where there is none.
//!
//! Prompts are random token ids: what a step costs does not depend on what is said.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth::config::PlanOptions;
use hearth::engine::handle::{EngineHandle, Event, GenerateRequest, Generation, SamplingParams};
use hearth::registry;
use hearth_kernels::Pool;
use hearth_models::{Compute, KvDType};

fn main() -> Result<(), Box<dyn Error>> {
    // Cargo adds `--bench`.
    let mut args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let named = args.last().and_then(|a| KvDType::ALL.into_iter().find(|t| t.name() == a));
    args.truncate(args.len() - usize::from(named.is_some()));
    let Some((model, parts)) = args.split_first() else {
        println!("no model: cargo bench --bench engine -- MODEL.gguf [prefix] [gap] [q8_0]");
        return Ok(());
    };
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let pool = Arc::new(Pool::new(hearth_kernels::pool::default_threads()));
    let compute = Compute::Fused(pool);
    let options = PlanOptions {
        ctx_size: Some(8192),
        running_len: 32,
        queue_len: 256,
        batch_tokens: 512,
        target_itl: Duration::from_millis(100),
        queue_timeout: None,
        kv_dtype: named.unwrap_or_default(),
        kv_prefault: false,
    };
    let model = registry::open(hearth_models::open(Path::new(model))?)?;
    let model = model.load_alone(&compute, &options)?;
    let engine = model.engine();
    ask(engine, &prompt(1, 200), 8); // the pace is learned, the pages are touched
    if wanted("prefix") {
        prefix(engine);
    }
    if wanted("gap") {
        gap(engine);
    }
    Ok(())
}

/// A classroom: the same 1,500 tokens before everybody's own 100.
fn prefix(engine: &EngineHandle) {
    let shared = prompt(2, 1500);
    let student = |i: u32| ask(engine, &[&shared[..], &prompt(200 + i, 100)].concat(), 1);
    let first = student(0);
    // In turns: a machine that changes its speed changes that of both.
    let both = |i: u32| (ask(engine, &prompt(100 + i, 100), 1), student(1 + i));
    let turns: Vec<(f64, f64)> = (0..25).map(both).collect();
    let ratios: Vec<f64> = turns.iter().map(|(alone, behind)| behind / alone).collect();
    let (alone, others): (Vec<f64>, Vec<f64>) = turns.into_iter().unzip();
    println!("100 tokens alone            {:7.0} ms", percentile(&alone, 50));
    println!("1,500 shared and 100 own    {first:7.0} ms for the first");
    println!("                            {:7.0} ms for the others", percentile(&others, 50));
    let [low, middle, high] = [25, 50, 75].map(|p| percentile(&ratios, p));
    println!("others / alone              {middle:7.2}, quartiles {low:.2} and {high:.2}");
}

/// Four answers run; a prompt of 4,000 tokens arrives.
fn gap(engine: &EngineHandle) {
    let streams: Vec<_> = (0..4).map(|i| submit(engine, &prompt(300 + i, 16), 4000)).collect();
    let start = Instant::now();
    let readers: Vec<_> =
        streams.into_iter().map(|s| std::thread::spawn(move || times(s))).collect();
    std::thread::sleep(Duration::from_secs(4));
    let arrived = Instant::now();
    let took = ask(engine, &prompt(3, 4000), 1);
    let answered = Instant::now();
    std::thread::sleep(Duration::from_secs(1));
    engine.drain(); // nothing new; readers are dropped below by their deadline
    let all: Vec<Vec<Instant>> = readers.into_iter().map(|r| r.join().expect("a reader")).collect();
    let between = |from: Instant, to: Instant| -> Vec<f64> {
        let pairs = all.iter().flat_map(|times| times.windows(2));
        let inside = pairs.filter(|pair| pair[0] >= from && pair[1] <= to);
        inside.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect()
    };
    let show = |what: &str, gaps: &[f64]| {
        let [p50, p95, max] = [50, 95, 100].map(|p| percentile(gaps, p));
        println!(
            "{what}  p50 {p50:6.1}  p95 {p95:6.1}  max {max:6.1} ms  p95/p50 {:.2}",
            p95 / p50
        );
    };
    show("gaps before the prompt    ", &between(start, arrived));
    show("gaps while it is computed ", &between(arrived, answered));
    println!("first token of 4,000 after  {took:7.0} ms");
}

/// When tokens came, for [`READ_FOR`].
fn times(mut generation: Generation) -> Vec<Instant> {
    let start = Instant::now();
    let mut times = Vec::new();
    while start.elapsed() < READ_FOR {
        match generation.blocking_next() {
            Some(Event::Token { .. }) => times.push(Instant::now()),
            Some(Event::Prompt { .. }) => {}
            _ => break,
        }
    }
    times
}

const READ_FOR: Duration = Duration::from_secs(40);

fn submit(engine: &EngineHandle, prompt: &[u32], max_tokens: usize) -> Generation {
    let request = GenerateRequest {
        prompt: prompt.to_vec(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens,
        ..GenerateRequest::default()
    };
    engine.submit(request).expect("it fits")
}

/// Milliseconds to the first token of an answer that is read to its end.
fn ask(engine: &EngineHandle, prompt: &[u32], max_tokens: usize) -> f64 {
    let start = Instant::now();
    let mut generation = submit(engine, prompt, max_tokens);
    let mut first = None;
    while let Some(event) = generation.blocking_next() {
        if let Event::Token { .. } = event {
            first.get_or_insert_with(|| start.elapsed());
        }
    }
    first.expect("a token").as_secs_f64() * 1e3
}

/// `len` token ids that differ by `seed`.
fn prompt(seed: u32, len: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        1000 + state % 30_000
    };
    (0..len).map(|_| next()).collect()
}

fn percentile(values: &[f64], p: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) * p / 100]
}
