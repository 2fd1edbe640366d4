//! The engine on a random in-memory model: what a sequence yields depends on nothing but itself.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_kernels::Pool;
use hearth_kernels::quant::DType;
use hearth_models::{Adapter, LoraSlot, Output, Pass, Wanted};
use hearth_models::{Compute, Error, ForwardBatch, KvGeometry, ModelConfig, tiny};

use super::handle::{Event, GenerateRequest, Generation, Logprobs, SamplingParams, SubmitError};
use super::*;
use crate::types::Usage;

/// A prompt token that makes [`Faulty`] panic, one that makes its logits NaN,
const PANIC: TokenId = 500;
const NOT_A_NUMBER: TokenId = 501;
/// and one for which it gives too few, on which the engine itself panics.
const TOO_FEW: TokenId = 502;

/// Adapters that it does not take.
const PANIC_ADAPTERS: LoraSlot = LoraSlot(4);

/// A model that fails on demand.
struct Faulty(Box<dyn Model>);

impl Model for Faulty {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<hearth_models::KvStore, Error> {
        self.0.kv_store(geometry)
    }

    fn launch(
        &self,
        batch: &ForwardBatch,
        kv: &mut hearth_models::KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Pass, Error> {
        assert!(!batch.tokens.contains(&PANIC), "asked to");
        let mut logits = self.0.launch(batch, kv, wanted)?.wait()?.into_logits();
        if batch.tokens.contains(&TOO_FEW) {
            logits.truncate(1);
        }
        if batch.tokens.contains(&NOT_A_NUMBER) {
            logits.fill(f32::NAN);
        }
        Ok(Pass::done(Output::of_logits(logits)))
    }

    fn put_adapters(
        &mut self,
        slot: LoraSlot,
        adapters: &[(Arc<Adapter>, f32)],
    ) -> Result<(), Error> {
        self.0.put_adapters(slot, adapters)?;
        assert!(slot != PANIC_ADAPTERS, "asked to");
        Ok(())
    }

    fn drop_adapters(&mut self, slot: LoraSlot) {
        self.0.drop_adapters(slot);
    }
}

/// Tokens of an answer that takes seconds, so that its client is always faster.
pub(super) const ENDLESS: usize = 30_000;

/// Room for [`ENDLESS`].
pub(super) fn roomy() -> Limits {
    Limits { context_len: ENDLESS + 64, kv_blocks: ENDLESS / 16 + 8, ..limits() }
}

pub(super) fn limits() -> Limits {
    Limits {
        context_len: 256,
        vocab_len: 512,
        queue_len: 64,
        running_len: 16,
        batch_tokens: 512,
        kv_blocks: 256,
        block_len: 16,
        target_itl: Duration::from_millis(100),
        queue_timeout: None,
        kv_prefault: false,
    }
}

pub(super) fn model() -> Box<dyn Model> {
    let compute = Compute::Fused(Arc::new(Pool::new(2)));
    tiny::load(&tiny::config(), DType::Q8_0, 7, &compute).unwrap()
}

thread_local! {
    /// What the engines of this test store.
    pub(super) static STORED: Cell<KvDType> = const { Cell::new(KvDType::Q16_0) };
}

pub(super) fn engine(limits: Limits) -> (EngineHandle, JoinHandle<()>) {
    spawn(model(), STORED.get(), limits, Speculation::default(), None).unwrap()
}

/// Request `i` of a varied set: lengths, seeds and sampling differ.
pub(super) fn request(i: u32) -> GenerateRequest {
    let prompt = (0..3 + 17 * i % 61).map(|p| (p * 31 + i * 97) % 480).collect();
    let sampling = match i % 3 {
        0 => SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        1 => SamplingParams { top_p: 0.9, top_k: 40, ..SamplingParams::default() },
        _ => SamplingParams { repetition_penalty: 1.2, min_p: 0.01, ..SamplingParams::default() },
    };
    let max_tokens = 20 + i as usize % 7;
    let (seed, logprobs) = (u64::from(i), Some(2));
    GenerateRequest { prompt, sampling, max_tokens, seed, logprobs, ..Default::default() }
}

pub(super) fn greedy(prompt: &[TokenId], max_tokens: usize) -> GenerateRequest {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    GenerateRequest { prompt: prompt.to_vec(), sampling, max_tokens, ..Default::default() }
}

/// Everything a generation said.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) tokens: Vec<TokenId>,
    pub(super) logprobs: Vec<Logprobs>,
    pub(super) prompt: Vec<Logprobs>,
    /// Tokens that the request expected.
    pub(super) expected: usize,
    pub(super) end: Option<(FinishReason, Usage)>,
    pub(super) failed: Option<String>,
}

