//! Tools over a real socket. The model is random and its template knows no tools, so every call is
//! the work of the grammar, and every prompt that of the fallback.

use serde_json::{Value, json};

use crate::fixture::{Options, Server, start, with_model};

fn tools() -> Value {
    json!([
        {"type": "function", "function": {
            "name": "get_weather", "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rio", "台北"]}, "celsius": {"type": "boolean"}},
                "required": ["city", "celsius"], "additionalProperties": false,
            },
        }},
        {"type": "custom", "custom": {"name": "dice", "format": {
            "type": "grammar", "grammar": {"syntax": "regex", "definition": "[1-6]d[1-6]"}}}},
    ])
}

fn with_tools(mut fields: Value) -> Value {
    fields["tools"] = tools();
    fields["temperature"] = json!(1.0);
    fields
}

/// One call of an answer, checked.
fn check(call: &Value) -> &str {
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")), "{call}");
    match call["type"].as_str() {
        Some("function") => {
            let arguments = call["function"]["arguments"].as_str().expect("a text");
            let arguments: Value = serde_json::from_str(arguments).expect("JSON");
            assert!(arguments["city"] == "Rio" || arguments["city"] == "台北", "{arguments}");
            assert!(arguments["celsius"].is_boolean());
            call["function"]["name"].as_str().expect("a name")
        }
        Some("custom") => {
            let input = call["custom"]["input"].as_str().expect("a text");
            assert!(input.len() == 3 && input.as_bytes()[1] == b'd', "{input}");
            call["custom"]["name"].as_str().expect("a name")
        }
        _ => panic!("{call}"),
    }
}

