//! Blocks that went to files and came back: nobody's tokens change by it.

use std::path::Path;

use hearth_models::LoraSlot;

use super::adapter_tests::sets;
use super::handle::{AdapterSet, GenerateRequest};
use super::tests::*;
use super::*;
use crate::kv::{Chain, Forgotten};
use crate::shelf::{Digest, Shelf};
use crate::types::{BlockId, CacheScope};

const CONTENT: Digest = Digest([1; 32]);

/// The engine of [`engine`] with a shelf in this folder.
fn keeping(folder: &Path, limits: Limits) -> (EngineHandle, JoinHandle<()>) {
    let shelf = Shelf::open(folder, 1 << 30, String::new()).unwrap();
    let keep = Some(Keep { shelf: Arc::new(shelf), content: CONTENT });
    spawn(model(), STORED.get(), limits, Speculation::default(), keep).unwrap()
}

fn end((handle, thread): (EngineHandle, JoinHandle<()>)) -> Arc<Stats> {
    handle.drain();
    thread.join().unwrap();
    Arc::clone(handle.stats())
}

fn text(seed: u32, len: u32) -> Vec<TokenId> {
    (0..len).map(|i| (i * 37 + seed * 11) % 480).collect()
}

fn asked(seed: u32) -> GenerateRequest {
    GenerateRequest { logprobs: Some(3), seed: 5, ..greedy(&text(seed, 100), 20) }
}

fn is_same(got: &Answer, want: &Answer, cached: usize) {
    assert_eq!((&got.tokens, &got.logprobs), (&want.tokens, &want.logprobs));
    assert_eq!(got.end.unwrap().1.cached, cached);
}

fn same_after_eviction_and_restart() {
    let folder = tempfile::tempdir().unwrap();
    let alone: Vec<Answer> = (0..6).map(|i| ask(&engine(limits()).0, asked(i))).collect();
    // Room for two of them.
    let small = || Limits { kv_blocks: 20, context_len: 160, ..limits() };
    let first = keeping(folder.path(), small());
    for (i, want) in alone.iter().enumerate() {
        is_same(&ask(&first.0, asked(i as u32)), want, 0);
    }
    let spilled = || first.0.stats().kv_spilled.load(Ordering::Relaxed);
    let started = Instant::now();
    while spilled() < 12 && started.elapsed() < Duration::from_secs(20) {
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(first.0.stats().kv_dropped.load(Ordering::Relaxed), 0);
    // Forgotten in memory long ago.
    is_same(&ask(&first.0, asked(0)), &alone[0], 96);
    let stats = end(first);
    assert!(stats.kv_reloaded.load(Ordering::Relaxed) >= 6);
    let again = keeping(folder.path(), limits());
    let running: Vec<_> = (0..6).map(|i| again.0.submit(asked(i)).unwrap()).collect();
    for (got, want) in running.into_iter().map(collect).zip(&alone) {
        is_same(&got, want, 96);
    }
    assert_eq!(again.0.stats().prefix_hit_tokens.load(Ordering::Relaxed), 6 * 96);
    let computed = again.0.stats().computed_tokens.load(Ordering::Relaxed);
    assert_eq!(computed, 6 * (4 + 19), "what is there is not computed");
    let stats = end(again);
    let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    assert_eq!((count(&stats.kv_reloaded), count(&stats.kv_corrupt)), (36, 0));
}

/// Files that are pipes: whoever opens one waits for ever.
#[cfg(unix)]
#[test]
fn a_disk_that_hangs_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let alone = ask(&engine(limits()).0, asked(1));
    let first = keeping(folder.path(), limits());
    ask(&first.0, asked(1));
    end(first);
    let again = keeping(folder.path(), limits());
    let (mut files, mut folders) = (0, vec![folder.path().to_owned()]);
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "kv") {
                std::fs::remove_file(&path).unwrap();
                let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
                assert!(made.success());
                files += 1;
            }
        }
    }
    assert!(files >= 6, "{files} blocks");
    let started = Instant::now();
    is_same(&ask(&again.0, asked(1)), &alone, 0);
    assert!(started.elapsed() >= Duration::from_secs(5), "it was not waited for at all");
    // The others never wait again.
    let started = Instant::now();
    ask(&again.0, asked(2));
    assert!(started.elapsed() < Duration::from_secs(5));
    end(again);
}

#[test]
fn kept_equals_not() {
    for dtype in [KvDType::Q16_0, KvDType::F16, KvDType::Q8_0, KvDType::F32] {
        STORED.set(dtype);
        same_after_eviction_and_restart();
    }
}

