//! OpenAI's harmony format, in which gpt-oss speaks: an answer is a row of messages, and the head
//! of each says for whom it is.
//!
//! ```text
//! <|start|>assistant<|channel|>analysis<|message|>THOUGHT<|end|>
//! <|start|>assistant<|channel|>final<|message|>WORDS<|return|>
//! <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{}<|call|>
//! ```
//!
//! The recipient of a call may stand before the channel, and `commentary` without one is words
//! before a call. The marks are special tokens and are known by their ids alone: the same letters
//! in ordinary tokens are text. Here are the marks, the ends of an answer, and the rules of one
//! that is held to a form; `output::harmony` reads answers.

use serde_json::{Map, Value};

use super::grammar::{Rules, Shape, Vocabulary, lark_string};
use super::tools::CallRule;
use super::{ChatTemplate, Tokenizer};

pub(super) const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
const END: &str = "<|end|>";
const CONSTRAIN: &str = "<|constrain|>";
const CALL: &str = "<|call|>";
const RETURN: &str = "<|return|>";
const END_OF_TEXT: &str = "<|endoftext|>";

/// The marks of a message: without these there is no harmony.
pub(super) const FRAME: [&str; 4] = [START, CHANNEL, MESSAGE, END];
/// What ends an answer, besides what the model's files name.
const LAST: [&str; 3] = [CALL, RETURN, END_OF_TEXT];
/// All marks that are in no text.
pub(super) const MARKS: [&str; 7] = [START, CHANNEL, MESSAGE, END, CONSTRAIN, CALL, RETURN];

/// The channel of thoughts.
pub(super) const ANALYSIS: &str = "analysis";
/// The channel of calls, and of words before them.
pub(super) const COMMENTARY: &str = "commentary";
/// The channel of the answer itself.
pub(super) const FINAL: &str = "final";
/// Who speaks.
pub(super) const ASSISTANT: &str = "assistant";
/// Before the recipient of a message.
pub(super) const TO: &str = "to=";
/// Before the name of a tool that the client has.
pub(super) const FUNCTIONS: &str = "functions.";

/// What a mark does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// A message begins, with the name of its author.
    Start,
    /// The name of its channel follows.
    Channel,
    /// The kind of its text follows.
    Constrain,
    /// Its text follows.
    Message,
    /// It is over.
    End,
}

/// The ids of the marks in one vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Harmony {
    start: u32,
    channel: u32,
    message: u32,
    end: u32,
    constrain: Option<u32>,
    /// As in [`LAST`].
    last: [Option<u32>; 3],
}

