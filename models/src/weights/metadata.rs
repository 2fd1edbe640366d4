//! Typed GGUF metadata: checked once when the file is opened, decoded from the map when asked for.
//!
//! An entry keeps its position in the file and nothing else, so a vocabulary of a few hundred
//! thousand tokens costs no memory until it is read, and no array ever costs more than its bytes.

use super::cursor::Cursor;
use super::error::{Error, Result, clipped};
use super::mmap::MappedFile;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Arrays of arrays deeper than this are refused: no model uses more than one level.
const NESTING_MAX: usize = 4;
/// The format's own limit on the length of a key; tensor names are held to it as well.
pub(super) const NAME_BYTES_MAX: usize = 65_535;

/// The type of a metadata value, with the number that stands for it in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // the names are the format's
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Str = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        const ALL: [ValueType; 13] =
            [U8, I8, U16, I16, U32, I32, F32, Bool, Str, Array, U64, I64, F64];
        ALL.get(id as usize).copied()
    }

    /// Bytes of one value in the file; for text and arrays, of the shortest one.
    fn bytes_min(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::Str => 8,
            Self::Array => 12,
        }
    }

    fn has_fixed_size(self) -> bool {
        !matches!(self, Self::Str | Self::Array)
    }
}

/// One metadata value, borrowed from the file.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)] // the names are the format's
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(&'a str),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// The type, as the file names it.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::Str(_) => ValueType::Str,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// Any whole number.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(x) => x.into(),
            Self::I8(x) => x.into(),
            Self::U16(x) => x.into(),
            Self::I16(x) => x.into(),
            Self::U32(x) => x.into(),
            Self::I32(x) => x.into(),
            Self::U64(x) => x.into(),
            Self::I64(x) => x.into(),
            _ => return None,
        })
    }

    fn decode(cursor: &mut Cursor<'a>, ty: ValueType) -> Result<Self> {
        let at = cursor.offset();
        Ok(match ty {
            ValueType::U8 => Self::U8(cursor.array::<1>()?[0]),
            ValueType::I8 => Self::I8(i8::from_le_bytes(cursor.array()?)),
            ValueType::U16 => Self::U16(u16::from_le_bytes(cursor.array()?)),
            ValueType::I16 => Self::I16(i16::from_le_bytes(cursor.array()?)),
            ValueType::U32 => Self::U32(cursor.u32()?),
            ValueType::I32 => Self::I32(i32::from_le_bytes(cursor.array()?)),
            ValueType::F32 => Self::F32(f32::from_le_bytes(cursor.array()?)),
            ValueType::U64 => Self::U64(cursor.u64()?),
            ValueType::I64 => Self::I64(i64::from_le_bytes(cursor.array()?)),
            ValueType::F64 => Self::F64(f64::from_le_bytes(cursor.array()?)),
            ValueType::Bool => match cursor.array::<1>()?[0] {
                0 => Self::Bool(false),
                1 => Self::Bool(true),
                other => {
                    let reason = format!("{other} is neither true (1) nor false (0)");
                    return Err(cursor.error_at(at, reason));
                }
            },
            ValueType::Str => {
                let bytes = cursor.string()?;
                let text = std::str::from_utf8(bytes);
                Self::Str(text.map_err(|_| cursor.error_at(at, "the text is not UTF-8"))?)
            }
            ValueType::Array => Self::Array(Array::decode(cursor)?),
        })
    }
}

