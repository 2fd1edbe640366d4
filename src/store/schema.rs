//! The tables, and how older databases come to have them: every change is one step at the end of
//! [`STEPS`], applied once, in order, each in its own transaction.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::{StoreError, refused};

/// Marks the file as ours ("HRTH"), so that no other program's database is ever migrated.
const APPLICATION_ID: i32 = 0x4852_5448;

/// `STEPS[i]` brings version `i` to version `i + 1`. Never edited once released.
const STEPS: &[&str] = &[
    "
    CREATE TABLE projects (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_s INTEGER NOT NULL
    ) STRICT;
    -- Whoever comes without a key of the table (an open server, --api-key) is in this one.
    INSERT INTO projects VALUES (1, 'default', unixepoch());

    CREATE TABLE keys (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        project INTEGER NOT NULL REFERENCES projects(id),
        name TEXT NOT NULL,
        hash BLOB NOT NULL UNIQUE,
        hint TEXT NOT NULL,
        admin INTEGER NOT NULL,
        weight INTEGER NOT NULL,
        max_running INTEGER,
        requests_per_min INTEGER,
        tokens_per_min INTEGER,
        created_s INTEGER NOT NULL,
        expires_s INTEGER,
        revoked_s INTEGER
    ) STRICT;

    -- JSON objects of every kind that the API keeps. `seq` is the order in which they came.
    CREATE TABLE documents (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        project INTEGER NOT NULL REFERENCES projects(id),
        kind TEXT NOT NULL,
        parent TEXT NOT NULL,
        id TEXT NOT NULL,
        created_s INTEGER NOT NULL,
        expires_s INTEGER,
        body TEXT NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX documents_by_id ON documents(project, kind, parent, id);
    CREATE INDEX documents_in_order ON documents(project, kind, parent, seq);
    CREATE INDEX documents_of_parent ON documents(project, parent) WHERE parent != '';
    CREATE INDEX documents_by_name ON documents(kind, id);
    CREATE INDEX documents_that_expire ON documents(expires_s) WHERE expires_s IS NOT NULL;
",
    "
    -- One row: what tells this database from another that was made in its place.
    CREATE TABLE identity (id BLOB NOT NULL) STRICT;
    INSERT INTO identity VALUES (randomblob(16));
",
    "
    -- What was used, added up by minute. A key of 0 is none of the table.
    CREATE TABLE usage (
        minute_s INTEGER NOT NULL,
        project INTEGER NOT NULL REFERENCES projects(id),
        key INTEGER NOT NULL,
        model TEXT NOT NULL,
        work TEXT NOT NULL,
        batch INTEGER NOT NULL,
        tier TEXT NOT NULL,
        requests INTEGER NOT NULL,
        input INTEGER NOT NULL,
        cached INTEGER NOT NULL,
        output INTEGER NOT NULL,
        PRIMARY KEY (minute_s, project, key, model, work, batch, tier)
    ) STRICT, WITHOUT ROWID;
",
    "ALTER TABLE keys ADD COLUMN queue_timeout_s INTEGER;",
];

/// Why a database is not ours to use.
#[derive(Debug)]
pub(super) enum Unfit {
    Newer(usize),
    Foreign,
    Failed(StoreError),
}

impl Unfit {
    /// As an error about a file.
    pub(super) fn of(self, path: &Path) -> StoreError {
        match self {
            Self::Failed(error) => error,
            Self::Foreign => refused(path, "is a database of another program"),
            Self::Newer(found) => refused(
                path,
                format!(
                    "was written by a newer hearth (schema {found}, this one knows {}); run that \
                     one, or name another --data-dir",
                    STEPS.len()
                ),
            ),
        }
    }
}

impl<E: Into<StoreError>> From<E> for Unfit {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Brings a database to the newest version.
///
/// # Errors
/// It is newer already, or not ours.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), Unfit> {
    loop {
        // Immediate, so that of two processes that start together one waits for the other.
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let number =
            |pragma| tx.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get::<_, i32>(0));
        let (version, application) = (number("user_version")?, number("application_id")?);
        let tables: i64 =
            tx.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if application != APPLICATION_ID && (application != 0 || version != 0 || tables != 0) {
            return Err(Unfit::Foreign);
        }
        let version = usize::try_from(version).unwrap_or(usize::MAX);
        match STEPS.get(version) {
            None if version == STEPS.len() => return Ok(()),
            None => return Err(Unfit::Newer(version)),
            Some(step) => tx.execute_batch(step)?,
        }
        tx.pragma_update(None, "application_id", APPLICATION_ID)?;
        tx.pragma_update(None, "user_version", version as i64 + 1)?;
        tx.commit()?;
    }
}
