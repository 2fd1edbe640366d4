//! `functions` and `function_call`, which came before tools, over a real socket. As with tools
//! every call is the work of the grammar.

use serde_json::{Value, json};

use crate::fixture::{CONTEXT_LEN, Options, Server, chat_body, start, with_model};

fn with_functions(mut fields: Value) -> Value {
    fields["functions"] = json!([
        {"name": "get_weather", "description": "The weather of a city.", "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Rio", "台北"]}},
            "required": ["city"], "additionalProperties": false}},
        {"name": "roll", "parameters": {
            "type": "object", "properties": {"sides": {"enum": [6, 20]}}, "required": ["sides"],
            "additionalProperties": false}},
    ]);
    fields["temperature"] = json!(1.0);
    fields["max_tokens"] = json!(300);
    fields
}

async fn choice(server: &Server, fields: Value) -> Value {
    let answer = server.chat(with_functions(fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["choices"][0].clone()
}

/// The call of a message, checked: nothing of tools beside it.
fn called(message: &Value) -> (String, Value) {
    assert!(message.get("tool_calls").is_none(), "{message}");
    let call = message["function_call"].as_object().expect("a call");
    let keys: Vec<_> = call.keys().map(String::as_str).collect();
    assert_eq!(keys, ["name", "arguments"]);
    let text = |key: &str| call[key].as_str().expect("a text");
    (text("name").to_owned(), serde_json::from_str(text("arguments")).expect("JSON"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_function_is_called_and_told_in_its_own_words() {
    let server = start(Options::default()).await;
    for seed in 0..3 {
        for (name, argument, values) in [
            ("get_weather", "city", [json!("Rio"), json!("台北")]),
            ("roll", "sides", [json!(6), json!(20)]),
        ] {
            let fields = json!({"function_call": {"name": name}, "seed": seed});
            let choice = choice(&server, fields).await;
            assert_eq!(choice["finish_reason"], "function_call");
            assert!(choice["message"]["content"].is_null());
            let (called, arguments) = called(&choice["message"]);
            assert_eq!(called, name);
            assert!(values.contains(&arguments[argument]), "{arguments}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_function_call_adds_up_to_the_whole_one() {
    let server = start(Options::default()).await;
    for seed in 0..3 {
        let named = json!({"name": "get_weather"});
        let fields = |stream| json!({"function_call": named, "seed": seed, "stream": stream});
        let whole = choice(&server, fields(false)).await;
        let chunks = server.chat(with_functions(fields(true))).await.chunks();
        let (mut call, mut pieces) = (json!({}), 0);
        for chunk in &chunks {
            let delta = &chunk["choices"][0]["delta"];
            assert!(delta.get("tool_calls").is_none());
            let Some(part) = delta.get("function_call") else { continue };
            if call == json!({}) {
                // The name comes first, and once.
                assert_eq!(*part, json!({"name": "get_weather", "arguments": ""}));
                call = part.clone();
                continue;
            }
            assert!(part.get("name").is_none());
            let all = call["arguments"].as_str().expect("a text");
            let more = part["arguments"].as_str().expect("a text");
            call["arguments"] = json!(format!("{all}{more}"));
            pieces += 1;
        }
        assert_eq!(call, whole["message"]["function_call"]);
        assert!(pieces > 1);
        let last = chunks.last().expect("chunks");
        assert_eq!(last["choices"][0]["finish_reason"], "function_call");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_has_one_call_or_words() {
    let server = start(Options::default()).await;
    // As the model likes: it may begin with a call, and with this letter none begins.
    let fields = json!({"seed": 1, "max_tokens": 20, "logit_bias": {b'<'.to_string(): -100}});
    for word in ["auto", "none"] {
        let mut fields = fields.clone();
        fields["function_call"] = json!(word);
        let choice = choice(&server, fields).await;
        assert!(choice["message"]["content"].is_string());
        assert!(choice["message"].get("function_call").is_none());
        assert_ne!(choice["finish_reason"], "function_call");
    }
    let prompt_tokens = async |word: &str| {
        let fields = with_functions(json!({"function_call": word}));
        server.chat(fields).await.json()["usage"]["prompt_tokens"].as_u64().expect("a count")
    };
    assert!(prompt_tokens("auto").await > prompt_tokens("none").await + 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_called_and_what_came_of_it_are_read() {
    let server = start(Options::default()).await;
    let first = choice(&server, json!({"function_call": {"name": "roll"}})).await;
    let user = json!({"role": "user", "content": "Roll."});
    let result = json!({"role": "function", "name": "roll", "content": "{\"rolled\": 4}"});
    let talk = json!([user, first["message"], result]);
    let body = with_model(with_functions(json!({"messages": talk, "function_call": "none"})));
    let answer = server.post("/v1/chat/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    // The model reads what it would read of a tool.
    let read = async |messages: Value| {
        let answer = server.post("/apply-template", json!({"messages": messages})).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["prompt"].clone()
    };
    let call = json!({"id": "c", "type": "function",
                      "function": first["message"]["function_call"]});
    let today = json!([
        user,
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "{\"rolled\": 4}"},
    ]);
    let prompt = read(talk).await;
    assert_eq!(prompt, read(today).await);
    assert!(prompt.as_str().is_some_and(|text| text.contains("rolled")), "{prompt}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_answer_has_the_words_that_were_sent() {
    let server = start(Options::default()).await;
    for stream in [false, true] {
        let fields = json!({"function_call": {"name": "roll"}, "store": true, "stream": stream});
        let answer = server.chat(with_functions(fields)).await;
        let id = match stream {
            true => answer.chunks()[0]["id"].clone(),
            false => answer.json()["id"].clone(),
        };
        let path = format!("/v1/chat/completions/{}", id.as_str().expect("an id"));
        let kept = server.get(&path).await.json();
        assert_eq!(called(&kept["choices"][0]["message"]).0, "roll");
        assert_eq!(kept["choices"][0]["finish_reason"], "function_call");
        assert_eq!(kept["tools"], Value::Null);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_words_at_once_and_what_is_too_long_are_refused_by_name() {
    let server = start(Options::default()).await;
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let long = json!([{"name": "f", "description": "x".repeat(CONTEXT_LEN)}]);
    for (fields, param) in [
        (with_functions(json!({"tools": [tool]})), "functions"),
        (with_functions(json!({"tool_choice": "auto"})), "functions"),
        (json!({"tools": [tool], "function_call": {"name": "f"}}), "function_call"),
        (with_functions(json!({"function_call": {"name": "g"}})), "function_call.name"),
        (
            json!({"functions": [{"name": "f", "parameters": {"type": "banana"}}]}),
            "functions[0].parameters",
        ),
        (json!({"functions": long}), "functions"),
    ] {
        let answer = server.post("/v1/chat/completions", chat_body(fields)).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(param)));
    }
}
