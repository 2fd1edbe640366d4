//! Several models in one process, with the real binary: loaded on demand under a memory budget,
//! evicted when another needs the room, unloaded when nobody asks, and never while a request holds
//! them.
//!
//! The models are copies of the built-in one, which is small and answers alike under every name,
//! and a small encoder.
#![cfg(all(target_os = "linux", feature = "builtin-model"))]

#[allow(dead_code, reason = "shared with another test binary, which uses the rest")]
#[path = "openai_surface/http.rs"]
mod http;
#[allow(dead_code, reason = "shared with another test binary, which uses the rest")]
#[path = "faults/server.rs"]
mod server;

use std::fs;
use std::path::Path;
use std::time::Duration;

use hearth::registry::builtin;
use serde_json::{Value, json};
use tempfile::TempDir;

use http::Answer;
use server::Server;

/// One whole context and no more, so that what a model takes does not depend on the budget; and so
/// many rows in a pass that a small encoder needs room too.
const FLAGS: [&str; 6] = ["--ctx-size", "512", "--max-running", "1", "--batch-tokens", "4096"];

/// A folder with these copies of the built-in model.
fn models(names: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in names {
        put(folder.path(), name);
    }
    folder
}

fn put(folder: &Path, name: &str) {
    let bytes = builtin::bytes().expect("the feature is on");
    fs::write(folder.join(format!("{name}.gguf")), bytes).expect("a file");
}

fn start(folder: &TempDir, extra: &[&str]) -> Server {
    let path = folder.path().to_str().expect("a path");
    Server::start(&[&FLAGS[..], &["--models-dir", path], extra].concat())
}

/// A server in which as many models of one size fit as `count` says.
async fn start_for(folder: &TempDir, count: f64, extra: &[&str]) -> Server {
    let bytes = {
        let server = start(folder, &["--memory-budget", "2G"]);
        standing(&server, "a").await["memory_bytes"].as_f64().expect("a number")
    };
    let budget = format!("{}M", (bytes * count / 1_048_576.0).ceil());
    start(folder, &[&["--memory-budget", budget.as_str()], extra].concat())
}

