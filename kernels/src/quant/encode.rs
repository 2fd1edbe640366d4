//! Simple quantisers: round to the nearest code, no search for a better scale.

use half::{bf16, f16};

use super::DType;

/// The values of `src` as whole blocks of `dtype`; none for the formats without a quantiser
/// (Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q5_K, Q8_K).
///
/// # Panics
/// If `src` is not a whole number of blocks.
pub fn quantize(dtype: DType, src: &[f32]) -> Option<Vec<u8>> {
    let bytes = dtype.row_bytes(src.len());
    let bytes = bytes.unwrap_or_else(|| panic!("{} weights in blocks of {dtype}", src.len()));
    let mut out = Vec::with_capacity(bytes);
    let block: fn(&[f32], &mut Vec<u8>) = match dtype {
        DType::F32 => |x, out| out.extend_from_slice(&x[0].to_le_bytes()),
        DType::F16 => |x, out| out.extend_from_slice(&f16::from_f32(x[0]).to_le_bytes()),
        DType::BF16 => |x, out| out.extend_from_slice(&bf16::from_f32(x[0]).to_le_bytes()),
        DType::Q8_0 => q8_0,
        DType::Q4_0 => q4_0,
        DType::Q4K => q4k,
        DType::Q6K => q6k,
        _ => return None,
    };
    for x in src.chunks_exact(dtype.block_len()) {
        block(x, &mut out);
    }
    Some(out)
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

fn code(x: f32, low: f32, high: f32) -> i32 {
    x.round_ties_even().clamp(low, high) as i32
}

fn max_abs(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most, x| most.max(x.abs()))
}

fn q8_0(x: &[f32], out: &mut Vec<u8>) {
    let inv = inverse(push_half(max_abs(x) / 127.0, out));
    out.extend(x.iter().map(|x| code(x * inv, -127.0, 127.0) as i8 as u8));
}

/// The scale is signed so that the value of largest magnitude gets the code 0 (-8).
fn q4_0(x: &[f32], out: &mut Vec<u8>) {
    let peak = x.iter().fold(0.0_f32, |peak, &x| if x.abs() > peak.abs() { x } else { peak });
    let inv = inverse(push_half(peak / -8.0, out));
    let code = |x: f32| code(x * inv + 8.0, 0.0, 15.0) as u8;
    out.extend((0..16).map(|i| code(x[i]) | code(x[i + 16]) << 4));
}

fn q4k(x: &[f32], out: &mut Vec<u8>) {
    let (mut scale, mut min) = ([0.0_f32; 8], [0.0_f32; 8]);
    for (sub, x) in x.chunks_exact(32).enumerate() {
        let low = x.iter().fold(0.0_f32, |low, &x| low.min(x));
        let high = x.iter().fold(0.0_f32, |high, &x| high.max(x));
        (scale[sub], min[sub]) = ((high - low) / 15.0, -low);
    }
    let d = push_half(max_abs(&scale) / 63.0, out);
    let dmin = push_half(max_abs(&min) / 63.0, out);
    let six = |x: f32, d: f32| code(x * inverse(d), 0.0, 63.0) as u8;
    let scale = scale.map(|x| six(x, d));
    let min = min.map(|x| six(x, dmin));
    out.extend((0..4).map(|i| scale[i] | scale[i + 4] >> 4 << 6));
    out.extend((0..4).map(|i| min[i] | min[i + 4] >> 4 << 6));
    out.extend((4..8).map(|i| scale[i] & 15 | min[i] << 4));
    let code = |i: usize| {
        let sub = i / 32;
        let low = dmin * f32::from(min[sub]);
        code((x[i] + low) * inverse(d * f32::from(scale[sub])), 0.0, 15.0) as u8
    };
    for run in 0..4 {
        out.extend((64 * run..64 * run + 32).map(|i| code(i) | code(i + 32) << 4));
    }
}

fn q6k(x: &[f32], out: &mut Vec<u8>) {
    let mut peak = [0.0_f32; 16];
    for (peak, x) in peak.iter_mut().zip(x.chunks_exact(16)) {
        *peak = max_abs(x) / 31.0;
    }
    let mut tail = Vec::with_capacity(2);
    let d = push_half(max_abs(&peak) / 127.0, &mut tail);
    let scale = peak.map(|x| code(x * inverse(d), 0.0, 127.0) as i8);
    let code = |i: usize| {
        let inv = inverse(d * f32::from(scale[i / 16]));
        code(x[i] * inv + 32.0, 0.0, 63.0) as u8
    };
    for half in [0, 128] {
        let low = |i: usize| code(half + i) & 15 | (code(half + i + 64) & 15) << 4;
        out.extend((0..64).map(low));
    }
    for half in [0, 128] {
        let high = |i: usize, quarter: usize| code(half + 32 * quarter + i) >> 4 << (2 * quarter);
        out.extend((0..32).map(|i| high(i, 0) | high(i, 1) | high(i, 2) | high(i, 3)));
    }
    out.extend(scale.iter().map(|&scale| scale as u8));
    out.extend_from_slice(&tail);
}
