//! Random traces: whatever happens, every sequence sees the text that it would have seen alone.
//!
//! The model is only arithmetic: what it stores for a position is a hash of all tokens up to it,
//! and the next token follows from what is stored. So a block that is lent to the wrong text,
//! written twice, or given away too early changes an answer, and is found before that. Passes are
//! computed in order and as late as they may be: when their results are asked for, in some traces
//! after the next one was scheduled and handed over. Clients leave, and stop reading for a while:
//! then their sequences stand aside as the engine has it, and others of theirs as it might.

mod kept;

use std::collections::HashMap;

use super::tests::promise::*;
use super::*;
use crate::kv::Chain;
use crate::types::{CacheScope, Priority, Tenant};

const BLOCK_LEN: usize = 4;
/// Steps of all traces together; `HEARTH_TRACE_STEPS` asks for more.
const STEPS: usize = 1_000_000;
const STEPS_OF_ONE: usize = 500;

#[test]
fn random_traces_keep_every_promise() {
    let seen = run(false);
    assert!(seen.right > 0, "nothing that was proposed was right");
    assert!(seen.came > 0, "nothing came back");
    assert!(seen.kept > 0 && seen.again > 0, "nothing went before it had to: {seen:?}");
    assert!(seen.stood > 0 && seen.wanted > 0 && seen.apart > 0, "{seen:?}");
    assert_eq!(seen.unknown + seen.late + seen.short + seen.failed + seen.flew, 0, "{seen:?}");
}

#[test]
fn random_traces_keep_every_promise_one_step_ahead() {
    let seen = run(true);
    assert!(seen.right > 0 && seen.unknown > 0, "{seen:?}");
    assert!(seen.late > 0 && seen.short > 0 && seen.failed > 0 && seen.kept > 0, "{seen:?}");
    assert!(seen.stood > 0 && seen.wanted > 0 && seen.flew > 0, "{seen:?}");
}

fn run(ahead: bool) -> Seen {
    let asked = std::env::var("HEARTH_TRACE_STEPS").ok().map(|n| n.parse().unwrap());
    let mut seen = Seen::default();
    for seed in 0..asked.unwrap_or(STEPS).div_ceil(STEPS_OF_ONE) as u64 {
        let mut trace = Trace::new(seed, ahead);
        trace.seen = seen;
        (0..STEPS_OF_ONE).for_each(|_| trace.step());
        seen = trace.end();
    }
    seen
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
    /// A step is scheduled before the last one is done. Nothing is kept then: what comes back is
    /// not in the order of the passes.
    ahead: bool,
    flight: Option<Flight>,
    was_short: bool,
    /// What the last pass chose.
    chosen: HashMap<SeqId, TokenId>,
    seen: Seen,
    shelf: Shelf,
    /// Loads that are not done: what is left of each.
    loads: Vec<Load>,
    /// What ever went, by the last that was stored for it.
    gone: HashMap<(CacheScope, Chain), u64>,
}

