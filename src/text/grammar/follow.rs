//! Along one answer: thinking first where a model thinks, then by the rules, or in free text until
//! a tool call opens.

use std::sync::Arc;

use llguidance::Matcher;

use super::{Grammar, Rules, lark_string};

/// How an answer begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    /// The model thinks before it answers.
    pub thinking: Option<Thinking>,
    /// Empty: the rules hold from the first word of the answer. Otherwise the answer is free text
    /// until one of these texts appears, with which the rules begin.
    pub triggers: Vec<Trigger>,
}

/// The marks of thinking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thinking {
    /// `<think>`.
    pub open: String,
    /// `</think>`.
    pub close: String,
    /// The prompt has opened it already.
    pub begun: bool,
}

/// A text with which rules begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// The text.
    pub text: String,
    /// Only at the beginning of the answer.
    pub at_start: bool,
}

/// What may come next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Anything.
    Any,
    /// The tokens whose bit is set: bit `i % 32` of word `i / 32` is token `i`.
    Only(Vec<u32>),
    /// Nothing: the answer is complete.
    End,
    /// The parser gave up, because of this.
    Failed(String),
}

/// One answer under a grammar.
pub struct Follower {
    grammar: Arc<Grammar>,
    opening: Arc<Opening>,
    phase: Phase,
}

enum Phase {
    /// The first token may begin a thought.
    MayThink,
    /// Free until the thought ends; the bytes so far that may be part of its end.
    Thinking(Vec<u8>),
    /// Free until a trigger; the tokens that may be part of one, and whether text came before.
    Watching { tokens: Vec<u32>, bytes: Vec<u8>, spoke: bool },
    /// Under the rules.
    Bound(Box<Matcher>),
    /// Nothing holds any more.
    Free,
    /// The parser gave up.
    Failed(String),
}

impl Follower {
    /// At the beginning of an answer.
    pub fn new(grammar: Arc<Grammar>, opening: Arc<Opening>) -> Self {
        let phase = match &opening.thinking {
            Some(thinking) if thinking.begun => Phase::Thinking(Vec::new()),
            Some(_) => Phase::MayThink,
            None => answer(&grammar, &opening),
        };
        Self { grammar, opening, phase }
    }

    /// Takes the next token of the answer.
    pub fn push(&mut self, token: u32) {
        let phase = std::mem::replace(&mut self.phase, Phase::Free);
        self.phase = match phase {
            Phase::MayThink if self.opens_thought(token) => Phase::Thinking(Vec::new()),
            Phase::MayThink => self.step(answer(&self.grammar, &self.opening), token),
            phase => self.step(phase, token),
        };
    }

    /// What may come next.
    pub fn allowed(&mut self) -> Next {
        let open = self.thought_id();
        match &mut self.phase {
            Phase::Thinking(_) | Phase::Watching { .. } | Phase::Free => Next::Any,
            Phase::Failed(why) => Next::Failed(why.clone()),
            Phase::Bound(matcher) => allowed(matcher),
            Phase::MayThink if !self.opening.triggers.is_empty() => Next::Any,
            Phase::MayThink => match (allowed(&mut self.grammar.start.clone()), open) {
                (Next::Only(mut words), Some(id)) => {
                    if let Some(word) = words.get_mut(id as usize / 32) {
                        *word |= 1 << (id % 32);
                    }
                    Next::Only(words)
                }
                (next, _) => next,
            },
        }
    }

    fn step(&self, phase: Phase, token: u32) -> Phase {
        match phase {
            Phase::Thinking(seen) => self.think(seen, token),
            Phase::Watching { tokens, bytes, spoke } => self.watch(tokens, bytes, spoke, token),
            Phase::Bound(mut matcher) => match matcher.consume_token(token) {
                Ok(()) => Phase::Bound(matcher),
                Err(error) => Phase::Failed(super::first_words(&error.to_string())),
            },
            Phase::MayThink | Phase::Free | Phase::Failed(_) => phase,
        }
    }

    /// The token of `<think>`, where the vocabulary has one.
    fn thought_id(&self) -> Option<u32> {
        let thinking = self.opening.thinking.as_ref()?;
        let tokenizer = &self.grammar.vocabulary.tokenizer;
        tokenizer.id_of(&thinking.open).filter(|&id| tokenizer.is_added(id))
    }

