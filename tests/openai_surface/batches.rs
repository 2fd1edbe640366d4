//! Batches over the wire: from the file of requests to the files of answers.

use std::time::Duration;

use hearth::auth::{NewKey, admin};
use hearth::store::Store;
use serde_json::{Value, json};

use crate::fixture::{CONTEXT_LEN, MODEL, Options, Server, start};
use crate::http::{self, Answer};

const CHAT: &str = "/v1/chat/completions";

fn chat_line(name: &str, fields: Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 4, "temperature": 0, "ignore_eos": true,
                          "messages": [{"role": "user", "content": format!("Hello {name}")}]});
    for (field, value) in fields.as_object().expect("fields") {
        body[field] = value.clone();
    }
    line(name, CHAT, body)
}

fn line(name: &str, url: &str, body: Value) -> Value {
    json!({"custom_id": name, "method": "POST", "url": url, "body": body})
}

async fn upload(server: &Server, key: Option<&str>, lines: &[Value]) -> String {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    server.upload(key, "batch", &text).await
}

async fn create(server: &Server, key: Option<&str>, file: &str, endpoint: &str) -> Answer {
    let body = json!({"input_file_id": file, "endpoint": endpoint, "completion_window": "24h"});
    server.ask("POST", "/v1/batches", key, Some(body)).await
}

/// Runs lines to their end.
async fn run(server: &Server, endpoint: &str, lines: &[Value]) -> Value {
    let file = upload(server, None, lines).await;
    let batch = create(server, None, &file, endpoint).await;
    assert_eq!(batch.status, 200, "{}", batch.body);
    server.ended(None, &batch.json()).await
}

async fn contents(server: &Server, key: Option<&str>, file: &Value) -> Vec<Value> {
    let path = format!("/v1/files/{}/content", file.as_str().expect("a file"));
    let text = server.ask("GET", &path, key, None).await.body;
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// What a key may use in a minute its batches use too; and while they wait for more of it, others'
/// batches have the places.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_pays_from_what_its_key_may_use() {
    let poor = NewKey { tokens_per_min: Some(300), ..crate::keys::new("poor", "a") };
    let (server, [poor, free]) =
        crate::keys::start_with([poor, crate::keys::new("free", "b")]).await;
    let lines: Vec<_> =
        (0..60).map(|i| chat_line(&i.to_string(), json!({"max_tokens": 40}))).collect();
    let file = upload(&server, Some(&poor), &lines).await;
    let batch = create(&server, Some(&poor), &file, CHAT).await.json();
    let file = upload(&server, Some(&free), &lines).await;
    let other = create(&server, Some(&free), &file, CHAT).await.json();
    assert_eq!(server.ended(Some(&free), &other).await["status"], "completed");
    let path = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));
    let now = server.ask("GET", &path, Some(&poor), None).await;
    assert_eq!(now.json()["status"], "in_progress", "{}", now.body);
    assert_eq!(now.header("x-ratelimit-remaining-tokens"), Some("0"));
    let live =
        server.ask("POST", CHAT, Some(&poor), Some(chat_line("x", json!({}))["body"].clone()));
    let refused = live.await;
    assert_eq!((refused.status, &refused.error()["type"]), (429, &json!("tokens")));
}

