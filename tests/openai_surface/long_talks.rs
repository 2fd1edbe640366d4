//! Conversations that grow too long: cut at their beginning, or summed up.

use serde_json::{Value, json};

use crate::fixture::{CONTEXT_LEN, MODEL, Options, Server, start, with_model};
use crate::responses::{PATH, body, respond, text};

fn said(role: &str, text: &str) -> Value {
    json!({"role": role, "content": text})
}

async fn count(server: &Server, fields: Value) -> u64 {
    let mut fields = fields;
    fields["model"] = json!(MODEL);
    let answer = server.post("/v1/responses/input_tokens", fields).await;
    answer.json()["input_tokens"].as_u64().unwrap_or_else(|| panic!("{}", answer.body))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_is_refused_or_loses_its_beginning() {
    let server = start(Options::default()).await;
    // A letter is a token.
    let long = "x".repeat(CONTEXT_LEN / 3);
    let input = json!([
        said("user", &long),
        said("assistant", &long),
        said("user", "Short."),
        said("assistant", &long),
        said("user", "Well?"),
    ]);
    let refused = server.post(PATH, body(json!({"input": input}))).await;
    assert_eq!(
        (refused.status, &refused.error()["code"]),
        (400, &json!("context_length_exceeded"))
    );
    let cut = json!({"input": input, "truncation": "auto", "instructions": "Be."});
    let cut_answer = respond(&server, cut.clone()).await;
    assert_eq!(cut_answer["truncation"], "auto");
    // As late as a turn of the user allows: what is left is what it read.
    let rest = json!({"input": input.as_array().expect("items")[2..], "instructions": "Be."});
    let rest_answer = respond(&server, rest).await;
    assert_eq!(text(&cut_answer), text(&rest_answer));
    assert_eq!(cut_answer["usage"]["input_tokens"], rest_answer["usage"]["input_tokens"]);
    assert_eq!(count(&server, cut).await, rest_answer["usage"]["input_tokens"]);
    // Nothing is forgotten: the whole input is kept.
    let path = format!("{PATH}/{}/input_items", cut_answer["id"].as_str().expect("an id"));
    assert_eq!(server.get(&path).await.json()["data"].as_array().map(Vec::len), Some(5));
    // An answer that wants more room makes the cut earlier.
    let greedy = json!({"input": input, "truncation": "auto",
                        "max_output_tokens": CONTEXT_LEN - 2000, "stream": true});
    let mut pending = server.begin(PATH, &body(greedy)).await;
    pending.wait_for("response.output_text.delta").await;
    drop(pending);
    // The last turn alone is never cut.
    let hopeless = json!({"input": "x".repeat(CONTEXT_LEN), "truncation": "auto"});
    assert_eq!(server.post(PATH, body(hopeless)).await.error()["param"], "input");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_is_summed_up_and_goes_on() {
    let server = start(Options::default()).await;
    let input = json!([
        said("developer", "Be."), said("user", "One?"), said("assistant", "First."),
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "4"},
        said("user", "Two?"),
    ]);
    let asked = json!({"model": MODEL, "input": input});
    let answer = server.post("/v1/responses/compact", asked).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("x-hearth-queue-position"), Some("0"));
    let short = answer.json();
    assert_eq!(short["object"], "response.compaction");
    let output = short["output"].as_array().expect("items");
    let kinds: Vec<_> = output.iter().map(|item| [&item["type"], &item["role"]]).collect();
    assert_eq!(
        json!(kinds),
        json!([
            ["message", "developer"],
            ["message", "user"],
            ["message", "user"],
            ["compaction", null]
        ])
    );
    assert!(output[3]["id"].as_str().is_some_and(|id| id.starts_with("cmp_")));
    let used = &short["usage"];
    assert!(used["output_tokens"].as_u64().is_some_and(|tokens| tokens > 0));
    assert_eq!(
        used["total_tokens"].as_u64(),
        Some(used["input_tokens"].as_u64().unwrap() + used["output_tokens"].as_u64().unwrap())
    );
    // It is input again, and the model reads it.
    let mut next = output.clone();
    next.push(said("user", "Go on."));
    let with = count(&server, json!({"input": next})).await;
    let mut without = next.clone();
    without.remove(3);
    assert!(with > count(&server, json!({"input": without})).await);
    let gone_on = respond(&server, json!({"input": next})).await;
    assert_eq!(gone_on["usage"]["input_tokens"], with);
    // What is stored need not be sent.
    let before = json!({"model": MODEL, "previous_response_id": gone_on["id"]});
    let again = server.post("/v1/responses/compact", before).await.json();
    let kinds = again["output"].as_array().expect("items").iter().map(|item| &item["type"]);
    assert_eq!(
        json!(kinds.collect::<Vec<_>>()),
        json!(["message", "message", "message", "message", "compaction"])
    );
    // Nor is a conversation lost that leaves no room for a summary.
    let full = json!({"model": MODEL, "input": "x".repeat(CONTEXT_LEN - 200)});
    let refused = server.post("/v1/responses/compact", full).await;
    assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("input")));
    let unknown = json!({"model": MODEL, "input": "x", "tools": []});
    let refused = server.post("/v1/responses/compact", unknown).await;
    assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("tools")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_by_itself_is_to_blame() {
    let server = start(Options::default()).await;
    let talk = json!([said("user", "Hi")]);
    let tool = |len: usize| json!({"name": "f", "description": "x".repeat(len)});
    let tools = |len| json!([{"type": "function", "function": tool(len)}]);
    let flat = |len| {
        let mut tool = tool(len);
        tool["type"] = json!("function");
        json!([tool])
    };
    let (all, half) = (CONTEXT_LEN, CONTEXT_LEN * 2 / 3);
    let half_said = json!([said("user", &"x".repeat(half))]);
    let chat = "/v1/chat/completions";
    let cases = [
        (chat, json!({"messages": talk, "tools": tools(all)}), "tools"),
        // So long that it is not even encoded.
        (chat, json!({"messages": talk, "tools": tools(20 * all)}), "tools"),
        (chat, json!({"messages": half_said, "tools": tools(half)}), "messages"),
        // The model does not read them.
        (
            chat,
            json!({"messages": [said("user", &"x".repeat(all))], "tools": tools(all),
                      "tool_choice": "none"}),
            "messages",
        ),
        (PATH, json!({"input": "Hi", "tools": flat(all)}), "tools"),
        (PATH, json!({"input": "Hi", "instructions": "x".repeat(all)}), "instructions"),
        (PATH, json!({"input": "x".repeat(half), "instructions": "x".repeat(half)}), "input"),
    ];
    for (path, body, param) in cases {
        let refused = server.post(path, with_model(body)).await;
        let error = refused.error();
        let code = json!("context_length_exceeded");
        assert_eq!((refused.status, &error["code"]), (400, &code), "{error}");
        assert_eq!(error["param"], param, "{path}");
    }
    // The neighbours have no place for a field but the message.
    let long = "x".repeat(all);
    let tool = json!({"name": "f", "description": long, "input_schema": {"type": "object"}});
    let cases = [
        ("/v1/messages", json!({"messages": talk, "max_tokens": 5, "system": long}), "system: "),
        ("/v1/messages", json!({"messages": talk, "max_tokens": 5, "tools": [tool]}), "tools: "),
        (
            "/v1/messages/count_tokens",
            json!({"messages": talk, "system": "x".repeat(20 * all)}),
            "system: ",
        ),
        ("/api/generate", json!({"prompt": "Hi", "system": long}), "system: "),
        ("/api/chat", json!({"messages": talk, "tools": tools(all)}), "tools: "),
        ("/api/chat", json!({"messages": [said("user", &long)]}), "messages: "),
    ];
    for (path, body, start) in cases {
        let refused = server.post(path, with_model(body)).await;
        let error = refused.json()["error"].clone();
        let message = error["message"].as_str().or(error.as_str()).expect("a message");
        assert_eq!(refused.status, 400, "{message}");
        assert!(message.starts_with(start), "{path}: {message}");
    }
}
