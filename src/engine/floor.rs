//! The engine's way to the shelf, where blocks go that are worth it or that memory has no room for,
//! and come back from.
//!
//! Two threads: one writes, one reads. The engine copies a block out before it is overwritten, into
//! one of a fixed number of buffers; where none is free, the block is dropped and counted. Those
//! that do not have to go yet take half of the buffers. A second after it was written a file is
//! flushed. What was read waits in a channel of few places, and the engine takes as much of it in a
//! step as it may. Deliberately absent: which blocks go and who waits for which: that is the
//! scheduler's.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::handle::Stats;
use crate::kv::{Chain, Forgotten, Kept};
use crate::scheduler::Load;
use crate::shelf::{Digest, Found, Label, Miss, ModelKey, Name, Put, Shelf};
use crate::types::{CacheScope, SeqId, TokenId};

/// Bytes of all buffers on their way to the disk.
const SPILL_BYTES: usize = 32 << 20;
/// Buffers, at least and at most.
const BUFFERS: (usize, usize) = (8, 1024);
/// Bytes that were read and wait for the engine.
const READ_BYTES: usize = 16 << 20;
/// Bytes that the engine takes in one step.
pub(super) const STEP_BYTES: usize = 16 << 20;
/// Fewer blocks in a row are computed sooner than read.
pub(super) const LOAD_BLOCKS_MIN: usize = 2;
/// So many new blocks of a prompt are written as soon as there is time. What is less is computed in
/// a moment, and is written when somebody asks for it again.
pub(super) const KEEP_BLOCKS_MIN: usize = 16;
/// A file is flushed when it is so old: what leaves sooner need not be,
const FLUSH_AFTER: Duration = Duration::from_secs(1);
/// and so many at a time, since blocks may wait to be written.
const FLUSH_FILES: usize = 16;
/// Scopes whose roots are remembered.
const ROOTS_MAX: usize = 4096;
/// What is in memory at the end is sent away for so long,
const PUT_AWAY_MAX: Duration = Duration::from_secs(8);
/// and after so long nobody waits for a disk.
const END_MAX: Duration = Duration::from_secs(10);

/// Where the blocks of one engine are kept.
pub(super) struct Floor {
    shared: Arc<Shared>,
    roots: HashMap<CacheScope, Digest>,
    /// Empty buffers.
    free: Receiver<Vec<u8>>,
    buffer_count: usize,
    /// Writes that had failed when it was asked last.
    failures: u64,
    spills: Sender<Spill>,
    loads: Sender<Job>,
    arrivals: Receiver<Arrival>,
    /// The one that writes, and the one that reads.
    threads: (JoinHandle<()>, JoinHandle<()>),
}

struct Shared {
    shelf: Arc<Shelf>,
    model: ModelKey,
    block_bytes: usize,
    block_len: usize,
    stats: Arc<Stats>,
    /// Loads that somebody waits for.
    wanted: Mutex<BTreeSet<u64>>,
}

/// A block on its way to the disk.
struct Spill {
    root: Digest,
    before: Chain,
    depth: usize,
    text: Box<[TokenId]>,
    shared: bool,
    /// `None` where its file is to be told that it was used.
    payload: Option<Vec<u8>>,
}

struct Job {
    root: Digest,
    load: Load,
}

/// The next block of a load; without bytes, its end.
pub(super) struct Arrival {
    pub id: SeqId,
    pub ticket: u64,
    pub bytes: Option<Vec<u8>>,
}

impl Floor {
    /// `content` is the model's; a block has so many bytes and tokens.
    pub fn new(
        shelf: Arc<Shelf>,
        content: Digest,
        layout: &str,
        [block_bytes, block_len]: [usize; 2],
        stats: &Arc<Stats>,
    ) -> std::io::Result<Self> {
        let model = ModelKey::new(content, layout, shelf.realm());
        // Set once: an engine has one floor.
        let _ = stats.kv_store_bytes.set(shelf.bytes_of(model));
        let (stats, wanted) = (Arc::clone(stats), Mutex::default());
        let shared = Shared { shelf, model, block_bytes, block_len, stats, wanted };
        let shared = Arc::new(shared);
        let count = |bytes: usize| bytes / block_bytes.max(1);
        let (give_back, free) = channel();
        let buffer_count = count(SPILL_BYTES).clamp(BUFFERS.0, BUFFERS.1);
        for _ in 0..buffer_count {
            let _ = give_back.send(Vec::new()); // the receiver is here
        }
        let (spills, to_write) = channel();
        let writing = Arc::clone(&shared);
        let writer = thread::Builder::new().name("hearth-kv-write".into());
        let writer = writer.spawn(move || writing.write(&to_write, &give_back))?;
        let (loads, jobs) = channel();
        let (arrive, arrivals) = sync_channel(count(READ_BYTES).clamp(2, BUFFERS.1));
        let reading = Arc::clone(&shared);
        let reader = thread::Builder::new().name("hearth-kv-read".into());
        let reader = reader.spawn(move || reading.read(&jobs, &arrive))?;
        let (roots, failures) = (HashMap::new(), 0);
        let threads = (writer, reader);
        Ok(Self { shared, roots, free, buffer_count, failures, spills, loads, arrivals, threads })
    }

