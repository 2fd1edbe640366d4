//! Who waits, and for how long: the queue, clients that hang up or never finish asking, and the
//! end of the server.

use std::time::{Duration, Instant};

use hearth::server::{ServerConfig, Tls};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{CONTEXT_LEN, Options, chat_body, start};
use crate::greedy;
use crate::http::{self, Pending};
use crate::keys;

#[tokio::test(flavor = "multi_thread")]
async fn answers_tell_their_tier_and_their_place_in_the_queue() {
    let server = start(Options::default()).await;
    for (asked, had) in [("auto", "default"), ("flex", "flex"), ("priority", "priority")] {
        let answer = server.chat(greedy(1, json!({"service_tier": asked}))).await;
        assert_eq!(answer.json()["service_tier"], had);
        assert_eq!(answer.header("x-hearth-queue-position"), Some("0"));
        assert_eq!(answer.header("x-hearth-estimated-wait-ms"), Some("0"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_not_begun_in_time_is_told_so() {
    let queue_timeout = Some(Duration::from_millis(50));
    let server = start(Options { running_len: 1, queue_timeout, ..Options::default() }).await;
    let long = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &long).await;
    running.wait_for("\"content\":").await;
    let late = server.chat(greedy(1, json!({}))).await;
    assert_eq!((late.status, &late.error()["code"]), (503, &json!("queue_timeout")));
    assert!(late.header("retry-after").is_some());
    assert_eq!(late.header("x-should-retry"), None);
    server.wait_for_metric("hearth_expired_total", 1.0).await;
    server.wait_for_metric("hearth_requests_waiting", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_frees_its_blocks() {
    let server = start(Options::default()).await;
    for (cancelled, stream) in [(1.0, true), (2.0, false)] {
        let body = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": stream})));
        let mut pending = server.begin("/v1/chat/completions", &body).await;
        if stream {
            pending.wait_for("\"content\":").await;
        }
        server.wait_for_metric("hearth_requests_running", 1.0).await;
        assert!(server.metric("hearth_kv_blocks_used").await > 0.0);
        drop(pending);
        server.wait_for_metric("hearth_cancelled_total", cancelled).await;
        server.wait_for_metric("hearth_requests_running", 0.0).await;
        server.wait_for_metric("hearth_kv_blocks_used", 0.0).await;
    }
}

/// The head of an answer that has begun, as it came.
fn told(pending: &Pending, name: &str) -> Option<u64> {
    let so_far = pending.so_far();
    let (head, _) = so_far.split_once("\r\n\r\n").expect("a head");
    let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    line.map(|value| value.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_is_told_once_something_is_known_of_it() {
    const WAIT: &str = "x-hearth-estimated-wait-ms";
    let config = ServerConfig { heartbeat: Duration::from_millis(10), ..ServerConfig::default() };
    let server = start(Options { config, running_len: 1, ..Options::default() }).await;
    let body = |tokens| chat_body(greedy(tokens, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &body(8000)).await;
    running.wait_for("\"content\":").await;
    let mut waiting = Vec::new();
    for position in 0..4 {
        let mut next = server.begin("/v1/chat/completions", &body(CONTEXT_LEN - 100)).await;
        next.wait_for(": heartbeat\n\n").await;
        let place = told(&next, "x-hearth-queue-position");
        assert_eq!((place, told(&next, WAIT)), (Some(position), None));
        waiting.push(next);
    }
    let metrics = server.get("/metrics").await.body;
    assert!(!metrics.contains("hearth_estimated_wait_ms"), "nobody knows yet");
    running.answer().await.chunks();
    waiting[0].wait_for("\"content\":").await;
    let mut next = server.begin("/v1/chat/completions", &body(1)).await;
    next.wait_for(": heartbeat\n\n").await;
    assert_eq!(told(&next, "x-hearth-queue-position"), Some(3));
    assert!(told(&next, WAIT).is_some_and(|wait_ms| wait_ms > 0));
    assert!(server.metric("hearth_estimated_wait_ms").await > 0.0);
}

/// Nothing where nobody is, more with answers that are ahead, and whoever finds no place is told to
/// come back after about half of it. By how much each one adds is tested in simulated time: here
/// the rest of the machine changes what a step takes from one request to the next.
#[tokio::test(flavor = "multi_thread")]
async fn a_told_wait_grows_with_the_queue() {
    const WAIT: &str = "x-hearth-estimated-wait-ms";
    const PLACES: usize = 5;
    let config = ServerConfig { heartbeat: Duration::from_millis(10), ..ServerConfig::default() };
    let options = Options { config, running_len: 1, queue_len: PLACES, ..Options::default() };
    let server = start(options).await;
    let alone = server.chat(greedy(8000, json!({}))).await;
    assert_eq!((alone.status, alone.header(WAIT)), (200, Some("0")));
    assert_eq!((alone.header("retry-after"), alone.header("retry-after-ms")), (None, None));
    let body = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &body).await;
    running.wait_for("\"content\":").await;
    let (mut waiting, mut waits_ms) = (Vec::new(), Vec::new());
    for _ in 0..PLACES {
        let mut next = server.begin("/v1/chat/completions", &body).await;
        next.wait_for(": heartbeat\n\n").await;
        waits_ms.push(told(&next, WAIT).expect("one answer is over"));
        waiting.push(next);
    }
    assert!(waits_ms[0] > 0 && waits_ms[PLACES - 1] > waits_ms[0], "{waits_ms:?}");
    let refused = server.chat(greedy(1, json!({}))).await;
    assert_eq!((refused.status, refused.header(WAIT)), (429, None));
    let retry_ms = refused.header("retry-after-ms").and_then(|ms| ms.parse::<u64>().ok());
    let half_ms = (waits_ms[PLACES - 1] / 2).clamp(1000, 60_000);
    let about = half_ms / 2..=half_ms * 2;
    assert!(retry_ms.is_some_and(|ms| about.contains(&ms)), "{retry_ms:?} of {waits_ms:?}");
    drop((running, waiting));
    for name in ["requests_waiting", "requests_running", "estimated_wait_ms"] {
        server.wait_for_metric(&format!("hearth_{name}"), 0.0).await;
    }
    let after = server.chat(greedy(1, json!({}))).await;
    assert_eq!((after.status, after.header(WAIT)), (200, Some("0")));
}

#[tokio::test(flavor = "multi_thread")]
async fn priority_overtakes_in_the_queue() {
    let config = ServerConfig { heartbeat: Duration::from_millis(10), ..ServerConfig::default() };
    let server = start(Options { config, running_len: 1, ..Options::default() }).await;
    let body = |tokens: usize, tier: &str| {
        chat_body(greedy(tokens, json!({"stream": true, "service_tier": tier})))
    };
    let mut running = server.begin("/v1/chat/completions", &body(CONTEXT_LEN - 100, "auto")).await;
    running.wait_for("\"content\":").await;
    let (tell, mut first_tokens) = tokio::sync::mpsc::unbounded_channel();
    for tier in ["default", "flex", "priority"] {
        let mut waiting = server.begin("/v1/chat/completions", &body(2000, tier)).await;
        waiting.wait_for(": heartbeat\n\n").await;
        let tell = tell.clone();
        tokio::spawn(async move {
            waiting.wait_for("\"content\":").await;
            tell.send(tier).expect("somebody listens");
            waiting.answer().await.chunks();
        });
    }
    drop((running, tell));
    for tier in ["priority", "default", "flex"] {
        assert_eq!(first_tokens.recv().await, Some(tier));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back_and_a_waiting_stream_hears_a_heartbeat() {
    let config = ServerConfig { heartbeat: Duration::from_millis(10), ..ServerConfig::default() };
    let server =
        start(Options { config, running_len: 1, queue_len: 1, ..Options::default() }).await;
    let long = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &long).await;
    running.wait_for("\"content\":").await;
    let mut waiting = server.begin("/v1/chat/completions", &long).await;
    waiting.wait_for(": heartbeat\n\n").await;
    let refused = server.chat(greedy(1, json!({}))).await;
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("rate_limit_exceeded")));
    let wait_s: u64 = refused.header("retry-after").and_then(|s| s.parse().ok()).expect("seconds");
    let wait_ms: u64 =
        refused.header("retry-after-ms").and_then(|s| s.parse().ok()).expect("milliseconds");
    assert!(wait_s >= 1 && wait_s == wait_ms.div_ceil(1000));
    // What clients try again by themselves is left to them, and what is soon over.
    assert_eq!(refused.header("x-should-retry") == Some("false"), wait_ms > 120_000);
    drop(running);
    waiting.wait_for("\"content\":").await;
    // What could never fit into the queue is not told to come back.
    let hopeless = server.chat(json!({"n": 2})).await;
    assert_eq!((hopeless.status, &hopeless.error()["param"]), (400, &json!("n")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_lets_running_streams_finish() {
    let mut server = start(Options::default()).await;
    let body = chat_body(greedy(500, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &body).await;
    running.wait_for("\"content\":").await;
    server.stop();
    let chunks = running.answer().await.chunks();
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let config = ServerConfig { body_timeout: Duration::from_millis(50), ..Default::default() };
    let server = start(Options { config, ..Options::default() }).await;
    let half = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                 Connection: close\r\nContent-Length: 1000\r\n\r\n{\"model\"";
    let refused = http::send_raw(server.address, half).await.answer().await;
    assert_eq!((refused.status, &refused.error()["code"]), (408, &json!("request_timeout")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_with_half_a_body_is_not_used_again() {
    let server = start(Options::default()).await;
    let kind = "Content-Type: application/json";
    let head = |path: &str, body: &str| {
        let len = body.len();
        format!("POST {path} HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {len}\r\n\r\n")
    };
    for (path, status) in [("/v1/nothing", 404), ("/v1/models", 405)] {
        let unread = http::send_raw(server.address, head(path, "{}").as_bytes()).await;
        let refused = unread.answer().await;
        assert_eq!((refused.status, refused.header("connection")), (status, Some("close")));
    }
    let whole = head("/v1/completions", "{}") + "{}";
    let mut read = http::send_raw(server.address, whole.as_bytes()).await;
    read.wait_for("missing_required_parameter").await;
    assert!(!read.so_far().to_lowercase().contains("connection:"), "{}", read.so_far());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_come_closes_its_connection() {
    let config = ServerConfig { head_timeout: Duration::from_millis(50), ..Default::default() };
    let server = start(Options { config, ..Options::default() }).await;
    let half = http::send_raw(server.address, b"GET /health HTTP/1.1\r\nHost:").await;
    half.closed().await;
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greeting_that_does_not_come_closes_its_connection() {
    let folder = tempfile::tempdir().unwrap();
    let identity = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name));
    std::fs::write(&cert, identity.cert.pem()).unwrap();
    std::fs::write(&key, identity.signing_key.serialize_pem()).unwrap();
    let config = ServerConfig {
        tls: Some(Tls::open(&cert, &key).unwrap()),
        head_timeout: Duration::from_millis(50),
        ..Default::default()
    };
    let server = start(Options { config, ..Options::default() }).await;
    for half in [&b""[..], b"\x16\x03\x01\x40\x00\x01"] {
        http::send_raw(server.address, half).await.closed().await;
    }
    let plain = server.get("/health").await;
    assert_eq!((plain.status, &plain.error()["code"]), (400, &json!("https_required")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_does_not_wait_for_half_a_request() {
    let mut server = start(Options::default()).await;
    let half = http::send_raw(server.address, b"POST /v1/completions HTTP/1.1\r\nHost:").await;
    assert_eq!(server.get("/health").await.status, 200);
    let began = std::time::Instant::now();
    server.stop();
    server.stopped().await;
    assert!(began.elapsed() < ServerConfig::default().drain_timeout / 2);
    drop(half);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_does_not_wait_for_ever() {
    let config =
        ServerConfig { drain_timeout: Duration::from_millis(100), ..ServerConfig::default() };
    let mut server = start(Options { config, ..Options::default() }).await;
    let body = chat_body(greedy(CONTEXT_LEN - 100, json!({"stream": true})));
    let mut running = server.begin("/v1/chat/completions", &body).await;
    running.wait_for("\"content\":").await;
    server.stop();
    server.stopped().await;
}

/// A program that opens connections and forgets them, on one machine of a class, keeps none of the
/// others out. A second machine is a second address, which only Linux has without being asked.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn one_address_leaves_connections_to_others() {
    let config = ServerConfig { connections_max: 8, ..ServerConfig::default() };
    let server = start(Options { config, ..Options::default() }).await;
    let mut idle = Vec::new();
    for _ in 0..6 {
        idle.push(http::send_raw(server.address, b"GET /health HTTP/1.1\r\n").await);
    }
    http::send_raw(server.address, b"").await.closed().await;
    let other = tokio::net::TcpSocket::new_v4().expect("a socket");
    other.bind("127.0.0.2:0".parse().expect("an address")).expect("loopback is wide");
    let other = other.connect(server.address).await.expect("the server listens");
    let answer = http::send_over(other, "GET", "/health", &[], b"").await.answer().await;
    assert_eq!(answer.status, 200);
    drop(idle);
    // Those that left are counted no more.
    let begun = Instant::now();
    let mut answered = 0;
    while answered < 20 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{answered} answered");
        let mut socket = tokio::net::TcpStream::connect(server.address).await.expect("a socket");
        let mut text = Vec::new();
        // It is closed in the middle of the question while there is no place.
        let _ = socket.write_all(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n").await;
        let _ = socket.read_to_end(&mut text).await;
        answered += usize::from(text.starts_with(b"HTTP/1.1 200"));
    }
}

/// Bodies are in memory before anybody knows what they ask: so many at a time, and no key has all.
#[tokio::test(flavor = "multi_thread")]
async fn one_key_leaves_room_for_the_long_bodies_of_others() {
    let (server, [greedy, other]) =
        keys::start_with([keys::new("greedy", "a"), keys::new("other", "b")]).await;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {greedy}\r\n\
         Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{{"
    );
    let mut unfinished = Vec::new();
    for _ in 0..48 {
        unfinished.push(http::send_raw(server.address, head.as_bytes()).await);
    }
    let long = chat_body(json!({"max_tokens": 1, "user": "x".repeat(100_000)}));
    let ask = async |key: &str| {
        server.ask("POST", "/v1/chat/completions", Some(key), Some(long.clone())).await
    };
    // The last of them may not be there yet; whoever finds no place has looked for a second.
    let mut refused = ask(&greedy).await;
    for _ in 0..100 {
        if refused.status == 429 {
            break;
        }
        refused = ask(&greedy).await;
    }
    assert_eq!((refused.status, &refused.error()["type"]), (429, &json!("rate_limit_error")));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_ne!(ask(&other).await.status, 429);
    let short = chat_body(json!({"max_tokens": 1}));
    let answer = server.ask("POST", "/v1/chat/completions", Some(&greedy), Some(short)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}
