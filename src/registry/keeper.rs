//! Does what `residency` decides: a thread that wakes up when something has changed or a time has
//! come, a thread for every load and unload, and what requests hold (`lease`).
//!
//! Whoever asks for a model that is not there waits in its line, on an async task or a thread, and
//! leaves the line by being dropped. A [`Hold`] keeps its model in memory; the last one of a model
//! makes it idle by being dropped. All state is behind one lock that nobody holds for long: models
//! are built and taken apart outside of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::residency::{Action, Ask, Class, Reason, Residency, State, Stays};
use super::standing::{Counts, Standing};
use super::{Entry, Loaded};
use crate::error::Error;
use crate::types::{KeepAlive, Tenant};

/// What the models of a process share.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes for all of them; `None`: as many as they want.
    pub budget_bytes: Option<u64>,
    /// Requests that may wait for one model to come in; of those of a key some places are kept free
    /// for others, as in every queue.
    pub queue_len: usize,
    /// A request that waited this long is given up.
    pub queue_timeout: Option<Duration>,
    /// How long an idle one stays, where its last request did not say.
    pub keep_alive: KeepAlive,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            budget_bytes: None,
            queue_len: 256,
            queue_timeout: None,
            keep_alive: KeepAlive::Forever,
        }
    }
}

/// One of the requests that hold a model.
pub(super) struct Hold {
    shared: Arc<Shared>,
    slot: usize,
    who: Class,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.change(|inner, now| inner.house.release(self.slot, self.who, now));
    }
}

type Reply = Result<(Loaded, Hold), Error>;

/// The keeper's thread, and what it shares with everybody.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    entries: Vec<Entry>,
    bounds: Bounds,
    inner: Mutex<Inner>,
    changed: Condvar,
    started: Instant,
    next_place: AtomicU64,
}

struct Inner {
    house: Residency,
    models: Vec<Option<Loaded>>,
    lines: Vec<Vec<Waiter>>,
    counts: Vec<Counts>,
    /// Nothing new comes in.
    closing: bool,
    /// The keeper goes.
    done: bool,
}

struct Waiter {
    place: u64,
    tenant: Tenant,
    reply: oneshot::Sender<Reply>,
}

/// A place in the line of a model, given up by being dropped.
struct Place<'a> {
    shared: &'a Shared,
    slot: usize,
    place: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        let line = &mut inner.lines[self.slot];
        let Some(at) = line.iter().position(|waiter| waiter.place == self.place) else { return };
        let left = line.remove(at);
        inner.house.leave(self.slot, class(left.tenant));
        self.shared.changed.notify_all();
    }
}

fn class(tenant: Tenant) -> Class {
    if tenant.background { Class::Background } else { Class::Person }
}

/// What became of a request at the door.
enum Entered<'a> {
    Holds(Loaded, Hold),
    Waits(Place<'a>, oneshot::Receiver<Reply>),
}

