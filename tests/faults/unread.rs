//! Clients that read slowly and steadily, and keys whose clients do not read at all.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use crate::http::{self, Answer, Pending};
use crate::readers::{all_stand_aside, large_stream, narrow};
use crate::server::{Server, chat, command, key, long_stream, text};
use crate::{CHAT, QUESTION};

/// Asks with a key, over a connection that takes little.
async fn ask(address: SocketAddr, key: &str, body: &Value) -> Pending {
    let bearer = format!("Bearer {key}");
    let headers = [("content-type", "application/json"), ("authorization", &bearer)];
    let body = body.to_string();
    http::send_over(narrow(address, 128 << 10).await, "POST", CHAT, &headers, body.as_bytes()).await
}

/// However many streams nobody reads, there are never more than may run and may wait: of one key no
/// more come in once a quarter of the places is taken by what it leaves unread. Others go on.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_key_leaves_unread_takes_places_in_the_queue() {
    const PLACES: f64 = 4.0 + 64.0;
    let keys = ["one", "two", "three"].map(|key| ["--api-key", key]).concat();
    let server = Server::start(&[&keys[..], &["--max-running", "4", "--max-queue", "64"]].concat());
    let question = chat(QUESTION, 12, false);
    let greedy = async |key| ask(server.address, key, &question).await.answer().await;
    let said = |answer: Answer| answer.json()["choices"][0]["message"].clone();
    let before = said(greedy("three").await);
    let mut unread = Vec::new();
    for answers in [8.0, 16.0] {
        unread.push(ask(server.address, "one", &large_stream()).await);
        all_stand_aside(&server, 1.0 + answers, 0.0).await;
        server.becomes("hearth_requests_unread", answers).await;
    }
    let refused = greedy("one").await;
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("rate_limit_exceeded")));
    assert!(refused.header("retry-after").is_some());
    let message = refused.error()["message"].as_str().expect("words").to_owned();
    assert!(message.contains("16 answers to this API key are not read"), "{message}");
    // Another comes with all at once, before any of it is unread.
    let mut others = Vec::new();
    for _ in 0..40 {
        let mut pending = ask(server.address, "two", &large_stream()).await;
        pending.wait_for("\r\n\r\n").await;
        let so_far = pending.so_far();
        match so_far.starts_with("HTTP/1.1 200") {
            true => others.push(pending),
            false => assert!(so_far.starts_with("HTTP/1.1 429"), "{so_far}"),
        }
    }
    let taken = 8.0 * others.len() as f64;
    let (aside, _) = all_stand_aside(&server, 17.0 + taken, 0.0).await;
    println!("{} of 40 were taken, {aside} stand aside", others.len());
    let left = server.metric("hearth_requests_unread").await;
    assert!(aside > 16.0 && left >= aside && left <= PLACES, "{left} are unread");
    assert_eq!(greedy("two").await.status, 429);
    for _ in 0..5 {
        assert_eq!(said(greedy("three").await), before);
    }
    // Whoever makes room has room.
    unread.remove(0);
    server.becomes("hearth_requests_unread", left - 8.0).await;
    assert_eq!(said(greedy("one").await), before);
    drop((unread, others));
    server.is_idle().await;
    server.becomes("hearth_requests_unread", 0.0).await;
    assert_eq!(said(greedy("two").await), before);
    server.is_well().await;
}

/// A key that may run two at once has two that nobody reads, and six that wait for them: there is
/// nothing to do, and nothing is done.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_readers_takes_no_time() {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, log) = (folder.path().join("data"), folder.path().join("log"));
    let key = key(&data, &["--max-running", "2"]);
    let server = Server::spawn(command(&data, &[]), folder, &log);
    let unread = ask(server.address, &key, &large_stream()).await;
    server.becomes("hearth_requests_aside", 2.0).await;
    server.becomes("hearth_requests_waiting", 6.0).await;
    let before = server.cpu_ms();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let busy_ms = server.cpu_ms() - before;
    assert!(busy_ms < 400, "{busy_ms} of 2000 ms");
    assert_eq!(server.metric("hearth_requests_aside").await, 2.0);
    // The others have their turn when it is read.
    let answer = unread.answer().await;
    assert_eq!((answer.status, answer.body.matches("\"finish_reason\":\"").count()), (200, 8));
    server.is_idle().await;
    server.is_well().await;
}

/// A connection of which at most so many bytes are read in a quarter of a second, up to a time.
struct Slowly {
    socket: TcpStream,
    bytes: usize,
    /// Of these, what is left of this quarter.
    left: usize,
    until: Instant,
    pause: Pin<Box<Sleep>>,
}

impl Slowly {
    fn new(socket: TcpStream, bytes: usize, time: Duration) -> Self {
        let pause = Box::pin(tokio::time::sleep(Duration::ZERO));
        Self { socket, bytes, left: 0, until: Instant::now() + time, pause }
    }
}

