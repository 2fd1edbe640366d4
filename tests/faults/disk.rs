//! A disk that takes no more, under everything that the server keeps: what must be kept is refused
//! in so many words, what need not be goes on, and once there is room so does the rest.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::http::Answer;
use crate::server::{self, Server, Witness, chat, long_stream};
use crate::{CHAT, QUESTION};

/// A disk of a few KiB.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where nobody may mount.
    pub(crate) fn mount(at: &Path, kib: usize) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={kib}k"), "none"]).arg(at);
        let output = mount.output().ok()?;
        output.status.success().then(|| Self(at.to_owned()))
    }

    /// Takes what is left.
    fn fill(&self) {
        let mut file = File::create(self.0.join("filler")).expect("a name");
        let full = file.write_all(&vec![1; 64 << 20]).expect_err("a small disk");
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).expect("the filler");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Refused because the disk is full, and not to be tried again.
fn is_full(answer: &Answer) {
    assert_eq!(answer.status, 507, "{}", answer.body);
    let error = answer.error();
    assert_eq!((&error["type"], &error["code"]), (&json!("server_error"), &json!("storage_full")));
    assert_eq!(error["message"], "the disk is full");
    assert_eq!(answer.header("x-should-retry"), Some("false"));
}

/// What would be kept.
fn bodies() -> [(&'static str, Value); 4] {
    let mut stored = chat(QUESTION, 4, false);
    stored["store"] = json!(true);
    let talk = json!({"items": [{"role": "user", "content": "Hi"}]});
    let upload = json!({"filename": "a", "purpose": "batch", "bytes": 3, "mime_type": "a/b"});
    let response = json!({"model": "hearth-tiny", "input": "Hi", "max_output_tokens": 16});
    [
        (CHAT, stored),
        ("/v1/responses", response),
        ("/v1/conversations", talk),
        ("/v1/uploads", upload),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_what_must_be_kept_and_nothing_else() {
    const LINES: usize = 300;
    let (place, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let Some(disk) = SmallDisk::mount(place.path(), 16 << 10) else {
        writeln!(std::io::stderr(), "SKIPPED: nobody may mount a small disk here").unwrap();
        return;
    };
    let log = folder.path().join("log");
    let server = Server::spawn(server::command(place.path(), &[]), folder, &log);
    let mut long = long_stream();
    long["max_tokens"] = json!(300);
    let (before, want) = (server.greedy(QUESTION).await, server.text(&long).await);
    let witness = Witness::before(&server).await;
    let mut kept = Vec::new();
    for (path, body) in bodies() {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        kept.push(format!("{path}/{}", answer.json()["id"].as_str().expect("an id")));
    }
    // One of each that works in the background when the disk gets full.
    let file = server.upload(LINES).await.json()["id"].clone();
    let work = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"});
    let batch = server.post("/v1/batches", &work).await.json();
    let batch = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));
    let background = json!({"model": "hearth-tiny", "input": "Say mango", "background": true,
                            "max_output_tokens": 2000, "ignore_eos": true});
    let response = server.post("/v1/responses", &background).await.json();
    let response = format!("/v1/responses/{}", response["id"].as_str().expect("an id"));
    assert_eq!(server.leaves(&batch, &["validating"]).await["status"], "in_progress");
    assert_eq!(server.leaves(&response, &["queued"]).await["status"], "in_progress");

    disk.fill();
    for (path, body) in bodies() {
        is_full(&server.post(path, &body).await);
    }
    for (path, body) in [("/v1/batches", &work), ("/v1/responses", &background)] {
        is_full(&server.post(path, body).await);
    }
    is_full(&server.upload(1).await);
    streams_say_so_at_their_end(&server).await;
    assert_eq!(server.greedy(QUESTION).await, before);
    assert_eq!(server.text(&long).await, want);
    for path in kept.iter().filter(|path| !path.starts_with("/v1/uploads")) {
        assert_eq!(server.get(path).await.status, 200, "{path} can be read");
    }
    // All of the answer is there, and cannot be kept; nor can a line of the batch.
    server.logs("a response in the background cannot be kept now").await;
    server.logs("a batch cannot keep its answers").await;
    let stands = server.get(&batch).await.json();
    assert_eq!(stands["status"], "in_progress");
    assert!(stands["request_counts"]["completed"].as_u64().expect("a number") < LINES as u64);
    assert_eq!(server.get(&response).await.json()["status"], "in_progress");

    disk.free();
    let response = server.leaves(&response, &["in_progress"]).await;
    assert_eq!(response["status"], "incomplete", "it is as long as it may be: {response}");
    let batch = server.leaves(&batch, &["in_progress", "finalizing"]).await;
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["request_counts"], json!({"total": LINES, "completed": LINES, "failed": 0}));
    for (path, body) in bodies() {
        assert_eq!(server.post(path, &body).await.status, 200, "{path}");
    }
    assert_eq!(server.upload(1).await.status, 200);
    witness.saw_nothing().await;
    server.is_idle().await;
    server.is_well().await;
    let left = fs::read_dir(place.path().join("files")).expect("a folder").flatten();
    let left: Vec<_> = left.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    assert!(left.iter().all(|name| !name.starts_with("unfinished")), "{left:?}");
}

/// The text has been told when it turns out that it cannot be kept.
async fn streams_say_so_at_their_end(server: &Server) {
    for (path, body) in &mut bodies()[..2] {
        body["stream"] = json!(true);
        let answer = server.post(path, body).await;
        let last = answer.body.trim_end().rsplit("data: ").next().expect("an event");
        assert_eq!(answer.status, 200);
        assert!(answer.body.contains("delta") && last.contains("the disk is full"), "{last}");
    }
}

/// Nobody hears of it: what was used waits in memory, is tried every two seconds, and is written by
/// itself once there is room, all of it and once.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_while_the_disk_was_full_is_counted_once() {
    const WORDS: &str = "what was used cannot be written now";
    let (place, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let Some(disk) = SmallDisk::mount(place.path(), 16 << 10) else {
        writeln!(std::io::stderr(), "SKIPPED: nobody may mount a small disk here").unwrap();
        return;
    };
    let log = folder.path().join("log");
    let start = |folder| Server::spawn(server::command(place.path(), &[]), folder, &log);
    let mut server = start(folder);
    let mut told = [0; 3];
    let mut ask = async |server: &Server| {
        let answer = server.post(CHAT, &chat(QUESTION, 12, false)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let usage = answer.json()["usage"].clone();
        let [input, output] = ["prompt_tokens", "completion_tokens"].map(|n| usage[n].as_u64());
        told = [told[0] + 1, told[1] + input.expect("a sum"), told[2] + output.expect("a sum")];
    };
    ask(&server).await;
    disk.fill();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        ask(&server).await;
    }
    server.logs(WORDS).await;
    let (tries, took) = (server.log().matches(WORDS).count() as u64, begun.elapsed());
    println!("{tries} tries in {took:?}");
    assert!(tries <= 1 + took.as_secs() / 2, "{tries} tries in {took:?}");
    disk.free();
    tokio::time::sleep(Duration::from_secs(4)).await;
    server.signal("-9");
    server.wait();
    let again = start(tempfile::tempdir().unwrap());
    let usage = again.get("/v1/organization/usage/completions?limit=2").await.json();
    let sums = usage["data"].as_array().expect("buckets").iter();
    let sums: Vec<_> = sums.flat_map(|bucket| bucket["results"].as_array().unwrap()).collect();
    let counted = ["num_model_requests", "input_tokens", "output_tokens"]
        .map(|name| sums.iter().map(|sum| sum[name].as_u64().expect("a sum")).sum::<u64>());
    assert_eq!(counted, told);
    again.is_well().await;
}

/// A log that cannot be written is a pity, not an end: neither where there is room for nothing nor
/// where there was.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_for_the_log_stops_nothing() {
    let place = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(place.path(), 64);
    let logs = match &disk {
        Some(_) => vec![PathBuf::from("/dev/full"), place.path().join("log")],
        None => vec![PathBuf::from("/dev/full")],
    };
    for log in logs {
        let folder = tempfile::tempdir().unwrap();
        let command = server::command(&folder.path().join("data"), &[]);
        let mut server = Server::spawn(command, folder, &log);
        let before = server.greedy(QUESTION).await;
        let ask = async || {
            for _ in 0..50 {
                assert_eq!(server.post(CHAT, &json!({"model": 5})).await.status, 400);
            }
            assert_eq!(server.greedy(QUESTION).await, before);
        };
        ask().await;
        if let Some(disk) = disk.as_ref().filter(|_| log.starts_with(place.path())) {
            disk.fill();
            let full = server.log().len();
            ask().await;
            assert!(server.log().len() < full + 4096, "it is not full");
            disk.free();
            ask().await;
            assert!(server.log().len() > full + 4096, "there is room again");
            server.is_well().await;
        }
        server.is_idle().await;
        server.signal("-TERM");
        assert_eq!(server.wait().code(), Some(0));
    }
}
