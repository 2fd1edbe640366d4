//! The step loop: drain commands, schedule, run, sample, update, emit.
//!
//! On a device that runs ahead, the next step is scheduled and asked for before this one is done
//! ([`flight`]); the loop is the same.
//!
//! One OS thread owns model, KV and scheduler and is spoken to through [`handle::EngineHandle`]. A
//! closed reply channel is cancellation; a panic fails the batch that caused it, never the process.
//! Deliberately absent: text, requests as the wire has them, any `if` about a feature.

#[cfg(test)]
mod adapter_tests;
mod door;
mod draft;
mod events;
mod exchange;
mod flight;
#[cfg(test)]
mod flight_tests;
mod floor;
#[cfg(test)]
mod floor_tests;
mod grammar;
pub mod handle;
mod interject;
#[cfg(test)]
mod interject_tests;
mod late;
#[cfg(test)]
mod late_tests;
mod live;
mod lookup;
mod queue;
mod readers;
#[cfg(test)]
mod readers_tests;
mod runner;
mod sampler;
#[cfg(test)]
mod shared_tests;
mod speculate;
#[cfg(test)]
mod speculate_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hearth_models::{KvDType, Model, RowOutput};

use self::door::Door;
use self::draft::Draft;
use self::exchange::Credit;
use self::flight::{Flight, caught, panic_message};
use self::floor::{Floor, KEEP_BLOCKS_MIN, LOAD_BLOCKS_MIN};
use self::grammar::Masks;
use self::handle::{
    Command, EngineHandle, Keep, Limits, PROPOSED_ROWS, SCORE_CHUNK, Speculation, Stats, Submission,
};
use self::live::{Choice, Live, Sampled};
use self::runner::{Logits, Runner};
use self::sampler::Sampler;
use crate::scheduler::{Batch, Entry, NewSequence, Scheduler, SchedulerConfig, Sequence};
use crate::types::{FinishReason, SeqId, TokenId};

/// Starts the engine's thread. `Limits` are derived by the caller, who knows the memory.
pub fn spawn(
    model: Box<dyn Model>,
    kv_dtype: KvDType,
    limits: Limits,
    mut speculation: Speculation,
    keep: Option<Keep>,
) -> Result<(EngineHandle, JoinHandle<()>), hearth_models::Error> {
    let runner = Runner::new(model, &limits, kv_dtype)?;
    let no_thread = |e| hearth_models::Error::Batch(format!("the engine has no thread: {e}"));
    let masks = Masks::spawn().map_err(no_thread)?;
    let mut config = scheduler_config(&limits, &speculation);
    config.keep_blocks_min = keep.is_some().then_some(KEEP_BLOCKS_MIN);
    let (scheduler, started) = (Scheduler::new(config), Instant::now());
    let outlook = scheduler.outlook(Duration::ZERO, &Batch::default());
    let (handle, commands) = EngineHandle::new(limits, outlook, started);
    let draft = speculation.draft.take().map(|draft| Draft::new(draft, kv_dtype)).transpose()?;
    let floor = keep.map(|Keep { shelf, content }| {
        let layout = runner.layout()?;
        let sizes = [runner.block_bytes(), handle.limits().block_len];
        Floor::new(shelf, content, &layout, sizes, handle.stats()).map_err(no_thread)
    });
    let floor = floor.transpose()?;
    let engine = Engine {
        // What is exported and imported is not in the order of the passes.
        ahead: runner.runs_ahead() && floor.is_none(),
        flight: None,
        landed: Instant::now(),
        floor,
        credit: Credit::new(Instant::now()),
        rested: false,
        heard: Instant::now(),
        runner,
        scheduler,
        sampler: Sampler::new(handle.limits().vocab_len),
        masks,
        lookup: speculation.lookup,
        draft,
        live: BTreeMap::new(),
        commands,
        stats: Arc::clone(handle.stats()),
        draining: false,
        started,
        door: handle.door().clone(),
        known: Vec::new(),
        came: false,
        looked: started,
    };
    let thread = thread::Builder::new()
        .name("hearth-engine".into())
        .spawn(move || engine.run())
        .map_err(no_thread)?;
    Ok((handle, thread))
}

fn scheduler_config(limits: &Limits, speculation: &Speculation) -> SchedulerConfig {
    SchedulerConfig {
        block_count: limits.kv_blocks,
        block_len: limits.block_len,
        batch_tokens: limits.batch_tokens,
        running_len: limits.running_len,
        score_chunk: SCORE_CHUNK,
        proposed_rows: if speculation.is_on() { PROPOSED_ROWS } else { 0 },
        price: speculation.price,
        load_blocks_min: LOAD_BLOCKS_MIN,
        keep_blocks_min: None,
        target_ms: limits.target_itl.as_secs_f64() * 1e3,
    }
}

