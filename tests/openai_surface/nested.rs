//! Members of objects within a body: what nobody knows is refused by its path, as beside them.

use serde_json::{Value, json};

use crate::fixture::{MODEL, Options, start, with_model};

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";

fn called(call: Value) -> Value {
    let said = json!({"role": "user", "content": "Hi"});
    let result = json!({"role": "tool", "tool_call_id": "c", "content": "x"});
    json!({"messages": [said, {"role": "assistant", "tool_calls": [call]}, result]})
}

fn part(part: Value) -> Value {
    json!({"messages": [{"role": "user", "content": [part]}]})
}

fn chosen(choice: Value) -> Value {
    let function = json!({"name": "f", "parameters": {"type": "object", "properties": {}}});
    json!({"tools": [{"type": "function", "function": function}], "tool_choice": choice})
}

fn chats() -> Vec<(Value, &'static str)> {
    let function = json!({"name": "f", "arguments": "{}"});
    let odd = json!({"name": "f", "arguments": "{}", "odd": 1});
    let name = json!({"name": "f"});
    let tool = json!({"type": "function", "function": name});
    let prediction = json!([{"type": "text", "text": "a", "odd": 1}]);
    vec![
        (part(json!({"type": "text", "text": "a", "odd": 1})), "messages[0].content[0].odd"),
        (
            called(json!({"id": "c", "type": "function", "function": function, "odd": 1})),
            "messages[1].tool_calls[0].odd",
        ),
        (
            called(json!({"id": "c", "type": "function", "function": odd})),
            "messages[1].tool_calls[0].function.odd",
        ),
        (
            called(json!({"id": "c", "type": "banana", "function": function})),
            "messages[1].tool_calls[0].type",
        ),
        (
            called(json!({"id": 5, "type": "function", "function": function})),
            "messages[1].tool_calls[0].id",
        ),
        (called(json!("c")), "messages[1].tool_calls[0]"),
        (chosen(json!({"type": "function", "function": name, "odd": 1})), "tool_choice.odd"),
        (
            chosen(json!({"type": "function", "function": {"name": "f", "odd": 1}})),
            "tool_choice.function.odd",
        ),
        (
            chosen(json!({"type": "allowed_tools", "allowed_tools":
                {"mode": "auto", "tools": [tool], "odd": 1}})),
            "tool_choice.allowed_tools.odd",
        ),
        (
            json!({"prediction": {"type": "content", "content": prediction}}),
            "prediction.content[0].odd",
        ),
        (
            json!({"tools": [{"type": "custom", "custom":
                {"name": "f", "format": {"type": "text", "odd": 1}}}]}),
            "tools[0].custom.format.odd",
        ),
    ]
}

fn responses() -> Vec<(Value, &'static str)> {
    let said = |content: Value| json!({"input": [{"role": "user", "content": [content]}]});
    let text = json!({"type": "input_text", "text": "a", "odd": 1});
    let thought = |thought: Value| {
        json!({"input": [{"role": "user", "content": "a"},
            {"type": "reasoning", "summary": [], "content": [thought]}]})
    };
    let chosen = |choice: Value| {
        json!({"tools": [{"type": "function", "name": "f", "parameters": {}}],
            "tool_choice": choice})
    };
    let pattern = json!({"type": "grammar", "syntax": "regex", "definition": "a", "odd": 1});
    vec![
        (said(text.clone()), "input[0].content[0].odd"),
        (
            json!({"input": [{"type": "function_call", "call_id": "c", "name": "f",
                "arguments": "{}"}, {"type": "function_call_output", "call_id": "c",
                "output": [text]}]}),
            "input[1].output[0].odd",
        ),
        (thought(json!(5)), "input[1].content[0]"),
        (thought(json!({"type": "reasoning_text"})), "input[1].content[0].text"),
        (
            thought(json!({"type": "reasoning_text", "text": "a", "odd": 1})),
            "input[1].content[0].odd",
        ),
        (json!({"conversation": {"id": "conv_1", "odd": 1}}), "conversation.odd"),
        (chosen(json!({"type": "function", "name": "f", "odd": 1})), "tool_choice.odd"),
        (
            chosen(json!({"type": "allowed_tools", "mode": "auto", "odd": 1,
                "tools": [{"type": "function", "name": "f"}]})),
            "tool_choice.odd",
        ),
        (
            json!({"tools": [{"type": "custom", "name": "f", "format": pattern}]}),
            "tools[0].format.odd",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_members_are_refused_by_path() {
    let server = start(Options::default()).await;
    let chats = chats().into_iter().map(|(mut fields, param)| {
        if fields["messages"].is_null() {
            fields["messages"] = json!([{"role": "user", "content": "Hi"}]);
        }
        (CHAT, with_model(fields), param)
    });
    let responses = responses().into_iter().map(|(mut body, param)| {
        body["model"] = json!(MODEL);
        if body["input"].is_null() {
            body["input"] = json!("Hi");
        }
        (RESPONSES, body, param)
    });
    for (path, body, param) in chats.chain(responses) {
        let answer = server.post(path, body.clone()).await;
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        assert_eq!(answer.error()["param"], param, "{body}: {}", answer.body);
    }
}

/// What an answer carries, and a client may send back of it, is no surprise.
#[tokio::test(flavor = "multi_thread")]
async fn what_clients_send_back_is_taken() {
    let server = start(Options::default()).await;
    let function = json!({"name": "f", "arguments": "{}", "parsed_arguments": {}});
    let call = json!({"id": "c", "index": 0, "type": "function", "function": function});
    let mark = json!({"mode": "explicit"});
    let text = json!({"type": "text", "text": "a", "prompt_cache_breakpoint": mark});
    for mut fields in [called(call), part(text)] {
        fields["max_tokens"] = json!(1);
        let answer = server.post(CHAT, with_model(fields)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    let said = json!({"type": "output_text", "text": "a", "annotations": [], "logprobs": [],
        "parsed": null});
    let body = json!({"model": MODEL, "max_output_tokens": 16, "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a",
            "prompt_cache_breakpoint": mark}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
            "content": [said]},
        {"role": "user", "content": "b"}]});
    let answer = server.post(RESPONSES, body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}
