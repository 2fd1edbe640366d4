//! Bodies of `/api/chat` and `/api/generate` to the house's request.

use serde_json::{Map, Value, json};

use super::{model_name, options};
use crate::pipeline::{Format, Prompt, TextRequest};
use crate::server::error::ApiError;
use crate::server::extract::{Fields, kind};
use crate::server::fields::{self, Field, Takes, honoured, no_effect, refused, required};
use crate::server::{call, messages, tools};
use crate::text::Shape;
use crate::types::KeepAlive;

const FITS: &str = "what does not fit is refused, never cut";

/// `think`: whether, or how much.
const THINK: Takes = Takes::OneOf(&[Takes::Bool, Takes::Text]);

/// `POST /api/chat`.
pub(super) const CHAT: &[Field] = &[
    required("model", Takes::Text),
    honoured("messages", Takes::List),
    honoured("tools", Takes::List),
    honoured("think", THINK),
    honoured("format", fields::TEXT_OR_OBJECT),
    honoured("options", Takes::Table(options::OPTIONS)),
    honoured("stream", Takes::Bool),
    honoured("keep_alive", fields::TEXT_OR_NUMBER),
    honoured("logprobs", Takes::Bool),
    honoured("top_logprobs", fields::TOP_LOGPROBS),
    no_effect("shift", Takes::Bool, FITS),
    no_effect("truncate", Takes::Bool, FITS),
];

/// `POST /api/generate`.
pub(super) const GENERATE: &[Field] = &[
    required("model", Takes::Text),
    honoured("prompt", Takes::Text),
    // Honoured by models that learned to fill in the middle; the others refuse it.
    honoured("suffix", Takes::Text),
    honoured("system", Takes::Text),
    honoured("raw", Takes::Bool),
    honoured("think", THINK),
    honoured("format", fields::TEXT_OR_OBJECT),
    honoured("options", Takes::Table(options::OPTIONS)),
    honoured("stream", Takes::Bool),
    honoured("keep_alive", fields::TEXT_OR_NUMBER),
    honoured("logprobs", Takes::Bool),
    honoured("top_logprobs", fields::TOP_LOGPROBS),
    no_effect("shift", Takes::Bool, FITS),
    no_effect("truncate", Takes::Bool, FITS),
    refused("template", is_empty_text, "a model is asked in its own template, or 'raw'"),
    refused("context", fields::is_empty_list, "send the conversation to /api/chat"),
    refused("images", fields::is_empty_list, "only text is read"),
    refused("width", fields::never, "no pictures are made"),
    refused("height", fields::never, "no pictures are made"),
    refused("steps", fields::never, "no pictures are made"),
];

/// One of `messages`.
const MESSAGE: &[Field] = &[
    honoured("role", Takes::Text),
    honoured("content", Takes::Text),
    honoured("thinking", Takes::Text),
    honoured("tool_calls", Takes::List),
    honoured("tool_name", Takes::Text),
    honoured("tool_call_id", Takes::Text),
    refused("images", fields::is_empty_list, "only text is read"),
];

/// A body, read.
#[derive(Debug)]
pub(super) struct Asked {
    /// The model, as the client named it.
    pub model: String,
    pub keep_alive: Option<KeepAlive>,
    /// `None`: the model is only to be there.
    pub request: Option<TextRequest>,
    /// It wants a thought, from a model that can.
    pub thinks: bool,
    pub stream: bool,
}

/// Reads the body of a chat.
///
/// # Errors
/// The first field that is unknown, refused, malformed or out of range.
pub(super) fn chat(mut body: Fields, lenient: bool) -> Result<Asked, ApiError> {
    fields::check(body.map(), CHAT, "", lenient)?;
    let (mut asked, template_kwargs) = common(&mut body)?;
    let tools = match body.map().get("tools") {
        Some(Value::Array(list)) if list.is_empty() => None,
        _ => tools::read(&mut body, lenient)?,
    };
    let messages = match body.value("messages") {
        None => None,
        Some(Value::Array(list)) if list.is_empty() => None,
        Some(Value::Array(list)) => {
            messages::normalise(Some(openai_messages(list, lenient)?), lenient).map(Some)?
        }
        Some(other) => return Err(ApiError::wrong_type("messages", "an array", kind(&other))),
    };
    let asks_nothing = messages.is_none();
    let messages = messages.unwrap_or_default();
    let prompt = Prompt::Chat { messages, template_kwargs };
    let request = generating(&mut body, &asked.model, prompt, lenient)?;
    asked.request = (!asks_nothing).then_some(TextRequest { tools, ..request });
    Ok(asked)
}

