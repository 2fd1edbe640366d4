//! The second floor of the prefix cache: blocks of keys and values in files, which outlive their
//! place in memory and the process.
//!
//! A folder of one process (a lock says so), shared by all its models, bounded in bytes: the files
//! unused longest go first, and what only one ever used counts as half as fresh: it comes into the
//! middle of the line. A file is called after everything that its numbers follow from (`key`) and
//! says it again inside (`file`); what is not exactly what was asked for is removed and never given
//! out. Written beside its name and renamed, and flushed when its writer finds the time: a file
//! that a power cut damaged before that is found out by its sum. Only files with names of this
//! form, in folders of this form, are ever removed. A folder that cannot be written makes writing
//! pause, and is no error of anybody. It blocks; callers bring a thread. Deliberately absent: which
//! blocks are worth it.

mod file;
mod index;
mod key;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::file::Bad;
use self::index::Index;
pub use self::key::{Digest, Label, ModelKey, Name};

/// After a write that failed none is tried for this long.
const PAUSE: Duration = Duration::from_secs(30);
/// A file that lags so far behind the last use of its block is told.
const STALE: Duration = Duration::from_secs(600);
/// A file takes whole pages of a disk.
const PAGE: u64 = 4096;
/// Folder of all models; changes with the way in which files are named.
const FOLDER: &str = "hearth-kv-1";

/// Blocks in a folder.
#[derive(Debug)]
pub struct Shelf {
    folder: PathBuf,
    bytes_max: u64,
    realm: String,
    index: Mutex<Index>,
    /// Until then nothing is written.
    paused: Mutex<Option<Instant>>,
    pause: Duration,
    /// The operator knows that writing fails.
    told: AtomicBool,
    writes: AtomicU64,
    /// When it was opened, by the clock that nobody sets and as a time of files: that of the wall,
    /// or of the newest file where the clock was set back.
    opened: (Instant, u64),
    /// Held as long as the shelf is used.
    _lock: File,
}

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ShelfError {
    /// The system says no.
    #[error("{}: {error}", path.display())]
    Io {
        /// To what.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Another process has it.
    #[error("{}: another process keeps its blocks there", .0.display())]
    Taken(PathBuf),
}

/// What became of a block that was brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is there now.
    Written,
    /// It was there already.
    Known,
    /// Writing pauses, or there is no room for it but that of blocks that were used later.
    Dropped,
    /// It could not be written; writing pauses.
    Failed,
}

/// Whether a block is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is.
    Yes,
    /// It is, and its file knows nothing of its last uses.
    Stale,
    /// It is not.
    No,
}

/// Why a block does not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// It is not there, or cannot be read.
    Absent,
    /// What was there was something else, and is gone.
    Corrupt,
}

