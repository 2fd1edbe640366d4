//! In which order: the prompts that run, who comes in next, and whose answers stand still for them.

use std::cmp::Reverse;

use super::fair::{Begun, Turn};
use super::{Batch, Found, Later, Scheduler, Sequence};
use crate::types::SeqId;

/// While a tenant with less waits for its prompt, each answer of one with more than its share
/// moves in every eighth step, which is when it would not be noticed by anybody else.
const SLOW_STRIDE: usize = 8;

/// The first of the waiting room.
pub(super) struct Next {
    pub(super) tenant: u64,
    pub(super) due: Turn,
    /// The known blocks with which it may come in, or why it may not.
    pub(super) room: Result<Found, Later>,
}

impl Scheduler {
    /// Answers that stand still in this step, because a tenant that is behind theirs has a prompt
    /// to compute, theirs has more than its share, and all answers together are a heavy load; or
    /// because they are in the background, and somebody is not.
    pub(super) fn slow_answers(&self) -> Vec<SeqId> {
        let prompts =
            self.running.iter().filter(|s| s.todo() > 0 && !s.is_answer() && !s.is_waiting());
        let begun = prompts.map(|s| self.tenants.turn(s.tenant.id));
        let least = begun.chain(self.tenants.heads().map(|(turn, _)| turn)).min();
        let answers = self.running.iter().filter(|s| s.is_answer()).count();
        let least = least.filter(|_| self.pace.are_heavy(answers));
        let foreground = self.tenants.in_foreground();
        let is_slow = |s: &&Sequence| {
            let tenant = s.tenant.id;
            let greedy = least.is_some_and(|least| {
                self.tenants.turn(tenant) > least && self.tenants.is_over_share(tenant)
            });
            s.is_answer() && (greedy || s.tenant.background && foreground)
        };
        let mut slow: Vec<&Sequence> = self.running.iter().filter(is_slow).collect();
        slow.sort_by_key(|s| (s.moved, s.id));
        let moving = slow.len().div_ceil(SLOW_STRIDE);
        slow[moving..].iter().map(|s| s.id).collect()
    }

    /// Some sequences of those that nothing is fetched for, in the order in which they are due, and
    /// how much is left of them.
    pub(super) fn prompts(
        &self,
        is_prompt: impl Fn(&Sequence) -> bool,
    ) -> (Vec<(Turn, SeqId)>, Begun) {
        let mut prompts: Vec<_> =
            self.running.iter().filter(|s| !s.is_waiting() && is_prompt(s)).collect();
        prompts.sort_by_key(|s| (Reverse(s.priority), s.id));
        let mut begun = Begun::default();
        let due = prompts.into_iter().map(|s| {
            let tokens = begun.add(s.tenant.id, s.todo());
            (self.tenants.due(s.tenant.id, tokens), s.id)
        });
        let mut order: Vec<_> = due.collect();
        order.sort_unstable();
        (order, begun)
    }

    /// Prompts that wait for their first token, of tenants that have no more than their share.
    pub(super) fn prompts_waiting(&self) -> usize {
        let begun = self.running.iter().filter(|s| {
            let tenant = s.tenant;
            let is_prompt = !s.is_answer() && !s.is_waiting();
            is_prompt && !tenant.background && !self.tenants.is_over_share(tenant.id)
        });
        begun.count() + self.tenants.waiting_in_share()
    }

    /// Who comes in next, and with what, or why not yet.
    pub(super) fn next(&self, batch: &Batch) -> Option<Next> {
        let (prompts, begun) = self.prompts(|s| !s.is_answer());
        let (due, tenant) = self.tenants.next(&begun)?;
        // Rows that others will have before it; whoever gets none in this step may as well wait.
        let before = prompts.iter().filter(|(turn, _)| *turn <= due);
        let before = before.filter_map(|(_, id)| self.running(*id));
        let taken: usize = before.map(|s| self.row_limit(s, batch)).sum();
        let room = match taken + batch.row_count() >= batch.row_limit {
            true if self.running.len() < self.config.running_len => Err(Later::BatchFull),
            _ => self.room_for(self.tenants.front(tenant)),
        };
        Some(Next { tenant, due, room })
    }
}
