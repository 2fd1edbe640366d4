//! What happens when things go wrong, with the real binary: clients that leave at every stage, that
//! vanish without a word, that do not read, connections that never ask, bodies made of noise, a
//! step that panics, no blocks left, kill -9, SIGTERM, clocks that jump, a full disk under
//! everything that is kept, blocks of keys and values on a disk that lies. After each: no block is
//! held, no sequence is stuck, nothing has panicked, and what other clients are told has not
//! changed.
#![cfg(all(target_os = "linux", feature = "builtin-model"))]

#[cfg(target_env = "gnu")]
#[path = "faults/clock.rs"]
mod clock;
#[path = "faults/disk.rs"]
mod disk;
#[allow(dead_code, reason = "shared with another test binary, which uses the rest")]
#[path = "openai_surface/http.rs"]
mod http;
#[path = "faults/kept.rs"]
mod kept;
#[path = "faults/noise.rs"]
mod noise;
#[path = "faults/readers.rs"]
mod readers;
#[path = "faults/server.rs"]
mod server;
#[path = "faults/tls.rs"]
mod tls;
#[path = "faults/unread.rs"]
mod unread;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::TcpStream;

use readers::large_stream;
use server::{Server, Witness, chat, command, long_stream};

const CHAT: &str = "/v1/chat/completions";
const QUESTION: &str =
    "[1] Mirka lives in Torvin. Mirka plays the flute.\n\nWhere does Mirka live?";

/// The same long answer on every road to it: streams of each API, and one in one piece.
fn roads() -> Vec<(&'static str, Value)> {
    let mut whole = long_stream();
    whole["stream"] = json!(false);
    let mut two = long_stream();
    two["n"] = json!(2);
    let (model, messages) = (&whole["model"], &whole["messages"]);
    let ask = messages[0]["content"].clone();
    let options = json!({"num_predict": 1500});
    vec![
        (CHAT, long_stream()),
        (CHAT, two),
        (
            "/v1/responses",
            json!({"model": model, "input": ask, "stream": true, "store": false,
                                 "max_output_tokens": 1500, "ignore_eos": true}),
        ),
        (
            "/v1/messages",
            json!({"model": model, "messages": messages, "stream": true,
                                "max_tokens": 1500}),
        ),
        ("/api/chat", json!({"model": model, "messages": messages, "options": options})),
        (CHAT, whole),
    ]
}

/// Before the body, in the body, waiting, after the first token, after many.
#[tokio::test(flavor = "multi_thread")]
async fn clients_may_leave_at_every_stage() {
    let server = Server::start(&["--max-running", "3"]);
    let before = server.greedy(QUESTION).await;
    let body = long_stream().to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let whole = head.clone() + &body;
    for round in 0..6 {
        let witness = Witness::before(&server).await;
        for cut in [0, 10, head.len(), head.len() + 20, whole.len() - 1, whole.len()] {
            drop(http::send_raw(server.address, &whole.as_bytes()[..cut]).await);
        }
        // More than run at once: some of them leave while they wait. Each road comes first once.
        let mut roads = roads();
        roads.rotate_left(round);
        let mut all = Vec::new();
        for (path, body) in &roads {
            all.push(server.send(path, body).await);
        }
        match roads[0].1["stream"] == true {
            true => all[0].wait_for("delta").await,
            false => server.becomes("hearth_requests_running", 3.0).await,
        }
        if round % 2 == 1 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        drop(all);
        assert_eq!(server.greedy(QUESTION).await, before, "round {round}");
        witness.saw_nothing().await;
        server.is_idle().await;
    }
    // At least the one of each round that had begun; of two roads it may have been over.
    assert!(server.metric("hearth_cancelled_total").await >= 6.0);
    server.is_well().await;
}

/// Two hundred connections that ask for nothing, or for half of something.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_are_only_connections() {
    let server = Server::start(&[]);
    let before = server.greedy(QUESTION).await;
    let mut open = Vec::new();
    for i in 0..200 {
        let bytes: &[u8] =
            if i % 2 == 0 { b"" } else { b"POST /v1/chat/completions HTTP/1.1\r\nho" };
        open.push(http::send_raw(server.address, bytes).await);
    }
    for _ in 0..5 {
        assert_eq!(server.greedy(QUESTION).await, before);
    }
    drop(open);
    server.is_idle().await;
    server.is_well().await;
}

