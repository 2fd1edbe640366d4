//! `tools`, `tool_choice` and `parallel_tool_calls` of a chat.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::extract::{Fields, kind};
use super::{fields, format};
use crate::pipeline::{Tool, ToolChoice, Tools};
use crate::text::Shape;

/// As many as OpenAI takes.
pub(super) const TOOLS_MAX: usize = 128;

/// Reads the three fields. `None`: there are no tools.
pub(super) fn read(body: &mut Fields, lenient: bool) -> Result<Option<Tools>, ApiError> {
    let parallel = body.bool("parallel_tool_calls")?.unwrap_or(true);
    let choice = body.value("tool_choice");
    let list = match body.value("tools") {
        None => {
            return match choice {
                None => Ok(None),
                Some(Value::String(word)) if word == "none" || word == "auto" => Ok(None),
                Some(_) => Err(ApiError::invalid(
                    "tool_choice",
                    "Invalid value for 'tool_choice': it is only allowed when 'tools' are given.",
                )),
            };
        }
        Some(Value::Array(list)) => list,
        Some(other) => return Err(ApiError::wrong_type("tools", "an array", kind(&other))),
    };
    if list.is_empty() || list.len() > TOOLS_MAX {
        let message =
            format!("Invalid 'tools': expected 1 to {TOOLS_MAX} tools, but got {}.", list.len());
        return Err(ApiError::invalid("tools", message));
    }
    let one = |(i, value)| tool(&format!("tools[{i}]"), value, lenient);
    let list: Vec<Tool> = list.into_iter().enumerate().map(one).collect::<Result<_, _>>()?;
    let mut tools = Tools { list, parallel, ..Tools::of("tools") };
    match choice {
        None => {}
        Some(Value::String(word)) => tools.choice = word_choice("tool_choice", &word, true)?,
        Some(Value::Object(object)) => object_choice(&mut tools, object, lenient)?,
        Some(other) => {
            let expected = "a string or an object";
            return Err(ApiError::wrong_type("tool_choice", expected, kind(&other)));
        }
    }
    Ok(Some(tools))
}

fn object(path: &str, value: Option<Value>) -> Result<Fields, ApiError> {
    match value {
        Some(Value::Object(map)) => Ok(Fields::within(path, map)),
        None | Some(Value::Null) => Err(ApiError::missing(path)),
        Some(other) => Err(ApiError::wrong_type(path, "an object", kind(&other))),
    }
}

/// A field that must be there.
pub(super) fn required(object: &mut Fields, name: &str) -> Result<String, ApiError> {
    object.string(name)?.ok_or_else(|| ApiError::missing(&object.at(name)))
}

fn tool(path: &str, value: Value, lenient: bool) -> Result<Tool, ApiError> {
    let mut tool = object(path, Some(value))?;
    let kind = required(&mut tool, "type")?;
    let read = match kind.as_str() {
        "function" => function,
        "custom" => custom,
        other => {
            let path = tool.at("type");
            let message =
                format!("Invalid value: '{other}'. Supported values are: 'function' and 'custom'.");
            return Err(ApiError::invalid(&path, message));
        }
    };
    let inner = object(&tool.at(&kind), tool.value(&kind))?;
    let read = read(inner, lenient)?;
    tool.end(&[], lenient)?;
    Ok(read)
}

pub(super) fn function(mut function: Fields, lenient: bool) -> Result<Tool, ApiError> {
    fields::check(function.map(), fields::FUNCTION, &function.at(""), lenient)?;
    let mut definition = function.map().clone();
    let name = required(&mut function, "name")?;
    format::check_name(&function.at("name"), &name)?;
    function.string("description")?;
    let strict = function.bool("strict")?.unwrap_or(false);
    let nothing = || json!({"type": "object", "properties": {}, "additionalProperties": false});
    let mut schema = function.object("parameters")?.map_or_else(nothing, Value::Object);
    definition.insert("parameters".to_owned(), schema.clone());
    definition.retain(|_, value| !value.is_null());
    if let Some(schema) = schema.as_object_mut() {
        // Arguments are an object, whether the schema says so or not.
        schema.entry("type").or_insert_with(|| json!("object"));
    }
    Ok(Tool {
        name,
        definition: json!({"type": "function", "function": definition}),
        arguments: Shape::Json { schema, lenient: !strict },
        custom: false,
        callable: true,
        param: function.at("parameters"),
    })
}

fn custom(mut custom: Fields, lenient: bool) -> Result<Tool, ApiError> {
    fields::check(custom.map(), fields::CUSTOM_TOOL, &custom.at(""), lenient)?;
    let name = required(&mut custom, "name")?;
    format::check_name(&custom.at("name"), &name)?;
    let description = custom.string("description")?;
    let param = custom.at("format");
    let pattern = match custom.object("format")? {
        None => None,
        Some(map) => custom_format(Fields::within(&param, map), lenient)?,
    };
    Ok(Tool { param, ..Tool::custom(name, description, pattern) })
}

