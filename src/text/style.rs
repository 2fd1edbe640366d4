//! How a chat template treats messages and tools, and messages in the form that it takes.
//!
//! What a template can do is found out by rendering conversations with known words. A model whose
//! template knows no tools is told of them in a system message, and asked for calls in the format
//! of Hermes; so is one whose own format is none of [`CallFormat`]. Where a template has no words
//! for a system message, first (Gemma) or later (Mistral), its text is the user's; where messages
//! must alternate, those of one side that follow each other become one; where there is one call to
//! a message (Llama), two calls are two messages; where the thought before a call has another name
//! (gpt-oss), it gets that.

mod adapt;

use serde_json::{Map, Value, json};

use super::ChatTemplate;
use super::output::{ARGS, CallFormat};

/// How a template treats tools and messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChatStyle {
    /// How calls are written.
    pub format: CallFormat,
    /// The template shows the tools that it is given.
    pub shows_tools: bool,
    /// The template shows calls of earlier turns.
    pub shows_calls: bool,
    /// It wants their arguments as JSON text, not as an object.
    pub text_arguments: bool,
    /// It shows a call whose message has `null` for words,
    pub takes_null: bool,
    /// and one whose message has empty ones.
    pub takes_empty: bool,
    /// It shows a call and what was said before it in one message.
    pub takes_both: bool,
    /// It shows two calls in one message.
    pub takes_two_calls: bool,
    /// It shows the thought before a call under the name `thinking` alone,
    pub takes_thinking: bool,
    /// and words beside both.
    pub takes_all: bool,
    /// It shows a system message that comes first,
    pub takes_system: bool,
    /// two that do,
    pub two_systems: bool,
    /// beside the first one that comes behind an answer,
    pub late_system: bool,
    /// and one that comes behind a question.
    pub mid_system: bool,
    /// It refuses two messages of the user in a row.
    pub alternates: bool,
    /// It takes an answer without words.
    pub takes_silence: bool,
    /// It takes a conversation that the assistant opens,
    pub takes_greeting: bool,
    /// and beside tools one that a call opens.
    pub opens_with_call: bool,
}

const TOOL: &str = "hearthtool";
const CALLED: &str = "hearthcall";
const OTHER: &str = "hearthother";
const KEY: &str = "hearthkey";
const FIRST: &str = "hearthfirst";
const SYSTEM: &str = "hearthsystem";
const WORDS: &str = "hearthwords";
const THOUGHT: &str = "hearththought";

impl ChatStyle {
    pub(super) fn of(template: &ChatTemplate) -> Self {
        let probe = Probe::new(template);
        let (user, answer) = (said("user", "question"), said("assistant", "answer"));
        // One that refuses a question alone has other reasons.
        let asks = probe.written(&[&user]).is_some();
        let shows = |messages: &[&Value], words: &[&str]| {
            let text = probe.written(messages);
            !asks || text.is_some_and(|text| words.iter().all(|word| text.contains(word)))
        };
        let (first, system) = (said("system", FIRST), said("system", SYSTEM));
        let takes_system = shows(&[&system, &user], &[SYSTEM]);
        let behind = |messages: &[&Value]| match takes_system {
            true => shows(&[&[&first], messages].concat(), &[FIRST, SYSTEM]),
            false => shows(messages, &[SYSTEM]),
        };
        let calls = Calls::of(&probe);
        let format = format_of(calls.written.as_deref().unwrap_or_default());
        let shows_tools = probe.shows_tools(&user);
        Self {
            format: format.unwrap_or(CallFormat::Hermes),
            shows_tools,
            // Who is told of tools in our words sees calls in our words, too.
            shows_calls: calls.written.is_some() && (shows_tools || format.is_some()),
            text_arguments: calls.text_arguments,
            takes_null: calls.takes_null,
            takes_empty: calls.takes_empty,
            takes_both: calls.takes_both,
            takes_two_calls: calls.takes_two,
            takes_thinking: calls.takes_thinking,
            takes_all: calls.takes_all,
            takes_system,
            two_systems: shows(&[&first, &system, &user], &[FIRST, SYSTEM]),
            late_system: behind(&[&user, &answer, &system, &user]),
            // Not as somebody's turn, where turns are counted.
            mid_system: behind(&[&user, &system, &user])
                && behind(&[&user, &system, &answer, &user]),
            alternates: asks && probe.written(&[&user, &user]).is_none(),
            takes_silence: probe.written(&[&user, &said("assistant", ""), &user]).is_some(),
            takes_greeting: shows(&[&answer, &user], &["answer"]),
            opens_with_call: calls.opens,
        }
    }
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// A template, and a tool that conversations with it have.
struct Probe<'a> {
    template: &'a ChatTemplate,
    tools: Value,
}

impl<'a> Probe<'a> {
    fn new(template: &'a ChatTemplate) -> Self {
        let tools = json!([{"type": "function", "function": {
            "name": TOOL, "description": "A tool.",
            "parameters": {"type": "object", "properties": {}},
        }}]);
        Self { template, tools }
    }

    fn written(&self, messages: &[&Value]) -> Option<String> {
        self.template.render(&json!(messages), None, true, &Map::new()).ok()
    }

