//! `system` and `messages`: blocks in, messages as chat templates know them out.
//!
//! A result of a tool is a message of its own, in the order of the blocks. Turns of one role that
//! follow each other are one turn, as at Anthropic. Every call has its result in the turn after it,
//! and every result its call in the turn before. That a tool failed is said in words, because
//! templates have no other place for it.

use serde_json::{Map, Value, json};

use super::request::wrong_word;
use crate::server::error::ApiError;
use crate::server::extract::{Fields, kind};
use crate::server::fields::{self, Field, Takes, honoured, no_effect, refused};
use crate::server::{messages, tools};

const CACHED: &str = "every prefix is cached while there is room";

/// One of `messages`.
const MESSAGE: &[Field] =
    &[honoured("role", Takes::Text), honoured("content", fields::TEXT_OR_LIST)];

const TEXT: &[Field] = &[
    honoured("type", Takes::Text),
    honoured("text", Takes::Text),
    no_effect("cache_control", Takes::Object, CACHED),
    refused("citations", fields::is_empty_list, "there are no documents to cite"),
];

const TOOL_USE: &[Field] = &[
    honoured("type", Takes::Text),
    honoured("id", Takes::Text),
    honoured("name", Takes::Text),
    honoured("input", Takes::Object),
    no_effect("cache_control", Takes::Object, CACHED),
    no_effect("caller", Takes::Object, "only the model itself calls tools"),
    refused("toolset_name", fields::never, "there are no toolsets here"),
];

const TOOL_RESULT: &[Field] = &[
    honoured("type", Takes::Text),
    honoured("tool_use_id", Takes::Text),
    honoured("content", fields::TEXT_OR_LIST),
    honoured("is_error", Takes::Bool),
    no_effect("cache_control", Takes::Object, CACHED),
    refused("toolset_name", fields::never, "there are no toolsets here"),
];

const THINKING: &[Field] = &[
    honoured("type", Takes::Text),
    honoured("thinking", Takes::Text),
    no_effect("signature", Takes::Text, "thought is neither signed nor checked here"),
];

/// Reads a conversation to messages as chat templates know them.
///
/// # Errors
/// The first message or block that is malformed or not supported, by its path.
pub(super) fn read(
    system: Option<Value>,
    messages: Option<Value>,
    lenient: bool,
) -> Result<Value, ApiError> {
    let list = messages::list(messages)?;
    let mut talk = Talk { lenient, ..Talk::default() };
    if let Some(system) = system {
        let text = talk.texts("system", system)?;
        talk.push("system", json!(text), None, Vec::new());
    }
    let last = list.len() - 1;
    for (i, value) in list.into_iter().enumerate() {
        talk.message(&format!("messages[{i}]"), value)?;
    }
    if talk.out.last().is_some_and(|message| message["role"] == "assistant") {
        let path = format!("messages[{last}]");
        let message = format!(
            "Unsupported '{path}': an answer that begins with given words is not supported; the \
             conversation must end with a turn of the user."
        );
        return Err(ApiError::unsupported(&path, message));
    }
    talk.settle()?;
    Ok(Value::Array(talk.out))
}

#[derive(Default)]
struct Talk {
    out: Vec<Value>,
    /// Calls of the assistant's last turn.
    called: Vec<Called>,
    lenient: bool,
}

struct Called {
    path: String,
    id: String,
    has_result: bool,
}

impl Talk {
    /// The turn after that of the assistant is over.
    fn settle(&mut self) -> Result<(), ApiError> {
        match self.called.drain(..).find(|called| !called.has_result) {
            None => Ok(()),
            Some(Called { path, id, .. }) => {
                let message = format!(
                    "Invalid '{path}': each 'tool_use' must have a 'tool_result' in the next \
                     message, and '{id}' has none."
                );
                Err(ApiError::invalid(&path, message))
            }
        }
    }

    fn message(&mut self, path: &str, value: Value) -> Result<(), ApiError> {
        let Value::Object(map) = value else {
            return Err(ApiError::wrong_type(path, "an object", kind(&value)));
        };
        fields::check(&map, MESSAGE, &format!("{path}."), self.lenient)?;
        let mut message = Fields::within(path, map);
        let role = tools::required(&mut message, "role")?;
        let at = message.at("content");
        let content = message.value("content").ok_or_else(|| ApiError::missing(&at))?;
        match role.as_str() {
            "user" => self.user(&at, content),
            "assistant" => self.assistant(&at, content),
            "system" => {
                let text = self.texts(&at, content)?;
                self.push("system", json!(text), None, Vec::new());
                Ok(())
            }
            other => Err(wrong_word(&message.at("role"), other, "user, assistant, system")),
        }
    }

    fn user(&mut self, path: &str, content: Value) -> Result<(), ApiError> {
        for block in self.blocks(path, content)? {
            match block.kind.as_str() {
                "text" => {
                    let text = self.text(block)?;
                    self.push("user", json!(text), None, Vec::new());
                }
                "tool_result" => self.tool_result(block)?,
                _ => return Err(block.unsupported("text and tool_result")),
            }
        }
        Ok(())
    }

