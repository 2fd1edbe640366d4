//! Bodies made of noise, and heads and bodies without end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::http;
use crate::server::{PATIENCE, Server, Witness, chat};
use crate::{CHAT, QUESTION};

/// Ten thousand bodies that were right before they were damaged: every answer is a 2xx, or a 4xx
/// in the shape of its API.
#[tokio::test(flavor = "multi_thread")]
async fn noise_is_refused() {
    const CASES: usize = 10_000;
    let server = Arc::new(Server::start(&[]));
    let before = server.greedy(QUESTION).await;
    let witness = Witness::before(&server).await;
    let (next, fields) = (Arc::new(AtomicUsize::new(0)), Arc::new(fields(&server).await));
    let work = |_| {
        let (server, next, fields) = (Arc::clone(&server), Arc::clone(&next), Arc::clone(&fields));
        tokio::spawn(async move {
            let mut refused = [0; PATHS.len()];
            let mut connection = Connection::new(&server).await;
            loop {
                let case = next.fetch_add(1, Ordering::Relaxed);
                if case >= CASES {
                    return refused;
                }
                let (at, body) = damaged(case as u64, &fields);
                let path = PATHS[at];
                let (status, text) = connection.ask(&server, path, &body).await;
                let body = String::from_utf8_lossy(&body);
                let said = || format!("case {case}: {status} {text} to {path} {body}");
                assert!((200..500).contains(&status), "{}", said());
                // A stream fails after its status.
                let ours = ["internal_error", "api_error", "server failed"];
                assert!(!ours.iter().any(|word| text.contains(word)), "{}", said());
                if status >= 400 {
                    refused[at] += 1;
                    let answer: Value =
                        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{}", said()));
                    let error = &answer["error"];
                    let message = if path.starts_with("/api") { error } else { &error["message"] };
                    assert!(message.is_string(), "{}", said());
                }
            }
        })
    };
    let mut refused = [0; PATHS.len()];
    for task in (0..8).map(work).collect::<Vec<_>>() {
        let more = task.await.expect("no case fails");
        refused.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    }
    witness.saw_nothing().await;
    for (path, refused) in PATHS.iter().zip(refused) {
        let of = (0..CASES).filter(|case| PATHS[damaged(*case as u64, &fields).0] == *path).count();
        println!("{path}: {refused} of {of} were refused");
        assert!(refused > of / 4 && refused < of, "{path}: the noise is too loud or too low");
    }
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
        let (mut received, mut again) = (Vec::new(), false);
        loop {
            let read = timeout(PATIENCE, self.0.read_buf(&mut received)).await;
            let count = read.expect("an answer").unwrap_or(0);
            if let Some(answer) = whole(&received) {
                return answer;
            }
            if count == 0 {
                let body = String::from_utf8_lossy(body);
                assert!(received.is_empty(), "half an answer to {body}: {received:?}");
                assert!(!again, "{path} closes without a word to {body}");
                again = true;
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

const PATHS: [&str; 6] =
    [CHAT, "/v1/completions", "/v1/responses", "/v1/conversations", "/v1/messages", "/api/chat"];

/// What the path at this place takes.
fn right(at: usize, stream: bool) -> Value {
    let mut body = chat("Hi", 2, stream);
    let model = body["model"].clone();
    match PATHS[at] {
        "/v1/completions" => {
            json!({"model": model, "prompt": "Hi", "max_tokens": 2, "temperature": 0})
        }
        "/v1/responses" => json!({"model": model, "input": "Hi", "max_output_tokens": 16,
                                  "temperature": 0, "stream": stream, "store": false}),
        "/v1/conversations" => json!({"items": [{"role": "user", "content": "Hi"}]}),
        "/api/chat" => {
            body["options"] = json!({"num_predict": 2, "temperature": 0});
            let body = body.as_object_mut().expect("an object");
            body.retain(|name, _| !["max_tokens", "temperature"].contains(&name.as_str()));
            json!(body)
        }
        _ => body,
    }
}

/// Every field of each path with its types, by the reference; and one that nobody knows.
async fn fields(server: &Server) -> Vec<Vec<(String, Value)>> {
    let document = server.get("/openapi.json").await.json();
    let known = |path: &str| {
        let body = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"];
        let known = body["schema"]["properties"].as_object().expect("fields").iter();
        let mut known: Vec<_> =
            known.map(|(name, field)| (name.clone(), field["type"].clone())).collect();
        // Whoever sets this sends the model away, which is no noise.
        known.retain(|(name, _)| name != "keep_alive");
        known.push(("nobody_knows".to_owned(), Value::Null));
        known
    };
    PATHS.iter().map(|path| known(path)).collect()
}

/// A value of a type, of one of several types, or of none.
fn of_type(types: &Value, pick: usize) -> Value {
    match types {
        Value::Array(several) => of_type(&several[pick % several.len()], pick / several.len()),
        Value::String(one) => match one.as_str() {
            "integer" => json!([0, 1, 2, -1][pick % 4]),
            "number" => json!([0.0, 0.5, 1.0, 1e308][pick % 4]),
            "boolean" => json!(pick.is_multiple_of(2)),
            "string" => json!(["Hi", "auto", "none", ""][pick % 4]),
            "array" => [json!([]), json!(["Hi"]), json!([1])][pick % 3].clone(),
            _ => [json!({}), json!({"type": "text"})][pick % 2].clone(),
        },
        _ => Value::Null,
    }
}

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

/// The place of a path, and a body with one to four faults: values of other types, names that
/// nobody knows, cut ends, bytes that are no text, brackets without end.
fn damaged(case: u64, fields: &[Vec<(String, Value)>]) -> (usize, Vec<u8>) {
    let mut state = case.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = move |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % n
    };
    let at = below(PATHS.len());
    let mut body = right(at, below(4) == 0);
    for _ in 0..=below(3) {
        let (name, types) = &fields[at][below(fields[at].len())];
        body[name] = match below(4) {
            0 => odd(below(16)),
            _ => of_type(types, below(64)),
        };
    }
    let mut bytes = body.to_string().into_bytes();
    match below(20) {
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
    (at, bytes)
}

/// Bodies and heads larger than the server takes are neither read to the end nor kept.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_not_read() {
    let server = Server::start(&["--body-limit-mb", "1"]);
    let before = server.greedy(QUESTION).await;
    let start = server.resident();
    let large = chat(&"x".repeat(2 << 20), 2, false);
    for path in PATHS {
        let answer = server.post(path, &large).await;
        assert_eq!(answer.status, 413, "{path}: {}", answer.body);
    }
    // Deep, and just small enough to be looked at.
    let kind = [("content-type", "application/json")];
    let deep = "[".repeat(1 << 20);
    let deep = http::send(server.address, "POST", CHAT, &kind, deep.as_bytes()).await;
    let deep = deep.answer().await;
    assert_eq!((deep.status, deep.error()["code"].as_str()), (400, Some("invalid_json")));
    // No length, no end.
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         transfer-encoding: chunked\r\n\r\n"
    );
    let piece = [b"10000\r\n".to_vec(), vec![b' '; 0x10000], b"\r\n".to_vec()].concat();
    is_stopped(&server, head.as_bytes(), &piece, "413").await;
    let piece = format!("x: {}\r\n", "y".repeat(1000));
    is_stopped(&server, b"GET /health HTTP/1.1\r\n", piece.as_bytes(), "431").await;
    let grown = server.resident().saturating_sub(start);
    println!("{} KiB more", grown >> 10);
    assert!(grown < 32 << 20, "{} MiB more", grown >> 20);
    assert_eq!(server.greedy(QUESTION).await, before);
    server.is_idle().await;
    server.is_well().await;
}

/// Whoever sends `piece` again and again is answered with this status or cut off, before it has
/// sent 64 MiB. It stops when it reads the answer; what it sends until then is dropped.
async fn is_stopped(server: &Server, start: &[u8], piece: &[u8], status: &str) {
    let socket = TcpStream::connect(server.address).await.expect("it listens");
    let (mut from, mut to) = socket.into_split();
    to.write_all(start).await.expect("it reads");
    let answered = AtomicBool::new(false);
    let sending = async {
        let mut pieces = (64 << 20) / piece.len();
        while pieces > 0 && !answered.load(Ordering::Relaxed) && to.write_all(piece).await.is_ok() {
            pieces -= 1;
        }
        let _ = to.shutdown().await; // it may be closed
        pieces > 0
    };
    let mut received = Vec::new();
    let receiving = async {
        let first = from.read_buf(&mut received).await;
        answered.store(true, Ordering::Relaxed);
        if first.is_ok() {
            let _ = from.read_to_end(&mut received).await; // it may be cut off
        }
    };
    let (stopped, ()) = tokio::join!(sending, receiving);
    let received = String::from_utf8_lossy(&received);
    assert!(stopped, "all of it was taken: {received}");
    let answered = received.starts_with(&format!("HTTP/1.1 {status}"));
    assert!(received.is_empty() || answered, "{received}");
}
