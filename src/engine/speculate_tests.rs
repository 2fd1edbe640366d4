//! Speculation changes no token, whatever is guessed and whoever else runs; and what it costs where
//! nothing that is guessed is right.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::grammar::{Allowed, Grammar, Mask, MaskSource};
use super::handle::{DraftModel, GenerateRequest, SamplingParams};
use super::tests::*;
use super::*;
use crate::types::Tenant;

/// A lookup for everybody, at a price at which every guess is worth its row.
pub(super) fn always() -> Speculation {
    Speculation { lookup: true, draft: None, price: Some(0.0) }
}

/// A draft model that is the model itself, so that most of what it says is right.
fn own_draft(limits: &Limits) -> Speculation {
    let draft = DraftModel { model: model(), limits: limits.clone() };
    Speculation { lookup: false, draft: Some(draft), price: Some(0.0) }
}

fn speculating(limits: Limits, speculation: Speculation) -> EngineHandle {
    spawn(model(), KvDType::default(), limits, speculation, None).unwrap().0
}

pub(super) fn counts(handle: &EngineHandle) -> (u64, u64) {
    let stats = handle.stats();
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    (count(&stats.proposed_tokens), count(&stats.accepted_tokens))
}

/// Even tokens only: a grammar that a random model can keep to.
#[derive(Debug)]
pub(super) struct Even;

impl Grammar for Even {
    fn start(&self) -> Box<dyn MaskSource> {
        Box::new(Self)
    }
}

impl MaskSource for Even {
    fn advance(&mut self, token: TokenId) {
        assert_eq!(token % 2, 0);
    }

    fn allowed(&mut self) -> Allowed {
        Allowed::Only(Mask(vec![0x5555_5555; 16]))
    }
}

/// Sixteen requests that differ in everything that has a say in a token. What they expect is what
/// comes, with a mistake here and there.
pub(super) fn varied() -> Vec<GenerateRequest> {
    let (plain, _thread) = engine(limits());
    let vary = |i: u32| {
        let mut one = request(i);
        one.max_tokens = 40;
        one.logprobs = (i % 4 == 1).then_some(3);
        one.sampling.presence_penalty = if i % 5 == 2 { 0.7 } else { 0.0 };
        one.sampling.frequency_penalty = if i % 5 == 3 { 0.4 } else { 0.0 };
        one.logit_bias = (0..i % 3).map(|k| (k * 50 + i, 3.0)).collect();
        one.tenant = Tenant { id: u64::from(i % 3), ..Tenant::default() };
        if i % 8 == 7 {
            one.grammar = Some(Arc::new(Even));
        }
        let mut expected = ask(&plain, one.clone()).tokens;
        // A stop token in the middle of what will be accepted.
        if i % 4 == 3 {
            one.stop_ids = [expected[17]].into();
        }
        one.max_tokens = 40 - i as usize; // reached in the middle of it
        expected[9 + i as usize % 4] ^= 1;
        expected[30] = 3;
        one.expected = expected.into();
        one
    };
    (0..16).map(vary).collect()
}

pub(super) fn same(got: &Answer, expected: &Answer) {
    let end = |answer: &Answer| {
        answer.end.map(|(reason, usage)| (reason, usage.prompt, usage.completion))
    };
    assert_eq!(got.tokens, expected.tokens);
    assert_eq!((&got.logprobs, end(got)), (&expected.logprobs, end(expected)));
    assert_eq!(got.failed, None);
}

#[test]
fn no_token_changes_alone_in_company_in_small_batches_or_without_blocks() {
    let requests = varied();
    let (plain, _thread) = engine(limits());
    let without: Vec<Answer> = requests.iter().map(|r| ask(&plain, r.clone())).collect();
    let handle = speculating(limits(), always());
    for (request, without) in requests.iter().zip(&without) {
        same(&ask(&handle, request.clone()), without);
    }
    let (proposed, accepted) = counts(&handle);
    assert!(accepted > 150 && proposed > accepted, "{accepted} of {proposed} were right");
    let steps = |handle: &EngineHandle| handle.stats().steps.load(Ordering::Relaxed);
    assert_eq!(steps(&plain) - steps(&handle), accepted, "each saves one step");
    for limits in [
        limits(),
        Limits { batch_tokens: 5, running_len: 3, ..limits() },
        Limits { kv_blocks: 16, ..limits() },
    ] {
        let scarce = limits.kv_blocks == 16;
        for speculation in [always(), own_draft(&limits)] {
            let handle = speculating(limits.clone(), speculation);
            let running = handle.submit_all(requests.clone()).unwrap();
            for (generation, without) in running.into_iter().zip(&without) {
                same(&collect(generation), without);
            }
            let stats = handle.stats();
            assert!(!scarce || stats.preemptions.load(Ordering::Relaxed) > 0);
            assert!(counts(&handle).1 > 0, "nothing was accepted");
            wait_until_idle(&handle);
            assert_eq!(stats.kv_blocks_used.load(Ordering::Relaxed), 0);
        }
    }
}

