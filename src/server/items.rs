//! Items of responses and conversations: validated, named, and turned into the messages of a chat.
//!
//! Afterwards every item has a type, an id and a status, and a message a list of parts. A summary
//! that took the place of a conversation travels as base64 that clients hand on unread, and so does
//! a thought where a client asks for it: not encrypted, since whoever holds it was there.
//! Deliberately absent: what is in no chat (pictures, sound, files, the calls of hosted tools),
//! which is refused by its path.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::extract::{Fields, kind};
use super::ids;
use super::messages::only;

/// Items of one request.
const ITEMS_MAX: usize = 10_000;

/// Reads a list of items: `input` of a response, `items` of a conversation.
///
/// # Errors
/// The first item that is malformed or of a kind that is not supported, by its path.
pub(super) fn read(param: &str, list: Vec<Value>, lenient: bool) -> Result<Vec<Value>, ApiError> {
    if list.len() > ITEMS_MAX {
        let message = format!("Invalid '{param}': at most {ITEMS_MAX} items.");
        return Err(ApiError::invalid(param, message));
    }
    let one = |(i, value)| item(&format!("{param}[{i}]"), value, lenient);
    list.into_iter().enumerate().map(one).collect()
}

/// A text as the message of a user.
pub(super) fn user_text(text: &str) -> Value {
    let content = json!([{"type": "input_text", "text": text}]);
    let id = ids::random("msg_");
    json!({"id": id, "type": "message", "status": "completed", "role": "user", "content": content})
}

/// What else the items of an answer carry: a client may send them back as they came.
const ECHOED: [&str; 5] = ["status", "phase", "created_by", "caller", "namespace"];

fn item(path: &str, value: Value, lenient: bool) -> Result<Value, ApiError> {
    let Value::Object(map) = value else {
        return Err(ApiError::wrong_type(path, "an object", kind(&value)));
    };
    let mut item = Item(Fields::within(path, map));
    let named = item.0.string("type")?;
    let read = match named.as_deref() {
        None if item.0.map().contains_key("role") => item.message(lenient),
        Some("message") => item.message(lenient),
        Some("function_call") => item.call("function_call", "fc_", "arguments"),
        Some("custom_tool_call") => item.call("custom_tool_call", "ctc_", "input"),
        Some("function_call_output") => item.output("function_call_output", "fco_", lenient),
        Some("custom_tool_call_output") => item.output("custom_tool_call_output", "ctco_", lenient),
        Some("reasoning") => item.reasoning(lenient),
        Some("compaction") => item.compaction(),
        // Resolved by whoever knows what was said before.
        None | Some("item_reference") if item.0.map().contains_key("id") => {
            Ok(json!({"type": "item_reference", "id": item.wanted("id")?}))
        }
        None => Err(ApiError::missing(&item.0.at("type"))),
        Some(other) => {
            let text = format!("Unsupported item: '{path}' is of type '{other}'.");
            Err(ApiError::unsupported(&item.0.at("type"), text))
        }
    }?;
    item.0.end(&ECHOED, lenient)?;
    Ok(read)
}

/// An item between the wire and the store.
struct Item(Fields);

impl Item {
    fn wanted(&mut self, field: &str) -> Result<String, ApiError> {
        self.0.string(field)?.ok_or_else(|| ApiError::missing(&self.0.at(field)))
    }

    /// The id that it has, or a new one.
    fn id(&mut self, prefix: &str) -> Result<String, ApiError> {
        let given = self.0.string("id")?.filter(|id| !id.is_empty());
        Ok(given.unwrap_or_else(|| ids::random(prefix)))
    }

