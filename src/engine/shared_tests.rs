//! What sequences have in common: prefixes, prompts, places in the queue; and that nobody's tokens
//! change by it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::handle::{Event, GenerateRequest, SamplingParams, SubmitError};
use super::tests::*;
use super::*;
use crate::types::{CacheScope, Tenant, Usage};

#[test]
fn a_cached_prefix_changes_nothing_but_the_usage() {
    let prompt: Vec<TokenId> = (0..100).map(|i| (i * 37 + 11) % 480).collect();
    let ask_for = |seed| GenerateRequest {
        sampling: SamplingParams { top_p: 0.9, top_k: 40, ..SamplingParams::default() },
        seed,
        logprobs: Some(3),
        ..greedy(&prompt, 30)
    };
    let alone: Vec<Answer> = (0..3).map(|i| ask(&engine(limits()).0, ask_for(i))).collect();
    let (handle, _thread) = engine(limits());
    for (i, alone) in alone.iter().enumerate() {
        let answer = ask(&handle, ask_for(i as u64));
        assert_eq!((&answer.tokens, &answer.logprobs), (&alone.tokens, &alone.logprobs));
        // Six whole blocks; from the second time on.
        let cached = if i == 0 { 0 } else { 96 };
        let usage = Usage { prompt: 100, cached, completion: 30 };
        assert_eq!(answer.end, Some((FinishReason::Length, usage)));
    }
    let stats = handle.stats();
    assert_eq!(stats.prefix_hits.load(Ordering::Relaxed), 2);
    assert_eq!(stats.prefix_hit_tokens.load(Ordering::Relaxed), 2 * 96);
    assert_eq!(stats.kv_blocks_used.load(Ordering::Relaxed), 0);
    assert!(stats.kv_blocks_cached.load(Ordering::Relaxed) >= 8);
}

#[test]
fn a_long_conversation_and_its_cached_turns_are_bitwise_the_same() {
    // Each turn's prompt is the last one with its answer and something new.
    let (handle, _thread) = engine(limits());
    let mut history: Vec<TokenId> = vec![3, 1, 4, 1, 5];
    for turn in 0..6 {
        let request = GenerateRequest { logprobs: Some(0), ..greedy(&history, 21) };
        let here = ask(&handle, request.clone());
        let alone = ask(&engine(limits()).0, request);
        assert_eq!((&here.tokens, &here.logprobs), (&alone.tokens, &alone.logprobs));
        let cached = here.end.unwrap().1.cached;
        assert_eq!(cached, if turn == 0 { 0 } else { (history.len() - 4) / 16 * 16 });
        history.extend(here.tokens);
        history.extend([7, 8, 9]);
    }
}

#[test]
fn a_part_of_a_block_is_lent_and_changes_nothing() {
    let begin: Vec<TokenId> = (0..76).map(|i| (i * 37 + 11) % 480).collect();
    let ask_for = |own: TokenId| {
        let prompt: Vec<TokenId> = begin.iter().copied().chain((0..20).map(|i| own + i)).collect();
        GenerateRequest { logprobs: Some(3), ..greedy(&prompt, 30) }
    };
    let (handle, _thread) = engine(limits());
    for (own, cached) in [(100, 0), (200, 76), (300, 76)] {
        let alone = ask(&engine(limits()).0, ask_for(own));
        let here = ask(&handle, ask_for(own));
        assert_eq!((&here.tokens, &here.logprobs), (&alone.tokens, &alone.logprobs), "{own}");
        assert_eq!(here.end.unwrap().1.cached, cached, "four blocks and twelve tokens");
    }
}

/// The other tests run with what the CPU stores by itself.
fn every_equality_holds(dtype: KvDType) {
    STORED.set(dtype);
    batch_equals_single();
    chunked_equals_whole();
    preempted_equals_not();
    any_arrival_order_equals_alone();
    a_cached_prefix_changes_nothing_but_the_usage();
    a_long_conversation_and_its_cached_turns_are_bitwise_the_same();
    a_part_of_a_block_is_lent_and_changes_nothing();
    forks_are_bitwise_what_they_are_alone_and_their_prompt_is_computed_once();
}

#[test]
fn every_equality_holds_with_keys_and_values_in_bytes() {
    every_equality_holds(KvDType::Q8_0);
}