/// Between two looks at what newcomers have before them, where more are here than so many.
const LOOK: Duration = Duration::from_millis(10);
const LOOK_ALWAYS: usize = 64;

struct Engine {
    runner: Runner,
    /// A step may be scheduled before the one before it is done.
    ahead: bool,
    /// The pass that was asked for last, unless its results are here.
    flight: Option<Flight>,
    /// When the last results came.
    landed: Instant,
    /// Where blocks go that memory has no room for.
    floor: Option<Floor>,
    /// Time for copies that do not have to be made yet.
    credit: Credit,
    /// The last step had no rows.
    rested: bool,
    /// When a block came from the floor last, or nobody waited for one.
    heard: Instant,
    scheduler: Scheduler,
    sampler: Sampler,
    masks: Masks,
    /// Answers are read for what they quote, not only for what their clients expect.
    lookup: bool,
    draft: Option<Draft>,
    /// Every sequence that waits or runs.
    live: BTreeMap<SeqId, Live>,
    commands: Receiver<Command>,
    stats: Arc<Stats>,
    draining: bool,
    /// From here on the scheduler counts time.
    started: Instant,
    /// Where newcomers are told how long they will wait.
    door: Door,
    /// Newcomers who came to the scheduler since it was looked at,
    known: Vec<SeqId>,
    /// which was then.
    looked: Instant,
    /// Somebody came since it was asked who is to be computed first.
    came: bool,
}

/// What a step gave to a sequence.
enum Outcome {
    /// A token.
    Token(Sampled),
    /// The end of a prompt that wanted none.
    PromptDone,
    /// The end of an answer that its grammar calls complete.
    Complete,
    /// No token can be chosen, because of this.
    Stuck(String),
}

