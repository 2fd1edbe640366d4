//! The body of a response: the same request as a chat, spoken differently.
//!
//! What both have is handed to the parser of chats, so that tools, formats and sampling mean the
//! same in both; names in errors are turned back to those that the client wrote.

use serde_json::{Map, Value, json};

use super::tables::{REASONING, RESPONSES, STREAM_OPTIONS, TEXT};
use crate::server::call::Call;
use crate::server::error::ApiError;
use crate::server::extract::{Fields, kind};
use crate::server::fields;
use crate::server::paging::Query;
use crate::server::{call, chat, items, metadata, pairs};

/// Fields that a chat knows under the same name.
const SAME: [&str; 15] = [
    "model",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "adapters",
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "keep_alive",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "top_k",
    "service_tier",
];

const LOGPROBS: &str = "message.output_text.logprobs";
const SEALED: &str = "reasoning.encrypted_content";

/// What may be included. All but the first two come from tools that there are not.
pub(in crate::server) const INCLUDABLE: [&str; 8] = [
    LOGPROBS,
    SEALED,
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];

/// Tokens of an answer, at least.
pub(super) const OUTPUT_TOKENS_MIN: u32 = 16;

/// A request, read but for what was said before.
#[derive(Debug)]
pub(in crate::server) struct Draft {
    /// A chat without its messages.
    chat: Map<String, Value>,
    pub instructions: Option<String>,
    /// Items of this request, in the form in which they are stored.
    pub input: Vec<Value>,
    pub conversation: Option<String>,
    pub previous: Option<String>,
    pub store: bool,
    pub background: bool,
    pub stream: bool,
    /// What answers carry because it was asked for.
    pub(super) included: Included,
    /// What is too long loses its beginning.
    pub truncate: bool,
    /// The fields of the object that repeat the request.
    pub echo: Map<String, Value>,
    lenient: bool,
}

/// What a client may have included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Included {
    /// Tokens come with their log-probabilities.
    pub logprobs: bool,
    /// What was thought comes sealed besides, for clients that send back nothing else of it.
    pub sealed: bool,
}

/// Reads a body.
///
/// # Errors
/// The first field that is unknown, refused, malformed or out of range.
pub(in crate::server) fn read(mut body: Fields, lenient: bool) -> Result<Draft, ApiError> {
    fields::check(body.map(), RESPONSES, "", lenient)?;
    let echo = echo(body.map());
    let metadata = metadata::read(&mut body)?.unwrap_or_default();
    let mut chat = Map::new();
    for name in SAME {
        chat.extend(body.value(name).map(|value| (name.to_owned(), value)));
    }
    if chat.get("model").is_none_or(|model| model == "") {
        return Err(ApiError::missing("model"));
    }
    if let Some(max) = body.count("max_output_tokens", OUTPUT_TOKENS_MIN..=u32::MAX)? {
        chat.insert("max_completion_tokens".to_owned(), json!(max));
    }
    let included = included(&mut body, &mut chat)?;
    tools(&mut body, &mut chat)?;
    text(&mut body, &mut chat, lenient)?;
    reasoning(&mut body, &mut chat, lenient)?;
    let stream = body.bool("stream")?.unwrap_or(false);
    if let Some(options) = body.object("stream_options")? {
        fields::check(&options, STREAM_OPTIONS, "stream_options.", lenient)?;
        if !stream {
            return Err(call::options_without_stream());
        }
    }
    let (previous, conversation) = before(&mut body, lenient)?;
    let store = body.bool("store")?.unwrap_or(true);
    let background = body.bool("background")?.unwrap_or(false);
    if background && !store {
        let message = "Background responses are stored; leave 'store' out, or set it to true.";
        return Err(ApiError::invalid("background", message));
    }
    let truncate = truncate(&mut body)?;
    let instructions = body.string("instructions")?;
    let input = input(&mut body, previous.is_some() || conversation.is_some(), lenient)?;
    let mut echo = echo;
    echo.insert("metadata".to_owned(), Value::Object(metadata));
    echo.insert(
        "conversation".to_owned(),
        conversation.as_ref().map_or(Value::Null, |id| json!({"id": id})),
    );
    Ok(Draft {
        chat,
        instructions,
        input,
        conversation,
        previous,
        store,
        background,
        stream,
        included,
        truncate,
        echo,
        lenient,
    })
}

