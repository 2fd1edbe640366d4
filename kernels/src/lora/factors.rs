//! A and B of one projection, in the order in which they are read.

use half::{bf16, f16};

use crate::LANES;
use crate::buffer::HugeBuf;
use crate::simd::Simd;

/// Columns of a tile of B.
pub(super) const COLUMNS: usize = 64;

/// How the numbers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// 32 bits.
    F32,
    /// 16 bits, 11 of them digits.
    F16,
    /// 16 bits, 8 of them digits.
    BF16,
}

/// A `[rank, k]` and B `[n, rank]` of the update `B A` of a matrix `[n, k]`.
///
/// A is kept in rows of `k`, or, where it is looked up by id, in rows of `rank`. B is kept in tiles
/// of 64 columns, so that it is read from end to end:
///
/// ```text
/// (n / 64, rank, 64), zeros beyond n
/// ```
#[derive(Debug)]
pub struct Factors {
    rank: usize,
    k: usize,
    n: usize,
    table: bool,
    a: Elements,
    b: Elements,
}

#[derive(Debug)]
pub(super) enum Elements {
    F32(HugeBuf<f32>),
    F16(HugeBuf<f16>),
    BF16(HugeBuf<bf16>),
}

impl Factors {
    /// Of `a` `[rank, k]` and `b` `[n, rank]`, row by row.
    ///
    /// # Panics
    /// If the slices are not of one rank.
    pub fn new(float: Float, [n, k, rank]: [usize; 3], a: &[f32], b: &[f32]) -> Self {
        assert_eq!(Some(a.len()), rank.checked_mul(k), "a is [rank, k]");
        let a = Elements::filled(float, a.len(), |i| a[i]);
        Self { rank, k, n, table: false, a, b: tiled(float, n, rank, b) }
    }

    /// The same for updates of rows of a table: `k` ids.
    ///
    /// # Panics
    /// As [`Factors::new`].
    pub fn of_table(float: Float, [n, k, rank]: [usize; 3], a: &[f32], b: &[f32]) -> Self {
        assert_eq!(Some(a.len()), rank.checked_mul(k), "a is [rank, k]");
        let a = Elements::filled(float, a.len(), |i| a[i % rank * k + i / rank]);
        Self { rank, k, n, table: true, a, b: tiled(float, n, rank, b) }
    }

    /// Rows of A.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Inputs, or ids.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs are ids.
    pub fn is_table(&self) -> bool {
        self.table
    }

    /// How the numbers are kept.
    pub fn float(&self) -> Float {
        match self.a {
            Elements::F32(_) => Float::F32,
            Elements::F16(_) => Float::F16,
            Elements::BF16(_) => Float::BF16,
        }
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }

    /// A as it came. `[rank, k]`
    pub fn to_a(&self) -> Vec<f32> {
        let place = |i: usize| match self.table {
            true => i % self.k * self.rank + i / self.k,
            false => i,
        };
        (0..self.rank * self.k).map(|i| self.a.get(place(i))).collect()
    }

    /// B as it came. `[n, rank]`
    pub fn to_b(&self) -> Vec<f32> {
        let get = |i: usize| self.b.get(place(self.rank, i / self.rank, i % self.rank));
        (0..self.n * self.rank).map(get).collect()
    }

    pub(super) fn looked_up(&self, id: u32, rank: usize) -> f32 {
        self.a.get(id as usize * self.rank + rank)
    }

    pub(super) fn a(&self) -> &Elements {
        &self.a
    }

    pub(super) fn b(&self) -> &Elements {
        &self.b
    }
}

/// Where the tiles of B have an element.
fn place(rank: usize, column: usize, r: usize) -> usize {
    (column / COLUMNS * rank + r) * COLUMNS + column % COLUMNS
}

fn tiled(float: Float, n: usize, rank: usize, b: &[f32]) -> Elements {
    assert_eq!(Some(b.len()), n.checked_mul(rank), "b is [n, rank]");
    let value = |i: usize| {
        let (tile, r, column) = (i / COLUMNS / rank, i / COLUMNS % rank, i % COLUMNS);
        b.get((tile * COLUMNS + column) * rank + r).copied().unwrap_or(0.0)
    };
    Elements::filled(float, n.div_ceil(COLUMNS) * rank * COLUMNS, value)
}

impl Elements {
    fn filled(float: Float, len: usize, value: impl Fn(usize) -> f32) -> Self {
        macro_rules! fill {
            ($variant:ident, $from:expr) => {{
                let mut buffer = HugeBuf::zeroed(len);
                for (i, out) in buffer.iter_mut().enumerate() {
                    *out = $from(value(i));
                }
                Self::$variant(buffer)
            }};
        }
        match float {
            Float::F32 => fill!(F32, std::convert::identity),
            Float::F16 => fill!(F16, f16::from_f32),
            Float::BF16 => fill!(BF16, bf16::from_f32),
        }
    }

    fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(x) => x[i],
            Self::F16(x) => x[i].to_f32(),
            Self::BF16(x) => x[i].to_f32(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(x) => size_of_val(&x[..]),
            Self::F16(x) => size_of_val(&x[..]),
            Self::BF16(x) => size_of_val(&x[..]),
        }
    }
}

/// An element that widens to f32 without rounding.
pub(super) trait Element: Copy {
    const ZERO: Self;
    fn load<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V;
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V {
        simd.load(x)
    }
}

impl Element for f16 {
    const ZERO: Self = f16::ZERO;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V {
        simd.load_f16(x)
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V {
        simd.load_bf16(x)
    }
}