/// A line that finds no place comes again, and is one request of its key all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_tried_again_pays_once() {
    let store = Store::in_memory().expect("a store");
    let keys = [
        NewKey { requests_per_min: Some(5), ..crate::keys::new("poor", "a") },
        crate::keys::new("busy", "b"),
    ];
    let [poor, busy] = keys.map(|key| admin::create(&store, &key).expect("a key").secret);
    let options = Options { store, running_len: 1, queue_len: 4, ..Options::default() };
    let server = start(options).await;
    let bearer = format!("Bearer {busy}");
    let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
    let fields = json!({"max_tokens": CONTEXT_LEN - 200, "stream": true});
    let long = chat_line("x", fields)["body"].to_string();
    let mut full = Vec::new();
    for _ in 0..5 {
        let mut begun = http::send(server.address, "POST", CHAT, &headers, long.as_bytes()).await;
        // The first one runs before the others come, and four wait.
        begun.wait_for(if full.is_empty() { "\"content\":" } else { "\r\n\r\n" }).await;
        assert!(begun.so_far().starts_with("HTTP/1.1 200"), "{}", begun.so_far());
        full.push(begun);
    }
    let file = upload(&server, Some(&poor), &[chat_line("a", json!({}))]).await;
    let batch = create(&server, Some(&poor), &file, CHAT).await.json();
    // Long enough to be tried again and again.
    tokio::time::sleep(Duration::from_millis(3500)).await;
    let path = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));
    let now = server.ask("GET", &path, Some(&poor), None).await;
    assert_eq!(now.json()["request_counts"]["completed"], 0, "it found a place");
    drop(full);
    let ended = server.ended(Some(&poor), &batch).await;
    assert_eq!(ended["request_counts"], json!({"total": 1, "completed": 1, "failed": 0}));
    // The file, the batch, the line.
    let now = server.ask("GET", &path, Some(&poor), None).await;
    let left = now.header("x-ratelimit-remaining-requests").and_then(|n| n.parse::<u32>().ok());
    assert!(left.is_some_and(|left| left >= 2), "{left:?} of 5 are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_answered_as_the_live_route_answers() {
    let server = start(Options::default()).await;
    let names: Vec<String> = (0..40).map(|i| format!("line {i}")).collect();
    let mut lines: Vec<_> = names.iter().map(|name| chat_line(name, json!({}))).collect();
    // It can be read, and cannot be run: the context has no room for it.
    lines.push(chat_line("huge", json!({"max_tokens": 1_000_000})));
    let batch = run(&server, CHAT, &lines).await;
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["request_counts"], json!({"total": 41, "completed": 40, "failed": 1}));
    assert_eq!((&batch["model"], &batch["completion_window"]), (&json!(MODEL), &json!("24h")));
    let output = contents(&server, None, &batch["output_file_id"]).await;
    assert_eq!(output.len(), 40);
    let mut tokens = 0;
    for (line, name) in output.iter().zip(&names) {
        assert_eq!((line["custom_id"].as_str(), &line["error"]), (Some(&**name), &Value::Null));
        assert!(line["id"].as_str().is_some_and(|id| id.starts_with("batch_req_")));
        let response = &line["response"];
        assert_eq!(response["status_code"], 200);
        assert!(response["request_id"].as_str().is_some_and(|id| id.starts_with("req_")));
        let asked = chat_line(name, json!({}))["body"].clone();
        let live = server.post(CHAT, asked).await.json();
        assert_eq!(response["body"]["choices"], live["choices"]);
        assert_eq!(response["body"]["object"], "chat.completion");
        tokens += live["usage"]["total_tokens"].as_u64().expect("a count");
    }
    assert_eq!(batch["usage"]["total_tokens"], tokens);
    let errors = contents(&server, None, &batch["error_file_id"]).await;
    let response = &errors[0]["response"];
    assert_eq!((&errors[0]["custom_id"], &response["status_code"]), (&json!("huge"), &json!(400)));
    assert_eq!(response["body"]["error"]["code"], "context_length_exceeded");
    let list = server.get("/v1/files?purpose=batch_output").await.json();
    assert_eq!(list["data"].as_array().map(Vec::len), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_endpoint_that_generates_takes_lines() {
    let server = start(Options::default()).await;
    let body = json!({"model": MODEL, "prompt": "Once", "max_tokens": 3});
    let batch = run(&server, "/v1/completions", &[line("a", "/v1/completions", body)]).await;
    let output = contents(&server, None, &batch["output_file_id"]).await;
    assert_eq!(output[0]["response"]["body"]["object"], "text_completion");
    let body = json!({"model": MODEL, "input": "Once", "max_output_tokens": 16});
    let batch = run(&server, "/v1/responses", &[line("a", "/v1/responses", body)]).await;
    let output = contents(&server, None, &batch["output_file_id"]).await;
    assert_eq!(output[0]["response"]["body"]["object"], "response");
    let used = &output[0]["response"]["body"]["usage"]["output_tokens"];
    assert_eq!(&batch["usage"]["output_tokens"], used);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_are_wrong_are_named_with_their_fields() {
    let server = start(Options::default()).await;
    let with = |name: &str, value: Value| {
        let mut line = chat_line("x", json!({}));
        line[name] = value;
        line
    };
    let cases = [
        (json!("no object"), Value::Null, "invalid_json_line"),
        (with("custom_id", Value::Null), json!("custom_id"), "missing_required_parameter"),
        (with("custom_id", json!("")), json!("custom_id"), "invalid_value"),
        (with("custom_id", json!(7)), json!("custom_id"), "invalid_type"),
        (with("method", Value::Null), json!("method"), "missing_required_parameter"),
        (with("method", json!("GET")), json!("method"), "invalid_value"),
        (with("url", json!("/v1/embeddings")), json!("url"), "invalid_value"),
        (with("body", Value::Null), json!("body"), "missing_required_parameter"),
        (with("body", json!([])), json!("body"), "invalid_type"),
        (with("priority", json!(1)), json!("priority"), "unknown_parameter"),
        (chat_line("m", json!({"model": "nobody"})), json!("body.model"), "model_not_found"),
        (chat_line("n", json!({"n": 0})), json!("body.n"), "invalid_value"),
        (chat_line("s", json!({"stream": true})), json!("body.stream"), "unsupported_parameter"),
        (
            chat_line("c", json!({"messages": [{"role": "user", "content": 5}]})),
            json!("body.messages[0].content"),
            "invalid_type",
        ),
        (chat_line("good", json!({})), json!(null), ""),
        (chat_line("good", json!({})), json!("custom_id"), "duplicate_custom_id"),
    ];
    let lines: Vec<_> = cases.iter().map(|(line, ..)| line.clone()).collect();
    let batch = run(&server, CHAT, &lines).await;
    assert_eq!((&batch["status"], &batch["errors"]["object"]), (&json!("failed"), &json!("list")));
    let errors = batch["errors"]["data"].as_array().expect("a list");
    assert_eq!(errors.len(), cases.len() - 1, "{errors:#?}");
    let wrong = cases.iter().zip(1..).filter(|((.., code), _)| !code.is_empty());
    for (error, ((_, param, code), number)) in errors.iter().zip(wrong) {
        assert_eq!((&error["line"], &error["param"]), (&json!(number), param), "{error}");
        assert_eq!(error["code"], *code, "{error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    }
    let broken = server.upload(None, "batch", "{\"custom_id\": \n").await;
    let batch = create(&server, None, &broken, CHAT).await.json();
    let batch = server.ended(None, &batch).await;
    assert_eq!(batch["errors"]["data"][0]["code"], "invalid_json_line");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_wrong_are_refused_by_name() {
    let server = start(Options::default()).await;
    let file = upload(&server, None, &[chat_line("a", json!({}))]).await;
    let other = server.upload(None, "user_data", "x").await;
    let good = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"});
    for (name, value) in [
        ("input_file_id", json!("file-none")),
        ("input_file_id", json!(other)),
        ("endpoint", json!("/v1/files")),
        ("completion_window", json!("1h")),
        ("metadata", json!([])),
        ("output_expires_after", json!("1h")),
        ("colour", json!("red")),
    ] {
        let mut body = good.clone();
        body[name] = value;
        let answer = server.post("/v1/batches", body).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(name)));
    }
    for (method, path, status) in [
        ("GET", "/v1/batches/batch_none", 404),
        ("POST", "/v1/batches/batch_none/cancel", 404),
        ("DELETE", "/v1/batches/batch_none", 405),
        ("GET", "/v1/batches?limit=0", 400),
        ("GET", "/v1/batches?limit=101", 400),
        ("GET", "/v1/batches?after=batch_none", 400),
        ("GET", "/v1/batches?before=x", 400),
    ] {
        assert_eq!(server.ask(method, path, None, None).await.status, status, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_walked_by_cursor_newest_first() {
    let server = start(Options::default()).await;
    let file = upload(&server, None, &[chat_line("a", json!({}))]).await;
    let mut made = Vec::new();
    for i in 0..5 {
        let body = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h",
                          "metadata": {"i": i.to_string()}});
        made.insert(0, server.post("/v1/batches", body).await.json()["id"].clone());
    }
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let list = server.get(&format!("/v1/batches?limit=2{after}")).await.json();
        seen.extend(list["data"].as_array().expect("a list").iter().map(|b| b["id"].clone()));
        if list["has_more"] == false {
            break;
        }
        after = format!("&after={}", list["last_id"].as_str().expect("an id"));
    }
    assert_eq!(seen, made);
    for id in &made {
        let batch = server.ended(None, &json!({"id": id})).await;
        assert_eq!(batch["status"], "completed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_before_a_batch_was_cancelled_is_kept() {
    let server = start(Options::default()).await;
    // As many as run at once: nobody waits behind the long ones.
    let tokens = |i| if i < 3 { 2 } else { 20_000 };
    let line = |i| chat_line(&format!("{i}"), json!({"max_tokens": tokens(i)}));
    let lines: Vec<_> = (0..8).map(line).collect();
    let file = upload(&server, None, &lines).await;
    let batch = create(&server, None, &file, CHAT).await.json();
    let path = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));
    while server.get(&path).await.json()["request_counts"]["completed"] != 3 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let cancelling = server.ask("POST", &format!("{path}/cancel"), None, None).await.json();
    assert_eq!(cancelling["status"], "cancelling");
    let batch = server.ended(None, &batch).await;
    assert_eq!(batch["status"], "cancelled");
    assert_eq!(batch["request_counts"], json!({"total": 8, "completed": 3, "failed": 0}));
    assert_eq!(contents(&server, None, &batch["output_file_id"]).await.len(), 3);
    let errors = contents(&server, None, &batch["error_file_id"]).await;
    assert_eq!((errors.len(), &errors[0]["error"]["code"]), (5, &json!("batch_cancelled")));
    server.wait_for_metric("hearth_kv_blocks_used", 0.0).await;
    let again = server.ask("POST", &format!("{path}/cancel"), None, None).await;
    assert_eq!((again.status, again.json()), (200, batch));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_sees_the_batches_of_its_project_only() {
    let store = Store::in_memory().expect("a store");
    let key = |name: &str, project: &str| {
        let new = NewKey { max_running: Some(1), ..NewKey::named(name, project) };
        admin::create(&store, &new).expect("a key").secret
    };
    let [one, two, friend] = [key("one", "x"), key("two", "y"), key("friend", "x")];
    let server = start(Options { store, ..Options::default() }).await;
    let stored = json!({"store": true});
    let lines = ["a", "b", "c"].map(|name| chat_line(name, stored.clone()));
    let file = upload(&server, Some(&one), &lines).await;
    let refused = create(&server, Some(&two), &file, CHAT).await;
    assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("input_file_id")));
    let batch = create(&server, Some(&one), &file, CHAT).await.json();
    let batch = server.ended(Some(&friend), &batch).await;
    assert_eq!(batch["status"], "completed");
    let path = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));
    for (method, path) in [("GET", path.clone()), ("POST", format!("{path}/cancel"))] {
        assert_eq!(server.ask(method, &path, Some(&two), None).await.status, 404);
    }
    let seen = async |key: &str, path: &str| {
        let list = server.ask("GET", path, Some(key), None).await.json();
        list["data"].as_array().expect("a list").len()
    };
    assert_eq!((seen(&one, "/v1/batches").await, seen(&two, "/v1/batches").await), (1, 0));
    // What lines store and write is the project's too.
    assert_eq!((seen(&friend, CHAT).await, seen(&two, CHAT).await), (3, 0));
    let output = format!("/v1/files/{}", batch["output_file_id"].as_str().expect("a file"));
    assert_eq!(server.ask("GET", &output, Some(&two), None).await.status, 404);
    assert_eq!(contents(&server, Some(&friend), &batch["output_file_id"]).await.len(), 3);
}

