//! Quantisers: floats to blocks.
//!
//! Blocks of 32 with plain codes follow the formulas that define them everywhere (the `gguf`
//! package writes the same bytes); the others search for the scale of least error (`fit`).

use half::{bf16, f16};

use super::fit;
use super::{DType, IQ4_BOOK};

/// The values of `src` as whole blocks of `dtype`; none for the formats without a quantiser
/// (Q8_K, IQ4_XS, MXFP4).
///
/// # Panics
/// If `src` is not a whole number of blocks.
pub fn quantize(dtype: DType, src: &[f32]) -> Option<Vec<u8>> {
    let bytes = dtype.row_bytes(src.len());
    let bytes = bytes.unwrap_or_else(|| panic!("{} weights in blocks of {dtype}", src.len()));
    let mut out = Vec::with_capacity(bytes);
    #[cfg(target_arch = "x86_64")]
    {
        /// The same code with wider vectors: no operation is fused, so no bit changes.
        #[target_feature(enable = "avx2")]
        fn wide(dtype: DType, src: &[f32], out: &mut Vec<u8>) -> Option<()> {
            blocks(dtype, src, out)
        }
        if crate::Isa::best() >= crate::Isa::Avx2 {
            // SAFETY: the processor has AVX2.
            unsafe { wide(dtype, src, &mut out) }?;
            return Some(out);
        }
    }
    blocks(dtype, src, &mut out)?;
    Some(out)
}

#[inline(always)]
fn blocks(dtype: DType, src: &[f32], out: &mut Vec<u8>) -> Option<()> {
    macro_rules! each {
        ($block:expr) => {
            src.chunks_exact(dtype.block_len()).for_each(|x| $block(x, out))
        };
    }
    match dtype {
        DType::F32 => src.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        DType::F16 => {
            src.iter().for_each(|x| out.extend_from_slice(&f16::from_f32(*x).to_le_bytes()));
        }
        DType::BF16 => {
            src.iter().for_each(|x| out.extend_from_slice(&bf16::from_f32(*x).to_le_bytes()));
        }
        DType::Q8_0 => each!(q8_0),
        DType::Q4_0 => each!(q4_0),
        DType::Q4_1 => each!(q4_1),
        DType::Q5_0 => each!(q5_0),
        DType::Q5_1 => each!(q5_1),
        DType::IQ4NL => each!(iq4nl),
        DType::Q2K => each!(q2k),
        DType::Q3K => each!(q3k),
        DType::Q4K => each!(q4k),
        DType::Q5K => each!(q5k),
        DType::Q6K => each!(q6k),
        DType::Q8K | DType::IQ4XS | DType::MXFP4 => return None,
    }
    Some(())
}

/// Rounds `d` to f16, appends it, and returns what the reader will see.
fn push_half(d: f32, out: &mut Vec<u8>) -> f32 {
    let d = f16::from_f32(d);
    out.extend_from_slice(&d.to_le_bytes());
    d.to_f32()
}

/// 1 / d, or 0 for 0: a block of zeros has the scale 0 and any codes.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of largest magnitude, the first of equals.
#[inline(always)]
fn peak(x: &[f32]) -> f32 {
    x.iter().fold(0.0_f32, |peak, &x| if x.abs() > peak.abs() { x } else { peak })
}

/// Smallest and largest value.
#[inline(always)]
fn range(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::MAX, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)))
}

#[inline(always)]
fn q8_0(x: &[f32], out: &mut Vec<u8>) {
    let d = peak(x).abs() / 127.0;
    let inverse = inverse(d);
    push_half(d, out);
    out.extend(x.iter().map(|x| {
        // Ties away from zero.
        let (x, whole) = (x * inverse, (x * inverse).abs() as i32);
        let up = (2.0 * (x.abs() - whole as f32)) as i32;
        (if x < 0.0 { -whole - up } else { whole + up }) as i8 as u8
    }));
}

/// 32 codes: `x * inverse + shift`, cut off, at most `high`.
#[inline(always)]
fn cut(x: &[f32], inverse: f32, shift: f32, high: u8) -> [u8; 32] {
    std::array::from_fn(|i| ((x[i] * inverse + shift) as u8).min(high))
}

#[inline(always)]
fn push_nibbles(codes: &[u8; 32], out: &mut Vec<u8>) {
    out.extend((0..16).map(|i| codes[i] & 15 | codes[i + 16] << 4));
}

fn push_fifth_bits(codes: &[u8; 32], out: &mut Vec<u8>) {
    let bits = (0..32).fold(0_u32, |bits, i| bits | u32::from(codes[i] >> 4) << i);
    out.extend_from_slice(&bits.to_le_bytes());
}

