//! The ledger over the wire: every token that was computed is on somebody's account, whoever read
//! it, and nobody sees the account of another project.

use std::time::Duration;

use hearth::auth::NewKey;
use serde_json::{Value, json};

use crate::fixture::{MODEL, Server, chat_body};
use crate::http;
use crate::keys::{new, start_with};

const USAGE: &str = "/v1/organization/usage/completions";
const CHAT: &str = "/v1/chat/completions";

/// The sums that this key sees, told apart as the query says.
async fn usage(server: &Server, key: &str, query: &str) -> Vec<Value> {
    let answer = server.ask("GET", &format!("{USAGE}?{query}"), Some(key), None).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let page = answer.json();
    assert_eq!((&page["object"], &page["has_more"]), (&json!("page"), &json!(false)));
    let buckets = page["data"].as_array().expect("buckets").clone();
    buckets.iter().flat_map(|bucket| bucket["results"].as_array().expect("sums").clone()).collect()
}

/// Requests, tokens of prompts, and of answers.
fn sums(results: &[Value]) -> [u64; 3] {
    ["num_model_requests", "input_tokens", "output_tokens"]
        .map(|name| results.iter().map(|result| result[name].as_u64().expect("a sum")).sum())
}

/// The same, once so many requests have ended.
async fn after(server: &Server, key: &str, requests: u64) -> [u64; 3] {
    for _ in 0..500 {
        let sums = sums(&usage(server, key, "").await);
        if sums[0] >= requests {
            return sums;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{requests} requests never ended")
}

async fn ask(server: &Server, key: &str, path: &str, body: Value) -> Value {
    let answer = server.ask("POST", path, Some(key), Some(body)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

/// Sends a stream that goes on for long, and leaves when it has begun to speak.
async fn leave(server: &Server, key: &str, path: &str, body: &Value, word: &str) {
    let bearer = format!("Bearer {key}");
    let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
    let body = body.to_string();
    let mut begun = http::send(server.address, "POST", path, &headers, body.as_bytes()).await;
    begun.wait_for(word).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_is_what_is_counted() {
    let (server, [key]) = start_with([new("a", "a")]).await;
    let mut told = [0; 3];
    let mut add = |usage: &Value, names: [&str; 2]| {
        let [input, output] = names.map(|name| usage[name].as_u64().expect("a count"));
        told = [told[0] + 1, told[1] + input, told[2] + output];
    };
    let (chat, response) =
        (["prompt_tokens", "completion_tokens"], ["input_tokens", "output_tokens"]);
    let fields = json!({"n": 3, "max_tokens": 5});
    add(&ask(&server, &key, CHAT, chat_body(fields)).await["usage"], chat);
    let best =
        json!({"model": MODEL, "prompt": ["a", "bc"], "n": 1, "best_of": 4, "max_tokens": 5});
    add(&ask(&server, &key, "/v1/completions", best).await["usage"], chat);
    let text = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 20});
    add(&ask(&server, &key, "/v1/responses", text).await["usage"], response);
    let stopped = json!({"max_tokens": 50, "stop": ["a", "b", "c", "e"], "stream": true,
        "stream_options": {"include_usage": true}});
    let stream = server.ask("POST", CHAT, Some(&key), Some(chat_body(stopped))).await.chunks();
    add(&stream.last().expect("chunks")["usage"], chat);
    let line = json!({"custom_id": "1", "method": "POST", "url": CHAT,
        "body": chat_body(json!({"max_tokens": 7}))});
    let file = server.upload(Some(&key), "batch", &format!("{line}\n")).await;
    let batch = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"});
    let batch = ask(&server, &key, "/v1/batches", batch).await;
    add(&server.ended(Some(&key), &batch).await["usage"], response);
    assert_eq!(after(&server, &key, 5).await, told);
    // What is refused costs nothing.
    let answer = server.ask("POST", CHAT, Some(&key), Some(chat_body(json!({"n": 0})))).await;
    assert_eq!(answer.status, 400);
    assert_eq!(sums(&usage(&server, &key, "").await), told);
    let in_batch = usage(&server, &key, "batch=true&group_by[]=batch").await;
    assert_eq!((sums(&in_batch)[0], &in_batch[0]["batch"]), (1, &json!(true)));
    let apart = usage(&server, &key, "group_by[]=model&group_by[]=service_tier").await;
    let names: Vec<_> = apart.iter().map(|one| [&one["model"], &one["service_tier"]]).collect();
    assert_eq!(names, [[MODEL, "default"]]);
}

/// The engine counts each token that it chooses.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_read_is_counted_too() {
    let (server, [key]) = start_with([new("a", "a")]).await;
    let long = json!({"ignore_eos": true, "stream": true, "max_tokens": 30_000, "n": 2});
    leave(&server, &key, CHAT, &chat_body(long), "\"content\":\"").await;
    let response = |more: &str| {
        let mut body = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 30_000,
            "ignore_eos": true});
        body[more] = json!(true);
        body
    };
    let word = "response.output_text.delta";
    leave(&server, &key, "/v1/responses", &response("stream"), word).await;
    server.wait_for_metric("hearth_requests_running", 0.0).await;
    let before = server.metric("hearth_generated_tokens_total").await;
    let queued = ask(&server, &key, "/v1/responses", response("background")).await;
    while server.metric("hearth_generated_tokens_total").await <= before {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let path = format!("/v1/responses/{}/cancel", queued["id"].as_str().expect("an id"));
    let cancelled = server.ask("POST", &path, Some(&key), None).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    server.wait_for_metric("hearth_requests_running", 0.0).await;
    let [requests, input, output] = after(&server, &key, 3).await;
    let computed = server.metric("hearth_generated_tokens_total").await as u64;
    assert_eq!(requests, 3);
    assert!(input > 0);
    // What is chosen in the moment in which its client leaves is nobody's: a few of each of four.
    assert!(output <= computed && output + 40 >= computed && output > 0, "{output} of {computed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_sees_the_account_of_its_project_and_an_admin_all() {
    let boss = NewKey { admin: true, ..new("boss", "school") };
    let (server, [boss, one, friend, two]) =
        start_with([boss, new("one", "x"), new("friend", "x"), new("two", "y")]).await;
    for (key, max) in [(&one, 3), (&friend, 4), (&two, 5)] {
        let fields = json!({"max_tokens": max, "ignore_eos": true});
        ask(&server, key, CHAT, chat_body(fields)).await;
    }
    after(&server, &boss, 3).await;
    let output = async |key: &str, query: &str| sums(&usage(&server, key, query).await)[2];
    assert_eq!(output(&boss, "").await, 12);
    assert_eq!((output(&one, "").await, output(&two, "").await), (7, 5));
    for query in ["project_ids[]=y", "api_key_ids[]=key_4"] {
        assert_eq!((output(&one, query).await, output(&boss, query).await), (0, 5), "{query}");
    }
    let query = "group_by[]=project_id&group_by[]=api_key_id";
    let apart = |results: &[Value]| {
        let one = |sum: &Value| {
            [&sum["project_id"], &sum["api_key_id"], &sum["output_tokens"]].map(Value::clone)
        };
        results.iter().map(one).collect::<Vec<_>>()
    };
    let row = |project, key, output| [json!(project), json!(key), json!(output)];
    let mine = [row("x", "key_2", 3), row("x", "key_3", 4)];
    assert_eq!(apart(&usage(&server, &friend, query).await), mine);
    assert_eq!(apart(&usage(&server, &boss, query).await)[2], row("y", "key_4", 5));
}
