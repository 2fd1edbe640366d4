//! What guessing ahead saves and costs, with real models and real answers: the same questions
//! without it and with it, in turns, the answers compared token by token.
//! `cargo bench --bench speculate -- [MODEL.gguf] [DRAFT.gguf]`; the built-in model where none is
//! named. Its questions are those of its evaluation; any other model is given beginnings of
//! stories.

#[path = "../examples/builtin/mod.rs"]
mod builtin;

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use builtin::corpus::world::Split;
use builtin::corpus::{self, Lang, Task};
use futures_util::{StreamExt, stream};
use hearth::config::RawConfig;
use hearth::engine::handle::{Speculation, Stats};
use hearth::pipeline::{Pipeline, Prompt, TextEvent, TextRequest};
use hearth::registry::{self, LoadOptions, Registry, plan};
use hearth::types::{SamplingOverrides, TokenId};
use hearth_kernels::Pool;
use hearth_models::Compute;
use hearth_models::train::Rng;
use serde_json::{Map, Value};

type Failure = Box<dyn Error>;

/// Counted rounds after one that is not.
const ROUNDS: usize = 5;
/// Questions of a workload.
const QUESTIONS: usize = 60;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let path = args.first().map_or(builtin::PATH, String::as_str);
    let mut sides = vec![open("off", path, false, None)?, open("ngram", path, true, None)?];
    if let Some(draft) = args.get(1) {
        sides.push(open("draft", path, false, Some(draft))?);
    }
    println!(
        "{:<28} {:>2}  {:<6} {:>8} {:>7} {:>9} {:>9} {:>9}  [least, most]",
        "workload", "at", "side", "tokens/s", "ratio", "proposed", "accepted", "tokens"
    );
    for (name, requests) in if args.is_empty() { chat_work() } else { story_work() } {
        for at_once in [1, 8] {
            compare(&name, at_once, &sides, &requests).await?;
        }
    }
    Ok(())
}

/// One way to serve the model.
struct Side {
    label: &'static str,
    pipeline: Pipeline,
    stats: Arc<Stats>,
}

fn open(
    label: &'static str,
    path: &str,
    lookup: bool,
    draft: Option<&str>,
) -> Result<Side, Failure> {
    let config = RawConfig::default().validate()?;
    let compute = Compute::Fused(Arc::new(Pool::new(config.threads)));
    let model = registry::open(hearth_models::open(Path::new(path))?)?;
    let bounds = |model: &registry::OpenModel| {
        let demands = [model.demand(&compute)];
        plan::plan(&demands, &config.plan, Some(4 << 30), 0).remove(0)
    };
    let mut speculation = Speculation { lookup, ..Speculation::default() };
    if let Some(path) = draft {
        let small = registry::open(hearth_models::open(Path::new(path))?)?;
        small.check_draft_of(&model, &compute)?;
        let limits = bounds(&small)?;
        speculation.draft = Some(small.load_draft(&compute, limits, &mut |_, _| {})?);
    }
    let served = LoadOptions {
        id: builtin::NAME.to_owned(),
        limits: bounds(&model)?,
        compute,
        kv_dtype: config.plan.kv_dtype,
        speculation,
        shelf: None,
        progress: &mut |_, _| {},
    };
    let model = model.load(served)?;
    let stats = Arc::clone(model.engine().stats());
    let pipeline = Pipeline::new(Arc::new(Registry::of(vec![model.into()])?));
    Ok(Side { label, pipeline, stats })
}

/// Answers that quote much, some, and nothing; the last kind is what a guess can only lose at.
fn chat_work() -> Vec<(String, Vec<TextRequest>)> {
    let ask = |task: Task, temperature: f32| {
        let mut rng = Rng::new(2026);
        let one = |i: usize| {
            let lang = Lang::ALL[i % Lang::ALL.len()];
            let conversation = corpus::question(&mut rng, (lang, task), Split::Eval);
            let messages = conversation.split_last().0.to_vec();
            chat(messages, 96, temperature, i)
        };
        let name = format!("{task:?}, temperature {temperature}");
        (name, (0..QUESTIONS).map(one).collect())
    };
    vec![
        ask(Task::Repeat, 0.0),
        ask(Task::Extract, 0.0),
        ask(Task::Json, 0.0),
        ask(Task::Talk, 1.0),
        ask(Task::Talk, 2.0),
    ]
}

