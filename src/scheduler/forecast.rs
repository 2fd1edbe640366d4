//! How long a newcomer waits: what the scheduler will do, in its order, with means instead of
//! tokens.
//!
//! Prompts are computed one after the other by when they are due, as many rows in a step as the
//! pace allows; answers go on by a token in each step; a place, or blocks, are free when an answer
//! is over, and the tenant whose turn it is takes them, or takes them from one with too much. So it
//! goes from one of these events to the next, and stops when the newcomer has its first row. Of
//! thousands who wait, rich are taken for one that is so much longer: there is a bound to the
//! events. Deliberately absent: what only moves some milliseconds (answers that stand still, rows
//! of guesses, a step's own end), and what nobody knows (who comes later).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::outlook::{Begun, Class, Outlook, Party};

/// Of so many who wait, each stands for itself.
const ALONE: f64 = 96.0;
/// More than these are not followed; the wait is at least as long as up to there.
const EVENTS_MAX: usize = 4096;
/// Rows of what lost its place and comes back to its own blocks.
const AGAIN: f64 = 16.0;

/// In the background or not, and when it is due.
type Turn = (bool, u64);

/// The state, from event to event.
pub(super) struct Forecast {
    out: Outlook,
    /// The tenant of the newcomer, who is the last of it; or who comes behind all others.
    own: Option<usize>,
    /// How many go as one.
    bulk: f64,
    jobs: Vec<Job>,
    /// Prompts by when they are due; answers by when they are over; tenants by whose turn it is.
    prompts: BinaryHeap<Reverse<(Turn, usize)>>,
    answers: BinaryHeap<Reverse<(u64, usize)>>,
    line: BinaryHeap<Reverse<(Turn, usize)>>,
    sides: Vec<Side>,
    /// Tenants that have more than they keep, or had.
    rich: Vec<usize>,
    answering: usize,
    running: usize,
    /// Events that are still followed.
    left: usize,
    /// Steps so far, and time.
    step: f64,
    ms: f64,
}

/// One who runs.
struct Job {
    begun: Begun,
    /// It is the newcomer.
    is_own: bool,
    /// The step in which its answer ends, once it has begun.
    end: Option<f64>,
    is_gone: bool,
}

/// What is counted of a tenant beside what the outlook knows.
#[derive(Clone, Copy, Default)]
struct Side {
    answers: usize,
    /// Its time has the tokens of its answers up to this step.
    settled: f64,
    /// Rows of its prompts that run.
    ahead: f64,
}

impl Forecast {
    pub fn new(mut out: Outlook, own: Option<usize>) -> Self {
        let waiting = out.parties.iter().flat_map(|p| &p.waiting).map(|c| c.count).sum::<f64>();
        let begun = std::mem::take(&mut out.begun);
        let sides = vec![Side::default(); out.parties.len()];
        let mut all = Self {
            own,
            bulk: (waiting / ALONE).ceil().max(1.0),
            jobs: Vec::with_capacity(begun.len()),
            prompts: BinaryHeap::new(),
            answers: BinaryHeap::new(),
            line: BinaryHeap::new(),
            sides,
            rich: (0..out.parties.len()).filter(|&i| out.parties[i].may_yield()).collect(),
            answering: 0,
            running: 0,
            left: EVENTS_MAX,
            step: 0.0,
            ms: 0.0,
            out,
        };
        // In the order in which they are due within a tenant.
        let mut order: Vec<Begun> = begun;
        order.sort_by_key(|job| Reverse(job.priority));
        order.into_iter().for_each(|begun| all.start(begun, false));
        (0..all.out.parties.len()).for_each(|party| all.stand_in_line(party));
        all
    }

    /// Milliseconds until the newcomer has a row; `None` where that takes time and nothing is
    /// known of what takes how long.
    pub fn run(mut self) -> Option<f64> {
        while self.left > 0 {
            self.left -= 1;
            self.admit();
            let next = self.prompts.peek().map(|Reverse((turn, job))| (*turn, *job));
            let is_own = next.is_some_and(|(_, job)| self.jobs[job].is_own);
            // Whoever comes behind all others comes before those in the background.
            let (waits, prompts) =
                (self.line.peek(), next.filter(|((background, _), _)| !background));
            let waits = waits.is_some_and(|Reverse(((background, _), _))| !background);
            let is_last = self.own.is_none() && !waits && prompts.is_none();
            if is_own || is_last && self.running < self.out.running_len {
                break;
            }
            if !self.go_on(next.map(|(_, job)| job))? {
                break;
            }
        }
        Some(self.ms)
    }

