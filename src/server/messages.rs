//! The `messages` of a chat: validated, and brought into the one form that chat templates know.
//!
//! Afterwards every message has a role that templates know (`developer` is `system`), and a content
//! that is a string (parts of text joined by newlines), or null beside tool calls. Deliberately
//! absent: rendering, which is the template's.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::extract::{Fields, kind};
use super::items::BESIDE;
use super::tools::required;

/// `messages`, at least one.
pub(super) fn list(messages: Option<Value>) -> Result<Vec<Value>, ApiError> {
    match messages {
        None => Err(ApiError::missing("messages")),
        Some(Value::Array(list)) if list.is_empty() => {
            let message = "Invalid 'messages': expected at least one message, but got none.";
            Err(ApiError::invalid("messages", message))
        }
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(ApiError::wrong_type("messages", "an array", kind(&other))),
    }
}

/// Brings messages into template form.
///
/// # Errors
/// The first message that is malformed or carries what is not supported, by its path.
pub(super) fn normalise(messages: Option<Value>, lenient: bool) -> Result<Value, ApiError> {
    let list = list(messages)?;
    let one = |(i, value)| message(&format!("messages[{i}]"), value, lenient);
    list.into_iter().enumerate().map(one).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

const ROLES: &str = "'system', 'developer', 'user', 'assistant' or 'tool'";

fn message(path: &str, value: Value, lenient: bool) -> Result<Value, ApiError> {
    let Value::Object(map) = value else {
        return Err(ApiError::wrong_type(path, "an object", kind(&value)));
    };
    let mut message = Message { fields: Fields::within(path, map), out: Map::new() };
    let role = message.string("role")?.ok_or_else(|| ApiError::missing(&message.at("role")))?;
    let role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => role.as_str(),
        other => {
            let text = format!("Invalid value: '{other}'. Supported values are: {ROLES}.");
            return Err(ApiError::invalid(&message.at("role"), text));
        }
    };
    message.out.insert("role".to_owned(), json!(role));
    let called_tools = role == "assistant" && message.tool_calls(lenient)?;
    message.content(role, called_tools, lenient)?;
    if role == "tool" {
        let id = message.string("tool_call_id")?;
        let id = id.ok_or_else(|| ApiError::missing(&message.at("tool_call_id")))?;
        message.out.insert("tool_call_id".to_owned(), json!(id));
    }
    if let Some(name) = message.string("name")? {
        message.out.insert("name".to_owned(), json!(name));
    }
    message.finish(lenient)
}

/// A message between the wire and the template.
struct Message {
    fields: Fields,
    out: Map<String, Value>,
}

impl Message {
    fn at(&self, field: &str) -> String {
        self.fields.at(field)
    }

    fn string(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        self.fields.string(field)
    }

    fn content(&mut self, role: &str, called_tools: bool, lenient: bool) -> Result<(), ApiError> {
        let path = self.at("content");
        // An assistant that refused said so in another field; its words are its words.
        let refusal = if role == "assistant" { self.string("refusal")? } else { None };
        let content = match self.fields.value("content") {
            Some(Value::String(text)) => Value::String(text),
            Some(Value::Array(parts)) => Value::String(join_parts(&path, parts, role, lenient)?),
            None => match refusal {
                Some(refusal) => Value::String(refusal),
                None if called_tools => Value::Null,
                None => return Err(ApiError::missing(&path)),
            },
            Some(other) => {
                let expected = "a string or an array of content parts";
                return Err(ApiError::wrong_type(&path, expected, kind(&other)));
            }
        };
        self.out.insert("content".to_owned(), content);
        Ok(())
    }

    /// Passes the calls of earlier turns on to the template. Says whether there were any.
    fn tool_calls(&mut self, lenient: bool) -> Result<bool, ApiError> {
        let path = self.at("tool_calls");
        let calls = match self.fields.value("tool_calls") {
            None => return Ok(false),
            Some(Value::Array(calls)) => calls,
            Some(other) => return Err(ApiError::wrong_type(&path, "an array", kind(&other))),
        };
        let one = |(i, call)| tool_call(&format!("{path}[{i}]"), call, lenient);
        let calls: Vec<Value> = calls.into_iter().enumerate().map(one).collect::<Result<_, _>>()?;
        let any = !calls.is_empty();
        if any {
            self.out.insert("tool_calls".to_owned(), Value::Array(calls));
        }
        Ok(any)
    }

