//! A body of `/v1/messages` to the house's request, field by field.

use serde_json::{Map, Value, json};

use super::talk;
use crate::pipeline::{Format, Prompt, TextRequest, Tool, ToolChoice, Tools};
use crate::server::call;
use crate::server::error::ApiError;
use crate::server::extract::{Fields, kind};
use crate::server::fields::{self, Field, Takes, honoured, no_effect, refused, required};
use crate::server::tools::{self, TOOLS_MAX};
use crate::text::Shape;
use crate::types::SamplingOverrides;

/// Why a mark for a cache does nothing.
const CACHED: &str = "every prefix is cached while there is room";

/// `POST /v1/messages`.
pub(super) const MESSAGES: &[Field] = &[
    required("model", Takes::Text),
    required("messages", Takes::List),
    required("max_tokens", fields::SOME),
    honoured("system", fields::TEXT_OR_LIST),
    honoured("stop_sequences", Takes::List),
    honoured("stream", Takes::Bool),
    honoured("temperature", fields::SHARE),
    honoured("top_p", fields::SHARE),
    honoured("top_k", Takes::Integer),
    honoured("thinking", Takes::Table(THINKING)),
    honoured("tools", Takes::List),
    honoured("tool_choice", Takes::Table(TOOL_CHOICE)),
    honoured("output_config", Takes::Table(OUTPUT_CONFIG)),
    // Checked; its one field has no effect.
    honoured("metadata", Takes::Table(METADATA)),
    no_effect("cache_control", Takes::Object, CACHED),
    no_effect("inference_geo", Takes::Text, "this machine is the only place there is"),
    no_effect(
        "service_tier",
        Takes::Word(&["auto", "standard_only"]),
        "reserved capacity is a matter of hosted services",
    ),
    no_effect("speed", Takes::Word(&["standard", "fast"]), "there is one speed here"),
    no_effect("user_profile_id", Takes::Text, "a key says who asks"),
    no_effect("workspace_id", Takes::Text, "a key belongs to one project"),
    refused("container", fields::never, "there are no containers here"),
    refused("diagnostics", fields::never, "prompts of earlier requests are not kept to compare"),
    refused("mcp_servers", fields::is_empty_list, "tools of other servers are the client's"),
];

/// `POST /v1/messages/count_tokens`: what may change the number of tokens, and what never does.
pub(super) const COUNT_TOKENS: &[Field] = &[
    required("model", Takes::Text),
    required("messages", Takes::List),
    honoured("system", fields::TEXT_OR_LIST),
    honoured("thinking", Takes::Table(THINKING)),
    honoured("tools", Takes::List),
    honoured("tool_choice", Takes::Table(TOOL_CHOICE)),
    honoured("output_config", Takes::Table(OUTPUT_CONFIG)),
    no_effect("cache_control", Takes::Object, CACHED),
    no_effect("speed", Takes::Word(&["standard", "fast"]), "there is one speed here"),
    no_effect("user_profile_id", Takes::Text, "a key says who asks"),
    no_effect("workspace_id", Takes::Text, "a key belongs to one project"),
    refused("mcp_servers", fields::is_empty_list, "tools of other servers are the client's"),
];

const METADATA: &[Field] =
    &[no_effect("user_id", Takes::Text, "for the abuse monitoring of a hosted service")];

const OUTPUT_CONFIG: &[Field] =
    &[honoured("effort", Takes::Text), honoured("format", Takes::Table(OUTPUT_FORMAT))];

const OUTPUT_FORMAT: &[Field] = &[honoured("type", Takes::Text), honoured("schema", Takes::Object)];

/// A tool of the client.
const TOOL: &[Field] = &[
    honoured("type", Takes::Text),
    honoured("name", Takes::Text),
    honoured("description", Takes::Text),
    honoured("input_schema", Takes::Object),
    honoured("strict", Takes::Bool),
    no_effect("cache_control", Takes::Object, CACHED),
    no_effect("eager_input_streaming", Takes::Bool, "arguments are streamed as they come"),
    refused("allowed_callers", is_direct, "only the model itself calls tools"),
    refused("defer_loading", is_false, "every tool is shown to the model"),
    refused("input_examples", fields::is_empty_list, "templates have no place for examples"),
];

