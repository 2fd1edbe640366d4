//! The prefix index: which block holds the KV of which text.
//!
//! A tree. A block is found by what stands before it and by its own token ids, compared in full:
//! hashes only make the search fast, so no collision can lend one text the keys and values of
//! another. Names of nodes are never used twice, so what hung below a forgotten block is never
//! found again under its successor. Deliberately absent: who holds a block, and which one is to
//! be forgotten next: that is the pool's.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound::{Excluded, Included, Unbounded};

use super::chain::{Chain, Forgotten};
use crate::types::{BlockId, CacheScope, TokenId};

/// What stands before a block: the beginning of a text, or another block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Before {
    /// Nothing. Texts of different scopes share nothing.
    Start(CacheScope),
    /// A block, under the name that it was given for this text.
    Block(u64, BlockId),
}

/// All blocks whose text is known.
#[derive(Clone, Debug)]
pub(super) struct PrefixIndex {
    /// What hangs where, in the order of its text.
    children: HashMap<Before, BTreeMap<Box<[TokenId]>, Node>>,
    /// Where each indexed block hangs, by id.
    places: Vec<Option<Place>>,
    next_name: u64,
}

/// Where a block hangs, and what that is called everywhere.
#[derive(Clone, Debug)]
struct Place {
    before: Before,
    text: Box<[TokenId]>,
    scope: CacheScope,
    /// The text before it, and with it.
    chains: [Chain; 2],
    /// Blocks before it.
    depth: usize,
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
        Some((node.block, Before::Block(node.name, node.block)))
    }

    /// The block in this place whose text begins most like this one, and how many tokens it shares.
    pub fn nearest(&self, before: Before, text: &[TokenId]) -> Option<(BlockId, usize)> {
        let siblings = self.children.get(&before)?;
        // In the order of texts, the one that shares most stands beside this one.
        let below = siblings.range::<[TokenId], _>((Unbounded, Included(text))).next_back();
        let above = siblings.range::<[TokenId], _>((Excluded(text), Unbounded)).next();
        let nearest = below.into_iter().chain(above).map(|(other, node)| {
            let alike = other.iter().zip(text).take_while(|(a, b)| a == b).count();
            (node.block, alike)
        });
        nearest.max_by_key(|(_, alike)| *alike)
    }

    /// Takes up a block in a place that is empty.
    pub fn insert(&mut self, block: BlockId, before: Before, text: &[TokenId]) -> Before {
        let name = self.next_name;
        self.next_name += 1;
        let (scope, above, depth) = self.above(before);
        let chains = [above, above.then(text)];
        let place = &mut self.places[block.0 as usize];
        assert!(place.is_none(), "{block:?} is indexed twice; this is a bug");
        *place = Some(Place { before, text: text.into(), scope, chains, depth });
        let old =
            self.children.entry(before).or_default().insert(text.into(), Node { block, name });
        assert!(old.is_none(), "the place of {block:?} is taken; this is a bug");
        Before::Block(name, block)
    }

    /// Forgets a block.
    pub fn remove(&mut self, block: BlockId) {
        let place = self.places[block.0 as usize].take();
        let place = place.expect("only an indexed block is forgotten; this is a bug");
        let siblings =
            self.children.get_mut(&place.before).expect("it hangs where it says; this is a bug");
        siblings.remove(&place.text);
        if siblings.is_empty() {
            self.children.remove(&place.before);
        }
    }

    /// Blocks before it.
    pub fn depth(&self, block: BlockId) -> Option<usize> {
        self.places[block.0 as usize].as_ref().map(|place| place.depth)
    }

    /// The block before it, unless that has forgotten its text.
    pub fn block_above(&self, block: BlockId) -> Option<BlockId> {
        let place = self.places[block.0 as usize].as_ref()?;
        let Before::Block(_, above) = place.before else { return None };
        let its = self.places[above.0 as usize].as_ref()?;
        ((its.scope, its.chains[1]) == (place.scope, place.chains[0])).then_some(above)
    }

    /// What an indexed block holds; who used it is not known here.
    pub fn describe(&self, block: BlockId) -> Option<Forgotten> {
        let Place { before: _, text, scope, chains, depth } =
            self.places[block.0 as usize].as_ref()?;
        let (scope, before, depth) = (*scope, chains[0], *depth);
        Some(Forgotten { block, scope, before, depth, text: text.clone(), shared: false })
    }

    /// Scope, text and blocks of what stands there. Whoever names a block holds it, so it is here.
    pub fn above(&self, before: Before) -> (CacheScope, Chain, usize) {
        match before {
            Before::Start(scope) => (scope, Chain::START, 0),
            Before::Block(_, block) => {
                let place = self.places[block.0 as usize].as_ref();
                let place = place.expect("what hangs below a block holds it; this is a bug");
                (place.scope, place.chains[1], place.depth + 1)
            }
        }
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.places[block.0 as usize].is_some()
    }

    fn name_of(&self, place: &Place) -> Option<u64> {
        Some(self.children.get(&place.before)?.get(&place.text)?.name)
    }

    /// Both sides name the same blocks.
    pub fn check(&self) -> Result<(), String> {
        let hanging = self.children.values().map(BTreeMap::len).sum::<usize>();
        let placed = self.places.iter().flatten().count();
        if hanging != placed || self.children.values().any(BTreeMap::is_empty) {
            return Err(format!("{hanging} blocks hang in the index, {placed} have a place"));
        }
        for (id, place) in self.places.iter().enumerate() {
            let Some(Place { before, text, scope, chains, depth }) = place else { continue };
            let found = self.find(*before, text).map(|(block, _)| block);
            if found != Some(BlockId(id as u32)) {
                return Err(format!("block {id}: {found:?} is found in its place"));
            }
            if chains[1] != chains[0].then(text) {
                return Err(format!("block {id} has the name of another text"));
            }
            // What it hung below may be forgotten before it, and be another block by now.
            let hangs = match before {
                Before::Start(own) => Some((*own, Chain::START, 0)),
                Before::Block(name, above) => self.places[above.0 as usize]
                    .as_ref()
                    .filter(|place| self.name_of(place) == Some(*name))
                    .map(|place| (place.scope, place.chains[1], place.depth + 1)),
            };
            if hangs.is_some_and(|above| above != (*scope, chains[0], *depth)) {
                return Err(format!("block {id} is not called as what it hangs below"));
            }
        }
        Ok(())
    }
}