#[test]
fn every_equality_holds_with_keys_and_values_in_floats() {
    every_equality_holds(KvDType::F16);
}

#[test]
fn tenants_that_are_apart_share_no_prefix() {
    let (handle, _thread) = engine(limits());
    let cached = |tenant| {
        let scope = CacheScope { adapter: 0, tenant };
        let answer = ask(&handle, GenerateRequest { scope, ..greedy(&[5; 40], 2) });
        answer.end.unwrap().1.cached
    };
    assert_eq!([1, 2, 1, 2, 3].map(cached), [0, 0, 32, 32, 0]);
}

#[test]
fn a_scored_prompt_does_not_read_the_cache() {
    let (handle, _thread) = engine(limits());
    let scored = GenerateRequest { prompt_logprobs: Some(1), ..greedy(&[9; 50], 0) };
    let first = ask(&handle, scored.clone());
    ask(&handle, greedy(&[9; 50], 3));
    let again = ask(&handle, scored);
    assert_eq!((&first.prompt, again.end.unwrap().1.cached), (&again.prompt, 0));
    assert_eq!(again.prompt.len(), 49);
}

/// `n` answers to one prompt, as one submission.
fn forked(handle: &EngineHandle, request: &GenerateRequest, n: u64) -> Vec<Answer> {
    let requests = (0..n).map(|seed| GenerateRequest { seed, ..request.clone() });
    let generations = handle.submit_all(requests.collect()).unwrap();
    generations.into_iter().map(collect).collect()
}

