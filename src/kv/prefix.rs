//! The prefix index: which block holds the KV of which text.
//!
//! A tree. A block is found by what stands before it and by its own token ids, compared in full:
//! hashes only make the search fast, so no collision can lend one text the keys and values of
//! another. Names of nodes are never used twice, so what hung below a forgotten block is never
//! found again under its successor. Deliberately absent: who holds a block, and which one is to
//! be forgotten next: that is the pool's.

use std::collections::HashMap;

use crate::types::{BlockId, CacheScope, TokenId};

/// What stands before a block: the beginning of a text, or another block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Before {
    /// Nothing. Texts of different scopes share nothing.
    Start(CacheScope),
    /// The block that was given this name.
    Block(u64),
}

/// All blocks whose text is known.
#[derive(Clone, Debug)]
pub(super) struct PrefixIndex {
    children: HashMap<Before, HashMap<Box<[TokenId]>, Node>>,
    /// Where each indexed block hangs, by id.
    places: Vec<Option<(Before, Box<[TokenId]>)>>,
    next_name: u64,
}

/// An indexed block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Node {
    block: BlockId,
    name: u64,
}

impl PrefixIndex {
    pub fn new(block_count: usize) -> Self {
        Self { children: HashMap::new(), places: vec![None; block_count], next_name: 0 }
    }

    /// The block with this text in this place, and what to call it as the place of the next.
    pub fn find(&self, before: Before, text: &[TokenId]) -> Option<(BlockId, Before)> {
        let node = self.children.get(&before)?.get(text)?;
        Some((node.block, Before::Block(node.name)))
    }

    /// Takes up a block in a place that is empty.
    pub fn insert(&mut self, block: BlockId, before: Before, text: &[TokenId]) -> Before {
        let name = self.next_name;
        self.next_name += 1;
        let place = &mut self.places[block.0 as usize];
        assert!(place.is_none(), "{block:?} is indexed twice; this is a bug");
        *place = Some((before, text.into()));
        let old =
            self.children.entry(before).or_default().insert(text.into(), Node { block, name });
        assert!(old.is_none(), "the place of {block:?} is taken; this is a bug");
        Before::Block(name)
    }

    /// Forgets a block.
    pub fn remove(&mut self, block: BlockId) {
        let place = self.places[block.0 as usize].take();
        let (before, text) = place.expect("only an indexed block is forgotten; this is a bug");
        let siblings =
            self.children.get_mut(&before).expect("it hangs where it says; this is a bug");
        siblings.remove(&text);
        if siblings.is_empty() {
            self.children.remove(&before);
        }
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.places[block.0 as usize].is_some()
    }

    /// Both sides name the same blocks.
    pub fn check(&self) -> Result<(), String> {
        let hanging = self.children.values().map(HashMap::len).sum::<usize>();
        let placed = self.places.iter().flatten().count();
        if hanging != placed || self.children.values().any(HashMap::is_empty) {
            return Err(format!("{hanging} blocks hang in the index, {placed} have a place"));
        }
        for (id, place) in self.places.iter().enumerate() {
            let Some((before, text)) = place else { continue };
            let found = self.find(*before, text).map(|(block, _)| block);
            if found != Some(BlockId(id as u32)) {
                return Err(format!("block {id}: {found:?} is found in its place"));
            }
        }
        Ok(())
    }
}
