//! Bodies of `/v1/messages`: what they become, and what is refused by name.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::request::{Asked, COUNT_TOKENS, MESSAGES, read};
use crate::pipeline::{Prompt, ToolChoice};
use crate::server::error::ApiError;
use crate::server::extract::Fields;

fn asked(body: Value) -> Result<Asked, ApiError> {
    read(Fields::parse(body.to_string().as_bytes())?, false)
}

fn with(name: &str, value: Value) -> Value {
    let hi = json!([{"role": "user", "content": "hi"}]);
    let mut body = json!({"model": "m", "max_tokens": 4096, "messages": hi});
    body[name] = value;
    body
}

fn chat(body: Value) -> (Value, Value) {
    match asked(body).unwrap_or_else(|error| panic!("{}", error.message)).request.prompt {
        Prompt::Chat { messages, template_kwargs } => (messages, Value::Object(template_kwargs)),
        other => panic!("{other:?}"),
    }
}

/// Parameters of `messages.create` in Anthropic's Python client 2.14.0, and those that only version
/// 2023-06-01 has.
const CREATE: &str = "max_tokens messages model cache_control container diagnostics inference_geo \
    metadata output_config service_tier speed stop_sequences stream system thinking tool_choice \
    tools user_profile_id workspace_id temperature top_p top_k";
/// The same of `messages.count_tokens`.
const COUNT: &str = "messages model cache_control output_config speed system thinking tool_choice \
    tools user_profile_id workspace_id";

#[test]
fn every_parameter_of_the_official_client_stands_in_its_table_once() {
    for (table, known) in [(MESSAGES, CREATE), (COUNT_TOKENS, COUNT)] {
        let names: HashSet<_> = table.iter().map(|field| field.name).collect();
        assert_eq!(names.len(), table.len(), "a name stands twice");
        for name in known.split_whitespace() {
            assert!(names.contains(name), "{name} is missing");
        }
    }
}

#[test]
fn blocks_become_messages_that_templates_know() {
    let cached = json!({"type": "ephemeral"});
    let mut body = with(
        "messages",
        json!([
            {"role": "user", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": "two", "cache_control": cached}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "bad",
                 "is_error": true},
                {"type": "text", "text": "go on"}]},
        ]),
    );
    body["system"] = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let call = json!({"id": "toolu_1", "type": "function",
                      "function": {"name": "f", "arguments": "{\"x\":1}"}});
    let expected = json!([
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm",
         "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: bad"},
        {"role": "user", "content": "go on"},
    ]);
    assert_eq!(chat(body).0, expected);
}

#[test]
fn calls_and_results_stand_in_turns_that_follow_each_other() {
    let uses = |ids: &[&str]| {
        let one = |id: &&str| json!({"type": "tool_use", "id": id, "name": "f", "input": {}});
        json!({"role": "assistant", "content": ids.iter().map(one).collect::<Vec<_>>()})
    };
    let results = |ids: &[&str]| {
        let one = |id: &&str| json!({"type": "tool_result", "tool_use_id": id});
        json!({"role": "user", "content": ids.iter().map(one).collect::<Vec<_>>()})
    };
    let (hi, ho) = (json!({"role": "user", "content": "hi"}), json!("ho"));
    let ho = json!({"role": "assistant", "content": ho});
    for talk in [
        json!([hi, uses(&["a", "b"]), results(&["b", "a"])]),
        json!([hi, uses(&["a"]), results(&["a"]), ho, hi]),
        // Turns of one role are one turn.
        json!([hi, uses(&["a"]), uses(&["b"]), results(&["b"]), results(&["a"]), hi]),
        json!([hi, uses(&["a"]), results(&["a"]), uses(&["a"]), results(&["a"])]),
    ] {
        let read = asked(with("messages", talk.clone()));
        assert!(read.is_ok(), "{talk}: {}", read.unwrap_err().message);
    }
    for (talk, param) in [
        (json!([hi, uses(&["a"]), hi]), "messages[1].content[0]"),
        (json!([hi, uses(&["a"]), hi, ho, results(&["a"])]), "messages[1].content[0]"),
        (json!([hi, uses(&["a", "b"]), results(&["a"])]), "messages[1].content[1]"),
        (
            json!([hi, uses(&["a"]), results(&["a"]), ho, results(&["a"])]),
            "messages[4].content[0].tool_use_id",
        ),
        (json!([hi, uses(&["a"]), results(&["a", "b"])]), "messages[2].content[1].tool_use_id"),
    ] {
        let error = asked(with("messages", talk.clone())).expect_err(param);
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{talk}");
    }
}

#[test]
fn fields_arrive() {
    let mut body = with("stop_sequences", json!(["a", "b", "c", "d", "e"]));
    for (name, value) in [
        ("temperature", json!(0.5)),
        ("top_p", json!(0.9)),
        ("top_k", json!(7)),
        ("stream", json!(true)),
        ("metadata", json!({"user_id": "ann"})),
        ("service_tier", json!("auto")),
    ] {
        body[name] = value;
    }
    let Asked { request, stream, .. } = asked(body).unwrap();
    assert!(stream && request.max_tokens == Some(4096) && request.stop.len() == 5);
    let s = request.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k), (Some(0.5), Some(0.9), Some(7)));
}

