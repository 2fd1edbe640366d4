//! The cache folder, in the layout that the hub's Python library uses, so that both find what the
//! other downloaded:
//!
//! ```text
//! models--org--name/refs/main                        the commit that `main` was, as text
//! models--org--name/snapshots/<commit>/config.json   -> ../../blobs/<etag>
//! models--org--name/blobs/<etag>                     the bytes;  <etag>.incomplete while they come
//! ```

use super::HubError;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// One repository's folder.
pub(super) struct RepoCache {
    root: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache: &Path, repo: &str) -> Self {
        Self { root: cache.join(format!("models--{}", repo.replace('/', "--"))) }
    }

    /// The commit that a revision was when it was last downloaded; a commit stands for itself.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        let recorded = fs::read_to_string(self.root.join("refs").join(revision)).ok();
        let commit = recorded.map_or_else(|| revision.to_owned(), |text| text.trim().to_owned());
        (is_plain_name(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// Records what a revision is now. Done last, so that a download that broke off never hides
    /// the complete one before it.
    pub(super) fn record(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_parent(&path)?;
        fs::write(&path, commit).map_err(|e| HubError::io(&path, e))
    }

    /// The folder of one commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The file, when it is all there.
    pub(super) fn file(&self, commit: &str, name: &str) -> Option<PathBuf> {
        let path = self.snapshot(commit).join(name);
        path.is_file().then_some(path)
    }

    /// Names of all files of one commit that are there, with `/` between folders.
    pub(super) fn files(&self, commit: &str) -> Vec<String> {
        let (snapshot, mut names) = (self.snapshot(commit), Vec::new());
        let mut folders = vec![snapshot.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                // A link to a folder could lead back up.
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if path.is_file()
                    && let Ok(name) = path.strip_prefix(&snapshot)
                {
                    let parts: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
                    names.push(parts.join("/"));
                }
            }
        }
        names
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Makes a complete blob appear as a file of a commit.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<PathBuf, HubError> {
        let path = self.snapshot(commit).join(name);
        create_parent(&path)?;
        if path.is_file() {
            return Ok(path);
        }
        // A link whose blob is gone.
        let _ = fs::remove_file(&path);
        let up = "../".repeat(2 + name.matches('/').count());
        match place(&self.blob(etag), &format!("{up}blobs/{etag}"), &path) {
            // Another process was faster.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(path),
            Err(e) => Err(HubError::io(&path, e)),
            Ok(()) => Ok(path),
        }
    }
}

#[cfg(unix)]
fn place(_blob: &Path, relative: &str, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(relative, path)
}

/// Where links need privileges, the bytes themselves stand in the snapshot.
#[cfg(not(unix))]
fn place(blob: &Path, _relative: &str, path: &Path) -> io::Result<()> {
    fs::hard_link(blob, path).or_else(|_| fs::copy(blob, path).map(drop))
}

pub(super) fn create_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|e| HubError::io(parent, e))
}

/// One component, no way up: commits and etags that a server names become file names here.
pub(super) fn is_plain_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    !name.is_empty() && name.len() <= 200 && !name.starts_with('.') && name.bytes().all(plain)
}

/// A path inside the repository, no way up.
pub(super) fn is_plain_path(name: &str) -> bool {
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_));
    !name.is_empty() && !name.contains('\\') && Path::new(name).components().all(inside)
}
