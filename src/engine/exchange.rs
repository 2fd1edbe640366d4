//! The engine's part in the exchange of blocks between memory and the shelf, once a step.

use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::Engine;
use super::floor::{Arrival, STEP_BYTES};
use crate::scheduler::Batch;

/// How long a step without rows waits for blocks.
const PATIENCE: Duration = Duration::from_millis(2);
/// A read that takes longer than this is not waited for, and none after it.
const STALLED: Duration = Duration::from_secs(5);

impl Engine {
    /// Puts blocks that have come into their places, so many in a step that it stays short. Where
    /// the last step had nothing to do, there is time to wait for one.
    pub(super) fn take_loaded(&mut self) {
        let Some(floor) = &self.floor else { return };
        let waiting = self.rested && self.scheduler.loading_count() > 0;
        let mut patience = if waiting { PATIENCE } else { Duration::ZERO };
        let mut room = STEP_BYTES;
        loop {
            let Arrival { id, ticket, bytes } = match floor.next(patience) {
                Ok(arrival) => arrival,
                Err(RecvTimeoutError::Timeout) => return self.look_at_the_clock(),
                Err(RecvTimeoutError::Disconnected) => return self.lose_floor("this is a bug"),
            };
            (patience, self.heard) = (Duration::ZERO, Instant::now());
            let Some(block) = self.scheduler.awaits(id, ticket) else {
                floor.forget(ticket);
                continue;
            };
            match bytes.map(|bytes| (bytes.len(), self.runner.import(block, &bytes))) {
                Some((len, Ok(()))) => {
                    self.scheduler.loaded(id);
                    self.stats.kv_reloaded.fetch_add(1, Ordering::Relaxed);
                    room = room.saturating_sub(len);
                }
                Some((_, Err(_))) | None => {
                    floor.forget(ticket);
                    self.scheduler.load_failed(id, ticket);
                }
            }
            if room == 0 {
                return;
            }
        }
    }

    /// A disk may hang for ever; who waits for a block then computes it.
    fn look_at_the_clock(&mut self) {
        if self.scheduler.loading_count() == 0 {
            self.heard = Instant::now();
        } else if self.heard.elapsed() > STALLED {
            self.lose_floor("a read took too long");
        }
    }

    /// Nothing is read or written any more until the model is loaded again.
    fn lose_floor(&mut self, why: &str) {
        tracing::error!("--kv-store: the folder is given up: {why}");
        self.floor = None;
        self.scheduler.all_loads_failed();
    }

    /// Copies what is about to be overwritten, the beginning of a text before its end, and begins
    /// to fetch what sequences wait for.
    pub(super) fn exchange(&mut self, batch: &Batch) {
        self.rested = batch.entries.is_empty();
        let Some(floor) = &self.floor else { return };
        for forgotten in batch.forgotten.iter().rev() {
            floor.spill(forgotten, |out| self.runner.export(forgotten.block, out));
        }
        batch.loads.iter().for_each(|load| floor.load(load.clone()));
    }

    /// The end of the engine: what is still cached is kept.
    pub(super) fn put_away(&mut self) {
        let Some(floor) = self.floor.take() else { return };
        let idle = self.scheduler.pool().idle();
        floor.put_away(idle, |block, out| self.runner.export(block.block, out));
    }
}