impl Shelf {
    /// Takes a folder into use, and makes it where it is not there. `realm` says whose tenants are
    /// meant.
    ///
    /// # Errors
    /// A folder that cannot be made or locked, or that another process uses.
    pub fn open(folder: &Path, bytes_max: u64, realm: String) -> Result<Self, ShelfError> {
        let io = |path: &Path, error| ShelfError::Io { path: path.to_owned(), error };
        let inner = folder.join(FOLDER);
        private_folder(&inner).map_err(|e| io(&inner, e))?;
        let path = inner.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| io(&path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ShelfError::Taken(folder.to_owned())),
            Err(TryLockError::Error(error)) => return Err(io(&path, error)),
        }
        let index = scan(&inner).map_err(|e| io(&inner, e))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let opened_us = index.newest_us().max(now.as_micros() as u64);
        let shelf = Self {
            index: Mutex::new(index),
            folder: inner,
            bytes_max,
            realm,
            paused: Mutex::default(),
            pause: PAUSE,
            told: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            opened: (Instant::now(), opened_us),
            _lock: lock,
        };
        let gone = shelf.index().make_room(0, bytes_max, u64::MAX);
        gone.iter().flatten().for_each(|name| shelf.unlink(name));
        Ok(shelf)
    }

    /// Whose tenants are meant.
    pub fn realm(&self) -> &str {
        &self.realm
    }

    /// Bytes of the files of a model, kept up to date.
    pub fn bytes_of(&self, model: ModelKey) -> Arc<AtomicU64> {
        self.index().counter(key::folder_of(model))
    }

    /// Whether a block is there, as far as is known without looking.
    pub fn has(&self, name: &Name) -> bool {
        self.index().contains(name)
    }

    /// Notes that a block is of use, to several or to one, where it is there.
    pub fn touch(&self, name: &Name, depth: usize, shared: bool) -> Found {
        let mut index = self.index();
        let used_us = self.used_us(depth, shared, index.oldest_us());
        match index.touch(name, used_us) {
            None => Found::No,
            Some(lag_us) if u128::from(lag_us) > STALE.as_micros() => Found::Stale,
            Some(_) => Found::Yes,
        }
    }

    /// Tells a file when its block was used last, so that the next process knows it.
    pub fn tell(&self, name: &Name) {
        let told_us = self.index().tell(name);
        if let Some(told_us) = told_us
            && let Ok(file) = OpenOptions::new().write(true).open(self.path(name))
        {
            // Without it, it goes earlier.
            let _ = file.set_modified(UNIX_EPOCH + Duration::from_micros(told_us));
        }
    }

    /// Writes a block, unless it is there. Others make room for it, if they were used earlier.
    pub fn put(&self, label: &Label<'_>, payload: &[u8], shared: bool) -> Put {
        let name = label.name();
        if self.touch(&name, label.depth, shared) != Found::No {
            return Put::Known;
        }
        let bytes = on_disk(file::len(label, payload.len()));
        if bytes > self.bytes_max || self.is_paused() {
            return Put::Dropped;
        }
        let (used_us, gone) = {
            let mut index = self.index();
            let used_us = self.used_us(label.depth, shared, index.oldest_us());
            (used_us, index.make_room(bytes, self.bytes_max, used_us))
        };
        let Some(gone) = gone else { return Put::Dropped };
        gone.iter().for_each(|name| self.unlink(name));
        match self.write(&name, label, payload, used_us) {
            Ok(()) => {
                self.index().insert(name, bytes, used_us);
                self.told.store(false, Ordering::Relaxed);
                Put::Written
            }
            Err(error) => {
                let until = Instant::now() + self.pause;
                *self.paused.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
                if !self.told.swap(true, Ordering::Relaxed) {
                    let (folder, seconds) = (self.folder.display(), self.pause.as_secs());
                    tracing::warn!(%folder, %error, seconds, "--kv-store: writing pauses");
                }
                Put::Failed
            }
        }
    }

    /// Reads a block of so many bytes.
    pub fn take(&self, label: &Label<'_>, payload_len: usize) -> Result<Vec<u8>, Miss> {
        let name = label.name();
        if !self.has(&name) {
            return Err(Miss::Absent);
        }
        let opened = File::open(self.path(&name));
        let read = opened.map_err(Bad::Io).and_then(|file| {
            let payload = file::read(&file, label, payload_len)?;
            // Its time is its place in the line after a restart; without it, it goes earlier.
            let used = Duration::from_micros(self.used_us(label.depth, true, None));
            let _ = file.set_modified(UNIX_EPOCH + used);
            Ok(payload)
        });
        match read {
            Ok(payload) => {
                self.touch(&name, label.depth, true);
                self.index().tell(&name);
                Ok(payload)
            }
            Err(Bad::Corrupt) => {
                self.index().remove(&name);
                self.unlink(&name);
                Err(Miss::Corrupt)
            }
            Err(Bad::Io(error)) => {
                // One that had to make room meanwhile is no news.
                if error.kind() != io::ErrorKind::NotFound {
                    let path = self.path(&name);
                    tracing::warn!(path = %path.display(), %error, "--kv-store: no block");
                }
                self.index().remove(&name);
                self.unlink(&name);
                Err(Miss::Absent)
            }
        }
    }

    fn write(
        &self,
        name: &Name,
        label: &Label<'_>,
        payload: &[u8],
        used_us: u64,
    ) -> io::Result<()> {
        let path = self.path(name);
        private_folder(path.parent().unwrap_or(&self.folder))?;
        let count = self.writes.fetch_add(1, Ordering::Relaxed);
        let beside = path.with_extension(format!("{count}.tmp"));
        let written = private_file(&beside).and_then(|file| {
            file::write(&file, label, payload)?;
            file.set_modified(UNIX_EPOCH + Duration::from_micros(used_us))?;
            fs::rename(&beside, &path)
        });
        if written.is_err() {
            let _ = fs::remove_file(&beside); // what cannot be written may not be there
        }
        written
    }

    /// Makes files that were written safe from a power cut, as far as the disk keeps its word.
    pub fn flush(&self, names: &[Name]) {
        let mut folders = BTreeSet::from([self.folder.clone()]);
        for name in names {
            let path = self.path(name);
            // What had to go meanwhile, or cannot be flushed, is found out when it is read.
            let _ = File::open(&path).and_then(|file| file.sync_data());
            folders.extend(path.parent().map(Path::to_owned));
        }
        for folder in folders {
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
    }

    /// Now, and earlier for every block before it: of one text the end goes first. By so much that
    /// it holds for blocks that are used one after the other, as a text is read. What only one ever
    /// used, half way back to the oldest.
    fn used_us(&self, depth: usize, shared: bool, oldest_us: Option<u64>) -> u64 {
        const BLOCK_US: u64 = 10_000;
        let (opened, opened_us) = self.opened;
        let now_us = opened_us.saturating_add(opened.elapsed().as_micros() as u64);
        let age_us = now_us.saturating_sub(oldest_us.unwrap_or(now_us));
        let back_us = if shared { 0 } else { age_us / 2 };
        now_us.saturating_sub(back_us).saturating_sub(BLOCK_US * depth as u64)
    }

    /// Nothing is written now.
    pub fn is_paused(&self) -> bool {
        let paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        paused.is_some_and(|until| Instant::now() < until)
    }

    fn path(&self, name: &Name) -> PathBuf {
        let model: String = name.model.iter().map(|byte| format!("{byte:02x}")).collect();
        self.folder.join(model).join(name.block.hex()).with_extension("kv")
    }

    /// What is gone already is as it should be.
    fn unlink(&self, name: &Name) {
        let _ = fs::remove_file(self.path(name));
    }

    /// The index is whole whoever panicked beside it.
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn on_disk(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE)
}

