//! Sixteen f32 lanes, whatever the processor: the vector type that the ops are written in.
//!
//! An op that is made of vector arithmetic is one [`Kernel`]: its text exists once, and [`run`]
//! compiles it for every instruction set. All versions do the same roundings in the same order
//! (a multiplication is fused with an addition only where the text says `mul_add`), so scalar,
//! AVX2, AVX-512 and NEON agree bit by bit, NaN payloads apart. `scalar.rs` is the truth of this
//! trait.
//!
//! A value that implements [`Simd`] is a proof that the processor has the instructions: it is
//! created in [`run`] only, after the check. So the methods are safe.
//!
//! Inside a kernel there are no closures that call the methods below, and no `map` of an array: the
//! compiler may leave one out of line, where it is compiled without the instruction set. It shows
//! as an intrinsic, or one of the few functions of several of them, that has a symbol of its own:
//! `nm -C target/release/deps/kernels-* | grep -E '_mm[0-9]*_|dot_(pairs|brains)|avx2::halves'`
//! finds none in the benchmark of that name.
//!
//! Integers are few: sixteen exact sums of products, and rounding to them. Quantised matrices have
//! their own intrinsics.
//!
//! Deliberately absent: gathers, and vectors of another width.

mod math;
mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

pub(crate) use math::{
    CUBIC, EXPS, QUARTIC, coarse_exps, exp, exps, largest, nearest, round, sigmoid, softcap, sum,
};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::widen;

use crate::{Isa, LANES};
use bytemuck::Pod;
use half::{bf16, f16};

/// A computation that can be compiled for any instruction set.
pub(crate) trait Kernel {
    /// What it gives back.
    type Out;
    /// The computation. Mark it `#[inline(always)]`: it is compiled into its caller, which has
    /// the instructions switched on.
    fn run<S: Simd>(self, simd: S) -> Self::Out;
}

/// Runs a kernel with an instruction set.
///
/// # Panics
/// When this processor does not have it.
#[inline]
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) -> K::Out {
    assert!(Isa::available().contains(&isa), "this processor has no {}", isa.name());
    match isa {
        Isa::Scalar => kernel.run(scalar::Scalar),
        // SAFETY: the assertion above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => unsafe { avx2::run(kernel) },
        // SAFETY: the assertion above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512::run(kernel) },
        // SAFETY: the assertion above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => unsafe { neon::run(kernel) },
        #[allow(unreachable_patterns)] // where every instruction set has its arm
        _ => unreachable!("not on this architecture; this is a bug"),
    }
}

/// Arithmetic on [`LANES`] lanes.
pub(crate) trait Simd: Copy {
    /// Sixteen lanes.
    type V: Copy;
    /// Sixteen lanes of i32.
    type Ints: Copy;
    /// Sixteen lanes of four bytes each.
    type Quads: Copy;
    /// Four bytes that meet those of every lane, in the form that they are multiplied in.
    type Quad: Pod;
    /// Sixteen lanes of two i16 each.
    type Pairs: Copy;
    /// True where there are registers for 16 accumulators of sixteen lanes; false: for 6.
    const WIDE: bool;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn load_f16(self, x: &[f16; LANES]) -> Self::V;
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V;
    /// The first of every two.
    fn load_firsts(self, x: &[[bf16; 2]; LANES]) -> Self::V;
    /// The second of every two.
    fn load_seconds(self, x: &[[bf16; 2]; LANES]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32; LANES]);
    /// Rounds to nearest, ties to even.
    fn store_f16(self, v: Self::V, out: &mut [f16; LANES]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c` with one rounding.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: b when one of them is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`: b when one of them is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { yes } else { no }`, lane by lane.
    fn if_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// The bits of a lane shifted left by 23, plus those of 1.0, as f32: see [`exp`].
    fn exponent(self, v: Self::V) -> Self::V;
    fn splat_ints(self, x: i32) -> Self::Ints;
    fn load_unsigned(self, x: &[[u8; 4]; LANES]) -> Self::Quads;
    fn load_signed(self, x: &[[i8; 4]; LANES]) -> Self::Quads;
    /// The nearest integers, ties to even, of numbers that fit a byte, signed or not. NaN gives
    /// some number.
    fn store_quads(self, v: Self::V, out: &mut [Self::Quad; LANES / 4]);
    /// `sums + a[0] * b[0] + .. + a[3] * b[3]` in every lane, exact: a is unsigned, b signed.
    fn dot_unsigned(self, a: Self::Quads, b: &Self::Quad, sums: Self::Ints) -> Self::Ints;
    /// The same where a is signed, b unsigned.
    fn dot_signed(self, a: Self::Quads, b: &Self::Quad, sums: Self::Ints) -> Self::Ints;
    fn load_pairs(self, x: &[[i16; 2]; LANES]) -> Self::Pairs;
    /// The nearest integers, ties to even, of numbers that fit an i16. NaN gives some number.
    fn store_pairs(self, v: Self::V, out: &mut [[i16; 2]; LANES / 2]);
    /// `sums + a[0] * b[0] + a[1] * b[1]` in every lane, modulo 2^32.
    fn dot_pairs(self, a: Self::Pairs, b: &[i16; 2], sums: Self::Ints) -> Self::Ints;
    /// To the nearest f32, ties to even.
    fn to_floats(self, v: Self::Ints) -> Self::V;
    /// Asks for the cache line at `line`, which need not exist: nothing is read.
    fn prefetch(self, line: *const u8);

    /// Loads a short slice; the lanes beyond it are `fill`.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::V {
        let mut lanes = [fill; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// Stores the first lanes into a short slice.
    #[inline(always)]
    fn store_part(self, v: Self::V, out: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        out.copy_from_slice(&lanes[..out.len()]);
    }
}

/// A function of two vectors, lane by lane. A trait and not a closure, because a closure that the
/// compiler decides not to inline is compiled without the instruction set: a hundred times slower.
pub(crate) trait Map {
    /// Mark it `#[inline(always)]`.
    fn map<S: Simd>(&self, simd: S, a: S::V, b: S::V) -> S::V;
}

/// `out = f(a, b)`, sixteen elements at a time; the last ones come padded with zeroes.
#[inline(always)]
pub(crate) fn zip_map<S: Simd>(simd: S, a: &[f32], b: &[f32], out: &mut [f32], f: impl Map) {
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        simd.store(f.map(simd, simd.load(a), simd.load(b)), out);
    }
    if !out_tail.is_empty() {
        let (a, b) = (simd.load_part(a_tail, 0.0), simd.load_part(b_tail, 0.0));
        simd.store_part(f.map(simd, a, b), out_tail);
    }
}

/// `a[i] = f(a[i], b[i])`, as [`zip_map`].
#[inline(always)]
pub(crate) fn zip_into<S: Simd>(simd: S, a: &mut [f32], b: &[f32], f: impl Map) {
    let (a, a_tail) = a.as_chunks_mut::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a.iter_mut().zip(b) {
        simd.store(f.map(simd, simd.load(a), simd.load(b)), a);
    }
    if !a_tail.is_empty() {
        let (x, y) = (simd.load_part(a_tail, 0.0), simd.load_part(b_tail, 0.0));
        simd.store_part(f.map(simd, x, y), a_tail);
    }
}

#[cfg(test)]
mod tests;
