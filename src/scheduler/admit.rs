//! Who comes in, and who makes way for it.

use super::order::Next;
use super::{Admit, Batch, Found, Later, Scheduler, Sequence};

impl Scheduler {
    /// Lets sequences in from the waiting room until something says no.
    pub(super) fn admit(&mut self, batch: &Batch) -> Admit {
        let mut line = self.line(batch);
        while let Some(Next { tenant, room, .. }) = self.next(&line, batch) {
            let found = match room {
                Ok(found) => found,
                Err(why) => return Admit::Later(why),
            };
            let place = self.let_in(tenant, &found);
            let seq = &self.running[place];
            line.join(seq, self.row_limit(seq, batch));
        }
        match self.tenants.waiting().next() {
            Some(_) => Admit::Later(Later::TenantFull),
            None => Admit::Now,
        }
    }

    /// The first of a tenant that waits runs from now on, with all blocks that it needs.
    pub(super) fn let_in(&mut self, tenant: u64, found: &Found) -> usize {
        let mut next = self.tenants.pop(tenant);
        next.adopt(found, &mut self.pool, self.config.block_len);
        let missing = self.blocks_wanted(&next) - next.blocks.len();
        next.blocks.extend((0..missing).map_while(|_| self.pool.allocate()));
        self.start(next)
    }

    /// The known blocks with which a sequence may come in, or why it may not.
    pub(super) fn room_for(&self, next: &Sequence) -> Result<Found, Later> {
        match self.running.len() < self.config.running_len {
            true => self.blocks_for(next).ok_or(Later::NoBlocks),
            false => Err(Later::RunningFull),
        }
    }

    /// The known blocks with which it may come in, if there are enough for the rest.
    pub(super) fn blocks_for(&self, next: &Sequence) -> Option<Found> {
        let found = next.found(&self.pool, self.config.block_len);
        // A known block that nobody holds is one of the free ones.
        let held = found.iter().filter(|(block, _)| !self.pool.is_free(*block)).count();
        (self.blocks_wanted(next) - held <= self.pool.free_count()).then_some(found)
    }

    /// Where the next one cannot come in, a tenant with more makes way; or where one has come in
    /// already, while rows flew ([`Scheduler::interject`]).
    pub(super) fn make_way(&mut self, batch: &mut Batch) {
        while self.running.len() > self.config.running_len && !self.flies() {
            self.preempt_youngest(self.tenants.largest(), batch);
        }
        while let Some(Next { tenant, due, room }) = self.next(&self.line(batch), batch)
            && let Err(Later::RunningFull | Later::NoBlocks) = room
            && let Some(other) = self.tenants.must_yield_to(tenant, due)
        {
            if self.flies() {
                batch.short = true;
                return;
            }
            self.preempt_youngest(Some(other), batch);
        }
    }

    /// Sends the youngest sequence of a tenant, or of all, back to the waiting room.
    pub(super) fn preempt_youngest(&mut self, tenant: Option<u64>, batch: &mut Batch) {
        let theirs = |s: &Sequence| tenant.is_none_or(|tenant| s.tenant.id == tenant);
        let place = self.running.iter().rposition(theirs);
        let seq = self.stop(place.expect("the one that asks runs; this is a bug"));
        batch.drop_answer(seq.id);
        batch.preempted.push(seq.id);
        self.tenants.enter(seq);
    }
}
