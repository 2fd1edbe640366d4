//! What the scheduler itself takes of a step, without a model: sequences of a few tenants that all
//! come at once, answer side by side, and all end at once; and what it takes to tell a newcomer how
//! long it will wait behind as many. `cargo bench --bench scheduler`

use std::hint::black_box;
use std::time::{Duration, Instant};

use hearth::scheduler::{Batch, NewSequence, Newcomer, Proposal, Scheduler, SchedulerConfig};
use hearth::types::{CacheScope, Priority, SeqId, Tenant};

/// Rounds, of which the fastest counts.
const ROUNDS: usize = 5;
const PROMPT: usize = 20;
const ANSWER: usize = 40;
const TENANTS: u64 = 30;
const BLOCK_LEN: usize = 16;

fn main() {
    println!(
        "{:>8} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "running",
        "come ms",
        "step ms",
        "ahead ms",
        "guesses ms",
        "slow ms",
        "end ms",
        "outlook ms",
        "wait ms"
    );
    for running in [64, 256, 1024, 4096] {
        let mut least = [f64::MAX; 8];
        for _ in 0..ROUNDS {
            let all = round(running).into_iter().chain(wait(running));
            for (least, ms) in least.iter_mut().zip(all) {
                *least = ms.min(*least);
            }
        }
        let [come, step, ahead, guesses, slow, end, outlook, wait] = least;
        println!(
            "{running:>8} {come:>12.3} {step:>12.3} {ahead:>12.3} {guesses:>12.3} {slow:>12.3} \
             {end:>12.3} {outlook:>12.3} {wait:>12.3}"
        );
    }
}

/// Milliseconds of the longest step while prompts come in, of a step of answers, the same one step
/// ahead, with a guess for each, all in the background but one, and of the end of all.
fn round(running: usize) -> [f64; 6] {
    let (mut s, come) = house(running, false);
    let plain = least(|| step(&mut s, &[], false));
    let ahead = least(|| step(&mut s, &[], true));
    let guess = |id| Proposal { id: SeqId(id), tokens: vec![7; 4] };
    let proposals: Vec<Proposal> = (0..running as u64).map(guess).collect();
    let guesses = least(|| step(&mut s, &proposals, false));
    let begun = Instant::now();
    (0..running as u64).for_each(|id| s.finish(SeqId(id)));
    let end = begun.elapsed().as_secs_f64() * 1e3;
    assert!(s.is_empty());
    let (mut s, _) = house(running, true);
    s.add(sequence(running as u64));
    step(&mut s, &[], false);
    let slow = least(|| step(&mut s, &[], false));
    [come, plain, ahead, guesses, slow, end]
}

/// Milliseconds of a look at so many who wait for 32 places, and of what follows for a newcomer.
fn wait(waiting: usize) -> [f64; 2] {
    let (mut s, _) = house(32, false);
    s.finish(SeqId(0)); // so that something is known of how long answers are
    (0..waiting as u64).for_each(|i| s.add(sequence(1000 + i)));
    step(&mut s, &[], false);
    let tenant = Tenant { id: 7, ..Tenant::default() };
    let (priority, prompt, answer_max) = (Priority::Default, PROMPT, ANSWER);
    let newcomer = Newcomer { tenant, priority, prompt, answer_max, count: 1 };
    let timed = |work: &dyn Fn()| {
        let begun = Instant::now();
        work();
        begun.elapsed().as_secs_f64() * 1e3
    };
    let outlook = s.outlook(Duration::ZERO, &Batch::default());
    let look = || _ = black_box(s.outlook(Duration::ZERO, &Batch::default()));
    let ask = || _ = black_box(outlook.wait(&newcomer, Duration::ZERO));
    [least(|| timed(&look)), least(|| timed(&ask))]
}

/// So many answers that run, in the background or not, and milliseconds of the longest step before
/// that.
fn house(running: usize, background: bool) -> (Scheduler, f64) {
    let mut s = Scheduler::new(SchedulerConfig {
        block_count: running * (PROMPT + ANSWER).div_ceil(BLOCK_LEN) + running,
        block_len: BLOCK_LEN,
        batch_tokens: running * PROMPT,
        running_len: running + 1,
        score_chunk: 64,
        target_ms: 100.0,
        proposed_rows: 32,
        price: None,
        load_blocks_min: 2,
        keep_blocks_min: None,
    });
    let mut longest = 0.0f64;
    for id in 0..running as u64 {
        let new = sequence(id);
        let tenant = if background { new.tenant.in_background() } else { new.tenant };
        s.add(NewSequence { tenant, ..new });
    }
    while s.answers().len() < running {
        longest = longest.max(step(&mut s, &[], false));
    }
    (s, longest)
}

fn least(mut step: impl FnMut() -> f64) -> f64 {
    (0..4).map(|_| step()).fold(f64::MAX, f64::min)
}

/// Milliseconds of one step of a model that takes no time.
fn step(s: &mut Scheduler, proposals: &[Proposal], ahead: bool) -> f64 {
    let begun = Instant::now();
    let batch = s.schedule(Duration::ZERO, proposals, &());
    let go_on: Vec<SeqId> = match ahead {
        true => batch.entries.iter().map(|entry| entry.id).collect(),
        false => Vec::new(),
    };
    s.launch(&batch, &go_on);
    let tokens = sampled(&batch);
    s.update(&batch, &tokens, 0.001);
    begun.elapsed().as_secs_f64() * 1e3
}

fn sampled(batch: &Batch) -> Vec<(SeqId, u32)> {
    let samples = batch.entries.iter().filter(|entry| entry.samples);
    samples.map(|entry| (entry.id, 9)).collect()
}

/// A text of its own.
fn sequence(id: u64) -> NewSequence {
    NewSequence {
        id: SeqId(id),
        prompt: (0..PROMPT as u32).map(|i| id as u32 * 100 + i).collect(),
        answer_max: 1000,
        score: false,
        scope: CacheScope::default(),
        tenant: Tenant { id: 1 + id % TENANTS, ..Tenant::default() },
        priority: Priority::Default,
        deadline: None,
        forks: Vec::new(),
    }
}
