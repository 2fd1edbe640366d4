//! What a step is told to compute, and why not more.

use std::ops::Range;

use super::{Load, Sequence};
use crate::kv::Forgotten;
use crate::types::{BlockId, SeqId, TokenId};

/// The rows of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// One for each sequence that has rows.
    pub entries: Vec<Entry>,
    /// Blocks to copy before anything is computed, in this order: from, to.
    pub copies: Vec<(BlockId, BlockId)>,
    /// Blocks that had to forget their text and are about to be written, and what they hold until
    /// then; of one text the end before the beginning.
    pub forgotten: Vec<Forgotten>,
    /// Blocks that sequences wait for from now on.
    pub loads: Vec<Load>,
    /// Sequences that lost their blocks and wait again.
    pub preempted: Vec<SeqId>,
    /// Sequences that are not begun any more: their deadline has passed.
    pub expired: Vec<SeqId>,
    /// Rows of running answers, what is proposed aside; they come first.
    pub answers: usize,
    /// Somebody would have to give blocks back, and nobody may before the pass is done that is
    /// being computed.
    pub short: bool,
    /// See [`Batch::is_apart`].
    pub(super) apart: bool,
    /// Rows that the batch may have.
    pub(super) row_limit: usize,
    /// What it has so far.
    pub(super) taken: Taken,
    /// Whether the waiting room was emptied, and what stood in the way.
    pub admit: Admit,
}

/// Counts of what stands in the entries while a batch is made, when they are asked for often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    pub rows: usize,
    /// Rows whose logits are read for scoring.
    pub scores: usize,
    pub forks: usize,
}

/// Rows of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whose.
    pub id: SeqId,
    /// Position of the first row.
    pub start: usize,
    /// Rows.
    pub rows: usize,
    /// The last row that is certain is the newest token, and the next one is wanted.
    pub samples: bool,
    /// Tokens of the last rows that nobody has chosen yet. A token is wanted from each of these
    /// rows too, as long as the one before it came out as proposed.
    pub proposed: Vec<TokenId>,
    /// Sequences that begin where this entry ends, and choose their first token from its last row.
    pub forks: Vec<SeqId>,
    /// Positions whose logits are wanted for prompt scoring; within the rows.
    pub score: Range<usize>,
}

/// How an answer may go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// Whose answer.
    pub id: SeqId,
    /// The tokens after its newest one.
    pub tokens: Vec<TokenId>,
}

/// What became of the waiting room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admit {
    /// Everybody is in.
    #[default]
    Now,
    /// The one whose turn it is waits, and others with it.
    Later(Later),
}

/// Why a sequence waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Later {
    /// As many sequences as allowed run.
    RunningFull,
    /// The batch has no row left.
    BatchFull,
    /// Everybody who waits has as many running, or aside, as allowed to its tenant.
    TenantFull,
    /// The pool has no room for the whole prompt.
    NoBlocks,
}

impl Entry {
    /// The sequence, and those that begin where the entry ends.
    pub fn ids(&self) -> impl Iterator<Item = SeqId> {
        std::iter::once(self.id).chain(self.forks.iter().copied())
    }
}

impl Batch {
    /// Rows of all entries.
    pub fn row_count(&self) -> usize {
        self.entries.iter().map(|e| e.rows).sum()
    }

    /// Sequences that begin at the end of an entry.
    pub(super) fn fork_count(&self) -> usize {
        self.entries.iter().map(|e| e.forks.len()).sum()
    }

    /// Prompts of newcomers alone, see [`super::Scheduler::interject`].
    pub fn is_apart(&self) -> bool {
        self.apart
    }

    /// Rows of tokens that were proposed.
    pub fn proposed_count(&self) -> usize {
        self.entries.iter().map(|e| e.proposed.len()).sum()
    }

    /// Rows whose logits are read for scoring.
    pub fn score_count(&self) -> usize {
        self.entries.iter().map(|e| e.score.len()).sum()
    }

    /// Rows of a sequence, and of its forks as many as there is room for, where they begin.
    pub(super) fn push(&mut self, seq: &Sequence, rows: usize, fork_room: usize) {
        let start = seq.start();
        let end = start + rows;
        let forks = match end == seq.prompt_len {
            true => &seq.forks[..seq.forks.len().min(fork_room)],
            false => &[],
        };
        let score = match seq.score {
            true => start.max(seq.scored)..end.min(seq.prompt_len),
            false => start..start,
        };
        let score = score.start..score.end.max(score.start);
        self.taken.rows += rows;
        self.taken.scores += score.len();
        self.taken.forks += forks.len();
        self.entries.push(Entry {
            id: seq.id,
            start,
            rows,
            samples: seq.answer_max > 0 && end == seq.len(),
            proposed: Vec::new(),
            forks: forks.to_vec(),
            score,
        });
    }

    /// The rows of a sequence that lost its blocks, which is one of an answer.
    pub(super) fn drop_answer(&mut self, id: SeqId) {
        self.entries.retain(|entry| entry.id != id);
        self.taken.rows = self.row_count();
    }
}
