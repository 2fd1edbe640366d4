//! The way to an encoder: a bounded number of requests, and one thread that owns the model.
//!
//! A request is a list of texts and is answered as a whole. Dropping [`Vectors`] cancels what is
//! not computed yet: the thread looks before every pass. A failing or panicking pass fails the
//! requests that were in it, and no other.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hearth_models::{EncoderBatch, TextEncoder};
use tokio::sync::oneshot;

use super::Settings;
use super::batch::{self, Pick, Turn};
use super::pooling;
use crate::types::TokenId;

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
pub struct Vectors(oneshot::Receiver<Result<Vec<Vec<f32>>, String>>);

impl Vectors {
    /// Waits.
    ///
    /// # Errors
    /// The pass that computed one of them failed; the reason.
    pub async fn wait(self) -> Result<Vec<Vec<f32>>, String> {
        self.0.await.unwrap_or_else(|_| Err("the model has stopped".to_owned()))
    }
}

/// Cheap to clone; every clone talks to the same thread.
#[derive(Clone, Debug)]
pub struct Queue {
    commands: Sender<Command>,
    bounds: Bounds,
    stats: Arc<Stats>,
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
    pub fn submit(&self, texts: Vec<Vec<TokenId>>) -> Result<Vectors, SubmitError> {
        let place = self.enter()?;
        let (reply, vectors) = oneshot::channel();
        if texts.is_empty() {
            let _ = reply.send(Ok(Vec::new())); // its receiver is `vectors`
            return Ok(Vectors(vectors));
        }
        let job = Job {
            lengths: texts.iter().map(Vec::len).collect(),
            vectors: vec![Vec::new(); texts.len()],
            texts,
            begun: 0,
            reply,
            _place: place,
        };
        let sent = self.commands.send(Command::Submit(job));
        sent.map(|()| Vectors(vectors)).map_err(|_| SubmitError::ShuttingDown)
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

    /// Takes a place in the waiting room.
    fn enter(&self) -> Result<Place, SubmitError> {
        let room = |n| (n < self.bounds.queue_len).then_some(n + 1);
        let waiting = &self.stats.waiting;
        match waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, room) {
            Ok(_) => Ok(Place(Arc::clone(&self.stats))),
            Err(waiting) => {
                let pass_ms = self.stats.pass_ms.load(Ordering::Relaxed);
                let wait_ms = (pass_ms * waiting as u64 / 2).clamp(1000, 60_000);
                let retry_after = Duration::from_millis(wait_ms);
                Err(SubmitError::QueueFull { waiting, retry_after })
            }
        }
    }
}

