//! SafeTensors: one file, or shards with an index.
//!
//! A file is 8 bytes of header length (little-endian), a JSON header, and the data. It is read here
//! and not by the `safetensors` crate, whose errors do not say which tensor or where. Tensors with
//! an empty dimension are legal in this format and are kept.

use super::DType;
use super::cursor::Cursor;
use super::error::{Error, Result, clipped};
use super::index::{Index, TensorInfo, TensorType};
use super::metadata::NAME_BYTES_MAX;
use super::mmap::MappedFile;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// The format's own limit on the header.
const HEADER_BYTES_MAX: usize = 100_000_000;
/// No weight has more dimensions; the limit keeps a hostile shape from growing.
const DIMS_MAX: usize = 8;
/// An index file lists names, not data: one that is larger than the largest header is not an index.
const INDEX_BYTES_MAX: u64 = HEADER_BYTES_MAX as u64;

/// Opens one `.safetensors` file.
pub(super) fn open(path: &Path) -> Result<Index> {
    from_file(MappedFile::open(path)?)
}

/// Reads one file that is already in memory.
pub(super) fn from_file(file: MappedFile) -> Result<Index> {
    let mut index = Index::default();
    read_part(&mut index, Arc::new(file))?;
    Ok(index)
}

/// Opens all shards that a `model.safetensors.index.json` names.
pub(super) fn open_sharded(index_path: &Path) -> Result<Index> {
    let io = |e| Error::io(index_path, e);
    let len = std::fs::metadata(index_path).map_err(io)?.len();
    if len > INDEX_BYTES_MAX {
        return Err(Error::not_weights(index_path, format!("an index of {len} bytes")));
    }
    let text = std::fs::read(index_path).map_err(io)?;
    let listing: ShardIndex = serde_json::from_slice(&text)
        .map_err(|e| Error::not_weights(index_path, format!("is not an index of shards: {e}")))?;
    let shards: BTreeSet<&str> = listing.weight_map.0.values().map(String::as_str).collect();
    if shards.is_empty() {
        return Err(Error::not_weights(index_path, "the index lists no tensors"));
    }
    let mut index = Index::default();
    for shard in shards {
        // The index must not reach outside its own folder.
        if Path::new(shard).file_name() != Some(shard.as_ref()) {
            let reason = format!("`{}` is not a plain file name", clipped(shard));
            return Err(Error::not_weights(index_path, reason));
        }
        let path = index_path.with_file_name(shard);
        let file = match MappedFile::open(&path) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let reason = format!("names the shard `{}`, which is missing", clipped(shard));
                return Err(Error::not_weights(index_path, reason));
            }
            other => other?,
        };
        read_part(&mut index, Arc::new(file))?;
    }
    check_listing(index_path, &listing, &index)?;
    Ok(index)
}

/// Every tensor that the index lists is in the shard that it names. A shard may hold more.
fn check_listing(index_path: &Path, listing: &ShardIndex, index: &Index) -> Result<()> {
    for (name, shard) in &listing.weight_map.0 {
        let found = index.get(name).map(|info| index.file(info).path());
        if found.and_then(Path::file_name) != Some(shard.as_ref()) {
            let reason = format!("is listed in `{}`, which does not hold it", clipped(shard));
            return Err(Error::tensor(index_path, name, reason));
        }
    }
    Ok(())
}

/// The name of the quantisation that a `config.json` announces, when this build cannot read it.
/// Every scheme that Hugging Face folders announce (GPTQ, AWQ, bitsandbytes, fp8, ...) packs its
/// weights in a layout of its own, so a loader refuses such a folder instead of computing garbage.
pub fn unreadable_quantization(config: &serde_json::Value) -> Option<String> {
    let nested = ["text_config", "language_config"].iter().filter_map(|key| config.get(key));
    let keys = ["quantization_config", "compression_config"];
    let mut found = std::iter::once(config)
        .chain(nested)
        .flat_map(|level| keys.iter().filter_map(|key| level.get(*key)))
        .filter(|scheme| !scheme.is_null());
    let scheme = found.next()?;
    let text = |key| scheme.get(key).and_then(serde_json::Value::as_str);
    let method = text("quant_method").or_else(|| text("quant_algo")).unwrap_or("unnamed scheme");
    let bits = scheme.get("bits").and_then(serde_json::Value::as_u64);
    let bits = bits.map_or(String::new(), |bits| format!(", {bits} bits"));
    Some(format!("{}{bits}", clipped(method)))
}

/// Bits of one element of the types of this format; the ones that are not a [`DType`] are listed in
/// an inspection and refused when asked for.
fn element_bits(ty: &str) -> Option<usize> {
    Some(match ty {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => return None,
    })
}

fn tensor_type(ty: &str) -> TensorType {
    match ty {
        "F32" => TensorType::Readable(DType::F32),
        "F16" => TensorType::Readable(DType::F16),
        "BF16" => TensorType::Readable(DType::BF16),
        other => TensorType::Unreadable(clipped(other)),
    }
}

