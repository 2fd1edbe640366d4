//! A client of a server that speaks the OpenAI API, ours or another: a base URL, a key, and an
//! error in the server's own words. Blocks; knows nothing of what is asked.

use std::io::{self, BufRead, BufReader, Read};
use std::time::Duration;

use serde_json::Value;
use ureq::http::Response;
use ureq::{Agent, Body, RequestBuilder};

/// Connections that are kept for later: as many as a load test has at once.
pub const IDLE_CONNECTIONS: usize = 2048;
/// Of an error's body, for people.
const ERROR_CHARS: usize = 300;

/// A server, and the key that it is asked with.
#[derive(Clone, Debug)]
pub struct Client {
    url: String,
    bearer: Option<String>,
    agent: Agent,
    /// Keeps no connection.
    afresh: Agent,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct Failed {
    /// `connect`, `timeout`, `status 429`, `broken stream`, ...
    pub kind: String,
    /// In the server's words, where it has some.
    pub message: String,
    /// How long to wait, as the server asks.
    pub pause: Option<Duration>,
}

impl Client {
    /// A server at `url`, which gets `/v1` if it has no path; `timeout` is that of a whole answer.
    pub fn new(url: &str, key: Option<&str>, timeout: Duration) -> Result<Self, Failed> {
        let url = url.trim_end_matches('/');
        let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        let host =
            host.ok_or_else(|| Failed::new("base URL", "it must begin with http:// or https://"))?;
        let path = if host.contains('/') { "" } else { "/v1" };
        let agent = |kept| {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .user_agent(concat!("hearth/", env!("CARGO_PKG_VERSION")))
                .timeout_global(Some(timeout))
                .max_idle_connections(kept)
                .max_idle_connections_per_host(kept);
            config.build().new_agent()
        };
        Ok(Self {
            url: format!("{url}{path}"),
            bearer: key.map(|key| format!("Bearer {key}")),
            agent: agent(IDLE_CONNECTIONS),
            afresh: agent(0),
        })
    }

    /// The base URL, without a slash at its end.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The text behind `path`.
    pub fn get(&self, path: &str) -> Result<String, Failed> {
        text(self.with_key(self.agent.get(self.at(path))).call())
    }

    /// What the server says to `body`.
    pub fn post(&self, path: &str, body: &Value) -> Result<String, Failed> {
        text(self.send(path, body))
    }

    /// The same, piece by piece as it comes; [`Failed::of_read`] says why it broke off.
    pub fn stream(&self, path: &str, body: &Value) -> Result<impl BufRead + use<>, Failed> {
        Ok(BufReader::new(accepted(self.send(path, body))?.into_body().into_reader()))
    }

    fn send(&self, path: &str, body: &Value) -> Result<Response<Body>, ureq::Error> {
        let body = body.to_string();
        let ask = |agent: &Agent| {
            let request = agent.post(self.at(path)).header("content-type", "application/json");
            self.with_key(request).send(&body)
        };
        match ask(&self.agent) {
            // A server may close a connection that it had kept while a request is on its way
            // (RFC 9112, section 9.3.1); one that closes a new one too means it.
            Err(ureq::Error::Io(error)) if is_closed(&error) => ask(&self.afresh),
            answer => answer,
        }
    }

    fn at(&self, path: &str) -> String {
        format!("{}/{path}", self.url)
    }

    fn with_key<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.bearer {
            Some(bearer) => request.header("authorization", bearer),
            None => request,
        }
    }
}

impl Failed {
    /// A failure; of a long message its beginning.
    pub fn new(kind: impl Into<String>, message: impl Into<String>) -> Self {
        let message: String = message.into();
        let message = message.chars().take(ERROR_CHARS).collect();
        Self { kind: kind.into(), message, pause: None }
    }

    /// An answer that broke off.
    pub fn of_read(error: &io::Error) -> Self {
        let timed_out = error.get_ref().and_then(|e| e.downcast_ref::<ureq::Error>());
        match timed_out {
            Some(ureq::Error::Timeout(_)) => Self::new("timeout", error.to_string()),
            _ if error.kind() == io::ErrorKind::TimedOut => Self::new("timeout", error.to_string()),
            _ => Self::new("broken stream", error.to_string()),
        }
    }

    fn of_transport(error: &ureq::Error) -> Self {
        let kind = match error {
            ureq::Error::Timeout(_) => "timeout",
            _ => "connect",
        };
        Self::new(kind, error.to_string())
    }

    /// An answer that is none.
    fn of_status(response: Response<Body>) -> Self {
        let status = response.status().as_u16();
        let seconds =
            response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok());
        let mut text = String::new();
        // What cannot be read is not shown.
        let _ = response.into_body().into_reader().take(1 << 16).read_to_string(&mut text);
        let json: Value = serde_json::from_str(&text).unwrap_or_default();
        let message = json["error"]["message"].as_str().unwrap_or(&text).to_owned();
        let failed = Self::new(format!("status {status}"), message);
        Self { pause: seconds.map(Duration::from_secs), ..failed }
    }
}

/// The other side ended the connection before it had answered anything.
fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

fn accepted(answer: Result<Response<Body>, ureq::Error>) -> Result<Response<Body>, Failed> {
    let response = answer.map_err(|e| Failed::of_transport(&e))?;
    if response.status().is_success() { Ok(response) } else { Err(Failed::of_status(response)) }
}

fn text(answer: Result<Response<Body>, ureq::Error>) -> Result<String, Failed> {
    let text = accepted(answer)?.body_mut().read_to_string();
    text.map_err(|e| Failed::of_read(&io::Error::other(e)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    /// Reads one request on `stream` to its end.
    pub(crate) fn heard(stream: &TcpStream) {
        let mut request = BufReader::new(stream);
        let (mut line, mut len) = (String::new(), 0);
        while request.read_line(&mut line).unwrap() > 2 {
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                len = value.trim().parse().unwrap();
            }
            line.clear();
        }
        request.take(len).read_to_end(&mut Vec::new()).unwrap();
    }

    /// A server that answers `answered` requests of each connection, promises to keep it, and
    /// closes it when it has heard one more.
    fn forgetful(answered: usize) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                for _ in 0..answered {
                    heard(&stream);
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
                }
                heard(&stream);
            }
        });
        Client::new(&url, None, Duration::from_secs(5)).unwrap()
    }

    #[test]
    fn a_kept_connection_that_is_closed_meanwhile_is_no_failure() {
        let (client, body) = (forgetful(1), Value::Null);
        for _ in 0..3 {
            assert_eq!(client.post("x", &body).as_deref(), Ok("ok"));
        }
        let failed = forgetful(0).post("x", &body).unwrap_err();
        assert_eq!(failed.kind, "connect", "{failed}");
    }

    #[test]
    fn a_base_url_is_one_of_openai_clients() {
        let url = |text: &str| Client::new(text, None, Duration::ZERO).map(|client| client.url);
        assert_eq!(url("http://h:1").unwrap(), "http://h:1/v1");
        assert_eq!(url("https://h/v1/").unwrap(), "https://h/v1");
        assert!(url("h:1/v1").unwrap_err().to_string().contains("https://"));
    }
}
