//! MXFP4 as folders of gpt-oss have it: codes and scales in tensors of their own.
//!
//! OCP Microscaling Formats 1.0: 32 numbers share a power of two. `NAME_blocks` is
//! `[count, n, k / 32, 16]` bytes, each two codes, the first in the low half; `NAME_scales` is
//! `[count, n, k / 32]` exponents. GGUF has scale and codes of a block together, and in the low
//! halves its first sixteen codes.

use super::{DType, TensorInfo, TensorType, Weights};
use crate::{Error, Result};

/// Numbers of a block.
pub(super) const LEN: usize = 32;
/// Bytes of its codes.
pub(super) const CODES: usize = 16;

/// Names of codes and scales, where a file has these in place of the tensor `name`.
pub(super) fn names(weights: &Weights, name: &str) -> Option<[String; 2]> {
    let names = [format!("{name}_blocks"), format!("{name}_scales")];
    (!weights.has(name) && weights.has(&names[0])).then_some(names)
}

/// How many numbers an element of a tensor is, if it is codes or scales.
pub(super) fn part(weights: &Weights, name: &str, info: &TensorInfo) -> Option<usize> {
    if info.ty != TensorType::Unreadable("U8".into()) {
        return None;
    }
    let beside = |stem: &str, end: &str| weights.has(&format!("{stem}{end}"));
    match (name.strip_suffix("_blocks"), name.strip_suffix("_scales")) {
        (Some(stem), _) if beside(stem, "_scales") => Some(2),
        (_, Some(stem)) if beside(stem, "_blocks") => Some(0),
        _ => None,
    }
}

/// Refuses codes and scales that are not those of a tensor `[count, n, k]`.
pub(super) fn check(weights: &Weights, names: &[String; 2], shape: [usize; 3]) -> Result<()> {
    let [count, n, k] = shape;
    let wrong = |name: &String, what| Err(Error::Tensor { name: name.clone(), what });
    for (name, wanted) in names.iter().zip([&[count, n, k / LEN, CODES][..], &[count, n, k / LEN]])
    {
        let Some(info) = weights.info(name) else {
            return wrong(name, "is missing beside codes of MXFP4".into());
        };
        if info.shape != wanted || info.ty != TensorType::Unreadable("U8".into()) {
            let (ty, found) = (info.ty.name(), &info.shape);
            return wrong(name, format!("is {ty} {found:?}, where U8 {wanted:?} is wanted"));
        }
    }
    match DType::MXFP4.row_bytes(k) {
        Some(_) => Ok(()),
        None => wrong(&names[0], format!("has rows of {k}, which are no whole blocks of {LEN}")),
    }
}

/// Blocks as GGUF has them.
pub(super) fn joined(codes: &[u8], scales: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(scales.len() * (1 + CODES));
    for (codes, scale) in codes.chunks_exact(CODES).zip(scales) {
        out.push(*scale);
        let code = |i: usize| codes[i / 2] >> (4 * (i % 2)) & 15;
        out.extend((0..CODES).map(|i| code(i) | code(i + CODES) << 4));
    }
    out
}

#[cfg(test)]
mod tests {
    use hearth_kernels::quant;

    use super::*;

    #[test]
    fn numbers_are_those_of_the_standard() {
        const LEVELS: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let codes: Vec<u8> = (0..2 * CODES as u32).map(|i| (i * 89 + 7) as u8).collect();
        let scales = [127, 120];
        let mut got = [0.0; 2 * LEN];
        quant::dequantize(DType::MXFP4, &joined(&codes, &scales), &mut got);
        for (i, got) in got.iter().enumerate() {
            let code = codes[i / 2] >> (4 * (i % 2)) & 15;
            let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
            let power = 2f32.powi(i32::from(scales[i / LEN]) - 127);
            assert_eq!(*got, sign * LEVELS[usize::from(code & 7)] * power, "number {i}");
        }
    }
}
