//! What the next step computes: a pure value.
//!
//! `schedule()` picks rows, `update()` takes what they gave, `finish()` frees a sequence. Between
//! the two `launch()` says that a batch flies: then the next one may be scheduled before its
//! results are here, see [`Scheduler::runs_on`]. No model, no clock, no thread: everything here is
//! tested with numbers alone. Every sequence is the same thing in a different place: `computed` of
//! its `tokens` have their KV in `blocks`, the rest is still to do. A new prompt has much to do, a
//! running answer one token, a preempted sequence all of it again.
//!
//! Policy, in this order: rows that yield a token of a running answer; then new sequences come in
//! while blocks last; then rows of prompts, as many as keep the step within its time; then, if
//! there is room in all of that, rows of tokens that were proposed. Whose turn it is among new
//! ones and prompts, `fair` says. When blocks run out, the youngest sequence of the tenant with the
//! most gives its own back and waits again at its old place; and so it does for a tenant that has
//! less, and whose turn it is. Who is set aside is not here until it is brought back (`aside`).

mod admit;
mod aside;
mod batch;
mod check;
mod fair;
#[cfg(test)]
mod fair_tests;
#[cfg(test)]
mod flight_tests;
mod forecast;
#[cfg(test)]
mod greedy_tests;
mod interject;
mod keep;
mod lengths;
mod load;
mod order;
mod outlook;
#[cfg(test)]
mod outlook_tests;
mod pace;
mod sequence;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trace_tests;

use std::collections::BTreeSet;
use std::time::Duration;

pub use batch::{Admit, Batch, Entry, Later, Proposal};
pub use load::Load;
pub use outlook::{Newcomer, Outlook};
pub use sequence::{NewSequence, Sequence};

use self::fair::Tenants;
use self::lengths::Lengths;
use self::pace::Pace;
use crate::kv::{Before, BlockPool, Kept};
use crate::types::{BlockId, SeqId, TokenId};

/// Bounds. All positive.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerConfig {
    /// Blocks of the pool.
    pub block_count: usize,
    /// Tokens of a block.
    pub block_len: usize,
    /// Rows of one batch; at least `running_len`, so that every answer moves in every step.
    pub batch_tokens: usize,
    /// Sequences that may hold blocks at once.
    pub running_len: usize,
    /// Rows of one sequence in one batch when the logits of all of them are wanted.
    pub score_chunk: usize,
    /// Rows of proposed tokens in one batch: each costs a vocabulary of floats.
    pub proposed_rows: usize,
    /// How long a step with answers should take, or up to twice as long where more prompts wait
    /// than answers run; prompts are cut accordingly.
    pub target_ms: f64,
    /// What a proposed row costs, see [`Scheduler::price`]; `None`: as it is measured.
    pub price: Option<f64>,
    /// Fewer kept blocks in a row are computed sooner than fetched.
    pub load_blocks_min: usize,
    /// So many new blocks of a prompt are kept as soon as they are known; `None`: none ever is.
    pub keep_blocks_min: Option<usize>,
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    pace: Pace,
    lengths: Lengths,
    /// Sequences without blocks: by whose turn it is, and those that stand aside.
    tenants: Tenants,
    /// Sequences with blocks, in order of id.
    running: Vec<Sequence>,
    /// Steps so far.
    steps: u64,
    /// The last ticket of a load.
    loads: u64,
}

/// Known blocks, and the place after each.
type Found = Vec<(BlockId, Before)>;

impl Scheduler {
    /// Nothing waits, nothing runs.
    pub fn new(config: SchedulerConfig) -> Self {
        assert!(config.batch_tokens >= config.running_len && config.score_chunk > 0);
        let pool = BlockPool::new(config.block_count).keeping(config.keep_blocks_min);
        let pace = Pace::new(config.target_ms);
        let (tenants, running, lengths) = (Tenants::default(), Vec::new(), Lengths::default());
        Self { config, pool, pace, lengths, tenants, running, steps: 0, loads: 0 }
    }

    /// The same bounds, with nothing in it.
    pub fn emptied(&self) -> Self {
        Self { loads: self.loads, ..Self::new(self.config) }
    }

    /// Takes a sequence. It must fit into the pool on its own: the engine refuses others. Ids may
    /// come in another order than they were given, from threads that submit at once.
    pub fn add(&mut self, new: NewSequence) {
        assert!(!new.prompt.is_empty(), "an empty prompt has no row; this is a bug");
        let mut seq = Sequence::new(new);
        self.lengths.came(seq.prompt_len, seq.look_ahead(&self.pool, self.config.block_len));
        self.tenants.enter(seq);
    }