/// An array as it lies in the file: its elements are decoded one by one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    /// The elements in the file's own encoding.
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The type of every element.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements. Text that is not UTF-8 is an error of its element alone.
    pub fn iter(&self) -> impl Iterator<Item = Result<Value<'a>>> + use<'a> {
        let (element, mut left) = (self.element, self.len);
        let mut cursor = Cursor::new(Path::new("array"), self.bytes);
        std::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            Some(Value::decode(&mut cursor, element))
        })
    }

    /// The elements in the file's own encoding, for a writer.
    pub(super) fn encoded(&self) -> &'a [u8] {
        self.bytes
    }

    /// From elements that are already encoded; [`super::gguf_writer`] makes them.
    pub(super) fn from_encoded(element: ValueType, len: usize, bytes: &'a [u8]) -> Self {
        Self { element, len, bytes }
    }

    /// Reads the array's head and finds its extent; it was checked when the file was opened.
    fn decode(cursor: &mut Cursor<'a>) -> Result<Self> {
        let mut probe = *cursor;
        let (element, len) = array_head(&mut probe)?;
        let start = probe.offset();
        skip_elements(&mut probe, element, len, NESTING_MAX)?;
        let head_len = start - cursor.offset();
        cursor.take(head_len)?;
        let bytes = cursor.take(probe.offset() - start)?;
        Ok(Self { element, len, bytes })
    }
}

fn value_type(cursor: &mut Cursor<'_>) -> Result<ValueType> {
    let at = cursor.offset();
    let id = cursor.u32()?;
    ValueType::from_id(id)
        .ok_or_else(|| cursor.error_at(at, format!("{id} is not a metadata value type")))
}

fn array_head(cursor: &mut Cursor<'_>) -> Result<(ValueType, usize)> {
    let element = value_type(cursor)?;
    let len = cursor.count("array elements", element.bytes_min())?;
    Ok((element, len))
}

/// Walks over one value and checks every length in it.
fn skip_value(cursor: &mut Cursor<'_>, ty: ValueType, levels_left: usize) -> Result<()> {
    match ty {
        ValueType::Str => cursor.string().map(drop),
        ValueType::Array => {
            if levels_left == 0 {
                let reason = format!("arrays are nested more than {NESTING_MAX} deep");
                return Err(cursor.error_at(cursor.offset(), reason));
            }
            let (element, len) = array_head(cursor)?;
            skip_elements(cursor, element, len, levels_left)
        }
        fixed => cursor.take(fixed.bytes_min()).map(drop),
    }
}

fn skip_elements(
    cursor: &mut Cursor<'_>,
    element: ValueType,
    len: usize,
    levels_left: usize,
) -> Result<()> {
    if element.has_fixed_size() {
        // `array_head` has checked that the product fits in the file.
        return cursor.take(len * element.bytes_min()).map(drop);
    }
    (0..len).try_for_each(|_| skip_value(cursor, element, levels_left - 1))
}

/// A type that a metadata value can be read as.
pub trait FromValue<'a>: Sized {
    /// What is expected, for the error message.
    const EXPECTED: &'static str;
    /// `None` when the value is of another kind or out of range.
    fn from_value(value: Value<'a>) -> Option<Self>;
}

/// Whole numbers are read from any integer type that holds them: writers do not agree on one.
macro_rules! integer_from_value {
    ($($t:ty),*) => {$(
        impl<'a> FromValue<'a> for $t {
            const EXPECTED: &'static str = concat!("a whole number that fits ", stringify!($t));
            fn from_value(value: Value<'a>) -> Option<Self> {
                value.integer().and_then(|x| x.try_into().ok())
            }
        }
    )*};
}
integer_from_value!(u16, u32, u64, usize, i32, i64);

impl<'a> FromValue<'a> for f64 {
    const EXPECTED: &'static str = "a number";
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::F32(x) => Some(x.into()),
            Value::F64(x) => Some(x),
            other => other.integer().map(|x| x as f64),
        }
    }
}

impl<'a> FromValue<'a> for f32 {
    const EXPECTED: &'static str = "a number";
    fn from_value(value: Value<'a>) -> Option<Self> {
        f64::from_value(value).map(|x| x as f32)
    }
}

impl<'a> FromValue<'a> for bool {
    const EXPECTED: &'static str = "true or false";
    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::Bool(x) = value { Some(x) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "text";
    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::Str(x) = value { Some(x) } else { None }
    }
}

impl<'a> FromValue<'a> for Array<'a> {
    const EXPECTED: &'static str = "an array";
    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::Array(x) = value { Some(x) } else { None }
    }
}

/// All metadata of a GGUF file (of its first part, when it is split).
#[derive(Debug)]
pub struct Metadata {
    file: Arc<MappedFile>,
    entries: BTreeMap<String, Entry>,
}

