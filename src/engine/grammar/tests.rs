//! Sequences under a grammar: in any batch, preempted, beside others that have none, and with a
//! grammar that takes its time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::handle::{GenerateRequest, Limits};
use super::super::tests::{alone, ask, collect, engine, greedy, limits, request};
use super::*;
use crate::types::FinishReason;

/// The token at place `i` leaves the rest `i % 7` when divided by 7; there are `len` of them.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Sevens {
    pub len: usize,
    pub delay: Duration,
    pub panics: bool,
}

impl Sevens {
    pub fn new(len: usize) -> Self {
        Self { len, delay: Duration::ZERO, panics: false }
    }
}

struct Place(Sevens, usize);

impl Grammar for Sevens {
    fn start(&self) -> Box<dyn MaskSource> {
        Box::new(Place(*self, 0))
    }
}

impl MaskSource for Place {
    fn advance(&mut self, token: TokenId) {
        assert_eq!(token as usize % 7, self.1 % 7, "what was forbidden came");
        self.1 += 1;
    }

    fn allowed(&mut self) -> Allowed {
        thread::sleep(self.0.delay);
        assert!(!(self.0.panics && self.1 == 2), "asked to");
        if self.1 == self.0.len {
            return Allowed::End;
        }
        let mut words = vec![0u32; 16];
        for id in (0..512).filter(|id| id % 7 == self.1 % 7) {
            words[id / 32] |= 1 << (id % 32);
        }
        Allowed::Only(Mask(words))
    }
}

pub(in crate::engine) fn under(grammar: Sevens, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { grammar: Some(Arc::new(grammar)), ..request }
}

#[test]
fn a_mask_forbids_what_is_not_in_it() {
    let mut mask = Mask(vec![0; 3]);
    mask.0[0] = 0b101;
    mask.0[1] = u32::MAX;
    let mut logits = vec![1.0; 130];
    mask.apply(&mut logits);
    let left = logits.iter().enumerate().filter(|(_, l)| l.is_finite()).map(|(i, _)| i);
    assert_eq!(left.collect::<Vec<_>>(), [vec![0, 2], (32..64).collect()].concat());
}

#[test]
fn a_grammar_decides_what_comes_and_when_it_ends() {
    let (handle, _thread) = engine(limits());
    let answer = ask(&handle, under(Sevens::new(9), greedy(&[1, 2, 3], 50)));
    assert_eq!(
        answer.tokens.iter().map(|t| t % 7).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5, 6, 0, 1]
    );
    let (reason, usage) = answer.end.unwrap();
    assert_eq!((reason, usage.completion), (FinishReason::Stop, 9));
    let cut = ask(&handle, under(Sevens::new(9), greedy(&[1, 2, 3], 4)));
    assert_eq!(cut.tokens, answer.tokens[..4]);
    assert_eq!(cut.end.unwrap().0, FinishReason::Length);
}

/// Even requests of the varied set are under a grammar, some of them slow.
pub(in crate::engine) fn mixed(i: u32, delay_ms: u64) -> GenerateRequest {
    let delay = Duration::from_millis(delay_ms * u64::from(i.is_multiple_of(4)));
    match i % 2 {
        0 => under(Sevens { delay, ..Sevens::new(30) }, request(i)),
        _ => request(i),
    }
}

#[test]
fn neither_company_nor_preemption_nor_patience_changes_a_token() {
    let (handle, _thread) = engine(limits());
    let single: Vec<_> = (0..12).map(|i| ask(&handle, mixed(i, 0)).tokens).collect();
    for (limits, delay_ms) in
        [(limits(), 0), (limits(), 3), (Limits { kv_blocks: 16, ..limits() }, 2)]
    {
        let preempts = limits.kv_blocks == 16;
        let (handle, _thread) = engine(limits);
        let running: Vec<_> = (0..12).map(|i| handle.submit(mixed(i, delay_ms)).unwrap()).collect();
        let together: Vec<_> = running.into_iter().map(|g| collect(g).tokens).collect();
        assert_eq!(together, single);
        assert!(!preempts || handle.stats().preemptions.load(Ordering::Relaxed) > 0);
    }
    for (i, (tokens, _)) in alone().into_iter().enumerate().filter(|(i, _)| i % 2 == 1) {
        assert_eq!(single[i], tokens, "request {i} has no grammar");
    }
}

#[test]
fn nobody_waits_for_a_slow_grammar_of_somebody_else() {
    let (handle, _thread) = engine(limits());
    let delay = Duration::from_millis(400);
    let slow = handle.submit(under(Sevens { delay, ..Sevens::new(3) }, greedy(&[5], 20))).unwrap();
    let began = std::time::Instant::now();
    assert_eq!(ask(&handle, greedy(&[6], 100)).tokens.len(), 100);
    assert!(began.elapsed() < 2 * delay, "{:?}", began.elapsed());
    assert_eq!(collect(slow).tokens.len(), 3);
}

#[test]
fn a_grammar_that_panics_fails_its_sequence_and_nothing_else() {
    let (handle, _thread) = engine(limits());
    let broken = under(Sevens { panics: true, ..Sevens::new(9) }, greedy(&[1], 9));
    assert!(ask(&handle, broken).failed.unwrap().contains("panicked"));
    assert_eq!(ask(&handle, under(Sevens::new(5), greedy(&[1], 9))).tokens.len(), 5);
}
