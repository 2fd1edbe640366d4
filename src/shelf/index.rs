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
    /// What its file says of that.
    told_us: u64,
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
        self.files.insert(name, Entry { bytes, used_us, told_us: used_us });
        self.order.insert((used_us, name));
        self.bytes += bytes;
        self.counter(name.model).fetch_add(bytes, Ordering::Relaxed);
    }

    /// When anything was used last.
    pub fn newest_us(&self) -> u64 {
        self.order.last().map_or(0, |&(used_us, _)| used_us)
    }

    /// When the one unused longest was used.
    pub fn oldest_us(&self) -> Option<u64> {
        self.order.first().map(|&(used_us, _)| used_us)
    }

    /// It is used again; no use makes it older. Says what its file lags behind, if it is there.
    pub fn touch(&mut self, name: &Name, used_us: u64) -> Option<u64> {
        let entry = self.files.get_mut(name)?;
        if used_us > entry.used_us {
            self.order.remove(&(entry.used_us, *name));
            entry.used_us = used_us;
            self.order.insert((used_us, *name));
        }
        Some(entry.used_us - entry.told_us)
    }

    /// Its file is told, from now on; of what.
    pub fn tell(&mut self, name: &Name) -> Option<u64> {
        let entry = self.files.get_mut(name)?;
        entry.told_us = entry.used_us;
        Some(entry.told_us)
    }

    pub fn remove(&mut self, name: &Name) {
        if let Some(entry) = self.files.remove(name) {
            self.order.remove(&(entry.used_us, *name));
            self.bytes -= entry.bytes;
            self.counter(name.model).fetch_sub(entry.bytes, Ordering::Relaxed);
        }
    }

    /// What must go until `more` bytes that were used then fit into `max`; forgotten already.
    /// `None` if it would have been used later than they.
    pub fn make_room(&mut self, more: u64, max: u64, used_us: u64) -> Option<Vec<Name>> {
        let (mut left, mut gone) = (self.bytes, Vec::new());
        for &(oldest_us, name) in &self.order {
            if left + more <= max {
                break;
            }
            if oldest_us > used_us {
                return None;
            }
            left -= self.files[&name].bytes;
            gone.push(name);
        }
        gone.iter().for_each(|name| self.remove(name));
        Some(gone)
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
