//! Bundles by the real binary: made, started from somewhere else with nothing around it, checked,
//! damaged, and checked again.

#![cfg(all(unix, feature = "builtin-model"))]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The binary in an environment that holds a `PATH` and nothing else.
fn hearth(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    command.args(args).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8(text).unwrap()
}

#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let output = hearth(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", said(&output));
    said(&output)
}

#[track_caller]
fn fails(args: &[&str], words: &[&str]) -> String {
    let output = hearth(args).output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "`{said}` does not mention `{word}`");
    }
    said
}

/// A script stands in for the program, where it is only carried: the real one has its own test.
fn stand_in(folder: &Path) -> PathBuf {
    let path = folder.join("program");
    let mut head = b"\x7fELF\x02\x01".to_vec();
    head.resize(64, 0);
    head[18] = 62;
    fs::write(&path, head).unwrap();
    path
}

/// A small bundle of one golden, without the weight of the real program.
fn small_bundle() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (bundle, model) = (folder.path().join("bundle"), golden("llama.gguf"));
    let program = stand_in(folder.path());
    let args = ["-m", text(&model), "-o", text(&bundle), "--binary", text(&program)];
    succeeds(&[&["bundle", "create"], &args[..]].concat());
    (folder, bundle)
}

fn verify(bundle: &Path) -> String {
    succeeds(&["bundle", "verify", text(bundle)])
}

fn verify_fails(bundle: &Path, words: &[&str]) -> String {
    fails(&["bundle", "verify", text(bundle)], words)
}

/// A start script that runs; ended when the test gives up.
struct Started {
    child: Child,
    address: String,
}

impl Started {
    /// From `home`, which is empty, by a path that begins there.
    fn new(script: &Path, home: &Path) -> Self {
        let mut command = Command::new("sh");
        command.arg(script).args(["--port", "0", "--threads", "1"]).current_dir(home);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", home).env("TMPDIR", home);
        // Whoever asks the network anyway meets a closed door.
        command.env("HTTPS_PROXY", "http://127.0.0.1:9").env("HTTP_PROXY", "http://127.0.0.1:9");
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://");
        let address = address.unwrap_or_else(|| panic!("no address in {line:?}")).to_owned();
        Self { child, address }
    }

    fn ask(&self, model: &str) -> Value {
        let body = json!({
            "model": model, "max_tokens": 16, "temperature": 0,
            "messages": [{"role": "user", "content": "Hello"}],
        });
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
        serde_json::from_str(body).unwrap()
    }

