//! From the bytes of one block to codes and scales.

use half::f16;

use super::{DType, codes};

/// One decoded block. Blocks of 32 use the first 32 codes, `d` and `m` only.
pub(crate) struct Parts {
    /// Unsigned codes, in the order of the weights.
    pub(crate) codes: [u8; 256],
    /// Sub-scales, one per 16 or 32 weights.
    pub(crate) scales: [i8; 16],
    /// Sub-minima, one per 16 or 32 weights.
    pub(crate) mins: [u8; 16],
    /// Scale of the block.
    pub(crate) d: f32,
    /// `m` or `dmin` of the formulas; 0 in formats with an offset.
    pub(crate) m: f32,
}

impl Default for Parts {
    fn default() -> Parts {
        Parts { codes: [0; 256], scales: [0; 16], mins: [0; 16], d: 0.0, m: 0.0 }
    }
}

impl Parts {
    /// The weights of the block, by the formulas of the module documentation.
    pub(crate) fn values(&self, dtype: DType, out: &mut [f32]) {
        let format = codes(dtype).expect("only quantised blocks are decoded; this is a bug");
        let (d, m) = (self.d, self.m);
        let value = |code: u8| {
            let level = format.book.map_or(code, |book| book[usize::from(code)]);
            (i32::from(level) - format.offset) as f32
        };
        if format.sub == 0 {
            for (y, &code) in out.iter_mut().zip(&self.codes) {
                *y = if format.has_min { value(code) * d + m } else { value(code) * d };
            }
            return;
        }
        let subs = out.chunks_exact_mut(format.sub).zip(self.codes.chunks_exact(format.sub));
        for (sub, (y, codes)) in subs.enumerate() {
            let scale = d * f32::from(self.scales[sub]);
            let min = m * f32::from(self.mins[sub]);
            for (y, &code) in y.iter_mut().zip(codes) {
                *y = if format.has_min { scale * value(code) - min } else { scale * value(code) };
            }
        }
    }
}

