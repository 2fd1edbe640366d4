//! What happens when things go wrong, with the real binary: clients that vanish at every stage,
//! clients that do not read, connections that never ask, bodies made of noise, kill -9, SIGTERM, a
//! full disk, blocks of keys and values on a disk that lies. After each: no block is held, no
//! sequence is stuck, nothing has panicked, and what other clients are told has not changed.
#![cfg(all(target_os = "linux", feature = "builtin-model"))]

#[allow(dead_code, reason = "shared with another test binary, which uses the rest")]
#[path = "openai_surface/http.rs"]
mod http;
#[path = "faults/kept.rs"]
mod kept;
#[path = "faults/server.rs"]
mod server;
#[path = "faults/tls.rs"]
mod tls;

use std::fs::OpenOptions;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use server::{Server, chat, long_stream};

const QUESTION: &str =
    "[1] Mirka lives in Torvin. Mirka plays the flute.\n\nWhere does Mirka live?";

/// Before the body, in the body, waiting, after the first token, after many.
#[tokio::test(flavor = "multi_thread")]
async fn clients_may_leave_at_every_stage() {
    let server = Server::start(&["--max-running", "2"]);
    let before = server.greedy(QUESTION).await;
    let body = long_stream().to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let whole = head.clone() + &body;
    for round in 0..4 {
        for cut in [0, 10, head.len(), head.len() + 20, whole.len() - 1, whole.len()] {
            drop(http::send_raw(server.address, &whole.as_bytes()[..cut]).await);
        }
        let mut all = Vec::new();
        // More than run at once: some of them leave while they wait.
        for _ in 0..6 {
            all.push(server.send("/v1/chat/completions", &long_stream()).await);
        }
        all[0].wait_for("\"content\"").await;
        if round % 2 == 1 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        drop(all);
        assert_eq!(server.greedy(QUESTION).await, before, "round {round}");
    }
    server.is_idle().await;
    assert!(server.metric("hearth_cancelled_total").await >= 4.0);
    server.is_well().await;
}

/// Streams that nobody reads stop at a full socket: the engine goes on, memory does not grow, and
/// the readers' blocks come back when they hang up.
#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_cost_nobody_else() {
    let server = Server::start(&[]);
    let before = server.greedy(QUESTION).await;
    let mut slow = Vec::new();
    for _ in 0..12 {
        let mut body = long_stream();
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(20);
        slow.push(server.send("/v1/chat/completions", &body).await);
    }
    let start = server.resident();
    for _ in 0..10 {
        assert_eq!(server.greedy(QUESTION).await, before);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let grown = server.resident().saturating_sub(start);
    assert!(grown < 256 << 20, "{} MiB more", grown >> 20);
    drop(slow);
    server.is_idle().await;
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

/// Ten thousand bodies that were right before they were damaged: every answer is a 2xx, or a 4xx
/// in OpenAI's shape.
#[tokio::test(flavor = "multi_thread")]
async fn noise_is_refused() {
    const CASES: usize = 10_000;
    let server = Arc::new(Server::start(&[]));
    let before = server.greedy(QUESTION).await;
    let next = Arc::new(AtomicUsize::new(0));
    let work = |_| {
        let (server, next) = (Arc::clone(&server), Arc::clone(&next));
        tokio::spawn(async move {
            let mut refused = 0;
            let mut connection = Connection::new(&server).await;
            loop {
                let case = next.fetch_add(1, Ordering::Relaxed);
                if case >= CASES {
                    return refused;
                }
                let (path, body) = damaged(case as u64);
                let (status, text) = connection.ask(&server, path, &body).await;
                let said = || format!("case {case}: {status} {text} to {body:?}");
                assert!((200..500).contains(&status), "{}", said());
                if status >= 400 {
                    refused += 1;
                    let answer: Value =
                        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{}", said()));
                    assert!(answer["error"]["message"].is_string(), "{}", said());
                }
            }
        })
    };
    let mut refused = 0;
    for task in (0..8).map(work).collect::<Vec<_>>() {
        refused += task.await.expect("no case fails");
    }
    println!("{refused} of {CASES} were refused");
    assert!(refused > CASES / 4 && refused < CASES, "the noise is too loud or too low: {refused}");
    assert_eq!(server.greedy(QUESTION).await, before);
    server.is_idle().await;
    server.is_well().await;
}

/// A connection that is used again and again.
struct Connection(TcpStream);

impl Connection {
    async fn new(server: &Server) -> Self {
        Self(TcpStream::connect(server.address).await.expect("it listens"))
    }

    /// Status and body. A connection that the server has closed is opened again.
    async fn ask(&mut self, server: &Server, path: &str, body: &[u8]) -> (u16, String) {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        let message = [head.as_bytes(), body].concat();
        let _ = self.0.write_all(&message).await;
        let mut received = Vec::new();
        loop {
            let count = self.0.read_buf(&mut received).await.unwrap_or(0);
            if let Some(answer) = whole(&received) {
                return answer;
            }
            if count == 0 {
                assert!(received.is_empty(), "half an answer: {received:?}");
                *self = Self::new(server).await;
                self.0.write_all(&message).await.expect("a new connection");
            }
        }
    }
}

/// An answer with a length, or a stream of chunks, if all of it is there.
fn whole(bytes: &[u8]) -> Option<(u16, String)> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..end]).ok()?.to_ascii_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let body = &bytes[end..];
    let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next());
    let done = match length.and_then(|digits| digits.parse::<usize>().ok()) {
        Some(length) => body.len() >= length,
        None => body.ends_with(b"0\r\n\r\n"),
    };
    done.then(|| (status, String::from_utf8_lossy(body).into_owned()))
}