    fn opens_thought(&self, token: u32) -> bool {
        self.thought_id() == Some(token)
    }

    fn bytes(&self, token: u32) -> Vec<u8> {
        self.grammar.vocabulary.tokenizer.token_bytes(token).unwrap_or_default()
    }

    fn think(&self, mut seen: Vec<u8>, token: u32) -> Phase {
        let Some(thinking) = &self.opening.thinking else { return Phase::Free };
        let close = thinking.close.as_bytes();
        seen.extend(self.bytes(token));
        if seen.windows(close.len()).any(|window| window == close) {
            return answer(&self.grammar, &self.opening);
        }
        seen.drain(..seen.len().saturating_sub(close.len() - 1));
        Phase::Thinking(seen)
    }

    /// Looks for a trigger that ends in `token`.
    fn watch(
        &self,
        mut tokens: Vec<u32>,
        mut bytes: Vec<u8>,
        mut spoke: bool,
        token: u32,
    ) -> Phase {
        tokens.push(token);
        bytes.extend(self.bytes(token));
        for trigger in &self.opening.triggers {
            let text = trigger.text.as_bytes();
            let Some(at) = bytes.windows(text.len()).position(|window| window == text) else {
                continue;
            };
            let fresh = !spoke && bytes[..at].iter().all(u8::is_ascii_whitespace);
            if fresh || !trigger.at_start {
                return self.bind(&tokens, &bytes, at);
            }
        }
        // What can no longer be part of a trigger goes, token by token.
        let longest = self.opening.triggers.iter().map(|t| t.text.len()).max().unwrap_or(0);
        let mut gone = 0;
        while let Some(&first) = tokens.get(gone) {
            let len = self.bytes(first).len();
            if bytes.len() - len < longest {
                break;
            }
            spoke |= !bytes[..len].iter().all(u8::is_ascii_whitespace);
            bytes.drain(..len);
            gone += 1;
        }
        tokens.drain(..gone);
        Phase::Watching { tokens, bytes, spoke }
    }

    /// The rules begin at byte `at` of `tokens`. A model that has left them within these tokens is
    /// let go: its text will come back as text.
    fn bind(&self, tokens: &[u32], bytes: &[u8], at: usize) -> Phase {
        let (mut first, mut before) = (0, 0);
        while let Some(len) = tokens.get(first).map(|&token| self.bytes(token).len()) {
            if before + len > at {
                break;
            }
            before += len;
            first += 1;
        }
        let matcher = match String::from_utf8(bytes[before..at].to_vec()) {
            Ok(prefix) if prefix.is_empty() => Some(self.grammar.start.clone()),
            Ok(prefix) => {
                self.grammar.vocabulary.matcher(&after(&prefix, &self.grammar.rules)).ok()
            }
            Err(_) => None,
        };
        let Some(mut matcher) = matcher else { return Phase::Free };
        match matcher.try_consume_tokens(&tokens[first..]) {
            Ok(count) if count == tokens.len() - first => Phase::Bound(Box::new(matcher)),
            _ => Phase::Free,
        }
    }
}

fn answer(grammar: &Grammar, opening: &Opening) -> Phase {
    match opening.triggers.is_empty() {
        true => Phase::Bound(Box::new(grammar.start.clone())),
        false => Phase::Watching { tokens: Vec::new(), bytes: Vec::new(), spoke: false },
    }
}

/// The same rules after a text that shares a token with their beginning.
fn after(prefix: &str, rules: &Rules) -> Rules {
    let lark = rules.lark.replacen("start:", "begin:", 1);
    let lark = format!("start: {} begin\n{lark}", lark_string(prefix));
    Rules { lark, parts: rules.parts.clone() }
}

pub(super) fn allowed(matcher: &mut Matcher) -> Next {
    if matcher.is_stopped() {
        return match matcher.stop_reason().is_ok() {
            true => Next::End,
            false => Next::Failed(matcher.stop_reason().to_string()),
        };
    }
    match matcher.compute_mask() {
        Ok(mask) => Next::Only(mask.as_slice().to_vec()),
        Err(error) => Next::Failed(super::first_words(&error.to_string())),
    }
}