    fn message(&mut self, lenient: bool) -> Result<Value, ApiError> {
        let role = self.wanted("role")?;
        if !["user", "assistant", "system", "developer"].contains(&role.as_str()) {
            let message = format!(
                "Invalid value: '{role}'. Supported values are: 'assistant', 'system', \
                 'developer' and 'user'."
            );
            return Err(ApiError::invalid(&self.0.at("role"), message));
        }
        let own = if role == "assistant" { "output_text" } else { "input_text" };
        let path = self.0.at("content");
        let content = match self.0.value("content") {
            None => return Err(ApiError::missing(&path)),
            Some(Value::String(text)) => vec![part(own, &text)],
            Some(Value::Array(parts)) => {
                let one = |(i, part)| text_part(&format!("{path}[{i}]"), part, own, lenient);
                parts.iter().enumerate().map(one).collect::<Result<_, _>>()?
            }
            Some(other) => {
                let expected = "a string or an array of content parts";
                return Err(ApiError::wrong_type(&path, expected, kind(&other)));
            }
        };
        let id = self.id("msg_")?;
        Ok(json!({"id": id, "type": "message", "status": "completed", "role": role,
                  "content": content}))
    }

    /// A call of a tool; `says` is the field with what the tool is given.
    fn call(&mut self, kind: &str, prefix: &str, says: &str) -> Result<Value, ApiError> {
        let (call_id, name) = (self.wanted("call_id")?, self.wanted("name")?);
        let (said, id) = (self.wanted(says)?, self.id(prefix)?);
        Ok(json!({"id": id, "type": kind, "status": "completed", "call_id": call_id, "name": name,
                  says: said}))
    }

    fn output(&mut self, name: &str, prefix: &str, lenient: bool) -> Result<Value, ApiError> {
        let call_id = self.wanted("call_id")?;
        self.0.string("name")?; // of the function: the call says it
        let path = self.0.at("output");
        let output = match self.0.value("output") {
            Some(Value::String(text)) => Value::String(text),
            Some(Value::Array(parts)) => {
                let path = |i| format!("{path}[{i}]");
                let one = |(i, part)| text_part(&path(i), part, "input_text", lenient);
                parts.iter().enumerate().map(one).collect::<Result<_, _>>()?
            }
            None => return Err(ApiError::missing(&path)),
            Some(other) => {
                let expected = "a string or an array of content parts";
                return Err(ApiError::wrong_type(&path, expected, kind(&other)));
            }
        };
        let id = self.id(prefix)?;
        Ok(json!({"id": id, "type": name, "status": "completed", "call_id": call_id,
                  "output": output}))
    }

    fn compaction(&mut self) -> Result<Value, ApiError> {
        let path = self.0.at("encrypted_content");
        let sealed = self.wanted("encrypted_content")?;
        if open(&sealed).is_none() {
            return Err(not_ours(&path));
        }
        let id = self.id("cmp_")?;
        Ok(json!({"id": id, "type": "compaction", "encrypted_content": sealed}))
    }

    fn reasoning(&mut self, lenient: bool) -> Result<Value, ApiError> {
        let id = self.id("rs_")?;
        let mut list = |field: &str| {
            let path = self.0.at(field);
            match self.0.value(field) {
                None => Ok(Value::Array(Vec::new())),
                Some(Value::Array(list)) => {
                    let thought = |(i, part)| thought(&format!("{path}[{i}]"), part, lenient);
                    list.iter().enumerate().try_for_each(thought)?;
                    Ok(Value::Array(list))
                }
                Some(other) => Err(ApiError::wrong_type(&path, "an array", kind(&other))),
            }
        };
        let (summary, mut content) = (list("summary")?, list("content")?);
        // Some clients send back what was sealed and nothing else. What another server sealed,
        // nobody here can read.
        let sealed = self.0.string("encrypted_content")?;
        if let Some(sealed) = sealed.filter(|sealed| sealed.starts_with(SEAL)) {
            let text = open(&sealed).ok_or_else(|| not_ours(&self.0.at("encrypted_content")))?;
            if content.as_array().is_some_and(Vec::is_empty) {
                content = json!([{"type": "reasoning_text", "text": text}]);
            }
        }
        Ok(json!({"id": id, "type": "reasoning", "summary": summary, "content": content}))
    }
}