pub(super) fn collect(mut generation: Generation) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = generation.blocking_next() {
        match event {
            Event::Prompt { logprobs, .. } => answer.prompt = logprobs.to_vec(),
            Event::Token { id, logprobs, expected } => {
                answer.tokens.push(id);
                answer.logprobs.extend(logprobs);
                answer.expected += usize::from(expected);
            }
            Event::Finished { reason, usage, .. } => answer.end = Some((reason, usage)),
            Event::Failed(message) => answer.failed = Some(message),
            Event::Expired { waited } => panic!("given up after {waited:?}"),
        }
    }
    answer
}

pub(super) fn ask(handle: &EngineHandle, request: GenerateRequest) -> Answer {
    collect(handle.submit(request).unwrap())
}

/// Tokens with their log-probabilities, which no two sums in another order have the same.
pub(super) type Said = (Vec<TokenId>, Vec<Logprobs>);

fn said(answer: Answer) -> Said {
    assert_eq!(answer.tokens.len(), answer.logprobs.len());
    (answer.tokens, answer.logprobs)
}

/// What requests `0..12` say, each alone in a roomy engine.
pub(super) fn alone() -> Vec<Said> {
    let (handle, _thread) = engine(limits());
    (0..12).map(|i| said(ask(&handle, request(i)))).collect()
}

/// The same, all submitted at once.
fn together(handle: &EngineHandle) -> Vec<Said> {
    let running: Vec<_> = (0..12).map(|i| handle.submit(request(i)).unwrap()).collect();
    running.into_iter().map(|g| said(collect(g))).collect()
}

#[test]
pub(super) fn batch_equals_single() {
    let (handle, _thread) = engine(limits());
    let got = together(&handle);
    assert_eq!(got, alone());
    assert!(got.iter().any(|said| said.0 != got[0].0));
    let steps = handle.stats().steps.load(Ordering::Relaxed);
    assert!(steps < 12 * 20, "{steps} steps: nothing was batched");
}

#[test]
pub(super) fn chunked_equals_whole() {
    let (handle, _thread) = engine(Limits { batch_tokens: 5, running_len: 3, ..limits() });
    assert_eq!(together(&handle), alone());
}

#[test]
pub(super) fn preempted_equals_not() {
    let (handle, _thread) = engine(Limits { kv_blocks: 16, ..limits() });
    assert_eq!(together(&handle), alone());
    assert!(handle.stats().preemptions.load(Ordering::Relaxed) > 0, "blocks never ran out");
}

#[test]
pub(super) fn any_arrival_order_equals_alone() {
    let alone = alone();
    let mut preemptions = 0;
    // Forwards, backwards, and in between: each comes some steps after the one before it.
    for (stride, first) in [(1, 0), (11, 11), (5, 3), (7, 8), (5, 10), (7, 1)] {
        let few = Limits { kv_blocks: 16, batch_tokens: 24, running_len: 7, ..limits() };
        let (handle, _thread) = engine(few);
        let order: Vec<usize> = (0..12).map(|i| (first + stride * i) % 12).collect();
        let mut running = Vec::new();
        for &i in &order {
            running.push(handle.submit(request(i as u32)).unwrap());
            let_steps_pass(&handle, (i * stride) as u64 % 5);
        }
        for (i, generation) in order.iter().zip(running) {
            assert_eq!(said(collect(generation)), alone[*i], "request {i} in {order:?}");
        }
        preemptions += handle.stats().preemptions.load(Ordering::Relaxed);
    }
    assert!(preemptions > 0, "blocks never ran out");
}

/// So many steps, or until there is nothing to do.
fn let_steps_pass(handle: &EngineHandle, steps: u64) {
    let stats = handle.stats();
    let done = || stats.steps.load(Ordering::Relaxed);
    let until = done() + steps;
    while done() < until
        && stats.running.load(Ordering::Relaxed) + stats.waiting.load(Ordering::Relaxed) > 0
    {
        std::thread::yield_now();
    }
}

#[test]
fn usage_counts_what_was_asked_and_given() {
    let (handle, _thread) = engine(limits());
    let answer = ask(&handle, greedy(&[1, 2, 3], 9));
    let usage = Usage { prompt: 3, cached: 0, completion: 9 };
    assert_eq!(answer.end, Some((FinishReason::Length, usage)));
    assert_eq!(answer.tokens.len(), 9);
}

