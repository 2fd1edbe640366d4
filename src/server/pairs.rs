//! Calls of tools and their results belong together: a result answers a call before it, and a call
//! has its result before anything else is said.
//!
//! Looked at is what clients send, by the ids that they give. What is malformed is left to whoever
//! reads it, and calls in the words of `functions` have no ids. Deliberately absent: Anthropic's
//! messages, which know their own ids, and Ollama's, which have none.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::error::ApiError;

/// Ids that a message lists, at most.
const NAMED_MAX: usize = 8;

/// The `messages` of a chat.
///
/// # Errors
/// A result answers no call of the message of the assistant before it, or a call has no result
/// before the next message that is none.
pub(super) fn of_chat(messages: Option<&Value>) -> Result<(), ApiError> {
    let mut open = Open::default();
    for (i, message) in messages.and_then(Value::as_array).into_iter().flatten().enumerate() {
        if message["role"] == "tool" {
            open.result(i, message["tool_call_id"].as_str())?;
        } else {
            open.end(&format!("messages[{i}].role"))?;
            open = Open::of(i, message);
        }
    }
    open.end("messages")
}

/// Calls of one message, and which of them have a result.
#[derive(Default)]
struct Open<'a> {
    at: usize,
    ids: Vec<&'a str>,
    answered: HashSet<&'a str>,
    /// Calls without an id, of which any result may be.
    unnamed: usize,
}

impl<'a> Open<'a> {
    fn of(at: usize, message: &'a Value) -> Self {
        let calls = message["tool_calls"].as_array().filter(|_| message["role"] == "assistant");
        let calls = calls.map(Vec::as_slice).unwrap_or_default();
        let ids: Vec<_> = calls.iter().filter_map(|call| call["id"].as_str()).collect();
        Self { at, unnamed: calls.len() - ids.len(), ids, answered: HashSet::new() }
    }

    fn result(&mut self, i: usize, id: Option<&'a str>) -> Result<(), ApiError> {
        let Some(id) = id else { return Ok(()) };
        if self.ids.contains(&id) {
            self.answered.insert(id);
            return Ok(());
        }
        if self.unnamed > 0 {
            self.unnamed -= 1;
            return Ok(());
        }
        let path = format!("messages[{i}].role");
        let message = format!(
            "Invalid '{path}': a message with the role 'tool' must be a response to one of the \
             'tool_calls' of the assistant's message before it, and none of them has the id '{id}'."
        );
        Err(ApiError::invalid(&path, message))
    }

    /// No more results come; `param` is what comes instead.
    fn end(&self, param: &str) -> Result<(), ApiError> {
        let missing = self.ids.iter().filter(|id| !self.answered.contains(*id));
        let missing: Vec<_> = missing.copied().take(NAMED_MAX).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let message = format!(
            "Invalid '{param}': a message of the assistant with 'tool_calls' must be followed by a \
             message with the role 'tool' for each 'tool_call_id', and of 'messages[{}]' these had \
             no response: {}.",
            self.at,
            missing.join(", ")
        );
        Err(ApiError::invalid(param, message))
    }
}