fn part(kind: &str, text: &str) -> Value {
    match kind {
        "output_text" => json!({"type": kind, "text": text, "annotations": [], "logprobs": []}),
        _ => json!({"type": kind, "text": text}),
    }
}

/// A part of a thought, or of its summary.
fn thought(path: &str, value: &Value, lenient: bool) -> Result<(), ApiError> {
    let Value::Object(part) = value else {
        return Err(ApiError::wrong_type(path, "an object", kind(value)));
    };
    if !value["text"].is_string() {
        return Err(ApiError::wrong_type(
            &format!("{path}.text"),
            "a string",
            kind(&value["text"]),
        ));
    }
    only(path, part, &["type", "text"], lenient)
}

/// What a part of text has besides: that of an answer may come back as it was, or as a client
/// parsed it, and where a prefix ends that is to be cached is of no effect.
pub(super) const BESIDE: [&str; 5] =
    ["annotations", "logprobs", "parsed", "prompt_cache_breakpoint", "cache_control"];

/// A part of text, as the side that said it writes it.
fn text_part(
    path: &str,
    value: &Value,
    own: &'static str,
    lenient: bool,
) -> Result<Value, ApiError> {
    let Value::Object(part) = value else {
        return Err(ApiError::wrong_type(path, "an object", kind(value)));
    };
    let named = match value["type"].as_str() {
        None => return Err(ApiError::missing(&format!("{path}.type"))),
        Some("input_text" | "output_text" | "text") => own,
        Some("refusal") if own == "output_text" => "refusal",
        Some(other @ ("input_image" | "input_file" | "input_audio")) => {
            let text =
                format!("Unsupported content: '{path}' is of type '{other}', and only text is.");
            return Err(ApiError::unsupported(path, text));
        }
        Some(other) => {
            let path = format!("{path}.type");
            let text = format!("Invalid value: '{other}'. Supported value is: '{own}'.");
            return Err(ApiError::invalid(&path, text));
        }
    };
    let field = if named == "refusal" { "refusal" } else { "text" };
    only(path, part, &[&["type", field][..], &BESIDE].concat(), lenient)?;
    let Some(text) = value[field].as_str() else {
        let path = format!("{path}.{field}");
        return Err(ApiError::wrong_type(&path, "a string", kind(&value[field])));
    };
    Ok(match named {
        "refusal" => json!({"type": named, "refusal": text}),
        _ => self::part(named, text),
    })
}

/// Turns items into the messages of a chat. Calls that follow each other are one message, and
/// what was thought before a message or a call goes with it.
pub(super) fn messages(instructions: Option<&str>, items: &[Value]) -> Vec<Value> {
    let mut messages: Vec<Value> = Vec::new();
    messages.extend(instructions.map(|text| json!({"role": "system", "content": text})));
    let mut thought = None;
    for item in items {
        match item["type"].as_str() {
            Some("function_call" | "custom_tool_call") => {
                let call = chat_call(item);
                let open = messages.last_mut().and_then(|last| last.get_mut("tool_calls"));
                match open.and_then(Value::as_array_mut) {
                    Some(calls) => calls.push(call),
                    None => {
                        let mut message = Map::new();
                        message.insert("role".to_owned(), json!("assistant"));
                        message.insert("content".to_owned(), Value::Null);
                        message.insert("tool_calls".to_owned(), json!([call]));
                        messages.push(with_thought(message, thought.take()));
                    }
                }
            }
            Some("function_call_output" | "custom_tool_call_output") => messages.push(json!({
                "role": "tool", "tool_call_id": item["call_id"], "content": joined(&item["output"]),
            })),
            Some("compaction") => {
                let text = item["encrypted_content"].as_str().and_then(open).unwrap_or_default();
                messages.push(json!({"role": "assistant", "content": text}));
            }
            Some("reasoning") => thought = Some(thoughts(item)).filter(|text| !text.is_empty()),
            _ => {
                let mut message = Map::new();
                message.insert("role".to_owned(), item["role"].clone());
                message.insert("content".to_owned(), joined(&item["content"]).into());
                let thought = thought.take().filter(|_| item["role"] == "assistant");
                messages.push(with_thought(message, thought));
            }
        }
    }
    messages
}

