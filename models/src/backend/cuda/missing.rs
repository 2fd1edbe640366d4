//! What is computed on the CPU only: a model that needs it is refused before it is loaded.

use crate::backend::Gate;
use crate::config::ModelConfig;
use crate::{Error, Result};

/// Refuses a gate with GELU, embeddings that are multiplied, soft bounds, and a rotation of layers
/// with a window: the families of Gemma.
pub(crate) fn check(config: &ModelConfig) -> Result<()> {
    let knobs = &config.knobs;
    let bounds = knobs.attention_softcap.is_some() || knobs.logit_softcap.is_some();
    let gemma = knobs.embedding_scale.is_some() || knobs.gate != Gate::Silu;
    match bounds || gemma || config.local_rope.is_some() {
        true => Err(error(config.family)),
        false => Ok(()),
    }
}

pub(super) fn error(what: &str) -> Error {
    Error::Device(format!("{what} is not computed on a GPU yet; choose --device cpu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gemma_is_refused_by_name() {
        let config = r#"{"model_type": "gemma2", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 128,
            "max_position_embeddings": 256}"#;
        let told = check(&ModelConfig::from_json(config).unwrap()).unwrap_err().to_string();
        assert!(told.contains("gemma2") && told.contains("--device cpu"), "{told}");
        assert!(check(&crate::tiny::config()).is_ok());
    }
}