    /// What is left is thought of earlier turns, or noise of a client that sends a response back,
    /// or unknown.
    fn finish(mut self, lenient: bool) -> Result<Value, ApiError> {
        // Two names are in use for the same thing; templates know this one.
        let reasoning = self.string("reasoning_content")?.or(self.string("reasoning")?);
        if let Some(reasoning) = reasoning {
            self.out.insert("reasoning_content".to_owned(), json!(reasoning));
        }
        if self.fields.value("audio").is_some() {
            let path = self.at("audio");
            let text = format!("Unsupported parameter: '{path}' is not supported.");
            return Err(ApiError::unsupported(&path, text));
        }
        self.fields.end(&["annotations", "refusal", "parsed"], lenient)?;
        Ok(Value::Object(self.out))
    }
}

/// A call of an earlier turn. Templates know functions; a custom tool is one with one argument.
fn tool_call(path: &str, call: Value, lenient: bool) -> Result<Value, ApiError> {
    let Value::Object(whole) = &call else {
        return Err(ApiError::wrong_type(path, "an object", kind(&call)));
    };
    let mut fields = Fields::within(path, whole.clone());
    let id = fields.string("id")?;
    let kind = fields.string("type")?.unwrap_or_else(|| "function".to_owned());
    let says = match kind.as_str() {
        "function" => "arguments",
        "custom" => "input",
        other => {
            let message =
                format!("Invalid value: '{other}'. Supported values are: 'function' and 'custom'.");
            return Err(ApiError::invalid(&fields.at("type"), message));
        }
    };
    let inner = fields.object(&kind)?.ok_or_else(|| ApiError::missing(&fields.at(&kind)))?;
    // Who puts a stream together may keep the place of a call.
    fields.end(&["index"], lenient)?;
    let mut inner = Fields::within(&fields.at(&kind), inner);
    let (name, said) = (required(&mut inner, "name")?, required(&mut inner, says)?);
    inner.end(&["parsed_arguments"], lenient)?;
    let arguments = match kind.as_str() {
        "custom" => json!({"input": said}).to_string(),
        _ => said,
    };
    let function = json!({"name": name, "arguments": arguments});
    let mut call = json!({"type": "function", "function": function});
    if let Some(id) = id {
        call["id"] = Value::String(id);
    }
    Ok(call)
}

/// A part of content has these members, and no others.
pub(super) fn only(
    path: &str,
    part: &Map<String, Value>,
    known: &[&str],
    lenient: bool,
) -> Result<(), ApiError> {
    Fields::within(path, part.clone()).end(known, lenient)
}