    /// SIGTERM to the script; the exit code of what it ran.
    fn stop(mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(started.elapsed() < Duration::from_secs(30), "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It has usually left already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_built_in_model_answers_from_a_bundle_with_nothing_around_it() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("a stick, 隨身碟");
    let said = succeeds(&["bundle", "create", "-o", text(&bundle)]);
    assert!(said.contains("hearth-tiny") && said.contains("sha256"), "{said}");
    let script = only_script(&bundle);
    let home = tempfile::tempdir().unwrap();
    let server = Started::new(&script, home.path());
    let answer = server.ask("hearth-tiny");
    let content = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(!content.trim().is_empty(), "{answer}");
    assert_eq!(server.stop(), Some(0));
    let said = verify(&bundle);
    for word in ["opens       hearth-tiny: qwen3", "program", "whole"] {
        assert!(said.contains(word), "{said}");
    }

    // A stick that holds no permission to run programs: the script runs a copy and removes it.
    for entry in fs::read_dir(bundle.join("bin")).unwrap() {
        let program = entry.unwrap().path().join("hearth");
        fs::set_permissions(program, fs::Permissions::from_mode(0o644)).unwrap();
    }
    let server = Started::new(&script, home.path());
    assert_eq!(server.ask("hearth-tiny")["choices"][0]["message"]["content"], content);
    assert_eq!(server.stop(), Some(0));
    let copies = fs::read_dir(home.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("tmp."));
    assert_eq!(copies.count(), 0);

    // One byte of 16 million.
    let model = bundle.join("models/hearth-tiny/hearth-tiny.gguf");
    let mut bytes = fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&model, bytes).unwrap();
    let said = verify_fails(&bundle, &["changed", "models/hearth-tiny/hearth-tiny.gguf"]);
    assert_eq!(said.matches("changed").count(), 1, "{said}");
}

fn only_script(bundle: &Path) -> PathBuf {
    let paths = fs::read_dir(bundle).unwrap().map(|entry| entry.unwrap().path());
    let is_script = |path: &PathBuf| text(path).contains("/start-");
    let scripts: Vec<PathBuf> = paths.filter(is_script).collect();
    assert_eq!(scripts.len(), 1, "{scripts:?}");
    scripts[0].clone()
}

#[test]
fn what_is_missing_changed_or_extra_is_named() {
    let (_folder, bundle) = small_bundle();
    verify(&bundle);
    let model = "models/llama/llama.gguf";
    fs::write(bundle.join("models/llama/.DS_Store"), "x").unwrap();
    let said = verify(&bundle);
    assert!(said.contains("ignored     models/llama/.DS_Store"), "{said}");
    fs::write(bundle.join("models/note.txt"), "x").unwrap();
    verify_fails(&bundle, &["extra       models/note.txt", "one thing is wrong"]);
    fs::remove_file(bundle.join("hearth.toml")).unwrap();
    verify_fails(&bundle, &["missing     hearth.toml", "models/note.txt", "2 things"]);
    let bytes = fs::read(bundle.join(model)).unwrap();
    fs::write(bundle.join(model), &bytes[..100]).unwrap();
    verify_fails(&bundle, &["changed     models/llama/llama.gguf", "100 bytes", "unreadable"]);
    fs::remove_file(bundle.join("manifest.json")).unwrap();
    verify_fails(&bundle, &["manifest.json", "no bundle"]);
}

#[test]
fn links_and_ways_out_are_refused() {
    let (folder, bundle) = small_bundle();
    let secret = folder.path().join("secret");
    fs::write(&secret, "x").unwrap();
    // The right bytes behind a link are still a link, be it the file or a folder before it.
    let (model, aside) = (bundle.join("models/llama/llama.gguf"), folder.path().join("aside.gguf"));
    fs::rename(&model, &aside).unwrap();
    symlink(&aside, &model).unwrap();
    verify_fails(&bundle, &["not a file  models/llama/llama.gguf", "not opened"]);
    fs::remove_file(&model).unwrap();
    fs::rename(&aside, &model).unwrap();
    verify(&bundle);
    let outside = folder.path().join("outside");
    fs::rename(bundle.join("models/llama"), &outside).unwrap();
    symlink(&outside, bundle.join("models/llama")).unwrap();
    verify_fails(&bundle, &["not a file  models/llama/llama.gguf", "extra       models/llama"]);
    fs::remove_file(bundle.join("models/llama")).unwrap();
    fs::rename(&outside, bundle.join("models/llama")).unwrap();
    // A file that never ends, where a model's folder is read by name.
    symlink("/dev/zero", bundle.join("models/llama/tokenizer.json")).unwrap();
    verify_fails(&bundle, &["extra       models/llama/tokenizer.json", "not opened"]);
    fs::remove_file(bundle.join("models/llama/tokenizer.json")).unwrap();

    let manifest = bundle.join("manifest.json");
    let whole = fs::read_to_string(&manifest).unwrap();
    for path in ["../secret", text(&secret), "models/../../secret", "C:/secret", "a\\\\b"] {
        fs::write(&manifest, whole.replace("hearth.toml", path)).unwrap();
        verify_fails(&bundle, &["secret"].map(|_| path.split(['\\', '/']).next_back().unwrap()));
    }
    fs::remove_file(&manifest).unwrap();
    symlink("/dev/zero", &manifest).unwrap();
    verify_fails(&bundle, &["manifest.json", "not a regular file"]);
}

#[test]
fn split_models_folders_hub_ids_and_adapters_go_along() {
    let folder = tempfile::tempdir().unwrap();
    let (hub, name) = (folder.path().join("hub"), "org/name:Q8_0");
    let snapshot = hub.join("models--org--name/snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(hub.join("models--org--name/refs")).unwrap();
    fs::write(hub.join("models--org--name/refs/main"), "0123").unwrap();
    symlink(golden("llama-q8_0.gguf"), snapshot.join("name-Q8_0.gguf")).unwrap();
    let tensors = safetensors_folder(folder.path());
    let adapter = folder.path().join("teacher");
    fs::create_dir(&adapter).unwrap();
    fs::write(adapter.join("adapter_config.json"), "{}").unwrap();
    fs::copy(golden("llama/model.safetensors"), adapter.join("adapter_model.safetensors")).unwrap();
    let bundle = folder.path().join("bundle");
    let split = golden("qwen2-q4_0-split-00001-of-00002.gguf");
    let program = stand_in(folder.path());
    let output = hearth(&["bundle", "create", "-o", text(&bundle), "--alias", "分割"])
        .args(["-m", text(&split), "-m", name, "-m", text(&tensors)])
        .args(["--adapter", text(&adapter), "--binary", text(&program)])
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HUB_CACHE", &hub)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    for file in [
        "models/分割/qwen2-q4_0-split-00002-of-00002.gguf",
        "models/org-name-Q8_0/name-Q8_0.gguf",
        "models/tensors/model.safetensors",
        "models/tensors/tokenizer.json",
        "models/tensors/LICENSE.md",
        "adapters/teacher/adapter_config.json",
        "README.txt",
    ] {
        assert!(bundle.join(file).is_file(), "{file}");
    }
    assert!(!bundle.join("models/tensors/notes.txt").exists(), "nobody asked for it");
    let said = verify(&bundle);
    for word in ["opens       分割: qwen2", "org/name:Q8_0: llama", "tensors: llama", "adapter, "]
    {
        assert!(said.contains(word), "`{said}` does not mention `{word}`");
    }
    // `serve` would find all of them, from anywhere.
    let config = bundle.join("hearth.toml");
    let said = succeeds(&["doctor", "--config", text(&config)]);
    assert_eq!(said.matches("\nfamily").count(), 3, "{said}");
}

/// A folder with weights, a tokenizer of its own, a licence, and something private.
fn safetensors_folder(parent: &Path) -> PathBuf {
    let folder = parent.join("tensors");
    fs::create_dir(&folder).unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(golden("llama").join(name), folder.join(name)).unwrap();
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("LICENSE.md"), "free").unwrap();
    fs::write(folder.join("notes.txt"), "private").unwrap();
    folder
}

