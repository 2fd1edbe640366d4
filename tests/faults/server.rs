//! The release binary on a port of its own, to be mistreated.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::http::{self, Answer, Pending};

/// Nothing here takes this long on an idle machine; tests share two cores.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    child: Child,
    folder: TempDir,
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    /// The built-in model with a few flags more.
    pub(crate) fn start(extra: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let log = File::create(folder.path().join("log")).expect("a file");
        Self::start_with(extra, folder, Stdio::from(log))
    }

    /// The same with its log somewhere else.
    pub(crate) fn start_with(extra: &[&str], folder: TempDir, log: Stdio) -> Self {
        let mut command = command(&folder.path().join("data"), extra);
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().expect("the binary");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a first line");
        let address = line.trim().strip_prefix("listening on http");
        let address = address.and_then(|rest| rest.trim_start_matches('s').strip_prefix("://"));
        let address = address.unwrap_or_else(|| panic!("no address in {line:?}"));
        let address = address.parse().expect("an address");
        Self { address, child, folder, _stdout: stdout }
    }

    /// Another one on the same data directory; this one has ended.
    pub(crate) fn again(mut self, extra: &[&str]) -> Self {
        self.wait();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a folder"));
        let log = OpenOptions::new().append(true).open(folder.path().join("log"));
        Self::start_with(extra, folder, Stdio::from(log.expect("its log")))
    }

    /// Everything it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
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

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib * 1024
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
    command.args(["serve", "--port", "0", "--threads", "1", "--data-dir"]).arg(data);
    command.args(extra).env_remove("RUST_LOG").stdin(Stdio::null());
    command
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
