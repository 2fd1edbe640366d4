//! What users, tools and models say stays what they say.
//!
//! A chat template writes special tokens such as `<|im_end|>` between the messages, as text, and
//! the tokenizer finds them again. A user who writes the same text would end his own turn and speak
//! for somebody else. So before rendering, such texts in the messages of users and tools are
//! replaced by marks that no message contains; afterwards the text is cut at the marks, and what
//! stood there is tokenized as plain text. Messages without such texts are untouched, and so are
//! those of the system, whose author is trusted. So is what the assistant said where its marks are
//! a part of its text (`<think>`); where they are beside it, as in harmony, nobody writes marks but
//! the template: a model that repeats some would speak for others in its next turn. There the
//! definitions of tools, which third parties write, are plain text too.

use serde_json::Value;

use super::{Special, TextError, Tokenizer};

/// Messages with their special-token texts hidden.
#[derive(Debug)]
pub struct Guard {
    /// What a template is given.
    pub messages: Value,
    /// Definitions of tools, for the template too.
    pub tools: Option<Value>,
    mark: char,
    hidden: Vec<String>,
}

impl Guard {
    /// Hides what the tokenizer would take for special tokens; with `beside`, also in what the
    /// assistant said and in tools.
    pub fn new(
        mut messages: Value,
        mut tools: Option<Value>,
        tokenizer: &Tokenizer,
        beside: bool,
    ) -> Self {
        if beside {
            // The letters of a text within a text may be escaped.
            arguments(&mut messages).for_each(|arguments| {
                let object = arguments.as_str().and_then(|text| serde_json::from_str(text).ok());
                if let Some(object @ Value::Object(_)) = object {
                    *arguments = object;
                }
            });
        }
        let guarded = tools.as_ref().filter(|_| beside).map(Value::to_string);
        let all = [messages.to_string(), guarded.unwrap_or_default()].concat();
        // JSON spells the characters of a special token's text as they are, or escapes them.
        let spelled = |text: &String| {
            let json = Value::from(text.as_str()).to_string();
            all.contains(&json[1..json.len() - 1])
        };
        let mut texts = tokenizer.special_texts();
        texts.retain(spelled);
        texts.sort_unstable_by_key(|text| std::cmp::Reverse(text.len()));
        let marks = '\u{f0000}'..='\u{ffffd}';
        let mark = marks.into_iter().find(|mark| !all.contains(*mark)).unwrap_or('\u{ffffe}');
        let mut guard = Self { messages: Value::Null, tools: None, mark, hidden: Vec::new() };
        if !texts.is_empty() {
            let list = messages.as_array_mut().into_iter().flatten();
            list.for_each(|message| guard.hide_in(message, &texts, beside));
            if beside && let Some(tools) = &mut tools {
                guard.hide(tools, &texts);
            }
        }
        if beside {
            arguments(&mut messages).for_each(|arguments| {
                if arguments.is_object() {
                    *arguments = Value::from(arguments.to_string());
                }
            });
        }
        (guard.messages, guard.tools) = (messages, tools);
        guard
    }

    fn hide_in(&mut self, message: &mut Value, texts: &[String], beside: bool) {
        let fields: &[&str] = match message["role"].as_str() {
            Some("user" | "tool") => &["content"],
            Some("assistant") if beside => &["content", "reasoning_content"],
            _ => return,
        };
        for field in fields {
            if let Some(value) = message.get_mut(*field) {
                self.hide(value, texts);
            }
        }
        if message["role"] == "assistant" {
            functions(message).for_each(|function| self.hide(function, texts));
        }
    }

    fn hide(&mut self, value: &mut Value, texts: &[String]) {
        match value {
            Value::String(text) => self.hide_text(text, texts),
            Value::Array(list) => list.iter_mut().for_each(|item| self.hide(item, texts)),
            Value::Object(map) => {
                for (mut key, mut item) in std::mem::take(map) {
                    self.hide_text(&mut key, texts);
                    self.hide(&mut item, texts);
                    map.insert(key, item);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn hide_text(&mut self, text: &mut String, texts: &[String]) {
        for special in texts {
            if text.contains(special.as_str()) {
                let mark = format!("{0}{1}{0}", self.mark, self.hidden.len());
                *text = text.replace(special.as_str(), &mark);
                self.hidden.push(special.clone());
            }
        }
    }

    /// The rendered text as the user wrote it.
    pub fn reveal(&self, rendered: &str) -> String {
        self.parts(rendered).map(|(text, _)| text).collect()
    }

    /// The rendered text as tokens.
    pub fn encode(&self, rendered: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for (i, (text, plain)) in self.parts(rendered).enumerate() {
            let special = match (plain, i) {
                (true, _) => Special::NONE,
                (false, 0) => Special::PROMPT,
                (false, _) => Special::PARSE,
            };
            if i == 0 || !text.is_empty() {
                ids.extend(tokenizer.encode(text, special)?);
            }
        }
        Ok(ids)
    }

    /// The text in parts, and whether each is what was hidden.
    fn parts<'a>(&'a self, rendered: &'a str) -> impl Iterator<Item = (&'a str, bool)> {
        let parts = rendered.split(self.mark).enumerate();
        parts.map(|(i, part)| match (i % 2, part.parse::<usize>()) {
            (1, Ok(at)) if at < self.hidden.len() => (self.hidden[at].as_str(), true),
            _ => (part, false),
        })
    }
}

/// What is called in a message.
fn functions(message: &mut Value) -> impl Iterator<Item = &mut Value> {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    calls.into_iter().flatten().filter_map(|call| call.get_mut("function"))
}

/// The arguments of all calls.
fn arguments(messages: &mut Value) -> impl Iterator<Item = &mut Value> {
    let functions = messages.as_array_mut().into_iter().flatten().flat_map(functions);
    functions.filter_map(|function| function.get_mut("arguments"))
}
