//! Requests that are refused before they are read: whoever writes all of them before it reads gets
//! the answer all the same, and who waits to be told to go on is not.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hearth::auth::{NewKey, admin};
use hearth::server::ServerConfig;
use hearth::store::Store;

use crate::fixture::{Options, start};
use crate::http::{self, Answer};
use crate::keys::new;

const CHAT: &str = "/v1/chat/completions";
const JSON: &str = "Content-Type: application/json";
/// More than any buffer between a client and a server takes.
const LEN: usize = 64 << 20;

fn head(path: &str, lines: &[&str]) -> Vec<u8> {
    let mut head = format!("POST {path} HTTP/1.1\r\nHost: localhost\r\n");
    lines.iter().for_each(|line| head.push_str(&format!("{line}\r\n")));
    head.push_str("\r\n");
    head.into_bytes()
}

/// A request with a long body, its length told or not.
fn long(lines: &[&str], chunked: bool) -> Vec<u8> {
    if !chunked {
        let len = format!("Content-Length: {LEN}");
        let mut request = head(CHAT, &[lines, &[len.as_str()]].concat());
        request.resize(request.len() + LEN, b' ');
        return request;
    }
    const PIECE: usize = 1 << 16;
    let mut request = head(CHAT, &[lines, &["Transfer-Encoding: chunked"]].concat());
    for _ in 0..LEN / PIECE {
        request.extend(format!("{PIECE:x}\r\n").as_bytes());
        request.resize(request.len() + PIECE, b' ');
        request.extend(b"\r\n");
    }
    request.extend(b"0\r\n\r\n");
    request
}

/// Writes all of it, and only then reads to the end.
async fn ask(server: SocketAddr, request: &[u8]) -> Answer {
    http::send_raw(server, request).await.answer().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_writes_all_before_it_reads_gets_the_refusal() {
    let store = Store::in_memory().expect("a store");
    let keys = [("rich", None), ("poor", Some(1))]
        .map(|(name, requests_per_min)| NewKey { requests_per_min, ..new(name, "a") })
        .map(|key| admin::create(&store, &key).expect("a key").secret)
        .map(|key| format!("Authorization: Bearer {key}"));
    let [rich, poor] = [keys[0].as_str(), keys[1].as_str()];
    let server = start(Options { store, ..Options::default() }).await;
    let used_up = head(CHAT, &[poor, JSON, "Content-Length: 0", "Connection: close"]);
    let none = ask(server.address, &used_up).await;
    assert_eq!(none.status, 400, "{}", none.body);
    for (lines, status, code) in [
        (&[rich, JSON][..], 413, "request_too_large"),
        (&[rich, "Content-Type: text/plain"], 415, "unsupported_media_type"),
        (&[rich, JSON, "Content-Encoding: gzip"], 415, "unsupported_media_type"),
        (&["Authorization: Bearer sk-wrong", JSON], 401, "invalid_api_key"),
        (&[poor, JSON], 429, "rate_limit_exceeded"),
    ] {
        for chunked in [false, true] {
            let answer = ask(server.address, &long(lines, chunked)).await;
            let found = (answer.status, answer.error()["code"].clone());
            assert_eq!(found, (status, code.into()), "{lines:?} {chunked}");
            assert_eq!(answer.header("connection"), Some("close"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_before_it_writes_is_refused_without_a_byte() {
    let config = ServerConfig { body_timeout: Duration::from_secs(9), ..ServerConfig::default() };
    let server = start(Options { config, ..Options::default() }).await;
    let form = "Content-Type: multipart/form-data; boundary=x";
    for (path, kind, len, code) in [
        (CHAT, JSON, (4 << 20) + 1, "request_too_large"),
        ("/v1/files", form, 600_u64 << 20, "file_too_large"),
        (CHAT, "Content-Type: text/plain", 9, "unsupported_media_type"),
    ] {
        let len = format!("Content-Length: {len}");
        let asked = Instant::now();
        let answer = ask(server.address, &head(path, &[kind, &len, "Expect: 100-continue"])).await;
        // Not the 100 that comes before a body is read.
        assert!(answer.status >= 400, "{path}: {}", answer.status);
        assert_eq!(answer.error()["code"], code, "{path}");
        assert!(asked.elapsed() < Duration::from_secs(5), "{path}: {:?}", asked.elapsed());
    }
    let told = head(CHAT, &[JSON, "Content-Length: 2", "Expect: 100-continue"]);
    let mut pending = http::send_raw(server.address, &told).await;
    pending.wait_for("HTTP/1.1 100 Continue").await;
}