    /// A sequence of this scope is here; so its blocks can be named.
    pub fn know(&mut self, scope: CacheScope, adapter: Option<Digest>) {
        if self.roots.len() >= ROOTS_MAX {
            self.roots.clear(); // what runs is not loaded or spilled until it is known again
        }
        self.roots.entry(scope).or_insert_with(|| self.shared.model.root(scope, adapter));
    }

    /// Sends a block away, unless it is there. `export` copies it.
    pub fn spill(&self, block: &Forgotten, export: impl FnOnce(&mut Vec<u8>) -> bool) {
        self.spill_within(block, Duration::ZERO, export);
    }

    /// The same, waiting so long for a buffer.
    fn spill_within(
        &self,
        block: &Forgotten,
        patience: Duration,
        export: impl FnOnce(&mut Vec<u8>) -> bool,
    ) {
        let &Forgotten { block: _, scope, before, depth, ref text, shared } = block;
        let stats = &self.shared.stats;
        let dropped = || {
            stats.kv_dropped.fetch_add(1, Ordering::Relaxed);
        };
        let Some(&root) = self.roots.get(&scope) else { return dropped() };
        let name = Name::new(self.shared.model, root, before.then(text));
        let payload = match self.shared.shelf.touch(&name, depth, shared) {
            Found::Yes => return,
            Found::Stale => None,
            Found::No => {
                let Ok(mut payload) = self.free.recv_timeout(patience) else { return dropped() };
                payload.clear();
                if !export(&mut payload) {
                    return dropped();
                }
                Some(payload)
            }
        };
        stats.kv_sent.fetch_add(1, Ordering::Release);
        let spill = Spill { root, before, depth, text: text.clone(), shared, payload };
        if self.spills.send(spill).is_err() {
            stats.kv_sent.fetch_sub(1, Ordering::Relaxed);
            dropped();
        }
    }

    /// Blocks on their way to the disk.
    pub fn sent_count(&self) -> usize {
        self.shared.stats.kv_sent.load(Ordering::Relaxed)
    }

    /// Whether a block may be sent that does not have to go yet.
    pub fn has_time(&self) -> bool {
        2 * self.sent_count() < self.buffer_count && !self.shared.shelf.is_paused()
    }

    /// Writes have failed since this was asked last: blocks that were sent may be lost.
    pub fn has_failed(&mut self) -> bool {
        let failures = self.shared.stats.kv_spill_failures.load(Ordering::Relaxed);
        std::mem::replace(&mut self.failures, failures) != failures
    }

    /// Begins to fetch.
    pub fn load(&self, load: Load) {
        let Some(&root) = self.roots.get(&load.scope) else { return };
        self.shared.wanted().insert(load.ticket);
        let _ = self.loads.send(Job { root, load }); // without a reader nothing comes
    }

    /// Nobody waits for it any more.
    pub fn forget(&self, ticket: u64) {
        self.shared.wanted().remove(&ticket);
    }

    /// The next block that has come.
    pub fn next(&self, patience: Duration) -> Result<Arrival, RecvTimeoutError> {
        self.arrivals.recv_timeout(patience)
    }

    /// The end: sends away all that is given, and waits until it is written, as far as time allows.
    pub fn put_away(
        self,
        blocks: impl Iterator<Item = Forgotten>,
        export: impl Fn(&Forgotten, &mut Vec<u8>) -> bool,
    ) {
        let started = Instant::now();
        for block in blocks {
            let patience = PUT_AWAY_MAX.saturating_sub(started.elapsed());
            self.spill_within(&block, patience, |out| export(&block, out));
        }
        let Self { shared, free, spills, loads, arrivals, threads: (writer, reader), .. } = self;
        shared.wanted().clear();
        drop((spills, loads));
        join(writer, &free, started + END_MAX);
        join(reader, &arrivals, started + END_MAX);
    }
}

