//! The head of a message in OpenAI's harmony format: what it says, and what it was meant to say.

use crate::text::harmony::{ANALYSIS, ASSISTANT, COMMENTARY, FINAL, FUNCTIONS, TO};

/// The head of a message, as far as it came.
#[derive(Debug, Default)]
pub(super) struct Head {
    /// The prompt has named the author already.
    named: bool,
    /// Author and recipient.
    author: String,
    /// A tool that was named under a channel before this one.
    tool: Option<String>,
    /// What follows `<|channel|>`.
    channel: Option<String>,
    /// What follows `<|constrain|>`.
    kind: Option<String>,
    /// Bytes of text in it.
    len: usize,
}

/// What a message is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Leads<'a> {
    Words,
    Thought,
    /// A call of this tool.
    Call(&'a str),
}

const CHANNELS: [&str; 3] = [ANALYSIS, COMMENTARY, FINAL];
/// Others who may speak.
const OTHERS: [&str; 4] = ["user", "system", "developer", "tool"];
/// Recipients that change nothing: the reader, and the model itself.
const READERS: [&str; 3] = [ASSISTANT, "user", "all"];
/// The kinds of text that a head may announce without a mark before them.
const KINDS: [&str; 2] = ["json", "code"];
/// Bytes of a head. What is longer is text before which a mark is missing.
const HEAD_LEN_MAX: usize = 512;

impl Head {
    /// The first one, whose author stands in the prompt.
    pub fn behind_author() -> Self {
        Self { named: true, ..Self::default() }
    }

    /// The same message under another channel, whose name follows. A recipient stays when it stood
    /// before all channels or is a tool: models write `commentary to=assistant` before the channel
    /// that they mean.
    pub fn under_another(self, tools: &[String]) -> Self {
        let tool = self.recipients().find_map(|to| offered(to, tools)).map(str::to_owned);
        let channel = Some(String::new());
        Self { tool, channel, kind: None, ..self }
    }

    /// A word for the kind of its text follows.
    pub fn name_kind(&mut self) {
        self.kind.get_or_insert_default();
    }

    /// Takes text; false when it cannot be a head.
    pub fn push(&mut self, text: &str) -> bool {
        self.len += text.len();
        let last = self.kind.as_mut().or(self.channel.as_mut());
        last.unwrap_or(&mut self.author).push_str(text);
        self.len <= HEAD_LEN_MAX && self.fits()
    }

    /// Behind an author's name come a recipient, the name again, and that of a channel without its
    /// mark, and nothing else.
    fn fits(&self) -> bool {
        if !self.named {
            return true;
        }
        let author = self.author.trim_start();
        let rest = author.strip_prefix(ASSISTANT).unwrap_or(author);
        let again = author.is_empty() || (rest.len() == author.len() && begins(author, ASSISTANT));
        let rest = rest.trim_start();
        let behind = CHANNELS.iter().find_map(|name| rest.strip_prefix(name));
        let to = behind.unwrap_or(rest).trim_start();
        let half = behind.is_none() && CHANNELS.iter().any(|name| begins(rest, name));
        again || half || to.starts_with(TO) || begins(to, TO)
    }

