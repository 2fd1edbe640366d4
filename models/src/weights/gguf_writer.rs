//! Writes GGUF v3: metadata and tensor table first, then the tensors one by one.
//!
//! Two steps, so that a model larger than memory can be written: [`GgufWriter`] collects what goes
//! into the header, [`GgufBody`] takes the bytes of the declared tensors in their order.

use super::DType;
use super::gguf::{ALIGNMENT_DEFAULT, MAGIC};
use super::metadata::{Array, Value, ValueType};
use std::collections::VecDeque;
use std::io::{self, Write};

/// The header of a file to be written. A key or a tensor that is given twice, a row that is not
/// whole blocks: `InvalidInput`.
#[derive(Debug, Default)]
pub struct GgufWriter {
    /// Encoded entries.
    metadata: Vec<u8>,
    keys: Vec<String>,
    /// Encoded tensor table.
    table: Vec<u8>,
    tensors: Vec<(String, usize)>,
    /// Where the next tensor starts in the data section, in bytes.
    next_offset: usize,
}

impl GgufWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata entry; a value read from another file may be given as it is.
    pub fn put(&mut self, key: &str, value: Value<'_>) -> io::Result<()> {
        if self.keys.iter().any(|known| known == key) {
            return Err(invalid(format!("metadata key `{key}` is given twice")));
        }
        self.keys.push(key.to_owned());
        put_text(&mut self.metadata, key);
        put_u32(&mut self.metadata, value.value_type() as u32);
        put_value(&mut self.metadata, &value);
        Ok(())
    }

    /// Adds an array of texts.
    pub fn put_strings<S: AsRef<str>>(&mut self, key: &str, texts: &[S]) -> io::Result<()> {
        let mut bytes = Vec::new();
        texts.iter().for_each(|text| put_text(&mut bytes, text.as_ref()));
        self.put(key, Value::Array(Array::from_encoded(ValueType::Str, texts.len(), &bytes)))
    }

    /// Adds an array of 32-bit floats.
    pub fn put_f32s(&mut self, key: &str, numbers: &[f32]) -> io::Result<()> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.put(key, Value::Array(Array::from_encoded(ValueType::F32, numbers.len(), &bytes)))
    }

    /// Adds an array of 32-bit integers.
    pub fn put_i32s(&mut self, key: &str, numbers: &[i32]) -> io::Result<()> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.put(key, Value::Array(Array::from_encoded(ValueType::I32, numbers.len(), &bytes)))
    }

    /// Declares a tensor; `shape` has its outermost dimension first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], dtype: DType) -> io::Result<()> {
        if self.tensors.iter().any(|(known, _)| known == name) {
            return Err(invalid(format!("tensor `{name}` is given twice")));
        }
        let Some((&row, outer)) = shape.split_last() else {
            return Err(invalid(format!("tensor `{name}` has no dimensions")));
        };
        let row_bytes = dtype.row_bytes(row).filter(|_| !shape.contains(&0));
        let Some(row_bytes) = row_bytes else {
            let ty = dtype.name();
            return Err(invalid(format!("tensor `{name}`: {shape:?} is not whole {ty} blocks")));
        };
        let len = outer.iter().product::<usize>() * row_bytes;
        put_text(&mut self.table, name);
        put_u32(&mut self.table, shape.len() as u32);
        shape.iter().rev().for_each(|&dim| put_u64(&mut self.table, dim as u64));
        put_u32(&mut self.table, dtype.ggml_id());
        put_u64(&mut self.table, self.next_offset as u64);
        self.next_offset = (self.next_offset + len).next_multiple_of(ALIGNMENT_DEFAULT);
        self.tensors.push((name.to_owned(), len));
        Ok(())
    }

    /// Writes the header; the tensors follow.
    pub fn write_header<W: Write>(self, mut out: W) -> io::Result<GgufBody<W>> {
        let mut head = Vec::from(MAGIC);
        put_u32(&mut head, 3);
        put_u64(&mut head, self.tensors.len() as u64);
        put_u64(&mut head, self.keys.len() as u64);
        head.extend_from_slice(&self.metadata);
        head.extend_from_slice(&self.table);
        head.resize(head.len().next_multiple_of(ALIGNMENT_DEFAULT), 0);
        out.write_all(&head)?;
        Ok(GgufBody { out, pending: self.tensors.into() })
    }
}

/// The data section of a file that is being written.
#[derive(Debug)]
pub struct GgufBody<W> {
    out: W,
    /// Name and length in bytes of the tensors still to come.
    pending: VecDeque<(String, usize)>,
}

impl<W: Write> GgufBody<W> {
    /// Writes the next declared tensor.
    pub fn write_tensor(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some((name, len)) = self.pending.pop_front() else {
            return Err(invalid("more tensors than were declared".to_owned()));
        };
        if bytes.len() != len {
            let reason = format!("tensor `{name}` takes {len} bytes, {} were given", bytes.len());
            return Err(invalid(reason));
        }
        self.out.write_all(bytes)?;
        let padding = len.next_multiple_of(ALIGNMENT_DEFAULT) - len;
        self.out.write_all(&[0; ALIGNMENT_DEFAULT][..padding])
    }

    /// Flushes, and gives the output back. A tensor that was declared and not written is an error.
    pub fn finish(mut self) -> io::Result<W> {
        if let Some((name, _)) = self.pending.front() {
            return Err(invalid(format!("tensor `{name}` was declared and not written")));
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

fn put_value(out: &mut Vec<u8>, value: &Value<'_>) {
    match value {
        Value::U8(x) => out.push(*x),
        Value::I8(x) => out.extend(x.to_le_bytes()),
        Value::U16(x) => out.extend(x.to_le_bytes()),
        Value::I16(x) => out.extend(x.to_le_bytes()),
        Value::U32(x) => out.extend(x.to_le_bytes()),
        Value::I32(x) => out.extend(x.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::U64(x) => out.extend(x.to_le_bytes()),
        Value::I64(x) => out.extend(x.to_le_bytes()),
        Value::F64(x) => out.extend(x.to_le_bytes()),
        Value::Bool(x) => out.push(u8::from(*x)),
        Value::Str(text) => put_text(out, text),
        Value::Array(array) => {
            put_u32(out, array.element_type() as u32);
            put_u64(out, array.len() as u64);
            out.extend_from_slice(array.encoded());
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn put_u32(out: &mut Vec<u8>, x: u32) {
    out.extend_from_slice(&x.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, x: u64) {
    out.extend_from_slice(&x.to_le_bytes());
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}
