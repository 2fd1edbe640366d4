//! Calls of tools in the words of one model: the grammar that holds it to them.

use serde_json::Value;

use super::grammar::{Rules, Shape, Trigger, Vocabulary, lark_string};
use super::output::{ARGS, CallFormat, PYTHON_TAG};

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