/// Answers that together need several times the blocks there are take turns, and each says what it
/// says alone. What would never fit is refused.
#[tokio::test(flavor = "multi_thread")]
async fn out_of_blocks_means_later_and_not_otherwise() {
    const CONTEXT: &str = "1024";
    let mut bodies = Vec::new();
    for i in 0..8 {
        let mut body = chat(&format!("Say it again: {i}, bread, tea, honey, mango"), 700, true);
        body["ignore_eos"] = json!(true);
        bodies.push(body);
    }
    let mut want = Vec::new();
    let roomy = Server::start(&["--ctx-size", CONTEXT]);
    for body in &bodies {
        want.push(roomy.text(body).await);
    }
    drop(roomy);
    // The least that it starts with is room for one context.
    let folder = tempfile::tempdir().expect("a folder");
    let none = ["--ctx-size", CONTEXT, "--memory-budget", "1M"];
    let refused = command(folder.path(), &none).output().expect("the binary");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let least =
        said.rsplit_once(" MB for its weights").and_then(|(head, _)| head.rsplit(' ').next());
    let least: usize = least.and_then(|mb| mb.parse().ok()).unwrap_or_else(|| panic!("{said}"));
    let budget = format!("{}M", least + 1);
    let server = Server::start(&["--ctx-size", CONTEXT, "--memory-budget", &budget]);
    let blocks = server.metric("hearth_kv_blocks_total").await;
    assert!(blocks < 2.0 * 64.0, "{blocks} blocks");
    let mut all = Vec::new();
    for body in &bodies {
        all.push(server.send(CHAT, body).await);
    }
    let mut too_long = bodies[0].clone();
    too_long["max_tokens"] = json!(1100);
    let refused = server.post(CHAT, &too_long).await;
    assert_eq!(
        (refused.status, refused.error()["code"].as_str()),
        (400, Some("context_length_exceeded"))
    );
    for (answer, want) in all.into_iter().zip(&want) {
        assert_eq!(&server::text(&answer.answer().await), want);
    }
    let preempted = server.metric("hearth_preemptions_total").await;
    println!("{blocks} blocks, {preempted} preemptions");
    assert!(preempted > 0.0, "blocks never ran out");
    server.is_idle().await;
    server.is_well().await;
}

/// Killed in the middle of streams, started again on the same folder: it answers as before.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_is_survived() {
    let mut server = Server::start(&[]);
    let before = server.greedy(QUESTION).await;
    for round in 0..3 {
        let mut streams = Vec::new();
        for (path, body) in roads() {
            streams.push(server.send(path, &body).await);
        }
        streams[0].wait_for("\"content\"").await;
        tokio::time::sleep(Duration::from_millis(40 * round)).await;
        server.signal("-9");
        server = server.again(&[]);
        assert_eq!(server.greedy(QUESTION).await, before);
        server.is_idle().await;
    }
    server.is_well().await;
}

/// A stream that has begun is finished, a new connection is refused, the exit code is 0.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains() {
    let mut server = Server::start(&[]);
    let mut body = long_stream();
    (body["temperature"], body["seed"]) = (json!(1), json!(7));
    let want = server.text(&body).await;
    server.is_idle().await;
    server.is_well().await;
    let mut stream = server.send(CHAT, &body).await;
    stream.wait_for("\"content\"").await;
    let told = Instant::now();
    server.signal("-TERM");
    let answer = stream.answer().await;
    let chunks = answer.chunks();
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    assert_eq!(server::text(&answer), want);
    assert_eq!(server.wait().code(), Some(0));
    println!("drained in {:?}", told.elapsed());
    assert!(TcpStream::connect(server.address).await.is_err());
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

/// What nobody is connected for ends, is kept and is counted before the process does.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_keeps_and_counts_what_runs_in_the_background() {
    let server = Server::start(&[]);
    let mut ids = Vec::new();
    for i in 0..6 {
        let body = json!({"model": "hearth-tiny", "input": format!("Say {i}"), "background": true,
            "max_output_tokens": 600, "ignore_eos": true, "temperature": 0});
        let answer = server.post("/v1/responses", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        ids.push(answer.json()["id"].as_str().expect("an id").to_owned());
    }
    server.signal("-TERM");
    let server = server.again(&[]);
    let mut output = 0;
    for id in &ids {
        let object = server.get(&format!("/v1/responses/{id}")).await.json();
        assert_eq!(object["status"], "incomplete", "{object}");
        output += object["usage"]["output_tokens"].as_u64().expect("a number");
    }
    let usage = server.get("/v1/organization/usage/completions?limit=2").await.json();
    let sums = usage["data"].as_array().expect("buckets").iter();
    let sums = sums.flat_map(|bucket| bucket["results"].as_array().expect("sums"));
    let counted: u64 = sums.map(|sum| sum["output_tokens"].as_u64().expect("a number")).sum();
    assert_eq!((output, counted), (6 * 600, 6 * 600));
}

/// Answers that nobody takes are waited for as long as it says, and whoever asks twice not at all.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_has_a_deadline() {
    const DEADLINE: Duration = Duration::from_secs(30);
    for signals in [1, 2] {
        let mut server = Server::start(&[]);
        let mut unread = Vec::new();
        for _ in 0..4 {
            unread.push(server.send(CHAT, &large_stream()).await);
        }
        unread[0].wait_for("\"content\"").await;
        let told = Instant::now();
        for _ in 0..signals {
            server.signal("-TERM");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let code = server.wait().code();
        println!("{signals} times: {code:?} after {:?}", told.elapsed());
        if signals == 1 {
            let (least, most) = (DEADLINE - Duration::from_secs(1), DEADLINE * 4 / 3);
            assert!((least..most).contains(&told.elapsed()), "{:?}", told.elapsed());
            assert_eq!(code, Some(0));
            server.logs("answers still run after the drain timeout").await;
        } else {
            assert!(told.elapsed() < DEADLINE / 3, "{:?}", told.elapsed());
            assert_eq!(code, Some(130));
        }
    }
}