/// Reads one file's header into the index.
fn read_part(index: &mut Index, file: Arc<MappedFile>) -> Result<()> {
    let part = index.add_part(Arc::clone(&file));
    let (path, bytes) = (file.path(), file.bytes());
    let mut cursor = Cursor::new(path, bytes);
    let header_len = cursor.count("bytes of header", 1)?;
    if header_len > HEADER_BYTES_MAX {
        let reason = format!("a header of {header_len} bytes (at most {HEADER_BYTES_MAX})");
        return Err(cursor.error_at(0, reason));
    }
    let json = cursor.take(header_len)?;
    if json.first() != Some(&b'{') {
        return Err(cursor.error_at(8, "the header does not start with `{`"));
    }
    let header: Header = serde_json::from_slice(json)
        .map_err(|e| cursor.error_at(8, format!("the header is not readable: {e}")))?;
    let data = cursor.offset()..bytes.len();
    for (name, entry) in &header.0.0 {
        let info = place_tensor(path, name, entry, part, data.start)?;
        index.insert(name, info)?;
    }
    index.close_part(part)?;
    check_every_byte_is_owned(index, part, path, data)
}

fn place_tensor(
    path: &Path,
    name: &str,
    entry: &TensorEntry<'_>,
    part: usize,
    data_start: usize,
) -> Result<TensorInfo> {
    let wrong = |reason: String| Error::tensor(path, name, reason);
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(wrong(format!("a name of {} bytes (1 to {NAME_BYTES_MAX})", name.len())));
    }
    let shape = &entry.shape.0;
    let (start, end) = entry.data_offsets;
    let place = |offset: u64| data_start.checked_add(usize::try_from(offset).ok()?);
    let (Some(first), Some(last)) = (place(start), place(end)) else {
        return Err(wrong(format!("its bytes {start}..{end} are beyond any file")));
    };
    if first > last {
        return Err(wrong(format!("its bytes end before they start: {start}..{end}")));
    }
    let elements = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let elements = elements.ok_or_else(|| wrong(format!("its shape {shape:?} overflows")))?;
    if let Some(bits) = element_bits(&entry.dtype) {
        let expected = elements.checked_mul(bits).map(|n| n.div_ceil(8));
        if expected != Some(last - first) {
            let (ty, len) = (&entry.dtype, last - first);
            return Err(wrong(format!("shape {shape:?} of {ty} does not fill {len} bytes")));
        }
    }
    Ok(TensorInfo::new(tensor_type(&entry.dtype), shape.clone(), part, first..last))
}

/// The format forbids bytes that belong to no tensor: a hole or a tail is a damaged file.
fn check_every_byte_is_owned(
    index: &Index,
    part: usize,
    path: &Path,
    data: std::ops::Range<usize>,
) -> Result<()> {
    let owned: usize = index.iter_part(part).map(TensorInfo::len_bytes).sum();
    if owned == data.len() {
        return Ok(());
    }
    let (room, lost) = (data.len(), data.len() - owned);
    let reason = format!("{lost} of the {room} bytes of data belong to no tensor");
    Err(Error::corrupt(path, data.start, reason))
}

/// The JSON header, tensors only.
struct Header<'a>(UniqueMap<TensorEntry<'a>>);

impl<'de> Deserialize<'de> for Header<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut tensors = UniqueMap::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.insert(name, &mut map)?;
                    }
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorEntry<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Shape,
    /// First byte, and the byte after the last, from the start of the data section.
    data_offsets: (u64, u64),
}

/// At most [`DIMS_MAX`] dimensions.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == DIMS_MAX {
                        return Err(A::Error::custom(format!("more than {DIMS_MAX} dimensions")));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// `model.safetensors.index.json`: which shard holds which tensor.
#[derive(serde::Deserialize)]
struct ShardIndex {
    weight_map: UniqueMap<String>,
}

/// A JSON object in which no key may appear twice.
struct UniqueMap<V>(BTreeMap<String, V>);

impl<V> Default for UniqueMap<V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<V> UniqueMap<V> {
    /// Reads the value of `key`; refuses a key that is there already.
    fn insert<'de, A: MapAccess<'de>>(
        &mut self,
        key: String,
        map: &mut A,
    ) -> std::result::Result<(), A::Error>
    where
        V: Deserialize<'de>,
    {
        if self.0.contains_key(&key) {
            return Err(A::Error::custom(format!("tensor `{}` appears twice", clipped(&key))));
        }
        let value = map
            .next_value()
            .map_err(|e| A::Error::custom(format!("tensor `{}`: {e}", clipped(&key))))?;
        self.0.insert(key, value);
        Ok(())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct MapVisitor<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for MapVisitor<V> {
            type Value = UniqueMap<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut entries = UniqueMap::default();
                while let Some(key) = map.next_key::<String>()? {
                    entries.insert(key, &mut map)?;
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(MapVisitor(std::marker::PhantomData))
    }
}