impl Harmony {
    /// `None` where the template writes no such messages, or the vocabulary has no tokens for
    /// their marks: such a model is read as any other.
    pub fn of(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<Self> {
        let id = |mark: &str| tokenizer.id_of(mark).filter(|&id| tokenizer.is_special(id));
        if !speaks(template) {
            return None;
        }
        Some(Self {
            start: id(START)?,
            channel: id(CHANNEL)?,
            message: id(MESSAGE)?,
            end: id(END)?,
            constrain: id(CONSTRAIN),
            last: LAST.map(id),
        })
    }

    /// Puts the ends of an answer right: a call is one, whatever the files say, and the end of a
    /// message is none, since an answer goes on behind a thought.
    pub fn mend_ends(&self, ends: &mut Vec<u32>) {
        ends.retain(|&id| id != self.end);
        ends.extend(self.last.iter().flatten());
    }

    /// `reasoning_effort` in the words that the model knows. Thought cannot be switched off, so
    /// whoever wants none gets as little as there is.
    ///
    /// # Errors
    /// What is no word.
    pub fn settle_effort(&self, template_kwargs: &mut Map<String, Value>) -> Result<(), String> {
        const EFFORT: &str = "reasoning_effort";
        if template_kwargs.get(EFFORT).is_some_and(Value::is_null) {
            template_kwargs.remove(EFFORT);
        }
        let asked = match template_kwargs.get(EFFORT) {
            None => None,
            Some(Value::String(word)) => Some(word.as_str()),
            Some(other) => return Err(format!("Invalid '{EFFORT}': {other} is no text.")),
        };
        let off = template_kwargs.get("enable_thinking") == Some(&Value::Bool(false));
        let known = match asked {
            Some("none" | "minimal") => "low",
            Some("xhigh" | "max") => "high",
            None if off => "low",
            _ => return Ok(()),
        };
        template_kwargs.insert(EFFORT.to_owned(), Value::from(known));
        Ok(())
    }

    /// The rules of an answer that may think first, and then calls a tool or says words: any words,
    /// or some of a form. With `must_call` it calls. There is one call in an answer, which ends it.
    pub fn rules(
        &self,
        tools: &[CallRule],
        must_call: bool,
        words: Option<Shape>,
        vocabulary: &Vocabulary,
    ) -> Rules {
        let [start, channel, message, end] = FRAME.map(|mark| vocabulary.mark(mark));
        let mut last = Vec::new();
        if !tools.is_empty() {
            last.push("call");
        }
        if !must_call {
            last.push("final");
        }
        // Who waits for a form, or for a call alone, has no use for words before it.
        let may_chat = !must_call && words.is_none();
        let aside = match may_chat && !tools.is_empty() {
            true => format!("(\"{ANALYSIS}\" | \"{COMMENTARY}\")"),
            false => format!("\"{ANALYSIS}\""),
        };
        let content = if words.is_some() { "@content" } else { "TEXT" };
        let kind = kinds(vocabulary);
        // Models name a channel, think better of it and name another.
        let mut lark = format!(
            "start: (aside {start} \"{ASSISTANT}\")* ({})\n\
             stray: ({channel} (\"{COMMENTARY}\" | \"{COMMENTARY} {TO}{ASSISTANT}\"))?\n\
             aside: stray {channel} {aside} {message} TEXT {end}\n\
             final: stray {channel} \"{FINAL}\" kind {message} {content}\n\
             kind: {kind}\n\
             TEXT: /(.|\\n)*/",
            last.join(" | "),
        );
        let mut calls = Vec::new();
        for (i, tool) in tools.iter().enumerate() {
            let to = format!(" {TO}{FUNCTIONS}{}", tool.name);
            let before = lark_string(&to);
            for name in [ANALYSIS, COMMENTARY] {
                let behind = lark_string(&format!("{name}{to}"));
                calls.push(format!(
                    "({channel} {behind} | {before} {channel} \"{name}\") kind {message} \
                     @arguments_{i}"
                ));
            }
        }
        if !calls.is_empty() {
            lark.push_str(&format!("\ncall: {}", calls.join("\n    | ")));
        }
        let parts = tools.iter().enumerate();
        let parts = parts.map(|(i, tool)| (format!("arguments_{i}"), tool.arguments.clone()));
        let words = words.map(|shape| ("content".to_owned(), shape));
        Rules { lark, parts: parts.chain(words).collect() }
    }

    pub(super) fn mark(&self, id: u32) -> Option<Mark> {
        Some(match id {
            _ if id == self.start => Mark::Start,
            _ if id == self.channel => Mark::Channel,
            _ if id == self.message => Mark::Message,
            _ if Some(id) == self.constrain => Mark::Constrain,
            _ if id == self.end || self.last.contains(&Some(id)) => Mark::End,
            _ => return None,
        })
    }
}

/// Whether a template writes messages in this format.
fn speaks(template: &ChatTemplate) -> bool {
    FRAME.iter().all(|mark| template.mentions(mark))
}

/// How a text may be announced: behind the mark for it with any short word, without it with one of
/// two, since more would be an answer in a head.
fn kinds(vocabulary: &Vocabulary) -> String {
    match vocabulary.special(CONSTRAIN) {
        Some(constrain) => {
            format!("(\" \"? {constrain} /[A-Za-z0-9_-]{{1,16}}/ | / (json|code)/)?")
        }
        None => "(/ (json|code)/)?".to_owned(),
    }
}
