//! One sequence: its tokens, and how far their keys and values have come.

use std::time::Duration;

use super::Entry;
use super::load::Coming;
use crate::kv::{Before, BlockPool};
use crate::types::{BlockId, CacheScope, Priority, SeqId, Tenant, TokenId};

/// A block is copied for this part of it, or more.
const ALIKE: usize = 4;

/// A sequence as it arrives.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Ascending in order of arrival.
    pub id: SeqId,
    /// Never empty.
    pub prompt: Vec<TokenId>,
    /// Tokens that are wanted at most (prompt scoring wants none).
    pub answer_max: usize,
    /// The logits of every prompt row are wanted.
    pub score: bool,
    /// With whom it shares prefixes. A scored prompt shares none: all its rows are computed.
    pub scope: CacheScope,
    /// On whose account it runs.
    pub tenant: Tenant,
    /// Its place among the tenant's others.
    pub priority: Priority,
    /// A sequence that has not begun by then is not begun any more.
    pub deadline: Option<Duration>,
    /// Others that begin with the same prompt and go their own way after it.
    pub forks: Vec<SeqId>,
}

/// One sequence.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub(super) id: SeqId,
    /// Prompt and answer so far.
    pub(super) tokens: Vec<TokenId>,
    pub(super) prompt_len: usize,
    /// Leading tokens whose KV is in `blocks`.
    pub(super) computed: usize,
    /// Rows behind them in passes that were asked for and are not done.
    pub(super) flying: usize,
    /// Tokens behind `tokens` that these passes choose, and the passes after them may read.
    pub(super) unknown: usize,
    /// The most that `computed` has ever been.
    reached: usize,
    /// Leading prompt rows whose logits have been read.
    pub(super) scored: usize,
    pub(super) blocks: Vec<BlockId>,
    /// Leading blocks that stand in the prefix index; the next one's place is `place`.
    pub(super) known: usize,
    place: Option<Before>,
    pub(super) scope: Option<CacheScope>,
    /// Blocks that it waits for; they are the next ones.
    pub(super) coming: Option<Coming>,
    /// No block before this one is waited for.
    pub(super) load_from: usize,
    /// Prompt tokens whose KV somebody else had computed.
    cached: usize,
    /// Tokens of its prompt that were known when it came, or are its own from before.
    pub(super) known_len: usize,
    /// Tokens that are wanted at most.
    pub(super) answer_max: usize,
    pub(super) score: bool,
    pub(super) tenant: Tenant,
    pub(super) priority: Priority,
    pub(super) deadline: Option<Duration>,
    /// Sequences that wait for this one's prompt.
    pub(super) forks: Vec<SeqId>,
    /// The last step that had rows of it.
    pub(super) moved: u64,
}

impl Sequence {
    pub(super) fn new(new: NewSequence) -> Self {
        let scope = (!new.score).then_some(new.scope);
        Self {
            id: new.id,
            prompt_len: new.prompt.len(),
            tokens: new.prompt,
            computed: 0,
            flying: 0,
            unknown: 0,
            reached: 0,
            scored: 0,
            blocks: Vec::new(),
            known: 0,
            place: scope.map(Before::Start),
            scope,
            coming: None,
            load_from: 0,
            cached: 0,
            known_len: 0,
            answer_max: new.answer_max,
            score: new.score,
            tenant: new.tenant,
            priority: new.priority,
            deadline: new.deadline,
            forks: new.forks,
            moved: 0,
        }
    }

    /// Another one that shares all that is computed. The block that is not full yet is shared too,
    /// until one of them writes into it.
    pub(super) fn fork(&self, id: SeqId, pool: &mut BlockPool, block_len: usize) -> Self {
        let mut blocks = self.blocks.clone();
        blocks.truncate(self.computed.div_ceil(block_len));
        blocks.iter().for_each(|&b| pool.retain(b));
        Self { id, blocks, forks: Vec::new(), ..self.clone() }
    }

