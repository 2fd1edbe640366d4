//! The way to an encoder: a bounded number of requests, and one thread that owns the model.
//!
//! A request is a list of texts and is answered as a whole. Dropping [`Vectors`] cancels what is
//! not computed yet: the thread looks before every pass. A failing or panicking pass fails the
//! requests that were in it, and no other.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hearth_models::{EncoderBatch, TextEncoder};
use tokio::sync::oneshot;

use super::Settings;
use super::batch::{Pick, Times, Turn};
use super::pooling;
use crate::types::{Tenant, TokenId};

/// Bounds derived once at start.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Requests that may wait or be in work.
    pub queue_len: usize,
    /// Rows of one forward pass.
    pub batch_tokens: usize,
}

/// Counters and gauges that the thread publishes after every pass.
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests submitted and not yet answered.
    pub waiting: AtomicUsize,
    /// Texts computed.
    pub texts: AtomicU64,
    /// Rows of all forward passes.
    pub computed_tokens: AtomicU64,
    /// Forward passes.
    pub passes: AtomicU64,
    /// Requests whose client went away.
    pub cancelled: AtomicU64,
    /// Passes that failed.
    pub failures: AtomicU64,
    /// Milliseconds of the last pass, for `Retry-After`.
    pass_ms: AtomicU64,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The waiting room is full.
    #[error("{waiting} requests are waiting")]
    QueueFull {
        /// Requests that wait.
        waiting: usize,
        /// A guess at when it is worth trying again.
        retry_after: Duration,
    },
    /// The thread drains or is gone.
    #[error("the model is shutting down")]
    ShuttingDown,
}

/// The vectors of a request, in the order of its texts, once they are there. Dropping it cancels.
#[derive(Debug)]
pub struct Vectors {
    reply: oneshot::Receiver<Result<Vec<Vec<f32>>, String>>,
    computed: Arc<AtomicUsize>,
}

impl Vectors {
    /// Tokens of its texts that are computed so far, or in a pass that has begun: no pass stops in
    /// the middle because a client leaves. It goes on counting when this is dropped. Passes that
    /// failed are not in it.
    pub fn computed(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.computed)
    }

    /// Waits.
    ///
    /// # Errors
    /// The pass that computed one of them failed; the reason.
    pub async fn wait(self) -> Result<Vec<Vec<f32>>, String> {
        self.reply.await.unwrap_or_else(|_| Err("the model has stopped".to_owned()))
    }
}

/// Cheap to clone; every clone talks to the same thread.
#[derive(Clone, Debug)]
pub struct Queue {
    commands: Sender<Command>,
    bounds: Bounds,
    stats: Arc<Stats>,
    tenants: Arc<Tenants>,
}

/// How many requests of each tenant are here; none that has none.
#[derive(Debug, Default)]
struct Tenants(Mutex<HashMap<u64, usize>>);

impl Tenants {
    /// Counts: whoever panicked beside them left them whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
enum Command {
    Submit(Job),
    /// Finish what waits, then stop.
    Drain,
}

impl Queue {
    /// Hands over texts, each of at least one token and within the model's tables (the caller has
    /// checked), or says at once why not.
    pub fn submit(&self, tenant: Tenant, texts: Vec<Vec<TokenId>>) -> Result<Vectors, SubmitError> {
        let place = self.enter(tenant)?;
        let (tell, reply) = oneshot::channel();
        let vectors = Vectors { reply, computed: Arc::default() };
        if texts.is_empty() {
            let _ = tell.send(Ok(Vec::new())); // its receiver is in `vectors`
            return Ok(vectors);
        }
        let job = Job {
            tenant,
            lengths: texts.iter().map(Vec::len).collect(),
            vectors: vec![Vec::new(); texts.len()],
            texts,
            begun: 0,
            computed: vectors.computed(),
            reply: tell,
            place,
        };
        let sent = self.commands.send(Command::Submit(job));
        sent.map(|()| vectors).map_err(|_| SubmitError::ShuttingDown)
    }

    /// Lets the thread finish what it has and stop.
    pub fn drain(&self) {
        // The thread being gone already is what was asked for.
        let _ = self.commands.send(Command::Drain);
    }

