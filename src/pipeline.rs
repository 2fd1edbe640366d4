//! One request on one screen: find the model, render and encode, submit, decode, stop.
//!
//! Runs on the caller's (async) task; the engine thread is only ever spoken to through its handle.
//! The rooms of the pipeline that do not exist yet (rails, cache, retrieval) will stand in
//! [`Pipeline::generate`], in reading order. Deliberately absent: the wire. What a client may send
//! and what it gets back is the server's business; this file speaks of text and numbers.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::engine::handle::SamplingParams;
use crate::error::Error;
use crate::registry::Registry;
use crate::types::{FinishReason, Timings, TokenId, Usage};

/// What is to be continued.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// A conversation, rendered by the model's chat template.
    Chat {
        /// Array of messages, as the wire has them.
        messages: Value,
        /// Extra variables for the template.
        template_kwargs: Map<String, Value>,
    },
    /// Plain text.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<TokenId>),
}

/// A request for text. `None` means: what the model's own generation config says, else OpenAI's
/// default.
#[derive(Clone, Debug)]
pub struct TextRequest {
    /// Id of a served model.
    pub model: String,
    /// What is to be continued.
    pub prompt: Prompt,
    /// Independent continuations.
    pub n: usize,
    /// `None`: as many as the context has room for.
    pub max_tokens: Option<usize>,
    /// The field that carried `max_tokens`, for errors.
    pub max_tokens_param: &'static str,
    /// Stop tokens are masked until this many tokens are generated.
    pub min_tokens: usize,
    /// Texts that end the generation and are not returned.
    pub stop: Vec<String>,
    /// Tokens that end the generation, besides the model's own.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on after the model's stop tokens.
    pub ignore_eos: bool,
    /// Log-probabilities of generated tokens, with this many alternatives.
    pub logprobs: Option<usize>,
    /// Begin with the prompt itself (with log-probabilities when those are asked for).
    pub echo: bool,
    /// Sampling fields that the client set.
    pub sampling: SamplingOverrides,
}

/// Sampling fields as a client gives them.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "the fields of `SamplingParams`, optional")]
pub struct SamplingOverrides {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<usize>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Vec<(TokenId, f32)>,
    pub seed: Option<u64>,
}

/// A token as text, with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: TokenId,
    /// Its text (U+FFFD where its bytes are not text on their own).
    pub text: String,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
    /// `None` for the first token of a prompt.
    pub logprob: Option<f32>,
    /// Alternatives, best first.
    pub top: Vec<TopLogprob>,
}

/// One alternative.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "as in `TokenLogprob`")]
pub struct TopLogprob {
    pub id: TokenId,
    pub text: String,
    pub bytes: Vec<u8>,
    pub logprob: f32,
}

/// What a running request tells its client.
#[derive(Clone, Debug)]
pub enum TextEvent {
    /// More text of one choice. With `echo` the first one of each choice is the prompt.
    Delta {
        /// `0..n`.
        choice: usize,
        /// Never half a character, never the beginning of a stop string.
        text: String,
        /// Empty unless log-probabilities were asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// The end of one choice.
    Finished {
        /// `0..n`.
        choice: usize,
        /// Why.
        reason: FinishReason,
        /// Tokens of this choice; the prompt is counted in each.
        usage: Usage,
        /// Where the time went.
        timings: Timings,
    },
}

/// The rooms that a request passes.
#[derive(Clone)]
pub struct Pipeline {
    registry: Arc<Registry>,
}

impl Pipeline {
    /// Over what the registry serves.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }

    /// What can be asked for.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Starts a request, or says at once why not. Dropping the stream cancels it.
    pub async fn generate(&self, request: TextRequest) -> Result<TextStream, Error> {
        let model = self.registry.get(&request.model);
        let model = model.ok_or_else(|| Error::ModelNotFound(request.model.clone()))?;
        let prompt = encode(&model, &request)?;
        let template = generate_request(&model, &request, prompt)?;
        let seed = request.sampling.seed.unwrap_or_else(random_seed);
        let mut choices = Vec::with_capacity(request.n);
        for index in 0..request.n {
            let mut generate = template.clone();
            generate.sampling.seed = seed.wrapping_add(index as u64);
            let generation = model.engine().submit(generate);
            let generation = generation.map_err(|e| submit_error(e, &request))?;
            choices.push(Choice::new(index, generation, &model, &request, &template));
        }
        Ok(TextStream { choices, prompt: template.prompt, next: 0 })
    }
}

/// Renders and encodes. A template that writes the beginning-of-text token itself gets no second.
fn encode(model: &ServedModel, request: &TextRequest) -> Result<Vec<TokenId>, Error> {
    let text_error = |e: TextError| Error::invalid("prompt", e.to_string());
    match &request.prompt {
        Prompt::Tokens(ids) => Ok(ids.clone()),
        Prompt::Text(text) => model.tokenizer().encode(text, Special::Plain).map_err(text_error),
        Prompt::Chat { messages, template_kwargs } => {
            let template = model.template().ok_or_else(|| {
                Error::invalid(
                    "messages",
                    format!("The model `{}` has no chat template.", model.id()),
                )
            })?;
            let text = template
                .render(messages, None, true, template_kwargs)
                .map_err(|e| Error::invalid("messages", e.to_string()))?;
            let special = template.special_for(&text, model.tokenizer());
            model.tokenizer().encode(&text, special).map_err(text_error)
        }
    }
}