    /// The same prompt, from its beginning, for the first of those that waited for this one.
    pub(super) fn heir(&mut self) -> Option<Self> {
        let mut forks = std::mem::take(&mut self.forks);
        let id = (!forks.is_empty()).then(|| forks.remove(0))?;
        let prompt = self.tokens[..self.prompt_len].to_vec();
        Some(Self::new(NewSequence {
            id,
            prompt,
            answer_max: self.answer_max,
            score: self.score,
            scope: self.scope.unwrap_or_default(),
            tenant: self.tenant,
            priority: self.priority,
            deadline: self.deadline.filter(|_| self.is_new()),
            forks,
        }))
    }

    /// Nothing was ever computed or found for it.
    pub(super) fn is_new(&self) -> bool {
        self.reached == 0
    }

    /// All that is left to compute is its newest token: it is an answer, not a prompt.
    pub(super) fn is_answer(&self) -> bool {
        self.todo() == 1 && self.start() >= self.prompt_len
    }

    /// The blocks that come next are fetched for it.
    pub(super) fn is_waiting(&self) -> bool {
        self.coming.is_some()
    }

    /// Prompt and answer so far.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Blocks in order of position.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Prompt tokens that were not computed for it but found in the prefix cache.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Tokens of it that a pass chooses which is not done.
    pub fn unknown(&self) -> usize {
        self.unknown
    }

