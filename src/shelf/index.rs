//! What is on the shelf, how large it is, and what was used when. A value: no files.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::key::Name;

/// All files.
#[derive(Debug, Default)]
pub(super) struct Index {
    files: HashMap<Name, Entry>,
    /// The one unused longest first.
    order: BTreeSet<(u64, Name)>,
    bytes: u64,
    /// Bytes of each model, for whoever watches.
    models: HashMap<[u8; 8], Arc<AtomicU64>>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: u64,
    /// Microseconds of Unix time, see [`super::Shelf::used_us`].
    used_us: u64,
}

impl Index {
    pub fn contains(&self, name: &Name) -> bool {
        self.files.contains_key(name)
    }

    /// Bytes of the files of one model, from now on.
    pub fn counter(&mut self, model: [u8; 8]) -> Arc<AtomicU64> {
        Arc::clone(self.models.entry(model).or_default())
    }

    pub fn insert(&mut self, name: Name, bytes: u64, used_us: u64) {
        self.remove(&name);
        self.files.insert(name, Entry { bytes, used_us });
        self.order.insert((used_us, name));
        self.bytes += bytes;
        self.counter(name.model).fetch_add(bytes, Ordering::Relaxed);
    }

    /// When anything was used last.
    pub fn newest_us(&self) -> u64 {
        self.order.last().map_or(0, |&(used_us, _)| used_us)
    }

    /// It is used again.
    pub fn touch(&mut self, name: &Name, used_us: u64) {
        if let Some(entry) = self.files.get_mut(name) {
            self.order.remove(&(entry.used_us, *name));
            entry.used_us = used_us;
            self.order.insert((used_us, *name));
        }
    }

    pub fn remove(&mut self, name: &Name) {
        if let Some(entry) = self.files.remove(name) {
            self.order.remove(&(entry.used_us, *name));
            self.bytes -= entry.bytes;
            self.counter(name.model).fetch_sub(entry.bytes, Ordering::Relaxed);
        }
    }

    /// What must go until `more` bytes fit into `max`; forgotten already.
    pub fn make_room(&mut self, more: u64, max: u64) -> Vec<Name> {
        let mut gone = Vec::new();
        while self.bytes + more > max
            && let Some(&(_, name)) = self.order.first()
        {
            self.remove(&name);
            gone.push(name);
        }
        gone
    }

    /// What is kept twice is the same.
    #[cfg(test)]
    pub fn check(&self) {
        let order: BTreeSet<_> = self.files.iter().map(|(n, e)| (e.used_us, *n)).collect();
        assert_eq!(order, self.order);
        assert_eq!(self.files.values().map(|e| e.bytes).sum::<u64>(), self.bytes);
        let counted: u64 = self.models.values().map(|b| b.load(Ordering::Relaxed)).sum();
        assert_eq!(counted, self.bytes);
    }
}
