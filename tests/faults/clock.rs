//! Clocks: the one on the wall may jump a day in the middle of everything; and where the system
//! does not tell the time at all the standard library panics, which is how a step is made to panic
//! in a binary that knows nothing of tests.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::http::{self, Answer};
use crate::server::{self, Server, chat, key, long_stream};
use crate::{CHAT, QUESTION};

const DAY: i64 = 86_400;

/// The clock of the servers that are started with it (`clock.c`).
struct Clock {
    folder: TempDir,
    control: File,
}

impl Clock {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/clock.c");
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", source, "-o"])
            .arg(folder.path().join("clock.so"));
        assert!(compiler.status().expect("the C compiler that linked this test").success());
        fs::write(folder.path().join("control"), [0; 16]).expect("a file");
        let control = File::options().write(true).open(folder.path().join("control"));
        Self { control: control.expect("a file"), folder }
    }

    /// A server, on a folder that may have something in it already.
    fn start(&self, folder: TempDir, extra: &[&str]) -> Server {
        let (log, data) = (folder.path().join("log"), folder.path().join("data"));
        let mut command = server::command(&data, extra);
        let file = |name: &str| -> PathBuf { self.folder.path().join(name) };
        command.env("LD_PRELOAD", file("clock.so")).env("CLOCK_CONTROL", file("control"));
        Server::spawn(command, folder, &log)
    }

    /// The clock on the wall is so far ahead now.
    fn jump(&self, ahead_s: i64) {
        self.control.write_all_at(&ahead_s.to_ne_bytes(), 0).expect("a file");
    }

    /// The time is not told when the engine asks for it for the `look`th time from now.
    fn fail_at(&self, look: i64) {
        self.control.write_all_at(&look.to_ne_bytes(), 8).expect("a file");
    }
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

/// `created` of an answer, in seconds from now.
fn ahead_s(answer: &Answer) -> i64 {
    let now = Command::new("date").arg("+%s").output().expect("date").stdout;
    let now: i64 = String::from_utf8_lossy(&now).trim().parse().expect("a number");
    answer.json()["created"].as_i64().expect("a number") - now
}

/// A stream, a batch and a response in the background run while the clock jumps back a day, then
/// forwards two, then back again.
#[tokio::test(flavor = "multi_thread")]
async fn the_clock_on_the_wall_may_jump() {
    const LINES: usize = 500;
    let clock = Clock::new();
    let server = clock.start(folder(), &[]);
    let mut long = long_stream();
    long["max_tokens"] = json!(600);
    let (before, want) = (server.greedy(QUESTION).await, server.text(&long).await);
    let file = server.upload(LINES).await.json()["id"].clone();
    let mut stored = Vec::new();
    for ahead in [-DAY, DAY, 0] {
        let body = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"});
        let batch = server.post("/v1/batches", &body).await.json();
        let batch = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));
        let begun = server.leaves(&batch, &["validating"]).await;
        let body = json!({"model": "hearth-tiny", "input": "Say mango", "background": true,
                          "max_output_tokens": 300, "ignore_eos": true});
        let response = server.post("/v1/responses", &body).await.json();
        let response = format!("/v1/responses/{}", response["id"].as_str().expect("an id"));
        let mut stream = server.send(CHAT, &long).await;
        stream.wait_for("\"content\"").await;

        clock.jump(ahead);
        assert!(!stream.so_far().contains("[DONE]"), "it was over before the jump");
        assert_eq!(begun["status"], "in_progress");
        assert_eq!(server::text(&stream.answer().await), want);
        let batch = server.leaves(&batch, &["in_progress", "finalizing"]).await;
        assert_eq!(batch["status"], "completed", "{batch}");
        assert_eq!(batch["request_counts"]["completed"], LINES);
        let response = server.leaves(&response, &["queued", "in_progress"]).await;
        assert_eq!(response["status"], "incomplete", "{response}");
        let mut kept = chat(QUESTION, 2, false);
        kept["store"] = json!(true);
        let kept = server.post(CHAT, &kept).await;
        let off = ahead_s(&kept) - ahead;
        assert!(off.abs() < 60, "the jump was not seen: {off} s");
        stored.push(kept.json()["id"].clone());
        assert_eq!(server.greedy(QUESTION).await, before);
        server.is_idle().await;
    }
    // In the order in which they came, whatever their dates say.
    let list = server.get("/v1/chat/completions?order=asc").await.json();
    let list: Vec<&Value> = list["data"].as_array().expect("a list").iter().collect();
    assert_eq!(
        list.iter().map(|kept| &kept["id"]).collect::<Vec<_>>(),
        stored.iter().collect::<Vec<_>>()
    );
    server.is_well().await;
}

