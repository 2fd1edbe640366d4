//! `hearth lora load`, `unload` and `list` beside a server that runs.

use std::io::Read;
use std::net::TcpStream;

use serde_json::{Value, json};

use super::serve::{Server, read_answer};
use super::{assert_fails, assert_mentions, golden, hearth, stderr, stdout_of};

fn lora<'a>(server: &'a Server, args: &[&'a str]) -> Vec<&'a str> {
    [&["lora"], args, &["--url", &server.url]].concat()
}

fn ask(server: &Server, model: &str, tokens: usize, stream: bool) -> TcpStream {
    let body = json!({
        "model": model, "prompt": "Once upon", "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true, "stream": stream,
    });
    server.send("POST", "/v1/completions", &body.to_string())
}

/// The tokens of an answer of `model`; a refusal has none.
fn tokens(server: &Server, model: &str, count: usize) -> Option<Value> {
    let (status, body) = read_answer(ask(server, model, count, false));
    let answer: Value = serde_json::from_str(&body).unwrap();
    (status == 200).then(|| answer["choices"][0]["token_ids"].clone())
}

#[test]
fn adapters_come_and_go_while_answers_run() {
    let server = Server::start(&["--device", "plain"]);
    let said = |args: &[&str]| stdout_of(&lora(&server, args));
    assert_eq!(said(&["list"]), "no adapters\n");
    let bent = format!("bent={}", golden("lora/llama").display());
    assert_mentions(&said(&["load", &bent, "--pin"]), &["'bent' added"]);
    assert_eq!(said(&["list"]), "bent  of llama\n");
    let base = tokens(&server, "llama", 240).expect("the base answers");
    let bent = tokens(&server, "bent", 240).expect("the adapter answers");
    assert_ne!(bent, base);

    let mut running = ask(&server, "bent", 240, true);
    running.read_exact(&mut [0; 16]).unwrap();
    let other = format!("bent={}", golden("lora/llama.gguf").display());
    assert_fails(&lora(&server, &["load", &other]), &["loaded already"]);
    assert_mentions(&said(&["load", &other, "--replace"]), &["'bent' added"]);
    assert_mentions(&said(&["unload", "bent"]), &["'bent' removed"]);
    assert_eq!((said(&["list"]).as_str(), tokens(&server, "bent", 1)), ("no adapters\n", None));
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    let events = rest.lines().filter_map(|line| line.strip_prefix("data: {"));
    let told = events.flat_map(|event| {
        let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        event["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default()
    });
    assert_eq!(Value::from(told.collect::<Vec<_>>()), bent);
    assert_eq!(tokens(&server, "llama", 240), Some(base));
}

#[test]
fn a_refusal_is_in_the_words_of_the_server() {
    let server = Server::start(&[]);
    let fails = |args: &[&str], words: &[&str]| assert_fails(&lora(&server, args), words);
    fails(&["unload", "nobody"], &["400", "nobody"]);
    fails(&["load", "x=/no/such/folder"], &["400", "/no/such/folder"]);
    fails(&["load", &format!("x={}", golden("lora/qwen3").display())], &["400"]);
    fails(&["load", &format!("no-such:x={}", golden("lora/llama").display())], &["no-such"]);
    fails(&["load", "x"], &["ID=PATH"]);
    assert_fails(&["lora", "list", "--url", "http://127.0.0.1:1"], &["connect"]);
    assert_fails(&["lora", "list", "--url", "127.0.0.1:1"], &["http://"]);
}

/// A key of the command line is no operator's.
#[test]
fn keys_are_sent() {
    let server = Server::start(&["--api-key", "sk-test"]);
    let with = |key, args: &[&'static str]| {
        lora(&server, args).into_iter().chain(["--api-key", key]).collect::<Vec<_>>()
    };
    assert_fails(&with("sk-other", &["list"]), &["401"]);
    assert_eq!(stdout_of(&with("sk-test", &["list"])), "no adapters\n");
    assert_fails(&with("sk-test", &["unload", "bent"]), &["403", "admin"]);
}

/// The server was started in another folder than the terminal is in.
#[test]
fn a_relative_path_is_that_of_the_terminal() {
    let server = Server::start(&[]);
    let mut load = hearth(&lora(&server, &["load", "bent=llama"]));
    let output = load.current_dir(golden("lora")).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(tokens(&server, "bent", 1).is_some());
}