/// The items that a response reads, those of before and those of its request.
///
/// # Errors
/// An output is that of no call before it, or a call has no output. A call that was cut short may
/// have one and needs none.
pub(super) fn of_items(items: &[Value]) -> Result<(), ApiError> {
    let mut calls: Vec<&str> = Vec::new();
    let mut settled: HashMap<&str, bool> = HashMap::new();
    for item in items {
        let id = item["call_id"].as_str().unwrap_or_default();
        match item["type"].as_str() {
            Some("function_call" | "custom_tool_call") => {
                calls.push(id);
                settled.insert(id, item["status"] == "incomplete");
            }
            Some("function_call_output" | "custom_tool_call_output") => {
                let Some(settled) = settled.get_mut(id) else {
                    let message =
                        format!("No tool call found for function call output with call_id {id}.");
                    return Err(ApiError::invalid("input", message));
                };
                *settled = true;
            }
            _ => {}
        }
    }
    match calls.into_iter().find(|id| settled.get(id) == Some(&false)) {
        None => Ok(()),
        Some(id) => {
            let message = format!("No tool output found for function call {id}.");
            Err(ApiError::invalid("input", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(role: &str) -> Value {
        json!({"role": role, "content": "x"})
    }

    fn calls(ids: &[&str]) -> Value {
        let call = |id: &&str| {
            let function = json!({"name": "f", "arguments": "{}"});
            json!({"id": id, "type": "function", "function": function})
        };
        json!({"role": "assistant", "tool_calls": ids.iter().map(call).collect::<Vec<_>>()})
    }

    fn result(id: &str) -> Value {
        json!({"role": "tool", "tool_call_id": id, "content": "x"})
    }

    #[test]
    fn calls_of_a_chat_have_their_results_in_any_order() {
        let mut unnamed = calls(&["a"]);
        unnamed["tool_calls"][0].as_object_mut().unwrap().remove("id");
        for talk in [
            json!([said("user")]),
            json!([said("user"), calls(&["a"]), result("a")]),
            json!([calls(&["a", "b"]), result("b"), result("a"), said("assistant"), said("user")]),
            json!([calls(&["a"]), result("a"), calls(&["b"]), result("b"), calls(&[])]),
            json!([calls(&["a"]), result("a"), calls(&["a"]), result("a")]),
            json!([unnamed, result("x"), said("user")]),
            // In the words of `functions` nothing is asked of them.
            json!([said("function"), {"role": "assistant", "function_call": {}}, said("user")]),
        ] {
            let right = of_chat(Some(&talk));
            assert!(right.is_ok(), "{talk}: {}", right.unwrap_err().message);
        }
        assert!(of_chat(None).is_ok() && of_chat(Some(&json!("hi"))).is_ok());
    }

    #[test]
    fn a_result_without_its_call_is_refused_and_so_is_the_reverse() {
        for (talk, param, id) in [
            (json!([said("user"), result("a")]), "messages[1].role", "'a'"),
            (json!([said("user"), calls(&["a"]), result("b")]), "messages[2].role", "'b'"),
            // The call is of an earlier turn.
            (
                json!([calls(&["a"]), result("a"), said("user"), result("a")]),
                "messages[3].role",
                "'a'",
            ),
            (json!([calls(&["a"]), said("user"), result("a")]), "messages[1].role", ": a."),
            (
                json!([calls(&["a", "b", "c"]), result("b"), said("user")]),
                "messages[2].role",
                ": a, c.",
            ),
            (json!([calls(&["a"]), calls(&["b"]), result("b")]), "messages[1].role", ": a."),
            (json!([said("user"), calls(&["a", "b"]), result("a")]), "messages", ": b."),
        ] {
            let error = of_chat(Some(&talk)).expect_err("a refusal");
            assert_eq!((error.status.as_u16(), error.kind), (400, "invalid_request_error"));
            assert_eq!(error.param.as_deref(), Some(param), "{talk}");
            assert!(error.message.contains(id), "{}", error.message);
        }
    }

    #[test]
    fn items_are_held_to_the_same() {
        let call = |id: &str, status: &str| {
            let (kind, name) = ("function_call", "f");
            json!({"type": kind, "call_id": id, "name": name, "arguments": "{}", "status": status})
        };
        let done = |id: &str| call(id, "completed");
        let output = |id: &str| json!({"type": "function_call_output", "call_id": id});
        let custom = json!({"type": "custom_tool_call", "call_id": "c"});
        let of_it = json!({"type": "custom_tool_call_output", "call_id": "c"});
        for items in [
            vec![said("user")],
            vec![done("a"), done("b"), output("b"), output("a"), said("user")],
            vec![done("a"), output("a"), done("a"), output("a"), custom, of_it],
            vec![call("a", "incomplete"), said("user")],
            vec![call("a", "incomplete"), output("a")],
        ] {
            assert!(of_items(&items).is_ok(), "{items:?}");
        }
        for (items, message) in [
            (
                vec![said("user"), output("a")],
                "No tool call found for function call output with call_id a.",
            ),
            (
                vec![output("a"), done("a")],
                "No tool call found for function call output with call_id a.",
            ),
            (vec![done("a"), done("b"), output("b")], "No tool output found for function call a."),
        ] {
            let error = of_items(&items).expect_err("a refusal");
            assert_eq!((error.param.as_deref(), error.message.as_str()), (Some("input"), message));
        }
    }
}
