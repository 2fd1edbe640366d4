//! What a step is told to compute, and why not more.

use std::ops::Range;

use super::Sequence;
use crate::types::SeqId;

/// The rows of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// One for each sequence that has rows.
    pub entries: Vec<Entry>,
    /// Sequences that lost their blocks and wait again.
    pub preempted: Vec<SeqId>,
    /// Rows of running answers; they come first.
    pub answers: usize,
    /// Rows that the batch may have.
    pub(super) row_limit: usize,
    /// Whether the waiting room was emptied, and what stood in the way.
    pub admit: Admit,
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
    /// The last row is the newest token and the next one is wanted.
    pub samples: bool,
    /// Positions whose logits are wanted for prompt scoring; within the rows.
    pub score: Range<usize>,
}

/// What became of the waiting room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admit {
    /// Everybody is in.
    #[default]
    Now,
    /// The next one waits.
    Later(Later),
}

/// Why a sequence waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Later {
    /// As many sequences as allowed run.
    RunningFull,
    /// The batch has no row left.
    BatchFull,
    /// The pool has no room for the whole prompt.
    NoBlocks,
}

impl Batch {
    /// Rows of all entries.
    pub fn row_count(&self) -> usize {
        self.entries.iter().map(|e| e.rows).sum()
    }

    /// Rows whose logits are read for scoring.
    pub fn score_count(&self) -> usize {
        self.entries.iter().map(|e| e.score.len()).sum()
    }

    pub(super) fn push(&mut self, seq: &Sequence, rows: usize) {
        let start = seq.computed;
        let end = start + rows;
        let score = match seq.score {
            true => start.max(seq.scored)..end.min(seq.prompt_len),
            false => start..start,
        };
        self.entries.push(Entry {
            id: seq.id,
            start,
            rows,
            samples: seq.samples && end == seq.tokens.len(),
            score: score.start..score.end.max(score.start),
        });
    }
}
