//! Which known blocks are worth a file and have none, and in which order they get one.
//!
//! Worth it at once is what more than one sequence had a use for, and then what was new in a long
//! prompt: a chapter before its second reader. What was computed for a short question, and what was
//! answered, is worth it once somebody comes with the same text. Of one text the beginning goes
//! before the end. What has its file and is used again comes last: the file only has to be told. A
//! value; off until it is asked for.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::types::BlockId;

/// Why a block waits; what is worth more comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Why {
    /// Another sequence had a use for it.
    Shared,
    /// It is of a long prompt that nobody had asked before.
    New,
    /// It has a file, and was used again.
    Again,
}

/// What is known of a block whose text is.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    shared: bool,
    new: bool,
    /// It has a file, or is on its way there.
    kept: bool,
    place: Option<(Why, i64)>,
}

/// The line.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// So many new blocks make a long prompt; `None`: nothing has files.
    new_min: Option<usize>,
    order: BTreeSet<(Why, i64, BlockId)>,
    /// By id; of no meaning for blocks whose text is not known.
    blocks: Vec<State>,
    /// Before and behind all who ever stood in it.
    ticks: Range<i64>,
    /// Those in the line that have no file.
    waiting: usize,
}

impl Line {
    pub fn new(block_count: usize, new_min: Option<usize>) -> Self {
        let blocks = vec![State::default(); block_count];
        Self { new_min, order: BTreeSet::new(), blocks, ticks: 0..0, waiting: 0 }
    }

    /// Whether anything has files.
    pub fn is_open(&self) -> bool {
        self.new_min.is_some()
    }

