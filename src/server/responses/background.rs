//! Responses that nobody waits for: each runs in a task of its own and writes its events into a
//! log, which any number of clients may follow, from the start or from where they were.
//!
//! Logs live in memory, the last [`LOGS_MAX`] of them; the response itself is in the store from the
//! moment it is queued. One that runs when the process ends has failed at the next start.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
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
        let mut known = log.events();
        known.extend(events);
        let count = known.len();
        drop(known);
        log.state.send_modify(|state| state.0 = count);
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
            state: watch::Sender::new((0, false)),
            stop: Notify::new(),
        });
        let mut logs = self.logs();
        logs.push_back(Arc::clone(&log));
        if logs.len() > LOGS_MAX
            && let Some(oldest) = logs.iter().position(|log| log.state.borrow().1)
        {
            logs.remove(oldest);
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
                let count = count as u64;
                if next < count {
                    let piece = log.piece(next, count);
                    return Some((piece, (log, changes, count)));
                }
                // An error is a log that was forgotten, whose response has ended.
                if ended || changes.changed().await.is_err() {
                    return None;
                }
            }
        })
        .boxed()
    }

    /// Sequence numbers count events, so they are places in the list.
    fn piece(&self, from: u64, to: u64) -> Vec<u8> {
        let events = self.events();
        let some = events.iter().filter(|event| (from..to).contains(&event.sequence));
        some.flat_map(|event| event.bytes.iter().copied()).collect()
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
