//! Copies of a data directory, the way back, and clearing out what has expired.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rusqlite::backup::Backup;
use rusqlite::{Connection, OpenFlags, params};

use super::{DATABASE, Kind, LOCK, Store, StoreError, hold, lock, lock_error, refused, schema};

/// Pages that are copied before other writers get their turn.
const PAGES: i32 = 256;

/// What `gc` found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Documents that had expired.
    pub documents: usize,
    /// Bytes that the database gave back.
    pub bytes: u64,
}

/// What a sweep removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Documents that had expired.
    pub documents: usize,
    /// Ids of those that have contents beside the database, which nobody names any more.
    pub contents: Vec<String>,
}

impl Store {
    /// Removes at most so many documents that have expired, without a flush: whoever writes next
    /// waits for these alone, and nobody misses what is not shown any more. Their space is used
    /// again; only [`Store::gc`] gives it back.
    pub fn sweep(&self, most: usize) -> Result<Swept, StoreError> {
        self.write_unflushed(|tx| {
            let sql = "DELETE FROM documents WHERE seq IN (SELECT seq FROM documents \
                       WHERE expires_s IS NOT NULL AND expires_s <= unixepoch() \
                       ORDER BY expires_s, seq LIMIT ?) RETURNING project, kind, parent, id";
            let mut query = tx.0.prepare_cached(sql)?;
            let row = |row: &rusqlite::Row<'_>| {
                let (project, kind): (i64, String) = (row.get(0)?, row.get(1)?);
                let (parent, id): (String, String) = (row.get(2)?, row.get(3)?);
                Ok((project, kind, parent, id))
            };
            let gone = query.query_map([most], row)?.collect::<Result<Vec<_>, _>>()?;
            let mut swept = Swept { documents: gone.len(), contents: Vec::new() };
            // What belongs to one mostly has the same end, and comes by itself.
            let sql = "DELETE FROM documents WHERE project = ? AND parent = ? \
                       AND expires_s IS NULL";
            let mut children = tx.0.prepare_cached(sql)?;
            for (project, kind, parent, id) in gone {
                if parent.is_empty() {
                    swept.documents += children.execute(params![project, id])?;
                }
                if kind == Kind::File.word() || kind == Kind::UploadPart.word() {
                    swept.contents.push(id);
                }
            }
            Ok(swept)
        })
    }

    /// Removes documents that have expired, with all that belongs to them, and gives the space of
    /// the database back.
    pub fn gc(&self) -> Result<Collected, StoreError> {
        let connection = hold(&self.writer);
        let pages = |pragma: &str| -> rusqlite::Result<u64> {
            connection.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get(0))
        };
        let before = pages("page_count")?;
        // Children first: afterwards nobody knows whose they were.
        let gone = "expires_s IS NOT NULL AND expires_s <= unixepoch()";
        let children = format!(
            "DELETE FROM documents WHERE parent != '' AND (project, parent) IN \
             (SELECT project, id FROM documents WHERE {gone})"
        );
        let mut documents = connection.execute(&children, [])?;
        documents += connection.execute(&format!("DELETE FROM documents WHERE {gone}"), [])?;
        connection.execute_batch("VACUUM; PRAGMA wal_checkpoint(TRUNCATE)")?;
        let bytes = before.saturating_sub(pages("page_count")?) * pages("page_size")?;
        Ok(Collected { documents, bytes })
    }
}

/// Copies the database of a data directory, as it is at one moment, into an empty or new folder. A
/// server may be at work on it.
pub fn backup(store: &Store, to: &Path) -> Result<(), StoreError> {
    if to.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(refused(to, "is not empty"));
    }
    fs::create_dir_all(to).map_err(|e| refused(to, e.to_string()))?;
    let from = hold(store.reader.as_ref().unwrap_or(&store.writer));
    copy(&from, &to.join(DATABASE))
}

/// Puts a backup in the place of a data directory's database. What is there is kept beside it, as
/// `hearth.db.before-restore`.
///
/// # Errors
/// The backup is not one, or the folder is in use.
pub fn restore(from: &Path, folder: &Path) -> Result<(), StoreError> {
    let source = from.join(DATABASE);
    let open = Connection::open_with_flags(&source, OpenFlags::SQLITE_OPEN_READ_WRITE);
    let mut backup = open.map_err(|e| refused(&source, format!("is not a backup: {e}")))?;
    schema::migrate(&mut backup).map_err(|e| e.of(&source))?;
    let lock = lock(folder, LOCK)?;
    let alone = lock.try_lock();
    alone.map_err(|e| refused(folder, lock_error(e, "is in use; stop the server first")))?;
    let (target, fresh) = (folder.join(DATABASE), folder.join("hearth.db.restoring"));
    let _ = fs::remove_file(&fresh); // of a restore that did not finish
    copy(&backup, &fresh)?;
    let failed = |e: std::io::Error| refused(&target, e.to_string());
    if target.exists() {
        // The log is part of the database: all of it goes into the one file that is kept.
        let old = Connection::open(&target)?;
        old.execute_batch("PRAGMA wal_checkpoint(TRUNCATE); PRAGMA journal_mode = DELETE")?;
        drop(old);
        fs::rename(&target, folder.join("hearth.db.before-restore")).map_err(failed)?;
    }
    fs::rename(&fresh, &target).map_err(failed)
}

fn copy(from: &Connection, to: &Path) -> Result<(), StoreError> {
    let mut target = Connection::open(to).map_err(|e| refused(to, e.to_string()))?;
    Backup::new(from, &mut target)?.run_to_completion(PAGES, Duration::ZERO, None)?;
    // One file, with no log beside it.
    target.execute_batch("PRAGMA journal_mode = DELETE")?;
    target.close().map_err(|(_, e)| e.into())
}
