//! Clients that do not read: they hold nobody up and no block, and miss nothing when they read.

use std::sync::atomic::Ordering;
use std::thread;

use super::events::UNREAD_MAX;
use super::grammar::{Allowed, Grammar, Mask, MaskSource};
use super::handle::{Event, GenerateRequest, SamplingParams, SubmitError};
use super::tests::*;
use super::*;
use crate::types::Tenant;

/// Alternatives of each token: less than 700 tokens are too much unread.
const TOP: usize = 100;
const TOKENS: usize = 1200;

fn limits_for(running_len: usize) -> Limits {
    Limits { context_len: 2048, kv_blocks: 1024, running_len, ..limits() }
}

/// More than may be unread.
fn long(seed: u64) -> GenerateRequest {
    let prompt: Vec<TokenId> = (0..50).map(|i| (i * 37 + 11) % 480).collect();
    let sampling = SamplingParams { top_p: 0.9, top_k: 40, ..SamplingParams::default() };
    GenerateRequest { sampling, seed, logprobs: Some(TOP), ..greedy(&prompt, TOKENS) }
}

/// Waits until so many stand aside, and nobody else is left.
pub(super) fn stand_aside(handle: &EngineHandle, count: usize) {
    let stats = handle.stats();
    let begun = Instant::now();
    let load = |count: &std::sync::atomic::AtomicUsize| count.load(Ordering::Acquire);
    while (load(&stats.aside), load(&stats.running), load(&stats.waiting)) != (count, count, 0) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{stats:?}");
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(load(&stats.kv_blocks_used), 0, "whoever stands aside holds a block");
}

fn same(here: &Answer, alone: &Answer) {
    assert_eq!((&here.tokens, &here.logprobs), (&alone.tokens, &alone.logprobs));
    assert_eq!((&here.prompt, &here.failed), (&alone.prompt, &alone.failed));
    let end = |answer: &Answer| answer.end.map(|(reason, usage)| (reason, usage.completion));
    assert_eq!(end(here), end(alone));
}

/// Answers alone, read as they come; then all of them at once, first unread and then read.
fn unread_is_as_read(limits: Limits, speculation: fn() -> Speculation, all: Vec<GenerateRequest>) {
    let engine = || spawn(model(), STORED.get(), limits.clone(), speculation(), None).unwrap().0;
    let alone: Vec<Answer> = all.iter().map(|r| ask(&engine(), r.clone())).collect();
    let handle = engine();
    let unread = handle.submit_all(all).unwrap();
    stand_aside(&handle, unread.len());
    let generated = || handle.stats().generated_tokens.load(Ordering::Relaxed);
    let stood = generated();
    let other = ask(&handle, request(1));
    assert_eq!(other.tokens, ask(&engine(), request(1)).tokens);
    assert_eq!(generated() - stood, other.tokens.len() as u64, "somebody went on unread");
    let reading: Vec<_> = unread.into_iter().map(|g| thread::spawn(move || collect(g))).collect();
    for (reading, alone) in reading.into_iter().zip(&alone) {
        same(&reading.join().unwrap(), alone);
    }
    assert_eq!(handle.stats().preemptions.load(Ordering::Relaxed), 0);
}

#[test]
fn who_is_not_read_stands_aside_and_misses_nothing() {
    unread_is_as_read(limits_for(1), Speculation::default, vec![long(1)]);
}

#[test]
fn answers_to_one_prompt_stand_aside_together() {
    unread_is_as_read(limits_for(2), Speculation::default, (0..4).map(long).collect());
}

#[test]
fn a_scored_prompt_and_one_that_is_read_ahead_stand_aside_too() {
    let lookup = || Speculation { lookup: true, ..Speculation::default() };
    let scored = GenerateRequest { prompt_logprobs: Some(3), ..long(5) };
    let quoting = GenerateRequest { logprobs: Some(TOP), ..greedy(&[7; 40], TOKENS) };
    unread_is_as_read(limits_for(8), lookup, vec![scored, quoting]);
}

/// Every other token is even.
#[derive(Debug)]
struct ByTurns(bool);

impl Grammar for ByTurns {
    fn start(&self) -> Box<dyn MaskSource> {
        Box::new(Self(self.0))
    }
}

impl MaskSource for ByTurns {
    fn advance(&mut self, _: TokenId) {
        self.0 = !self.0;
    }

    fn allowed(&mut self) -> Allowed {
        Allowed::Only(Mask(vec![if self.0 { 0x5555_5555 } else { 0xaaaa_aaaa }; 16]))
    }
}

#[test]
fn a_grammar_waits_with_its_answer() {
    let guided = GenerateRequest { grammar: Some(Arc::new(ByTurns(true))), ..long(3) };
    unread_is_as_read(limits_for(4), Speculation::default, vec![guided, long(4)]);
}