/// A call as a message of a chat has it.
fn chat_call(item: &Value) -> Value {
    let (kind, says) = match item["type"] == "custom_tool_call" {
        true => ("custom", "input"),
        false => ("function", "arguments"),
    };
    json!({"id": item["call_id"], "type": kind, kind: {"name": item["name"], says: item[says]}})
}

/// The item that a summary becomes.
pub(super) fn compaction(summary: &str) -> Value {
    json!({"id": ids::random("cmp_"), "type": "compaction", "encrypted_content": seal(summary)})
}

/// A text that clients hand on unread.
pub(super) fn seal(text: &str) -> String {
    format!("{SEAL}{}", STANDARD.encode(text))
}

/// What sealed text begins with: a change of the form will be a change of this.
const SEAL: &str = "hearth-1.";

fn not_ours(path: &str) -> ApiError {
    ApiError::invalid(path, format!("Invalid '{path}': it was not made by this server."))
}

/// The text again, if it is one of ours.
fn open(sealed: &str) -> Option<String> {
    let text = STANDARD.decode(sealed.strip_prefix(SEAL)?).ok()?;
    String::from_utf8(text).ok()
}

fn with_thought(mut message: Map<String, Value>, thought: Option<String>) -> Value {
    if let Some(thought) = thought {
        message.insert("reasoning_content".to_owned(), thought.into());
    }
    Value::Object(message)
}

/// The text of a string or of parts.
fn joined(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        content => texts(content).join("\n"),
    }
}

fn thoughts(item: &Value) -> String {
    let content = texts(&item["content"]);
    if content.is_empty() { texts(&item["summary"]).join("\n") } else { content.join("\n") }
}

