//! Anthropic's and Ollama's routes over a real socket: shapes, the order of events, refusals in
//! their own words, and that keys, limits and cancellation are those of every other route.

use std::time::Duration;

use hearth::auth::{NewKey, admin};
use hearth::server::ServerConfig;
use hearth::store::Store;
use serde_json::{Value, json};

use crate::fixture::{ALIAS, CONTEXT_LEN, MODEL, Options, Server, chat_body, start, with_model};
use crate::greedy;
use crate::http::{self, Answer};
use crate::reference::{is_neighbour, kinds, operations};

const MESSAGES: &str = "/v1/messages";

fn said() -> Value {
    json!([{"role": "user", "content": "Tell me a story."}])
}

/// A body for Anthropic's route.
fn message(mut fields: Value) -> Value {
    for (name, value) in [("max_tokens", json!(20)), ("messages", said())] {
        fields[name] = fields.get(name).cloned().unwrap_or(value);
    }
    with_model(fields)
}

/// A body for Ollama's chat.
fn chat(mut fields: Value) -> Value {
    fields["messages"] = fields.get("messages").cloned().unwrap_or_else(said);
    with_model(fields)
}

fn weather() -> Value {
    json!({"type": "object", "properties": {"city": {"enum": ["Rio", "台北"]}},
           "required": ["city"], "additionalProperties": false})
}

/// Names and values of a stream of events.
fn events(answer: &Answer) -> Vec<(String, Value)> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let parse = |block: &str| {
        let (name, data) = block.split_once('\n').expect("two lines");
        let name = name.strip_prefix("event: ").expect("a name");
        let data: Value =
            serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!(data["type"], name);
        (name.to_owned(), data)
    };
    answer.body.split_terminator("\n\n").map(parse).collect()
}

fn lines(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), Some("application/x-ndjson"));
    answer.body.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

async fn send(server: &Server, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let json = [("Content-Type", "application/json")];
    let headers = [&json[..], headers].concat();
    let body = message(json!({"max_tokens": 1})).to_string();
    http::send(server.address, method, path, &headers, body.as_bytes()).await.answer().await
}

/// Type and message of an error in Anthropic's shape.
fn anthropic(answer: &Answer) -> (String, String) {
    let body = answer.json();
    let keys: Vec<_> = body.as_object().expect("an object").keys().cloned().collect();
    assert_eq!((&body["type"], keys.len()), (&json!("error"), 3), "{body}");
    assert_eq!(body["request_id"].as_str(), answer.header("request-id"));
    assert_eq!(answer.header("request-id"), answer.header("x-request-id"));
    let text = |name: &str| body["error"][name].as_str().expect("a text").to_owned();
    (text("type"), text("message"))
}