    /// To the end of the prompt that is next, or of the answer that is. False where there is
    /// neither; `None` where nobody knows how long it takes.
    fn go_on(&mut self, prompt: Option<usize>) -> Option<bool> {
        self.out.curve.as_ref()?;
        let step_ms = self.out.pace.step_ms(self.answering, 0);
        let answer = loop {
            match self.answers.peek() {
                Some(&Reverse((_, job))) if self.jobs[job].is_gone => drop(self.answers.pop()),
                next => break next.map(|Reverse((_, job))| *job),
            }
        };
        let until_answer = answer.and_then(|job| self.jobs[job].end).map(|end| end - self.step);
        let rows = prompt.map(|job| (job, self.rows(self.jobs[job].begun.party)));
        let until_prompt = rows.map(|(job, rows)| self.jobs[job].begun.prompt / rows);
        let steps = match (until_prompt, until_answer) {
            (None, None) => return Some(false),
            (a, b) => a.unwrap_or(f64::INFINITY).min(b.unwrap_or(f64::INFINITY)).max(0.0),
        };
        let rows_ms = rows.map_or(Some(0.0), |(_, rows)| self.out.pace.rows_ms(rows))?;
        self.ms += steps * (step_ms + rows_ms);
        self.step += steps;
        if let Some((job, rows)) = rows {
            self.compute(job, rows * steps);
        }
        if let Some(job) = answer
            && self.jobs[job].end.is_some_and(|end| end <= self.step + 1e-6)
        {
            self.end(job);
        }
        Some(true)
    }

    /// Rows of a prompt; with its last one its answer begins.
    fn compute(&mut self, job: usize, rows: f64) {
        let Begun { party, prompt, answer, .. } = &mut self.jobs[job].begun;
        let (party, answer, done) = (*party, *answer, rows.min(*prompt));
        *prompt -= done;
        let is_done = *prompt < 1e-6;
        self.sides[party].ahead -= done;
        let Party { time, weight, .. } = &mut self.out.parties[party];
        *time += done / *weight;
        if is_done {
            self.prompts.pop();
            self.answer(job, answer);
        }
    }

    fn answer(&mut self, job: usize, answer: f64) {
        let end = self.step + answer;
        let party = self.jobs[job].begun.party;
        self.jobs[job].end = Some(end);
        self.settle(party);
        self.sides[party].answers += 1;
        self.answering += 1;
        self.answers.push(Reverse((key(end), job)));
    }

    /// An answer is over, or has to come again.
    fn end(&mut self, job: usize) {
        let Job { begun: Begun { party, held, .. }, is_gone, .. } = &mut self.jobs[job];
        let (party, held) = (*party, *held);
        *is_gone = true;
        self.settle(party);
        self.sides[party].answers -= 1;
        self.answering -= 1;
        self.running -= 1;
        self.out.free_tokens += held;
        let Party { running, room, .. } = &mut self.out.parties[party];
        *running -= 1;
        *room = room.saturating_add(1);
        if *room == 1 {
            self.stand_in_line(party);
        }
    }

    /// Its answers have moved meanwhile, each by a token in each step.
    fn settle(&mut self, party: usize) {
        let (side, of) = (&mut self.sides[party], &mut self.out.parties[party]);
        of.time += side.answers as f64 * (self.step - side.settled) / of.weight;
        side.settled = self.step;
    }

    /// Lets in who is next as long as there is room, or somebody makes room.
    fn admit(&mut self) {
        while self.left > 0
            && let Some((turn, party)) = self.next()
        {
            self.left -= 1;
            let Class { prompt, answer, priority, count } = self.out.parties[party].waiting[0];
            if self.running >= self.out.running_len || prompt > self.out.free_tokens {
                match self.must_yield(party, turn) {
                    Some(job) => self.take_place(job),
                    None => return,
                }
                continue;
            }
            self.line.pop();
            let waiting = &mut self.out.parties[party].waiting;
            let is_own = self.own == Some(party) && waiting.len() == 1 && count <= 1.0;
            let mut some = self.bulk.min(count);
            if some >= count {
                waiting.remove(0);
            } else {
                waiting[0].count -= some;
            }
            some = some.max(1.0);
            let of = &mut self.out.parties[party];
            (of.running, of.room) = (of.running + 1, of.room.saturating_sub(1));
            if of.may_yield() && !self.rich.contains(&party) {
                self.rich.push(party);
            }
            let held = prompt + answer / 2.0;
            self.out.free_tokens -= held;
            let (prompt, answer) = (some * prompt, some * answer);
            self.start(Begun { party, priority, prompt, answer, held }, is_own);
            self.stand_in_line(party);
        }
    }

