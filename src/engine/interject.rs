//! A pass on its way through the layers: between two of them, who has come meanwhile may be
//! computed first.
//!
//! The scheduler says who; here its pass is run and landed like any other, while the one that waits
//! stays where it is. Deliberately absent: models that run ahead. Their passes are on the device,
//! in order, and short.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::flight::{Flight, caught};
use super::runner::{Asked, Logits};
use super::{Command, Engine};
use crate::scheduler::Batch;

/// Blocks that were never in use and have their memory: more than a pass apart takes.
const AHEAD_BLOCKS: usize = 16;

impl Engine {
    /// Computes what is left of a pass. `apart` is told how long it stood still for others.
    pub(super) fn arrive(
        &mut self,
        mut asked: Asked,
        batch: &Batch,
        apart: &mut Duration,
    ) -> Result<Logits, String> {
        let mut may_stop = !batch.is_apart();
        while caught(|| self.runner.go_on(&mut asked))? {
            if !batch.is_apart() {
                self.provide();
            }
            let (started, landed) = (Instant::now(), self.landed);
            if may_stop && self.hear() {
                may_stop = !self.interject(batch, Instant::now());
                *apart += started.elapsed();
                self.landed = landed;
            }
        }
        caught(|| asked.wait())
    }

    /// Has the system provide pages of the memory that will be needed soon; false when all is
    /// there. A host may take milliseconds to find one, and who is computed apart finds it there:
    /// it is asked for between the layers of the others, and while nobody runs. A model that was
    /// only loaded takes none.
    pub(super) fn provide(&mut self) -> bool {
        let reached = self.scheduler.pool().reached();
        reached > 0
            && (self.runner.provide(reached + AHEAD_BLOCKS)
                || self.draft.as_mut().is_some_and(|draft| draft.provide(AHEAD_BLOCKS)))
    }

    /// Computes those first who have come since the last pass.
    pub(super) fn put_first(&mut self) {
        if std::mem::take(&mut self.came) && !self.runner.runs_ahead() {
            self.interject(&Batch::default(), Instant::now());
        }
    }

    /// Lets those in who have come; whether somebody has. Who is not computed now is looked at
    /// again before the next step.
    fn hear(&mut self) -> bool {
        let before = std::mem::take(&mut self.came);
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Submit(group) => self.add(group),
                Command::Drain => self.draining = true,
            }
        }
        let came = self.came;
        self.came |= before;
        came
    }

    /// Runs a pass for some of them, if the scheduler has one.
    fn interject(&mut self, flying: &Batch, started: Instant) -> bool {
        let batch = self.scheduler.interject(started - self.started, flying, &self.floor);
        self.expire(&batch);
        self.begin(&batch);
        self.exchange(&batch);
        self.rested = false;
        if batch.entries.is_empty() {
            return false;
        }
        self.stats.interjected.fetch_add(1, Ordering::Relaxed);
        let pass = self.compute(&batch);
        self.scheduler.launch(&batch, &[]);
        self.land(Flight { batch, pass, late: Vec::new(), started });
        true
    }
}
