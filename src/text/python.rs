//! What chat templates expect of Python: `json.dumps`, `repr`, string methods, Jinja2's tests.
//!
//! minijinja already prints `True`, `False` and `None` as Python does, and `minijinja-contrib`
//! brings most methods of `str`, `list` and `dict`.

use std::borrow::Cow;
use std::fmt::Write as _;

use minijinja::filters;
use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;

/// Levels of lists and maps that are printed; `serde_json` reads no more than 128.
const NESTING_MAX: usize = 256;
/// Columns by which a filter moves lines.
const INDENT_MAX: usize = 64;

/// Makes an environment behave like the one in which templates were written.
pub(super) fn install(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(method);
    env.set_formatter(print);
    env.add_filter("tojson", to_json);
    env.add_filter("string", string);
    env.add_filter("indent", indent);
    env.add_filter("upper", |value: &Value| str_of(value).map(|text| text.to_uppercase()));
    env.add_filter("lower", |value: &Value| str_of(value).map(|text| text.to_lowercase()));
    env.add_filter("title", |value: &Value| Ok::<_, Error>(filters::title(str_of(value)?.into())));
    env.add_filter("trim", |value: &Value, chars: Option<&str>| {
        let text = str_of(value)?;
        Ok::<_, Error>(match chars {
            None => text.trim().to_owned(),
            Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        })
    });
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
}

/// `value | string`. Python prints containers as `repr` does, the JavaScript renderer, whose
/// goldens we hold, as JSON: here alone they differ, and JSON is followed.
fn string(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.clone()),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            to_json(value, std::iter::empty::<(&str, Value)>().collect())
        }
        _ => str_of(value).map(Value::from),
    }
}

/// `{{ value }}`: as Python's `str`.
fn print(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Number => {
            out.write_str(&str_of(value)?).map_err(Error::from)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// Python's `str(value)`.
fn str_of(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        _ => {
            let mut text = String::new();
            check_nesting(value, NESTING_MAX)?;
            repr(value, &mut text)?;
            Ok(text)
        }
    }
}

/// Printing recurses, so what is printed may not be nested without end.
fn check_nesting(value: &Value, levels: usize) -> Result<(), Error> {
    let left = levels.checked_sub(1).ok_or_else(|| invalid("the value is nested too deeply"))?;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.try_for_each(|item| check_nesting(&item, left))
        }
        ValueKind::Map => {
            value.try_iter()?.try_for_each(|key| check_nesting(&value.get_item(&key)?, left))
        }
        _ => Ok(()),
    }
}

