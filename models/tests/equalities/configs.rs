//! Configurations that differ from a small Llama in what families differ in.

use hearth_models::backend::{Gate, Routing};
use hearth_models::config::{Knobs, ModelConfig, Naming, RopeConfig, RopeScaling};
use hearth_models::tiny;

/// Every knob of the configuration, one at a time, and some together.
pub(super) fn configs() -> Vec<(&'static str, ModelConfig)> {
    [common(), gemma(), experts()].concat()
}

/// What most families have.
fn common() -> Vec<(&'static str, ModelConfig)> {
    let base = tiny::config();
    let with = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = base.clone();
        change(&mut config);
        config.rope.dim = config.rope.dim.min(config.head_dim);
        config
    };
    let heads = |kv: usize, dim: usize| {
        with(&|c| {
            (c.kv_head_count, c.head_dim, c.rope.dim) = (kv, dim, dim);
        })
    };
    let rope = |scaling: RopeScaling| with(&|c| c.rope.scaling = scaling.clone());
    let biases = Knobs { qkv_bias: true, out_bias: true, mlp_bias: true, ..Knobs::default() };
    let norms = Knobs { qk_norm: true, ..Knobs::default() };
    let yarn = |attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_context_len: 32.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor,
        truncate: true,
    };
    vec![
        ("base: 4 queries a key, tied", base.clone()),
        ("untied", with(&|c| c.tied = false)),
        ("biases", with(&|c| c.knobs = biases)),
        ("qk_norm", with(&|c| c.knobs = norms)),
        ("one query a key", heads(8, 32)),
        ("8 queries a key", heads(1, 32)),
        ("heads of 64", heads(2, 64)),
        ("heads of 80", heads(2, 80)),
        ("half of a head rotates", with(&|c| c.rope.dim = 16)),
        ("window in one layer", with(&|c| c.windows = vec![Some(11), None])),
        ("window of one block", with(&|c| c.windows = vec![Some(16); 2])),
        ("window of one key", with(&|c| c.windows = vec![Some(1); 2])),
        ("linear rope", rope(RopeScaling::Linear { factor: 4.0 })),
        ("yarn", rope(yarn(None))),
        ("yarn with a temperature", rope(yarn(Some(1.25)))),
        (
            "llama3 rope",
            rope(RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_context_len: 32.0,
            }),
        ),
        ("divisors", rope(RopeScaling::Divisors((0..16).map(|i| 1.0 + i as f32 / 4.0).collect()))),
        (
            "biases, qk_norm, window, untied, one query a key, heads of 64",
            with(&|c| {
                (c.knobs, c.tied, c.windows) = (biases, false, vec![None, Some(7)]);
                c.knobs.qk_norm = true;
                (c.kv_head_count, c.head_dim, c.rope.dim) = (8, 64, 64);
            }),
        ),
    ]
}

/// Layers of which each row uses a part.
fn experts() -> Vec<(&'static str, ModelConfig)> {
    let with = |routing: Routing, ffn: usize| ModelConfig {
        experts: Some(routing),
        ffn_len: ffn,
        ..tiny::config()
    };
    let routing = |count, used, normalized| Routing { count, used, normalized };
    vec![
        ("2 of 8 experts", with(routing(8, 2, true), 256)),
        ("4 of 13 experts, as the softmax says, of a width of 40", {
            with(routing(13, 4, false), 40)
        }),
        ("all of 3 experts", with(routing(3, 3, true), 64)),
        ("2 of 8 experts with biases", {
            let mut config = with(routing(8, 2, true), 128);
            config.knobs.mlp_bias = true;
            config
        }),
        ("all of 4 experts with biases and a bounded gate", {
            let mut config = with(routing(4, 4, true), 64);
            (config.knobs.mlp_bias, config.knobs.gate) = (true, Gate::ClampedSwiglu);
            config
        }),
        ("sinks", {
            let mut config = tiny::config();
            config.knobs.sinks = true;
            config
        }),
        ("a bounded gate", {
            let mut config = tiny::config();
            config.knobs.gate = Gate::ClampedSwiglu;
            config
        }),
        ("gpt-oss", {
            let mut config = with(routing(8, 4, true), 96);
            config.windows = vec![Some(11), None];
            (config.knobs.sinks, config.knobs.gate) = (true, Gate::ClampedSwiglu);
            let knobs = &mut config.knobs;
            (knobs.qkv_bias, knobs.out_bias, knobs.mlp_bias) = (true, true, true);
            knobs.naming = Naming::GptOss;
            config
        }),
    ]
}

/// What Gemma has beside.
fn gemma() -> Vec<(&'static str, ModelConfig)> {
    let with = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = tiny::config();
        change(&mut config);
        config
    };
    vec![
        ("norms behind attention and MLP", with(&|c| c.knobs.post_norms = true)),
        ("GELU in the gate", with(&|c| c.knobs.gate = Gate::GeluTanh)),
        ("a soft bound of scores", with(&|c| c.knobs.attention_softcap = Some(2.0))),
        ("a soft bound of logits", with(&|c| c.knobs.logit_softcap = Some(3.0))),
        (
            "larger embeddings, other scores",
            with(&|c| {
                (c.knobs.embedding_scale, c.knobs.query_scale) = (Some(16.0), Some(0.3));
            }),
        ),
        (
            "Gemma 3: another rope for windows",
            with(&|c| {
                c.windows = vec![Some(11), None];
                c.local_rope = Some(RopeConfig { base: 100.0, ..c.rope.clone() });
                (c.knobs.post_norms, c.knobs.qk_norm) = (true, true);
            }),
        ),
    ]
}
