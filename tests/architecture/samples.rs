//! The checker, checked: small sources that must fail, beside sources that must not.

use super::source::{Function, Source};
use super::{cycles, forbidden_names, strays, tidy, unlawful_imports, words_elsewhere};

fn source(path: &str, text: &str) -> [Source; 1] {
    [Source::new(path, text)]
}

/// The check finds exactly one violation, at this line.
fn fails_at(check: fn(&[Source]) -> Vec<String>, path: &str, text: &str, line: usize) {
    let found = check(&source(path, text));
    assert_eq!(found.len(), 1, "{text}: {found:?}");
    assert!(found[0].starts_with(&format!("{path}:{line}: ")), "{text}: {found:?}");
}

fn passes(check: fn(&[Source]) -> Vec<String>, path: &str, text: &str) {
    assert_eq!(check(&source(path, text)), Vec::<String>::new(), "{text}");
}

#[test]
fn paths_are_spelled_out() {
    let text = "use crate::{a::{b, c as d}, e};\nmod t { use super::*; }\n\
                fn f() -> impl X + use<> { self::g::h() }\n\
                fn k(x: ::candle_core::Tensor) { x.iter::<u8>(); 0..std::mem::size_of::<T>() }";
    let paths = source("src/room/part.rs", text)[0].paths();
    let paths: Vec<(String, usize)> =
        paths.into_iter().map(|n| (n.path.join("::"), n.line)).collect();
    let want = [
        ("crate::a::b", 1),
        ("crate::a::c", 1),
        ("crate::e", 1),
        ("crate::room::part::*", 2),
        ("crate::room::part::g::h", 3),
        ("candle_core::Tensor", 4),
        ("std::mem::size_of", 4),
    ];
    assert_eq!(paths, want.map(|(path, line)| (path.to_owned(), line)));
}

#[test]
fn comments_texts_and_characters_are_no_code() {
    let text = "// unsafe\n/* unsafe */ 'u' '\\'' '\"' \"unsafe \\\" unsafe\"\n\
                r#\"unsafe \" unsafe\"# \
                b\"unsafe\" fn f<'a>(x: &'a str) { '{' }";
    let words: Vec<String> =
        source("a.rs", text)[0].tokens.iter().map(|t| t.text.clone()).collect();
    assert_eq!(words.concat(), "fnf<>(x:&str){}");
    assert_eq!(source("a.rs", text)[0].tokens[0].line, 3);
}

#[test]
fn imports_against_the_law_are_found() {
    let check = unlawful_imports;
    fails_at(check, "src/kv/mod.rs", "\nuse crate::scheduler::Batch;", 2);
    fails_at(check, "src/registry/load.rs", "use crate::pipeline::Pipeline;", 1);
    fails_at(check, "src/pipeline.rs", "fn f() {\n    crate::engine::spawn()\n}", 2);
    fails_at(check, "src/pipeline/choice.rs", "use super::super::server::App;", 1);
    fails_at(check, "src/text/mod.rs", "use {std::fmt, crate::{types, registry}};", 1);
    fails_at(check, "src/engine/mod.rs", "use crate::text::Tokenizer;", 1);
    fails_at(check, "src/engine/mod.rs", "fn f(x: candle_core::Tensor) {}", 1);
    fails_at(check, "src/server/mod.rs", "use hearth_models::Model;", 1);
    fails_at(check, "src/server/mod.rs", "use crate::engine::handle::Event;", 1);
    fails_at(check, "src/main.rs", "fn main() { hearth::server::run() }", 1);
    fails_at(check, "src/types.rs", "#[cfg(test)]\nmod tests {\n    use crate::kv::A;\n}", 3);
    let found = check(&source("src/attic/mod.rs", "//! A room without a law."));
    assert_eq!(found, ["src/attic/mod.rs: the law knows no room `attic`"]);
}

#[test]
fn lawful_imports_are_not() {
    let check = unlawful_imports;
    passes(check, "src/cli/serve.rs", "use super::{Common, open};\nuse crate::server::{self, X};");
    passes(check, "src/scheduler/mod.rs", "use crate::kv::BlockPool; use crate::types::SeqId;");
    passes(check, "src/pipeline.rs", "use crate::engine::handle::{Event, Generation};");
    passes(check, "src/pipeline/choice.rs", "use super::TextEvent; mod tests { use super::*; }");
    passes(check, "src/text/mod.rs", "//! Not crate::server.\nconst A: &str = \"crate::server\";");
    passes(check, "src/main.rs", "fn main() { hearth::cli::run() }");
    passes(check, "kernels/src/lib.rs", "use crate::server::X;");
}

#[test]
fn a_cycle_in_the_law_is_found() {
    assert_eq!(cycles(&[("a", &["b::c"]), ("b", &["a"]), ("c", &["a"])]).len(), 2);
    assert!(cycles(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])]).is_empty());
}

