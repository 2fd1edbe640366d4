//! The door of the waiting room, and who came through it.
//!
//! Everybody who came in is counted until both are done with them: the engine has no more of them,
//! and their client has read the end, or has left. So what waits, and what nobody reads, is never
//! more than there are places in the waiting room (`queue`), and nobody has to count down by hand.
//! Nobody counts of whom little is unread at the end, as of everybody whose client reads: the
//! answers to hundreds of them may end in one step.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::handle::Stats;
use super::queue::{Refused, Stage, WaitingRoom};
use crate::types::Tenant;

/// The waiting room, for those who come in and for the thread that lets them out.
#[derive(Clone, Debug)]
pub(super) struct Door {
    stats: Arc<Stats>,
    room: Arc<Mutex<WaitingRoom>>,
}

impl Door {
    pub fn new(places: usize, stats: &Arc<Stats>) -> Self {
        let room = Arc::new(Mutex::new(WaitingRoom::new(places)));
        Self { stats: Arc::clone(stats), room }
    }

    /// Lets `count` of a tenant in, all or none: how many are before them, and a seat for each.
    pub fn enter(&self, tenant: Tenant, count: usize) -> Result<(usize, Vec<Seat>), Refused> {
        let before = self.change(|room| room.enter(tenant, count))?;
        let seat = || {
            let guest = Guest { door: self.clone(), tenant, has_left: AtomicBool::new(false) };
            let guest = Arc::new(guest);
            Seat { guest, stage: Stage::Waiting }
        };
        Ok((before, std::iter::repeat_with(seat).take(count).collect()))
    }

    fn change<T>(&self, change: impl FnOnce(&mut WaitingRoom) -> T) -> T {
        let mut room = self.room();
        let changed = change(&mut room);
        self.stats.waiting.store(room.count(Stage::Waiting), Ordering::Release);
        self.stats.unread.store(room.count(Stage::Unread), Ordering::Release);
        changed
    }

    /// Counts are whole whoever panicked beside them.
    fn room(&self) -> MutexGuard<'_, WaitingRoom> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One who came in. The engine has it in a [`Seat`], the client beside what it reads.
#[derive(Debug)]
pub(super) struct Guest {
    door: Door,
    tenant: Tenant,
    has_left: AtomicBool,
}

impl Guest {
    fn leave(&self) {
        if !self.has_left.swap(true, Ordering::AcqRel) {
            self.door.change(|room| room.leave(self.tenant));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Where the engine has one: dropped when it is done with it.
#[derive(Debug)]
pub(super) struct Seat {
    guest: Arc<Guest>,
    stage: Stage,
}

impl Seat {
    /// The same one, for its client.
    pub fn guest(&self) -> Arc<Guest> {
        Arc::clone(&self.guest)
    }

    pub fn is(&self, stage: Stage) -> bool {
        self.stage == stage
    }

    /// The engine is done with it, and nobody has to wait for its client.
    pub fn leave(mut self) {
        self.set(Stage::Unread);
        self.guest.leave();
    }

    pub fn set(&mut self, stage: Stage) {
        let before = std::mem::replace(&mut self.stage, stage);
        if before != stage {
            let Guest { door, tenant, .. } = &*self.guest;
            door.change(|room| room.change(*tenant, before, stage));
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.set(Stage::Unread);
    }
}
