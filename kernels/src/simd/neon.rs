//! Sixteen lanes as four registers of four.

use super::{Kernel, Simd};
use crate::LANES;
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::arch::asm;

#[target_feature(enable = "neon")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Neon(()))
}

/// Proof that the processor has NEON: [`run`] makes the only one.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

#[derive(Clone, Copy)]
pub(super) struct Four(float32x4_t, float32x4_t, float32x4_t, float32x4_t);

#[derive(Clone, Copy)]
pub(super) struct IntFour(int32x4_t, int32x4_t, int32x4_t, int32x4_t);

/// The first, second, third and fourth byte of sixteen quads as i16, eight lanes to a register: so
/// a sum over quads is four multiplications into the lanes where it belongs.
#[derive(Clone, Copy)]
pub(super) struct QuadFour([[int16x8_t; 2]; 4]);

/// One expression for each of four registers, put together by a constructor.
macro_rules! four {
    ($made:ident, |$($v:ident),+| $call:expr) => {
        // SAFETY: `Neon` exists only where NEON does.
        unsafe {
            $made(
                { $(let $v = $v.0;)+ $call },
                { $(let $v = $v.1;)+ $call },
                { $(let $v = $v.2;)+ $call },
                { $(let $v = $v.3;)+ $call },
            )
        }
    };
}

impl Simd for Neon {
    type V = Four;
    type Ints = IntFour;
    type Quads = QuadFour;
    type Quad = [i16; 4];
    type Pairs = [int16x8x2_t; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Four {
        // SAFETY: `Neon` exists only where NEON does.
        let x = unsafe { vdupq_n_f32(x) };
        Four(x, x, x, x)
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Four {
        let x = x.as_ptr();
        // SAFETY: NEON is here; the array holds four registers.
        unsafe {
            Four(vld1q_f32(x), vld1q_f32(x.add(4)), vld1q_f32(x.add(8)), vld1q_f32(x.add(12)))
        }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Four {
        let x = x.as_ptr().cast::<u16>();
        // SAFETY: NEON is here; the array holds two registers of eight halves.
        unsafe {
            let ([first, second], [third, fourth]) =
                (widen(vld1q_u16(x)), widen(vld1q_u16(x.add(8))));
            Four(first, second, third, fourth)
        }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Four {
        let x = x.as_ptr().cast::<u16>();
        // SAFETY: NEON is here; the array holds two registers of eight halves.
        let x = unsafe {
            let (low, high) = (vld1q_u16(x), vld1q_u16(x.add(8)));
            let (first, third) = (vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_low_u16(high)));
            (first, vmovl_high_u16(low), third, vmovl_high_u16(high))
        };
        four!(Four, |x| vreinterpretq_f32_u32(vshlq_n_u32::<16>(x)))
    }

    #[inline(always)]
    fn load_firsts(self, x: &[[bf16; 2]; LANES]) -> Four {
        let x = x.as_ptr().cast::<u32>();
        // SAFETY: NEON is here; the array holds four registers.
        let x = unsafe {
            (vld1q_u32(x), vld1q_u32(x.add(4)), vld1q_u32(x.add(8)), vld1q_u32(x.add(12)))
        };
        four!(Four, |x| vreinterpretq_f32_u32(vshlq_n_u32::<16>(x)))
    }

    #[inline(always)]
    fn load_seconds(self, x: &[[bf16; 2]; LANES]) -> Four {
        let x = x.as_ptr().cast::<u32>();
        // SAFETY: NEON is here; the array holds four registers.
        let x = unsafe {
            (vld1q_u32(x), vld1q_u32(x.add(4)), vld1q_u32(x.add(8)), vld1q_u32(x.add(12)))
        };
        four!(Four, |x| vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff_0000))))
    }

