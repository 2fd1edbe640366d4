//! Messages in the form that a template takes.

use std::collections::{HashMap, VecDeque};

use serde_json::{Value, json};

use super::ChatStyle;
use crate::text::output::CallFormat;

impl ChatStyle {
    /// Messages as the template wants them: arguments of calls as objects or texts, ids of calls
    /// short where the family insists on it, and everything in words where the template knows no
    /// tools. `tools` is what is left to be given to the template.
    pub fn adapt(&self, messages: Value, tools: Option<Value>) -> (Value, Option<Value>) {
        let Value::Array(mut list) = messages else { return (messages, tools) };
        list.iter_mut().for_each(|message| self.adapt_message(message));
        let (shown, told) = match self.shows_tools {
            true => (tools, None),
            false => (None, tools),
        };
        if let Some(tools) = told {
            let text = describe(&tools);
            match list.first_mut() {
                Some(first) if first["role"] == "system" => {
                    let own = first["content"].as_str().unwrap_or_default();
                    first["content"] = Value::from(format!("{own}\n\n{text}"));
                }
                _ => list.insert(0, json!({"role": "system", "content": text})),
            }
        }
        if self.shows_calls && !self.takes_two_calls {
            list = self.one_by_one(list);
        }
        if self.shows_calls && !self.takes_both && !self.alternates {
            list = list.into_iter().flat_map(|message| self.apart(message)).collect();
        }
        let mut turns = self.in_turns(list, shown.is_some());
        let first = turns.iter().position(|turn| turn["role"] != "system");
        let may_open = self.takes_greeting && (shown.is_none() || self.opens_with_call);
        if let Some(first) = first.filter(|&i| !may_open && turns[i]["role"] == "assistant") {
            turns.insert(first, json!({"role": "user", "content": ""}));
        }
        (Value::Array(turns), shown)
    }

    /// What was said and what was called in a message, each in its own.
    fn apart(&self, mut message: Value) -> impl Iterator<Item = Value> {
        let text = message["content"].as_str().filter(|text| !text.is_empty());
        let said = text.filter(|_| message.get("tool_calls").is_some_and(Value::is_array));
        let said = said.map(|text| json!({"role": "assistant", "content": text}));
        if said.is_some() {
            message["content"] = self.no_words();
        }
        said.into_iter().chain([message])
    }

    /// Every call in a message of its own, with its result behind it; what else the message had
    /// stays with the first. Results that name no call of it go to calls without one, in order.
    fn one_by_one(&self, list: Vec<Value>) -> Vec<Value> {
        let mut out = Vec::with_capacity(list.len());
        let mut rest = list.into_iter().peekable();
        while let Some(mut message) = rest.next() {
            let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
            let Some(calls) = calls.filter(|calls| calls.len() > 1).map(std::mem::take) else {
                out.push(message);
                continue;
            };
            let mut open: HashMap<String, VecDeque<usize>> = HashMap::new();
            for (i, call) in calls.iter().enumerate() {
                open.entry(id_of(&call["id"])).or_default().push_back(i);
            }
            let (mut results, mut others) = (vec![None; calls.len()], VecDeque::new());
            while let Some(result) = rest.next_if(|next| next["role"] == "tool") {
                let id = id_of(&result["tool_call_id"]);
                match open.get_mut(&id).and_then(VecDeque::pop_front) {
                    Some(i) => results[i] = Some(result),
                    None => others.push_back(result),
                }
            }
            let mut first = Some(message);
            for (call, result) in calls.into_iter().zip(results) {
                let bare = || json!({"role": "assistant", "content": self.no_words()});
                let mut one = first.take().unwrap_or_else(bare);
                one["tool_calls"] = json!([call]);
                out.push(one);
                out.extend(result.or_else(|| others.pop_front()));
            }
            out.extend(others);
        }
        out
    }

    /// The content of a message with nothing but a call.
    fn no_words(&self) -> Value {
        if self.takes_null { Value::Null } else { json!("") }
    }

    /// Messages in the order that the template takes: what it has no place for becomes a part of a
    /// neighbour. Beside tools system messages are one, since some take a second for the question.
    fn in_turns(&self, list: Vec<Value>, tools: bool) -> Vec<Value> {
        let mut turns: Vec<Value> = Vec::with_capacity(list.len());
        let mut was_system = false; // the last one, which is the user's now
        let mut leads = true; // all before it are system messages
        let role = |message: &Value| message["role"].as_str().unwrap_or_default().to_owned();
        for mut message in list {
            let last = turns.last().map(role).unwrap_or_default();
            let shown = match last.as_str() {
                _ if leads => self.takes_system,
                "user" | "tool" => self.mid_system || self.late_system,
                _ => self.late_system,
            };
            let moved = message["role"] == "system" && !shown;
            if moved {
                message["role"] = Value::from("user");
            }
            let calls = message.get("tool_calls").is_some();
            let called = turns.last().is_some_and(|last| last.get("tool_calls").is_some());
            let joins = match (last.as_str(), role(&message).as_str()) {
                ("system", "system") => !self.two_systems || (leads && tools),
                ("user", "user") => self.alternates || was_system,
                ("assistant", "assistant") => self.alternates && !calls && !called,
                ("tool", "user") => self.alternates && !self.takes_silence,
                _ => false,
            };
            // Calls and results are not counted as turns.
            let between = match (last.as_str(), role(&message).as_str()) {
                _ if !self.alternates => None,
                ("assistant", "assistant") if calls && !called => Some("user"),
                ("tool", "user") => Some("assistant"),
                _ => None,
            };
            leads &= message["role"] == "system";
            match turns.last_mut() {
                Some(last) if joins => append(last, &message),
                _ => {
                    turns.extend(between.map(|role| json!({"role": role, "content": ""})));
                    turns.push(message);
                }
            }
            was_system = moved;
        }
        turns
    }

