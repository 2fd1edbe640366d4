//! Durable background work: batches of requests, every line run once whatever happens meanwhile.
//!
//! [`Batches`] owns the `batch` objects on their way from `validating` to their end; `work` takes
//! them along it, `lines` reads their input, and `runner`, which knows nothing of batches, says
//! whose turn it is; the next line is of the key that has fewest [`places`](crate::places). A line
//! is run by an [`Executor`], which the house above brings: never upward.
//! What a line gave is kept in the transaction that counts it. So after a `kill -9` those are run
//! that are not there, and nothing is told twice; only when all is there, or time is up, the lines
//! become files, in the transaction that ends the batch. [`sweep`] clears out what is over. Runs on
//! tasks of its caller's runtime; what waits for the disk goes to one of two threads that may.
//! Deliberately absent: HTTP, what a line says, and models.

mod batch;
mod lines;
mod runner;
mod sweep;
mod work;

use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value};

use self::runner::Runner;
pub use self::sweep::sweep;
use self::work::Worker;
use crate::error::Error;
use crate::files::Files;
use crate::store::{Document, Kind, Listing, Page, Store, Tx};
use crate::types::{ProjectId, Tenant, unix_now_s};

/// The only `completion_window`.
pub const WINDOW: &str = "24h";
/// Lines of one batch.
pub const LINES_MAX: usize = 50_000;
/// Bytes of the file of a batch.
pub const INPUT_BYTES_MAX: u64 = 200 << 20;
/// Inputs of all lines of a batch for embeddings.
pub const INPUTS_MAX: usize = 50_000;
/// What a file of lines is uploaded for.
const PURPOSE: &str = "batch";
/// Threads that may wait which all of this takes up at most.
pub const THREADS: usize = work::THREADS + sweep::THREADS;
/// Batches that are at work at once; others wait for their turn.
const AT_ONCE: usize = 16;

/// How the house above runs lines.
pub trait Executor: Send + Sync + 'static {
    /// Reads a line, with no regard to others and without running it.
    fn check(&self, endpoint: &str, line: &[u8]) -> Result<Checked, Fault>;

    /// Counts a line of a tenant that begins now, or says when one may.
    fn admit(&self, tenant: Tenant) -> Result<(), Later>;

    /// Runs a line that was checked. Dropping the future cancels it. It never panics.
    fn run<'a>(
        &'a self,
        endpoint: &'a str,
        tenant: Tenant,
        line: &'a [u8],
    ) -> BoxFuture<'a, Result<Answer, Later>>;

    /// Lines of all batches that may run at once.
    fn at_once(&self) -> usize;

    /// Bytes of a line.
    fn line_bytes_max(&self) -> usize;
}

/// A line that can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// What the client calls it.
    pub custom_id: String,
    /// The model that it asks.
    pub model: String,
    /// Texts to be embedded in it.
    pub inputs: usize,
}

/// Why a line cannot be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
    /// Where in the line it is: `body.messages[0].content`.
    pub param: Option<String>,
}

/// What a line gave.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What the client calls the line.
    pub custom_id: String,
    /// As the endpoint alone would have answered.
    pub status: u16,
    /// The answer's own name.
    pub request_id: String,
    /// The object, or the error.
    pub body: Value,
}

/// A line could not be run now and was not begun.
#[derive(Clone, Copy, Debug)]
pub struct Later {
    /// When it is worth trying again.
    pub wait: std::time::Duration,
}

/// A batch to be.
#[derive(Clone, Debug)]
pub struct NewBatch {
    /// The file of its lines.
    pub input_file_id: String,
    /// What all lines ask.
    pub endpoint: String,
    /// Labels.
    pub metadata: Option<Map<String, Value>>,
    /// Seconds that its files live; `None` is for ever.
    pub output_lifetime_s: Option<u64>,
    /// On whose account it runs.
    pub tenant: Tenant,
}

/// A piece of work that survives the process, by the name of its object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Job {
    project: ProjectId,
    id: String,
    /// Whose it is.
    key: u64,
}

impl Job {
    fn of(project: ProjectId, batch: &Document) -> Self {
        let key = batch::tenant(project, &batch.body).key();
        Self { project, id: batch.id.clone(), key }
    }
}

