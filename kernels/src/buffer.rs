//! Large zeroed memory in huge pages.
//!
//! A matrix read once per token is bound by memory bandwidth, and pages of 4 KiB halve the
//! bandwidth on the machine measured. [`HugeBuf`] asks for pages of 2 MiB: it starts on a 2 MiB
//! boundary and carries `MADV_HUGEPAGE`. Its last part, less than 2 MiB, stays in small pages, so a
//! buffer costs no more memory than it holds, but for a staggered one: the first huge page of that
//! comes with what lies before its beginning, 1 MiB on average.
//!
//! Deliberately absent: growth, and any guarantee that the system grants huge pages.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::hint::black_box;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Pod;

/// Alignment of every buffer, in bytes: a cache line, and the widest vector.
const ALIGN: usize = 64;
/// Size of a huge page.
const HUGE: usize = 2 << 20;
/// Steps in which buffers are staggered: units of keys and values do not straddle more pages so. No
/// page of a system is smaller.
const PAGE: usize = 4 << 10;
/// Smaller buffers come from the allocator, which may keep what is given back; others are mappings
/// of their own, so a model that leaves gives all its memory back.
const MAPPED: usize = 256 << 10;

/// A fixed number of elements, zero at first, aligned to 64 bytes (2 MiB from 256 KiB on, but for a
/// staggered one).
///
/// Memory is not touched before its first use, so the threads that fill it also fault it in.
pub struct HugeBuf<T: Pod> {
    start: NonNull<T>,
    len: usize,
    /// Bytes of the mapping before the first element.
    lead: usize,
    owned: PhantomData<T>,
}

// SAFETY: a HugeBuf owns its memory as a Vec does, and T: Pod is plain data.
unsafe impl<T: Pod + Send> Send for HugeBuf<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Pod + Sync> Sync for HugeBuf<T> {}

impl<T: Pod> HugeBuf<T> {
    /// `len` zeros. Running out of memory ends the process, as it does for a `Vec`.
    pub fn zeroed(len: usize) -> HugeBuf<T> {
        HugeBuf::staggered(len, 0, 1)
    }

    /// The same for one of `of` buffers that are filled side by side, a little of each at a time:
    /// they begin in different places of their first huge pages, so that they do not all need their
    /// next one, 2 MiB of zeroes, at the same moment. Buffers smaller than a huge page begin at
    /// their beginning.
    pub fn staggered(len: usize, index: usize, of: usize) -> HugeBuf<T> {
        assert!(align_of::<T>() <= ALIGN && size_of::<T>() > 0, "an element of this shape");
        assert!(index < of, "one of them");
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer larger than memory");
        let mapped = cfg!(target_os = "linux") && bytes >= MAPPED;
        let lead = lead(bytes, index, of);
        let start = if bytes == 0 {
            NonNull::<Aligned>::dangling().cast()
        } else if mapped {
            let all = bytes.checked_add(lead).expect("a buffer larger than memory");
            // SAFETY: the mapping has `lead` bytes and more.
            unsafe { map(all).byte_add(lead).cast() }
        } else {
            let layout = layout(bytes);
            // SAFETY: the layout is not empty.
            let start = unsafe { alloc_zeroed(layout) };
            NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)).cast()
        };
        HugeBuf { start, len, lead, owned: PhantomData }
    }
}

impl HugeBuf<u8> {
    /// Has the system provide memory from byte `from` on, to `until` and a little beyond at most,
    /// of one huge page; where that ends. What is stored stays.
    pub fn provide(&mut self, from: usize, until: usize) -> usize {
        let page_end = (self.lead + from + 1).next_multiple_of(HUGE) - self.lead;
        let end = until.min(page_end).next_multiple_of(PAGE).min(self.len);
        // Written, for what is only read may be one page of zeroes that many share.
        self[from..end].iter_mut().step_by(PAGE).for_each(|byte| *byte = black_box(*byte));
        end
    }
}

/// Bytes before the beginning of a [`HugeBuf::staggered`] of so many bytes: its first huge page
/// has them too.
pub fn lead(bytes: usize, index: usize, of: usize) -> usize {
    let mapped = cfg!(target_os = "linux") && bytes >= HUGE;
    if mapped { HUGE * index / of / PAGE * PAGE } else { 0 }
}

