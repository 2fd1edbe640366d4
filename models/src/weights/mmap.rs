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

/// Largest run of pages that the system keeps, and maps, as one: a fault on one byte may make all
/// of it resident.
#[cfg(unix)]
const FOLIO: usize = 2 << 20;

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
    /// does not live beside its source, and with them what the system mapped around them. Reading
    /// the range or its neighbours again is allowed and finds the file again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let (Backing::Map(map), Some(range)) = (&self.backing, self.inside(range)) {
            use memmap2::UncheckedAdvice::DontNeed;
            let end = range.end.next_multiple_of(FOLIO).min(map.len());
            let start = range.start / FOLIO * FOLIO;
            // SAFETY: DONTNEED is unsound where it replaces data that a reference still sees. This
            // is a read-only map of a file, so the next access finds the file's own bytes again.
            let _ = unsafe { map.unchecked_advise_range(DontNeed, start, end - start) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// [`MappedFile::release`] of a slice of [`MappedFile::bytes`].
    pub fn release_slice(&self, slice: &[u8]) {
        let start = slice.as_ptr().addr().wrapping_sub(self.bytes().as_ptr().addr());
        self.release(start..start.saturating_add(slice.len()));
    }

    /// The range, if it is not empty and lies in the file.
    #[cfg(unix)]
    fn inside(&self, range: Range<usize>) -> Option<Range<usize>> {
        (range.start < range.end && range.end <= self.bytes().len()).then_some(range)
    }
}