/// The scale is signed so that the value of largest magnitude gets the code 0 (-8).
#[inline(always)]
fn q4_0(x: &[f32], out: &mut Vec<u8>) {
    let d = peak(x) / -8.0;
    push_half(d, out);
    push_nibbles(&cut(x, inverse(d), 8.5, 15), out);
}

#[inline(always)]
fn q5_0(x: &[f32], out: &mut Vec<u8>) {
    let d = peak(x) / -16.0;
    push_half(d, out);
    let codes = cut(x, inverse(d), 16.5, 31);
    push_fifth_bits(&codes, out);
    push_nibbles(&codes, out);
}

/// d and the codes above the minimum.
#[inline(always)]
fn above_min(x: &[f32], high: u8, out: &mut Vec<u8>) -> [u8; 32] {
    let (low, top) = range(x);
    let d = (top - low) / f32::from(high);
    push_half(d, out);
    push_half(low, out);
    let above: [f32; 32] = std::array::from_fn(|i| x[i] - low);
    cut(&above, inverse(d), 0.5, high)
}

#[inline(always)]
fn q4_1(x: &[f32], out: &mut Vec<u8>) {
    let codes = above_min(x, 15, out);
    push_nibbles(&codes, out);
}

#[inline(always)]
fn q5_1(x: &[f32], out: &mut Vec<u8>) {
    let codes = above_min(x, 31, out);
    push_fifth_bits(&codes, out);
    push_nibbles(&codes, out);
}

#[inline(always)]
fn iq4nl(x: &[f32], out: &mut Vec<u8>) {
    let d = push_half(fit::book_scale(x, &fit::importance::<32>(x), &IQ4_BOOK, 128.0), out);
    let inverse = inverse(d);
    let codes: [u8; 32] =
        std::array::from_fn(|i| fit::nearest_level(x[i] * inverse, &IQ4_BOOK, 128.0).0);
    push_nibbles(&codes, out);
}

/// Scales and minima of the sub-blocks in whole numbers, and the codes under them.
struct Affine<const SUBS: usize> {
    d: f32,
    dmin: f32,
    scale: [u8; SUBS],
    min: [u8; SUBS],
    codes: [u8; 256],
}

/// Fits `SUBS` sub-blocks of `SUB` weights; codes up to `high`, scales and minima up to `steps`.
#[inline(always)]
fn affine<const SUBS: usize, const SUB: usize>(x: &[f32], high: f32, steps: f32) -> Affine<SUBS> {
    let (mut scale, mut min) = ([0.0_f32; SUBS], [0.0_f32; SUBS]);
    for (sub, x) in x.chunks_exact(SUB).enumerate() {
        let weights = fit::importance::<SUB>(x);
        (scale[sub], min[sub]) = fit::scale_and_min::<SUB>(x, &weights, high);
    }
    let halved = |d: f32| f16::from_f32(d).to_f32();
    let d = halved(scale.iter().fold(0.0, |a, b| b.max(a)) / steps);
    let dmin = halved(min.iter().fold(0.0, |a, b| b.max(a)) / steps);
    let whole = |x: f32, d: f32| (x * inverse(d)).round_ties_even().clamp(0.0, steps) as u8;
    let (scale, min) = (scale.map(|x| whole(x, d)), min.map(|x| whole(x, dmin)));
    let mut codes = [0; 256];
    let subs = codes.chunks_exact_mut(SUB).zip(x.chunks_exact(SUB));
    for (sub, (codes, x)) in subs.enumerate() {
        let inverse = inverse(d * f32::from(scale[sub]));
        let low = dmin * f32::from(min[sub]);
        for (code, x) in codes.iter_mut().zip(x) {
            *code = fit::round((x + low) * inverse, 0.0, high) as u8;
        }
    }
    Affine { d, dmin, scale, min, codes }
}

/// Signed scales of the sub-blocks in whole numbers, and the codes (with the offset) under them.
struct Symmetric {
    d: f32,
    scale: [i8; 16],
    codes: [u8; 256],
}