impl Engine {
    fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.wait_for_work() && self.step())) {
                Ok(true) => {}
                Ok(false) => break,
                Err(panic) => self.start_over(&panic_message(&*panic)),
            }
        }
        self.put_away();
    }

    /// One step: asks for a pass, and takes what the one before it gave; its own too, where nobody
    /// can go on without. There is a next one.
    fn step(&mut self) -> bool {
        self.drop_closed();
        self.mind_readers();
        self.take_loaded();
        self.put_first();
        let asked = self.launch();
        if let Some(before) = self.flight.replace(asked) {
            self.land(before);
        }
        if let Some(own) = self.flight.take_if(|own| !self.scheduler.runs_on(&own.batch)) {
            self.land(own);
        }
        true
    }

    /// The first half of a step: schedules, and runs.
    fn launch(&mut self) -> Flight {
        let started = Instant::now();
        let proposals = self.propose();
        let batch = self.scheduler.schedule(started - self.started, &proposals, &self.floor);
        self.expire(&batch);
        self.begin(&batch);
        self.look(started, &batch);
        self.exchange(&batch);
        let pass = self.compute(&batch);
        let late = self.choose_kept(&batch);
        self.scheduler.launch(&batch, &self.who_goes_on(&batch));
        Flight { batch, pass, late, started }
    }

    /// The second half: samples, updates, emits.
    fn land(&mut self, flight: Flight) {
        let Flight { batch, pass, late, started } = flight;
        let mut apart = Duration::ZERO;
        match pass.and_then(|asked| self.arrive(asked, &batch, &mut apart)) {
            Ok(logits) => {
                let mut outcomes = self.sample(&batch, &logits);
                self.settle(&batch, late, &mut outcomes);
                let took = self.took(started + apart);
                self.update(&batch, &outcomes, took);
                self.publish(&batch); // whoever hears of an end finds it counted
                self.emit(outcomes);
            }
            Err(message) => {
                self.fail(&batch, &message);
                self.give_up(late, &message);
                self.publish(&batch);
            }
        }
    }

    /// Drains the commands; sleeps while there is nothing to do. False at the end of the engine.
    fn wait_for_work(&mut self) -> bool {
        loop {
            let command = match self.live.is_empty() && !self.draining {
                true => self.idle(),
                false if self.waits_for_readers() => self.rest(),
                false => self.commands.try_recv().map_err(|e| e == TryRecvError::Disconnected),
            };
            match command {
                Ok(Command::Submit(group)) => self.add(group),
                Ok(Command::Drain) => self.draining = true,
                Err(closed) => return !self.live.is_empty() || !(closed || self.draining),
            }
        }
    }

    /// Sequences that share their prompt: the first one computes it.
    fn add(&mut self, group: Vec<Submission>) {
        self.known.push(group[0].id);
        self.came = true;
        if let Err(message) = caught(|| self.hold_adapters(&group)) {
            for submission in group {
                self.runner.release(submission.id);
                let mut live = Live::new(submission, &self.masks, false);
                live.leave();
                live.fail(&message);
            }
            return;
        }
        self.rested = false;
        let leader = &group[0];
        let request = &leader.request;
        let adapter = request.adapters.as_ref().map(|adapters| adapters.content);
        self.floor.iter_mut().for_each(|floor| floor.know(request.scope(), adapter));
        self.scheduler.add(NewSequence {
            id: leader.id,
            prompt: request.prompt.clone(),
            answer_max: request.max_tokens,
            score: request.prompt_logprobs.is_some(),
            scope: request.scope(),
            tenant: request.tenant,
            priority: request.priority,
            deadline: leader.deadline.map(|deadline| deadline - self.started),
            forks: group[1..].iter().map(|s| s.id).collect(),
        });
        for submission in group {
            let reads = self.lookup || !submission.request.expected.is_empty();
            self.live.insert(submission.id, Live::new(submission, &self.masks, reads));
        }
    }

    /// A group runs with one list of adapters.
    fn hold_adapters(&mut self, group: &[Submission]) -> Result<(), hearth_models::Error> {
        let mut held = group.iter().filter_map(|s| Some((s.id, s.request.adapters.as_ref()?)));
        held.try_for_each(|(id, adapters)| self.runner.hold(id, adapters))
    }

    /// Sequences that nobody reads any more give their blocks back.
    fn drop_closed(&mut self) {
        let closed = self.live.iter().filter(|(_, live)| live.is_closed());
        let closed: Vec<_> = closed.map(|(id, live)| (*id, live.is_stopped())).collect();
        for (id, stopped) in closed {
            if !stopped {
                self.stats.cancelled.fetch_add(1, Ordering::Relaxed);
            }
            self.remove(id);
        }
    }

    /// Sequences that waited too long are told so.
    fn expire(&mut self, batch: &Batch) {
        for id in &batch.expired {
            if let Some(live) = self.remove(*id) {
                self.stats.expired.fetch_add(1, Ordering::Relaxed);
                live.expire();
            }
        }
    }

    /// Sequences that appear for the first time leave the waiting room.
    fn begin(&mut self, batch: &Batch) {
        let now = Instant::now();
        self.stats.kv_blocks_used.store(self.scheduler.used_blocks(), Ordering::Release);
        for id in &batch.preempted {
            if let Some(live) = self.live.get_mut(id) {
                live.preempted();
            }
        }
        for (entry, id) in batch.entries.iter().flat_map(|e| e.ids().map(move |id| (e, id))) {
            if let Some(live) = self.live.get_mut(&id)
                && live.begin(now)
            {
                self.stats.running.fetch_add(1, Ordering::AcqRel);
                if id == entry.id {
                    let prompt = live.prompt_len() as u64;
                    self.stats.prompt_tokens.fetch_add(prompt, Ordering::Relaxed);
                }
            }
        }
    }

    /// One token for every sequence that wants one; log-probabilities of scored prompt rows.
    fn sample(&mut self, batch: &Batch, logits: &Logits) -> Vec<(SeqId, Outcome)> {
        let mut outcomes = Vec::new();
        for (entry, rows) in batch.entries.iter().zip(&logits.entries) {
            let Some(live) = self.live.get_mut(&entry.id) else { continue }; // it ended meanwhile
            for (position, row) in entry.score.clone().zip(rows.score.clone()) {
                if let RowOutput::Logits(logits) = logits.row(row) {
                    live.score(position, logits, &mut self.sampler);
                }
            }
            let prompt_is_done = entry.start + entry.rows >= live.prompt_len();
            if prompt_is_done {
                self.prompt_done(entry);
            }
            for id in entry.ids() {
                let live = self.live.get_mut(&id).expect("scheduled, so alive; this is a bug");
                if prompt_is_done && live.wants_no_token() {
                    outcomes.push((id, Outcome::PromptDone));
                }
                // On to the first token that is not as proposed.
                let mut proposed = entry.proposed.iter();
                for row in rows.sample.clone() {
                    let choice = live.sample(logits.row(row), &mut self.sampler);
                    let goes_on = choice.goes_on_with(proposed.next());
                    outcomes.extend(outcome(choice).map(|outcome| (id, outcome)));
                    if !goes_on {
                        break;
                    }
                }
            }
        }
        outcomes
    }

    /// Everybody whose prompt it is hears of it.
    fn prompt_done(&mut self, entry: &Entry) {
        let cached = self.scheduler.running(entry.id).map_or(0, Sequence::cached);
        let leader = self.live.get_mut(&entry.id).expect("scheduled, so alive; this is a bug");
        let logprobs: Arc<[_]> = leader.take_prompt_logprobs().into();
        if leader.prompt_done(cached, Arc::clone(&logprobs)) && cached > 0 {
            self.stats.prefix_hits.fetch_add(1, Ordering::Relaxed);
            self.stats.prefix_hit_tokens.fetch_add(cached as u64, Ordering::Relaxed);
        }
        for id in &entry.forks {
            if let Some(live) = self.live.get_mut(id) {
                live.prompt_done(cached, Arc::clone(&logprobs));
            }
        }
    }

    fn update(&mut self, batch: &Batch, outcomes: &[(SeqId, Outcome)], took: Duration) {
        let sampled = outcomes.iter().filter_map(|(id, outcome)| match outcome {
            Outcome::Token(token) => Some((*id, token.id)),
            Outcome::PromptDone | Outcome::Complete | Outcome::Stuck(_) => None,
        });
        let sampled: Vec<(SeqId, TokenId)> = sampled.collect();
        self.count_proposals(batch, &sampled);
        self.scheduler.update(batch, &sampled, took.as_secs_f64() * 1e3);
    }

    /// Tells the clients, and lets those go that are done.
    fn emit(&mut self, outcomes: Vec<(SeqId, Outcome)>) {
        for (id, outcome) in outcomes {
            let live = self.live.get_mut(&id).expect("sampled, so alive; this is a bug");
            let end = match outcome {
                Outcome::Token(token) => {
                    self.stats.generated_tokens.fetch_add(1, Ordering::Relaxed);
                    let end = token.end;
                    live.emit(token, Instant::now());
                    end
                }
                Outcome::PromptDone => Some(FinishReason::Length),
                Outcome::Complete => Some(FinishReason::Stop),
                Outcome::Stuck(why) => {
                    if let Some(live) = self.remove(id) {
                        live.fail(&why);
                    }
                    continue;
                }
            };
            if let Some(reason) = end {
                // Told last: whoever hears of it finds the blocks free.
                if let Some(live) = self.remove(id) {
                    live.finish(reason);
                }
            }
        }
    }

    /// Frees what a sequence holds, and its place in the counts.
    fn remove(&mut self, id: SeqId) -> Option<Live> {
        self.scheduler.finish(id);
        self.draft.iter_mut().for_each(|draft| draft.forget(id));
        self.runner.release(id);
        self.stats.kv_blocks_used.store(self.scheduler.used_blocks(), Ordering::Release);
        let cached = self.scheduler.pool().idle_count();
        self.stats.kv_blocks_cached.store(cached, Ordering::Release);
        let mut live = self.live.remove(&id)?;
        live.leave(); // before its client hears of the end, and may ask again
        if live.has_begun() {
            self.stats.running.fetch_sub(1, Ordering::AcqRel);
        }
        Some(live)
    }

    /// Shows newcomers what they have before them; of many not so often that it takes time.
    fn look(&mut self, now: Instant, batch: &Batch) {
        if self.live.len() <= LOOK_ALWAYS || now.duration_since(self.looked) >= LOOK {
            self.looked = now;
            let outlook = self.scheduler.outlook(now - self.started, batch);
            self.door.look(outlook, self.known.drain(..));
        }
    }

    fn publish(&self, batch: &Batch) {
        let stats = &self.stats;
        let pool = self.scheduler.pool();
        stats.kv_blocks_used.store(self.scheduler.used_blocks(), Ordering::Relaxed);
        stats.kv_blocks_cached.store(pool.idle_count(), Ordering::Relaxed);
        stats.kv_unkept.store(pool.unkept_count(), Ordering::Release);
        stats.prefix_evictions.store(pool.evictions(), Ordering::Relaxed);
        stats.preemptions.fetch_add(batch.preempted.len() as u64, Ordering::Relaxed);
        if !batch.entries.is_empty() {
            stats.steps.fetch_add(1, Ordering::Relaxed);
            let computed = batch.row_count() as u64;
            stats.computed_tokens.fetch_add(computed, Ordering::Relaxed);
        }
    }
}

/// `None` for logits that wait for their grammar.
fn outcome(choice: Choice) -> Option<Outcome> {
    match choice {
        Choice::Token(token) => Some(Outcome::Token(token)),
        Choice::Complete => Some(Outcome::Complete),
        Choice::Stuck(why) => Some(Outcome::Stuck(why)),
        Choice::Later => None,
    }
}
