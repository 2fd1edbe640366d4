//! GGUF v2 and v3, little-endian: the header, the tensor table, and files split in parts.
//!
//! Follows the public description of the format. Nothing in the header is believed before it is
//! checked: counts against the bytes that are left, dimensions for overflow and whole blocks,
//! offsets for alignment, extents for the end of the file and for overlap.

use super::DType;
use super::cursor::Cursor;
use super::error::{Error, Result};
use super::index::{Index, TensorInfo, TensorType};
use super::metadata::{Metadata, read_name};
use super::mmap::MappedFile;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The first four bytes of every GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Where tensors start when the file does not say: multiples of this many bytes.
pub(super) const ALIGNMENT_DEFAULT: usize = 32;
const DIMS_MAX: usize = 4;
/// More parts than this is nonsense: the file names count with five digits.
const PARTS_MAX: usize = 99_999;

/// Names of the tensor types that this build does not read, so that an error can say what it met.
const UNREADABLE_TYPES: [(u32, &str); 22] = [
    (9, "Q8_1"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (40, "NVFP4"),
];

/// Opens a GGUF file, and with it all parts when it is the first of a split model.
pub(super) fn open(path: &Path) -> Result<(Index, Metadata)> {
    let mut index = Index::default();
    let first = Arc::new(MappedFile::open(path)?);
    let metadata = read_part(&mut index, first)?;
    let split = Split::of(&metadata)?;
    if split.count > 1 {
        open_other_parts(&mut index, path, &metadata, split)?;
    }
    Ok((index, metadata))
}

/// Reads one GGUF that is already in memory; a part of a split model is refused.
pub(super) fn from_file(file: MappedFile) -> Result<(Index, Metadata)> {
    let mut index = Index::default();
    let metadata = read_part(&mut index, Arc::new(file))?;
    if Split::of(&metadata)?.count > 1 {
        return Err(Error::metadata(index.path(0), SPLIT_COUNT, "a split model must be on disk"));
    }
    Ok((index, metadata))
}

const SPLIT_NO: &str = "split.no";
const SPLIT_COUNT: &str = "split.count";
const SPLIT_TENSORS: &str = "split.tensors.count";

/// What one part says about its place among the others.
#[derive(Debug, Clone, Copy)]
struct Split {
    /// Counted from 0.
    no: usize,
    /// 0 or 1: the model is one file.
    count: usize,
}

impl Split {
    fn of(metadata: &Metadata) -> Result<Self> {
        let no = metadata.get_opt(SPLIT_NO)?.unwrap_or(0);
        let count = metadata.get_opt(SPLIT_COUNT)?.unwrap_or(0);
        Ok(Self { no, count })
    }
}

fn open_other_parts(
    index: &mut Index,
    first: &Path,
    metadata: &Metadata,
    split: Split,
) -> Result<()> {
    let wrong = |key, reason: String| Err(Error::metadata(first, key, reason));
    if split.no != 0 {
        let part = split.no + 1;
        return wrong(SPLIT_NO, format!("this is part {part} of {}: open part 1", split.count));
    }
    if split.count > PARTS_MAX {
        return wrong(SPLIT_COUNT, format!("{} parts", split.count));
    }
    for no in 1..split.count {
        let path = part_path(first, no, split.count)?;
        let file = match MappedFile::open(&path) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let reason = format!("part {} of {} of this model is missing", no + 1, split.count);
                return Err(Error::not_weights(&path, reason));
            }
            other => Arc::new(other?),
        };
        let part = Split::of(&read_part(index, file)?)?;
        if (part.no, part.count) != (no, split.count) {
            let reason = format!(
                "says it is part {} of {}, its name says part {} of {}",
                part.no + 1,
                part.count,
                no + 1,
                split.count
            );
            return Err(Error::metadata(&path, SPLIT_NO, reason));
        }
    }
    let (expected, found) = (metadata.get::<u64>(SPLIT_TENSORS)?, index.len() as u64);
    if expected != found {
        let reason = format!("says {expected} tensors, the {} parts hold {found}", split.count);
        return wrong(SPLIT_TENSORS, reason);
    }
    Ok(())
}

/// `model-00001-of-00003.gguf` -> `model-00002-of-00003.gguf` for part `no` = 1.
fn part_path(first: &Path, no: usize, count: usize) -> Result<PathBuf> {
    let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(stem) = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")) else {
        let reason = format!("part 1 of {count} must be named `…-00001-of-{count:05}.gguf`");
        return Err(Error::not_weights(first, reason));
    };
    Ok(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", no + 1)))
}

