//! Tools in the words of one model: how its template shows them, how it writes a call, and the
//! grammar that holds it to that.
//!
//! What a template can do is found out by rendering a conversation with a known call. A model whose
//! template knows no tools is told of them in a system message, and asked for calls in the format
//! of Hermes; so is one whose own format is none of [`CallFormat`]. Where a template has no words
//! for a system message (Gemma), its text stands before that of the user; where two messages of the
//! user may not follow each other, they become one.

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
    /// It shows a system message.
    pub takes_system: bool,
    /// It refuses two messages of the user in a row.
    pub alternates: bool,
}

const TOOL: &str = "hearthtool";
const CALLED: &str = "hearthcall";
const KEY: &str = "hearthkey";
const SYSTEM: &str = "hearthsystem";

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
        let takes_system = match written(json!([user])) {
            Ok(_) => written(json!([system, user])).is_ok_and(|text| text.contains(SYSTEM)),
            Err(_) => true, // it is another thing that it refuses
        };
        let alternates = written(json!([user])).is_ok() && written(json!([user, user])).is_err();
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
            takes_system,
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
        let is_system = |message: &Value| message["role"] == "system";
        if !self.takes_system && list.iter().any(is_system) {
            list.iter_mut().filter(|message| is_system(message)).for_each(|message| {
                message["role"] = Value::from("user");
            });
            list = joined(list);
        } else if self.alternates {
            list = joined(list);
        }
        (Value::Array(list), shown)
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
        let Some(calls) = message["tool_calls"].as_array_mut() else { return };
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

/// Texts of the user that follow each other, as one message.
fn joined(list: Vec<Value>) -> Vec<Value> {
    let mut all: Vec<Value> = Vec::with_capacity(list.len());
    let text = |message: &Value| match message["role"] == "user" {
        true => message["content"].as_str().map(str::to_owned),
        false => None,
    };
    for message in list {
        match (all.last_mut(), text(&message)) {
            (Some(last), Some(next)) if text(last).is_some() => {
                let before = text(last).unwrap_or_default();
                last["content"] = Value::from(format!("{before}\n\n{next}"));
            }
            _ => all.push(message),
        }
    }
    all
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