/// Decodes one block of a quantised format.
pub(crate) fn decode(dtype: DType, block: &[u8], parts: &mut Parts) {
    debug_assert_eq!(block.len(), dtype.block_bytes());
    match dtype {
        DType::Q8_0 => {
            parts.d = half_at(block, 0);
            for (code, &q) in parts.codes.iter_mut().zip(&block[2..34]) {
                *code = q ^ 0x80; // i8 to the same number plus 128
            }
        }
        DType::Q4_0 => {
            parts.d = half_at(block, 0);
            nibbles_32(&block[2..18], &mut parts.codes);
        }
        DType::Q4_1 => {
            (parts.d, parts.m) = (half_at(block, 0), half_at(block, 2));
            nibbles_32(&block[4..20], &mut parts.codes);
        }
        DType::Q5_0 => {
            parts.d = half_at(block, 0);
            nibbles_32(&block[6..22], &mut parts.codes);
            fifth_bits_32(&block[2..6], &mut parts.codes);
        }
        DType::Q5_1 => {
            (parts.d, parts.m) = (half_at(block, 0), half_at(block, 2));
            nibbles_32(&block[8..24], &mut parts.codes);
            fifth_bits_32(&block[4..8], &mut parts.codes);
        }
        DType::Q2K => q2k(block, parts),
        DType::Q3K => q3k(block, parts),
        DType::Q4K => q4k(block, parts),
        DType::Q5K => q5k(block, parts),
        DType::Q6K => q6k(block, parts),
        DType::Q8K => {
            parts.d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
            for (code, &q) in parts.codes.iter_mut().zip(&block[4..260]) {
                *code = q ^ 0x80;
            }
        }
        DType::IQ4NL => {
            parts.d = half_at(block, 0);
            nibbles_32(&block[2..18], &mut parts.codes);
        }
        DType::IQ4XS => iq4xs(block, parts),
        DType::MXFP4 => {
            parts.d = half_of_power(block[0]);
            nibbles_32(&block[1..17], &mut parts.codes);
        }
        DType::F32 | DType::F16 | DType::BF16 => {
            unreachable!("{dtype} has no codes; this is a bug")
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// 2^(e - 128), half of what an E8M0 exponent stands for: the levels are twice theirs. The two
/// smallest are subnormal.
fn half_of_power(e: u8) -> f32 {
    match e {
        0 | 1 => f32::from_bits(0x0020_0000 << e),
        _ => f32::from_bits(u32::from(e - 1) << 23),
    }
}

/// 16 bytes: low nibbles are the weights 0..16, high nibbles 16..32.
fn nibbles_32(qs: &[u8], codes: &mut [u8]) {
    for (i, &q) in qs.iter().enumerate() {
        codes[i] = q & 15;
        codes[i + 16] = q >> 4;
    }
}

/// Bit `i` of a little-endian u32 is bit 4 of code `i`.
fn fifth_bits_32(qh: &[u8], codes: &mut [u8; 256]) {
    let bits = u32::from_le_bytes([qh[0], qh[1], qh[2], qh[3]]);
    for (i, code) in codes[..32].iter_mut().enumerate() {
        *code |= ((bits >> i & 1) as u8) << 4;
    }
}

/// `scales[16]` (low nibble scale, high nibble minimum), `qs[64]`, d, dmin.
fn q2k(block: &[u8], parts: &mut Parts) {
    for (i, &byte) in block[..16].iter().enumerate() {
        parts.scales[i] = (byte & 15) as i8;
        parts.mins[i] = byte >> 4;
    }
    two_bits_256(&block[16..80], &mut parts.codes);
    (parts.d, parts.m) = (half_at(block, 80), half_at(block, 82));
}

/// `hmask[32]`, `qs[64]`, `scales[12]` (six bits each, minus 32), d.
fn q3k(block: &[u8], parts: &mut Parts) {
    two_bits_256(&block[32..96], &mut parts.codes);
    for (i, codes) in parts.codes.chunks_exact_mut(32).enumerate() {
        for (code, &mask) in codes.iter_mut().zip(&block[..32]) {
            *code |= (mask >> i & 1) << 2;
        }
    }
    let packed = &block[96..108];
    for i in 0..16 {
        let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
        let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
        parts.scales[i] = (low | high << 4) as i8 - 32;
    }
    parts.d = half_at(block, 108);
}

/// d, dmin, `scales[12]`, `qs[128]`.
fn q4k(block: &[u8], parts: &mut Parts) {
    (parts.d, parts.m) = (half_at(block, 0), half_at(block, 2));
    six_bit_scales(&block[4..16], parts);
    nibbles_256(&block[16..144], &mut parts.codes);
}

/// d, dmin, `scales[12]`, `qh[32]`, `qs[128]`.
fn q5k(block: &[u8], parts: &mut Parts) {
    (parts.d, parts.m) = (half_at(block, 0), half_at(block, 2));
    six_bit_scales(&block[4..16], parts);
    nibbles_256(&block[48..176], &mut parts.codes);
    for (i, codes) in parts.codes.chunks_exact_mut(32).enumerate() {
        for (code, &bits) in codes.iter_mut().zip(&block[16..48]) {
            *code |= (bits >> i & 1) << 4;
        }
    }
}

/// `ql[128]`, `qh[64]`, `scales[16]` (signed), d.
fn q6k(block: &[u8], parts: &mut Parts) {
    for half in 0..2 {
        let low = &block[64 * half..64 * half + 64];
        let high = &block[128 + 32 * half..160 + 32 * half];
        let codes = &mut parts.codes[128 * half..128 * half + 128];
        for i in 0..32 {
            codes[i] = low[i] & 15 | (high[i] & 3) << 4;
            codes[i + 32] = low[i + 32] & 15 | (high[i] >> 2 & 3) << 4;
            codes[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
            codes[i + 96] = low[i + 32] >> 4 | (high[i] >> 6) << 4;
        }
    }
    for (scale, &byte) in parts.scales.iter_mut().zip(&block[192..208]) {
        *scale = byte as i8;
    }
    parts.d = half_at(block, 208);
}

/// d, `scales_h` (u16), `scales_l[4]` (six bits each, minus 32), `qs[128]`.
fn iq4xs(block: &[u8], parts: &mut Parts) {
    parts.d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for i in 0..8 {
        let low = block[4 + i / 2] >> (4 * (i % 2)) & 15;
        parts.scales[i] = (low | ((high >> (2 * i) & 3) as u8) << 4) as i8 - 32;
    }
    for (codes, qs) in parts.codes.chunks_exact_mut(32).zip(block[8..136].chunks_exact(16)) {
        nibbles_32(qs, codes);
    }
}

/// Two runs of 32 bytes; bits 2i, 2i + 1 of the bytes of a run are the i-th 32 of its 128 weights.
fn two_bits_256(qs: &[u8], codes: &mut [u8; 256]) {
    for (i, codes) in codes.chunks_exact_mut(32).enumerate() {
        let run = &qs[i / 4 * 32..i / 4 * 32 + 32];
        for (code, &q) in codes.iter_mut().zip(run) {
            *code = q >> (2 * (i % 4)) & 3;
        }
    }
}

/// Four runs of 32 bytes; the low nibbles of a run are 32 weights, the high nibbles the next 32.
fn nibbles_256(qs: &[u8], codes: &mut [u8; 256]) {
    for (codes, run) in codes.chunks_exact_mut(64).zip(qs.chunks_exact(32)) {
        for (i, &q) in run.iter().enumerate() {
            codes[i] = q & 15;
            codes[i + 32] = q >> 4;
        }
    }
}

/// Eight scales and eight minima of six bits in twelve bytes.
fn six_bit_scales(packed: &[u8], parts: &mut Parts) {
    for i in 0..4 {
        parts.scales[i] = (packed[i] & 63) as i8;
        parts.mins[i] = packed[i + 4] & 63;
        parts.scales[i + 4] = (packed[i + 8] & 15 | packed[i] >> 6 << 4) as i8;
        parts.mins[i + 4] = packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4;
    }
}
