//! One request on one screen: find the model, render and encode, submit, decode, stop.
//!
//! Runs on the caller's (async) task; the engine thread is only ever spoken to through its handle.
//! The rooms of the pipeline that do not exist yet (rails, cache, retrieval) will stand in
//! [`Pipeline::generate`], in reading order. Deliberately absent: the wire. What a client may send
//! and what it gets back is the server's business; this file speaks of text and numbers.

mod apart;
mod choice;
mod embed;
mod form;
mod meter;
mod prompt;
mod stream;
mod tools;

use std::sync::Arc;

use serde_json::{Map, Value};

use self::apart::Apart;
pub use self::apart::THREADS;
use self::choice::Choice;
pub use self::choice::Prediction;
pub use self::embed::{EmbedInput, EmbedRequest, Embedding, Embeddings};
use self::form::Form;
pub use self::meter::Meter;
use self::prompt::Prepared;
pub use self::stream::TextStream;
pub use self::tools::{Tool, ToolChoice, Tools};
use crate::engine::handle::{AdapterSet, GenerateRequest, SamplingParams, SubmitError};
use crate::error::Error;
use crate::registry::{Lease, Registry, ServedModel, Weighted};
use crate::text::{Shape, Special};
use crate::types::{
    CacheScope, FinishReason, KeepAlive, Place, Priority, SamplingOverrides, Tenant, Timings,
    TokenId, Usage,
};

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
    /// What follows the gap that the answer fills, for models that learned it.
    pub suffix: Option<String>,
    /// Log-probabilities of the prompt, with this many alternatives.
    pub prompt_logprobs: Option<usize>,
    /// Tell the tokens of the answer.
    pub token_ids: bool,
    /// What the answer must look like.
    pub format: Option<Format>,
    /// What the answer is expected to be, for speed alone.
    pub prediction: Option<String>,
    /// The field that the first message of a chat came in, where it was not among the others.
    pub system_param: Option<&'static str>,
    /// What the model may call, in a chat.
    pub tools: Option<Tools>,
    /// Sampling fields that the client set.
    pub sampling: SamplingOverrides,
    /// Who asks.
    pub tenant: Tenant,
    /// Its place among what the same tenant asks.
    pub priority: Priority,
    /// How long the model stays in memory after it.
    pub keep_alive: Option<KeepAlive>,
    /// Adapters that the model runs with, besides the one that its name asks for.
    pub adapters: Vec<Weighted>,
}

/// What an answer must look like.
#[derive(Clone, Debug, PartialEq)]
pub struct Format {
    /// The form itself.
    pub shape: Shape,
    /// The field that asked for it, for errors.
    pub param: &'static str,
    /// What a refusal begins with: "Invalid schema for response_format 'person'".
    pub refusal: String,
}

/// A token as text, with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: TokenId,
    /// Its text (U+FFFD where its bytes are not text on their own).
    pub text: String,
    /// Its exact bytes, as in the middle of a text.
    pub bytes: Vec<u8>,
    /// Characters of the choice's text that begin in it: 0 for a special token, and one less than
    /// its own where the text drops the space before its first word.
    pub chars: usize,
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
    /// More text of one choice.
    Delta {
        /// `0..n`.
        choice: usize,
        /// Never half a character, never the beginning of a stop string.
        text: String,
        /// Empty unless log-probabilities were asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// The prompt as the beginning of the text of one choice, with `echo`.
    Echo {
        /// `0..n`.
        choice: usize,
        /// All of it.
        text: String,
    },
    /// The scored prompt, when its log-probabilities were asked for.
    Prompt {
        /// The first of those whose prompt it is.
        choice: usize,
        /// Every token of it.
        tokens: Vec<TokenLogprob>,
    },
    /// The tokens of an answer, as they come, when they were asked for.
    Tokens {
        /// `0..n`.
        choice: usize,
        /// The end of the text is one of them.
        ids: Vec<TokenId>,
    },
    /// More thought of one choice.
    Reasoning {
        /// `0..n`.
        choice: usize,
        /// As in `Delta`.
        text: String,
        /// As in `Delta`.
        logprobs: Vec<TokenLogprob>,
    },
    /// A call begins; its arguments follow.
    ToolCall {
        /// `0..n`.
        choice: usize,
        /// Calls of this choice before it.
        index: usize,
        /// `call_` and letters that no other call has.
        id: String,
        /// Name of the tool.
        name: String,
        /// The tool takes a text, not an object.
        custom: bool,
    },
    /// More of what a call says: JSON text, or the text of a custom tool.
    ToolArguments {
        /// `0..n`.
        choice: usize,
        /// Which call.
        index: usize,
        /// As it came.
        text: String,
        /// As in `Delta`.
        logprobs: Vec<TokenLogprob>,
    },
    /// The end of one choice.
    Finished {
        /// `0..n`.
        choice: usize,
        /// Why.
        reason: FinishReason,
        /// The stop string that ended it, if one did.
        stop: Option<String>,
        /// Tokens of this choice; the prompt is counted in each.
        usage: Usage,
        /// Tokens of the completion that were thought.
        reasoning_tokens: usize,
        /// What became of what the client expected.
        prediction: Prediction,
        /// Where the time went.
        timings: Timings,
    },
}

