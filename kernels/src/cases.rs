//! Awkward shapes and reproducible numbers, shared by tests and benches.
//!
//! Deliberately absent: anything that the runtime calls.

/// Lengths of rows and vectors: nothing, one, tails of every vector width, real model sizes.
pub const LENGTHS: &[usize] =
    &[0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 172, 255, 896, 1000, 4096, 4864];

/// Row counts: none, one, odd, more than a tile.
pub const ROWS: &[usize] = &[0, 1, 2, 3, 5, 33];

/// Head sizes of real models, and the smallest one allowed.
pub const HEAD_DIMS: &[usize] = &[8, 16, 64, 80, 96, 128, 256];

/// Numbers in [-1, 1) that depend on the seed alone.
pub fn randoms(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// The largest difference between two equally long slices; infinite when one has a NaN that the
/// other has not.
pub fn max_abs_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "slices of different length");
    let diff = |(x, y): (&f32, &f32)| match (x.is_nan(), y.is_nan()) {
        (true, true) => 0.0,
        (false, false) if x == y => 0.0,
        (false, false) => (x - y).abs(),
        _ => f32::INFINITY,
    };
    a.iter().zip(b).map(diff).fold(0.0, f32::max)
}

/// Panics with the first difference unless the slices are equal bit by bit.
pub fn assert_same_bits(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}: slices of different length");
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!(x.to_bits() == y.to_bits(), "{what}: element {i} is {x:e} and {y:e}");
    }
}
