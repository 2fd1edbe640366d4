//! Answers in OpenAI's harmony format (`text::harmony` says what that is).
//!
//! The recipient of a message decides before its channel. To a tool of the client it is a call. To
//! anybody else (`python` and `browser`, which the models were trained with, or a tool that is not
//! offered) it is thought: nobody answers it here, and in the model's own world it is a part of
//! thinking. Without a recipient `analysis` is thought, and everything else is words: those before
//! a call, those of the answer, and those under a channel that nobody knows or without one. What
//! stands in a head is never said, but for text that a model put there because it forgot the mark
//! before it.

use super::call::Scan;
use super::{OutputParser, Piece};
use crate::text::harmony::{ANALYSIS, ASSISTANT, COMMENTARY, FINAL, FUNCTIONS, Harmony, Mark, TO};

/// What stands between messages of one kind.
const BREAK: &str = "\n\n";

/// Reads one answer, which begins behind `<|start|>assistant`.
pub struct HarmonyParser {
    marks: Harmony,
    /// Names of the tools that the client has.
    tools: Vec<String>,
    state: State,
    /// There were words, and thoughts, in messages before.
    spoke: bool,
    thought: bool,
}

enum State {
    /// In the head of a message.
    Head(Head),
    /// In its text; `begun` with its first letter.
    Body { kind: Kind, begun: bool },
}

/// What the text of a message is.
enum Kind {
    Words,
    Thought,
    /// The arguments of a call; `complete` as JSON.
    Call {
        scan: Scan,
        complete: bool,
    },
}

/// The head of a message, as far as it came.
#[derive(Debug, Default)]
struct Head {
    /// The prompt has named the author already.
    named: bool,
    /// Author and recipient.
    author: String,
    /// What follows `<|channel|>`.
    channel: Option<String>,
    /// Kinds of text follow, which nobody needs.
    typed: bool,
    /// Bytes of text in it.
    len: usize,
}

/// The kind of text that a head may announce.
const KIND: &str = "json";
/// Bytes of a head. What is longer is text before which a mark is missing.
const HEAD_LEN_MAX: usize = 512;

impl Head {
    /// What the text in it would be under `<|message|>`, and the tool that it is for.
    fn leads_to(&self, tools: &[String]) -> (Kind, Option<String>) {
        let Some(recipient) = self.recipient() else {
            let thought = self.channel.as_ref().is_some_and(|text| word_of(text).0 == ANALYSIS);
            return (if thought { Kind::Thought } else { Kind::Words }, None);
        };
        let name = recipient.strip_prefix(FUNCTIONS).unwrap_or(recipient);
        match tools.iter().any(|tool| tool == name) {
            true => (Kind::Call { scan: Scan::default(), complete: false }, Some(name.to_owned())),
            false => (Kind::Thought, None),
        }
    }

    fn recipient(&self) -> Option<&str> {
        // Behind the author's name comes nothing else.
        let of_author = !self.named || self.author.trim_start().starts_with(TO);
        let author = Some(self.author.as_str()).filter(|_| of_author);
        let words = [self.channel.as_deref(), author].into_iter().flatten();
        let mut words = words.flat_map(str::split_whitespace);
        words.find_map(|word| word.strip_prefix(TO))
    }

    /// Takes text; false when it cannot be a head.
    fn push(&mut self, text: &str) -> bool {
        self.len += text.len();
        if !self.typed {
            self.channel.as_mut().unwrap_or(&mut self.author).push_str(text);
        }
        let author = self.author.trim_start();
        let fits = author.starts_with(TO) || TO.starts_with(author);
        self.len <= HEAD_LEN_MAX && (fits || !self.named)
    }

    /// Text that stands in it and should not.
    fn text(&self) -> &str {
        match &self.channel {
            // The kind of a text that never came is none, and neither is half of a recipient.
            Some(channel) => match word_of(channel).1.trim_start() {
                rest if KIND.starts_with(rest) || TO.starts_with(rest) => "",
                text => text,
            },
            None if self.named && self.author.trim().is_empty() => "",
            None if self.named => &self.author,
            None => {
                let author = self.author.trim_start();
                author.strip_prefix(ASSISTANT).unwrap_or(author).trim_start()
            }
        }
    }
}

/// The name of a channel, and what follows it.
fn word_of(channel: &str) -> (&str, &str) {
    let channel = channel.trim_start();
    for known in [ANALYSIS, COMMENTARY, FINAL] {
        if let Some(rest) = channel.strip_prefix(known) {
            return (known, rest);
        }
    }
    channel.split_once(char::is_whitespace).unwrap_or((channel, ""))
}

