//! Philox4x32-10, a generator without state: random numbers as a function of a key and a counter.
//!
//! J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as 1, 2,
//! 3", SC11.

/// A number in [0, 1) with 53 random bits, for this position of a sequence with this seed.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let counter = [position as u32, (position >> 32) as u32, 0, 0];
    let [low, high, ..] = philox4x32_10(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(high) << 32 | u64::from(low);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Ten rounds of Philox on four words.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    let (mut x, mut key) = (counter, key);
    for _ in 0..10 {
        let a = u64::from(x[0]) * u64::from(MULTIPLIERS[0]);
        let b = u64::from(x[2]) * u64::from(MULTIPLIERS[1]);
        let high = |product: u64| (product >> 32) as u32;
        x = [high(b) ^ x[1] ^ key[0], b as u32, high(a) ^ x[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_known_answers() {
        let zero = philox4x32_10([0; 4], [0; 2]);
        assert_eq!(zero, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox4x32_10([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox4x32_10(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
        );
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn uniform_is_uniform_and_repeats() {
        let draws: Vec<f64> = (0..20_000).map(|position| uniform(42, position)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        for tenth in 0..10 {
            let count = draws.iter().filter(|u| (**u * 10.0) as usize == tenth).count();
            assert!((1850..2150).contains(&count), "{count} draws in tenth {tenth}");
        }
        assert_eq!(uniform(42, 7), draws[7]);
        assert_ne!(uniform(43, 7), draws[7]);
    }
}
