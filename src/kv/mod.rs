//! The block pool: which KV blocks are free, how many hold each of the others, and what text each
//! of them is the KV of.
//!
//! A block is *held* by sequences, or *idle*: nobody holds it but its text is known, so that the
//! next sequence that begins with the same text may have it; or *blank*. Idle blocks are free
//! blocks: when no blank one is left, the one that has been idle longest forgets its text.
//!
//! Ids and reference counts, no tensors. Owned by the scheduler, so it needs no lock. Deliberately
//! absent: the storage itself (`hearth_models::kv_store`) and any knowledge of sequences.

mod chain;
mod line;
mod prefix;

use std::collections::BTreeMap;

pub use chain::{Chain, Forgotten, Kept};
use line::Line;
pub use prefix::Before;
use prefix::PrefixIndex;

use crate::types::{BlockId, CacheScope, TokenId};

/// All blocks of one engine.
#[derive(Clone, Debug)]
pub struct BlockPool {
    /// Blocks without holders and without a known text; the last one is handed out next.
    blank: Vec<BlockId>,
    /// Blocks without holders whose text is known, by the tick at which they were let go.
    idle: BTreeMap<u64, BlockId>,
    /// Holders of each block, by id.
    refs: Vec<u32>,
    /// The key in `idle`, by id; of no meaning for others.
    idle_since: Vec<u64>,
    tick: u64,
    reached: usize,
    index: PrefixIndex,
    line: Line,
    /// Blocks that ever had to forget their text.
    evictions: u64,
    /// Those of them that nobody has asked for yet.
    forgotten: Vec<Forgotten>,
}

impl BlockPool {
    /// `count` blank blocks.
    pub fn new(count: usize) -> Self {
        let ids = u32::try_from(count).expect("block ids are 32 bits; this is a bug");
        Self {
            blank: (0..ids).rev().map(BlockId).collect(),
            idle: BTreeMap::new(),
            refs: vec![0; count],
            idle_since: vec![0; count],
            tick: 0,
            reached: 0,
            index: PrefixIndex::new(count),
            line: Line::new(count, None),
            evictions: 0,
            forgotten: Vec::new(),
        }
    }

    /// The same, where blocks are kept outside of the pool: at once if so many are new in a prompt.
    pub fn keeping(self, new_min: Option<usize>) -> Self {
        Self { line: Line::new(self.refs.len(), new_min), ..self }
    }

