//! Grammars on a device that chooses: the tokens that the host chooses, whether the set is there in
//! time or not, and no row is read out.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::flight_tests::{count, remote};
use super::grammar::tests::{Sevens, mixed, under};
use super::handle::GenerateRequest;
use super::tests::*;
use super::*;

/// Request `i` of the mixed set, half of which is under a grammar, as a device answers it.
fn masked(i: u32, delay_ms: u64) -> GenerateRequest {
    GenerateRequest { logprobs: None, ..mixed(i, delay_ms) }
}

#[test]
fn a_device_under_masks_says_what_the_host_says() {
    let (plain, _thread) = engine(limits());
    let single: Vec<_> = (0..12).map(|i| ask(&plain, masked(i, 0)).tokens).collect();
    for (limits, delay_ms) in [
        (limits(), 0),
        (limits(), 3),
        (Limits { kv_blocks: 16, ..limits() }, 0),
        (Limits { kv_blocks: 16, ..limits() }, 2),
        (Limits { batch_tokens: 5, running_len: 3, ..limits() }, 1),
    ] {
        let preempts = limits.kv_blocks == 16;
        let (handle, seen) = remote(limits, Speculation::default());
        let running: Vec<_> =
            (0..12).map(|i| handle.submit(masked(i, delay_ms)).unwrap()).collect();
        let together: Vec<_> = running.into_iter().map(|g| collect(g).tokens).collect();
        assert_eq!(together, single);
        wait_until_idle(&handle);
        assert!(!preempts || count(&handle.stats().preemptions) > 0);
        assert_eq!(count(&seen.read_out), 0, "no logits come back");
        assert!(delay_ms == 0 || count(&seen.kept) > 10, "{} rows were kept", count(&seen.kept));
        assert_eq!(handle.stats().kv_blocks_used.load(Ordering::Relaxed), 0);
        assert_eq!(seen.under_way.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn a_slow_grammar_waits_and_nobody_with_it() {
    let (plain, _thread) = engine(limits());
    let slow = |delay| under(Sevens { delay, ..Sevens::new(3) }, greedy(&[5], 20));
    let want = ask(&plain, slow(Duration::ZERO)).tokens;
    let (handle, seen) = remote(limits(), Speculation::default());
    let delay = Duration::from_millis(400);
    let answer = handle.submit(slow(delay)).unwrap();
    let began = Instant::now();
    assert_eq!(ask(&handle, greedy(&[6], 100)).tokens.len(), 100);
    assert!(began.elapsed() < 2 * delay, "{:?}", began.elapsed());
    let answer = collect(answer);
    assert_eq!((answer.tokens, answer.end.unwrap().0), (want, FinishReason::Stop));
    assert_eq!((count(&seen.read_out), count(&seen.kept)), (0, 4), "one for each set");
}

#[test]
fn a_grammar_that_ends_or_breaks_does_so_on_a_device_too() {
    let (handle, seen) = remote(limits(), Speculation::default());
    for delay in [Duration::ZERO, Duration::from_millis(5)] {
        let nine = ask(&handle, under(Sevens { delay, ..Sevens::new(9) }, greedy(&[1, 2, 3], 50)));
        assert_eq!((nine.tokens.len(), nine.end.unwrap().0), (9, FinishReason::Stop));
        let broken = Sevens { delay, panics: true, ..Sevens::new(9) };
        let company = handle.submit(greedy(&[6], 30)).unwrap();
        let broken = ask(&handle, under(broken, greedy(&[1], 9)));
        assert!(broken.failed.unwrap().contains("panicked"));
        assert_eq!(collect(company).tokens.len(), 30);
    }
    assert_eq!(count(&seen.read_out), 0);
}

/// Whose token was asked for beside a pass that fails is told so, and the engine goes on.
#[test]
fn a_pass_that_fails_takes_the_late_ones_beside_it_along() {
    let (handle, seen) = remote(limits(), Speculation::default());
    let delay = Duration::from_millis(1);
    let slow = || under(Sevens { delay, ..Sevens::new(300) }, greedy(&[5, 6], 200));
    for after in [1, 3, 8, 15] {
        let mut company = handle.submit(greedy(&[6], 250)).unwrap();
        let answers: Vec<_> = (0..3).map(|_| handle.submit(slow()).unwrap()).collect();
        first_token(&mut company);
        first_tokens(&mut company, after - 1);
        seen.fails.store(true, Ordering::Release);
        // A pass that comes later than that, even if all of the others were over by then.
        let last = handle.submit(greedy(&[6], 2)).unwrap();
        let answers = answers.into_iter().chain([last]);
        let failed = answers.map(collect).filter_map(|answer| answer.failed).count();
        let company = collect(company).failed;
        assert!(failed > 0 || company.is_some(), "a pass failed");
        wait_until_idle(&handle);
        assert_eq!(handle.stats().kv_blocks_used.load(Ordering::Relaxed), 0);
    }
    assert!(count(&seen.kept) > 0);
    assert_eq!(seen.under_way.load(Ordering::Relaxed), 0);
}