impl HarmonyParser {
    /// At the beginning of an answer to a client that has these tools.
    pub fn new(marks: Harmony, tools: Vec<String>) -> Self {
        let state = State::Head(Head { named: true, ..Head::default() });
        Self { marks, tools, state, spoke: false, thought: false }
    }

    /// More of the text of a message.
    fn say(&mut self, text: &str, out: &mut Vec<Piece>) {
        let State::Body { kind, begun } = &mut self.state else { return };
        let call = matches!(kind, Kind::Call { .. });
        let text = if call && !*begun { text.trim_start() } else { text };
        if text.is_empty() {
            return;
        }
        let first = !std::mem::replace(begun, true);
        let apart = |before: &mut bool| match first && std::mem::replace(before, true) {
            true => [BREAK, text].concat(),
            false => text.to_owned(),
        };
        out.push(match kind {
            Kind::Words => Piece::Text(apart(&mut self.spoke)),
            Kind::Thought => Piece::Reasoning(apart(&mut self.thought)),
            Kind::Call { scan, complete } => {
                text.chars().for_each(|c| *complete = scan.step(c));
                Piece::Arguments(text.to_owned())
            }
        });
    }

    /// The text of the message of this head follows.
    fn open(&mut self, head: &Head, out: &mut Vec<Piece>) {
        let (kind, tool) = head.leads_to(&self.tools);
        self.state = State::Body { kind, begun: false };
        out.extend(tool.map(|name| Piece::Call { name }));
    }

    /// A head that no `<|message|>` ended: what stands in it is said, unless it was for somebody.
    fn give_up(&mut self, head: &Head, out: &mut Vec<Piece>) {
        let (kind, _) = head.leads_to(&[]);
        let addressed = head.recipient().is_some();
        self.state = State::Body { kind, begun: false };
        if !addressed {
            self.say(head.text(), out);
        }
    }

    /// The message is over, as far as it came.
    fn close(&mut self, out: &mut Vec<Piece>) {
        let head = State::Head(Head::default());
        match std::mem::replace(&mut self.state, head) {
            State::Head(head) => {
                self.give_up(&head, out);
                self.state = State::Head(Head::default());
            }
            State::Body { kind: Kind::Call { .. }, begun } => {
                if !begun {
                    out.push(Piece::Arguments("{}".to_owned()));
                }
                out.push(Piece::CallEnd);
            }
            State::Body { .. } => {}
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
                    self.give_up(&head, out);
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
                // Of two names of a channel the last one counts; a recipient stays.
                let head = std::mem::take(head);
                let author = head.recipient().map(|recipient| format!("{TO}{recipient}"));
                if author.is_none() && (head.named || head.channel.is_some()) {
                    self.give_up(&head, out);
                }
                let (author, channel) = (author.unwrap_or_default(), Some(String::new()));
                self.state =
                    State::Head(Head { author, channel, len: head.len, ..Head::default() });
            }
            (State::Head(head), Mark::Constrain) => head.typed = true,
            (State::Head(head), Mark::Message) => {
                let head = std::mem::take(head);
                self.open(&head, out);
            }
            (State::Body { .. }, Mark::Channel) => {
                self.close(out);
                let channel = Some(String::new());
                self.state = State::Head(Head { channel, ..Head::default() });
            }
            // Written twice.
            (State::Body { .. }, Mark::Message | Mark::Constrain) => {}
        }
    }

    fn finish(&mut self, cut: bool, out: &mut Vec<Piece>) {
        match &mut self.state {
            // Of a head that is cut off nobody knows what it would have been; with the name of a
            // channel behind it, it is text.
            State::Head(head) => {
                let known = head.channel.as_deref().map(|channel| word_of(channel).0);
                let known = known.is_some_and(|name| [ANALYSIS, COMMENTARY, FINAL].contains(&name));
                if !cut || known {
                    let head = std::mem::take(head);
                    self.give_up(&head, out);
                }
            }
            // Its end is not written where a grammar says that it is complete.
            State::Body { kind: Kind::Call { complete: true, .. }, .. } if !cut => self.close(out),
            State::Body { .. } => {}
        }
    }

    fn is_thinking(&self) -> bool {
        matches!(self.state, State::Body { kind: Kind::Thought, .. })
    }

    fn reads_head(&self) -> bool {
        matches!(self.state, State::Head(_))
    }
}