/// Requests per minute are of a clock that nobody sets; an expiry is a date.
#[tokio::test(flavor = "multi_thread")]
async fn limits_do_not_follow_the_clock_on_the_wall_and_dates_do() {
    let (clock, folder) = (Clock::new(), folder());
    let data = folder.path().join("data");
    let limited = key(&data, &["--requests-per-min", "6"]);
    let dated = key(&data, &["--expires", "12h"]);
    let server = clock.start(folder, &[]);
    let ask = async |key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
        http::send(server.address, "POST", CHAT, &headers, b"{}").await.answer().await
    };
    for _ in 0..6 {
        assert_eq!(ask(&limited).await.status, 400);
    }
    let mut wait_ms = 0;
    for (ahead, status) in [(0, 400), (-DAY, 400), (DAY, 401), (0, 400)] {
        clock.jump(ahead);
        assert_eq!(ask(&dated).await.status, status, "{ahead} s ahead");
        let refused = ask(&limited).await;
        assert_eq!(refused.status, 429, "{ahead} s ahead: {}", refused.body);
        let told = refused.header("retry-after-ms").expect("a time");
        wait_ms = told.parse().expect("a number");
        assert!(wait_ms <= 10_000, "{ahead} s ahead: {wait_ms} ms");
    }
    clock.jump(-DAY);
    tokio::time::sleep(Duration::from_millis(wait_ms + 50)).await;
    assert_eq!(ask(&limited).await.status, 400, "what it was told is true");
    server.is_idle().await;
    server.is_well().await;
}

/// Three run and one waits when a step panics. Those of the step are told, each in the words of its
/// API; blocks come back; whoever comes later is answered as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_a_step_ends_its_sequences_and_nothing_else() {
    let clock = Clock::new();
    let mut kinds = [0; 2];
    // Alone the engine asks for the time around the forward pass. With a second thread it also does
    // within, hundreds of times, while it waits for that one.
    for (threads, rounds) in [("1", 5), ("2", 10)] {
        let server = clock.start(folder(), &["--max-running", "3", "--threads", threads]);
        let before = server.greedy(QUESTION).await;
        let mut later = long_stream();
        later["max_tokens"] = json!(100);
        let want = server.text(&later).await;
        for count in 1..=rounds {
            let kind = panic_at(&clock, &server, count.into(), &before).await;
            kinds[kind] += 1;
            server.is_idle().await;
            assert_eq!(server.metric("hearth_failures_total").await, f64::from(count));
            assert_eq!(server.log().matches("panicked at").count(), count as usize);
            assert_eq!(server.greedy(QUESTION).await, before);
            assert_eq!(server.text(&later).await, want);
            assert_eq!(server.get("/ready").await.status, 200);
        }
    }
    println!("{} in the forward pass, {} beside it", kinds[0], kinds[1]);
    assert!(kinds[0] > 0 && kinds[1] > 0, "{kinds:?}");
}

/// Which kind of panic it was: 0 in the forward pass, which is an error of its batch alone; 1
/// beside it, when everybody is told.
async fn panic_at(clock: &Clock, server: &Server, look: i64, before: &str) -> usize {
    let batches = || server.log().matches("a batch failed").count();
    let earlier = batches();
    let mut streamed = long_stream();
    let stream = server.send(CHAT, &streamed).await;
    streamed["stream"] = json!(false);
    let whole = server.send(CHAT, &streamed).await;
    let talk = json!({"model": "hearth-tiny", "input": "Say mango", "max_output_tokens": 1500,
                      "stream": true, "ignore_eos": true});
    let talk = server.send("/v1/responses", &talk).await;
    server.becomes("hearth_requests_running", 3.0).await;
    let waiting = server.send(CHAT, &chat(QUESTION, 48, false)).await;
    server.becomes("hearth_requests_waiting", 1.0).await;

    clock.fail_at(look);
    let (stream, whole, talk) = (stream.answer().await, whole.answer().await, talk.answer().await);
    let last = stream.body.trim_end().rsplit("data: ").next().expect("an event");
    let last: Value = serde_json::from_str(last).unwrap_or_else(|_| panic!("{last}"));
    assert_eq!((stream.status, &last["error"]["code"]), (200, &json!("internal_error")));
    assert_eq!((whole.status, &whole.error()["code"]), (500, &json!("internal_error")));
    assert!(talk.body.contains("event: response.failed"), "{}", talk.body);
    let waiting = waiting.answer().await;
    let beside = batches() == earlier;
    match waiting.status {
        // The engine had heard of it.
        500 if beside => {}
        _ => assert_eq!(waiting.json()["choices"][0]["message"]["content"], before),
    }
    usize::from(beside)
}
