//! Weight files as named tensors: GGUF and SafeTensors behind one type.
//!
//! Owns: opening and checking the files, the memory map, the tensor index, GGUF metadata, the
//! writer of GGUF files, and in `role` and `encoder_role` the names that each format gives to a
//! weight. May import: `hearth-kernels`. Runs on whatever thread asks; everything is read-only and
//! `Sync`.
//!
//! Absent on purpose: what a family does with its tensors, arithmetic on them (kernels), JSON
//! configuration (`config`), and the network (the `hearth` package's registry).
//!
//! The files are untrusted. No count, length, dimension or offset is used before it is checked
//! against the bytes that are really there, and errors name the offset or the tensor.

mod cursor;
mod encoder_role;
mod error;
pub mod gguf;
pub mod gguf_writer;
mod index;
mod layout;
mod loader;
mod metadata;
mod mix;
mod mmap;
mod mxfp4;
mod part;
mod role;
pub mod safetensors;

pub use encoder_role::EncoderRole;
pub use error::{Error, Result};
pub use hearth_kernels::quant::DType;
pub use index::{TensorInfo, TensorType};
pub use layout::{Layout, Stacked};
pub(crate) use loader::adjacent;
pub use loader::{Loader, MatrixSource};
pub use metadata::{Array, FromValue, Metadata, Value, ValueType};
pub use mix::Mix;
pub use mmap::MappedFile;
pub use part::Part;
pub use role::Role;

use index::Index;
use std::borrow::Cow;
use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The weights of one model.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    index: Index,
    metadata: Option<Metadata>,
}

/// One tensor, borrowed from the file.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Outermost dimension first: `[n, k]` for a linear layer of n outputs and k inputs.
    pub shape: &'a [usize],
    /// Row-major elements or blocks, little-endian, rows of `dtype.row_bytes(k)`. They start at any
    /// address: not aligned for anything larger than a byte.
    pub bytes: &'a [u8],
}

/// What kind of file the weights came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// GGUF, with metadata.
    Gguf,
    /// SafeTensors, with a `config.json` beside it.
    SafeTensors,
}

