//! One batch at work: looked at, run, put into files. Every stage begins with what the store has,
//! so it does not matter how often, or by which process, one was begun before.

use std::cmp::Reverse;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use super::batch::{self, Done};
use super::lines::{self, Line, Lines};
use super::runner::Stop;
use super::{Answer, Batches, Executor, Fault, Job, Later, known};
use crate::error::Error;
use crate::files::{NewFile, Writing};
use crate::places::{Place, Places};
use crate::store::{Document, Kind, Tx};
use crate::types::{Tenant, unix_now_s};

/// After a failure of the disk or the database it is tried again.
const PAUSE: Duration = Duration::from_secs(5);
/// Lines that are read ahead.
const AHEAD: usize = 32;
/// Bytes of lines after which no more are read ahead.
const AHEAD_BYTES: usize = 4 << 20;
/// Bytes of a file of answers: no line of it is thrown away.
const OUTPUT_BYTES_MAX: u64 = u64::MAX;

/// What all batches of one process work with.
pub(super) struct Worker {
    batches: Arc<Batches>,
    executor: Arc<dyn Executor>,
    /// Lines that may run, of all batches together.
    places: Arc<Places>,
    /// What looks at whole files takes seconds, and is done one after the other,
    long: Arc<Semaphore>,
    /// and so is what does not, beside it.
    short: Arc<Semaphore>,
}

/// Threads that may wait which all batches take up at most: others need them for people.
pub(super) const THREADS: usize = 2;

/// A batch as a stage finds it.
struct Stage {
    job: Job,
    body: Value,
    stop: Stop,
}

impl Worker {
    pub(super) fn new(batches: Arc<Batches>, executor: Arc<dyn Executor>) -> Self {
        let places = Places::new(executor.at_once().max(1));
        let turns = || Arc::new(Semaphore::new(1));
        Self { batches, executor, places, long: turns(), short: turns() }
    }

