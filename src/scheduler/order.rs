//! In which order: the prompts that run, who comes in next, and whose answers stand still for them.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::fair::{Crowd, Turn};
use super::{Batch, Found, Later, Scheduler, Sequence};
use crate::types::{Priority, SeqId};

/// While a tenant with less waits for its prompt, each answer of one with more than its share
/// moves in every eighth step, which is when it would not be noticed by anybody else.
const SLOW_STRIDE: usize = 8;

/// Rows of prompts in the background in a step, while somebody in the foreground is here.
const BACKGROUND_ROWS: usize = 16;

/// Rows of a step that some prompts may still have.
pub(super) struct Shares {
    /// Those in the background, while somebody is not.
    background: usize,
    /// Those of tenants that have their share and a queue.
    queueing: usize,
    /// When the first prompt was due that ends in this step.
    first: Option<Turn>,
    crowd: Crowd,
}

/// The first of the waiting room.
pub(super) struct Next {
    pub(super) tenant: u64,
    pub(super) due: Turn,
    /// The known blocks with which it may come in, or why it may not.
    pub(super) room: Result<Found, Later>,
}

impl Scheduler {
    /// Answers that stand still in this step, in order of id, because they are beyond the time at
    /// which a prompt of another tenant is due, theirs has more than its share, and all answers
    /// together are a heavy load; or because they are in the background, and somebody is not; or
    /// because they are too many for a step of which somebody may come to wait.
    pub(super) fn slow_answers(&self) -> Vec<SeqId> {
        let answers = self.running.iter().filter(|s| s.is_answer()).count();
        let first_due = || {
            let begun = self.prompts(|s| s.todo() > 0 && !s.is_answer());
            let begun = begun.first().map(|(due, _)| *due);
            let first = self.first(&self.line(&Batch::default()));
            begun.into_iter().chain(first.map(|(due, _)| due)).min()
        };
        let least = if self.pace.are_heavy(answers) { first_due() } else { None };
        let (foreground, crowd) = (self.tenants.in_foreground(), self.tenants.crowd());
        let is_slow = |s: &&Sequence| {
            let greedy = least.is_some_and(|least| self.is_greedy(s.tenant.id, least, crowd));
            s.is_answer() && (greedy || s.tenant.background && foreground)
        };
        let mut slow: Vec<&Sequence> = self.running.iter().filter(is_slow).collect();
        let mut moving = slow.len().div_ceil(SLOW_STRIDE);
        if let Some(tenant) = self.is_alone_with_a_queue()
            && slow.is_empty()
        {
            let theirs = |s: &&Sequence| s.is_answer() && s.tenant.id == tenant;
            slow = self.running.iter().filter(theirs).collect();
            let free = self.config.running_len.saturating_sub(answers);
            let rows = if free > 0 { self.pace.spread_rows(slow.len(), free) } else { 0 };
            moving = self.pace.moving(slow.len(), rows.min(self.config.batch_tokens));
        }
        slow.sort_by_key(|s| (s.moved, s.id));
        let mut slow: Vec<SeqId> = slow[moving..].iter().map(|s| s.id).collect();
        slow.sort_unstable();
        slow
    }

    /// The only tenant in the foreground, if others may come in at any moment, and what it has to
    /// wait for is its own queue.
    fn is_alone_with_a_queue(&self) -> Option<u64> {
        let mut here = self.tenants.foreground();
        let (Some(tenant), None) = (here.next(), here.next()) else { return None };
        let queues =
            self.pace.in_company() && self.tenants.is_queueing(tenant, self.tenants.crowd());
        queues.then_some(tenant)
    }

    /// The tenant has more than its share, and had its turn when this was due.
    fn is_greedy(&self, tenant: u64, due: Turn, crowd: Crowd) -> bool {
        self.tenants.turn(tenant) > due && self.tenants.is_over_share(tenant, crowd)
    }

    /// What prompts may have of a step, by whose they are: in one with so many of all `answers`.
    pub(super) fn shares(&self, answers: usize, batch: &Batch) -> Shares {
        let free = self.config.running_len.saturating_sub(answers);
        Shares {
            background: if self.tenants.in_foreground() { BACKGROUND_ROWS } else { usize::MAX },
            queueing: self.pace.spread_rows(batch.answers, free),
            first: None,
            crowd: self.tenants.crowd(),
        }
    }

    /// Rows that the prompts of a tenant may still have. A first token of somebody with less does
    /// not wait for any of one who has too much, or a queue.
    pub(super) fn bound(&self, shares: &Shares, tenant: u64) -> usize {
        let queueing = self.tenants.is_queueing(tenant, shares.crowd);
        if self.tenants.has_much(tenant, shares.crowd)
            && shares.first.is_some_and(|due| self.tenants.turn(tenant) > due)
        {
            return 0;
        }
        let (in_background, _) = self.tenants.turn(tenant);
        let background = if in_background { shares.background } else { usize::MAX };
        background.min(if queueing { shares.queueing } else { usize::MAX })
    }

    /// The prompt at `place` has these.
    pub(super) fn take(&self, shares: &mut Shares, place: usize, due: Turn, rows: usize) {
        let seq = &self.running[place];
        shares.background = shares.background.saturating_sub(if due.0 { rows } else { 0 });
        let queueing = self.tenants.is_queueing(seq.tenant.id, shares.crowd);
        shares.queueing = shares.queueing.saturating_sub(if queueing { rows } else { 0 });
        if rows == seq.todo() {
            shares.first.get_or_insert(due);
        }
    }

