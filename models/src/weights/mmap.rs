//! The one memory map of this crate, and the only `unsafe` of the weights.
//!
//! A [`MappedFile`] is the bytes of one weight file: mapped from disk, or held in memory (a model
//! that is built into the binary, a test). Absent on purpose: writing, and growing.

#![allow(unsafe_code, reason = "a map of a file that another process may change")]

use super::error::{Error, Result};
use memmap2::Mmap;
use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The bytes of one weight file, read-only.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Map(Mmap),
    Memory(Cow<'static, [u8]>),
}

impl MappedFile {
    /// Maps the whole file. Nothing is read until it is touched.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let kind = file.metadata().map_err(|e| Error::io(path, e))?;
        if !kind.is_file() {
            return Err(Error::not_weights(path, "is not a regular file"));
        }
        if kind.len() == 0 {
            return Err(Error::not_weights(path, "the file is empty"));
        }
        // SAFETY: the map is read-only, its length is the file's, and it lives as long as `Mmap`.
        // What Rust cannot see is another process that rewrites or truncates the file while it is
        // mapped; weight files are written once and renamed into place, and every reader of these
        // bytes checks what it decodes, so a rewritten byte is a wrong number, never a wild access.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_owned(), backing: Backing::Map(map) })
    }

    /// Bytes that are already in memory; `name` stands for the path in error messages.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Self {
        Self { path: PathBuf::from(name), backing: Backing::Memory(bytes.into()) }
    }

    /// Where the bytes come from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        match &self.backing {
            Backing::Map(map) => map,
            Backing::Memory(bytes) => bytes,
        }
    }

    /// Says that the file will be read from front to back, once. Advice only: never fails.
    pub fn will_read_in_order(&self) {
        #[cfg(unix)]
        if let Backing::Map(map) = &self.backing {
            let _ = map.advise(memmap2::Advice::Sequential);
        }
    }

    /// Starts reading `range` ahead of its use. Advice only: never fails.
    pub fn will_need(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let (Backing::Map(map), Some(range)) = (&self.backing, self.inside(range)) {
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Gives the pages of a consumed range back to the system, so that a packed copy of a tensor
    /// does not live beside its source. Reading the range again is allowed and reads the file again
    /// (so does a neighbour that shares the first or the last page).
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let (Backing::Map(map), Some(range)) = (&self.backing, self.inside(range)) {
            use memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: DONTNEED is unsound where it replaces data that a reference still sees. This
            // is a read-only map of a file, so the next access finds the file's own bytes again.
            let _ = unsafe { map.unchecked_advise_range(DontNeed, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// The range, if it is not empty and lies in the file.
    #[cfg(unix)]
    fn inside(&self, range: Range<usize>) -> Option<Range<usize>> {
        (range.start < range.end && range.end <= self.bytes().len()).then_some(range)
    }
}