async fn choice(server: &Server, fields: Value) -> Value {
    let answer = server.chat(with_tools(fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["choices"][0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_call_is_a_call_of_one_of_the_tools() {
    let server = start(Options::default()).await;
    // The tokenizer's ids are the bytes: what may not begin with this letter is the other tool.
    for (letter, name) in [(b'g', "dice"), (b'd', "get_weather")] {
        let fields = json!({"tool_choice": "required", "parallel_tool_calls": false,
                            "logit_bias": {letter.to_string(): -100}});
        let choice = choice(&server, fields).await;
        assert_eq!(choice["finish_reason"], "tool_calls");
        assert!(choice["message"]["content"].is_null());
        let calls = choice["message"]["tool_calls"].as_array().expect("calls");
        assert_eq!(calls.len(), 1);
        assert_eq!(check(&calls[0]), name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn named_and_allowed_tools_are_the_only_ones_that_are_called() {
    let server = start(Options::default()).await;
    let function = json!({"type": "function", "function": {"name": "get_weather"}});
    let custom = json!({"type": "custom", "custom": {"name": "dice"}});
    let allowed = json!({"type": "allowed_tools", "allowed_tools": {
        "mode": "required", "tools": [custom]}});
    for seed in 0..4 {
        for (tool_choice, name) in
            [(&function, "get_weather"), (&custom, "dice"), (&allowed, "dice")]
        {
            let fields = json!({"tool_choice": tool_choice, "seed": seed, "max_tokens": 400});
            let choice = choice(&server, fields).await;
            let calls = choice["message"]["tool_calls"].as_array().expect("calls");
            let complete = match choice["finish_reason"].as_str() {
                Some("tool_calls") => calls.len(),
                _ => calls.len() - 1,
            };
            assert!(calls[..complete].iter().all(|call| check(call) == name), "{choice}");
        }
    }
}

/// A template that shows tools and calls as `$call` writes them.
macro_rules! template {
    ($call:literal) => {
        concat!(
            "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>",
            "{{ m.role }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}",
            $call,
            "{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    };
}

/// A template of each way to write a call, and what stands in the tokens of one.
const FORMATS: [(&str, &str); 4] = [
    (
        template!(
            "<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": \
             {{ c.function.arguments | tojson }}}\n</tool_call>"
        ),
        "<tool_call>",
    ),
    // Llama 3: JSON and nothing else.
    (
        template!(
            "{\"name\": \"{{ c.function.name }}\", \"parameters\": \
             {{ c.function.arguments | tojson }}}"
        ),
        "\", \"parameters\": ",
    ),
    // Mistral: a list, and from its Tekken vocabularies on name and arguments.
    (
        template!(
            "[TOOL_CALLS] [{\"name\": \"{{ c.function.name }}\", \"arguments\": \
             {{ c.function.arguments | tojson }}, \"id\": \"{{ c.id }}\"}]"
        ),
        "[{\"name\": ",
    ),
    (
        template!("[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"),
        "[ARGS]",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn streamed_calls_add_up_to_the_whole_ones_in_every_way_to_write_them() {
    for (template, mark) in FORMATS {
        let server = start(Options { template, ..Options::default() }).await;
        for seed in 0..4 {
            let written = add_up(&server, seed).await;
            assert!(written.contains(mark), "no {mark} in {written}");
        }
    }
}

/// Holds a stream to the whole answer, and gives what the model wrote.
async fn add_up(server: &Server, seed: u64) -> String {
    let fields = |stream: bool| {
        json!({"tool_choice": "required", "seed": seed, "max_tokens": 300, "stream": stream,
               "logprobs": true, "return_token_ids": !stream})
    };
    let whole = choice(server, fields(false)).await;
    let chunks = server.chat(with_tools(fields(true))).await.chunks();
    let mut calls: Vec<Value> = Vec::new();
    let (mut text, mut tokens) = (String::new(), 0);
    for chunk in &chunks {
        let choice = &chunk["choices"][0];
        text += choice["delta"]["content"].as_str().unwrap_or_default();
        tokens += choice["logprobs"]["content"].as_array().map_or(0, Vec::len);
        for delta in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = delta["index"].as_u64().expect("an index") as usize;
            if index == calls.len() {
                let mut first = delta.clone();
                first.as_object_mut().expect("an object").remove("index");
                calls.push(first);
                continue;
            }
            for (kind, text) in [("function", "arguments"), ("custom", "input")] {
                if let Some(more) = delta[kind][text].as_str() {
                    assert!(delta.get("id").is_none() && delta[kind].get("name").is_none());
                    let all = calls[index][kind][text].as_str().expect("a text");
                    calls[index][kind][text] = json!(format!("{all}{more}"));
                }
            }
        }
    }
    let mut expected = whole["message"]["tool_calls"].clone();
    for (call, expected) in calls.iter_mut().zip(expected.as_array_mut().expect("calls")) {
        assert_ne!(call["id"], expected["id"]);
        call["id"] = expected["id"].clone();
    }
    assert_eq!(Value::Array(calls), expected);
    // What was cut off in the middle of a mark is text.
    assert_eq!(text, whole["message"]["content"].as_str().unwrap_or_default());
    let last = chunks.last().expect("chunks");
    assert_eq!(last["choices"][0]["finish_reason"], whole["finish_reason"]);
    assert_eq!(tokens, whole["logprobs"]["content"].as_array().map_or(0, Vec::len));
    // The tokenizer's first ids are the bytes; the others are special.
    let ids = whole["token_ids"].as_array().expect("tokens").iter();
    let bytes = ids.filter_map(|id| u8::try_from(id.as_u64()?).ok());
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_call_the_answer_is_text() {
    let server = start(Options::default()).await;
    for tool_choice in ["none", "auto"] {
        let fields = json!({"tool_choice": tool_choice, "seed": 1, "max_tokens": 20});
        let choice = choice(&server, fields).await;
        assert!(choice["message"]["content"].is_string());
        assert!(choice["message"].get("tool_calls").is_none());
    }
    // The model is told of the tools, unless none may be called.
    let prompt_tokens = async |tool_choice: &str| {
        let fields = with_tools(json!({"tool_choice": tool_choice, "max_tokens": 1}));
        server.chat(fields).await.json()["usage"]["prompt_tokens"].as_u64().expect("a count")
    };
    assert!(prompt_tokens("auto").await > prompt_tokens("none").await + 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_or_an_answer_in_its_form() {
    let server = start(Options::default()).await;
    for (letter, called) in [(b'{', true), (b'<', false)] {
        let format = json!({"type": "json_schema", "json_schema": {
            "name": "n", "schema": {"type": "object", "properties": {"n": {"enum": [1, 2]}},
                                    "required": ["n"], "additionalProperties": false}}});
        // No answer begins with this letter.
        let fields = json!({"response_format": format, "max_tokens": 400,
                            "parallel_tool_calls": false,
                            "logit_bias": {letter.to_string(): -30}});
        let choice = choice(&server, fields).await;
        match choice["message"]["tool_calls"].as_array() {
            Some(calls) => {
                assert!(called);
                check(&calls[0]);
            }
            None => {
                assert!(!called);
                let text = choice["message"]["content"].as_str().expect("a text");
                let object: Value = serde_json::from_str(text).expect("JSON");
                assert!(object["n"] == 1 || object["n"] == 2, "{text}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_goes_on_after_a_call() {
    let server = start(Options::default()).await;
    let call = json!({"id": "call_1", "type": "function",
                      "function": {"name": "get_weather", "arguments": "{\"city\": \"Rio\"}"}});
    let custom = json!({"id": "call_2", "type": "custom",
                        "custom": {"name": "dice", "input": "1d6"}});
    let messages = json!([
        {"role": "user", "content": "Weather and dice?"},
        {"role": "assistant", "content": null, "tool_calls": [call, custom]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "4"}]},
    ]);
    let ask = async |without: Option<usize>| {
        let mut messages = messages.clone();
        if let (Some(i), Some(list)) = (without, messages.as_array_mut()) {
            list.remove(i);
        }
        let body = with_model(with_tools(json!({"max_tokens": 5, "messages": messages})));
        server.post("/v1/chat/completions", body).await
    };
    let answer = ask(None).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    // A result without its call, and a call without its result.
    for (without, param) in [(1, "messages[1].role"), (2, "messages")] {
        let answer = ask(Some(without)).await;
        let error = answer.error();
        assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tool_cannot_promise_is_refused_by_its_field() {
    let server = start(Options::default()).await;
    let with = |parameters: Value, strict: bool| {
        json!({"tool_choice": "required", "max_tokens": 200, "tools": [
            {"type": "function", "function": {"name": "f"}},
            {"type": "function", "function": {
                "name": "g", "parameters": parameters, "strict": strict}}]})
    };
    let unique = json!({"type": "object", "properties": {
        "a": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": true}}});
    let error = server.chat(with(unique.clone(), true)).await.error();
    assert_eq!(error["param"], "tools[1].function.parameters");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("uniqueItems")), "{error}");
    // Without `strict` nobody was promised that.
    assert_eq!(server.chat(with(unique, false)).await.status, 200);
    let error = server.chat(with(json!({"type": "banana"}), false)).await.error();
    assert_eq!(error["param"], "tools[1].function.parameters");
}
