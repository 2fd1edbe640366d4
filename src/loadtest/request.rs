//! One streamed request as a client sees it: when each piece of the answer came, or why none did.

use std::io::{BufRead, Read};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::LoadTestError;
use super::prompts::{Content, Prompt};
use crate::client::{Client, Failed};

/// An event longer than this is nobody's.
const EVENT_BYTES_MAX: u64 = 8 << 20;

/// A server, and how it is asked.
#[derive(Clone, Debug)]
pub struct Server {
    /// The id that requests name.
    pub model: String,
    /// Tokens of an answer, unless a prompt says otherwise.
    pub max_tokens: usize,
    /// Let no token end an answer before (an extension that ours and others have).
    pub ignore_eos: bool,
    /// `/completions` instead of `/chat/completions`.
    pub completions: bool,
    client: Client,
}

/// What became of one request. Times are in seconds since the measurement began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// When it was due.
    pub due_s: f64,
    /// When pieces of text came, in order.
    pub pieces_s: Vec<f64>,
    /// When it was over.
    pub end_s: f64,
    /// Tokens of the answer: as the server counts, or else pieces.
    pub output_tokens: usize,
    /// Tokens of the prompt, where the server says it.
    pub prompt_tokens: Option<usize>,
    /// Why it is no answer.
    pub failed: Option<Failed>,
}

impl Record {
    pub(super) fn failed(due_s: f64, failed: Failed) -> Self {
        Self { due_s, end_s: due_s, failed: Some(failed), ..Self::default() }
    }

    /// From when it was due to its first piece, or to its end where the answer is empty.
    pub fn ttft_s(&self) -> f64 {
        self.pieces_s.first().unwrap_or(&self.end_s) - self.due_s
    }

    /// From when it was due to its end.
    pub fn e2e_s(&self) -> f64 {
        self.end_s - self.due_s
    }

    /// Between one piece and the next.
    pub fn gaps_s(&self) -> impl Iterator<Item = f64> {
        self.pieces_s.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Mean time of a token after the first; `None` of fewer than two.
    pub fn token_s(&self) -> Option<f64> {
        let (first, last) = (self.pieces_s.first()?, self.pieces_s.last()?);
        (self.output_tokens > 1).then(|| (last - first) / (self.output_tokens - 1) as f64)
    }
}

impl Server {
    /// A server at `url`; a URL without a path gets `/v1`.
    pub fn new(url: &str, key: Option<&str>, timeout: Duration) -> Result<Self, LoadTestError> {
        let client = Client::new(url, key, timeout).map_err(|failed| unusable(url, &failed))?;
        let (model, max_tokens) = (String::new(), 0);
        Ok(Self { model, max_tokens, ignore_eos: false, completions: false, client })
    }

    /// Its base URL.
    pub fn url(&self) -> &str {
        self.client.url()
    }

    /// Ids of the models that it serves.
    pub fn models(&self) -> Result<Vec<String>, LoadTestError> {
        let text = self.client.get("models").map_err(|failed| unusable(self.url(), &failed))?;
        let list: Value = serde_json::from_str(&text).map_err(|e| {
            let why = format!("its list of models is not JSON: {e}");
            unusable(self.url(), &Failed::new("models", why))
        })?;
        let ids = list["data"].as_array().into_iter().flatten();
        Ok(ids.filter_map(|model| model["id"].as_str().map(str::to_owned)).collect())
    }

    /// Asks once, unmeasured: an error of every request is found here.
    pub fn probe(&self, prompt: &Prompt) -> Result<Record, LoadTestError> {
        let record = self.stream(prompt, Instant::now(), 0.0);
        match &record.failed {
            Some(failed) => Err(unusable(self.url(), failed)),
            None => Ok(record),
        }
    }

    /// Asks and reads the answer to its end.
    pub fn stream(&self, prompt: &Prompt, started: Instant, due_s: f64) -> Record {
        let mut record = Record { due_s, ..Record::default() };
        record.failed = self.read(prompt, started, &mut record).err();
        if record.failed.is_some() || record.end_s == 0.0 {
            record.end_s = started.elapsed().as_secs_f64();
        }
        record
    }