const THINKING: &[Field] = &[
    honoured("type", Takes::Text),
    honoured("budget_tokens", Takes::Integer),
    honoured("display", Takes::Text),
];

const TOOL_CHOICE: &[Field] = &[
    honoured("type", Takes::Text),
    honoured("name", Takes::Text),
    honoured("disable_parallel_tool_use", Takes::Bool),
];

/// The least that Anthropic takes.
const BUDGET_MIN: u32 = 1024;

/// A body, read.
#[derive(Debug)]
pub(super) struct Asked {
    pub request: TextRequest,
    pub thinking: Thinking,
    pub stream: bool,
}

/// Variables by which templates switch thought on and off.
pub(super) const SWITCHES: [&str; 2] = ["enable_thinking", "thinking"];

/// What a client says of thought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Thinking {
    /// It wants it, from a model that can.
    pub insists: bool,
    /// It wants to read it.
    pub shown: bool,
    /// It says whether it wants it.
    pub said: bool,
}

/// Reads the body of a message.
///
/// # Errors
/// The first field that is unknown, refused, malformed or out of range.
pub(super) fn read(mut body: Fields, lenient: bool) -> Result<Asked, ApiError> {
    fields::check(body.map(), MESSAGES, "", lenient)?;
    let max_tokens = body.count("max_tokens", 1..=u32::MAX)?;
    let max_tokens = max_tokens.ok_or_else(|| ApiError::missing("max_tokens"))?;
    if let Some(metadata) = body.object("metadata")? {
        fields::check(&metadata, METADATA, "metadata.", lenient)?;
    }
    let sampling = SamplingOverrides {
        temperature: body.number("temperature", 0.0..=1.0)?,
        top_p: body.number("top_p", 0.0..=1.0)?,
        top_k: body.count("top_k", 0..=u32::MAX)?,
        ..SamplingOverrides::default()
    };
    let stop = stop_sequences(&mut body)?;
    let stream = body.bool("stream")?.unwrap_or(false);
    let (request, thinking) = prompt(&mut body, Some(max_tokens), lenient)?;
    let request = TextRequest { max_tokens: Some(max_tokens), stop, sampling, ..request };
    Ok(Asked { request, thinking, stream })
}

/// Reads a body whose prompt is to be counted.
///
/// # Errors
/// As in [`read`].
pub(super) fn read_prompt(
    mut body: Fields,
    lenient: bool,
) -> Result<(TextRequest, Thinking), ApiError> {
    fields::check(body.map(), COUNT_TOKENS, "", lenient)?;
    prompt(&mut body, None, lenient)
}

/// What the model reads, and what it may say.
fn prompt(
    body: &mut Fields,
    max_tokens: Option<usize>,
    lenient: bool,
) -> Result<(TextRequest, Thinking), ApiError> {
    let model = call::model(body)?;
    let mut template_kwargs = Map::new();
    let thinking = thinking(body, max_tokens, &mut template_kwargs, lenient)?;
    let format = output_config(body, &mut template_kwargs, lenient)?;
    let tools = tools(body, lenient)?;
    let system = body.value("system");
    let system_param = system.as_ref().map(|_| "system");
    let messages = talk::read(system, body.value("messages"), lenient)?;
    let prompt = Prompt::Chat { messages, template_kwargs };
    Ok((TextRequest { format, tools, system_param, ..TextRequest::new(&model, prompt) }, thinking))
}