    /// Counters and gauges.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Takes a place in the waiting room, of which every tenant leaves some to others.
    fn enter(&self, tenant: Tenant) -> Result<Place, SubmitError> {
        let (places, waiting) = (self.bounds.queue_len, &self.stats.waiting);
        let mut tenants = self.tenants.lock();
        let own = tenants.get(&tenant.id).copied().unwrap_or_default();
        let taken = waiting.load(Ordering::Acquire);
        if taken >= places - tenant.leaves(places, own) {
            let pass_ms = self.stats.pass_ms.load(Ordering::Relaxed);
            let wait_ms = (pass_ms * taken as u64 / 2).clamp(1000, 60_000);
            let retry_after = Duration::from_millis(wait_ms);
            return Err(SubmitError::QueueFull { waiting: taken, retry_after });
        }
        tenants.insert(tenant.id, own + 1);
        waiting.store(taken + 1, Ordering::Release);
        let (stats, tenants) = (Arc::clone(&self.stats), Arc::clone(&self.tenants));
        Ok(Place { stats, tenants, tenant: tenant.id })
    }
}

/// A place in the waiting room, given back when it is dropped.
#[derive(Debug)]
struct Place {
    stats: Arc<Stats>,
    tenants: Arc<Tenants>,
    tenant: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut tenants = self.tenants.lock();
        self.stats.waiting.fetch_sub(1, Ordering::AcqRel);
        match tenants.get_mut(&self.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(tenants.remove(&self.tenant)),
        }
    }
}

/// A request on its way.
#[derive(Debug)]
struct Job {
    tenant: Tenant,
    texts: Vec<Vec<TokenId>>,
    lengths: Vec<usize>,
    /// Texts that were in a pass.
    begun: usize,
    /// Tokens of these.
    computed: Arc<AtomicUsize>,
    vectors: Vec<Vec<f32>>,
    reply: oneshot::Sender<Result<Vec<Vec<f32>>, String>>,
    place: Place,
}

/// Starts the thread of a model.
pub(super) fn start(
    model: Box<dyn TextEncoder>,
    settings: Settings,
    bounds: Bounds,
) -> std::io::Result<(Queue, JoinHandle<()>)> {
    let (commands, receiver) = mpsc::channel();
    let stats = Arc::<Stats>::default();
    let queue = Queue { commands, bounds, stats: Arc::clone(&stats), tenants: Arc::default() };
    let worker = Worker {
        model,
        settings,
        batch_tokens: bounds.batch_tokens,
        jobs: Vec::new(),
        times: Times::default(),
        commands: receiver,
        stats,
        draining: false,
    };
    let thread = thread::Builder::new().name("hearth-embed".into()).spawn(move || worker.run())?;
    Ok((queue, thread))
}

struct Worker {
    model: Box<dyn TextEncoder>,
    settings: Settings,
    batch_tokens: usize,
    /// In the order of their turns.
    jobs: Vec<Job>,
    times: Times,
    commands: Receiver<Command>,
    stats: Arc<Stats>,
    draining: bool,
}

impl Worker {
    fn run(mut self) {
        while self.wait_for_work() {
            self.drop_closed();
            let picks = self.choose();
            if picks.is_empty() {
                continue;
            }
            let started = Instant::now();
            // Counted now: whoever leaves in the middle has it computed all the same.
            for Pick { request, rows, .. } in &picks {
                self.jobs[*request].computed.fetch_add(*rows, Ordering::Relaxed);
            }
            let states = self.compute(&picks);
            self.publish(&picks, started.elapsed());
            match states {
                Ok(states) => self.keep(&picks, &states),
                Err(message) => self.fail(&picks, &message),
            }
        }
    }

    /// Drains the commands; sleeps while there is nothing to do. False at the end.
    fn wait_for_work(&mut self) -> bool {
        loop {
            let command = match self.jobs.is_empty() && !self.draining {
                true => self.commands.recv().map_err(|_| true),
                false => self.commands.try_recv().map_err(|e| e == TryRecvError::Disconnected),
            };
            match command {
                Ok(Command::Submit(job)) => self.jobs.push(job),
                Ok(Command::Drain) => self.draining = true,
                Err(closed) => return !self.jobs.is_empty() || !(closed || self.draining),
            }
        }
    }