#[test]
fn thinking_is_a_variable_of_the_template() {
    let kwargs = |thinking: Value| chat(with("thinking", thinking)).1;
    let switched = |on: bool| json!({"enable_thinking": on, "thinking": on});
    assert_eq!(kwargs(json!(null)), switched(false));
    assert_eq!(kwargs(json!({"type": "disabled"})), switched(false));
    assert_eq!(kwargs(json!({"type": "adaptive"})), json!({}));
    let enabled = json!({"type": "enabled", "budget_tokens": 2048});
    assert_eq!(kwargs(enabled.clone()), switched(true));
    let thinking = asked(with("thinking", enabled)).unwrap().thinking;
    assert!(thinking.insists && thinking.shown);
    let omitted = json!({"type": "adaptive", "display": "omitted"});
    assert!(!asked(with("thinking", omitted)).unwrap().thinking.shown);
}

#[test]
fn a_choice_of_tools_is_kept() {
    let tool = |name: &str| json!({"name": name, "input_schema": {"type": "object"}});
    let tools = |choice: Value| {
        let mut body = with("tools", json!([tool("f"), tool("g")]));
        body["tool_choice"] = choice;
        asked(body).unwrap().request.tools.unwrap()
    };
    assert_eq!(tools(json!(null)).choice, ToolChoice::Auto);
    assert_eq!(tools(json!({"type": "none"})).choice, ToolChoice::None);
    let any = tools(json!({"type": "any", "disable_parallel_tool_use": true}));
    assert_eq!((any.choice, any.parallel), (ToolChoice::Required, false));
    let named = tools(json!({"type": "tool", "name": "g"}));
    assert_eq!(named.choice, ToolChoice::Required);
    let callable: Vec<_> = named.list.iter().map(|tool| tool.callable).collect();
    assert_eq!(callable, [false, true]);
    assert_eq!(named.list[1].param, "tools[1].input_schema");
}

#[test]
fn what_is_wrong_is_named() {
    let user = |content: Value| with("messages", json!([{"role": "user", "content": content}]));
    let tool = |tool: Value| with("tools", json!([tool]));
    let object = json!({"type": "object"});
    let image = json!([{"type": "text", "text": "a"}, {"type": "image", "source": {}}]);
    let result = json!([{"type": "tool_result", "tool_use_id": "toolu_9"}]);
    let cases = [
        (with("tempature", json!(1)), "tempature"),
        (with("model", json!(null)), "model"),
        (with("max_tokens", json!(null)), "max_tokens"),
        (with("max_tokens", json!(0)), "max_tokens"),
        (with("max_tokens", json!("9")), "max_tokens"),
        (with("temperature", json!(1.5)), "temperature"),
        (with("stop_sequences", json!("a")), "stop_sequences"),
        (with("stop_sequences", json!([" "])), "stop_sequences[0]"),
        (with("metadata", json!({"user": "a"})), "metadata.user"),
        (with("container", json!("c")), "container"),
        (with("messages", json!(null)), "messages"),
        (with("messages", json!([])), "messages"),
        (with("messages", json!({})), "messages"),
        (with("messages", json!([{"role": "tool", "content": "a"}])), "messages[0].role"),
        (with("messages", json!([{"content": "a"}])), "messages[0].role"),
        (with("messages", json!([{"role": "user"}])), "messages[0].content"),
        (with("messages", json!([{"role": "user", "content": "a", "x": 1}])), "messages[0].x"),
        (with("messages", json!([{"role": "assistant", "content": "a"}])), "messages[0]"),
        (user(json!([])), "messages[0].content"),
        (user(json!(5)), "messages[0].content"),
        (user(image), "messages[0].content[1]"),
        (user(result), "messages[0].content[0].tool_use_id"),
        (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
        (with("system", json!([{"type": "image"}])), "system[0]"),
        (with("thinking", json!({"type": "enabled"})), "thinking.budget_tokens"),
        (
            with("thinking", json!({"type": "enabled", "budget_tokens": 4096})),
            "thinking.budget_tokens",
        ),
        (with("thinking", json!({"type": "some"})), "thinking.type"),
        (tool(json!({"name": "f"})), "tools[0].input_schema"),
        (tool(json!({"input_schema": object})), "tools[0].name"),
        (tool(json!({"name": "a b", "input_schema": object})), "tools[0].name"),
        (tool(json!({"type": "web_search_20250305", "name": "web_search"})), "tools[0].type"),
        (with("tool_choice", json!({"type": "any"})), "tool_choice"),
        (with("tool_choice", json!("auto")), "tool_choice"),
        (with("output_config", json!({"effort": "huge"})), "output_config.effort"),
        (with("output_config", json!({"format": {"type": "xml"}})), "output_config.format.type"),
    ];
    for (body, param) in cases {
        let error = asked(body.clone()).expect_err(param);
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}");
        assert!(error.message.contains(param.split('[').next().unwrap()), "{}", error.message);
    }
}
