//! The file of one block, all numbers little endian:
//!
//! ```text
//! "HEARTHKV" | version u32 | blocks before it u32 | tokens u32 | payload bytes u64
//! model [32] | root [32] | name of the text before it [32] | token ids u32 ...
//! payload
//! SHA-256 of all of that [32]
//! ```
//! Whoever wants a block knows everything but its payload, so a file is right when it begins with
//! exactly what it should begin with (the token ids too), is as long as it should be, and its sum
//! is right. Nothing is allocated on the word of a file.

use std::fs::File;
use std::io::{self, Read, Write};

use ring::digest::{Context, SHA256};

use super::key::Label;

/// Changes with the format.
pub(super) const VERSION: u32 = 1;
const SUM_LEN: usize = 32;

/// Why a file gives no block.
#[derive(Debug)]
pub(super) enum Bad {
    /// It is not what it is called.
    Corrupt,
    /// It cannot be read.
    Io(io::Error),
}

impl From<io::Error> for Bad {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn header(label: &Label<'_>, payload_len: usize) -> Vec<u8> {
    let mut header = b"HEARTHKV".to_vec();
    for number in [VERSION, label.depth as u32, label.text.len() as u32] {
        header.extend(number.to_le_bytes());
    }
    header.extend((payload_len as u64).to_le_bytes());
    for name in [&label.model.0.0, &label.root.0, label.before.as_bytes()] {
        header.extend(name);
    }
    label.text.iter().for_each(|token| header.extend(token.to_le_bytes()));
    header
}

fn sum(header: &[u8], payload: &[u8]) -> [u8; SUM_LEN] {
    let mut hash = Context::new(&SHA256);
    hash.update(header);
    hash.update(payload);
    let mut sum = [0; SUM_LEN];
    sum.copy_from_slice(hash.finish().as_ref());
    sum
}

/// Bytes of the file of a block.
pub(super) fn len(label: &Label<'_>, payload_len: usize) -> u64 {
    (header(label, payload_len).len() + payload_len + SUM_LEN) as u64
}

pub(super) fn write(mut to: &File, label: &Label<'_>, payload: &[u8]) -> io::Result<()> {
    let header = header(label, payload.len());
    to.write_all(&header)?;
    to.write_all(payload)?;
    to.write_all(&sum(&header, payload))
}

/// The payload, if this is the file of that block.
pub(super) fn read(mut from: &File, label: &Label<'_>, payload_len: usize) -> Result<Vec<u8>, Bad> {
    let wanted = header(label, payload_len);
    if from.metadata()?.len() != len(label, payload_len) {
        return Err(Bad::Corrupt);
    }
    let mut header = vec![0; wanted.len()];
    from.read_exact(&mut header)?;
    if header != wanted {
        return Err(Bad::Corrupt);
    }
    let mut payload = vec![0; payload_len];
    from.read_exact(&mut payload)?;
    let mut written = [0; SUM_LEN];
    from.read_exact(&mut written)?;
    match written == sum(&header, &payload) {
        true => Ok(payload),
        false => Err(Bad::Corrupt),
    }
}