    /// Forgets requests whose client is gone.
    fn drop_closed(&mut self) {
        let before = self.jobs.len();
        self.jobs.retain(|job| !job.reply.is_closed());
        let gone = (before - self.jobs.len()) as u64;
        self.stats.cancelled.fetch_add(gone, Ordering::Relaxed);
    }

    fn choose(&mut self) -> Vec<Pick> {
        let turns = self.jobs.iter().map(|job| {
            let Job { tenant, lengths, begun, .. } = job;
            Turn { tenant: *tenant, lengths, begun: *begun }
        });
        let turns: Vec<_> = turns.collect();
        self.times.choose(&turns, self.batch_tokens)
    }

    /// Hidden states of all rows of a batch, one text behind the other.
    fn compute(&self, picks: &[Pick]) -> Result<Vec<f32>, String> {
        let mut batch = EncoderBatch::default();
        for pick in picks {
            batch.push(&self.jobs[pick.request].texts[pick.text]);
        }
        match catch_unwind(AssertUnwindSafe(|| self.model.forward(&batch))) {
            Ok(states) => states.map_err(|error| error.to_string()),
            Err(panic) => Err(panic_message(&*panic).to_owned()),
        }
    }

    /// Pools the states of a batch, and answers the requests that are complete. Who had a turn and
    /// is not done goes behind the others.
    fn keep(&mut self, picks: &[Pick], states: &[f32]) {
        let width = self.model.config().hidden_len;
        let mut rest = states;
        for pick in picks {
            let rows;
            (rows, rest) = rest.split_at(pick.rows * width);
            let mut vector = self.settings.pooling.pool(rows, width);
            if self.settings.normalize {
                pooling::normalize(&mut vector);
            }
            let job = &mut self.jobs[pick.request];
            job.vectors[pick.text] = vector;
            job.begun += 1;
        }
        let (served, waiting) = self.split(picks);
        self.jobs = waiting;
        for job in served {
            match job.begun == job.texts.len() {
                true => {
                    // Who has an answer has no place any more.
                    drop(job.place);
                    // Nobody may be there to hear it.
                    drop(job.reply.send(Ok(job.vectors)));
                }
                false => self.jobs.push(job),
            }
        }
    }

    /// Tells the requests of a failed batch, and forgets them.
    fn fail(&mut self, picks: &[Pick], message: &str) {
        self.stats.failures.fetch_add(1, Ordering::Relaxed);
        tracing::error!(error = message, "a pass of the encoder failed");
        for Pick { request, rows, .. } in picks {
            self.jobs[*request].computed.fetch_sub(*rows, Ordering::Relaxed);
        }
        let (failed, waiting) = self.split(picks);
        self.jobs = waiting;
        for job in failed {
            let _ = job.reply.send(Err(message.to_owned())); // nobody may be there to hear it
        }
    }

    /// Takes the requests apart: those in a batch, and the others.
    fn split(&mut self, picks: &[Pick]) -> (Vec<Job>, Vec<Job>) {
        let (mut chosen, mut others) = (Vec::new(), Vec::new());
        for (i, job) in std::mem::take(&mut self.jobs).into_iter().enumerate() {
            let side = match picks.iter().any(|pick| pick.request == i) {
                true => &mut chosen,
                false => &mut others,
            };
            side.push(job);
        }
        (chosen, others)
    }

    fn publish(&self, picks: &[Pick], took: Duration) {
        let rows: usize = picks.iter().map(|pick| pick.rows).sum();
        self.stats.texts.fetch_add(picks.len() as u64, Ordering::Relaxed);
        self.stats.computed_tokens.fetch_add(rows as u64, Ordering::Relaxed);
        self.stats.passes.fetch_add(1, Ordering::Relaxed);
        self.stats.pass_ms.store(took.as_millis() as u64, Ordering::Relaxed);
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("the encoder panicked")
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
