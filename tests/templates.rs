//! Chat templates against what Hugging Face's own renderer prints.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth::text::{ChatTemplate, Clock};
use serde_json::{Map, Value, json};

fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(path);
    if !path.exists() {
        println!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// 2025-07-10, noon, UTC.
fn clock() -> Clock {
    let noon: jiff::Timestamp = "2025-07-10T12:00:00Z".parse().unwrap();
    Arc::new(move || noon.to_zoned(jiff::tz::TimeZone::UTC))
}

#[test]
fn golden_conversations_render_exactly() {
    let Some(path) = shared("chat-templates/goldens/rendered.json") else { return };
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(cases.len(), 27);
    let mut wrong = 0;
    for case in &cases {
        let mut data: Map<String, Value> = case["data"].as_object().unwrap().clone();
        let messages = data.remove("messages").unwrap();
        let tools = data.remove("tools");
        let prompt = data.remove("add_generation_prompt").is_some_and(|v| v == true);
        let template = case["chat_template"].as_str().unwrap();
        let rendered = ChatTemplate::new(template, None, None)
            .map(|template| template.with_clock(clock()))
            .and_then(|template| template.render(&messages, tools.as_ref(), prompt, &data));
        if !matches!(&rendered, Ok(text) if *text == case["target"].as_str().unwrap()) {
            wrong += 1;
            println!("{}: expected {}\n got {rendered:?}", case["name"], case["target"]);
        }
    }
    assert_eq!(wrong, 0, "of {} conversations", cases.len());
}

/// Every real template renders a plain conversation; most also one with tools.
#[test]
fn real_templates_render() {
    let Some(folder) = shared("chat-templates/templates") else { return };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "jinja"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 28);
    let messages = json!([
        { "role": "user", "content": "What is the capital of Taiwan?" },
        { "role": "assistant", "content": "Taipei." },
        { "role": "user", "content": "And its mayor?" },
    ]);
    let tools = json!([{ "type": "function", "function": {
        "name": "search", "description": "Searches.",
        "parameters": { "type": "object", "properties": {
            "query": { "type": "string", "description": "what" } }, "required": ["query"] },
    }}]);
    let mut failed = Vec::new();
    for path in &paths {
        let source = std::fs::read_to_string(path).unwrap();
        let template = ChatTemplate::new(&source, Some("<BOS>"), Some("<EOS>")).unwrap();
        let template = template.with_clock(clock());
        for tools in [None, Some(&tools)] {
            match template.render(&messages, tools, true, &Map::new()) {
                Ok(text) => assert!(text.contains("And its mayor?"), "{path:?}: {text}"),
                Err(error) => failed.push(format!("{path:?} tools={}: {error}", tools.is_some())),
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
