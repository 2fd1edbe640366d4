//! Architectures and weights.
pub mod weights;