    #[inline(always)]
    fn store(self, v: Four, out: &mut [f32; LANES]) {
        let out = out.as_mut_ptr();
        // SAFETY: NEON is here; the array holds four registers.
        unsafe {
            vst1q_f32(out, v.0);
            vst1q_f32(out.add(4), v.1);
            vst1q_f32(out.add(8), v.2);
            vst1q_f32(out.add(12), v.3);
        }
    }

    #[inline(always)]
    fn store_f16(self, v: Four, out: &mut [f16; LANES]) {
        let out = out.as_mut_ptr().cast::<u16>();
        // SAFETY: NEON is here; the array holds two registers of halves.
        unsafe {
            vst1q_u16(out, narrow([v.0, v.1]));
            vst1q_u16(out.add(8), narrow([v.2, v.3]));
        }
    }

    #[inline(always)]
    fn add(self, a: Four, b: Four) -> Four {
        four!(Four, |a, b| vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Four, b: Four) -> Four {
        four!(Four, |a, b| vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Four, b: Four) -> Four {
        four!(Four, |a, b| vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: Four, b: Four) -> Four {
        four!(Four, |a, b| vdivq_f32(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: Four, b: Four, c: Four) -> Four {
        four!(Four, |a, b, c| vfmaq_f32(c, a, b))
    }

    // `fmax` and `fmin` have other ideas of NaN, and of the zeroes.

    #[inline(always)]
    fn max(self, a: Four, b: Four) -> Four {
        four!(Four, |a, b| vbslq_f32(vcgtq_f32(a, b), a, b))
    }

    #[inline(always)]
    fn min(self, a: Four, b: Four) -> Four {
        four!(Four, |a, b| vbslq_f32(vcltq_f32(a, b), a, b))
    }

    #[inline(always)]
    fn if_less(self, a: Four, b: Four, yes: Four, no: Four) -> Four {
        four!(Four, |a, b, yes, no| vbslq_f32(vcltq_f32(a, b), yes, no))
    }

    #[inline(always)]
    fn exponent(self, v: Four) -> Four {
        four!(Four, |v| {
            let shifted = vshlq_n_s32::<23>(vreinterpretq_s32_f32(v));
            vreinterpretq_f32_s32(vaddq_s32(shifted, vreinterpretq_s32_f32(vdupq_n_f32(1.0))))
        })
    }

    #[inline(always)]
    fn splat_ints(self, x: i32) -> IntFour {
        // SAFETY: `Neon` exists only where NEON does.
        let x = unsafe { vdupq_n_s32(x) };
        IntFour(x, x, x, x)
    }

    #[inline(always)]
    fn load_unsigned(self, x: &[[u8; 4]; LANES]) -> QuadFour {
        // SAFETY: NEON is here; the array holds four registers.
        unsafe {
            let uint8x16x4_t(first, second, third, fourth) = vld4q_u8(x.as_ptr().cast());
            let mut quads = [[vdupq_n_s16(0); 2]; 4];
            for (wide, x) in quads.iter_mut().zip([first, second, third, fourth]) {
                wide[0] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x)));
                wide[1] = vreinterpretq_s16_u16(vmovl_high_u8(x));
            }
            QuadFour(quads)
        }
    }

    #[inline(always)]
    fn load_signed(self, x: &[[i8; 4]; LANES]) -> QuadFour {
        // SAFETY: NEON is here; the array holds four registers.
        unsafe {
            let int8x16x4_t(first, second, third, fourth) = vld4q_s8(x.as_ptr().cast());
            let mut quads = [[vdupq_n_s16(0); 2]; 4];
            for (wide, x) in quads.iter_mut().zip([first, second, third, fourth]) {
                *wide = [vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)];
            }
            QuadFour(quads)
        }
    }

    #[inline(always)]
    fn store_quads(self, v: Four, out: &mut [[i16; 4]; LANES / 4]) {
        // SAFETY: NEON is here; every quad is half a register.
        unsafe {
            for (out, v) in out.iter_mut().zip([v.0, v.1, v.2, v.3]) {
                vst1_s16(out.as_mut_ptr(), vmovn_s32(vcvtnq_s32_f32(v)));
            }
        }
    }

    #[inline(always)]
    fn dot_unsigned(self, a: QuadFour, b: &[i16; 4], sums: IntFour) -> IntFour {
        self.dot_signed(a, b, sums)
    }

    #[inline(always)]
    fn dot_signed(self, a: QuadFour, b: &[i16; 4], sums: IntFour) -> IntFour {
        let mut sums = sums;
        // SAFETY: `Neon` exists only where NEON does.
        unsafe {
            for (a, b) in a.0.into_iter().zip(*b) {
                sums.0 = vmlal_n_s16(sums.0, vget_low_s16(a[0]), b);
                sums.1 = vmlal_high_n_s16(sums.1, a[0], b);
                sums.2 = vmlal_n_s16(sums.2, vget_low_s16(a[1]), b);
                sums.3 = vmlal_high_n_s16(sums.3, a[1], b);
            }
        }
        sums
    }

    #[inline(always)]
    fn load_pairs(self, x: &[[i16; 2]; LANES]) -> [int16x8x2_t; 2] {
        let x = x.as_ptr().cast::<i16>();
        // SAFETY: NEON is here; the array holds four registers.
        unsafe { [vld2q_s16(x), vld2q_s16(x.add(LANES))] }
    }

    #[inline(always)]
    fn store_pairs(self, v: Four, out: &mut [[i16; 2]; LANES / 2]) {
        // SAFETY: NEON is here; two pairs are half a register.
        unsafe {
            for (out, v) in out.as_chunks_mut::<2>().0.iter_mut().zip([v.0, v.1, v.2, v.3]) {
                vst1_s16(out.as_mut_ptr().cast(), vmovn_s32(vcvtnq_s32_f32(v)));
            }
        }
    }

    #[inline(always)]
    fn dot_pairs(self, a: [int16x8x2_t; 2], b: &[i16; 2], sums: IntFour) -> IntFour {
        let ([low, high], mut sums) = (a, sums);
        // SAFETY: `Neon` exists only where NEON does.
        unsafe {
            for (low, high, b) in [(low.0, high.0, b[0]), (low.1, high.1, b[1])] {
                sums.0 = vmlal_n_s16(sums.0, vget_low_s16(low), b);
                sums.1 = vmlal_high_n_s16(sums.1, low, b);
                sums.2 = vmlal_n_s16(sums.2, vget_low_s16(high), b);
                sums.3 = vmlal_high_n_s16(sums.3, high, b);
            }
        }
        sums
    }

    #[inline(always)]
    fn to_floats(self, v: IntFour) -> Four {
        four!(Four, |v| vcvtq_f32_s32(v))
    }

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // SAFETY: a prefetch of any address is allowed, and changes nothing that a program sees.
        unsafe {
            asm!(
                "prfm pldl1keep, [{line}]",
                line = in(reg) line,
                options(readonly, nostack, preserves_flags)
            );
        }
    }
}

/// Eight half floats as floats. Written out, as [`narrow`]: the oldest Rust that we build with has
/// no name for it.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn widen(halves: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high);
    // SAFETY: every NEON has these; only the outputs change.
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {halves:v}.4h",
            "fcvtl2 {high:v}.4s, {halves:v}.8h",
            low = out(vreg) low,
            high = out(vreg) high,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    [low, high]
}

/// Eight floats as half floats, rounded to nearest, ties to even, as the processor is set.
#[inline]
#[target_feature(enable = "neon")]
fn narrow(floats: [float32x4_t; 2]) -> uint16x8_t {
    let halves;
    // SAFETY: every NEON has these; only the output changes.
    unsafe {
        asm!(
            "fcvtn {halves:v}.4h, {low:v}.4s",
            "fcvtn2 {halves:v}.8h, {high:v}.4s",
            halves = out(vreg) halves,
            low = in(vreg) floats[0],
            high = in(vreg) floats[1],
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    halves
}