/// The expression that the text of a custom tool must match.
fn custom_format(mut format: Fields, lenient: bool) -> Result<Option<String>, ApiError> {
    match required(&mut format, "type")?.as_str() {
        "text" => format.end(&[], lenient).map(|()| None),
        "grammar" => {
            let mut grammar = object(&format.at("grammar"), format.value("grammar"))?;
            format.end(&[], lenient)?;
            let definition = required(&mut grammar, "definition")?;
            match required(&mut grammar, "syntax")?.as_str() {
                "regex" => grammar.end(&[], lenient).map(|()| Some(definition)),
                "lark" => Err(ApiError::unsupported(
                    &grammar.at("syntax"),
                    "The syntax 'lark' is not supported for custom tools; 'regex' is.",
                )),
                other => {
                    let message = format!("Invalid value: '{other}'. Supported value is: 'regex'.");
                    Err(ApiError::invalid(&grammar.at("syntax"), message))
                }
            }
        }
        other => {
            let message =
                format!("Invalid value: '{other}'. Supported values are: 'text' and 'grammar'.");
            Err(ApiError::invalid(&format.at("type"), message))
        }
    }
}

fn word_choice(path: &str, word: &str, with_none: bool) -> Result<ToolChoice, ApiError> {
    match word {
        "none" if with_none => Ok(ToolChoice::None),
        "auto" => Ok(ToolChoice::Auto),
        "required" => Ok(ToolChoice::Required),
        other => {
            let none = if with_none { "'none', " } else { "" };
            let message = format!(
                "Invalid value: '{other}'. Supported values are: {none}'auto' and 'required'."
            );
            Err(ApiError::invalid(path, message))
        }
    }
}

fn object_choice(
    tools: &mut Tools,
    choice: Map<String, Value>,
    lenient: bool,
) -> Result<(), ApiError> {
    let mut choice = Fields::within("tool_choice", choice);
    let kind = required(&mut choice, "type")?;
    match kind.as_str() {
        "function" | "custom" => {
            let wanted = named(tools, &mut choice, &kind, &[], lenient)?;
            tools.list.iter_mut().enumerate().for_each(|(i, tool)| tool.callable = i == wanted);
            tools.choice = ToolChoice::Required;
            tools.parallel = false;
        }
        "allowed_tools" => {
            let path = choice.at("allowed_tools");
            let mut allowed = object(&path, choice.value("allowed_tools"))?;
            let mode = required(&mut allowed, "mode")?;
            tools.choice = word_choice(&allowed.at("mode"), &mode, false)?;
            let path = allowed.at("tools");
            let list = match allowed.value("tools") {
                None => return Err(ApiError::missing(&path)),
                Some(Value::Array(list)) if list.is_empty() => {
                    let message = format!("Invalid '{path}': the array cannot be empty.");
                    return Err(ApiError::invalid(&path, message));
                }
                Some(Value::Array(list)) => list,
                Some(other) => {
                    return Err(ApiError::wrong_type(
                        &path,
                        "an array",
                        super::extract::kind(&other),
                    ));
                }
            };
            let mut wanted = Vec::with_capacity(list.len());
            for (i, value) in list.into_iter().enumerate() {
                let mut tool = object(&format!("{path}[{i}]"), Some(value))?;
                let kind = required(&mut tool, "type")?;
                wanted.push(named(tools, &mut tool, &kind, &DEFINED, lenient)?);
            }
            allowed.end(&[], lenient)?;
            let callable = |(i, tool): (usize, &mut Tool)| tool.callable = wanted.contains(&i);
            tools.list.iter_mut().enumerate().for_each(callable);
        }
        other => {
            let message = format!(
                "Invalid value: '{other}'. Supported values are: 'function', 'custom' and \
                 'allowed_tools'."
            );
            return Err(ApiError::invalid(&choice.at("type"), message));
        }
    }
    choice.end(&[], lenient)
}

/// What a tool that is allowed may say besides its name: the specification has definitions here,
/// and what counts is that of `tools`.
const DEFINED: [&str; 4] = ["description", "parameters", "strict", "format"];

/// The place of the tool that `{"type": kind, kind: {"name": ...}}` speaks of.
fn named(
    tools: &Tools,
    choice: &mut Fields,
    kind: &str,
    beside: &[&str],
    lenient: bool,
) -> Result<usize, ApiError> {
    let mut inner = object(&choice.at(kind), choice.value(kind))?;
    let name = required(&mut inner, "name")?;
    inner.end(beside, lenient)?;
    choice.end(&[], lenient)?;
    let custom = kind == "custom";
    let found = tools.list.iter().position(|tool| tool.name == name && tool.custom == custom);
    found.ok_or_else(|| {
        let message = format!("Tool choice '{name}' not found in 'tools'.");
        ApiError::invalid(&inner.at("name"), message)
    })
}

#[cfg(test)]
#[path = "tools_tests.rs"]
mod tests;