impl AsyncRead for Slowly {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if Instant::now() > self.until {
            return Pin::new(&mut self.socket).poll_read(cx, buf);
        }
        if self.left == 0 {
            ready!(self.pause.as_mut().poll(cx));
            let next = tokio::time::Instant::now() + Duration::from_millis(250);
            self.pause.as_mut().reset(next);
            self.left = self.bytes;
        }
        let mut some = vec![0; self.left.min(buf.remaining())];
        let mut read = ReadBuf::new(&mut some);
        ready!(Pin::new(&mut self.socket).poll_read(cx, &mut read))?;
        self.left -= read.filled().len();
        buf.put_slice(read.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Slowly {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// A tenth of the time that a client has by default, and ten times five kilobytes a second, by an
/// end with little room of its own: it takes something often enough, for several times as long as
/// one has that takes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn who_reads_slowly_and_steadily_reads_all_of_it() {
    const TIMEOUT: Duration = Duration::from_secs(6);
    const BYTES: usize = (48 << 10) / 4;
    let server = Server::start(&["--send-timeout-s", "6"]);
    let mut body = long_stream();
    (body["logprobs"], body["top_logprobs"]) = (json!(true), json!(20));
    let want = server.post(CHAT, &body).await;
    let socket = Slowly::new(narrow(server.address, 16 << 10).await, BYTES, TIMEOUT * 4);
    let headers = [("content-type", "application/json")];
    let begun = Instant::now();
    let sent = body.to_string();
    let answer = http::send_over(socket, "POST", CHAT, &headers, sent.as_bytes()).await;
    let answer = answer.answer().await;
    let took = begun.elapsed();
    println!("{} bytes in {took:?}", answer.body.len());
    assert!(took > TIMEOUT * 4 && answer.body.len() > 20 * 4 * BYTES, "it was not slow");
    assert_eq!(text(&answer), text(&want));
    server.is_idle().await;
    assert_eq!(server.metric("hearth_cancelled_total").await, 0.0);
    server.is_well().await;
}

/// Answers in one piece that nobody takes are in memory until somebody does: a key has a part of
/// it, is told so, and others go on.
#[tokio::test(flavor = "multi_thread")]
async fn whole_answers_that_nobody_takes_have_a_bound() {
    const PART: usize = 64 << 20;
    let server = Server::start(&["--api-key", "one", "--api-key", "two"]);
    let (question, large) = (chat(QUESTION, 12, false), json!({"tokens": vec![300; 900_000]}));
    let send = async |key: &str, path, body: &Value| {
        let bearer = format!("Bearer {key}");
        let headers = [("content-type", "application/json"), ("authorization", &bearer)];
        let socket = narrow(server.address, 128 << 10).await;
        http::send_over(socket, "POST", path, &headers, body.to_string().as_bytes()).await
    };
    let said = async |key| {
        let answer = send(key, CHAT, &question).await.answer().await;
        (answer.status, answer.json()["choices"][0]["message"].clone())
    };
    let before = said("two").await;
    let len = send("one", "/detokenize", &large).await.answer().await.body.len();
    let start = server.resident();
    let mut unread = Vec::new();
    let refused = loop {
        let mut pending = send("one", "/detokenize", &large).await;
        pending.wait_for("\r\n\r\n").await;
        match pending.so_far().starts_with("HTTP/1.1 200") {
            true => unread.push(pending),
            false => break pending.answer().await,
        }
        assert!(unread.len() * len <= PART, "{} of {len} bytes", unread.len());
    };
    let grown = server.resident().saturating_sub(start) >> 20;
    println!("{} answers of {len} bytes, {grown} MiB more", unread.len());
    // The door closes an eighth before the room is full.
    assert!(unread.len() * len > PART - PART / 8, "{} of {len} bytes", unread.len());
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("rate_limit_exceeded")));
    assert!(refused.header("retry-after").is_some());
    let computed = server.metric("hearth_generated_tokens_total").await;
    assert_eq!(said("one").await, (429, Value::Null));
    let after = server.metric("hearth_generated_tokens_total").await;
    assert_eq!(after, computed, "nothing is computed for it in vain");
    // Another key hears nothing of it.
    assert_eq!(said("two").await, before);
    let other = send("two", "/detokenize", &large).await.answer().await;
    assert_eq!((other.status, other.body.len()), (200, len));
    // Whoever reads, or leaves, makes room.
    let read = unread.remove(0).answer().await;
    assert_eq!((read.status, read.body.len()), (200, len));
    drop(unread);
    let begun = Instant::now();
    while send("one", "/detokenize", &large).await.answer().await.status != 200 {
        assert!(begun.elapsed() < crate::server::PATIENCE, "there is no room");
    }
    server.is_well().await;
}