    /// Takes a batch to its end.
    pub(super) async fn work(self: Arc<Self>, job: Job, stop: Stop) {
        loop {
            match self.stage(&job, &stop).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::error!(%error, id = job.id, "a batch cannot go on now");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// The next stage. False when there is none.
    async fn stage(self: &Arc<Self>, job: &Job, stop: &Stop) -> Result<bool, Error> {
        let (worker, name) = (Arc::clone(self), job.clone());
        let body = aside(&self.short, move || worker.batch(&name)).await?;
        let status = body["status"].as_str().unwrap_or_default().to_owned();
        let stage = Stage { job: job.clone(), body, stop: Arc::clone(stop) };
        let worker = Arc::clone(self);
        match status.as_str() {
            "validating" => aside(&self.long, move || worker.validate(&stage)).await?,
            "in_progress" => self.execute(stage).await?,
            "finalizing" | "cancelling" => aside(&self.long, move || worker.finish(&stage)).await?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn batch(&self, job: &Job) -> Result<Value, Error> {
        Ok(self.batches.store.read(|tx| known(tx, job.project, &job.id))?.body)
    }

    /// Changes a batch that still has this status, and says whether it had.
    fn change(
        &self,
        job: &Job,
        status: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<bool, Error> {
        self.batches.store.write(|tx| {
            let mut document = known(tx, job.project, &job.id)?;
            let same = document.body["status"] == status;
            if same {
                change(&mut document.body);
                tx.replace(job.project, Kind::Batch, &document)?;
            }
            Ok(same)
        })
    }

    /// Its input from the beginning; `None` when the file is gone.
    fn input(&self, job: &Job, body: &Value) -> Result<Option<Lines>, Error> {
        let id = body["input_file_id"].as_str().unwrap_or_default();
        match self.batches.files.content(job.project, id) {
            Ok((_, file)) => Ok(Some(Lines::new(file, self.executor.line_bytes_max()))),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn validate(&self, stage: &Stage) -> Result<(), Error> {
        let Stage { job, body, .. } = stage;
        let endpoint = body["endpoint"].as_str().unwrap_or_default();
        let survey = match self.input(job, body)? {
            Some(input) => lines::survey(input, endpoint, &*self.executor)?,
            None => lines::Survey { total: 0, model: None, errors: vec![input_gone()] },
        };
        self.change(job, "validating", |body| {
            body["request_counts"]["total"] = survey.total.into();
            body["model"] = survey.model.into();
            match survey.errors.is_empty() {
                true => batch::enter(body, "in_progress"),
                false => batch::fail(body, survey.errors),
            }
        })?;
        Ok(())
    }

    /// Runs the lines that were not run yet, until none is left, or it is cancelled or too late.
    async fn execute(self: &Arc<Self>, stage: Stage) -> Result<(), Error> {
        let Stage { job, body, stop } = stage;
        let (worker, own, of) = (Arc::clone(self), job.clone(), body.clone());
        let source = aside(&self.short, move || worker.source(&own, &of)).await?;
        let gone = source.is_none();
        let mut running = Running {
            worker: Arc::clone(self),
            endpoint: body["endpoint"].as_str().unwrap_or_default().into(),
            tenant: batch::tenant(job.project, &body),
            job,
            source,
            ahead: VecDeque::new(),
            lines: JoinSet::new(),
            pause: Instant::now(),
        };
        let expires_s = body["expires_at"].as_u64().unwrap_or_default();
        let left = Duration::from_secs(expires_s.saturating_sub(unix_now_s()));
        running.until(&stop, left).await?;
        let (worker, job) = (Arc::clone(self), running.job.clone());
        drop(running); // what still runs is cancelled
        aside(&self.short, move || {
            worker.change(&job, "in_progress", |body| {
                if gone {
                    let errors = vec![input_gone()];
                    body["errors"] = serde_json::json!({"object": "list", "data": errors});
                }
                batch::enter(body, "finalizing");
            })
        })
        .await?;
        Ok(())
    }

    fn source(&self, job: &Job, body: &Value) -> Result<Option<Source>, Error> {
        let done = self.numbers(job)?;
        Ok(self.input(job, body)?.map(|lines| Source { lines, done }))
    }

    /// The lines that were run.
    fn numbers(&self, job: &Job) -> Result<HashSet<u64>, Error> {
        let ids = |tx: &Tx<'_>| tx.ids(job.project, Kind::BatchLine, &job.id);
        let ids = self.batches.store.read(ids)?;
        Ok(ids.iter().filter_map(|id| id.parse().ok()).collect())
    }

    /// Keeps what lines gave and counts them, all or none. False when the batch is not in progress
    /// any more, and nothing was kept.
    fn commit(&self, job: &Job, done: &[Done]) -> Result<bool, Error> {
        self.batches.store.write(|tx| {
            let mut batch = known(tx, job.project, &job.id)?;
            if batch.body["status"] != "in_progress" {
                return Ok(false);
            }
            for Done { line, body } in done {
                let (id, parent, body) = (line.to_string(), job.id.clone(), body.clone());
                let created_s = unix_now_s();
                let kept = Document { id, parent, created_s, expires_s: None, body };
                tx.insert(job.project, Kind::BatchLine, &kept)?;
            }
            batch::count(&mut batch.body, done);
            tx.replace(job.project, Kind::Batch, &batch)?;
            Ok(true)
        })
    }

    /// Puts what there is into files, in the order of the input, and ends the batch.
    fn finish(&self, stage: &Stage) -> Result<(), Error> {
        let Stage { job, body, .. } = stage;
        let files = &self.batches.files;
        let mut outputs = Outputs {
            answers: files.write(OUTPUT_BYTES_MAX)?,
            errors: files.write(OUTPUT_BYTES_MAX)?,
            late: false,
        };
        // A batch that was cancelled before its lines were looked at has none.
        if !body["in_progress_at"].is_null() {
            self.sort(job, body, &mut outputs)?;
        }
        let Outputs { answers, errors, late } = outputs;
        let file = |which: &str| NewFile {
            filename: format!("{}_{which}.jsonl", job.id),
            purpose: "batch_output".to_owned(),
            lifetime_s: batch::output_lifetime_s(body),
        };
        let made = [("output", answers), ("error", errors)];
        let made = made.into_iter().filter(|(_, content)| content.bytes() > 0);
        let made: Vec<_> =
            made.map(|(which, content)| (which, batch::file_id(&job.id, which), content)).collect();
        let ids: Vec<_> =
            made.iter().map(|(which, id, _)| (format!("{which}_file_id"), id.clone())).collect();
        let made = made.into_iter().map(|(which, id, content)| (id, file(which), content));
        files.keep_made(job.project, made.collect(), |tx| {
            let mut document = known(tx, job.project, &job.id)?;
            let body = &mut document.body;
            for (member, id) in ids {
                body[member] = id.into();
            }
            let end = match body["status"].as_str() {
                Some("cancelling") => "cancelled",
                _ if !body["errors"].is_null() => "failed",
                _ if late => "expired",
                _ => "completed",
            };
            batch::enter(body, end);
            tx.replace(job.project, Kind::Batch, &document)?;
            tx.delete_children(job.project, Kind::BatchLine, &job.id)?;
            Ok(())
        })
    }

    /// Sorts the lines into the two files.
    fn sort(&self, job: &Job, body: &Value, outputs: &mut Outputs) -> Result<(), Error> {
        let cancelled = body["status"] == "cancelling";
        let endpoint = body["endpoint"].as_str().unwrap_or_default();
        let mut input = self.input(job, body)?;
        // Where the input is gone, there is what was run.
        let mut numbers = self.numbers(job)?.into_iter().collect::<Vec<_>>();
        numbers.sort_unstable_by_key(|number| Reverse(*number));
        let mut next = || match &mut input {
            Some(lines) => lines.next(),
            None => Ok(numbers.pop().map(|number| (number, Vec::new()))),
        };
        while let Some((number, line)) = next()? {
            let id = number.to_string();
            let get = |tx: &Tx<'_>| tx.get(job.project, Kind::BatchLine, &job.id, &id);
            let text = match self.batches.store.read(get)? {
                Some(kept) => kept.body,
                None => {
                    outputs.late = true;
                    // It could be read when the batch began.
                    let checked = self.executor.check(endpoint, &line);
                    let custom_id = checked.map(|line| line.custom_id).unwrap_or_default();
                    batch::not_run(&job.id, number, &custom_id, cancelled)
                }
            };
            let file = match batch::is_success(&text) {
                true => &mut outputs.answers,
                false => &mut outputs.errors,
            };
            file.push(format!("{text}\n").as_bytes())?;
        }
        Ok(())
    }
}

/// The two files of a batch.
struct Outputs {
    answers: Writing,
    errors: Writing,
    /// There are lines that were not run.
    late: bool,
}

/// The lines of a batch that are still to be run.
struct Source {
    lines: Lines,
    done: HashSet<u64>,
}

impl Source {
    /// Some of them; none at the end.
    fn some(&mut self) -> Result<Vec<Line>, Error> {
        let (mut some, mut bytes) = (Vec::new(), 0);
        while some.len() < AHEAD && bytes < AHEAD_BYTES {
            let Some((number, line)) = self.lines.next()? else { break };
            if !self.done.contains(&number) {
                bytes += line.len();
                some.push((number, line));
            }
        }
        Ok(some)
    }
}

/// A batch whose lines run.
struct Running {
    worker: Arc<Worker>,
    job: Job,
    endpoint: Arc<str>,
    tenant: Tenant,
    /// `None` when nothing is left to be read.
    source: Option<Source>,
    ahead: VecDeque<Line>,
    lines: JoinSet<(u64, Answer)>,
    /// No line begins before.
    pause: Instant,
}

impl Running {
    /// Runs lines until none is left, it is told to stop, or the time is up.
    async fn until(&mut self, stop: &Stop, left: Duration) -> Result<(), Error> {
        let late = tokio::time::sleep(left);
        tokio::pin!(late);
        loop {
            if self.ahead.is_empty() {
                self.read().await?;
            }
            if self.ahead.is_empty() && self.lines.is_empty() {
                return Ok(());
            }
            // Who has used up what its key may use holds no place meanwhile.
            let (places, pause) = (Arc::clone(&self.worker.places), self.pause);
            let tenant = self.tenant;
            let place = async move {
                tokio::time::sleep_until(pause).await;
                places.take(tenant).await
            };
            tokio::select! {
                biased;
                () = stop.notified() => return Ok(()),
                () = &mut late => return Ok(()),
                Some(line) = self.lines.join_next(), if !self.lines.is_empty() => {
                    if !self.keep(line).await? {
                        return Ok(());
                    }
                }
                place = place, if !self.ahead.is_empty() => {
                    match self.worker.executor.admit(self.tenant) {
                        Ok(()) => self.begin(place),
                        // A key may be given more meanwhile, or be revoked.
                        Err(Later { wait }) => self.pause = Instant::now() + wait.min(PAUSE),
                    }
                }
            }
        }
    }

    async fn read(&mut self) -> Result<(), Error> {
        let Some(mut source) = self.source.take() else { return Ok(()) };
        let some = move || source.some().map(|some| (some, source));
        let (some, source) = aside(&self.worker.short, some).await?;
        self.source = (!some.is_empty()).then_some(source);
        self.ahead.extend(some);
        Ok(())
    }

    fn begin(&mut self, place: Place) {
        let Some((number, line)) = self.ahead.pop_front() else { return };
        let executor = Arc::clone(&self.worker.executor);
        let (endpoint, tenant) = (Arc::clone(&self.endpoint), self.tenant);
        self.lines.spawn(async move {
            let _place = place;
            loop {
                match executor.run(&endpoint, tenant, &line).await {
                    Ok(answer) => return (number, answer),
                    Err(Later { wait }) => tokio::time::sleep(wait).await,
                }
            }
        });
    }

    /// Keeps what this line gave, and every other one that is there. False when the batch is not in
    /// progress any more.
    async fn keep(&mut self, first: Result<(u64, Answer), JoinError>) -> Result<bool, Error> {
        let failed = |e: JoinError| Error::Internal(format!("a line of a batch failed: {e}"));
        let mut done = Vec::new();
        let mut line = Some(first);
        while let Some(ended) = line {
            let (number, answer) = ended.map_err(failed)?;
            done.push(batch::answered(&self.job.id, number, answer));
            line = self.lines.try_join_next();
        }
        let done = Arc::new(done);
        loop {
            let (worker, job, done) =
                (Arc::clone(&self.worker), self.job.clone(), Arc::clone(&done));
            let kept = aside(&self.worker.short, move || worker.commit(&job, &done)).await;
            match kept {
                // It was computed and paid for: it waits until there is room, and is not run again.
                Err(error) if !matches!(error, Error::NotFound { .. }) => {
                    tracing::error!(%error, id = self.job.id, "a batch cannot keep its answers");
                    tokio::time::sleep(PAUSE).await;
                }
                kept => return kept,
            }
        }
    }
}

fn input_gone() -> Value {
    let message = "The input file is not there any more.".to_owned();
    let (code, param) = ("input_file_not_found".to_owned(), Some("input_file_id".to_owned()));
    batch::error(None, Fault { code, message, param })
}

/// Runs what waits for the disk on a thread that may, when it is its turn.
async fn aside<T: Send + 'static>(
    turns: &Arc<Semaphore>,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let turn = Arc::clone(turns).acquire_owned().await; // it is never closed
    let done = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    });
    let failed = |e| Error::Internal(format!("work in the background failed: {e}"));
    done.await.unwrap_or_else(|e| Err(failed(e)))
}
