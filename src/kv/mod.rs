//! The block pool: which KV blocks are free and how many sequences hold each of the others.
//!
//! Ids and reference counts, no tensors. Owned by the scheduler, so it needs no lock. Deliberately
//! absent: the storage itself (`hearth_models::kv_store`) and any knowledge of sequences.

use crate::types::BlockId;

/// All blocks of one engine.
#[derive(Clone, Debug)]
pub struct BlockPool {
    /// Blocks that nobody holds; the last one is handed out next.
    free: Vec<BlockId>,
    /// Holders of each block, by id.
    refs: Vec<u32>,
}

impl BlockPool {
    /// `count` free blocks.
    pub fn new(count: usize) -> Self {
        let count = u32::try_from(count).expect("block ids are 32 bits; this is a bug");
        Self { free: (0..count).rev().map(BlockId).collect(), refs: vec![0; count as usize] }
    }

    /// A block for one holder, or `None` when all are held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.refs[block.0 as usize] = 1;
        Some(block)
    }

    /// One more holder.
    pub fn retain(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        assert!(*refs > 0, "{block:?} is free and cannot be shared; this is a bug");
        *refs += 1;
    }

    /// One holder less; the last one frees the block.
    pub fn release(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        assert!(*refs > 0, "{block:?} is released twice; this is a bug");
        *refs -= 1;
        if *refs == 0 {
            self.free.push(block);
        }
    }

    /// Blocks that nobody holds.
    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    /// All blocks.
    pub fn block_count(&self) -> usize {
        self.refs.len()
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
        let mut free: Vec<_> = self.free.iter().map(|b| b.0).collect();
        free.sort_unstable();
        let expected = (0..refs.len() as u32).filter(|&i| refs[i as usize] == 0);
        if !expected.eq(free.iter().copied()) {
            return Err(format!("the free list {free:?} is not the blocks without holders"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