/// Fits 16 sub-blocks; codes from `-offset`, scales from `-steps` on, both up to one less.
#[inline(always)]
fn symmetric(x: &[f32], offset: f32, steps: f32) -> Symmetric {
    let mut scale = [0.0_f32; 16];
    for (scale, x) in scale.iter_mut().zip(x.chunks_exact(16)) {
        *scale = fit::scale::<16>(x, &fit::importance::<16>(x), offset);
    }
    // Signed, so that the largest scale gets the largest number there is.
    let d = f16::from_f32(peak(&scale) / -steps).to_f32();
    let whole = |x: f32| (x * inverse(d)).round_ties_even().clamp(-steps, steps - 1.0) as i8;
    let scale = scale.map(whole);
    let mut codes = [0; 256];
    let subs = codes.chunks_exact_mut(16).zip(x.chunks_exact(16));
    for (sub, (codes, x)) in subs.enumerate() {
        let inverse = inverse(d * f32::from(scale[sub]));
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (fit::round(x * inverse, -offset, offset - 1.0) + offset) as u8;
        }
    }
    Symmetric { d, scale, codes }
}

#[inline(always)]
fn q2k(x: &[f32], out: &mut Vec<u8>) {
    let made = affine::<16, 16>(x, 3.0, 15.0);
    out.extend((0..16).map(|i| made.scale[i] | made.min[i] << 4));
    push_two_bits(&made.codes, out);
    push_half(made.d, out);
    push_half(made.dmin, out);
}

#[inline(always)]
fn q3k(x: &[f32], out: &mut Vec<u8>) {
    let made = symmetric(x, 4.0, 32.0);
    let codes = &made.codes;
    out.extend((0..32).map(|i| (0..8).fold(0, |mask, j| mask | (codes[32 * j + i] >> 2) << j)));
    push_two_bits(codes, out);
    let scale = made.scale.map(|scale| (scale + 32) as u8);
    out.extend((0..8).map(|i| scale[i] & 15 | (scale[i + 8] & 15) << 4));
    let high = |i: usize| (0..4).fold(0, |byte, j| byte | (scale[i + 4 * j] >> 4) << (2 * j));
    out.extend((0..4).map(high));
    push_half(made.d, out);
}

#[inline(always)]
fn q4k(x: &[f32], out: &mut Vec<u8>) {
    let made = affine::<8, 32>(x, 15.0, 63.0);
    push_six_bit_scales(&made, out);
    push_nibble_runs(&made.codes, out);
}

#[inline(always)]
fn q5k(x: &[f32], out: &mut Vec<u8>) {
    let made = affine::<8, 32>(x, 31.0, 63.0);
    push_six_bit_scales(&made, out);
    let codes = &made.codes;
    out.extend((0..32).map(|i| (0..8).fold(0, |bits, j| bits | (codes[32 * j + i] >> 4) << j)));
    push_nibble_runs(codes, out);
}

#[inline(always)]
fn q6k(x: &[f32], out: &mut Vec<u8>) {
    let made = symmetric(x, 32.0, 128.0);
    let code = |i: usize| made.codes[i];
    for half in [0, 128] {
        let low = |i: usize| code(half + i) & 15 | (code(half + i + 64) & 15) << 4;
        out.extend((0..64).map(low));
    }
    for half in [0, 128] {
        let high = |i: usize, quarter: usize| code(half + 32 * quarter + i) >> 4 << (2 * quarter);
        out.extend((0..32).map(|i| high(i, 0) | high(i, 1) | high(i, 2) | high(i, 3)));
    }
    out.extend(made.scale.iter().map(|&scale| scale as u8));
    push_half(made.d, out);
}

/// d, dmin, and eight scales and eight minima of six bits in twelve bytes.
fn push_six_bit_scales(made: &Affine<8>, out: &mut Vec<u8>) {
    push_half(made.d, out);
    push_half(made.dmin, out);
    let (scale, min) = (&made.scale, &made.min);
    out.extend((0..4).map(|i| scale[i] | scale[i + 4] >> 4 << 6));
    out.extend((0..4).map(|i| min[i] | min[i + 4] >> 4 << 6));
    out.extend((4..8).map(|i| scale[i] & 15 | min[i] << 4));
}

/// Four runs of 32 bytes: the low bits of 32 codes, and above them those of the next 32.
fn push_nibble_runs(codes: &[u8; 256], out: &mut Vec<u8>) {
    for run in codes.chunks_exact(64) {
        out.extend((0..32).map(|i| run[i] & 15 | run[i + 32] << 4));
    }
}

/// Two runs of 32 bytes, each the two low bits of four times 32 codes.
fn push_two_bits(codes: &[u8; 256], out: &mut Vec<u8>) {
    for run in codes.chunks_exact(128) {
        let byte = |i: usize| (0..4).fold(0, |byte, j| byte | (run[32 * j + i] & 3) << (2 * j));
        out.extend((0..32).map(byte));
    }
}
