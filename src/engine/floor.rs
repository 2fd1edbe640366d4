//! The engine's way to the shelf, where blocks go that are worth it or that memory has no room for,
//! and come back from.
//!
//! Two threads: one writes, one reads. The engine copies a block out before it is overwritten, into
//! one of a fixed number of buffers; where none is free, the block is dropped and counted. Those
//! that do not have to go yet take half of the buffers. A file is flushed a second after it was
//! written, when nothing is to be written. What was read waits in a channel of few places, and the
//! engine takes as much of it in a step as it may. Deliberately absent: which blocks go and who
//! waits for which: that is the scheduler's.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
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
/// and so many at a time, since blocks may wait to be written,
const FLUSH_FILES: usize = 16;
/// which come first until so many files wait.
const FRESH_FILES: usize = 256;
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
    /// Scopes whose blocks could not be named; at most as many.
    rootless: HashSet<CacheScope>,
    /// One of them can be named again.
    named: bool,
    /// Empty buffers.
    free: Receiver<Vec<u8>>,
    /// One that was taken and not filled.
    spare: Option<Vec<u8>>,
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
    /// Let go last.
    _sent: Sent,
}

/// A block is on its way, whatever becomes of it and of who has it.
struct Sent(Arc<Stats>);

impl Sent {
    fn new(stats: &Arc<Stats>) -> Self {
        stats.kv_sent.fetch_add(1, Ordering::Release);
        Self(Arc::clone(stats))
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.0.kv_sent.fetch_sub(1, Ordering::Release);
    }
}

/// Files that are not flushed, and since when; counted as long as they are here.
struct Fresh<'a> {
    shared: &'a Shared,
    files: VecDeque<(Instant, Name)>,
}