impl Keeper {
    /// Starts the thread. What is loaded already stands in its entry.
    pub fn start(entries: Vec<Entry>, bounds: Bounds) -> std::io::Result<Self> {
        let mut house = Residency::new(bounds.budget_bytes.unwrap_or(u64::MAX));
        for entry in &entries {
            let state = if entry.loaded.is_some() { State::Ready } else { State::Unloaded };
            house.add(entry.bytes, entry.pinned, state);
        }
        let inner = Inner {
            house,
            models: entries.iter().map(|entry| entry.loaded.clone()).collect(),
            lines: entries.iter().map(|_| Vec::new()).collect(),
            counts: vec![Counts::default(); entries.len()],
            closing: false,
            done: false,
        };
        let shared = Arc::new(Shared {
            entries,
            bounds,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            started: Instant::now(),
            next_place: AtomicU64::new(0),
        });
        let kept = Arc::clone(&shared);
        let thread = thread::Builder::new().name("hearth-models".into());
        let thread = thread.spawn(move || kept.keep())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub fn entries(&self) -> &[Entry] {
        &self.shared.entries
    }

    /// A lease on a model, which may have to be loaded first. Dropping the future leaves the line.
    pub async fn lease(&self, slot: usize, tenant: Tenant, keep_alive: Option<KeepAlive>) -> Reply {
        match self.enter(slot, tenant, keep_alive)? {
            Entered::Holds(model, hold) => Ok((model, hold)),
            Entered::Waits(_place, reply) => match self.shared.bounds.queue_timeout {
                None => reply.await.unwrap_or(Err(Error::ShuttingDown)),
                Some(limit) => match tokio::time::timeout(limit, reply).await {
                    Ok(reply) => reply.unwrap_or(Err(Error::ShuttingDown)),
                    Err(_) => Err(Error::Expired { waited: limit }),
                },
            },
        }
    }

    /// The same, for a thread that may wait.
    pub fn lease_blocking(&self, slot: usize) -> Reply {
        match self.enter(slot, Tenant::default(), None)? {
            Entered::Holds(model, hold) => Ok((model, hold)),
            Entered::Waits(_place, reply) => {
                reply.blocking_recv().unwrap_or(Err(Error::ShuttingDown))
            }
        }
    }

    /// Begins to take a model out, if nothing keeps it.
    pub fn dismiss(&self, slot: usize) -> Result<(), Stays> {
        let mut inner = self.shared.lock();
        if let Some(action) = inner.house.dismiss(slot)? {
            let later = inner.begin(&self.shared, action);
            drop(inner);
            later.run(&self.shared);
        }
        Ok(())
    }

    /// Every model that is in memory.
    pub fn loaded(&self) -> Vec<Loaded> {
        let inner = self.shared.lock();
        let ready = |(slot, _): &(usize, &Option<Loaded>)| inner.house.state(*slot) == State::Ready;
        inner.models.iter().enumerate().filter(ready).filter_map(|(_, m)| m.clone()).collect()
    }

    /// How every model stands.
    pub fn standings(&self) -> Vec<Standing> {
        let (inner, now) = (self.shared.lock(), self.shared.now());
        let one = |(slot, entry): (usize, &Entry)| {
            let (held, waiting) = inner.house.requests(slot);
            Standing {
                id: entry.card.id.clone(),
                state: inner.house.state(slot),
                held,
                waiting,
                pinned: entry.pinned,
                stays: inner.house.stays(slot, now),
                bytes: entry.bytes,
                counts: inner.counts[slot],
            }
        };
        self.shared.entries.iter().enumerate().map(one).collect()
    }

    /// Nothing new is held or loaded; who waits is told.
    pub fn close(&self) {
        let lines: Vec<_> = {
            let mut inner = self.shared.lock();
            inner.closing = true;
            let lines: Vec<_> = inner.lines.iter_mut().map(std::mem::take).collect();
            for (slot, line) in lines.iter().enumerate() {
                line.iter().for_each(|waiter| inner.house.leave(slot, class(waiter.tenant)));
            }
            lines
        };
        for waiter in lines.into_iter().flatten() {
            let _ = waiter.reply.send(Err(Error::ShuttingDown)); // it may have left
        }
    }

    /// What must hold at any time.
    #[cfg(test)]
    pub fn check(&self) {
        let inner = self.shared.lock();
        inner.house.check();
        for (slot, line) in inner.lines.iter().enumerate() {
            let state = inner.house.state(slot);
            assert_eq!(inner.house.requests(slot).1, line.len(), "who waits is counted");
            assert!(state != State::Ready || inner.models[slot].is_some(), "ready, so there");
            assert!(state != State::Unloaded || inner.models[slot].is_none(), "gone is gone");
        }
    }

    /// A hold or a place in the line, or why neither.
    fn enter(
        &self,
        slot: usize,
        tenant: Tenant,
        keep_alive: Option<KeepAlive>,
    ) -> Result<Entered<'_>, Error> {
        let shared = &self.shared;
        let (now, bounds, who) = (shared.now(), shared.bounds, class(tenant));
        let mut inner = shared.lock();
        if inner.closing {
            return Err(Error::ShuttingDown);
        }
        let id = &shared.entries[slot].card.id;
        if let Some((needed, most)) = inner.house.never_fits(slot) {
            return Err(too_large(id, needed, most, bounds.budget_bytes));
        }
        let keep_alive = keep_alive.unwrap_or(bounds.keep_alive);
        let own = inner.lines[slot].iter().filter(|waiter| waiter.tenant.id == tenant.id).count();
        let places = bounds.queue_len - tenant.leaves(bounds.queue_len, own);
        match inner.house.ask(slot, who, keep_alive, places, now) {
            Ask::Held => {
                let model = inner.models[slot].clone().expect("ready, so there; this is a bug");
                Ok(Entered::Holds(model, Hold { shared: Arc::clone(shared), slot, who }))
            }
            Ask::Full(waiting) => {
                let counts = inner.counts[slot];
                let mean = counts.load_time.checked_div(counts.loads as u32).unwrap_or_default();
                let retry_after = mean.clamp(Duration::from_secs(1), Duration::from_secs(60));
                Err(Error::QueueFull { waiting, retry_after })
            }
            Ask::Waits => {
                let (reply, answer) = oneshot::channel();
                let place = shared.next_place.fetch_add(1, Ordering::Relaxed);
                inner.lines[slot].push(Waiter { place, tenant, reply });
                shared.changed.notify_all();
                Ok(Entered::Waits(Place { shared, slot, place }, answer))
            }
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.close();
        self.shared.lock().done = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was told already
        }
    }
}

