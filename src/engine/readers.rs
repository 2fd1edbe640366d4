//! Readers that are slower than the engine: a sequence whose client leaves too much unread stands
//! aside, without a place and without blocks, until it reads or leaves. Nobody waits with it.
//!
//! Exact, because it is a preemption: what comes after is computed from the same tokens, the next
//! one with the draw of its own position. Deliberately absent: how long a client may take; the
//! server closes a connection that takes nothing, and that is cancellation.

use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;

use super::Engine;
use super::handle::Command;
use super::live::Live;

/// How often an engine looks whether somebody has read, when nothing else is left to do. Half of
/// what was unread is still there then, so nobody waits for it.
const LOOK: Duration = Duration::from_millis(10);

impl Engine {
    /// Whose client is behind stands aside; whose has caught up comes back.
    pub(super) fn mind_readers(&mut self) {
        for (id, live) in &mut self.live {
            match (live.is_aside(), live.is_behind()) {
                (false, true) if self.scheduler.set_aside(*id) => {
                    live.stand_aside(true);
                    self.draft.iter_mut().for_each(|draft| draft.forget(*id));
                }
                (true, false) => {
                    self.scheduler.bring_back(*id);
                    live.stand_aside(false);
                }
                _ => {}
            }
        }
        self.stats.kv_blocks_used.store(self.scheduler.used_blocks(), Ordering::Release);
        let aside = self.live.values().filter(|live| live.is_aside()).count();
        self.stats.aside.store(aside, Ordering::Release);
    }

    /// Somebody has to read first: the next command, if one comes before it is time to look.
    /// Otherwise whether no more will come.
    pub(super) fn rest(&self) -> Result<Command, bool> {
        self.commands.recv_timeout(LOOK).map_err(|error| {
            let closed = error == RecvTimeoutError::Disconnected;
            if closed {
                thread::sleep(LOOK);
            }
            closed
        })
    }

    /// Nothing can be computed until somebody reads: all who are left stand aside, or wait for
    /// their places.
    pub(super) fn waits_for_readers(&self) -> bool {
        let held_up = self.rested && self.flight.is_none() && self.scheduler.running_count() == 0;
        held_up && self.live.values().any(Live::is_aside)
    }
}
