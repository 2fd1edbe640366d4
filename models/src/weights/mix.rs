//! Which type each matrix of a quantised model gets: the mixes that GGUF file names know.
//!
//! A mix is a base type with more bits where an error costs most: the output, and in the `_m` mixes
//! the values of attention and the way out of the MLP in a part of the layers (the first eighth,
//! the last, and every third between). Vectors always stay f32. A row that is not whole blocks of
//! its type falls back to a near type with smaller ones.

use super::{DType, Role};
use crate::config::ModelConfig;

/// A named mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    name: &'static str,
    /// `general.file_type` of a GGUF file.
    file_type: u32,
    base: DType,
}

const MIXES: [Mix; 17] = [
    Mix { name: "f32", file_type: 0, base: DType::F32 },
    Mix { name: "f16", file_type: 1, base: DType::F16 },
    Mix { name: "bf16", file_type: 32, base: DType::BF16 },
    Mix { name: "q8_0", file_type: 7, base: DType::Q8_0 },
    Mix { name: "q4_0", file_type: 2, base: DType::Q4_0 },
    Mix { name: "q4_1", file_type: 3, base: DType::Q4_1 },
    Mix { name: "q5_0", file_type: 8, base: DType::Q5_0 },
    Mix { name: "q5_1", file_type: 9, base: DType::Q5_1 },
    Mix { name: "iq4_nl", file_type: 25, base: DType::IQ4NL },
    Mix { name: "q2_k", file_type: 10, base: DType::Q2K },
    Mix { name: "q3_k_s", file_type: 11, base: DType::Q3K },
    Mix { name: "q3_k_m", file_type: 12, base: DType::Q3K },
    Mix { name: "q4_k_s", file_type: 14, base: DType::Q4K },
    Mix { name: "q4_k_m", file_type: 15, base: DType::Q4K },
    Mix { name: "q5_k_s", file_type: 16, base: DType::Q5K },
    Mix { name: "q5_k_m", file_type: 17, base: DType::Q5K },
    Mix { name: "q6_k", file_type: 18, base: DType::Q6K },
];

impl Mix {
    /// The mix of this name, in any case.
    pub fn named(name: &str) -> Option<Self> {
        MIXES.into_iter().find(|mix| mix.name.eq_ignore_ascii_case(name))
    }

    /// The mix that a GGUF file with this `general.file_type` was written in.
    pub fn of_file_type(number: u32) -> Option<Self> {
        MIXES.into_iter().find(|mix| mix.file_type == number)
    }

    /// All names, for help and errors.
    pub fn names() -> String {
        MIXES.map(|mix| mix.name).join(", ")
    }

    /// Its name, in lower case.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The number that stands for it in a GGUF file.
    pub fn file_type(&self) -> u32 {
        self.file_type
    }

    /// The type of a tensor.
    pub fn dtype(&self, role: Role, config: &ModelConfig) -> DType {
        match role.shape(config)[..] {
            // A row goes elsewhere by the last digits of its scores, and it is small.
            _ if matches!(role, Role::Router(_)) => DType::F32,
            [_, k] => whole_blocks(self.wanted(role, config), k),
            _ => DType::F32,
        }
    }

    /// The type of a tensor whose rows are as long as any block.
    fn wanted(&self, role: Role, config: &ModelConfig) -> DType {
        use Role::{Down, Embedding, ExpertDown, Head, Out, V};
        let role = if let ExpertDown(l, _) = role { Down(l) } else { role };
        let n = config.layer_count;
        let important = |l: usize| l < n / 8 || l >= 7 * n / 8 || (l - n / 8) % 3 == 2;
        let quantised = self.base.block_len() > 1 && self.base != DType::Q8_0;
        match (self.name, role) {
            (_, Head) if quantised => DType::Q6K,
            (_, Embedding) if quantised && config.tied => DType::Q6K,
            ("q4_k_m" | "q5_k_m", V(l) | Down(l)) if important(l) => DType::Q6K,
            ("q4_k_s", V(l)) if l < 4 => DType::Q5K,
            ("q4_k_s", Down(l)) if l < n / 8 => DType::Q5K,
            ("q3_k_m", V(l)) if l < 2 => DType::Q5K,
            ("q3_k_m", Down(l)) if l < n / 16 => DType::Q5K,
            ("q3_k_m", Down(l)) if !important(l) => DType::Q3K,
            ("q3_k_m", V(_) | Down(_) | Out(_)) => DType::Q4K,
            ("q2_k", V(_)) if config.head_count >= 4 * config.kv_head_count => DType::Q4K,
            ("q2_k", V(_) | Down(_) | Out(_)) => DType::Q3K,
            _ => self.base,
        }
    }
}

/// `dtype`, or the nearest type whose blocks rows of `k` fill.
fn whole_blocks(dtype: DType, k: usize) -> DType {
    let smaller = match dtype {
        _ if dtype.row_bytes(k).is_some() => return dtype,
        DType::Q2K | DType::Q3K => DType::IQ4NL,
        DType::Q4K => DType::Q5_0,
        DType::Q5K => DType::Q5_1,
        DType::Q6K => DType::Q8_0,
        _ => DType::F16,
    };
    whole_blocks(smaller, k)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The Q4_K_M file of a model with 28 layers, as others write it.
    #[test]
    fn important_layers_are_the_known_ones() {
        let config = ModelConfig { layer_count: 28, ..crate::tiny::config() };
        let mix = Mix::named("Q4_K_M").unwrap();
        let down = (0..28).filter(|&l| mix.wanted(Role::Down(l), &config) == DType::Q6K);
        assert!(down.eq([0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]));
        assert_eq!(mix.wanted(Role::Gate(0), &config), DType::Q4K);
        assert_eq!(mix.wanted(Role::V(2), &config), DType::Q6K);
        assert_eq!(mix.wanted(Role::Head, &config), DType::Q6K);
    }

    #[test]
    fn rows_that_are_not_whole_blocks_fall_back() {
        for (wanted, k, got) in [
            (DType::Q4K, 512, DType::Q4K),
            (DType::Q4K, 576, DType::Q5_0),
            (DType::Q6K, 896, DType::Q8_0),
            (DType::Q2K, 960, DType::IQ4NL),
            (DType::Q4K, 172, DType::F16),
            (DType::Q8_0, 172, DType::F16),
            (DType::BF16, 172, DType::BF16),
        ] {
            assert_eq!(whole_blocks(wanted, k), got, "{wanted} {k}");
        }
    }

    #[test]
    fn names_are_known_and_numbers_differ() {
        assert_eq!(Mix::named("q9"), None);
        let mut numbers = MIXES.map(|mix| mix.file_type);
        numbers.sort_unstable();
        assert!(numbers.windows(2).all(|two| two[0] < two[1]));
    }
}
