//! The one contract between a scheduler and a model.
//!
//! A batch is `(sequence, n_new)` pairs, packed: there is no prefill phase and no decode phase.
//! A chunk of a prompt, a single new token and a resumed sequence are the same thing with other
//! numbers. Rows of all sequences stand one behind the other.

use std::any::Any;
use std::collections::BTreeMap;

use hearth_kernels::sampling::SamplingParams;
pub use hearth_kernels::sampling::TokenEdit;

use crate::{Error, Result};

/// The number under which a model knows a weighted list of adapters. Never used twice, so it says
/// which generation of them is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LoraSlot(pub u64);

/// One forward pass. `T` is the number of rows, `S` the number of sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForwardBatch {
    /// Token of each row. `[T]`
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence. `[T]`
    pub positions: Vec<u32>,
    /// Rows of sequence `s` are `cu_q[s]..cu_q[s + 1]`. `[S + 1]`
    pub cu_q: Vec<u32>,
    /// Keys of each sequence once this batch is written: earlier ones and its new rows. `[S]`
    pub context_len: Vec<u32>,
    /// Where each row's key and value go: `block * block_len + offset`. `[T]`
    pub slot_mapping: Vec<u32>,
    /// Blocks of each sequence in order. `[S][ceil(context_len / block_len)]`
    pub block_tables: Vec<Vec<u32>>,
    /// Adapters of each sequence; `None` is the base model. `[S]`
    pub lora_slot: Vec<Option<LoraSlot>>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// Rows whose token the pass before this one chose, and out of which of its logit rows; 0
    /// stands for it in `tokens`. Only for a model that [runs ahead](crate::Model::runs_ahead).
    pub chosen: Vec<(u32, u32)>,
    /// Blocks to copy before anything is computed, in this order: from, to.
    pub copies: Vec<(u32, u32)>,
}

impl ForwardBatch {
    /// A whole sequence from position 0, every row's logits wanted, blocks in order from `block`.
    /// What tests, benchmarks and scoring need.
    pub fn whole(tokens: &[u32], block: u32, block_len: usize) -> Self {
        let mut batch = Self::empty();
        let blocks = tokens.len().div_ceil(block_len) as u32;
        batch.push(tokens, 0, (block..block + blocks).collect(), block_len);
        batch.logit_rows = (0..tokens.len() as u32).collect();
        batch
    }

    /// No sequence yet.
    pub fn empty() -> Self {
        Self { cu_q: vec![0], ..Self::default() }
    }

    /// Adds `tokens` at positions `start..` of a sequence whose blocks are `table`, without an
    /// adapter.
    pub fn push(&mut self, tokens: &[u32], start: usize, table: Vec<u32>, block_len: usize) {
        for (i, &token) in tokens.iter().enumerate() {
            let position = start + i;
            self.tokens.push(token);
            self.positions.push(position as u32);
            let block = table[position / block_len];
            self.slot_mapping.push(block * block_len as u32 + (position % block_len) as u32);
        }
        self.cu_q.push(self.tokens.len() as u32);
        self.context_len.push((start + tokens.len()) as u32);
        self.block_tables.push(table);
        self.lora_slot.push(None);
    }

    /// The sequence that was added last runs with these adapters.
    pub fn run_last_with(&mut self, slot: Option<LoraSlot>) {
        if let Some(last) = self.lora_slot.last_mut() {
            *last = slot;
        }
    }

    /// The rows that run with adapters.
    pub fn lora_rows(&self) -> LoraRows {
        let slots = self.sequences().zip(&self.lora_slot);
        LoraRows::new(slots.flat_map(|(s, slot)| s.rows.map(move |_| *slot)).collect())
    }

    /// Rows.
    pub fn row_count(&self) -> usize {
        self.tokens.len()
    }

    /// Sequences.
    pub fn sequence_count(&self) -> usize {
        self.context_len.len()
    }

    /// Whether every sequence is whole (no earlier rows) and all are of one length.
    pub fn is_even(&self) -> bool {
        let len = self.context_len.first().map_or(0, |&len| len as usize);
        self.sequences().all(|s| s.rows.len() == len && s.context_len == len)
    }

