//! One slice, written by many tasks.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice of which the tasks of a run each take their own part.
pub(crate) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    lent: PhantomData<&'a mut [T]>,
}

// SAFETY: `take` hands out disjoint mutable parts (its contract), which may go to any thread if T
// may.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Parts { start: slice.as_mut_ptr(), len: slice.len(), lent: PhantomData }
    }

    /// Where the slice begins.
    pub(crate) fn as_ptr(&self) -> *const T {
        self.start
    }

    /// The part `range`.
    ///
    /// # Safety
    /// Parts that are alive at the same time do not overlap.
    ///
    /// # Panics
    /// When the range is not inside the slice.
    #[allow(clippy::mut_from_ref, reason = "disjoint parts, as the contract says")]
    pub(crate) unsafe fn take(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part outside the slice");
        // SAFETY: inside the slice that was lent for 'a; the caller keeps parts apart.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