    fn shows_tools(&self, user: &Value) -> bool {
        let shown = self.template.render(&json!([user]), Some(&self.tools), true, &Map::new());
        shown.is_ok_and(|text| text.contains(TOOL))
    }

    /// What is written of an assistant's message with a call, with others behind it; `None` where
    /// the template refuses it or shows no call.
    fn call(&self, message: &Value, behind: &[Value]) -> Option<String> {
        let messages = [&[said("user", "question"), message.clone()], behind].concat();
        let text = self.beside_tools(messages)?;
        let call = text[text.rfind("question")?..].to_owned();
        (call.contains(CALLED) && call.contains(KEY)).then_some(call)
    }

    fn beside_tools(&self, messages: Vec<Value>) -> Option<String> {
        let messages = Value::from(messages);
        self.template.render(&messages, Some(&self.tools), false, &Map::new()).ok()
    }
}

/// What a template makes of messages with calls.
struct Calls {
    written: Option<String>,
    text_arguments: bool,
    takes_null: bool,
    takes_empty: bool,
    takes_both: bool,
    takes_two: bool,
    takes_thinking: bool,
    takes_all: bool,
    opens: bool,
}

impl Calls {
    fn of(probe: &Probe<'_>) -> Self {
        let [null, empty, words] = [Value::Null, json!(""), json!(WORDS)];
        let (object, text) = (json!({KEY: 1}), json!(format!("{{\"{KEY}\": 1}}")));
        let one = |id: &str, name: &str, arguments: &Value| {
            json!({"id": id, "type": "function",
                   "function": {"name": name, "arguments": arguments}})
        };
        let message = |content: &Value, calls: &[Value]| {
            json!({"role": "assistant", "content": content,
                   "tool_calls": calls})
        };
        let call = |content: &Value, arguments: &Value, behind: &[Value]| {
            probe.call(&message(content, &[one("abcdefghi", CALLED, arguments)]), behind)
        };
        let with = |content: &Value, behind: &[Value]| {
            [&object, &text].into_iter().find_map(|a| call(content, a, behind))
        };
        // The last message, and one that its result follows.
        let mut result = said("tool", "1");
        (result["tool_call_id"], result["name"]) = (json!("abcdefghi"), json!(CALLED));
        let behind = [result];
        let [last_null, last_empty] = [&null, &empty].map(|content| with(content, &[]));
        let [mid_null, mid_empty] = [&null, &empty].map(|content| with(content, &behind).is_some());
        // Some print `null` as a word.
        let nones = |text: &String| text.to_lowercase().matches("none").count();
        let fewest = last_empty.as_ref().map(nones);
        let as_good = last_null.as_ref().map(nones).is_some_and(|n| fewest.is_none_or(|e| n <= e));
        // An object that was printed by some other rule than JSON's shows in its quotes.
        let quoted = |text: &String| text.contains(&format!("\"{KEY}\""));
        let plain =
            |arguments: &Value| [&null, &empty].into_iter().find_map(|c| call(c, arguments, &[]));
        let as_object = plain(&object).filter(quoted);
        let as_text = as_object.is_none();
        let written = as_object.or_else(|| plain(&text));
        let arguments = if as_text { &text } else { &object };
        let calls = [one("abcdefghi", CALLED, arguments), one("abcdefghj", OTHER, arguments)];
        let two = |content: &Value| probe.call(&message(content, &calls), &[]);
        let two = [&null, &empty].into_iter().find_map(two);
        let thought = |key: &str, content: &Value| {
            let mut message = message(content, &calls[..1]);
            message[key] = json!(THOUGHT);
            probe.call(&message, &behind).filter(|text| text.contains(THOUGHT))
        };
        let shows = |key: &str| [&null, &empty].iter().any(|c| thought(key, c).is_some());
        let all = thought("thinking", &words).is_some_and(|text| text.contains(WORDS));
        let opens = |content: &Value| {
            let first = message(content, &calls[..1]);
            let messages = [&[first], &behind[..], &[said("user", "question")]].concat();
            probe.beside_tools(messages).is_some_and(|text| text.contains(KEY))
        };
        let opens = written.is_none() || opens(&null) || opens(&empty);
        Self {
            opens,
            text_arguments: as_text && written.is_some(),
            written,
            takes_null: as_good && (mid_null || !mid_empty),
            takes_empty: last_empty.is_some() && (mid_empty || !mid_null),
            takes_both: with(&words, &[]).is_some_and(|text| text.contains(WORDS)),
            takes_two: two.is_some_and(|text| text.contains(OTHER)),
            takes_thinking: shows("thinking") && !shows("reasoning_content"),
            takes_all: all,
        }
    }
}

/// Told by what surrounds the known call; `None` is one that we do not read.
fn format_of(written: &str) -> Option<CallFormat> {
    let after = written.split(CALLED).nth(1).unwrap_or_default();
    if written.contains("[TOOL_CALLS]") {
        return Some(match after.contains(ARGS) || after.trim_start().starts_with('{') {
            true => CallFormat::MistralArgs,
            false => CallFormat::MistralList,
        });
    }
    if written.contains("<tool_call>") {
        return Some(CallFormat::Hermes);
    }
    after.contains("\"parameters\"").then_some(CallFormat::Llama)
}