#[test]
fn forks_are_bitwise_what_they_are_alone_and_their_prompt_is_computed_once() {
    let prompt: Vec<TokenId> = (0..75).map(|i| (i * 29 + 5) % 480).collect();
    let sampling = SamplingParams { top_p: 0.95, ..SamplingParams::default() };
    let request = GenerateRequest { sampling, logprobs: Some(2), ..greedy(&prompt, 25) };
    let alone: Vec<Answer> = (0..6)
        .map(|seed| ask(&engine(limits()).0, GenerateRequest { seed, ..request.clone() }))
        .collect();
    // With places for all, for some, and with blocks that run out.
    for limits in
        [limits(), Limits { running_len: 4, ..limits() }, Limits { kv_blocks: 16, ..limits() }]
    {
        let roomy = limits.kv_blocks > 16 && limits.running_len > 4;
        let (handle, _thread) = engine(limits);
        let answers = forked(&handle, &request, 6);
        for (fork, alone) in answers.iter().zip(&alone) {
            assert_eq!((&fork.tokens, &fork.logprobs), (&alone.tokens, &alone.logprobs));
        }
        let stats = handle.stats();
        if roomy {
            // The prompt once, and every token of every answer but its last.
            assert_eq!(stats.computed_tokens.load(Ordering::Relaxed), 75 + 6 * 24);
            assert_eq!(stats.prompt_tokens.load(Ordering::Relaxed), 75);
        }
        assert_eq!(stats.kv_blocks_used.load(Ordering::Relaxed), 0);
        assert_eq!(stats.waiting.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn every_fork_of_a_scored_prompt_gets_its_scores() {
    let (handle, _thread) = engine(limits());
    let request = GenerateRequest { prompt_logprobs: Some(1), ..greedy(&[9; 50], 4) };
    let one = ask(&handle, request.clone());
    for max_tokens in [4, 0] {
        for answer in forked(&handle, &GenerateRequest { max_tokens, ..request.clone() }, 3) {
            assert_eq!(answer.prompt, one.prompt);
            assert_eq!(answer.tokens, one.tokens[..max_tokens]);
        }
    }
}

#[test]
fn a_fork_may_leave_before_and_after_its_prompt() {
    let (handle, _thread) = engine(Limits { batch_tokens: 16, ..roomy() });
    let prompt: Vec<TokenId> = (0..200).map(|i| i % 480).collect();
    let all = || vec![greedy(&prompt, 30); 4];
    let mut generations = handle.submit_all(all()).unwrap();
    drop(generations.remove(0)); // the one that computes
    drop(generations.remove(1));
    let left: Vec<Answer> = generations.into_iter().map(collect).collect();
    assert_eq!(left.len(), 2);
    assert!(left.iter().all(|answer| answer.tokens.len() == 30));
    let mut generations = handle.submit_all(all()).unwrap();
    first_token(&mut generations[2]);
    drop(generations.remove(0));
    let ends = generations.into_iter().map(|g| collect(g).tokens);
    ends.for_each(|tokens| assert!(left[0].tokens.ends_with(&tokens) && tokens.len() >= 29));
    wait_until_idle(&handle);
    assert_eq!(handle.stats().kv_blocks_used.load(Ordering::Relaxed), 0);
}

#[test]
fn several_are_taken_all_or_none() {
    let (handle, _thread) = engine(Limits { queue_len: 3, running_len: 1, ..roomy() });
    let long = greedy(&[1, 2], ENDLESS);
    let first = handle.submit(long.clone()).unwrap();
    while handle.stats().waiting.load(Ordering::Relaxed) > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = handle.submit_all(vec![long.clone(); 4]).unwrap_err();
    assert!(matches!(error, SubmitError::QueueFull { waiting: 0, .. }), "{error:?}");
    let bad = greedy(&[600], 1);
    let error = handle.submit_all(vec![long.clone(), bad]).unwrap_err();
    assert_eq!(error, SubmitError::UnknownToken(600));
    assert_eq!(handle.stats().waiting.load(Ordering::Relaxed), 0);
    assert_eq!(handle.submit_all(vec![long; 3]).unwrap().len(), 3);
    drop(first);
}

#[test]
fn who_waits_too_long_is_told_and_who_runs_is_not() {
    let timeout = Some(Duration::from_millis(30));
    let (handle, _thread) = engine(Limits { running_len: 1, queue_timeout: timeout, ..roomy() });
    let mut running = handle.submit(greedy(&[1, 2], ENDLESS)).unwrap();
    first_token(&mut running);
    let mut late = handle.submit(greedy(&[3], 5)).unwrap();
    assert_eq!(late.place.position, 0);
    match late.blocking_next() {
        Some(Event::Expired { waited }) => assert!(waited >= Duration::from_millis(30)),
        other => panic!("{other:?}"),
    }
    assert!(late.blocking_next().is_none());
    assert_eq!(handle.stats().expired.load(Ordering::Relaxed), 1);
    assert_eq!(handle.stats().waiting.load(Ordering::Relaxed), 0);
    first_tokens(&mut running, 3);
}

/// Where the server lets everybody wait, a key may want to be told sooner.
#[test]
fn a_key_waits_no_longer_than_it_may() {
    let (handle, _thread) = engine(Limits { running_len: 1, ..roomy() });
    let mut running = handle.submit(greedy(&[1, 2], ENDLESS)).unwrap();
    first_token(&mut running);
    let of = |id, queue_timeout_s| {
        let tenant = Tenant { id, queue_timeout_s, ..Tenant::default() };
        handle.submit(GenerateRequest { tenant, ..greedy(&[3], 5) }).unwrap()
    };
    let (mut hasty, mut patient) = (of(1, Some(1)), of(2, Some(3600)));
    match hasty.blocking_next() {
        Some(Event::Expired { waited }) => assert!(waited >= Duration::from_secs(1)),
        other => panic!("{other:?}"),
    }
    assert_eq!(handle.stats().expired.load(Ordering::Relaxed), 1);
    drop(running);
    first_token(&mut patient);
}

#[test]
fn another_tenant_is_let_in_and_nobody_s_tokens_change() {
    let tenant = |id| Tenant { id, ..Tenant::default() };
    let alone: Vec<_> = (0..5).map(|i| ask(&engine(limits()).0, request(i)).tokens).collect();
    let (handle, _thread) = engine(Limits { running_len: 2, ..limits() });
    let greedy_one = (0..4).map(|i| GenerateRequest { tenant: tenant(1), ..request(i) });
    let theirs: Vec<_> = greedy_one.map(|r| handle.submit(r).unwrap()).collect();
    let other = handle.submit(GenerateRequest { tenant: tenant(2), ..request(4) }).unwrap();
    assert_eq!(other.place.position, 0, "by turns, not by the length of another's queue");
    assert_eq!(collect(other).tokens, alone[4]);
    for (generation, alone) in theirs.into_iter().zip(alone) {
        assert_eq!(collect(generation).tokens, alone);
    }
}