#[test]
fn stop_tokens_stop_unless_too_early() {
    let (handle, _thread) = engine(limits());
    let free = ask(&handle, greedy(&[5, 6, 7], 24)).tokens;
    let stop = free[3];
    let first = free.iter().position(|&t| t == stop).unwrap() + 1;
    let stopping = GenerateRequest { stop_ids: [stop].into(), ..greedy(&[5, 6, 7], 24) };
    let answer = ask(&handle, stopping.clone());
    assert_eq!(answer.tokens, free[..first]);
    assert_eq!(answer.end.unwrap().0, FinishReason::Stop);
    let patient = ask(&handle, GenerateRequest { min_tokens: 10, ..stopping }).tokens;
    assert!(patient.len() >= 10 && !patient[..10].contains(&stop));
}

#[test]
fn a_bias_decides() {
    let (handle, _thread) = engine(limits());
    let biased = GenerateRequest { logit_bias: vec![(42, 100.0)], ..greedy(&[1], 4) };
    assert_eq!(ask(&handle, biased).tokens, [42; 4]);
}

#[test]
fn logprobs_are_of_the_raw_distribution() {
    let (handle, _thread) = engine(limits());
    let asked = GenerateRequest { logprobs: Some(5), ..greedy(&[9, 8, 7], 6) };
    let answer = ask(&handle, asked);
    assert_eq!(answer.logprobs.len(), 6);
    for (token, l) in answer.tokens.iter().zip(&answer.logprobs) {
        assert!(l.logprob <= 0.0);
        assert_eq!(l.top[0], (*token, l.logprob), "greedy takes the best");
        assert!(l.top.len() == 5 && l.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
}

#[test]
fn a_scored_prompt_agrees_with_generation() {
    let (handle, _thread) = engine(limits());
    let asked = GenerateRequest { logprobs: Some(1), ..greedy(&[9, 8, 7], 100) };
    let answer = ask(&handle, asked);
    // The same tokens as a prompt of its own, scored in chunks smaller than it.
    let prompt = [&[9, 8, 7], answer.tokens.as_slice()].concat();
    assert!(prompt.len() > SCORE_CHUNK);
    let scored = GenerateRequest { prompt_logprobs: Some(1), ..greedy(&prompt, 0) };
    let scores = ask(&handle, scored);
    assert_eq!(scores.prompt.len(), prompt.len() - 1);
    assert_eq!(scores.prompt[2..], answer.logprobs);
    let usage = Usage { prompt: prompt.len(), cached: 0, completion: 0 };
    assert_eq!(scores.end, Some((FinishReason::Length, usage)));
}

#[test]
fn what_never_fits_is_refused_at_once() {
    let (handle, _thread) = engine(limits());
    let error = |request| handle.submit(request).unwrap_err();
    assert_eq!(error(greedy(&[], 1)), SubmitError::EmptyPrompt);
    assert_eq!(error(greedy(&[1, 512], 1)), SubmitError::UnknownToken(512));
    let too_long = SubmitError::TooLong { prompt: 200, max_tokens: 57, max: 256 };
    assert_eq!(error(greedy(&[1; 200], 57)), too_long);
    assert_eq!(ask(&handle, greedy(&[1; 200], 56)).tokens.len(), 56, "the last one that fits");
    assert_eq!(handle.stats().waiting.load(Ordering::Relaxed), 0);
}

#[test]
fn a_full_queue_refuses_and_recovers() {
    let (handle, _thread) = engine(Limits { queue_len: 2, running_len: 1, ..limits() });
    let mut taken = Vec::new();
    let refused = loop {
        match handle.submit(greedy(&[1, 2], 200)) {
            Ok(generation) => taken.push(generation),
            Err(error) => break error,
        }
        assert!(taken.len() < 20, "the queue has no end");
    };
    let SubmitError::QueueFull { waiting, retry_after } = refused else { panic!("{refused}") };
    assert!(waiting == 2 && retry_after >= Duration::from_secs(1));
    drop(taken);
    wait_until_idle(&handle);
    assert_eq!(ask(&handle, greedy(&[1, 2], 3)).tokens.len(), 3);
}

#[test]
fn a_wait_is_told_once_an_answer_is_over() {
    let (handle, _thread) = engine(Limits { running_len: 1, ..limits() });
    let submit = |token| handle.submit(greedy(&[1, token], 250)).unwrap();
    let mut first = submit(2);
    assert_eq!(first.place.wait, Some(Duration::ZERO));
    first_token(&mut first);
    let mut second = submit(3);
    assert_eq!((second.place.position, second.place.wait), (0, None));
    assert_eq!(handle.estimated_wait(), None);
    while first.blocking_next().is_some() {}
    first_token(&mut second);
    let waiting: Vec<_> = [4, 5, 6].map(submit).into();
    let waits: Vec<Duration> = waiting.iter().map(|w| w.place.wait.unwrap()).collect();
    assert!(waits.is_sorted() && waits[2] > waits[0], "{waits:?}");
    assert!(handle.estimated_wait().unwrap() > Duration::ZERO);
    drop((second, waiting));
    wait_until_idle(&handle);
    assert_eq!(handle.estimated_wait(), Some(Duration::ZERO));
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let (handle, _thread) = engine(roomy());
    let mut generation = handle.submit(greedy(&[3; 40], ENDLESS)).unwrap();
    first_token(&mut generation);
    drop(generation);
    wait_until_idle(&handle);
    let stats = handle.stats();
    assert_eq!(stats.kv_blocks_used.load(Ordering::Relaxed), 0);
    assert_eq!(stats.cancelled.load(Ordering::Relaxed), 1);
    assert!(stats.generated_tokens.load(Ordering::Relaxed) < ENDLESS as u64);
}

#[test]
fn a_stopped_generation_is_a_finish_not_a_cancellation() {
    let (handle, _thread) = engine(roomy());
    let mut generation = handle.submit(greedy(&[3; 40], ENDLESS)).unwrap();
    first_token(&mut generation);
    generation.stop();
    wait_until_idle(&handle);
    let stats = handle.stats();
    assert_eq!(stats.cancelled.load(Ordering::Relaxed), 0);
    assert_eq!(stats.kv_blocks_used.load(Ordering::Relaxed), 0);
    assert!(stats.generated_tokens.load(Ordering::Relaxed) < ENDLESS as u64);
}

#[test]
fn a_panic_fails_its_batch_and_nothing_else() {
    let faulty = Box::new(Faulty(model()));
    let spawned = spawn(faulty, KvDType::F16, limits(), Speculation::default(), None);
    let (handle, _thread) = spawned.unwrap();
    let answer = ask(&handle, greedy(&[1, PANIC], 5));
    assert!(answer.failed.unwrap().contains("asked to"));
    let answer = ask(&handle, greedy(&[1, NOT_A_NUMBER], 5));
    assert!(answer.failed.unwrap().contains("no token to choose"));
    let answer = ask(&handle, greedy(&[1, TOO_FEW], 5));
    assert!(answer.failed.unwrap().contains("out of range"));
    for _ in 0..2 {
        let adapters = super::adapter_tests::sets().pop().unwrap();
        let answer = ask(&handle, GenerateRequest { adapters, ..greedy(&[1, 2], 5) });
        assert!(answer.failed.unwrap().contains("asked to"), "what it had taken is gone");
    }
    wait_until_idle(&handle);
    assert_eq!(handle.stats().kv_blocks_used.load(Ordering::Relaxed), 0);
    assert_eq!(ask(&handle, greedy(&[1, 2], 5)).tokens.len(), 5, "the engine goes on");
}

#[test]
fn draining_finishes_what_runs() {
    let (handle, thread) = engine(limits());
    let running = handle.submit(greedy(&[1, 2], 50)).unwrap();
    handle.drain();
    assert_eq!(collect(running).tokens.len(), 50);
    thread.join().unwrap();
    assert_eq!(handle.submit(greedy(&[1], 1)).unwrap_err(), SubmitError::ShuttingDown);
}

pub(super) fn first_token(generation: &mut Generation) {
    assert!(matches!(generation.blocking_next(), Some(Event::Prompt { .. })));
    first_tokens(generation, 1);
}

pub(super) fn first_tokens(generation: &mut Generation, count: usize) {
    for _ in 0..count {
        assert!(matches!(generation.blocking_next(), Some(Event::Token { .. })));
    }
}

pub(super) fn wait_until_idle(handle: &EngineHandle) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let stats = handle.stats();
    while stats.running.load(Ordering::Relaxed) + stats.waiting.load(Ordering::Relaxed) > 0 {
        assert!(Instant::now() < deadline, "the engine is not idle: {stats:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