/// The rooms that a request passes.
#[derive(Clone)]
pub struct Pipeline {
    registry: Arc<Registry>,
    apart: Apart,
}

impl Pipeline {
    /// Over what the registry serves.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry, apart: Apart::new() }
    }

    /// What can be asked for.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Starts a request, or says why not. Dropping the stream, or the future before, cancels it.
    pub async fn generate(&self, request: TextRequest) -> Result<TextStream, Error> {
        let model = self.model(&request.model, request.tenant, request.keep_alive).await?;
        let mut one = self.generate_all(&model, vec![request]).await?;
        Ok(one.pop().expect("one for each request; this is a bug"))
    }

    /// The model that a name stands for, held in memory until the lease is dropped and all that
    /// was asked with it is computed. May take as long as a load; dropping the future gives the
    /// place up.
    pub async fn model(
        &self,
        name: &str,
        tenant: Tenant,
        keep_alive: Option<KeepAlive>,
    ) -> Result<Lease<ServedModel>, Error> {
        self.registry.generator(name, tenant, keep_alive).await
    }

    /// What a request runs with besides its model; reads what is not in memory.
    async fn adapters(
        &self,
        model: &Lease<ServedModel>,
        request: &TextRequest,
    ) -> Result<Option<Arc<AdapterSet>>, Error> {
        let wanted = self.registry.wanted(&request.model, &request.adapters)?;
        if wanted.is_empty() {
            return Ok(None);
        }
        if let Some(set) = self.registry.adapters().set_at_hand(model.id(), &wanted) {
            return Ok(Some(set));
        }
        let (registry, model) = (Arc::clone(&self.registry), model.clone());
        let set = move || registry.adapters().set(model.id(), model.file(), &wanted);
        self.apart.read(request.tenant, set).await
    }

    /// Starts requests to one model with the same adapters, all or none.
    pub async fn generate_all(
        &self,
        model: &Lease<ServedModel>,
        requests: Vec<TextRequest>,
    ) -> Result<Vec<TextStream>, Error> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        let adapters = self.adapters(model, first).await?;
        let (mut all, mut generates) = (Vec::new(), Vec::new());
        for request in requests {
            let (len, preparing) = (request.len_bytes(), model.clone());
            let prepared = self.apart.encode(request.tenant, len, move || {
                prompt::prepare(&preparing, &request).map(|prepared| (prepared, request))
            });
            let (Prepared { prompt, expected, form }, request) = prepared.await?;
            let template = generate_request(model, &request, prompt, &form)?;
            let expected = expected.into();
            let (adapters, hold) = (adapters.clone(), Some(model.parts().1));
            let template = GenerateRequest { adapters, hold, expected, ..template };
            let seed = request.sampling.seed.unwrap_or_else(random_seed);
            for index in 0..request.n as u64 {
                // Far apart, so that choice 1 of a seed is not choice 0 of the next.
                let seed = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                generates.push(GenerateRequest { seed, ..template.clone() });
            }
            all.push((request, template, form));
        }
        let submitted = model.engine().submit_all(generates);
        let mut generations = submitted.map_err(|e| submit_error(e, &all[0].0))?.into_iter();
        let stream = |(request, template, form): (TextRequest, GenerateRequest, Form)| {
            let own = generations.by_ref().take(request.n).collect::<Vec<_>>();
            let place = own.first().map_or_else(Place::default, |generation| generation.place);
            let meter = Arc::<Meter>::default();
            let choice = |(index, generation)| {
                Choice::new(index, generation, model, &request, &template, &form, &meter)
            };
            let choices = own.into_iter().enumerate().map(choice).collect();
            TextStream { choices, prompt: template.prompt, meter, place, next: 0 }
        };
        Ok(all.into_iter().map(stream).collect())
    }

    /// The prompt of a request as text and as tokens. `special` is for plain text; a conversation
    /// has its special tokens where its template puts them.
    pub async fn prompt(
        &self,
        model: &Lease<ServedModel>,
        request: TextRequest,
        special: Special,
    ) -> Result<(String, Vec<TokenId>), Error> {
        let (model, len, tenant) = (model.clone(), request.len_bytes(), request.tenant);
        self.apart.encode(tenant, len, move || prompt::encode(&model, &request, special)).await
    }
}