fn repr(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => repr_str(value.as_str().unwrap_or_default(), out),
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&key, out)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&item, out)?;
            }
            out.push(']');
        }
        ValueKind::Number if !value.is_integer() => {
            let float = f64::try_from(value.clone())?;
            out.push_str(&python_float(float));
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn repr_str(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if (c as u32) < 0x20 || c as u32 == 0x7F => {
                write!(out, "\\x{:02x}", c as u32).expect("a String grows; this is a bug");
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// `value | indent(width=4, first=False, blank=False)`. A text that ends in a line's end keeps it.
fn indent(
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let text = str_of(value)?;
    let flag = |given: Option<bool>, name| match given {
        Some(given) => Ok(given),
        None => options.get::<Option<bool>>(name).map(Option::unwrap_or_default),
    };
    let (first, blank) = (flag(first, "first")?, flag(blank, "blank")?);
    let width = match width {
        Some(width) => Some(width),
        None => options.get::<Option<Value>>("width")?,
    };
    options.assert_all_used()?;
    let by = match width {
        None => " ".repeat(4),
        Some(by) if by.as_str().is_some() => by.as_str().unwrap_or_default().to_owned(),
        Some(count) => {
            let count = usize::try_from(count).map_err(|_| invalid("indent: bad width"))?;
            " ".repeat(count.min(INDENT_MAX))
        }
    };
    let mut out = String::with_capacity(text.len());
    for (i, line) in text.split('\n').enumerate() {
        out.push_str(if i > 0 { "\n" } else { "" });
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&by);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `value | tojson(indent=, sort_keys=, ensure_ascii=, separators=)`: `json.dumps` with
/// `ensure_ascii=False`, as Hugging Face defines the filter.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(invalid("tojson: the value is undefined"));
    }
    let indent = options.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none());
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(count) => {
            let count = usize::try_from(count).map_err(|_| invalid("tojson: bad indent"))?;
            Some(" ".repeat(count.min(16)))
        }
    };
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson: separators are two texts")),
        None => ((if indent.is_some() { "," } else { ", " }).into(), ": ".into()),
    };
    let writer = JsonWriter {
        indent,
        item,
        key,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    check_nesting(value, NESTING_MAX)?;
    let json = serde_json::to_value(value).map_err(|e| invalid(format!("tojson: {e}")))?;
    let mut out = String::new();
    writer.write(&json, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

/// Python's `json.dumps`.
struct JsonWriter {
    indent: Option<String>,
    /// Between items.
    item: String,
    /// Between key and value.
    key: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl JsonWriter {
    fn write(&self, json: &Json, depth: usize, out: &mut String) {
        match json {
            Json::String(text) => self.write_str(text, out),
            Json::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => out.push_str(&python_float(float)),
                None => out.push_str(&number.to_string()),
            },
            Json::Array(items) => {
                self.write_items('[', items.iter(), ']', depth, out, |item, out| {
                    self.write(item, depth + 1, out);
                });
            }
            Json::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                let write_entry = |(key, value): (&String, &Json), out: &mut String| {
                    self.write_str(key, out);
                    out.push_str(&self.key);
                    self.write(value, depth + 1, out);
                };
                self.write_items('{', entries.into_iter(), '}', depth, out, write_entry);
            }
            Json::Null | Json::Bool(_) => out.push_str(&json.to_string()),
        }
    }

    fn write_items<T>(
        &self,
        open: char,
        items: impl ExactSizeIterator<Item = T>,
        close: char,
        depth: usize,
        out: &mut String,
        write_item: impl Fn(T, &mut String),
    ) {
        let empty = items.len() == 0;
        out.push(open);
        for (i, item) in items.enumerate() {
            out.push_str(if i > 0 { &self.item } else { "" });
            self.new_line(depth + 1, out);
            write_item(item, out);
        }
        if !empty {
            self.new_line(depth, out);
        }
        out.push(close);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn write_str(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").expect("a String grows; this is a bug");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Rust and Python both print the shortest digits; only exponents are spelled differently.
fn python_float(float: f64) -> String {
    if !float.is_finite() {
        return float.to_string().to_lowercase();
    }
    let text = format!("{float:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
    }
}

/// Methods of Python's types; the few of `str` that `minijinja-contrib` lacks are here.
fn method(
    state: &State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let error = match unknown_method_callback(state, value, name, args) {
        Err(error) if error.kind() == ErrorKind::UnknownMethod => error,
        result => return result,
    };
    let Some(text) = value.as_str() else { return Err(error) };
    match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let at = text.find(part).ok_or_else(|| invalid("substring not found"))?;
            Ok(Value::from(text[..at].chars().count()))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.split_once(separator).unwrap_or((text, ""));
            let found = if text.contains(separator) { separator } else { "" };
            Ok(texts([before, found, after]))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.rsplit_once(separator).unwrap_or(("", text));
            let found = if text.contains(separator) { separator } else { "" };
            Ok(texts([before, found, after]))
        }
        "rsplit" => {
            let (separator, count): (&str, Option<usize>) = from_args(args)?;
            let count = count.map_or(usize::MAX, |count| count.saturating_add(1));
            let mut parts: Vec<&str> = text.rsplitn(count, separator).collect();
            parts.reverse();
            Ok(texts(parts))
        }
        _ => Err(error),
    }
}

fn texts<'a>(parts: impl IntoIterator<Item = &'a str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn invalid(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
