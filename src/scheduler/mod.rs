//! What the next step computes: a pure value.
//!
//! `schedule()` picks rows, `update()` takes what they gave, `finish()` frees a sequence. No model,
//! no clock, no thread: everything here is tested with numbers alone. Every sequence is the same
//! thing in a different place: `computed` of its `tokens` have their KV in `blocks`, the rest is
//! still to do. A new prompt has much to do, a running answer one token, a preempted sequence all
//! of it again.
//!
//! Policy, in this order: rows that yield a token of a running answer; then the rest of prompts
//! already begun, oldest first; then new ones, first come first served, while blocks last. When
//! blocks run out the youngest sequence gives its own back and waits again at its old place.

mod batch;
mod sequence;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trace;

use std::collections::VecDeque;

pub use batch::{Admit, Batch, Entry, Later};
pub use sequence::{NewSequence, Sequence};

use crate::kv::{Before, BlockPool};
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
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    /// In order of id.
    waiting: VecDeque<Sequence>,
    /// In order of id.
    running: Vec<Sequence>,
}

impl Scheduler {
    /// Nothing waits, nothing runs.
    pub fn new(config: SchedulerConfig) -> Self {
        assert!(config.batch_tokens >= config.running_len && config.score_chunk > 0);
        let pool = BlockPool::new(config.block_count);
        Self { config, pool, waiting: VecDeque::new(), running: Vec::new() }
    }

    /// The same bounds, with nothing in it.
    pub fn emptied(&self) -> Self {
        Self::new(self.config)
    }

    /// Takes a sequence. It must fit into the pool on its own: the engine refuses others.
    pub fn add(&mut self, new: NewSequence) {
        assert!(!new.prompt.is_empty(), "an empty prompt has no row; this is a bug");
        // Threads that submit at once may hand over their ids in another order.
        let place = self.waiting.partition_point(|s| s.id < new.id);
        self.waiting.insert(place, Sequence::new(new));
    }

    /// Picks the rows of the next step and gives them their blocks.
    pub fn schedule(&mut self) -> Batch {
        let mut batch = Batch::default();
        let answers = |s: &Sequence| s.todo() == 1;
        self.schedule_running(&mut batch, answers);
        self.schedule_running(&mut batch, |s| !answers(s));
        batch.admit = self.admit(&mut batch);
        batch
    }

    /// Takes the results of a step: all its rows are computed, some sequences got a token.
    pub fn update(&mut self, batch: &Batch, sampled: &[(SeqId, TokenId)]) {
        for entry in &batch.entries {
            if let Some(seq) = self.running.iter_mut().find(|s| s.id == entry.id) {
                seq.advance(entry.start + entry.rows);
                seq.publish(&mut self.pool, self.config.block_len);
                seq.scored = seq.scored.max(seq.computed.min(seq.prompt_len));
            }
        }
        for &(id, token) in sampled {
            if let Some(seq) = self.running.iter_mut().find(|s| s.id == id) {
                seq.tokens.push(token);
            }
        }
    }

    /// Forgets a sequence, wherever it is, and frees its blocks.
    pub fn finish(&mut self, id: SeqId) {
        self.waiting.retain(|s| s.id != id);
        if let Some(place) = self.running.iter().position(|s| s.id == id) {
            self.running.remove(place).release(&mut self.pool);
        }
    }

    /// A sequence that holds blocks.
    pub fn running(&self, id: SeqId) -> Option<&Sequence> {
        self.running.iter().find(|s| s.id == id)
    }

    /// Sequences without blocks.
    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
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

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Recomputes everything that is kept twice.
    pub fn check(&self) -> Result<(), String> {
        self.pool.check(self.running.iter().map(|s| s.blocks.as_slice()))?;
        let ids = |s: &Sequence| s.id;
        if !self.waiting.iter().map(ids).is_sorted() || !self.running.iter().map(ids).is_sorted() {
            return Err("sequences are not in order of arrival".into());
        }
        if self.running.len() > self.config.running_len {
            return Err(format!("{} sequences run", self.running.len()));
        }
        for s in &self.running {
            s.check(&self.pool, self.config.block_len)?;
        }
        match self.waiting.iter().find(|s| s.computed > 0 || !s.blocks.is_empty()) {
            Some(s) => Err(format!("{} waits and holds something", s.id)),
            None => Ok(()),
        }
    }