fn chat(messages: Vec<Value>, max: usize, temperature: f32, seed: usize) -> TextRequest {
    let prompt = Prompt::Chat { messages: Value::Array(messages), template_kwargs: Map::new() };
    request(prompt, max, temperature, seed)
}

fn story_work() -> Vec<(String, Vec<TextRequest>)> {
    let begun =
        ["Once upon a time", "Lily had a red ball", "Tom and Sam went to the park", "The cat"];
    let tell = |temperature: f32| {
        let one = |i: usize| {
            let prompt = Prompt::Text(begun[i % begun.len()].to_owned());
            request(prompt, 200, temperature, i)
        };
        (format!("stories, temperature {temperature}"), (0..QUESTIONS / 5).map(one).collect())
    };
    vec![tell(0.0), tell(0.7), tell(2.0)]
}

fn request(prompt: Prompt, max: usize, temperature: f32, seed: usize) -> TextRequest {
    let (temperature, seed) = (Some(temperature), Some(seed as u64));
    TextRequest {
        max_tokens: Some(max),
        token_ids: true,
        sampling: SamplingOverrides { temperature, seed, ..SamplingOverrides::default() },
        ..TextRequest::new(builtin::NAME, prompt)
    }
}

/// Every side in turns; ratios are taken within a turn.
async fn compare(
    name: &str,
    at_once: usize,
    sides: &[Side],
    requests: &[TextRequest],
) -> Result<(), Failure> {
    let mut speeds = vec![Vec::new(); sides.len()];
    let (mut answers, mut counts) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        answers.clear();
        counts.clear();
        for (side, Side { pipeline, stats, .. }) in sides.iter().enumerate() {
            let before = counted(stats);
            let started = Instant::now();
            let all = answer(pipeline, requests, at_once).await?;
            let took_s = started.elapsed().as_secs_f64();
            let tokens: usize = all.iter().map(Vec::len).sum();
            if round > 0 {
                speeds[side].push(tokens as f64 / took_s);
            }
            let after = counted(stats);
            counts.push([after[0] - before[0], after[1] - before[1], tokens as u64]);
            answers.push(all);
        }
        assert!(answers.iter().all(|all| *all == answers[0]), "a token differs");
    }
    for (side, Side { label, .. }) in sides.iter().enumerate() {
        let ratios = speeds[side].iter().zip(&speeds[0]).map(|(ours, off)| ours / off);
        let (speed, [proposed, accepted, tokens]) = (median(speeds[side].clone()), counts[side]);
        let (least, most) = speeds[side]
            .iter()
            .fold((f64::MAX, 0.0), |(a, b): (f64, f64), &s| (a.min(s), b.max(s)));
        println!(
            "{name:<28} {at_once:>2}  {label:<6} {speed:>8.0} {:>7.2} {proposed:>9} {accepted:>9} \
             {tokens:>9}  [{least:.0}, {most:.0}]",
            median(ratios.collect())
        );
    }
    Ok(())
}

async fn answer(
    pipeline: &Pipeline,
    requests: &[TextRequest],
    at_once: usize,
) -> Result<Vec<Vec<TokenId>>, Failure> {
    let answers = requests.iter().map(|request| async {
        let mut stream = pipeline.generate(request.clone()).await?;
        let mut tokens = Vec::new();
        while let Some(event) = stream.next().await {
            if let TextEvent::Tokens { ids, .. } = event? {
                tokens.extend(ids);
            }
        }
        Ok(tokens)
    });
    let answers: Vec<Result<_, Failure>> = stream::iter(answers).buffered(at_once).collect().await;
    answers.into_iter().collect()
}

fn counted(stats: &Stats) -> [u64; 2] {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    [read(&stats.proposed_tokens), read(&stats.accepted_tokens)]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
