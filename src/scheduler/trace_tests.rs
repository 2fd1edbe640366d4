//! Random traces: whatever happens, every sequence sees the text that it would have seen alone.
//!
//! The model is only arithmetic: what it stores for a position is a hash of all tokens up to it,
//! and the next token follows from what is stored. So a block that is lent to the wrong text,
//! written twice, or given away too early changes an answer, and is found before that.

use std::collections::HashMap;

use super::*;
use crate::kv::{Chain, Forgotten};
use crate::types::{CacheScope, Priority, Tenant};

const BLOCK_LEN: usize = 4;
/// Steps of all traces together; `HEARTH_TRACE_STEPS` asks for more.
const STEPS: usize = 1_000_000;
const STEPS_OF_ONE: usize = 500;

#[test]
fn random_traces_keep_every_promise() {
    let asked = std::env::var("HEARTH_TRACE_STEPS").ok().map(|n| n.parse().unwrap());
    let (mut right, mut came) = (0, 0);
    for seed in 0..asked.unwrap_or(STEPS).div_ceil(STEPS_OF_ONE) as u64 {
        let mut trace = Trace::new(seed);
        (0..STEPS_OF_ONE).for_each(|_| trace.step());
        let (was_right, has_come) = trace.end();
        (right, came) = (right + was_right, came + has_come);
    }
    assert!(right > 0, "nothing that was proposed was right");
    assert!(came > 0, "nothing came back");
}

struct Trace {
    seed: u64,
    random: Random,
    scheduler: Scheduler,
    batch_tokens: usize,
    /// What the model stored, by block and offset.
    kv: HashMap<(BlockId, usize), u64>,
    live: HashMap<SeqId, Promise>,
    next_id: u64,
    now: Duration,
    /// Steps without a row, in a row.
    idle: usize,
    /// Proposed tokens that were right.
    right: usize,
    shelf: Shelf,
    /// Loads that are not done: what is left of each.
    loads: Vec<Load>,
    /// Blocks that came.
    came: usize,
}

/// What was stored for the tokens of a block, by scope and text; some of it gets lost.
#[derive(Default)]
struct Shelf(HashMap<(CacheScope, Chain), Vec<u64>>);

impl Kept for Shelf {
    fn has(&self, scope: CacheScope, text: Chain) -> bool {
        self.0.contains_key(&(scope, text))
    }
}

/// What a sequence was told on arrival.
struct Promise {
    prompt: Vec<TokenId>,
    /// Tokens of prompt and answer at which it ends.
    end: usize,
    scope: CacheScope,
}