fn question(model: &str, fields: &Value) -> Value {
    let mut body = server::chat("[1] Oro lives in Lume.\n\nWhere does Oro live?", 24, false);
    body["model"] = json!(model);
    for (name, value) in fields.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

async fn ask(server: &Server, model: &str) -> Answer {
    server.post("/v1/chat/completions", &question(model, &json!({}))).await
}

async fn text(server: &Server, model: &str) -> String {
    let answer = ask(server, model).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    assert_eq!(answer["model"], model);
    answer["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
}

async fn standing(server: &Server, model: &str) -> Value {
    let list = server.get("/v1/admin/models").await.json();
    let list = list["data"].as_array().expect("a list").clone();
    list.into_iter().find(|one| one["id"] == model).unwrap_or_else(|| panic!("no {model}"))
}

async fn state(server: &Server, model: &str) -> String {
    standing(server, model).await["state"].as_str().expect("a state").to_owned()
}

/// Waits until a model stands so.
async fn wait_for(server: &Server, model: &str, key: &str, value: Value) {
    for _ in 0..3000 {
        if standing(server, model).await[key] == value {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{key} of {model} never became {value}: {}", standing(server, model).await);
}

/// A stream that is not over soon.
fn stream(model: &str) -> Value {
    question(model, &json!({"stream": true, "ignore_eos": true, "max_tokens": 400}))
}

async fn admin(server: &Server, path: &str) -> Answer {
    server.post(&format!("/v1/admin/models/{path}"), &json!({})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn models_come_on_demand_and_the_one_unused_longest_goes() {
    let folder = models(&["a", "b", "c"]);
    let server = start_for(&folder, 2.5, &["--model-alias", "gpt-4o-mini=b"]).await;
    let list = server.get("/v1/models").await.json();
    let list = list["data"].as_array().expect("a list").clone();
    let ids: Vec<_> = list.iter().map(|one| one["id"].as_str().expect("an id")).collect();
    assert_eq!(ids, ["a", "b", "c", "gpt-4o-mini"]);
    for one in &list {
        assert_eq!((&one["object"], &one["owned_by"]), (&json!("model"), &json!("hearth")));
        assert!(one["created"].is_u64() && one["context_length"] == 512, "{one}");
    }
    // To send away, in Ollama's words, what is not there brings nothing in.
    let away = server.post("/api/chat", &json!({"model": "b", "keep_alive": 0})).await;
    assert_eq!((away.status, &away.json()["done_reason"]), (200, &json!("unload")));
    assert_eq!(server.metric("hearth_model_loads_total").await, 0.0);
    assert_eq!(server.get("/ready").await.status, 200);

    let said = text(&server, "a").await;
    assert!(!said.is_empty());
    assert_eq!(text(&server, "b").await, said);
    assert_eq!(text(&server, "a").await, said, "and now b was not used for longer");
    assert_eq!(text(&server, "c").await, said);
    assert_eq!(state(&server, "b").await, "unloaded");
    assert_eq!(
        (state(&server, "a").await, state(&server, "c").await),
        ("ready".into(), "ready".into())
    );
    assert_eq!(server.metric("hearth_model_evictions_total").await, 1.0);
    // The other name loads it again: a new generation that has computed nothing yet.
    let body = question("gpt-4o-mini", &json!({}));
    let again = server.post("/v1/chat/completions", &body).await.json();
    assert_eq!(
        (&again["model"], &again["choices"][0]["message"]["content"]),
        (&json!("b"), &json!(said))
    );
    let cached = &again["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(cached, 0, "its prefixes went with it");
    assert_eq!(standing(&server, "b").await["loads"], 2);
    assert_eq!(server.metric("hearth_model_loads_total").await, 4.0);
    assert_eq!(state(&server, "a").await, "unloaded");
    let resident = server.metric("hearth_model_resident_bytes").await;
    let each = standing(&server, "a").await["memory_bytes"].as_f64().expect("a number");
    assert_eq!(resident, 2.0 * each);
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_stream_is_never_dropped_for_another_model() {
    let folder = models(&["a", "b"]);
    let server = start_for(&folder, 1.5, &[]).await;
    let alone = server.post("/v1/chat/completions", &stream("a")).await.body;
    let words = |body: &str| -> String {
        let chunks = body.lines().filter_map(|line| line.strip_prefix("data: {"));
        let chunk = |rest: &str| serde_json::from_str::<Value>(&format!("{{{rest}")).expect("JSON");
        let text = |v: Value| v["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
        chunks.map(chunk).filter_map(text).collect()
    };
    let mut running = server.send("/v1/chat/completions", &stream("a")).await;
    running.wait_for("\"content\"").await;
    let waiting = server.send("/v1/chat/completions", &question("b", &json!({}))).await;
    wait_for(&server, "b", "requests_waiting", json!(1)).await;
    assert_eq!(state(&server, "a").await, "ready");
    // Who gives up leaves the line.
    drop(waiting);
    wait_for(&server, "b", "requests_waiting", json!(0)).await;
    let waiting = server.send("/v1/chat/completions", &question("b", &json!({}))).await;
    let (ran, waited) = tokio::join!(running.answer(), waiting.answer());
    assert_eq!(words(&ran.body), words(&alone), "as if nobody had waited");
    assert!(ran.body.contains("[DONE]"));
    assert_eq!(waited.status, 200, "{}", waited.body);
    assert_eq!(
        (state(&server, "a").await, state(&server, "b").await),
        ("unloaded".into(), "ready".into())
    );
    server.is_well().await;
}

/// What a client has not read yet of an answer that is computed needs no model.
#[tokio::test(flavor = "multi_thread")]
async fn who_reads_slowly_keeps_no_model_from_others() {
    let folder = models(&["a", "b"]);
    let server = start_for(&folder, 1.5, &["--send-timeout-s", "600"]).await;
    let mut body = stream("a");
    (body["logprobs"], body["top_logprobs"]) = (json!(true), json!(20));
    let want = server::text(&server.post("/v1/chat/completions", &body).await);
    let mut slow = server.send("/v1/chat/completions", &body).await;
    slow.wait_for("\"content\"").await;
    let other = tokio::time::timeout(Duration::from_secs(40), ask(&server, "b")).await;
    assert_eq!(other.expect("it waits for a reader").status, 200);
    assert_eq!(state(&server, "a").await, "unloaded");
    let answer = slow.answer().await;
    assert!(answer.body.len() > 512 << 10, "{} bytes are no burden", answer.body.len());
    assert_eq!(server::text(&answer), want);
    server.is_well().await;
}

/// What is not computed yet because its client does not read keeps the model, and nobody else from
/// it, however long others wait for another.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_waits_for_a_reader_is_there_for_others_meanwhile() {
    let folder = models(&["a", "b"]);
    let server = start_for(&folder, 1.5, &["--send-timeout-s", "600"]).await;
    let mut body = stream("a");
    (body["logprobs"], body["top_logprobs"], body["n"]) = (json!(true), json!(20), json!(16));
    let mut slow = server.send("/v1/chat/completions", &body).await;
    slow.wait_for("\"content\"").await;
    let stands = async || {
        let aside = server.metric("hearth_requests_aside").await;
        aside > 0.0 && aside == server.metric("hearth_requests_running").await
    };
    for _ in 0..3000 {
        if stands().await {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(stands().await, "it was all computed");
    let waiting = server.send("/v1/chat/completions", &question("b", &json!({}))).await;
    wait_for(&server, "b", "requests_waiting", json!(1)).await;
    // Longer than it takes until busy models let nobody in.
    tokio::time::sleep(Duration::from_secs(23)).await;
    let other = tokio::time::timeout(Duration::from_secs(10), ask(&server, "a")).await;
    assert_eq!(other.expect("it waits for a reader of somebody else").status, 200);
    let (slow, waited) = tokio::join!(slow.answer(), waiting.answer());
    assert_eq!(slow.body.matches("\"finish_reason\":\"").count(), 16);
    assert_eq!(waited.status, 200, "{}", waited.body);
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_line_says_when_to_come_back() {
    let folder = models(&["a", "b"]);
    let server = start_for(&folder, 1.5, &["--max-queue", "2"]).await;
    let mut running = server.send("/v1/chat/completions", &stream("a")).await;
    running.wait_for("\"content\"").await;
    let first = server.send("/v1/chat/completions", &question("b", &json!({}))).await;
    let second = server.send("/v1/chat/completions", &question("b", &json!({}))).await;
    wait_for(&server, "b", "requests_waiting", json!(2)).await;
    let third = ask(&server, "b").await;
    assert_eq!((third.status, &third.error()["code"]), (429, &json!("rate_limit_exceeded")));
    assert!(third.header("retry-after").is_some_and(|s| s.parse::<u64>().is_ok_and(|s| s > 0)));
    let answers = tokio::join!(running.answer(), first.answer(), second.answer());
    assert_eq!((answers.0.status, answers.1.status, answers.2.status), (200, 200, 200));
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_model_leaves_when_its_time_has_come() {
    let folder = models(&["a", "b"]);
    let server = start(&folder, &["--memory-budget", "2G", "--keep-alive", "200ms"]);
    text(&server, "a").await;
    wait_for(&server, "a", "state", json!("unloaded")).await;
    assert_eq!(server.metric("hearth_model_idle_unloads_total").await, 1.0);
    // A request may say otherwise, for chats, completions, responses and embeddings alike.
    let kept = question("a", &json!({"keep_alive": -1}));
    assert_eq!(server.post("/v1/chat/completions", &kept).await.status, 200);
    let body = json!({"model": "b", "prompt": "a", "max_tokens": 1, "keep_alive": "5m"});
    assert_eq!(server.post("/v1/completions", &body).await.status, 200);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(
        (state(&server, "a").await, state(&server, "b").await),
        ("ready".into(), "ready".into())
    );
    let body = json!({"model": "a", "input": "Hi", "keep_alive": 0, "store": false});
    assert_eq!(server.post("/v1/responses", &body).await.status, 200);
    wait_for(&server, "a", "state", json!("unloaded")).await;
    assert_eq!(state(&server, "b").await, "ready");
    let wrong = question("a", &json!({"keep_alive": "soon"}));
    let wrong = server.post("/v1/chat/completions", &wrong).await;
    assert_eq!((wrong.status, &wrong.error()["param"]), (400, &json!("keep_alive")));
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_fails_tells_everybody_and_the_next_one_tries_again() {
    let folder = models(&["a", "b"]);
    let server = start(&folder, &["--memory-budget", "2G"]);
    let path = folder.path().join("b.gguf");
    fs::rename(&path, folder.path().join("gone")).expect("it is there");
    let failed = tokio::join!(ask(&server, "b"), ask(&server, "b"), ask(&server, "a"));
    for answer in [&failed.0, &failed.1] {
        assert_eq!((answer.status, &answer.error()["code"]), (500, &json!("model_load_failed")));
        assert!(
            answer.error()["message"].as_str().is_some_and(|m| m.contains("`b`")),
            "{answer:?}"
        );
    }
    assert_eq!(failed.2.status, 200);
    assert!(server.metric("hearth_model_load_failures_total").await >= 1.0);
    // Another model under the name: not what the memory was divided for.
    fs::copy(golden("llama.gguf"), &path).expect("a copy");
    let changed = ask(&server, "b").await;
    assert!(changed.error()["message"].as_str().is_some_and(|m| m.contains("start the server")));
    fs::rename(folder.path().join("gone"), &path).expect("it was there");
    assert_eq!(text(&server, "b").await, text(&server, "a").await);
    server.is_well().await;
}

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_fits_is_refused_by_name_with_both_numbers() {
    let folder = models(&["a"]);
    let server = start(&folder, &["--memory-budget", "3M"]);
    assert_eq!(server.get("/v1/models").await.json()["data"], json!([]));
    let refused = ask(&server, "a").await;
    assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("model")));
    let message = refused.error()["message"].to_string();
    assert!(message.contains("`a`") && message.contains("3 MB"), "{message}");
    assert!(message.matches(" MB").count() >= 2, "{message}");
    // Beside a pinned one as well, though it would fit alone.
    let folder = models(&["a", "b"]);
    let server = start_for(&folder, 1.5, &["--pin", "a"]).await;
    assert_eq!(state(&server, "a").await, "ready");
    let refused = ask(&server, "b").await;
    let message = refused.error()["message"].to_string();
    assert!(refused.status == 400 && message.contains("`b`"), "{message}");
    assert!(message.contains("pinned"), "{message}");
    assert_eq!(state(&server, "a").await, "ready");
}

#[test]
fn the_list_shows_what_a_server_would_offer() {
    let folder = models(&["a", "b"]);
    fs::write(folder.path().join("noise.gguf"), "noise").expect("a file");
    let list = |budget: &str| {
        let path = folder.path().to_str().expect("a path");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hearth"));
        command.args(["models", "list", "--models-dir", path, "--memory-budget", budget]);
        let output = command.args(FLAGS).output().expect("it runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("a text")
    };
    let text = list("2G");
    let row = |id: &str| {
        let rows = text.lines().filter_map(|line| line.strip_prefix("  "));
        let found = rows.into_iter().find(|row| row.split(' ').next() == Some(id));
        found.unwrap_or_else(|| panic!("no {id} in {text}"))
    };
    for id in ["a", "b"] {
        assert!(row(id).contains("loaded on demand") && row(id).contains("context 512"), "{text}");
    }
    assert!(text.contains("2048 MB") && text.contains("not offered: The model `noise`"), "{text}");
    let none = list("3M");
    assert!(none.contains("not offered: The model `a`") && none.contains("3 MB"), "{none}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_loads_and_unloads() {
    let folder = models(&["a", "b"]);
    let server = start(&folder, &["--memory-budget", "2G", "--pin", "b"]);
    let loaded = admin(&server, "a/load").await;
    assert_eq!((loaded.status, &loaded.json()["state"]), (200, &json!("ready")));
    let mut running = server.send("/v1/chat/completions", &stream("a")).await;
    running.wait_for("\"content\"").await;
    let busy = admin(&server, "a/unload").await;
    assert_eq!((busy.status, &busy.error()["code"]), (409, &json!("model_in_use")));
    assert_eq!(running.answer().await.status, 200);
    wait_for(&server, "a", "requests_running", json!(0)).await;
    assert_eq!(admin(&server, "a/unload").await.status, 200);
    wait_for(&server, "a", "state", json!("unloaded")).await;
    assert_eq!(admin(&server, "a/unload").await.status, 200, "it is gone already");
    let pinned = admin(&server, "b/unload").await;
    assert!(pinned.status == 409 && pinned.body.contains("pinned"), "{}", pinned.body);
    assert_eq!(admin(&server, "c/load").await.status, 404);
    assert_eq!(admin(&server, "a/lode").await.status, 404);
    let headers = [("origin", "https://strange.example")];
    let strange =
        http::send(server.address, "POST", "/v1/admin/models/b/load", &headers, b"").await;
    assert_eq!(strange.answer().await.status, 415);
    // Where keys are asked for, an admin's is.
    let server = start(&folder, &["--memory-budget", "2G", "--api-key", "sk-test"]);
    let headers = [("authorization", "Bearer sk-test"), ("content-type", "application/json")];
    let path = "/v1/admin/models/a/load";
    let answer = http::send(server.address, "POST", path, &headers, b"{}").await.answer().await;
    assert_eq!(answer.status, 403, "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_that_embed_take_part_in_the_same_way() {
    let folder = models(&["a"]);
    fs::copy(golden("bert.gguf"), folder.path().join("bert.gguf")).expect("a copy");
    let server = start_for(&folder, 1.02, &[]).await;
    let embed = json!({"model": "bert", "input": "ab c"});
    let vector = |answer: Answer| {
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["data"][0]["embedding"].clone()
    };
    let first = vector(server.post("/v1/embeddings", &embed).await);
    assert_eq!(state(&server, "bert").await, "ready");
    assert!(!text(&server, "a").await.is_empty());
    assert_eq!(state(&server, "bert").await, "unloaded", "they do not fit together");
    let list = server.get("/v1/models").await.json();
    assert!(list["data"][1]["embedding_length"].is_u64(), "{list}");
    let mut gone = embed.clone();
    gone["keep_alive"] = json!(0);
    assert_eq!(vector(server.post("/v1/embeddings", &gone).await), first);
    assert_eq!(state(&server, "a").await, "unloaded");
    wait_for(&server, "bert", "state", json!("unloaded")).await;
    assert_eq!(vector(server.post("/v1/embeddings", &embed).await), first, "as before");
    let wrong = ask(&server, "bert").await;
    assert_eq!((wrong.status, &wrong.error()["param"]), (400, &json!("model")));
    server.is_well().await;
}

/// Whoever scrapes while a request waits for a load sees that one waits, and for what.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_and_who_waits_for_it_are_in_the_metrics() {
    let folder = models(&["a"]);
    let server = start(&folder, &[]);
    let wanted = [
        "hearth_model_requests_waiting{model=\"a\"} 1",
        "hearth_model_state{model=\"a\",state=\"loading\"} 1",
        "hearth_model_state{model=\"a\",state=\"ready\"} 0",
    ];
    // A load takes some hundredths of a second, and each is looked at as often as can be.
    for _ in 0..50 {
        let pending = server.send("/v1/chat/completions", &question("a", &json!({}))).await;
        while state(&server, "a").await != "ready" {
            let metrics = server.get("/metrics").await.body;
            if wanted.iter().all(|line| metrics.lines().any(|known| known == *line)) {
                assert_eq!(pending.answer().await.status, 200);
                let metrics = server.get("/metrics").await.body;
                assert!(metrics.contains("hearth_model_requests_waiting{model=\"a\"} 0"));
                return;
            }
        }
        assert_eq!(pending.answer().await.status, 200);
        assert_eq!(admin(&server, "a/unload").await.status, 200);
        wait_for(&server, "a", "state", json!("unloaded")).await;
    }
    panic!("nobody was seen to wait for a load");
}
