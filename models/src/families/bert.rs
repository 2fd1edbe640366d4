//! BERT and what kept the shape (MiniLM, E5, BGE, GTE of the first generation).
//!
//! Devlin et al. 2018.

use super::EncoderFamily;

pub(super) const FAMILY: EncoderFamily = EncoderFamily {
    name: "bert",
    model_types: &["bert"],
    gguf_architectures: &["bert"],
    prefix: "bert.",
};
