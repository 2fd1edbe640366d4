//! What outlives the process: the real binary on a data directory, killed without warning, and the
//! commands that manage its keys and copies.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use hearth::files::{Files, NewFile, Quota};
use hearth::store::Store;
use hearth::types::ProjectId;

fn hearth(data: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("HEARTH_") {
            command.env_remove(name);
        }
    }
    command.args(args).env("HEARTH_DATA_DIR", data).stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

fn run(data: &Path, args: &[&str]) -> Output {
    hearth(data, args).output().unwrap()
}

/// What a command that must succeed prints.
fn stdout_of(data: &Path, args: &[&str]) -> String {
    let output = run(data, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The last words of a command that must fail.
fn error_of(data: &Path, args: &[&str]) -> String {
    let output = run(data, args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
    assert!(!text.contains("panicked"), "{text}");
    text.rsplit_once("error: ").unwrap_or_else(|| panic!("no error in {text}")).1.to_owned()
}

#[test]
fn keys_are_made_listed_and_revoked() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let create = ["keys", "create", "--name", "room 1", "--project", "class", "--expires", "30d"];
    let key = stdout_of(data, &create);
    assert!(key.starts_with("sk-hearth-") && !key.contains(char::is_whitespace));
    let list = stdout_of(data, &["keys", "list"]);
    let hint = &key[key.len() - 4..];
    for word in ["key_1", "room 1", "class", hint, "until 20"] {
        assert!(list.contains(word), "no {word} in {list}");
    }
    assert!(!list.contains(&key));
    assert!(
        !fs::read(data.join("hearth.db")).unwrap().windows(43).any(|w| key.as_bytes().ends_with(w))
    );
    assert_eq!(stdout_of(data, &["keys", "revoke", "room 1"]), "revoked key_1 room 1");
    assert!(stdout_of(data, &["keys", "list"]).contains("revoked 20"));
    assert!(error_of(data, &["keys", "revoke", "room 1"]).contains("room 1"));
    assert!(error_of(data, &["keys", "create", "--name", " "]).contains("name"));
    assert_eq!(run(data, &["keys", "create"]).status.code(), Some(2));
}

#[test]
fn other_machines_are_not_served_without_a_key_by_accident() {
    let data = tempfile::tempdir().unwrap();
    let serve = ["serve", "--port", "0", "--host", "0.0.0.0", "-m", "no-such-file.gguf"];
    let error = error_of(data.path(), &serve);
    for word in ["0.0.0.0", "hearth keys create", "--api-key", "--insecure"] {
        assert!(error.contains(word), "{error}");
    }
    // With any of the three it goes on to the model, which is not there.
    for way in ["--insecure", "--api-key=sk-k"] {
        assert!(error_of(data.path(), &[&serve[..], &[way]].concat()).contains("no-such-file"));
    }
    stdout_of(data.path(), &["keys", "create", "--name", "a"]);
    assert!(error_of(data.path(), &serve).contains("no-such-file"));
    // A key that is revoked opens nothing, and does not open the door either.
    stdout_of(data.path(), &["keys", "revoke", "a"]);
    assert!(error_of(data.path(), &serve).contains("no-such-file"));
}

#[test]
fn folders_that_cannot_be_used_are_named_before_a_model_is_loaded() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("file");
    fs::write(&file, "").unwrap();
    let error = error_of(&file, &["serve", "--port", "0"]);
    assert!(error.contains("file") && error.contains("--data-dir"), "{error}");
    assert!(error_of(Path::new("none"), &["keys", "list"]).contains("none"));
}

#[test]
fn copies_come_back() {
    let data = tempfile::tempdir().unwrap();
    let copy = data.path().join("copy");
    let data = data.path().join("data");
    stdout_of(&data, &["keys", "create", "--name", "early"]);
    fs::create_dir(data.join("files")).unwrap();
    fs::write(data.join("files/file-1"), "contents").unwrap();
    stdout_of(&data, &["data", "backup", copy.to_str().unwrap()]);
    stdout_of(&data, &["keys", "create", "--name", "late"]);
    assert!(error_of(&data, &["data", "backup", copy.to_str().unwrap()]).contains("not empty"));
    fs::remove_file(data.join("files/file-1")).unwrap();
    stdout_of(&data, &["data", "restore", copy.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(data.join("files/file-1")).unwrap(), "contents");
    let list = stdout_of(&data, &["keys", "list"]);
    assert!(list.contains("early") && !list.contains("late"), "{list}");
    assert!(stdout_of(&data, &["data", "gc"]).contains("0 expired"));
    assert!(error_of(&data, &["data", "restore", "/nowhere"]).contains("nowhere"));
}

#[test]
fn what_has_expired_is_collected_with_its_contents() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let (gone, kept) = ("x".repeat(300_000), "y".repeat(1000));
    {
        let store = Arc::new(Store::open(data).unwrap());
        let files = Files::open(store, Quota { project_bytes_max: 1 << 20 }).unwrap();
        for (id, text, lifetime_s) in [("file-1", &gone, Some(1)), ("file-2", &kept, None)] {
            let (filename, purpose) = ("a.jsonl".to_owned(), "batch".to_owned());
            let new = NewFile { filename, purpose, lifetime_s };
            let mut writing = files.write(1 << 20).unwrap();
            writing.push(text.as_bytes()).unwrap();
            files.keep(ProjectId::DEFAULT, id, &new, writing).unwrap();
        }
    }
    let path = |id: &str| data.join("files").join(id);
    std::thread::sleep(std::time::Duration::from_millis(2100));
    // Contents that nobody names may still be on their way to a name while they are young.
    let contents = fs::File::open(path("file-1")).unwrap();
    contents.set_modified(std::time::UNIX_EPOCH).unwrap();
    let said = stdout_of(data, &["data", "gc"]);
    let (documents, bytes) = said.split_once(" expired objects, ").expect(&said);
    let bytes: u64 = bytes.strip_suffix(" bytes").expect(&said).parse().unwrap();
    assert_eq!(documents, "1");
    assert!(bytes >= gone.len() as u64, "{said}");
    assert!(!path("file-1").exists());
    assert_eq!(fs::read_to_string(path("file-2")).unwrap(), kept);
    assert_eq!(stdout_of(data, &["data", "gc"]), "0 expired objects, 0 bytes");
}

#[cfg(all(unix, feature = "builtin-model"))]
mod killed {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpStream;
    use std::process::{Child, ChildStdout, Stdio};
    use std::time::Duration;

    use hearth::store::{Document, Kind};
    use serde_json::{Value, json};

    use super::*;

    struct Server {
        child: Child,
        address: String,
        _stdout: BufReader<ChildStdout>,
    }

    impl Server {
        fn start(data: &Path) -> Self {
            let mut command = hearth(data, &["serve", "--port", "0"]);
            Self::of(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap())
        }

        fn of(mut child: Child) -> Self {
            let mut stdout = BufReader::new(child.stdout.take().unwrap());
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            let address = line.trim().strip_prefix("listening on http://");
            let address = address.unwrap_or_else(|| panic!("no address in {line:?}")).to_owned();
            Self { child, address, _stdout: stdout }
        }

        /// Status and body; an answer that is cut off has status 0.
        fn ask(&self, method: &str, path: &str, key: &str, body: &Value) -> (u16, Value) {
            let answer = self.send(method, path, key, "application/json", &body.to_string());
            match answer.map(|(status, body)| (status, serde_json::from_str(&body))) {
                Some((status, Ok(body))) => (status, body),
                _ => (0, Value::Null),
            }
        }

        /// Status and body as they came, if they did.
        fn send(
            &self,
            method: &str,
            path: &str,
            key: &str,
            kind: &str,
            body: &str,
        ) -> Option<(u16, String)> {
            let mut socket = TcpStream::connect(&self.address).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let head = format!(
                "{method} {path} HTTP/1.1\r\nhost: hearth\r\nconnection: close\r\n\
                 authorization: Bearer {key}\r\ncontent-type: {kind}\r\n\
                 content-length: {}\r\n\r\n{body}",
                body.len()
            );
            let mut text = String::new();
            socket.write_all(head.as_bytes()).ok()?;
            socket.read_to_string(&mut text).ok()?;
            let (head, body) = text.split_once("\r\n\r\n")?;
            Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
        }

        /// The id of a new file of requests.
        fn upload(&self, text: &str) -> Value {
            let body = format!(
                "--edge\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
                 --edge\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.jsonl\"\
                 \r\n\r\n{text}\r\n--edge--\r\n"
            );
            let kind = "multipart/form-data; boundary=edge";
            let (status, body) = self.send("POST", "/v1/files", "-", kind, &body).unwrap();
            assert_eq!(status, 200, "{body}");
            serde_json::from_str::<Value>(&body).unwrap()["id"].take()
        }

        /// `kill -9`.
        fn kill(&mut self) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// Nobody has to call `gc`: a server clears out, and the rest is as it was.
    #[test]
    fn what_has_expired_leaves_while_a_server_runs() {
        let data = tempfile::tempdir().unwrap();
        let contents = data.path().join("files/file-1");
        let body = || json!({"object": "response", "status": "completed"});
        let response = |id: &str, parent: &str, expires_s| Document {
            id: id.to_owned(),
            parent: parent.to_owned(),
            created_s: 1,
            expires_s,
            body: body(),
        };
        let seen = |kind, id: &str| {
            let store = Store::open(data.path()).unwrap();
            store.read(|tx| tx.exists(kind, id)).unwrap()
        };
        {
            let store = Arc::new(Store::open(data.path()).unwrap());
            let files = Files::open(Arc::clone(&store), Quota { project_bytes_max: 9 }).unwrap();
            let mut writing = files.write(9).unwrap();
            writing.push(b"old").unwrap();
            let (filename, purpose) = ("a".to_owned(), "batch".to_owned());
            let new = NewFile { filename, purpose, lifetime_s: Some(0) };
            files.keep(ProjectId::DEFAULT, "file-1", &new, writing).unwrap();
            let kept = store.write(|tx| {
                for i in 0..500 {
                    let id = format!("old-{i}");
                    let put = |kind, one: &Document| tx.insert(ProjectId::DEFAULT, kind, one);
                    put(Kind::Response, &response(&id, "", Some(1)))?;
                    put(Kind::ResponseInput, &response("item", &id, Some(1)))?;
                }
                tx.insert(ProjectId::DEFAULT, Kind::Response, &response("new", "", None))
            });
            kept.unwrap();
        }
        assert!(contents.exists() && seen(Kind::File, "file-1"));
        let server = Server::start(data.path());
        let begun = std::time::Instant::now();
        while seen(Kind::ResponseInput, "item") || seen(Kind::File, "file-1") || contents.exists() {
            assert!(begun.elapsed() < Duration::from_secs(120), "it is still there");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(!seen(Kind::Response, "old-499"));
        assert_eq!(server.ask("GET", "/v1/responses/new", "-", &Value::Null), (200, body()));
        // What is stored now has an end, but for conversations.
        let made = server.ask("POST", "/v1/conversations", "-", &json!({})).1;
        let ask = json!({"model": "hearth-tiny", "input": "Hi", "max_output_tokens": 16});
        let said = server.ask("POST", "/v1/responses", "-", &ask).1;
        let store = Store::open(data.path()).unwrap();
        let end = |kind, id: &Value| {
            let found = store.read(|tx| tx.get(ProjectId::DEFAULT, kind, "", id.as_str().unwrap()));
            let found = found.unwrap().unwrap();
            found.expires_s.map(|end| end - found.created_s)
        };
        let month = 30 * 24 * 3600;
        let left = end(Kind::Response, &said["id"]).unwrap();
        assert!((month..month + 60).contains(&left), "{left}");
        assert_eq!(end(Kind::Conversation, &made["id"]), None);
    }

    /// The start says who may ask, and the log by whose name a client calls its request.
    #[test]
    fn the_log_says_that_the_door_is_open_and_who_came_in() {
        let data = tempfile::tempdir().unwrap();
        let log = data.path().join("log");
        let mut command = hearth(data.path(), &["serve", "--port", "0"]);
        command.stdout(Stdio::piped()).stderr(fs::File::create(&log).unwrap());
        let mut server = Server::of(command.spawn().unwrap());
        let mut socket = TcpStream::connect(&server.address).unwrap();
        let head = "GET /v1/models HTTP/1.1\r\nhost: hearth\r\nconnection: close\r\n\
                    x-client-request-id: mine-7\r\n\r\n";
        socket.write_all(head.as_bytes()).unwrap();
        socket.read_to_string(&mut String::new()).unwrap();
        let pid = server.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert!(server.child.wait().unwrap().success());
        let log = fs::read_to_string(log).unwrap();
        for words in ["open to every program on this machine", "mine-7"] {
            assert!(log.contains(words), "no '{words}' in:\n{log}");
        }
    }

    #[test]
    fn every_answer_that_was_given_is_kept_through_kill_9() {
        let data = tempfile::tempdir().unwrap();
        let key = stdout_of(data.path(), &["keys", "create", "--name", "a"]);
        let mut answered = Vec::new();
        for round in 0..3 {
            let mut server = Server::start(data.path());
            let body = json!({
                "model": "hearth-tiny", "store": true, "max_tokens": 3,
                "messages": [{"role": "user", "content": "Hi"}],
                "metadata": {"round": round.to_string()},
            });
            let ask = || server.ask("POST", "/v1/chat/completions", &key, &body);
            answered.extend((0..5).map(|_| {
                let (status, answer) = ask();
                assert_eq!(status, 200, "{answer}");
                answer["id"].clone()
            }));
            // Killed while others are still being answered: those that were count.
            let late = std::thread::scope(|scope| {
                let asking = [(); 4].map(|()| scope.spawn(ask));
                std::thread::sleep(Duration::from_millis(20));
                let pid = server.child.id().to_string();
                assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
                asking.map(|thread| thread.join().unwrap())
            });
            answered.extend(late.iter().filter(|(s, _)| *s == 200).map(|(_, a)| a["id"].clone()));
            server.kill();
        }
        let server = Server::start(data.path());
        let path = "/v1/chat/completions?limit=100";
        let list = server.ask("GET", path, &key, &Value::Null).1;
        let kept = list["data"].as_array().unwrap();
        assert!(answered.len() >= 15);
        for id in &answered {
            let found = kept.iter().filter(|object| object["id"] == *id).count();
            assert_eq!(found, 1, "{id} of {} answers, {} kept", answered.len(), kept.len());
        }
        assert_eq!(server.ask("GET", "/v1/models", "sk-other", &Value::Null).0, 401);
    }

    /// `HEARTH_TEST_BATCH_LINES=50000` takes minutes: as many as a file may have.
    #[test]
    fn a_batch_that_is_killed_again_and_again_answers_every_line_once() {
        let lines = std::env::var("HEARTH_TEST_BATCH_LINES");
        let lines: usize = lines.map_or(300, |count| count.parse().unwrap());
        let data = tempfile::tempdir().unwrap();
        let line = |i: usize| {
            let messages = json!([{"role": "user", "content": format!("What is {i} and 1?")}]);
            let body = json!({"model": "hearth-tiny", "messages": messages, "max_tokens": 8,
                              "temperature": 0, "ignore_eos": true});
            let url = "/v1/chat/completions";
            json!({"custom_id": i.to_string(), "method": "POST", "url": url, "body": body})
        };
        let text: String = (0..lines).map(|i| format!("{}\n", line(i))).collect();
        let mut server = Server::start(data.path());
        let body = json!({"input_file_id": server.upload(&text), "completion_window": "24h",
                          "endpoint": "/v1/chat/completions"});
        let batch = server.ask("POST", "/v1/batches", "-", &body).1;
        let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
        let look = |server: &Server| server.ask("GET", &path, "-", &Value::Null).1;
        let done = |batch: &Value| batch["request_counts"]["completed"].as_u64().unwrap() as usize;
        let mut before = 0;
        for kills in 1..=4 {
            // Somewhere in the middle, the first time as early as that.
            let until = lines * kills / 6;
            let mut batch = look(&server);
            while done(&batch) < until {
                std::thread::sleep(Duration::from_millis(10));
                batch = look(&server);
            }
            assert!(done(&batch) >= before && done(&batch) < lines, "{batch}");
            before = done(&batch);
            server.kill();
            server = Server::start(data.path());
            assert!(done(&look(&server)) >= before, "a line that was counted is lost");
        }
        let mut batch = look(&server);
        while batch["status"] == "in_progress" || batch["status"] == "finalizing" {
            std::thread::sleep(Duration::from_millis(20));
            batch = look(&server);
        }
        let counts = json!({"total": lines, "completed": lines, "failed": 0});
        assert_eq!((&batch["status"], &batch["request_counts"]), (&json!("completed"), &counts));
        let path = format!("/v1/files/{}/content", batch["output_file_id"].as_str().unwrap());
        let (_, text) = server.send("GET", &path, "-", "-", "").unwrap();
        let answers: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let names: Vec<_> = answers.iter().map(|l| l["custom_id"].as_str().unwrap()).collect();
        let expected: Vec<String> = (0..lines).map(|i| i.to_string()).collect();
        assert_eq!(names, expected);
        // A line that was run again says the same as one that was not.
        let live = server.ask("POST", "/v1/chat/completions", "-", &line(lines / 2)["body"]).1;
        assert_eq!(answers[lines / 2]["response"]["body"]["choices"], live["choices"]);
    }

    #[test]
    fn a_response_in_the_background_that_is_killed_has_failed() {
        let data = tempfile::tempdir().unwrap();
        let mut server = Server::start(data.path());
        let body = json!({"model": "hearth-tiny", "input": "Hi", "background": true,
                          "ignore_eos": true});
        let (status, queued) = server.ask("POST", "/v1/responses", "-", &body);
        assert_eq!((status, &queued["status"]), (200, &json!("queued")));
        server.kill();
        let server = Server::start(data.path());
        let path = format!("/v1/responses/{}", queued["id"].as_str().unwrap());
        let (status, response) = server.ask("GET", &path, "-", &Value::Null);
        assert_eq!((status, &response["status"]), (200, &json!("failed")), "{response}");
        assert_eq!(response["error"]["code"], "server_error");
    }
}