impl Fresh<'_> {
    fn add(&mut self, name: Name) {
        self.shared.stats.kv_unflushed.fetch_add(1, Ordering::Release);
        self.files.push_back((Instant::now(), name));
    }

    /// How long it is until the first one is to be flushed.
    fn due(&self) -> Option<Duration> {
        self.files.front().map(|(since, _)| FLUSH_AFTER.saturating_sub(since.elapsed()))
    }

    /// Flushes some of those that are so old.
    fn flush(&mut self, age: Duration) {
        let old = self.files.iter().take_while(|(since, _)| since.elapsed() >= age);
        let old: Vec<Name> = old.take(FLUSH_FILES).map(|(_, name)| *name).collect();
        if !old.is_empty() {
            self.shared.shelf.flush(&old);
            self.files.drain(..old.len());
            self.shared.stats.kv_unflushed.fetch_sub(old.len(), Ordering::Relaxed);
        }
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        self.shared.stats.kv_unflushed.fetch_sub(self.files.len(), Ordering::Relaxed);
    }
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
        Ok(Self {
            shared,
            roots: HashMap::new(),
            rootless: HashSet::new(),
            named: false,
            free,
            spare: None,
            buffer_count,
            failures: 0,
            spills,
            loads,
            arrivals,
            threads: (writer, reader),
        })
    }

    /// A sequence of this scope is here; so its blocks can be named.
    pub fn know(&mut self, scope: CacheScope, adapter: Option<Digest>) {
        if self.roots.contains_key(&scope) {
            return;
        }
        if self.roots.len() >= ROOTS_MAX {
            self.roots.clear(); // what runs is not loaded or spilled until it is known again
        }
        self.roots.insert(scope, self.shared.model.root(scope, adapter));
        self.named |= self.rootless.remove(&scope);
    }

    /// Sends a block away that has to go, unless it is there. `export` copies it.
    pub fn spill(&mut self, block: &Forgotten, export: impl FnOnce(&mut Vec<u8>) -> bool) {
        self.spill_within(block, Duration::ZERO, export);
    }

    /// The same, waiting so long for a buffer; where there is none, it is lost.
    fn spill_within(
        &mut self,
        block: &Forgotten,
        patience: Duration,
        export: impl FnOnce(&mut Vec<u8>) -> bool,
    ) {
        if !self.takes(block, patience, export) {
            self.shared.stats.kv_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends a block away that does not have to go yet. False where it was not taken and may be
    /// tried again. One that cannot be named is not waited for: [`Floor::has_failed`] says so when
    /// it can.
    pub fn keep(&mut self, block: &Forgotten, export: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        if self.roots.contains_key(&block.scope) {
            return self.takes(block, Duration::ZERO, export);
        }
        if self.rootless.len() < ROOTS_MAX {
            self.rootless.insert(block.scope);
        }
        true
    }

    /// Whether a block is there, or on its way.
    fn takes(
        &mut self,
        block: &Forgotten,
        patience: Duration,
        export: impl FnOnce(&mut Vec<u8>) -> bool,
    ) -> bool {
        let &Forgotten { block: _, scope, before, depth, ref text, shared } = block;
        let Some(&root) = self.roots.get(&scope) else { return false };
        let name = Name::new(self.shared.model, root, before.then(text));
        let payload = match self.shared.shelf.touch(&name, depth, shared) {
            Found::Yes => return true,
            // The disk has enough to do; without being told, a file goes earlier.
            Found::Stale if self.sent_count() >= self.buffer_count => return true,
            Found::Stale => None,
            Found::No => {
                let free = || self.free.recv_timeout(patience).ok();
                let Some(mut payload) = self.spare.take().or_else(free) else { return false };
                payload.clear();
                if !export(&mut payload) {
                    self.spare = Some(payload);
                    return false;
                }
                Some(payload)
            }
        };
        let (text, _sent) = (text.clone(), Sent::new(&self.shared.stats));
        self.spills.send(Spill { root, before, depth, text, shared, payload, _sent }).is_ok()
    }

    /// Blocks on their way to the disk. Where there were none, all writes that failed are counted.
    pub fn sent_count(&self) -> usize {
        self.shared.stats.kv_sent.load(Ordering::Acquire)
    }

    /// Whether a block may be sent that does not have to go yet.
    pub fn has_time(&self) -> bool {
        2 * self.sent_count() < self.buffer_count && !self.shared.shelf.is_paused()
    }

    /// Writes have failed since this was asked last, or blocks can be named that could not:
    /// blocks that were sent may be lost.
    pub fn has_failed(&mut self) -> bool {
        let failures = self.shared.stats.kv_spill_failures.load(Ordering::Relaxed);
        let named = std::mem::take(&mut self.named);
        std::mem::replace(&mut self.failures, failures) != failures || named
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
        mut self,
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
    /// The thread that writes. To flush is for when nothing is to be written.
    fn write(&self, spills: &Receiver<Spill>, give_back: &Sender<Vec<u8>>) {
        let mut fresh = Fresh { shared: self, files: VecDeque::new() };
        loop {
            let spill = match fresh.due() {
                None => spills.recv().map_err(RecvTimeoutError::from),
                Some(due) => spills.recv_timeout(due),
            };
            match spill {
                Ok(spill) => {
                    self.put(spill, give_back, &mut fresh);
                    if fresh.files.len() >= FRESH_FILES {
                        fresh.flush(Duration::ZERO);
                    }
                }
                Err(RecvTimeoutError::Timeout) => fresh.flush(FLUSH_AFTER),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        while !fresh.files.is_empty() {
            fresh.flush(Duration::ZERO);
        }
    }

    /// Writes a block.
    fn put(&self, spill: Spill, give_back: &Sender<Vec<u8>>, fresh: &mut Fresh<'_>) {
        let Spill { root, before, depth, text, shared, payload, _sent } = spill;
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
        // Counted there before it is not counted here: nobody finds it nowhere.
        if put == Put::Written {
            fresh.add(name);
        }
        drop(_sent);
        payload.map(|payload| give_back.send(payload)); // the engine may be gone
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

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn a_writer_that_panics_leaves_nothing_that_somebody_waits_for() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Arc::new(Shelf::open(folder.path(), 1 << 20, String::new()).unwrap());
        let stats = Arc::new(Stats::default());
        let floor = Floor::new(shelf, Digest([1; 32]), "layout", [1000, 16], &stats).unwrap();
        let root = floor.shared.model.root(CacheScope::default(), None);
        let (spills, to_write) = channel();
        let spill = || {
            let (text, _sent) = ([7; 16].into(), Sent::new(&stats));
            let before = Chain::START;
            Spill { root, before, depth: 0, text, shared: true, payload: None, _sent }
        };
        for _ in 0..3 {
            spills.send(spill()).unwrap();
        }
        let waiting = || [stats.kv_sent.load(Ordering::Relaxed), stats.kv_waiting()];
        assert_eq!(waiting(), [3, 3]);
        let writes = || {
            let mut fresh = Fresh { shared: &floor.shared, files: VecDeque::new() };
            let _spill: Spill = to_write.recv().unwrap();
            fresh.add(Name::new(floor.shared.model, root, Chain::START));
            assert_eq!(waiting(), [3, 4]);
            panic!("a bug in the writer");
        };
        assert!(catch_unwind(AssertUnwindSafe(writes)).is_err());
        assert_eq!(waiting(), [2, 2]);
        drop(to_write);
        assert_eq!(waiting(), [0, 0]);
        assert!(spills.send(spill()).is_err());
        assert_eq!(waiting(), [0, 0]);
    }
}