    /// Tokens of its answer so far.
    pub(super) fn answered(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Prompt and answer, with what is not known of it yet.
    pub(super) fn len(&self) -> usize {
        self.tokens.len() + self.unknown
    }

    /// Where its next row stands.
    pub(super) fn start(&self) -> usize {
        self.computed + self.flying
    }

    /// Rows that are left, without those of proposals that fly.
    pub(super) fn todo(&self) -> usize {
        self.len().saturating_sub(self.start())
    }

    /// The text that comes next, and its place; `None` in the middle of a block, and while rows
    /// fly. The last token is always left to compute, because its logits are wanted.
    pub(super) fn ahead(&self, block_len: usize) -> Option<(Before, &[TokenId])> {
        let place = self.place.filter(|_| self.start() == self.known * block_len)?;
        let (_, ahead) = self.tokens[self.computed..].split_last()?;
        Some((place, ahead))
    }

    /// Known blocks for the text that comes next, and the place after each.
    pub(super) fn found(&self, pool: &BlockPool, block_len: usize) -> Vec<(BlockId, Before)> {
        let mut found = Vec::new();
        let Some((mut place, ahead)) = self.ahead(block_len) else { return found };
        for text in ahead.chunks_exact(block_len) {
            let Some((block, next)) = pool.find(place, text) else { break };
            place = next;
            found.push((block, next));
        }
        found
    }

    /// It has just come: how much of its prompt is known.
    pub(super) fn look_ahead(&mut self, pool: &BlockPool, block_len: usize) -> usize {
        self.known_len = self.found(pool, block_len).len() * block_len;
        self.known_len
    }

    /// Takes what was found, in exchange for blank blocks where it has some.
    pub(super) fn adopt(
        &mut self,
        found: &[(BlockId, Before)],
        pool: &mut BlockPool,
        block_len: usize,
    ) {
        for &(block, next) in found {
            // What it had itself before it lost its blocks is of use to nobody else by that.
            let own = (self.known + 1) * block_len <= self.reached;
            if own {
                pool.retain(block)
            } else {
                pool.adopt(block)
            }
            match self.blocks.get_mut(self.known) {
                Some(own) => pool.release(std::mem::replace(own, block)),
                None => self.blocks.push(block),
            }
            self.known += 1;
            self.place = Some(next);
            self.take_computed(block_len);
            if own {
                self.note_new(block, pool, block_len);
            }
        }
    }

    /// Begins its next block with as much as a known one has of the same text, if that is worth a
    /// copy: from, to.
    pub(super) fn begin_alike(
        &mut self,
        pool: &mut BlockPool,
        block_len: usize,
    ) -> Option<(BlockId, BlockId)> {
        let (place, ahead) = self.ahead(block_len)?;
        let own = *self.blocks.get(self.known)?;
        let text = &ahead[..ahead.len().min(block_len)];
        let (block, alike) = pool.nearest(place, text, block_len.div_ceil(ALIKE))?;
        self.take_computed(alike);
        Some((block, own))
    }

    /// The next so many tokens are computed, and not for it.
    pub(super) fn take_computed(&mut self, count: usize) {
        let before = self.reached;
        self.advance(self.computed + count);
        self.cached += self.reached - before;
    }

    /// Keys and values have come to `computed`.
    pub(super) fn advance(&mut self, computed: usize) {
        self.computed = computed;
        self.reached = self.reached.max(computed);
    }

    /// Rows are asked for; if it `goes_on`, the pass after that may read the token that comes.
    pub(super) fn launch(&mut self, entry: &Entry, goes_on: bool) {
        self.flying += entry.rows;
        self.unknown += usize::from(goes_on);
        self.reached = self.reached.max(self.start().min(self.tokens.len()));
        self.scored = self.scored.max(self.start().min(self.prompt_len));
    }

    /// Rows that were asked for are done; their token, if there is one, comes next.
    pub(super) fn land(&mut self, entry: &Entry) {
        self.flying = self.flying.saturating_sub(entry.rows);
        self.unknown = self.unknown.saturating_sub(usize::from(entry.samples));
        self.advance((entry.start + entry.rows).min(self.tokens.len()));
        self.scored = self.scored.max(self.computed.min(self.prompt_len));
    }

    /// Lets others know of the blocks that have become full.
    pub(super) fn publish(&mut self, pool: &mut BlockPool, block_len: usize) {
        while let Some(place) = self.place
            && (self.known + 1) * block_len <= self.computed
        {
            let text = &self.tokens[self.known * block_len..][..block_len];
            let (block, next) = pool.publish(self.blocks[self.known], place, text);
            self.blocks[self.known] = block;
            self.known += 1;
            self.place = Some(next);
            self.note_new(block, pool, block_len);
        }
    }

    /// Its last known block may be of its prompt, of which so many blocks nobody had computed.
    fn note_new(&self, block: BlockId, pool: &mut BlockPool, block_len: usize) {
        if self.known * block_len <= self.prompt_len {
            pool.is_new(block, self.prompt_len.saturating_sub(self.cached) / block_len);
        }
    }

    /// Keeps `wanted` blocks, and gives those behind them back.
    pub(super) fn give_back(&mut self, wanted: usize, pool: &mut BlockPool) {
        let kept = self.blocks.len().min(wanted);
        self.blocks.drain(kept..).rev().for_each(|b| pool.release(b));
    }

    /// Gives all blocks back, the last one first.
    pub(super) fn release(&mut self, pool: &mut BlockPool, block_len: usize) {
        self.blocks.drain(..).rev().for_each(|b| pool.release(b));
        self.known_len = self.known * block_len;
        (self.computed, self.flying, self.unknown) = (0, 0, 0);
        self.known = 0;
        self.place = self.scope.map(Before::Start);
        (self.coming, self.load_from) = (None, 0);
    }

    /// What must hold of its own numbers.
    pub(super) fn check(&self, pool: &BlockPool, block_len: usize) -> Result<(), String> {
        let held = self.blocks.len() * block_len;
        if self.computed > self.tokens.len() || self.start() > held || self.unknown > self.flying {
            let Self { id, computed, flying, .. } = self;
            return Err(format!("{id}: {computed} computed, {flying} fly, {held} held"));
        }
        let full = if self.scope.is_some() { self.computed / block_len } else { 0 };
        if self.known != full || self.cached > self.prompt_len {
            return Err(format!("{}: {} of {full} full blocks known", self.id, self.known));
        }
        if self.coming.is_some() {
            let place = self.ahead(block_len).map(|(place, _)| pool.above(place).1);
            let place = place.ok_or_else(|| format!("{} waits and has no place", self.id))?;
            self.check_coming(place, block_len)?;
        }
        // The one that is not full may be shared with forks.
        let own = self.blocks.get(self.computed.div_ceil(block_len)..).unwrap_or_default();
        match own.iter().find(|b| !pool.is_private(**b)) {
            Some(b) => Err(format!("{}: {b:?} will be written and is not its own", self.id)),
            None => Ok(()),
        }
    }
}