    /// What the text under it is.
    pub fn leads_to<'a>(&'a self, tools: &[String]) -> Leads<'a> {
        match self.recipients().find_map(|to| offered(to, tools)) {
            _ if self.is_foreign() => Leads::Thought,
            Some(name) => Leads::Call(name),
            None => self.speaks(),
        }
    }

    /// What text in it is: no call, and of nobody who is not known.
    pub fn speaks(&self) -> Leads<'static> {
        let aside = || self.recipients().any(|to| !READERS.contains(&to));
        match self.place().map(|(name, _)| name) {
            _ if self.is_other() => Leads::Thought,
            Some(ANALYSIS) => Leads::Thought,
            Some(FINAL) => Leads::Words,
            _ if aside() => Leads::Thought,
            _ => Leads::Words,
        }
    }

    /// It is that of the answer itself.
    pub fn is_final(&self) -> bool {
        self.place().is_some_and(|(name, _)| name == FINAL)
    }

    /// It is for somebody, or for nobody in particular but said so.
    pub fn is_addressed(&self) -> bool {
        self.recipients().next().is_some()
    }

    /// What stands in it before another channel may be text.
    pub fn holds_text(&self) -> bool {
        !self.is_addressed() && (self.named || self.channel.is_some())
    }

    /// As far as it came, what stands in it may be text.
    pub fn may_end(&self) -> bool {
        self.place().map_or(!self.named, |(name, _)| CHANNELS.contains(&name))
    }

    /// Its recipients in order.
    fn recipients(&self) -> impl Iterator<Item = &str> {
        let author = Some(self.author.as_str()).filter(|_| self.fits());
        let texts = [author, self.channel.as_deref(), self.kind.as_deref()];
        let words = texts.into_iter().flatten().flat_map(str::split_whitespace);
        let words = words.filter_map(|word| {
            // Models forget the space behind the name of a channel.
            let bare = CHANNELS.iter().find_map(|name| word.strip_prefix(name));
            bare.unwrap_or(word).strip_prefix(TO)
        });
        self.tool.as_deref().into_iter().chain(words)
    }

    /// Somebody else than the assistant says it: somebody who is known, or it is one word.
    fn is_foreign(&self) -> bool {
        let mut words = self.by_name().split_whitespace().filter(|word| !word.starts_with(TO));
        let name = words.next().filter(|name| !CHANNELS.contains(name));
        let one = !self.named && name.is_some() && words.next().is_none();
        one || self.is_other()
    }

    /// Somebody else says it who is known to speak.
    fn is_other(&self) -> bool {
        let (name, _) = first_of(self.by_name());
        !self.named && (OTHERS.contains(&name) || name.starts_with(FUNCTIONS))
    }

    /// What stands before the channel, without the assistant's name.
    fn by_name(&self) -> &str {
        let author = self.author.trim_start();
        author.strip_prefix(ASSISTANT).unwrap_or(author).trim_start()
    }

    /// The name of its channel, and what follows it. Where the mark before one was forgotten it
    /// stands in its author's place.
    fn place(&self) -> Option<(&str, &str)> {
        if let Some(channel) = &self.channel {
            return Some(word_of(channel));
        }
        let (name, rest) = first_of(self.by_name());
        (CHANNELS.contains(&name) && self.fits()).then_some((name, rest))
    }

    /// Text that stands in it and should not.
    pub fn text(&self, cut: bool) -> &str {
        // The kind of a text that never came is none, and neither is a name, or half of one.
        let is_of = |text: &str, word: &str| text == word || (cut && begins(text, word));
        if let Some(kind) = &self.kind {
            let letter = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            let text = kind.trim_start().trim_start_matches(letter).trim_start();
            return if is_of(text, TO) { "" } else { text };
        }
        if let Some((_, rest)) = self.place() {
            let (text, bare) = (rest.trim_start(), rest.trim());
            let none = bare.is_empty() || is_of(bare, TO);
            return if none || KINDS.iter().any(|kind| is_of(bare, kind)) { "" } else { text };
        }
        if self.named && !self.fits() {
            return &self.author;
        }
        let (text, bare) = (self.by_name(), self.by_name().trim_end());
        let mut names = CHANNELS.iter().chain(&OTHERS).chain([&ASSISTANT, &TO]);
        let one = bare.starts_with(FUNCTIONS) && !bare.contains(char::is_whitespace);
        if bare.is_empty() || one || names.any(|name| is_of(bare, name)) {
            return "";
        }
        if self.named { &self.author } else { text }
    }
}

/// Whether a text may be the beginning of a word.
fn begins(text: &str, word: &str) -> bool {
    word.starts_with(text)
}

/// The tool of a recipient.
fn offered<'a>(to: &'a str, tools: &[String]) -> Option<&'a str> {
    let name = to.strip_prefix(FUNCTIONS).unwrap_or(to);
    tools.iter().any(|tool| tool == name).then_some(name)
}

fn first_of(text: &str) -> (&str, &str) {
    text.split_at(text.find(char::is_whitespace).unwrap_or(text.len()))
}

/// The name of a channel, and what follows it.
fn word_of(channel: &str) -> (&str, &str) {
    let channel = channel.trim_start();
    let known = CHANNELS.iter().find(|name| channel.starts_with(**name));
    known.map_or_else(|| first_of(channel), |name| channel.split_at(name.len()))
}
