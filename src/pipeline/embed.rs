//! One request for vectors: find the model, encode, check, submit, cut.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use super::Pipeline;
use crate::embeddings::{Dimensions, EmbeddingModel, SubmitError, Vectors, cut};
use crate::error::Error;
use crate::registry::Lease;
use crate::text::Special;
use crate::types::{KeepAlive, Tenant, TokenId};

/// A request for vectors.
#[derive(Clone, Debug)]
pub struct EmbedRequest {
    /// Id of a served model that embeds.
    pub model: String,
    /// What is to be embedded, at least one.
    pub inputs: Vec<EmbedInput>,
    /// Numbers of a vector; `None`: all that the model has.
    pub dimensions: Option<usize>,
    /// A text that is too long loses its end; otherwise it is refused.
    pub truncate: bool,
    /// How long the model stays in memory after it.
    pub keep_alive: Option<KeepAlive>,
    /// Who asks.
    pub tenant: Tenant,
}

impl EmbedRequest {
    /// How much text there is to encode.
    fn len_bytes(&self) -> usize {
        let len = |input: &EmbedInput| match input {
            EmbedInput::Text(text) => text.len(),
            EmbedInput::Tokens(_) => 0,
        };
        self.inputs.iter().map(len).sum()
    }
}

/// One text.
#[derive(Clone, Debug)]
pub enum EmbedInput {
    /// Text; special tokens are added, and their spelling inside it is ordinary text.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<TokenId>),
}

/// The answer.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// Id of the model that made them.
    pub model: String,
    /// One for each input, in order.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens of all inputs, special ones included.
    pub prompt_tokens: usize,
}

/// Vectors on their way. Dropping it cancels what is not computed yet.
pub struct Embedding {
    model: Lease<EmbeddingModel>,
    vectors: Vectors,
    dimensions: usize,
    prompt_tokens: usize,
}

impl Embedding {
    /// Id of the model that makes them.
    pub fn model(&self) -> &str {
        self.model.id()
    }

    /// Tokens of all inputs, special ones included.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// How many of them are computed, also when nobody waits any more.
    pub fn computed(&self) -> Arc<AtomicUsize> {
        self.vectors.computed()
    }

    /// Waits for all.
    ///
    /// # Errors
    /// A pass with one of them failed.
    pub async fn wait(self) -> Result<Embeddings, Error> {
        let Self { model, vectors, dimensions, prompt_tokens } = self;
        let mut vectors = vectors.wait().await.map_err(Error::Internal)?;
        let normalize = model.settings().normalize;
        vectors.iter_mut().for_each(|vector| cut(vector, dimensions, normalize));
        Ok(Embeddings { model: model.id().to_owned(), vectors, prompt_tokens })
    }
}

/// Tokens of all inputs of a request, as at OpenAI.
const TOKENS_MAX: usize = 300_000;

impl Pipeline {
    /// Begins to embed.
    pub async fn embed(&self, request: EmbedRequest) -> Result<Embedding, Error> {
        let model =
            self.registry.embedder(&request.model, request.tenant, request.keep_alive).await?;
        self.embed_with(&model, request).await
    }

    /// The same by a model that is held.
    pub async fn embed_with(
        &self,
        model: &Lease<EmbeddingModel>,
        request: EmbedRequest,
    ) -> Result<Embedding, Error> {
        let dimensions = check_dimensions(model, request.dimensions)?;
        let (len, inputs, encoder) = (request.len_bytes(), request.inputs, model.clone());
        let (truncate, tenant) = (request.truncate, request.tenant);
        let texts =
            self.apart.encode(tenant, len, move || encode(&encoder, inputs, truncate)).await?;
        let prompt_tokens = texts.iter().map(Vec::len).sum();
        let vectors = model.queue().submit(tenant, texts).map_err(|error| match error {
            SubmitError::QueueFull { waiting, retry_after } => {
                Error::QueueFull { waiting, retry_after }
            }
            SubmitError::ShuttingDown => Error::ShuttingDown,
        })?;
        Ok(Embedding { model: model.clone(), vectors, dimensions, prompt_tokens })
    }
}

/// Token ids of every input, within what the model and the request may have.
fn encode(
    model: &EmbeddingModel,
    inputs: Vec<EmbedInput>,
    truncate: bool,
) -> Result<Vec<Vec<TokenId>>, Error> {
    let mut texts = Vec::with_capacity(inputs.len());
    let mut total = 0;
    for input in inputs {
        let mut ids = match input {
            EmbedInput::Tokens(ids) => ids,
            EmbedInput::Text(text) => {
                let encoded = model.tokenizer().encode(&text, Special::ADD);
                encoded.map_err(|e| Error::invalid("input", e.to_string()))?
            }
        };
        let max = model.settings().context_len;
        if truncate && ids.len() > max {
            // The last token is the mark of the end.
            ids.drain(max - 1..ids.len() - 1);
        }
        let prompt = ids.len();
        if prompt > max {
            return Err(Error::ContextLengthExceeded {
                prompt,
                completion: 0,
                max,
                param: "input",
            });
        }
        let (at, vocab_len) = (texts.len(), model.vocab_len());
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_len) {
            let message = format!(
                "Invalid 'input[{at}]': token id {id} is not in the vocabulary of {vocab_len} \
                 tokens."
            );
            return Err(Error::invalid("input", message));
        }
        if ids.is_empty() {
            return Err(Error::invalid(
                "input",
                format!("Invalid 'input[{at}]': it has no token."),
            ));
        }
        total += prompt;
        if total > TOKENS_MAX {
            let message = format!(
                "Invalid 'input': the inputs have more than {TOKENS_MAX} tokens together, the most \
                 that one request may have."
            );
            return Err(Error::invalid("input", message));
        }
        texts.push(ids);
    }
    Ok(texts)
}

/// The numbers that each vector will have.
fn check_dimensions(model: &EmbeddingModel, asked: Option<usize>) -> Result<usize, Error> {
    let whole = model.vector_len();
    let Some(asked) = asked.filter(|&asked| asked != whole) else { return Ok(whole) };
    let id = model.id();
    let allowed = match &model.settings().dimensions {
        Dimensions::Any if asked < whole => return Ok(asked),
        Dimensions::Of(list) if asked < whole && list.contains(&asked) => return Ok(asked),
        Dimensions::Any => format!("up to {whole}"),
        Dimensions::Of(list) => {
            let list: Vec<_> = list.iter().map(usize::to_string).collect();
            format!("{} or {whole}", list.join(", "))
        }
        Dimensions::Whole => format!("{whole}: it was not trained for shorter ones"),
    };
    let message =
        format!("Invalid 'dimensions': the vectors of `{id}` have {allowed}, and not {asked}.");
    Err(Error::invalid("dimensions", message))
}