    /// It runs: with its prompt, when that is due; or with its answer.
    fn start(&mut self, begun: Begun, is_own: bool) {
        let Begun { party, prompt, answer, .. } = begun;
        let job = self.jobs.len();
        self.jobs.push(Job { begun, is_own, end: None, is_gone: false });
        self.running += 1;
        if prompt > 0.0 {
            self.sides[party].ahead += prompt;
            let turn = self.due(party, 0.0);
            self.prompts.push(Reverse((turn, job)));
        } else {
            self.answer(job, answer);
        }
    }

    /// The tenant whose turn it is. Times only go on, so what stands in the line is no later.
    fn next(&mut self) -> Option<(Turn, usize)> {
        loop {
            let &Reverse((stood, party)) = self.line.peek()?;
            let of = &self.out.parties[party];
            let first = of.waiting.first().filter(|_| of.room > 0);
            let Some(prompt) = first.map(|class| class.prompt) else {
                self.line.pop();
                continue;
            };
            let turn = self.due(party, prompt);
            if turn <= stood {
                return Some((turn, party));
            }
            self.line.pop();
            self.line.push(Reverse((turn, party)));
        }
    }

    fn stand_in_line(&mut self, party: usize) {
        let first = self.out.parties[party].waiting.first();
        if let Some(prompt) = first.map(|class| class.prompt) {
            let turn = self.due(party, prompt);
            self.line.push(Reverse((turn, party)));
        }
    }

    /// When a prompt of a tenant is due, behind those of it that run.
    fn due(&mut self, party: usize, prompt: f64) -> Turn {
        self.settle(party);
        let (of, side) = (&self.out.parties[party], &self.sides[party]);
        (of.background, key(of.time + (side.ahead + prompt) / of.weight))
    }

    /// The youngest of the tenant that has to make way for one of another that is due then.
    fn must_yield(&mut self, party: usize, due: Turn) -> Option<usize> {
        let mut most: Option<(bool, f64, usize)> = None;
        for i in 0..self.rich.len() {
            let other = self.rich[i];
            self.settle(other);
            let (theirs, own) = (&self.out.parties[other], &self.out.parties[party]);
            let share = theirs.running as f64 / theirs.weight;
            let more = share > (own.running + 1) as f64 / own.weight;
            let yields = theirs.may_yield() && other != party;
            let beyond = (theirs.background, key(theirs.time)) > due;
            let candidate = (theirs.background, share, other);
            if yields && beyond && (more || theirs.background != own.background) {
                most = Some(most.map_or(candidate, |m| if m >= candidate { m } else { candidate }));
            }
        }
        let (_, _, other) = most?;
        self.jobs.iter().rposition(|job| {
            job.begun.party == other && !job.is_gone && job.end.is_some() && !job.is_own
        })
    }

    /// It waits again, before others of its tenant.
    fn take_place(&mut self, job: usize) {
        let left = self.jobs[job].end.map_or(0.0, |end| (end - self.step).max(1.0));
        let Begun { party, priority, .. } = self.jobs[job].begun;
        self.end(job);
        let again = Class { priority, count: 1.0, prompt: AGAIN, answer: left };
        self.out.parties[party].waiting.insert(0, again);
        self.stand_in_line(party);
    }

    /// Rows of a tenant's prompts in a step.
    fn rows(&self, party: usize) -> f64 {
        let of = &self.out.parties[party];
        let rows = self.out.pace.prompt_rows(self.answering, self.out.prompts_waiting);
        let rows = rows.min(self.out.batch_tokens.saturating_sub(self.answering)).max(1);
        let free = self.out.running_len.saturating_sub(self.answering);
        let spread = self.out.pace.spread_rows(self.answering, free);
        let is_queueing = !of.waiting.is_empty() && self.out.parties.len() > 1;
        let running = of.running * self.out.parties.len() >= self.running;
        let rows = if is_queueing && running { rows.min(spread) } else { rows };
        rows as f64
    }
}

/// Non-negative numbers in their order.
fn key(value: f64) -> u64 {
    (value.max(0.0) * 1024.0) as u64
}