/// Both numbers, by name.
fn too_large(id: &str, needed: u64, most: u64, budget: Option<u64>) -> Error {
    let mb = |bytes: u64| bytes.div_ceil(1 << 20);
    let pinned = budget.unwrap_or(u64::MAX).saturating_sub(most);
    let beside = match pinned {
        0 => String::new(),
        pinned => format!(" beside the {} MB of the pinned models", mb(pinned)),
    };
    Error::invalid(
        "model",
        format!(
            "The model `{id}` needs {} MB, and the memory budget leaves {} MB{beside}: it can \
             never be loaded here.",
            mb(needed),
            most >> 20
        ),
    )
}

/// What is done without the lock.
enum Later {
    Tell(Vec<(oneshot::Sender<Reply>, Reply)>),
    Load(usize),
    Unload(usize),
}

impl Inner {
    /// What is to be done at this moment, and when at the latest to look again.
    fn decide(&mut self, now: Duration) -> (Vec<Action>, Option<Duration>) {
        /// Who holds a model begins to wait for readers, or ends, without a word.
        const LOOK: Duration = Duration::from_secs(1);
        let line = self.house.has_line();
        for (slot, model) in self.models.iter().enumerate().filter(|_| line) {
            let unread = model.as_ref().is_some_and(Loaded::waits_for_readers);
            self.house.waits_for_readers(slot, unread);
        }
        let actions = self.house.decide(now);
        let next = self.house.next_change(now).into_iter().chain(line.then(|| now + LOOK));
        (actions, next.min())
    }

    /// The part of an action that belongs to the state.
    fn begin(&mut self, shared: &Arc<Shared>, action: Action) -> Later {
        match action {
            Action::Load(slot) => Later::Load(slot),
            Action::Unload(slot, reason) => {
                let counts = &mut self.counts[slot];
                let count = match reason {
                    Reason::Idle => &mut counts.idle,
                    Reason::Evicted => &mut counts.evicted,
                    Reason::Asked => &mut counts.asked,
                };
                *count += 1;
                tracing::info!(model = shared.entries[slot].card.id, ?reason, "a model leaves");
                Later::Unload(slot)
            }
            Action::Serve(slot) => {
                let model = self.models[slot].clone().expect("ready, so there; this is a bug");
                let line = std::mem::take(&mut self.lines[slot]);
                let told = line.into_iter().map(|waiter| {
                    let who = class(waiter.tenant);
                    let hold = Hold { shared: Arc::clone(shared), slot, who };
                    (waiter.reply, Ok((model.clone(), hold)))
                });
                Later::Tell(told.collect())
            }
        }
    }
}