#[test]
fn a_draft_of_the_same_weights_is_right_until_penalties_say_otherwise() {
    let sampling = SamplingParams { top_p: 0.9, ..SamplingParams::default() };
    let request = GenerateRequest { sampling, seed: 5, ..greedy(&[1, 2, 3, 4], 90) };
    let without = ask(&engine(limits()).0, request.clone());
    let handle = speculating(limits(), own_draft(&limits()));
    same(&ask(&handle, request), &without);
    let (proposed, accepted) = counts(&handle);
    assert_eq!(proposed, accepted, "the same weights, seed and position: the same token");
    assert!(accepted >= 75, "{accepted} of 90");
}

#[test]
fn a_draft_with_few_blocks_or_a_short_context_says_what_it_can() {
    let without = ask(&engine(limits()).0, greedy(&[9; 40], 100));
    for draft in [
        Limits { kv_blocks: 4, ..limits() },
        Limits { context_len: 64, ..limits() },
        Limits { kv_blocks: 1, ..limits() },
    ] {
        let some = draft.kv_blocks > 1;
        let handle = speculating(limits(), own_draft(&draft));
        same(&ask(&handle, greedy(&[9; 40], 100)), &without);
        assert_eq!(counts(&handle).0 > 0, some);
    }
}

#[test]
fn forks_and_cached_prefixes_change_nothing() {
    let prompt: Vec<TokenId> = (0..75).map(|i| (i * 29 + 5) % 480).collect();
    let sampling = SamplingParams { top_p: 0.95, ..SamplingParams::default() };
    let one = GenerateRequest { sampling, logprobs: Some(2), ..greedy(&prompt, 40) };
    let (plain, _thread) = engine(limits());
    let forks: Vec<_> = (0..4)
        .map(|seed| {
            let fork = GenerateRequest { seed, ..one.clone() };
            let expected = ask(&plain, fork.clone()).tokens.into();
            GenerateRequest { expected, ..fork }
        })
        .collect();
    let without: Vec<Answer> = forks.iter().map(|fork| ask(&plain, fork.clone())).collect();
    let handle = speculating(limits(), always());
    for _ in 0..2 {
        let running = handle.submit_all(forks.clone()).unwrap();
        for (generation, without) in running.into_iter().zip(&without) {
            same(&collect(generation), without);
        }
    }
    // What was said is the beginning of what comes next: no rejected row is found there.
    for (fork, without) in forks.iter().zip(&without) {
        let history = [&prompt[..], &without.tokens].concat();
        let wrong = GenerateRequest { expected: [7; 20].into(), ..greedy(&history, 30) };
        let next = ask(&plain, wrong.clone());
        same(&ask(&handle, GenerateRequest { seed: fork.seed, ..wrong }), &next);
    }
    assert!(counts(&handle).1 > 100);
}

#[test]
fn what_was_expected_is_told_with_every_kind_of_speculation() {
    let tokens = ask(&engine(limits()).0, greedy(&[5, 6, 7], 20)).tokens;
    let mut expected = tokens.clone();
    expected[12] ^= 1;
    let request = GenerateRequest { expected: expected.into(), ..greedy(&[5, 6, 7], 20) };
    for speculation in [Speculation::default(), always(), own_draft(&limits())] {
        let on = speculation.is_on();
        let handle = speculating(limits(), speculation);
        let answer = ask(&handle, request.clone());
        assert_eq!(answer.tokens, tokens);
        assert!((12..=19).contains(&answer.expected), "{}", answer.expected);
        assert_eq!(counts(&handle).0 > 0, on);
    }
}

#[test]
fn guesses_that_are_seldom_right_cost_next_to_nothing() {
    // Answers out of eight tokens at random: what comes was there before, and went on otherwise.
    let price = 0.2;
    let handle = speculating(limits(), Speculation { price: Some(price), ..always() });
    let mut tokens = 0;
    for seed in 0..8 {
        let request = GenerateRequest {
            sampling: SamplingParams { temperature: 50.0, ..SamplingParams::default() },
            logit_bias: (100..108).map(|token| (token, 1e4)).collect(),
            seed,
            ..greedy(&[1, 2, 3], 200)
        };
        tokens += ask(&handle, request).tokens.len();
    }
    let (proposed, accepted) = counts(&handle);
    let lost = proposed as f64 * price - accepted as f64;
    assert!(lost < 0.03 * tokens as f64, "{proposed} rows, {accepted} right, {tokens} tokens");
}
