//! Bodies of `/api/chat` and `/api/generate`: what they become, and what is refused by name.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::options::OPTIONS;
use super::request::{Asked, CHAT, GENERATE, chat, generate};
use crate::pipeline::Prompt;
use crate::server::error::ApiError;
use crate::server::extract::Fields;
use crate::types::KeepAlive;

fn fields(mut body: Value) -> Result<Fields, ApiError> {
    body["model"] = body.get("model").cloned().unwrap_or_else(|| json!("m"));
    Fields::parse(body.to_string().as_bytes())
}

fn chatted(body: Value) -> Result<Asked, ApiError> {
    chat(fields(body)?, false)
}

fn generated(body: Value) -> Result<Asked, ApiError> {
    generate(fields(body)?, false)
}

fn user() -> Value {
    json!([{"role": "user", "content": "hi"}])
}

fn with(name: &str, value: Value) -> Value {
    let mut body = json!({"messages": user()});
    body[name] = value;
    body
}

fn messages(asked: Asked) -> (Value, Value) {
    match asked.request.expect("a request").prompt {
        Prompt::Chat { messages, template_kwargs } => (messages, Value::Object(template_kwargs)),
        other => panic!("{other:?}"),
    }
}

/// Fields of the requests of Ollama's Python client 0.6.3.
const CLIENT_CHAT: &str = "model stream options format keep_alive messages tools think logprobs \
    top_logprobs";
const CLIENT_GENERATE: &str = "model stream options format keep_alive prompt suffix system \
    template context raw images think logprobs top_logprobs width height steps";
const CLIENT_OPTIONS: &str = "numa num_ctx num_batch num_gpu main_gpu low_vram f16_kv logits_all \
    vocab_only use_mmap use_mlock embedding_only num_thread num_keep seed num_predict top_k top_p \
    tfs_z typical_p repeat_last_n temperature repeat_penalty presence_penalty frequency_penalty \
    mirostat mirostat_tau mirostat_eta penalize_newline stop min_p";

#[test]
fn every_field_of_the_official_client_stands_in_its_table_once() {
    let tables = [(CHAT, CLIENT_CHAT), (GENERATE, CLIENT_GENERATE), (OPTIONS, CLIENT_OPTIONS)];
    for (table, known) in tables {
        let names: HashSet<_> = table.iter().map(|field| field.name).collect();
        assert_eq!(names.len(), table.len(), "a name stands twice");
        for name in known.split_whitespace() {
            assert!(names.contains(name), "{name} is missing");
        }
    }
}

#[test]
fn options_arrive_under_the_names_of_the_house() {
    let options = json!({
        "num_predict": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 5,
        "stop": ["a", "b", "c", "d", "e"], "repeat_penalty": 1.2, "num_ctx": 4096,
        "mirostat": 0, "num_gpu": 99, "presence_penalty": 0.5, "frequency_penalty": 0.25,
    });
    let asked = chatted(with("options", options)).unwrap();
    assert!(asked.stream, "lines are the default");
    let request = asked.request.unwrap();
    assert_eq!((request.max_tokens, request.stop.len()), (Some(7), 5));
    let s = request.sampling;
    assert_eq!((s.temperature, s.top_k, s.top_p), (Some(0.5), Some(3), Some(0.9)));
    assert_eq!((s.min_p, s.seed, s.repetition_penalty), (Some(0.1), Some(5), Some(1.2)));
    assert_eq!((s.presence_penalty, s.frequency_penalty), (Some(0.5), Some(0.25)));
    let open = chatted(with("options", json!({"num_predict": -1, "seed": -1}))).unwrap();
    let open = open.request.unwrap();
    assert_eq!((open.max_tokens, open.sampling.seed), (None, None));
    let none = json!({"repeat_penalty": 1.3, "repeat_last_n": 0});
    let none = chatted(with("options", none)).unwrap().request.unwrap();
    assert_eq!(none.sampling.repetition_penalty, Some(1.0));
}

#[test]
fn a_conversation_with_tools_is_one_that_the_house_knows() {
    let call = |name: &str| json!({"function": {"name": name, "arguments": {"x": 1}}});
    let said = json!([
        {"role": "user", "content": "hi"},
        {"role": "assistant", "thinking": "hm", "tool_calls": [call("f"), call("g")]},
        {"role": "tool", "tool_name": "g", "content": "2"},
        {"role": "tool", "content": "1"},
    ]);
    let (messages, _) = messages(chatted(json!({"messages": said})).unwrap());
    let told = &messages[1]["tool_calls"];
    assert_eq!(told[0]["function"], json!({"name": "f", "arguments": "{\"x\":1}"}));
    assert_eq!(messages[1]["reasoning_content"], "hm");
    assert_eq!(messages[2]["tool_call_id"], told[1]["id"]);
    assert_eq!(messages[3]["tool_call_id"], told[0]["id"]);
    // Without ids nobody says what belongs together, and Ollama does not ask.
    let alone = json!([{"role": "tool", "content": "1"}, {"role": "user", "content": "hi"}]);
    assert!(chatted(json!({"messages": alone})).is_ok());
}

