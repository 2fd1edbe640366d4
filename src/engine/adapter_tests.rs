//! Requests with adapters: what one yields depends on its own adapters and nothing else.

use std::sync::atomic::Ordering;

use hearth_kernels::lora::Float;
use hearth_models::{Adapter, LoraSlot, ModelConfig, tiny};

use super::handle::{AdapterSet, Event, GenerateRequest};
use super::tests::*;
use super::*;
use crate::shelf::Digest;

fn adapter(rank: usize, seed: u64) -> Arc<Adapter> {
    Arc::new(tiny::adapter(&tiny::config(), rank, Float::F32, seed).unwrap())
}

/// Four lists, one of them composed.
pub(super) fn sets() -> Vec<Option<Arc<AdapterSet>>> {
    let (one, two) = (adapter(4, 1), adapter(16, 2));
    let lists = [
        vec![(Arc::clone(&one), 1.0)],
        vec![(Arc::clone(&two), 1.0)],
        vec![(one, 0.5), (two, -0.5)],
        vec![(adapter(7, 3), 2.0)],
    ];
    let content = |slot: u64| Digest::of_parts(&[&slot.to_le_bytes()]);
    let set = |(slot, parts)| {
        Some(Arc::new(AdapterSet { slot: LoraSlot(slot), parts, content: content(slot) }))
    };
    std::iter::once(None).chain((1..).zip(lists).map(set)).collect()
}

/// Request `i` of the varied set, with the adapters whose turn it is.
fn with(sets: &[Option<Arc<AdapterSet>>], i: u32) -> GenerateRequest {
    let adapters = sets[i as usize % sets.len()].clone();
    GenerateRequest { adapters, logprobs: Some(2), ..request(i) }
}

#[test]
fn a_mix_of_adapters_is_each_request_alone() {
    let sets = sets();
    let alone: Vec<Answer> = (0..15).map(|i| ask(&engine(limits()).0, with(&sets, i))).collect();
    for limits in [
        limits(),
        Limits { batch_tokens: 5, running_len: 3, ..limits() },
        Limits { kv_blocks: 16, ..limits() },
    ] {
        let (handle, _thread) = engine(limits);
        let running: Vec<_> = (0..15).map(|i| handle.submit(with(&sets, i)).unwrap()).collect();
        for (got, want) in running.into_iter().map(collect).zip(&alone) {
            assert_eq!((&got.tokens, &got.logprobs), (&want.tokens, &want.logprobs));
            assert!(got.failed.is_none() && !got.tokens.is_empty());
        }
    }
    let base = ask(&engine(limits()).0, request(1)).tokens;
    assert_ne!(alone[1].tokens, base, "the adapter changes nothing");
}

#[test]
fn prefixes_are_shared_within_one_list_alone() {
    let (handle, _thread) = engine(limits());
    let sets = sets();
    let cached = |i: usize| {
        let request = GenerateRequest { adapters: sets[i].clone(), ..greedy(&[5; 40], 2) };
        ask(&handle, request).end.unwrap().1.cached
    };
    assert_eq!([0, 1, 2, 3, 1, 0, 3].map(cached), [0, 0, 0, 0, 32, 32, 32]);
}

/// Answers to one prompt with different adapters share nothing; with the same, all.
#[test]
fn forks_run_with_the_adapters_of_their_prompt() {
    let sets = sets();
    let ask_for = |i: usize| GenerateRequest {
        adapters: sets[i].clone(),
        ..greedy(&(0..50).map(|i| i * 9 % 480).collect::<Vec<_>>(), 12)
    };
    let alone: Vec<_> = (0..3).map(|i| ask(&engine(limits()).0, ask_for(i)).tokens).collect();
    let (handle, _thread) = engine(limits());
    let order = [1, 1, 0, 0, 2, 1];
    let running = handle.submit_all(order.map(ask_for).to_vec()).unwrap();
    for (generation, i) in running.into_iter().zip(order) {
        assert_eq!(collect(generation).tokens, alone[i]);
    }
}

/// A list is let go when nobody runs with it, and a request keeps it until then.
#[test]
fn adapters_are_held_as_long_as_somebody_runs_with_them() {
    let (handle, _thread) = engine(roomy());
    let set = sets()[1].clone().unwrap();
    let with = |max_tokens| GenerateRequest {
        adapters: Some(Arc::clone(&set)),
        ..greedy(&[1, 2, 3], max_tokens)
    };
    let mut long = handle.submit(with(ENDLESS)).unwrap();
    assert_eq!(ask(&handle, with(5)).tokens.len(), 5);
    assert!(matches!(long.blocking_next(), Some(Event::Prompt { .. })));
    let held = Arc::strong_count(&set);
    assert!(held > 1);
    drop(long);
    while handle.stats().running.load(Ordering::Acquire) > 0 {
        thread::yield_now();
    }
    assert_eq!(ask(&handle, greedy(&[1], 1)).tokens.len(), 1);
    assert_eq!(Arc::strong_count(&set), 1);
    assert_eq!(ask(&handle, with(5)).tokens.len(), 5, "it may come back");
}

#[test]
fn an_adapter_of_another_model_fails_its_own_request() {
    let (handle, _thread) = engine(limits());
    let other = ModelConfig { hidden_len: 128, ..tiny::config() };
    let other = Arc::new(tiny::adapter(&other, 4, Float::F32, 1).unwrap());
    let set = Arc::new(AdapterSet {
        slot: LoraSlot(9),
        parts: vec![(other, 1.0)],
        content: Digest::default(),
    });
    let running = handle.submit(greedy(&[1, 2], 9)).unwrap();
    let failed = ask(&handle, GenerateRequest { adapters: Some(set), ..greedy(&[1, 2], 9) });
    assert!(failed.failed.unwrap().contains("has an update of"));
    assert_eq!(collect(running).tokens.len(), 9);
    assert_eq!(handle.stats().waiting.load(Ordering::Acquire), 0);
}
