//! What outlives the process, in one embedded SQLite database. The only room that names one.
//!
//! Other rooms speak in transactions over typed rows: [`Tx`] has the documents (JSON objects with
//! an id, a project and an order), the API keys, and the sums of what was used. One connection
//! writes, behind a mutex, and two read beside it, which the write-ahead log allows: one for what
//! is found at once, and one for lists, which may have to look at everything; other processes
//! (`hearth keys`) do the same and wait for each other. Everything here blocks: async callers bring
//! a thread that may.
//!
//! A commit is on the disk before it returns (`synchronous=FULL`): what the API acknowledged
//! survives `kill -9`, which the log alone would do, and a power cut, which it would not. The price
//! is one flush for each request that stores something. What nobody waits for is written without
//! one ([`Store::write_unflushed`]). Deliberately absent: what the documents mean, and the contents
//! of files, which lie beside the database.

mod documents;
mod keys;
mod maintain;
mod schema;
mod usage;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};

pub use documents::{Document, Kind, Listing, Match, Page};
pub use keys::{KeyRow, NewKey};
pub use maintain::{Collected, Swept, backup, restore};
pub use usage::{Account, Group, UsageQuery, UsageRow, Used, Work};

use crate::error::Error;

/// Name of the database inside the data directory.
const DATABASE: &str = "hearth.db";
/// Held shared by whoever uses the folder, and alone by whoever replaces it.
const LOCK: &str = "hearth.lock";
/// Held shared by every server on the folder.
const SERVED: &str = "hearth.served";
/// How long a writer waits for a writer in another process.
const BUSY: Duration = Duration::from_secs(10);

/// Why nothing was read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be used.
    #[error("{}: {why}", .path.display())]
    Folder {
        /// The folder, or the file in it.
        path: PathBuf,
        /// What is wrong and what would help.
        why: String,
    },
    /// Another process wrote for longer than [`BUSY`].
    #[error("the database is busy: another process has been writing for a long time")]
    Busy,
    /// No room on the disk.
    #[error("the disk is full")]
    Full,
    /// A list was to go on after an object that is not in it.
    #[error("no object with the id '{0}' is in this list")]
    NoSuchCursor(String),
    /// Ours, or the disk's.
    #[error("the database failed: {0}")]
    Database(String),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy,
            Some(ErrorCode::DiskFull) => Self::Full,
            _ => Self::Database(error.to_string()),
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NoSuchCursor(_) => Self::invalid("after", error.to_string()),
            StoreError::Full => Self::StorageFull(error.to_string()),
            _ => Self::Internal(error.to_string()),
        }
    }
}

/// One folder of durable state, or the same in memory.
#[derive(Debug)]
pub struct Store {
    writer: Mutex<Connection>,
    /// `None` in memory, where there is only one connection.
    reader: Option<Mutex<Connection>>,
    /// As `reader`, for what takes its time: keys are looked up for every request.
    lister: Option<Mutex<Connection>>,
    folder: Option<PathBuf>,
    alone: bool,
    /// Held as long as this lives.
    locks: Vec<File>,
}

/// One transaction: all of it happens or none.
pub struct Tx<'a>(Transaction<'a>);