/// Reads the body of a completion.
///
/// # Errors
/// As in [`chat`].
pub(super) fn generate(mut body: Fields, lenient: bool) -> Result<Asked, ApiError> {
    fields::check(body.map(), GENERATE, "", lenient)?;
    let (mut asked, template_kwargs) = common(&mut body)?;
    let raw = body.bool("raw")?.unwrap_or(false);
    let text = |name: &str, body: &mut Fields| {
        body.string(name).map(|text| text.filter(|text| !text.is_empty()))
    };
    let (text, suffix, system) =
        (text("prompt", &mut body)?, text("suffix", &mut body)?, text("system", &mut body)?);
    let plain = raw || suffix.is_some();
    if plain && (system.is_some() || asked.thinks) {
        let name = if system.is_some() { "system" } else { "think" };
        let message =
            format!("Invalid '{name}': with 'raw' or 'suffix' there is no template for it.");
        return Err(ApiError::invalid(name, message));
    }
    let asks_nothing = text.is_none() && suffix.is_none();
    let system_param = system.as_ref().map(|_| "system");
    let text = text.unwrap_or_default();
    let prompt = match plain {
        true => Prompt::Text(text),
        false => {
            let system = system.map(|system| json!({"role": "system", "content": system}));
            let messages = system.into_iter().chain([json!({"role": "user", "content": text})]);
            Prompt::Chat { messages: messages.collect(), template_kwargs }
        }
    };
    let request = generating(&mut body, &asked.model, prompt, lenient)?;
    asked.request = (!asks_nothing).then_some(TextRequest { suffix, system_param, ..request });
    Ok(asked)
}

/// What both have, but for how to generate; with it the variables of the template.
fn common(body: &mut Fields) -> Result<(Asked, Map<String, Value>), ApiError> {
    let model = model_name(body)?;
    let mut kwargs = Map::new();
    let thinks = think(body.value("think"), &mut kwargs)?;
    let stream = body.bool("stream")?.unwrap_or(true);
    let keep_alive = call::keep_alive(body)?;
    Ok((Asked { model, keep_alive, request: None, thinks, stream }, kwargs))
}

/// The request with options, format and log-probabilities.
fn generating(
    body: &mut Fields,
    model: &str,
    prompt: Prompt,
    lenient: bool,
) -> Result<TextRequest, ApiError> {
    let format = format(body.value("format"))?;
    let top = body.count("top_logprobs", 0..=20)?;
    let logprobs = body.bool("logprobs")?.unwrap_or(false) || top.is_some_and(|top| top > 0);
    let logprobs = logprobs.then(|| top.unwrap_or(0));
    let request = TextRequest { format, logprobs, ..TextRequest::new(model, prompt) };
    options::read(body, request, lenient)
}

/// `think`, as the variables that templates read. Says whether a thought is wanted.
fn think(value: Option<Value>, kwargs: &mut Map<String, Value>) -> Result<bool, ApiError> {
    let thinks = match value {
        // As the model does it by itself.
        None => return Ok(false),
        Some(Value::Bool(thinks)) => thinks,
        Some(Value::String(level)) if ["low", "medium", "high", "max"].contains(&&*level) => {
            kwargs.insert("reasoning_effort".to_owned(), json!(level));
            true
        }
        Some(Value::String(other)) => {
            let message = format!(
                "Invalid 'think': '{other}' is none of true, false, low, medium, high, max."
            );
            return Err(ApiError::invalid("think", message));
        }
        Some(other) => {
            return Err(ApiError::wrong_type("think", "a boolean or a level", kind(&other)));
        }
    };
    for switch in ["enable_thinking", "thinking"] {
        kwargs.insert(switch.to_owned(), json!(thinks));
    }
    Ok(thinks)
}

