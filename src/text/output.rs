//! From the text of an answer to what it means: words for the reader, thought, tool calls.
//!
//! An [`OutputParser`] sees the text as it comes and says each thing as soon as it is certain, so
//! that how the text was cut into pieces changes nothing but how the pieces of one kind are cut.
//! What looks like a call and is none comes back as text. Families differ in their marks, which
//! stand in a [`CallFormat`]; another kind of family is another implementation of the trait:
//! [`HarmonyParser`], whose marks are tokens and come beside the text.

mod call;
mod harmony;
#[cfg(test)]
mod harmony_tests;
mod head;
#[cfg(test)]
mod tests;
mod think;

pub use self::call::CallParser;
pub use self::harmony::HarmonyParser;
pub use self::think::{THINK, ThinkParser};

/// A part of an answer. Parts of one kind in a row belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Words for the reader.
    Text(String),
    /// Thought.
    Reasoning(String),
    /// A tool call begins; its arguments follow.
    Call {
        /// Name of the tool.
        name: String,
    },
    /// More of the arguments of the call that began last: JSON text.
    Arguments(String),
    /// The arguments are complete. A call that is cut off has no end.
    CallEnd,
}

/// Reads one answer.
pub trait OutputParser: Send {
    /// Takes more text; adds what became certain to `out`.
    fn push(&mut self, text: &str, out: &mut Vec<Piece>);

    /// Whether a token is none of the text but a mark, which comes through
    /// [`OutputParser::mark`] after all text before it.
    fn is_mark(&self, _: u32) -> bool {
        false
    }

    /// Takes a mark.
    fn mark(&mut self, _: u32, _: &mut Vec<Piece>) {}

    /// The end of the text. One that was `cut` off in the middle of a call's head ends before it.
    fn finish(&mut self, cut: bool, out: &mut Vec<Piece>);

    /// The last word that came was thought.
    fn is_thinking(&self) -> bool {
        false
    }

    /// The answer is complete, though its end was not written.
    fn is_over(&self) -> bool {
        false
    }

    /// Text that comes now is for the parser alone: no stop string is looked for in it.
    fn reads_head(&self) -> bool {
        false
    }
}

/// Text is text.
#[derive(Debug, Default)]
pub struct PlainParser;

impl OutputParser for PlainParser {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        say(text, out);
    }

    fn finish(&mut self, _: bool, _: &mut Vec<Piece>) {}
}

/// How a family writes its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`, one after the other. Also
    /// what models are asked for whose own format is unknown.
    Hermes,
    /// The whole answer is `{"name": ..., "parameters": {...}}`.
    Llama,
    /// `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`.
    MistralList,
    /// `[TOOL_CALLS]name[ARGS]{...}`, one after the other.
    MistralArgs,
}

impl CallFormat {
    /// The text that begins a call; empty when a call is told by its first letter.
    pub fn open(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama => "",
            Self::MistralList | Self::MistralArgs => "[TOOL_CALLS]",
        }
    }

    /// The text after a call.
    pub fn close(self) -> &'static str {
        match self {
            Self::Hermes => "</tool_call>",
            Self::Llama | Self::MistralList | Self::MistralArgs => "",
        }
    }

    /// Every mark: those that are tokens of their own must be seen by the parser.
    pub fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["<tool_call>", "</tool_call>"],
            Self::Llama => &[PYTHON_TAG],
            Self::MistralList | Self::MistralArgs => &["[TOOL_CALLS]", ARGS],
        }
    }
}

/// What Llama may write before a call.
pub(super) const PYTHON_TAG: &str = "<|python_tag|>";
/// Between name and arguments of a call of newer Mistral models.
pub(super) const ARGS: &str = "[ARGS]";

fn say(text: &str, out: &mut Vec<Piece>) {
    if !text.is_empty() {
        out.push(Piece::Text(text.to_owned()));
    }
}

/// Length in bytes of the longest end of `text` that could be the beginning of `mark`.
fn overlap(text: &str, mark: &str) -> usize {
    let longest = mark.len().saturating_sub(1).min(text.len());
    let fits = |len: &usize| text.as_bytes().ends_with(&mark.as_bytes()[..*len]);
    (1..=longest).rev().find(fits).unwrap_or(0)
}
