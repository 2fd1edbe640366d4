//! An engine that runs ahead says what one says that does not: on a model whose passes are computed
//! by another thread, in order, with keys and values that only that thread has.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};

use hearth_kernels::sampling::{self, Scratch};
use hearth_models::{
    Adapter, Error, ForwardBatch, Kept, KvGeometry, KvStore, LoraSlot, Made, ModelConfig, Output,
    Pass, Pick, RowOutput, Wanted,
};

use super::adapter_tests::sets;
use super::grammar::Mask;
use super::handle::{GenerateRequest, SamplingParams};
use super::readers_tests::stand_aside;
use super::speculate_tests::{Even, always, counts, same, varied};
use super::tests::*;
use super::*;

/// Request `i` of the varied set, as a device answers it: without what was probable.
pub(super) fn request(i: u32) -> GenerateRequest {
    GenerateRequest { logprobs: None, ..super::tests::request(i) }
}

/// What became of passes, told to the test.
#[derive(Default)]
pub(super) struct Seen {
    /// Asked for and not waited for.
    pub under_way: AtomicUsize,
    /// Asked for while another one was under way.
    ahead: AtomicU64,
    /// Tokens that were read where they were chosen.
    read: AtomicU64,
    /// Rows whose logits came back, and rows that stayed.
    pub read_out: AtomicU64,
    pub kept: AtomicU64,
    /// The next pass fails.
    pub fails: AtomicBool,
}

/// A model that is somewhere else.
struct Remote {
    config: ModelConfig,
    jobs: Sender<Job>,
    seen: Arc<Seen>,
    /// Of rows that are kept.
    names: AtomicU64,
}

enum Job {
    Store(KvGeometry),
    Put(LoraSlot, Vec<(Arc<Adapter>, f32)>),
    Drop(LoraSlot),
    Pass(Box<ForwardBatch>, Vec<Wanted>, u64, SyncSender<Result<Output, String>>),
    /// A token out of a row that was kept.
    Choose(u64, Box<Pick>, SyncSender<Result<Output, String>>),
}

impl Remote {
    fn new(mut model: Box<dyn Model>) -> (Box<Self>, Arc<Seen>) {
        let (config, seen) = (model.config().clone(), Arc::<Seen>::default());
        let (jobs, todo) = channel();
        let notes = Arc::clone(&seen);
        std::thread::spawn(move || {
            let (mut kv, mut rows) = (KvStore::Nothing, Left::default());
            for (i, job) in todo.into_iter().enumerate() {
                match job {
                    Job::Store(geometry) => kv = model.kv_store(geometry).unwrap(),
                    Job::Put(slot, adapters) => model.put_adapters(slot, &adapters).unwrap(),
                    Job::Drop(slot) => model.drop_adapters(slot),
                    Job::Choose(name, pick, reply) => {
                        let row = rows.kept.remove(&name).expect("kept, and chosen from once");
                        let token = choose(&row, &pick, &mut Scratch::new());
                        let _ = reply.send(Ok(Output::new(Vec::new(), vec![Made::Token(token)])));
                    }
                    Job::Pass(batch, wanted, name, reply) => {
                        // Results are sometimes there before they are asked for.
                        std::thread::sleep(Duration::from_micros(150 * (i as u64 % 3)));
                        let fails = notes.fails.swap(false, Ordering::AcqRel);
                        let work = || compute(&*model, *batch, &wanted, name, &mut kv, &mut rows);
                        let made = catch_unwind(AssertUnwindSafe(work));
                        let made = made.unwrap_or_else(|_| Err("a pass panicked".to_owned()));
                        let failed = Err("a pass was to fail".to_owned());
                        let _ = reply.send(if fails { failed } else { made });
                    }
                }
            }
        });
        let names = AtomicU64::new(0);
        (Box::new(Self { config, jobs, seen: Arc::clone(&seen), names }), seen)
    }