    /// Sequences that would go on with one row.
    pub fn answers(&self) -> Vec<SeqId> {
        self.running.iter().filter(|s| s.is_answer()).map(|s| s.id).collect()
    }

    /// What a proposed row costs, as a part of what a token costs without: a proposal that is right
    /// less often than that is not worth its row. Where proposals have no rows, none is.
    pub fn price(&self) -> f64 {
        if self.config.proposed_rows == 0 {
            return f64::INFINITY;
        }
        let answers = self.running.iter().filter(|s| s.is_answer()).count();
        self.config.price.unwrap_or_else(|| self.pace.price(answers))
    }

    /// Picks the rows of the next step and gives them their blocks. Text that is kept somewhere is
    /// waited for, not computed.
    pub fn schedule(&mut self, now: Duration, proposals: &[Proposal], kept: &dyn Kept) -> Batch {
        let mut batch = Batch { row_limit: self.config.batch_tokens, ..Batch::default() };
        batch.expired = self.tenants.expire(now);
        self.pace.see(self.tenants.foreground(), now);
        self.make_way(&mut batch);
        let answers = self.answers();
        self.give_to_answers(&answers, &mut batch);
        batch.answers = batch.taken.rows;
        let rows = match self.tenants.in_foreground() {
            true => self.pace.prompt_rows(batch.answers, self.prompts_waiting()),
            false => self.pace.background_rows(batch.answers),
        };
        let rows = batch.answers.saturating_add(rows);
        batch.row_limit = rows.min(self.config.batch_tokens);
        batch.admit = self.admit(&batch);
        self.give_to_prompts(&answers, kept, &mut batch);
        self.give_to_proposals(proposals, &mut batch);
        batch.forgotten = self.pool.take_forgotten();
        batch
    }

    /// A batch is asked for, and the next one may be scheduled before its results are here. Those
    /// who `go_on` get their token where the next pass can read it before anybody knows it; for
    /// others that want one, nothing more is scheduled until then. Batches are computed in order,
    /// so blocks that are freed meanwhile may be in a later one: its rows come after all that an
    /// earlier one reads or writes.
    pub fn launch(&mut self, batch: &Batch, go_on: &[SeqId]) {
        let go_on: BTreeSet<SeqId> = go_on.iter().copied().collect();
        let step = self.steps + 1 + u64::from(self.flies());
        for entry in &batch.entries {
            let Some(place) = self.place(entry.id) else { continue };
            let goes_on = entry.samples && go_on.contains(&entry.id);
            self.running[place].launch(entry, goes_on);
            self.running[place].moved = step;
        }
    }

    /// Whether it is of use to schedule a step while this batch flies: somebody goes on, no fork
    /// begins, and nobody waits for blocks that others have to give.
    pub fn runs_on(&self, batch: &Batch) -> bool {
        let goes_on = self.running.iter().any(|s| s.unknown > 0);
        goes_on && batch.fork_count() == 0 && !batch.short
    }

    /// Takes the results of a step: all its rows are computed, some sequences got a token, and it
    /// took so long. Tokens of one sequence stand together, the proposed ones that were right
    /// before the last; rows behind them are of another text, and their blocks are given back.
    pub fn update(&mut self, batch: &Batch, sampled: &[(SeqId, TokenId)], took_ms: f64) {
        self.steps += 1;
        let proposed = batch.proposed_count();
        let prompt_rows = batch.row_count() - batch.answers - proposed;
        self.pace.learn(batch.answers, proposed, prompt_rows, took_ms);
        self.pace.passed(batch.apart, took_ms);
        let given = || sampled.chunk_by(|a, b| a.0 == b.0).filter_map(<[_]>::split_last);
        for (_, right) in given() {
            right.iter().for_each(|&(id, token)| self.append(id, token));
        }
        for entry in &batch.entries {
            let Some(place) = self.place(entry.id) else { continue };
            let wanted = self.blocks_wanted(&self.running[place]);
            let seq = &mut self.running[place];
            seq.land(entry);
            seq.publish(&mut self.pool, self.config.block_len);
            seq.give_back(wanted, &mut self.pool);
            seq.moved = self.steps.max(seq.moved); // rows of it may fly already
            self.tenants.charge(seq.tenant.id, seq.computed - entry.start);
            self.begin_forks(place, &entry.forks);
        }
        given().for_each(|(&(id, token), _)| self.append(id, token));
        self.tenants.settle();
    }