    fn tool_result(&mut self, mut block: Block) -> Result<(), ApiError> {
        block.check(TOOL_RESULT, self.lenient)?;
        let id = tools::required(&mut block.fields, "tool_use_id")?;
        let at = block.fields.at("tool_use_id");
        let Some(called) = self.called.iter_mut().find(|called| called.id == id) else {
            let message = format!(
                "Invalid '{at}': each 'tool_result' must have a 'tool_use' in the message before, \
                 and none there has the id '{id}'."
            );
            return Err(ApiError::invalid(&at, message));
        };
        called.has_result = true;
        let failed = block.fields.bool("is_error")?.unwrap_or(false);
        let at = block.fields.at("content");
        let text = match block.fields.value("content") {
            None => String::new(),
            Some(Value::Array(list)) if list.is_empty() => String::new(),
            Some(content) => self.texts(&at, content)?,
        };
        let text = if failed { format!("Error: {text}") } else { text };
        self.out.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
        Ok(())
    }

    fn assistant(&mut self, path: &str, content: Value) -> Result<(), ApiError> {
        if self.out.last().is_some_and(|last| last["role"] != "assistant") {
            self.settle()?;
        }
        let (mut texts, mut thought, mut calls) = (Vec::new(), Vec::new(), Vec::new());
        for mut block in self.blocks(path, content)? {
            match block.kind.as_str() {
                "text" => texts.push(self.text(block)?),
                "thinking" => {
                    block.check(THINKING, self.lenient)?;
                    thought.push(tools::required(&mut block.fields, "thinking")?);
                }
                "tool_use" => calls.push(self.tool_use(block)?),
                _ => return Err(block.unsupported("text, thinking and tool_use")),
            }
        }
        let content = match texts.is_empty() && !calls.is_empty() {
            true => Value::Null,
            false => json!(texts.join("\n")),
        };
        let thought = (!thought.is_empty()).then(|| thought.join("\n"));
        self.push("assistant", content, thought, calls);
        Ok(())
    }

    fn tool_use(&mut self, mut block: Block) -> Result<Value, ApiError> {
        block.check(TOOL_USE, self.lenient)?;
        let id = tools::required(&mut block.fields, "id")?;
        let name = tools::required(&mut block.fields, "name")?;
        let at = block.fields.at("input");
        let input = block.fields.object("input")?.ok_or_else(|| ApiError::missing(&at))?;
        let arguments = Value::Object(input).to_string();
        let function = json!({"name": name, "arguments": arguments});
        let call = json!({"id": id, "type": "function", "function": function});
        self.called.push(Called { path: block.path, id, has_result: false });
        Ok(call)
    }

    /// The text of content in which only text may stand.
    fn texts(&self, path: &str, content: Value) -> Result<String, ApiError> {
        let one = |block: Block| match block.kind.as_str() {
            "text" => self.text(block),
            _ => Err(block.unsupported("text")),
        };
        let texts = self.blocks(path, content)?.into_iter().map(one);
        Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
    }

    fn text(&self, mut block: Block) -> Result<String, ApiError> {
        block.check(TEXT, self.lenient)?;
        tools::required(&mut block.fields, "text")
    }

    /// Content as blocks; a text is one of them.
    fn blocks(&self, path: &str, content: Value) -> Result<Vec<Block>, ApiError> {
        let list = match content {
            Value::String(text) => vec![json!({"type": "text", "text": text})],
            Value::Array(list) if list.is_empty() => {
                let message = format!("Invalid '{path}': expected at least one block.");
                return Err(ApiError::invalid(path, message));
            }
            Value::Array(list) => list,
            other => {
                let expected = "a string or an array of blocks";
                return Err(ApiError::wrong_type(path, expected, kind(&other)));
            }
        };
        let one = |(i, value)| Block::read(format!("{path}[{i}]"), value);
        list.into_iter().enumerate().map(one).collect()
    }

    /// One more turn, or more of the last one.
    fn push(&mut self, role: &str, content: Value, thought: Option<String>, calls: Vec<Value>) {
        if let Some(last) = self.out.last_mut().filter(|last| last["role"] == role) {
            match (&mut last["content"], content) {
                (Value::String(old), Value::String(new)) => append(old, &new),
                (Value::String(_), _) => {}
                (old, new) => *old = new,
            }
            if let Some(new) = thought {
                match &mut last["reasoning_content"] {
                    Value::String(old) => append(old, &new),
                    old => *old = json!(new),
                }
            }
            if !calls.is_empty() {
                match &mut last["tool_calls"] {
                    Value::Array(old) => old.extend(calls),
                    old => *old = Value::Array(calls),
                }
            }
            return;
        }
        let mut message = json!({"role": role, "content": content});
        if let Some(thought) = thought {
            message["reasoning_content"] = json!(thought);
        }
        if !calls.is_empty() {
            message["tool_calls"] = Value::Array(calls);
        }
        self.out.push(message);
    }
}

/// One more line.
fn append(text: &mut String, more: &str) {
    text.push('\n');
    text.push_str(more);
}

/// A block of content that is not read yet.
struct Block {
    kind: String,
    path: String,
    fields: Fields,
}

impl Block {
    fn read(path: String, value: Value) -> Result<Self, ApiError> {
        let Value::Object(map) = value else {
            return Err(ApiError::wrong_type(&path, "an object", kind(&value)));
        };
        let mut head = Map::new();
        head.extend(map.get("type").map(|word| ("type".to_owned(), word.clone())));
        let kind = tools::required(&mut Fields::within(&path, head), "type")?;
        Ok(Self { kind, fields: Fields::within(&path, map), path })
    }

    fn check(&mut self, table: &[Field], lenient: bool) -> Result<(), ApiError> {
        fields::check(self.fields.map(), table, &format!("{}.", self.path), lenient)
    }

    fn unsupported(&self, words: &str) -> ApiError {
        let message = format!(
            "Unsupported '{}': a block of the type '{}' is not supported here; {words} are.",
            self.path, self.kind
        );
        ApiError::unsupported(&self.path, message)
    }
}
