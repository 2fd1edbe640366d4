//! Chat templates: the Jinja text that models ship, rendered as Hugging Face renders it.
//!
//! A template is somebody else's program. It sees only the values passed in, runs on a budget of
//! instructions and of recursion, and its output is bounded; `raise_exception` becomes
//! [`TextError::Refused`]. Not bounded, because minijinja gives no hold on it: the length of a
//! text that a template doubles in memory, and the depth of a list that it nests in itself (both
//! need a template written to do harm; a template is as trusted as the weights it comes with).

use std::io::Write;
use std::sync::Arc;

use jiff::Zoned;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value, json};

use super::TextError;
use super::output::THINK;
use super::python;
use super::style::ChatStyle;
use super::tokenizer::{Special, Tokenizer};

/// Tells the time to templates that print a date.
pub type Clock = Arc<dyn Fn() -> Zoned + Send + Sync>;

/// Tokens that end a turn in the templates of well-known families; consulted when the template
/// does not show its own.
pub(super) const END_OF_TURN_NAMES: [&str; 9] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_turn|>",
    "<|end|>",
    "<|return|>",
    "<｜end▁of▁sentence｜>",
];

/// VM instructions that one rendering may take: a second or two of work. Most templates take about
/// 100 per message, but some are quadratic: 7 million for 1,000 messages.
const FUEL: u64 = 20_000_000;
/// Bytes that one rendering may print.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// The chat template of one model.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    /// `bos_token`, `eos_token`, ...: name and text.
    tokens: Map<String, Value>,
    /// The text of all templates.
    source: Arc<str>,
}

impl ChatTemplate {
    /// Compiles a template (`chat_template.jinja`, GGUF's `tokenizer.chat_template`).
    pub fn new(
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<Self, TextError> {
        let tokens = [("bos_token", bos_token), ("eos_token", eos_token)]
            .into_iter()
            .filter_map(|(name, text)| Some((name.to_owned(), Value::from(text?))))
            .collect();
        Self::compile(vec![(DEFAULT.into(), source.into())], tokens)
    }

    /// Compiles what `tokenizer_config.json` says: its `chat_template` is one template or a list
    /// of named ones, of which `tool_use` is taken when there are tools. `file` is the text of
    /// `chat_template.jinja`, which comes before the config's. `None` if there is no template.
    pub fn from_tokenizer_config(
        config: &Value,
        file: Option<&str>,
    ) -> Result<Option<Self>, TextError> {
        let tokens = special_tokens(config);
        if let Some(source) = file {
            return Self::compile(vec![(DEFAULT.into(), source.into())], tokens).map(Some);
        }
        let templates = match &config["chat_template"] {
            Value::Null => return Ok(None),
            Value::String(source) => vec![(DEFAULT.into(), source.clone())],
            Value::Array(list) => list
                .iter()
                .filter_map(|entry| {
                    Some((entry["name"].as_str()?.into(), entry["template"].as_str()?.into()))
                })
                .collect(),
            _ => Vec::new(),
        };
        if !templates.iter().any(|(name, _): &(String, String)| name == DEFAULT) {
            return Err(TextError::BadTemplate(
                "chat_template in tokenizer_config.json is neither a text nor a list of named \
                 templates with one named `default`"
                    .into(),
            ));
        }
        Self::compile(templates, tokens).map(Some)
    }

    fn compile(
        templates: Vec<(String, String)>,
        tokens: Map<String, Value>,
    ) -> Result<Self, TextError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_fuel(Some(FUEL));
        env.add_function("raise_exception", raise_exception);
        python::install(&mut env);
        let texts: Vec<&str> = templates.iter().map(|(_, source)| source.as_str()).collect();
        let all: Arc<str> = texts.join("\n").into();
        for (name, source) in templates {
            env.add_template_owned(name, without_generation_blocks(&source))
                .map_err(|e| TextError::BadTemplate(describe(&e)))?;
        }
        Ok(Self { env: Arc::new(env), tokens, source: all }.with_clock(Arc::new(Zoned::now)))
    }

    /// The same template with another clock.
    pub fn with_clock(self, clock: Clock) -> Self {
        let mut env = (*self.env).clone();
        env.add_function("strftime_now", move |format: &str| {
            jiff::fmt::strtime::format(format, &clock()).map_err(|e| {
                Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {e}"))
            })
        });
        Self { env: Arc::new(env), ..self }
    }

