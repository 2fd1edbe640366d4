//! What routes answer is what the document says they answer: member by member, errors too.

use serde_json::{Value, json};

use crate::fixture::chat_body;
use crate::http;
use crate::reference::operations;
use crate::robust::{Full, example};

/// Where a value is not as its schema says. What an object has beside its schema is told, too.
fn misfits(document: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    if let Some(name) = schema["$ref"].as_str() {
        let schema = document.pointer(&name[1..]).unwrap_or_else(|| panic!("{name} is nowhere"));
        return misfits(document, schema, value, at);
    }
    if let Some(any) = schema["anyOf"].as_array() {
        let each = any.iter().map(|schema| misfits(document, schema, value, at));
        return each.min_by_key(Vec::len).unwrap_or_default();
    }
    let types: Vec<_> = match &schema["type"] {
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect(),
    };
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let fits = types.contains(&kind) || kind == "integer" && types.contains(&"number");
    if !fits && !types.is_empty() {
        return vec![format!("{at} is of the kind {kind}, said {types:?}")];
    }
    if schema["enum"].as_array().is_some_and(|words| !words.contains(value)) {
        return vec![format!("{at} is {value}, said {}", schema["enum"])];
    }
    let mut found = Vec::new();
    if let Some(items) = value.as_array().filter(|_| schema["items"].is_object()) {
        for (i, item) in items.iter().enumerate() {
            found.extend(misfits(document, &schema["items"], item, &format!("{at}[{i}]")));
        }
    }
    if let (Some(known), Some(members)) = (schema["properties"].as_object(), value.as_object()) {
        for (name, value) in members {
            match known.get(name) {
                Some(schema) => {
                    found.extend(misfits(document, schema, value, &format!("{at}.{name}")));
                }
                None => found.push(format!("{at}.{name} is not in the document")),
            }
        }
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !members.contains_key(name) {
                found.push(format!("{at}.{name} is missing"));
            }
        }
    }
    found
}

#[test]
fn what_does_not_fit_is_found() {
    let schema = json!({"type": "object", "required": ["a"], "properties": {
        "a": {"type": "array", "items": {"$ref": "#/n"}}, "b": {"enum": ["x"]}}});
    let document = json!({"n": {"anyOf": [{"type": "number"}, {"type": ["string", "null"]}]}});
    let found = |value| misfits(&document, &schema, &value, "it").join(", ");
    assert_eq!(found(json!({"a": [1, 0.5, "x", null], "b": "x"})), "");
    for (value, place) in [
        (json!([]), "it is"),
        (json!({}), "it.a is missing"),
        (json!({"a": [true]}), "it.a[0]"),
        (json!({"a": [], "b": "y"}), "it.b"),
        (json!({"a": [], "c": 1}), "it.c is not"),
    ] {
        let found = found(value);
        assert!(found.contains(place), "{place}: {found}");
    }
}

/// Each route once with its example, and what ends something at the end.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_as_the_document_says() {
    let full = Full::start().await;
    let document = full.server.get("/openapi.json").await.json();
    let key = Some(full.key.as_str());
    let parts = full.real("/v1/uploads/{upload_id}/parts");
    let part = http::send_form(full.server.address, &parts, key, &[("data", None, b"abc")]);
    let part = part.await.answer().await.json();
    let mut all = operations(&full.server).await;
    let ends = |path: &str| ["/cancel", "/unload"].iter().any(|word| path.ends_with(word));
    all.sort_by_key(|(path, method, _)| (method == "DELETE", ends(path)));
    let (mut wrong, mut refused) = (Vec::new(), Vec::new());
    let mut look = |said: &str, operation: &Value, answer: &http::Answer| {
        let range = format!("{}XX", answer.status / 100);
        let responses = &operation["responses"];
        let exact = &responses[answer.status.to_string()];
        let mut response = if exact.is_null() { &responses[range] } else { exact };
        if let Some(name) = response["$ref"].as_str() {
            response = document.pointer(&name[1..]).expect("it is there");
        }
        if answer.status >= 400 {
            refused.push(said.to_owned());
        }
        let kind = answer.header("content-type").unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default();
        match &response["content"][kind]["schema"] {
            Value::Null => wrong.push(format!("{said}: {} of {kind}", answer.status)),
            schema if kind == "application/json" => {
                let found = misfits(&document, schema, &answer.json(), "it");
                wrong.extend(found.iter().map(|found| format!("{said}: {found}")));
            }
            _ => {}
        }
    };
    for (path, method, operation) in &all {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let mut body = example(schema).map(Value::Object);
        if path == "/v1/uploads/{upload_id}/complete" {
            body = Some(json!({"part_ids": [part["id"]]}));
        }
        let answer = full.ask(method, &full.real(path), body).await;
        look(&format!("{method} {path}"), operation, &answer);
    }
    // What a stored one of these has is looked at above.
    let chat =
        all.iter().find(|(path, method, _)| path == "/v1/chat/completions" && method == "POST");
    let rich = json!({"n": 2, "max_tokens": 3, "logprobs": true, "top_logprobs": 2,
        "return_token_ids": true, "prompt_logprobs": 1});
    let answer = full.ask("POST", "/v1/chat/completions", Some(chat_body(rich))).await;
    look("a rich chat", &chat.expect("it is there").2, &answer);
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert_eq!(refused, REFUSED);
}

/// Those that need an encoder, a form, a file, an adapter, something unfinished, something that did
/// not go with what it was in, or a model that is not pinned.
const REFUSED: [&str; 14] = [
    "POST /v1/embeddings",
    "POST /v1/files",
    "POST /v1/uploads/{upload_id}/parts",
    "POST /v1/batches",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "POST /api/embed",
    "POST /api/embeddings",
    "POST /v1/responses/{response_id}/cancel",
    "POST /v1/uploads/{upload_id}/cancel",
    "POST /v1/batches/{batch_id}/cancel",
    "POST /v1/admin/models/{model}/unload",
    "DELETE /v1/conversations/{conversation_id}/items/{item_id}",
    "DELETE /v1/models/{model}",
];
