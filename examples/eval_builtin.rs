//! Measures `hearth-tiny` on the evaluation split, through the registry and the pipeline that
//! serve it: greedy answers, no grammar.
//!
//! `cargo run --release --example eval_builtin -- --count 100`

#[path = "builtin/mod.rs"]
mod builtin;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use hearth::config::RawConfig;
use hearth::pipeline::Pipeline;
use hearth::registry::{self, Registry};
use hearth_kernels::Pool;
use hearth_models::Compute;

use builtin::corpus::world::Split;
use builtin::corpus::{Lang, Task};
use builtin::score::{self, Score};

/// Measure the built-in model.
#[derive(Debug, Parser)]
struct Args {
    /// The model.
    #[arg(long, default_value = builtin::PATH)]
    model: PathBuf,
    /// Questions of each task in each language.
    #[arg(long, default_value_t = 100)]
    count: usize,
    /// Only this task (`extract`, `json`, ...).
    #[arg(long)]
    task: Option<String>,
    /// Ask what it was trained on: the gap to the evaluation is what it cannot carry over.
    #[arg(long)]
    trained: bool,
    /// Print this many wrong answers of each.
    #[arg(long, default_value_t = 0)]
    show: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let pipeline = open(&args.model)?;
    println!("{:<12} {:<8} {:>5} {:>8} {:>8}", "task", "language", "asked", "right", "exact");
    let split = if args.trained { Split::Train } else { Split::Eval };
    let wanted = |task: &Task| {
        let name = format!("{task:?}");
        args.task.as_ref().is_none_or(|only| only.eq_ignore_ascii_case(&name))
    };
    for task in Task::SCORED.into_iter().filter(wanted) {
        for lang in Lang::ALL {
            let asked = (task, lang, split);
            let answers = score::ask(&pipeline, builtin::NAME, asked, args.count).await?;
            let score = Score::of(&answers);
            println!(
                "{:<12} {:<8} {:>5} {:>6.1} % {:>6.1} %",
                format!("{task:?}"),
                format!("{lang:?}"),
                score.asked,
                score.right_percent(),
                score.exact_percent()
            );
            for wrong in answers.iter().filter(|a| !a.is_exact()).take(args.show) {
                let (messages, expected) = wrong.conversation.split_last();
                let asked = messages.last().map(|m| m["content"].to_string());
                println!("  asked    {}", asked.unwrap_or_default());
                println!("  expected {expected:?}\n  answered {:?}", wrong.answer);
            }
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<Pipeline, Box<dyn Error>> {
    let config = RawConfig::default().validate()?;
    let compute = Compute::Fused(Arc::new(Pool::new(config.threads)));
    let model = registry::open(hearth_models::open(path)?)?.load_alone(&compute, &config.plan)?;
    Ok(Pipeline::new(Arc::new(Registry::of(vec![model.into()])?)))
}
