//! `--kv-store`: what was computed once is read again, also after a restart and a kill; a disk that
//! is full or lies costs time, and no answer is another one.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::disk::SmallDisk;
use crate::server::{self, Server, Witness};

/// Room for one prompt in memory.
const SMALL: [&str; 2] = ["--max-running", "1"];

/// A prompt of 1,200 to 2,000 tokens of which no two have a beginning in common.
fn body(seed: usize) -> Value {
    let sentence = |i| format!(" Mirka {seed} lives in Torvin and plays flute {i}.");
    let prompt: String = (0..50).map(sentence).collect();
    json!({
        "model": "hearth-tiny",
        "prompt": format!("{seed}{prompt}"),
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": 3,
    })
}

/// Text and log-probabilities, and how many tokens of the prompt were cached.
async fn ask(server: &Server, seed: usize) -> (Value, u64) {
    let answer = server.post("/v1/completions", &body(seed)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    let (choice, usage) = (&answer["choices"][0], &answer["usage"]);
    let prompt = usage["prompt_tokens"].as_u64().expect("a number");
    assert!((1000..2000).contains(&prompt), "{prompt} tokens");
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
    (json!([choice["text"], choice["logprobs"], choice["finish_reason"], prompt]), cached)
}

async fn same(server: &Server, seed: usize, want: &Value) -> u64 {
    let (got, cached) = ask(server, seed).await;
    assert_eq!(&got, want, "prompt {seed}");
    cached
}

/// What prompts are answered with where nothing is kept.
async fn alone(count: usize, extra: &[&str]) -> Vec<Value> {
    let server = Server::start(extra);
    let mut answers = Vec::new();
    for seed in 0..count {
        answers.push(ask(&server, seed).await.0);
    }
    answers
}

/// All files below, their names ending like this.
fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for item in fs::read_dir(folder).into_iter().flatten().flatten() {
        match item.path() {
            path if path.is_dir() => found.extend(files(&path, end)),
            path if path.to_string_lossy().ends_with(end) => found.push(path),
            _ => {}
        }
    }
    found
}

fn flags<'a>(store: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut flags = vec!["--kv-store", store.to_str().expect("a name")];
    flags.extend(more);
    flags
}