    /// A block for one holder, or `None` when all are held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.blank.pop() {
            Some(block) => block,
            None => self.evict()?,
        };
        self.refs[block.0 as usize] = 1;
        self.reached = self.reached.max(block.0 as usize + 1);
        Some(block)
    }

    /// One more holder of a block that is held, or idle.
    pub fn retain(&mut self, block: BlockId) {
        let i = block.0 as usize;
        if self.refs[i] == 0 {
            let idle = self.idle.remove(&self.idle_since[i]);
            assert_eq!(idle, Some(block), "a blank block cannot be shared; this is a bug");
        }
        self.refs[i] += 1;
    }

    /// One holder less; without the last one the block is free. A sequence lets its last block go
    /// first, so that a text is forgotten from its end.
    pub fn release(&mut self, block: BlockId) {
        let i = block.0 as usize;
        assert!(self.refs[i] > 0, "{block:?} is released twice; this is a bug");
        self.refs[i] -= 1;
        if self.refs[i] > 0 {
            return;
        }
        if self.index.contains(block) {
            self.idle_since[i] = self.tick;
            self.idle.insert(self.tick, block);
            self.tick += 1;
        } else {
            self.blank.push(block);
        }
    }

    /// The block with this text in this place, and what to call it as the place of the next.
    pub fn find(&self, before: Before, text: &[TokenId]) -> Option<(BlockId, Before)> {
        self.index.find(before, text)
    }

    /// The block in this place whose text begins most like this one, and how many tokens it shares,
    /// if these are so many. It counts as used.
    pub fn nearest(
        &mut self,
        before: Before,
        text: &[TokenId],
        at_least: usize,
    ) -> Option<(BlockId, usize)> {
        let nearest = self.index.nearest(before, text);
        let (block, alike) = nearest.filter(|(_, alike)| *alike >= at_least)?;
        self.retain(block);
        self.release(block);
        Some((block, alike))
    }

    /// Makes a held block known by its text, so that others may hold it too. Where another one
    /// is known already, the holder gets that one instead. A known block is never written again.
    pub fn publish(
        &mut self,
        block: BlockId,
        before: Before,
        text: &[TokenId],
    ) -> (BlockId, Before) {
        let Some((known, name)) = self.find(before, text) else {
            self.line.enter(block);
            return (block, self.index.insert(block, before, text));
        };
        self.adopt(known);
        self.release(block);
        (known, name)
    }

    /// One more holder of a known block, for whom it need not be computed.
    pub fn adopt(&mut self, block: BlockId) {
        self.retain(block);
        self.share_above(block);
        self.line.again(block);
    }

    /// A known block is of a prompt of which so many blocks were new.
    pub fn is_new(&mut self, block: BlockId, new: usize) {
        self.line.is_new(block, new);
    }

    /// A known block came from outside of the pool.
    pub fn came(&mut self, block: BlockId) {
        self.share_above(block);
        self.line.came(block);
    }

    /// What stands before a block of use is of use: forks have not taken it up, and it may have
    /// been computed because it alone had no file.
    fn share_above(&mut self, block: BlockId) {
        let mut above = Vec::new();
        let mut next = self.index.block_above(block).filter(|_| self.line.is_open());
        while let Some(block) = next.filter(|block| !self.line.is_shared(*block)) {
            above.push(block);
            next = self.index.block_above(block);
        }
        above.into_iter().rev().for_each(|block| self.line.again(block));
    }

    /// Known blocks that are worth to be kept outside of the pool, and are not.
    pub fn unkept_count(&self) -> usize {
        self.line.waiting()
    }

    /// What is to be kept next, the beginning of a text before its end; also what is kept already
    /// and was used again. Nobody writes into it: it is known.
    pub fn next_unkept(&mut self) -> Option<Forgotten> {
        let block = self.line.next()?;
        self.describe(block)
    }

    /// What was to be kept is not, and goes before all others.
    pub fn put_back(&mut self, block: BlockId) {
        self.line.back(block);
    }

    /// What was kept may be lost: whatever is still here goes again.
    pub fn keep_again(&mut self) {
        let blocks = (0..self.refs.len() as u32).map(BlockId);
        let depths = blocks.filter_map(|block| Some((self.index.depth(block)?, block)));
        let mut depths: Vec<_> = depths.collect();
        depths.sort_unstable();
        self.line.again_all(depths.into_iter().map(|(_, block)| block));
    }

    /// Nothing is kept outside of the pool any more.
    pub fn keep_nothing(&mut self) {
        self.line.close();
    }

    /// Only one sequence holds it and its text is not known: it may be written.
    pub fn is_private(&self, block: BlockId) -> bool {
        self.refs[block.0 as usize] == 1 && !self.index.contains(block)
    }

    /// Nobody holds it.
    pub fn is_free(&self, block: BlockId) -> bool {
        self.refs[block.0 as usize] == 0
    }

    /// Blocks that nobody holds.
    pub fn free_count(&self) -> usize {
        self.blank.len() + self.idle.len()
    }

    /// Those of them whose text is known.
    pub fn idle_count(&self) -> usize {
        self.idle.len()
    }

    /// How many of the first blocks were ever handed out: those behind them never were.
    pub fn reached(&self) -> usize {
        self.reached
    }

    /// All blocks.
    pub fn block_count(&self) -> usize {
        self.refs.len()
    }

    /// Scope, text and number of the blocks that stand there.
    pub fn above(&self, before: Before) -> (CacheScope, Chain, usize) {
        self.index.above(before)
    }

    /// Blocks that had to forget their text since this was asked last, in that order: of one text
    /// the end before the beginning.
    pub fn take_forgotten(&mut self) -> Vec<Forgotten> {
        std::mem::take(&mut self.forgotten)
    }

    /// What all idle blocks hold, the one that was let go last first: of one text the beginning
    /// before the end.
    pub fn idle(&self) -> impl Iterator<Item = Forgotten> {
        self.idle.values().rev().filter_map(|block| self.describe(*block))
    }

    /// Blocks that ever had to forget their text.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Counts every reference again from the tables of all holders and compares.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) -> Result<(), String> {
        let mut refs = vec![0; self.refs.len()];
        for block in tables.flatten() {
            refs[block.0 as usize] += 1;
        }
        if let Some(i) = (0..refs.len()).find(|&i| refs[i] != self.refs[i]) {
            return Err(format!("block {i}: counted {}, kept {}", refs[i], self.refs[i]));
        }
        self.index.check()?;
        self.line.check(|block| self.index.contains(block))?;
        let free = |known: bool| {
            let ids = (0..refs.len() as u32).map(BlockId);
            ids.filter(move |&b| self.is_free(b) && self.index.contains(b) == known)
        };
        let mut blank = self.blank.clone();
        blank.sort_unstable();
        if !free(false).eq(blank.iter().copied()) {
            return Err(format!("{blank:?} are not the blocks without holders and text"));
        }
        let mut idle: Vec<BlockId> = self.idle.values().copied().collect();
        idle.sort_unstable();
        if !free(true).eq(idle.iter().copied()) {
            return Err(format!("{idle:?} are not the blocks without holders whose text is known"));
        }
        match self.idle.iter().find(|(tick, b)| self.idle_since[b.0 as usize] != **tick) {
            Some((_, block)) => Err(format!("{block:?} does not know since when it is idle")),
            None => Ok(()),
        }
    }

    /// The block that has been idle longest, its text forgotten.
    fn evict(&mut self) -> Option<BlockId> {
        let (_, block) = self.idle.pop_first()?;
        self.forgotten.extend(self.describe(block));
        self.index.remove(block);
        self.line.leave(block);
        self.evictions += 1;
        Some(block)
    }

    /// What a known block holds.
    fn describe(&self, block: BlockId) -> Option<Forgotten> {
        let forgotten = self.index.describe(block)?;
        Some(Forgotten { shared: self.line.is_shared(block), ..forgotten })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::CacheScope;

    const START: Before = Before::Start(CacheScope { adapter: 0, tenant: 0 });

    #[test]
    fn a_shared_block_is_free_after_its_last_holder() {
        let mut pool = BlockPool::new(2);
        let a = pool.allocate().unwrap();
        pool.retain(a);
        pool.release(a);
        assert_eq!(pool.free_count(), 1, "one holder is left");
        pool.check([[a].as_slice()].into_iter()).unwrap();
        pool.release(a);
        assert_eq!(pool.free_count(), 2);
        pool.check(std::iter::empty()).unwrap();
    }

    #[test]
    fn an_empty_pool_says_so() {
        let mut pool = BlockPool::new(1);
        assert!(pool.allocate().is_some());
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn check_sees_a_lost_reference() {
        let mut pool = BlockPool::new(2);
        let a = pool.allocate().unwrap();
        assert!(pool.check(std::iter::empty()).is_err());
        assert!(pool.check([[a, a].as_slice()].into_iter()).is_err());
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn releasing_twice_is_caught() {
        let mut pool = BlockPool::new(1);
        let a = pool.allocate().unwrap();
        pool.release(a);
        pool.release(a);
    }

    #[test]
    #[should_panic(expected = "a blank block cannot be shared")]
    fn a_blank_block_is_nobodys() {
        let mut pool = BlockPool::new(1);
        let a = pool.allocate().unwrap();
        pool.release(a);
        pool.retain(a);
    }

    #[test]
    fn a_known_text_is_found_in_its_place_only() {
        let mut pool = BlockPool::new(4);
        let [a, b] = [(); 2].map(|()| pool.allocate().unwrap());
        let (held, after_a) = pool.publish(a, START, &[1, 2]);
        assert_eq!(held, a);
        let (_, after_b) = pool.publish(b, after_a, &[3, 4]);
        assert_eq!(pool.find(START, &[1, 2]), Some((a, after_a)));
        assert_eq!(pool.find(after_a, &[3, 4]), Some((b, after_b)));
        assert_eq!(pool.find(START, &[3, 4]), None, "another place");
        assert_eq!(pool.find(after_a, &[3, 5]), None, "another text");
        for other in [CacheScope { adapter: 1, tenant: 0 }, CacheScope { adapter: 0, tenant: 1 }] {
            assert_eq!(pool.find(Before::Start(other), &[1, 2]), None, "another scope");
        }
        pool.check([[a, b].as_slice()].into_iter()).unwrap();
    }

    #[test]
    fn the_nearest_text_is_the_one_that_begins_most_alike() {
        let mut pool = BlockPool::new(5);
        let texts = [[5, 6, 7, 8], [5, 6, 9, 0], [5, 1, 1, 1], [4, 6, 7, 8]];
        let blocks = texts.map(|text| {
            let block = pool.allocate().unwrap();
            pool.publish(block, START, &text);
            block
        });
        let nearest = |pool: &mut BlockPool, text: &[TokenId]| pool.nearest(START, text, 1);
        assert_eq!(nearest(&mut pool, &[5, 6, 7, 0]), Some((blocks[0], 3)));
        assert_eq!(nearest(&mut pool, &[5, 6, 9]), Some((blocks[1], 3)), "less than a block");
        assert_eq!(nearest(&mut pool, &[5, 0]).unwrap().1, 1);
        assert_eq!(nearest(&mut pool, &[4, 6, 7, 8]), Some((blocks[3], 4)));
        assert_eq!(nearest(&mut pool, &[6, 6, 7, 8]), None);
        let elsewhere = Before::Start(CacheScope { adapter: 1, tenant: 0 });
        assert_eq!(pool.nearest(elsewhere, &[5, 6, 7, 8], 1), None, "another scope");
        blocks.iter().for_each(|&b| pool.release(b));
        pool.nearest(START, &[5, 6, 7, 0], 3);
        assert_eq!(pool.nearest(START, &[5, 6, 9], 4), None, "and one that is too far off is not");
        let order: Vec<_> = (0..5).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(order[1..], [blocks[1], blocks[2], blocks[3], blocks[0]], "used last");
    }

    #[test]
    fn who_computed_the_same_gets_the_block_that_is_known() {
        let mut pool = BlockPool::new(2);
        let [a, b] = [(); 2].map(|()| pool.allocate().unwrap());
        let first = pool.publish(a, START, &[1]);
        assert_eq!(pool.publish(b, START, &[1]), first);
        assert_eq!(pool.free_count(), 1);
        assert!(!pool.is_private(a), "known and held twice");
        pool.check([[a].as_slice(), &[a]].into_iter()).unwrap();
    }

    #[test]
    fn the_longest_idle_block_is_forgotten_first_and_its_name_never_comes_back() {
        let mut pool = BlockPool::new(3);
        let blocks = [(); 3].map(|()| pool.allocate().unwrap());
        let (_, after) = pool.publish(blocks[0], START, &[1]);
        let (_, after) = pool.publish(blocks[1], after, &[2]);
        pool.publish(blocks[2], after, &[3]);
        blocks.iter().rev().for_each(|&b| pool.release(b));
        assert_eq!((pool.free_count(), pool.idle_count()), (3, 3));
        assert_eq!(pool.allocate(), Some(blocks[2]), "the end of the text");
        assert_eq!(pool.find(after, &[3]), None);
        pool.retain(blocks[0]);
        assert_eq!(pool.allocate(), Some(blocks[1]));
        assert_eq!((pool.allocate(), pool.evictions()), (None, 2));
        let forgotten = pool.take_forgotten();
        let two = Chain::START.then(&[1]).then(&[2]);
        let said: Vec<_> = forgotten.iter().map(|f| (f.block, f.before, f.depth)).collect();
        assert_eq!(said, [(blocks[2], two, 2), (blocks[1], Chain::START.then(&[1]), 1)]);
        assert_eq!((&forgotten[0].text[..], pool.take_forgotten().len()), (&[3][..], 0));
        pool.release(blocks[1]);
        pool.check([[blocks[0]].as_slice(), &[blocks[2]]].into_iter()).unwrap();
        let b = pool.allocate().unwrap();
        let (_, first) = pool.find(START, &[1]).unwrap();
        let (_, again) = pool.publish(b, first, &[2]);
        assert_ne!(again, after, "what hung below the old block must not be found again");
    }
}