impl Later {
    fn run(self, shared: &Arc<Shared>) {
        match self {
            // Who has left gives its hold back by this.
            Self::Tell(all) => all.into_iter().for_each(|(to, reply)| drop(to.send(reply))),
            Self::Load(slot) => shared.aside("hearth-load", move |shared| shared.load(slot)),
            Self::Unload(slot) => {
                shared.aside("hearth-unload", move |shared| shared.unload(slot));
            }
        }
    }
}

impl Shared {
    /// The keeper's thread.
    fn keep(self: Arc<Self>) {
        let mut inner = self.lock();
        while !inner.done {
            let now = self.now();
            let (actions, next) = match inner.closing {
                true => (Vec::new(), None),
                false => inner.decide(now),
            };
            if actions.is_empty() {
                // A while at most: whatever was missed is seen then.
                const LOOK: Duration = Duration::from_secs(3600);
                let wait = next.map_or(LOOK, |at| at.saturating_sub(now)).min(LOOK);
                let woken = self.changed.wait_timeout(inner, wait);
                inner = woken.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let begun: Vec<_> = actions.into_iter().map(|a| inner.begin(&self, a)).collect();
            drop(inner);
            begun.into_iter().for_each(|later| later.run(&self));
            inner = self.lock();
        }
    }

    /// Brings a model in, on a thread of its own.
    fn load(&self, slot: usize) {
        let (entry, started) = (&self.entries[slot], Instant::now());
        let id = &entry.card.id;
        let load = catch_unwind(AssertUnwindSafe(|| match &entry.load {
            Some(load) => load().map_err(|error| error.to_string()),
            None => Err("it was given to this process loaded".to_owned()),
        }));
        let load = load.unwrap_or_else(|_| Err("its loading panicked".to_owned()));
        let took = started.elapsed();
        match load {
            Ok(model) => {
                tracing::info!(model = id, seconds = took.as_secs_f64(), "a model is loaded");
                self.change(|inner, now| {
                    inner.models[slot] = Some(model);
                    inner.house.loaded(slot, now);
                    let counts = &mut inner.counts[slot];
                    (counts.loads, counts.load_time) = (counts.loads + 1, counts.load_time + took);
                });
            }
            Err(error) => {
                tracing::error!(model = id, error, "a model could not be loaded");
                let line = self.change(|inner, _| {
                    inner.house.failed(slot);
                    inner.counts[slot].failures += 1;
                    std::mem::take(&mut inner.lines[slot])
                });
                for waiter in line {
                    let model = id.clone();
                    let failed = Error::LoadFailed { model, error: error.clone() };
                    let _ = waiter.reply.send(Err(failed)); // it may have left
                }
            }
        }
    }

    /// Takes a model out: its thread ends, and with it go weights, keys and values.
    fn unload(&self, slot: usize) {
        let model = self.lock().models[slot].take();
        if let Some(model) = model {
            model.stop();
            while !model.wait(Instant::now() + Duration::from_secs(60)) {
                let id = &self.entries[slot].card.id;
                tracing::warn!(model = id, "its thread still works on what was left behind");
            }
        }
        self.change(|inner, _| inner.house.unloaded(slot));
    }

    /// Runs work on a thread of its own; where the system refuses one, on this one.
    fn aside(self: &Arc<Self>, name: &str, work: impl Fn(&Self) + Copy + Send + 'static) {
        let (own, shared) = (work, Arc::clone(self));
        let spawned = thread::Builder::new().name(name.into()).spawn(move || own(&shared));
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a model; others wait for it");
            work(self);
        }
    }

    /// Changes the state and wakes the keeper.
    fn change<T>(&self, change: impl FnOnce(&mut Inner, Duration) -> T) -> T {
        let mut inner = self.lock();
        let changed = change(&mut inner, self.now());
        self.changed.notify_all();
        changed
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The state is whole whoever panicked beside it.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