/// Reads one file's header into the index and returns its metadata.
fn read_part(index: &mut Index, file: Arc<MappedFile>) -> Result<Metadata> {
    let part = index.add_part(Arc::clone(&file));
    let (path, bytes) = (file.path(), file.bytes());
    let mut cursor = Cursor::new(path, bytes);
    check_magic_and_version(&mut cursor)?;
    // name length, one dimension count, one dimension, type, offset
    let n_tensors = cursor.count("tensors", 8 + 4 + 8 + 4 + 8)?;
    // key length, type, the shortest value
    let n_entries = cursor.count("metadata entries", 8 + 4 + 1)?;
    let metadata = Metadata::read(&file, &mut cursor, n_entries)?;
    let alignment = alignment(path, &metadata)?;

    // The table is walked twice: where the data start is known only at its end.
    let mut table = cursor;
    for _ in 0..n_tensors {
        read_tensor(path, &mut cursor)?;
    }
    let Some(data_start) = cursor.offset().checked_next_multiple_of(alignment) else {
        return Err(cursor.error_at(cursor.offset(), "the header ends at an absurd offset"));
    };
    for _ in 0..n_tensors {
        let head = read_tensor(path, &mut table)?;
        let info = place_tensor(path, &head, part, data_start, alignment)?;
        index.insert(head.name, info)?;
    }
    index.close_part(part)?;
    Ok(metadata)
}

fn check_magic_and_version(cursor: &mut Cursor<'_>) -> Result<()> {
    let magic: [u8; 4] = cursor.array()?;
    if magic != MAGIC {
        let reason = format!("not a GGUF file: it starts with `{}`", magic.escape_ascii());
        return Err(cursor.error_at(0, reason));
    }
    let refused = match cursor.u32()? {
        2 | 3 => return Ok(()),
        1 => "GGUF version 1 is no longer read: convert the file to version 3".to_owned(),
        v if matches!(v.swap_bytes(), 1..=3) => "big-endian GGUF files are not read".to_owned(),
        v => format!("GGUF version {v} is not known (2 and 3 are)"),
    };
    Err(cursor.error_at(4, refused))
}

fn alignment(path: &Path, metadata: &Metadata) -> Result<usize> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.get_opt::<u32>(KEY)?.map_or(ALIGNMENT_DEFAULT, |a| a as usize);
    if alignment.is_power_of_two() {
        Ok(alignment)
    } else {
        Err(Error::metadata(path, KEY, format!("{alignment} is not a power of two")))
    }
}

/// A row of the tensor table, as it stands in the file.
struct TensorHead<'a> {
    name: &'a str,
    /// Fastest dimension first, the rest 1.
    dims: [u64; DIMS_MAX],
    n_dims: usize,
    ty: u32,
    /// From the start of the data section.
    offset: u64,
}

fn read_tensor<'a>(path: &Path, cursor: &mut Cursor<'a>) -> Result<TensorHead<'a>> {
    let name = read_name(cursor, "tensor name")?;
    let n_dims = cursor.u32()? as usize;
    if !(1..=DIMS_MAX).contains(&n_dims) {
        return Err(Error::tensor(path, name, format!("{n_dims} dimensions (1 to {DIMS_MAX})")));
    }
    let mut dims = [1; DIMS_MAX];
    for dim in &mut dims[..n_dims] {
        *dim = cursor.u64()?;
    }
    Ok(TensorHead { name, dims, n_dims, ty: cursor.u32()?, offset: cursor.u64()? })
}

/// Checks one row of the table and finds where its bytes are, in a file that is whole.
fn place_tensor(
    path: &Path,
    head: &TensorHead<'_>,
    part: usize,
    data_start: usize,
    alignment: usize,
) -> Result<TensorInfo> {
    let wrong = |reason: String| Error::tensor(path, head.name, reason);
    let dims = &head.dims[..head.n_dims];
    let overflow = || wrong(format!("its dimensions {dims:?} overflow"));
    let mut elements = 1usize;
    let mut shape = Vec::with_capacity(head.n_dims);
    for &dim in dims.iter().rev() {
        let dim = usize::try_from(dim).map_err(|_| overflow())?;
        elements = elements.checked_mul(dim).ok_or_else(overflow)?;
        shape.push(dim);
    }
    if elements == 0 {
        return Err(wrong(format!("a dimension of {dims:?} is zero")));
    }
    if !head.offset.is_multiple_of(alignment as u64) {
        return Err(wrong(format!("offset {} is not a multiple of {alignment}", head.offset)));
    }
    let beyond = || wrong(format!("its bytes at offset {} are beyond any file", head.offset));
    let start = usize::try_from(head.offset)
        .ok()
        .and_then(|offset| data_start.checked_add(offset))
        .ok_or_else(beyond)?;

    let Some(dtype) = DType::from_ggml(head.ty) else {
        // Its extent is unknown: `Index::close_part` lets it reach to the next tensor.
        let ty = TensorType::Unreadable(unreadable_name(head.ty));
        return Ok(TensorInfo::new(ty, shape, part, start..start));
    };
    let row = shape[shape.len() - 1];
    if !row.is_multiple_of(dtype.block_len()) {
        let (ty, block) = (dtype.name(), dtype.block_len());
        return Err(wrong(format!("rows of {row} are not whole {ty} blocks of {block}")));
    }
    let blocks = elements / dtype.block_len();
    let len = blocks.checked_mul(dtype.block_bytes()).ok_or_else(overflow)?;
    let end = start.checked_add(len).ok_or_else(beyond)?;
    Ok(TensorInfo::new(TensorType::Readable(dtype), shape, part, start..end))
}

fn unreadable_name(id: u32) -> String {
    let known = UNREADABLE_TYPES.iter().find(|(known, _)| *known == id);
    known.map_or_else(|| format!("number {id}"), |(_, name)| (*name).to_owned())
}
