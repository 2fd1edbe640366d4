//! Load on any server that speaks the OpenAI API, ours or a peer's, and what it felt like.
//!
//! Closed loop: so many clients, each asks again when it has its answer, at once or after a moment
//! of thought. Open loop: requests come at random moments (a Poisson process) whether or not the
//! server keeps up, which is how strangers behave. Latencies of the open loop begin when a request
//! was due, so a client that falls behind cannot hide what the server does. Every client is a
//! thread that blocks; all of this runs until the last answer is there. Of ours it knows the client
//! alone.
//!
//! Deliberately absent: judging the answers, and driving more than one machine.

mod arrivals;
mod plot;
mod prompts;
mod report;
mod request;
mod stats;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub use plot::html;
pub use prompts::{Content, Prompt, Prompts};
pub use report::{Point, Report, Slo};
pub use request::{Record, Server};
pub use stats::{Percentiles, percentile};

use crate::client::{self, Failed};

/// Requests under way at once in the open loop; further ones are counted as not sent.
const IN_FLIGHT_MAX: usize = client::IDLE_CONNECTIONS;
/// A client waits this long after an error where the server does not say how long.
const PAUSE: Duration = Duration::from_millis(200);
/// TLS and JSON fit; two thousand of them fit into a small machine.
const STACK_BYTES: usize = 512 << 10;

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum LoadTestError {
    /// The server cannot be asked at all.
    #[error("{url}: {why}")]
    Server {
        /// Its base URL.
        url: String,
        /// What it said, or why it did not.
        why: String,
    },
    /// The file of prompts.
    #[error("{path}: {why}")]
    Prompts {
        /// The file, and the line where there is one.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// The operating system gives no thread.
    #[error("a thread for a client: {0}")]
    Thread(#[from] std::io::Error),
}

/// How hard to push.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pressure {
    /// Closed loop of this many clients.
    Clients(usize),
    /// Open loop, requests a second.
    Rate(f64),
}

/// When to stop asking; answers that run are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// After this many requests.
    Requests(usize),
    /// After this time.
    Duration(Duration),
}

/// How far one measurement is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Part of the work, 0 to 1.
    pub share: f64,
    /// Requests answered.
    pub answered: usize,
    /// Requests that failed.
    pub failed: usize,
}

/// One measurement: every request, with its times since the start in seconds.
pub struct Measurement<'a> {
    /// Whom to ask.
    pub server: &'a Server,
    /// What to ask.
    pub prompts: &'a Prompts,
    /// Number of the first prompt: later measurements ask what earlier ones did not.
    pub first_prompt: usize,
    /// How hard.
    pub pressure: Pressure,
    /// How long.
    pub extent: Extent,
    /// In the closed loop: how long a client thinks before each question, on average.
    pub think: Duration,
    /// In the closed loop: how much later than its neighbour a client asks for the first time.
    pub stagger: Duration,
    /// Random moments of the open loop, and lengths of thought.
    pub seed: u64,
    /// Told after every request.
    pub progress: &'a (dyn Fn(Progress) + Sync),
}