/// Fills in what the client left open: the model's own generation config, then OpenAI's defaults.
fn generate_request(
    model: &ServedModel,
    request: &TextRequest,
    prompt: Vec<TokenId>,
    form: &Form,
) -> Result<GenerateRequest, Error> {
    let room = model.context_len().saturating_sub(prompt.len());
    let vocab_len = model.engine().limits().vocab_len;
    if let Some((id, _)) = request.sampling.logit_bias.iter().find(|b| b.0 as usize >= vocab_len) {
        let message = format!(
            "Invalid 'logit_bias': token id {id} is not in the vocabulary of {vocab_len} tokens."
        );
        return Err(Error::invalid("logit_bias", message));
    }
    let own = if request.ignore_eos { &[] } else { model.stop_ids() };
    let mut stop_ids = [own, &request.stop_token_ids].concat();
    stop_ids.sort_unstable();
    stop_ids.dedup();
    if let Some(id) = stop_ids.iter().find(|&&id| id as usize >= vocab_len) {
        let message = format!(
            "Invalid 'stop_token_ids': {id} is not in the vocabulary of {vocab_len} tokens."
        );
        return Err(Error::invalid("stop_token_ids", message));
    }
    Ok(GenerateRequest {
        prompt,
        sampling: sampling(model.defaults(), &request.sampling),
        logit_bias: request.sampling.logit_bias.clone(),
        seed: 0, // one for each choice
        max_tokens: request.max_tokens.unwrap_or(room),
        min_tokens: request.min_tokens,
        stop_ids: stop_ids.into(),
        logprobs: request.logprobs,
        prompt_logprobs: request.logprobs.filter(|_| request.echo).max(request.prompt_logprobs),
        grammar: form.grammar.clone(),
        expected: Arc::default(),
        adapters: None, // one list for all requests
        hold: None,     // and so is this
        scope: CacheScope { adapter: 0, tenant: request.tenant.project.0.unsigned_abs() },
        tenant: request.tenant,
        priority: request.priority,
    })
}

fn sampling(defaults: &SamplingOverrides, given: &SamplingOverrides) -> SamplingParams {
    let openai = SamplingParams::default();
    macro_rules! pick {
        ($field:ident) => {
            given.$field.or(defaults.$field).unwrap_or(openai.$field)
        };
    }
    SamplingParams {
        temperature: pick!(temperature),
        top_p: pick!(top_p),
        top_k: pick!(top_k),
        min_p: pick!(min_p),
        repetition_penalty: pick!(repetition_penalty),
        presence_penalty: pick!(presence_penalty),
        frequency_penalty: pick!(frequency_penalty),
    }
}

fn submit_error(error: SubmitError, request: &TextRequest) -> Error {
    match error {
        SubmitError::TooLong { prompt, max_tokens, max } => Error::ContextLengthExceeded {
            prompt,
            completion: max_tokens,
            max,
            param: request.max_tokens_param,
        },
        SubmitError::EmptyPrompt => {
            Error::invalid(request.prompt_param(), "The prompt has no token.")
        }
        SubmitError::UnknownToken(id) => {
            let message = format!("Token id {id} is not in the vocabulary.");
            Error::invalid(request.prompt_param(), message)
        }
        SubmitError::QueueFull { waiting, retry_after } => {
            Error::QueueFull { waiting, retry_after }
        }
        SubmitError::Unread { unread, retry_after } => Error::Unread { unread, retry_after },
        SubmitError::ShuttingDown => Error::ShuttingDown,
    }
}

/// The operating system's randomness, through the standard library's hasher.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

impl TextRequest {
    /// One answer of any length, with nothing asked for.
    pub fn new(model: &str, prompt: Prompt) -> Self {
        Self {
            model: model.to_owned(),
            prompt,
            n: 1,
            max_tokens: None,
            max_tokens_param: "max_tokens",
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            echo: false,
            suffix: None,
            prompt_logprobs: None,
            token_ids: false,
            format: None,
            prediction: None,
            system_param: None,
            tools: None,
            sampling: SamplingOverrides::default(),
            tenant: Tenant::default(),
            priority: Priority::Default,
            keep_alive: None,
            adapters: Vec::new(),
        }
    }

    fn prompt_param(&self) -> &'static str {
        match self.prompt {
            Prompt::Chat { .. } => "messages",
            Prompt::Text(_) | Prompt::Tokens(_) => "prompt",
        }
    }
}
