//! The left side of a product: rows of x, quantised to 8 bits where the weights are quantised, and
//! rounded to bf16 where they are bf16.

use std::ops::Range;

use half::bf16;

use super::Shared;
use super::brain::round_rows;
use crate::{Isa, Pool};

/// What a weight format wants x to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationKind {
    /// f32 as it is: f32 and f16.
    Float,
    /// Rounded to bf16: bf16.
    Brain,
    /// 8-bit codes with one f32 scale per 32 elements: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_K,
    /// IQ4_NL, MXFP4.
    Block32,
    /// 8-bit codes with one f32 scale per 256 elements: Q2_K to Q6_K, IQ4_XS.
    Block256,
}

impl ActivationKind {
    fn block(self) -> usize {
        match self {
            ActivationKind::Float | ActivationKind::Brain => 1,
            ActivationKind::Block32 => 32,
            ActivationKind::Block256 => 256,
        }
    }
}

/// Rows of x in the form of one [`ActivationKind`], made once and used for every matrix with the
/// same input (q, k and v; gate and up).
///
/// A block is quantised by itself, so the codes of a row do not depend on its neighbours:
///
/// ```text
/// scale = max |x| / 127        code = round_ties_even(x * (127 / max |x|))
/// ```
/// A block of magnitudes below 1e-30 counts as zeros; a block with a NaN or an infinity gets the
/// scale NaN, which reaches every output of its row.
///
/// bf16 is the nearest, ties to even, and zero for magnitudes below 2^-126.
#[derive(Debug)]
pub struct Activations<'a> {
    pub(super) kind: ActivationKind,
    pub(super) m: usize,
    pub(super) k: usize,
    /// (m, k), for `Float`; else empty.
    x: &'a [f32],
    /// `Brain` is in `pairs`, not in `rounded`.
    pub(super) in_pairs: bool,
    /// (m, k, and a zero where k is odd), for `Brain`.
    rounded: Vec<[f32; 2]>,
    /// The same in two bytes, for an instruction that takes two at a time.
    pub(super) pairs: Vec<[bf16; 2]>,
    /// (k / block, m, block), and what is left of a larger input, here and below.
    pub(super) codes: Vec<i8>,
    /// (k / block, m)
    pub(super) scales: Vec<f32>,
    /// Sums of the codes of each block of 32. (k / 32, m), for `Block32`.
    pub(super) sums: Vec<i32>,
    /// Sums over sixteen 16s, then over eight 32s. (k / 256, m, 24), for `Block256`.
    pub(super) sub_sums: Vec<i16>,
}

/// Memory of [`Activations`] between two uses, so that preparing an input asks for none.
#[derive(Debug, Default)]
pub struct ActivationBuffers {
    rounded: Vec<[f32; 2]>,
    pairs: Vec<[bf16; 2]>,
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    sub_sums: Vec<i16>,
}

/// Sums per block of 256 in [`Activations::sub_sums`].
pub(super) const SUB_SUMS: usize = 24;

impl<'a> Activations<'a> {
    /// Prepares `m` rows of `k` elements.
    ///
    /// # Panics
    /// If `x` is not `m * k` long, or `k` not a whole number of blocks.
    pub fn new(pool: &Pool, x: &'a [f32], m: usize, k: usize, kind: ActivationKind) -> Self {
        Self::new_in(ActivationBuffers::default(), pool, x, m, k, kind)
    }

    /// [`Activations::new`] in memory that was used before.
    ///
    /// # Panics
    /// As [`Activations::new`].
    pub fn new_in(
        buffers: ActivationBuffers,
        pool: &Pool,
        x: &'a [f32],
        m: usize,
        k: usize,
        kind: ActivationKind,
    ) -> Self {
        Self::with_isa(Isa::best(), buffers, pool, x, m, k, kind)
    }