impl Store {
    /// Opens the database of a data directory for a server, both made when they are not there.
    ///
    /// # Errors
    /// The folder cannot be written, is being restored, or was written by a newer version.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let mut store = Self::visit(folder)?;
        let served = lock(folder, SERVED)?;
        let alone = join(&mut hold(&store.writer), folder, &served)?;
        store.alone = alone;
        store.locks.push(served);
        Ok(store)
    }

    /// The same for a command, which takes up no work that was left there: to the servers it is
    /// as if it were not here.
    pub fn visit(folder: &Path) -> Result<Self, StoreError> {
        let lock = lock(folder, LOCK)?;
        let shared = lock.try_lock_shared();
        shared.map_err(|e| refused(folder, lock_error(e, "it is being restored right now")))?;
        let path = folder.join(DATABASE);
        let mut writer = connect(&path, OpenFlags::SQLITE_OPEN_CREATE)?;
        schema::migrate(&mut writer).map_err(|e| e.of(&path))?;
        let reader = Some(Mutex::new(connect(&path, OpenFlags::empty())?));
        let lister = Some(Mutex::new(connect(&path, OpenFlags::empty())?));
        let folder = Some(folder.to_owned());
        let writer = Mutex::new(writer);
        Ok(Self { writer, reader, lister, folder, alone: false, locks: vec![lock] })
    }

    /// A store that is gone with the process.
    pub fn in_memory() -> Result<Self, StoreError> {
        let mut writer = Connection::open_in_memory()?;
        prepare(&writer)?;
        schema::migrate(&mut writer).map_err(|e| e.of(Path::new(":memory:")))?;
        Ok(Self {
            writer: Mutex::new(writer),
            reader: None,
            lister: None,
            folder: None,
            alone: true,
            locks: Vec::new(),
        })
    }

    /// The data directory; `None` in memory.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// What tells this database from every other, in hexadecimal digits: the numbers of projects
    /// are its own.
    pub fn identity(&self) -> Result<String, StoreError> {
        self.read(|tx| Ok(tx.0.query_row("SELECT hex(id) FROM identity", [], |row| row.get(0))?))
    }

    /// No other server had the folder open when this one came: what was at work there is not any
    /// more.
    pub fn was_alone(&self) -> bool {
        self.alone
    }

    /// Reads a consistent state.
    pub fn read<T, E: From<StoreError>>(
        &self,
        work: impl FnOnce(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.read_by(self.reader.as_ref(), work)
    }

    /// The same, of what may take seconds. No other read waits for it.
    pub fn scan<T, E: From<StoreError>>(
        &self,
        work: impl FnOnce(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.read_by(self.lister.as_ref(), work)
    }

    fn read_by<T, E: From<StoreError>>(
        &self,
        connection: Option<&Mutex<Connection>>,
        work: impl FnOnce(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = hold(connection.unwrap_or(&self.writer));
        let tx = connection.transaction().map_err(StoreError::from)?;
        work(&Tx(tx))
    }

    /// Writes: when this returns `Ok` it is on the disk, and after an `Err` nothing has changed.
    pub fn write<T, E: From<StoreError>>(
        &self,
        work: impl FnOnce(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        commit(&mut hold(&self.writer), "FULL", work)
    }

    /// Writes what nobody waits for, without a flush: it outlives the process at once, and a power
    /// cut from the next [`Store::write`] on.
    pub fn write_unflushed<T, E: From<StoreError>>(
        &self,
        work: impl FnOnce(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        commit(&mut hold(&self.writer), "NORMAL", work)
    }
}

fn commit<T, E: From<StoreError>>(
    connection: &mut Connection,
    synchronous: &str,
    work: impl FnOnce(&Tx<'_>) -> Result<T, E>,
) -> Result<T, E> {
    connection.pragma_update(None, "synchronous", synchronous).map_err(StoreError::from)?;
    // Immediate: a writer that waits for another waits here, and not in the middle.
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate);
    let tx = Tx(tx.map_err(StoreError::from)?);
    let done = work(&tx)?;
    tx.0.commit().map_err(StoreError::from)?;
    Ok(done)
}

/// A panic in the middle of a transaction rolled it back, so the connection is whole.
fn hold(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused(path: &Path, why: impl Into<String>) -> StoreError {
    StoreError::Folder { path: path.to_owned(), why: why.into() }
}

fn lock_error(error: TryLockError, held: &str) -> String {
    match error {
        TryLockError::WouldBlock => held.to_owned(),
        TryLockError::Error(error) => format!("cannot be locked: {error}"),
    }
}

/// Takes a place among the servers of a folder. Says whether it is the only one.
fn join(writer: &mut Connection, folder: &Path, served: &File) -> Result<bool, StoreError> {
    // From alone to shared goes over unlocked: two that start together must not both be alone.
    let _turn = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let alone = served.try_lock().is_ok();
    let shared = served.unlock().map_err(TryLockError::Error);
    let shared = shared.and_then(|()| served.try_lock_shared());
    shared.map_err(|e| refused(folder, lock_error(e, "another server is starting there")))?;
    Ok(alone)
}

/// A lock file of a folder; both are made where they are not there.
fn lock(folder: &Path, name: &str) -> Result<File, StoreError> {
    let cannot = |error: std::io::Error| {
        let why = format!(
            "the data directory cannot be written: {error}; name another with --data-dir, or \
             'none' to keep everything in memory"
        );
        refused(folder, why)
    };
    if !folder.is_dir() {
        fs::create_dir_all(folder).map_err(cannot)?;
        private(folder).map_err(cannot)?;
    }
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(folder.join(name)).map_err(cannot)
}

/// Prompts and hashes of keys lie in the folder that we make: nobody else on the machine reads it.
#[cfg(unix)]
fn private(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
}

#[cfg(not(unix))]
fn private(_: &Path) -> std::io::Result<()> {
    Ok(())
}

fn connect(path: &Path, more: OpenFlags) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | more;
    let connection = Connection::open_with_flags(path, flags)
        .and_then(|connection| prepare(&connection).map(|()| connection));
    connection.map_err(|e| refused(path, format!("cannot be opened as a database: {e}")))
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY)?;
    // The answer is the mode that holds; in memory there is no log, which is as well.
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
