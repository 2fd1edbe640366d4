//! The GGML block formats: what the bytes of a weight row mean.
//!
//! A row of `k` weights is `k / block_len` blocks. Within a block a weight is a small unsigned
//! *code* with a scale, and either a fixed offset or a minimum:
//!
//! ```text
//! block of 32,  offset   w = (code - offset) * d                  Q8_0 Q4_0 Q5_0
//! block of 32,  minimum  w = code * d + m                         Q4_1 Q5_1
//! block of 32,  book     w = (book[code] - offset) * d            IQ4_NL MXFP4
//! block of 256, offset   w = (d * scale[sub]) * (code - offset)   Q3_K Q6_K      sub = 16 weights
//! block of 256, minimum  w = (d * scale[sub]) * code - dmin * min[sub]   Q4_K Q5_K (32)  Q2_K (16)
//! block of 256, book     w = (d * scale[sub]) * (book[code] - offset)    IQ4_XS (32)
//! block of 256, no sub   w = (code - offset) * d                  Q8_K
//! ```
//! A *book* gives each of sixteen codes a level: levels lie closer together near zero, as weights
//! do. The scale is an f16, in MXFP4 a power of two (8 exponent bits), in Q8_K an f32.
//!
//! The formulas are evaluated in f32, in the order written, without fused operations: that is the
//! exact meaning of a format, and [`dequantize`] is its definition for all of this crate.
//!
//! Owns the type table, the decoder of every format and the quantisers of those that files are
//! written in. Deliberately absent: files, tensors, arithmetic on codes (that is `matmul`), and
//! quantisers that look at the activations a weight will meet.

mod decode;
mod encode;
mod fit;

pub(crate) use decode::{Parts, decode};
pub use encode::quantize;

use half::{bf16, f16};

/// How a matrix is stored in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // the names of the formats
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Q8K,
    IQ4NL,
    IQ4XS,
    MXFP4,
}

/// One line per format: type, GGML type id, name, weights per block, bytes per block.
const TABLE: &[(DType, u32, &str, usize, usize)] = &[
    (DType::F32, 0, "F32", 1, 4),
    (DType::F16, 1, "F16", 1, 2),
    (DType::BF16, 30, "BF16", 1, 2),
    (DType::Q4_0, 2, "Q4_0", 32, 18),
    (DType::Q4_1, 3, "Q4_1", 32, 20),
    (DType::Q5_0, 6, "Q5_0", 32, 22),
    (DType::Q5_1, 7, "Q5_1", 32, 24),
    (DType::Q8_0, 8, "Q8_0", 32, 34),
    (DType::Q2K, 10, "Q2_K", 256, 84),
    (DType::Q3K, 11, "Q3_K", 256, 110),
    (DType::Q4K, 12, "Q4_K", 256, 144),
    (DType::Q5K, 13, "Q5_K", 256, 176),
    (DType::Q6K, 14, "Q6_K", 256, 210),
    (DType::Q8K, 15, "Q8_K", 256, 292),
    (DType::IQ4NL, 20, "IQ4_NL", 32, 18),
    (DType::IQ4XS, 23, "IQ4_XS", 256, 136),
    (DType::MXFP4, 39, "MXFP4", 32, 17),
];

impl DType {
    /// Every format, in the order of the declaration.
    pub fn all() -> impl Iterator<Item = DType> {
        TABLE.iter().map(|row| row.0)
    }

    /// The format with this GGML type id, if it is one of ours.
    pub fn from_ggml(id: u32) -> Option<DType> {
        TABLE.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// The GGML type id.
    pub fn ggml_id(self) -> u32 {
        self.line().1
    }

    /// The name that GGUF tools print, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.line().2
    }

    /// Weights per block; 1 for the float types.
    pub fn block_len(self) -> usize {
        self.line().3
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.line().4
    }