    fn append(&mut self, id: SeqId, token: TokenId) {
        if let Some(place) = self.place(id) {
            let seq = &mut self.running[place];
            self.lengths.grew(seq.answered());
            seq.tokens.push(token);
        }
    }

    /// Forgets a sequence, wherever it is, and frees its blocks.
    pub fn finish(&mut self, id: SeqId) {
        let gone = match self.place(id) {
            Some(place) => Some(self.stop(place)),
            None => self.tenants.remove(id),
        };
        if let Some(seq) = gone.as_ref().filter(|seq| seq.answered() > 0) {
            self.lengths.is_over(seq.answered(), seq.answer_max);
        }
        if gone.is_none() {
            let everybody = self.running.iter_mut().chain(self.tenants.waiting_mut());
            everybody.for_each(|s| s.forks.retain(|fork| *fork != id));
        }
        if let Some(heir) = gone.and_then(|mut seq| seq.heir()) {
            self.tenants.enter(heir);
        }
        self.tenants.settle();
    }

    /// A sequence that holds blocks.
    pub fn running(&self, id: SeqId) -> Option<&Sequence> {
        self.place(id).map(|place| &self.running[place])
    }

    /// Sequences without blocks.
    pub fn waiting_count(&self) -> usize {
        let waiting = self.tenants.waiting().map(|s| 1 + s.forks.len());
        let forks = self.running.iter().map(|s| s.forks.len());
        waiting.chain(forks).sum()
    }

    /// Sequences with blocks.
    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    /// Blocks that are held.
    pub fn used_blocks(&self) -> usize {
        self.pool.block_count() - self.pool.free_count()
    }

    /// The blocks: how many are free, known, evicted.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Nothing to do, now or later.
    pub fn is_empty(&self) -> bool {
        self.waiting_count() == 0 && self.running.is_empty() && self.tenants.aside().count() == 0
    }

    fn place(&self, id: SeqId) -> Option<usize> {
        self.running.binary_search_by_key(&id, |s| s.id).ok()
    }

    /// One row for every answer, oldest first; for some answers of those who have too much only
    /// now and then.
    fn give_to_answers(&mut self, answers: &[SeqId], batch: &mut Batch) {
        let slow = self.slow_answers();
        for &id in answers.iter().filter(|id| slow.binary_search(id).is_err()) {
            if self.grow(id, batch)
                && let Some(seq) = self.running(id)
            {
                batch.push(seq, 1, 0);
            }
        }
    }

    /// Rows for all that are no answers, by when they are due.
    fn give_to_prompts(&mut self, answers: &[SeqId], kept: &dyn Kept, batch: &mut Batch) {
        let order = self.prompts(|s| answers.binary_search(&s.id).is_err());
        let loading = self.loading_count() > 0;
        let mut share = self.shares(answers.len(), batch);
        for (due, id) in order {
            let place = self.place(id).expect("it runs, and nobody stops it; this is a bug");
            let seq = &mut self.running[place];
            // Somebody may have computed meanwhile what comes next in it.
            let found = seq.found(&self.pool, self.config.block_len);
            seq.adopt(&found, &mut self.pool, self.config.block_len);
            if self.waits_for_kept(place, kept, loading, batch) {
                continue;
            }
            let bound = self.bound(&share, self.running[place].tenant.id);
            let rows = self.give_rows(place, bound, batch);
            if rows > 0 {
                self.take(&mut share, place, due, rows);
            }
        }
        self.stand_back(&share, answers.len(), batch);
    }

    /// Rows of a prompt, as many as it may have.
    fn give_rows(&mut self, place: usize, bound: usize, batch: &mut Batch) -> usize {
        if self.row_limit(&self.running[place], batch).min(bound) == 0 {
            return 0;
        }
        let seq = &mut self.running[place];
        batch.copies.extend(seq.begin_alike(&mut self.pool, self.config.block_len));
        let seq = &self.running[place];
        let rows = self.row_limit(seq, batch).min(bound);
        batch.push(seq, rows, self.fork_room(seq, batch));
        rows
    }

