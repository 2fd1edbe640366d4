//! The adapters that can be asked for: by id, each made for one base model.
//!
//! An adapter is registered with its files alone; it is read when somebody asks for it first, on
//! the thread that asks, and stays in memory while the budget lasts: those that nobody asked for
//! longest go first, pinned ones never. What is registered is a *generation*: replacing an adapter,
//! or files that changed before they were read again, make a new one, under a number that is never
//! used twice. A running request holds what it began with, and the prefix cache is told apart by
//! the number. Deliberately absent: who may use which adapter, and the engine, which knows numbers.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use hearth_models::{Adapter, LoraSlot, ModelFile, Pool};

use crate::engine::handle::AdapterSet;
use crate::error::Error;
use crate::shelf::Digest;
use crate::types::unix_now_s;

/// Adapters of one request, at most: a batch has room for more, a request has no use for them.
pub const COMPOSED_MAX: usize = 16;
/// Weighted lists whose numbers are remembered.
const LISTS_MAX: usize = 4096;

/// What is known of an adapter whether it is in memory or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterCard {
    /// The id that requests name.
    pub id: String,
    /// Id of the model that it was made for.
    pub base: String,
    /// Since when it is offered, in seconds of Unix time.
    pub created_s: u64,
}

/// An adapter to be registered.
#[derive(Clone, Debug)]
pub struct NewAdapter {
    /// The id that requests name.
    pub id: String,
    /// Id of the model that it was made for.
    pub base: String,
    /// A PEFT folder or a GGUF file.
    pub path: PathBuf,
    /// Once in memory, it stays.
    pub pinned: bool,
}

/// One of an adapter, and how strong it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    /// Its id.
    pub id: String,
    /// Multiplies what it adds.
    pub weight: f32,
}

/// All adapters of this process.
#[derive(Debug, Default)]
pub struct Adapters {
    state: Mutex<State>,
    /// Bytes that adapters may take while nobody uses them.
    budget_bytes: u64,
    /// The last number that was given.
    numbers: AtomicU64,
    /// Counts uses.
    clock: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    known: BTreeMap<String, Arc<Known>>,
    /// Numbers of weighted lists, by generations and bits of the weights.
    lists: HashMap<Vec<(u64, u32)>, u64>,
}

/// One that is registered.
#[derive(Debug)]
struct Known {
    card: AdapterCard,
    path: PathBuf,
    pinned: bool,
    /// What its files were, and what came of them.
    read: Mutex<Option<Read>>,
    /// When somebody asked for it last.
    used: AtomicU64,
}

#[derive(Debug)]
struct Read {
    generation: u64,
    stamp: Stamp,
    /// `None` once it had to go.
    adapter: Option<Arc<Adapter>>,
    content: Digest,
}

/// One that is in memory, its generation and its content.
type There = (Arc<Adapter>, u64, Digest);

impl Read {
    fn there(&self) -> Option<There> {
        let adapter = self.adapter.as_ref()?;
        Some((Arc::clone(adapter), self.generation, self.content))
    }
}

impl Adapters {
    /// None yet; those that are read share `budget_bytes`.
    pub fn new(budget_bytes: u64) -> Self {
        Self { budget_bytes, ..Self::default() }
    }

    /// Registers one; reads nothing. With `replace` as [`Adapters::load`].
    pub(super) fn put(&self, new: NewAdapter, replace: bool) -> Result<(), Error> {
        self.insert(Known::new(new)?, replace)
    }

    /// Reads one and registers it. With `replace` it takes the place of another of its id and its
    /// base: requests that run keep the old one.
    pub(super) fn load(
        &self,
        new: NewAdapter,
        file: &ModelFile,
        replace: bool,
    ) -> Result<(), Error> {
        let known = Known::new(new)?;
        self.admits(&known, replace)?;
        self.read(&known, file).map_err(|why| Error::invalid("lora_path", why))?;
        self.insert(known, replace)?;
        self.make_room();
        Ok(())
    }

    fn insert(&self, known: Known, replace: bool) -> Result<(), Error> {
        self.admits(&known, replace)?;
        self.state().known.insert(known.card.id.clone(), Arc::new(known));
        Ok(())
    }

    fn admits(&self, new: &Known, replace: bool) -> Result<(), Error> {
        let id = &new.card.id;
        match self.card(id) {
            Some(old) if !replace || old.base != new.card.base => {
                let message = format!("The adapter `{id}` is loaded already, for `{}`.", old.base);
                Err(Error::invalid("lora_name", message))
            }
            _ => Ok(()),
        }
    }

