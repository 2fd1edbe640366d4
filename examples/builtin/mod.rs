//! How `hearth-tiny` is made: its corpus, its vocabulary, its file. Shared by the trainer, the
//! evaluation and the tests.

#![allow(dead_code, reason = "each of the programs that share it uses a part")]
#![allow(missing_docs, reason = "a program, not a library")]

pub mod corpus;
pub mod file;
pub mod score;
pub mod vocabulary;

use hearth::text::{ChatTemplate, Special, TextError, Tokenizer};
use hearth_models::ModelConfig;
use hearth_models::config::{Knobs, RopeConfig, RopeScaling};
use hearth_models::train::Example;
use serde_json::{Map, Value};

use corpus::Conversation;

/// The name it is served under.
pub const NAME: &str = "hearth-tiny";
/// Where it is kept.
pub const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/builtin/hearth-tiny.gguf");
/// Its chat template.
pub const TEMPLATE: &str = include_str!("template.jinja");

/// The shape: Qwen3, because every GGUF runtime runs it and its rows need no permutation.
pub fn config(vocab_len: usize) -> ModelConfig {
    let (layer_count, head_dim) = (4, 64);
    ModelConfig {
        family: "qwen3",
        hidden_len: 192,
        ffn_len: 512,
        experts: None,
        layer_count,
        head_count: 4,
        kv_head_count: 2,
        head_dim,
        vocab_len,
        context_len: 2048,
        norm_eps: 1e-6,
        rope: RopeConfig { base: 10_000.0, dim: head_dim, scaling: RopeScaling::None },
        local_rope: None,
        windows: vec![None; layer_count],
        knobs: Knobs { qk_norm: true, ..Knobs::default() },
        tied: true,
        bos_id: None,
        eos_ids: Vec::new(),
    }
}

/// Turns conversations into examples: everything is read, what the assistant says is learned.
pub struct Encoder {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    /// What opens the assistant's turn, and what closes any.
    open: Vec<u32>,
    close: u32,
}

impl Encoder {
    pub fn new(tokenizer: Tokenizer) -> Result<Self, TextError> {
        let template = ChatTemplate::new(TEMPLATE, None, Some(vocabulary::END_OF_TURN))?;
        let open = tokenizer.encode("<|im_start|>assistant\n", Special::PROMPT)?;
        let close = tokenizer.encode(vocabulary::END_OF_TURN, Special::PROMPT)?[0];
        Ok(Self { tokenizer, template, open, close })
    }

    /// The whole conversation as the template shows it.
    pub fn text(&self, conversation: &Conversation) -> Result<String, TextError> {
        let messages = Value::Array(conversation.messages.clone());
        self.template.render(&messages, conversation.tools.as_ref(), false, &Map::new())
    }

    /// Tokens with weight 1 for what the assistant says, its end of turn included, and
    /// `prompt_weight` for the rest.
    pub fn example(&self, c: &Conversation, prompt_weight: f32) -> Result<Example, TextError> {
        let tokens = self.tokenizer.encode(&self.text(c)?, Special::PROMPT)?;
        let mut weights = vec![prompt_weight; tokens.len()];
        let mut speaking = false;
        for i in 0..tokens.len() {
            if speaking {
                weights[i] = 1.0;
            }
            speaking = (speaking && tokens[i] != self.close) || tokens[..=i].ends_with(&self.open);
        }
        Ok(Example { tokens, weights })
    }
}
