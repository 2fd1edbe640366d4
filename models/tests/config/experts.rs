//! What files say of experts, and of the families that have them.

use hearth_models::backend::Routing;
use hearth_models::config::{ModelConfig, RopeScaling};
use serde_json::{Value, json};

use super::{GgufValue, assert_refused, gguf_config, json_config};

/// A small Qwen3 with experts.
fn experts(mut changes: Value) -> hearth_models::Result<ModelConfig> {
    let given = json!({
        "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [],
    });
    for (key, value) in given.as_object().unwrap() {
        if changes.get(key).is_none() {
            changes[key] = value.clone();
        }
    }
    json_config(changes)
}

#[test]
fn experts_of_json_and_gguf() {
    let read = experts(json!({"norm_topk_prob": true})).unwrap();
    assert_eq!((read.family, read.ffn_len), ("qwen3_moe", 48));
    assert_eq!(read.experts, Some(Routing { count: 8, used: 2, normalized: true }));
    assert!(read.knobs.qk_norm);
    let silent = experts(json!({})).unwrap().experts.unwrap();
    assert!(!silent.normalized, "as transformers has it");
    let newer = experts(json!({"num_experts": null, "num_local_experts": 6})).unwrap();
    assert_eq!(newer.experts.unwrap().count, 6);
    assert_eq!(json_config(json!({})).unwrap().experts, None);
    let window = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 30});
    assert_eq!(experts(window).unwrap().windows, vec![Some(9); 32], "in every layer");
    assert_eq!(experts(json!({"sliding_window": 9})).unwrap().windows, vec![None; 32]);
    for (changes, words) in [
        (json!({"num_experts": null}), ["num_experts", "missing"]),
        (json!({"num_experts": 0}), ["num_experts", "0"]),
        (json!({"num_experts": 100_000}), ["num_experts", "absurd"]),
        (json!({"num_experts": 4000, "num_hidden_layers": 100}), ["num_experts", "absurd"]),
        (json!({"num_experts_per_tok": 9}), ["num_experts_per_tok", "8 experts"]),
        (json!({"moe_intermediate_size": null}), ["moe_intermediate_size", "missing"]),
        (json!({"decoder_sparse_step": 2}), ["decoder_sparse_step", "without experts"]),
        (json!({"mlp_only_layers": [3]}), ["mlp_only_layers", "without experts"]),
    ] {
        assert_refused(experts(changes), &words);
    }

    let of_gguf = |more: &[(&str, GgufValue<'_>)]| {
        let keys = [
            ("general.architecture", GgufValue::Str("qwen3moe")),
            ("qwen3moe.block_count", GgufValue::U32(2)),
            ("qwen3moe.context_length", GgufValue::U32(256)),
            ("qwen3moe.embedding_length", GgufValue::U32(64)),
            ("qwen3moe.attention.head_count", GgufValue::U32(4)),
            ("qwen3moe.expert_count", GgufValue::U32(8)),
            ("qwen3moe.expert_used_count", GgufValue::U32(3)),
            ("qwen3moe.expert_feed_forward_length", GgufValue::U32(40)),
        ];
        gguf_config(&[&keys[..], more].concat())
    };
    let read = of_gguf(&[]).unwrap();
    assert_eq!((read.family, read.ffn_len), ("qwen3_moe", 40));
    assert_eq!(read.experts, Some(Routing { count: 8, used: 3, normalized: true }));
    let shared = [("qwen3moe.expert_shared_count", GgufValue::U32(1))];
    assert_refused(of_gguf(&shared), &["expert_shared_count", "not supported"]);
    let sigmoid = [("qwen3moe.expert_gating_func", GgufValue::U32(2))];
    assert_refused(of_gguf(&sigmoid), &["expert_gating_func", "not supported"]);
    let scaled = [("qwen3moe.expert_weights_scale", GgufValue::F32(2.5))];
    assert_refused(of_gguf(&scaled), &["expert_weights_scale", "not supported"]);
    let none = [("qwen3moe.expert_weights_scale", GgufValue::F32(1.0))];
    of_gguf(&none).unwrap();
    let said = [("qwen3moe.expert_weights_norm", GgufValue::Bool(false))];
    assert!(!of_gguf(&said).unwrap().experts.unwrap().normalized);
}