/// Whole blocks of a prompt before its last token.
fn whole(want: &Value) -> u64 {
    (want[3].as_u64().expect("a number") - 1) / 16 * 16
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_finds_what_was_computed() {
    for dtype in ["q16_0", "f16", "q8_0"] {
        let store = tempfile::tempdir().expect("a folder");
        let with = flags(store.path(), &["--kv-dtype", dtype]);
        let want = alone(1, &with[2..]).await.remove(0);
        let server = Server::start(&with);
        assert_eq!(same(&server, 0, &want).await, 0);
        assert_eq!(same(&server, 0, &want).await, whole(&want), "from memory");
        server.signal("-TERM");
        let server = server.again(&with);
        assert_eq!(same(&server, 0, &want).await, whole(&want), "from the disk");
        let blocks = whole(&want) / 16;
        assert_eq!(server.metric("hearth_kv_store_reloaded_blocks_total").await, blocks as f64);
        assert!(server.metric("hearth_kv_store_bytes").await > 0.0);
        server.is_idle().await;
        server.is_well().await;
    }
}

/// Until all that is worth a file has one, and how long that took.
async fn written(server: &Server) -> Duration {
    let start = Instant::now();
    server.becomes("hearth_kv_store_waiting_blocks", 0.0).await;
    start.elapsed()
}

/// Nothing had to leave memory, and nothing ended in order: what is there was written before that.
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_survives_kill_9_soon_after_it_was_computed() {
    for dtype in ["q16_0", "q8_0"] {
        let store = tempfile::tempdir().expect("a folder");
        let with = flags(store.path(), &["--kv-dtype", dtype]);
        let want = alone(1, &with[2..]).await.remove(0);
        let server = Server::start(&with);
        assert_eq!(same(&server, 0, &want).await, 0);
        let took = written(&server).await;
        println!("{dtype}: written and flushed {took:?} after the answer");
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert_eq!(server.metric("hearth_prefix_cache_evictions_total").await, 0.0);
        let blocks = want[3].as_u64().expect("a number") / 16;
        let spilled = "hearth_kv_store_spilled_blocks_total";
        assert_eq!(server.metric(spilled).await, blocks as f64, "the prompt, not its answer");
        server.signal("-9");
        let server = server.again(&with);
        assert_eq!(same(&server, 0, &want).await, whole(&want), "from the disk");
        written(&server).await;
        assert_eq!(server.metric(spilled).await, 0.0, "it is there");
        server.is_idle().await;
        server.is_well().await;
    }
}

/// Long prompts beside streams that never pause: all is written meanwhile, and nobody's tokens
/// change.
#[tokio::test(flavor = "multi_thread")]
async fn under_load_prompts_are_written_all_the_same() {
    let store = tempfile::tempdir().expect("a folder");
    let with = flags(store.path(), &[]);
    let want = alone(3, &[]).await;
    let server = Server::start(&with);
    let witness = Witness::before(&server).await;
    for (seed, want) in want.iter().enumerate() {
        assert_eq!(same(&server, seed, want).await, 0);
        println!("written {:?} after the answer", written(&server).await);
        // Between two streams there may be none for a moment.
        let start = Instant::now();
        while server.metric("hearth_requests_running").await == 0.0 {
            assert!(start.elapsed() < server::PATIENCE, "the streams have ended");
        }
    }
    witness.saw_nothing().await;
    assert_eq!(server.metric("hearth_prefix_cache_evictions_total").await, 0.0);
    server.is_idle().await;
    server.is_well().await;
    server.signal("-9");
    let server = server.again(&with);
    for (seed, want) in want.iter().enumerate() {
        assert_eq!(same(&server, seed, want).await, whole(want));
    }
}

/// Killed at all moments of it, while a prompt is computed and after that: what is there is right,
/// what is not is computed.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_while_what_is_worth_it_is_written_is_survived() {
    const KILLS: usize = 8;
    let store = tempfile::tempdir().expect("a folder");
    let with = flags(store.path(), &[]);
    let want = alone(KILLS, &[]).await;
    let mut server = Server::start(&with);
    let mut torn = 0;
    for (seed, want) in want.iter().enumerate() {
        let before = files(store.path(), ".kv").len();
        let pending = server.send("/v1/completions", &body(seed)).await;
        if seed % 2 == 1 {
            same(&server, seed, want).await;
        }
        // Fewer than two blocks are not read.
        let start = Instant::now();
        while files(store.path(), ".kv").len() < before + 2 + 10 * seed {
            assert!(start.elapsed() < server::PATIENCE, "prompt {seed} is not written");
            tokio::task::yield_now().await;
        }
        server.signal("-9");
        drop(pending);
        server = server.again(&with);
        let after = files(store.path(), ".kv").len() - before;
        torn += usize::from((after as u64) < whole(want) / 16);
        assert!(files(store.path(), ".tmp").is_empty(), "what was not finished is removed");
    }
    println!("{torn} of {KILLS} kills came before all was written");
    assert!(torn > 0, "no kill came while anything was written");
    for (seed, want) in want.iter().enumerate() {
        let cached = same(&server, seed, want).await;
        assert!(cached > 0, "prompt {seed}: nothing of its beginning came back");
    }
    assert_eq!(server.metric("hearth_kv_store_corrupt_blocks_total").await, 0.0);
    server.is_idle().await;
    server.is_well().await;
}

/// What could not be written is written once it can.
#[tokio::test(flavor = "multi_thread")]
async fn what_failed_is_written_after_the_pause() {
    let store = tempfile::tempdir().expect("a folder");
    let with = flags(store.path(), &[]);
    let want = alone(1, &[]).await.remove(0);
    let server = Server::start(&with);
    same(&server, 0, &want).await;
    written(&server).await;
    server.signal("-9");
    let mut server = server;
    server.wait();
    let model = block(store.path());
    let server = server.again(&with);
    assert_eq!(same(&server, 0, &want).await, 0, "its files are gone");
    server.logs("writing pauses").await;
    assert_eq!(server.metric("hearth_kv_store_spilled_blocks_total").await, 0.0);
    fs::remove_file(model).expect("a file");
    let start = Instant::now();
    while server.metric("hearth_kv_store_waiting_blocks").await == 0.0 {
        assert!(start.elapsed() < server::PATIENCE, "what failed is forgotten");
    }
    println!("written {:?} after there was room", written(&server).await);
    server.signal("-9");
    let server = server.again(&with);
    assert_eq!(same(&server, 0, &want).await, whole(&want));
    server.is_well().await;
}