    /// Rows and context length of each sequence.
    pub fn sequences(&self) -> impl Iterator<Item = Sequence<'_>> {
        (0..self.sequence_count()).map(|s| Sequence {
            rows: self.cu_q[s] as usize..self.cu_q[s + 1] as usize,
            context_len: self.context_len[s] as usize,
            blocks: &self.block_tables[s],
        })
    }

    /// Every number against every other, before a kernel relies on them.
    pub fn check(&self, vocab_len: usize, block_len: usize, block_count: usize) -> Result<()> {
        let rows = self.row_count();
        let wrong = |what: &str| Err(Error::Batch(what.to_owned()));
        let slots =
            block_count.checked_mul(block_len).filter(|&slots| u32::try_from(slots).is_ok());
        if block_len == 0 || slots.is_none() {
            return wrong("the store has more slots than a u32 counts, or blocks of nothing");
        }
        if self.positions.len() != rows || self.slot_mapping.len() != rows {
            return wrong("positions or slots do not match the tokens");
        }
        if self.cu_q.len() != self.sequence_count() + 1
            || self.block_tables.len() != self.sequence_count()
            || self.lora_slot.len() != self.sequence_count()
            || self.cu_q.first() != Some(&0)
            || self.cu_q.last() != Some(&(rows as u32))
            || !self.cu_q.is_sorted()
        {
            return wrong("cu_q does not cover the rows, or an adapter slot is missing");
        }
        if let Some(id) = self.tokens.iter().find(|&&id| id as usize >= vocab_len) {
            return Err(Error::Batch(format!("token {id} is beyond the vocabulary")));
        }
        if self.logit_rows.iter().any(|&row| row as usize >= rows) {
            return wrong("a logit row does not exist");
        }
        if self.chosen.iter().any(|&(row, _)| row as usize >= rows) {
            return wrong("a row whose token was chosen does not exist");
        }
        if self.copies.iter().any(|&(from, to)| from.max(to) as usize >= block_count) {
            return wrong("a block to copy does not exist");
        }
        for sequence in self.sequences() {
            let new = sequence.rows.len();
            if new == 0 {
                return wrong("a sequence brings no rows");
            }
            if new > sequence.context_len
                || sequence.blocks.len() < sequence.context_len.div_ceil(block_len)
                || sequence.blocks.iter().any(|&b| b as usize >= block_count)
            {
                return wrong("a block table does not cover its context");
            }
            let start = sequence.context_len - new;
            for (i, row) in sequence.rows.enumerate() {
                let (block, offset) = ((start + i) / block_len, (start + i) % block_len);
                let slot = sequence.blocks[block] * block_len as u32 + offset as u32;
                if self.positions[row] as usize != start + i || self.slot_mapping[row] != slot {
                    return wrong("a row's position or slot is not where its sequence puts it");
                }
            }
        }
        Ok(())
    }
}

/// What becomes of a row of logits, where the device can do that; elsewhere they are read out.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// They are read out.
    Logits,
    /// A token is chosen from them.
    Token(Pick),
    /// They stay where they are: whoever wants a token does not know yet how it is to be chosen.
    /// Only a model that [runs ahead](crate::Model::runs_ahead) keeps them.
    Kept,
}

/// How a token is to be chosen from a row of logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Pick {
    /// Temperature, `top_k`, `top_p`, `min_p`; penalties are among the edits.
    pub params: SamplingParams,
    /// What is done to the logits before, each token once.
    pub edits: Vec<TokenEdit>,
    /// Key of the generator.
    pub seed: u64,
    /// Position of the token in the answer.
    pub position: u64,
    /// Ids from here on are padding of the embedding.
    pub vocab_len: usize,
    /// The tokens that may be chosen: bit `i % 32` of word `i / 32` is token `i`, and those beyond
    /// the last word may not. `None` is all.
    pub mask: Option<Vec<u32>>,
}