impl Measurement<'_> {
    /// Runs it. Also the seconds from the start to the last answer.
    pub fn run(&self) -> Result<(Vec<Record>, f64), LoadTestError> {
        let ledger = Ledger::new(self);
        let refused = match self.pressure {
            Pressure::Clients(clients) => self.closed(clients, &ledger),
            Pressure::Rate(rate) => self.open(rate, &ledger),
        };
        refused?;
        let wall_s = ledger.started.elapsed().as_secs_f64();
        let records = ledger.records.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok((records, wall_s))
    }

    fn closed(&self, clients: usize, ledger: &Ledger<'_>) -> Result<(), std::io::Error> {
        let client = |number: u32| {
            thread::sleep(self.stagger.saturating_mul(number).min(ledger.left()));
            for thought in arrivals::thinking(self.think, self.seed, number.into()) {
                thread::sleep(thought.min(ledger.left()));
                let Some(index) = ledger.next() else { break };
                let due = ledger.started.elapsed();
                let record = self.ask(index, due, ledger);
                let pause = record.failed.as_ref().map(|failed| failed.pause.unwrap_or(PAUSE));
                ledger.enter(record);
                if let Some(pause) = pause {
                    thread::sleep(pause.min(ledger.left()));
                }
            }
        };
        thread::scope(|scope| {
            let spawn = |number| {
                let thread = thread::Builder::new().stack_size(STACK_BYTES);
                thread.spawn_scoped(scope, move || client(number))
            };
            let spawned: Result<Vec<_>, _> = (0..).take(clients).map(spawn).collect();
            // Those that run already need not go on.
            ledger.closed.store(spawned.is_err(), Ordering::Relaxed);
            spawned.map(drop)
        })
    }

    fn open(&self, rate: f64, ledger: &Ledger<'_>) -> Result<(), std::io::Error> {
        let in_flight = &AtomicUsize::new(0);
        thread::scope(|scope| {
            for due in arrivals::poisson(rate, self.seed) {
                if ledger.is_over_at(due) {
                    break;
                }
                let Some(index) = ledger.next() else { break };
                thread::sleep(due.saturating_sub(ledger.started.elapsed()));
                if in_flight.load(Ordering::Relaxed) >= IN_FLIGHT_MAX {
                    let why = format!("{IN_FLIGHT_MAX} requests are under way");
                    ledger.enter(Record::failed(due.as_secs_f64(), Failed::new("not sent", why)));
                    continue;
                }
                in_flight.fetch_add(1, Ordering::Relaxed);
                let ask = move || {
                    ledger.enter(self.ask(index, due, ledger));
                    in_flight.fetch_sub(1, Ordering::Relaxed);
                };
                thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, ask)?;
            }
            Ok(())
        })
    }

    fn ask(&self, index: usize, due: Duration, ledger: &Ledger<'_>) -> Record {
        let prompt = self.prompts.get(self.first_prompt + index);
        self.server.stream(&prompt, ledger.started, due.as_secs_f64())
    }
}

/// What all clients of a measurement share.
struct Ledger<'a> {
    of: &'a Measurement<'a>,
    started: Instant,
    /// Prompts handed out.
    issued: AtomicUsize,
    /// No client begins another request.
    closed: AtomicBool,
    records: Mutex<Vec<Record>>,
}

impl<'a> Ledger<'a> {
    fn new(of: &'a Measurement<'a>) -> Self {
        Self {
            of,
            started: Instant::now(),
            issued: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            records: Mutex::default(),
        }
    }

    /// The number of the next request; `None` when there are enough.
    fn next(&self) -> Option<usize> {
        if self.closed.load(Ordering::Relaxed) || self.is_over_at(self.started.elapsed()) {
            return None;
        }
        let index = self.issued.fetch_add(1, Ordering::Relaxed);
        match self.of.extent {
            Extent::Requests(requests) if index >= requests => None,
            _ => Some(index),
        }
    }

    fn is_over_at(&self, moment: Duration) -> bool {
        matches!(self.of.extent, Extent::Duration(limit) if moment >= limit)
    }

    /// Time in which there may be further requests.
    fn left(&self) -> Duration {
        match self.of.extent {
            Extent::Requests(_) => Duration::MAX,
            Extent::Duration(limit) => limit.saturating_sub(self.started.elapsed()),
        }
    }

    fn enter(&self, record: Record) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.push(record);
        let failed = records.iter().filter(|record| record.failed.is_some()).count();
        let answered = records.len() - failed;
        drop(records);
        let share = match self.of.extent {
            Extent::Requests(requests) => (answered + failed) as f64 / requests as f64,
            Extent::Duration(limit) => self.started.elapsed().as_secs_f64() / limit.as_secs_f64(),
        };
        (self.of.progress)(Progress { share: share.min(1.0), answered, failed });
    }
}
