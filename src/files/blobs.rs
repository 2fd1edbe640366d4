//! Contents on the disk: one file each, named after the object that owns it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use ring::digest::{Context, SHA256};

use crate::error::Error;

/// Younger contents may belong to an object that is being written.
const OLD: Duration = Duration::from_secs(3600);
/// Name of the folder inside a data directory.
pub(super) const FOLDER: &str = "files";
/// Temporary names begin so.
const UNFINISHED: &str = "unfinished-";

/// A folder of contents.
#[derive(Debug)]
pub struct Blobs {
    folder: Arc<Folder>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// It is gone with the process.
    temporary: bool,
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.temporary {
            // Nothing can be done about what cannot be removed.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn failed(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::StorageFull("the disk is full".to_owned())
        }
        _ => Error::Internal(format!("the contents of a file cannot be kept: {error}")),
    }
}

/// A new folder that only this user may enter. One that is there already is somebody else's, or was
/// left behind by a process that was killed: neither is used.
fn temporary() -> io::Result<PathBuf> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let mut folder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut folder, 0o700);
    loop {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!("hearth-{}-{serial}", std::process::id());
        let path = std::env::temp_dir().join(name);
        match folder.create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            done => return done.map(|()| path),
        }
    }
}

impl Blobs {
    /// `files` inside a data directory; without one, a folder that is gone with the process.
    pub(super) fn open(data_dir: Option<&Path>) -> Result<Self, Error> {
        let (path, temporary) = match data_dir {
            Some(folder) => {
                let path = folder.join(FOLDER);
                fs::create_dir_all(&path).map_err(|e| failed(&e))?;
                (path, false)
            }
            None => (temporary().map_err(|e| failed(&e))?, true),
        };
        Ok(Self { folder: Arc::new(Folder { path, temporary }), next: AtomicU64::new(0) })
    }

    /// Removes what nobody will finish, where no other process is at work.
    pub(super) fn clear_unfinished(&self) -> Result<(), Error> {
        for entry in fs::read_dir(&self.folder.path).map_err(|e| failed(&e))? {
            let name = entry.map_err(|e| failed(&e))?.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(UNFINISHED) {
                self.remove(&name);
            }
        }
        Ok(())
    }

    /// Begins contents of at most so many bytes.
    pub(super) fn begin(&self, bytes_max: u64) -> Result<Writing, Error> {
        let serial = self.next.fetch_add(1, Ordering::Relaxed);
        // Of two processes on one folder, each has its own.
        let name = format!("{UNFINISHED}{}-{serial}", std::process::id());
        let path = self.folder.path.join(name);
        let file = File::create(&path).map_err(|e| failed(&e))?;
        let folder = Arc::clone(&self.folder);
        let sha256 = Context::new(&SHA256);
        Ok(Writing { folder, path, file, sha256, bytes: 0, bytes_max })
    }

    /// Where they lie.
    #[cfg(test)]
    pub(super) fn folder(&self) -> &Path {
        &self.folder.path
    }

    pub(super) fn read(&self, id: &str) -> Result<File, Error> {
        File::open(self.folder.path.join(id)).map_err(|e| failed(&e))
    }

    /// What cannot be removed now is collected later.
    pub(super) fn remove(&self, id: &str) {
        if let Err(error) = fs::remove_file(self.folder.path.join(id)) {
            tracing::warn!(%error, id, "the contents of a deleted file are still there");
        }
    }

    /// Copies all contents that have their name into another folder.
    pub(super) fn copy_to(&self, folder: &Path) -> Result<(), Error> {
        let copy = || -> io::Result<()> {
            fs::create_dir_all(folder)?;
            for entry in fs::read_dir(&self.folder.path)? {
                let entry = entry?;
                let name = entry.file_name();
                if name.to_string_lossy().starts_with(UNFINISHED) {
                    continue;
                }
                match fs::copy(entry.path(), folder.join(&name)) {
                    // It was deleted meanwhile.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    done => drop(done?),
                }
            }
            Ok(())
        };
        copy().map_err(|e| failed(&e))
    }

    /// Names and bytes of contents that are not being written right now.
    pub(super) fn old(&self) -> Result<Vec<(String, u64)>, Error> {
        let mut old = Vec::new();
        for entry in fs::read_dir(&self.folder.path).map_err(|e| failed(&e))? {
            let entry = entry.map_err(|e| failed(&e))?;
            let meta = entry.metadata().map_err(|e| failed(&e))?;
            let modified = meta.modified().unwrap_or(SystemTime::now());
            let age = modified.elapsed().unwrap_or_default();
            if meta.is_file() && age > OLD {
                old.push((entry.file_name().to_string_lossy().into_owned(), meta.len()));
            }
        }
        Ok(old)
    }
}

/// More than one file may have.
pub fn too_large(bytes_max: u64) -> Error {
    let message = format!("The file is larger than the limit of {bytes_max} bytes.");
    Error::TooLarge { code: "file_too_large", message }
}

/// Contents on their way to the disk; gone if they never get there.
pub struct Writing {
    folder: Arc<Folder>,
    path: PathBuf,
    file: File,
    sha256: Context,
    bytes: u64,
    bytes_max: u64,
}

impl Writing {
    /// More of it.
    ///
    /// # Errors
    /// It is too large, or the disk is full.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), Error> {
        self.bytes += piece.len() as u64;
        if self.bytes > self.bytes_max {
            return Err(too_large(self.bytes_max));
        }
        self.sha256.update(piece);
        self.file.write_all(piece).map_err(|e| failed(&e))
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Flushes it and gives it its name. Returns its length in bytes and its SHA-256.
    pub(super) fn finish(self, id: &str) -> Result<(u64, String), Error> {
        let keep = || {
            self.file.sync_all()?;
            fs::rename(&self.path, self.folder.path.join(id))?;
            // The name is part of the folder.
            #[cfg(unix)]
            File::open(&self.folder.path)?.sync_all()?;
            io::Result::Ok(())
        };
        keep().map_err(|e| failed(&e))?;
        let digest = self.sha256.clone().finish();
        let hex = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok((self.bytes, hex))
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        // It is not there any more when it has its name.
        let _ = fs::remove_file(&self.path);
    }
}
