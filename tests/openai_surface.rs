//! The OpenAI surface over a real socket: a server with a small random model, and a client that
//! checks what comes over the wire.
//!
//! What the fields of a body may be is tested beside their parsers; here is what needs the whole
//! way from the socket to the engine and back.

#[path = "openai_surface/batches.rs"]
mod batches;
#[path = "openai_surface/files.rs"]
mod files;
#[path = "openai_surface/fixture.rs"]
mod fixture;
#[path = "openai_surface/http.rs"]
mod http;
#[path = "openai_surface/keys.rs"]
mod keys;
#[path = "openai_surface/responses.rs"]
mod responses;
#[path = "openai_surface/stored.rs"]
mod stored;
#[path = "openai_surface/structured.rs"]
mod structured;
#[path = "openai_surface/tokens.rs"]
mod tokens;
#[path = "openai_surface/tools.rs"]
mod tools;

use std::time::Duration;

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
async fn prompts_come_in_four_forms_and_choices_in_prompt_major_order() {
    let server = start(Options::default()).await;
    let text = |answer: &Value, i: usize| answer["choices"][i]["text"].clone();
    let a = server.complete(greedy(20, json!({"prompt": "Once"}))).await.json();
    let b = server.complete(greedy(20, json!({"prompt": "Upon"}))).await.json();
    assert!(a["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")));
    assert_ne!(text(&a, 0), text(&b, 0));
    // The tokenizer's ids are the bytes.
    let ids = json!([b"Once", b"Upon"]);
    for prompt in [json!(["Once", "Upon"]), ids.clone()] {
        let both = server.complete(greedy(20, json!({"prompt": prompt, "n": 2}))).await.json();
        let texts: Vec<_> = (0..4).map(|i| text(&both, i)).collect();
        assert_eq!(texts, [text(&a, 0), text(&a, 0), text(&b, 0), text(&b, 0)]);
        assert_eq!(both["usage"]["prompt_tokens"], 8);
        assert_eq!(both["usage"]["completion_tokens"], 80);
    }
    let one = server.complete(greedy(20, json!({"prompt": ids[0]}))).await.json();
    assert_eq!(text(&one, 0), text(&a, 0));

    let fields = json!({"prompt": ["Once", "Upon"], "stream": true});
    let chunks = server.complete(greedy(20, fields)).await.chunks();
    assert_eq!(streamed_text(&chunks, 0), text(&a, 0));
    assert_eq!(streamed_text(&chunks, 1), text(&b, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn text_offsets_point_into_the_text() {
    let server = start(Options::default()).await;
    // A special token, which the text does not show, then "Hé".
    let prompt = json!([260, b'H', 0xc3, 0xa9]);
    let fields = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 0});
    let choice = &server.complete(fields).await.json()["choices"][0];
    assert_eq!(choice["text"], "Hé");
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 1, 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn long_prompts_take_turns_and_all_are_answered() {
    let server = start(Options::default()).await;
    let long = "word ".repeat(40_000);
    let fields = json!({"prompt": long, "max_tokens": 1});
    let answers = (0..6).map(|_| server.complete(fields.clone()));
    for answer in futures_util::future::join_all(answers).await {
        let error = answer.error();
        assert_eq!((answer.status, &error["code"]), (400, &json!("context_length_exceeded")));
    }
    assert_eq!(server.complete(json!({"prompt": "short", "max_tokens": 1})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_can_be_scored_without_generating() {
    let server = start(Options::default()).await;
    let fields = json!({"prompt": "Once upon", "max_tokens": 0, "echo": true, "logprobs": 3});
    let scored = server.complete(fields).await.json();
    let choice = &scored["choices"][0];
    assert_eq!(choice["text"], "Once upon");
    assert_eq!(choice["finish_reason"], "length");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().map(Vec::len), Some(9));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4, 5, 6, 7, 8]));
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    for i in 1..9 {
        let own = logprobs["token_logprobs"][i].as_f64().expect("a number");
        let top = logprobs["top_logprobs"][i].as_object().expect("alternatives");
        let name = logprobs["tokens"][i].as_str().expect("a text");
        assert!(own < 0.0 && top[name].as_f64() == Some(own) && (3..=4).contains(&top.len()));
    }
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_was_seen_is_cached_and_usage_says_so() {
    let server = start(Options::default()).await;
    let prompt = "the same long beginning ".repeat(20);
    let complete = async |rest: &str| {
        let body = json!({
            "model": MODEL, "prompt": format!("{prompt}{rest}"), "max_tokens": 3, "temperature": 0,
        });
        let answer = server.post("/v1/completions", body).await.json();
        let details = &answer["usage"]["prompt_tokens_details"];
        (details["cached_tokens"].as_u64().unwrap(), answer["usage"]["prompt_tokens"].clone())
    };
    // A byte is a token here, and a block has sixteen.
    assert_eq!(complete("one").await, (0, json!(483)));
    assert_eq!(complete("two").await, (480, json!(483)));
    let chat = async || server.chat(greedy(2, json!({}))).await.json();
    assert_eq!(chat().await["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let again = chat().await;
    let prompt_tokens = again["usage"]["prompt_tokens"].as_u64().unwrap();
    let cached = (prompt_tokens - 1) / 16 * 16;
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], cached);
    server.wait_for_metric("hearth_prefix_cache_hit_tokens_total", 480.0 + cached as f64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_best_of_several_is_the_likeliest_and_all_are_counted() {
    let server = start(Options::default()).await;
    let ask = async |fields: Value| {
        let mut body = json!({
            "model": MODEL, "prompt": "abc", "max_tokens": 8, "temperature": 1.5, "seed": 11,
            "ignore_eos": true,
        });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.post("/v1/completions", body).await.json()
    };
    let all = ask(json!({"n": 5, "logprobs": 0})).await;
    let mean = |choice: &Value| {
        let list = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        list.iter().map(|l| l.as_f64().unwrap()).sum::<f64>() / list.len() as f64
    };
    let mut choices = all["choices"].as_array().unwrap().clone();
    choices.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let best = ask(json!({"n": 2, "best_of": 5})).await;
    let texts = |list: &[Value]| list.iter().map(|c| c["text"].clone()).collect::<Vec<_>>();
    let given = best["choices"].as_array().unwrap();
    assert_eq!(texts(given), texts(&choices[..2]));
    assert_eq!(given[0]["logprobs"], Value::Null, "they were not asked for");
    assert_eq!(best["usage"]["completion_tokens"], 40);
    assert_eq!(best["usage"]["prompt_tokens"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_tell_their_tier_and_their_place_in_the_queue() {
    let server = start(Options::default()).await;
    for (asked, had) in [("auto", "default"), ("flex", "flex"), ("priority", "priority")] {
        let answer = server.chat(greedy(1, json!({"service_tier": asked}))).await;
        assert_eq!(answer.json()["service_tier"], had);
        assert_eq!(answer.header("x-hearth-queue-position"), Some("0"));
        assert_eq!(answer.header("x-hearth-estimated-wait-ms"), Some("0"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_not_begun_in_time_is_told_so() {
    let queue_timeout = Some(Duration::from_millis(50));
    let server = start(Options { running_len: 1, queue_timeout, ..Options::default() }).await;
    let long = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &long).await;
    running.wait_for("\"content\":").await;
    let late = server.chat(greedy(1, json!({}))).await;
    assert_eq!((late.status, &late.error()["code"]), (503, &json!("queue_timeout")));
    assert!(late.header("retry-after").is_some());
    server.wait_for_metric("hearth_expired_total", 1.0).await;
    server.wait_for_metric("hearth_requests_waiting", 0.0).await;
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
    let cases: [Case; 6] = [
        ("GET", "/v1/nothing", &[], b"", 404, "unknown_url"),
        ("PUT", chat, &[json], b"{}", 405, "method_not_supported"),
        ("POST", "/v1/models", &[json], b"{}", 405, "method_not_supported"),
        ("POST", chat, &[json], b"{\"model\": }", 400, "invalid_json"),
        ("POST", chat, &[("Content-Type", "text/plain")], b"{}", 415, "unsupported_media_type"),
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
async fn a_client_that_hangs_up_frees_its_blocks() {
    let server = start(Options::default()).await;
    for (cancelled, stream) in [(1.0, true), (2.0, false)] {
        let body = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": stream})));
        let mut pending = server.begin("/v1/chat/completions", &body).await;
        if stream {
            pending.wait_for("\"content\":").await;
        }
        server.wait_for_metric("hearth_requests_running", 1.0).await;
        assert!(server.metric("hearth_kv_blocks_used").await > 0.0);
        drop(pending);
        server.wait_for_metric("hearth_cancelled_total", cancelled).await;
        server.wait_for_metric("hearth_requests_running", 0.0).await;
        server.wait_for_metric("hearth_kv_blocks_used", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back_and_a_waiting_stream_hears_a_heartbeat() {
    let config = ServerConfig { heartbeat: Duration::from_millis(10), ..ServerConfig::default() };
    let server =
        start(Options { config, running_len: 1, queue_len: 1, ..Options::default() }).await;
    let long = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &long).await;
    running.wait_for("\"content\":").await;
    let mut waiting = server.begin("/v1/chat/completions", &long).await;
    waiting.wait_for(": heartbeat\n\n").await;
    let refused = server.chat(greedy(1, json!({}))).await;
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("rate_limit_exceeded")));
    let wait_s: u64 = refused.header("retry-after").and_then(|s| s.parse().ok()).expect("seconds");
    let wait_ms: u64 =
        refused.header("retry-after-ms").and_then(|s| s.parse().ok()).expect("milliseconds");
    assert!(wait_s >= 1 && wait_s == wait_ms.div_ceil(1000));
    drop(running);
    waiting.wait_for("\"content\":").await;
    // What could never fit into the queue is not told to come back.
    let hopeless = server.chat(json!({"n": 2})).await;
    assert_eq!((hopeless.status, &hopeless.error()["param"]), (400, &json!("n")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_lets_running_streams_finish() {
    let mut server = start(Options::default()).await;
    let body = chat_body(greedy(500, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &body).await;
    running.wait_for("\"content\":").await;
    server.stop();
    let chunks = running.answer().await.chunks();
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let config = ServerConfig { body_timeout: Duration::from_millis(50), ..Default::default() };
    let server = start(Options { config, ..Options::default() }).await;
    let half = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                 Connection: close\r\nContent-Length: 1000\r\n\r\n{\"model\"";
    let refused = http::send_raw(server.address, half).await.answer().await;
    assert_eq!((refused.status, &refused.error()["code"]), (408, &json!("request_timeout")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_come_closes_its_connection() {
    let config = ServerConfig { head_timeout: Duration::from_millis(50), ..Default::default() };
    let server = start(Options { config, ..Options::default() }).await;
    let half = http::send_raw(server.address, b"GET /health HTTP/1.1\r\nHost:").await;
    half.closed().await;
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_does_not_wait_for_half_a_request() {
    let mut server = start(Options::default()).await;
    let half = http::send_raw(server.address, b"POST /v1/completions HTTP/1.1\r\nHost:").await;
    assert_eq!(server.get("/health").await.status, 200);
    let began = std::time::Instant::now();
    server.stop();
    server.stopped().await;
    assert!(began.elapsed() < ServerConfig::default().drain_timeout / 2);
    drop(half);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_does_not_wait_for_ever() {
    let config =
        ServerConfig { drain_timeout: Duration::from_millis(100), ..ServerConfig::default() };
    let mut server = start(Options { config, ..Options::default() }).await;
    let body = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &body).await;
    running.wait_for("\"content\":").await;
    server.stop();
    server.stopped().await;
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
