//! The engine's part in the exchange of blocks between memory and the shelf, once a step, and while
//! there is nothing else to do.
//!
//! What is worth a file goes there before it has to: while somebody runs, in a hundredth of the
//! time, a block or two in a step; while nobody does, one after the other. So it is safe from the
//! end of the process soon after it was computed, whenever that comes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::Engine;
use super::flight::panic_message;
use super::floor::{Arrival, Floor, STEP_BYTES};
use super::handle::Command;
use crate::scheduler::Batch;

/// Of the time in which sequences run, one part in so many may be spent on copying what does not
/// have to go yet.
const SHARE: u32 = 100;
/// What is not spent is saved up to this, so that a step stays short.
const SAVED_MAX: Duration = Duration::from_millis(1);
/// How often an idle engine looks whether the writer has time again, and, rarely, whether writing
/// goes on after a pause.
const LOOK: Duration = Duration::from_millis(2);
const LOOK_RARELY: Duration = Duration::from_millis(200);

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
        self.scheduler.keep_nothing();
    }

    /// Copies what is about to be overwritten, the beginning of a text before its end, and begins
    /// to fetch what sequences wait for.
    pub(super) fn exchange(&mut self, batch: &Batch) {
        self.rested = batch.entries.is_empty();
        let Some(floor) = &mut self.floor else { return };
        for forgotten in batch.forgotten.iter().rev() {
            floor.spill(forgotten, |out| self.runner.export(forgotten.block, out));
        }
        batch.loads.iter().for_each(|load| floor.load(load.clone()));
        self.keep_some();
    }

    /// Copies what is worth a file, as far as time allows.
    fn keep_some(&mut self) {
        self.credit.earn(Instant::now());
        while self.credit.is_left() {
            let started = Instant::now();
            if !self.keep_one() {
                break;
            }
            self.credit.spend(started.elapsed());
        }
    }

    /// Copies the next block that is worth a file. False where there is none, or the writer has no
    /// time for it.
    fn keep_one(&mut self) -> bool {
        let Some(floor) = &mut self.floor else { return false };
        if floor.has_failed() {
            self.scheduler.keep_again();
        }
        let block = floor.has_time().then(|| self.scheduler.next_unkept()).flatten();
        let taken = block.is_some_and(|block| {
            let taken = floor.keep(&block, |out| self.runner.export(block.block, out));
            if !taken {
                self.scheduler.put_back(&block);
            }
            taken
        });
        self.stats.kv_unkept.store(self.scheduler.unkept_count(), Ordering::Release);
        taken
    }

    /// The next command, or whether no more will come. Meanwhile what is worth a file goes there,
    /// and memory is asked for.
    pub(super) fn idle(&mut self) -> Result<Command, bool> {
        loop {
            // Before it is asked what failed: what fails after that is still on its way here.
            let sent = self.sent_count();
            let kept = catch_unwind(AssertUnwindSafe(|| self.keep_one() || self.provide()));
            let kept = kept.unwrap_or_else(|panic| {
                self.start_over(&panic_message(&*panic));
                false
            });
            let patience = match (kept, self.scheduler.unkept_count(), sent) {
                (true, ..) => Duration::ZERO,
                (false, 0, 0) => return self.commands.recv().map_err(|_| true),
                (false, _, 0) => LOOK_RARELY,
                (false, ..) => LOOK,
            };
            match self.commands.recv_timeout(patience) {
                Ok(command) => return Ok(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(true),
            }
        }
    }

    fn sent_count(&self) -> usize {
        self.floor.as_ref().map_or(0, Floor::sent_count)
    }

    /// The end of the engine: what is still cached is kept.
    pub(super) fn put_away(&mut self) {
        let Some(floor) = self.floor.take() else { return };
        let blocks = self.scheduler.put_away();
        floor.put_away(blocks.into_iter(), |block, out| self.runner.export(block.block, out));
    }
}

/// Time that may be spent: a part of all that passes, saved up to a bound, or owed.
pub(super) struct Credit {
    since: Instant,
    left_ns: i64,
}

impl Credit {
    pub fn new(now: Instant) -> Self {
        Self { since: now, left_ns: 0 }
    }

    fn earn(&mut self, now: Instant) {
        let part = now.duration_since(self.since) / SHARE;
        self.left_ns = self.left_ns.saturating_add(ns(part)).min(ns(SAVED_MAX));
        self.since = now;
    }

    fn spend(&mut self, time: Duration) {
        self.left_ns = self.left_ns.saturating_sub(ns(time));
    }

    fn is_left(&self) -> bool {
        self.left_ns > 0
    }
}

fn ns(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundredth_of_the_time_is_spent_and_no_more() {
        let (step, copy) = (Duration::from_millis(50), Duration::from_micros(700));
        let mut now = Instant::now();
        let (mut credit, started) = (Credit::new(now), now);
        let (mut spent, mut most) = (Duration::ZERO, 0);
        for _ in 0..1000 {
            now += step;
            credit.earn(now);
            let mut copies = 0;
            while credit.is_left() {
                credit.spend(copy);
                spent += copy;
                copies += 1;
            }
            most = most.max(copies);
        }
        let share = spent.as_secs_f64() / now.duration_since(started).as_secs_f64();
        assert!((0.0095..0.0102).contains(&share), "{share}");
        assert_eq!(most, 1);
        // However long nothing was to be done.
        credit.earn(now + Duration::from_secs(3600));
        credit.spend(SAVED_MAX);
        assert!(!credit.is_left());
    }
}
