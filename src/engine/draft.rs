//! A second, smaller model with the same vocabulary that says first what the large one will say.
//!
//! It has its own keys and values, one table of blocks for each answer, and keeps no word of what
//! became of its guesses: before it goes on it compares the text whose keys it has with the text
//! as it is, and begins where they part. So rejected guesses, preempted answers and answers that
//! it left out for a while are one case. Where it has no blocks left, or the text is longer than
//! it was made for, it says nothing. Deliberately absent: prefixes in common; each answer's prompt
//! is read anew.

use std::collections::BTreeMap;

use hearth_models::{ForwardBatch, KvStore, Model};

use super::handle::DraftModel;
use super::runner::store;
use crate::kv::BlockPool;
use crate::scheduler::Proposal;
use crate::types::{BlockId, SeqId, TokenId};

/// The model, its keys, and what it knows of each answer.
pub(super) struct Draft {
    model: Box<dyn Model>,
    kv: KvStore,
    pool: BlockPool,
    block_len: usize,
    context_len: usize,
    known: BTreeMap<SeqId, Known>,
}

/// An answer that waits for guesses.
pub(super) struct Open<'a> {
    pub id: SeqId,
    /// Prompt and answer so far.
    pub tokens: &'a [TokenId],
    /// Guesses at most.
    pub max: usize,
}

/// What was read and guessed of an answer.
struct Known {
    /// Tokens whose keys are in `blocks`.
    tokens: Vec<TokenId>,
    blocks: Vec<BlockId>,
    /// The guesses, and where the first of them stands.
    guesses: (usize, Vec<TokenId>),
    /// How often a guess is right.
    odds: f64,
    /// Steps without a guess.
    rested: usize,
}

/// What is believed of an answer of which nothing was guessed yet.
const ODDS_FIRST: f64 = 0.6;
/// Weight of the newest guess in the odds.
const NEWEST: f64 = 0.1;
/// After so many steps without a guess there is one, to see whether it is right by now.
const REST: usize = 32;
/// Rows of texts that were not read yet, in one step.
const CATCH_UP: usize = 128;

impl Draft {
    pub fn new(draft: DraftModel, kv_dtype: hearth_models::KvDType) -> hearth_models::Result<Self> {
        let DraftModel { model, limits } = draft;
        Ok(Self {
            kv: store(&*model, &limits, kv_dtype)?,
            model,
            pool: BlockPool::new(limits.kv_blocks),
            block_len: limits.block_len,
            context_len: limits.context_len,
            known: BTreeMap::new(),
        })
    }

    /// Has the system provide pages of memory for so many blocks beyond those that were ever in
    /// use; false when they have all.
    pub fn provide(&mut self, ahead: usize) -> bool {
        self.kv.provide(self.pool.reached() + ahead)
    }

