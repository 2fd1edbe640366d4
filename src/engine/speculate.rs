//! What the next step is told of how answers may go on: out of what they quote, or by a draft
//! model.
//!
//! Exact without a rule of acceptance: a token is chosen from its own logits, with the draw of its
//! own position, as it would be without; a proposal only decides whether these logits are there
//! already. Deliberately absent: whether rows are left for a proposal. The scheduler knows.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use super::Engine;
use super::draft::Open;
use super::flight::panic_message;
use crate::scheduler::{Batch, Proposal};
use crate::types::{SeqId, TokenId};

/// Tokens proposed for one answer at most. Where memory is the limit nine rows cost little more
/// than one; where computing is, the price of a row leaves fewer.
const PROPOSED_MAX: usize = 8;

impl Engine {
    /// Guesses for the answers that run, and whose newest token is known.
    pub(super) fn propose(&mut self) -> Vec<Proposal> {
        let (price, mut open, mut proposals) = (self.scheduler.price(), Vec::new(), Vec::new());
        for id in self.scheduler.answers() {
            let seq = self.scheduler.running(id).filter(|seq| seq.unknown() == 0);
            let Some(seq) = seq else { continue };
            let live = &self.live[&id];
            let max = live.proposals_max().min(PROPOSED_MAX);
            let tokens = live.propose(price, max);
            match tokens.is_empty() {
                true => open.push(Open { id, tokens: seq.tokens(), max }),
                false => proposals.push(Proposal { id, tokens }),
            }
        }
        let Some(draft) = &mut self.draft else { return proposals };
        let (live, sampler) = (&self.live, &mut self.sampler);
        let choose = |id: SeqId, ahead: usize, logits: &[f32]| {
            live[&id].would_choose(ahead, logits, sampler)
        };
        let drafted = catch_unwind(AssertUnwindSafe(|| draft.propose(&open, price, choose)));
        match drafted.map(|drafted| drafted.map_err(|e| e.to_string())) {
            Ok(Ok(drafted)) => proposals.extend(drafted),
            Ok(Err(message)) => self.without_draft(&message),
            Err(panic) => self.without_draft(&panic_message(&*panic)),
        }
        proposals
    }

    /// Answers do not need it.
    fn without_draft(&mut self, message: &str) {
        tracing::error!(message, "the draft model failed; answers go on without it");
        self.draft = None;
    }

    /// How many rows were spent on proposals, and how many of these were right.
    pub(super) fn count_proposals(&self, batch: &Batch, sampled: &[(SeqId, TokenId)]) {
        let right = sampled.windows(2).filter(|pair| pair[0].0 == pair[1].0).count();
        let stats = &self.stats;
        stats.proposed_tokens.fetch_add(batch.proposed_count() as u64, Ordering::Relaxed);
        stats.accepted_tokens.fetch_add(right as u64, Ordering::Relaxed);
    }
}
