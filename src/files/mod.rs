//! Files that clients upload: metadata in the store, contents beside it.
//!
//! [`Blobs`] owns the contents: written to a temporary name, flushed, renamed, and only then spoken
//! of in the database, so a file that is listed is whole. What is deleted leaves the database
//! first; a crash in between leaves contents that nobody names, which [`Files::gc`] clears away.
//! [`uploads`] puts large files together from parts. Everything here blocks on the disk.
//! Deliberately absent: HTTP, and what is in a file.

mod blobs;
mod md5;
mod uploads;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

pub use blobs::{Blobs, Writing, too_large};
pub use uploads::{NewUpload, PART_BYTES_MAX, UPLOAD_BYTES_MAX};

use crate::error::Error;
use crate::store::{Document, Kind, Match, Store, Tx};
pub use crate::store::{Listing, Page};
use crate::types::{ProjectId, unix_now_s};

/// What a client may say that a file is for.
pub const PURPOSES: [&str; 6] =
    ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"];
/// Bytes of one file that comes in one piece.
pub const FILE_BYTES_MAX: u64 = 512 << 20;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    /// Bytes of the files of one project together.
    pub project_bytes_max: u64,
}

/// A file to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// As the client calls it.
    pub filename: String,
    /// What it is for.
    pub purpose: String,
    /// Seconds that it lives; `None` is for ever.
    pub lifetime_s: Option<u64>,
}

/// All files of one data directory.
pub struct Files {
    store: Arc<Store>,
    blobs: Blobs,
    quota: Quota,
}

fn not_found(id: &str) -> Error {
    Error::NotFound { what: "file", id: id.to_owned() }
}

impl Files {
    /// Over an open store, with contents in its folder, or in a temporary one where it has none.
    /// What a killed process left unfinished there is removed.
    pub fn open(store: Arc<Store>, quota: Quota) -> Result<Self, Error> {
        let blobs = Blobs::open(store.folder())?;
        if store.was_alone() {
            blobs.clear_unfinished()?;
        }
        Ok(Self { store, blobs, quota })
    }

    /// Begins to write contents of at most so many bytes.
    pub fn write(&self, bytes_max: u64) -> Result<Writing, Error> {
        self.blobs.begin(bytes_max)
    }

    /// Keeps what was written as a file with this id. Returns the `file` object.
    ///
    /// # Errors
    /// The project has no room left.
    pub fn keep(
        &self,
        project: ProjectId,
        id: &str,
        new: &NewFile,
        content: Writing,
    ) -> Result<Value, Error> {
        // Asked twice: before the contents get their name, and when nobody else can take the room.
        let bytes = content.bytes();
        self.store.read(|tx| self.check_room(tx, project, bytes))?;
        self.keep_with(vec![document(id, new, content)?], |tx, files| {
            self.check_room(tx, project, bytes)?;
            files.iter().try_for_each(|file| tx.insert(project, Kind::File, file))?;
            Ok(files[0].body.clone())
        })
    }

