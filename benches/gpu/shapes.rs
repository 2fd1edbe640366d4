//! The models that are measured, as numbers, and what a pass of one cannot do without.

use hearth_models::config::{Knobs, RopeConfig, RopeScaling};
use hearth_models::weights::{Mix, Role};
use hearth_models::{KvDType, ModelConfig};

use super::decode::BLOCK_LEN;
use super::limits::Ceiling;

/// A model without its weights.
pub struct Shape {
    pub name: &'static str,
    pub config: ModelConfig,
    pub mix: Mix,
}

/// Bytes that have to be read and operations that have to be done.
pub struct Cost {
    pub bytes: f64,
    pub flops: f64,
}

impl Cost {
    /// Seconds that a device of these limits needs at least.
    pub fn at_least(&self, ceiling: &Ceiling) -> f64 {
        (self.bytes / ceiling.copy).max(self.flops / ceiling.product)
    }
}

/// Everything that is measured.
pub fn all() -> Vec<Shape> {
    let of = |name, config: fn() -> ModelConfig, mix| Shape {
        name,
        config: config(),
        mix: Mix::named(mix).expect("a mix that exists"),
    };
    vec![
        of("8b-bf16", llama_8b, "bf16"),
        of("8b-q4_k_m", llama_8b, "q4_k_m"),
        of("0.6b-bf16", qwen_06b, "bf16"),
        of("0.6b-q4_k_m", qwen_06b, "q4_k_m"),
    ]
}

/// Llama 3.1 8B.
fn llama_8b() -> ModelConfig {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context_len: 8192.0,
    };
    ModelConfig {
        family: "llama",
        hidden_len: 4096,
        ffn_len: 14_336,
        experts: None,
        layer_count: 32,
        head_count: 32,
        kv_head_count: 8,
        head_dim: 128,
        vocab_len: 128_256,
        context_len: 131_072,
        norm_eps: 1e-5,
        rope: RopeConfig { base: 500_000.0, dim: 128, scaling },
        local_rope: None,
        windows: vec![None; 32],
        knobs: Knobs::default(),
        tied: false,
        bos_id: None,
        eos_ids: Vec::new(),
    }
}

/// Qwen3 0.6B.
fn qwen_06b() -> ModelConfig {
    ModelConfig {
        family: "qwen3",
        hidden_len: 1024,
        ffn_len: 3072,
        experts: None,
        layer_count: 28,
        head_count: 16,
        kv_head_count: 8,
        head_dim: 128,
        vocab_len: 151_936,
        context_len: 40_960,
        norm_eps: 1e-6,
        rope: RopeConfig { base: 1e6, dim: 128, scaling: RopeScaling::None },
        local_rope: None,
        windows: vec![None; 28],
        knobs: Knobs { qk_norm: true, ..Knobs::default() },
        tied: true,
        bos_id: None,
        eos_ids: Vec::new(),
    }
}

impl Shape {
    /// One new token of each of `batch` sequences with `depth` keys.
    pub fn decode(&self, batch: usize, depth: usize, kv: KvDType) -> Cost {
        let (layers, head) = (self.products(|role| !is_table(role)), self.products(is_table));
        let sequences = batch as f64;
        let keys = depth as f64 * sequences * self.config.layer_count as f64;
        let token = self.config.kv_geometry(1, BLOCK_LEN, kv).bytes() / BLOCK_LEN;
        let kv = (batch * depth * token) as f64;
        Cost {
            bytes: layers.bytes + head.bytes + kv,
            flops: (layers.flops + head.flops) * sequences
                + 4.0 * keys * self.config.q_len() as f64,
        }
    }

    /// A prompt of `tokens`, of which the last one's logits are wanted.
    pub fn prefill(&self, tokens: usize) -> Cost {
        let last = self.config.layer_count - 1;
        // Behind the last attention only the wanted row goes on.
        let ends = |role: Role| match role {
            Role::Out(l) | Role::Gate(l) | Role::Up(l) | Role::Down(l) => l == last,
            role => is_table(role),
        };
        let (layers, ending) = (self.products(|role| !ends(role)), self.products(ends));
        let rows = tokens as f64;
        // Of the pairs of tokens, a half.
        let pairs = rows * rows / 2.0 * self.config.layer_count as f64;
        Cost {
            bytes: layers.bytes + ending.bytes,
            flops: layers.flops * rows + ending.flops + 4.0 * pairs * self.config.q_len() as f64,
        }
    }

    /// Some of the matrices that rows are multiplied with.
    fn products(&self, is_asked: impl Fn(Role) -> bool) -> Cost {
        let mut cost = Cost { bytes: 0.0, flops: 0.0 };
        let output = if self.config.tied { Role::Embedding } else { Role::Head };
        for role in Role::all(&self.config) {
            let &[n, k] = &role.shape(&self.config)[..] else { continue };
            if (is_table(role) && role != output) || !is_asked(role) {
                continue;
            }
            let row_bytes = self.mix.dtype(role, &self.config).row_bytes(k);
            cost.bytes += (n * row_bytes.expect("a mix fits its rows")) as f64;
            cost.flops += 2.0 * (n * k) as f64;
        }
        cost
    }
}

fn is_table(role: Role) -> bool {
    matches!(role, Role::Embedding | Role::Head)
}
