//! The OpenAI surface over a real socket: a server with a small random model, and a client that
//! checks what comes over the wire.
//!
//! What the fields of a body may be is tested beside their parsers; here is what needs the whole
//! way from the socket to the engine and back.

#[path = "openai_surface/adapters.rs"]
mod adapters;
#[path = "openai_surface/answers.rs"]
mod answers;
#[path = "openai_surface/batches.rs"]
mod batches;
#[path = "openai_surface/completions.rs"]
mod completions;
#[path = "openai_surface/early.rs"]
mod early;
#[path = "openai_surface/files.rs"]
mod files;
#[path = "openai_surface/fixture.rs"]
mod fixture;
#[path = "openai_surface/functions.rs"]
mod functions;
#[path = "openai_surface/harmony.rs"]
mod harmony;
#[path = "openai_surface/http.rs"]
mod http;
#[path = "openai_surface/keys.rs"]
mod keys;
#[path = "openai_surface/long_talks.rs"]
mod long_talks;
#[path = "openai_surface/neighbours.rs"]
mod neighbours;
#[path = "openai_surface/nested.rs"]
mod nested;
#[path = "openai_surface/reference.rs"]
mod reference;
#[path = "openai_surface/responses.rs"]
mod responses;
#[path = "openai_surface/robust.rs"]
mod robust;
#[path = "openai_surface/stored.rs"]
mod stored;
#[path = "openai_surface/structured.rs"]
mod structured;
#[path = "openai_surface/thought.rs"]
mod thought;
#[path = "openai_surface/tokens.rs"]
mod tokens;
#[path = "openai_surface/tools.rs"]
mod tools;
#[path = "openai_surface/usage.rs"]
mod usage;
#[path = "openai_surface/waiting.rs"]
mod waiting;

use hearth::server::ServerConfig;
use serde_json::{Value, json};

use fixture::{ALIAS, CONTEXT_LEN, MODEL, Options, chat_body, start, with_model};

/// Keeps generating to the limit, and always the same.
fn greedy(max_tokens: usize, mut fields: Value) -> Value {
    fields["temperature"] = json!(0);
    fields["ignore_eos"] = json!(true);
    fields["max_tokens"] = json!(max_tokens);
    fields
}