    /// Keeps what was made for a project, in a transaction that does something else besides. A file
    /// that is there under the same id is one that a killed process did not come to speak of, and
    /// is overwritten. The quota is not asked: what was worked for is not thrown away, but counts.
    pub fn keep_made<T>(
        &self,
        project: ProjectId,
        made: Vec<(String, NewFile, Writing)>,
        besides: impl FnOnce(&Tx<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let named = made.into_iter().map(|(id, new, content)| document(&id, &new, content));
        self.keep_with(named.collect::<Result<_, _>>()?, |tx, files| {
            files.iter().try_for_each(|file| tx.insert(project, Kind::File, file))?;
            besides(tx)
        })
    }

    /// Contents that have their name, spoken of in a transaction, or removed.
    fn keep_with<T>(
        &self,
        files: Vec<Document>,
        keep: impl FnOnce(&Tx<'_>, &[Document]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let kept = self.store.write(|tx| keep(tx, &files));
        kept.inspect_err(|_| files.iter().for_each(|file| self.blobs.remove(&file.id)))
    }

    /// Whether a project may have anything more.
    ///
    /// # Errors
    /// Its quota is used up.
    pub fn check_quota(&self, project: ProjectId) -> Result<(), Error> {
        self.store.read(|tx| self.check_room(tx, project, 1))
    }

    /// A `file` object.
    pub fn get(&self, project: ProjectId, id: &str) -> Result<Value, Error> {
        let found = self.store.read(|tx| tx.get(project, Kind::File, "", id))?;
        found.map(|document| document.body).ok_or_else(|| not_found(id))
    }

    /// A file's object, and its contents from the beginning.
    pub fn content(&self, project: ProjectId, id: &str) -> Result<(Value, File), Error> {
        let object = self.get(project, id)?;
        Ok((object, self.blobs.read(id)?))
    }

    /// Those of one purpose, or all.
    pub fn list(
        &self,
        project: ProjectId,
        purpose: Option<&str>,
        page: &Page,
    ) -> Result<Listing, Error> {
        let is = |value: &str| Match { path: "$", key: "purpose".into(), value: value.into() };
        let matches: Vec<_> = purpose.map(is).into_iter().collect();
        Ok(self.store.list(project, Kind::File, &matches, page)?)
    }

    /// Forgets a file and its contents.
    pub fn delete(&self, project: ProjectId, id: &str) -> Result<(), Error> {
        if !self.store.write(|tx| tx.delete(project, Kind::File, "", id))? {
            return Err(not_found(id));
        }
        self.blobs.remove(id);
        Ok(())
    }

    /// Removes at most so many objects that have expired, of whatever kind, and their contents.
    /// Returns how many objects that were.
    pub fn sweep(&self, most: usize) -> Result<usize, Error> {
        let swept = self.store.sweep(most)?;
        swept.contents.iter().for_each(|id| self.blobs.remove(id));
        Ok(swept.documents)
    }

    /// Removes contents that no object names. Returns how many bytes that were.
    pub fn gc(&self) -> Result<u64, Error> {
        let mut freed = 0;
        for (id, bytes) in self.blobs.old()? {
            let named = |kind| self.store.read(|tx| tx.exists(kind, &id));
            if !named(Kind::File)? && !named(Kind::UploadPart)? {
                self.blobs.remove(&id);
                freed += bytes;
            }
        }
        Ok(freed)
    }

    /// Copies the contents of all files into the folder of a backup, whose database is there
    /// already: what it names is copied, and only what is deleted meanwhile may be missing.
    pub fn copy_to(&self, backup: &Path) -> Result<(), Error> {
        self.blobs.copy_to(&backup.join(blobs::FOLDER))
    }

    fn check_room(&self, tx: &Tx<'_>, project: ProjectId, more: u64) -> Result<(), Error> {
        let max = self.quota.project_bytes_max;
        let kinds = [Kind::File, Kind::UploadPart];
        let used = kinds.iter().map(|&kind| tx.sum(project, kind, "$.bytes"));
        let used = used.sum::<Result<u64, _>>()?;
        if used.saturating_add(more) <= max {
            return Ok(());
        }
        let message = format!(
            "There is no room for this file: the project's files have {used} of {max} bytes, and \
             it has {more}. Delete some first."
        );
        Err(Error::TooLarge { code: "storage_quota_exceeded", message })
    }
}

/// Brings the contents of a backup into a data directory. They have names of their own, so nothing
/// that is there is overwritten by anything else.
pub fn restore(backup: &Path, data_dir: &Path) -> Result<(), Error> {
    let from = backup.join(blobs::FOLDER);
    if !from.is_dir() {
        return Ok(());
    }
    Blobs::open(Some(backup))?.copy_to(&data_dir.join(blobs::FOLDER))
}

/// The document of a file whose contents now get their name.
fn document(id: &str, new: &NewFile, content: Writing) -> Result<Document, Error> {
    let created_s = unix_now_s();
    let expires_s = new.lifetime_s.map(|lifetime_s| created_s + lifetime_s);
    let (bytes, sha256) = content.finish(id)?;
    let mut body = json!({
        "id": id,
        "object": "file",
        "bytes": bytes,
        "created_at": created_s,
        "filename": new.filename,
        "purpose": new.purpose,
        "status": "processed",
        "status_details": null,
        // Not OpenAI's: what came is what was sent.
        "sha256": sha256,
    });
    if let Some(expires_s) = expires_s {
        body["expires_at"] = expires_s.into();
    }
    Ok(Document { id: id.to_owned(), parent: String::new(), created_s, expires_s, body })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
