//! Text: everything between characters and token ids.
//!
//! Owns the tokenizer (from `tokenizer.json` or from GGUF metadata), incremental detokenisation,
//! chat templates, stop strings, grammars, and the parsers that tell words from thought and calls.
//! Everything here is a plain value without a thread of its own:
//! a [`Tokenizer`] and a [`ChatTemplate`] are shared, a [`DecodeStream`] and a [`StopMatcher`]
//! belong to one request.
//!
//! A leaf room: it imports no other room. Deliberately absent: files other than
//! `tokenizer.json` (the registry reads configs and GGUF headers and passes values in), sampling,
//! and the wire format of messages (templates see plain JSON).

mod detokenize;
mod export;
mod fim;
mod gguf;
mod grammar;
mod guard;
mod harmony;
#[cfg(test)]
mod harmony_tests;
mod output;
mod pretokenizer;
mod python;
mod spm;
mod stop;
mod style;
mod template;
mod tokenizer;
mod tools;

pub use detokenize::DecodeStream;
pub use export::export;
pub use gguf::{GgufVocab, VocabKind};
pub use grammar::{Follower, Grammar, Next, Opening, Rules, Shape, Thinking, Trigger, Vocabulary};
pub use guard::Guard;
pub use harmony::Harmony;
pub use output::{
    CallFormat, CallParser, HarmonyParser, OutputParser, Piece, PlainParser, THINK, ThinkParser,
};
pub use stop::{StopHit, StopMatcher};
pub use style::ChatStyle;
pub use template::{ChatTemplate, Clock};
pub use tokenizer::{Special, Tokenizer};
pub use tools::{CallRule, call_rules, triggers};

/// What can go wrong with text. Every message is fit to be shown to the user.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A tokenizer definition is malformed or of a kind that this build cannot run.
    #[error("bad tokenizer: {0}")]
    BadTokenizer(String),
    /// The tokenizer refused a text.
    #[error("cannot tokenize: {0}")]
    Encode(String),
    /// A chat template does not compile.
    #[error("bad chat template: {0}")]
    BadTemplate(String),
    /// The template itself refused the conversation through `raise_exception`.
    #[error("the chat template refused the conversation: {0}")]
    Refused(String),
    /// A grammar, or a JSON schema, cannot be enforced.
    #[error("{0}")]
    Grammar(String),
    /// A chat template failed, or ran out of its budget of instructions or output, on this input.
    #[error("chat template failed: {0}")]
    Render(String),
}