fn stop_sequences(body: &mut Fields) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "stop_sequences";
    let list = match body.value(NAME) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(ApiError::wrong_type(NAME, "an array", kind(&other))),
    };
    call::check_stops(NAME, list.len())?;
    let text = |(i, value)| match value {
        Value::String(text) if !text.trim().is_empty() => Ok(text),
        Value::String(_) => {
            let path = format!("{NAME}[{i}]");
            Err(ApiError::invalid(&path, format!("Invalid '{path}': it is only white space.")))
        }
        other => Err(ApiError::wrong_type(&format!("{NAME}[{i}]"), "a string", kind(&other))),
    };
    list.into_iter().enumerate().map(text).collect()
}

/// `thinking`, as the variables that templates read. A budget is checked, and what bounds a thought
/// is `max_tokens`: Anthropic too calls it a target.
fn thinking(
    body: &mut Fields,
    max_tokens: Option<usize>,
    kwargs: &mut Map<String, Value>,
    lenient: bool,
) -> Result<Thinking, ApiError> {
    let object = body.object("thinking")?;
    let said = object.is_some();
    let mut object = match object {
        None => Fields::within("thinking", Map::from_iter([("type".into(), json!("disabled"))])),
        Some(map) => {
            fields::check(&map, THINKING, "thinking.", lenient)?;
            Fields::within("thinking", map)
        }
    };
    let found = tools::required(&mut object, "type")?;
    let shown = match object.string("display")?.as_deref() {
        None | Some("summarized") => true,
        Some("omitted") => false,
        Some(other) => return Err(wrong_word("thinking.display", other, "summarized, omitted")),
    };
    let budget = object.count("budget_tokens", BUDGET_MIN..=u32::MAX)?;
    let (thinks, thinking) = match found.as_str() {
        "enabled" => {
            let path = "thinking.budget_tokens";
            let budget = budget.ok_or_else(|| ApiError::missing(path))?;
            if max_tokens.is_some_and(|max| budget >= max) {
                let message = format!("Invalid '{path}': it must be less than 'max_tokens'.");
                return Err(ApiError::invalid(path, message));
            }
            (Some(true), Thinking { insists: true, shown, said })
        }
        // As the model does it by itself.
        "adaptive" => (None, Thinking { insists: false, shown, said }),
        "disabled" => (Some(false), Thinking { said, ..Thinking::default() }),
        other => return Err(wrong_word("thinking.type", other, "enabled, disabled, adaptive")),
    };
    if let Some(thinks) = thinks {
        for switch in SWITCHES {
            kwargs.insert(switch.to_owned(), json!(thinks));
        }
    }
    Ok(thinking)
}

fn output_config(
    body: &mut Fields,
    kwargs: &mut Map<String, Value>,
    lenient: bool,
) -> Result<Option<Format>, ApiError> {
    const PARAM: &str = "output_config.format";
    let Some(map) = body.object("output_config")? else { return Ok(None) };
    fields::check(&map, OUTPUT_CONFIG, "output_config.", lenient)?;
    let mut config = Fields::within("output_config", map);
    match config.string("effort")?.as_deref() {
        None => {}
        Some(effort @ ("low" | "medium" | "high" | "xhigh" | "max")) => {
            kwargs.insert("reasoning_effort".to_owned(), json!(effort));
        }
        Some(other) => {
            return Err(wrong_word("output_config.effort", other, "low, medium, high, xhigh, max"));
        }
    }
    let Some(format) = config.object("format")? else { return Ok(None) };
    fields::check(&format, OUTPUT_FORMAT, "output_config.format.", lenient)?;
    let mut format = Fields::within(PARAM, format);
    match tools::required(&mut format, "type")?.as_str() {
        "json_schema" => {}
        other => return Err(wrong_word("output_config.format.type", other, "json_schema")),
    }
    let schema = format.object("schema")?;
    let schema = schema.ok_or_else(|| ApiError::missing("output_config.format.schema"))?;
    let shape = Shape::Json { schema: Value::Object(schema), lenient: false };
    Ok(Some(Format { shape, param: PARAM, refusal: format!("Invalid schema for {PARAM}") }))
}