    /// Guesses for answers. `choose` picks the token so many places ahead out of its logits, as the
    /// answer itself will. A guess has to be right more often than `price`.
    pub fn propose(
        &mut self,
        open: &[Open<'_>],
        price: f64,
        mut choose: impl FnMut(SeqId, usize, &[f32]) -> Option<TokenId>,
    ) -> hearth_models::Result<Vec<Proposal>> {
        let mut rows = CATCH_UP;
        let mut turns: Vec<(SeqId, usize)> = Vec::new();
        let mut batch = ForwardBatch::empty();
        for answer in open {
            let wanted = self.meet(answer, price);
            if wanted > 0 && self.read(answer, wanted, &mut rows, &mut batch) {
                turns.push((answer.id, wanted));
            }
        }
        let first = |id: &SeqId| open.iter().find(|o| o.id == *id).map_or(0, |o| o.tokens.len());
        for ahead in 0.. {
            let vocab_len = self.model.config().vocab_len;
            batch.check(vocab_len, self.block_len, self.pool.block_count())?;
            if batch.row_count() == 0 {
                break;
            }
            let logits = self.model.forward(&batch, &mut self.kv)?;
            batch = ForwardBatch::empty();
            let mut rows = logits.chunks_exact(vocab_len);
            turns.retain(|&(id, wanted)| {
                let guess = rows.next().and_then(|row| choose(id, ahead, row));
                let known = self.known.get_mut(&id).expect("it was met; this is a bug");
                let Some(guess) = guess.filter(|_| ahead < wanted) else { return false };
                known.guesses.1.push(guess);
                if ahead + 1 == wanted {
                    return false;
                }
                known.tokens.push(guess);
                let table = known.blocks.iter().map(|b| b.0).collect();
                batch.push(&[guess], first(&id) + ahead, table, self.block_len);
                batch.logit_rows.push(batch.row_count() as u32 - 1);
                true
            });
        }
        let said = open.iter().filter_map(|o| {
            let (at, tokens) = &self.known.get(&o.id)?.guesses;
            let fresh = *at == o.tokens.len() && !tokens.is_empty();
            fresh.then(|| Proposal { id: o.id, tokens: tokens.clone() })
        });
        Ok(said.collect())
    }

    /// An answer is over.
    pub fn forget(&mut self, id: SeqId) {
        if let Some(known) = self.known.remove(&id) {
            known.blocks.into_iter().rev().for_each(|block| self.pool.release(block));
        }
    }

    /// Compares what was guessed with what came; says how many guesses are worth their rows now.
    fn meet(&mut self, answer: &Open<'_>, price: f64) -> usize {
        let known = self.known.entry(answer.id).or_insert_with(|| Known {
            tokens: Vec::new(),
            blocks: Vec::new(),
            guesses: (0, Vec::new()),
            odds: ODDS_FIRST,
            rested: 0,
        });
        let (at, guesses) = std::mem::take(&mut known.guesses);
        for (guess, token) in guesses.iter().zip(answer.tokens.get(at..).unwrap_or_default()) {
            known.odds += NEWEST * (f64::from(u8::from(guess == token)) - known.odds);
            if guess != token {
                break;
            }
        }
        let same = known.tokens.iter().zip(answer.tokens).take_while(|(a, b)| a == b).count();
        // The newest is always read, because its logits are wanted.
        known.tokens.truncate(same.min(answer.tokens.len() - 1));
        let mut chance = 1.0;
        let pays = |_: &usize| {
            chance *= known.odds;
            chance > price
        };
        let wanted = (0..answer.max).take_while(pays).count();
        known.rested = if wanted > 0 { 0 } else { known.rested + 1 };
        // At a price beyond 1 no guess pays, however right.
        match known.rested < REST || price >= 1.0 {
            true => wanted,
            false => answer.max.min(1),
        }
    }

    /// Rows of what was not read yet; true when they come to the end of the text.
    fn read(
        &mut self,
        answer: &Open<'_>,
        wanted: usize,
        rows: &mut usize,
        batch: &mut ForwardBatch,
    ) -> bool {
        let known = self.known.get_mut(&answer.id).expect("it was met; this is a bug");
        let start = known.tokens.len();
        let end = answer.tokens.len().min(start + *rows);
        let len = answer.tokens.len() + wanted;
        if end == start || len > self.context_len {
            return false;
        }
        while known.blocks.len() < len.div_ceil(self.block_len) {
            let Some(block) = self.pool.allocate() else { return false };
            known.blocks.push(block);
        }
        *rows -= end - start;
        known.tokens.extend(&answer.tokens[start..end]);
        known.rested = 0;
        let table = known.blocks.iter().map(|b| b.0).collect();
        batch.push(&answer.tokens[start..end], start, table, self.block_len);
        let whole = end == answer.tokens.len();
        if whole {
            known.guesses = (end, Vec::new());
            batch.logit_rows.push(batch.row_count() as u32 - 1);
        }
        whole
    }
}
