//! `<think>` ... `</think>` before an answer.

use super::{OutputParser, Piece, overlap};

/// The marks that begin and end a thought.
pub const THINK: [&str; 2] = ["<think>", "</think>"];
const OPEN: &str = THINK[0];
const CLOSE: &str = THINK[1];

/// Takes the thought off the beginning of an answer and hands the rest on. White space around the
/// marks belongs to neither.
pub struct ThinkParser {
    state: State,
    /// Text that is not certain yet.
    held: String,
    rest: Box<dyn OutputParser>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The answer may begin with a thought.
    Maybe,
    /// In it; whether a word of it came.
    Inside { spoke: bool },
    /// Before the first word of the answer.
    After,
    /// In the answer.
    Outside,
}

impl ThinkParser {
    /// `begun`: the prompt has opened the thought already.
    pub fn new(begun: bool, rest: Box<dyn OutputParser>) -> Self {
        let state = if begun { State::Inside { spoke: false } } else { State::Maybe };
        Self { state, held: String::new(), rest }
    }

    /// One step over what is held; false when more text is needed.
    fn step(&mut self, out: &mut Vec<Piece>) -> bool {
        let trimmed = self.held.trim_start();
        match self.state {
            State::Maybe => {
                if let Some(rest) = trimmed.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.state = State::Inside { spoke: false };
                } else if OPEN.starts_with(trimmed) {
                    return false;
                } else {
                    self.state = State::Outside;
                }
            }
            State::Inside { .. } => return self.think(out),
            State::After => {
                self.held = trimmed.to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.state = State::Outside;
            }
            State::Outside => {
                let text = std::mem::take(&mut self.held);
                self.rest.push(&text, out);
                return false;
            }
        }
        true
    }

    fn think(&mut self, out: &mut Vec<Piece>) -> bool {
        if let Some(at) = self.held.find(CLOSE) {
            let rest = self.held.split_off(at);
            let thought = std::mem::take(&mut self.held);
            self.thought(thought.trim_end(), out);
            self.held = rest[CLOSE.len()..].to_owned();
            self.state = State::After;
            return true;
        }
        let certain = &self.held[..self.held.len() - overlap(&self.held, CLOSE)];
        let certain = certain.trim_end().len();
        let rest = self.held.split_off(certain);
        let thought = std::mem::replace(&mut self.held, rest);
        self.thought(&thought, out);
        false
    }

    fn thought(&mut self, text: &str, out: &mut Vec<Piece>) {
        let State::Inside { spoke } = &mut self.state else { return };
        let text = if *spoke { text } else { text.trim_start() };
        if !text.is_empty() {
            *spoke = true;
            out.push(Piece::Reasoning(text.to_owned()));
        }
    }
}

impl OutputParser for ThinkParser {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.held.push_str(text);
        while self.step(out) {}
    }

    fn finish(&mut self, cut: bool, out: &mut Vec<Piece>) {
        let text = std::mem::take(&mut self.held);
        match self.state {
            State::Inside { .. } => self.thought(text.trim_end(), out),
            State::Maybe | State::After | State::Outside => self.rest.push(&text, out),
        }
        self.rest.finish(cut, out);
    }

    fn is_thinking(&self) -> bool {
        matches!(self.state, State::Inside { .. })
    }
}
