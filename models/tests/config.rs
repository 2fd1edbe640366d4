//! What `config.json` and GGUF metadata mean, where the same thing can be said in several ways.
//!
//! Values that are refused together with their files are `refusals.rs`.

use hearth_models::config::{ModelConfig, RopeConfig, RopeScaling, yarn_temperature};
use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::{DType, Value as GgufValue, Weights};
use serde_json::{Value, json};

#[path = "config/experts.rs"]
mod experts;

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
    assert_refused(gguf_config(&experts), &["llama.expert_count", "not supported"]);
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

/// Heads of 16 in a hidden width of 64, as in [`json_config`].
fn gemma(model_type: &str, mut changes: Value) -> hearth_models::Result<ModelConfig> {
    (changes["model_type"], changes["head_dim"]) = (json!(model_type), json!(16));
    changes["num_key_value_heads"] = json!(4);
    json_config(changes)
}

#[test]
fn gemma_2_has_windows_and_bounds_that_the_file_does_not_mention() {
    let plain = gemma("gemma2", json!({})).unwrap();
    assert_eq!(plain.windows[..3], [Some(4096), None, Some(4096)]);
    assert_eq!(plain.knobs.attention_softcap, Some(50.0));
    assert_eq!(plain.knobs.logit_softcap, Some(30.0));
    assert_eq!((plain.knobs.query_scale, plain.knobs.embedding_scale), (Some(0.0625), Some(8.0)));
    assert!(plain.tied && plain.knobs.norms_from_one && plain.knobs.post_norms);

    let null = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null});
    let knobs = gemma("gemma2", null).unwrap().knobs;
    assert_eq!((knobs.attention_softcap, knobs.logit_softcap), (None, None));
    let kinds: Vec<&str> = (0..32).map(|_| "full_attention").collect();
    assert_eq!(gemma("gemma2", json!({"layer_types": kinds})).unwrap().windows, vec![None; 32]);

    for (key, bad, word) in [
        ("layer_types", json!(["sliding_attention"]), "32 layers"),
        ("layer_types", json!(vec!["chunked_attention"; 32]), "chunked_attention"),
        ("sliding_window", json!(null), "missing"),
        ("sliding_window_pattern", json!(0), "0"),
        ("use_bidirectional_attention", json!(true), "behind"),
    ] {
        for family in ["gemma2", "gemma3_text"] {
            if (family, key) != ("gemma2", "sliding_window_pattern") {
                assert_refused(gemma(family, json!({key: bad.clone()})), &[key, word]);
            }
        }
    }
    assert!(gemma("gemma2", json!({"use_bidirectional_attention": false})).is_ok());
    for key in ["attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"] {
        for bad in [0.0, -2.0] {
            assert_refused(gemma("gemma2", json!({key: bad})), &[key, "positive"]);
        }
    }
    assert_refused(gemma("gemma2", json!({"hidden_act": "silu"})), &["hidden_act", "silu"]);
    let other = json!({"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "relu"});
    assert_refused(gemma("gemma2", other), &["hidden_activation", "relu"]);
    let both = json!({"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"});
    assert!(gemma("gemma2", both.clone()).is_ok(), "the first one is not read");
    assert_refused(gemma("gemma", both), &["hidden_act", "silu"]);
    let third = gemma("gemma2", json!({"sliding_window_pattern": 3})).unwrap();
    assert_eq!(third.windows[..3], [Some(4096), None, Some(4096)], "nor is this");
    let bare = json!({"model_type": "gemma", "num_attention_heads": 16});
    let bare = json_config(bare).unwrap();
    assert_eq!((bare.head_dim, bare.kv_head_count), (256, 16));
    assert!(gemma("gemma", json!({"hidden_act": "gelu"})).is_ok(), "the first files say so");
    assert_refused(json_config(json!({"hidden_act": "gelu"})), &["hidden_act", "gelu"]);
}

/// What files say of rotary positions by kinds of layers, now and before.
#[test]
fn gemma_3_turns_layers_with_a_window_in_another_way() {
    let before = json!({"rope_theta": 1e6, "rope_local_base_freq": 2e4, "sliding_window": 512,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    let now = json!({"sliding_window": 512, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }});
    let beside = json!({"sliding_window": 512, "rope_parameters": {
        "full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 2e4},
    }, "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    let absent = json!({"sliding_window": 512,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    for (changes, base) in [(before, 2e4), (now, 2e4), (beside, 2e4), (absent, 1e4)] {
        let config = gemma("gemma3_text", changes).unwrap();
        let scaling = RopeScaling::Linear { factor: 8.0 };
        assert_eq!(config.rope, RopeConfig { base: 1e6, dim: 16, scaling });
        let local = RopeConfig { base, dim: 16, scaling: RopeScaling::None };
        assert_eq!(config.local_rope, Some(local));
        let global: Vec<usize> = (0..32).filter(|&l| config.windows[l].is_none()).collect();
        assert_eq!(global, [5, 11, 17, 23, 29]);
        assert_eq!(config.windows[0], Some(512));
        assert!(config.knobs.qk_norm && config.knobs.attention_softcap.is_none());
    }
    // Saved again, a file has both keys.
    let third = json!({"sliding_window_pattern": 3, "_sliding_window_pattern": 3,
        "attn_logit_softcapping": 50.0});
    let third = gemma("gemma3_text", third).unwrap();
    assert_eq!(third.windows[..3], [Some(4096), Some(4096), None]);
    assert_eq!(third.knobs.attention_softcap, None, "it has none, whatever is said");
    assert_refused(gemma("gemma3", json!({})), &["model_type", "gemma3"]);
    let negative = json!({"rope_local_base_freq": -1.0});
    assert_refused(gemma("gemma3_text", negative), &["rope_local_base_freq", "-1"]);
    let other = json!({"rope_local_base_freq": 2e4});
    assert_refused(gemma("gemma2", other), &["rope_local_base_freq", "kinds of layers"]);
}

/// A GGUF of a Gemma with so many layers, 4 heads of 16 in a hidden width of 32.
fn gguf_gemma(arch: &'static str, layers: u32, more: &[(&str, GgufValue<'_>)]) -> ModelConfig {
    use GgufValue::{F32, Str, U32};
    let key = |name: &str| format!("{arch}.{name}");
    let mut keys = vec![("general.architecture".to_owned(), Str(arch))];
    keys.extend([
        (key("embedding_length"), U32(32)),
        (key("feed_forward_length"), U32(64)),
        (key("block_count"), U32(layers)),
        (key("attention.head_count"), U32(4)),
        (key("attention.head_count_kv"), U32(2)),
        (key("attention.key_length"), U32(16)),
        (key("context_length"), U32(256)),
        (key("rope.freq_base"), F32(1e6)),
    ]);
    keys.extend(more.iter().map(|(name, value)| (key(name), *value)));
    let keys: Vec<(&str, GgufValue<'_>)> = keys.iter().map(|(k, v)| (k.as_str(), *v)).collect();
    gguf_config(&keys).unwrap()
}

#[test]
fn gguf_of_gemma_leaves_to_the_reader_what_config_json_says() {
    let second = gguf_gemma("gemma2", 26, &[]);
    assert_eq!(second.windows[..2], [Some(4096), None]);
    let knobs = second.knobs;
    assert_eq!((knobs.attention_softcap, knobs.logit_softcap), (Some(50.0), Some(30.0)));
    assert!(!knobs.norms_from_one, "they are whole in these files");
    assert_eq!(knobs.query_scale(16), 0.25);
    let caps = [("attn_logit_softcapping", GgufValue::F32(20.0))];
    assert_eq!(gguf_gemma("gemma2", 26, &caps).knobs.attention_softcap, Some(20.0));
    // The largest ones: by the hidden width of a head.
    assert_eq!(gguf_gemma("gemma2", 46, &[]).knobs.query_scale(16), 8f32.powf(-0.5));
    assert_eq!(gguf_gemma("gemma3", 62, &[]).knobs.query_scale(16), 8f32.powf(-0.5));

    let window = ("attention.sliding_window", GgufValue::U32(512));
    let third = gguf_gemma("gemma3", 26, &[window]);
    assert_eq!(third.windows[4..6], [Some(512), None]);
    assert_eq!((third.rope.base, third.local_rope.unwrap().base), (1e6, 1e4));
    let base = ("rope.freq_base_swa", GgufValue::F32(2e4));
    assert_eq!(gguf_gemma("gemma3", 26, &[window, base]).local_rope.unwrap().base, 2e4);
    assert_eq!(gguf_gemma("gemma3", 26, &[]).windows, vec![None; 26]);
    let none = ("attention.sliding_window", GgufValue::U32(0));
    assert_eq!(gguf_gemma("gemma3", 26, &[none]).windows, vec![None; 26]);
    let third = ("attention.sliding_window_pattern", GgufValue::U32(3));
    let windows = gguf_gemma("gemma3", 26, &[window, third]).windows;
    assert_eq!(windows[..3], [Some(512), Some(512), None]);
    // As Ollama writes them.
    let bases = [
        ("rope.global.freq_base", GgufValue::F32(5e5)),
        ("rope.local.freq_base", GgufValue::F32(3e4)),
    ];
    let ollama = gguf_gemma("gemma3", 26, &[window, bases[0], bases[1]]);
    assert_eq!(ollama.local_rope.unwrap().base, 3e4);
}
