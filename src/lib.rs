//! Hearth.
pub mod text;
