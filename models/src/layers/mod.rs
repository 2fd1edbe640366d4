//! The parts of a model, each written once for both backends.

pub mod attention;
pub mod experts;
pub mod linear;
pub mod mlp;
pub mod rotary;