/// The text of a stream's choice, put together.
fn streamed_text(chunks: &[Value], choice: u64) -> String {
    let parts = chunks.iter().filter_map(|chunk| {
        let part = chunk["choices"].get(0).filter(|part| part["index"] == choice)?;
        part["delta"]["content"].as_str().or(part["text"].as_str())
    });
    parts.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_and_found_by_plain_and_encoded_id() {
    let server = start(Options::default()).await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["object"], "model");
    for path in ["/v1/models/org/tiny:F32", "/v1/models/org%2Ftiny%3AF32"] {
        assert_eq!(server.get(path).await.json(), list["data"][0]);
    }
    // The other name is a model of its own to those who look for it.
    assert_eq!(list["data"][1]["id"], ALIAS);
    assert_eq!(server.get("/v1/models/gpt-4o-mini").await.json(), list["data"][1]);
    let asked = json!({"model": ALIAS, "prompt": "a", "max_tokens": 1});
    let answer = server.post("/v1/completions", asked).await;
    assert_eq!((answer.status, &answer.json()["model"]), (200, &json!(MODEL)));
    let unknown = server.get("/v1/models/gpt-4o").await;
    assert_eq!((unknown.status, &unknown.error()["code"]), (404, &json!("model_not_found")));
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.get("/ready").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_chat_says_what_the_whole_one_says() {
    let server = start(Options::default()).await;
    let whole = server.chat(greedy(200, json!({}))).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    assert!(whole.header("x-request-id").is_some_and(|id| id.starts_with("req_")));
    assert!(whole.header("openai-processing-ms").is_some());
    assert_eq!(whole.header("openai-version"), Some("2020-10-01"));
    let whole = whole.json();
    assert!(whole["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")));
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 200);

    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = server.chat(greedy(200, options)).await.chunks();
    let text = streamed_text(&chunks, 0);
    assert_eq!(text, whole["choices"][0]["message"]["content"]);
    assert!(!text.is_empty());
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let last = chunks.last().expect("chunks");
    assert_eq!(last["usage"]["total_tokens"], whole["usage"]["total_tokens"]);
    let one = |key: &str| chunks.iter().all(|chunk| chunk[key] == chunks[0][key]);
    assert!(one("id") && one("created") && one("model") && one("object"));
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_cover_every_token_streamed_or_not() {
    let server = start(Options::default()).await;
    let fields = || greedy(50, json!({"logprobs": true, "top_logprobs": 2}));
    let whole = server.chat(fields()).await.json();
    let tokens = &whole["choices"][0]["logprobs"]["content"];
    assert_eq!(tokens.as_array().map(Vec::len), Some(50));
    for token in tokens.as_array().expect("a list") {
        assert!(token["logprob"].as_f64().is_some_and(|logprob| logprob <= 0.0));
        assert_eq!(token["top_logprobs"].as_array().map(Vec::len), Some(2));
        // Greedy: the token is the best alternative.
        assert_eq!(token["top_logprobs"][0]["bytes"], token["bytes"]);
    }
    let mut fields = fields();
    fields["stream"] = json!(true);
    let chunks = server.chat(fields).await.chunks();
    let pieces =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(Value::Array(pieces.flatten().cloned().collect()), *tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_makes_an_answer_repeatable() {
    let server = start(Options::default()).await;
    let ask = async |seed: i64| {
        let fields = json!({"seed": seed, "temperature": 1, "max_tokens": 30, "ignore_eos": true});
        server.chat(fields).await.json()["choices"][0]["message"]["content"].clone()
    };
    let first = ask(7).await;
    assert_eq!(first, ask(7).await);
    assert_ne!(first, ask(8).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_text_and_is_not_in_it() {
    let server = start(Options::default()).await;
    let whole = server.chat(greedy(200, json!({}))).await.json();
    let text = whole["choices"][0]["message"]["content"].as_str().expect("a text").to_owned();
    // Two characters from the middle of what it says anyway.
    let stop: String = text.chars().skip(20).take(2).collect();
    let expected = text.split(&stop).next().expect("a beginning");
    let stopped = server.chat(greedy(200, json!({"stop": stop}))).await.json();
    assert_eq!(stopped["choices"][0]["message"]["content"], expected);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let fields = greedy(200, json!({"stop": [stop], "stream": true}));
    assert_eq!(streamed_text(&server.chat(fields).await.chunks(), 0), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_name_what_is_wrong() {
    let server = start(Options::default()).await;
    let cases = [
        (chat_body(json!({"temperature": 3})), 400, "invalid_value", "temperature"),
        (chat_body(json!({"foo": 1})), 400, "unknown_parameter", "foo"),
        (chat_body(json!({"tools": [{}]})), 400, "missing_required_parameter", "tools[0].type"),
        (chat_body(json!({"n": "two"})), 400, "invalid_type", "n"),
        (
            chat_body(json!({"max_tokens": CONTEXT_LEN})),
            400,
            "context_length_exceeded",
            "max_tokens",
        ),
        (
            json!({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}),
            404,
            "model_not_found",
            "model",
        ),
        (
            with_model(json!({"messages": [{"role": "user", "content": "x".repeat(CONTEXT_LEN)}]})),
            400,
            "context_length_exceeded",
            "messages",
        ),
    ];
    for (body, status, code, param) in cases {
        let answer = server.post("/v1/chat/completions", body).await;
        let error = answer.error();
        assert_eq!(answer.status, status, "{error}");
        assert_eq!((&error["code"], &error["param"]), (&json!(code), &json!(param)), "{error}");
        if code == "context_length_exceeded" {
            let message = error["message"].as_str().expect("a text");
            assert!(message.contains(&CONTEXT_LEN.to_string()), "{message}");
        }
    }
    let bad_token = server.complete(json!({"prompt": [1, 4_000_000]})).await;
    assert_eq!((bad_token.status, &bad_token.error()["param"]), (400, &json!("prompt")));
}

#[tokio::test(flavor = "multi_thread")]
async fn http_errors_have_the_same_shape() {
    let config = ServerConfig { body_limit_bytes: 1000, ..ServerConfig::default() };
    let server = start(Options { config, ..Options::default() }).await;
    let json = ("Content-Type", "application/json");
    let big = [b' '; 2000];
    let chat = "/v1/chat/completions";
    type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a [u8], u16, &'a str);
    let zipped = ("Content-Encoding", "gzip");
    let cases: [Case; 10] = [
        ("GET", "/v1/nothing", &[], b"", 404, "unknown_url"),
        ("PUT", chat, &[json], b"{}", 405, "method_not_supported"),
        ("POST", "/v1/models", &[json], b"{}", 405, "method_not_supported"),
        ("GET", "/v1/files/%FF", &[], b"", 404, "unknown_url"),
        ("DELETE", "/v1/conversations/a/items/%C3", &[], b"", 404, "unknown_url"),
        ("GET", "/v1/models/%FF", &[], b"", 404, "unknown_url"),
        ("POST", chat, &[json], b"{\"model\": }", 400, "invalid_json"),
        ("POST", chat, &[("Content-Type", "text/plain")], b"{}", 415, "unsupported_media_type"),
        ("POST", chat, &[json, zipped], b"{}", 415, "unsupported_media_type"),
        ("POST", chat, &[json], &big, 413, "request_too_large"),
    ];
    for (method, path, headers, body, status, code) in cases {
        let answer = http::send(server.address, method, path, headers, body).await.answer().await;
        assert_eq!((answer.status, &answer.error()["code"]), (status, &json!(code)));
        assert!(answer.header("x-request-id").is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn configured_keys_are_asked_for() {
    let api_keys = vec!["sk-right".to_owned()];
    let server = start(Options { api_keys, ..Options::default() }).await;
    let ask = async |path: &str, headers: &[(&str, &str)]| {
        http::send(server.address, "GET", path, headers, b"").await.answer().await
    };
    assert_eq!(ask("/v1/models", &[("Authorization", "Bearer sk-right")]).await.status, 200);
    for headers in [&[][..], &[("Authorization", "Bearer sk-wrong")]] {
        let answer = ask("/v1/models", headers).await;
        assert_eq!((answer.status, &answer.error()["code"]), (401, &json!("invalid_api_key")));
    }
    assert_eq!(ask("/health", &[]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_fields_pass_when_the_operator_says_so() {
    let config = ServerConfig { lenient_fields: true, ..ServerConfig::default() };
    let server = start(Options { config, ..Options::default() }).await;
    assert_eq!(server.chat(greedy(3, json!({"foo": 1}))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_carry_the_names_that_dashboards_know() {
    let server = start(Options::default()).await;
    assert_eq!(server.chat(greedy(5, json!({}))).await.status, 200);
    let scrape = server.get("/metrics").await;
    assert!(scrape.header("content-type").is_some_and(|kind| kind.contains("openmetrics-text")));
    for (name, value) in [
        ("hearth_requests_running", 0.0),
        ("hearth_requests_waiting", 0.0),
        ("hearth_kv_blocks_used", 0.0),
        ("hearth_requests_total", 1.0),
        ("hearth_generated_tokens_total", 5.0),
        ("hearth_preemptions_total", 0.0),
        ("hearth_cancelled_total", 0.0),
        ("hearth_failures_total", 0.0),
        ("hearth_time_to_first_token_seconds_count", 1.0),
        ("hearth_request_seconds_count", 1.0),
    ] {
        server.wait_for_metric(name, value).await;
    }
    let counted = "http_responses_total kv_blocks_total prompt_tokens_total steps_total";
    for name in counted.split(' ') {
        assert!(server.metric(&format!("hearth_{name}")).await > 0.0, "{name}");
    }
}