    /// What room is left goes to answers that may go on in a known way. Nobody waits for these
    /// rows, and nobody gives a block for them.
    fn give_to_proposals(&mut self, proposals: &[Proposal], batch: &mut Batch) {
        let rows = batch.row_limit.saturating_sub(batch.taken.rows);
        let mut room = rows.min(self.config.proposed_rows);
        for proposal in proposals {
            let Some(place) = self.place(proposal.id) else { continue };
            let seq = &mut self.running[place];
            // Answers come first, in order of id, with a row each.
            let answers = &mut batch.entries[..batch.answers];
            let Ok(entry) = answers.binary_search_by_key(&proposal.id, |entry| entry.id) else {
                continue;
            };
            let entry = &mut answers[entry];
            if seq.flying > 0 {
                continue;
            }
            let certain = entry.rows;
            for &token in proposal.tokens.iter().take(room) {
                let last = (entry.start + entry.rows) / self.config.block_len;
                if last == seq.blocks.len() {
                    let Some(block) = self.pool.allocate() else { break };
                    seq.blocks.push(block);
                }
                entry.proposed.push(token);
                entry.rows += 1;
            }
            room -= entry.rows - certain;
            batch.taken.rows += entry.rows - certain;
        }
    }

    /// Rows that this sequence may have in this batch. Rows whose logits are read are bounded over
    /// the whole batch: each costs a vocabulary of floats.
    fn row_limit(&self, seq: &Sequence, batch: &Batch) -> usize {
        let rows = seq.todo().min(batch.row_limit - batch.taken.rows);
        if !seq.score || seq.scored >= seq.prompt_len {
            return rows;
        }
        let again = seq.scored.saturating_sub(seq.start());
        rows.min(again + self.config.score_chunk - batch.taken.scores)
    }

    /// Forks that may begin to run with this step.
    fn fork_room(&self, seq: &Sequence, batch: &Batch) -> usize {
        let slots = self.config.running_len.saturating_sub(self.running.len());
        slots.min(self.tenants.room(seq.tenant.id)).saturating_sub(batch.taken.forks)
    }

    /// The prompt of the sequence at `place` is computed for these too. Those for whom there was
    /// no room come later, and find it in the cache.
    fn begin_forks(&mut self, place: usize, forks: &[SeqId]) {
        let leader = &mut self.running[place];
        if leader.computed < leader.prompt_len {
            return;
        }
        leader.forks.retain(|id| !forks.contains(id));
        let heir = leader.heir();
        let leader = &self.running[place];
        let (pool, block_len) = (&mut self.pool, self.config.block_len);
        let begun: Vec<_> = forks.iter().map(|&id| leader.fork(id, pool, block_len)).collect();
        for fork in begun {
            self.tenants.forked(fork.tenant.id);
            self.start(fork);
        }
        if let Some(heir) = heir {
            self.tenants.enter(heir);
        }
    }

    /// Blocks of all its tokens and the next one, so that only answers ever need more.
    fn blocks_wanted(&self, seq: &Sequence) -> usize {
        (seq.tokens.len() + usize::from(seq.answer_max > 0)).div_ceil(self.config.block_len)
    }

    /// Makes sure that an answer has a block of its own for its newest token, taking blocks from
    /// others where it must. False when it does not run (any more).
    fn grow(&mut self, id: SeqId, batch: &mut Batch) -> bool {
        loop {
            let Some(place) = self.place(id) else { return false };
            let seq = &mut self.running[place];
            let tail = seq.start() / self.config.block_len;
            match seq.blocks.get(tail).copied() {
                Some(block) if self.pool.is_private(block) => return true,
                shared => match (self.pool.allocate(), shared) {
                    (Some(block), None) => seq.blocks.push(block),
                    (Some(block), Some(shared)) => {
                        seq.blocks[tail] = block;
                        self.pool.release(shared);
                        batch.copies.push((shared, block));
                    }
                    (None, _) if self.flies() => {
                        batch.short = true;
                        return false;
                    }
                    (None, _) => {
                        let largest = self.tenants.largest();
                        self.preempt_youngest(largest, batch);
                    }
                },
            }
        }
    }

    /// Rows of somebody fly. Nobody is sent back meanwhile: whoever waits has all its tokens.
    fn flies(&self) -> bool {
        self.running.iter().any(|s| s.flying > 0)
    }

    /// It runs from now on; preempted ones come back with ids older than some that run.
    fn start(&mut self, seq: Sequence) -> usize {
        let place = self.running.partition_point(|s| s.id < seq.id);
        self.running.insert(place, seq);
        place
    }

    /// It does not run any more, and its blocks are free.
    fn stop(&mut self, place: usize) -> Sequence {
        let mut seq = self.running.remove(place);
        seq.release(&mut self.pool, self.config.block_len);
        self.tenants.left(seq.tenant.id);
        seq
    }
}
