//! Device memory: what is allocated once, and the arena that rows go round in.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, result, sys};

use super::Result;

/// Bytes on the device. Freed, or given back to its arena, when dropped.
pub struct Buffer {
    pointer: sys::CUdeviceptr,
    bytes: usize,
    home: Home,
}

enum Home {
    Driver(Arc<CudaContext>),
    Arena(Arc<Arena>),
    /// Somebody else's, who outlives it.
    Nowhere,
}

impl Buffer {
    /// Memory of its own, with whatever was in it before.
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        context.bind_to_thread()?;
        let bytes = bytes.max(16);
        // SAFETY: a plain allocation; every element is written before it is read (by contract of
        // the callers in this folder), and `drop` frees it once.
        let pointer = unsafe { result::malloc_sync(bytes) }?;
        Ok(Self { pointer, bytes, home: Home::Driver(Arc::clone(context)) })
    }

    /// The same bytes; whoever holds the first one keeps them.
    pub(super) fn alias(&self) -> Self {
        Self { pointer: self.pointer, bytes: self.bytes, home: Home::Nowhere }
    }

    /// The bytes from some place on; whoever holds the first one keeps them.
    pub(super) fn part(&self, byte: usize) -> Self {
        Self { pointer: self.at(byte), bytes: self.bytes - byte, home: Home::Nowhere }
    }

    /// So many bytes into it.
    pub(super) fn at(&self, byte: usize) -> sys::CUdeviceptr {
        debug_assert!(byte <= self.bytes);
        self.pointer + byte as sys::CUdeviceptr
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.home {
            Home::Nowhere => {}
            Home::Arena(arena) => arena.give(self.pointer, self.bytes),
            Home::Driver(context) => {
                context.record_err(context.bind_to_thread());
                // SAFETY: allocated by `new`, freed once. The driver waits for what still uses it.
                context.record_err(unsafe { result::free_sync(self.pointer) });
            }
        }
    }
}

/// Buffers between two uses, by size. One stream orders all uses, so a buffer may be given back
/// while the kernel that reads it has not begun.
pub(super) struct Arena {
    context: Arc<CudaContext>,
    free: Mutex<BTreeMap<usize, Vec<sys::CUdeviceptr>>>,
}

impl Arena {
    pub fn new(context: &Arc<CudaContext>) -> Arc<Self> {
        Arc::new(Self { context: Arc::clone(context), free: Mutex::default() })
    }

    /// A buffer of at least so many bytes. Sizes are rounded up to one of eight for each power of
    /// two, so that passes of similar shapes use the same ones.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let bytes = rounded(bytes);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let pointer = match free.get_mut(&bytes).and_then(Vec::pop) {
            Some(pointer) => pointer,
            None => {
                self.context.bind_to_thread()?;
                // SAFETY: as in `Buffer::new`; freed when the arena is dropped.
                unsafe { result::malloc_sync(bytes) }?
            }
        };
        Ok(Buffer { pointer, bytes, home: Home::Arena(Arc::clone(self)) })
    }

    fn give(&self, pointer: sys::CUdeviceptr, bytes: usize) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.entry(bytes).or_default().push(pointer);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        let free = self.free.get_mut().unwrap_or_else(PoisonError::into_inner);
        for pointer in free.values().flatten() {
            // SAFETY: allocated by `take`; a buffer that is in use keeps the arena alive.
            self.context.record_err(unsafe { result::free_sync(*pointer) });
        }
    }
}

fn rounded(bytes: usize) -> usize {
    let bytes = bytes.max(1024);
    let step = (bytes.next_power_of_two() / 16).max(256);
    bytes.next_multiple_of(step)
}

#[cfg(test)]
mod tests {
    use super::rounded;

    #[test]
    fn sizes_waste_an_eighth_at_most() {
        for bytes in [1025usize, 4096, 4097, 100_000, 1 << 20, (1 << 20) + 1, 123_456_789] {
            let got = rounded(bytes);
            assert!(got >= bytes && got - bytes <= bytes / 8 + 256, "{bytes}: {got}");
            assert_eq!(rounded(got), got);
        }
    }
}
