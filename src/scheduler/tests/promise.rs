//! What random traces are made of: a model that is only arithmetic, what it promises, and chance.

use std::collections::HashMap;

use crate::kv::{Chain, Kept};
use crate::scheduler::Batch;
use crate::types::{BlockId, CacheScope, Tenant, TokenId};

/// What traces must have met.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::scheduler) struct Seen {
    /// Proposed tokens that were right.
    pub right: usize,
    /// Blocks that came,
    pub came: usize,
    /// that went before they had to,
    pub kept: usize,
    /// and that were used when they had gone.
    pub again: usize,
    /// Rows whose token nobody knew when they were scheduled.
    pub unknown: usize,
    /// Rows of sequences that were gone when they were computed.
    pub late: usize,
    /// Steps in which somebody had to wait for blocks of those who fly.
    pub short: usize,
    /// Rows behind a pass that failed.
    pub failed: usize,
    /// Answers that were whole after they had stood aside.
    pub stood: usize,
    /// Times that one could not stand aside, because others waited for its prompt or with it,
    pub wanted: usize,
    /// or because rows of it flew.
    pub flew: usize,
    /// Prompts that were computed while another pass waited.
    pub apart: usize,
}

/// A pass that was handed over, with all that it needs: a text for each entry.
pub(in crate::scheduler) struct Flight {
    pub batch: Batch,
    pub texts: Vec<Text>,
}

pub(in crate::scheduler) struct Text {
    /// From the beginning, proposals aside; one that the pass before chooses is not there.
    pub tokens: Vec<Option<TokenId>>,
    pub blocks: Vec<BlockId>,
    pub scope: CacheScope,
    /// Tokens at which it ends.
    pub end: usize,
}

/// What was stored for the tokens of a block, by scope and text; some of it gets lost.
#[derive(Default)]
pub(in crate::scheduler) struct Shelf(pub HashMap<(CacheScope, Chain), Vec<u64>>);

impl Kept for Shelf {
    fn has(&self, scope: CacheScope, text: Chain) -> bool {
        self.0.contains_key(&(scope, text))
    }
}

/// What a sequence was told on arrival, and what became of its client.
#[derive(Clone)]
pub(in crate::scheduler) struct Promise {
    pub prompt: Vec<TokenId>,
    /// Tokens of prompt and answer at which it ends.
    pub end: usize,
    pub scope: CacheScope,
    pub tenant: Tenant,
    /// Its tokens are chosen where the next pass can read them,
    pub goes_on: bool,
    /// and it is known before which one is its last.
    pub counts: bool,
    pub reader: Reader,
}

/// Somebody who reads more or less.
#[derive(Clone, Copy, Default)]
pub(in crate::scheduler) struct Reader {
    /// The sequence is to stand aside,
    pub behind: bool,
    /// and does,
    pub aside: bool,
    /// or did before.
    pub stood: bool,
}

/// Prompt and answer of a sequence that never met another, and never stood aside.
pub(in crate::scheduler) fn alone(promise: &Promise) -> Vec<TokenId> {
    go_on(promise.scope, &promise.prompt, promise.end)
}

/// `tokens` and what follows them, `end` in all.
pub(in crate::scheduler) fn go_on(
    scope: CacheScope,
    tokens: &[TokenId],
    end: usize,
) -> Vec<TokenId> {
    let mut hash = origin(scope);
    let mut tokens = tokens.to_vec();
    let mut i = 0;
    while tokens.len() < end {
        while i < tokens.len() {
            hash = after(hash, tokens[i]);
            i += 1;
        }
        tokens.push(chosen(hash));
    }
    tokens
}

/// What is stored before the first token: no two scopes have keys and values in common.
pub(in crate::scheduler) fn origin(scope: CacheScope) -> u64 {
    scope.tenant + (scope.adapter << 32)
}

/// What is stored for a token, behind what is stored for those before it.
pub(in crate::scheduler) fn after(hash: u64, token: TokenId) -> u64 {
    (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
}

/// The token that follows.
pub(in crate::scheduler) fn chosen(hash: u64) -> TokenId {
    (hash % 101) as TokenId
}

/// xorshift64*
pub(in crate::scheduler) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n as u64) as usize
    }
}