#[test]
fn crates_away_from_home_are_found() {
    fails_at(strays, "src/engine/mod.rs", "use std::fmt;\nuse axum::Json;", 2);
    fails_at(strays, "src/text/mod.rs", "fn f() -> ureq::Agent { }", 1);
    fails_at(strays, "kernels/src/matmul/mod.rs", "use candle_core::Tensor;", 1);
    fails_at(strays, "kernels/examples/x.rs", "use candle_core::Tensor;", 1);
    passes(strays, "kernels/benches/matmul.rs", "use candle_core::Tensor;");
    passes(strays, "src/server/sse.rs", "use axum::Json;");
}

#[test]
fn forbidden_names_are_found() {
    let check = forbidden_names;
    fails_at(check, "src/scheduler/mod.rs", "fn f() { let t = Instant::now(); }", 1);
    fails_at(check, "src/scheduler/mod.rs", "fn f() { std::time::Instant::now() }", 1);
    fails_at(check, "src/kv/mod.rs", "use tokio::sync::mpsc;", 1);
    fails_at(check, "src/kv/mod.rs", "use std::thread;", 1);
    fails_at(check, "models/src/backend/fused.rs", "use candle_core::Tensor;", 1);
    passes(check, "src/scheduler/mod.rs", "fn f(now: std::time::Instant) {}");
    passes(check, "src/engine/mod.rs", "fn f() { Instant::now() }");
}

#[test]
fn words_away_from_home_are_found() {
    let check = words_elsewhere;
    fails_at(check, "models/src/open.rs", "fn f() {\n    unsafe { g() }\n}", 2);
    fails_at(check, "src/jobs/work.rs", "fn f() { std::time::SystemTime::now() }", 1);
    fails_at(check, "src/auth/limits.rs", "use std::time::{Instant, SystemTime};", 1);
    passes(check, "kernels/src/pool.rs", "unsafe fn f() {}");
    passes(check, "src/kv/mod.rs", "#![forbid(unsafe_code)] // unsafe");
    passes(check, "src/types.rs", "fn f() { SystemTime::now() }");
}

#[test]
fn functions_are_measured() {
    let text = "fn a() {\n    fn b() { }\n}\nfn c();\ntype F = fn(u8);\n\
                fn d<T>(x: [u8; 3])\nwhere\n    T: X,\n{\n}";
    let want = [("a", 3), ("b", 1), ("d", 5)];
    let want = want.map(|(name, lines)| Function { name: name.to_owned(), lines });
    assert_eq!(source("a.rs", text)[0].functions(), want);
}

#[test]
fn the_ratchet_turns_one_way() {
    let has = |lines: usize| [("a f".to_owned(), lines)];
    let table: &[(&str, usize)] = &[("a f", 80)];
    assert!(tidy::ratchet(70, &has(70), &[]).is_empty());
    assert!(tidy::ratchet(70, &has(80), table).is_empty());
    assert_eq!(tidy::ratchet(70, &has(71), &[]), ["a f: 71 lines, at most 70"]);
    assert_eq!(tidy::ratchet(70, &has(81), table), ["a f: 81 lines, was 80"]);
    assert!(tidy::ratchet(70, &has(79), table)[0].contains("lower its row"));
    assert!(tidy::ratchet(70, &has(70), table)[0].contains("strike out"));
    assert_eq!(tidy::ratchet(70, &[], table), ["a f: is gone, strike out its row"]);
}

#[test]
fn unfinished_work_is_found() {
    let check = tidy::unfinished;
    fails_at(check, "src/a.rs", "fn f() {\n    x\n        .unwrap()\n}", 3);
    fails_at(check, "src/a.rs", "fn f() { todo!() }", 1);
    fails_at(check, "src/a.rs", "#[cfg(test)]\nuse a::{b};\nfn f() { dbg!(1) }", 3);
    fails_at(check, "src/a.rs", "#[cfg(not(test))]\nfn f() { x.unwrap() }", 2);
    fails_at(check, "src/a.rs", "#[cfg(test)]\nmod tests { }\nfn f() { x.unwrap() }", 3);
    passes(check, "src/a.rs", "fn f() { x.unwrap_or(1); }\n/// x.unwrap()\nfn g() {}");
    passes(check, "src/a.rs", "#[cfg(test)]\n#[allow(x)]\nmod tests { fn f() { x.unwrap() } }");
    passes(check, "src/a/tests.rs", "fn f() { x.unwrap() }");
}

#[test]
fn untidy_texts_are_found() {
    fails_at(tidy::long_lines, "a.rs", &format!("a\n{}", "ü".repeat(101)), 2);
    passes(tidy::long_lines, "a.rs", &"ü".repeat(100));
    assert_eq!(tidy::undocumented(&source("a.rs", "use a;")).len(), 1);
    passes(tidy::undocumented, "a.rs", "//! A.\nuse a;");
    let machine = |folder: &str| format!("\nlet a = \"/{folder}/b\";");
    assert_eq!(tidy::machine_paths(&source("a.rs", &machine("work"))[0]).len(), 1);
    assert_eq!(tidy::machine_paths(&source("a.rs", &machine("home"))[0]).len(), 1);
    assert!(tidy::machine_paths(&source("a.rs", &machine("home/me"))[0]).is_empty());
    assert!(tidy::machine_paths(&source("a.rs", &machine("tmp"))[0]).is_empty());
}