impl Draft {
    /// The model that it asks.
    pub(in crate::server) fn model(&self) -> &str {
        self.chat.get("model").and_then(Value::as_str).unwrap_or_default()
    }

    /// Reads the chat that it is as far as that is known before what was said before is.
    pub(in crate::server) fn check(&self) -> Result<(), ApiError> {
        let refers = self.input.iter().any(|item| item["type"] == "item_reference");
        if refers || self.previous.is_some() || self.conversation.is_some() {
            return Ok(());
        }
        pairs::of_items(&self.input)?;
        self.call(&self.input).map(drop)
    }

    /// The chat that it is, after these items.
    pub(super) fn call(&self, said: &[Value]) -> Result<Call, ApiError> {
        let mut body = self.chat.clone();
        let messages = items::messages(self.instructions.as_deref(), said);
        body.insert("messages".to_owned(), Value::Array(messages));
        let mut call = chat::read(Fields::within("", body), self.lenient).map_err(own_names)?;
        let system_param = self.instructions.as_ref().map(|_| "instructions");
        call.requests.iter_mut().for_each(|request| request.system_param = system_param);
        Ok(call)
    }

    /// A note about everything before: short, and without thought.
    pub(super) fn brief(&mut self, tokens_max: usize) {
        self.chat.insert("max_completion_tokens".to_owned(), json!(tokens_max));
        self.chat.insert("reasoning_effort".to_owned(), json!("none"));
    }

    /// Tokens that the answer wants to have room for.
    pub(super) fn room_wanted(&self) -> usize {
        let asked = self.chat.get("max_completion_tokens").and_then(Value::as_u64);
        asked.unwrap_or(OUTPUT_TOKENS_MIN.into()) as usize
    }
}

/// An error about a chat as one about the response that it was.
pub(super) fn own_names(mut error: ApiError) -> ApiError {
    const NAMES: [(&str, &str); 8] = [
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format.json_schema", "text.format"),
        ("response_format", "text.format"),
        ("reasoning_effort", "reasoning.effort"),
        ("tool_choice.function", "tool_choice"),
        ("tool_choice.custom", "tool_choice"),
        ("tool_choice.allowed_tools", "tool_choice"),
        ("messages", "input"),
    ];
    let Some(param) = &error.param else { return error };
    let mut name = param.clone();
    for (chat, own) in NAMES {
        if let Some(rest) = name.strip_prefix(chat) {
            name = format!("{own}{rest}");
            break;
        }
    }
    if name.starts_with("tools[") {
        name = name.replace("].function", "]").replace("].custom", "]");
        name = name.replace("].format.grammar", "].format");
    }
    error.message = error.message.replace(param.as_str(), &name);
    error.param = Some(name);
    error
}

/// The fields of the object as the request has them, or as they are when it says nothing.
fn echo(body: &Map<String, Value>) -> Map<String, Value> {
    let field = |name: &str, default: Value| {
        let given = body.get(name).filter(|value| !value.is_null());
        (name.to_owned(), given.cloned().unwrap_or(default))
    };
    let within = |name: &str, member: &str, default: Value| {
        let given = body.get(name).and_then(|object| object.get(member));
        given.filter(|value| !value.is_null()).cloned().unwrap_or(default)
    };
    let text = json!({"format": within("text", "format", json!({"type": "text"})),
                      "verbosity": within("text", "verbosity", json!("medium"))});
    let reasoning = json!({"effort": within("reasoning", "effort", Value::Null),
                           "summary": within("reasoning", "summary", Value::Null)});
    Map::from_iter([
        field("background", json!(false)),
        field("instructions", Value::Null),
        field("max_output_tokens", Value::Null),
        field("max_tool_calls", Value::Null),
        field("model", Value::Null),
        field("parallel_tool_calls", json!(true)),
        field("presence_penalty", json!(0.0)),
        field("frequency_penalty", json!(0.0)),
        field("previous_response_id", Value::Null),
        ("conversation".to_owned(), Value::Null),
        field("prompt", Value::Null),
        field("prompt_cache_key", Value::Null),
        field("prompt_cache_retention", Value::Null),
        ("reasoning".to_owned(), reasoning),
        field("safety_identifier", Value::Null),
        field("service_tier", json!("default")),
        field("store", json!(true)),
        field("temperature", Value::Null),
        ("text".to_owned(), text),
        field("tool_choice", json!("auto")),
        ("tools".to_owned(), whole_tools(body.get("tools"))),
        field("top_logprobs", json!(0)),
        field("top_p", Value::Null),
        field("truncation", json!("disabled")),
        field("user", Value::Null),
        ("metadata".to_owned(), json!({})),
    ])
}