/// The text of content that comes in parts.
pub(super) fn join_parts(
    path: &str,
    parts: Vec<Value>,
    role: &str,
    lenient: bool,
) -> Result<String, ApiError> {
    if parts.is_empty() {
        let message = format!("Invalid '{path}': expected at least one content part.");
        return Err(ApiError::invalid(path, message));
    }
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let field = match part["type"].as_str() {
            Some("text") => "text",
            Some("refusal") if role == "assistant" => "refusal",
            Some("image_url" | "input_audio" | "file") => {
                let text = format!(
                    "Unsupported content: '{path}' is of type {}, and only text is supported.",
                    part["type"]
                );
                return Err(ApiError::unsupported(&path, text));
            }
            Some(_) => {
                let text = format!("Invalid value in '{path}.type'. Supported value is: 'text'.");
                return Err(ApiError::invalid(&format!("{path}.type"), text));
            }
            None if part.is_object() => return Err(ApiError::missing(&format!("{path}.type"))),
            None => return Err(ApiError::wrong_type(&path, "an object", kind(&part))),
        };
        if let Value::Object(part) = &part {
            only(&path, part, &[&["type", field][..], &BESIDE].concat(), lenient)?;
        }
        match part[field].as_str() {
            Some(text) => texts.push(text.to_owned()),
            None => {
                let path = format!("{path}.{field}");
                return Err(ApiError::wrong_type(&path, "a string", kind(&part[field])));
            }
        }
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_comes_into_template_form() {
        let call = json!({"id": "call_1", "type": "function",
                          "function": {"name": "f", "arguments": "{}"}});
        let messages = json!([
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "text", "text": "And kind."}]},
            {"role": "user", "name": "Ann", "content": [
                {"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": null, "tool_calls": [call],
             "refusal": null, "annotations": [], "audio": null, "function_call": null},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
            {"role": "assistant", "content": "42.", "reasoning": "hm"},
            {"role": "assistant", "refusal": "No."},
        ]);
        let expected = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "And kind."},
            {"role": "user", "content": "one\ntwo", "name": "Ann"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "content": "42", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "42.", "reasoning_content": "hm"},
            {"role": "assistant", "content": "No."},
        ]);
        assert_eq!(normalise(Some(messages), false).unwrap(), expected);
    }

    #[test]
    fn bad_messages_are_refused_by_path() {
        let user = |content: Value| json!([{"role": "user", "content": content}]);
        let cases = [
            (json!("hi"), "messages", "invalid_type"),
            (json!([]), "messages", "invalid_value"),
            (json!(["hi"]), "messages[0]", "invalid_type"),
            (json!([{"content": "x"}]), "messages[0].role", "missing_required_parameter"),
            (json!([{"role": "robot", "content": "x"}]), "messages[0].role", "invalid_value"),
            (json!([{"role": 1, "content": "x"}]), "messages[0].role", "invalid_type"),
            (user(json!(null)), "messages[0].content", "missing_required_parameter"),
            (user(json!(5)), "messages[0].content", "invalid_type"),
            (user(json!([])), "messages[0].content", "invalid_value"),
            (user(json!(["x"])), "messages[0].content[0]", "invalid_type"),
            (user(json!([{"type": "text"}])), "messages[0].content[0].text", "invalid_type"),
            (
                user(json!([{"text": "x"}])),
                "messages[0].content[0].type",
                "missing_required_parameter",
            ),
            (user(json!([{"type": "sound"}])), "messages[0].content[0].type", "invalid_value"),
            (
                json!([{"role": "tool", "content": "x"}]),
                "messages[0].tool_call_id",
                "missing_required_parameter",
            ),
            (
                json!([{"role": "assistant", "content": null}]),
                "messages[0].content",
                "missing_required_parameter",
            ),
            (
                json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]),
                "messages[0].tool_calls[0].function.arguments",
                "missing_required_parameter",
            ),
            (
                json!([{"role": "assistant", "content": "x", "audio": {"id": "a"}}]),
                "messages[0].audio",
                "unsupported_parameter",
            ),
            (
                json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b", "x": 1}]),
                "messages[1].x",
                "unknown_parameter",
            ),
        ];
        for (messages, param, code) in cases {
            let error = normalise(Some(messages.clone()), false).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{messages}");
            assert_eq!(error.code, Some(code), "{messages}");
        }
        assert_eq!(normalise(None, false).unwrap_err().param.as_deref(), Some("messages"));
        let extra = json!([{"role": "user", "content": "b", "x": 1}]);
        assert!(normalise(Some(extra), true).is_ok());
    }

    #[test]
    fn content_that_is_no_text_is_refused_by_path() {
        for part in ["image_url", "input_audio", "file"] {
            let messages = json!([{"role": "user", "content": [
                {"type": "text", "text": "look"}, {"type": part, part: {}}]}]);
            let error = normalise(Some(messages), false).unwrap_err();
            assert_eq!(error.code, Some("unsupported_parameter"));
            assert_eq!(error.param.as_deref(), Some("messages[0].content[1]"));
            assert!(error.message.contains(part));
        }
    }
}