    /// Forgets one. Requests that run keep it.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        match self.state().known.remove(id) {
            Some(_) => Ok(()),
            None => {
                let message = format!("The adapter `{id}` does not exist.");
                Err(Error::invalid("lora_name", message))
            }
        }
    }

    /// All of them, by id.
    pub fn cards(&self) -> Vec<AdapterCard> {
        self.state().known.values().map(|known| known.card.clone()).collect()
    }

    /// One of them.
    pub fn card(&self, id: &str) -> Option<AdapterCard> {
        self.state().known.get(id).map(|known| known.card.clone())
    }

    /// It is known, and its files lie in this folder.
    pub(super) fn is_from(&self, id: &str, folder: &Path) -> bool {
        self.state().known.get(id).is_some_and(|known| known.path.starts_with(folder))
    }

    /// Bytes of those in memory.
    pub fn resident_bytes(&self) -> u64 {
        let known: Vec<_> = self.state().known.values().cloned().collect();
        known.iter().map(|known| known.resident_bytes()).sum()
    }

    /// A weighted list for a request to the model `base`, whose files are `file`. Reads what is not
    /// in memory; `None` for an empty list.
    pub fn set(
        &self,
        base: &str,
        file: &ModelFile,
        wanted: &[Weighted],
    ) -> Result<Option<Arc<AdapterSet>>, Error> {
        if wanted.is_empty() {
            return Ok(None);
        }
        let mut all = Vec::with_capacity(wanted.len());
        for Weighted { id, weight } in wanted {
            let known = self.known(base, id).ok_or_else(|| {
                let message = format!("The model `{base}` has no adapter `{id}`.");
                Error::invalid("adapters", message)
            })?;
            let read = self.read(&known, file);
            // The log says why; whoever asks need not know where files lie.
            let there = read.map_err(|_| {
                let message =
                    format!("The adapter `{id}` cannot be used; the server's log has why.");
                Error::Internal(message)
            })?;
            all.push((there, *weight));
        }
        self.make_room();
        Ok(Some(self.list(all)))
    }

    /// The same where all of it is in memory; waits for nothing.
    pub fn set_at_hand(&self, base: &str, wanted: &[Weighted]) -> Option<Arc<AdapterSet>> {
        let one = |Weighted { id, weight }: &Weighted| {
            let known = self.known(base, id)?;
            self.is_used(&known);
            let there = known.read.try_lock().ok()?.as_ref()?.there()?;
            Some((there, *weight))
        };
        wanted.iter().map(one).collect::<Option<Vec<_>>>().map(|all| self.list(all))
    }

    fn known(&self, base: &str, id: &str) -> Option<Arc<Known>> {
        let known = self.state().known.get(id).cloned();
        known.filter(|known| known.card.base == base)
    }

    fn list(&self, all: Vec<(There, f32)>) -> Arc<AdapterSet> {
        let (mut parts, mut key, mut content) = (Vec::new(), Vec::new(), Vec::new());
        for ((adapter, generation, digest), weight) in all {
            parts.push((adapter, weight));
            key.push((generation, weight.to_bits()));
            content.push(Digest::of_parts(&[&digest.0, &weight.to_le_bytes()]));
        }
        let slot = LoraSlot(self.number_of(key));
        let content: Vec<&[u8]> = content.iter().map(|digest| &digest.0[..]).collect();
        Arc::new(AdapterSet { slot, parts, content: Digest::of_parts(&content) })
    }

    /// Whoever else asks for it meanwhile waits for the same read.
    fn read(&self, known: &Known, file: &ModelFile) -> Result<There, String> {
        self.is_used(known);
        let mut read = known.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = read.as_ref().and_then(Read::there) {
            return Ok(there);
        }
        let stamp = stamp(&known.path);
        // On this thread alone: no engine waits for it.
        let adapter = Adapter::open(&known.path, file, &Pool::new(1)).map_err(|error| {
            tracing::warn!(adapter = known.card.id, %error, "an adapter cannot be read");
            format!("The adapter `{}` cannot be used: {error}", known.card.id)
        })?;
        let adapter = Arc::new(adapter);
        let content = Digest::of(|listener| adapter.tell(listener));
        // A copy may keep lengths and times; what other numbers computed is no longer true.
        let generation = match &*read {
            Some(old) if old.stamp == stamp && old.content == content => old.generation,
            _ => self.next_number(),
        };
        let kept = Some(Arc::clone(&adapter));
        *read = Some(Read { generation, stamp, adapter: kept, content });
        Ok((adapter, generation, content))
    }

    fn is_used(&self, known: &Known) {
        known.used.store(self.clock.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Lets adapters go until the others fit, those that nobody asked for longest first.
    fn make_room(&self) {
        let mut known: Vec<_> = self.state().known.values().cloned().collect();
        known.sort_by_key(|known| known.used.load(Ordering::Relaxed));
        let mut bytes: u64 = known.iter().map(|known| known.resident_bytes()).sum();
        for known in known.iter().filter(|known| !known.pinned) {
            if bytes <= self.budget_bytes {
                return;
            }
            bytes -= known.let_go();
        }
    }

    /// The number of a weighted list: the same list has the same one for as long as it is
    /// remembered.
    fn number_of(&self, key: Vec<(u64, u32)>) -> u64 {
        let mut state = self.state();
        if state.lists.len() >= LISTS_MAX {
            state.lists.clear();
        }
        *state.lists.entry(key).or_insert_with(|| self.next_number())
    }

    fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn new(NewAdapter { id, base, path, pinned }: NewAdapter) -> Result<Self, Error> {
        if id.is_empty() || id.chars().any(char::is_control) {
            let message = "Invalid 'lora_name': a name without control characters is wanted.";
            return Err(Error::invalid("lora_name", message));
        }
        let card = AdapterCard { id, base, created_s: unix_now_s() };
        Ok(Self { card, path, pinned, read: Mutex::default(), used: AtomicU64::new(0) })
    }

    /// Those that are being read count when they are there.
    fn resident_bytes(&self) -> u64 {
        let Ok(read) = self.read.try_lock() else { return 0 };
        read.as_ref().and_then(|r| r.adapter.as_ref()).map_or(0, |a| a.bytes() as u64)
    }

    /// Bytes that are free once requests that run with it are done.
    fn let_go(&self) -> u64 {
        let Ok(mut read) = self.read.try_lock() else { return 0 };
        let adapter = read.as_mut().and_then(|read| read.adapter.take());
        adapter.map_or(0, |adapter| adapter.bytes() as u64)
    }
}

/// Lengths and times of the files of an adapter: others are another generation.
pub(super) type Stamp = Vec<(u64, Option<SystemTime>)>;

pub(super) fn stamp(path: &Path) -> Stamp {
    let of = |path: &Path| fs::metadata(path).map(|meta| (meta.len(), meta.modified().ok())).ok();
    let is_part = |path: &PathBuf| {
        let end = path.extension().and_then(|end| end.to_str());
        matches!(end, Some("json" | "safetensors" | "gguf"))
    };
    let inside = fs::read_dir(path).into_iter().flatten().flatten().map(|item| item.path());
    let mut files: Vec<PathBuf> = inside.filter(is_part).collect();
    files.sort();
    std::iter::once(of(path)).chain(files.iter().map(|file| of(file))).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "llama";

    fn goldens() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
    }

    fn base() -> ModelFile {
        hearth_models::open(&goldens().join("llama")).unwrap()
    }

    fn new(id: &str, path: PathBuf) -> NewAdapter {
        NewAdapter { id: id.to_owned(), base: BASE.to_owned(), path, pinned: false }
    }

    fn one(id: &str, weight: f32) -> Vec<Weighted> {
        vec![Weighted { id: id.to_owned(), weight }]
    }

    /// Three adapters that are one file, and a budget for one and a half of them.
    fn adapters() -> (Adapters, u64) {
        let bytes = Adapter::open(&goldens().join("lora/llama"), &base(), &Pool::new(1)).unwrap();
        let bytes = bytes.bytes() as u64;
        let adapters = Adapters::new(bytes * 3 / 2);
        for id in ["a", "b", "c"] {
            adapters.put(new(id, goldens().join("lora/llama")), false).unwrap();
        }
        (adapters, bytes)
    }

    fn slot(adapters: &Adapters, wanted: &[Weighted]) -> u64 {
        adapters.set(BASE, &base(), wanted).unwrap().unwrap().slot.0
    }

    #[test]
    fn files_are_read_when_they_are_asked_for_and_go_by_turns() {
        let (adapters, bytes) = adapters();
        assert_eq!(adapters.resident_bytes(), 0);
        let first = slot(&adapters, &one("a", 1.0));
        assert_eq!(adapters.resident_bytes(), bytes);
        let at_hand = |id| adapters.set_at_hand(BASE, &one(id, 1.0)).map(|set| set.slot.0);
        assert_eq!((at_hand("a"), at_hand("b")), (Some(first), None), "nothing is read for it");
        let held = adapters.set(BASE, &base(), &one("b", 1.0)).unwrap();
        assert_eq!(adapters.resident_bytes(), bytes, "the first had to go");
        slot(&adapters, &one("c", 1.0));
        assert!(held.is_some_and(|set| set.parts[0].0.bytes() as u64 == bytes), "it is held");
        // The same files come back as what they were.
        assert_eq!(slot(&adapters, &one("a", 1.0)), first);
    }

    #[test]
    fn a_pinned_adapter_stays() {
        let (adapters, bytes) = adapters();
        let pinned = NewAdapter { pinned: true, ..new("p", goldens().join("lora/llama")) };
        adapters.put(pinned, false).unwrap();
        slot(&adapters, &one("p", 1.0));
        for id in ["a", "b"] {
            slot(&adapters, &one(id, 1.0));
        }
        let known = adapters.state().known["p"].clone();
        assert_eq!((known.resident_bytes(), adapters.resident_bytes()), (bytes, bytes));
    }

    #[test]
    fn numbers_tell_lists_and_generations_apart() {
        let (adapters, _) = adapters();
        let pair = |a, b| [one("a", a), one("b", b)].concat();
        let lists = [one("a", 1.0), one("a", 0.5), one("b", 1.0), pair(1.0, 1.0), pair(1.0, 0.5)];
        let numbers = lists.clone().map(|list| slot(&adapters, &list));
        let mut apart = numbers.to_vec();
        apart.sort_unstable();
        apart.dedup();
        assert_eq!(apart.len(), numbers.len());
        assert_eq!(lists.map(|list| slot(&adapters, &list)), numbers);
        // Replaced by the same file: another generation.
        adapters.load(new("a", goldens().join("lora/llama")), &base(), true).unwrap();
        assert!(slot(&adapters, &one("a", 1.0)) > numbers[4]);
    }

    #[test]
    fn files_that_changed_are_another_generation() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(goldens().join("lora/llama").join(file), folder.path().join(file)).unwrap();
        }
        let (adapters, _) = adapters();
        adapters.put(new("x", folder.path().to_owned()), false).unwrap();
        let first = slot(&adapters, &one("x", 1.0));
        let known = adapters.state().known["x"].clone();
        known.let_go();
        assert_eq!(slot(&adapters, &one("x", 1.0)), first);
        known.let_go();
        let config = folder.path().join("adapter_config.json");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace("\"lora_alpha\": 8", "\"lora_alpha\": 16")).unwrap();
        let second = slot(&adapters, &one("x", 1.0));
        assert_ne!(second, first);
        // Other numbers in files of the same lengths and times, as some copies leave them.
        known.let_go();
        let weights = folder.path().join("adapter_model.safetensors");
        let times = fs::metadata(&weights).unwrap().modified().unwrap();
        let mut bytes = fs::read(&weights).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 0x80; // the sign of the last number
        fs::write(&weights, bytes).unwrap();
        fs::File::open(&weights).unwrap().set_modified(times).unwrap();
        assert_ne!(slot(&adapters, &one("x", 1.0)), second);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let (adapters, _) = adapters();
        let error = |result: Result<(), Error>| result.unwrap_err().to_string();
        assert!(error(adapters.put(new("a", goldens()), false)).contains("loaded already"));
        assert!(error(adapters.put(new("", goldens()), false)).contains("lora_name"));
        assert!(error(adapters.remove("z")).contains("`z`"));
        let broken = adapters.load(new("z", goldens().join("lora/qwen3")), &base(), false);
        assert!(error(broken).contains("self_attn"), "the tensor is named");
        assert!(adapters.card("z").is_none());
        let unknown = adapters.set(BASE, &base(), &one("z", 1.0)).map(drop);
        assert!(error(unknown).contains("`z`"));
        let other = adapters.set("other", &base(), &one("a", 1.0)).map(drop);
        assert!(error(other).contains("`other`"));
        adapters.remove("a").unwrap();
        assert!(adapters.set(BASE, &base(), &one("a", 1.0)).is_err());
        assert!(adapters.set(BASE, &base(), &[]).unwrap().is_none());
    }
}