#[test]
fn to_think_is_a_variable_of_the_template() {
    let kwargs = |think: Value| {
        let asked = chatted(with("think", think)).unwrap();
        (asked.thinks, messages(asked).1)
    };
    assert_eq!(kwargs(json!(null)), (false, json!({})));
    let switched = |on: bool| json!({"enable_thinking": on, "thinking": on});
    assert_eq!(kwargs(json!(true)), (true, switched(true)));
    assert_eq!(kwargs(json!(false)), (false, switched(false)));
    assert_eq!(kwargs(json!("high")).1["reasoning_effort"], "high");
}

#[test]
fn a_prompt_is_asked_in_the_template_or_raw() {
    let (told, _) = messages(generated(json!({"prompt": "a", "system": "s"})).unwrap());
    let expected = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]);
    assert_eq!(told, expected);
    for (body, suffix) in [
        (json!({"prompt": "a", "raw": true}), None),
        (json!({"prompt": "a", "suffix": "b"}), Some("b")),
    ] {
        let request = generated(body).unwrap().request.unwrap();
        assert!(matches!(&request.prompt, Prompt::Text(text) if text == "a"));
        assert_eq!(request.suffix.as_deref(), suffix);
    }
}

#[test]
fn to_ask_nothing_is_to_ask_for_the_model() {
    for body in [json!({}), json!({"messages": []}), json!({"messages": null})] {
        assert!(chatted(body).unwrap().request.is_none());
    }
    let asked = generated(json!({"prompt": "", "keep_alive": 0})).unwrap();
    assert!(asked.request.is_none());
    assert_eq!(asked.keep_alive, KeepAlive::from_secs(0.0));
}

#[test]
fn what_is_wrong_is_named() {
    let options = |name: &str, value: Value| with("options", json!({name: value}));
    let call = json!([{"function": {"name": "f", "arguments": "{}"}}]);
    let window = json!({"repeat_penalty": 1.1, "repeat_last_n": 64});
    let cases = [
        (with("model", json!("")), "model"),
        (with("tempature", json!(1)), "tempature"),
        (with("stream", json!("no")), "stream"),
        (with("messages", json!("hi")), "messages"),
        (with("messages", json!([5])), "messages[0]"),
        (with("messages", json!([{"content": "a"}])), "messages[0].role"),
        (with("messages", json!([{"role": "user", "content": 5}])), "messages[0].content"),
        (with("messages", json!([{"role": "user", "x": 5}])), "messages[0].x"),
        (
            with("messages", json!([{"role": "user", "content": "", "images": ["aa"]}])),
            "messages[0].images",
        ),
        (
            with("messages", json!([{"role": "assistant", "tool_calls": call}])),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (with("format", json!("xml")), "format"),
        (with("format", json!(5)), "format"),
        (with("think", json!("some")), "think"),
        (with("keep_alive", json!("soon")), "keep_alive"),
        (with("tools", json!([{"type": "function"}])), "tools[0].function"),
        (with("options", json!([])), "options"),
        (options("temprature", json!(1)), "options.temprature"),
        (options("temperature", json!("hot")), "options.temperature"),
        (options("num_predict", json!(1.5)), "options.num_predict"),
        (options("mirostat", json!(1)), "options.mirostat"),
        (options("typical_p", json!(0.5)), "options.typical_p"),
        (options("num_ctx", json!("long")), "options.num_ctx"),
        (options("stop", json!([""])), "options.stop[0]"),
        (with("options", window), "options.repeat_last_n"),
    ];
    for (body, param) in cases {
        let error = chatted(body.clone()).expect_err(param);
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}");
    }
    for (body, param) in [
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": "a", "template": "{{ .Prompt }}"}), "template"),
        (json!({"prompt": "a", "context": [1, 2]}), "context"),
        (json!({"prompt": "a", "images": ["aa"]}), "images"),
        (json!({"prompt": "a", "raw": true, "system": "s"}), "system"),
        (json!({"prompt": "a", "raw": true, "think": true}), "think"),
    ] {
        let error = generated(body.clone()).expect_err(param);
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}");
    }
}
