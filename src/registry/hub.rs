//! Fetches a model from the hub into the shared cache, or finds it there.
//!
//! Owns the hub's routes, the cache layout, and the choice of files. Runs on the thread that calls
//! it and blocks; it is called at start, before anything is served. May import `source`, and is the
//! only place that names an HTTP client.
//!
//! Deliberately absent: uploading, deleting from the cache, and formats that are not models.
//! Two processes may fetch the same file at once without a lock: both write the same bytes to the
//! same places, and the one that comes second finds the file complete.

mod cache;
mod choose;
mod client;
mod download;
mod progress;

pub use progress::{Bars, Progress};

use self::cache::RepoCache;
use self::choose::{Choice, SHARD_INDEX, choose};
use self::client::Client;
use super::source::HubId;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How to reach the hub and where to keep what comes from it.
#[derive(Clone)]
pub struct HubOptions {
    /// Without a slash at its end.
    pub endpoint: String,
    /// The folder with `models--org--name` in it.
    pub cache: PathBuf,
    /// Sent to the endpoint, and nowhere else.
    pub token: Option<String>,
    /// Never touch the network.
    pub offline: bool,
    /// Attempts in a row that bring no byte before a download fails.
    pub attempts: u32,
    /// Wait before the second attempt; twice as long before each further one.
    pub retry_pause: Duration,
    /// How long to wait for a connection.
    pub connect_timeout: Duration,
}

impl HubOptions {
    /// From the environment, as the hub's own tools read it: `HF_ENDPOINT`, `HF_HUB_CACHE`,
    /// `HF_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// The same, with the variables given by a function.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).filter(|value| !value.trim().is_empty());
        let path = |name: &str| var(name).map(PathBuf::from);
        let user_cache = || {
            let home = path("HOME").or_else(|| path("USERPROFILE")).unwrap_or_default();
            path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache"))
        };
        let home = path("HF_HOME").unwrap_or_else(|| user_cache().join("huggingface"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let yes = |value: String| matches!(&*value.to_uppercase(), "1" | "ON" | "YES" | "TRUE");
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            token,
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
            attempts: 5,
            retry_pause: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(10),
        }
    }
}

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No such repository, revision or file.
    #[error("{what} was not found on {endpoint}")]
    NotFound {
        /// What was asked for.
        what: String,
        /// The hub.
        endpoint: String,
    },
    /// The hub refuses access.
    #[error(
        "`{repo}` is gated, private or does not exist (status {status}): {advice}; accept its \
         terms at {page} if it has any"
    )]
    Gated {
        /// `org/name`.
        repo: String,
        /// Where a person can ask for access.
        page: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        advice: &'static str,
    },
    /// The hub does not answer.
    #[error("{endpoint} cannot be reached: {reason}")]
    Unreachable {
        /// The hub.
        endpoint: String,
        /// What happened.
        reason: String,
    },
    /// The hub does not answer or must not be asked, and the cache does not help.
    #[error(
        "`{id}` is not complete in the cache {} ({missing}), and {why}. Run this once with the \
         network, or download the model on another machine and give its folder or .gguf file \
         instead of the id",
        cache.display()
    )]
    NotCached {
        /// What was asked for.
        id: String,
        /// Where it was looked for.
        cache: PathBuf,
        /// What the cache lacks.
        missing: String,
        /// Why it is not downloaded.
        why: String,
    },
    /// The repository is there, but it is not clear which of its files make the model.
    #[error("`{repo}`: {reason}; it has: {}", available.join(", "))]
    Choice {
        /// `org/name`.
        repo: String,
        /// What is not clear.
        reason: String,
        /// The files to choose from.
        available: Vec<String>,
    },
    /// The hub answers something that a hub does not answer.
    #[error("{endpoint} gives an answer that is not understood: {reason}")]
    Confused {
        /// The hub.
        endpoint: String,
        /// What it was.
        reason: String,
    },
    /// What came is not what was announced.
    #[error("`{file}` came damaged: {reason}; it was removed, try again")]
    Damaged {
        /// The file.
        file: String,
        /// How it is known.
        reason: String,
    },
    /// The cache folder.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

impl HubError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

/// Brings a model into the cache and returns what to open: a `.gguf` file or a folder.
///
/// Only what is missing is downloaded. When the hub does not answer, a complete model in the cache
/// is used, with a warning.
pub fn resolve(
    id: &HubId,
    options: &HubOptions,
    progress: &mut dyn Progress,
) -> Result<PathBuf, HubError> {
    let cache = RepoCache::new(&options.cache, &id.repo);
    if options.offline {
        return cached(id, options, &cache, "HF_HUB_OFFLINE forbids to ask the hub".to_owned());
    }
    match pull(id, options, &cache, progress) {
        Err(HubError::Unreachable { endpoint, reason }) => {
            let why = format!("{endpoint} cannot be reached ({reason})");
            let path = cached(id, options, &cache, why.clone())?;
            progress.warn(&format!("{why}: using what the cache has of `{id}`"));
            Ok(path)
        }
        other => other,
    }
}