/// Where a value lies.
#[derive(Debug, Clone, Copy)]
struct Entry {
    ty: ValueType,
    start: usize,
}

impl Metadata {
    /// Reads `count` entries at the cursor, which must be over `file`.
    pub(super) fn read(
        file: &Arc<MappedFile>,
        cursor: &mut Cursor<'_>,
        count: usize,
    ) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            let at = cursor.offset();
            let key = read_name(cursor, "metadata key")?;
            let ty = value_type(cursor)?;
            let start = cursor.offset();
            skip_value(cursor, ty, NESTING_MAX)?;
            if entries.contains_key(key) {
                let reason = format!("metadata key `{}` appears twice", clipped(key));
                return Err(cursor.error_at(at, reason));
            }
            entries.insert(key.to_owned(), Entry { ty, start });
        }
        Ok(Self { file: Arc::clone(file), entries })
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is such a key.
    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The value, or `None` when there is no such key.
    pub fn value(&self, key: &str) -> Result<Option<Value<'_>>> {
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        let mut cursor = Cursor::at(self.file.path(), self.file.bytes(), entry.start);
        match Value::decode(&mut cursor, entry.ty) {
            Ok(value) => Ok(Some(value)),
            Err(Error::Corrupt { reason, .. }) => Err(self.error(key, reason)),
            Err(other) => Err(other),
        }
    }

    /// The value as a `T`, or `None` without such a key. A value of another kind is an error.
    pub fn get_opt<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.value(key)? else { return Ok(None) };
        let found = value.value_type();
        match T::from_value(value) {
            Some(typed) => Ok(Some(typed)),
            None => {
                let number = value.integer().map(|x| format!(" {x}")).unwrap_or_default();
                let expected = T::EXPECTED;
                Err(self.error(key, format!("expected {expected}, found {found:?}{number}")))
            }
        }
    }

    /// The value as a `T`: `get::<u32>("llama.block_count")`, `get::<&str>(..)`, `get::<f32>(..)`.
    /// A missing key is an error that names it.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.get_opt(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// The elements of an array, as `T`s. An element of another kind is an error that names the key
    /// and the element.
    pub fn get_array<'a, T: FromValue<'a>>(
        &'a self,
        key: &'a str,
    ) -> Result<impl ExactSizeIterator<Item = Result<T>>> {
        let array: Array<'a> = self.get(key)?;
        let elements = array.iter().enumerate().map(move |(i, element)| match element {
            Ok(value) => T::from_value(value).ok_or_else(|| {
                let (expected, found) = (T::EXPECTED, value.value_type());
                self.error(key, format!("element {i}: expected {expected}, found {found:?}"))
            }),
            Err(Error::Corrupt { reason, .. }) => {
                Err(self.error(key, format!("element {i}: {reason}")))
            }
            Err(other) => Err(other),
        });
        Ok(Elements { left: array.len(), elements })
    }

    fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::metadata(self.file.path(), key, reason)
    }
}

/// Array elements with their number, so that a caller can reserve once.
struct Elements<I> {
    left: usize,
    elements: I,
}

impl<I: Iterator> Iterator for Elements<I> {
    type Item = I::Item;
    fn next(&mut self) -> Option<I::Item> {
        let item = self.elements.next()?;
        self.left -= 1;
        Some(item)
    }
    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<I: Iterator> ExactSizeIterator for Elements<I> {}

/// A key or a tensor name: UTF-8, not empty, not longer than the format allows.
pub(super) fn read_name<'a>(cursor: &mut Cursor<'a>, what: &str) -> Result<&'a str> {
    let at = cursor.offset();
    let bytes = cursor.string()?;
    if bytes.is_empty() || bytes.len() > NAME_BYTES_MAX {
        let reason = format!("a {what} of {} bytes (1 to {NAME_BYTES_MAX})", bytes.len());
        return Err(cursor.error_at(at, reason));
    }
    std::str::from_utf8(bytes).map_err(|_| cursor.error_at(at, format!("a {what} is not UTF-8")))
}