    /// [`Activations::new_in`] with a given instruction set, for tests.
    pub(super) fn with_isa(
        isa: Isa,
        buffers: ActivationBuffers,
        pool: &Pool,
        x: &'a [f32],
        m: usize,
        k: usize,
        kind: ActivationKind,
    ) -> Self {
        assert!(Isa::available().contains(&isa), "{} on this processor", isa.name());
        assert_eq!(Some(x.len()), m.checked_mul(k), "elements of x, [{m}, {k}]");
        let block = kind.block();
        assert_eq!(k % block, 0, "rows of {k} elements in blocks of {block}");
        let ActivationBuffers { rounded, pairs, codes, scales, sums, sub_sums } = buffers;
        let in_pairs = in_pairs(isa, kind);
        let mut made = Activations {
            kind,
            m,
            k,
            x: &[],
            in_pairs,
            rounded,
            pairs,
            codes,
            scales,
            sums,
            sub_sums,
        };
        match kind {
            ActivationKind::Float => made.x = x,
            ActivationKind::Brain => made.round(isa, pool, x),
            _ => made.fill(isa, pool, x),
        }
        made
    }

    /// The memory, for [`Activations::new_in`].
    pub fn into_buffers(self) -> ActivationBuffers {
        let Activations { rounded, pairs, codes, scales, sums, sub_sums, .. } = self;
        ActivationBuffers { rounded, pairs, codes, scales, sums, sub_sums }
    }

    /// Rows.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Elements per row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The form they are in.
    pub fn kind(&self) -> ActivationKind {
        self.kind
    }

    /// x of float weights, and how far apart its rows are.
    pub(super) fn floats(&self) -> (&[f32], usize) {
        match self.kind {
            ActivationKind::Brain => (self.rounded.as_flattened(), self.k.next_multiple_of(2)),
            _ => (self.x, self.k),
        }
    }

    fn round(&mut self, isa: Isa, pool: &Pool, x: &[f32]) {
        if self.in_pairs {
            round_rows(isa, pool, x, self.m, self.k, &mut self.pairs);
        } else {
            round_rows(isa, pool, x, self.m, self.k, &mut self.rounded);
        }
    }

    fn fill(&mut self, isa: Isa, pool: &Pool, x: &[f32]) {
        let (m, k, kind) = (self.m, self.k, self.kind);
        let block = kind.block();
        grow(&mut self.codes, m * k);
        grow(&mut self.scales, m * k / block);
        match kind {
            ActivationKind::Block32 => grow(&mut self.sums, m * k / 32),
            _ => grow(&mut self.sub_sums, m * k / 256 * SUB_SUMS),
        }
        let out = Targets {
            codes: Shared(self.codes.as_mut_ptr()),
            scales: Shared(self.scales.as_mut_ptr()),
            sums: Shared(self.sums.as_mut_ptr()),
            sub_sums: Shared(self.sub_sums.as_mut_ptr()),
        };
        // At least 16 Ki elements per task: less is not worth waking a thread. Where there are many
        // rows, so many that no two tasks write to one line.
        let few = (16384 / k.max(1)).max(1);
        let per_task = if m < 8 * LINE { few } else { few.next_multiple_of(LINE) };
        pool.run(m.div_ceil(per_task), &|task| {
            let rows = task * per_task..((task + 1) * per_task).min(m);
            // SAFETY: the processor has the instructions (`with_isa` asserts it), the targets have
            // m rows of k elements, a row belongs to one task.
            unsafe {
                match kind {
                    ActivationKind::Block32 => fill_rows::<32>(isa, x, m, rows, &out),
                    _ => fill_rows::<256>(isa, x, m, rows, &out),
                }
            }
        });
    }
}

/// Whether what is rounded to bf16 is wanted in pairs, and not as floats.
pub(super) fn in_pairs(isa: Isa, kind: ActivationKind) -> bool {
    isa == Isa::Avx512Bf16 && kind == ActivationKind::Brain
}

/// Rows whose scales are a line of the cache.
const LINE: usize = 16;