/// A row of logits that stays on its device until a token is chosen from it.
pub struct Kept(Choose);

type Choose = Box<dyn FnOnce(Pick) -> Result<Pass> + Send>;

impl Kept {
    /// `choose` asks for the one token.
    pub fn new(choose: impl FnOnce(Pick) -> Result<Pass> + Send + 'static) -> Self {
        Self(Box::new(choose))
    }

    /// Asks for a token, in the order of the passes; it is row 0 of what the pass gives.
    ///
    /// # Errors
    /// The device failed.
    pub fn choose(self, pick: Pick) -> Result<Pass> {
        (self.0)(pick)
    }
}

/// What became of the logit rows of a batch.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Of the rows that are read out, in order. `[rows, vocab]`
    logits: Vec<f32>,
    /// What became of each row; empty where all are read out.
    rows: Vec<Made>,
}

/// What became of a logit row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// Its logits are read out.
    Logits,
    /// This was chosen.
    Token(Chosen),
    /// It is kept.
    Kept,
}

/// A pass that was asked for.
pub struct Pass {
    wait: Box<dyn FnOnce() -> Result<Output> + Send>,
    /// Rows that stay on the device, by their place among the logit rows.
    kept: Vec<(usize, Kept)>,
}

impl Pass {
    /// What it gives is known already.
    pub fn done(output: Output) -> Self {
        Self::new(move || Ok(output))
    }

    /// `wait` waits for it.
    pub fn new(wait: impl FnOnce() -> Result<Output> + Send + 'static) -> Self {
        Self { wait: Box::new(wait), kept: Vec::new() }
    }

    /// The same beside rows that it keeps.
    pub fn keeping(self, kept: Vec<(usize, Kept)>) -> Self {
        Self { kept, ..self }
    }

    /// Rows that stay on the device, each with its place among the logit rows. They are there to be
    /// chosen from before the pass is waited for.
    pub fn take_kept(&mut self) -> Vec<(usize, Kept)> {
        std::mem::take(&mut self.kept)
    }

    /// What it gives, when that is there.
    ///
    /// # Errors
    /// The device failed.
    pub fn wait(self) -> Result<Output> {
        (self.wait)()
    }
}

/// A pass that stands between two layers. What it is made of, its model knows.
pub struct Walk(Box<dyn Any + Send>);

impl Walk {
    pub(crate) fn new(between: impl Any + Send) -> Self {
        Self(Box::new(between))
    }

    /// What it is made of.
    pub(crate) fn of<T: Any>(&mut self) -> Result<&mut T> {
        self.0.downcast_mut().ok_or_else(|| Error::Batch("this pass is of another model".into()))
    }
}

/// A token; `None` where every token is ruled out.
pub type Chosen = Option<u32>;

/// One row of an [`Output`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowOutput<'a> {
    /// `[vocab]`
    Logits(&'a [f32]),
    /// The token.
    Chosen(Chosen),
    /// Nothing yet: see [`Pass::take_kept`].
    Kept,
}

impl Output {
    /// Nothing was chosen.
    pub fn of_logits(logits: Vec<f32>) -> Self {
        Self { logits, rows: Vec::new() }
    }

    /// What became of each row, and the logits of those that are read out, in order.
    pub fn new(logits: Vec<f32>, rows: Vec<Made>) -> Self {
        Self { logits, rows }
    }

    /// All logits, of rows from which nothing was chosen.
    pub fn into_logits(self) -> Vec<f32> {
        self.logits
    }

    /// One row.
    pub fn row(&self, row: usize, vocab_len: usize) -> RowOutput<'_> {
        match self.rows.get(row) {
            Some(Made::Token(chosen)) => return RowOutput::Chosen(*chosen),
            Some(Made::Kept) => return RowOutput::Kept,
            Some(Made::Logits) | None => {}
        }
        let before = self.rows.iter().take(row).filter(|made| **made != Made::Logits).count();
        let start = (row - before) * vocab_len;
        RowOutput::Logits(&self.logits[start..start + vocab_len])
    }
}

