//! What the element type of keys and values costs: the perplexity of a model with each of them.
//!
//! `cargo run --release --example kv_perplexity [-- MODEL.gguf [--against OTHER.gguf]]`
//!
//! `hearth-tiny` is asked for the answers of its evaluation split. Another model reads what it made
//! up itself, sampled at temperature 1 with keys and values in f32. With `--against` the measure is
//! another model, which makes up the texts then: what the same weights in another type cost.

#[path = "builtin/mod.rs"]
mod builtin;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use hearth::registry::gguf_vocab;
use hearth::text::Tokenizer;
use hearth_kernels::Pool;
use hearth_models::train::{Example, Rng};
use hearth_models::weights::Weights;
use hearth_models::{Compute, ForwardBatch, KvDType, KvStore, Model};

use builtin::corpus::world::Split;
use builtin::corpus::{self, Lang, Task};

/// Measure what rounding keys and values costs.
#[derive(Debug, Parser)]
struct Args {
    /// A GGUF file.
    #[arg(default_value = builtin::PATH)]
    model: PathBuf,
    /// The same model in other weights, with keys and values in f32.
    #[arg(long)]
    against: Option<PathBuf>,
    /// Conversations of each task in each language.
    #[arg(long, default_value_t = 20)]
    count: usize,
    /// Texts of a model that makes up its own.
    #[arg(long, default_value_t = 64)]
    texts: usize,
}

const BLOCK_LEN: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let compute = Compute::Fused(Arc::new(Pool::new(hearth_kernels::pool::default_threads())));
    let load = |path: &Path| hearth_models::open(path)?.load(&compute, &mut |_| {});
    let model = load(&args.model)?;
    let other = args.against.as_deref().map(load).transpose()?;
    let measure = other.as_ref().unwrap_or(&model);
    let examples = match args.model == Path::new(builtin::PATH) {
        true => evaluation(&args)?,
        false => {
            (0..args.texts as u64).map(|seed| own(&**measure, seed)).collect::<Result<_, _>>()?
        }
    };
    let tokens: usize = examples.iter().map(|e| e.tokens.len()).sum();
    println!("{} texts, {tokens} tokens\n", examples.len());
    println!("| keys and values | perplexity | change | log-probabilities apart (rms) |");
    println!("|---|---|---|---|");
    let exact = scores(&**measure, KvDType::F32, &examples)?;
    for dtype in KvDType::ALL {
        let got = scores(&*model, dtype, &examples)?;
        let apart: f64 = got.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum();
        let (now, before) = (perplexity(&got), perplexity(&exact));
        println!(
            "| {} | {now:.5} | {:+.4} % | {:.1e} |",
            dtype.name(),
            100.0 * (now / before - 1.0),
            (apart / got.len() as f64).sqrt()
        );
    }
    Ok(())
}

/// What the assistant says in the evaluation split.
fn evaluation(args: &Args) -> Result<Vec<Example>, Box<dyn Error>> {
    let weights = Weights::open(&args.model)?;
    let meta = weights.metadata().ok_or("not a GGUF file")?;
    let encoder = builtin::Encoder::new(Tokenizer::from_gguf(&gguf_vocab(meta)?)?)?;
    let mut rng = Rng::new(11);
    let mut examples = Vec::new();
    for (lang, task) in Lang::ALL.iter().flat_map(|lang| Task::SCORED.map(|task| (*lang, task))) {
        for _ in 0..args.count {
            let conversation = corpus::question(&mut rng, (lang, task), Split::Eval);
            examples.push(encoder.example(&conversation, 0.0)?);
        }
    }
    Ok(examples)
}

/// A text as long as the model's context, 512 tokens at most, from the first token of its tokenizer
/// that opens a text.
fn own(model: &dyn Model, seed: u64) -> Result<Example, Box<dyn Error>> {
    let len = model.config().context_len.min(512);
    let mut kv = store(model, KvDType::F32, len)?;
    let mut tokens = vec![model.config().bos_id.unwrap_or(1)];
    let mut rng = Rng::new(seed);
    let table: Vec<u32> = (0..len.div_ceil(BLOCK_LEN) as u32).collect();
    while tokens.len() < len {
        let at = tokens.len() - 1;
        let mut batch = ForwardBatch::empty();
        batch.push(&tokens[at..], at, table.clone(), BLOCK_LEN);
        batch.logit_rows.push(0);
        let logits = model.forward(&batch, &mut kv)?;
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let chances: Vec<f64> = logits.iter().map(|x| f64::from(x - largest).exp()).collect();
        let mut left = rng.unit() * chances.iter().sum::<f64>();
        let chosen = chances.iter().take_while(|chance| {
            left -= **chance;
            left > 0.0
        });
        tokens.push(chosen.count().min(logits.len() - 1) as u32);
    }
    let weights = vec![1.0; tokens.len()];
    Ok(Example { tokens, weights })
}

/// Log-probabilities of all tokens that count.
fn scores(
    model: &dyn Model,
    dtype: KvDType,
    examples: &[Example],
) -> Result<Vec<f64>, Box<dyn Error>> {
    let vocab_len = model.config().vocab_len;
    let mut scores = Vec::new();
    for example in examples {
        let mut kv = store(model, dtype, example.tokens.len())?;
        let batch = ForwardBatch::whole(&example.tokens, 0, BLOCK_LEN);
        let logits = model.forward(&batch, &mut kv)?;
        let next = example.tokens.iter().zip(&example.weights).skip(1);
        for (row, (token, weight)) in logits.chunks_exact(vocab_len).zip(next) {
            if *weight > 0.0 {
                scores.push(log_probability(row, *token as usize));
            }
        }
    }
    Ok(scores)
}

fn store(model: &dyn Model, dtype: KvDType, len: usize) -> Result<KvStore, Box<dyn Error>> {
    let geometry = model.config().kv_geometry(len.div_ceil(BLOCK_LEN), BLOCK_LEN, dtype);
    Ok(model.kv_store(geometry)?)
}

fn log_probability(logits: &[f32], token: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
    f64::from(logits[token] - largest) - total.ln()
}

fn perplexity(scores: &[f64]) -> f64 {
    (-scores.iter().sum::<f64>() / scores.len() as f64).exp()
}
