//! Tools in the words of one model: how its template shows them, how it writes a call, and the
//! grammar that holds it to that.
//!
//! What a template can do is found out by rendering a conversation with a known call. A model whose
//! template knows no tools is told of them in a system message, and asked for calls in the format
//! of Hermes; so is one whose own format is none of [`CallFormat`]. Where a template has no words
//! for a system message, first (Gemma) or later (Mistral), its text is the user's; where messages
//! must alternate, those of one side that follow each other become one.

use serde_json::{Map, Value, json};

use super::ChatTemplate;
use super::grammar::{Rules, Shape, Trigger, Vocabulary, lark_string};
use super::output::{ARGS, CallFormat, PYTHON_TAG};

/// How a template treats tools and messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToolStyle {
    /// How calls are written.
    pub format: CallFormat,
    /// The template shows the tools that it is given.
    pub shows_tools: bool,
    /// The template shows calls of earlier turns.
    pub shows_calls: bool,
    /// It wants their arguments as JSON text, not as an object.
    pub text_arguments: bool,
    /// It shows a call whose message has `null` for words.
    pub takes_null: bool,
    /// It shows a call and what was said before it in one message.
    pub takes_both: bool,
    /// It shows a system message that comes first,
    pub takes_system: bool,
    /// one that comes behind an answer,
    pub late_system: bool,
    /// and one that comes behind a question.
    pub mid_system: bool,
    /// It refuses two messages of the user in a row.
    pub alternates: bool,
}

const TOOL: &str = "hearthtool";
const CALLED: &str = "hearthcall";
const KEY: &str = "hearthkey";
const SYSTEM: &str = "hearthsystem";
const WORDS: &str = "hearthwords";

impl ToolStyle {
    pub(super) fn of(template: &ChatTemplate) -> Self {
        let user = json!({"role": "user", "content": "question"});
        let tools = json!([{"type": "function", "function": {
            "name": TOOL, "description": "A tool.",
            "parameters": {"type": "object", "properties": {}},
        }}]);
        let none = Map::new();
        let written = |messages: Value| template.render(&messages, None, true, &none);
        let system = json!({"role": "system", "content": SYSTEM});
        let shows = |messages: Value| written(messages).is_ok_and(|text| text.contains(SYSTEM));
        // One that refuses a question alone has other reasons.
        let asks = written(json!([user])).is_ok();
        let takes_system = !asks || shows(json!([system, user]));
        let answer = json!({"role": "assistant", "content": "answer"});
        let late_system = !asks || shows(json!([user, answer, system, user]));
        let mid_system = !asks || shows(json!([user, system, user]));
        let alternates = asks && written(json!([user, user])).is_err();
        let shown = template.render(&json!([user]), Some(&tools), true, &none);
        let call = |content: &Value, arguments: Value| {
            let call = json!({"id": "abcdefghi", "type": "function",
                              "function": {"name": CALLED, "arguments": arguments}});
            let call = json!({"role": "assistant", "content": content, "tool_calls": [call]});
            let text = template.render(&json!([user, call]), Some(&tools), false, &none).ok()?;
            let call = text[text.rfind("question")?..].to_owned();
            (call.contains(CALLED) && call.contains(KEY)).then_some(call)
        };
        let contents = [Value::Null, json!("")];
        let numbers = [json!({KEY: 1}), json!(format!("{{\"{KEY}\": 1}}"))];
        // Some print it as a word.
        let words = |text: String| text.to_lowercase().matches("none").count();
        let with = |content: &Value| numbers.iter().find_map(|n| call(content, n.clone()));
        let [null, empty] = [&contents[0], &contents[1]].map(|content| with(content).map(words));
        let takes_null = null.is_some_and(|null| empty.is_none_or(|empty| null <= empty));
        let both = with(&json!(WORDS));
        let takes_both = both.is_some_and(|text| text.contains(WORDS));
        let as_object = contents.iter().find_map(|content| call(content, json!({KEY: 1})));
        // An object that was printed by some other rule than JSON's shows in its quotes.
        let as_object = as_object.filter(|text| text.contains(&format!("\"{KEY}\"")));
        let as_text = || contents.iter().find_map(|c| call(c, json!(format!("{{\"{KEY}\": 1}}"))));
        let text_arguments = as_object.is_none();
        let written = as_object.or_else(as_text);
        Self {
            format: format_of(written.as_deref().unwrap_or_default()),
            shows_tools: shown.is_ok_and(|text| text.contains(TOOL)),
            shows_calls: written.is_some(),
            text_arguments: text_arguments && written.is_some(),
            takes_null,
            takes_both,
            takes_system,
            late_system,
            mid_system,
            alternates,
        }
    }

