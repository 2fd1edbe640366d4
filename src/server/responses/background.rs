//! Responses that nobody waits for: each runs in a task of its own and writes its events into a
//! log, which any number of clients may follow, from the start or from where they were.
//!
//! Logs live in memory, the last [`LOGS_MAX`] of them and no more than [`LOGS_BYTES`]; the response
//! itself is in the store from the moment it is queued. One that runs when the process ends has
//! failed at the next start.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Json;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::{Notify, watch};

use super::reply::Event;
use super::{App, Run, aside, sse};
use crate::server::error::ApiError;
use crate::server::observe::Watch;
use crate::types::ProjectId;

/// Logs that are remembered. Those of running responses are never forgotten.
const LOGS_MAX: usize = 256;

/// What they may weigh together: half a million events or so.
const LOGS_BYTES: usize = 128 << 20;

/// What a client is given at a time.
const PIECE_BYTES: usize = 64 << 10;

/// The logs of one server, oldest first.
#[derive(Default)]
pub(in crate::server) struct Backgrounds {
    logs: Mutex<VecDeque<Arc<Log>>>,
}

/// The events of one response.
pub(super) struct Log {
    project: ProjectId,
    id: String,
    events: Mutex<Vec<Event>>,
    bytes: AtomicUsize,
    /// How many events there are, and whether no more will come.
    state: watch::Sender<(usize, bool)>,
    stop: Notify,
}

/// Queues a response and answers at once, with the object or with the stream of its log.
pub(super) async fn start(
    app: &Arc<App>,
    watch: Arc<Watch>,
    mut run: Run,
) -> Result<Response, ApiError> {
    let (object, history) = (run.reply.queue(), Arc::clone(&run.keep.history));
    let (project, input) = (run.keep.project, run.keep.draft.input.clone());
    let kept = object.clone();
    aside(move || history.begin_response(project, &kept, &input)).await?;
    let id = object["id"].as_str().unwrap_or_default().to_owned();
    let log = app.backgrounds.open(project, id);
    let streamed = run.keep.draft.stream;
    let task = Arc::clone(&log);
    tokio::spawn(async move {
        let work = AssertUnwindSafe(write(&task, run)).catch_unwind();
        tokio::select! {
            done = work => if done.is_err() {
                tracing::error!(id = task.id, "a response in the background failed");
            },
            () = task.stop.notified() => {}
        }
        task.state.send_modify(|state| state.1 = true);
        // The request is in work until here.
        drop(watch);
    });
    match streamed {
        true => Ok(sse::pieces(log.follow(None), app.config.heartbeat)),
        false => Ok(Json(object).into_response()),
    }
}

async fn write(log: &Log, mut run: Run) {
    while let Some(events) = run.step().await {
        log.add(events);
    }
}

impl Backgrounds {
    /// The log of a response, while it is remembered.
    pub(super) fn log(&self, project: ProjectId, id: &str) -> Option<Arc<Log>> {
        let logs = self.logs();
        logs.iter().find(|log| log.project == project && log.id == id).cloned()
    }

    /// Ends a response, if it runs.
    pub(super) fn stop(&self, project: ProjectId, id: &str) {
        if let Some(log) = self.log(project, id) {
            log.stop.notify_one();
        }
    }

    fn open(&self, project: ProjectId, id: String) -> Arc<Log> {
        let log = Arc::new(Log {
            project,
            id,
            events: Mutex::default(),
            bytes: AtomicUsize::new(0),
            state: watch::Sender::new((0, false)),
            stop: Notify::new(),
        });
        let mut logs = self.logs();
        logs.push_back(Arc::clone(&log));
        let mut bytes: usize = logs.iter().map(|log| log.bytes()).sum();
        while (logs.len() > LOGS_MAX || bytes > LOGS_BYTES)
            && let Some(oldest) = logs.iter().position(|log| log.state.borrow().1)
        {
            bytes -= logs.remove(oldest).map_or(0, |log| log.bytes());
        }
        log
    }