/// Waits for a thread that has nothing more to do, but not longer. Its channel closes when it ends.
fn join<T>(thread: JoinHandle<()>, channel: &Receiver<T>, until: Instant) {
    loop {
        match channel.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => return,
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let _ = thread.join(); // a panic there was told already
}

/// Nothing is kept without a floor.
impl Kept for Option<Floor> {
    fn has(&self, scope: CacheScope, text: Chain) -> bool {
        self.as_ref().is_some_and(|floor| {
            let root = floor.roots.get(&scope);
            let model = floor.shared.model;
            root.is_some_and(|root| floor.shared.shelf.has(&Name::new(model, *root, text)))
        })
    }
}

impl Shared {
    /// The thread that writes.
    fn write(&self, spills: &Receiver<Spill>, give_back: &Sender<Vec<u8>>) {
        // What is not flushed, and since when.
        let mut fresh: VecDeque<(Instant, Name)> = VecDeque::new();
        loop {
            let due = fresh.front().map(|(since, _)| FLUSH_AFTER.saturating_sub(since.elapsed()));
            let spill = match due {
                None => spills.recv().map_err(RecvTimeoutError::from),
                Some(due) => spills.recv_timeout(due),
            };
            match spill {
                Ok(spill) => {
                    let written = self.put(spill, give_back);
                    fresh.extend(written.map(|name| (Instant::now(), name)));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let old = fresh.iter().take_while(|(since, _)| since.elapsed() >= FLUSH_AFTER);
            let old = old.take(FLUSH_FILES).count();
            let old: Vec<Name> = fresh.drain(..old).map(|(_, name)| name).collect();
            if !old.is_empty() {
                self.shelf.flush(&old);
                self.stats.kv_unflushed.fetch_sub(old.len(), Ordering::Relaxed);
            }
        }
    }

    /// Writes a block; its name, if there is a new file.
    fn put(&self, spill: Spill, give_back: &Sender<Vec<u8>>) -> Option<Name> {
        let Spill { root, before, depth, text, shared, payload } = spill;
        let label = Label { model: self.model, root, before, depth, text: &text };
        let (name, stats) = (label.name(), &self.stats);
        let put = match &payload {
            Some(payload) => self.shelf.put(&label, payload, shared),
            None => {
                self.shelf.tell(&name);
                Put::Known
            }
        };
        let counter = match put {
            Put::Known => None,
            Put::Written => Some(&stats.kv_spilled),
            Put::Dropped => Some(&stats.kv_dropped),
            Put::Failed => Some(&stats.kv_spill_failures),
        };
        counter.map(|counter| counter.fetch_add(1, Ordering::Relaxed));
        let written = (put == Put::Written).then_some(name);
        // Counted there before it is not counted here: nobody finds it nowhere.
        stats.kv_unflushed.fetch_add(usize::from(written.is_some()), Ordering::Release);
        stats.kv_sent.fetch_sub(1, Ordering::Release);
        payload.map(|payload| give_back.send(payload)); // the engine may be gone
        written
    }

    /// The thread that reads.
    fn read(&self, jobs: &Receiver<Job>, arrive: &SyncSender<Arrival>) {
        while let Ok(Job { root, load }) = jobs.recv() {
            let Load { id, ticket, scope: _, mut before, depth, text } = load;
            for (i, text) in text.chunks_exact(self.block_len).enumerate() {
                if !self.wanted().contains(&ticket) {
                    break;
                }
                let label = Label { model: self.model, root, before, depth: depth + i, text };
                let taken = self.shelf.take(&label, self.block_bytes);
                if let Err(Miss::Corrupt) = taken {
                    self.stats.kv_corrupt.fetch_add(1, Ordering::Relaxed);
                }
                before = before.then(text);
                let bytes = taken.ok();
                let more = bytes.is_some();
                if arrive.send(Arrival { id, ticket, bytes }).is_err() {
                    return;
                }
                if !more {
                    break;
                }
            }
            self.wanted().remove(&ticket);
        }
    }

    /// A set of numbers is whole whoever panicked beside it.
    fn wanted(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
