//! The tensor index that both formats fill: name -> type, shape, place.
//!
//! Tensors live in a tree, not in a table of a size that a file announces: no single allocation
//! grows with a number that has not been backed by bytes.

use super::DType;
use super::error::{Error, Result, clipped};
use super::mmap::MappedFile;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The type of a tensor's elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TensorType {
    /// This build can compute with it.
    Readable(DType),
    /// It can be listed by its name, and no more.
    Unreadable(String),
}

impl TensorType {
    /// The name that the format gives it.
    pub fn name(&self) -> &str {
        match self {
            Self::Readable(dtype) => dtype.name(),
            Self::Unreadable(name) => name,
        }
    }
}

/// What the index knows about one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Element type.
    pub ty: TensorType,
    /// Outermost dimension first: `[n, k]` for a linear layer of n outputs and k inputs.
    pub shape: Vec<usize>,
    /// Which of the model's files.
    part: usize,
    /// Where in that file, in bytes.
    bytes: Range<usize>,
}

impl TensorInfo {
    pub(super) fn new(ty: TensorType, shape: Vec<usize>, part: usize, bytes: Range<usize>) -> Self {
        Self { ty, shape, part, bytes }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size in the file, in bytes. For a type whose block size is unknown: up to the next tensor.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Position in the file, in bytes from its start.
    pub fn offset_bytes(&self) -> usize {
        self.bytes.start
    }
}

/// All tensors of a model, over one or more files.
#[derive(Debug, Default)]
pub(super) struct Index {
    parts: Vec<Arc<MappedFile>>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Index {
    /// Adds a file and returns its number.
    pub(super) fn add_part(&mut self, file: Arc<MappedFile>) -> usize {
        self.parts.push(file);
        self.parts.len() - 1
    }

    /// The path of a file that was added.
    pub(super) fn path(&self, part: usize) -> &Path {
        self.parts[part].path()
    }

    pub(super) fn parts(&self) -> &[Arc<MappedFile>] {
        &self.parts
    }

    pub(super) fn file(&self, info: &TensorInfo) -> &MappedFile {
        &self.parts[info.part]
    }

    pub(super) fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.parts[info.part].bytes()[info.bytes.clone()]
    }

    pub(super) fn range(&self, info: &TensorInfo) -> Range<usize> {
        info.bytes.clone()
    }

    pub(super) fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// The tensors of one file.
    pub(super) fn iter_part(&self, part: usize) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().filter(move |info| info.part == part)
    }

    pub(super) fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Adds a tensor, whose range is checked when the part is closed.
    pub(super) fn insert(&mut self, name: &str, info: TensorInfo) -> Result<()> {
        match self.tensors.entry(name.to_owned()) {
            Entry::Vacant(free) => {
                free.insert(info);
                Ok(())
            }
            Entry::Occupied(taken) => {
                let other = self.parts[taken.get().part].path().display().to_string();
                let reason = format!("the name appears twice (also in {other})");
                Err(Error::tensor(self.parts[info.part].path(), name, reason))
            }
        }
    }

    /// Checks that the file holds all of its tensors and that no two of them share a byte, and lets
    /// those of unknown extent reach to their successor.
    pub(super) fn close_part(&mut self, part: usize) -> Result<()> {
        let file = &self.parts[part];
        let needed = self.iter_part(part).map(|info| info.bytes.end).max().unwrap_or_default();
        Error::unless_whole(file.path(), file.bytes().len(), needed)?;
        let mut by_place: Vec<(&String, &mut TensorInfo)> =
            self.tensors.iter_mut().filter(|(_, info)| info.part == part).collect();
        by_place.sort_unstable_by_key(|(_, info)| (info.bytes.start, info.bytes.end));
        let mut successor: Option<(&str, usize)> = None;
        for (name, info) in by_place.into_iter().rev() {
            let limit = successor.map_or(file.bytes().len(), |(_, start)| start);
            let unknown = matches!(info.ty, TensorType::Unreadable(_)) && info.bytes.is_empty();
            if unknown && info.elements() != 0 {
                info.bytes.end = limit;
            }
            if let Some((other, start)) = successor
                && info.bytes.end > start
            {
                let reason = format!(
                    "its bytes {:?} overlap tensor `{}`, which starts at {start}",
                    info.bytes,
                    clipped(other)
                );
                return Err(Error::tensor(file.path(), name, reason));
            }
            successor = Some((name, info.bytes.start));
        }
        Ok(())
    }
}
