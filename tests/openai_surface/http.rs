//! An HTTP client of a hundred lines: what a test needs and no more, down to hanging up mid-answer.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Nothing in these tests takes this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The `error` object, whose four keys are checked on the way.
    pub(crate) fn error(&self) -> Value {
        let error = self.json()["error"].clone();
        let keys: Vec<_> = error.as_object().expect("an error object").keys().cloned().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        error
    }

    /// The values of an event stream that ends as it should.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let blocks = self.body.split_terminator("\n\n");
        let mut data: Vec<_> = blocks.filter_map(|block| block.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.iter().map(|json| serde_json::from_str(json).expect("JSON in every event")).collect()
    }
}

/// A request that has been sent.
pub(crate) struct Pending {
    socket: Box<dyn AsyncRead + Send + Unpin>,
    received: Vec<u8>,
}

/// Sends some bytes and nothing more.
pub(crate) async fn send_raw(server: SocketAddr, bytes: &[u8]) -> Pending {
    let mut socket = TcpStream::connect(server).await.expect("the server listens");
    socket.write_all(bytes).await.expect("the server reads");
    Pending { socket: Box::new(socket), received: Vec::new() }
}

/// Sends a request. `headers` are added to those that every request has.
pub(crate) async fn send(
    server: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Pending {
    let socket = TcpStream::connect(server).await.expect("the server listens");
    send_over(socket, method, path, headers, body).await
}

/// Sends a request over a connection that is there.
pub(crate) async fn send_over(
    mut socket: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Pending {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    socket.write_all(head.as_bytes()).await.expect("the server reads");
    // A server that refuses by the head alone may close before it has read the body.
    let _ = socket.write_all(body).await;
    Pending { socket: Box::new(socket), received: Vec::new() }
}

/// A field of a form: name, name of the file, contents.
pub(crate) type Part<'a> = (&'a str, Option<&'a str>, &'a [u8]);

const EDGE: &str = "----edge";

/// Sends a form, with a key or without.
pub(crate) async fn send_form(
    server: SocketAddr,
    path: &str,
    key: Option<&str>,
    parts: &[Part<'_>],
) -> Pending {
    let mut body = Vec::new();
    for (name, filename, content) in parts {
        let filename = filename.map_or(String::new(), |name| format!("; filename=\"{name}\""));
        let head = format!(
            "--{EDGE}\r\nContent-Disposition: form-data; name=\"{name}\"{filename}\r\n\r\n"
        );
        body.extend([head.as_bytes(), content, b"\r\n"].concat());
    }
    body.extend(format!("--{EDGE}--\r\n").as_bytes());
    let kind = format!("multipart/form-data; boundary={EDGE}");
    let bearer = key.map(|key| format!("Bearer {key}"));
    let mut headers = vec![("Content-Type", kind.as_str())];
    headers.extend(bearer.iter().map(|bearer| ("Authorization", bearer.as_str())));
    send(server, "POST", path, &headers, &body).await
}

impl Pending {
    /// Waits until the server has closed the connection, whatever it says before.
    pub(crate) async fn closed(mut self) {
        let rest = timeout(PATIENCE, self.socket.read_to_end(&mut self.received)).await;
        rest.expect("it closes in time").expect("it closes in order");
    }

    /// Reads until `text` has come.
    pub(crate) async fn wait_for(&mut self, text: &str) {
        let contains = |bytes: &[u8]| bytes.windows(text.len()).any(|w| w == text.as_bytes());
        while !contains(&self.received) {
            let got = timeout(PATIENCE, self.socket.read_buf(&mut self.received)).await;
            let got = got.expect("an answer in time").expect("a socket");
            let so_far = String::from_utf8_lossy(&self.received);
            assert!(got > 0, "the answer ended without {text:?}: {so_far}");
        }
    }

    /// What has come so far.
    pub(crate) fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.received).into_owned()
    }

    /// Reads to the end.
    pub(crate) async fn answer(mut self) -> Answer {
        let read = timeout(PATIENCE, self.socket.read_to_end(&mut self.received)).await;
        read.expect("an answer in time").expect("a socket");
        parse(&self.received)
    }
}

fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("a whole head");
    let head = std::str::from_utf8(&bytes[..end]).expect("a head of text");
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status line");
    let header = |line: &str| {
        let (name, value) = line.split_once(": ").expect("a header");
        (name.to_ascii_lowercase(), value.to_owned())
    };
    let mut answer = Answer {
        status: status.parse().expect("a number"),
        headers: lines.map(header).collect(),
        body: String::new(),
    };
    let body = match answer.header("transfer-encoding") {
        Some("chunked") => unchunk(&bytes[end + 4..]),
        _ => bytes[end + 4..].to_vec(),
    };
    answer.body = String::from_utf8(body).expect("a body of whole characters");
    answer
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let end = bytes.windows(2).position(|w| w == b"\r\n").expect("a chunk's length");
        let len = std::str::from_utf8(&bytes[..end]).expect("digits");
        let len = usize::from_str_radix(len, 16).expect("hexadecimal digits");
        if len == 0 {
            return out;
        }
        out.extend_from_slice(&bytes[end + 2..end + 2 + len]);
        bytes = &bytes[end + 2 + len + 2..];
    }
}