impl<T: Pod> Drop for HugeBuf<T> {
    fn drop(&mut self) {
        let bytes = self.len * size_of::<T>();
        if bytes == 0 {
        } else if cfg!(target_os = "linux") && bytes >= MAPPED {
            // SAFETY: `staggered` mapped so many bytes before the first element.
            unmap(unsafe { self.start.byte_sub(self.lead).cast() }, bytes + self.lead);
        } else {
            // SAFETY: `staggered` allocated this address with this layout.
            unsafe { dealloc(self.start.as_ptr().cast(), layout(bytes)) };
        }
    }
}

impl<T: Pod> Deref for HugeBuf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements from `start` are ours: zeros, or a T written over them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for HugeBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> std::fmt::Debug for HugeBuf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HugeBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

#[repr(align(64))]
struct Aligned;

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGN).expect("a buffer larger than memory")
}

#[cfg(target_os = "linux")]
fn map(bytes: usize) -> NonNull<u8> {
    let wanted = bytes.next_multiple_of(page());
    let reserved = wanted.checked_add(HUGE).expect("a buffer larger than memory");
    let (access, kind) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping at an address that the system chooses.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), reserved, access, kind, -1, 0) };
    if mapped == libc::MAP_FAILED {
        handle_alloc_error(layout(bytes));
    }
    let before = mapped.align_offset(HUGE);
    // SAFETY: the mapping has `wanted + HUGE` bytes and `before < HUGE`, so the kept part and the
    // two parts given back lie in it; all three start and end on pages. A failed madvise or munmap
    // costs speed or address space only.
    unsafe {
        let start = mapped.byte_add(before);
        if before > 0 {
            libc::munmap(mapped, before);
        }
        libc::munmap(start.byte_add(wanted), HUGE - before);
        libc::madvise(start, wanted, libc::MADV_HUGEPAGE);
        NonNull::new_unchecked(start.cast())
    }
}

#[cfg(target_os = "linux")]
fn unmap(start: NonNull<u8>, bytes: usize) {
    // SAFETY: `map` made this mapping, of this many whole pages.
    unsafe { libc::munmap(start.as_ptr().cast(), bytes.next_multiple_of(page())) };
}

#[cfg(target_os = "linux")]
fn page() -> usize {
    // SAFETY: asks for a number.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(not(target_os = "linux"))]
fn map(_bytes: usize) -> NonNull<u8> {
    unreachable!("only Linux maps; this is a bug")
}

#[cfg(not(target_os = "linux"))]
fn unmap(_start: NonNull<u8>, _bytes: usize) {
    unreachable!("only Linux maps; this is a bug")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staggered_buffers_begin_apart_and_are_as_others() {
        let begins = |len: usize, of: usize| -> Vec<usize> {
            let offset = |b: HugeBuf<u8>| b.as_ptr().addr() % HUGE;
            (0..of).map(|i| offset(HugeBuf::staggered(len, i, of))).collect()
        };
        if cfg!(target_os = "linux") {
            assert_eq!(begins(HUGE, 4), [0, HUGE / 4, HUGE / 2, 3 * HUGE / 4]);
            assert_eq!(begins(MAPPED, 3), [0, 0, 0], "too small");
        }
        for (len, of) in [(HUGE, 4), (HUGE + 1, 7), (HUGE - 1, 2), (MAPPED, 3)] {
            let leads: Vec<usize> = (0..of).map(|i| lead(len, i, of)).collect();
            assert!(cfg!(not(target_os = "linux")) || leads == begins(len, of), "{len} {leads:?}");
        }
        let mut buffer = HugeBuf::<u32>::staggered(HUGE, 2, 3);
        assert!(buffer.len() == HUGE && buffer.iter().all(|&x| x == 0));
        buffer.fill(7);
        assert_eq!(buffer.as_ptr().align_offset(ALIGN), 0);
    }

    #[test]
    fn buffers_are_zero_aligned_and_writable_to_the_end() {
        let edge = MAPPED / 4;
        let lengths = [0, 1, 63, edge - 1, edge, HUGE / 4, HUGE / 4 + 1, HUGE / 2 + 1025, HUGE];
        for len in lengths {
            let mut buffer = HugeBuf::<u32>::zeroed(len);
            let align = if len * 4 >= MAPPED && cfg!(target_os = "linux") { HUGE } else { ALIGN };
            assert_eq!(buffer.as_ptr().align_offset(align), 0, "{len}");
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&x| x == 0), "{len}");
            buffer.fill(7);
            assert!(buffer.iter().all(|&x| x == 7), "{len}");
        }
    }
}