/// A small gpt-oss.
fn oss(changes: Value) -> hearth_models::Result<ModelConfig> {
    let mut config = json!({
        "model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3, "rope_theta": 150_000.0, "hidden_act": "silu",
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": false, "original_max_position_embeddings": 4096,
        },
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    json_config(config)
}

#[test]
fn gpt_oss_of_json_and_gguf() {
    let read = oss(json!({})).unwrap();
    assert_eq!((read.family, read.ffn_len, read.head_dim), ("gpt_oss", 96, 64));
    assert_eq!(read.experts, Some(Routing { count: 8, used: 4, normalized: true }));
    assert_eq!(read.windows, [Some(128), None, Some(128)]);
    assert!(read.knobs.sinks && read.knobs.mlp_bias && read.knobs.qkv_bias);
    let kinds = json!(["full_attention", "sliding_attention", "full_attention"]);
    let other = oss(json!({"layer_types": kinds, "sliding_window": 9})).unwrap();
    assert_eq!(other.windows, [None, Some(9), None]);
    assert!(!oss(json!({"attention_bias": false})).unwrap().knobs.qkv_bias);
    oss(json!({"swiglu_limit": 7.0, "swiglu_alpha": 1.702})).unwrap();
    oss(json!({"quantization_config": {"quant_method": "mxfp4"}})).unwrap();
    for (changes, words) in [
        (json!({"swiglu_limit": 8.0}), ["swiglu_limit", "7"]),
        (json!({"swiglu_alpha": 1.0}), ["swiglu_alpha", "1.702"]),
        (json!({"hidden_act": "gelu"}), ["hidden_act", "gelu"]),
        (json!({"rope_scaling": null}), ["rope_scaling", "missing"]),
        (json!({"rope_theta": null}), ["rope_theta", "missing"]),
        (json!({"layer_types": ["full_attention"]}), ["layer_types", "3 layers"]),
        (json!({"intermediate_size": null}), ["intermediate_size", "missing"]),
        (json!({"quantization_config": {"quant_method": "gptq"}}), ["quantization", "gptq"]),
        (json!({"sliding_window": null}), ["sliding_window", "missing"]),
        (json!({"num_local_experts": 0}), ["num_local_experts", "0"]),
    ] {
        assert_refused(oss(changes), &words);
    }
    let qwen = json!({"quantization_config": {"quant_method": "mxfp4"}});
    assert_refused(experts(qwen), &["quantization_config", "mxfp4"]);

    let of_gguf = |more: &[(&str, GgufValue<'_>)]| {
        let keys = [
            ("general.architecture", GgufValue::Str("gpt-oss")),
            ("gpt-oss.block_count", GgufValue::U32(4)),
            ("gpt-oss.context_length", GgufValue::U32(256)),
            ("gpt-oss.embedding_length", GgufValue::U32(64)),
            ("gpt-oss.attention.head_count", GgufValue::U32(4)),
            ("gpt-oss.expert_count", GgufValue::U32(8)),
            ("gpt-oss.expert_used_count", GgufValue::U32(3)),
            ("gpt-oss.expert_feed_forward_length", GgufValue::U32(40)),
        ];
        gguf_config(&[&keys[..], more].concat())
    };
    let said = [
        ("gpt-oss.attention.sliding_window", GgufValue::U32(128)),
        ("gpt-oss.rope.freq_base", GgufValue::F32(150_000.0)),
        ("gpt-oss.rope.scaling.type", GgufValue::Str("yarn")),
        ("gpt-oss.rope.scaling.factor", GgufValue::F32(32.0)),
    ];
    for (i, (key, _)) in said.iter().enumerate() {
        let others: Vec<_> = [&said[..i], &said[i + 1..]].concat();
        assert_refused(of_gguf(&others), &[key, "missing"]);
    }
    let of_gguf =
        |more: (&'static str, GgufValue<'static>)| of_gguf(&[&said[..], &[more]].concat());
    let read = of_gguf(("gpt-oss.expert_gating_func", GgufValue::U32(3))).unwrap();
    assert_eq!((read.family, read.ffn_len), ("gpt_oss", 40));
    assert_eq!(read.windows, [Some(128), None, Some(128), None]);
    let bounds = |scaling: &RopeScaling| match scaling {
        RopeScaling::Yarn { truncate, .. } => *truncate,
        other => panic!("{other:?}"),
    };
    assert!(!bounds(&read.rope.scaling), "which GGUF has no word for");
    let sigmoid = ("gpt-oss.expert_gating_func", GgufValue::U32(2));
    assert_refused(of_gguf(sigmoid), &["expert_gating_func", "not supported"]);
}
