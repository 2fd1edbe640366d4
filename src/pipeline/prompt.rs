//! From what a request wants continued to the tokens that the model sees.

use serde_json::{Map, Value};

use super::apart::LONG_PROMPT_BYTES;
use super::form::Form;
use super::{Prompt, TextRequest, Tools};
use crate::error::Error;
use crate::registry::ServedModel;
use crate::text::{Guard, Special};
use crate::types::TokenId;

/// What takes time to find out about a request.
pub(super) struct Prepared {
    pub prompt: Vec<TokenId>,
    /// What the answer is expected to be.
    pub expected: Vec<TokenId>,
    pub form: Form,
}

impl TextRequest {
    /// About how much text there is to encode for it.
    pub(super) fn len_bytes(&self) -> usize {
        let beside = [&self.prediction, &self.suffix].into_iter().flatten();
        let tools = self.tools.iter().flat_map(|tools| &tools.list);
        self.prompt.len_bytes()
            + beside.map(String::len).sum::<usize>()
            + tools.map(|tool| weigh(&tool.definition)).sum::<usize>()
    }
}

impl Prompt {
    /// About how much text there is to encode: in a chat, every string and a little for each value.
    fn len_bytes(&self) -> usize {
        match self {
            Self::Chat { messages, template_kwargs } => {
                weigh(messages) + template_kwargs.values().map(weigh).sum::<usize>()
            }
            Self::Text(text) => text.len(),
            Self::Tokens(_) => 0,
        }
    }
}

fn weigh(value: &Value) -> usize {
    const MARKUP: usize = 16;
    MARKUP
        + match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(weigh).sum(),
            Value::Object(map) => map.values().map(weigh).sum(),
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        }
}

/// Renders, encodes and compiles.
pub(super) fn prepare(model: &ServedModel, request: &TextRequest) -> Result<Prepared, Error> {
    let (text, mut prompt) = encode(model, request, Special::PROMPT)?;
    if let Some(suffix) = &request.suffix {
        check_len(model, suffix, "suffix")?;
        let filled = model.tokenizer().fill_in(&prompt, suffix);
        let filled = filled.map_err(|e| Error::invalid("suffix", e.to_string()))?;
        let filled = filled.ok_or_else(|| {
            let message = format!("The model `{}` cannot fill in the middle.", model.id());
            Error::unsupported("suffix", message)
        })?;
        let max = model.context_len();
        if filled.len() - prompt.len() > max {
            let (prompt, param) = (filled.len(), "suffix");
            return Err(Error::ContextLengthExceeded { prompt, completion: 0, max, param });
        }
        prompt = filled;
    }
    let max = model.context_len();
    if prompt.len() > max || (prompt.len() == max && request.max_tokens != Some(0)) {
        return Err(too_long(model, request, prompt.len()));
    }
    let expected = match &request.prediction {
        Some(text) => model.tokenizer().encode(text, Special::NONE),
        None => Ok(Vec::new()),
    };
    let expected = expected.map_err(|e| Error::invalid("prediction.content", e.to_string()))?;
    Ok(Prepared { prompt, expected, form: Form::new(model, request, &text)? })
}

/// The prompt as text and as tokens. `special` is for plain text; a conversation has its special
/// tokens where its template puts them. A text that already begins with the beginning-of-text token
/// gets no second one.
pub(super) fn encode(
    model: &ServedModel,
    request: &TextRequest,
    special: Special,
) -> Result<(String, Vec<TokenId>), Error> {
    let tokenizer = model.tokenizer();
    let fail = |e: crate::text::TextError| Error::invalid(request.prompt_param(), e.to_string());
    match &request.prompt {
        Prompt::Tokens(ids) => Ok((String::new(), ids.clone())),
        Prompt::Text(text) => {
            check_len(model, text, request.prompt_param())?;
            Ok((text.clone(), tokenizer.encode(text, special).map_err(fail)?))
        }
        Prompt::Chat { messages, template_kwargs } => {
            let tools = request.tools.as_ref().and_then(Tools::definitions);
            let beside = model.harmony().is_some();
            let guard = Guard::new(messages.clone(), tools, tokenizer, beside);
            let text = render(model, &guard, template_kwargs)?;
            let revealed = guard.reveal(&text);
            if let Err(Error::ContextLengthExceeded { prompt, .. }) =
                check_len(model, &revealed, "messages")
            {
                return Err(too_long(model, request, prompt));
            }
            let ids = guard.encode(&text, tokenizer).map_err(fail)?;
            Ok((revealed, ids))
        }
    }
}

/// What can never fit is not encoded first: that takes seconds for a few MB.
fn check_len(model: &ServedModel, text: &str, param: &'static str) -> Result<(), Error> {
    let max = model.context_len();
    if text.len() < LONG_PROMPT_BYTES {
        return Ok(());
    }
    match model.tokenizer().tokens_at_least(text.len()) {
        prompt if prompt > max => {
            Err(Error::ContextLengthExceeded { prompt, completion: 0, max, param })
        }
        _ => Ok(()),
    }
}

/// A prompt that leaves no room for an answer. What does so alone is to blame, and not the rest.
fn too_long(model: &ServedModel, request: &TextRequest, prompt: usize) -> Error {
    let max = model.context_len();
    let alone = |text: &str| {
        let long = || model.tokenizer().encode(text, Special::NONE).is_ok_and(|t| t.len() >= max);
        check_len(model, text, "messages").is_err() || long()
    };
    let is_alone = |(text, _): &(String, &'static str)| alone(text);
    let param = parts(request).find(is_alone).map_or(request.prompt_param(), |(_, param)| param);
    Error::ContextLengthExceeded { prompt, completion: 0, max, param }
}

/// What a conversation is made of besides its messages, and the field of each.
fn parts(request: &TextRequest) -> impl Iterator<Item = (String, &'static str)> {
    let system = match (&request.prompt, request.system_param) {
        (Prompt::Chat { messages, .. }, Some(param)) => {
            messages[0]["content"].as_str().map(|text| (text.to_owned(), param))
        }
        _ => None,
    };
    let tools = request.tools.as_ref().and_then(|tools| {
        tools.definitions().map(|definitions| (definitions.to_string(), tools.param))
    });
    system.into_iter().chain(tools)
}

/// A conversation as the model's template has it.
fn render(
    model: &ServedModel,
    guard: &Guard,
    template_kwargs: &Map<String, Value>,
) -> Result<String, Error> {
    let (Some(template), Some(style)) = (model.template(), model.style()) else {
        let message = format!("The model `{}` has no chat template.", model.id());
        return Err(Error::unsupported("messages", message));
    };
    let (messages, tools) = style.adapt(guard.messages.clone(), guard.tools.clone());
    let mut kwargs = template_kwargs.clone();
    if let Some(harmony) = model.harmony() {
        let settled = harmony.settle_effort(&mut kwargs);
        settled.map_err(|why| Error::invalid("chat_template_kwargs.reasoning_effort", why))?;
    }
    if let Some(effort) = kwargs.get("reasoning_effort").and_then(Value::as_str) {
        // Other templates know a switch only.
        let thinks = Value::Bool(effort != "none" && effort != "minimal");
        for switch in ["enable_thinking", "thinking"] {
            if template.mentions(switch) {
                kwargs.entry(switch).or_insert(thinks.clone());
            }
        }
    }
    let text = template.render(&messages, tools.as_ref(), true, &kwargs);
    text.map_err(|e| Error::invalid("messages", e.to_string()))
}
