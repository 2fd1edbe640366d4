//! Tool calls in the text of an answer, for every family that writes them as JSON.
//!
//! [`CallParser`] looks for the marks and holds the text between them against [`Reader`], which
//! reads one call letter by letter: the name and the arguments in any order, the arguments told as
//! they come. Up to the first argument the whole text of the call is kept, so that it can come back
//! as text; from there on it is a call, whatever follows.

use super::{ARGS, CallFormat, OutputParser, PYTHON_TAG, Piece, overlap, say};

/// Finds the calls of one family.
pub struct CallParser {
    format: CallFormat,
    state: State,
    /// Text that is not certain yet.
    held: String,
}

enum State {
    /// Before the first word, where a call may begin without a mark.
    Start,
    /// Among words; `after` a call, where white space is nobody's.
    Text { after: bool },
    /// In a call.
    Call(Reader),
    /// Behind the last brace of one.
    Closing,
    /// No call can come any more.
    Plain,
}

impl CallParser {
    /// At the beginning of an answer.
    pub fn new(format: CallFormat) -> Self {
        let state = match format.open() {
            "" => State::Start,
            _ => State::Text { after: false },
        };
        Self { format, state, held: String::new() }
    }

    /// One step over what is held; false when more text is needed.
    fn step(&mut self, out: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::Start => self.start(),
            State::Text { after } => {
                let after = *after;
                self.text(after, out)
            }
            State::Call(_) => self.call(out),
            State::Closing => self.closing(),
            State::Plain => {
                say(&std::mem::take(&mut self.held), out);
                false
            }
        }
    }

    fn start(&mut self) -> bool {
        let text = self.held.trim_start();
        if text.starts_with('{') || text.starts_with(PYTHON_TAG) {
            let mark_len = if text.starts_with('{') { 0 } else { PYTHON_TAG.len() };
            let space_len = self.held.len() - text.len();
            self.begin(space_len + mark_len);
        } else if PYTHON_TAG.starts_with(text) {
            return false;
        } else {
            self.state = State::Plain;
        }
        true
    }

    /// A call begins behind the first `mark_len` bytes of what is held.
    fn begin(&mut self, mark_len: usize) {
        let rest = self.held.split_off(mark_len);
        let mark = std::mem::replace(&mut self.held, rest);
        self.state = State::Call(Reader::new(self.format, mark));
    }

    fn text(&mut self, after: bool, out: &mut Vec<Piece>) -> bool {
        let open = self.format.open();
        if after {
            self.held = self.held.trim_start().to_owned();
        }
        let found = self.held.find(open);
        let end = found.unwrap_or(self.held.len() - overlap(&self.held, open));
        let certain = self.held[..end].trim_end().len();
        say(&self.held[..certain], out);
        if certain > 0 {
            self.state = State::Text { after: false };
        }
        match found {
            Some(at) => {
                self.held.drain(..at);
                self.begin(open.len());
                true
            }
            None => {
                self.held.drain(..certain);
                false
            }
        }
    }

    fn call(&mut self, out: &mut Vec<Piece>) -> bool {
        let State::Call(reader) = &mut self.state else { return false };
        let text = std::mem::take(&mut self.held);
        let mut piece = String::new();
        for (at, c) in text.char_indices() {
            let event = reader.read(c, &mut piece);
            if reader.started && !piece.is_empty() && reader.announce {
                reader.announce = false;
                out.push(Piece::Call { name: reader.name.clone().unwrap_or_default() });
            }
            match event {
                Read::More => {}
                Read::Done => {
                    arguments(piece, out);
                    out.push(Piece::CallEnd);
                    self.held = text[at + c.len_utf8()..].to_owned();
                    self.state = State::Closing;
                    return true;
                }
                Read::Malformed => {
                    let rest = &text[at..];
                    self.malformed(piece, rest, out);
                    return true;
                }
            }
        }
        arguments(piece, out);
        false
    }

    /// The text is no call, or no longer one from `rest` on.
    fn malformed(&mut self, piece: String, rest: &str, out: &mut Vec<Piece>) {
        let State::Call(reader) = std::mem::replace(&mut self.state, State::Plain) else { return };
        if reader.started {
            arguments(piece, out);
            out.push(Piece::CallEnd);
            self.held = rest.to_owned();
            self.state = State::Closing;
            return;
        }
        // The mark is text after all; what follows it is looked at again.
        say(&reader.mark, out);
        self.held = reader.raw + rest;
        if !self.format.open().is_empty() {
            self.state = State::Text { after: false };
        }
    }

    /// After the last brace: the closing mark, or the next item of a list.
    fn closing(&mut self) -> bool {
        let close = self.format.close();
        let text = self.held.trim_start();
        if !close.is_empty() {
            match text.strip_prefix(close) {
                Some(rest) => self.held = rest.to_owned(),
                None if close.starts_with(text) => return false,
                None => {}
            }
            self.state = State::Text { after: true };
            return true;
        }
        let Some(next) = text.chars().next() else { return false };
        let rest = text[next.len_utf8()..].to_owned();
        match (self.format, next) {
            (CallFormat::Llama, ';') => (self.held, self.state) = (rest, State::Start),
            (CallFormat::Llama, '{') => self.state = State::Start,
            (CallFormat::Llama, _) => self.state = State::Plain,
            (_, ',') => {
                let reader = Reader::new(self.format, String::new());
                (self.held, self.state) = (rest, State::Call(reader));
            }
            (_, ']') => (self.held, self.state) = (rest, State::Text { after: true }),
            _ => self.state = State::Text { after: true },
        }
        true
    }
}

