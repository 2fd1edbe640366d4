//! Numbers on their way back to the host, while the stream goes on.
//!
//! They land in page-locked memory; a mark in the stream behind the copy says when they are there.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, PinnedHostSlice, result, sys};

use super::{Gpu, Result, Rows};

/// Numbers of 4 bytes that were asked for.
pub struct Parcel {
    /// Always there before it is dropped.
    room: Option<Room>,
    len: usize,
    home: Arc<Parcels>,
}

struct Room {
    memory: PinnedHostSlice<u32>,
    there: CudaEvent,
}

/// Rooms between two uses. One stream orders all copies into them.
#[derive(Default)]
pub(super) struct Parcels(Mutex<Vec<Room>>);

/// Rooms that are kept: of two passes, tokens and logits of each.
const KEPT: usize = 4;
/// Numbers of the smallest room.
const LEAST: usize = 1024;

impl Parcel {
    /// Waits for the numbers, and for nothing that was asked for after them.
    pub fn open<T: bytemuck::AnyBitPattern>(self) -> Result<Vec<T>> {
        let room = self.room.as_ref().expect("taken when it is dropped; this is a bug");
        room.there.synchronize()?;
        Ok(bytemuck::cast_slice(&room.memory.as_slice()?[..self.len]).to_vec())
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        let mut rooms = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.extend(self.room.take());
        rooms.sort_by_key(|room| room.memory.len());
        let too_many = rooms.len().saturating_sub(KEPT);
        rooms.drain(..too_many);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // Nothing may land in it afterwards.
        self.memory.context().record_err(self.there.synchronize());
    }
}

impl Parcels {
    fn take(&self, context: &Arc<CudaContext>, len: usize) -> Result<Room> {
        let mut rooms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = rooms.iter().position(|room| room.memory.len() >= len) {
            return Ok(rooms.remove(place));
        }
        // The processor reads it, so it is not write-combined.
        // SAFETY: read only where numbers were copied to.
        let memory = unsafe {
            context.alloc_pinned_with_flags::<u32>(len.next_power_of_two().max(LEAST), 0)?
        };
        Ok(Room { memory, there: context.new_event(None)? })
    }
}

impl Gpu {
    /// Asks for numbers from the device, or for nothing but the end of what was asked for before.
    pub(super) fn fetch(&self, from: sys::CUdeviceptr, len: usize) -> Result<Parcel> {
        let mut room = self.parcels.take(&self.context, len)?;
        self.context.bind_to_thread()?;
        if len > 0 {
            let out = &mut room.memory.as_mut_slice()?[..len];
            // SAFETY: `from` is valid for as many numbers by the callers' checks. The room is
            // neither read, nor freed, before the mark behind this copy.
            unsafe { result::memcpy_dtoh_async(out, from, self.stream.cu_stream())? };
        }
        room.there.record(&self.stream)?;
        Ok(Parcel { room: Some(room), len, home: Arc::clone(&self.parcels) })
    }

    /// Asks for the numbers of some rows. `[count * width]`, as `f32`
    pub fn fetch_rows(&self, x: Rows) -> Result<Parcel> {
        let x = self.convert(x, super::Float::F32)?;
        self.fetch(x.buffer.at(0), x.len())
    }

    /// What is there when all is done that was asked for so far.
    pub fn fetch_nothing(&self) -> Result<Parcel> {
        self.fetch(0, 0)
    }
}
