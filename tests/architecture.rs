//! The law of the house as a test: who may import whom, where `unsafe` and foreign crates live,
//! and how long a line, a function and a file may be.
//!
//! `DESIGN.md` is the text of the law; the tables here are the same law for a machine. An edge that
//! is missing changes the text first, with its reason. Every check is a function from sources to
//! violations, and is itself tested on small samples that must fail.

#[path = "architecture/samples.rs"]
mod samples;
#[path = "architecture/source.rs"]
mod source;
#[path = "architecture/tidy.rs"]
mod tidy;

use std::collections::BTreeSet;
use std::path::Path;

use source::Source;

/// Room -> what it may import. A name is a room of `src/` or a part of one; `hearth_models`,
/// `hearth_kernels` and `candle` are what lies below. Leaves may be imported by every room.
const ROOMS: &[(&str, &[&str])] = &[
    // The composition root: builds the rooms and wires them, owns no logic.
    ("cli", &["*"]),
    (
        "server",
        &[
            "pipeline",
            "registry",
            "jobs",
            "ledger",
            "auth",
            "history",
            "files",
            "rag",
            "embeddings",
            "text",
        ],
    ),
    (
        "pipeline",
        &[
            "auth",
            "guardrails",
            "semantic_cache",
            "rag",
            "embeddings",
            "registry",
            "ledger",
            "history",
            "text",
            "engine::handle",
        ],
    ),
    // `files`: the lines of a batch come out of one, and its answers become two.
    ("jobs", &["store", "files"]),
    // `engine::spawn`: to load a model is to start its engine; what remains is the handle.
    // `hearth_kernels`: not used, models brings the pool.
    // `shelf`: what a model and an adapter are, byte by byte, is known where they are read.
    // The same of `embeddings`: to load an encoder is to start its thread.
    (
        "registry",
        &[
            "engine::handle",
            "engine::spawn",
            "embeddings",
            "hearth_models",
            "shelf",
            "store",
            "text",
        ],
    ),
    // Opens models as `serve` would, and copies their files.
    ("bundle", &["registry", "hearth_models"]),
    // Of any server: they know nothing of ours.
    ("client", &[]),
    ("loadtest", &["client"]),
    // `hearth_models`: the thread of an encoder owns it, as the engine owns its model.
    ("embeddings", &["hearth_models", "text"]),
    ("semantic_cache", &["embeddings", "vector", "store"]),
    ("rag", &["embeddings", "vector", "store"]),
    ("vector", &["hearth_kernels"]),
    ("auth", &["store"]),
    ("ledger", &["store"]),
    ("history", &["store"]),
    // Uploads are used by batches, retrieval and training alike, so they are a room of their own.
    ("files", &["store"]),
    ("engine", &["scheduler", "kv", "shelf", "hearth_models", "hearth_kernels"]),
    ("scheduler", &["kv"]),
    ("kv", &[]),
    // Files of blocks, named after the texts of the pool.
    ("shelf", &["kv"]),
    ("text", &[]),
    ("store", &[]),
    ("guardrails", &[]),
    ("types", &[]),
    ("places", &[]),
    ("error", &[]),
    // The element types of `--kv-dtype` and the default of `--threads` are not said twice.
    ("config", &["hearth_models", "hearth_kernels"]),
];

const LEAVES: [&str; 4] = ["types", "error", "config", "places"];

/// Foreign crate -> the only places that name it.
const HOMES: &[(&str, &[&str])] = &[
    ("axum", &["src/server/"]),
    ("hyper", &["src/server/"]),
    ("hyper_util", &["src/server/"]),
    ("tower", &["src/server/"]),
    ("tokio_io_timeout", &["src/server/listen.rs"]),
    ("socket2", &["src/server/listen.rs"]),
    ("tokio_rustls", &["src/server/tls.rs"]),
    ("bytes", &["src/server/"]),
    ("utoipa", &["src/server/reference/"]),
    ("prometheus_client", &["src/server/metrics.rs"]),
    ("tokenizers", &["src/text/"]),
    ("llguidance", &["src/text/grammar"]),
    ("minijinja", &["src/text/"]),
    ("minijinja_contrib", &["src/text/"]),
    ("ureq", &["src/registry/hub", "src/client.rs"]),
    ("clap", &["src/cli/", "src/config/"]),
    ("indicatif", &["src/cli/", "src/registry/hub/progress.rs"]),
    ("rustix", &["src/bundle/", "src/cli/serve.rs"]),
    ("tracing_subscriber", &["src/cli/"]),
    ("rusqlite", &["src/store/"]),
    ("memmap2", &["models/src/weights/mmap.rs"]),
    // In the kernels only as a peer to measure against, and for the glue of custom operations.
    ("candle_core", &["models/", "kernels/benches/", "kernels/src/candle_ops.rs"]),
    ("candle_nn", &["models/", "kernels/benches/"]),
    ("cudarc", &["kernels/src/cuda/"]),
];

