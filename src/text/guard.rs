//! What users and tools say stays what they say.
//!
//! A chat template writes special tokens such as `<|im_end|>` between the messages, as text, and
//! the tokenizer finds them again. A user who writes the same text would end his own turn and speak
//! for somebody else. So before rendering, such texts in the messages of users and tools are
//! replaced by marks that no message contains; afterwards the text is cut at the marks, and what
//! stood there is tokenized as plain text. Messages without such texts are untouched, and so are
//! those of the system and the assistant, whose authors are trusted.

use serde_json::Value;

use super::{Special, TextError, Tokenizer};

/// Messages with their special-token texts hidden.
#[derive(Debug)]
pub struct Guard {
    /// What a template is given.
    pub messages: Value,
    mark: char,
    hidden: Vec<String>,
}

impl Guard {
    /// Hides what the tokenizer would take for special tokens.
    pub fn new(mut messages: Value, tokenizer: &Tokenizer) -> Self {
        let all = messages.to_string();
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
        let mut guard = Self { messages: Value::Null, mark, hidden: Vec::new() };
        if !texts.is_empty() {
            let list = messages.as_array_mut().into_iter().flatten();
            for message in list.filter(|m| m["role"] == "user" || m["role"] == "tool") {
                guard.hide(&mut message["content"], &texts);
            }
        }
        guard.messages = messages;
        guard
    }

    fn hide(&mut self, value: &mut Value, texts: &[String]) {
        match value {
            Value::String(text) => {
                for special in texts {
                    if text.contains(special.as_str()) {
                        let mark = format!("{0}{1}{0}", self.mark, self.hidden.len());
                        *text = text.replace(special.as_str(), &mark);
                        self.hidden.push(special.clone());
                    }
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|item| self.hide(item, texts)),
            Value::Object(map) => map.values_mut().for_each(|item| self.hide(item, texts)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
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
