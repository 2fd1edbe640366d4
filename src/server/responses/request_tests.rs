//! The body of a response against its table, and against the chat that it becomes.

use std::collections::HashSet;

use super::*;
use crate::pipeline::Prompt;

/// Property names of `CreateResponse`, its parents included, in OpenAI's specification 2.3.0 of
/// 2026-08-21.
const OPENAI: &str = "metadata top_logprobs temperature top_p user safety_identifier \
    prompt_cache_key prompt_cache_retention prompt_cache_options previous_response_id model \
    background max_tool_calls text tools tool_choice prompt service_tier truncation reasoning \
    input include parallel_tool_calls store instructions moderation stream stream_options \
    conversation context_management max_output_tokens";

fn draft(body: Value) -> Result<Draft, ApiError> {
    read(Fields::parse(body.to_string().as_bytes())?, false)
}

fn with(name: &str, value: Value) -> Value {
    let mut body = json!({"model": "m", "input": "hi"});
    body[name] = value;
    body
}

fn call(body: Value) -> Result<Call, ApiError> {
    let draft = draft(body)?;
    draft.call(&draft.input)
}

#[test]
fn every_field_of_the_specification_stands_in_the_table_once() {
    let names: Vec<_> = RESPONSES.iter().map(|field| field.name).collect();
    let unique: HashSet<_> = names.iter().copied().collect();
    assert_eq!(unique.len(), names.len());
    for name in OPENAI.split_whitespace() {
        assert!(unique.contains(name), "{name}");
    }
}

#[test]
fn a_bare_request_is_a_chat_with_one_message_and_is_stored() {
    let draft = draft(json!({"model": "m", "input": "hi", "instructions": "Be."})).unwrap();
    assert!(draft.store && !draft.background && !draft.stream);
    assert_eq!(draft.included, Included::default());
    let call = draft.call(&draft.input).unwrap();
    let Prompt::Chat { messages, .. } = &call.requests[0].prompt else { panic!("no chat") };
    let expected = json!([{"role": "system", "content": "Be."}, {"role": "user", "content": "hi"}]);
    assert_eq!(*messages, expected);
    assert_eq!(draft.echo["text"], json!({"format": {"type": "text"}, "verbosity": "medium"}));
    assert_eq!((&draft.echo["tools"], &draft.echo["tool_choice"]), (&json!([]), &json!("auto")));
}

#[test]
fn tools_and_formats_arrive_in_the_chat() {
    let tool = json!({"type": "function", "name": "f", "description": null, "strict": true,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}},
                       "required": ["a"], "additionalProperties": false}});
    let bare = json!([{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}]);
    let whole = json!([{"type": "function", "name": "f", "description": null, "parameters": null,
                        "strict": null}, {"type": "custom", "name": "g"}]);
    assert_eq!(draft(with("tools", bare)).unwrap().echo["tools"], whole);
    let mut body = with("tools", json!([tool]));
    body["tool_choice"] = json!({"type": "function", "name": "f"});
    let request = call(body.clone()).unwrap().requests.remove(0);
    assert_eq!(request.tools.unwrap().list[0].name, "f");
    body["tool_choice"] = json!({"type": "allowed_tools", "mode": "auto",
                                 "tools": [{"type": "function", "name": "f"}]});
    assert!(call(body.clone()).is_ok());
    for (choice, param) in [
        (json!({"type": "function", "name": "g"}), "tool_choice.name"),
        (json!({"type": "custom", "name": "f"}), "tool_choice.name"),
        (json!({"type": "allowed_tools", "mode": "any", "tools": []}), "tool_choice.mode"),
    ] {
        body["tool_choice"] = choice;
        assert_eq!(call(body.clone()).unwrap_err().param.as_deref(), Some(param));
    }
    let schema = json!({"type": "object", "properties": {}, "additionalProperties": false});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    let request = call(with("text", json!({"format": format}))).unwrap().requests.remove(0);
    assert!(request.format.is_some());
}

#[test]
fn what_is_included_is_known_by_its_name() {
    let mut body = with("include", json!(["message.output_text.logprobs"]));
    assert_eq!(call(body.clone()).unwrap().requests[0].logprobs, Some(0));
    body["top_logprobs"] = json!(3);
    assert_eq!(call(body).unwrap().requests[0].logprobs, Some(3));
    assert!(draft(with("top_logprobs", json!(2))).unwrap().included.logprobs);
    let sealed = draft(with("include", json!(["reasoning.encrypted_content"]))).unwrap();
    assert_eq!(sealed.included, Included { logprobs: false, sealed: true });
}

#[test]
fn wrong_fields_are_refused_by_the_names_that_the_client_wrote() {
    let function = |name: Value| json!([{"type": "function", "name": name}]);
    for (name, value, param) in [
        ("model", json!(""), "model"),
        ("input", json!([]), "input"),
        ("input", json!(3), "input"),
        ("input", json!([{"role": "robot", "content": "x"}]), "input[0].role"),
        ("temperature", json!(3), "temperature"),
        ("max_output_tokens", json!(15), "max_output_tokens"),
        ("top_logprobs", json!(21), "top_logprobs"),
        ("include", json!(["everything"]), "include[0]"),
        ("tools", json!([{"type": "file_search"}]), "tools[0].type"),
        ("tools", function(json!("a b")), "tools[0].name"),
        ("tools", json!("f"), "tools"),
        ("text", json!({"format": {"type": "xml"}}), "text.format.type"),
        ("text", json!({"format": {"type": "json_schema"}}), "text.format.name"),
        ("text", json!({"shape": 1}), "text.shape"),
        ("reasoning", json!({"effort": "huge"}), "reasoning.effort"),
        ("reasoning", json!({"speed": 1}), "reasoning.speed"),
        ("stream_options", json!({"include_usage": true}), "stream_options.include_usage"),
        ("conversation", json!(3), "conversation"),
        ("conversation", json!({}), "conversation.id"),
        ("conversation", json!({"id": 5}), "conversation.id"),
        ("stream_options", json!({}), "stream_options"),
        ("truncation", json!("some"), "truncation"),
        ("service_tier", json!("slow"), "service_tier"),
        ("max_tool_calls", json!("two"), "max_tool_calls"),
        ("user", json!(1), "user"),
        ("text", json!({"verbosity": "loud"}), "text.verbosity"),
        ("reasoning", json!({"summary": true}), "reasoning.summary"),
        ("prompt", json!({"id": "pmpt_1"}), "prompt"),
        ("metadata", json!({"k": 1}), "metadata.k"),
        ("messages", json!([]), "messages"),
        ("n", json!(2), "n"),
    ] {
        let error = call(with(name, value.clone())).unwrap_err();
        assert_eq!(error.status, 400, "{name}: {value}");
        assert_eq!(error.param.as_deref(), Some(param), "{name}: {value}");
    }
    let mut both = with("previous_response_id", json!("resp_1"));
    both["conversation"] = json!("conv_1");
    assert_eq!(draft(both).unwrap_err().param.as_deref(), Some("previous_response_id"));
    let mut unstored = with("background", json!(true));
    unstored["store"] = json!(false);
    assert_eq!(draft(unstored).unwrap_err().param.as_deref(), Some("background"));
    let missing = draft(json!({"model": "m"})).unwrap_err();
    assert_eq!(missing.param.as_deref(), Some("input"));
    assert!(draft(json!({"model": "m", "previous_response_id": "resp_1"})).is_ok());
}
