//! Numbers on their way back to the host, or from it, while the stream goes on.
//!
//! They land in page-locked memory; a mark in the stream behind the copy says when they are there.
//! What is sent is copied there first: out of other memory the driver may send much only when the
//! stream has come as far.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, PinnedHostSlice, result, sys};

use super::memory::Buffer;
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

/// Rooms of what was sent last; the oldest first.
#[derive(Default)]
pub(super) struct Outgoing(Mutex<VecDeque<Room>>);

/// Rooms that are kept: of two passes, tokens and logits of each, and of as many tokens that are
/// chosen apart. To make one takes locks of the driver's.
const KEPT: usize = 64;
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
        Room::new(context, len)
    }
}

impl Room {
    fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        // The processor reads it, so it is not write-combined.
        // SAFETY: read only where numbers were copied to.
        let memory = unsafe {
            context.alloc_pinned_with_flags::<u32>(len.next_power_of_two().max(LEAST), 0)?
        };
        Ok(Self { memory, there: context.new_event(None)? })
    }
}

impl Outgoing {
    /// A room that nothing is sent from any more.
    fn take(&self, context: &Arc<CudaContext>, len: usize) -> Result<Room> {
        let mut rooms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |room: &Room| room.memory.len() >= len && room.there.is_complete();
        match rooms.iter().position(free).and_then(|place| rooms.remove(place)) {
            Some(room) => Ok(room),
            None => Room::new(context, len),
        }
    }

    fn give(&self, room: Room) {
        let mut rooms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.push_back(room);
        // What was sent long ago has arrived, so none that goes is waited for.
        while rooms.len() > KEPT && rooms.front().is_some_and(|room| room.there.is_complete()) {
            rooms.pop_front();
        }
    }
}

impl Gpu {
    /// Sends words in the order of the stream; nothing is waited for, however many they are.
    pub(super) fn send_words(&self, words: &[u32]) -> Result<Buffer> {
        self.of_one_pass()?;
        let buffer = self.arena.take(4 * words.len())?;
        self.context.bind_to_thread()?;
        let mut room = self.outgoing.take(&self.context, words.len())?;
        let memory = &mut room.memory.as_mut_slice()?[..words.len()];
        memory.copy_from_slice(words);
        // SAFETY: the buffer is as long, and the room is not written again before the mark behind
        // this copy.
        unsafe { result::memcpy_htod_async(buffer.at(0), memory, self.stream.cu_stream())? };
        self.mark(&room)?;
        self.outgoing.give(room);
        Ok(buffer)
    }

    /// A mark behind the copy of a room; where there is none, the copy is waited for.
    fn mark(&self, room: &Room) -> Result<()> {
        if let Err(error) = room.there.record(&self.stream) {
            self.stream.synchronize()?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Asks for numbers from the device, or for nothing but the end of what was asked for before.
    pub(super) fn fetch(&self, from: sys::CUdeviceptr, len: usize) -> Result<Parcel> {
        self.of_one_pass()?;
        let mut room = self.parcels.take(&self.context, len)?;
        self.context.bind_to_thread()?;
        if len > 0 {
            let out = &mut room.memory.as_mut_slice()?[..len];
            // SAFETY: `from` is valid for as many numbers by the callers' checks. The room is
            // neither read, nor freed, before the mark behind this copy.
            unsafe { result::memcpy_dtoh_async(out, from, self.stream.cu_stream())? };
        }
        self.mark(&room)?;
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
