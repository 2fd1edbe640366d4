//! Prompts that are computed while another pass waits between two layers: the same answers, bit by
//! bit, and nobody else's trouble.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize};
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
type Gate = (Sender<()>, Receiver<()>);

/// A pass fails where a prompt begins with it: at once, or behind its first layer.
const PANIC: TokenId = 500;
const PANIC_LATER: TokenId = 501;

/// A model that waits in the middle of its next pass once there are gates: at each in turn, before
/// one and the same pass goes on.
struct Gated {
    model: Box<dyn Model>,
    gates: Arc<Mutex<Vec<Gate>>>,
    /// Where the pass is that waited.
    waited: Mutex<Option<usize>>,
    fails: AtomicBool,
    /// Passes that began before all their blocks had memory.
    lacking: Arc<AtomicUsize>,
}

impl Model for Gated {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore, Error> {
        self.model.kv_store(geometry)
    }

    fn launch(
        &self,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Pass, Error> {
        self.model.launch(batch, kv, wanted)
    }

    fn walk(&self, batch: &ForwardBatch, kv: &mut KvStore) -> Result<Option<Walk>, Error> {
        let begins = |token| batch.positions.iter().zip(&batch.tokens).any(|b| b == (&0, &token));
        assert!(!begins(PANIC), "asked to");
        self.fails.fetch_or(begins(PANIC_LATER), Ordering::Relaxed);
        let last = batch.slot_mapping.iter().max().unwrap();
        let lacks = kv.provide(*last as usize / limits().block_len + 1);
        self.lacking.fetch_add(usize::from(lacks), Ordering::Relaxed);
        self.model.walk(batch, kv)
    }

    fn go_on(&self, walk: &mut Walk, kv: &mut KvStore) -> Result<Option<Pass>, Error> {
        let pass = std::ptr::from_ref(walk).addr();
        let waits = self.waited.lock().unwrap().is_none_or(|waited| waited == pass);
        let gate = if waits { self.gates.lock().unwrap().pop() } else { None };
        if let Some((here, go)) = gate {
            *self.waited.lock().unwrap() = Some(pass);
            here.send(()).unwrap();
            go.recv().unwrap();
        }
        if self.gates.lock().unwrap().is_empty() {
            *self.waited.lock().unwrap() = None;
        }
        let went = self.model.go_on(walk, kv);
        assert!(!self.fails.swap(false, Ordering::Relaxed), "asked to");
        went
    }

    fn put_adapters(
        &mut self,
        slot: LoraSlot,
        adapters: &[(Arc<Adapter>, f32)],
    ) -> Result<(), Error> {
        self.model.put_adapters(slot, adapters)
    }

    fn drop_adapters(&mut self, slot: LoraSlot) {
        self.model.drop_adapters(slot);
    }
}

struct Room {
    handle: EngineHandle,
    gates: Arc<Mutex<Vec<Gate>>>,
    lacking: Arc<AtomicUsize>,
}

/// An engine that knows what a row takes, and that two keys ask.
fn room(limits: Limits) -> Room {
    let (gates, lacking) = (Arc::<Mutex<Vec<Gate>>>::default(), Arc::<AtomicUsize>::default());
    let gated = Box::new(Gated {
        model: model(),
        gates: Arc::clone(&gates),
        waited: Mutex::default(),
        fails: AtomicBool::default(),
        lacking: Arc::clone(&lacking),
    });
    let (handle, _thread) =
        spawn(gated, STORED.get(), limits, Speculation::default(), None).unwrap();
    for id in [1, 2] {
        ask(&handle, of(id, greedy(&[id as TokenId; 70], 2)));
    }
    Room { handle, gates, lacking }
}

fn of(id: u64, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { tenant: Tenant { id, ..Tenant::default() }, ..request }
}

impl Room {
    /// Submits what comes in the middle of a pass.
    fn meanwhile<T>(&self, submit: impl FnOnce() -> T) -> T {
        self.meanwhile_and_before_it_goes_on(submit, |submitted| submitted)
    }

    /// The same, and what is to be seen before that pass is at its next layer but one.
    fn meanwhile_and_before_it_goes_on<T, U>(
        &self,
        submit: impl FnOnce() -> T,
        see: impl FnOnce(T) -> U,
    ) -> U {
        let [(first, is_first), (second, is_second)] = [channel(), channel()];
        let [(go, goes), (end, ends)] = [channel(), channel()];
        *self.gates.lock().unwrap() = vec![(second, ends), (first, goes)];
        is_first.recv().unwrap();
        let submitted = submit();
        go.send(()).unwrap();
        is_second.recv().unwrap();
        let seen = see(submitted);
        end.send(()).unwrap();
        seen
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
    // Where there is no block they wait; where there is no place, one is made.
    for (limits, has_room) in [
        (limits(), true),
        (Limits { batch_tokens: 18, ..limits() }, true),
        (Limits { running_len: 6, ..limits() }, true),
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
    let request = GenerateRequest { max_tokens: 1, ..request(7) };
    let interjected = room.meanwhile_and_before_it_goes_on(
        || room.submit(2, request),
        |newcomer| {
            let interjected = room.interjected();
            assert!(interjected == 0 || collect(newcomer).tokens.len() == 1);
            interjected
        },
    );
    assert_eq!(interjected, 1);
    greedy.into_iter().for_each(|g| assert!(collect(g).failed.is_none()));
}

#[test]
fn what_fails_between_two_layers_fails_alone() {
    let (plain, _thread) = engine(limits());
    let alone: Vec<_> = (0..12).map(|i| ask(&plain, longer(i)).tokens).collect();
    let room = room(limits());
    let others = room.greedy();
    for (tenant, token) in [(2, PANIC), (3, PANIC_LATER)] {
        let failing = room.meanwhile(|| room.submit(tenant, greedy(&[token, 1, 2], 4)));
        let message = collect(failing).failed.expect("it fails");
        assert!(message.contains("asked to"), "{message}");
    }
    assert_eq!(room.interjected(), 2);
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

#[test]
fn blocks_have_their_memory_before_the_pass_that_writes_them() {
    let room = room(limits());
    let answers: Vec<_> = (0..8).map(|i| room.submit(1, greedy(&[9 + i; 4], 200))).collect();
    answers.into_iter().for_each(|answer| assert_eq!(collect(answer).tokens.len(), 200));
    // Of the very first pass nothing was known, and it is provided for layer by layer.
    let lacking = room.lacking.load(Ordering::Relaxed);
    assert!(lacking <= 2, "{lacking} passes, with 8 new blocks every 16 tokens");
}
