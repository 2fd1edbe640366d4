//! Adapters as GGUF: `general.type` is `adapter`, and every update is `NAME.lora_a` and
//! `NAME.lora_b`, NAME being that of the base's tensor.
//!
//! The files of Hugging Face adapters that llama.cpp converts. A is `[rank, k]`, but of the
//! embedding `[vocab, rank]`; rows of Q and K are in the order of the base's GGUF file. One alpha
//! holds for all; 0 means that `B A` is not scaled.

use std::collections::BTreeMap;

use super::{Planned, Scale, targets};
use crate::config::ModelConfig;
use crate::families;
use crate::weights::{Metadata, Role, Weights};
use crate::{Error, Result};

const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";

pub(super) fn plan(weights: &Weights, config: &ModelConfig) -> Result<Vec<Planned>> {
    let meta = weights.metadata().expect("a GGUF file has metadata; this is a bug");
    let is = |key: &str, wanted: &str| match word(meta, key)? {
        found if found == wanted => Ok(()),
        found => Err(Error::config(key, format!("is `{found}`; an adapter says `{wanted}`"))),
    };
    is("general.type", "adapter")?;
    is("adapter.type", "lora")?;
    let family = families::by_name(config.family);
    // Mistral is a Llama there.
    let arch = family.and_then(|f| f.gguf_architectures.first()).copied().unwrap_or("llama");
    let found = word(meta, "general.architecture")?;
    if found != arch {
        let what = format!("is `{found}`, the adapter's; the model is a `{arch}`");
        return Err(Error::config("general.architecture", what));
    }
    if meta.has(INVOCATION) {
        let what = "is not supported: the adapter begins to act in the middle of a prompt";
        return Err(Error::config(INVOCATION, what));
    }
    let alpha = meta.get_opt::<f32>(ALPHA)?.unwrap_or(0.0);
    if !alpha.is_finite() {
        return Err(Error::config(ALPHA, "is not finite"));
    }
    pairs(weights, config, alpha)
}

fn word<'a>(meta: &'a Metadata, key: &str) -> Result<&'a str> {
    Ok(meta.get_opt::<&str>(key)?.unwrap_or(""))
}

fn pairs(weights: &Weights, config: &ModelConfig, alpha: f32) -> Result<Vec<Planned>> {
    let known: BTreeMap<String, Role> =
        targets(config).into_iter().map(|role| (role.name(true, "weight"), role)).collect();
    let mut plan: Vec<Planned> = Vec::new();
    for name in weights.names() {
        let refused = |what: &str| Error::Tensor { name: name.to_owned(), what: what.to_owned() };
        let Some((stem, side)) = name.rsplit_once('.') else {
            return Err(refused("is no part of a LoRA adapter"));
        };
        let other = match side {
            "lora_a" => format!("{stem}.lora_b"),
            "lora_b" => format!("{stem}.lora_a"),
            _ => return Err(refused("is no part of a LoRA adapter, or a whole module")),
        };
        let Some(&role) = known.get(stem) else {
            return Err(refused(match stem.contains("_exps") || stem.contains("_shexp") {
                true => "updates experts, which is not supported",
                false => "has no place in this architecture",
            }));
        };
        if !weights.has(&other) {
            return Err(refused(&format!("has no `{other}` beside it")));
        }
        if side == "lora_a" {
            plan.push(Planned {
                role,
                a: name.to_owned(),
                a_is_turned: role == Role::Embedding,
                b: other,
                magnitude: None,
                scale: Scale::Alpha(alpha),
            });
        }
    }
    match plan.is_empty() {
        true => Err(Error::config("adapter", "has no tensors")),
        false => Ok(plan),
    }
}