/// Tools with the fields that an answer never leaves out.
fn whole_tools(tools: Option<&Value>) -> Value {
    let mut tools = tools.filter(|tools| !tools.is_null()).cloned().unwrap_or(json!([]));
    let functions = tools.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut);
    for tool in functions.filter(|tool| tool.get("type") == Some(&json!("function"))) {
        for name in ["description", "parameters", "strict"] {
            tool.entry(name).or_insert(Value::Null);
        }
    }
    tools
}

fn truncate(body: &mut Fields) -> Result<bool, ApiError> {
    match body.string("truncation")?.as_deref() {
        None | Some("disabled") => Ok(false),
        Some("auto") => Ok(true),
        Some(other) => {
            let message =
                format!("Invalid value: '{other}'. Supported values are: 'auto' and 'disabled'.");
            Err(ApiError::invalid("truncation", message))
        }
    }
}

/// `previous_response_id` and `conversation`, of which there is one at most.
fn before(body: &mut Fields, lenient: bool) -> Result<(Option<String>, Option<String>), ApiError> {
    let previous = body.string("previous_response_id")?;
    let conversation = match body.value("conversation") {
        None => None,
        Some(Value::String(id)) => Some(id),
        Some(Value::Object(object)) => {
            let mut object = Fields::within("conversation", object);
            let id = object.string("id")?.ok_or_else(|| ApiError::missing("conversation.id"))?;
            object.end(&[], lenient)?;
            Some(id)
        }
        Some(other) => {
            let expected = "a string or an object";
            return Err(ApiError::wrong_type("conversation", expected, kind(&other)));
        }
    };
    if previous.is_some() && conversation.is_some() {
        let message = "Mutually exclusive parameters: 'previous_response_id' and 'conversation'.";
        return Err(ApiError::invalid("previous_response_id", message));
    }
    Ok((previous, conversation))
}

fn input(body: &mut Fields, may_be_empty: bool, lenient: bool) -> Result<Vec<Value>, ApiError> {
    match body.value("input") {
        None if may_be_empty => Ok(Vec::new()),
        None => Err(ApiError::missing("input")),
        Some(Value::String(text)) => Ok(vec![items::user_text(&text)]),
        Some(Value::Array(list)) if list.is_empty() && !may_be_empty => {
            let message = "Invalid 'input': expected at least one item, but got none.";
            Err(ApiError::invalid("input", message))
        }
        Some(Value::Array(list)) => items::read("input", list, lenient),
        Some(other) => {
            Err(ApiError::wrong_type("input", "a string or an array of items", kind(&other)))
        }
    }
}

/// `include` and `top_logprobs`.
fn included(body: &mut Fields, chat: &mut Map<String, Value>) -> Result<Included, ApiError> {
    let top = body.count("top_logprobs", 0..=20)?;
    let mut wanted = Included { logprobs: top.is_some_and(|top| top > 0), sealed: false };
    let list = match body.value("include") {
        None => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(ApiError::wrong_type("include", "an array", kind(&other))),
    };
    for (i, value) in list.iter().enumerate() {
        match value.as_str() {
            Some(LOGPROBS) => wanted.logprobs = true,
            Some(SEALED) => wanted.sealed = true,
            Some(word) if INCLUDABLE.contains(&word) => {}
            _ => return Err(not_included(i, value)),
        }
    }
    if wanted.logprobs {
        chat.insert("logprobs".to_owned(), json!(true));
        chat.insert("top_logprobs".to_owned(), json!(top.unwrap_or(0)));
    }
    Ok(wanted)
}

