//! `functions` and `function_call`: what tools were called before they were tools.
//!
//! Only the edge knows them. A body is read to the house's own tools, of which one may be called in
//! an answer, and the choices of the answer are put into the old words on their way out; what is
//! stored is what was sent. Deliberately absent: everything between, which knows tools only.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::extract::{Fields, kind};
use super::tools::{self, TOOLS_MAX};
use crate::pipeline::{Tool, ToolChoice, Tools};

const LIST: &str = "functions";
const CALL: &str = "function_call";

/// Reads the two fields. `None`: there are no functions, and `tools` may be read.
pub(super) fn read(body: &mut Fields, lenient: bool) -> Result<Option<Tools>, ApiError> {
    let choice = body.value(CALL);
    let Some(list) = body.value(LIST) else {
        return match choice {
            None => Ok(None),
            Some(Value::String(word)) if word == "none" || word == "auto" => Ok(None),
            Some(_) => Err(ApiError::invalid(
                CALL,
                "Invalid value for 'function_call': it is only allowed when 'functions' are given.",
            )),
        };
    };
    // One call at most is what an answer has a place for.
    let parallel = body.bool("parallel_tool_calls")?.unwrap_or(false);
    if let Some(new) = ["tools", "tool_choice"].into_iter().find(|new| body.value(new).is_some()) {
        let message = format!("Invalid '{LIST}': it cannot be used beside '{new}'.");
        return Err(ApiError::invalid(LIST, message));
    }
    if parallel {
        let message = "Invalid 'parallel_tool_calls': an answer has one call of 'functions'.";
        return Err(ApiError::invalid("parallel_tool_calls", message));
    }
    let mut tools = Tools { list: functions(list, lenient)?, ..Tools::of(LIST) };
    match choice {
        None => {}
        Some(Value::String(word)) if word == "auto" => {}
        Some(Value::String(word)) if word == "none" => tools.choice = ToolChoice::None,
        Some(Value::Object(named)) => choose(&mut tools, named)?,
        Some(Value::String(other)) => {
            let message =
                format!("Invalid value: '{other}'. Supported values are: 'none' and 'auto'.");
            return Err(ApiError::invalid(CALL, message));
        }
        Some(other) => {
            return Err(ApiError::wrong_type(CALL, "a string or an object", kind(&other)));
        }
    }
    Ok(Some(tools))
}

fn functions(list: Value, lenient: bool) -> Result<Vec<Tool>, ApiError> {
    let Value::Array(list) = list else {
        return Err(ApiError::wrong_type(LIST, "an array", kind(&list)));
    };
    if list.is_empty() || list.len() > TOOLS_MAX {
        let message = format!(
            "Invalid '{LIST}': expected 1 to {TOOLS_MAX} functions, but got {}.",
            list.len()
        );
        return Err(ApiError::invalid(LIST, message));
    }
    let one = |(i, value): (usize, Value)| {
        let path = format!("{LIST}[{i}]");
        match value {
            Value::Object(map) => tools::function(Fields::within(&path, map), lenient),
            other => Err(ApiError::wrong_type(&path, "an object", kind(&other))),
        }
    };
    list.into_iter().enumerate().map(one).collect()
}

/// `{"name": ...}`: this one, whatever was said.
fn choose(tools: &mut Tools, named: Map<String, Value>) -> Result<(), ApiError> {
    let mut named = Fields::within(CALL, named);
    let name = tools::required(&mut named, "name")?;
    if !tools.list.iter().any(|tool| tool.name == name) {
        let message = format!("Function '{name}' not found in '{LIST}'.");
        return Err(ApiError::invalid(&named.at("name"), message));
    }
    tools.list.iter_mut().for_each(|tool| tool.callable = tool.name == name);
    tools.choice = ToolChoice::Required;
    Ok(())
}

/// Puts the messages of a body that speak of functions into today's words: a call is the only one
/// of `tool_calls`, and a result answers the call before it. What is no list of objects is left to
/// whoever reads the messages.
pub(super) fn translate(messages: &mut Option<Value>) -> Result<(), ApiError> {
    let Some(Value::Array(list)) = messages else { return Ok(()) };
    let mut last = Value::Null;
    for (i, message) in list.iter_mut().enumerate() {
        let Value::Object(map) = message else { continue };
        let path = format!("messages[{i}]");
        if map.get("role").is_some_and(|role| role == "assistant") {
            // An answer of today is sent back with a null in its place.
            if let Some(call) = map.shift_remove(CALL).filter(|call| !call.is_null()) {
                last = json!(format!("call_{i}"));
                let call = json!({"id": last, "type": "function", "function": call});
                self::call(&path, map, call)?;
            }
        } else if map.get("role").is_some_and(|role| role == "function") {
            let name = Fields::within(&path, map.clone()).string("name")?;
            name.ok_or_else(|| ApiError::missing(&format!("{path}.name")))?;
            map.insert("role".to_owned(), json!("tool"));
            let id = if last.is_null() { json!(format!("call_{i}")) } else { last.clone() };
            map.insert("tool_call_id".to_owned(), id);
            // A function may have had nothing to say.
            if map.get("content").is_some_and(Value::is_null) {
                map.insert("content".to_owned(), json!(""));
            }
        }
    }
    Ok(())
}

