//! Trains `hearth-tiny` from the generated corpus.
//!
//! `cargo run --release --example train_builtin -- --minutes 30` starts from nothing;
//! `--from models/builtin/hearth-tiny.gguf` goes on from the shipped weights with a fresh
//! optimiser. On a processor, `RAYON_NUM_THREADS=1` leaves the threads to `--threads`, which is
//! twice as fast as one pass with threaded operations.

#[path = "builtin/mod.rs"]
mod builtin;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use hearth::registry::gguf_vocab;
use hearth::text::{GgufVocab, Tokenizer};
use hearth_kernels::Pool;
use hearth_models::Compute;
use hearth_models::train::{Batch, DataLoader, Example, Rng, Schedule, Trainer};
use hearth_models::weights::Weights;
use indicatif::{ProgressBar, ProgressStyle};

use builtin::corpus::world::Split;
use builtin::corpus::{self, Conversation, Lang, Task};
use builtin::{Encoder, config, file, vocabulary};

/// Train the built-in model.
#[derive(Debug, Parser)]
struct Args {
    /// How long.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Learning rate between warm-up and decay.
    #[arg(long, default_value_t = 2e-3)]
    rate: f64,
    /// Tokens of a step, padding included.
    #[arg(long, default_value_t = 2560)]
    batch_tokens: usize,
    /// Parts of a batch that are computed at once.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Threads that make conversations.
    #[arg(long, default_value_t = 1)]
    makers: usize,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Weights to go on from.
    #[arg(long)]
    from: Option<PathBuf>,
    /// Where the model is written, every few minutes and at the end.
    #[arg(long, default_value = "target/builtin/hearth-tiny.gguf")]
    out: PathBuf,
    /// Part of the time in which conversations grow from easy to hard (default: a third, and none
    /// with --from).
    #[arg(long)]
    easy: Option<f64>,
    /// Print this many conversations of the corpus instead.
    #[arg(long)]
    show: Option<usize>,
    /// Another seed, another corpus.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Between two writings of the file.
const SAVE_EVERY: Duration = Duration::from_secs(180);
/// Weight of the prompt's tokens at the beginning; it falls to 0 with the ease of the corpus.
const PROMPT_WEIGHT: f64 = 0.1;

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if let Some(folder) = args.out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let (vocab, weights) = start(&args)?;
    eprintln!("a vocabulary of {} tokens", vocab.tokens.len());
    let config = config(vocab.tokens.len());
    let pool = Arc::new(Pool::new(1));
    let compute = Compute::parse(&args.device, &pool)?;
    let mut trainer = Trainer::new(config, &weights, &compute, Default::default())?;
    let parameters: usize = trainer.tensors().iter().map(|t| t.tensor.elem_count()).sum();
    eprintln!("{parameters} parameters, {} tokens, {}", vocab.tokens.len(), compute.describe());
    let encoder = Encoder::new(Tokenizer::from_gguf(&vocab)?)?;
    if let Some(count) = args.show {
        return show(count, args.seed, &encoder);
    }
    let held_out = held_out(&encoder)?;
    learn(&args, &mut trainer, &encoder, &held_out, &vocab)?;
    save(&args.out, &trainer, &vocab)
}

/// Vocabulary and weights to start from.
fn start(args: &Args) -> Result<(GgufVocab, Weights), Box<dyn Error>> {
    let Some(path) = &args.from else {
        let vocab = vocabulary::train(args.seed).map_err(|e| e.to_string())?;
        let bytes = hearth_models::train::random(&config(vocab.tokens.len()), args.seed)?;
        return Ok((vocab, Weights::from_bytes("random", bytes)?));
    };
    let weights = Weights::open(path)?;
    let meta = weights.metadata().ok_or("the weights to go on from are not a GGUF file")?;
    Ok((gguf_vocab(meta)?, weights))
}

/// The steps, until the time is over. Conversations are made on threads of their own.
fn learn(
    args: &Args,
    trainer: &mut Trainer,
    encoder: &Encoder,
    held_out: &[Batch],
    vocab: &GgufVocab,
) -> Result<(), Box<dyn Error>> {
    let easy = args.easy.unwrap_or(if args.from.is_some() { 0.0 } else { 1.0 / 3.0 });
    let clock = Clock { begin: Instant::now(), total: args.minutes * 60.0, easy };
    thread::scope(|scope| {
        // Dropped at the end of the steps, which ends the makers.
        let (made, examples) = mpsc::sync_channel(256);
        for maker in 0..args.makers.max(1) as u64 {
            let (made, clock) = (made.clone(), &clock);
            let rng = Rng::new(args.seed.wrapping_add(maker << 32).wrapping_mul(0x9e37_79b9));
            scope.spawn(move || make(rng, encoder, clock, &made));
        }
        drop(made);
        steps(args, &clock, trainer, examples, held_out, vocab)
    })
}