    /// A row that stays there.
    fn kept(&self, name: u64) -> Kept {
        let jobs = self.jobs.clone();
        Kept::new(move |pick| {
            let (reply, made) = sync_channel(1);
            jobs.send(Job::Choose(name, Box::new(pick), reply)).unwrap();
            Ok(Pass::new(move || made.recv().unwrap().map_err(Error::Batch)))
        })
    }
}

/// What a pass leaves where it was computed.
#[derive(Default)]
struct Left {
    /// What became of its logit rows.
    made: Vec<Made>,
    /// Rows that were kept, also of passes before it.
    kept: BTreeMap<u64, Vec<f32>>,
}

/// One pass, with the tokens of the one before it. Rows that are kept are named after `name`.
fn compute(
    model: &dyn Model,
    mut batch: ForwardBatch,
    wanted: &[Wanted],
    name: u64,
    kv: &mut KvStore,
    left: &mut Left,
) -> Result<Output, String> {
    for (row, from) in std::mem::take(&mut batch.chosen) {
        let Made::Token(token) = left.made[from as usize] else { panic!("it chose no token") };
        batch.tokens[row as usize] = token.unwrap_or(0);
    }
    let output = model.step(&batch, kv, &[]).map_err(|e| e.to_string())?;
    let (mut rest, mut scratch) = (Vec::new(), Scratch::new());
    left.made.clear();
    for (row, wanted) in wanted.iter().enumerate() {
        let RowOutput::Logits(logits) = output.row(row, model.config().vocab_len) else {
            panic!("nothing was to be chosen");
        };
        left.made.push(match wanted {
            Wanted::Token(pick) => Made::Token(choose(logits, pick, &mut scratch)),
            Wanted::Logits => {
                rest.extend_from_slice(logits);
                Made::Logits
            }
            Wanted::Kept => {
                left.kept.insert(name + row as u64, logits.to_vec());
                Made::Kept
            }
        });
    }
    Ok(Output::new(rest, left.made.clone()))
}

/// As on a device.
fn choose(logits: &[f32], pick: &Pick, scratch: &mut Scratch) -> Option<u32> {
    let mut row = logits[..pick.vocab_len].to_vec();
    for edit in &pick.edits {
        let x = &mut row[edit.token as usize];
        if edit.divide != 1.0 {
            *x = if *x > 0.0 { *x / edit.divide } else { *x * edit.divide };
        }
        *x = *x - edit.subtract + edit.add;
    }
    if let Some(mask) = &pick.mask {
        Mask(mask.clone()).apply(&mut row);
    }
    sampling::sample(&row, &pick.params, pick.seed, pick.position, scratch)
}

