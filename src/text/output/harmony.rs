//! Answers in OpenAI's harmony format (`text::harmony` says what that is).
//!
//! A message to a tool of the client is a call, and one whose author is somebody else is thought:
//! what the model dreams that a user or a tool said is no answer and no call, and is not lost. Then
//! its channel decides. `analysis` is thought and `final` is words, to whomever. What else is for
//! somebody (`python` and `browser`, which the models were trained with, or a tool that is not
//! offered) is thought: nobody answers it here, and in the model's own world it is a part of
//! thinking. The rest is words: those before a call, and those under a channel that nobody knows or
//! without one. What stands in a head is never said, but for text that a model put there because it
//! forgot the mark before it.

use super::call::Scan;
use super::head::{Head, Leads};
use super::{OutputParser, Piece};
use crate::text::harmony::{Harmony, Mark};

/// What stands between messages of one kind that follow each other.
const BREAK: &str = "\n\n";

/// Reads one answer, which begins behind `<|start|>assistant`.
pub struct HarmonyParser {
    marks: Harmony,
    /// Names of the tools that the client has.
    tools: Vec<String>,
    state: State,
    /// What came last was words, thought, or neither.
    last: Option<Last>,
    /// The answer is complete, whether its end was written or not.
    over: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Words,
    Thought,
}

enum State {
    /// In the head of a message.
    Head(Head),
    /// In its text; `begun` with its first letter. With `answers` it is the answer itself.
    Body { kind: Kind, begun: bool, answers: bool },
}

/// What the text of a message is.
enum Kind {
    Words,
    Thought,
    /// The arguments of a call; `complete` as JSON, and `whole` as an object.
    Call {
        scan: Scan,
        complete: bool,
        whole: bool,
    },
}

impl HarmonyParser {
    /// At the beginning of an answer to a client that has these tools.
    pub fn new(marks: Harmony, tools: Vec<String>) -> Self {
        let state = State::Head(Head::behind_author());
        Self { marks, tools, state, last: None, over: false }
    }

    /// More of the text of a message.
    fn say(&mut self, text: &str, out: &mut Vec<Piece>) {
        let State::Body { kind, begun, .. } = &mut self.state else { return };
        let call = matches!(kind, Kind::Call { .. });
        let text = if call && !*begun { text.trim_start() } else { text };
        if text.is_empty() {
            return;
        }
        let first = !std::mem::replace(begun, true);
        let new = match kind {
            Kind::Words => Some(Last::Words),
            Kind::Thought => Some(Last::Thought),
            Kind::Call { .. } => None,
        };
        let again = std::mem::replace(&mut self.last, new) == new;
        let apart = || if first && again { [BREAK, text].concat() } else { text.to_owned() };
        out.push(match kind {
            Kind::Words => Piece::Text(apart()),
            Kind::Thought => Piece::Reasoning(apart()),
            Kind::Call { scan, complete, whole } => {
                for c in text.chars() {
                    *complete = scan.step(c);
                    *whole = *complete && (c == '}' || *whole && c.is_whitespace());
                }
                Piece::Arguments(text.to_owned())
            }
        });
    }

    /// The text of the message of this head follows.
    fn open(&mut self, head: &Head, out: &mut Vec<Piece>) {
        let (kind, tool) = match head.leads_to(&self.tools) {
            Leads::Words => (Kind::Words, None),
            Leads::Thought => (Kind::Thought, None),
            Leads::Call(name) => {
                let scan = Scan::default();
                (Kind::Call { scan, complete: false, whole: false }, Some(name.to_owned()))
            }
        };
        let answers = matches!(kind, Kind::Words) && head.is_final();
        self.state = State::Body { kind, begun: false, answers };
        if let Some(name) = tool {
            self.last = None;
            out.push(Piece::Call { name });
        }
    }

    /// A head that no `<|message|>` ended: what stands in it is said, unless it was for somebody.
    /// One that was `cut` off may end in half of a word.
    fn give_up(&mut self, head: &Head, cut: bool, out: &mut Vec<Piece>) {
        let kind = match head.speaks() {
            Leads::Thought => Kind::Thought,
            _ => Kind::Words,
        };
        self.state = State::Body { kind, begun: false, answers: false };
        if !head.is_addressed() {
            self.say(head.text(cut), out);
        }
    }

    /// The message is over, as far as it came.
    fn close(&mut self, out: &mut Vec<Piece>) {
        let head = State::Head(Head::default());
        match std::mem::replace(&mut self.state, head) {
            State::Head(head) => {
                self.give_up(&head, false, out);
                self.state = State::Head(Head::default());
            }
            State::Body { kind: Kind::Call { .. }, begun, .. } => {
                if !begun {
                    out.push(Piece::Arguments("{}".to_owned()));
                }
                out.push(Piece::CallEnd);
            }
            State::Body { answers, .. } => self.over |= answers,
        }
    }
}

impl OutputParser for HarmonyParser {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        match &mut self.state {
            State::Body { .. } => self.say(text, out),
            State::Head(head) => {
                if !head.push(text) {
                    let head = std::mem::take(head);
                    self.give_up(&head, false, out);
                }
            }
        }
    }

    fn is_mark(&self, id: u32) -> bool {
        self.marks.mark(id).is_some()
    }

    fn mark(&mut self, id: u32, out: &mut Vec<Piece>) {
        let Some(mark) = self.marks.mark(id) else { return };
        match (&mut self.state, mark) {
            (_, Mark::End) => self.close(out),
            (_, Mark::Start) => {
                self.close(out);
                self.state = State::Head(Head::default());
            }
            (State::Head(head), Mark::Channel) => {
                // Of two names of a channel the last one counts.
                let head = std::mem::take(head);
                if head.holds_text() {
                    self.give_up(&head, false, out);
                }
                self.state = State::Head(head.under_another(&self.tools));
            }
            (State::Head(head), Mark::Constrain) => head.name_kind(),
            (State::Head(head), Mark::Message) => {
                let head = std::mem::take(head);
                self.open(&head, out);
            }
            (State::Body { .. }, Mark::Channel) => {
                self.close(out);
                self.state = State::Head(Head::default().under_another(&self.tools));
            }
            // Written twice.
            (State::Body { .. }, Mark::Message | Mark::Constrain) => {}
        }
    }

    fn finish(&mut self, cut: bool, out: &mut Vec<Piece>) {
        match &mut self.state {
            // Of a head that is cut off nobody knows what it would have been; with the name of a
            // channel behind it, or without one, it is text.
            State::Head(head) => {
                if !cut || head.may_end() {
                    let head = std::mem::take(head);
                    self.give_up(&head, cut, out);
                }
            }
            // Its end is not written where a grammar says that it is complete, and has no room
            // where its last brace was the last token.
            State::Body { kind: Kind::Call { complete, whole, .. }, .. } => {
                if *whole || *complete && !cut {
                    self.close(out);
                }
            }
            State::Body { .. } => {}
        }
    }

    fn is_over(&self) -> bool {
        self.over
    }

    fn is_thinking(&self) -> bool {
        matches!(self.state, State::Body { kind: Kind::Thought, .. })
    }

    fn reads_head(&self) -> bool {
        matches!(self.state, State::Head(_))
    }
}