/// The message of an error in Ollama's shape.
fn ollama(answer: &Answer) -> String {
    let body = answer.json();
    assert_eq!(body.as_object().map(serde_json::Map::len), Some(1), "{body}");
    body["error"].as_str().expect("a text").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_message_has_its_events_in_order_and_says_what_the_whole_one_says() {
    let server = start(Options::default()).await;
    let fields = |stream: bool| message(json!({"temperature": 0, "top_k": 1, "stream": stream}));
    let whole = server.post(MESSAGES, fields(false)).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    assert!(whole.header("x-hearth-queue-position").is_some());
    let whole = whole.json();
    assert_eq!(
        (&whole["stop_reason"], &whole["role"]),
        (&json!("max_tokens"), &json!("assistant"))
    );
    assert_eq!(whole["usage"]["output_tokens"], 20);

    let events = events(&server.post(MESSAGES, fields(true)).await);
    let names: Vec<_> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..3], ["message_start", "content_block_start", "ping"]);
    assert!(names[3..names.len() - 3].iter().all(|name| *name == "content_block_delta"));
    let end = ["content_block_stop", "message_delta", "message_stop"];
    assert_eq!(names[names.len() - 3..], end);
    let deltas = events.iter().filter_map(|(_, data)| data["delta"]["text"].as_str());
    assert_eq!(deltas.collect::<String>(), whole["content"][0]["text"]);
    let usage = &events[events.len() - 2].1["usage"];
    // The second time the prompt was there already.
    let sum = |usage: &Value| {
        let count = |name: &str| usage[name].as_u64().expect("a number");
        count("input_tokens") + count("cache_read_input_tokens")
    };
    assert_eq!(sum(usage), sum(&whole["usage"]));
    assert!(usage["cache_read_input_tokens"].as_u64() > Some(0), "{usage}");
    let path = "/v1/messages/count_tokens";
    let counted = with_model(json!({"messages": said()}));
    assert_eq!(server.post(path, counted).await.json()["input_tokens"], sum(usage));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_call_is_one_block_and_its_deltas_are_its_input() {
    let server = start(Options::default()).await;
    let tool = json!({"name": "get_weather", "input_schema": weather()});
    let choice = json!({"type": "tool", "name": "get_weather", "disable_parallel_tool_use": true});
    let fields = json!({"tools": [tool], "tool_choice": choice, "max_tokens": 200, "stream": true});
    let events = events(&server.post(MESSAGES, message(fields)).await);
    let start = &events[1].1["content_block"];
    assert_eq!((&start["type"], &start["input"]), (&json!("tool_use"), &json!({})));
    assert!(start["id"].as_str().is_some_and(|id| id.starts_with("toolu_")));
    let parts = events.iter().filter_map(|(_, data)| data["delta"]["partial_json"].as_str());
    let input: Value = serde_json::from_str(&parts.collect::<String>()).expect("JSON");
    assert!(input["city"] == "Rio" || input["city"] == "台北", "{input}");
    assert_eq!(events[events.len() - 2].1["delta"]["stop_reason"], "tool_use");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_messages_are_anthropics() {
    let api_keys = vec!["sk-right".to_owned()];
    let config = ServerConfig { body_limit_bytes: 4000, ..ServerConfig::default() };
    let server = start(Options { api_keys, config, ..Options::default() }).await;
    let right = ("x-api-key", "sk-right");
    for version in ["2023-06-01", "2026-10-21"] {
        let ok = send(&server, "POST", MESSAGES, &[right, ("anthropic-version", version)]).await;
        assert_eq!(ok.status, 200, "{}", ok.body);
        assert!(ok.header("request-id").is_some_and(|id| id.starts_with("req_")));
    }
    for (method, path, headers, status, kind, named) in [
        ("POST", MESSAGES, vec![], 401, "authentication_error", "x-api-key"),
        ("POST", MESSAGES, vec![("x-api-key", "sk-no")], 401, "authentication_error", "key"),
        ("GET", MESSAGES, vec![right], 405, "invalid_request_error", "GET"),
        ("POST", "/v1/messages/batches", vec![right], 404, "not_found_error", "batches"),
        (
            "POST",
            MESSAGES,
            vec![right, ("anthropic-version", "2023-01-01")],
            400,
            "invalid_request_error",
            "anthropic-version",
        ),
    ] {
        let answer = send(&server, method, path, &headers).await;
        let (found, message) = anthropic(&answer);
        assert_eq!((answer.status, found.as_str()), (status, kind), "{method} {path}");
        assert!(message.contains(named), "{message}");
    }
    let long = json!([{"role": "user", "content": "x".repeat(5000)}]);
    let image = json!([{"role": "user", "content": [{"type": "image", "source": {}}]}]);
    for (body, status, named) in [
        (message(json!({"foo": 1})), 400, "foo"),
        (message(json!({"max_tokens": "many"})), 400, "max_tokens"),
        (with_model(json!({"messages": said()})), 400, "max_tokens"),
        (message(json!({"messages": []})), 400, "messages"),
        (message(json!({"messages": image})), 400, "messages[0].content[0]"),
        (message(json!({"stop_sequences": vec!["q"; 65]})), 400, "stop_sequences"),
        (
            message(json!({"thinking": {"type": "enabled", "budget_tokens": 1024},
                        "max_tokens": 2000})),
            400,
            "thinking",
        ),
        (json!({"model": "claude", "max_tokens": 1, "messages": said()}), 404, "claude"),
        (message(json!({"messages": long})), 413, "4000"),
    ] {
        let answer = server.ask("POST", MESSAGES, Some("sk-right"), Some(body)).await;
        let (_, message) = anthropic(&answer);
        assert_eq!(answer.status, status, "{message}");
        assert!(message.contains(named), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_of_ollama_is_lines_unless_it_is_one_object() {
    let server = start(Options::default()).await;
    let options = json!({"temperature": 0, "num_predict": 20});
    let whole = server.post("/api/chat", chat(json!({"options": options, "stream": false}))).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!((&whole["done"], &whole["done_reason"]), (&json!(true), &json!("length")));
    assert_eq!((&whole["model"], &whole["eval_count"]), (&json!(MODEL), &json!(20)));
    for name in ["total_duration", "load_duration", "prompt_eval_duration", "eval_duration"] {
        assert!(whole[name].is_u64(), "{name}: {whole}");
    }
    let lines = lines(&server.post("/api/chat", chat(json!({"options": options}))).await);
    let (last, parts) = lines.split_last().expect("lines");
    assert!(parts.iter().all(|line| line["done"] == false && line.get("eval_count").is_none()));
    let text: String = parts.iter().filter_map(|l| l["message"]["content"].as_str()).collect();
    assert_eq!(text, whole["message"]["content"]);
    assert_eq!((&last["message"]["content"], &last["done"]), (&json!(""), &json!(true)));

    let raw = json!({"prompt": "ab", "raw": true, "stream": false, "options": options});
    let raw = server.post("/api/generate", with_model(raw)).await.json();
    let same = json!({"prompt": "ab", "temperature": 0, "max_tokens": 20});
    let same = server.complete(same).await.json();
    assert_eq!(raw["response"], same["choices"][0]["text"]);
    assert_eq!(raw["prompt_eval_count"], same["usage"]["prompt_tokens"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_told_as_ollama_tells_them() {
    let server = start(Options::default()).await;
    let tags = server.get("/api/tags").await.json();
    let names: Vec<_> = tags["models"].as_array().expect("a list").iter().collect();
    assert_eq!(names[0]["name"], MODEL);
    assert_eq!(names[1]["name"], format!("{ALIAS}:latest"));
    let details = &names[0]["details"];
    assert_eq!((&details["family"], &details["format"]), (&json!("qwen3"), &json!("safetensors")));
    assert_eq!(details["quantization_level"], "F32");
    assert!(names[0]["size"].as_u64() > Some(1000));
    let shown = server.post("/api/show", json!({"model": format!("{ALIAS}:latest")})).await.json();
    assert_eq!(shown["model_info"]["general.architecture"], "qwen3");
    assert_eq!(shown["model_info"]["qwen3.context_length"], CONTEXT_LEN);
    assert_eq!(shown["capabilities"], json!(["completion", "tools", "insert"]));
    let ps = server.get("/api/ps").await.json();
    assert_eq!(
        (&ps["models"][0]["model"], ps["models"].as_array().map(Vec::len)),
        (&json!(MODEL), Some(1))
    );
    assert!(ps["models"][0]["expires_at"].as_str().is_some_and(|at| at.starts_with("9999")));
    assert!(server.get("/api/version").await.json()["version"].is_string());
    let load = server.post("/api/generate", with_model(json!({}))).await.json();
    assert_eq!((&load["done_reason"], &load["response"]), (&json!("load"), &json!("")));
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_the_other_neighbour_are_ollamas() {
    let api_keys = vec!["sk-right".to_owned()];
    let server = start(Options { api_keys, ..Options::default() }).await;
    let key = Some("sk-right");
    let options = |name: &str, value: Value| chat(json!({"options": {name: value}}));
    let call = json!({"function": {"name": "a", "arguments": {}}});
    let calls = json!([{"role": "assistant", "content": "", "tool_calls": vec![call; 1025]}]);
    for (method, path, body, status, named) in [
        ("POST", "/api/chat", Some(chat(json!({"foo": 1}))), 400, "foo"),
        ("POST", "/api/chat", Some(json!({"messages": said()})), 400, "model"),
        ("POST", "/api/chat", Some(options("mirostat", json!(2))), 400, "options.mirostat"),
        ("POST", "/api/chat", Some(options("top_p", json!("x"))), 400, "options.top_p"),
        ("POST", "/api/chat", Some(chat(json!({"think": true}))), 400, "think"),
        ("POST", "/api/chat", Some(options("stop", json!(vec!["q"; 65]))), 400, "options.stop"),
        ("POST", "/api/chat", Some(chat(json!({"messages": calls}))), 400, "tool_calls[1024]"),
        ("POST", "/api/chat", Some(json!({"model": "x", "messages": said()})), 404, "x"),
        ("GET", "/api/chat", None, 405, "GET"),
        ("POST", "/api/pull", Some(json!({"model": "x"})), 404, "/api/pull"),
        ("POST", "/api/show", Some(json!({})), 400, "model"),
        ("POST", "/api/embed", Some(with_model(json!({"input": []}))), 400, "input"),
        ("POST", "/api/embed", Some(with_model(json!({"input": "a"}))), 400, "model"),
    ] {
        let answer = server.ask(method, path, key, body).await;
        let message = ollama(&answer);
        assert_eq!(answer.status, status, "{path}: {message}");
        assert!(message.contains(named), "{path}: {message}");
    }
    let answer = server.ask("GET", "/api/tags", None, None).await;
    assert_eq!(answer.status, 401);
    ollama(&answer);
}

/// Every field of every body with what it is not, and what no body is: the document knows them all.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_neighbours_are_refused_by_name() {
    let server = start(Options::default()).await;
    let told = |path: &str, answer: &Answer| match path.starts_with("/api/") {
        true => ollama(answer),
        false => anthropic(answer).1,
    };
    let (mut wrong, mut tried) = (Vec::new(), 0);
    for (path, method, operation) in operations(&server).await {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        if !is_neighbour(&path) || !schema.is_object() {
            continue;
        }
        let mut base = schema["examples"][0].clone();
        base["model"] = json!(MODEL);
        let with = |name: &str, value: Value| {
            let mut body = base.clone();
            body[name] = value;
            body
        };
        let mut cases = vec![("no_such_field".to_owned(), with("no_such_field", json!(1)))];
        for name in schema["required"].as_array().into_iter().flatten() {
            let mut body = base.clone();
            let name = name.as_str().expect("a name");
            body.as_object_mut().expect("an object").remove(name);
            cases.push((name.to_owned(), body));
        }
        for (name, field) in schema["properties"].as_object().expect("fields") {
            let types = match &field["type"] {
                Value::String(one) => vec![one.as_str()],
                Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
                _ => continue,
            };
            let fits =
                |kind| types.contains(&kind) || kind == "integer" && types.contains(&"number");
            let others = kinds().into_iter().filter(|(kind, _)| !fits(*kind));
            cases.extend(others.map(|(_, value)| (name.clone(), with(name, value))));
        }
        for (name, body) in cases {
            let answer = server.post(&path, body.clone()).await;
            let message = told(&path, &answer);
            if answer.status != 400 || !message.contains(&name) {
                wrong.push(format!("{path} {body}: {} {message}", answer.status));
            }
            tried += 1;
        }
        let text = base.to_string();
        for (kind, body, status) in [
            ("application/json", "[]", 400),
            ("application/json", "{", 400),
            ("text/plain", text.as_str(), 415),
        ] {
            let headers = [("Content-Type", kind)];
            let sent = http::send(server.address, &method, &path, &headers, body.as_bytes()).await;
            let answer = sent.answer().await;
            told(&path, &answer);
            assert_eq!(answer.status, status, "{path} {kind} {body}");
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert!(tried > 250, "{tried} bodies");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limits_of_a_key_hold_for_neighbours_too() {
    let store = Store::in_memory().expect("a store");
    let key = NewKey { requests_per_min: Some(2), ..NewKey::named("a", "a") };
    let secret = admin::create(&store, &key).expect("a key").secret;
    let server = start(Options { store, ..Options::default() }).await;
    let ask = async |path: &'static str, body: Value| {
        server.ask("POST", path, Some(&secret), Some(body)).await
    };
    let one = message(json!({"max_tokens": 1}));
    assert_eq!(ask(MESSAGES, one.clone()).await.status, 200);
    let chat = chat(json!({"options": {"num_predict": 1}}));
    assert_eq!(ask("/api/chat", chat.clone()).await.status, 200);
    let refused = ask(MESSAGES, one).await;
    assert_eq!((refused.status, anthropic(&refused).0.as_str()), (429, "rate_limit_error"));
    assert!(refused.header("retry-after").is_some());
    let refused = ask("/api/chat", chat).await;
    assert_eq!(refused.status, 429);
    ollama(&refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_neighbour_that_hangs_up_frees_its_blocks() {
    let server = start(Options::default()).await;
    // A random model may end its turn at any time; a grammar keeps it from that.
    let flags = json!({"type": "array", "items": {"type": "boolean"}, "minItems": 5000});
    let long = json!({"type": "object", "properties": {"a": flags}, "required": ["a"],
                      "additionalProperties": false});
    let format = json!({"type": "json_schema", "schema": long});
    let max = CONTEXT_LEN - 200;
    let never = json!({"max_tokens": max, "stream": true, "output_config": {"format": format}});
    let endless = json!({"options": {"num_predict": max}, "format": long});
    for (cancelled, path, body, word) in [
        (1.0, MESSAGES, message(never), "content_block_delta"),
        (2.0, "/api/chat", chat(endless), "\"done\":false"),
    ] {
        let mut pending = server.begin(path, &body).await;
        pending.wait_for(word).await;
        drop(pending);
        server.wait_for_metric("hearth_cancelled_total", cancelled).await;
        server.wait_for_metric("hearth_kv_blocks_used", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_waited_too_long_finds_an_overloaded_server() {
    let queue_timeout = Some(Duration::from_millis(50));
    let server = start(Options { running_len: 1, queue_timeout, ..Options::default() }).await;
    let long = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &long).await;
    running.wait_for("\"content\":").await;
    let late = server.post(MESSAGES, message(json!({}))).await;
    assert_eq!((late.status, anthropic(&late).0.as_str()), (529, "overloaded_error"));
    // In a stream the status is long gone.
    let streamed = events(&server.post(MESSAGES, message(json!({"stream": true}))).await);
    let (name, data) = streamed.last().expect("events");
    assert_eq!((name.as_str(), &data["error"]["type"]), ("error", &json!("overloaded_error")));
    let lines = lines(&server.post("/api/chat", chat(json!({}))).await);
    assert!(lines.last().is_some_and(|line| line["error"].is_string()));
}
