//! `hearth serve` from its first line to its exit code.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{golden, hearth};

/// A server on a port of its own; killed when the test gives up.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: String,
    pub(crate) url: String,
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    pub(crate) fn start(extra: &[&str]) -> Self {
        let model = golden("llama.gguf");
        let mut args = vec!["serve", "--port", "0", "-m", model.to_str().unwrap()];
        args.extend(extra);
        Self::run(hearth(&args))
    }

    fn run(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://");
        let address = address.unwrap_or_else(|| panic!("no address in {line:?}")).to_owned();
        Self { child, url: format!("http://{address}"), address, _stdout: stdout }
    }

    pub(crate) fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )
        .unwrap();
        stream
    }

    /// Status and body.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        read_answer(self.send(method, path, body))
    }

    fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    fn wait(&mut self, patience: Duration) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < patience, "still running after {patience:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has usually left already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn read_answer(mut stream: TcpStream) -> (u16, String) {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

fn completion(max_tokens: usize, stream: bool) -> String {
    json!({
        "model": "llama", "prompt": "Once upon", "max_tokens": max_tokens, "temperature": 0,
        "stream": stream, "ignore_eos": true,
    })
    .to_string()
}

#[test]
fn answers_and_leaves_on_sigterm() {
    let mut server = Server::start(&[]);
    assert_eq!(server.ask("GET", "/health", "").0, 200);
    let (status, models) = server.ask("GET", "/v1/models", "");
    assert_eq!((status, models.contains("\"llama\"")), (200, true), "{models}");
    let (status, body) = server.ask("POST", "/v1/completions", &completion(8, false));
    assert_eq!(status, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 8, "{body}");
    assert!(answer["choices"][0]["text"].is_string(), "{body}");
    let (_, again) = server.ask("POST", "/v1/completions", &completion(8, false));
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(again["choices"][0]["text"], answer["choices"][0]["text"]);

    server.terminate();
    assert_eq!(server.wait(Duration::from_secs(20)).code(), Some(0));
    assert!(TcpStream::connect(&server.address).is_err(), "the port is still open");
}

/// An answer that has begun is finished, down to its last event.
#[test]
fn a_running_stream_is_finished_before_the_end() {
    // Eight answers on the slow path outlast the signal.
    let mut server = Server::start(&["--device", "plain"]);
    let mut request: Value = serde_json::from_str(&completion(240, true)).unwrap();
    request["n"] = json!(8);
    let mut stream = server.send("POST", "/v1/completions", &request.to_string());
    stream.read_exact(&mut [0; 16]).unwrap();
    server.terminate();
    let signalled = Instant::now();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    let left = signalled.elapsed();
    println!("{left:?} from the signal to the end of the stream");
    assert!(left > Duration::from_millis(50), "the answers were over before the signal");
    assert_eq!(rest.matches("\"finish_reason\":\"length\"").count(), 8, "{rest}");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(server.wait(Duration::from_secs(20)).code(), Some(0));
}

#[test]
fn a_port_in_use_is_named() {
    let server = Server::start(&[]);
    let port = server.address.rsplit_once(':').unwrap().1;
    let model = golden("llama.gguf");
    super::assert_fails(&["serve", "--port", port, "-m", model.to_str().unwrap()], &[port]);
}

#[test]
fn keys_from_the_command_line_are_asked_for() {
    let server = Server::start(&["--api-key", "sk-test"]);
    assert_eq!(server.ask("GET", "/v1/models", "").0, 401);
    assert_eq!(server.ask("GET", "/health", "").0, 200);
}

#[test]
#[cfg(target_os = "linux")]
fn more_files_are_asked_for_than_the_shell_hands_out() {
    let model = golden("llama.gguf");
    let program = hearth(&["serve", "--port", "0", "-m", model.to_str().unwrap()]);
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -S -n 200 && exec \"$0\" \"$@\""]).arg(program.get_program());
    shell.args(program.get_args());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let server = Server::run(shell);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.child.id())).unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let [soft, hard] = [0, 1].map(|at| files.split_whitespace().nth(at).unwrap());
    let hard = hard.parse().unwrap_or(u64::MAX);
    assert_eq!(soft.parse(), Ok(hard.min(1 << 15)), "{files}");
}
