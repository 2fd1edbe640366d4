//! The engine under load, in this process: one client, and sixty-four whose prompts arrive while
//! others are being answered.

use std::thread;
use std::time::{Duration, Instant};

use hearth::engine::handle::{
    EngineHandle, Event, GenerateRequest, Limits, SamplingParams, Speculation,
};
use hearth_models::KvDType;

use super::Failure;
use super::decode::{BLOCK_LEN, Subject};
use super::table::{Row, digits, percentile};
use super::weights::Random;

const CLIENTS: usize = 64;
/// Tokens of an answer.
const ANSWER: usize = 128;
/// Tokens of a prompt: so many, or more by less than the second number.
const PROMPT: (usize, u64) = (100, 701);
/// Before the first token counts: passes are recorded, the pace is learned.
const WARM: [Duration; 2] = [Duration::from_millis(1500), Duration::from_millis(3000)];
/// In which tokens count.
const WINDOW: [Duration; 2] = [Duration::from_millis(2500), Duration::from_millis(5000)];
/// Of the step; what is asked of the gaps leaves room for a late one.
const TARGET_ITL: Duration = Duration::from_millis(30);

/// What the clients of one load saw, times in milliseconds.
#[derive(Default)]
struct Seen {
    tokens: usize,
    first: Vec<f64>,
    gaps: Vec<f64>,
}

/// Drives an engine that takes the model over.
pub fn run(subject: Subject<'_>) -> Result<(), Failure> {
    let (name, is_8b) = (subject.shape.name, subject.is_8b());
    let Subject { gpu, model, shape, kv, .. } = subject;
    drop((gpu, kv));
    let longest = PROMPT.0 + PROMPT.1 as usize + ANSWER;
    let limits = Limits {
        context_len: longest,
        vocab_len: shape.config.vocab_len,
        queue_len: 4 * CLIENTS,
        running_len: CLIENTS,
        batch_tokens: 1024,
        kv_blocks: (CLIENTS + 8) * longest.div_ceil(BLOCK_LEN),
        block_len: BLOCK_LEN,
        target_itl: TARGET_ITL,
        queue_timeout: None,
        kv_prefault: false,
    };
    let (engine, running) = hearth::engine::spawn(
        Box::new(model),
        KvDType::BF16,
        limits,
        Speculation::default(),
        None,
    )?;
    let loads = [1, CLIENTS].into_iter().zip(WARM.into_iter().zip(WINDOW));
    let seen: Vec<(usize, Seen, f64)> = loads
        .map(|(clients, (warm, window))| {
            let seen = load(&engine, clients, warm, window);
            let per_s = seen.tokens as f64 / window.as_secs_f64();
            (clients, seen, per_s)
        })
        .collect();
    engine.drain();
    running.join().map_err(|_| "the engine panicked")?;
    let one = seen[0].2;
    for (clients, seen, per_s) in seen {
        let [typical, late] = [50, 95].map(|percent| percentile(&seen.gaps, percent));
        let ratio = per_s / one;
        let first = digits(percentile(&seen.first, 50));
        let row = Row::new(name, format!("serve, {clients} clients"))
            .ms(typical)
            .tokens(per_s)
            .rate(format!("first token {first} ms, p95 gap {} ms", digits(late)))
            .part(format!("{ratio:.1} x one client"));
        match is_8b && clients > 1 {
            true => row.target(">= 20 x, p95 < 40 ms", ratio >= 20.0 && late < 40.0).print(),
            false => row.print(),
        }
    }
    Ok(())
}

/// Clients that ask again as soon as they are answered; they come in one after another.
fn load(engine: &EngineHandle, clients: usize, warm: Duration, window: Duration) -> Seen {
    let start = Instant::now();
    let (from, to) = (start + warm, start + warm + window);
    let all = thread::scope(|scope| {
        let one = |client: usize| {
            let pause = warm.mul_f64(0.5 * client as f64 / clients as f64);
            scope.spawn(move || {
                thread::sleep(pause);
                ask(engine, client, from, to)
            })
        };
        let asking: Vec<_> = (0..clients).map(one).collect();
        asking.into_iter().map(|client| client.join().unwrap_or_default()).collect::<Vec<_>>()
    });
    all.into_iter().fold(Seen::default(), |mut all, seen| {
        all.tokens += seen.tokens;
        all.first.extend(seen.first);
        all.gaps.extend(seen.gaps);
        all
    })
}

/// One client until the end of the window; what it sees in it.
fn ask(engine: &EngineHandle, client: usize, from: Instant, to: Instant) -> Seen {
    let vocab = engine.limits().vocab_len as u64;
    let mut random = Random((client as u64 + 1) << 40);
    let mut seen = Seen::default();
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    while Instant::now() < to {
        let len = PROMPT.0 + random.below(PROMPT.1) as usize;
        let temperature = if client.is_multiple_of(2) { 0.0 } else { 0.7 };
        let request = GenerateRequest {
            prompt: (0..len).map(|_| random.below(vocab)).collect(),
            sampling: SamplingParams { temperature, ..SamplingParams::default() },
            seed: random.next(),
            max_tokens: ANSWER,
            ..GenerateRequest::default()
        };
        let asked = Instant::now();
        let Ok(mut answer) = engine.submit(request) else { break };
        let mut last = None;
        while let Some(event) = answer.blocking_next() {
            let now = Instant::now();
            if now >= to {
                return seen;
            }
            let Event::Token { .. } = event else { continue };
            seen.tokens += usize::from(now >= from);
            match last {
                Some(last) if now >= from => seen.gaps.push(ms(last, now)),
                None if asked >= from => seen.first.push(ms(asked, now)),
                _ => {}
            }
            last = Some(now);
        }
    }
    seen
}
