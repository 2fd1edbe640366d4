//! Prompts that are computed while another pass waits between two layers: the same answers, bit by
//! bit, and nobody else's trouble.

use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};

use hearth_models::{
    Adapter, Error, ForwardBatch, KvGeometry, KvStore, LoraSlot, ModelConfig, Pass, Walk, Wanted,
};

use super::adapter_tests::sets;
use super::handle::{GenerateRequest, Generation};
use super::tests::*;
use super::*;
use crate::types::Tenant;

/// Where a pass stands still: it says so, and goes on when it is told to.
type Gate = Arc<Mutex<Option<(Sender<()>, Receiver<()>)>>>;

/// A pass fails where a prompt begins with it.
const PANIC: TokenId = 500;

/// A model that waits in the middle of its next pass, once there is a gate.
struct Gated(Box<dyn Model>, Gate);

impl Model for Gated {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore, Error> {
        self.0.kv_store(geometry)
    }

    fn launch(
        &self,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Pass, Error> {
        self.0.launch(batch, kv, wanted)
    }

    fn walk(&self, batch: &ForwardBatch, kv: &mut KvStore) -> Result<Option<Walk>, Error> {
        let begins = batch.positions.iter().zip(&batch.tokens);
        assert!(!begins.into_iter().any(|begins| begins == (&0, &PANIC)), "asked to");
        self.0.walk(batch, kv)
    }

    fn go_on(&self, walk: &mut Walk, kv: &mut KvStore) -> Result<Option<Pass>, Error> {
        if let Some((here, go)) = self.1.lock().unwrap().take() {
            here.send(()).unwrap();
            go.recv().unwrap();
        }
        self.0.go_on(walk, kv)
    }

    fn put_adapters(
        &mut self,
        slot: LoraSlot,
        adapters: &[(Arc<Adapter>, f32)],
    ) -> Result<(), Error> {
        self.0.put_adapters(slot, adapters)
    }

    fn drop_adapters(&mut self, slot: LoraSlot) {
        self.0.drop_adapters(slot);
    }
}

struct Room {
    handle: EngineHandle,
    gate: Gate,
}

/// An engine that knows what a row takes, and that two keys ask.
fn room(limits: Limits) -> Room {
    let gate = Gate::default();
    let gated = Box::new(Gated(model(), Arc::clone(&gate)));
    let (handle, _thread) =
        spawn(gated, STORED.get(), limits, Speculation::default(), None).unwrap();
    for id in [1, 2] {
        ask(&handle, of(id, greedy(&[id as TokenId; 70], 2)));
    }
    Room { handle, gate }
}

fn of(id: u64, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { tenant: Tenant { id, ..Tenant::default() }, ..request }
}

impl Room {
    /// Submits what comes in the middle of a pass.
    fn meanwhile<T>(&self, submit: impl FnOnce() -> T) -> T {
        let ((here, is_here), (go, goes)) = (channel(), channel());
        *self.gate.lock().unwrap() = Some((here, goes));
        is_here.recv().unwrap();
        let submitted = submit();
        go.send(()).unwrap();
        submitted
    }

    fn submit(&self, tenant: u64, request: GenerateRequest) -> Generation {
        self.handle.submit(of(tenant, request)).unwrap()
    }

    /// Requests of one key, of which many run.
    fn greedy(&self) -> Vec<Generation> {
        let (stats, before) = (self.handle.stats(), 2 * 2);
        let several = (0..12).map(|i| self.submit(1, longer(i))).collect();
        while stats.generated_tokens.load(Ordering::Relaxed) < before + 12 {
            std::thread::yield_now();
        }
        several
    }

    fn interjected(&self) -> u64 {
        self.handle.stats().interjected.load(Ordering::Relaxed)
    }
}

/// Request `i` of the varied set, with a longer answer.
fn longer(i: u32) -> GenerateRequest {
    GenerateRequest { max_tokens: 60, ..request(i) }
}

#[test]
fn a_prompt_between_two_layers_changes_no_answer() {
    let sets = sets();
    // Prompts that the others have, and prompts with adapters of their own.
    let others = || (20..26u32).map(|i| (u64::from(i), i, sets[i as usize % sets.len()].clone()));
    let other = |i: u32, adapters| GenerateRequest { adapters, ..request(i % 8) };
    let (plain, _thread) = engine(limits());
    let alone: Vec<_> = (0..12).map(|i| ask(&plain, longer(i)).tokens).collect();
    let apart: Vec<_> = others().map(|(_, i, set)| ask(&plain, other(i, set)).tokens).collect();
    // Where there is no place, or no block, they wait.
    for (limits, has_room) in [
        (limits(), true),
        (Limits { batch_tokens: 18, ..limits() }, true),
        (Limits { running_len: 6, ..limits() }, false),
        (Limits { kv_blocks: 40, ..limits() }, false),
    ] {
        let room = room(limits);
        let greedy = room.greedy();
        let newcomers: Vec<_> = others()
            .map(|(tenant, i, set)| room.meanwhile(|| room.submit(tenant, other(i, set))))
            .collect();
        let said: Vec<_> = newcomers.into_iter().map(|g| collect(g).tokens).collect();
        assert_eq!(said, apart);
        let said: Vec<_> = greedy.into_iter().map(|g| collect(g).tokens).collect();
        assert_eq!(said, alone);
        wait_until_idle(&room.handle);
        assert!(!has_room || room.interjected() > 0, "nobody was computed apart");
        assert_eq!(room.handle.stats().kv_blocks_used.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn it_has_its_token_before_the_pass_that_waits_is_over() {
    let room = room(Limits { target_itl: Duration::from_secs(1), ..limits() });
    let greedy = room.greedy();
    let (newcomer, steps) = room.meanwhile(|| {
        let steps = room.handle.stats().steps.load(Ordering::Relaxed);
        (room.submit(2, GenerateRequest { max_tokens: 1, ..request(7) }), steps)
    });
    assert_eq!(collect(newcomer).tokens.len(), 1);
    // Its own step was counted when it heard of its end, and none that began after it came.
    let passed = room.handle.stats().steps.load(Ordering::Relaxed) - steps;
    assert!(passed >= 1 && room.interjected() == 1, "{passed} steps");
    greedy.into_iter().for_each(|g| assert!(collect(g).failed.is_none()));
}

#[test]
fn what_fails_between_two_layers_fails_alone() {
    let (plain, _thread) = engine(limits());
    let alone: Vec<_> = (0..12).map(|i| ask(&plain, longer(i)).tokens).collect();
    let room = room(limits());
    let others = room.greedy();
    let failing = room.meanwhile(|| room.submit(2, greedy(&[PANIC, 1, 2], 4)));
    let message = collect(failing).failed.expect("it fails");
    assert!(message.contains("asked to"), "{message}");
    assert_eq!(room.interjected(), 1);
    let said: Vec<_> = others.into_iter().map(|g| collect(g).tokens).collect();
    assert_eq!(said, alone);
    wait_until_idle(&room.handle);
}

#[test]
fn who_has_an_answer_running_waits_for_the_end_of_the_pass() {
    let room = room(Limits { target_itl: Duration::from_secs(1), ..limits() });
    let others = room.greedy();
    let mut first = room.submit(2, greedy(&[5; 9], 120));
    first_token(&mut first);
    let before = room.interjected();
    let more = [1, 2].map(|tenant| room.meanwhile(|| room.submit(tenant, greedy(&[6; 9], 2))));
    more.into_iter().for_each(|g| assert_eq!(collect(g).tokens.len(), 2));
    assert_eq!(room.interjected(), before);
    drop((others, first));
    wait_until_idle(&room.handle);
}
