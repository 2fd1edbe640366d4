//! Rust text as tokens: enough to see paths, functions and attributes, and nothing more.
//!
//! Comments, texts and numbers are gone, so a word in a comment breaks no law. Macros are taken as
//! they stand. `use` trees are spelled out, and `self` and `super` are resolved.

use std::iter::Peekable;
use std::path::Path;
use std::slice;

/// One file.
pub struct Source {
    /// Relative to the repository's root, with `/`.
    pub path: String,
    /// As it stands.
    pub text: String,
    /// Without comments, texts and numbers.
    pub tokens: Vec<Token>,
}

/// A word, `::`, or one other character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    /// From 1.
    pub line: usize,
}

/// A path that the code names, from the crate's root (`crate`) or another crate's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub path: Vec<String>,
    pub line: usize,
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    pub name: String,
    /// From `fn` to the closing brace.
    pub lines: usize,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned(), tokens: tokens(text) }
    }

    /// Whether the whole file is compiled for tests or measurements only.
    pub fn is_test(&self) -> bool {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        let folder = |name: &str| self.path.split('/').any(|part| part == name);
        folder("tests") || folder("benches") || folder("examples") || name.ends_with("tests.rs")
    }

    /// Tokens of what is compiled into the program.
    pub fn shipped(&self) -> Vec<Token> {
        if self.is_test() { Vec::new() } else { without_tests(&self.tokens) }
    }

    /// The module of the file: `src/a/b.rs` is `[a, b]`, `models/src/lib.rs` is `[]`.
    pub fn module(&self) -> Vec<String> {
        let inside = self.path.split_once("src/").map_or(self.path.as_str(), |(_, path)| path);
        let stem = inside.trim_end_matches(".rs");
        let parts = stem.split('/').filter(|part| !["mod", "lib", "main"].contains(part));
        parts.map(str::to_owned).collect()
    }

    /// Every path in the file, tests included.
    pub fn paths(&self) -> Vec<Named> {
        let mut found = Vec::new();
        let mut module = self.module();
        // One entry for each open brace: whether it opened an inline module.
        let mut braces = Vec::new();
        let tokens = &self.tokens;
        let mut at = 0;
        while at < tokens.len() {
            let word = tokens[at].text.as_str();
            let after = |n: usize| tokens.get(at + n).map_or("", |t| t.text.as_str());
            match word {
                "mod" if after(2) == "{" => {
                    module.push(after(1).to_owned());
                    braces.push(true);
                    at += 2;
                }
                "{" => braces.push(false),
                "}" if braces.pop() == Some(true) => drop(module.pop()),
                // `impl Trait + use<..>` imports nothing.
                "use" if after(1) != "<" => {
                    let mut tree = tokens[at + 1..].iter().peekable();
                    use_tree(&mut tree, &[], &mut |path, line| {
                        found.push(Named { path: resolve(path, &module), line });
                    });
                    at = tokens.len() - tree.len();
                    continue;
                }
                _ if is_word(word) && after(1) == "::" && !continues(tokens, at) => {
                    let mut path = vec![word.to_owned()];
                    let line = tokens[at].line;
                    while after(1 + 2 * (path.len() - 1)) == "::" && is_word(after(2 * path.len()))
                    {
                        path.push(after(2 * path.len()).to_owned());
                    }
                    at += 2 * (path.len() - 1);
                    found.push(Named { path: resolve(path, &module), line });
                }
                _ => {}
            }
            at += 1;
        }
        found
    }

    /// Every function with a body, those inside others too.
    pub fn functions(&self) -> Vec<Function> {
        let mut found = Vec::new();
        for at in 0..self.tokens.len() {
            let name = self.tokens.get(at + 1).map_or("", |t| t.text.as_str());
            if self.tokens[at].text != "fn" || !is_word(name) {
                continue;
            }
            if let Some(end) = end_of_item(&self.tokens, at)
                && self.tokens[end].text == "}"
            {
                let lines = self.tokens[end].line - self.tokens[at].line + 1;
                found.push(Function { name: name.to_owned(), lines });
            }
        }
        found
    }
}