fn tools(body: &mut Fields, lenient: bool) -> Result<Option<Tools>, ApiError> {
    let choice = body.object("tool_choice")?;
    let list = match body.value("tools") {
        None => Vec::new(),
        Some(Value::Array(list)) if list.len() <= TOOLS_MAX => list,
        Some(Value::Array(list)) => {
            let message =
                format!("Invalid 'tools': at most {TOOLS_MAX} tools, but got {}.", list.len());
            return Err(ApiError::invalid("tools", message));
        }
        Some(other) => return Err(ApiError::wrong_type("tools", "an array", kind(&other))),
    };
    let one = |(i, value)| tool(&format!("tools[{i}]"), value, lenient);
    let list: Vec<Tool> = list.into_iter().enumerate().map(one).collect::<Result<_, _>>()?;
    let mut tools = Tools { list, parallel: true, ..Tools::of("tools") };
    if let Some(choice) = choice {
        tool_choice(&mut tools, choice, lenient)?;
    }
    Ok((!tools.list.is_empty()).then_some(tools))
}

fn tool(path: &str, value: Value, lenient: bool) -> Result<Tool, ApiError> {
    let Value::Object(mut map) = value else {
        return Err(ApiError::wrong_type(path, "an object", kind(&value)));
    };
    if let Some(Value::String(hosted)) = map.get("type").filter(|word| **word != "custom") {
        let message = format!("Invalid '{path}.type': the tool '{hosted}' is not here.");
        return Err(ApiError::unsupported(&format!("{path}.type"), message));
    }
    fields::check(&map, TOOL, &format!("{path}."), lenient)?;
    let param = format!("{path}.input_schema");
    let schema = match map.remove("input_schema") {
        Some(schema @ Value::Object(_)) => schema,
        None | Some(Value::Null) => return Err(ApiError::missing(&param)),
        Some(other) => return Err(ApiError::wrong_type(&param, "an object", kind(&other))),
    };
    let known = |name: &String| ["name", "description", "strict"].contains(&name.as_str());
    map.retain(|name, _| known(name));
    map.insert("parameters".to_owned(), schema);
    let tool = tools::function(Fields::within(path, map), lenient)?;
    Ok(Tool { param, ..tool })
}

fn tool_choice(
    tools: &mut Tools,
    choice: Map<String, Value>,
    lenient: bool,
) -> Result<(), ApiError> {
    fields::check(&choice, TOOL_CHOICE, "tool_choice.", lenient)?;
    let mut choice = Fields::within("tool_choice", choice);
    let found = tools::required(&mut choice, "type")?;
    tools.parallel = !choice.bool("disable_parallel_tool_use")?.unwrap_or(false);
    let name = choice.string("name")?;
    tools.choice = match found.as_str() {
        "auto" => ToolChoice::Auto,
        "none" => ToolChoice::None,
        "any" | "tool" if tools.list.is_empty() => {
            let message = "Invalid 'tool_choice': there are no 'tools' to choose from.";
            return Err(ApiError::invalid("tool_choice", message));
        }
        "any" => ToolChoice::Required,
        "tool" => {
            let name = name.ok_or_else(|| ApiError::missing("tool_choice.name"))?;
            if !tools.list.iter().any(|tool| tool.name == name) {
                let message = format!("Invalid 'tool_choice.name': no tool is called '{name}'.");
                return Err(ApiError::invalid("tool_choice.name", message));
            }
            tools.list.iter_mut().for_each(|tool| tool.callable = tool.name == name);
            ToolChoice::Required
        }
        other => return Err(wrong_word("tool_choice.type", other, "auto, any, tool, none")),
    };
    Ok(())
}

pub(super) fn wrong_word(path: &str, got: &str, words: &str) -> ApiError {
    ApiError::invalid(path, format!("Invalid '{path}': '{got}' is none of {words}."))
}

fn is_false(value: &Value) -> bool {
    value == false
}

fn is_direct(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(|word| word == "direct"))
}
