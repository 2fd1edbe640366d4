//! API keys over the wire: who gets in, what a key sees, what it may use, who manages keys.

use std::sync::Arc;
use std::time::Duration;

use hearth::auth::{NewKey, admin};
use hearth::server::ServerConfig;
use hearth::store::Store;
use serde_json::{Value, json};

use crate::fixture::{Options, Server, chat_body, start};
use crate::http::{self, Answer};

pub(crate) fn new(name: &str, project: &str) -> NewKey {
    NewKey::named(name, project)
}

/// A server with these keys, and the keys.
pub(crate) async fn start_with<const N: usize>(keys: [NewKey; N]) -> (Server, [String; N]) {
    let store = Store::in_memory().expect("a store");
    let secrets = keys.map(|key| admin::create(&store, &key).expect("a key").secret);
    (start(Options { store, ..Options::default() }).await, secrets)
}

async fn chat(server: &Server, key: &str, fields: Value) -> Answer {
    server.ask("POST", "/v1/chat/completions", Some(key), Some(chat_body(fields))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn only_keys_of_the_table_get_in() {
    let (server, [key]) = start_with([new("a", "a")]).await;
    assert_eq!(server.ask("GET", "/v1/models", Some(&key), None).await.status, 200);
    for wrong in [None, Some("sk-wrong"), Some(&key[..key.len() - 1])] {
        let answer = server.ask("GET", "/v1/models", wrong, None).await;
        assert_eq!((answer.status, &answer.error()["code"]), (401, &json!("invalid_api_key")));
        assert_eq!(answer.error()["type"], "invalid_request_error");
        assert_eq!(answer.header("openai-organization"), Some("hearth"));
    }
    // Pages about the server itself want none.
    assert_eq!(server.ask("GET", "/health", None, None).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_sees_its_own_project_only() {
    let (server, [one, two, friend]) =
        start_with([new("one", "x"), new("two", "y"), new("friend", "x")]).await;
    let stored = chat(&server, &one, json!({"store": true, "max_tokens": 2})).await.json();
    let path = format!("/v1/chat/completions/{}", stored["id"].as_str().expect("an id"));
    let messages = format!("{path}/messages");
    for path in [&path, &messages] {
        assert_eq!(server.ask("GET", path, Some(&friend), None).await.status, 200);
        let answer = server.ask("GET", path, Some(&two), None).await;
        assert_eq!((answer.status, &answer.error()["code"]), (404, &json!("not_found")));
    }
    let labels = Some(json!({"metadata": {"k": "v"}}));
    assert_eq!(server.ask("POST", &path, Some(&two), labels).await.status, 404);
    assert_eq!(server.ask("DELETE", &path, Some(&two), None).await.status, 404);
    let list = |key| server.ask("GET", "/v1/chat/completions", Some(key), None);
    assert_eq!(list(&two).await.json()["data"], json!([]));
    assert_eq!(list(&friend).await.json()["data"][0]["id"], stored["id"]);
}

/// `usage` tells how much of a prompt was there before: within a project, and to nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_lent_within_a_project_only() {
    let (server, [one, two, friend]) =
        start_with([new("one", "x"), new("two", "y"), new("friend", "x")]).await;
    let said = json!([{"role": "user", "content": "the same long question ".repeat(8)}]);
    let cached = async |key: &str| {
        let answer = chat(&server, key, json!({"max_tokens": 1, "messages": said})).await;
        let details = answer.json()["usage"]["prompt_tokens_details"].clone();
        details["cached_tokens"].as_u64().expect("a number")
    };
    assert_eq!(cached(&one).await, 0);
    assert_eq!(cached(&two).await, 0);
    assert!(cached(&friend).await >= 16);
}

/// Places are free, and a key that may use one uses one; another key has its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_no_more_running_than_it_may() {
    let single = NewKey { max_running: Some(1), ..new("a", "a") };
    let (server, [key, free]) = start_with([single, new("free", "a")]).await;
    let stream = json!({"stream": true, "ignore_eos": true, "max_tokens": 1500});
    let body = chat_body(stream).to_string();
    let begin = async |key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
        let path = "/v1/chat/completions";
        let mut begun = http::send(server.address, "POST", path, &headers, body.as_bytes()).await;
        begun.wait_for("\r\n\r\n").await;
        begun
    };
    let mut all = Vec::new();
    for _ in 0..3 {
        all.push(begin(&key).await);
    }
    all[0].wait_for("\"content\":").await;
    assert_eq!(server.metric("hearth_requests_waiting").await, 2.0);
    let mut most = 0.0_f64;
    while server.metric("hearth_requests_waiting").await > 0.0 {
        most = most.max(server.metric("hearth_requests_running").await);
    }
    assert_eq!(most, 1.0, "running at once");
    let mut other = begin(&free).await;
    other.wait_for("\"content\":").await;
    for answer in all {
        answer.answer().await.chunks();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_limit_are_told_when_to_come_back() {
    let limited = NewKey { requests_per_min: Some(2), ..new("a", "a") };
    let (server, [key, free]) = start_with([limited, new("free", "a")]).await;
    for left in ["1", "0"] {
        let answer = chat(&server, &key, json!({"max_tokens": 1})).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("x-ratelimit-limit-requests"), Some("2"));
        assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some(left));
        assert!(
            answer.header("x-ratelimit-reset-requests").is_some_and(|time| time.ends_with('s'))
        );
        assert_eq!(answer.header("x-ratelimit-limit-tokens"), None);
    }
    let refused = chat(&server, &key, json!({"max_tokens": 1})).await;
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("rate_limit_exceeded")));
    assert_eq!(refused.error()["type"], "requests");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("0"));
    let wait_s: u64 = refused.header("retry-after").expect("a time").parse().expect("seconds");
    assert!((25..=30).contains(&wait_s), "{wait_s}");
    assert_eq!(refused.header("x-should-retry"), None);
    // Looking is not asking, and the limit of one key is not that of another.
    assert_eq!(server.ask("GET", "/v1/models", Some(&key), None).await.status, 200);
    let other = chat(&server, &free, json!({"max_tokens": 1})).await;
    assert_eq!((other.status, other.header("x-ratelimit-limit-requests")), (200, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_counted_as_usage_counts_them() {
    let limited = NewKey { tokens_per_min: Some(600), ..new("a", "a") };
    let (server, [key]) = start_with([limited]).await;
    let fields = json!({"max_tokens": 100, "ignore_eos": true});
    let answer = chat(&server, &key, fields).await;
    let used = answer.json()["usage"]["total_tokens"].as_u64().expect("a count");
    let left = answer.header("x-ratelimit-remaining-tokens").expect("a count");
    let left: u64 = left.parse().expect("a number");
    // Ten come back in a second.
    assert!(left >= 600 - used && left < 600 - used + 100, "{left} left, {used} used");
    let fields = json!({"max_tokens": 3000, "ignore_eos": true, "stream": true});
    chat(&server, &key, fields).await.chunks();
    let refused = chat(&server, &key, json!({"max_tokens": 1})).await;
    assert_eq!((refused.status, &refused.error()["type"]), (429, &json!("tokens")));
    let wait_s: u64 = refused.header("retry-after").expect("a time").parse().expect("seconds");
    // Longer than the official clients wait by themselves: they are told not to try.
    assert!(wait_s > 120, "{wait_s}");
    assert_eq!(refused.header("x-should-retry"), Some("false"));
}

#[tokio::test(flavor = "multi_thread")]
async fn admins_manage_keys_and_nobody_else() {
    let boss = NewKey { admin: true, ..new("boss", "school") };
    let (server, [boss, user]) = start_with([boss, new("user", "school")]).await;
    let body = json!({"name": "room 2", "project": "class", "weight": 3, "requests_per_min": 9,
        "queue_timeout_s": 40});
    for (method, path) in
        [("GET", "/v1/admin/keys"), ("POST", "/v1/admin/keys"), ("DELETE", "/v1/admin/keys/key_1")]
    {
        let answer = server.ask(method, path, Some(&user), Some(body.clone())).await;
        let code = answer.error()["code"].clone();
        assert_eq!((answer.status, code), (403, json!("insufficient_permissions")));
    }
    let made = server.ask("POST", "/v1/admin/keys", Some(&boss), Some(body)).await;
    assert_eq!(made.status, 201);
    let made = made.json();
    assert_eq!((&made["weight"], &made["project"]), (&json!(3), &json!("class")));
    assert_eq!((&made["queue_timeout_s"], &made["max_running"]), (&json!(40), &json!(null)));
    let key = made["value"].as_str().expect("the key");
    assert_eq!(chat(&server, key, json!({"max_tokens": 1})).await.status, 200);
    let list = server.ask("GET", "/v1/admin/keys", Some(&boss), None).await;
    assert!(!list.body.contains(key));
    assert_eq!(list.json()["data"].as_array().map(Vec::len), Some(3));
    let path = format!("/v1/admin/keys/{}", made["id"].as_str().expect("an id"));
    assert_eq!(server.ask("DELETE", &path, Some(&boss), None).await.json()["deleted"], true);
    let out = chat(&server, key, json!({"max_tokens": 1})).await;
    assert_eq!(
        (out.status, out.error()["message"].as_str().is_some_and(|m| m.contains("revoked"))),
        (401, true)
    );
    assert_eq!(server.ask("DELETE", "/v1/admin/keys/key_99", Some(&boss), None).await.status, 404);
    for (field, value) in [
        ("name", json!(5)),
        ("weight", json!(0)),
        ("wait", json!(1)),
        ("queue_timeout_s", json!(0)),
    ] {
        let mut body = json!({"name": "x"});
        body[field] = value;
        let answer = server.ask("POST", "/v1/admin/keys", Some(&boss), Some(body)).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(field)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_server_lets_nobody_make_keys() {
    let server = start(Options::default()).await;
    let made = server.ask("POST", "/v1/admin/keys", None, Some(json!({"name": "mine"}))).await;
    assert_eq!(made.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_out_within_a_second() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = || Store::open(folder.path()).expect("a store");
    let elsewhere = Arc::new(open());
    let key = admin::create(&elsewhere, &new("a", "a")).expect("a key").secret;
    let server = start(Options { store: open(), ..Options::default() }).await;
    assert_eq!(server.ask("GET", "/v1/models", Some(&key), None).await.status, 200);
    admin::revoke(&elsewhere, "a").expect("it is there");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(server.ask("GET", "/v1/models", Some(&key), None).await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_ask_only_where_the_operator_says_so() {
    let friend = "https://app.example";
    let asks = [
        ("Origin", friend),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type"),
    ];
    let config = ServerConfig { cors_origins: vec![friend.to_owned()], ..Default::default() };
    let api_keys = vec!["sk-k".to_owned()];
    let server = start(Options { config, api_keys, ..Options::default() }).await;
    let path = "/v1/chat/completions";
    let ask = async |server: &Server, method: &str, headers: &[(&str, &str)]| {
        http::send(server.address, method, path, headers, b"").await.answer().await
    };
    // A browser asks without a key.
    let permission = ask(&server, "OPTIONS", &asks).await;
    assert_eq!(permission.status, 204);
    assert_eq!(permission.header("access-control-allow-origin"), Some(friend));
    let allowed = permission.header("access-control-allow-headers");
    assert_eq!(allowed, Some("authorization,content-type"));
    // And reads errors too.
    let refused = ask(&server, "POST", &[("Origin", friend)]).await;
    assert_eq!(refused.status, 401);
    assert_eq!(refused.header("access-control-allow-origin"), Some(friend));
    let stranger = ask(&server, "POST", &[("Origin", "https://evil.example")]).await;
    assert_eq!(stranger.header("access-control-allow-origin"), None);
    let closed = start(Options::default()).await;
    let none = ask(&closed, "OPTIONS", &asks).await;
    assert_eq!((none.status, none.header("access-control-allow-origin")), (405, None));
}