/// A pool for one prompt: each answer makes the one before leave memory.
#[tokio::test(flavor = "multi_thread")]
async fn what_leaves_memory_comes_back() {
    let store = tempfile::tempdir().expect("a folder");
    let with = flags(store.path(), &SMALL);
    let want = alone(3, &SMALL).await;
    let server = Server::start(&with);
    for (seed, want) in want.iter().enumerate() {
        assert_eq!(same(&server, seed, want).await, 0);
    }
    for (seed, want) in want.iter().enumerate() {
        // The end of it is in memory or not; the beginning was written before it was forgotten.
        assert!(same(&server, seed, want).await > 0, "prompt {seed}");
    }
    assert!(server.metric("hearth_kv_store_spilled_blocks_total").await > 0.0);
    assert!(server.metric("hearth_kv_store_reloaded_blocks_total").await > 0.0);
    server.is_idle().await;
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_while_blocks_are_written_is_survived() {
    let store = tempfile::tempdir().expect("a folder");
    let with = flags(store.path(), &SMALL);
    let want = alone(4, &SMALL).await;
    let mut server = Server::start(&with);
    for kill in 1..4 {
        for (seed, want) in want.iter().enumerate().take(kill) {
            same(&server, seed, want).await;
        }
        // Its blocks push the others' out, which are being written now.
        let pending = server.send("/v1/completions", &body(kill)).await;
        let start = Instant::now();
        while files(store.path(), ".kv").is_empty() {
            assert!(start.elapsed() < server::PATIENCE, "nothing is written");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.signal("-9");
        drop(pending);
        server = server.again(&with);
        assert!(files(store.path(), ".tmp").is_empty(), "what was not finished is removed");
    }
    let mut cached = 0;
    for (seed, want) in want.iter().enumerate() {
        cached += same(&server, seed, want).await;
    }
    assert!(cached > 0, "nothing came back");
    assert_eq!(server.metric("hearth_kv_store_corrupt_blocks_total").await, 0.0);
    server.is_idle().await;
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_is_found_and_its_file_removed() {
    let store = tempfile::tempdir().expect("a folder");
    let with = flags(store.path(), &[]);
    let want = alone(3, &[]).await;
    let server = Server::start(&with);
    for (seed, want) in want.iter().enumerate() {
        same(&server, seed, want).await;
    }
    server.signal("-TERM");
    let mut server = server;
    assert_eq!(server.wait().code(), Some(0));
    let all = files(store.path(), ".kv");
    assert!(all.len() as u64 >= 3 * whole(&want[0]) / 16, "{} files", all.len());
    let damaged = all.iter().enumerate().map(|(i, path)| {
        let mut bytes = fs::read(path).expect("a file");
        let at = i * 7919 % bytes.len();
        bytes[at] ^= 1 << (i % 8);
        fs::write(path, &bytes).expect("a file");
        (path, bytes)
    });
    let damaged: Vec<_> = damaged.collect();
    let server = server.again(&with);
    for (seed, want) in want.iter().enumerate() {
        assert_eq!(same(&server, seed, want).await, 0, "a damaged block was used");
    }
    let corrupt = server.metric("hearth_kv_store_corrupt_blocks_total").await;
    assert!(corrupt >= 3.0, "{corrupt}");
    // Some of them are written again by now, whole.
    let left = damaged.iter().filter(|(path, bytes)| fs::read(path).is_ok_and(|b| b == *bytes));
    assert_eq!(all.len() - left.count(), corrupt as usize);
    server.is_idle().await;
    server.is_well().await;
}

/// Where nobody may mount, a file stands where the folder of the model should be.
fn block(store: &Path) -> PathBuf {
    let found = files(store, ".kv");
    let model = found.first().and_then(|file| file.parent()).expect("a folder of the model");
    fs::remove_dir_all(model).expect("a folder");
    fs::write(model, "in the way").expect("a file");
    model.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_no_more_fails_no_request() {
    let store = tempfile::tempdir().expect("a folder");
    let disk = SmallDisk::mount(store.path(), 256);
    let with = flags(store.path(), &SMALL);
    let want = alone(3, &SMALL).await;
    let mut server = Server::start(&with);
    if disk.is_none() {
        same(&server, 0, &want[0]).await;
        server.signal("-TERM");
        server.wait();
        block(store.path());
        server = server.again(&with);
    }
    let way = if disk.is_some() { "a tmpfs of 256 KiB" } else { "a file in the way" };
    println!("ran with {way}");
    let witness = Witness::before(&server).await;
    for _ in 0..2 {
        for (seed, want) in want.iter().enumerate() {
            same(&server, seed, want).await;
        }
    }
    witness.saw_nothing().await;
    assert!(server.metric("hearth_kv_store_failures_total").await > 0.0);
    server.is_idle().await;
    server.is_well().await;
    assert_eq!(server.log().matches("writing pauses").count(), 1, "{}", server.log());
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(0));
    let server = server.again(&with);
    same(&server, 0, &want[0]).await;
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_of_one_process() {
    let store = tempfile::tempdir().expect("a folder");
    let with = flags(store.path(), &[]);
    let first = Server::start(&with);
    let data = tempfile::tempdir().expect("a folder");
    let second = server::command(data.path(), &with).output().expect("the binary");
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{said}");
    let name = store.path().to_string_lossy();
    for words in ["--kv-store", &name, "another process keeps its blocks there"] {
        assert!(said.contains(words), "{said}");
    }
    first.is_well().await;
}
