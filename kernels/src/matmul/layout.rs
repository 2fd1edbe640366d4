//! Where the bits of a packed matrix lie.
//!
//! A *tile* is 16 rows of W, one per vector lane ("column" of the tile, since they are columns of
//! y). A tile of floats is `[k][16]` elements; of bf16 `[k / 2][16][2]`, since they are multiplied
//! two at a time, and a zero ends a column of odd k. A tile of a quantised format is a run of
//! *records*, read from front to back; a record covers 256 weights of each column (super-blocks),
//! or one or two blocks of 32:
//!
//! ```text
//! record = 64 bytes: d[16] and m[16] of 16 bits, or the d[16] of two steps when there is no
//!          minimum, or d[16] in f32
//!        | scale bytes (super-blocks: 256, or 128 for signed scales of 32 weights)
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
//! sub = 32 (IQ4_XS)       4 pairs of signed scales
//! sub = 16 (Q3_K, Q6_K)   8 pairs of signed scales
//! sub = 16 (Q2_K)         8 pairs of scale | minimum << 4
//! ```

use half::{bf16, f16};

use crate::quant::{Book, Codes, DType, FP4_BOOK, IQ4_BOOK, Scale, codes};

/// Columns per tile.
pub(super) const COLUMNS: usize = 16;
/// Weights of a column in one step.
pub(super) const STEP: usize = 32;
/// Bytes of scales in a record of super-blocks with `sub` weights per scale.
pub(super) const fn scale_bytes(sub: usize, has_min: bool) -> usize {
    match (sub, has_min) {
        (0, _) => 0,
        (32, false) => 128,
        _ => 256,
    }
}
/// Bytes of d and m at the start of every record.
pub(super) const HEAD: usize = 64;

/// Forms of d, for kernels: f16 or bf16 of two steps (or beside m), f32 of one.
pub(super) const HALF: u8 = 0;
pub(super) const BRAIN: u8 = 1;
pub(super) const WIDE: u8 = 2;

/// The book of formats with `lo` low bits and an offset: nibbles whose levels reach below -8.
pub(super) const fn book(lo: usize, offset: i32) -> Option<&'static Book> {
    match (lo, offset) {
        (4, 128) => Some(&IQ4_BOOK),
        (4, 12) => Some(&FP4_BOOK),
        _ => None,
    }
}

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
    /// Steps in a record: 8 in super-blocks, else 2, or 1 when there is a minimum or a wide scale.
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
            (_, Some(codes)) if codes.sub > 0 => Storage::Supers(Record::new(codes, 8)),
            (_, Some(codes)) => {
                let one = codes.has_min || codes.scale == Scale::F32;
                Storage::Blocks(Record::new(codes, if one { 1 } else { 2 }))
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

    /// Where in a tile of numbers of two bytes weight `i` of a column is.
    pub(super) fn half_at(&self, i: usize, column: usize) -> usize {
        match self {
            Storage::BF16 => 64 * (i / 2) + 4 * column + 2 * (i % 2),
            _ => 32 * i + 2 * column,
        }
    }
}

impl Record {
    fn new(codes: Codes, steps: usize) -> Record {
        let step_bytes = 64 * (codes.lo + codes.hi) as usize;
        let scales = scale_bytes(codes.sub, codes.has_min);
        Record { codes, steps, step_bytes, bytes: HEAD + scales + steps * step_bytes }
    }

    /// The codes of one step of a record.
    pub(super) fn step<'a>(&self, record: &'a [u8], step: usize) -> &'a [u8] {
        &record[self.step_at(step)..][..self.step_bytes]
    }

    pub(super) fn step_at(&self, step: usize) -> usize {
        self.bytes - (self.steps - step) * self.step_bytes
    }

    /// Keeps the d of a column in step `step` (0 in super-blocks), and its m where there is one.
    pub(super) fn put_d_m(&self, record: &mut [u8], step: usize, column: usize, d: f32, m: f32) {
        let at = 2 * (16 * step + column);
        let mut put = |at: usize, bytes: [u8; 2]| record[at..at + 2].copy_from_slice(&bytes);
        match self.codes.scale {
            Scale::F16 => put(at, f16::from_f32(d).to_le_bytes()),
            Scale::BF16 => put(at, bf16::from_f32(d).to_le_bytes()),
            Scale::F32 => record[4 * column..4 * column + 4].copy_from_slice(&d.to_le_bytes()),
        }
        if self.codes.has_min {
            let at = HEAD / 2 + 2 * column;
            record[at..at + 2].copy_from_slice(&f16::from_f32(m).to_le_bytes());
        }
    }

    /// d and m of a column in step `step` (0 in super-blocks); m is 0 without a minimum.
    pub(super) fn d_m(&self, record: &[u8], step: usize, column: usize) -> (f32, f32) {
        let two = |at: usize| [record[at], record[at + 1]];
        let half = |at: usize| f16::from_le_bytes(two(at)).to_f32();
        let at = 2 * (16 * step + column);
        let d = match self.codes.scale {
            Scale::F16 => half(at),
            Scale::BF16 => bf16::from_le_bytes(two(at)).to_f32(),
            Scale::F32 => {
                let at = 4 * column;
                f32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
            }
        };
        (d, if self.codes.has_min { half(HEAD / 2 + 2 * column) } else { 0.0 })
    }

    /// Writes the codes of one step, given by group.
    pub(super) fn put_codes(&self, groups: &[[u8; 64]; 8], out: &mut [u8]) {
        let (low, high) = out.split_at_mut(64 * self.codes.lo as usize);
        put_planes(groups, 0, self.codes.lo, low);
        put_planes(groups, self.codes.lo, self.codes.hi, high);
    }

    /// The codes of one step, by group; levels where the format has a book.
    pub(super) fn codes_of(&self, step: &[u8]) -> [[u8; 64]; 8] {
        let (low, high) = step.split_at(64 * self.codes.lo as usize);
        let mut groups = [[0; 64]; 8];
        for (g, group) in groups.iter_mut().enumerate() {
            or_plane(low, g, self.codes.lo, 0, group);
            or_plane(high, g, self.codes.hi, self.codes.lo, group);
            if let Some(book) = self.codes.book {
                *group = group.map(|code| book[usize::from(code)]);
            }
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
