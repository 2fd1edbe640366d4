//! Sequences that wait for blocks that are kept outside of the pool.
//!
//! Where the text that comes next in a prompt is kept (in files, says whoever passes [`Kept`]), the
//! sequence waits for it while others run: the batch says what is to be fetched, and whoever
//! fetches it says block by block that it is there. It holds the blocks for it from the beginning,
//! and nobody knows them by their text before they are filled. Whoever needs the same text waits
//! for the same fetch. What does not come is computed.

use std::collections::VecDeque;

use super::{Batch, Scheduler, Sequence};
use crate::kv::{Chain, Kept};
use crate::types::{BlockId, CacheScope, SeqId, TokenId};

/// Blocks to fetch, in order, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Who waits for them.
    pub id: SeqId,
    /// Never used twice: a sequence that lost its blocks does not wait for the old ones.
    pub ticket: u64,
    /// Whose they are.
    pub scope: CacheScope,
    /// The text before them.
    pub before: Chain,
    /// Blocks before them.
    pub depth: usize,
    /// Their own text: whole blocks.
    pub text: Vec<TokenId>,
}

/// Blocks that a sequence waits for.
#[derive(Clone, Debug)]
pub(super) struct Coming {
    ticket: u64,
    /// Never empty.
    texts: VecDeque<Chain>,
}

impl Scheduler {
    /// Sequences that wait for blocks.
    pub fn loading_count(&self) -> usize {
        self.running.iter().filter(|s| s.coming.is_some()).count()
    }

    /// Into which block the next one of a load belongs; `None` once nobody waits for it.
    pub fn awaits(&self, id: SeqId, ticket: u64) -> Option<BlockId> {
        let seq = self.running(id)?;
        let coming = seq.coming.as_ref().filter(|coming| coming.ticket == ticket);
        coming.map(|_| seq.blocks[seq.known])
    }

    /// The block that [`Scheduler::awaits`] named is filled.
    pub fn loaded(&mut self, id: SeqId) {
        let Some(place) = self.place(id) else { return };
        let seq = &mut self.running[place];
        let Some(coming) = &mut seq.coming else { return };
        coming.texts.pop_front();
        if coming.texts.is_empty() {
            seq.coming = None;
        }
        seq.take_computed(self.config.block_len);
        seq.publish(&mut self.pool, self.config.block_len);
        self.pool.came(seq.blocks[seq.known - 1]);
    }

    /// Nothing more comes of a load: the next block is computed.
    pub fn load_failed(&mut self, id: SeqId, ticket: u64) {
        if self.awaits(id, ticket).is_some()
            && let Some(place) = self.place(id)
        {
            let seq = &mut self.running[place];
            seq.coming = None;
            seq.load_from = seq.known + 1;
        }
    }

    /// Nothing comes of any load.
    pub fn all_loads_failed(&mut self) {
        for seq in &mut self.running {
            if seq.coming.take().is_some() {
                seq.load_from = seq.known + 1;
            }
        }
    }

    /// Whether a prompt waits for blocks, from now on or as others do already, which had begun
    /// before this batch where somebody was `loading`.
    pub(super) fn waits_for_kept(
        &mut self,
        place: usize,
        kept: &dyn Kept,
        loading: bool,
        batch: &mut Batch,
    ) -> bool {
        let block_len = self.config.block_len;
        let seq = &self.running[place];
        let Some((scope, before, depth)) = seq.ahead(block_len).map(|(p, _)| self.pool.above(p))
        else {
            return false;
        };
        let texts = seq.chains(before, block_len);
        let comes = |next: &Chain| {
            let of = |s: &Sequence| s.coming.as_ref().is_some_and(|c| c.texts.contains(next));
            self.running.iter().any(|s| s.scope == Some(scope) && of(s))
        };
        let loading = loading || !batch.loads.is_empty();
        if loading && texts.clone().next().as_ref().is_some_and(comes) {
            return true;
        }
        if seq.known < seq.load_from {
            return false;
        }
        let texts: VecDeque<Chain> = texts.take_while(|text| kept.has(scope, *text)).collect();
        if texts.is_empty() || texts.len() < self.config.load_blocks_min {
            return false;
        }
        self.loads += 1;
        let ticket = self.loads;
        let text = seq.tokens[seq.computed..][..texts.len() * block_len].to_vec();
        batch.loads.push(Load { id: seq.id, ticket, scope, before, depth, text });
        self.running[place].coming = Some(Coming { ticket, texts });
        true
    }
}

impl Sequence {
    /// The names of the text that comes next, block by block.
    fn chains(&self, before: Chain, block_len: usize) -> impl Iterator<Item = Chain> + Clone {
        let ahead = self.ahead(block_len).into_iter();
        let texts = ahead.flat_map(move |(_, ahead)| ahead.chunks_exact(block_len));
        texts.scan(before, |chain, text| {
            *chain = chain.then(text);
            Some(*chain)
        })
    }

    /// What must hold while it waits.
    pub(super) fn check_coming(&self, before: Chain, block_len: usize) -> Result<(), String> {
        let Some(Coming { ticket, texts }) = &self.coming else { return Ok(()) };
        let wanted: Vec<Chain> = self.chains(before, block_len).take(texts.len()).collect();
        let whole = !texts.is_empty() && self.blocks.len() >= self.known + texts.len();
        match whole && texts.iter().eq(&wanted) {
            true => Ok(()),
            false => Err(format!("{}: load {ticket} is not of its text", self.id)),
        }
    }
}
