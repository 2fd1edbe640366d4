//! Ids to text, whole and one at a time.
//!
//! One rule for both: a token stands for bytes, the bytes of all tokens form one row, and the row
//! is read as UTF-8 with U+FFFD for every maximal invalid part. [`Tokenizer::decode`] is a stream
//! that is pushed to its end, so streamed text equals whole text by construction. (The
//! `tokenizers` crate differs in one corner: if a run of `<0xXX>` tokens is not valid as a whole
//! it replaces every byte of the run, which nobody can know before the run ends.)
//!
//! The one thing that depends on position is the first token: SentencePiece and WordPiece
//! decoders drop the space before it.

use tokenizers::{Decoder as _, DecoderWrapper};

use super::Tokenizer;

/// Incremental detokenisation of one sequence.
///
/// `push` returns text as soon as it is certain, never half a character; `flush` returns what is
/// left. The concatenation equals [`Tokenizer::decode`] of all ids.
#[derive(Debug, Clone)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Special tokens that appear in the text in any case.
    shown: Vec<u32>,
    /// The next token is the first of the text.
    first: bool,
    /// Bytes of a character that is not complete yet: at most three.
    pending: Vec<u8>,
    /// Tokens held back until the end; used only by decoders that need the whole sequence.
    held: Vec<String>,
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        Self {
            tokenizer,
            skip_special: true,
            shown: Vec::new(),
            first: true,
            pending: Vec::new(),
            held: Vec::new(),
        }
    }

    /// Special tokens appear in the text, as they are spelled.
    pub fn keep_special(mut self) -> Self {
        self.skip_special = false;
        self
    }

    /// These special tokens appear in the text, as they are spelled.
    pub fn showing(mut self, ids: Vec<u32>) -> Self {
        self.shown = ids;
        self
    }

    /// The text continues another one (a completion after its prompt): the leading space of the
    /// first token is kept.
    pub fn continuing(mut self) -> Self {
        self.first = false;
        self
    }

    /// Takes the next token; returns the text that became certain with it.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if self.skip_special && self.tokenizer.is_special(id) && !self.shown.contains(&id) {
            return None;
        }
        let token = self.tokenizer.raw_token(id)?;
        let detokenizer = self.tokenizer.detokenizer();
        if detokenizer.needs_whole() {
            self.held.push(token);
            return None;
        }
        self.pending.extend(detokenizer.piece(&token, self.first));
        self.first = false;
        let (text, rest) = take_certain(&self.pending);
        self.pending = rest;
        (!text.is_empty()).then_some(text)
    }

    /// Ends the text: an unfinished character becomes U+FFFD.
    pub fn flush(&mut self) -> Option<String> {
        let held = std::mem::take(&mut self.held);
        let pending = std::mem::take(&mut self.pending);
        if !held.is_empty() {
            return Some(self.tokenizer.detokenizer().whole(held));
        }
        (!pending.is_empty()).then(|| String::from_utf8_lossy(&pending).into_owned())
    }
}

/// Splits bytes into text that no further byte can change and the beginning of a character.
fn take_certain(mut bytes: &[u8]) -> (String, Vec<u8>) {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                return (text, Vec::new());
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                let Some(invalid) = error.error_len() else { return (text, rest.to_vec()) };
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[invalid..];
            }
        }
    }
}

/// How the tokens of one vocabulary become bytes.
#[derive(Debug, Clone)]
pub(super) enum Detokenizer {
    /// Every letter of a token stands for one byte (GPT-2's table).
    ByteLevel,
    /// A decoder that works token by token; `<0xXX>` tokens are bytes if `byte_fallback`.
    ByToken { decoder: DecoderWrapper, byte_fallback: bool },
    /// A decoder that must see the whole sequence.
    Whole(DecoderWrapper),
    /// No decoder: tokens are joined by spaces.
    Joined,
}

impl Detokenizer {
    pub(super) fn new(decoder: Option<DecoderWrapper>) -> Self {
        let Some(decoder) = decoder else { return Self::Joined };
        let stages = match serde_json::to_value(&decoder) {
            Ok(json) => json["decoders"].as_array().cloned().unwrap_or_else(|| vec![json]),
            Err(_) => return Self::Whole(decoder),
        };
        if matches!(&stages[..], [only] if only["type"] == "ByteLevel") {
            return Self::ByteLevel;
        }
        if !stages.iter().all(works_by_token) {
            return Self::Whole(decoder);
        }
        let byte_fallback = stages.iter().any(|stage| stage["type"] == "ByteFallback");
        Self::ByToken { decoder, byte_fallback }
    }

    fn needs_whole(&self) -> bool {
        matches!(self, Self::Whole(_))
    }

    /// The bytes of one token at the beginning or in the middle of a text.
    pub(super) fn piece(&self, token: &str, first: bool) -> Vec<u8> {
        match self {
            Self::ByteLevel => byte_level(token),
            Self::Joined if first => token.into(),
            Self::Joined => format!(" {token}").into(),
            Self::Whole(decoder) => {
                decoder.decode(vec![token.into()]).map_or_else(|_| token.into(), Into::into)
            }
            Self::ByToken { decoder, byte_fallback } => {
                match fallback_byte(token).filter(|_| *byte_fallback) {
                    // ASCII is text by itself and may be the space that is stripped.
                    Some(byte) if !byte.is_ascii() => vec![byte],
                    _ => by_token(decoder, token, first),
                }
            }
        }
    }

    fn whole(&self, tokens: Vec<String>) -> String {
        match self {
            Self::Whole(decoder) => decoder.decode(tokens).unwrap_or_default(),
            _ => tokens.concat(),
        }
    }
}

/// Whether a decoder stage treats each token by itself, apart from the first.
fn works_by_token(stage: &serde_json::Value) -> bool {
    match stage["type"].as_str() {
        Some("WordPiece" | "Metaspace" | "ByteFallback" | "Fuse") => true,
        Some("Strip") => stage["stop"] == 0 && stage["start"].as_u64() <= Some(1),
        Some("Replace") => {
            stage["pattern"]["String"].as_str().is_some_and(|p| p.chars().count() == 1)
        }
        _ => false,
    }
}

/// Runs the decoder on one token; one in the middle is put after a letter that is cut off again.
fn by_token(decoder: &DecoderWrapper, token: &str, first: bool) -> Vec<u8> {
    const BEFORE: &str = "a";
    let tokens = if first { vec![token.into()] } else { vec![BEFORE.into(), token.into()] };
    let text = match decoder.decode(tokens) {
        Ok(text) => text,
        Err(_) => return token.into(),
    };
    if first { text.into() } else { text.strip_prefix(BEFORE).unwrap_or(&text).into() }
}

/// `<0xE6>` -> 0xE6.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// GPT-2's byte table backwards. A token with a letter outside the table (an added token such as
/// `<｜User｜>`) is taken as it is spelled.
fn byte_level(token: &str) -> Vec<u8> {
    token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into())
}

/// Printable Latin-1 stands for itself; the other 68 bytes, in order, for U+0100 and on.
fn byte_of(letter: char) -> Option<u8> {
    match u32::from(letter) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}
