//! Blocks that leave a trace: because they have to, or before that. What goes is whole and its own
//! text, whatever flies, and stands behind nothing that never went.

use super::*;
use crate::kv::Forgotten;

impl Trace {
    /// Keeps most of what goes, and says what is waited for.
    pub(super) fn exchange(&mut self, batch: &Batch) {
        for block in &batch.forgotten {
            self.goes(block);
        }
        if self.random.below(30) == 0 {
            self.scheduler.keep_again();
            self.check();
        }
        for _ in 0..self.random.below(4) {
            let Some(block) = self.scheduler.next_unkept() else { break };
            if self.random.below(8) == 0 {
                self.scheduler.put_back(&block);
                self.check();
                break;
            }
            let name = (block.scope, block.before.then(&block.text));
            self.seen.kept += 1;
            self.seen.again += usize::from(self.gone.contains_key(&name));
            let stands = block.depth == 0 || self.gone.contains_key(&(block.scope, block.before));
            assert!(stands, "seed {}: a gap before {block:?}", self.seed);
            self.goes(&block);
            self.check();
        }
        for load in &batch.loads {
            let running = self.scheduler.running(load.id);
            let at = load.depth * BLOCK_LEN;
            let text = running.map(|seq| &seq.tokens()[at..at + load.text.len()]);
            assert_eq!(text, Some(&load.text[..]), "seed {}", self.seed);
            let rows = batch.entries.iter().any(|entry| entry.id == load.id);
            assert!(!rows && !load.text.is_empty(), "seed {}", self.seed);
        }
        self.loads.extend(batch.loads.iter().cloned());
    }

    /// Its rows are all there, and are those of its text.
    fn goes(&mut self, block: &Forgotten) {
        let &Forgotten { block, scope, before, depth, ref text, shared: _ } = block;
        let stored = (0..BLOCK_LEN).map(|offset| self.kv[&(block, offset)]);
        let stored: Vec<u64> = stored.collect();
        let above = match depth {
            0 => Some(origin(scope)),
            _ => self.gone.get(&(scope, before)).copied(),
        };
        let mut hash = above;
        let hashes = text.iter().map(|&token| {
            hash = hash.map(|hash| after(hash, token));
            hash
        });
        if above.is_some() {
            let want: Vec<u64> = hashes.flatten().collect();
            assert_eq!(stored, want, "seed {}: another text", self.seed);
        }
        let name = (scope, before.then(text));
        self.gone.insert(name, stored[BLOCK_LEN - 1]);
        if !self.ahead && self.random.below(4) > 0 {
            self.shelf.0.insert(name, stored);
        }
    }
}
