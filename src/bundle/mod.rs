//! Folders for machines without a network: models, a configuration, programs and start scripts,
//! with the hash of every file. The way into an offline classroom is a USB stick.
//!
//! `create` copies and hashes in one pass into a folder beside the target, which gets its name when
//! it is whole; `verify` reads everything again and trusts nothing. Runs on the thread that calls
//! it and blocks. May import `registry` (to open models as `serve` would) and `hearth_models`.
//!
//! Deliberately absent: archives and compression (weights do not shrink, and a bundle serves from
//! where it lies), signatures (the printed hash of the manifest stands for the whole), times of
//! day (the same contents make the same bundle), and downloads (the caller resolves hub ids).

mod create;
mod layout;
mod manifest;
mod names;
mod platform;
mod texts;
mod verify;

use std::io;
use std::path::{Path, PathBuf};

pub use layout::{Contents, ModelSource, Origin, Plan};
pub use manifest::{FileEntry, MANIFEST, Manifest, Part};
pub use platform::{Binary, PLATFORMS};
pub use verify::{Bundle, Problem, Report};

use crate::registry::LoadError;

/// Read and written at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Why a bundle is not made, or not read.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The operating system.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A name that cannot travel.
    #[error("`{path}`: {why}")]
    Name {
        /// The path in the bundle.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// Two files of one name.
    #[error("`{0}` and `{1}` would be one file where case does not count")]
    Collision(String, String),
    /// Two models of one id.
    #[error("two models would be served as `{0}`; use --alias")]
    Twice(String),
    /// A model that `serve` would not load.
    #[error(transparent)]
    Model(Box<LoadError>),
    /// A folder or file that is no adapter.
    #[error("{}: {why}", path.display())]
    Adapter {
        /// What was given.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A program that cannot go along.
    #[error("--binary: {}: {why}", path.display())]
    Binary {
        /// What was given.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A place where the bundle cannot be.
    #[error("{}: {why}", path.display())]
    Target {
        /// What was given.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Not enough room.
    #[error(
        "{}: the bundle takes {} MB and {} MB are free",
        path.display(), needed.div_ceil(1 << 20), free >> 20
    )]
    Space {
        /// The folder.
        path: PathBuf,
        /// Bytes to write.
        needed: u64,
        /// Bytes that there are.
        free: u64,
    },
    /// A file was written to while it was copied.
    #[error("{}: it changed while it was copied; try again", .0.display())]
    Changed(PathBuf),
    /// A folder without a manifest.
    #[error("{}: there is no {MANIFEST}, so this is no bundle, or not a whole one", .0.display())]
    NoBundle(PathBuf),
    /// A manifest that is not one.
    #[error("{MANIFEST}: {0}")]
    Manifest(String),
}

impl BundleError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

impl From<LoadError> for BundleError {
    fn from(error: LoadError) -> Self {
        Self::Model(Box::new(error))
    }
}
