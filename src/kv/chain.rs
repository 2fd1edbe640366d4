//! What a block of text is called where a name must mean the same tomorrow and in another process.
//!
//! A name follows from all tokens up to the end of its block (SHA-256, each block's over the name
//! before it and its own tokens), not from who computed it, and not from its scope. Names in the
//! prefix index are numbers of one process; these are for the store of blocks on disk.

use ring::digest::{Context, SHA256};

use crate::types::{BlockId, CacheScope, TokenId};

/// A text of whole blocks, from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chain([u8; 32]);

impl Chain {
    /// The empty text.
    pub const START: Self = Self([0; 32]);

    /// This text and one more block.
    pub fn then(self, text: &[TokenId]) -> Self {
        let mut hash = Context::new(&SHA256);
        hash.update(&self.0);
        for token in text {
            hash.update(&token.to_le_bytes());
        }
        let mut name = [0; 32];
        name.copy_from_slice(hash.finish().as_ref());
        Self(name)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// A block and its text, which may have been forgotten. Its keys and values are there until
/// somebody writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forgotten {
    /// The block.
    pub block: BlockId,
    /// Whose it was.
    pub scope: CacheScope,
    /// The text before it.
    pub before: Chain,
    /// Blocks before it.
    pub depth: usize,
    /// Its own text.
    pub text: Box<[TokenId]>,
    /// More than one sequence had a use for it.
    pub shared: bool,
}

/// Blocks that are kept outside of the pool.
pub trait Kept {
    /// Whether the last block of this text is there, as far as is known.
    fn has(&self, scope: CacheScope, text: Chain) -> bool;
}

/// None.
impl Kept for () {
    fn has(&self, _: CacheScope, _: Chain) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_all_of_the_text_and_its_cuts() {
        let texts: [&[&[TokenId]]; 5] =
            [&[&[1, 2], &[3, 4]], &[&[1, 2]], &[&[3, 4], &[1, 2]], &[&[1, 2, 3, 4]], &[&[1, 3]]];
        let name = |text: &[&[TokenId]]| text.iter().fold(Chain::START, |c, text| c.then(text));
        let mut names = texts.map(name).to_vec();
        assert_eq!(name(texts[0]), names[0]);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), texts.len());
    }
}