/// A place in the waiting room, given back when it is dropped.
#[derive(Debug)]
struct Place(Arc<Stats>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request on its way.
#[derive(Debug)]
struct Job {
    texts: Vec<Vec<TokenId>>,
    lengths: Vec<usize>,
    /// Texts that were in a pass.
    begun: usize,
    vectors: Vec<Vec<f32>>,
    reply: oneshot::Sender<Result<Vec<Vec<f32>>, String>>,
    _place: Place,
}

/// Starts the thread of a model.
pub(super) fn start(
    model: Box<dyn TextEncoder>,
    settings: Settings,
    bounds: Bounds,
) -> std::io::Result<(Queue, JoinHandle<()>)> {
    let (commands, receiver) = mpsc::channel();
    let stats = Arc::<Stats>::default();
    let queue = Queue { commands, bounds, stats: Arc::clone(&stats) };
    let worker = Worker {
        model,
        settings,
        batch_tokens: bounds.batch_tokens,
        jobs: Vec::new(),
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

    fn choose(&self) -> Vec<Pick> {
        let turns: Vec<_> =
            self.jobs.iter().map(|job| Turn { lengths: &job.lengths, begun: job.begun }).collect();
        batch::choose(&turns, self.batch_tokens)
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
                // Nobody may be there to hear it any more.
                true => drop(job.reply.send(Ok(job.vectors))),
                false => self.jobs.push(job),
            }
        }
    }

    /// Tells the requests of a failed batch, and forgets them.
    fn fail(&mut self, picks: &[Pick], message: &str) {
        self.stats.failures.fetch_add(1, Ordering::Relaxed);
        tracing::error!(error = message, "a pass of the encoder failed");
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
mod tests {
    use std::sync::Mutex;

    use hearth_models::EncoderConfig;

    use super::super::{Dimensions, Pooling};
    use super::*;

    /// Says its tokens back, after it was let go; panics on token 9, fails on 8.
    struct Echo {
        config: EncoderConfig,
        gate: Mutex<Receiver<()>>,
        batches: Arc<Mutex<Vec<Vec<u32>>>>,
    }

    impl TextEncoder for Echo {
        fn config(&self) -> &EncoderConfig {
            &self.config
        }

        fn forward(&self, batch: &EncoderBatch) -> hearth_models::Result<Vec<f32>> {
            self.gate.lock().unwrap().recv().expect("the test opens the gate");
            self.batches.lock().unwrap().push(batch.tokens.clone());
            assert!(!batch.tokens.contains(&9), "token nine");
            if batch.tokens.contains(&8) {
                return Err(hearth_models::Error::Batch("token eight".into()));
            }
            Ok(batch.tokens.iter().flat_map(|id| [*id as f32, 1.0]).collect())
        }
    }

    /// A queue of two places and passes of four rows; the gate; the batches so far.
    struct World {
        queue: Queue,
        thread: JoinHandle<()>,
        gate: Sender<()>,
        batches: Arc<Mutex<Vec<Vec<u32>>>>,
    }

    fn world() -> World {
        let (gate, closed) = mpsc::channel();
        let batches = Arc::<Mutex<Vec<Vec<u32>>>>::default();
        let config = EncoderConfig {
            family: "echo",
            hidden_len: 2,
            ffn_len: 1,
            layer_count: 1,
            head_count: 1,
            vocab_len: 10,
            context_len: 4,
            type_count: 1,
            norm_eps: 0.0,
            gelu: hearth_models::backend::Gelu::Erf,
            names: Default::default(),
        };
        let model = Echo { config, gate: Mutex::new(closed), batches: Arc::clone(&batches) };
        let settings = Settings {
            pooling: Pooling::Mean,
            normalize: false,
            context_len: 4,
            dimensions: Dimensions::Whole,
        };
        let bounds = Bounds { queue_len: 2, batch_tokens: 4 };
        let (queue, thread) = start(Box::new(model), settings, bounds).unwrap();
        World { queue, thread, gate, batches }
    }

    impl World {
        fn open(&self, passes: usize) {
            (0..passes).for_each(|_| self.gate.send(()).unwrap());
        }
    }

    #[tokio::test]
    async fn a_long_request_and_a_short_one_share_passes() {
        let world = world();
        let long = world.queue.submit(vec![vec![1, 1], vec![2, 2], vec![3], vec![4, 6]]).unwrap();
        let short = world.queue.submit(vec![vec![5, 7]]).unwrap();
        world.open(9);
        assert_eq!(short.wait().await.unwrap(), [[6.0, 1.0]]);
        let want = [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [5.0, 1.0]];
        assert_eq!(long.wait().await.unwrap(), want);
        let batches = world.batches.lock().unwrap().clone();
        assert!(batches.iter().all(|batch| batch.len() <= 4), "{batches:?}");
        let position = |id: u32| batches.iter().position(|batch| batch.contains(&id)).unwrap();
        assert!(position(5) < position(4), "{batches:?}");
        assert_eq!(world.queue.stats().texts.load(Ordering::Relaxed), 5);
        assert_eq!(world.queue.stats().computed_tokens.load(Ordering::Relaxed), 9);
    }

    #[tokio::test]
    async fn a_full_waiting_room_says_when_to_come_back_and_empties() {
        let world = world();
        let first = world.queue.submit(vec![vec![1]]).unwrap();
        let second = world.queue.submit(vec![vec![2]]).unwrap();
        let error = world.queue.submit(vec![vec![3]]).unwrap_err();
        let SubmitError::QueueFull { waiting, retry_after } = error else { panic!("{error}") };
        assert_eq!((waiting, retry_after), (2, Duration::from_secs(1)));
        world.open(9);
        first.wait().await.unwrap();
        second.wait().await.unwrap();
        assert!(world.queue.submit(vec![vec![3]]).is_ok());
    }

    #[tokio::test]
    async fn who_leaves_is_not_computed() {
        let world = world();
        let first = world.queue.submit(vec![vec![1, 1, 1, 1]]).unwrap();
        while world.queue.stats().waiting.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        drop(world.queue.submit(vec![vec![2]]).unwrap());
        world.open(9);
        first.wait().await.unwrap();
        world.queue.submit(vec![vec![3]]).unwrap().wait().await.unwrap();
        assert!(!world.batches.lock().unwrap().concat().contains(&2));
        assert_eq!(world.queue.stats().cancelled.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_failing_pass_fails_its_requests_and_no_other() {
        for (bad, word) in [(8, "token eight"), (9, "token nine")] {
            let world = world();
            world.open(9);
            let message = world.queue.submit(vec![vec![bad]]).unwrap().wait().await.unwrap_err();
            assert!(message.contains(word), "{message}");
            let good = world.queue.submit(vec![vec![4]]).unwrap().wait().await;
            assert_eq!(good.unwrap(), [[4.0, 1.0]]);
            assert_eq!(world.queue.stats().failures.load(Ordering::Relaxed), 1);
        }
    }

    #[tokio::test]
    async fn draining_finishes_what_waits() {
        let world = world();
        let vectors = world.queue.submit(vec![vec![1], vec![2, 2, 2, 2]]).unwrap();
        world.queue.drain();
        world.open(9);
        assert_eq!(vectors.wait().await.unwrap().len(), 2);
        world.thread.join().unwrap();
        assert_eq!(world.queue.submit(vec![vec![1]]).unwrap_err(), SubmitError::ShuttingDown);
        assert_eq!(world.queue.stats().waiting.load(Ordering::Relaxed), 0);
    }
}