/// Makes room. What was longer stays so: cut off, it would be cleared anew by the next that is.
pub(super) fn grow<T: Clone + Default>(numbers: &mut Vec<T>, len: usize) {
    if numbers.len() < len {
        numbers.resize(len, T::default());
    }
}

/// The vectors of [`Activations`], shared by the tasks that fill them.
struct Targets {
    codes: Shared<i8>,
    scales: Shared<f32>,
    sums: Shared<i32>,
    sub_sums: Shared<i16>,
}

/// Blocks of 32 or of 256: a length that the compiler knows, so that no part is left over. Of 32
/// vectors of 256 bits make more than wider ones.
///
/// # Safety
/// The processor has the instructions, `out` points to arrays of the shapes of [`Activations`] for
/// the `m` rows of `x`, and nobody else uses what belongs to `rows`.
unsafe fn fill_rows<const BLOCK: usize>(
    isa: Isa,
    x: &[f32],
    m: usize,
    rows: Range<usize>,
    out: &Targets,
) {
    match isa {
        // SAFETY: passed on from the caller.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 if BLOCK > 32 => unsafe {
            x86::fill_rows_512::<BLOCK>(x, m, rows, out)
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 | Isa::Avx512Bf16 => unsafe {
            x86::fill_rows_256::<BLOCK>(x, m, rows, out);
        },
        // SAFETY: passed on from the caller.
        _ => unsafe { fill_rows_with::<BLOCK, false>(x, m, rows, out) },
    }
}

/// The same code with wider vectors: the results are those of the portable version, since every
/// operation is exact or rounds one element.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::{SUB_SUMS, Targets, fill_rows_with};

    /// # Safety
    /// As [`super::fill_rows`], on a processor with these instructions.
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
    pub unsafe fn fill_rows_512<const BLOCK: usize>(
        x: &[f32],
        m: usize,
        rows: Range<usize>,
        out: &Targets,
    ) {
        // SAFETY: passed on from the caller.
        unsafe { fill_rows_with::<BLOCK, true>(x, m, rows, out) }
    }

    /// # Safety
    /// As [`super::fill_rows`], on a processor with AVX2.
    #[target_feature(enable = "avx2")]
    pub unsafe fn fill_rows_256<const BLOCK: usize>(
        x: &[f32],
        m: usize,
        rows: Range<usize>,
        out: &Targets,
    ) {
        // SAFETY: passed on from the caller.
        unsafe { fill_rows_with::<BLOCK, true>(x, m, rows, out) }
    }

    /// [`super::sub_sums`]: sums of neighbours, of these, and so on. What a vector read here was
    /// written by one store: else it would wait for the cache.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn sub_sums(codes: &[i8; 256], sums: &mut [i16; SUB_SUMS]) {
        let mut by_16 = [_mm_setzero_si128(); 2];
        for (by_16, codes) in by_16.iter_mut().zip(codes.as_chunks::<128>().0) {
            let mut by_4 = [_mm_setzero_si128(); 4];
            for (by_4, codes) in by_4.iter_mut().zip(codes.as_chunks::<32>().0) {
                let (first, second) = codes.split_at(16);
                *by_4 = _mm_hadd_epi16(pairs(first), pairs(second));
            }
            let [a, b, c, d] = by_4;
            *by_16 = _mm_hadd_epi16(_mm_hadd_epi16(a, b), _mm_hadd_epi16(c, d));
        }
        let [first, second] = by_16;
        let parts = [first, second, _mm_hadd_epi16(first, second)];
        for (sums, part) in sums.as_chunks_mut::<8>().0.iter_mut().zip(parts) {
            // SAFETY: a part has eight numbers.
            unsafe { _mm_storeu_si128(sums.as_mut_ptr().cast(), part) };
        }
    }

    /// Sums of neighbours of 16 codes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn pairs(codes: &[i8]) -> __m128i {
        debug_assert_eq!(codes.len(), 16);
        // SAFETY: there are 16 codes.
        let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
        _mm_maddubs_epi16(_mm_set1_epi8(1), codes)
    }
}

