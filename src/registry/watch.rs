//! Folders whose adapters are served as they come and go.
//!
//! Every folder in one that holds a PEFT adapter, and every `.gguf` file, is an adapter named like
//! it. A folder is looked at every two seconds, which needs nothing of the system and works on
//! shares. What is new or changed is taken when two looks agree, so that nothing is read while it
//! is being copied; a changed adapter is a new generation, and one whose files are gone is
//! forgotten: running requests keep what they began with. Deliberately absent: reading, which is
//! done when somebody asks.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hearth_models::Adapter;

use super::Registry;
use super::adapters::{NewAdapter, Stamp, stamp};
use crate::error::Error;

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(2);

/// A folder of adapters for one model.
#[derive(Debug)]
pub struct Watched {
    base: String,
    folder: PathBuf,
    seen: BTreeMap<String, Seen>,
    /// The last look failed, and was told.
    lost: bool,
}

/// An adapter that lies in the folder.
#[derive(Debug)]
struct Seen {
    /// As the last look found its files.
    stamp: Stamp,
    /// As they were when it was taken, for better or for worse.
    taken: Option<Stamp>,
    /// It is registered, by us.
    ours: bool,
    /// The last look did not find it.
    missed: bool,
}

impl Watched {
    /// What lies in `folder` is registered at once.
    ///
    /// # Errors
    /// A folder that cannot be listed, or an adapter whose name is taken.
    pub(super) fn open(registry: &Registry, base: String, folder: PathBuf) -> Result<Self, Error> {
        let mut watched = Self { base, folder, seen: BTreeMap::new(), lost: false };
        for (id, path) in watched.list().map_err(|why| watched.unlisted(&why))? {
            let stamp = stamp(&path);
            watched.take(registry, &id, &path, false)?;
            let taken = Some(stamp.clone());
            watched.seen.insert(id, Seen { stamp, taken, ours: true, missed: false });
        }
        Ok(watched)
    }

    /// Follows what became of the folder since the last look.
    pub fn look(&mut self, registry: &Registry) {
        let found = match self.list() {
            Ok(found) => found,
            // What was there stays: a share that is away for a minute takes nothing with it.
            Err(why) => {
                if !std::mem::replace(&mut self.lost, true) {
                    tracing::warn!("{}", self.unlisted(&why));
                }
                return;
            }
        };
        self.lost = false;
        self.seen.retain(|id, seen| {
            if found.contains_key(id) || !std::mem::replace(&mut seen.missed, true) {
                return true; // a file that could not be looked at once is not gone
            }
            let adapters = registry.adapters();
            if seen.ours && adapters.is_from(id, &self.folder) && adapters.remove(id).is_ok() {
                tracing::info!(adapter = id, "an adapter is gone with its files");
            }
            false
        });
        for (id, path) in found {
            let now = stamp(&path);
            let old = self.seen.remove(&id);
            let settled = old.as_ref().is_some_and(|old| old.stamp == now);
            let (taken, ours) = old.map_or((None, false), |old| (old.taken, old.ours));
            let mut ours = ours && registry.adapters().is_from(&id, &self.folder);
            if !settled || taken.as_ref() == Some(&now) {
                self.seen.insert(id, Seen { stamp: now, taken, ours, missed: false });
                continue;
            }
            match self.take(registry, &id, &path, ours) {
                Ok(()) => {
                    tracing::info!(adapter = id, replaced = ours, "an adapter is served");
                    ours = true;
                }
                Err(error) => tracing::warn!(adapter = id, %error, "an adapter is not served"),
            }
            self.seen
                .insert(id, Seen { taken: Some(now.clone()), stamp: now, ours, missed: false });
        }
    }

    fn take(&self, registry: &Registry, id: &str, path: &Path, replace: bool) -> Result<(), Error> {
        registry.is_free(id)?;
        let (id, base, path) = (id.to_owned(), self.base.clone(), path.to_owned());
        registry.adapters().put(NewAdapter { id, base, path, pinned: false }, replace)
    }

    /// The adapters that lie in the folder, by id. Hidden ones are left out.
    fn list(&self) -> io::Result<BTreeMap<String, PathBuf>> {
        let mut found = BTreeMap::new();
        for item in std::fs::read_dir(&self.folder)? {
            let path = item?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let id = match path.is_dir() {
                true => Some(name),
                false => name.strip_suffix(".gguf"),
            };
            let id = id.filter(|id| !id.is_empty() && !name.starts_with('.'));
            if let Some(id) = id.filter(|_| Adapter::is_at(&path).is_ok()) {
                found.insert(id.to_owned(), path);
            }
        }
        Ok(found)
    }

    fn unlisted(&self, why: &io::Error) -> Error {
        Error::invalid("lora_dir", format!("{} cannot be listed: {why}", self.folder.display()))
    }
}

/// Looks at the folders for as long as the registry is used.
///
/// # Errors
/// The system refuses a thread.
pub fn watch(registry: &Arc<Registry>, mut folders: Vec<Watched>) -> io::Result<()> {
    if folders.is_empty() {
        return Ok(());
    }
    let registry = Arc::downgrade(registry);
    let look = move || {
        while let Some(registry) = registry.upgrade() {
            folders.iter_mut().for_each(|folder| folder.look(&registry));
            drop(registry);
            thread::sleep(EVERY);
        }
    };
    thread::Builder::new().name("lora-dir".to_owned()).spawn(look).map(drop)
}