/// All batches of one data directory.
pub struct Batches {
    store: Arc<Store>,
    files: Arc<Files>,
    runner: Runner,
}

fn not_found(id: &str) -> Error {
    Error::NotFound { what: "batch", id: id.to_owned() }
}

impl Batches {
    /// Over an open store. Batches that were at work when the process ended go on with
    /// [`Batches::run`]; another server on the same folder may still be at work on its own, so
    /// these are left to it.
    pub fn open(store: Arc<Store>, files: Arc<Files>) -> Result<Self, Error> {
        let runner = Runner::default();
        if store.was_alone() {
            for status in batch::UNFINISHED {
                for (project, document) in store.read(|tx| tx.with_status(Kind::Batch, status))? {
                    runner.add(Job::of(project, &document));
                }
            }
        }
        Ok(Self { store, files, runner })
    }

    /// Works until it is dropped, which cancels what runs; nothing is lost by that.
    pub async fn run(self: Arc<Self>, executor: Arc<dyn Executor>) {
        let worker = Arc::new(Worker::new(Arc::clone(&self), executor));
        let work = |job, stop| Arc::clone(&worker).work(job, stop);
        self.runner.run(AT_ONCE, work).await;
    }

    /// Takes a batch. Returns the `batch` object.
    ///
    /// # Errors
    /// There is no such file, it is for something else or too large, or the project's quota of
    /// files is used up.
    pub fn create(&self, id: &str, new: &NewBatch) -> Result<Value, Error> {
        let project = new.tenant.project;
        self.check_input(project, &new.input_file_id)?;
        self.files.check_quota(project)?;
        let created_s = unix_now_s();
        let body = batch::object(id, new, created_s);
        let (id, parent) = (id.to_owned(), String::new());
        let document = Document { id, parent, created_s, expires_s: None, body };
        self.store.write(|tx| tx.insert(project, Kind::Batch, &document))?;
        self.runner.add(Job::of(project, &document));
        Ok(batch::shown(document.body))
    }

    /// A `batch` object.
    pub fn get(&self, project: ProjectId, id: &str) -> Result<Value, Error> {
        let found = self.store.read(|tx| known(tx, project, id))?;
        Ok(batch::shown(found.body))
    }

    /// Some of them.
    pub fn list(&self, project: ProjectId, page: &Page) -> Result<Listing, Error> {
        let mut found = self.store.list(project, Kind::Batch, &[], page)?;
        for document in &mut found.documents {
            document.body = batch::shown(document.body.take());
        }
        Ok(found)
    }

    /// Ends one before its time. What is done already is kept. Returns the `batch` object.
    ///
    /// # Errors
    /// It has ended, or is about to.
    pub fn cancel(&self, project: ProjectId, id: &str) -> Result<Value, Error> {
        let document = self.store.write(|tx| {
            let mut document = known(tx, project, id)?;
            if batch::cancel(&mut document.body)? {
                tx.replace(project, Kind::Batch, &document)?;
            }
            Ok::<_, Error>(document)
        })?;
        self.runner.stop(&Job::of(project, &document));
        Ok(batch::shown(document.body))
    }

    fn check_input(&self, project: ProjectId, id: &str) -> Result<(), Error> {
        let wrong = |why: String| Error::invalid("input_file_id", why);
        let file = self.files.get(project, id).map_err(|error| match error {
            Error::NotFound { .. } => {
                wrong(format!("Invalid 'input_file_id': no file found with id '{id}'."))
            }
            other => other,
        })?;
        if file["purpose"] != PURPOSE {
            let why = format!("its purpose is {}, and that of a batch is 'batch'", file["purpose"]);
            return Err(wrong(format!("Invalid 'input_file_id': {why}.")));
        }
        let bytes = file["bytes"].as_u64().unwrap_or_default();
        if bytes > INPUT_BYTES_MAX {
            let why = format!("the file has {bytes} bytes, and a batch at most {INPUT_BYTES_MAX}");
            return Err(wrong(format!("Invalid 'input_file_id': {why}.")));
        }
        Ok(())
    }
}

fn known(tx: &Tx<'_>, project: ProjectId, id: &str) -> Result<Document, Error> {
    tx.get(project, Kind::Batch, "", id)?.ok_or_else(|| not_found(id))
}

#[cfg(test)]
mod tests;
