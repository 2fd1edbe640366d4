//! A position in untrusted bytes: every read is checked against what is left.

use super::error::{Error, Result};
use std::path::Path;

/// Reads little-endian values one after the other; a short file is an error that names the offset.
#[derive(Clone, Copy)]
pub(super) struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        Self { path, bytes, at: 0 }
    }

    /// A cursor over the same file, at another offset (which may lie beyond the end).
    pub(super) fn at(path: &'a Path, bytes: &'a [u8], at: usize) -> Self {
        Self { path, bytes, at }
    }

    /// The offset of the next read, in bytes from the start of the file.
    pub(super) fn offset(&self) -> usize {
        self.at
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    /// An error at the offset `at`.
    pub(super) fn error_at(&self, at: usize, reason: impl Into<String>) -> Error {
        Error::corrupt(self.path, at, reason)
    }

    /// The next `len` bytes.
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            let (left, found) = (self.remaining(), self.bytes.len());
            let needed = self.at.saturating_add(len);
            let reason = format!(
                "{len} bytes are expected here and the file has {left} left: it has {found} bytes, \
                 and {needed} or more are needed; fetch it again"
            );
            return Err(self.error_at(self.at, reason));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let taken = self.take(N)?;
        Ok(taken.try_into().expect("take(N) returns N bytes; anything else is a bug"))
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of items that take at least `item_bytes_min` bytes each: refused when the rest of
    /// the file cannot hold them, so that a count never decides how much memory is asked for.
    pub(super) fn count(&mut self, what: &str, item_bytes_min: usize) -> Result<usize> {
        let at = self.at;
        let count = self.u64()?;
        let fits = usize::try_from(count)
            .ok()
            .filter(|&n| n.checked_mul(item_bytes_min).is_some_and(|len| len <= self.remaining()));
        fits.ok_or_else(|| {
            let (left, found) = (self.remaining(), self.bytes.len());
            let reason = format!(
                "{count} {what} cannot fit in the {left} bytes that follow: the file is damaged, \
                 or was cut short at {found} bytes; fetch it again"
            );
            self.error_at(at, reason)
        })
    }

    /// A length-prefixed string, not yet checked to be UTF-8.
    pub(super) fn string(&mut self) -> Result<&'a [u8]> {
        let len = self.count("bytes of text", 1)?;
        self.take(len)
    }
}