fn arguments(piece: String, out: &mut Vec<Piece>) {
    if !piece.is_empty() {
        out.push(Piece::Arguments(piece));
    }
}

impl OutputParser for CallParser {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.held.push_str(text);
        while self.step(out) {}
    }

    fn finish(&mut self, cut: bool, out: &mut Vec<Piece>) {
        match std::mem::replace(&mut self.state, State::Plain) {
            State::Call(reader) if !reader.started && !cut => {
                say(&reader.mark, out);
                say(&reader.raw, out);
            }
            // A call that is cut off stays one, as far as it went.
            State::Call(_) | State::Closing => {}
            State::Text { after: true } => say(self.held.trim_start(), out),
            State::Start | State::Text { .. } | State::Plain => say(&self.held, out),
        }
        self.held.clear();
    }
}

/// What a letter did.
enum Read {
    More,
    /// It was the last one of the call.
    Done,
    /// It cannot stand here.
    Malformed,
}

/// One call, letter by letter.
struct Reader {
    format: CallFormat,
    /// What stood before it.
    mark: String,
    /// Its text so far, until it is certain that it is a call.
    raw: String,
    at: At,
    key: String,
    name: Option<String>,
    /// Arguments that came before the name, or as a text.
    early: Option<String>,
    /// The arguments are being told.
    started: bool,
    /// They are, and nobody was told the name.
    announce: bool,
}

/// Where the next letter stands.
#[derive(Clone, Debug)]
enum At {
    /// Before the first brace.
    Lead,
    /// In the name before `[ARGS]`.
    Head(String),
    /// Before a key, or the end of the object.
    Key,
    InKey(Scan, String),
    Colon,
    Value,
    InValue(Scan, String),
    InArguments(Scan),
    /// Behind a value.
    Comma,
}

impl Reader {
    fn new(format: CallFormat, mark: String) -> Self {
        Self {
            format,
            mark,
            raw: String::new(),
            at: At::Lead,
            key: String::new(),
            name: None,
            early: None,
            started: false,
            announce: false,
        }
    }

    /// Takes a letter; arguments go to `piece`.
    fn read(&mut self, c: char, piece: &mut String) -> Read {
        let at = std::mem::replace(&mut self.at, At::Lead);
        let next = self.letter(at, c, piece);
        match next {
            Ok(Some(at)) => {
                self.at = at;
                if !self.started {
                    self.raw.push(c);
                }
                Read::More
            }
            Ok(None) => Read::Done,
            Err(()) => Read::Malformed,
        }
    }

    /// Where the letter leads: `None` is the end of the call.
    fn letter(&mut self, at: At, c: char, piece: &mut String) -> Result<Option<At>, ()> {
        let space = c.is_ascii_whitespace();
        Ok(Some(match at {
            At::Lead if space => At::Lead,
            At::Lead => self.lead(c)?,
            At::Head(head) => self.head(head, c, piece)?,
            At::Key | At::Colon | At::Value | At::Comma if space => at,
            At::Key if c == '"' => At::InKey(Scan::text(), String::from(c)),
            At::InKey(mut scan, mut text) => {
                text.push(c);
                match scan.step(c) {
                    true => {
                        self.key = serde_json::from_str(&text).map_err(drop)?;
                        At::Colon
                    }
                    false => At::InKey(scan, text),
                }
            }
            At::Colon if c == ':' => At::Value,
            At::Value => self.value(c, piece)?,
            At::InValue(scan, text) => return self.in_value(scan, text, c, piece),
            At::InArguments(mut scan) => {
                piece.push(c);
                match scan.step(c) {
                    // Written as `name[ARGS]{...}`, it ends with its arguments.
                    true if self.key == ARGS => return Ok(None),
                    true => At::Comma,
                    false => At::InArguments(scan),
                }
            }
            At::Comma if c == ',' => At::Key,
            At::Key | At::Comma if c == '}' => return self.close(piece).map(|()| None),
            At::Key | At::Colon | At::Comma => return Err(()),
        }))
    }