#[test]
fn what_cannot_be_made_says_why_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (model, out, program) = (golden("llama.gguf"), at("out"), stand_in(folder.path()));
    let create = |extra: &[&str]| -> Vec<String> {
        let args = ["bundle", "create", "-o", text(&out), "--binary", text(&program)];
        args.iter().chain(extra).map(|&arg| arg.to_owned()).collect()
    };
    let refused = |extra: &[&str], words: &[&str]| {
        let args = create(extra);
        fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), words);
        assert!(!out.exists() && !at("out.partial").exists(), "{extra:?} left something");
    };
    refused(&["-m", "none.gguf"], &["none.gguf"]);
    refused(&["-m", text(&model), "-m", text(&model)], &["`llama`", "--alias"]);
    refused(&["-m", text(&model), "--alias", "a", "--alias", "b"], &["--alias"]);
    refused(&["--binary", text(&model)], &["llama.gguf", "linux-x86_64"]);
    refused(&["--binary", &format!("windows-x86_64={}", text(&program))], &["linux-x86_64, not"]);
    refused(&["--binary", text(&program)], &["`bin/linux-x86_64/hearth`"]);
    refused(&["--adapter", text(folder.path())], &["adapter_config.json"]);
    let odd = at("what?.gguf");
    fs::copy(&model, &odd).unwrap();
    refused(&["-m", text(&odd)], &["what?.gguf", "Windows"]);
    let (two, upper) = (at("two"), at("TWO"));
    for folder in [&two, &upper] {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("adapter_config.json"), "{}").unwrap();
        fs::copy(golden("llama/model.safetensors"), folder.join("x.safetensors")).unwrap();
    }
    refused(&["--adapter", text(&two), "--adapter", text(&upper)], &["TWO", "case"]);
    let half = at("half.gguf");
    let bytes = fs::read(&model).unwrap();
    fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
    refused(&["-m", text(&half)], &["half.gguf", "bytes"]);
}

#[test]
fn a_place_that_is_taken_is_left_alone() {
    let (folder, bundle) = small_bundle();
    let (model, program) = (golden("qwen3.gguf"), folder.path().join("program"));
    let create = |out: &Path, extra: &[&str]| {
        let args = ["bundle", "create", "-m", text(&model), "--binary", text(&program), "-o"];
        hearth(&args).arg(out).args(extra).output().unwrap()
    };
    let refused = |out: &Path, extra: &[&str], word: &str| {
        let output = create(out, extra);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(said(&output).contains(word), "{}", said(&output));
    };
    refused(&bundle, &[], "--force");
    assert!(verify(&bundle).contains("llama"));
    // Not even with --force is a folder deleted that is no bundle.
    let home = folder.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("thesis.txt"), "x").unwrap();
    refused(&home, &["--force"], "no bundle");
    assert!(home.join("thesis.txt").is_file());
    refused(&program, &[], "no folder");
    refused(Path::new("/"), &[], "a folder in it");
    refused(Path::new("/proc"), &["--force"], "whole disk");
    // What an interrupted run left never has the bundle's name.
    let partial = folder.path().join("bundle.partial");
    fs::create_dir(&partial).unwrap();
    refused(&bundle, &[], "--force");
    let output = create(&bundle, &["--force"]);
    assert!(output.status.success(), "{}", said(&output));
    let text = verify(&bundle);
    assert!(text.contains("qwen3") && !text.contains("llama"), "{text}");
    assert!(!partial.exists() && !folder.path().join("bundle.old").exists());
    // An empty folder is a fine place.
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert!(create(&empty, &[]).status.success());
    verify(&empty);
}