/// Place -> paths that it never names, and why.
const NEVER: &[(&str, &[&str], &str)] = &[
    (
        "src/scheduler",
        &["tokio", "std::thread", "thread", "Instant::now", "SystemTime::now"],
        "the scheduler is a value: time is passed in",
    ),
    (
        "src/kv",
        &["tokio", "std::thread", "thread", "Instant::now", "SystemTime::now"],
        "the KV pool is a value: time is passed in",
    ),
    ("kernels/src", &["hearth_models", "crate::error"], "kernels know numbers only"),
    ("kernels/src", &["tokio", "serde", "serde_json"], "kernels know numbers only"),
    ("models/src", &["tokio"], "a model runs on the thread that calls it"),
    (
        "models/src/backend/fused.rs",
        &["candle_core", "candle_nn"],
        "candle would start a thread pool of its own",
    ),
    ("models/src/families", &["candle_core", "crate::backend"], "a family is a row of a table"),
];

/// Word -> where alone it may stand, and why.
const WORDS: &[(&str, &[&str], &str)] = &[
    (
        "unsafe",
        &[
            "kernels/",
            "models/src/weights/mmap.rs",
            // An allocator that counts, to prove that a hostile file allocates nothing.
            "models/tests/weights_hostile.rs",
        ],
        // Clippy asks for the SAFETY comment.
        "unsafe lives in kernels/",
    ),
    (
        "SystemTime",
        // `unix_now_s`, and the times of files.
        &["src/types.rs", "src/files/", "src/shelf/", "src/registry/adapters.rs"],
        "the clock on the wall jumps: a date is `unix_now_s`, a length of time `Instant`",
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file of the house.
fn house() -> Vec<Source> {
    let folders = ["src", "models", "kernels", "tests", "benches"];
    let all: Vec<Source> =
        folders.iter().flat_map(|folder| source::read_all(root(), folder)).collect();
    assert!(all.len() > 100, "the house is not here: {} files", all.len());
    all
}

fn assert_lawful(violations: Vec<String>) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

#[test]
fn rooms_import_only_what_the_law_lets_them() {
    assert_lawful(unlawful_imports(&house()));
}

#[test]
fn the_law_has_no_cycle() {
    assert_lawful(cycles(ROOMS));
}

#[test]
fn foreign_crates_stay_at_home() {
    assert_lawful(strays(&house()));
}

#[test]
fn some_names_are_never_named() {
    assert_lawful(forbidden_names(&house()));
}

#[test]
fn some_words_have_an_address() {
    assert_lawful(words_elsewhere(&house()));
}

#[test]
fn unsafe_is_forbidden_by_the_compiler_too() {
    let has = |path: &str, attribute: &str| {
        let text = std::fs::read_to_string(root().join(path)).unwrap();
        text.lines().any(|line| line == attribute)
    };
    assert!(has("src/lib.rs", "#![forbid(unsafe_code)]"));
    assert!(has("src/main.rs", "#![forbid(unsafe_code)]"));
    assert!(has("models/src/lib.rs", "#![deny(unsafe_code)]"));
    let allows = |s: &Source| s.text.contains("allow(unsafe_code");
    let allowed: Vec<String> =
        source::read_all(root(), "models/src").into_iter().filter(allows).map(|s| s.path).collect();
    assert_eq!(allowed, ["models/src/weights/mmap.rs"]);
}

#[test]
fn workspace_has_exactly_three_packages() {
    let text = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap();
    let members: Vec<&str> = members.iter().filter_map(|m| m.as_str()).collect();
    assert_eq!(members, [".", "kernels", "models"]);
}

/// Edges between rooms, and from rooms to the packages below, that [`ROOMS`] does not have.
fn unlawful_imports(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| s.path.starts_with("src/")) {
        let room = source.module().first().cloned().unwrap_or_default();
        // `lib.rs` declares the rooms; `main.rs` calls `cli` and nothing else.
        let allowed: &[&str] = match ROOMS.iter().find(|(name, _)| *name == room) {
            Some((_, allowed)) => allowed,
            None if source.path == "src/lib.rs" => &[],
            None if source.path == "src/main.rs" => &["cli"],
            None => {
                found.push(format!("{}: the law knows no room `{room}`", source.path));
                continue;
            }
        };
        for named in source.paths() {
            let target: Vec<&str> = named.path.iter().map(String::as_str).collect();
            let target = match target[..] {
                ["crate", ref inside @ ..] => inside,
                [below, ..] if below.starts_with("hearth_") => &target[..],
                [below, ..] if below.starts_with("candle") => &["candle"],
                _ => continue,
            };
            let Some(first) = target.first() else { continue };
            // A function of the same name as a room is no path: only `a::b` gets here.
            let lawful = *first == room
                || LEAVES.contains(first)
                || allowed.iter().any(|a| *a == "*" || begins_with(target, a));
            if !lawful {
                let (path, line) = (&source.path, named.line);
                found.push(format!("{path}:{line}: {room} may not import {}", target.join("::")));
            }
        }
    }
    found
}

/// Whether `path` is `prefix` (`a::b`) or inside it.
fn begins_with(path: &[&str], prefix: &str) -> bool {
    let prefix: Vec<&str> = prefix.split("::").collect();
    path.starts_with(&prefix)
}

/// Rooms that can reach themselves, leaves and the composition root aside.
fn cycles(rooms: &[(&str, &[&str])]) -> Vec<String> {
    let next = |room: &str| {
        let row = rooms.iter().find(|(name, _)| *name == room);
        let allowed = row.map_or(&[][..], |(_, allowed)| *allowed);
        allowed.iter().filter_map(|a| a.split("::").next()).collect::<Vec<_>>()
    };
    let reaches_itself = |room: &str| {
        let (mut seen, mut open) = (BTreeSet::new(), next(room));
        while let Some(other) = open.pop() {
            if seen.insert(other) {
                open.extend(next(other));
            }
        }
        seen.contains(room)
    };
    let names = rooms.iter().map(|(name, _)| *name);
    names.filter(|r| reaches_itself(r)).map(|r| format!("{r} reaches itself")).collect()
}

/// Foreign crates named outside their [`HOMES`]. Tests may name what they like.
fn strays(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| !s.is_test() || s.path.starts_with("kernels/")) {
        for named in source.paths() {
            let home = HOMES.iter().find(|(name, _)| *name == named.path[0]);
            if let Some((name, homes)) = home
                && !homes.iter().any(|home| source.path.starts_with(home))
            {
                found.push(format!("{}:{}: {name} lives in {homes:?}", source.path, named.line));
            }
        }
    }
    found
}

/// Paths of [`NEVER`] in the places that must not name them.
fn forbidden_names(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        for (place, names, why) in NEVER.iter().filter(|n| source.path.starts_with(n.0)) {
            debug_assert!(!place.is_empty());
            for named in source.paths() {
                let path: Vec<&str> = named.path.iter().map(String::as_str).collect();
                // `Instant::now` ends a path wherever it was imported from.
                let hit =
                    |name: &&&str| begins_with(&path, name) || path.join("::").ends_with(**name);
                if let Some(name) = names.iter().find(hit) {
                    found.push(format!("{}:{}: {name}: {why}", source.path, named.line));
                }
            }
        }
    }
    found
}

/// [`WORDS`] that stand elsewhere.
fn words_elsewhere(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for (word, homes, why) in WORDS {
        for source in sources.iter().filter(|s| !homes.iter().any(|h| s.path.starts_with(h))) {
            for token in source.tokens.iter().filter(|t| t.text == *word) {
                found.push(format!("{}:{}: {why}", source.path, token.line));
            }
        }
    }
    found
}
