//! Rows whose grammar does not know yet what may come: nobody waits with them.
//!
//! Where logits are read out they are kept here, and a token is chosen when the set is there. On a
//! device that chooses they stay there, and with the first pass for which the set is known a token
//! is asked for beside it: that is one step later, and nothing but the token comes back. With
//! nothing else to do there is time to wait for a set. Deliberately absent: who waits for what; a
//! sequence knows.

use std::time::{Duration, Instant};

use hearth_models::Pass;

use super::flight::caught;
use super::live::{Choice, Live};
use super::{Engine, Outcome, outcome};
use crate::scheduler::{Batch, Entry};
use crate::types::SeqId;

/// How long a step without rows waits for grammars.
const PATIENCE: Duration = Duration::from_millis(20);

/// A token that was asked for beside a pass, or what was wrong with it.
pub(super) type Late = (SeqId, Result<Pass, String>);

impl Engine {
    /// Asks for tokens out of rows that the device keeps.
    pub(super) fn choose_kept(&mut self, batch: &Batch) -> Vec<Late> {
        let rests = batch.entries.is_empty() && self.flight.is_none();
        let until = Instant::now() + if rests { PATIENCE } else { Duration::ZERO };
        let (vocab_len, mut late) = (self.sampler.vocab_len(), Vec::new());
        for (id, live) in &mut self.live {
            let patience = until.saturating_duration_since(Instant::now());
            if let Some((kept, pick)) = live.choose_kept(vocab_len, patience) {
                late.push((*id, caught(|| kept.choose(pick))));
            }
        }
        late
    }

    /// What earlier passes left open, behind what this one gave; not while one of those waits.
    pub(super) fn settle(
        &mut self,
        batch: &Batch,
        late: Vec<Late>,
        outcomes: &mut Vec<(SeqId, Outcome)>,
    ) {
        if !batch.is_apart() {
            self.sample_held(batch, outcomes);
            self.take_late(late, outcomes);
        }
    }

    /// Takes tokens that were asked for beside a pass.
    fn take_late(&mut self, late: Vec<Late>, outcomes: &mut Vec<(SeqId, Outcome)>) {
        for (id, pass) in late {
            let made = pass.and_then(|pass| caught(|| pass.wait()));
            // It ended meanwhile, or its rows are computed again.
            let Some(live) = self.live.get_mut(&id).filter(|live| live.awaits_late()) else {
                continue;
            };
            let choice = match made {
                Ok(output) => live.sample(output.row(0, 0), &mut self.sampler),
                Err(message) => Choice::Stuck(message),
            };
            outcomes.extend(outcome(choice).map(|outcome| (id, outcome)));
        }
    }

    /// The pass beside which they were asked for failed: nobody knows what they are.
    pub(super) fn give_up(&mut self, late: Vec<Late>, message: &str) {
        for (id, pass) in late {
            drop(pass);
            if self.live.get(&id).is_some_and(Live::awaits_late)
                && let Some(live) = self.remove(id)
            {
                live.fail(message);
            }
        }
    }

    /// Rows of earlier steps whose grammar was late, and that the host can settle.
    fn sample_held(&mut self, batch: &Batch, outcomes: &mut Vec<(SeqId, Outcome)>) {
        let until =
            Instant::now() + if batch.entries.is_empty() { PATIENCE } else { Duration::ZERO };
        // A row of this batch has its turn, and one that flies belongs to the next.
        let flying = self.flight.as_ref().map(|flight| &flight.batch);
        let computed = |id: &SeqId| {
            let mut batches = std::iter::once(batch).chain(flying);
            batches.any(|b| b.entries.iter().flat_map(Entry::ids).any(|e| e == *id))
        };
        for (id, live) in self.live.iter_mut().filter(|(id, live)| live.is_held() && !computed(id))
        {
            let patience = until.saturating_duration_since(Instant::now());
            if let Some(outcome) = outcome(live.sample_held(&mut self.sampler, patience)) {
                outcomes.push((*id, outcome));
            }
        }
    }
}
