//! Eight bits of floating point: four of exponent, three of mantissa, no infinity (E4M3 of
//! Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
//!
//! Numbers from 2^-9 to 448, without a scale: a relative error of 1/16 at most, where `q8_0` has an
//! absolute one of the 254th part of a head's largest number. Meant for GPUs that read it in one
//! instruction; here it is the truth that theirs is compared with, and no faster than f16.

/// The largest number.
pub const LARGEST: f32 = 448.0;
/// What is no number.
const NAN: u8 = 0x7f;

/// The number of a byte.
#[inline(always)]
pub fn to_f32(byte: u8) -> f32 {
    let (size, sign) = (u32::from(byte & 0x7f), u32::from(byte & 0x80) << 24);
    // The exponent of f32 begins 120 lower; the smallest numbers come out right too.
    let exponents = f32::from_bits((120 + 127) << 23);
    let x = f32::from_bits(size << 20) * exponents;
    let x = if size == u32::from(NAN) { f32::NAN } else { x };
    f32::from_bits(x.to_bits() | sign)
}

/// The byte of the nearest number, the even one of two. What is too large is the largest; what is
/// no number, or infinite, is none.
#[inline(always)]
pub fn from_f32(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let size = x.abs();
    // A sum with a power of two is rounded to multiples of its last place: 2^-9.
    let small = (size.min(1.0) + 16384.0).to_bits() as u8;
    let within = size.min(LARGEST).to_bits();
    let normal = within.wrapping_add(0x7_ffff + (within >> 20 & 1)).wrapping_sub(120 << 23) >> 20;
    let byte = if size < 0.015_625 { small } else { normal as u8 };
    if size <= f32::MAX { byte | sign } else { NAN }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition of the format.
    fn meaning(byte: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
        let size = match exponent {
            0 => mantissa * 2f64.powi(-9),
            _ => (8.0 + mantissa) * 2f64.powi(exponent - 10),
        };
        if byte & 0x80 == 0 { size } else { -size }
    }

    #[test]
    fn every_byte_means_its_number_and_comes_back() {
        for byte in 0..=255u8 {
            let got = to_f32(byte);
            if byte & 0x7f == 0x7f {
                assert!(got.is_nan() && from_f32(got) & 0x7f == 0x7f);
            } else {
                assert_eq!(f64::from(got), meaning(byte), "{byte:#x}");
                assert_eq!(from_f32(got), byte, "{got}");
            }
        }
    }

    #[test]
    fn between_two_the_nearest_and_of_equals_the_even() {
        for byte in 0..0x7e_u8 {
            let (low, high) = (to_f32(byte), to_f32(byte + 1));
            let middle = (low + high) / 2.0;
            let even = byte + byte % 2;
            assert_eq!((from_f32(middle), from_f32(-middle)), (even, even | 0x80), "{middle}");
            assert_eq!(from_f32(f32::from_bits(middle.to_bits() - 1)), byte);
            assert_eq!(from_f32(f32::from_bits(middle.to_bits() + 1)), byte + 1);
        }
        for x in [448.1, 500.0, 1e30, f32::MAX] {
            assert_eq!((from_f32(x), from_f32(-x)), (0x7e, 0xfe));
        }
        for x in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(from_f32(x) & 0x7f, 0x7f);
        }
        assert_eq!((from_f32(1e-30), from_f32(-1e-30)), (0, 0x80));
    }
}