/// Twelve at once, of whom four have the blocks to come to an end: those who lost theirs find in
/// files what others took from them. No two texts begin alike, and each is asked once, so what
/// comes back is of a sequence that was here before.
fn swapped_equals_not(dtype: KvDType) {
    STORED.set(dtype);
    let folder = tempfile::tempdir().unwrap();
    let asked = |i: u32| GenerateRequest { logprobs: Some(2), ..greedy(&text(i, 40), 60) };
    let roomy = engine(limits()).0;
    let alone: Vec<Answer> = (0..12).map(|i| ask(&roomy, asked(i))).collect();
    let few = keeping(folder.path(), Limits { kv_blocks: 28, context_len: 128, ..limits() });
    let running: Vec<_> = (0..12).map(|i| few.0.submit(asked(i)).unwrap()).collect();
    for (got, want) in running.into_iter().map(collect).zip(&alone) {
        assert_eq!((got.tokens.len(), &got.tokens), (60, &want.tokens));
        assert_eq!(got.logprobs, want.logprobs);
    }
    let stats = end(few);
    let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    let (preemptions, reloaded) = (count(&stats.preemptions), count(&stats.kv_reloaded));
    println!("{preemptions} preemptions, {reloaded} blocks came back");
    assert!(preemptions > 0, "blocks never ran out");
    assert!(reloaded > 0, "nothing came back after {preemptions} preemptions: {stats:?}");
}

#[test]
fn what_lost_its_blocks_and_found_them_in_files_says_the_same() {
    swapped_equals_not(KvDType::Q16_0);
    swapped_equals_not(KvDType::F16);
    swapped_equals_not(KvDType::Q8_0);
}

/// The number of a list is of one process; its content is of all.
#[test]
fn adapters_find_their_own_blocks_under_another_number() {
    let folder = tempfile::tempdir().unwrap();
    let sets = sets();
    let with = |set: Option<Arc<AdapterSet>>| GenerateRequest { adapters: set, ..asked(1) };
    let alone: Vec<Answer> =
        sets.iter().map(|set| ask(&engine(limits()).0, with(set.clone()))).collect();
    let first = keeping(folder.path(), limits());
    for (set, want) in sets.iter().zip(&alone) {
        is_same(&ask(&first.0, with(set.clone())), want, 0);
    }
    end(first);
    let again = keeping(folder.path(), limits());
    for (set, want) in sets.iter().zip(&alone).rev() {
        let renumbered = set.as_ref().map(|set| {
            let AdapterSet { slot, parts, content } = &**set;
            let (slot, parts) = (LoraSlot(100 - slot.0), parts.clone());
            Arc::new(AdapterSet { slot, parts, content: *content })
        });
        is_same(&ask(&again.0, with(renumbered)), want, 96);
    }
    end(again);
}

#[test]
fn tenants_that_are_apart_stay_apart_on_the_shelf() {
    let folder = tempfile::tempdir().unwrap();
    let of = |tenant| GenerateRequest { scope: CacheScope { adapter: 0, tenant }, ..asked(1) };
    let want = ask(&engine(limits()).0, asked(1));
    let first = keeping(folder.path(), limits());
    is_same(&ask(&first.0, of(7)), &want, 0);
    end(first);
    let again = keeping(folder.path(), limits());
    is_same(&ask(&again.0, of(8)), &want, 0);
    is_same(&ask(&again.0, of(7)), &want, 96);
    end(again);
}

/// Several with one beginning, at once: it is read once. Others go away while they wait.
#[test]
fn a_beginning_is_read_once_for_all() {
    let folder = tempfile::tempdir().unwrap();
    let want = ask(&engine(limits()).0, asked(1));
    let first = keeping(folder.path(), limits());
    ask(&first.0, asked(1));
    end(first);
    let again = keeping(folder.path(), limits());
    let running: Vec<_> = (0..8).map(|_| again.0.submit(asked(1)).unwrap()).collect();
    for (i, generation) in running.into_iter().enumerate() {
        match i % 3 {
            0 => drop(generation),
            _ => is_same(&collect(generation), &want, 96),
        }
    }
    let stats = end(again);
    let reloaded = stats.kv_reloaded.load(Ordering::Relaxed);
    assert!((6..=12).contains(&reloaded), "{reloaded}");
    assert_eq!(stats.kv_blocks_used.load(Ordering::Relaxed), 0);
}

/// Waits until all that is worth a file has one.
fn written(handle: &EngineHandle) {
    let started = Instant::now();
    while handle.stats().kv_waiting() > 0 {
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", handle.stats());
        thread::sleep(Duration::from_millis(1));
    }
}