/// Nobody else can stop it: an admin of another project does not see it.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_a_key_that_is_revoked_costs_nothing_more() {
    let key = |name: &str| NewKey { admin: name == "friend", ..crate::keys::new(name, "x") };
    let (server, [lost, friend]) = crate::keys::start_with([key("lost"), key("friend")]).await;
    let lines: Vec<_> =
        (0..300).map(|i| chat_line(&i.to_string(), json!({"max_tokens": 500}))).collect();
    let file = upload(&server, Some(&lost), &lines).await;
    let batch = create(&server, Some(&lost), &file, CHAT).await.json();
    server.wait_for_metric("hearth_requests_running", 8.0).await;
    let gone = server.ask("DELETE", "/v1/admin/keys/key_1", Some(&friend), None).await;
    assert_eq!(gone.status, 200, "{}", gone.body);
    let batch = server.ended(Some(&friend), &batch).await;
    let counts = &batch["request_counts"];
    assert!(counts["failed"].as_u64().is_some_and(|failed| failed > 0), "{batch}");
    let errors = contents(&server, Some(&friend), &batch["error_file_id"]).await;
    let response = &errors[0]["response"];
    let code = &response["body"]["error"]["code"];
    assert_eq!((&response["status_code"], code), (&json!(401), &json!("invalid_api_key")));
}
