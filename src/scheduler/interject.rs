//! Whom a pass that is being computed stops for, between two of its layers.
//!
//! Who comes while a step runs would wait for its end, and a step may take as long as a short
//! question does alone: however fair the turns are, a greedy tenant would double that question's
//! wait. So where a step computes for a tenant that has more than its share, or its share and a
//! queue, the first prompt of somebody else is computed before its next layer, alone, if that takes
//! no longer than a long step. Whoever has an answer running has its next token that much later,
//! once in a step at most, and for no more than a fifth of the time. What it costs is the weights,
//! which are read once more. Nobody makes way for a newcomer here, since rows of all of them fly:
//! it comes in if there is room.

use std::time::Duration;

use super::{Batch, Scheduler, Sequence};
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
        let crowd = self.tenants.crowd();
        let has_much = |s: &Sequence| self.tenants.has_much(s.tenant.id, crowd);
        if !self.running.iter().any(has_much) {
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

    /// Lets the next one in, if it is the first of its tenant and not too long.
    fn let_in_apart(&mut self, batch: &Batch) -> Option<usize> {
        let (turn, tenant) = self.first(&Default::default())?;
        let (next, in_background) = (self.tenants.front(tenant), turn.0);
        if in_background || next.score || self.tenants.has_begun(tenant) {
            return None;
        }
        if self.running.len() + batch.taken.forks >= self.config.running_len {
            return None;
        }
        let found = self.room_for(next).ok()?;
        let rows = next.todo() - found.len() * self.config.block_len;
        let (left, taken) = (batch.row_limit - batch.taken.rows, batch.taken.rows);
        let fits = rows <= left || taken == 0 && rows <= PARTS * left;
        fits.then(|| self.let_in(tenant, &found))
    }
}
