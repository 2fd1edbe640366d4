//! What `config.json` and GGUF metadata mean, where the same thing can be said in several ways.
//!
//! Values that are refused together with their files are `refusals.rs`.

use hearth_models::config::{ModelConfig, RopeConfig, RopeScaling, yarn_temperature};
use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::{DType, Value as GgufValue, Weights};
use serde_json::{Value, json};

/// A small Llama with `changes` laid over it; 256 positions, heads of 16.
fn json_config(changes: Value) -> hearth_models::Result<ModelConfig> {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 32, "num_attention_heads": 4, "vocab_size": 128,
        "max_position_embeddings": 256,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(&config.to_string())
}

fn json_rope(changes: Value) -> RopeConfig {
    json_config(changes).unwrap().rope
}

fn assert_refused(config: hearth_models::Result<ModelConfig>, words: &[&str]) {
    let text = config.expect_err(&format!("understood, although {words:?}")).to_string();
    for word in words {
        assert!(text.contains(word), "`{text}` does not mention `{word}`");
    }
}

#[test]
fn rope_scaling_stands_for_rope_parameters_and_both_for_the_top_level() {
    let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor});
    let both = json!({"rope_scaling": linear(2.0), "rope_parameters": {"rope_type": "default"}});
    assert_eq!(json_rope(both).scaling, RopeScaling::Linear { factor: 2.0 });
    let empty = json!({"rope_scaling": {}, "rope_parameters": linear(3.0)});
    assert_eq!(json_rope(empty).scaling, RopeScaling::Linear { factor: 3.0 });
    let null = json!({"rope_scaling": null, "rope_parameters": linear(3.0)});
    assert_eq!(json_rope(null).scaling, RopeScaling::Linear { factor: 3.0 });

    let inside = json!({"rope_theta": 5e5, "partial_rotary_factor": 0.5});
    let outside = json!({
        "rope_parameters": inside, "rope_theta": 1e4, "partial_rotary_factor": 1.0
    });
    let rope = json_rope(outside);
    assert_eq!((rope.base, rope.dim), (5e5, 8));
    assert_eq!(json_rope(json!({"rope_theta": 7e4})).base, 7e4);

    let differ = json!({"rope_scaling": linear(2.0), "rope_parameters": linear(3.0)});
    assert_refused(json_config(differ), &["rope_scaling", "rope_parameters", "different"]);
    let same = json!({"rope_scaling": linear(2.0), "rope_parameters": linear(2.0)});
    assert_eq!(json_rope(same).scaling, RopeScaling::Linear { factor: 2.0 });
    let kinds = json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}});
    assert_refused(json_config(kinds), &["rope_parameters", "kinds of layers"]);
}

/// A YaRN configuration with `changes`: factor, temperature, fast, slow.
fn json_yarn(changes: Value) -> hearth_models::Result<(f64, Option<f64>, f64, f64)> {
    let mut words =
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    for (key, value) in changes.as_object().unwrap() {
        words[key] = value.clone();
    }
    match json_config(json!({"rope_scaling": words}))?.rope.scaling {
        RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, .. } => {
            Ok((factor, attention_factor, beta_fast, beta_slow))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn yarn_of_json() {
    assert_eq!(json_yarn(json!({})).unwrap(), (4.0, None, 32.0, 1.0));
    let zero = json!({"beta_fast": 0, "beta_slow": 0});
    assert_eq!(json_yarn(zero).unwrap(), (4.0, None, 32.0, 1.0));
    let quotient = json!({"factor": null, "beta_fast": 16, "beta_slow": 2});
    assert_eq!(json_yarn(quotient).unwrap(), (8.0, None, 16.0, 2.0));
    let scales = json!({"mscale": 1.0, "mscale_all_dim": 0.5});
    let ratio = (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0);
    let got = json_yarn(scales).unwrap().1.unwrap();
    assert!((got - ratio).abs() < 1e-12, "{got} != {ratio}");
    let one = json!({"mscale": 1.0, "mscale_all_dim": 0});
    assert_eq!(json_yarn(one).unwrap().1, None);
    let both = json!({"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.5});
    assert_eq!(json_yarn(both).unwrap().1, Some(1.5));

    for key in ["factor", "original_max_position_embeddings", "beta_fast", "mscale"] {
        let (negative, text) = (json!({key: -1}), json!({key: "4"}));
        assert_refused(
            json_config(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
            key: -1}})),
            &["rope_scaling", key, "-1"],
        );
        assert!(json_yarn(negative).is_err() && json_yarn(text).is_err(), "{key}");
    }
    assert!(json_yarn(json!({"attention_factor": 0})).is_err());
    assert!(json_yarn(json!({"truncate": "no"})).is_err());
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    assert_refused(json_config(json!({"rope_scaling": llama3})), &["low_freq_factor", "4"]);
}

#[test]
fn windows_and_heads_that_the_file_does_not_mention() {
    let windows = |changes: Value| json_config(changes).unwrap().windows;
    let llama = windows(json!({"sliding_window": 16}));
    assert_eq!(llama, vec![None; 32], "Llama has no window");
    assert_eq!(json_config(json!({})).unwrap().kv_head_count, 4);

    let mistral = |mut changes: Value| {
        (changes["model_type"], changes["num_attention_heads"]) = (json!("mistral"), json!(16));
        json_config(changes).unwrap()
    };
    assert_eq!(mistral(json!({})).windows, vec![Some(4096); 32]);
    assert_eq!(mistral(json!({"sliding_window": null})).windows, vec![None; 32]);
    assert_eq!(mistral(json!({"sliding_window": 16})).windows, vec![Some(16); 32]);
    assert_eq!(mistral(json!({})).kv_head_count, 8);
    assert_eq!(mistral(json!({"num_key_value_heads": null})).kv_head_count, 16);

    let qwen = |mut changes: Value| {
        changes["model_type"] = json!("qwen2");
        windows(changes)
    };
    assert_eq!(qwen(json!({"sliding_window": 16})), vec![None; 32], "not switched on");
    let late = [vec![None; 28], vec![Some(4096); 4]].concat();
    assert_eq!(qwen(json!({"use_sliding_window": true})), late);
    let null = json!({"use_sliding_window": true, "sliding_window": null});
    assert_eq!(qwen(null), vec![None; 32]);
    let all = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 0});
    assert_eq!(qwen(all), vec![Some(9); 32]);
}