/// A chapter at once, a question and an answer once somebody comes with them again; and what is
/// there is not written twice.
#[test]
fn what_is_worth_it_is_written_before_it_has_to_leave() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, thread) = keeping(folder.path(), Limits { context_len: 1024, ..limits() });
    let count = || {
        written(&handle);
        handle.stats().kv_spilled.load(Ordering::Relaxed)
    };
    let chapter = text(1, 16 * KEEP_BLOCKS_MIN as u32);
    let with = |seed: u32| [&chapter[..], &text(seed, 40)].concat();
    ask(&handle, greedy(&text(2, 200), 40));
    assert_eq!(count(), 0, "twelve blocks, asked once");
    ask(&handle, greedy(&chapter, 40));
    assert_eq!(count(), 16, "the chapter, and not what was answered");
    ask(&handle, greedy(&with(3), 40));
    assert_eq!(count(), 16, "and not the question");
    let answer = ask(&handle, greedy(&with(3), 24)).tokens;
    assert_eq!(count(), 19, "the same question, and what both were answered");
    let talk = [with(3), answer, text(4, 20)].concat();
    ask(&handle, greedy(&talk, 8));
    assert_eq!(count(), 20, "what only the first was answered is part of what is asked");
    let stats = handle.stats();
    assert_eq!(stats.prefix_evictions.load(Ordering::Relaxed), 0);
    assert_eq!(stats.kv_dropped.load(Ordering::Relaxed), 0);
    end((handle, thread));
}

/// Twelve long prompts at once, in steps that are never empty: all is written, and nobody's tokens
/// change by it.
#[test]
fn written_while_others_run_equals_not() {
    let folder = tempfile::tempdir().unwrap();
    let roomy = Limits { kv_blocks: 512, context_len: 512, ..limits() };
    let asked = |i: u32| GenerateRequest { logprobs: Some(2), ..greedy(&text(i, 300), 60) };
    let alone: Vec<Answer> = (0..12).map(|i| ask(&engine(roomy.clone()).0, asked(i))).collect();
    let (handle, thread) = keeping(folder.path(), roomy);
    let running: Vec<_> = (0..12).map(|i| handle.submit(asked(i)).unwrap()).collect();
    for (got, want) in running.into_iter().map(collect).zip(&alone) {
        assert_eq!((&got.tokens, &got.logprobs), (&want.tokens, &want.logprobs));
    }
    written(&handle);
    let stats = end((handle, thread));
    let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    assert!(count(&stats.kv_spilled) >= 12 * (300 / 16), "{stats:?}");
    assert_eq!((count(&stats.kv_dropped), count(&stats.prefix_evictions)), (0, 0));
    assert_eq!(stats.kv_blocks_used.load(Ordering::Relaxed), 0);
}

/// A floor without an engine, and a block of it.
fn floor(folder: &Path, block_bytes: usize) -> (Floor, Arc<Stats>, impl Fn(u32) -> Forgotten) {
    let shelf = Arc::new(Shelf::open(folder, 1 << 30, String::new()).unwrap());
    let stats = Arc::new(Stats::default());
    let floor = Floor::new(shelf, CONTENT, "layout", [block_bytes, 16], &stats).unwrap();
    let (scope, before) = (CacheScope::default(), Chain::START);
    let block = move |seed| {
        let text = [seed; 16].into();
        Forgotten { block: BlockId(0), scope, before, depth: 0, text, shared: true }
    };
    (floor, stats, block)
}

#[test]
fn what_is_not_taken_may_be_tried_again_and_costs_no_buffer() {
    let folder = tempfile::tempdir().unwrap();
    let (mut floor, stats, block) = floor(folder.path(), 8 << 20); // eight buffers
    let fill = |out: &mut Vec<u8>| {
        out.resize(1000, 7);
        true
    };
    assert!(floor.keep(&block(1), |_| panic!("it has no name")) && !floor.has_failed());
    floor.know(CacheScope::default(), None);
    assert!(floor.has_failed() && !floor.has_failed(), "now it has, and is asked for once");
    for _ in 0..20 {
        assert!(!floor.keep(&block(1), |_| false));
    }
    assert_eq!((floor.sent_count(), stats.kv_dropped.load(Ordering::Relaxed)), (0, 0));
    assert!(floor.keep(&block(1), fill));
    floor.spill(&block(2), |_| false);
    assert_eq!(stats.kv_dropped.load(Ordering::Relaxed), 1, "that one had to go");
    floor.put_away([3, 4].map(block).into_iter(), |_, out| fill(out));
    assert_eq!(stats.kv_spilled.load(Ordering::Relaxed), 3);
    assert_eq!(stats.kv_waiting(), 0, "and all is flushed");
}

#[test]
fn whose_scope_is_known_stays_known_when_there_are_too_many() {
    let folder = tempfile::tempdir().unwrap();
    let (mut floor, _, block) = floor(folder.path(), 1000);
    let scope = |tenant| CacheScope { adapter: 0, tenant };
    let full = |floor: &mut Floor| (0..4096).for_each(|tenant| floor.know(scope(tenant), None));
    (0..2).for_each(|_| full(&mut floor));
    let is_known = |floor: &mut Floor, tenant| {
        let block = Forgotten { scope: scope(tenant), ..block(1) };
        !floor.keep(&block, |_| false) // no name, no try
    };
    assert!(is_known(&mut floor, 0) && is_known(&mut floor, 4095));
    floor.know(scope(5000), None);
    assert!(!is_known(&mut floor, 0) && is_known(&mut floor, 5000));
    floor.know(scope(0), None);
    assert!(is_known(&mut floor, 0) && floor.has_failed());
}