    /// The thought of a message under the name that the template has for it. Words between it and
    /// a call become a part of it where both together are refused.
    fn rename_thought(&self, message: &mut Value) {
        const KEY: &str = "reasoning_content";
        let Some(thought) = message.as_object_mut().and_then(|message| message.remove(KEY)) else {
            return;
        };
        message["thinking"] = thought;
        let words = message["content"].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        if let Some(words) = words.filter(|_| !self.takes_all && message["tool_calls"].is_array()) {
            let thought = message["thinking"].as_str().unwrap_or_default();
            let whole = [thought, &words].into_iter().filter(|text| !text.is_empty());
            message["thinking"] = whole.collect::<Vec<_>>().join("\n\n").into();
            message["content"] = self.no_words();
        }
    }

    fn adapt_message(&self, message: &mut Value) {
        let mistral = matches!(self.format, CallFormat::MistralList | CallFormat::MistralArgs);
        if mistral && let Some(id) = message["tool_call_id"].as_str() {
            message["tool_call_id"] = Value::from(short_id(id));
        }
        if !self.shows_calls && message["role"] == "tool" {
            let content = message["content"].as_str().unwrap_or_default();
            let content = format!("<tool_response>\n{content}\n</tool_response>");
            *message = json!({"role": "user", "content": content});
            return;
        }
        if !self.takes_null && message["role"] == "assistant" && message["content"].is_null() {
            message["content"] = json!("");
        }
        if self.takes_thinking {
            self.rename_thought(message);
        }
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        let Some(calls) = calls else { return };
        for call in calls.iter_mut() {
            if mistral && let Some(id) = call["id"].as_str() {
                call["id"] = Value::from(short_id(id));
            }
            let arguments = &mut call["function"]["arguments"];
            if !self.text_arguments
                && let Some(text) = arguments.as_str()
                && let Ok(object @ Value::Object(_)) = serde_json::from_str(text)
            {
                *arguments = object;
            }
        }
        if self.shows_calls && !self.takes_empty && self.takes_null && message["content"] == "" {
            message["content"] = Value::Null;
        }
        if !self.shows_calls {
            let mut words = vec![message["content"].as_str().unwrap_or_default().to_owned()];
            words.retain(|text| !text.is_empty());
            let calls = message["tool_calls"].as_array().into_iter().flatten();
            words.extend(calls.map(|call| {
                let call = &call["function"];
                let (name, arguments) = (&call["name"], &call["arguments"]);
                format!(
                    "<tool_call>\n{{\"name\": {name}, \"arguments\": {arguments}}}\n</tool_call>"
                )
            }));
            *message = json!({"role": "assistant", "content": words.join("\n")});
        }
    }
}

/// An id as a key; what is no text is like nothing.
fn id_of(id: &Value) -> String {
    id.as_str().unwrap_or_default().to_owned()
}

/// Puts a text behind another one, with a line between.
fn append(last: &mut Value, next: &Value) {
    let after = next["content"].as_str().unwrap_or_default();
    match last.get_mut("content") {
        _ if after.is_empty() => {}
        Some(Value::String(text)) if !text.is_empty() => {
            text.push_str("\n\n");
            text.push_str(after);
        }
        _ => last["content"] = Value::from(after),
    }
}

/// Nine letters and digits, as Mistral's templates insist.
fn short_id(id: &str) -> String {
    let letters: Vec<char> = id.chars().filter(char::is_ascii_alphanumeric).collect();
    let short: String = letters[letters.len().saturating_sub(9)..].iter().collect();
    format!("{short:0>9}")
}

/// What a model is told whose template has no words for tools.
fn describe(tools: &Value) -> String {
    let mut text =
        String::from("You may call these tools. Each is described by a line of JSON:\n<tools>\n");
    for tool in tools.as_array().into_iter().flatten() {
        text.push_str(&tool["function"].to_string());
        text.push('\n');
    }
    text.push_str(
        "</tools>\nTo call one, answer with nothing but:\n<tool_call>\n\
         {\"name\": \"the tool\", \"arguments\": {\"its\": \"arguments\"}}\n</tool_call>",
    );
    text
}