fn texts(parts: &Value) -> Vec<&str> {
    let text = |part: &Value| part["text"].as_str().or(part["refusal"].as_str()).is_some();
    let parts = parts.as_array().into_iter().flatten().filter(|part| text(part));
    parts.filter_map(|part| part["text"].as_str().or(part["refusal"].as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_message_comes_into_one() {
        let items = read(
            "input",
            vec![
                json!({"role": "user", "content": "hi"}),
                json!({"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                       "content": [{"type": "output_text", "text": "ho", "annotations": []}]}),
                json!({"role": "developer", "content": [{"type": "input_text", "text": "be"}]}),
            ],
            false,
        )
        .unwrap();
        assert_eq!(items[0]["content"], json!([{"type": "input_text", "text": "hi"}]));
        assert!(items[0]["id"].as_str().unwrap().starts_with("msg_"));
        assert_eq!((&items[1]["id"], &items[1]["status"]), (&json!("msg_1"), &json!("completed")));
        assert_eq!(
            messages(Some("sys"), &items),
            [
                json!({"role": "system", "content": "sys"}),
                json!({"role": "user", "content": "hi"}),
                json!({"role": "assistant", "content": "ho"}),
                json!({"role": "developer", "content": "be"}),
            ]
        );
    }

    #[test]
    fn calls_that_follow_each_other_are_one_message_with_its_thought() {
        let call = |id: &str| {
            let kind = "function_call";
            json!({"type": kind, "call_id": id, "name": "f", "arguments": "{}"})
        };
        let output = json!({"type": "function_call_output", "call_id": "a", "output": "4"});
        let thought = json!({"type": "reasoning", "summary": [],
                             "content": [{"type": "reasoning_text", "text": "hm"}]});
        let items = read("input", vec![thought, call("a"), call("b"), output, call("c")], false);
        let items = items.unwrap();
        let messages = messages(None, &items);
        assert_eq!(messages.len(), 3);
        assert_eq!(messages[0]["tool_calls"].as_array().map(Vec::len), Some(2));
        assert_eq!(messages[0]["tool_calls"][1]["id"], "b");
        assert_eq!(messages[0]["reasoning_content"], "hm");
        assert_eq!(messages[1], json!({"role": "tool", "tool_call_id": "a", "content": "4"}));
        assert_eq!(messages[2]["tool_calls"][0]["id"], "c");
    }

    #[test]
    fn calls_of_custom_tools_come_back_as_they_went() {
        let call = json!({"id": "ctc_1", "type": "custom_tool_call", "status": "completed",
                          "call_id": "a", "name": "sh", "input": "ls"});
        let output = json!({"type": "custom_tool_call_output", "call_id": "a", "output": "x.rs"});
        let items = read("input", vec![call.clone(), output], false).unwrap();
        assert_eq!(items[0], call);
        assert!(items[1]["id"].as_str().unwrap().starts_with("ctco_"));
        assert_eq!(
            messages(None, &items),
            [
                json!({"role": "assistant", "content": null, "tool_calls": [
                    {"id": "a", "type": "custom", "custom": {"name": "sh", "input": "ls"}}]}),
                json!({"role": "tool", "tool_call_id": "a", "content": "x.rs"}),
            ]
        );
    }

    #[test]
    fn a_summary_is_read_back_and_anything_else_is_not() {
        let item = compaction("Été: 4 €.");
        assert!(!item["encrypted_content"].as_str().unwrap().contains("Été"));
        let items = read("input", vec![item.clone()], false).unwrap();
        assert_eq!(items, [item]);
        let said = json!({"role": "assistant", "content": "Été: 4 €."});
        assert_eq!(messages(None, &items), [said]);
        // A thought comes back too, from clients that keep only what was sealed.
        let sealed = items[0]["encrypted_content"].clone();
        let thought = json!({"type": "reasoning", "summary": [], "encrypted_content": sealed});
        let words = json!([{"type": "reasoning_text", "text": "Été: 4 €."}]);
        assert_eq!(read("input", vec![thought.clone()], false).unwrap()[0]["content"], words);
        let mut foreign = thought;
        foreign["encrypted_content"] = json!("gAAAAABo");
        assert_eq!(read("input", vec![foreign], false).unwrap()[0]["content"], json!([]));
        let damaged = json!({"type": "reasoning", "encrypted_content": "hearth-1.%%"});
        let error = read("input", vec![damaged], false).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("input[0].encrypted_content"));
        for foreign in ["", "gAAAAABo", "hearth-1.%%", "hearth-1./w=="] {
            let item = json!({"type": "compaction", "encrypted_content": foreign});
            let error = read("input", vec![item], false).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("input[0].encrypted_content"), "{foreign}");
        }
    }

    #[test]
    fn bad_items_are_refused_by_path() {
        let user = |content: Value| json!({"role": "user", "content": content});
        for (item, param) in [
            (json!("hi"), "input[0]"),
            (json!({"content": "hi"}), "input[0].type"),
            (json!({"type": "file_search_call"}), "input[0].type"),
            (json!({"role": "robot", "content": "x"}), "input[0].role"),
            (json!({"type": "message", "content": "x"}), "input[0].role"),
            (json!({"role": "user"}), "input[0].content"),
            (user(json!(3)), "input[0].content"),
            (user(json!(["x"])), "input[0].content[0]"),
            (user(json!([{"type": "input_image"}])), "input[0].content[0]"),
            (user(json!([{"type": "sound"}])), "input[0].content[0].type"),
            (user(json!([{"type": "input_text"}])), "input[0].content[0].text"),
            (json!({"type": "function_call", "name": "f"}), "input[0].call_id"),
            (json!({"type": "function_call_output", "call_id": "a"}), "input[0].output"),
            (json!({"type": "item_reference"}), "input[0].type"),
            (json!({"type": "reasoning", "summary": "x"}), "input[0].summary"),
            (json!({"type": "custom_tool_call", "call_id": "a", "name": "f"}), "input[0].input"),
            (json!({"role": "user", "content": "x", "colour": "red"}), "input[0].colour"),
        ] {
            let error = read("input", vec![item.clone()], false).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{item}");
        }
    }
}