    /// Messages as the template wants them: arguments of calls as objects or texts, ids of calls
    /// short where the family insists on it, and everything in words where the template knows no
    /// tools. `tools` is what is left to be given to the template.
    pub fn adapt(&self, messages: Value, tools: Option<Value>) -> (Value, Option<Value>) {
        let Value::Array(mut list) = messages else { return (messages, tools) };
        list.iter_mut().for_each(|message| self.adapt_message(message));
        let (shown, told) = match self.shows_tools {
            true => (tools, None),
            false => (None, tools),
        };
        if let Some(tools) = told {
            let text = describe(&tools);
            match list.first_mut() {
                Some(first) if first["role"] == "system" => {
                    let own = first["content"].as_str().unwrap_or_default();
                    first["content"] = Value::from(format!("{own}\n\n{text}"));
                }
                _ => list.insert(0, json!({"role": "system", "content": text})),
            }
        }
        if self.shows_calls && !self.takes_both && !self.alternates {
            list = list.into_iter().flat_map(|message| self.apart(message)).collect();
        }
        (Value::Array(self.in_turns(list)), shown)
    }

    /// What was said and what was called in a message, each in its own.
    fn apart(&self, mut message: Value) -> impl Iterator<Item = Value> {
        let text = message["content"].as_str().filter(|text| !text.is_empty());
        let said = text.filter(|_| message.get("tool_calls").is_some_and(Value::is_array));
        let said = said.map(|text| json!({"role": "assistant", "content": text}));
        if said.is_some() {
            message["content"] = if self.takes_null { Value::Null } else { json!("") };
        }
        said.into_iter().chain([message])
    }

    /// Messages in the order that the template takes: what it has no place for becomes a part of a
    /// neighbour.
    fn in_turns(&self, list: Vec<Value>) -> Vec<Value> {
        let mut turns: Vec<Value> = Vec::with_capacity(list.len());
        let mut was_system = false; // the last one, which is the user's now
        for mut message in list {
            let leads = turns.iter().all(|turn| turn["role"] == "system");
            let role = |message: &Value| message["role"].as_str().unwrap_or_default().to_owned();
            let last = turns.last().map(role).unwrap_or_default();
            let shown = match last.as_str() {
                _ if leads => self.takes_system,
                "user" | "tool" => self.mid_system || self.late_system,
                _ => self.late_system,
            };
            let moved = message["role"] == "system" && !shown;
            if moved {
                message["role"] = Value::from("user");
            }
            let calls = |message: &Value| message.get("tool_calls").is_some();
            let calls = calls(&message) || turns.last().is_some_and(calls);
            let joins = match (last.as_str(), role(&message).as_str()) {
                ("system", "system") => !self.late_system,
                ("user", "user") => self.alternates || was_system,
                // Some print words or calls, not both.
                ("assistant", "assistant") => self.alternates && !calls,
                // A result is not counted, so the next turn would be the user's second one.
                ("tool", "user") => self.alternates,
                _ => false,
            };
            match turns.last_mut() {
                Some(last) if joins => append(last, &message),
                _ => turns.push(message),
            }
            was_system = moved;
        }
        turns
    }

    fn adapt_message(&self, message: &mut Value) {
        let mistral = matches!(self.format, CallFormat::MistralList | CallFormat::MistralArgs);
        if mistral && let Some(id) = message["tool_call_id"].as_str() {
            message["tool_call_id"] = Value::from(short_id(id));
        }
        if !self.shows_calls && message["role"] == "tool" {
            let content = message["content"].as_str().unwrap_or_default();
            let content = format!("<tool_response>\n{content}\n</tool_response>");
            *message = json!({"role": "user", "content": content});
            return;
        }
        if !self.takes_null && message["role"] == "assistant" && message["content"].is_null() {
            message["content"] = json!("");
        }
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        let Some(calls) = calls else { return };
        for call in calls.iter_mut() {
            if mistral && let Some(id) = call["id"].as_str() {
                call["id"] = Value::from(short_id(id));
            }
            let arguments = &mut call["function"]["arguments"];
            if !self.text_arguments
                && let Some(text) = arguments.as_str()
                && let Ok(object @ Value::Object(_)) = serde_json::from_str(text)
            {
                *arguments = object;
            }
        }
        if !self.shows_calls {
            let mut words = vec![message["content"].as_str().unwrap_or_default().to_owned()];
            words.retain(|text| !text.is_empty());
            let calls = message["tool_calls"].as_array().into_iter().flatten();
            words.extend(calls.map(|call| {
                let call = &call["function"];
                let (name, arguments) = (&call["name"], &call["arguments"]);
                format!(
                    "<tool_call>\n{{\"name\": {name}, \"arguments\": {arguments}}}\n</tool_call>"
                )
            }));
            *message = json!({"role": "assistant", "content": words.join("\n")});
        }
    }
}

