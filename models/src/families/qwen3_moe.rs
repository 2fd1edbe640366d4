//! Qwen3 with experts: the attention of Qwen3, and in every layer an MLP of which each row uses a
//! few of many.
//!
//! Yang et al. 2025.

use super::{Family, qwen3};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    gguf_architectures: &["qwen3moe"],
    experts: true,
    ..qwen3::FAMILY
};
