//! The model that the binary carries, so that the first start needs no file and no network.
//!
//! `models/builtin/MODEL_CARD.md` says what it is. Without the feature `builtin-model` the binary
//! is smaller and there is none.

use hearth_models::ModelFile;

/// The id it is served under, and its name for `--model`.
pub const NAME: &str = "hearth-tiny";

/// Told to whoever serves it.
pub const NOTICE: &str = "a demonstration model, for a first look and not for work; \
    load a real one with\n  \
    --model path/to/model.gguf      a GGUF file\n  \
    --model path/to/folder          config.json, tokenizer.json and *.safetensors\n  \
    --model org/name:Q4_K_M         from the Hugging Face hub";

#[cfg(feature = "builtin-model")]
const FILE: Option<&[u8]> = Some(include_bytes!("../../models/builtin/hearth-tiny.gguf"));
#[cfg(not(feature = "builtin-model"))]
const FILE: Option<&[u8]> = None;

/// The file itself.
pub fn bytes() -> Option<&'static [u8]> {
    FILE
}

/// Opens it. `None` where this build carries none.
pub fn open() -> Option<hearth_models::Result<ModelFile>> {
    FILE.map(|bytes| hearth_models::open_bytes(NAME, bytes))
}