/// How much of the training is over, and how easy its conversations still are.
struct Clock {
    begin: Instant,
    /// In seconds.
    total: f64,
    /// Part of the whole in which ease falls from 1 to 0.
    easy: f64,
}

impl Clock {
    fn seconds(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    fn done(&self) -> f64 {
        self.seconds() / self.total
    }

    fn ease(&self) -> f64 {
        (1.0 - self.done() / self.easy.max(f64::MIN_POSITIVE)).max(0.0)
    }
}

/// Conversations without end, easy ones first, until nobody takes them.
fn make(mut rng: Rng, encoder: &Encoder, clock: &Clock, made: &SyncSender<Example>) {
    loop {
        let ease = clock.ease();
        let conversation = corpus::training(&mut rng, 1.0 - ease);
        let example = encoder.example(&conversation, (PROMPT_WEIGHT * ease) as f32);
        let example = example.expect("the corpus fits its own template; this is a bug");
        if made.send(example).is_err() {
            return;
        }
    }
}

fn steps(
    args: &Args,
    clock: &Clock,
    trainer: &mut Trainer,
    examples: Receiver<Example>,
    held_out: &[Batch],
    vocab: &GgufVocab,
) -> Result<(), Box<dyn Error>> {
    let schedule = Schedule { peak: args.rate, warmup_steps: 60.0, decay_share: 0.25 };
    let mut data = DataLoader::new(examples.into_iter(), args.batch_tokens, 256);
    let mut rng = Rng::new(args.seed ^ 0x5eed);
    let bar = ProgressBar::new(1000);
    bar.set_style(ProgressStyle::with_template("{bar:30} {elapsed} {msg}")?);
    let (mut saved, mut tokens, mut loss) = (Instant::now(), 0usize, f64::NAN);
    let mut step = 0;
    while clock.done() < 1.0 {
        let Some(batch) = data.next(args.threads, rng.unit()) else { break };
        let report = trainer.step(&batch, schedule.rate(step, clock.done()))?;
        tokens += batch.iter().map(|b| b.forward.row_count()).sum::<usize>();
        loss = if loss.is_nan() { report.loss } else { 0.98 * loss + 0.02 * report.loss };
        let speed = tokens as f64 / clock.seconds();
        bar.set_position((clock.done() * 1000.0) as u64);
        bar.set_message(format!("step {step} loss {loss:.3} {speed:.0} tokens/s"));
        if step % 200 == 0 {
            let (seconds, norm) = (clock.seconds(), report.gradient_norm);
            let measured = trainer.loss(held_out)?;
            bar.suspend(|| {
                eprintln!(
                    "{seconds:.0} s, step {step}, {tokens} tokens, {speed:.0} tokens/s, \
                     loss {loss:.3}, held out {measured:.3}, gradient {norm:.2}"
                );
            });
        }
        if saved.elapsed() > SAVE_EVERY {
            save(&args.out, trainer, vocab)?;
            saved = Instant::now();
        }
        step += 1;
    }
    bar.finish_and_clear();
    let measured = trainer.loss(held_out)?;
    eprintln!("{tokens} tokens in all, loss {loss:.3}, held out {measured:.3}");
    Ok(())
}

/// A few conversations of every measured task.
fn held_out(encoder: &Encoder) -> Result<Vec<Batch>, Box<dyn Error>> {
    let mut rng = Rng::new(7);
    let mut batches = Vec::new();
    for lang in Lang::ALL {
        for task in Task::SCORED {
            let conversations: Vec<Conversation> =
                (0..4).map(|_| corpus::question(&mut rng, (lang, task), Split::Eval)).collect();
            let examples = conversations.iter().map(|c| encoder.example(c, 0.0));
            batches.push(Batch::new(&examples.collect::<Result<Vec<_>, _>>()?));
        }
    }
    Ok(batches)
}

/// What the corpus looks like, and how long its conversations are.
fn show(count: usize, seed: u64, encoder: &Encoder) -> Result<(), Box<dyn Error>> {
    let mut rng = Rng::new(seed);
    for _ in 0..count {
        let conversation = corpus::training(&mut rng, 1.0);
        let example = encoder.example(&conversation, 0.0)?;
        let learned = example.weights.iter().filter(|&&w| w > 0.0).count();
        let (text, all) = (encoder.text(&conversation)?, example.tokens.len());
        println!("--- {:?}: {learned} of {all} tokens\n{text}", conversation.task);
    }
    Ok(())
}

fn save(path: &Path, trainer: &Trainer, vocab: &GgufVocab) -> Result<(), Box<dyn Error>> {
    file::write(path, trainer.config(), vocab, &trainer.tensors())
}
