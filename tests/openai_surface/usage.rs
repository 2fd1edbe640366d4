//! The ledger over the wire: every token that was computed is on somebody's account, whoever read
//! it, and nobody sees the account of another project.

use std::collections::BTreeMap;
use std::time::Duration;

use hearth::auth::{NewKey, admin};
use hearth::store::{Account, Store, Used, Work};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::adapters;
use crate::fixture::{MODEL, Options, Server, chat_body, start};
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

/// Under the name that they are asked by. What a request adds to a model by a list is the model's.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_have_accounts_of_their_own() {
    const KEY: &str = "anybody";
    let server = adapters::server(Options::default()).await;
    let of_bent = format!("{MODEL}:bent");
    let listed = json!([{"id": "bent", "weight": 0.5}]);
    let text = |model: &str, max: u64| -> Value {
        json!({"model": model, "prompt": "Tell", "max_tokens": max, "ignore_eos": true})
    };
    let chat = |model: &str, max: u64| {
        let mut body = chat_body(json!({"max_tokens": max, "ignore_eos": true}));
        body["model"] = json!(model);
        body
    };
    let mut with_list = text(MODEL, 4);
    with_list["adapters"] = listed;
    let mut stream = chat("bent", 64);
    stream["stream"] = json!(true);
    let response = json!({"model": "bent", "input": "Hi", "max_output_tokens": 32,
        "ignore_eos": true});
    let line = json!({"custom_id": "1", "method": "POST", "url": CHAT, "body": chat("bent", 128)});
    let bodies = [
        ("/v1/completions", text(MODEL, 1)),
        ("/v1/completions", text("bent", 2)),
        ("/v1/completions", with_list),
        ("/v1/completions", text(&of_bent, 8)),
        (CHAT, chat("bent", 16)),
        ("/v1/responses", response),
        (CHAT, stream),
    ];
    for (path, body) in bodies {
        let answer = server.ask("POST", path, Some(KEY), Some(body)).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }
    let said = json!([{"role": "user", "content": "Hi"}]);
    let message = json!({"model": "bent", "max_tokens": 256, "messages": said});
    let message = ask(&server, KEY, "/v1/messages", message).await;
    let of_message = message["usage"]["output_tokens"].as_u64().expect("a count");
    let file = server.upload(Some(KEY), "batch", &format!("{line}\n")).await;
    let batch = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"});
    let batch = ask(&server, KEY, "/v1/batches", batch).await;
    assert_eq!(server.ended(Some(KEY), &batch).await["status"], "completed");
    after(&server, KEY, 9).await;
    let apart = usage(&server, KEY, "group_by[]=model").await;
    let mut accounts = BTreeMap::new();
    for sum in &apart {
        let name = sum["model"].as_str().expect("a name").to_owned();
        let [requests, _, output] = sums(std::slice::from_ref(sum));
        accounts.insert(name, (requests, output));
    }
    let own = (7, 2 + 8 + 16 + 32 + 64 + 128 + of_message);
    let want = [("bent".to_owned(), own), (MODEL.to_owned(), (2, 1 + 4))];
    assert_eq!(accounts, BTreeMap::from(want));
    assert_eq!(sums(&usage(&server, KEY, "models[]=bent").await)[2], own.1);
}

/// A month of minutes of many models, which takes a second to add up, asked for again and again:
/// keys are looked up, prompts answered and other keys' lists made meanwhile, and of that key one
/// is added up at a time.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_who_adds_up_everything() {
    const ROWS: u64 = 400_000;
    const QUERIES: usize = 12;
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path()).expect("a store");
    let made = ["greedy", "other"].map(|name| admin::create(&store, &new(name, name)).unwrap());
    let used = Used { requests: 1, input: 2, cached: 0, output: 3 };
    let account = |i: u64| Account {
        minute_s: i / 10 * 60,
        project: made[0].row.project.0,
        key: made[0].row.id,
        model: format!("model {}", i % 10),
        work: Work::Completions,
        batch: false,
        tier: "default",
    };
    let filled = store.write(|tx| (0..ROWS).try_for_each(|i| tx.add_usage(&account(i), used)));
    filled.expect("room");
    let [greedy, other] = made.map(|key| key.secret);
    let server = start(Options { store, ..Options::default() }).await;
    let query = "start_time=0&end_time=2592000&limit=31&group_by[]=project_id\
                 &group_by[]=api_key_id&group_by[]=model";
    let path = format!("{USAGE}?{query}");
    let mut queries = JoinSet::new();
    for _ in 0..QUERIES {
        let (address, path, bearer) = (server.address, path.clone(), format!("Bearer {greedy}"));
        queries.spawn(async move {
            let headers = [("Authorization", bearer.as_str())];
            http::send(address, "GET", &path, &headers, b"").await.answer().await
        });
    }
    let first = queries.join_next().await.expect("one").expect("no panic").json();
    let days = first["data"].as_array().expect("buckets").iter();
    let results: Vec<Value> =
        days.flat_map(|day| day["results"].as_array().expect("sums").clone()).collect();
    assert_eq!(sums(&results), [ROWS, 2 * ROWS, 3 * ROWS]);
    // The others are at it.
    let mut over = 1;
    for key in [&greedy, &other] {
        ask(&server, key, CHAT, chat_body(json!({"max_tokens": 2}))).await;
    }
    while queries.try_join_next().is_some() {
        over += 1;
    }
    assert!(over <= QUERIES / 2, "{over} of {QUERIES} were added up before two short answers");
    let before = over;
    for path in [CHAT, USAGE] {
        let list = server.ask("GET", path, Some(&other), None).await;
        assert_eq!(list.status, 200, "{}", list.body);
    }
    while queries.try_join_next().is_some() {
        over += 1;
    }
    // Each waits for the one that is being added up, and then it is its turn.
    assert!(over <= before + 3, "{} were added up before two lists", over - before);
    queries.join_all().await;
}
