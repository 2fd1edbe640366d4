//! A configuration in the words of GGUF, or why it cannot be said in them.

use crate::config::{ModelConfig, RawConfig, RopeConfig, RopeScaling, yarn_temperature};
use crate::families;
use crate::weights::Value;
use crate::{Error, Result};

pub(super) fn family(config: &ModelConfig) -> Result<&'static families::Family> {
    let unknown = || Error::config("family", format!("`{}` has no name in GGUF", config.family));
    families::by_name(config.family).ok_or_else(unknown)
}

/// A configuration in the words of GGUF.
pub(super) fn entries(config: &ModelConfig) -> Result<Vec<(String, Value<'static>)>> {
    // Mistral is a Llama there.
    let arch = family(config)?.gguf_architectures.first().copied().unwrap_or("llama");
    let key = |name: &str| format!("{arch}.{name}");
    let count = |n: usize| Value::U32(n as u32); // every length was checked to be below 2^32
    let float = |x: f64| Value::F32(x as f32);
    let mut all = vec![
        ("general.architecture".to_owned(), Value::Str(arch)),
        (key("block_count"), count(config.layer_count)),
        (key("context_length"), count(config.context_len)),
        (key("embedding_length"), count(config.hidden_len)),
        (key("feed_forward_length"), count(config.ffn_len)),
        (key("attention.head_count"), count(config.head_count)),
        (key("attention.head_count_kv"), count(config.kv_head_count)),
        (key("attention.key_length"), count(config.head_dim)),
        (key("attention.value_length"), count(config.head_dim)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(config.norm_eps)),
        (key("rope.dimension_count"), count(config.rope.dim)),
        (key("rope.freq_base"), float(config.rope.base)),
        (key("vocab_size"), count(config.vocab_len)),
    ];
    all.extend(of_layers(config, arch)?);
    match &config.rope.scaling {
        // Llama 3 stands in a tensor.
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_) => {}
        RopeScaling::Linear { factor } => {
            all.push((key("rope.scaling.type"), Value::Str("linear")));
            all.push((key("rope.scaling.factor"), float(*factor)));
        }
        &RopeScaling::Yarn { truncate, .. } if truncate != family(config)?.gguf_yarn_truncates => {
            let what = format!("`truncate: {truncate}` has no word in GGUF");
            return Err(Error::config("rope_scaling", what));
        }
        &RopeScaling::Yarn {
            factor,
            original_context_len,
            beta_fast,
            beta_slow,
            attention_factor,
            ..
        } => {
            all.push((key("rope.scaling.type"), Value::Str("yarn")));
            all.push((key("rope.scaling.factor"), float(factor)));
            let original = count(original_context_len as usize);
            all.push((key("rope.scaling.original_context_length"), original));
            all.push((key("rope.scaling.yarn_beta_fast"), float(beta_fast)));
            all.push((key("rope.scaling.yarn_beta_slow"), float(beta_slow)));
            if let Some(attention) = attention_factor {
                let factor = attention / yarn_temperature(factor, 1.0);
                all.push((key("rope.scaling.attn_factor"), float(factor)));
            }
        }
    }
    Ok(all)
}

/// Windows, bounds and what else a family says of its layers, if whoever reads the file will see
/// the same.
fn of_layers(config: &ModelConfig, arch: &str) -> Result<Vec<(String, Value<'static>)>> {
    let (knobs, window) = (&config.knobs, config.windows.iter().copied().flatten().next());
    let number = |x: Option<f32>| x.map(f64::from);
    let raw = RawConfig {
        hidden_size: Some(config.hidden_len),
        num_hidden_layers: Some(config.layer_count),
        num_attention_heads: Some(config.head_count),
        head_dim: Some(config.head_dim),
        sliding_window: Some(window),
        attn_logit_softcapping: number(knobs.attention_softcap).map(Some),
        final_logit_softcapping: number(knobs.logit_softcap).map(Some),
        gguf_rope: Some(config.rope.clone()),
        ..RawConfig::default()
    };
    let reader = families::by_gguf_architecture(arch).unwrap_or(family(config)?);
    if (reader.windows)(&raw, config.layer_count)? != config.windows {
        let what = "cannot be written to GGUF for this family or these layers";
        return Err(Error::config("sliding_window", what));
    }
    let read = (reader.knobs)(&raw);
    for (key, differs) in [
        (
            "query_pre_attn_scalar",
            read.query_scale(config.head_dim) != knobs.query_scale(config.head_dim),
        ),
        ("attn_logit_softcapping", read.attention_softcap != knobs.attention_softcap),
        ("final_logit_softcapping", read.logit_softcap != knobs.logit_softcap),
    ] {
        if differs {
            return Err(Error::config(key, "cannot be written to GGUF for this family"));
        }
    }
    let key = |name: &str| format!("{arch}.{name}");
    let mut experts = Vec::new();
    if let Some(routing) = config.experts {
        if !routing.normalized {
            let what = "false has no word in GGUF: readers add weights up to one";
            return Err(Error::config("norm_topk_prob", what));
        }
        for (name, count) in [
            ("expert_count", routing.count),
            ("expert_used_count", routing.used),
            ("expert_feed_forward_length", config.ffn_len),
        ] {
            experts.push((key(name), Value::U32(count as u32)));
        }
    }
    let window = window.map(|n| (key("attention.sliding_window"), Value::U32(n as u32)));
    let cap = |name, cap: Option<f32>| cap.map(|cap| (key(name), Value::F32(cap)));
    let caps = [
        cap("attn_logit_softcapping", knobs.attention_softcap),
        cap("final_logit_softcapping", knobs.logit_softcap),
    ];
    let local = match &config.local_rope {
        None => None,
        Some(RopeConfig { base, dim, scaling: RopeScaling::None }) if *dim == config.rope.dim => {
            Some((key("rope.freq_base_swa"), Value::F32(*base as f32)))
        }
        Some(_) => {
            let what = "of layers with a window cannot be written to GGUF";
            return Err(Error::config("rope_parameters", what));
        }
    };
    Ok(experts.into_iter().chain(window).chain(caps.into_iter().flatten()).chain(local).collect())
}
