//! What somebody who comes in has before it: the part of the scheduler's state from which a wait
//! follows, as a value that can be handed to those who let others in.
//!
//! It is made now and then, and whoever came in since stands in it too ([`Outlook::enter`]). Of
//! each tenant the first few who wait are in it one by one, and those behind them as so many of the
//! mean: so neither making it nor asking it takes longer with every one who waits. What follows
//! from it says `forecast`.

use std::time::Duration;

use super::forecast::Forecast;
use super::lengths::Curve;
use super::pace::Pace;
use super::{Batch, Scheduler, Sequence};
use crate::types::{Priority, Tenant};

/// Somebody who comes in, with `count` answers to one prompt.
#[derive(Clone, Debug)]
pub struct Newcomer {
    /// On whose account it is to run.
    pub tenant: Tenant,
    /// Its place among the tenant's others.
    pub priority: Priority,
    /// Tokens.
    pub prompt: usize,
    /// Tokens that each answer may have.
    pub answer_max: usize,
    /// Answers.
    pub count: usize,
}

/// Who is here, and how fast it goes. Time is the scheduler's.
#[derive(Clone, Debug)]
pub struct Outlook {
    /// When it was made. A step began, which takes so long.
    at: Duration,
    step_ms: f64,
    pub(super) pace: Pace,
    /// `None` while no answer is over.
    pub(super) curve: Option<Curve>,
    /// The part of a prompt that is probably new.
    new_part: f64,
    pub(super) running_len: usize,
    pub(super) batch_tokens: usize,
    /// Tokens for which there are blocks.
    pub(super) free_tokens: f64,
    /// Prompts of which those who answer take notice.
    pub(super) prompts_waiting: usize,
    /// The clocks of tenants in the foreground, and in the background.
    pub(super) clocks: [f64; 2],
    /// Ahead of its clock by so much less is who comes back.
    pub(super) credit: f64,
    pub(super) parties: Vec<Party>,
    pub(super) begun: Vec<Begun>,
}

/// A tenant.
#[derive(Clone, Debug)]
pub(super) struct Party {
    pub id: u64,
    pub background: bool,
    pub weight: f64,
    /// Virtual time, in tokens.
    pub time: f64,
    /// How many of it run,
    pub running: usize,
    /// and how many more may.
    pub room: usize,
    /// In the order in which they come in.
    pub waiting: Vec<Class>,
}

impl Party {
    /// Whether one of it may have to make way: a tenant keeps one, unless it is in the background.
    pub fn may_yield(&self) -> bool {
        self.running > usize::from(!self.background)
    }
}

/// Some of a tenant who wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Class {
    pub priority: Priority,
    pub count: f64,
    /// Tokens that are to be computed before the first of an answer, for each,
    pub prompt: f64,
    /// and that follow.
    pub answer: f64,
}

/// One who runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    /// Index of its tenant.
    pub party: usize,
    pub priority: Priority,
    /// Rows of its prompt that are left,
    pub prompt: f64,
    /// and tokens of its answer.
    pub answer: f64,
    /// Tokens for which it holds blocks that nobody else has computed.
    pub held: f64,
}

/// So many of a tenant who wait stand for themselves.
const HEADS: usize = 8;

impl Scheduler {
    /// What a newcomer has before it, now that this batch is being computed.
    pub fn outlook(&self, now: Duration, batch: &Batch) -> Outlook {
        let prompt_rows = batch.row_count() - batch.answers - batch.proposed_count();
        let curve = self.lengths.curve();
        let (clocks, credit) = self.tenants.clocks();
        let left =
            |len: usize, max: usize| curve.as_ref().map_or(0.0, |curve| curve.left(len, max));
        let mut parties: Vec<Party> = self.tenants.standings().collect();
        for party in &mut parties {
            let waiting = self.tenants.queue(party.id);
            let classes = waiting.flat_map(|s| classes(s, &left));
            classes.for_each(|class| party.push(class));
        }
        let begun = self.running.iter().filter_map(|s| {
            let party = parties.binary_search_by_key(&s.tenant.id, |party| party.id).ok()?;
            let prompt = if s.is_answer() { 0.0 } else { s.todo() as f64 };
            let held = (s.blocks.len() * self.config.block_len).saturating_sub(s.cached());
            let answer = left(s.answered(), s.answer_max);
            Some(Begun { party, priority: s.priority, prompt, answer, held: held as f64 })
        });
        Outlook {
            at: now,
            step_ms: self.pace.step_ms(batch.answers, prompt_rows),
            pace: self.pace.calm(),
            new_part: self.lengths.new_part(),
            running_len: self.config.running_len,
            batch_tokens: self.config.batch_tokens,
            free_tokens: (self.pool.free_count() * self.config.block_len) as f64,
            prompts_waiting: self.prompts_waiting(),
            clocks,
            credit,
            begun: begun.collect(),
            curve,
            parties,
        }
    }
}

