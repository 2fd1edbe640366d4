//! What the scheduler itself takes of a step, without a model: sequences of a few tenants that all
//! come at once, answer side by side, and all end at once. `cargo bench --bench scheduler`

use std::time::{Duration, Instant};

use hearth::scheduler::{Batch, NewSequence, Proposal, Scheduler, SchedulerConfig};
use hearth::types::{CacheScope, Priority, SeqId, Tenant};

/// Rounds, of which the fastest counts.
const ROUNDS: usize = 5;
const PROMPT: usize = 20;
const ANSWER: usize = 40;
const TENANTS: u64 = 30;
const BLOCK_LEN: usize = 16;

fn main() {
    println!(
        "{:>8} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "running", "come ms", "step ms", "ahead ms", "guesses ms", "slow ms", "end ms"
    );
    for running in [64, 256, 1024, 4096] {
        let mut least = [f64::MAX; 6];
        for _ in 0..ROUNDS {
            for (least, ms) in least.iter_mut().zip(round(running)) {
                *least = ms.min(*least);
            }
        }
        let [come, step, ahead, guesses, slow, end] = least;
        println!(
            "{running:>8} {come:>12.3} {step:>12.3} {ahead:>12.3} {guesses:>12.3} {slow:>12.3} \
             {end:>12.3}"
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
        samples: true,
        score: false,
        scope: CacheScope::default(),
        tenant: Tenant { id: 1 + id % TENANTS, ..Tenant::default() },
        priority: Priority::Default,
        deadline: None,
        forks: Vec::new(),
    }
}
