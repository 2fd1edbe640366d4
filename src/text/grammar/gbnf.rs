//! GBNF, the grammar notation of llama.cpp, as Lark.
//!
//! The two differ in spelling only: `root ::= item+` is `start: item+`, `[a-z]` is `/[a-z]/`, a
//! comment begins with `#` in both. Names are put in one alphabet on the way.

use super::{Shape, lark_string};

impl Shape {
    /// A grammar in Lark, or in GBNF, which is told by its `::=`.
    ///
    /// # Errors
    /// What cannot be read, with its line.
    pub fn grammar(text: &str) -> Result<Self, String> {
        match text.contains("::=") {
            true => to_lark(text).map(Self::Lark),
            false => Ok(Self::Lark(text.to_owned())),
        }
    }
}

fn to_lark(gbnf: &str) -> Result<String, String> {
    let mut rules: Vec<String> = Vec::new();
    let mut depth = 0usize;
    for (number, line) in (1..).zip(gbnf.lines()) {
        let fail = |what: String| format!("line {number}: {what}");
        let body = match line.split_once("::=") {
            // Inside a literal it is text.
            Some((name, body)) if is_name(name.trim()) && depth == 0 => {
                rules.push(format!("{}:", rule(name.trim())));
                body
            }
            _ => line,
        };
        let body = translate(body, &mut depth).map_err(fail)?;
        match rules.last_mut() {
            Some(rule) => {
                rule.push(' ');
                rule.push_str(&body);
            }
            None if body.trim().is_empty() => {}
            None => return Err(fail("a rule begins with `name ::=`".to_owned())),
        }
    }
    if !rules.iter().any(|rule| rule.starts_with("start:")) {
        return Err("there is no rule `root`".to_owned());
    }
    Ok(rules.join("\n"))
}

/// The right side of a rule, or one line of it.
fn translate(body: &str, depth: &mut usize) -> Result<String, String> {
    let mut out = String::new();
    let mut chars = body.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '#' => break,
            '"' => {
                let literal = quoted(&mut chars, '"').ok_or("a text has no closing quote")?;
                out.push_str(&lark_string(&unescape(&literal)?));
            }
            '[' => {
                let class = quoted(&mut chars, ']').ok_or("a `[` is not closed")?;
                out.push_str(&format!("/[{}]/", class.replace('/', "\\/")));
            }
            '.' => out.push_str("/(.|\\n)/"),
            '(' | ')' => {
                let open = usize::from(c == '(');
                *depth = (*depth + open).checked_sub(1 - open).ok_or("a `)` has no `(`")?;
                out.push(c);
            }
            c if c.is_ascii_alphanumeric() || c == '_' => {
                let mut name = c.to_string();
                while let Some(c) = chars.next_if(|c| is_name_char(*c)) {
                    name.push(c);
                }
                out.push_str(&rule(&name));
            }
            // A count: {2}, {2,}, {2,5}.
            '{' => {
                let count = quoted(&mut chars, '}').ok_or("a `{` is not closed")?;
                out.push_str(&format!("{{{count}}}"));
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

/// Everything up to `end`, which may stand escaped before it.
fn quoted(chars: &mut impl Iterator<Item = char>, end: char) -> Option<String> {
    let mut text = String::new();
    loop {
        match chars.next()? {
            c if c == end => return Some(text),
            '\\' => text.extend(['\\', chars.next()?]),
            c => text.push(c),
        }
    }
}

/// `\n`, `\x41`, `\u0041`, `\"` and the like.
fn unescape(literal: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let digits = match chars.next() {
            Some('n') => {
                out.push('\n');
                continue;
            }
            Some('r') => {
                out.push('\r');
                continue;
            }
            Some('t') => {
                out.push('\t');
                continue;
            }
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(other) => {
                out.push(other);
                continue;
            }
            None => return Err("a text ends in `\\`".to_owned()),
        };
        let code: String = chars.by_ref().take(digits).collect();
        let c = u32::from_str_radix(&code, 16).ok().and_then(char::from_u32);
        out.push(c.ok_or_else(|| format!("`\\{code}` is no character"))?);
    }
    Ok(out)
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(is_name_char)
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

/// `root` is `start`; every other name becomes a rule that cannot be taken for a terminal.
fn rule(name: &str) -> String {
    match name {
        "root" => "start".to_owned(),
        _ => {
            // Upper case is told from lower, so that two names stay two.
            let letters = name.chars().map(|c| match c {
                '-' => "_h".to_owned(),
                '_' => "__".to_owned(),
                c if c.is_ascii_uppercase() => format!("_{}_", c.to_ascii_lowercase()),
                c => c.to_string(),
            });
            format!("r_{}", letters.collect::<String>())
        }
    }
}
