//! The door of the waiting room, and who came through it.
//!
//! Everybody who came in is counted until both are done with them: the engine has no more of them,
//! and their client has read the end, or has left. So what waits, and what nobody reads, is never
//! more than there are places in the waiting room (`queue`), and nobody has to count down by hand.
//! Nobody counts of whom little is unread at the end, as of everybody whose client reads: the
//! answers to hundreds of them may end in one step.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::handle::Stats;
use super::queue::{Refused, Stage, WaitingRoom};
use crate::scheduler::{Newcomer, Outlook};
use crate::types::{SeqId, Tenant};

/// The waiting room, for those who come in and for the thread that lets them out.
#[derive(Clone, Debug)]
pub(super) struct Door {
    stats: Arc<Stats>,
    room: Arc<Mutex<WaitingRoom>>,
    view: Arc<Mutex<View>>,
    /// From here on the scheduler counts time.
    started: Instant,
}

/// What those who come in have before them.
#[derive(Debug)]
struct View {
    outlook: Outlook,
    /// Those in it of whom the engine did not know when it made it.
    fresh: BTreeMap<SeqId, Newcomer>,
}

/// Those who were let in.
pub(super) struct Entered {
    /// How many will be admitted before them.
    pub before: usize,
    /// Nobody else is here who would hold them up.
    pub alone: bool,
    /// One for each.
    pub seats: Vec<Seat>,
}

impl Door {
    pub fn new(places: usize, stats: &Arc<Stats>, outlook: Outlook, started: Instant) -> Self {
        let room = Arc::new(Mutex::new(WaitingRoom::new(places)));
        let view = Arc::new(Mutex::new(View { outlook, fresh: BTreeMap::new() }));
        Self { stats: Arc::clone(stats), room, view, started }
    }

    /// Lets `count` of a tenant in, all or none.
    pub fn enter(&self, tenant: Tenant, count: usize) -> Result<Entered, Refused> {
        let (alone, before) = self.change(|room| (room.is_idle(), room.enter(tenant, count)));
        let before = before?;
        let seat = || {
            let guest = Guest { door: self.clone(), tenant, has_left: AtomicBool::new(false) };
            let guest = Arc::new(guest);
            Seat { guest, stage: Stage::Waiting }
        };
        let seats = std::iter::repeat_with(seat).take(count).collect();
        Ok(Entered { before, alone, seats })
    }

    /// How long a newcomer will wait who does not stand in the outlook yet; `None` while nothing is
    /// known of that.
    pub fn wait(&self, newcomer: &Newcomer) -> Option<Duration> {
        let outlook = self.view().outlook.clone(); // nobody waits while it is looked at
        outlook.wait(newcomer, self.started.elapsed())
    }

    /// The same for somebody behind everybody else.
    pub fn wait_of_last(&self) -> Option<Duration> {
        if self.room().is_idle() {
            return Some(Duration::ZERO);
        }
        let outlook = self.view().outlook.clone();
        outlook.wait_of_last(self.started.elapsed())
    }

    /// A newcomer is on its way to the engine; where it is `alone`, who was here has gone.
    pub fn came(&self, id: SeqId, newcomer: Newcomer, alone: bool) {
        let mut view = self.view();
        if alone {
            view.outlook.empty();
            view.fresh.clear();
        }
        view.outlook.enter(&newcomer);
        view.fresh.insert(id, newcomer);
    }

    /// What the engine sees now that it knows of these newcomers too.
    pub fn look(&self, mut outlook: Outlook, known: impl Iterator<Item = SeqId>) {
        let mut view = self.view();
        for id in known {
            view.fresh.remove(&id);
        }
        view.fresh.values().for_each(|newcomer| outlook.enter(newcomer));
        view.outlook = outlook;
    }

    /// A view is whole whoever panicked beside it: it is replaced soon.
    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
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