/// Fields of a request, and one that nobody knows.
const NAMES: &str = "model messages prompt max_tokens temperature top_p n stop seed stream \
    logprobs top_logprobs logit_bias presence_penalty tools tool_choice response_format \
    stream_options user echo suffix best_of metadata nobody_knows";

/// A value that most fields do not take.
fn odd(kind: usize) -> Value {
    match kind {
        0 => Value::Null,
        1 => json!(-1),
        2 => json!(1e308),
        3 => json!(u64::MAX),
        4 => json!("\u{0}\u{fffd}\u{1F525}"),
        5 => json!([]),
        6 => json!({}),
        7 => json!([[[[1]]]]),
        8 => json!({"a": {"b": [null, 1.5, "c"]}}),
        9 => json!(true),
        10 => json!(""),
        11 => json!("x".repeat(5000)),
        12 => json!([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
        13 => json!([{"role": "wizard", "content": 5}]),
        14 => json!(2.5),
        _ => json!({"50256": 100, "-3": 1}),
    }
}

/// A body with one to four faults: values of other types, names that nobody knows, cut ends, bytes
/// that are no text, brackets without end.
fn damaged(case: u64) -> (&'static str, Vec<u8>) {
    let mut state = case.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = move |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % n
    };
    let mut body = chat("Hi", 2, below(4) == 0);
    let mut path = "/v1/chat/completions";
    if below(3) == 0 {
        path = "/v1/completions";
        body = json!({"model": "hearth-tiny", "prompt": "Hi", "max_tokens": 2, "temperature": 0});
    }
    let names: Vec<&str> = NAMES.split(' ').collect();
    for _ in 0..=below(2) {
        body[names[below(names.len())]] = odd(below(16));
    }
    let mut bytes = body.to_string().into_bytes();
    match below(10) {
        0 => bytes.truncate(below(bytes.len())),
        1 => {
            let at = below(bytes.len());
            bytes[at] = below(256) as u8;
        }
        2 => {
            let at = below(bytes.len());
            bytes.splice(at..at, vec![b'['; 200]);
        }
        _ => {}
    }
    (path, bytes)
}

/// Killed in the middle of streams, started again on the same folder: it answers as before.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_is_survived() {
    let mut server = Server::start(&[]);
    let before = server.greedy(QUESTION).await;
    let mut stream = server.send("/v1/chat/completions", &long_stream()).await;
    stream.wait_for("\"content\"").await;
    server.signal("-9");
    server.wait();
    let again = Server::start(&[]);
    assert_eq!(again.greedy(QUESTION).await, before);
    again.is_well().await;
}

/// A stream that has begun is finished, a new connection is refused, the exit code is 0.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains() {
    let mut server = Server::start(&[]);
    let mut stream = server.send("/v1/chat/completions", &long_stream()).await;
    stream.wait_for("\"content\"").await;
    let told = Instant::now();
    server.signal("-TERM");
    let chunks = stream.answer().await.chunks();
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    assert_eq!(server.wait().code(), Some(0));
    println!("drained in {:?}", told.elapsed());
    assert!(TcpStream::connect(server.address).await.is_err());
}

/// A log that cannot be written is a pity, not an end.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_for_the_log_stops_nothing() {
    let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let folder = tempfile::tempdir().expect("a folder");
    let mut server = Server::start_with(&[], folder, Stdio::from(full));
    for _ in 0..3 {
        assert!(!server.greedy(QUESTION).await.is_empty());
    }
    assert_eq!(server.post("/v1/chat/completions", &json!({"model": 5})).await.status, 400);
    server.is_idle().await;
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(0));
}