/// One who waits, and those who wait for its prompt.
fn classes(s: &Sequence, left: impl Fn(usize, usize) -> f64) -> impl Iterator<Item = Class> {
    let answer = left(s.answered(), s.answer_max);
    let prompt = s.todo().saturating_sub(s.known_len).max(1) as f64;
    Class { priority: s.priority, count: 1.0, prompt, answer }.with_forks(s.forks.len())
}

impl Class {
    /// Those who wait for the same prompt have one row of it each.
    fn with_forks(self, count: usize) -> impl Iterator<Item = Self> {
        let forks = (count > 0).then_some(Self { count: count as f64, prompt: 1.0, ..self });
        std::iter::once(self).chain(forks)
    }

    fn add(&mut self, other: &Self) {
        let count = self.count + other.count;
        let mean = |a: f64, b: f64| (a * self.count + b * other.count) / count;
        self.prompt = mean(self.prompt, other.prompt);
        self.answer = mean(self.answer, other.answer);
        self.count = count;
    }
}

impl Party {
    /// Some more, behind all who are not less urgent.
    fn push(&mut self, class: Class) {
        let place = self.waiting.partition_point(|other| other.priority >= class.priority);
        let before = self.waiting[..place].last_mut().filter(|b| b.priority == class.priority);
        match before {
            Some(before) if place >= HEADS => before.add(&class),
            _ => self.waiting.insert(place, class),
        }
    }

    /// Nobody of it was here.
    fn new(tenant: Tenant) -> Self {
        let weight = f64::from(tenant.weight.max(1));
        let room = tenant.max_running.unwrap_or(usize::MAX);
        let (id, background) = (tenant.id, tenant.background);
        Self { id, background, weight, time: 0.0, running: 0, room, waiting: Vec::new() }
    }
}

impl Outlook {
    /// Somebody came in since.
    pub fn enter(&mut self, newcomer: &Newcomer) {
        let class = self.class(newcomer);
        let party = self.party(newcomer.tenant);
        let classes = class.with_forks(newcomer.count.saturating_sub(1));
        classes.for_each(|class| self.parties[party].push(class));
    }

    /// Everybody who was here has gone.
    pub fn empty(&mut self) {
        self.begun.clear();
        for party in &mut self.parties {
            party.waiting.clear();
            party.room = party.room.saturating_add(std::mem::take(&mut party.running));
        }
        self.step_ms = 0.0;
    }

    /// How long it takes until rows of this one are computed, which comes in now and does not stand
    /// in it yet; `None` while nothing is known of that.
    pub fn wait(&self, newcomer: &Newcomer, now: Duration) -> Option<Duration> {
        let mut all = self.clone();
        let class = all.class(newcomer);
        let party = all.party(newcomer.tenant);
        // Who is less urgent is not before it.
        all.parties[party].waiting.retain(|other| other.priority >= class.priority);
        all.parties[party].waiting.push(class);
        self.until(Forecast::new(all, Some(party)).run()?, now)
    }

    /// The same for somebody behind everybody else but those in the background.
    pub fn wait_of_last(&self, now: Duration) -> Option<Duration> {
        self.until(Forecast::new(self.clone(), None).run()?, now)
    }

    /// What is under way is waited for. Where nothing was, there is nothing to wait for.
    fn until(&self, wait_ms: f64, now: Duration) -> Option<Duration> {
        let wait_ms = if self.curve.is_some() { wait_ms.max(self.step_ms) } else { wait_ms };
        let end = self.at.checked_add(Duration::try_from_secs_f64(wait_ms / 1e3).ok()?)?;
        Some(end.saturating_sub(now))
    }

    fn class(&self, newcomer: &Newcomer) -> Class {
        let answer = self.curve.as_ref().map_or(0.0, |curve| curve.left(0, newcomer.answer_max));
        let prompt = (newcomer.prompt as f64 * self.new_part).max(1.0);
        Class { priority: newcomer.priority, count: 1.0, prompt, answer }
    }

    /// Where a tenant stands; who was away comes back as it does for the scheduler.
    fn party(&mut self, tenant: Tenant) -> usize {
        let found = self.parties.iter().position(|party| party.id == tenant.id);
        let i = found.unwrap_or_else(|| {
            self.parties.push(Party::new(tenant));
            self.parties.len() - 1
        });
        let party = &mut self.parties[i];
        if party.running == 0 && party.waiting.is_empty() {
            let clock = self.clocks[usize::from(party.background)];
            party.time = party.time.max(clock - self.credit / party.weight);
        }
        i
    }
}
