//! Where the bits of a packed matrix lie.
//!
//! A *tile* is 16 rows of W, one per vector lane ("column" of the tile, since they are columns of
//! y). A tile of floats is `[k][16]` elements. A tile of a quantised format is a run of *records*,
//! read from front to back; a record covers 256 weights of each column (super-blocks), or one or
//! two blocks of 32:
//!
//! ```text
//! record = 64 bytes: f16 d[16] and m[16], or the d[16] of two steps when there is no minimum
//!        | scale bytes (super-blocks: 256)
//!        | steps * [ low planes | high planes ]   codes; a step is 32 weights of 16 columns
//! ```
//! That is the order of reading: memory is fastest when no load goes backwards.
//!
//! Within a step, *group* g (0..8) is the codes 4g..4g+4 of each column: 64 bytes, byte
//! `4 * column + i`, one 512-bit register and what one `vpdpbusd` eats. Groups share bytes when the
//! codes are narrow:
//!
//! ```text
//! 8 bits   plane g         = group g
//! 4 bits   plane j (0..4)  = group j | group j+4 << 4
//! 2 bits   plane j (0..2)  = group j | group j+2 << 2 | group j+4 << 4 | group j+6 << 6
//! 1 bit    one plane       = bit g is group g
//! ```
//! Scale bytes come in pairs of neighbouring sub-blocks, `[pair][column][2]`, which widen to the
//! i16 pairs that `vpdpwssd` eats:
//!
//! ```text
//! sub = 32 (Q4_K, Q5_K)   4 pairs of scales, then 4 pairs of minima
//! sub = 16 (Q3_K, Q6_K)   8 pairs of signed scales
//! sub = 16 (Q2_K)         8 pairs of scale | minimum << 4
//! ```

use crate::quant::{Codes, DType, codes};

/// Columns per tile.
pub(super) const COLUMNS: usize = 16;
/// Weights of a column in one step.
pub(super) const STEP: usize = 32;
/// Bytes of scales in a record of super-blocks.
pub(super) const SCALES: usize = 256;
/// Bytes of d and m at the start of every record.
pub(super) const HEAD: usize = 64;

/// How the elements of a tile are stored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Storage {
    F32,
    F16,
    BF16,
    /// Blocks of 32 weights.
    Blocks(Record),
    /// Blocks of 256 weights.
    Supers(Record),
}

/// The shape of a record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) codes: Codes,
    /// Steps in a record: 8 in super-blocks, else 2, or 1 when there is a minimum.
    pub(super) steps: usize,
    pub(super) step_bytes: usize,
    /// Bytes of the whole record; a multiple of 64.
    pub(super) bytes: usize,
}

impl Storage {
    pub(super) fn of(dtype: DType) -> Storage {
        match (dtype, codes(dtype)) {
            (DType::F16, _) => Storage::F16,
            (DType::BF16, _) => Storage::BF16,
            (_, None) => Storage::F32,
            (_, Some(codes)) if dtype.block_len() == 256 => {
                Storage::Supers(Record::new(codes, 8, SCALES))
            }
            (_, Some(codes)) => {
                Storage::Blocks(Record::new(codes, if codes.has_min { 1 } else { 2 }, 0))
            }
        }
    }

    /// Bytes of a tile of columns of `k` weights; a multiple of 64.
    pub(super) fn tile_bytes(&self, k: usize) -> usize {
        match self {
            Storage::F32 => 64 * k,
            Storage::F16 | Storage::BF16 => (32 * k).next_multiple_of(64),
            Storage::Blocks(record) | Storage::Supers(record) => {
                (k / STEP).div_ceil(record.steps) * record.bytes
            }
        }
    }
}

impl Record {
    fn new(codes: Codes, steps: usize, scales: usize) -> Record {
        let step_bytes = 64 * (codes.lo + codes.hi) as usize;
        Record { codes, steps, step_bytes, bytes: HEAD + scales + steps * step_bytes }
    }

    /// The codes of one step of a record.
    pub(super) fn step<'a>(&self, record: &'a [u8], step: usize) -> &'a [u8] {
        &record[self.step_at(step)..][..self.step_bytes]
    }

    pub(super) fn step_at(&self, step: usize) -> usize {
        self.bytes - (self.steps - step) * self.step_bytes
    }

    /// Offset of the d of a column of step `step` (0 in super-blocks).
    pub(super) fn d_at(&self, step: usize, column: usize) -> usize {
        2 * (16 * step + column)
    }

    pub(super) fn m_at(&self, column: usize) -> usize {
        HEAD / 2 + 2 * column
    }

    /// Writes the codes of one step, given by group.
    pub(super) fn put_codes(&self, groups: &[[u8; 64]; 8], out: &mut [u8]) {
        let (low, high) = out.split_at_mut(64 * self.codes.lo as usize);
        put_planes(groups, 0, self.codes.lo, low);
        put_planes(groups, self.codes.lo, self.codes.hi, high);
    }

    /// The codes of one step, by group.
    pub(super) fn codes_of(&self, step: &[u8]) -> [[u8; 64]; 8] {
        let (low, high) = step.split_at(64 * self.codes.lo as usize);
        let mut groups = [[0; 64]; 8];
        for (g, group) in groups.iter_mut().enumerate() {
            or_plane(low, g, self.codes.lo, 0, group);
            or_plane(high, g, self.codes.hi, self.codes.lo, group);
        }
        groups
    }

    /// One code: that of weight `i` (0..32) of a column.
    pub(super) fn code(&self, step: &[u8], column: usize, i: usize) -> u8 {
        let (g, at) = (i / 4, 4 * column + i % 4);
        let (low, high) = step.split_at(64 * self.codes.lo as usize);
        let bits = |planes: &[u8], bits: u32| match bits {
            0 => 0,
            _ => {
                let (plane, shift) = place(g, bits);
                (planes[64 * plane + at] >> shift) & mask(bits)
            }
        };
        bits(low, self.codes.lo) | bits(high, self.codes.hi) << (self.codes.lo % 8)
    }
}

/// Plane and shift of a group.
fn place(group: usize, bits: u32) -> (usize, u32) {
    let planes = bits as usize;
    (group % planes, (group / planes) as u32 * bits)
}

fn mask(bits: u32) -> u8 {
    (0xff_u16 >> (8 - bits)) as u8
}

/// `bits` bits of every code, from bit `from` on, into planes.
fn put_planes(groups: &[[u8; 64]; 8], from: u32, bits: u32, out: &mut [u8]) {
    if bits == 0 {
        return;
    }
    out[..64 * bits as usize].fill(0);
    for (g, group) in groups.iter().enumerate() {
        let (plane, shift) = place(g, bits);
        for (out, &code) in out[64 * plane..64 * plane + 64].iter_mut().zip(group) {
            *out |= ((code >> from) & mask(bits)) << shift;
        }
    }
}

fn or_plane(planes: &[u8], g: usize, bits: u32, to: u32, group: &mut [u8; 64]) {
    if bits == 0 {
        return;
    }
    let (plane, shift) = place(g, bits);
    for (code, &byte) in group.iter_mut().zip(&planes[64 * plane..64 * plane + 64]) {
        *code |= ((byte >> shift) & mask(bits)) << to;
    }
}