    /// Gives rows to running sequences that `wanted` picks, oldest first.
    fn schedule_running(&mut self, batch: &mut Batch, wanted: impl Fn(&Sequence) -> bool) {
        let ids: Vec<SeqId> = self.running.iter().filter(|s| wanted(s)).map(|s| s.id).collect();
        for id in ids {
            self.adopt(id);
            if !self.grow(id, batch) {
                continue; // gave its blocks to an older one, now or meanwhile
            }
            let seq = self.running(id).expect("it holds blocks; this is a bug");
            let rows = self.row_limit(seq, batch);
            if rows > 0 {
                batch.push(seq, rows);
            }
        }
    }

    /// Lets sequences in from the waiting room until something says no.
    fn admit(&mut self, batch: &mut Batch) -> Admit {
        while let Some(next) = self.waiting.front() {
            let found = match self.room_for(next, batch) {
                Ok(found) => found,
                Err(why) => return Admit::Later(why),
            };
            let mut next = self.waiting.pop_front().expect("just looked at; this is a bug");
            next.adopt(&found, &mut self.pool, self.config.block_len);
            let missing = self.blocks_wanted(&next) - next.blocks.len();
            next.blocks.extend((0..missing).map_while(|_| self.pool.allocate()));
            batch.push(&next, self.row_limit(&next, batch));
            // Preempted sequences come back with ids older than some that run.
            let place = self.running.partition_point(|s| s.id < next.id);
            self.running.insert(place, next);
        }
        Admit::Now
    }

    /// The known blocks with which a sequence may come in, or why it may not.
    fn room_for(&self, next: &Sequence, batch: &Batch) -> Result<Vec<(BlockId, Before)>, Later> {
        if self.running.len() == self.config.running_len {
            return Err(Later::RunningFull);
        }
        if self.row_limit(next, batch) == 0 {
            return Err(Later::BatchFull);
        }
        let found = next.found(&self.pool, self.config.block_len);
        // A known block that nobody holds is one of the free ones.
        let held = found.iter().filter(|(block, _)| !self.pool.is_free(*block)).count();
        match self.blocks_wanted(next) - held <= self.pool.free_count() {
            true => Ok(found),
            false => Err(Later::NoBlocks),
        }
    }

    /// Blocks of all its tokens and the next one, so that only answers ever need more.
    fn blocks_wanted(&self, seq: &Sequence) -> usize {
        (seq.tokens.len() + usize::from(seq.samples)).div_ceil(self.config.block_len)
    }

    /// Rows that this sequence may have in this batch. Rows whose logits are read are bounded over
    /// the whole batch: each costs a vocabulary of floats.
    fn row_limit(&self, seq: &Sequence, batch: &Batch) -> usize {
        let rows = seq.todo().min(self.config.batch_tokens - batch.row_count());
        if !seq.score || seq.scored >= seq.prompt_len {
            return rows;
        }
        let again = seq.scored.saturating_sub(seq.computed);
        rows.min(again + self.config.score_chunk - batch.score_count())
    }

    /// Makes sure that a running sequence has a block for each of its tokens, taking blocks from
    /// the youngest sequence where it must. False when the sequence does not run (any more).
    fn grow(&mut self, id: SeqId, batch: &mut Batch) -> bool {
        loop {
            let Some(seq) = self.running.iter_mut().find(|s| s.id == id) else { return false };
            if seq.blocks.len() * self.config.block_len >= seq.tokens.len() {
                return true;
            }
            match self.pool.allocate() {
                Some(block) => seq.blocks.push(block),
                // Rows go to the oldest first, so the youngest has none in this batch yet.
                None => self.preempt_youngest(batch),
            }
        }
    }

    /// Somebody may have computed meanwhile what comes next in it.
    fn adopt(&mut self, id: SeqId) {
        if let Some(seq) = self.running.iter_mut().find(|s| s.id == id) {
            let found = seq.found(&self.pool, self.config.block_len);
            seq.adopt(&found, &mut self.pool, self.config.block_len);
        }
    }

    fn preempt_youngest(&mut self, batch: &mut Batch) {
        let mut seq = self.running.pop().expect("the one that asks runs; this is a bug");
        seq.release(&mut self.pool);
        batch.preempted.push(seq.id);
        let place = self.waiting.partition_point(|s| s.id < seq.id);
        self.waiting.insert(place, seq);
    }
}