    /// Blocks that are worth a file and have none.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    pub fn is_shared(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].shared
    }

    /// Its text is known from now on.
    pub fn enter(&mut self, block: BlockId) {
        self.leave(block);
        self.blocks[block.0 as usize] = State::default();
    }

    /// It is of a prompt of which so many blocks were new.
    pub fn is_new(&mut self, block: BlockId, new: usize) {
        let state = &mut self.blocks[block.0 as usize];
        if self.new_min.is_some_and(|min| new >= min) && !state.kept && !state.shared {
            state.new = true;
            self.stand(block, Why::New);
        }
    }

    /// Another sequence has a use for it.
    pub fn again(&mut self, block: BlockId) {
        if !self.is_open() {
            return;
        }
        let state = &mut self.blocks[block.0 as usize];
        state.shared = true;
        match state.kept {
            true => self.stand(block, Why::Again),
            false => self.stand(block, Why::Shared),
        }
    }

    /// It came out of a file.
    pub fn came(&mut self, block: BlockId) {
        if !self.is_open() {
            return;
        }
        self.leave(block);
        let state = &mut self.blocks[block.0 as usize];
        (state.shared, state.kept) = (true, true);
    }

    /// Nobody waits for it any more.
    pub fn leave(&mut self, block: BlockId) {
        if let Some((why, tick)) = self.blocks[block.0 as usize].place.take() {
            self.order.remove(&(why, tick, block));
            self.waiting -= usize::from(why != Why::Again);
        }
    }

    /// The first of the line, which gets its file now.
    pub fn next(&mut self) -> Option<BlockId> {
        let &(_, _, block) = self.order.first()?;
        self.leave(block);
        self.blocks[block.0 as usize].kept = true;
        Some(block)
    }

    /// The one that was [`Line::next`] did not get its file: it goes before all others.
    pub fn back(&mut self, block: BlockId) {
        if let Some(why) = self.has_none(block) {
            self.ticks.start -= 1;
            self.put(block, why, self.ticks.start);
        }
    }

    /// Those among these that went to files may have none: they go again, in this order.
    pub fn again_all(&mut self, blocks: impl Iterator<Item = BlockId>) {
        for block in blocks {
            if let Some(why) = self.has_none(block) {
                self.stand(block, why);
            }
        }
    }

    /// It has no file after all. Why it is worth one, if it went to one and is.
    fn has_none(&mut self, block: BlockId) -> Option<Why> {
        let state = &mut self.blocks[block.0 as usize];
        match (std::mem::take(&mut state.kept) && self.new_min.is_some(), state.shared, state.new) {
            (true, true, _) => Some(Why::Shared),
            (true, false, true) => Some(Why::New),
            _ => None,
        }
    }

    /// Nothing has files any more.
    pub fn close(&mut self) {
        *self = Self::new(self.blocks.len(), None);
    }

    /// At the end of those who wait for the same reason, unless it stands there already.
    fn stand(&mut self, block: BlockId, why: Why) {
        let place = self.blocks[block.0 as usize].place;
        if place.is_some_and(|(stands, _)| stands == why) {
            return;
        }
        self.put(block, why, self.ticks.end);
        self.ticks.end += 1;
    }

    fn put(&mut self, block: BlockId, why: Why, tick: i64) {
        self.leave(block);
        self.blocks[block.0 as usize].place = Some((why, tick));
        self.order.insert((why, tick, block));
        self.waiting += usize::from(why != Why::Again);
    }

    /// What is kept twice is the same, and only known blocks stand here.
    pub fn check(&self, is_known: impl Fn(BlockId) -> bool) -> Result<(), String> {
        let places = (0..).map(BlockId).zip(&self.blocks);
        let order: BTreeSet<_> =
            places.filter_map(|(block, s)| s.place.map(|(why, tick)| (why, tick, block))).collect();
        let waiting = order.iter().filter(|(why, ..)| *why != Why::Again).count();
        if order != self.order || waiting != self.waiting {
            return Err(format!("{:?} and {} are not {order:?}", self.order, self.waiting));
        }
        match order.iter().find(|(_, _, block)| !is_known(*block)) {
            Some(place) => Err(format!("{place:?} waits for a file and is of no text")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Line {
        Line::new(16, Some(3))
    }

    fn all(line: &mut Line) -> Vec<u32> {
        line.check(|_| true).unwrap();
        std::iter::from_fn(|| line.next()).map(|block| block.0).collect()
    }

    #[test]
    fn what_others_use_goes_first_and_what_was_asked_once_only_if_it_is_long() {
        let mut line = line();
        (0..8).for_each(|b| line.enter(BlockId(b)));
        (0..2).for_each(|b| line.is_new(BlockId(b), 2)); // a question
        (2..5).for_each(|b| line.is_new(BlockId(b), 3)); // a chapter
        (5..8).for_each(|b| line.again(BlockId(b)));
        line.again(BlockId(4));
        assert_eq!(line.waiting(), 6);
        assert_eq!(all(&mut line), [5, 6, 7, 4, 2, 3]);
        assert_eq!((line.waiting(), line.next()), (0, None));
        line.again(BlockId(0));
        assert_eq!(all(&mut line), [0], "somebody asked the same question");
    }

    #[test]
    fn what_has_its_file_is_only_told_and_comes_last() {
        let mut line = line();
        (0..6).for_each(|b| line.enter(BlockId(b)));
        (0..3).for_each(|b| line.is_new(BlockId(b), 3));
        assert_eq!(all(&mut line), [0, 1, 2]);
        line.came(BlockId(3));
        line.is_new(BlockId(3), 9);
        assert_eq!(line.waiting(), 0, "it was read");
        (0..4).chain(0..4).for_each(|b| line.again(BlockId(b)));
        assert_eq!(line.waiting(), 0);
        line.is_new(BlockId(4), 3);
        assert_eq!(all(&mut line), [4, 0, 1, 2, 3]);
    }

    #[test]
    fn who_forgets_its_text_leaves_and_a_write_that_failed_comes_again() {
        let mut line = line();
        (0..4).for_each(|b| line.enter(BlockId(b)));
        (0..4).for_each(|b| line.is_new(BlockId(b), 4));
        line.leave(BlockId(1));
        assert!(line.check(|b| b != BlockId(1)).is_ok() && line.check(|b| b.0 > 1).is_err());
        assert_eq!(all(&mut line), [0, 2, 3]);
        line.again(BlockId(3));
        line.enter(BlockId(1));
        line.again_all([0, 1, 2, 3].map(BlockId).into_iter());
        assert_eq!((line.waiting(), all(&mut line)), (3, vec![3, 0, 2]));
        line.enter(BlockId(0));
        line.again_all([BlockId(0)].into_iter());
        assert_eq!(line.next(), None, "another text");
    }

    #[test]
    fn where_nothing_has_files_nobody_waits() {
        let mut line = Line::new(4, None);
        line.enter(BlockId(0));
        line.is_new(BlockId(0), 100);
        line.again(BlockId(0));
        line.came(BlockId(0));
        line.again_all([BlockId(0)].into_iter());
        assert_eq!((line.waiting(), line.next()), (0, None));
        line.back(BlockId(0));
        assert_eq!((line.waiting(), line.next()), (0, None));
    }

    #[test]
    fn who_is_put_back_stands_before_all_who_came_later() {
        let mut line = line();
        (0..6).for_each(|b| line.enter(BlockId(b)));
        (0..4).for_each(|b| line.is_new(BlockId(b), 4));
        for _ in 0..3 {
            assert_eq!(line.next(), Some(BlockId(0)));
            line.back(BlockId(0));
            assert_eq!(line.waiting(), 4);
        }
        line.again(BlockId(5));
        assert_eq!(all(&mut line), [5, 0, 1, 2, 3]);
        line.back(BlockId(4));
        assert_eq!(line.next(), None, "it was never in it");
    }
}
