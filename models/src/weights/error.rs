//! The one error enum of the weight files: every variant says which file, and where in it.

use super::DType;
use std::io;
use std::path::{Path, PathBuf};

/// What can be wrong with a weight file, or with a question about one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to open, map or list something.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The path does not lead to weights that this build can open.
    #[error("{}: {reason}", path.display())]
    NotWeights {
        /// The file or folder.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// The bytes break the format.
    #[error("{}: {reason} (at byte {offset})", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Position in the file, in bytes from its start.
        offset: u64,
        /// What was found there.
        reason: String,
    },
    /// The file ends before its last tensor does: a download that was cut off, mostly.
    #[error(
        "{}: the file is shorter than its header promises: it has {found} bytes, and {needed} are \
         needed; fetch it again",
        path.display()
    )]
    Short {
        /// The file.
        path: PathBuf,
        /// Bytes that it has.
        found: u64,
        /// Bytes up to the end of its last tensor.
        needed: u64,
    },
    /// One tensor's description breaks the format or contradicts another one's.
    #[error("{}: tensor `{}`: {reason}", path.display(), clipped(tensor))]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The tensor is sound, but this build has no reader for its type.
    #[error(
        "{}: tensor `{}` has type {ty}, which this build cannot read (it reads {})",
        path.display(), clipped(tensor), readable_types()
    )]
    UnreadableType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type's name, or its number where it has no known name.
        ty: String,
    },
    /// The file has no tensor of that name.
    #[error("{}: there is no tensor `{}`", path.display(), clipped(tensor))]
    NoSuchTensor {
        /// The file or folder.
        path: PathBuf,
        /// The name that was asked for.
        tensor: String,
    },
    /// A metadata key is missing, or holds something else than was asked for.
    #[error("{}: metadata key `{}`: {reason}", path.display(), clipped(key))]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Result of this layer.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(super) fn not_weights(path: &Path, reason: impl Into<String>) -> Self {
        Self::NotWeights { path: path.to_owned(), reason: reason.into() }
    }

    pub(super) fn corrupt(path: &Path, offset: usize, reason: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), offset: offset as u64, reason: reason.into() }
    }

    /// Whether a file of `found` bytes has all that its header speaks of.
    pub(super) fn unless_whole(path: &Path, found: usize, needed: usize) -> Result<()> {
        if needed <= found {
            return Ok(());
        }
        let (found, needed) = (found as u64, needed as u64);
        Err(Self::Short { path: path.to_owned(), found, needed })
    }

    pub(super) fn tensor(path: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), reason: reason.into() }
    }

    pub(super) fn metadata(path: &Path, key: &str, reason: impl Into<String>) -> Self {
        Self::Metadata { path: path.to_owned(), key: key.to_owned(), reason: reason.into() }
    }
}

fn readable_types() -> String {
    DType::all().map(DType::name).collect::<Vec<_>>().join(", ")
}

/// Names come from the file, so a hostile one can be long and can hold control characters; an error
/// message shows at most its first 120 characters, escaped.
pub(super) fn clipped(name: &str) -> String {
    const CHARS_MAX: usize = 120;
    let mut shown: String = name.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect();
    if name.chars().nth(CHARS_MAX).is_some() {
        shown.push('…');
    }
    shown
}