fn format(value: Option<Value>) -> Result<Option<Format>, ApiError> {
    const PARAM: &str = "format";
    let shape = match value {
        None => return Ok(None),
        Some(Value::String(word)) if word.is_empty() => return Ok(None),
        Some(Value::String(word)) if word == "json" => Shape::object(),
        Some(schema @ Value::Object(_)) => Shape::Json { schema, lenient: false },
        Some(Value::String(other)) => {
            let message = format!("Invalid '{PARAM}': '{other}' is not 'json', nor a schema.");
            return Err(ApiError::invalid(PARAM, message));
        }
        Some(other) => {
            return Err(ApiError::wrong_type(PARAM, "\"json\" or a schema", kind(&other)));
        }
    };
    Ok(Some(Format { shape, param: PARAM, refusal: format!("Invalid schema for '{PARAM}'") }))
}

/// The same messages in OpenAI's form: one for one, so that errors name the right one.
fn openai_messages(list: Vec<Value>, lenient: bool) -> Result<Value, ApiError> {
    // Calls that have no result yet: id and name.
    let (mut open, mut count) = (Vec::new(), 0);
    let one = |(i, value): (usize, Value)| {
        let path = format!("messages[{i}]");
        let Value::Object(mut map) = value else {
            return Err(ApiError::wrong_type(&path, "an object", kind(&value)));
        };
        fields::check(&map, MESSAGE, &format!("{path}."), lenient)?;
        map.remove("images");
        if let Some(thinking) = map.remove("thinking") {
            map.insert("reasoning_content".to_owned(), thinking);
        }
        if map.get("content").is_none_or(Value::is_null) {
            map.insert("content".to_owned(), json!(""));
        }
        let name = Fields::within(&path, map.clone()).string("tool_name")?;
        map.remove("tool_name");
        if map.get("role").is_some_and(|role| role == "tool") {
            let given = map.get("tool_call_id").filter(|id| !id.is_null()).cloned();
            let id = given.unwrap_or_else(|| answered(&mut open, name.as_deref()));
            map.insert("tool_call_id".to_owned(), id);
            map.extend(name.map(|name| ("name".to_owned(), json!(name))));
        }
        if let Some(Value::Array(calls)) = map.get_mut("tool_calls") {
            for (j, call) in calls.iter_mut().enumerate() {
                let path = format!("{path}.tool_calls[{j}]");
                let id = openai_call(&path, call, &mut count)?;
                if open.len() == OPEN_MAX {
                    let words = format!("more than {OPEN_MAX} calls wait for a result");
                    return Err(ApiError::invalid(&path, format!("Invalid '{path}': {words}.")));
                }
                open.push((id, call["function"]["name"].clone()));
            }
        }
        Ok(Value::Object(map))
    };
    list.into_iter().enumerate().map(one).collect::<Result<_, _>>().map(Value::Array)
}

/// Calls without a result at once.
const OPEN_MAX: usize = 1024;

/// The id of the call that a result without one belongs to: the first of its name, else the first.
fn answered(open: &mut Vec<(Value, Value)>, name: Option<&str>) -> Value {
    let named = |(_, own): &(Value, Value)| name.is_none_or(|name| own == name);
    match open.iter().position(named).or((!open.is_empty()).then_some(0)) {
        Some(at) => open.remove(at).0,
        None => json!("call_0"),
    }
}

/// Arguments are an object there and a text here. Returns the id, a new one where there is none.
fn openai_call(path: &str, call: &mut Value, count: &mut usize) -> Result<Value, ApiError> {
    let arguments = match &call["function"]["arguments"] {
        arguments @ Value::Object(_) => arguments.to_string(),
        Value::Null => "{}".to_owned(),
        other => {
            let path = format!("{path}.function.arguments");
            return Err(ApiError::wrong_type(&path, "an object", kind(other)));
        }
    };
    let id = match &call["id"] {
        Value::String(id) if !id.is_empty() => json!(id),
        _ => {
            *count += 1;
            json!(format!("call_{count}"))
        }
    };
    let name = call["function"]["name"].clone();
    let function = json!({"name": name, "arguments": arguments});
    *call = json!({"id": id, "type": "function", "function": function});
    Ok(id)
}

fn is_empty_text(value: &Value) -> bool {
    value == ""
}