    fn lead(&mut self, c: char) -> Result<At, ()> {
        let mistral = matches!(self.format, CallFormat::MistralList | CallFormat::MistralArgs);
        match c {
            '{' => Ok(At::Key),
            '[' if mistral && !self.raw.contains('[') => Ok(At::Lead),
            c if mistral && c.is_alphanumeric() && !self.raw.contains('[') => {
                Ok(At::Head(c.to_string()))
            }
            _ => Err(()),
        }
    }

    /// Longer is no name.
    const HEAD_LEN_MAX: usize = 256;

    fn head(&mut self, mut head: String, c: char, piece: &mut String) -> Result<At, ()> {
        if c != '{' {
            head.push(c);
            let fine = head.len() <= Self::HEAD_LEN_MAX && c != '\n';
            return fine.then_some(At::Head(head)).ok_or(());
        }
        let name = head.split('[').next().unwrap_or_default().trim();
        if name.is_empty() {
            return Err(());
        }
        self.name = Some(name.to_owned());
        self.key = ARGS.to_owned();
        self.start(piece);
        piece.push(c);
        Ok(At::InArguments(Scan::nested()))
    }

    fn value(&mut self, c: char, piece: &mut String) -> Result<At, ()> {
        let arguments = self.is_arguments();
        if arguments && c == '{' && self.name.is_some() {
            self.start(piece);
            piece.push(c);
            return Ok(At::InArguments(Scan::nested()));
        }
        let scan = match c {
            '"' => Scan::text(),
            '{' | '[' => Scan::nested(),
            _ => Scan::word(),
        };
        Ok(At::InValue(scan, c.to_string()))
    }

    fn in_value(
        &mut self,
        mut scan: Scan,
        mut text: String,
        c: char,
        piece: &mut String,
    ) -> Result<Option<At>, ()> {
        if scan.word && (c.is_ascii_whitespace() || matches!(c, ',' | '}' | ']')) {
            self.keep(&text)?;
            return self.letter(At::Comma, c, piece);
        }
        text.push(c);
        if !scan.step(c) {
            return Ok(Some(At::InValue(scan, text)));
        }
        self.keep(&text)?;
        Ok(Some(At::Comma))
    }

    fn is_arguments(&self) -> bool {
        self.key == "arguments" || self.key == "parameters"
    }

    /// A value that is complete: the name, or arguments that came before it or as a text.
    fn keep(&mut self, text: &str) -> Result<(), ()> {
        let value: serde_json::Value = serde_json::from_str(text).map_err(drop)?;
        if self.key == "name" {
            let name = value.as_str().filter(|name| !name.is_empty()).ok_or(())?;
            self.name = Some(name.to_owned());
        } else if self.is_arguments() {
            self.early = Some(match value {
                serde_json::Value::Object(_) => text.to_owned(),
                serde_json::Value::String(inner) => inner,
                serde_json::Value::Null => "{}".to_owned(),
                _ => return Err(()),
            });
        }
        Ok(())
    }

    fn start(&mut self, piece: &mut String) {
        self.started = true;
        self.announce = true;
        piece.clear();
        self.raw.clear();
    }

    /// The end of the object.
    fn close(&mut self, piece: &mut String) -> Result<(), ()> {
        if self.started {
            return Ok(());
        }
        if self.name.is_none() {
            return Err(());
        }
        self.start(piece);
        piece.push_str(&self.early.take().unwrap_or_else(|| "{}".to_owned()));
        Ok(())
    }
}

/// The end of a JSON value, found letter by letter.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scan {
    depth: usize,
    text: bool,
    escaped: bool,
    /// A number, `true`, `null`: ends where something else begins.
    word: bool,
}

impl Scan {
    /// Behind the opening quote of a text.
    fn text() -> Self {
        Self { text: true, ..Self::default() }
    }

    /// Behind the first brace or bracket.
    fn nested() -> Self {
        Self { depth: 1, ..Self::default() }
    }

    fn word() -> Self {
        Self { word: true, ..Self::default() }
    }

    /// Takes a letter; true when it was the last.
    pub fn step(&mut self, c: char) -> bool {
        if self.text {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.text = false,
                _ => {}
            }
            return !self.text && self.depth == 0;
        }
        match c {
            '"' => self.text = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.depth == 0 && !self.word
    }
}
