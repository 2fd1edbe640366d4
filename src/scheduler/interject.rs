//! Whom a pass that is being computed stops for, between two of its layers.
//!
//! Who comes while a step runs would wait for its end, and a step may take as long as a short
//! question does alone: however fair the turns are, a greedy tenant would double that question's
//! wait. So where a step computes for a tenant that has more than its share, or its share and a
//! queue, the first prompt of somebody else is computed before its next layer, alone, if that takes
//! no longer than a long step; not while somebody without much waits for a first token that is
//! begun. Whoever has an answer running has its next token that much later, once in a step at most,
//! and for no more than a fifth of the time. What it costs is the weights, which are read once
//! more. Nobody can make way for a newcomer here, since rows of all fly: where all places are
//! taken, one of those with more makes way before the next step.

use std::time::Duration;

use super::{Batch, Found, Scheduler, Sequence};
use crate::kv::Kept;

/// A prompt that is longer than a pass apart has its first part of it, if there are no more parts.
const PARTS: usize = 2;

impl Scheduler {
    /// Rows that are computed before the rest of the batch that flies, or before the next one, if
    /// none does.
    pub fn interject(&mut self, now: Duration, flying: &Batch, kept: &dyn Kept) -> Batch {
        let rows = self.pace.rows_apart().min(self.config.batch_tokens);
        let mut batch = Batch { row_limit: rows, apart: true, ..Batch::default() };
        batch.expired = self.tenants.expire(now);
        batch.taken.forks = flying.fork_count(); // they have their places already
        self.pace.see(self.tenants.foreground(), now);
        if !self.may_stop(flying) {
            return batch;
        }
        let loading = self.loading_count() > 0;
        while let Some(place) = self.let_in_apart(&batch) {
            if !self.waits_for_kept(place, kept, loading, &mut batch) {
                self.give_rows(place, usize::MAX, &mut batch);
            }
        }
        batch.forgotten = self.pool.take_forgotten();
        batch
    }

    /// It is for somebody with much, and nobody else waits for the end of a prompt that is begun.
    fn may_stop(&self, flying: &Batch) -> bool {
        let crowd = self.tenants.crowd();
        let has_much = |s: &Sequence| self.tenants.has_much(s.tenant.id, crowd);
        let is_begun =
            |s: &Sequence| s.computed < s.prompt_len && !s.is_waiting() && !s.tenant.background;
        let mut flies = flying.entries.iter().filter_map(|entry| self.running(entry.id));
        let for_much = match flying.entries.is_empty() {
            true => self.running.iter().any(has_much),
            false => flies.any(has_much),
        };
        for_much && !self.running.iter().any(|s| is_begun(s) && !has_much(s))
    }

    /// Lets the next one in, if it is the first of its tenant and not too long.
    fn let_in_apart(&mut self, batch: &Batch) -> Option<usize> {
        let (due, tenant) = self.first(&Default::default())?;
        let (next, (in_background, _)) = (self.tenants.front(tenant), due);
        if in_background || next.score || self.tenants.has_begun(tenant) {
            return None;
        }
        let found: Found = match self.config.running_len.checked_sub(self.places_taken(batch))? {
            0 => self.tenants.must_yield_to(tenant, due).and_then(|_| self.blocks_for(next))?,
            _ => self.blocks_for(next)?,
        };
        let rows = next.todo() - found.len() * self.config.block_len;
        let (left, taken) = (batch.row_limit - batch.taken.rows, batch.taken.rows);
        let fits = rows <= left || taken == 0 && rows <= PARTS * left;
        fits.then(|| self.let_in(tenant, &found))
    }

    fn places_taken(&self, batch: &Batch) -> usize {
        self.running.len() + batch.taken.forks
    }
}