    /// Whoever panicked in here left a list that is whole.
    fn logs(&self) -> MutexGuard<'_, VecDeque<Arc<Log>>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log {
    /// Its events after this sequence number, those to come included.
    pub(super) fn follow(self: &Arc<Self>, after: Option<u64>) -> BoxStream<'static, Vec<u8>> {
        let first = after.map_or(0, |after| after.saturating_add(1));
        let state = (Arc::clone(self), self.state.subscribe(), first);
        stream::unfold(state, |(log, mut changes, next)| async move {
            loop {
                let (count, ended) = *changes.borrow_and_update();
                if next < count as u64 {
                    let (piece, next) = log.piece(next);
                    return Some((piece, (log, changes, next)));
                }
                // An error is a log that was forgotten, whose response has ended.
                if ended || changes.changed().await.is_err() {
                    return None;
                }
            }
        })
        .boxed()
    }

    /// The next events, one at least if there are any, and the number behind them. Sequence numbers
    /// count events, so they are places in the list.
    fn piece(&self, from: u64) -> (Vec<u8>, u64) {
        let (events, mut piece, mut next) = (self.events(), Vec::new(), from);
        for event in events.iter().skip(from as usize) {
            if !piece.is_empty() && piece.len() + event.bytes.len() > PIECE_BYTES {
                break;
            }
            debug_assert_eq!(event.sequence, next);
            piece.extend_from_slice(&event.bytes);
            next += 1;
        }
        (piece, next)
    }

    fn add(&self, events: Vec<Event>) {
        let bytes = events.iter().map(|event| event.bytes.len()).sum();
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let mut known = self.events();
        known.extend(events);
        let count = known.len();
        drop(known);
        self.state.send_modify(|state| state.0 = count);
    }

    fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROJECT: ProjectId = ProjectId::DEFAULT;

    fn event(sequence: u64, len: usize) -> Event {
        Event { sequence, bytes: vec![sequence as u8; len] }
    }

    #[test]
    fn logs_that_ended_are_forgotten_by_number_and_by_weight() {
        let all = Backgrounds::default();
        let known = |id: &str| all.log(PROJECT, id).is_some();
        let running = all.open(PROJECT, "running".into());
        running.add(vec![event(0, LOGS_BYTES)]);
        for id in ["old", "new"] {
            let log = all.open(PROJECT, id.into());
            log.add(vec![event(0, 1000)]);
            log.state.send_modify(|state| state.1 = true);
        }
        assert!(known("running") && !known("old") && known("new"));
        running.state.send_modify(|state| state.1 = true);
        all.open(PROJECT, "last".into());
        assert!(!known("running") && known("new"), "the oldest had the weight");
        for number in 0..2 * LOGS_MAX {
            let log = all.open(PROJECT, number.to_string());
            log.state.send_modify(|state| state.1 = true);
        }
        assert_eq!(all.logs().len(), LOGS_MAX);
        assert!(known("last"), "it runs");
    }

    #[tokio::test]
    async fn a_log_is_given_in_pieces_from_any_place() {
        let log = Backgrounds::default().open(PROJECT, "a".into());
        let lens = [10, 0, PIECE_BYTES, 20, 3 * PIECE_BYTES, 30];
        log.add(lens.iter().zip(0..).map(|(len, sequence)| event(sequence, *len)).collect());
        log.state.send_modify(|state| state.1 = true);
        for after in [None, Some(0), Some(2), Some(4), Some(5), Some(900), Some(u64::MAX)] {
            let pieces: Vec<Vec<u8>> = log.follow(after).collect().await;
            let first = after.map_or(0, |after| after.saturating_add(1) as usize);
            let wanted: Vec<u8> = (first..lens.len())
                .flat_map(|sequence| vec![sequence as u8; lens[sequence]])
                .collect();
            assert_eq!(pieces.concat(), wanted, "{after:?}");
            let small = |piece: &Vec<u8>| piece.len() <= PIECE_BYTES || piece[0] == 4;
            assert!(pieces.iter().all(small), "{after:?}");
        }
    }
}