/// A GGUF with metadata, an embedding of 48 rows, and what a test adds.
fn gguf(keys: &[(&str, GgufValue<'_>)], tensors: &[(&str, DType, &[f32])]) -> Weights {
    use GgufValue::{Str, U32};
    let mut writer = GgufWriter::new();
    let base = [
        ("general.architecture", Str("llama")),
        ("llama.embedding_length", U32(32)),
        ("llama.feed_forward_length", U32(64)),
        ("llama.block_count", U32(2)),
        ("llama.attention.head_count", U32(2)),
        ("llama.context_length", U32(256)),
        ("llama.vocab_size", U32(40)),
    ];
    let unchanged = base.iter().filter(|(key, _)| keys.iter().all(|(other, _)| other != key));
    for (key, value) in unchanged.chain(keys) {
        writer.put(key, *value).unwrap();
    }
    writer.tensor("token_embd.weight", &[48, 32], DType::F16).unwrap();
    let quantise = |(name, dtype, values): &(&str, DType, &[f32])| {
        writer.tensor(name, &[values.len()], *dtype).unwrap();
        hearth_kernels::quant::quantize(*dtype, values).unwrap()
    };
    let bodies: Vec<Vec<u8>> = tensors.iter().map(quantise).collect();
    let mut body = writer.write_header(Vec::new()).unwrap();
    body.write_tensor(&[0; 48 * 32 * 2]).unwrap();
    bodies.iter().for_each(|bytes| body.write_tensor(bytes).unwrap());
    Weights::from_bytes("small.gguf", body.finish().unwrap()).unwrap()
}

fn gguf_config(keys: &[(&str, GgufValue<'_>)]) -> hearth_models::Result<ModelConfig> {
    ModelConfig::from_gguf(&gguf(keys, &[]))
}

fn gguf_scaling(keys: &[(&str, GgufValue<'_>)]) -> RopeScaling {
    gguf_config(keys).unwrap().rope.scaling
}

const TYPE: &str = "llama.rope.scaling.type";
const FACTOR: &str = "llama.rope.scaling.factor";

#[test]
fn gguf_says_it_with_tensors() {
    let config = gguf_config(&[]).unwrap();
    assert_eq!(config.vocab_len, 48, "rows of the embedding, not the stale key");
    assert!(config.tied);
    assert_eq!((config.windows[0], config.rope.dim), (None, 16));
    let head = gguf(&[], &[("output.weight", DType::F32, &[1.0])]);
    assert!(!ModelConfig::from_gguf(&head).unwrap().tied);
    let keys = [
        ("llama.attention.sliding_window", GgufValue::U32(24)),
        ("llama.rope.dimension_count", GgufValue::U32(6)),
    ];
    let config = gguf_config(&keys).unwrap();
    assert_eq!((config.windows[1], config.rope.dim), (Some(24), 6));

    let experts = [("llama.expert_count", GgufValue::U32(8))];
    assert_refused(gguf_config(&experts), &["llama.expert_count", "mixture of experts"]);
    gguf_config(&[("llama.expert_count", GgufValue::U32(0))]).unwrap();
    let layers = [("llama.block_count", GgufValue::U32(1 << 24))];
    assert_refused(gguf_config(&layers), &["llama.block_count", "absurd"]);
    let width = [("llama.rope.dimension_count", GgufValue::U32(18))];
    assert_refused(gguf_config(&width), &["llama.rope.dimension_count", "18"]);
}

#[test]
fn gguf_scaling_in_all_its_spellings() {
    use GgufValue::{F32, Str};
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(gguf_scaling(&[(TYPE, Str("linear")), (FACTOR, F32(4.0))]), linear);
    assert_eq!(gguf_scaling(&[(FACTOR, F32(4.0))]), linear);
    assert_eq!(gguf_scaling(&[("llama.rope.scale_linear", F32(4.0))]), linear);
    assert_eq!(gguf_scaling(&[(TYPE, Str("linear")), (FACTOR, F32(0.0))]), RopeScaling::None);
    assert_eq!(gguf_scaling(&[(TYPE, Str("linear"))]), RopeScaling::None);
    assert_eq!(gguf_scaling(&[(TYPE, Str("none")), (FACTOR, F32(4.0))]), RopeScaling::None);
    assert_refused(gguf_config(&[(FACTOR, F32(-2.0))]), &[FACTOR, "-2"]);
    assert_refused(gguf_config(&[(TYPE, Str("longrope"))]), &[TYPE, "longrope"]);
    assert_refused(gguf_config(&[(TYPE, Str("yarn"))]), &[FACTOR, "missing"]);
}

#[test]
fn gguf_yarn() {
    use GgufValue::{F32, Str, U32};
    let base = [
        (TYPE, Str("yarn")),
        (FACTOR, F32(4.0)),
        ("llama.rope.scaling.original_context_length", U32(64)),
    ];
    let with = |more: &[(&'static str, GgufValue<'static>)]| [&base, more].concat();
    let yarn = |beta_fast, beta_slow, attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_context_len: 64.0,
        beta_fast,
        beta_slow,
        attention_factor,
        truncate: true,
    };
    assert_eq!(gguf_scaling(&base), yarn(32.0, 1.0, None));
    let numbers = with(&[
        ("llama.rope.scaling.yarn_beta_fast", F32(16.0)),
        ("llama.rope.scaling.yarn_beta_slow", F32(2.0)),
        ("llama.rope.scaling.attn_factor", F32(1.25)),
    ]);
    let temperature = 1.25 * yarn_temperature(4.0, 1.0);
    assert_eq!(gguf_scaling(&numbers), yarn(16.0, 2.0, Some(temperature)));
    for (key, harmless, bad) in [
        ("llama.rope.scaling.yarn_ext_factor", 1.0, 0.5),
        ("llama.rope.scaling.yarn_log_multiplier", 0.0, 0.1),
        ("llama.rope.scaling.yarn_attn_factor", 1.0, 2.0),
    ] {
        assert_eq!(gguf_scaling(&with(&[(key, F32(harmless))])), yarn(32.0, 1.0, None), "{key}");
        assert_refused(gguf_config(&with(&[(key, F32(bad))])), &[key, "not supported"]);
    }
}

#[test]
fn gguf_divisors() {
    const NAME: &str = "rope_freqs.weight";
    let of = |keys: &[(&str, GgufValue<'_>)], dtype, values: &[f32]| {
        ModelConfig::from_gguf(&gguf(keys, &[(NAME, dtype, values)]))
    };
    let values = [1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0];
    let divisors = RopeScaling::Divisors(values.to_vec());
    assert_eq!(of(&[], DType::F32, &values).unwrap().rope.scaling, divisors);
    let none = [(TYPE, GgufValue::Str("none"))];
    assert_eq!(of(&none, DType::F32, &values).unwrap().rope.scaling, divisors);
    let both = [(FACTOR, GgufValue::F32(4.0))];
    assert_refused(of(&both, DType::F32, &values), &["rope.scaling", NAME]);
    assert_refused(of(&[], DType::F16, &values), &[NAME, "F16"]);
    assert_refused(of(&[], DType::F32, &[1.0; 513]), &[NAME, "513"]);
    assert_refused(of(&[], DType::F32, &[-1.0; 8]), &[NAME, "-1"]);
}
