//! The release binary on a port of its own, to be mistreated.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::http::{self, Answer, Pending};

/// Nothing here takes this long on an idle machine; tests share two cores.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    child: Child,
    folder: TempDir,
    log: PathBuf,
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    /// The built-in model with a few flags more.
    pub(crate) fn start(extra: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (log, data) = (folder.path().join("log"), folder.path().join("data"));
        Self::spawn(command(&data, extra), folder, &log)
    }

    /// A command of one's own, the folder that lives as long as it, and a file for its log.
    pub(crate) fn spawn(mut command: Command, folder: TempDir, log: &Path) -> Self {
        let end = OpenOptions::new().append(true).create(true).open(log).expect("a log");
        let mut child = command.stdout(Stdio::piped()).stderr(end).spawn().expect("the binary");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a first line");
        let address = line.trim().strip_prefix("listening on http");
        let address = address.and_then(|rest| rest.trim_start_matches('s').strip_prefix("://"));
        let address = address.unwrap_or_else(|| panic!("no address in {line:?}"));
        let address = address.parse().expect("an address");
        Self { address, child, folder, log: log.to_owned(), _stdout: stdout }
    }

    /// Another one on the same data directory; this one has ended.
    pub(crate) fn again(mut self, extra: &[&str]) -> Self {
        self.wait();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a folder"));
        let command = command(&folder.path().join("data"), extra);
        Self::spawn(command, folder, &self.log)
    }

    /// Everything it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) async fn send(&self, path: &str, body: &Value) -> Pending {
        let headers = [("content-type", "application/json")];
        http::send(self.address, "POST", path, &headers, body.to_string().as_bytes()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(path, body).await.answer().await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        http::send(self.address, "GET", path, &[], b"").await.answer().await
    }

    /// What a greedy question is answered with: the same at all times.
    pub(crate) async fn greedy(&self, text: &str) -> String {
        let answer = self.post("/v1/chat/completions", &chat(text, 48, false)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
    }

    /// Waits until it has said so in its log.
    pub(crate) async fn logs(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no {text:?} in {}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What a stream of chat says.
    pub(crate) async fn text(&self, body: &Value) -> String {
        text(&self.post("/v1/chat/completions", body).await)
    }

    /// One number of `/metrics`, all models together.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.body;
        let lines = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let values: Vec<f64> = lines
            .map(|line| line.rsplit(' ').next().and_then(|v| v.parse().ok()).expect("a number"))
            .collect();
        assert!(!values.is_empty(), "no {name} in {text}");
        values.iter().sum()
    }

    /// Waits until nothing runs or waits, and no sequence holds a block.
    pub(crate) async fn is_idle(&self) {
        let start = Instant::now();
        loop {
            let mut busy = Vec::new();
            for name in ["requests_running", "requests_waiting", "kv_blocks_used"] {
                let value = self.metric(&format!("hearth_{name}")).await;
                busy.extend((value != 0.0).then(|| format!("{name} {value}")));
            }
            if busy.is_empty() {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "still {busy:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a number of `/metrics` is this one.
    pub(crate) async fn becomes(&self, name: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name).await != value {
            assert!(start.elapsed() < PATIENCE, "{name} never became {value}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until a number of `/metrics` is more than this one.
    pub(crate) async fn passes(&self, name: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name).await <= value {
            assert!(start.elapsed() < PATIENCE, "{name} never passed {value}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until an object has a status that is none of these.
    pub(crate) async fn leaves(&self, path: &str, statuses: &[&str]) -> Value {
        let start = Instant::now();
        loop {
            let object = self.get(path).await.json();
            if !statuses.iter().any(|status| object["status"] == *status) {
                return object;
            }
            assert!(start.elapsed() < PATIENCE, "it stays {object}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The id of a new file of requests: so many, each of a few tokens.
    pub(crate) async fn upload(&self, lines: usize) -> Answer {
        let line = |i: usize| {
            let body = chat(&format!("What is {i} and 1?"), 24, false);
            let (url, id) = ("/v1/chat/completions", i.to_string());
            format!("{}\n", json!({"custom_id": id, "method": "POST", "url": url, "body": body}))
        };
        let text: String = (0..lines).map(line).collect();
        let file = ("file", Some("a.jsonl"), text.as_bytes());
        let form = [("purpose", None, &b"batch"[..]), file];
        http::send_form(self.address, "/v1/files", None, &form).await.answer().await
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib * 1024
    }

    /// Processor time so far.
    pub(crate) fn cpu_ms(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        let stat = stat.expect("it runs");
        let fields = stat.rsplit(") ").next().expect("fields").split(' ');
        // User and system, in hundredths of a second.
        let ticks = fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number"));
        ticks.sum::<u64>() * 10
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sockets that it has open.
    pub(crate) fn sockets(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("it runs");
        let links = open.flatten().filter_map(|file| fs::read_link(file.path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
    }

    /// Waits until it has no more open than so many.
    pub(crate) async fn has_sockets(&self, count: usize) {
        let start = Instant::now();
        while self.sockets() > count {
            assert!(start.elapsed() < PATIENCE, "{} sockets are open", self.sockets());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill").success());
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// It runs, and has not panicked.
    pub(crate) async fn is_well(&self) {
        assert_eq!(self.get("/health").await.status, 200);
        let log = self.log();
        assert!(!log.contains("panicked"), "{log}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `serve` with the built-in model, as no variable of whoever tests would change it.
pub(crate) fn command(data: &Path, extra: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("HEARTH_") {
            command.env_remove(name);
        }
    }
    command.args(["serve", "--port", "0", "--data-dir"]).arg(data);
    if !extra.contains(&"--threads") {
        command.args(["--threads", "1"]);
    }
    command.args(extra).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// A new key.
pub(crate) fn key(data: &Path, more: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    command.args(["keys", "create", "--name", "a", "--data-dir"]);
    let output = command.arg(data).args(more).output().expect("a key");
    String::from_utf8(output.stdout).expect("a key").trim().to_owned()
}

/// The same command in a network of its own.
pub(crate) fn apart(command: &Command) -> Command {
    let mut apart = Command::new("unshare");
    apart.arg("-n").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => apart.env(name, value),
            None => apart.env_remove(name),
        };
    }
    apart.stdin(Stdio::null());
    apart
}

/// A client beside a fault: the same seeded stream again and again, the first of them begun before
/// it, each compared with what it says alone.
pub(crate) struct Witness {
    over: Arc<AtomicBool>,
    streams: JoinHandle<usize>,
}

impl Witness {
    /// It has its first words when this returns.
    pub(crate) async fn before(server: &Server) -> Self {
        let mut body = chat("Say it again: bread, tea, honey, mango", 600, true);
        (body["ignore_eos"], body["temperature"], body["seed"]) = (json!(true), json!(1), json!(7));
        let (address, want) = (server.address, server.text(&body).await);
        let body = body.to_string();
        let ask = async move || {
            let headers = [("content-type", "application/json")];
            http::send(address, "POST", "/v1/chat/completions", &headers, body.as_bytes()).await
        };
        let mut stream = ask().await;
        stream.wait_for("\"content\"").await;
        let over = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&over);
        let streams = tokio::spawn(async move {
            for count in 1.. {
                assert_eq!(text(&stream.answer().await), want, "stream {count}");
                if is_over.load(Ordering::Relaxed) {
                    return count;
                }
                stream = ask().await;
            }
            0
        });
        Self { over, streams }
    }

    /// After the fault: nothing in any of them was another.
    pub(crate) async fn saw_nothing(self) {
        self.over.store(true, Ordering::Relaxed);
        let count = self.streams.await.expect("no stream is another");
        println!("{count} streams beside it are what they are alone");
    }
}

/// A greedy chat request.
pub(crate) fn chat(text: &str, max_tokens: usize, stream: bool) -> Value {
    json!({
        "model": "hearth-tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    })
}

/// A stream that goes on for long: no token ends it.
pub(crate) fn long_stream() -> Value {
    let mut body = chat("Say it again: bread, tea, honey, mango", 1500, true);
    body["ignore_eos"] = json!(true);
    body
}

/// What a stream of chat says, which ends as it should.
pub(crate) fn text(answer: &Answer) -> String {
    let chunks = answer.chunks();
    let pieces = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str());
    pieces.collect()
}