/// Rows of a batch by the adapters that they run with.
#[derive(Clone, Debug, Default)]
pub struct LoraRows {
    /// Of each row. `[T]`
    slots: Vec<Option<LoraSlot>>,
    groups: BTreeMap<LoraSlot, Vec<u32>>,
}

impl LoraRows {
    fn new(slots: Vec<Option<LoraSlot>>) -> Self {
        let mut groups: BTreeMap<LoraSlot, Vec<u32>> = BTreeMap::new();
        for (row, slot) in slots.iter().enumerate() {
            if let Some(slot) = slot {
                groups.entry(*slot).or_default().push(row as u32);
            }
        }
        Self { slots, groups }
    }

    /// The same of some rows, in the order given.
    pub fn selected(&self, rows: &[u32]) -> Self {
        match self.groups.is_empty() {
            true => Self::default(),
            false => Self::new(rows.iter().map(|&row| self.slots[row as usize]).collect()),
        }
    }

    /// Rows of each slot that has some, ascending.
    pub fn groups(&self) -> impl Iterator<Item = (LoraSlot, &[u32])> {
        self.groups.iter().map(|(slot, rows)| (*slot, rows.as_slice()))
    }
}

/// One sequence of a batch.
#[derive(Clone, Debug)]
pub struct Sequence<'a> {
    /// Its new rows.
    pub rows: std::ops::Range<usize>,
    /// Its keys, new ones included.
    pub context_len: usize,
    /// Its blocks.
    pub blocks: &'a [u32],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_contradict_each_other_are_refused() {
        let mut sound = ForwardBatch::whole(&[1, 2, 3], 0, 2);
        sound.push(&[4], 4, vec![2, 3, 4], 2);
        sound.check(8, 2, 5).unwrap();
        let refused = |word: &str, change: fn(&mut ForwardBatch)| {
            let mut batch = sound.clone();
            change(&mut batch);
            let error = batch.check(8, 2, 5).expect_err(word).to_string();
            assert!(error.contains(word), "`{error}` does not mention `{word}`");
        };
        refused("no rows", |b| b.push(&[], 1, vec![0], 2));
        refused("vocabulary", |b| b.tokens[1] = 8);
        refused("cu_q", |b| b.cu_q[1] = 5);
        refused("logit row", |b| b.logit_rows.push(4));
        refused("was chosen", |b| b.chosen.push((4, 0)));
        refused("block to copy", |b| b.copies.push((0, 5)));
        refused("adapter slot", |b| b.lora_slot.push(None));
        refused("block table", |b| b.block_tables[1][2] = 5);
        refused("slot", |b| b.slot_mapping[0] = 1);
    }

    #[test]
    fn rows_stand_with_their_adapters() {
        let mut batch = ForwardBatch::whole(&[1, 2, 3], 0, 2);
        for (block, slot) in [(2, Some(9)), (3, None), (4, Some(7)), (5, Some(9))] {
            batch.push(&[4, 5], 0, vec![block], 2);
            batch.lora_slot[block as usize - 1] = slot.map(LoraSlot);
        }
        let rows = batch.lora_rows();
        let groups: Vec<_> = rows.groups().map(|(slot, rows)| (slot.0, rows.to_vec())).collect();
        assert_eq!(groups, [(7, vec![7, 8]), (9, vec![3, 4, 9, 10])]);
        let rows = rows.selected(&[10, 0, 8, 3]);
        let groups: Vec<_> = rows.groups().map(|(slot, rows)| (slot.0, rows.to_vec())).collect();
        assert_eq!(groups, [(7, vec![2]), (9, vec![0, 3])]);
    }

    #[test]
    fn slots_are_counted_in_u32() {
        let batch = ForwardBatch::whole(&[1], 0, 16);
        batch.check(8, 16, (1 << 28) - 1).unwrap();
        for (block_len, block_count) in [(16, 1 << 28), (16, usize::MAX), (0, 1)] {
            assert!(batch.check(8, block_len, block_count).is_err(), "{block_len} {block_count}");
        }
    }
}