impl Model for Remote {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore, Error> {
        self.jobs.send(Job::Store(geometry)).unwrap();
        Ok(KvStore::Nothing)
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn launch(
        &self,
        batch: &ForwardBatch,
        _: &mut KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Pass, Error> {
        let under_way = self.seen.under_way.fetch_add(1, Ordering::AcqRel);
        assert!(under_way < 2, "two at most");
        self.seen.ahead.fetch_add(under_way as u64, Ordering::Relaxed);
        self.seen.read.fetch_add(batch.chosen.len() as u64, Ordering::Relaxed);
        let (wanted, name) = (wanted(), self.names.fetch_add(1 << 20, Ordering::Relaxed));
        let rows = |of: Wanted| wanted.iter().filter(|wanted| **wanted == of).count() as u64;
        self.seen.read_out.fetch_add(rows(Wanted::Logits), Ordering::Relaxed);
        self.seen.kept.fetch_add(rows(Wanted::Kept), Ordering::Relaxed);
        let (reply, made) = sync_channel(1);
        let kept = wanted.iter().enumerate().filter(|(_, wanted)| **wanted == Wanted::Kept);
        let kept = kept.map(|(row, _)| (row, self.kept(name + row as u64))).collect();
        self.jobs.send(Job::Pass(Box::new(batch.clone()), wanted, name, reply)).unwrap();
        let landed = Landed(Arc::clone(&self.seen));
        let pass = Pass::new(move || {
            let made = made.recv().unwrap().map_err(Error::Batch);
            drop(landed);
            made
        });
        Ok(pass.keeping(kept))
    }

    fn put_adapters(&mut self, slot: LoraSlot, all: &[(Arc<Adapter>, f32)]) -> Result<(), Error> {
        self.jobs.send(Job::Put(slot, all.to_vec())).unwrap();
        Ok(())
    }

    fn drop_adapters(&mut self, slot: LoraSlot) {
        self.jobs.send(Job::Drop(slot)).unwrap();
    }
}

/// A pass that nobody waits for any more.
struct Landed(Arc<Seen>);

impl Drop for Landed {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(super) fn remote(limits: Limits, speculation: Speculation) -> (EngineHandle, Arc<Seen>) {
    let (remote, seen) = Remote::new(model());
    (spawn(remote, STORED.get(), limits, speculation, None).unwrap().0, seen)
}

pub(super) fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn no_token_changes_alone_in_company_in_small_batches_or_without_blocks() {
    let requests = varied();
    let (plain, _thread) = engine(limits());
    let in_turn: Vec<Answer> = requests.iter().map(|r| ask(&plain, r.clone())).collect();
    let (handle, seen) = remote(limits(), Speculation::default());
    for (request, in_turn) in requests.iter().zip(&in_turn) {
        same(&ask(&handle, request.clone()), in_turn);
    }
    assert!(count(&seen.read) > 100, "{} tokens were read ahead", count(&seen.read));
    for limits in [
        limits(),
        Limits { batch_tokens: 5, running_len: 3, ..limits() },
        Limits { kv_blocks: 16, ..limits() },
    ] {
        for speculation in [Speculation::default(), always()] {
            let scarce = limits.kv_blocks == 16;
            let guesses = speculation.is_on();
            let (handle, seen) = remote(limits.clone(), speculation);
            let running = handle.submit_all(requests.clone()).unwrap();
            for (generation, in_turn) in running.into_iter().zip(&in_turn) {
                same(&collect(generation), in_turn);
            }
            wait_until_idle(&handle);
            let stats = handle.stats();
            assert!(!scarce || count(&stats.preemptions) > 0);
            assert!(count(&seen.read) > 0 && (!guesses || counts(&handle).1 > 0));
            assert_eq!(stats.kv_blocks_used.load(Ordering::Relaxed), 0);
            assert_eq!(seen.under_way.load(Ordering::Relaxed), 0);
        }
    }
}

#[test]
fn one_row_too_many_is_computed_for_a_stop_token_and_none_for_a_length() {
    let (plain, _thread) = engine(limits());
    let free = ask(&plain, greedy(&[5, 6, 7], 24)).tokens;
    let (handle, seen) = remote(limits(), Speculation::default());
    assert_eq!(ask(&handle, greedy(&[5, 6, 7], 24)).tokens, free);
    wait_until_idle(&handle);
    let computed = || count(&handle.stats().computed_tokens);
    assert_eq!((computed(), count(&seen.ahead)), (3 + 23, 23), "all but the first");
    let stop = free[9];
    let len = free.iter().position(|&token| token == stop).unwrap() + 1;
    let stopping = GenerateRequest { stop_ids: [stop].into(), ..greedy(&[5, 6, 7], 24) };
    let answer = ask(&handle, stopping);
    assert_eq!((&answer.tokens[..], answer.end.unwrap().0), (&free[..len], FinishReason::Stop));
    let before = computed();
    while seen.under_way.load(Ordering::Relaxed) > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(before <= 26 + 3 + len as u64 && len > 1);
    assert_eq!(ask(&handle, greedy(&[1], 1)).tokens.len(), 1, "and the engine rests in between");
    assert_eq!(computed(), 26 + 3 + len as u64 + 1);
}

#[test]
fn whoever_needs_the_host_waits_for_it_and_nobody_with_it() {
    let needs_host = |i: u32| {
        let mut one = GenerateRequest { max_tokens: 20, ..request(3 * i) }; // greedy
        match i % 3 {
            0 => one.logprobs = Some(2),
            1 => one.grammar = Some(Arc::new(Even)),
            _ => one.sampling.presence_penalty = 0.5,
        }
        one
    };
    let (handle, seen) = remote(limits(), Speculation::default());
    let all: Vec<_> = (0..6).map(|i| handle.submit(needs_host(i)).unwrap()).collect();
    all.into_iter().for_each(|g| assert_eq!(collect(g).tokens.len(), 20));
    assert_eq!((count(&seen.ahead), count(&seen.read)), (0, 0), "nothing to run ahead for");
    // One that does not need it moves in every step, in company as alone.
    let mut free = handle.submit(greedy(&[1, 2, 3], 200)).unwrap();
    first_token(&mut free);
    let all: Vec<_> = (0..6).map(|i| handle.submit(needs_host(i)).unwrap()).collect();
    let steps = || count(&handle.stats().steps);
    let before = steps();
    assert_eq!(collect(free).tokens.len(), 199);
    assert!(steps() - before <= 200, "{} steps", steps() - before);
    assert!(count(&seen.read) >= 190, "{} of its rows were ahead", count(&seen.read));
    all.into_iter().for_each(|g| assert_eq!(collect(g).tokens.len(), 20));
}

#[test]
fn some_leave_and_others_come_while_passes_are_under_way() {
    let alone = alone();
    for limits in [roomy(), Limits { kv_blocks: 40, context_len: 600, ..roomy() }] {
        let scarce = limits.kv_blocks == 40;
        let (handle, seen) = remote(limits, Speculation::default());
        let long = if scarce { 500 } else { ENDLESS };
        let mut leaving: Vec<_> =
            (0..3).map(|i| handle.submit(greedy(&[3 + i; 40], long)).unwrap()).collect();
        leaving.iter_mut().for_each(first_token);
        let mut staying = Vec::new();
        for i in 0..12 {
            staying.push(handle.submit(request(i)).unwrap());
            if i % 4 == 1
                && let Some(one) = leaving.pop()
            {
                if i == 1 { one.stop() } else { drop(one) }
            }
        }
        for (generation, (alone, _)) in staying.into_iter().zip(&alone) {
            assert_eq!(&collect(generation).tokens, alone);
        }
        wait_until_idle(&handle);
        assert_eq!(handle.stats().kv_blocks_used.load(Ordering::Relaxed), 0);
        assert!(count(&seen.ahead) > 10);
    }
}

#[test]
fn forks_and_cached_prefixes_are_what_they_are_in_turn() {
    let prompt: Vec<TokenId> = (0..75).map(|i| (i * 29 + 5) % 480).collect();
    let sampling = SamplingParams { top_p: 0.95, ..SamplingParams::default() };
    let with = |seed| GenerateRequest { sampling, seed, ..greedy(&prompt, 25) };
    let (plain, _thread) = engine(limits());
    let in_turn: Vec<_> = (0..6).map(|seed| ask(&plain, with(seed)).tokens).collect();
    for limits in [limits(), Limits { running_len: 4, ..limits() }] {
        let (handle, seen) = remote(limits, Speculation::default());
        let company = handle.submit(request(4)).unwrap();
        for cached in [false, true] {
            let all = handle.submit_all((0..6).map(with).collect()).unwrap();
            for (generation, in_turn) in all.into_iter().zip(&in_turn) {
                let answer = collect(generation);
                assert_eq!(&answer.tokens, in_turn);
                assert!(!cached || answer.end.unwrap().1.cached >= 64);
            }
        }
        // The answer is known by its text as far as it is known at all.
        let next = [&prompt[..], &in_turn[2], &[1, 2, 3]].concat();
        let answer = ask(&handle, greedy(&next, 10));
        assert_eq!(answer.tokens, ask(&plain, greedy(&next, 10)).tokens);
        assert_eq!(answer.end.unwrap().1.cached, 96);
        assert!(count(&seen.read) > 20);
        collect(company);
    }
}

#[test]
fn a_pass_that_fails_takes_its_sequences_along_and_nothing_is_known_of_its_blocks() {
    let prompt: Vec<TokenId> = (0..40).collect();
    let (plain, _thread) = engine(limits());
    let want = ask(&plain, greedy(&prompt, 30)).tokens;
    let (handle, seen) = remote(limits(), Speculation::default());
    for after in [0, 1, 8, 20] {
        let mut generation = handle.submit(greedy(&prompt, 200)).unwrap();
        if after > 0 {
            first_token(&mut generation);
            first_tokens(&mut generation, after - 1);
        }
        seen.fails.store(true, Ordering::Release);
        assert!(collect(generation).failed.unwrap().contains("was to fail"));
        wait_until_idle(&handle);
        assert_eq!(handle.stats().kv_blocks_used.load(Ordering::Relaxed), 0);
        assert_eq!(ask(&handle, greedy(&prompt, 30)).tokens, want, "after {after}");
    }
    assert_eq!(count(&handle.stats().failures), 4);
    assert_eq!(seen.under_way.load(Ordering::Relaxed), 0);
}

/// Eight answers that together say more than may be unread, beside one that is read: all of them
/// have a row in every step, which is asked for before the one before it is done.
#[test]
fn who_is_not_read_stands_aside_while_steps_run_ahead_and_comes_back_to_its_text() {
    const TOKENS: usize = 1400;
    let limits = Limits { context_len: 2048, kv_blocks: 2048, ..limits() };
    let sampling = SamplingParams { top_p: 0.9, top_k: 40, ..SamplingParams::default() };
    let long = |seed| GenerateRequest { sampling, seed, ..greedy(&[11, 7, 5], TOKENS) };
    let (plain, _thread) = engine(limits.clone());
    let in_turn: Vec<Answer> = (0..10).map(|seed| ask(&plain, long(seed))).collect();
    let (handle, seen) = remote(limits, Speculation::default());
    let read = |generation| std::thread::spawn(move || collect(generation));
    let company = read(handle.submit(long(8)).unwrap());
    let unread = handle.submit_all((0..8).map(long).collect()).unwrap();
    same(&company.join().unwrap(), &in_turn[8]);
    stand_aside(&handle, 8);
    let stats = handle.stats();
    let (ahead, computed) = (count(&seen.ahead), count(&stats.computed_tokens));
    same(&ask(&handle, long(9)), &in_turn[9]);
    assert_eq!(count(&seen.ahead) - ahead, TOKENS as u64 - 1, "somebody was in its way");
    stand_aside(&handle, 8);
    assert_eq!(count(&stats.computed_tokens) - computed, TOKENS as u64 + 2, "somebody went on");
    // They come back beside somebody who runs ahead.
    let company = read(handle.submit(long(9)).unwrap());
    let reading: Vec<_> = unread.into_iter().map(read).collect();
    for (reading, in_turn) in reading.into_iter().zip(&in_turn) {
        same(&reading.join().unwrap(), in_turn);
    }
    same(&company.join().unwrap(), &in_turn[9]);
    wait_until_idle(&handle);
    let used = stats.kv_blocks_used.load(Ordering::Relaxed);
    assert_eq!((used, count(&stats.preemptions)), (0, 0));
    assert_eq!(seen.under_way.load(Ordering::Relaxed), 0);
}

/// Lists of adapters come and go with those who run with them, also while a pass is under way.
#[test]
fn adapters_come_and_go_in_the_order_of_the_passes() {
    let sets = sets();
    let with = |i: u32| GenerateRequest {
        adapters: sets[i as usize % sets.len()].clone(),
        max_tokens: 3 + i as usize % 8,
        ..request(i)
    };
    let in_turn: Vec<_> = (0..15).map(|i| ask(&engine(limits()).0, with(i)).tokens).collect();
    let (handle, seen) = remote(Limits { running_len: 4, ..limits() }, Speculation::default());
    let running: Vec<_> = (0..15).map(|i| handle.submit(with(i)).unwrap()).collect();
    for (generation, in_turn) in running.into_iter().zip(&in_turn) {
        let answer = collect(generation);
        assert_eq!((&answer.tokens, answer.failed), (in_turn, None));
    }
    assert!(count(&seen.read) > 0);
}