    /// Bytes of a row of `k` weights; none when `k` is not a whole number of blocks (or too large).
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_len()) {
            return None;
        }
        (k / self.block_len()).checked_mul(self.block_bytes())
    }

    fn line(self) -> &'static (DType, u32, &'static str, usize, usize) {
        // The table has the order of the declaration; a test holds it to that.
        &TABLE[self as usize]
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What the codes of a quantised format are; see the formulas above.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Codes {
    /// Bits of a code: `lo` low ones and `hi` high ones, which are packed apart.
    pub(crate) lo: u32,
    pub(crate) hi: u32,
    /// What a code stands for, where it is not itself.
    pub(crate) book: Option<&'static Book>,
    /// Subtracted from a code or its level; 0 where a minimum is stored instead.
    pub(crate) offset: i32,
    pub(crate) has_min: bool,
    /// Weights per sub-scale: 16 or 32; 0 where a block has none.
    pub(crate) sub: usize,
    pub(crate) scale: Scale,
}

/// A level for each code of four bits, with the offset added.
pub(crate) type Book = [u8; 16];

/// What a scale needs to be kept exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    F16,
    BF16,
    F32,
}

/// Levels of IQ4_NL and IQ4_XS, plus 128.
pub(crate) const IQ4_BOOK: Book =
    [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];
/// Twice the sixteen numbers of E2M1 (sign, two bits of exponent, one of mantissa), plus 12.
pub(crate) const FP4_BOOK: Book = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// The codes of a quantised format; none for floats.
pub(crate) fn codes(dtype: DType) -> Option<Codes> {
    let line = |lo, hi, offset, has_min, sub| Codes {
        lo,
        hi,
        book: None,
        offset,
        has_min,
        sub,
        scale: Scale::F16,
    };
    Some(match dtype {
        DType::Q4_0 => line(4, 0, 8, false, 0),
        DType::Q4_1 => line(4, 0, 0, true, 0),
        DType::Q5_0 => line(4, 1, 16, false, 0),
        DType::Q5_1 => line(4, 1, 0, true, 0),
        DType::Q8_0 => line(8, 0, 128, false, 0),
        DType::Q2K => line(2, 0, 0, true, 16),
        DType::Q3K => line(2, 1, 4, false, 16),
        DType::Q4K => line(4, 0, 0, true, 32),
        DType::Q5K => line(4, 1, 0, true, 32),
        DType::Q6K => line(4, 2, 32, false, 16),
        DType::Q8K => Codes { scale: Scale::F32, ..line(8, 0, 128, false, 0) },
        DType::IQ4NL => Codes { book: Some(&IQ4_BOOK), ..line(4, 0, 128, false, 0) },
        DType::IQ4XS => Codes { book: Some(&IQ4_BOOK), ..line(4, 0, 128, false, 32) },
        DType::MXFP4 => {
            let book = Some(&FP4_BOOK);
            Codes { book, scale: Scale::BF16, ..line(4, 0, 12, false, 0) }
        }
        DType::F32 | DType::F16 | DType::BF16 => return None,
    })
}

/// Writes the values of `src`, whole blocks of `dtype`, to `dst`.
///
/// # Panics
/// If `src` is not exactly the blocks of `dst.len()` weights.
pub fn dequantize(dtype: DType, src: &[u8], dst: &mut [f32]) {
    let expected = dtype.row_bytes(dst.len());
    assert_eq!(expected, Some(src.len()), "{} weights of {dtype}", dst.len());
    match dtype {
        DType::F32 => {
            for (y, b) in dst.iter_mut().zip(src.chunks_exact(4)) {
                *y = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        DType::F16 => {
            for (y, b) in dst.iter_mut().zip(src.chunks_exact(2)) {
                *y = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        DType::BF16 => {
            for (y, b) in dst.iter_mut().zip(src.chunks_exact(2)) {
                *y = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        _ => {
            let mut parts = Parts::default();
            let blocks = src.chunks_exact(dtype.block_bytes());
            for (y, block) in dst.chunks_exact_mut(dtype.block_len()).zip(blocks) {
                decode(dtype, block, &mut parts);
                parts.values(dtype, y);
            }
        }
    }
}

#[cfg(test)]
mod tests;