impl Weights {
    /// Opens a `.gguf` file (the first part of a split one), a `.safetensors` file, a
    /// `.safetensors.index.json`, or a folder that holds one model: SafeTensors, or one GGUF.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { weights_in_folder(path)? } else { path.to_owned() };
        let name = file.file_name().and_then(OsStr::to_str).unwrap_or_default();
        if name.ends_with(".safetensors.index.json") {
            Ok(Self { index: safetensors::open_sharded(&file)?, metadata: None, path: file })
        } else if name.ends_with(".gguf") || starts_with_gguf_magic(&file)? {
            let (index, metadata) = gguf::open(&file)?;
            Ok(Self { index, metadata: Some(metadata), path: file })
        } else if name.ends_with(".safetensors") {
            Ok(Self { index: safetensors::open(&file)?, metadata: None, path: file })
        } else {
            Err(Error::not_weights(&file, "is neither a GGUF nor a .safetensors file"))
        }
    }

    /// Reads a GGUF or SafeTensors file that is already in memory; `name` stands for its path in
    /// error messages.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        let file = MappedFile::from_bytes(name, bytes);
        let path = file.path().to_owned();
        if file.bytes().starts_with(&gguf::MAGIC) {
            let (index, metadata) = gguf::from_file(file)?;
            Ok(Self { index, metadata: Some(metadata), path })
        } else {
            Ok(Self { index: safetensors::from_file(file)?, metadata: None, path })
        }
    }

    /// The file that was opened: the GGUF (its first part), the `.safetensors`, or the index of its
    /// shards.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What kind of file it is.
    pub fn format(&self) -> Format {
        if self.metadata.is_some() { Format::Gguf } else { Format::SafeTensors }
    }

    /// GGUF metadata; SafeTensors has none that a model needs.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.iter().map(|(name, _)| name)
    }

    /// All tensors, sorted by name, readable or not.
    pub fn infos(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.index.iter()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there are no tensors (a GGUF that holds a vocabulary alone).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.index.get(name).is_some()
    }

    /// What is known about a tensor without reading it.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name)
    }

    /// The element type, if there is such a tensor and this build can read it: a loader asks this
    /// of every tensor it needs before it starts to work.
    pub fn readable(&self, name: &str) -> Result<DType> {
        let Some(info) = self.index.get(name) else {
            return Err(Error::NoSuchTensor { path: self.path.clone(), tensor: name.to_owned() });
        };
        match &info.ty {
            TensorType::Readable(dtype) => Ok(*dtype),
            TensorType::Unreadable(ty) => Err(Error::UnreadableType {
                path: self.index.file(info).path().to_owned(),
                tensor: name.to_owned(),
                ty: ty.clone(),
            }),
        }
    }

    /// One tensor. Nothing is copied: its bytes are read from disk when they are touched.
    pub fn tensor<'a>(&'a self, name: &'a str) -> Result<TensorView<'a>> {
        let dtype = self.readable(name)?;
        let info = self.index.get(name).expect("readable() found it; this is a bug");
        Ok(TensorView { name, dtype, shape: &info.shape, bytes: self.index.bytes(info) })
    }

    /// The bytes of a tensor, whatever their type.
    pub fn bytes(&self, name: &str) -> &[u8] {
        self.index.get(name).map_or(&[], |info| self.index.bytes(info))
    }

    /// All tensors, sorted by name: in what type their numbers are, and how many they hold. Codes
    /// of MXFP4 whose scales stand apart are two to a byte, and the scales no numbers.
    pub fn numbers(&self) -> impl Iterator<Item = (&TensorInfo, &str, u64)> {
        self.infos().map(|(name, info)| match mxfp4::part(self, name, info) {
            None => (info, info.ty.name(), info.elements() as u64),
            Some(numbers) => (info, DType::MXFP4.name(), (info.elements() * numbers) as u64),
        })
    }

    /// The tensors that are the weight of a name: itself, or codes and scales.
    pub(crate) fn parts_of(&self, name: &str) -> Vec<String> {
        mxfp4::names(self, name).map_or(vec![name.to_owned()], Vec::from)
    }

    /// Starts reading a tensor ahead of its use.
    pub fn will_need(&self, name: &str) {
        if let Some(info) = self.index.get(name) {
            self.index.file(info).will_need(self.index.range(info));
        }
    }

    /// Gives a tensor's pages back once it has been packed. Asking for it again still works.
    pub fn release(&self, name: &str) {
        if let Some(info) = self.index.get(name) {
            self.index.file(info).release(self.index.range(info));
        }
    }

    /// Gives back every page that was read so far: headers and metadata too, which stay readable.
    pub fn release_all(&self) {
        self.index.parts().iter().for_each(|file| file.release(0..file.bytes().len()));
    }

    /// The file that holds a tensor.
    fn file_of(&self, name: &str) -> Option<&MappedFile> {
        self.index.get(name).map(|info| self.index.file(info))
    }

    /// Size of all tensors in bytes, as they lie in the file.
    pub fn tensor_bytes(&self) -> u64 {
        self.index.iter().map(|(_, info)| info.len_bytes() as u64).sum()
    }

    /// Size of all files in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.index.parts().iter().map(|file| file.bytes().len() as u64).sum()
    }

    /// The files that hold the tensors, in order.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.index.parts().iter().map(|file| file.path())
    }
}

fn starts_with_gguf_magic(path: &Path) -> Result<bool> {
    let io = |e| Error::io(path, e);
    let mut start = Vec::with_capacity(gguf::MAGIC.len());
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(gguf::MAGIC.len() as u64).read_to_end(&mut start).map_err(io)?;
    Ok(start == gguf::MAGIC)
}

/// Chooses the one model in a folder.
fn weights_in_folder(folder: &Path) -> Result<PathBuf> {
    let io = |e| Error::io(folder, e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        names.extend(entry.map_err(io)?.file_name().into_string());
    }
    names.sort();
    for usual in ["model.safetensors.index.json", "model.safetensors"] {
        if names.iter().any(|name| name == usual) {
            return Ok(folder.join(usual));
        }
    }
    for ending in [".safetensors.index.json", ".safetensors", ".gguf"] {
        let found: Vec<&String> =
            names.iter().filter(|name| name.ends_with(ending) && !is_later_part(name)).collect();
        match found[..] {
            [] => {}
            [one] => return Ok(folder.join(one)),
            _ => {
                let list = found.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
                let reason = format!("holds several models, name one of them: {list}");
                return Err(Error::not_weights(folder, reason));
            }
        }
    }
    let pickled = names.iter().find(|name| name.ends_with(".bin") || name.ends_with(".pth"));
    let reason = match pickled {
        Some(name) => format!("holds no .safetensors or .gguf file (`{name}` is not read)"),
        None => "holds no .safetensors or .gguf file".to_owned(),
    };
    Err(Error::not_weights(folder, reason))
}

/// `model-00002-of-00003.gguf`: belongs to the part with number 1.
fn is_later_part(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(".gguf") else { return false };
    let mut words = stem.rsplit('-');
    let (count, of, no) = (words.next(), words.next(), words.next());
    let number = |word: Option<&str>| word.filter(|w| w.len() == 5)?.parse::<u32>().ok();
    of == Some("of") && number(count).is_some() && number(no).is_some_and(|no| no > 1)
}