#[test]
fn clients_that_leave_while_they_are_behind_are_noticed() {
    let (handle, thread) = engine(limits_for(2));
    let unread = handle.submit_all((0..3).map(long).collect()).unwrap();
    stand_aside(&handle, 3);
    // One is read on; what the others say counts against it only while they are here.
    let mut unread = unread.into_iter();
    let read = unread.next().unwrap();
    drop(unread);
    same(&collect(read), &ask(&engine(limits_for(2)).0, long(0)));
    stand_aside(&handle, 0);
    assert_eq!(handle.stats().cancelled.load(Ordering::Relaxed), 2);
    let unread = handle.submit(long(1)).unwrap();
    stand_aside(&handle, 1);
    drop(handle);
    drop(unread);
    thread.join().unwrap();
}

/// What is counted is what is there: log-probabilities are most of it.
#[test]
fn the_bound_is_in_bytes() {
    let (handle, _thread) = engine(limits_for(1));
    let (mut heavy, mut light) = (handle.submit(long(1)).unwrap(), Vec::new());
    stand_aside(&handle, 1);
    while let Some(event) = heavy.blocking_next() {
        if let Event::Token { logprobs, .. } = event {
            light.push(logprobs.unwrap().top.len());
        }
        if light.len() * TOP * 8 > UNREAD_MAX {
            break;
        }
    }
    assert!(light.iter().all(|top| *top == TOP));
    drop(heavy);
    // The same without them is far from it.
    let plain = handle.submit(GenerateRequest { logprobs: None, ..long(1) }).unwrap();
    let begun = Instant::now();
    while handle.stats().running.load(Ordering::Relaxed) > 0 || begun.elapsed().as_millis() < 50 {
        assert_eq!(handle.stats().aside.load(Ordering::Relaxed), 0);
    }
    assert_eq!(collect(plain).tokens.len(), TOKENS);
}

/// Answers that are over, and far from too much.
#[test]
fn what_is_over_has_a_place_in_the_queue_until_it_is_read() {
    let (handle, _thread) = engine(Limits { queue_len: 4, ..limits_for(2) });
    let few = |max_tokens| GenerateRequest { max_tokens, ..long(1) };
    let mut unread = Vec::new();
    let refused = loop {
        match handle.submit(few(100)) {
            Ok(generation) => unread.push(generation),
            Err(refused) => break refused,
        }
        wait_until_idle(&handle);
    };
    assert!(matches!(refused, SubmitError::QueueFull { waiting: 4, .. }), "{refused:?}");
    let count = || handle.stats().unread.load(Ordering::Acquire);
    assert_eq!((unread.len(), count()), (4, 4));
    // One is read to its end and kept, one is dropped, one has an end that nobody looks at.
    let mut read = unread.remove(0);
    while read.blocking_next().is_some_and(|event| !matches!(event, Event::Finished { .. })) {}
    unread.remove(0);
    assert_eq!(count(), 2);
    unread[0].blocking_next().unwrap();
    assert_eq!(count(), 2);
    // Many may end at once whose clients are about to read the end.
    let mut short = Vec::new();
    for _ in 0..5 {
        short.extend(handle.submit_all(vec![few(2); 2]).unwrap());
        wait_until_idle(&handle);
    }
    assert!(
        (count(), short.len()) == (2, 10)
            && short.iter_mut().all(|one| one.blocking_next().is_some())
    );
    let full = handle.submit_all(vec![few(2); 3]).unwrap_err();
    assert!(matches!(full, SubmitError::QueueFull { waiting: 2, .. }), "{full:?}");
    drop((read, unread));
    wait_until_idle(&handle);
    assert_eq!(count(), 0);
}

/// Whatever comes and is never read, no more are here than may run and may wait: of one key fewer,
/// and another one hardly notices.
#[test]
fn how_many_stand_aside_is_bounded_for_each_key() {
    let of = |id, seed| {
        let tenant = Tenant { id, ..Tenant::default() };
        GenerateRequest { tenant, ..long(seed) }
    };
    let (handle, _thread) = engine(Limits { queue_len: 12, ..limits_for(2) });
    let mut unread = Vec::new();
    let refused = loop {
        match handle.submit(of(1, unread.len() as u64)) {
            Ok(generation) => unread.push(generation),
            Err(refused) => break refused,
        }
        stand_aside(&handle, unread.len());
    };
    assert!(matches!(refused, SubmitError::Unread { unread: 3, .. }), "{refused:?}");
    // At once they come in while there are places (for each that runs already one more would, which
    // a third key would miss), and no more of them afterwards.
    let mut others: Vec<_> = (0..8).map(|seed| handle.submit(of(2, seed)).unwrap()).collect();
    stand_aside(&handle, 3 + others.len());
    assert!(matches!(handle.submit(of(2, 0)), Err(SubmitError::Unread { .. })));
    let third = GenerateRequest { max_tokens: 3, ..of(3, 0) };
    assert_eq!(ask(&handle, third).tokens.len(), 3);
    // One of them leaves, one is read and misses nothing.
    unread.remove(2);
    stand_aside(&handle, 2 + others.len());
    let more = handle.submit(of(1, 7)).unwrap();
    stand_aside(&handle, 3 + others.len());
    same(&collect(others.remove(1)), &ask(&engine(limits_for(2)).0, long(1)));
    drop((unread, others, more));
    stand_aside(&handle, 0);
    assert_eq!(handle.stats().unread.load(Ordering::Acquire), 0);
}