/// `AVX2` says that the processor has it.
///
/// # Safety
/// As [`fill_rows`].
#[inline(always)]
unsafe fn fill_rows_with<const BLOCK: usize, const AVX2: bool>(
    x: &[f32],
    m: usize,
    rows: Range<usize>,
    out: &Targets,
) {
    let (x, blocks) = (x.as_chunks::<BLOCK>().0, x.len() / m / BLOCK);
    // A part of a row that is worth going to; what is written of several rows lies together.
    let strip = 256 / BLOCK;
    for first in (0..blocks).step_by(strip) {
        for row in rows.clone() {
            for i in first..blocks.min(first + strip) {
                // SAFETY: block `i` of row `row` lies within the arrays, by the caller's promise.
                unsafe { fill_block::<BLOCK, AVX2>(&x[row * blocks + i], i * m + row, out) };
            }
        }
    }
}

/// # Safety
/// As [`fill_rows_with`], of the block with number `at` in the arrays.
#[inline(always)]
unsafe fn fill_block<const BLOCK: usize, const AVX2: bool>(
    x: &[f32; BLOCK],
    at: usize,
    out: &Targets,
) {
    // SAFETY: the block is ours, by the caller's promise.
    let codes = unsafe { &mut *out.codes.at(at * BLOCK).cast::<[i8; BLOCK]>() };
    let (scale, sum) = quantize_block(x, codes);
    // SAFETY: as above.
    unsafe { *out.scales.at(at) = scale };
    let Some(codes) = codes.first_chunk::<256>() else {
        // SAFETY: as above.
        return unsafe { *out.sums.at(at) = sum };
    };
    // SAFETY: as above.
    let sums = unsafe { &mut *out.sub_sums.at(at * SUB_SUMS).cast::<[i16; SUB_SUMS]>() };
    #[cfg(target_arch = "x86_64")]
    if AVX2 {
        // SAFETY: the processor has it, as the caller says.
        return unsafe { x86::sub_sums(codes, sums) };
    }
    sub_sums(codes, sums);
}

/// Sums over sixteen 16s, then over eight 32s.
#[inline(always)]
fn sub_sums(codes: &[i8; 256], sums: &mut [i16; SUB_SUMS]) {
    let (by_16, by_32) = sums.split_at_mut(16);
    let pairs = by_16.as_chunks_mut::<2>().0.iter_mut().zip(by_32);
    for ((pair, both), codes) in pairs.zip(codes.as_chunks::<32>().0) {
        let sum = |codes: &[i8]| codes.iter().map(|&q| i16::from(q)).sum::<i16>();
        let (first, second) = (sum(&codes[..16]), sum(&codes[16..]));
        (*pair, *both) = ([first, second], first + second);
    }
}

/// Codes of one block; its scale, and their sum.
#[inline(always)]
fn quantize_block<const N: usize>(x: &[f32; N], codes: &mut [i8; N]) -> (f32, i32) {
    // As integers, magnitudes order like the numbers, with infinity and NaN on top.
    let peak = x.iter().fold(0, |peak, x| (x.to_bits() & 0x7fff_ffff).max(peak));
    let peak = f32::from_bits(peak);
    if !peak.is_finite() {
        codes.fill(0);
        return (f32::NAN, 0);
    }
    if peak < 1e-30 {
        codes.fill(0);
        return (0.0, 0);
    }
    let (inverse, mut sum) = (127.0 / peak, 0);
    for (code, x) in codes.iter_mut().zip(x) {
        // |x * inverse| <= 127 and a bit: the largest f32 below 127.5 is far, so it rounds to 127.
        // SAFETY: the product is finite and within the range of i32.
        let q = unsafe { (x * inverse).round_ties_even().to_int_unchecked::<i32>() };
        *code = q as i8;
        sum += q;
    }
    (peak / 127.0, sum)
}