    /// Renders a conversation. `messages` is the list of messages as the OpenAI API has them,
    /// `tools` the list of tool definitions, `extra` further variables
    /// (`chat_template_kwargs`), which win over everything else.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, TextError> {
        let mut context = self.tokens.clone();
        context.insert("messages".into(), messages.clone());
        context.insert("tools".into(), tools.cloned().unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.extend(extra.clone());
        let template = match tools {
            Some(_) => self.env.get_template(TOOL_USE),
            None => self.env.get_template(DEFAULT),
        };
        let template = template
            .or_else(|_| self.env.get_template(DEFAULT))
            .map_err(|e| TextError::Render(describe(&e)))?;
        let mut out = Bounded(Vec::new());
        match template.render_captured_to(&context, &mut out) {
            Ok(_) => String::from_utf8(out.0).map_err(|e| TextError::Render(e.to_string())),
            Err(error) => Err(match raised(&error) {
                Some(message) => TextError::Refused(message),
                None => TextError::Render(describe(&error)),
            }),
        }
    }

    /// Whether a rendered prompt begins with the BOS token, so that none must be added.
    /// ([`Special::PROMPT`] takes care of it by itself.)
    pub fn starts_with_bos(&self, rendered: &str) -> bool {
        let bos = self.tokens.get("bos_token").and_then(Value::as_str);
        bos.is_some_and(|bos| !bos.is_empty() && rendered.starts_with(bos))
    }

    /// Whether its text speaks of something: a variable such as `enable_thinking`, a mark.
    pub fn mentions(&self, word: &str) -> bool {
        self.source.contains(word)
    }

    /// Whether it writes a thought before an answer between `<think>` and `</think>`.
    pub fn tags_thought(&self) -> bool {
        THINK.iter().any(|mark| self.mentions(mark))
    }

    /// Its text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// How it treats messages and tools.
    pub fn style(&self) -> ChatStyle {
        ChatStyle::of(self)
    }

    /// The tokens after which the assistant's turn is over: the one that the template writes
    /// after an assistant message, or else those of [`END_OF_TURN_NAMES`] in the vocabulary.
    pub fn stop_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        if let Some(id) = self.probe_end_of_turn(tokenizer) {
            return vec![id];
        }
        let known = END_OF_TURN_NAMES.iter().filter_map(|name| tokenizer.id_of(name));
        known.filter(|&id| tokenizer.is_added(id)).collect()
    }

    /// Renders a conversation with a known answer and reads the token that follows the answer.
    fn probe_end_of_turn(&self, tokenizer: &Tokenizer) -> Option<u32> {
        const ANSWER: &str = "hearthprobe";
        let as_text = |text: &str| json!(text);
        let as_parts = |text: &str| json!([{ "type": "text", "text": text }]);
        let shapes: [&dyn Fn(&str) -> Value; 2] = [&as_text, &as_parts];
        let rendered = shapes.iter().find_map(|content| {
            let messages = json!([
                { "role": "user", "content": content("question") },
                { "role": "assistant", "content": content(ANSWER) },
            ]);
            let text = self.render(&messages, None, false, &Map::new()).ok()?;
            text.contains(ANSWER).then_some(text)
        })?;
        let (_, after) = rendered.rsplit_once(ANSWER)?;
        let ids = tokenizer.encode(after.trim_start(), Special::PARSE).ok()?;
        let first = *ids.first()?;
        (tokenizer.is_added(first) || tokenizer.end_ids().contains(&first)).then_some(first)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("tokens", &self.tokens).finish_non_exhaustive()
    }
}

/// `bos_token` and its kin, each a text or an object with `content`.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let Some(config) = config.as_object() else { return Map::new() };
    let named = config.iter().filter(|(name, _)| name.ends_with("_token"));
    named
        .filter_map(|(name, token)| {
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            Some((name.clone(), text.into()))
        })
        .collect()
}

/// The error of `raise_exception`: carried as a source so that it is told from other failures.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<minijinja::Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn raised(error: &Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return Some(message.clone());
        }
        source = cause.source();
    }
    None
}

fn describe(error: &Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => "the template runs too long; it was stopped".into(),
        _ => error.to_string(),
    }
}

/// Replaces `{% generation %}` ... `{% endgeneration %}`, which mark the assistant's text for
/// training, by a condition that is always true: the same text, the same whitespace control.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let word = tag[2..end].trim_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        let Some(replacement) = replacement else {
            out.push_str("{%");
            rest = &tag[2..];
            continue;
        };
        out.push_str(&tag[..end].replacen(word, replacement, 1));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// A buffer that refuses to grow beyond [`OUTPUT_BYTES_MAX`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(std::io::Error::other("the template prints too much; it was stopped"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