fn not_included(i: usize, value: &Value) -> ApiError {
    let message = format!("Invalid value: {value}. Nothing of this name is included.");
    ApiError::invalid(&format!("include[{i}]"), message)
}

/// `include` of a query, which asks for what is there in any case, or never.
///
/// # Errors
/// The first word that nobody knows.
pub(in crate::server) fn take_include(query: &mut Query) -> Result<(), ApiError> {
    let list = query.list("include");
    let known = |word: &String| word.is_empty() || INCLUDABLE.contains(&word.as_str());
    let odd = list.iter().position(|word| !known(word));
    odd.map_or(Ok(()), |i| Err(not_included(i, &json!(list[i]))))
}

/// Flat tools become nested ones.
fn tools(body: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let nest = |tool: &Value| {
        let mut inner = tool.as_object()?.clone();
        let kind = inner.remove("type")?;
        let kind = kind.as_str().filter(|kind| ["function", "custom"].contains(kind))?.to_owned();
        if let Some(format) = inner.get_mut("format")
            && format["type"] == "grammar"
        {
            let mut grammar = format.take();
            if let Some(grammar) = grammar.as_object_mut() {
                grammar.remove("type");
            }
            *format = json!({"type": "grammar", "grammar": grammar});
        }
        let mut tool = Map::new();
        tool.insert("type".to_owned(), json!(kind));
        tool.insert(kind, Value::Object(inner));
        Some(Value::Object(tool))
    };
    match body.value("tools") {
        None => {}
        Some(Value::Array(list)) if list.is_empty() => {}
        Some(Value::Array(list)) => {
            for (i, tool) in list.iter().enumerate() {
                if let Some(kind) = tool["type"].as_str()
                    && !["function", "custom"].contains(&kind)
                {
                    let path = format!("tools[{i}].type");
                    let message = format!("Tools of the type '{kind}' are not supported.");
                    return Err(ApiError::unsupported(&path, message));
                }
            }
            let nested = list.iter().map(|tool| nest(tool).unwrap_or_else(|| tool.clone()));
            chat.insert("tools".to_owned(), nested.collect());
        }
        Some(other) => return Err(ApiError::wrong_type("tools", "an array", kind(&other))),
    }
    let choice = match body.value("tool_choice") {
        Some(Value::Object(object)) if object.get("type") == Some(&json!("allowed_tools")) => {
            let mut allowed = object;
            allowed.remove("type");
            for tool in allowed.get_mut("tools").and_then(Value::as_array_mut).into_iter().flatten()
            {
                *tool = nest(tool).unwrap_or_else(|| tool.clone());
            }
            Some(json!({"type": "allowed_tools", "allowed_tools": allowed}))
        }
        Some(choice @ Value::Object(_)) => Some(nest(&choice).unwrap_or(choice)),
        choice => choice,
    };
    chat.extend(choice.map(|choice| ("tool_choice".to_owned(), choice)));
    Ok(())
}

/// `text.format`, flat here and nested in a chat.
fn text(body: &mut Fields, chat: &mut Map<String, Value>, lenient: bool) -> Result<(), ApiError> {
    let Some(text) = body.object("text")? else { return Ok(()) };
    fields::check(&text, TEXT, "text.", lenient)?;
    let format = match text.get("format") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Object(format)) => format,
        Some(other) => return Err(ApiError::wrong_type("text.format", "an object", kind(other))),
    };
    let mut inner = format.clone();
    let nested = match inner.remove("type") {
        Some(Value::String(word)) if word == "json_schema" => {
            json!({"type": "json_schema", "json_schema": inner})
        }
        _ => Value::Object(format.clone()),
    };
    chat.insert("response_format".to_owned(), nested);
    Ok(())
}

fn reasoning(
    body: &mut Fields,
    chat: &mut Map<String, Value>,
    lenient: bool,
) -> Result<(), ApiError> {
    let Some(reasoning) = body.object("reasoning")? else { return Ok(()) };
    fields::check(&reasoning, REASONING, "reasoning.", lenient)?;
    let effort = reasoning.get("effort").filter(|effort| !effort.is_null());
    chat.extend(effort.map(|effort| ("reasoning_effort".to_owned(), effort.clone())));
    Ok(())
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