impl Trace {
    fn new(seed: u64, ahead: bool) -> Self {
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
            keep_blocks_min: [None, Some(1 + random.below(6))][random.below(4).min(1)],
        };
        Self {
            seed,
            random,
            scheduler: Scheduler::new(config),
            batch_tokens,
            kv: HashMap::new(),
            live: HashMap::new(),
            next_id: 0,
            now: Duration::ZERO,
            idle: 0,
            ahead,
            flight: None,
            was_short: false,
            chosen: HashMap::new(),
            seen: Seen::default(),
            shelf: Shelf::default(),
            loads: Vec::new(),
            gone: HashMap::new(),
        }
    }

    fn step(&mut self) {
        if self.random.below(3) == 0 && self.live.len() < 12 {
            self.arrive();
        }
        if self.random.below(10) == 0 {
            self.leave();
        }
        self.read_or_not();
        let stops = !self.ahead && self.random.below(3) == 0;
        self.pass(stops);
        self.now += Duration::from_secs(1);
        let waiting = self.live.len() - self.scheduler.running_count() - self.aside(|_| true);
        assert_eq!(self.scheduler.waiting_count(), waiting, "seed {}", self.seed);
    }

    /// Hands a pass over, which may stop between two layers, and takes the results of the one
    /// before it, or its own.
    fn pass(&mut self, stops: bool) {
        self.bring();
        let proposals = self.propose();
        let batch = self.scheduler.schedule(self.now, &proposals, &self.shelf);
        self.judge(&batch);
        let mut flight = self.launch(batch);
        self.check();
        if stops {
            self.interject(&mut flight);
        }
        if let Some(before) = self.flight.replace(flight) {
            self.land(before);
        }
        if let Some(own) = self.flight.take_if(|own| !self.scheduler.runs_on(&own.batch)) {
            self.land(own);
        }
    }

    /// Between two layers somebody comes, and may be computed before the others.
    fn interject(&mut self, flight: &mut Flight) {
        self.copy(&std::mem::take(&mut flight.batch.copies));
        if self.live.len() < 12 {
            self.arrive();
        }
        let batch = self.scheduler.interject(self.now, &flight.batch, &self.shelf);
        batch.expired.iter().for_each(|id| drop(self.live.remove(id)));
        assert!(batch.row_count() <= self.batch_tokens, "seed {}", self.seed);
        let flies = |entry: &Entry| flight.batch.entries.iter().any(|e| e.id == entry.id);
        assert!(!batch.entries.iter().any(flies), "seed {}: a row is computed twice", self.seed);
        self.seen.apart += batch.entries.len();
        let apart = self.launch(batch);
        self.check();
        self.land(apart);
    }

    fn check(&self) {
        self.scheduler.check().unwrap_or_else(|e| panic!("seed {}: {e}", self.seed));
        if self.now.as_secs().is_multiple_of(32) {
            let (tenant, priority) = (Tenant::default(), Priority::Default);
            let newcomer = Newcomer { tenant, priority, prompt: 20, answer_max: 30, count: 2 };
            let outlook = self.scheduler.outlook(self.now, &Batch::default());
            let told = outlook.wait(&newcomer, self.now);
            assert!(
                told.is_none_or(|t| t < Duration::from_secs(3600)),
                "seed {}: {told:?}",
                self.seed
            );
        }
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
        let adapter = u64::from(self.random.below(4) == 0);
        let scope = CacheScope { adapter, tenant: id % 2 };
        let n = [1, 1, 1, 2, 5][self.random.below(5)];
        let ids: Vec<SeqId> = (self.next_id..self.next_id + n).map(SeqId).collect();
        self.next_id += n;
        for id in &ids {
            let end = len + 1 + self.random.below(48 - len);
            let [goes_on, counts] = [2, 1].map(|n| self.random.below(3) < n);
            let prompt = prompt.clone();
            let reader = Reader::default();
            self.live.insert(*id, Promise { prompt, end, scope, tenant, goes_on, counts, reader });
        }
        self.scheduler.add(NewSequence {
            id: ids[0],
            prompt,
            answer_max: 1000,
            score: self.random.below(4) == 0,
            scope,
            tenant,
            priority: [Priority::Flex, Priority::Default][self.random.below(2)],
            deadline: (self.random.below(3) == 0).then(|| self.now + Duration::from_secs(20)),
            forks: ids[1..].to_vec(),
        });
    }

    /// Everybody who is here, in order.
    fn ids(&self) -> Vec<SeqId> {
        let mut ids: Vec<SeqId> = self.live.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Clients fall behind, and come up again: who is behind is set aside as soon as that can be.
    fn read_or_not(&mut self) {
        for id in self.ids() {
            let Reader { behind, aside, .. } = self.live[&id].reader;
            let behind = behind ^ (self.random.below(if behind { 6 } else { 40 }) == 0);
            let reader = &mut self.live.get_mut(&id).unwrap().reader;
            reader.behind = behind;
            match (aside, behind) {
                (false, true) if self.scheduler.set_aside(id) => {
                    (reader.aside, reader.stood) = (true, true);
                }
                (false, true) => match self.scheduler.running(id) {
                    Some(seq) if seq.flying > 0 => self.seen.flew += 1,
                    _ => self.seen.wanted += 1,
                },
                (true, false) => {
                    self.scheduler.bring_back(id);
                    reader.aside = false;
                }
                _ => continue,
            }
            self.check();
        }
    }

    /// How many stand aside, of those that fit.
    fn aside(&self, fits: impl Fn(&Promise) -> bool) -> usize {
        self.live.values().filter(|promise| promise.reader.aside && fits(promise)).count()
    }

    /// Somebody is here who neither stands aside nor waits for those of its own tenant that do.
    fn somebody_could_move(&self) -> bool {
        self.live.iter().any(|(id, Promise { tenant, reader, .. })| {
            let theirs = || self.aside(|promise| promise.tenant.id == tenant.id);
            let open = || tenant.max_running.is_none_or(|max| theirs() < max);
            !reader.aside && (self.scheduler.running(*id).is_some() || open())
        })
    }

    /// A client goes away.
    fn leave(&mut self) {
        let ids = self.ids();
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
        let running = self.scheduler.running_count();
        assert!(running <= self.scheduler.config.running_len, "seed {seed}: {running} run");
        assert!(batch.row_count() <= self.batch_tokens && batch.score_count() <= 3, "seed {seed}");
        // A slow answer may lose its blocks in the very step in which it would have moved.
        let nothing = batch.row_count() == 0 && batch.loads.is_empty();
        let waits = self.loads.is_empty() && self.flight.is_none();
        let idle = nothing && waits && self.somebody_could_move();
        self.seen.short += usize::from(batch.short);
        assert!(!(batch.short && self.was_short), "seed {seed}: somebody waits for ever");
        self.was_short = batch.short;
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
                    self.seen.came += 1;
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
            self.check();
        }
    }

    /// Hands a batch over as it is, and says who goes on.
    fn launch(&mut self, batch: Batch) -> Flight {
        self.exchange(&batch);
        let (mut texts, mut go_on) = (Vec::new(), Vec::new());
        for entry in &batch.entries {
            let seq = self.scheduler.running(entry.id).unwrap();
            let Promise { end, scope, goes_on, counts, reader, .. } = self.live[&entry.id];
            assert!(!reader.aside, "seed {}: it stands aside, and moves", self.seed);
            let certain = entry.start + entry.rows - entry.proposed.len();
            assert_eq!(entry.samples, certain == seq.len(), "seed {}", self.seed);
            let known = seq.tokens().iter().copied().map(Some).take(certain);
            let tokens: Vec<_> = known.chain((seq.tokens().len()..certain).map(|_| None)).collect();
            self.seen.unknown += certain.saturating_sub(seq.tokens().len());
            for position in entry.start..entry.start + entry.rows {
                let block = seq.blocks()[position / BLOCK_LEN];
                assert!(self.scheduler.pool().is_private(block), "seed {}", self.seed);
            }
            texts.push(Text { tokens, blocks: seq.blocks().to_vec(), scope, end });
            let alone = entry.forks.is_empty() && entry.proposed.is_empty();
            let is_last = counts && certain + 1 >= end;
            if self.ahead && goes_on && entry.samples && alone && !is_last && !reader.behind {
                go_on.push(entry.id);
            }
        }
        self.scheduler.launch(&batch, &go_on);
        Flight { batch, texts }
    }

    /// Takes the results of a pass. Now and then there are none.
    fn land(&mut self, flight: Flight) {
        if self.ahead && self.random.below(50) == 0 {
            return self.fail(&flight);
        }
        let sampled = self.compute(&flight);
        let took_ms = self.random.below(300) as f64;
        self.scheduler.update(&flight.batch, &sampled, took_ms);
        self.check();
        self.finish(&sampled);
        self.check();
    }

    /// Nothing is left of a pass: its sequences are gone, and what is in its blocks is of no use.
    fn fail(&mut self, Flight { batch, texts }: &Flight) {
        for (entry, text) in batch.entries.iter().zip(texts) {
            for position in entry.start..entry.start + entry.rows {
                self.kv.insert((text.blocks[position / BLOCK_LEN], position % BLOCK_LEN), 0);
            }
            for id in entry.ids() {
                self.live.remove(&id);
                self.scheduler.finish(id);
            }
            // Its rows in the pass behind are of no text.
            let Some(Flight { batch, texts }) = &mut self.flight else { continue };
            if let Some(place) = batch.entries.iter().position(|e| e.id == entry.id) {
                drop((batch.entries.remove(place), texts.remove(place)));
                batch.answers -= usize::from(place < batch.answers);
                self.seen.failed += 1;
            }
        }
        self.check();
    }

    /// Stores every row, and reads what stands before it.
    fn compute(&mut self, Flight { batch, texts }: &Flight) -> Vec<(SeqId, TokenId)> {
        let mut sampled = Vec::new();
        self.copy(&batch.copies);
        let before = std::mem::take(&mut self.chosen);
        for (entry, text) in batch.entries.iter().zip(texts) {
            let certain = text.tokens.len();
            let (mut hash, mut hashes) = (origin(text.scope), Vec::new());
            let known = text.tokens.iter().map(|token| token.unwrap_or_else(|| before[&entry.id]));
            for (i, token) in known.chain(entry.proposed.iter().copied()).enumerate() {
                hash = after(hash, token);
                let slot = (text.blocks[i / BLOCK_LEN], i % BLOCK_LEN);
                match i < entry.start {
                    true => assert_eq!(self.kv[&slot], hash, "seed {}: another text", self.seed),
                    false => drop(self.kv.insert(slot, hash)),
                }
                hashes.push(hash);
            }
            let token = |i: usize| chosen(hashes[i]);
            if entry.samples {
                self.chosen.insert(entry.id, token(certain - 1));
                sampled.extend(entry.ids().map(|id| (id, token(certain - 1))));
            }
            // On to the first one that is not as proposed, or to the end.
            for (i, &proposed) in (certain..text.end - 1).zip(&entry.proposed) {
                if token(i - 1) != proposed {
                    break;
                }
                sampled.push((entry.id, token(i)));
                self.seen.right += 1;
            }
        }
        self.seen.late += sampled.extract_if(.., |(id, _)| !self.live.contains_key(id)).count();
        sampled
    }

    fn copy(&mut self, copies: &[(BlockId, BlockId)]) {
        for (from, to) in copies {
            for offset in 0..BLOCK_LEN {
                match self.kv.get(&(*from, offset)).copied() {
                    Some(stored) => drop(self.kv.insert((*to, offset), stored)),
                    None => drop(self.kv.remove(&(*to, offset))),
                }
            }
        }
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
            self.seen.stood += usize::from(promise.reader.stood);
            self.scheduler.finish(id);
            self.live.remove(&id);
        }
    }

    /// Everybody comes to an end without new arrivals, in a time that the work allows, once all
    /// that is said is read.
    fn end(mut self) -> Seen {
        for id in self.ids() {
            let reader = &mut self.live.get_mut(&id).unwrap().reader;
            (reader.behind, reader.aside) = (false, false);
            self.scheduler.bring_back(id);
        }
        for _ in 0..2000 {
            if self.live.is_empty() && self.flight.is_none() {
                break;
            }
            self.pass(false);
        }
        assert!(self.live.is_empty(), "seed {}: some are never served", self.seed);
        assert!(self.scheduler.is_empty() && self.scheduler.used_blocks() == 0);
        self.check();
        self.seen
    }
}