/// Texts can be read out of blocks: nobody else may.
fn private_folder(path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

fn private_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// What an earlier process left; what it had not finished is removed. Other files are not ours.
fn scan(folder: &Path) -> io::Result<Index> {
    let mut index = Index::default();
    for model in fs::read_dir(folder)? {
        let model = model?;
        let Some(key) = from_hex::<8>(&model.file_name().to_string_lossy()) else { continue };
        if !model.file_type()?.is_dir() {
            continue;
        }
        for item in fs::read_dir(model.path())? {
            let item = item?;
            let (name, meta) = (item.file_name().to_string_lossy().into_owned(), item.metadata());
            let Ok(meta) = meta else { continue };
            let Some((block, end)) = name.split_once('.') else { continue };
            let Some(block) = from_hex::<32>(block).filter(|_| meta.is_file()) else { continue };
            match end {
                "kv" => {
                    let used = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
                    let used_us = used.unwrap_or_default().as_micros() as u64;
                    let name = Name { model: key, block: Digest(block) };
                    index.insert(name, on_disk(meta.len()), used_us);
                }
                _ if end.ends_with("tmp") => drop(fs::remove_file(item.path())),
                _ => {}
            }
        }
    }
    Ok(index)
}

/// Bytes out of twice as many lower-case hexadecimal digits.
fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
    if text.len() != 2 * N || !text.bytes().all(digit) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}
