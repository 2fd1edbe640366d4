//! The engine's way to the shelf, where blocks go that memory has no room for, and come back from.
//!
//! Two threads: one writes, one reads. The engine copies a block out before it is overwritten, into
//! one of a fixed number of buffers; where none is free, the block is dropped and counted. What was
//! read waits in a channel of few places, and the engine takes as much of it in a step as it may.
//! Deliberately absent: which blocks go and who waits for which: that is the scheduler's.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::handle::Stats;
use crate::kv::{Chain, Forgotten, Kept};
use crate::scheduler::Load;
use crate::shelf::{Digest, Label, Miss, ModelKey, Name, Put, Shelf};
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
    spills: Sender<Spill>,
    writer: JoinHandle<()>,
    loads: Sender<Job>,
    arrivals: Receiver<Arrival>,
    reader: JoinHandle<()>,
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
    payload: Vec<u8>,
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
        for _ in 0..count(SPILL_BYTES).clamp(BUFFERS.0, BUFFERS.1) {
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
        let roots = HashMap::new();
        Ok(Self { shared, roots, free, spills, writer, loads, arrivals, reader })
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
        let Forgotten { block: _, scope, before, depth, text } = block;
        let dropped = || {
            self.shared.stats.kv_dropped.fetch_add(1, Ordering::Relaxed);
        };
        let Some(&root) = self.roots.get(scope) else { return dropped() };
        let name = Name::new(self.shared.model, root, before.then(text));
        if self.shared.shelf.touch(&name, *depth) {
            return;
        }
        let Ok(mut payload) = self.free.recv_timeout(patience) else { return dropped() };
        payload.clear();
        let whole = export(&mut payload);
        let (before, depth, text) = (*before, *depth, text.clone());
        if !whole || self.spills.send(Spill { root, before, depth, text, payload }).is_err() {
            dropped();
        }
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
        let Self { shared, roots: _, free, spills, writer, loads, arrivals, reader } = self;
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
        while let Ok(Spill { root, before, depth, text, payload }) = spills.recv() {
            let label = Label { model: self.model, root, before, depth, text: &text };
            let stats = &self.stats;
            let counter = match self.shelf.put(&label, &payload) {
                Put::Known => None,
                Put::Written => Some(&stats.kv_spilled),
                Put::Dropped => Some(&stats.kv_dropped),
                Put::Failed => Some(&stats.kv_spill_failures),
            };
            counter.map(|counter| counter.fetch_add(1, Ordering::Relaxed));
            let _ = give_back.send(payload); // the engine may be gone
        }
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