/// All `.rs` files under `folder`, in order.
pub fn read_all(root: &Path, folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut entries: Vec<_> = match std::fs::read_dir(root.join(folder)) {
        Ok(entries) => entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect(),
        Err(_) => Vec::new(),
    };
    entries.sort();
    for name in entries {
        let path = format!("{folder}/{name}");
        if root.join(&path).is_dir() && name != "target" {
            found.extend(read_all(root, &path));
        } else if name.ends_with(".rs") {
            found.push(Source::new(&path, &std::fs::read_to_string(root.join(&path)).unwrap()));
        }
    }
    found
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Whether the word at `at` follows `::` or `.`, so that it begins no path.
fn continues(tokens: &[Token], at: usize) -> bool {
    let before = |n: usize| at.checked_sub(n).map_or("", |i| tokens[i].text.as_str());
    // `::name` at the beginning of a path names a crate; after a word or `>` it goes on.
    (before(1) == "." && before(2) != ".")
        || (before(1) == "::" && (is_word(before(2)) || before(2) == ">"))
}

/// Takes one tree of a `use` and tells its leaves.
fn use_tree(
    tokens: &mut Peekable<slice::Iter<'_, Token>>,
    prefix: &[String],
    tell: &mut dyn FnMut(Vec<String>, usize),
) {
    let mut path = prefix.to_vec();
    let mut line = 0;
    while let Some(token) = tokens.next_if(|t| ![",", "}", ";"].contains(&t.text.as_str())) {
        line = token.line;
        match token.text.as_str() {
            "{" => {
                while tokens.peek().is_some_and(|t| !["}", ";"].contains(&t.text.as_str())) {
                    use_tree(tokens, &path, tell);
                    tokens.next_if(|t| t.text == ",");
                }
                tokens.next();
                return;
            }
            "as" => drop(tokens.next()),
            "::" => {}
            word => path.push(word.to_owned()),
        }
    }
    if path.len() > prefix.len() {
        tell(path, line);
    }
}

/// `self` and `super` as seen from `module`; the program's own library is this crate.
fn resolve(path: Vec<String>, module: &[String]) -> Vec<String> {
    let supers = path.iter().filter(|part| *part == "super").count();
    let rest = |n: usize| path[n..].iter().filter(|p| *p != "self" && *p != "super").cloned();
    let root = ["crate".to_owned()].into_iter();
    match path.first().map_or("", String::as_str) {
        "self" | "super" => {
            let base = module[..module.len().saturating_sub(supers)].iter().cloned();
            root.chain(base).chain(rest(0)).collect()
        }
        "crate" | "hearth" => root.chain(rest(1)).collect(),
        _ => path,
    }
}

/// The tokens without items under `#[cfg(test)]` and the like.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        match attribute(tokens, at) {
            Some((end, words))
                if words.first() == Some(&"cfg")
                    && words.contains(&"test")
                    && !words.contains(&"not") =>
            {
                at = end;
                while let Some((end, _)) = attribute(tokens, at) {
                    at = end;
                }
                at = end_of_item(tokens, at).map_or(tokens.len(), |end| end + 1);
            }
            _ => {
                kept.push(tokens[at].clone());
                at += 1;
            }
        }
    }
    kept
}

/// The words of an attribute that begins at `at`, and where it has ended.
fn attribute(tokens: &[Token], at: usize) -> Option<(usize, Vec<&str>)> {
    let text = |i: usize| tokens.get(i).map(|t| t.text.as_str());
    if text(at) != Some("#") || text(at + 1) != Some("[") {
        return None;
    }
    let end = matching(tokens, at + 1)?;
    let words = tokens[at + 2..end].iter().map(|t| t.text.as_str()).filter(|t| is_word(t));
    Some((end + 1, words.collect()))
}

/// Where the item that begins at `at` ends: its `;`, or the brace that closes its body.
fn end_of_item(tokens: &[Token], at: usize) -> Option<usize> {
    let is_use = tokens.get(at)?.text == "use";
    let mut i = at;
    loop {
        match tokens.get(i)?.text.as_str() {
            ";" => return Some(i),
            "{" if !is_use => return matching(tokens, i),
            "(" | "[" | "{" => i = matching(tokens, i)? + 1,
            _ => i += 1,
        }
    }
}

/// The token that closes the bracket at `at`.
fn matching(tokens: &[Token], at: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return Some(i);
        }
    }
    None
}

/// Cuts a text into tokens.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < chars.len() {
        let next = skipped(&chars, at).unwrap_or_else(|| {
            let end = token_end(&chars, at);
            if !chars[at].is_ascii_digit() {
                found.push(Token { text: chars[at..end].iter().collect(), line });
            }
            end
        });
        line += chars[at..next].iter().filter(|c| **c == '\n').count();
        at = next;
    }
    found
}

fn token_end(chars: &[char], at: usize) -> usize {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    match chars[at] {
        c if word(c) => chars[at..].iter().position(|c| !word(*c)).map_or(chars.len(), |n| at + n),
        ':' if chars.get(at + 1) == Some(&':') => at + 2,
        _ => at + 1,
    }
}

/// Where white space, a comment, a text, a character or a lifetime at `at` has ended.
fn skipped(chars: &[char], at: usize) -> Option<usize> {
    let starts = |what: &str| what.chars().eq(chars[at..].iter().copied().take(what.len()));
    let find = |from: usize, end: &str| {
        let end: Vec<char> = end.chars().collect();
        let place = (from..chars.len()).find(|&i| chars[i..].starts_with(&end));
        place.map_or(chars.len(), |i| i + end.len())
    };
    if chars[at].is_whitespace() {
        return Some(at + 1);
    }
    if starts("//") {
        return Some(find(at, "\n"));
    }
    if starts("/*") {
        return Some(find(at, "*/"));
    }
    // Raw texts, and prefixes of plain ones.
    let prefix = chars[at..].iter().take_while(|c| "bcr".contains(**c)).count().min(2);
    let raw = chars[at..at + prefix].contains(&'r');
    let hashes = chars[at + prefix..].iter().take_while(|c| **c == '#').count();
    if raw && chars.get(at + prefix + hashes) == Some(&'"') {
        return Some(find(at + prefix + hashes + 1, &format!("\"{}", "#".repeat(hashes))));
    }
    if chars.get(at + prefix) == Some(&'"') {
        return Some(closing(chars, at + prefix, '"'));
    }
    if chars[at] != '\'' {
        return None;
    }
    // `'a'` and `'\n'` are characters, `'a` is a lifetime.
    match (chars.get(at + 1), chars.get(at + 2)) {
        (Some('\\'), _) | (_, Some('\'')) => Some(closing(chars, at, '\'')),
        _ => Some(token_end(chars, at + 1)),
    }
}

/// Behind the quote that closes the one at `at`.
fn closing(chars: &[char], at: usize, quote: char) -> usize {
    let mut i = at + 1;
    while i < chars.len() && chars[i] != quote {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    (i + 1).min(chars.len())
}