fn call(path: &str, message: &mut Map<String, Value>, call: Value) -> Result<(), ApiError> {
    let path = format!("{path}.{CALL}");
    if message.get("tool_calls").is_some_and(|calls| !calls.is_null()) {
        let text = format!("Invalid '{path}': it cannot be used beside 'tool_calls'.");
        return Err(ApiError::invalid(&path, text));
    }
    let function = &call["function"];
    if !function.is_object() {
        return Err(ApiError::wrong_type(&path, "an object", kind(function)));
    }
    for name in ["name", "arguments"] {
        let value = &function[name];
        if !value.is_string() {
            return Err(ApiError::wrong_type(&format!("{path}.{name}"), "a string", kind(value)));
        }
    }
    message.insert("tool_calls".to_owned(), json!([call]));
    Ok(())
}

/// A choice of an answer, whole or a part of one, in the old words.
pub(super) fn rename(choice: &mut Value) {
    for part in ["message", "delta"] {
        let Some(said) = choice.get_mut(part).and_then(Value::as_object_mut) else { continue };
        if let Some(mut calls) = said.shift_remove("tool_calls") {
            said.insert(CALL.to_owned(), calls[0]["function"].take());
        }
    }
    if choice["finish_reason"] == "tool_calls" {
        choice["finish_reason"] = json!(CALL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_one(body: Value) -> Result<Option<Tools>, ApiError> {
        read(&mut Fields::parse(body.to_string().as_bytes())?, false)
    }

    fn with(name: &str, value: Value) -> Value {
        json!({"functions": [{"name": "f", "parameters": {}}, {"name": "g"}], name: value})
    }

    #[test]
    fn functions_are_tools_of_which_one_is_called() {
        for (choice, expected, callable) in [
            (json!(null), ToolChoice::Auto, [true, true]),
            (json!("auto"), ToolChoice::Auto, [true, true]),
            (json!("none"), ToolChoice::None, [true, true]),
            (json!({"name": "g"}), ToolChoice::Required, [false, true]),
        ] {
            let tools = read_one(with("function_call", choice)).unwrap().unwrap();
            let can: Vec<bool> = tools.list.iter().map(|tool| tool.callable).collect();
            assert_eq!((tools.choice, tools.parallel), (expected, false));
            assert_eq!(can, callable);
            assert_eq!(tools.list[0].param, "functions[0].parameters");
        }
        for nothing in [json!({}), json!({"functions": null, "function_call": "auto"})] {
            assert_eq!(read_one(nothing).unwrap(), None);
        }
    }

    #[test]
    fn bad_functions_are_refused_by_path() {
        let many: Vec<Value> = (0..129).map(|_| json!({"name": "f"})).collect();
        for (body, param) in [
            (json!({"functions": {}}), "functions"),
            (json!({"functions": []}), "functions"),
            (json!({"functions": many}), "functions"),
            (json!({"functions": ["f"]}), "functions[0]"),
            (json!({"functions": [{}]}), "functions[0].name"),
            (json!({"functions": [{"name": "a b"}]}), "functions[0].name"),
            (json!({"functions": [{"name": "f", "parameters": []}]}), "functions[0].parameters"),
            (json!({"functions": [{"name": "f", "type": "x"}]}), "functions[0].type"),
            (json!({"function_call": {"name": "f"}}), "function_call"),
            (with("function_call", json!("required")), "function_call"),
            (with("function_call", json!(1)), "function_call"),
            (with("function_call", json!({})), "function_call.name"),
            (with("function_call", json!({"name": "h"})), "function_call.name"),
            (with("tools", json!([])), "functions"),
            (with("tool_choice", json!("auto")), "functions"),
            (with("parallel_tool_calls", json!(true)), "parallel_tool_calls"),
        ] {
            let error = read_one(body.clone()).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)));
        }
    }

    #[test]
    fn messages_come_into_todays_words() {
        let function = json!({"name": "f", "arguments": "{}"});
        let mut messages = Some(json!([
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": null, "function_call": function},
            {"role": "function", "name": "f", "content": null},
            {"role": "assistant", "content": "y", "function_call": null},
        ]));
        translate(&mut messages).unwrap();
        let call = json!({"id": "call_1", "type": "function", "function": function});
        let expected = json!([
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": "", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "y"},
        ]);
        assert_eq!(messages, Some(expected));
        for (message, param) in [
            (json!({"role": "function", "content": "x"}), "messages[0].name"),
            (json!({"role": "function", "name": 1, "content": "x"}), "messages[0].name"),
            (json!({"role": "assistant", "function_call": "f"}), "messages[0].function_call"),
            (json!({"role": "assistant", "function_call": {}}), "messages[0].function_call.name"),
            (
                json!({"role": "assistant", "function_call": {"name": "f", "arguments": {}}}),
                "messages[0].function_call.arguments",
            ),
            (
                json!({"role": "assistant", "function_call": function, "tool_calls": []}),
                "messages[0].function_call",
            ),
        ] {
            let error = translate(&mut Some(json!([message]))).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
        }
    }

    #[test]
    fn a_choice_goes_out_in_the_old_words() {
        let cases = [
            (
                json!({"message": {"content": null, "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                    "finish_reason": "tool_calls"}),
                json!({"message": {"content": null,
                       "function_call": {"name": "f", "arguments": "{}"}},
                       "finish_reason": "function_call"}),
            ),
            (
                json!({"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
                       "finish_reason": null}),
                json!({"delta": {"function_call": {"arguments": "{"}}, "finish_reason": null}),
            ),
            (
                json!({"delta": {"content": "x"}, "finish_reason": "stop"}),
                json!({"delta": {"content": "x"}, "finish_reason": "stop"}),
            ),
        ];
        for (mut choice, expected) in cases {
            rename(&mut choice);
            assert_eq!(choice, expected);
        }
    }
}
