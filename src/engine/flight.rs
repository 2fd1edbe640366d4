//! A pass between the half of a step that asks for it and the half that takes what it gave.
//!
//! Where a model runs ahead, the step after it is scheduled in between, for all whose token the
//! device keeps: it reads the token where it was chosen, and the host learns it while that step is
//! computed. Whoever needs the host for its next token (a grammar, penalties, what else was
//! probable, a guess, forks) has its row in the step after that; if nobody else goes on, nothing is
//! scheduled in between, and all is as it is without. An answer that turns out to be over has one
//! row too many, which nobody reads. Its blocks are given to others at once: passes are computed in
//! order, so whoever writes into them does so behind that row. Deliberately absent: whether a pass
//! was computed by the time it was asked for. On the CPU it was.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hearth_models::Wanted;

use super::Engine;
use super::late::Late;
use super::runner::Asked;
use crate::scheduler::{Batch, Entry, Sequence};
use crate::types::SeqId;

/// A pass that was asked for.
pub(super) struct Flight {
    pub batch: Batch,
    /// Or what was wrong with it.
    pub pass: Result<Asked, String>,
    /// Tokens that were asked for beside it, out of rows of earlier ones.
    pub late: Vec<Late>,
    /// When it was scheduled.
    pub started: Instant,
}

impl Engine {
    /// Asks for the forward pass. A panic in it is an error of this batch.
    pub(super) fn compute(&mut self, batch: &Batch) -> Result<Asked, String> {
        let (runner, scheduler) = (&mut self.runner, &self.scheduler);
        let (live, vocab_len) = (&mut self.live, self.sampler.vocab_len());
        let wanted = |id: SeqId, ahead: usize| {
            let unknown = scheduler.running(id).map_or(0, Sequence::unknown);
            let live = live.get_mut(&id);
            live.map_or(Wanted::Logits, |live| live.wanted(unknown + ahead, vocab_len))
        };
        let mut asked = caught(|| runner.launch(batch, scheduler, wanted))?;
        for (id, kept) in asked.take_kept() {
            if let Some(live) = self.live.get_mut(&id) {
                live.hold(kept);
            }
        }
        Ok(asked)
    }

    /// Whose next row may be asked for before their token is known. A draft model reads every token
    /// first.
    pub(super) fn who_goes_on(&self, batch: &Batch) -> Vec<SeqId> {
        if !self.ahead || self.draft.is_some() {
            return Vec::new();
        }
        let price = self.scheduler.price();
        let goes_on = |id: &SeqId| {
            let seq = self.scheduler.running(*id).filter(|_| self.runner.is_picked(*id));
            // Whose client is behind is to stand aside, which it cannot while rows of it fly.
            let live = seq.is_some().then(|| &self.live[id]).filter(|live| !live.is_behind());
            seq.zip(live).is_some_and(|(seq, live)| live.goes_on(seq.unknown(), price))
        };
        batch.entries.iter().map(|entry| entry.id).filter(goes_on).collect()
    }

    /// How long a step took whose results are here: while another one was computed, it was not.
    pub(super) fn took(&mut self, started: Instant) -> Duration {
        let before = std::mem::replace(&mut self.landed, Instant::now());
        self.landed.duration_since(before.max(started))
    }

    /// The batch is lost, the engine is not. Of the pass behind it only the rows of the same
    /// sequences are: nobody else reads what this one should have written.
    pub(super) fn fail(&mut self, batch: &Batch, message: &str) {
        tracing::error!(message, sequences = batch.entries.len(), "a batch failed");
        self.stats.failures.fetch_add(1, Ordering::Relaxed);
        for id in batch.entries.iter().flat_map(Entry::ids) {
            if let Some(live) = self.remove(id) {
                live.fail(message);
            }
        }
    }

    /// After a panic outside the forward pass nothing that is counted can be trusted: everybody is
    /// told, and the engine begins again with an empty scheduler.
    pub(super) fn start_over(&mut self, message: &str) {
        tracing::error!(message, sequences = self.live.len(), "a step failed; starting over");
        self.stats.failures.fetch_add(1, Ordering::Relaxed);
        if let Some(flight) = self.flight.take() {
            // Waited for, whatever it gives: nothing is under way when the engine begins again.
            drop(flight.pass.and_then(|pass| caught(|| pass.wait())));
        }
        self.stats.aside.store(0, Ordering::Release);
        self.scheduler = self.scheduler.emptied();
        if self.floor.is_none() {
            self.scheduler.keep_nothing();
        }
        let ids: Vec<SeqId> = self.live.keys().copied().collect();
        for id in ids {
            if let Some(live) = self.remove(id) {
                live.fail(message);
            }
        }
    }
}

/// What an engine survives: an error, or a panic.
pub(super) fn caught<T>(
    work: impl FnOnce() -> Result<T, hearth_models::Error>,
) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(panic_message(&*panic)),
    }
}

/// What a panic said.
pub(super) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the step panicked: {}", text.unwrap_or("without a message"))
}