/// Downloads what is missing of the revision as it is now.
fn pull(
    id: &HubId,
    options: &HubOptions,
    cache: &RepoCache,
    progress: &mut dyn Progress,
) -> Result<PathBuf, HubError> {
    let client = Client::new(options);
    let listing = client.list(id)?;
    let choice = choose(id, &listing.files)?;
    let mut fetch =
        |file: &str| download::file(&client, cache, id, &listing.commit, file, progress);
    for file in choice.files() {
        let path = fetch(file)?;
        if file == SHARD_INDEX {
            for shard in shards(id, &path)? {
                fetch(&shard)?;
            }
        }
    }
    cache.record(id.revision(), &listing.commit)?;
    Ok(opened(cache, &listing.commit, &choice))
}

/// A complete model in the cache.
fn cached(
    id: &HubId,
    options: &HubOptions,
    cache: &RepoCache,
    why: String,
) -> Result<PathBuf, HubError> {
    let incomplete = |missing: String| HubError::NotCached {
        id: id.to_string(),
        cache: options.cache.clone(),
        missing,
        why: why.clone(),
    };
    let commit = cache
        .commit_of(id.revision())
        .ok_or_else(|| incomplete(format!("nothing of revision `{}`", id.revision())))?;
    let files = cache.files(&commit);
    let choice = match choose(id, &files) {
        // What a cache lacks says nothing about the repository, what it has does.
        Err(HubError::Choice { reason, available, .. }) => {
            return Err(incomplete(format!("{reason}; it has: {}", available.join(", "))));
        }
        other => other?,
    };
    for file in choice.files().iter().filter(|file| *file == SHARD_INDEX) {
        for shard in shards(id, &cache.snapshot(&commit).join(file))? {
            if cache.file(&commit, &shard).is_none() {
                return Err(incomplete(format!("the shard `{shard}` is missing")));
            }
        }
    }
    let is_folder = matches!(choice, Choice::Folder { .. });
    if is_folder && cache.file(&commit, "config.json").is_none() {
        return Err(incomplete("`config.json` is missing".to_owned()));
    }
    Ok(opened(cache, &commit, &choice))
}

/// A repository in the cache, at one commit.
#[derive(Debug, PartialEq, Eq)]
pub struct CachedModel {
    /// `org/name`.
    pub repo: String,
    /// Its folder.
    pub path: PathBuf,
    /// Weight files that are complete, with their sizes in bytes; sorted.
    pub weights: Vec<(String, u64)>,
}

/// Every commit in the cache that has weights, sorted.
pub fn list(cache: &Path) -> Vec<CachedModel> {
    let names = |folder: &Path| -> BTreeSet<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let mut found = Vec::new();
    for folder in names(cache) {
        let Some(repo) = folder.strip_prefix("models--") else { continue };
        let repo = repo.replacen("--", "/", 1);
        let repo_cache = RepoCache::new(cache, &repo);
        for commit in names(&cache.join(&folder).join("snapshots")) {
            let path = repo_cache.snapshot(&commit);
            let size = |name: &str| std::fs::metadata(path.join(name)).map_or(0, |m| m.len());
            let is_weight =
                |name: &String| name.ends_with(".gguf") || name.ends_with(".safetensors");
            let mut files = repo_cache.files(&commit);
            files.retain(is_weight);
            files.sort();
            let weights: Vec<_> = files.into_iter().map(|n| (n.clone(), size(&n))).collect();
            if !weights.is_empty() {
                found.push(CachedModel { repo: repo.clone(), path, weights });
            }
        }
    }
    found
}

fn opened(cache: &RepoCache, commit: &str, choice: &Choice) -> PathBuf {
    let folder = cache.snapshot(commit);
    match choice {
        Choice::Folder { .. } => folder,
        Choice::Gguf { files } => folder.join(&files[0]),
    }
}

/// The files that an index of shards names.
fn shards(id: &HubId, index: &Path) -> Result<BTreeSet<String>, HubError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let damaged =
        |reason: String| HubError::Damaged { file: format!("{}/{SHARD_INDEX}", id.repo), reason };
    let text = std::fs::read(index).map_err(|e| HubError::io(index, e))?;
    let parsed: Result<Index, _> = serde_json::from_slice(&text);
    let shards: BTreeSet<String> = match parsed {
        Ok(index) => index.weight_map.into_values().collect(),
        Err(e) => return Err(damaged(e.to_string())),
    };
    match shards.iter().find(|name| !cache::is_plain_path(name)) {
        Some(odd) => Err(damaged(format!("it names a shard `{}`", odd.escape_debug()))),
        None => Ok(shards),
    }
}