/// Puts a text behind another one, with a line between.
fn append(last: &mut Value, next: &Value) {
    let text = |message: &Value| message["content"].as_str().unwrap_or_default().to_owned();
    let (before, after) = (text(last), text(next));
    if !after.is_empty() {
        let between = if before.is_empty() { "" } else { "\n\n" };
        last["content"] = Value::from(format!("{before}{between}{after}"));
    }
}

/// Nine letters and digits, as Mistral's templates insist.
fn short_id(id: &str) -> String {
    let letters: Vec<char> = id.chars().filter(char::is_ascii_alphanumeric).collect();
    let short: String = letters[letters.len().saturating_sub(9)..].iter().collect();
    format!("{short:0>9}")
}

/// What a model is told whose template has no words for tools.
fn describe(tools: &Value) -> String {
    let mut text =
        String::from("You may call these tools. Each is described by a line of JSON:\n<tools>\n");
    for tool in tools.as_array().into_iter().flatten() {
        text.push_str(&tool["function"].to_string());
        text.push('\n');
    }
    text.push_str(
        "</tools>\nTo call one, answer with nothing but:\n<tool_call>\n\
         {\"name\": \"the tool\", \"arguments\": {\"its\": \"arguments\"}}\n</tool_call>",
    );
    text
}

/// Told by what surrounds the known call.
fn format_of(written: &str) -> CallFormat {
    let after = written.split(CALLED).nth(1).unwrap_or_default();
    if written.contains("[TOOL_CALLS]") {
        return match after.contains(ARGS) || after.trim_start().starts_with('{') {
            true => CallFormat::MistralArgs,
            false => CallFormat::MistralList,
        };
    }
    match !written.contains("<tool_call>") && after.contains("\"parameters\"") {
        true => CallFormat::Llama,
        false => CallFormat::Hermes,
    }
}

/// A tool that may be called, as its grammar needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct CallRule {
    /// Its name.
    pub name: String,
    /// What its arguments must look like.
    pub arguments: Shape,
}

/// Rules for calls, with the rule `calls`, and the parts that they refer to.
pub fn call_rules(
    format: CallFormat,
    tools: &[CallRule],
    parallel: bool,
    vocabulary: &Vocabulary,
) -> Rules {
    let mark = |text: &str| vocabulary.mark(text);
    let (open, close) = (mark(format.open()), mark(format.close()));
    let one = |(i, tool): (usize, &CallRule)| {
        let name = Value::from(tool.name.as_str());
        match format {
            CallFormat::Hermes | CallFormat::MistralList => {
                let head = lark_string(&format!("{{\"name\": {name}, \"arguments\": "));
                format!("{head} @arguments_{i} \"}}\"")
            }
            CallFormat::Llama => {
                let head = lark_string(&format!("{{\"name\": {name}, \"parameters\": "));
                format!("{head} @arguments_{i} \"}}\"")
            }
            CallFormat::MistralArgs => {
                format!("{} {} @arguments_{i}", lark_string(&tool.name), mark(ARGS))
            }
        }
    };
    let any: Vec<String> = tools.iter().enumerate().map(one).collect();
    let more = |separator: &str, item: &str| match parallel {
        true => format!(" ({separator}{item})*"),
        false => String::new(),
    };
    let calls = match format {
        CallFormat::Hermes => format!(
            "calls: call{}\ncall: {open} (\"\\n\")? one (\"\\n\")? {close}",
            more("(\"\\n\")? ", "call")
        ),
        CallFormat::Llama => {
            let tag = vocabulary.special(PYTHON_TAG);
            format!("calls: {}one", tag.map_or(String::new(), |tag| format!("({tag})? ")))
        }
        CallFormat::MistralList => {
            format!("calls: {open} (\" \")? \"[\" one{} \"]\"", more("\", \" ", "one"))
        }
        CallFormat::MistralArgs => {
            format!("calls: call{}\ncall: {open} one", more("", "call"))
        }
    };
    let lark = format!("{calls}\none: {}", any.join(" | "));
    let parts = tools.iter().enumerate();
    let parts = parts.map(|(i, tool)| (format!("arguments_{i}"), tool.arguments.clone())).collect();
    Rules { lark, parts }
}

/// The texts with which a call begins in the middle of an answer.
pub fn triggers(format: CallFormat) -> Vec<Trigger> {
    let trigger = |text: &str, at_start| Trigger { text: text.to_owned(), at_start };
    match format {
        CallFormat::Llama => {
            vec![trigger(PYTHON_TAG, true), trigger("{\"name\": \"", true)]
        }
        other => vec![trigger(other.open(), false)],
    }
}
