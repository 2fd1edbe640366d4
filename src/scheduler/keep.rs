//! Blocks that go to where they outlast memory before they have to leave it. What is worth it, and
//! in which order, the pool knows (`kv::line`); when there is time for it, the engine.

use std::collections::BTreeSet;

use super::Scheduler;
use crate::kv::Forgotten;
use crate::types::BlockId;

impl Scheduler {
    /// Blocks that are to be kept and are not.
    pub fn unkept_count(&self) -> usize {
        self.pool.unkept_count()
    }

    /// The next one. Its rows are done and nobody writes into it, also while a batch flies; so it
    /// may be copied until the next batch is scheduled.
    pub fn next_unkept(&mut self) -> Option<Forgotten> {
        self.pool.next_unkept()
    }

    /// It could not be copied now: it is the next one again.
    pub fn put_back(&mut self, block: &Forgotten) {
        self.pool.put_back(block.block);
    }

    /// Something that was to be kept got lost on the way: all goes again that is still here.
    pub fn keep_again(&mut self) {
        self.pool.keep_again();
    }

    /// The end: all that is to be kept and is not, and then whatever is idle; each block once.
    pub fn put_away(&mut self) -> Vec<Forgotten> {
        let mut blocks: Vec<Forgotten> = std::iter::from_fn(|| self.next_unkept()).collect();
        let there: BTreeSet<BlockId> = blocks.iter().map(|block| block.block).collect();
        blocks.extend(self.pool.idle().filter(|block| !there.contains(&block.block)));
        blocks
    }

    /// Nothing is kept any more.
    pub fn keep_nothing(&mut self) {
        self.pool.keep_nothing();
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{BLOCK_LEN, config, step, text};
    use super::super::{Scheduler, SchedulerConfig};
    use crate::types::{SeqId, TokenId};

    /// Three new blocks are a long prompt.
    fn keeping() -> Scheduler {
        let keep_blocks_min = Some(3);
        Scheduler::new(SchedulerConfig { keep_blocks_min, ..config(100, 64, 4) })
    }

    /// Beginning and depth of all that goes now.
    fn goes(s: &mut Scheduler) -> Vec<(TokenId, usize, bool)> {
        s.check().unwrap();
        let all = std::iter::from_fn(|| s.next_unkept());
        all.map(|block| (block.text[0], block.depth, block.shared)).collect()
    }

    fn prompt(blocks: &[TokenId]) -> Vec<TokenId> {
        blocks.iter().flat_map(|&token| [token; BLOCK_LEN]).chain([99]).collect()
    }

    fn ask(s: &mut Scheduler, id: u64, blocks: &[TokenId]) {
        s.add(text(id, prompt(blocks)));
        step(s);
    }

    #[test]
    fn a_chapter_goes_at_once_and_a_question_when_it_is_asked_again() {
        let mut s = keeping();
        ask(&mut s, 0, &[1, 2, 3, 4]);
        assert_eq!(s.unkept_count(), 4);
        ask(&mut s, 1, &[70]);
        ask(&mut s, 2, &[1, 2, 3, 4, 50, 51]);
        // The second reader came before the first block went.
        let shared = [(1, 0, true), (2, 1, true), (3, 2, true), (4, 3, true)];
        assert_eq!(goes(&mut s), shared, "the chapter and no question");
        ask(&mut s, 3, &[1, 2, 3, 4, 50]);
        assert_eq!(s.unkept_count(), 1, "the same question");
        let told = [(50, 4, true), (1, 0, true), (2, 1, true), (3, 2, true), (4, 3, true)];
        assert_eq!(goes(&mut s), told, "and what was there is of use");
    }

    #[test]
    fn what_is_read_by_several_goes_before_what_came_earlier() {
        let mut s = keeping();
        ask(&mut s, 0, &[1, 2, 3]);
        ask(&mut s, 1, &[10]);
        ask(&mut s, 2, &[10, 11]);
        let want = [(10, 0, true), (1, 0, false), (2, 1, false), (3, 2, false)];
        assert_eq!(goes(&mut s), want);
    }

    #[test]
    fn answers_do_not_go_and_what_failed_goes_again() {
        let mut s = keeping();
        ask(&mut s, 0, &[1, 2, 3]);
        (0..4 * BLOCK_LEN).for_each(|_| drop(step(&mut s)));
        let want = [(1, 0, false), (2, 1, false), (3, 2, false)];
        assert_eq!(goes(&mut s), want);
        assert_eq!(goes(&mut s), []);
        s.keep_again();
        assert_eq!((s.unkept_count(), goes(&mut s)), (3, want.to_vec()));
        s.finish(SeqId(0));
        s.keep_nothing();
        ask(&mut s, 1, &[1, 2, 3]);
        ask(&mut s, 2, &[4, 5, 6]);
        assert_eq!((s.unkept_count(), goes(&mut s)), (0, vec![]));
    }

    #[test]
    fn at_the_end_every_block_goes_once_and_what_is_worth_it_first() {
        let mut s = keeping();
        ask(&mut s, 0, &[70]);
        ask(&mut s, 1, &[1, 2, 3]);
        s.finish(SeqId(0));
        s.finish(SeqId(1));
        assert_eq!((s.unkept_count(), s.pool().idle_count()), (3, 4));
        let away: Vec<_> = s.put_away().iter().map(|block| block.text[0]).collect();
        assert_eq!(away, [1, 2, 3, 70]);
    }

    #[test]
    fn who_comes_back_to_its_own_blocks_is_nobody_else() {
        let mut s = keeping();
        ask(&mut s, 0, &[1, 2, 3]);
        ask(&mut s, 1, &[70]);
        (0..2 * BLOCK_LEN).for_each(|_| drop(step(&mut s)));
        let want = [(1, 0, false), (2, 1, false), (3, 2, false)];
        assert_eq!(goes(&mut s), want);
        for id in [0, 1].map(SeqId) {
            assert!(s.set_aside(id));
            s.bring_back(id);
        }
        let blocks = s.pool().idle_count();
        step(&mut s);
        assert!(blocks > 5 && s.pool().idle_count() == 0, "they are back");
        assert_eq!((s.unkept_count(), goes(&mut s)), (0, vec![]));
        // What it had is worth as much as before, also when it stands in the line.
        ask(&mut s, 2, &[4, 5, 6]);
        assert!(s.set_aside(SeqId(2)));
        s.bring_back(SeqId(2));
        step(&mut s);
        assert_eq!(goes(&mut s), [(4, 0, false), (5, 1, false), (6, 2, false)]);
        ask(&mut s, 3, &[70]);
        assert_eq!(goes(&mut s), [(70, 0, true)], "somebody else");
    }
}