    fn body(&self, prompt: &Prompt) -> Value {
        let mut body = json!({
            "model": self.model,
            "max_tokens": prompt.max_tokens.unwrap_or(self.max_tokens),
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match (&prompt.content, self.completions) {
            (Content::Text(text), true) => body["prompt"] = json!(text),
            (content, _) => body["messages"] = content.messages(),
        }
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        body
    }

    fn read(&self, prompt: &Prompt, started: Instant, record: &mut Record) -> Result<(), Failed> {
        let route = if self.completions { "completions" } else { "chat/completions" };
        let mut lines = self.client.stream(route, &self.body(prompt))?;
        let (mut line, mut is_done) = (Vec::new(), false);
        loop {
            line.clear();
            let read = lines.by_ref().take(EVENT_BYTES_MAX).read_until(b'\n', &mut line);
            let now_s = started.elapsed().as_secs_f64();
            match read {
                // The connection is used again once it is read to its end.
                Ok(0) if is_done => break,
                Ok(0) => return Err(Failed::new("broken stream", "it ended without [DONE]")),
                Ok(_) => {}
                Err(_) if is_done => break,
                Err(e) => return Err(Failed::of_read(&e)),
            }
            let Some(data) = line.trim_ascii().strip_prefix(b"data:").map(<[u8]>::trim_ascii)
            else {
                continue;
            };
            match data {
                b"[DONE]" => (is_done, record.end_s) = (true, now_s),
                event => take_event(event, now_s, record)?,
            }
        }
        if record.output_tokens == 0 {
            record.output_tokens = record.pieces_s.len();
        }
        Ok(())
    }
}

fn unusable(url: &str, failed: &Failed) -> LoadTestError {
    LoadTestError::Server { url: url.to_owned(), why: failed.to_string() }
}

/// Notes what one event brings.
fn take_event(event: &[u8], now_s: f64, record: &mut Record) -> Result<(), Failed> {
    let event: Value =
        serde_json::from_slice(event).map_err(|e| Failed::new("bad event", e.to_string()))?;
    if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
        let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
        return Err(Failed::new("error event", message));
    }
    let says = |value: &Value| match value {
        Value::String(text) => !text.is_empty(),
        Value::Array(calls) => !calls.is_empty(),
        _ => false,
    };
    let brings_text = |choice: &Value| {
        let delta = &choice["delta"];
        let texts = ["content", "reasoning_content", "reasoning", "refusal", "tool_calls"];
        says(&choice["text"]) || texts.iter().any(|key| says(&delta[*key]))
    };
    if event["choices"].as_array().is_some_and(|choices| choices.iter().any(brings_text)) {
        record.pieces_s.push(now_s);
    }
    let count = |key: &str| event["usage"][key].as_u64().map(|n| n as usize);
    record.prompt_tokens = count("prompt_tokens").or(record.prompt_tokens);
    record.output_tokens = count("completion_tokens").unwrap_or(record.output_tokens);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::tests::heard;
    use std::io::Write;
    use std::net::TcpListener;

    /// Answers one request with `parts`, each after a pause in milliseconds.
    fn served(head: &'static str, parts: &'static [(u64, &'static str)]) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            heard(&stream);
            stream.write_all(head.as_bytes()).unwrap();
            for (pause_ms, part) in parts {
                std::thread::sleep(Duration::from_millis(*pause_ms));
                stream.write_all(part.as_bytes()).unwrap();
            }
        });
        Server::new(&url, None, Duration::from_secs(5)).unwrap()
    }

    fn ask(server: &Server) -> Record {
        let prompt = Prompt { content: Content::Text("x".into()), max_tokens: None };
        server.stream(&prompt, Instant::now(), 0.0)
    }

    const OK: &str =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

    #[test]
    fn times_are_those_of_the_events() {
        let record = ask(&served(
            OK,
            &[
                (0, "data: {\"choices\":[{\"delta\":{\"role\":\"x\",\"content\":\"\"}}]}\n\n"),
                (120, ": heartbeat\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n"),
                (60, "data:{\"choices\":[{\"delta\":{\"reasoning_content\":\"b\"}}]}\r\n\r\n"),
                (60, "data: {\"choices\":[{\"delta\":{\"content\":\"c\"}}]}\n\n"),
                (40, "data: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":5}}\n\n"),
                (0, "data: [DONE]\n\n"),
            ],
        ));
        assert_eq!(record.failed, None);
        assert_eq!((record.pieces_s.len(), record.output_tokens), (3, 5));
        assert_eq!(record.prompt_tokens, Some(7));
        let is = |value: f64, expected: f64| (expected..expected + 0.05).contains(&value);
        // Pauses are never shorter than asked; a busy machine makes them longer.
        assert!(record.ttft_s() >= 0.12 && record.e2e_s() >= 0.28, "{record:?}");
        assert!(record.e2e_s() - record.ttft_s() >= 0.155, "{record:?}");
        let span = record.pieces_s[2] - record.pieces_s[0];
        assert!(is(record.token_s().unwrap(), span / 4.0), "{record:?}");
        assert_eq!(record.gaps_s().count(), 2);
    }

    #[test]
    fn failures_have_kinds() {
        let kind = |head, parts| ask(&served(head, parts)).failed.unwrap().kind;
        let text = (0, "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n");
        assert_eq!(
            kind(OK, const { &[(0, "data: {\"error\":{\"message\":\"no\"}}\n\n")] }),
            "error event"
        );
        assert_eq!(kind(OK, const { &[(0, "data: {oops\n\n")] }), "bad event");
        let record = ask(&served(OK, Box::leak(Box::new([text]))));
        assert_eq!(
            (record.failed.unwrap().kind.as_str(), record.pieces_s.len()),
            ("broken stream", 1)
        );
        let busy = "HTTP/1.1 429 Too Many Requests\r\nretry-after: 3\r\nconnection: close\r\n\r\n";
        let failed =
            ask(&served(busy, &[(0, "{\"error\":{\"message\":\"later\"}}")])).failed.unwrap();
        assert_eq!((failed.kind.as_str(), failed.message.as_str()), ("status 429", "later"));
        assert_eq!(failed.pause, Some(Duration::from_secs(3)));
        let server = Server::new("http://127.0.0.1:1", None, Duration::from_secs(5)).unwrap();
        assert_eq!(ask(&server).failed.unwrap().kind, "connect");
        let slow = served(OK, &[(1500, "data: [DONE]\n\n")]);
        let slow = Server::new(slow.url(), None, Duration::from_millis(200)).unwrap();
        assert_eq!(ask(&slow).failed.unwrap().kind, "timeout");
    }
}