impl Trace {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let running_len = 1 + random.below(6);
        let batch_tokens = running_len + random.below(20);
        let config = SchedulerConfig {
            block_count: 12 + random.below(20),
            block_len: BLOCK_LEN,
            batch_tokens,
            running_len,
            score_chunk: 3,
            target_ms: 100.0,
            proposed_rows: random.below(12),
            price: None,
            load_blocks_min: 1 + random.below(3),
        };
        let scheduler = Scheduler::new(config);
        let (kv, live) = (HashMap::new(), HashMap::new());
        Self {
            seed,
            random,
            scheduler,
            batch_tokens,
            kv,
            live,
            next_id: 0,
            now: Duration::ZERO,
            idle: 0,
            right: 0,
            shelf: Shelf::default(),
            loads: Vec::new(),
            came: 0,
        }
    }

    fn step(&mut self) {
        if self.random.below(3) == 0 && self.live.len() < 12 {
            self.arrive();
        }
        if self.random.below(10) == 0 {
            self.leave();
        }
        self.bring();
        let proposals = self.propose();
        let batch = self.scheduler.schedule(self.now, &proposals, &self.shelf);
        self.now += Duration::from_secs(1);
        self.judge(&batch);
        let sampled = self.compute(&batch);
        let took_ms = self.random.below(300) as f64;
        self.scheduler.update(&batch, &sampled, took_ms);
        let waiting = self.live.len() - self.scheduler.running_count();
        assert_eq!(self.scheduler.waiting_count(), waiting, "seed {}", self.seed);
        self.scheduler.check().unwrap_or_else(|e| panic!("seed {}: {e}", self.seed));
        self.finish(&sampled);
    }

    /// A prompt out of a few texts, so that many have a beginning in common; often for several
    /// answers, for a few tenants of different weight.
    fn arrive(&mut self) {
        let (text, len) = (self.random.below(3) as u32, 1 + self.random.below(30));
        let differs = self.random.below(40);
        let token = |i: usize| 1000 * text + i as u32 + 7 * u32::from(i >= differs);
        let prompt: Vec<TokenId> = (0..len).map(token).collect();
        let id = self.random.below(3) as u64;
        let max_running = [None, None, Some(1)][id as usize];
        let weight = 1 + id as u32;
        let tenant = Tenant { id, weight, max_running, ..Tenant::default() };
        let tenant = if differs.is_multiple_of(3) { tenant.in_background() } else { tenant };
        let scope = CacheScope { adapter: 0, tenant: id % 2 };
        let n = [1, 1, 1, 2, 5][self.random.below(5)];
        let ids: Vec<SeqId> = (self.next_id..self.next_id + n).map(SeqId).collect();
        self.next_id += n;
        for id in &ids {
            let end = len + 1 + self.random.below(48 - len);
            self.live.insert(*id, Promise { prompt: prompt.clone(), end, scope });
        }
        self.scheduler.add(NewSequence {
            id: ids[0],
            prompt,
            samples: true,
            score: self.random.below(4) == 0,
            scope,
            tenant,
            priority: [Priority::Flex, Priority::Default][self.random.below(2)],
            deadline: (self.random.below(3) == 0).then(|| self.now + Duration::from_secs(20)),
            forks: ids[1..].to_vec(),
        });
    }

    /// A client goes away.
    fn leave(&mut self) {
        let mut ids: Vec<SeqId> = self.live.keys().copied().collect();
        ids.sort_unstable();
        if !ids.is_empty() {
            let id = ids[self.random.below(ids.len())];
            self.live.remove(&id);
            self.scheduler.finish(id);
        }
    }

    /// Guesses for some answers, and for one that is none: what will come, or that with a mistake.
    fn propose(&mut self) -> Vec<Proposal> {
        let mut ids = self.scheduler.answers();
        ids.retain(|_| self.random.below(3) > 0);
        ids.push(SeqId(self.random.below(1 + self.next_id as usize) as u64));
        let mut proposals = Vec::new();
        for id in ids {
            let Some(seq) = self.scheduler.running(id) else { continue };
            let len = seq.tokens().len();
            let mut tokens = go_on(self.live[&id].scope, seq.tokens(), len + 7)[len..].to_vec();
            tokens.truncate(self.random.below(7));
            let wrong = self.random.below(9);
            tokens.iter_mut().skip(wrong).for_each(|token| *token += 1);
            proposals.push(Proposal { id, tokens });
        }
        proposals
    }

    /// Bounds and progress.
    fn judge(&mut self, batch: &Batch) {
        batch.expired.iter().for_each(|id| drop(self.live.remove(id)));
        let seed = self.seed;
        assert!(batch.row_count() <= self.batch_tokens && batch.score_count() <= 3, "seed {seed}");
        // A slow answer may lose its blocks in the very step in which it would have moved.
        let nothing = batch.row_count() == 0 && batch.loads.is_empty();
        let idle = nothing && !self.live.is_empty() && self.loads.is_empty();
        self.idle = if idle { self.idle + 1 } else { 0 };
        assert!(self.idle < 2, "seed {seed}: no progress");
    }

    /// Some of the blocks that are waited for come, in order; some are lost on the way, and with
    /// them what is left of their load.
    fn bring(&mut self) {
        for _ in 0..self.random.below(6) {
            if self.loads.is_empty() {
                return;
            }
            let which = self.random.below(self.loads.len());
            let Load { id, ticket, scope, before, depth, text } = self.loads[which].clone();
            let (now, later) = text.split_at(BLOCK_LEN);
            let after = before.then(now);
            if self.random.below(8) == 0 {
                self.shelf.0.remove(&(scope, after));
            }
            let stored = self.shelf.0.get(&(scope, after));
            match (self.scheduler.awaits(id, ticket), stored) {
                (Some(block), Some(stored)) => {
                    assert!(self.scheduler.pool().is_private(block), "seed {}", self.seed);
                    let slots = (0..BLOCK_LEN).map(|offset| (block, offset));
                    self.kv.extend(slots.zip(stored.iter().copied()));
                    self.scheduler.loaded(id);
                    self.came += 1;
                    let (text, depth) = (later.to_vec(), depth + 1);
                    self.loads[which] = Load { id, ticket, scope, before: after, depth, text };
                    if later.is_empty() {
                        self.loads.swap_remove(which);
                    }
                }
                _ => {
                    self.scheduler.load_failed(id, ticket);
                    self.loads.swap_remove(which);
                }
            }
            self.scheduler.check().unwrap_or_else(|e| panic!("seed {}: {e}", self.seed));
        }
    }

    /// Keeps most of what is forgotten, and says what is waited for.
    fn exchange(&mut self, batch: &Batch) {
        for Forgotten { block, scope, before, depth: _, text } in &batch.forgotten {
            if self.random.below(4) > 0 {
                let stored = (0..BLOCK_LEN).map(|offset| self.kv[&(*block, offset)]).collect();
                self.shelf.0.insert((*scope, before.then(text)), stored);
            }
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

    /// Stores every row, and reads what stands before it.
    fn compute(&mut self, batch: &Batch) -> Vec<(SeqId, TokenId)> {
        self.exchange(batch);
        let mut sampled = Vec::new();
        for (from, to) in &batch.copies {
            for offset in 0..BLOCK_LEN {
                match self.kv.get(&(*from, offset)).copied() {
                    Some(stored) => drop(self.kv.insert((*to, offset), stored)),
                    None => drop(self.kv.remove(&(*to, offset))),
                }
            }
        }
        for entry in &batch.entries {
            let seq = self.scheduler.running(entry.id).unwrap();
            let scope = self.live[&entry.id].scope;
            let certain = entry.start + entry.rows - entry.proposed.len();
            let (mut hash, mut hashes) = (scope.tenant, Vec::new());
            let tokens = seq.tokens()[..certain].iter().chain(&entry.proposed);
            for (i, &token) in tokens.enumerate() {
                hash = (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
                let slot = (seq.blocks()[i / BLOCK_LEN], i % BLOCK_LEN);
                match i < entry.start {
                    true => assert_eq!(self.kv[&slot], hash, "seed {}: another text", self.seed),
                    false => {
                        assert!(self.scheduler.pool().is_private(slot.0), "seed {}", self.seed);
                        self.kv.insert(slot, hash);
                    }
                }
                hashes.push(hash);
            }
            assert_eq!(entry.samples, certain == seq.tokens().len(), "seed {}", self.seed);
            let token = |i: usize| (hashes[i] % 101) as TokenId;
            if entry.samples {
                let all = std::iter::once(&entry.id).chain(&entry.forks);
                sampled.extend(all.map(|id| (*id, token(certain - 1))));
            }
            // On to the first one that is not as proposed, or to the end.
            for (i, &proposed) in (certain..self.live[&entry.id].end - 1).zip(&entry.proposed) {
                if token(i - 1) != proposed {
                    break;
                }
                sampled.push((entry.id, token(i)));
                self.right += 1;
            }
        }
        sampled
    }

    /// Those at their end say what they would have said alone.
    fn finish(&mut self, sampled: &[(SeqId, TokenId)]) {
        for &(id, _) in sampled {
            let Some(seq) = self.scheduler.running(id) else { continue }; // it had several
            let promise = &self.live[&id];
            let wanted = (seq.tokens().len() + 1).div_ceil(BLOCK_LEN);
            assert!(seq.blocks().len() <= wanted, "seed {}: {:?}", self.seed, seq.blocks());
            if seq.tokens().len() < promise.end {
                continue;
            }
            assert!(seq.cached() <= promise.prompt.len(), "seed {}", self.seed);
            assert_eq!(alone(promise), seq.tokens(), "seed {}", self.seed);
            self.scheduler.finish(id);
            self.live.remove(&id);
        }
    }

    /// Everybody comes to an end without new arrivals, in a time that the work allows. Says how
    /// many proposals were right, and how many blocks came back.
    fn end(mut self) -> (usize, usize) {
        for _ in 0..2000 {
            if self.live.is_empty() {
                break;
            }
            self.bring();
            let proposals = self.propose();
            let batch = self.scheduler.schedule(self.now, &proposals, &self.shelf);
            self.judge(&batch);
            let sampled = self.compute(&batch);
            self.scheduler.update(&batch, &sampled, 1.0);
            self.scheduler.check().unwrap_or_else(|e| panic!("seed {}: {e}", self.seed));
            self.finish(&sampled);
        }
        assert!(self.live.is_empty(), "seed {}: some are never served", self.seed);
        assert!(self.scheduler.is_empty() && self.scheduler.used_blocks() == 0);
        self.scheduler.check().unwrap_or_else(|e| panic!("seed {}: {e}", self.seed));
        (self.right, self.came)
    }
}

/// Prompt and answer of a sequence that never met another.
fn alone(promise: &Promise) -> Vec<TokenId> {
    go_on(promise.scope, &promise.prompt, promise.end)
}

/// `tokens` and what follows them, `end` in all.
fn go_on(scope: CacheScope, tokens: &[TokenId], end: usize) -> Vec<TokenId> {
    let mut hash = scope.tenant;
    let mut tokens = tokens.to_vec();
    let mut i = 0;
    while tokens.len() < end {
        while i < tokens.len() {
            let token = u64::from(tokens[i]);
            hash = (hash ^ token).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
            i += 1;
        }
        tokens.push((hash % 101) as TokenId);
    }
    tokens
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n as u64) as usize
    }
}