    /// Nor does it wait for answers of that one that moved in the last step, where one of their own
    /// is cheap; or in one of the last two, where all `answers` are a heavy load and take turns.
    pub(super) fn stand_back(&self, shares: &Shares, answers: usize, batch: &mut Batch) {
        let heavy = self.pace.are_heavy(answers);
        let is_worth = heavy || self.pace.is_cheap_apart(batch.answers);
        let Some(due) = shares.first.filter(|_| is_worth) else { return };
        let last = self.steps + u64::from(self.flies());
        let copies = &batch.copies;
        let stands = |id| {
            let seq = self.running(id).filter(|s| s.moved + u64::from(heavy) >= last);
            let may = seq.filter(|s| self.is_greedy(s.tenant.id, due, shares.crowd));
            // What is copied for it in this pass is lost if that fails, and so must it be.
            may.is_some_and(|s| copies.iter().all(|(_, to)| !s.blocks.contains(to)))
        };
        // What is behind the answers may have become one since, and ends in this step.
        let mut left = batch.answers;
        batch.entries.retain(|entry| {
            let is_answer = left > 0;
            left -= usize::from(is_answer);
            let stands = is_answer && stands(entry.id);
            batch.answers -= usize::from(stands);
            !stands
        });
    }

    /// Some sequences of those that nothing is fetched for, in the order in which they are due.
    pub(super) fn prompts(&self, is_prompt: impl Fn(&Sequence) -> bool) -> Vec<(Turn, SeqId)> {
        let prompts = self.running.iter().filter(|s| !s.is_waiting() && is_prompt(s));
        let mut prompts: Vec<&Sequence> = prompts.collect();
        prompts.sort_by_key(|s| rank(s));
        let mut ahead: BTreeMap<u64, usize> = BTreeMap::new(); // of each tenant
        let due = prompts.into_iter().map(|s| {
            let tokens = ahead.entry(s.tenant.id).or_default();
            *tokens += s.todo();
            (self.tenants.due(s.tenant.id, *tokens), s.id)
        });
        let mut order: Vec<_> = due.collect();
        order.sort_unstable();
        order
    }

    /// Prompts that wait for their first token and may have it soon, of tenants that have no more
    /// than their share. Where one has a queue and others may come, no step is longer for it.
    pub(super) fn prompts_waiting(&self) -> usize {
        match self.is_alone_with_a_queue() {
            Some(_) => 0,
            None => self.tenants.waiting_in_share(self.begun()),
        }
    }

    /// Prompts that run, but for those that something is fetched for.
    fn begun(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().filter(|s| s.todo() > 0 && !s.is_answer() && !s.is_waiting())
    }

    /// Prompts that run, each with the rows that it may have in this batch.
    pub(super) fn line(&self, batch: &Batch) -> Line {
        let mut line = Line::default();
        if self.tenants.waiting().next().is_some() {
            self.running.iter().for_each(|s| line.join(s, self.row_limit(s, batch)));
        }
        line
    }

    /// The tenant whose turn it is, and when its first sequence is due: what is known of its text
    /// need not be computed, and prompts of its own that run are before it, if they rank so.
    pub(super) fn first(&self, line: &Line) -> Option<(Turn, u64)> {
        let block_len = self.config.block_len;
        self.tenants.next(|head| {
            let found = head.found(&self.pool, block_len).len() * block_len;
            let ahead: usize = line.before(head).iter().map(|prompt| prompt.todo).sum();
            head.todo() - found + ahead
        })
    }

    /// Who comes in next, and with what, or why not yet.
    pub(super) fn next(&self, line: &Line, batch: &Batch) -> Option<Next> {
        let (due, tenant) = self.first(line)?;
        let head = self.tenants.front(tenant);
        // Rows that others will have before it; whoever gets none in this step may as well wait.
        let of = |(id, prompts): (&u64, &Vec<Prompt>)| {
            let before = if *id == tenant { line.before(head) } else { prompts };
            let mut tokens = 0;
            let before = before.iter().take_while(|prompt| {
                tokens += prompt.todo;
                self.tenants.due(*id, tokens) <= due
            });
            before.map(|prompt| prompt.rows).sum::<usize>()
        };
        let taken: usize = line.0.iter().map(of).sum();
        let room = match taken + batch.taken.rows >= batch.row_limit {
            true if self.running.len() < self.config.running_len => Err(Later::BatchFull),
            _ => self.room_for(head),
        };
        Some(Next { tenant, due, room })
    }
}

/// Prompts that run, by tenant, and of each in order. It is made once and kept up to date while
/// sequences come in, of which there may be thousands.
#[derive(Default)]
pub(super) struct Line(BTreeMap<u64, Vec<Prompt>>);

struct Prompt {
    rank: Rank,
    /// Rows that are left.
    todo: usize,
    /// Of these, those that it may have now.
    rows: usize,
}

impl Line {
    /// One more, unless it is an answer, or something is fetched for it.
    pub(super) fn join(&mut self, seq: &Sequence, rows: usize) {
        if seq.is_answer() || seq.is_waiting() {
            return;
        }
        let prompts = self.0.entry(seq.tenant.id).or_default();
        let rank = rank(seq);
        let place = prompts.partition_point(|prompt| prompt.rank < rank);
        prompts.insert(place, Prompt { rank, todo: seq.todo(), rows });
    }

    /// Those of its tenant that come before one that waits.
    fn before(&self, head: &Sequence) -> &[Prompt] {
        let Some(own) = self.0.get(&head.tenant.id) else { return &[] };
        &own[..own.partition_point(|prompt| prompt.rank < rank(head))]
    }
}

type Rank = (Reverse<Priority>, SeqId);

/// Who comes first within a tenant.
fn rank(seq: &Sequence) -> Rank {
    (Reverse(seq.priority), seq.id)
}
