//! `/openapi.json` and `/docs`: that they say what the server does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use hearth::auth::NewKey;
use serde_json::{Map, Value, json};

use crate::fixture::{MODEL, Options, Server, start};
use crate::http;
use crate::keys::{new, start_with};
use crate::robust::{Full, example};

const METHODS: [&str; 5] = ["GET", "POST", "PUT", "PATCH", "DELETE"];

/// Path, method in capitals, operation.
pub(crate) async fn operations(server: &Server) -> Vec<(String, String, Value)> {
    let document = server.get("/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let mut all = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            all.push((path.clone(), method.to_uppercase(), operation.clone()));
        }
    }
    assert!(all.len() > 40, "{} operations", all.len());
    all
}

/// It has errors of its own shape; `neighbours` looks at them.
pub(crate) fn is_neighbour(path: &str) -> bool {
    path.starts_with("/api/") || path.starts_with("/v1/messages")
}

/// A path with an id in it that nothing has.
fn filled(path: &str) -> String {
    path.split('/').map(|part| if part.starts_with('{') { "nothing" } else { part }).fold(
        String::new(),
        |path, part| match part {
            "" => path,
            part => path + "/" + part,
        },
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_route_is_served_and_no_other_method_of_it() {
    let server = start(Options::default()).await;
    let all = operations(&server).await;
    for (path, ..) in &all {
        for method in METHODS {
            let documented = all.iter().any(|(p, m, _)| p == path && m == method);
            let sent = http::send(server.address, method, &filled(path), &[], b"").await;
            let answer = sent.answer().await;
            let code = match answer.status {
                404 if !is_neighbour(path) => answer.error()["code"].as_str().unwrap().to_owned(),
                _ => String::new(),
            };
            if answer.status == 405 {
                let allow = answer.header("allow").expect("an Allow").split(',');
                let mut allow: Vec<_> = allow.filter(|method| *method != "HEAD").collect();
                allow.sort_unstable();
                let mut known: Vec<_> =
                    all.iter().filter(|(p, ..)| p == path).map(|(_, m, _)| m.as_str()).collect();
                known.sort_unstable();
                assert_eq!(allow, known, "{method} {path}");
                if !is_neighbour(path) {
                    assert_eq!(answer.error()["code"], "method_not_supported");
                }
            }
            let served = answer.status != 405 && code != "unknown_url";
            // Below `/v1/models` an id may have slashes, and this one may look like a route.
            assert_eq!(served, documented, "{method} {path}: {} {code}", answer.status);
        }
    }
}

/// What is registered in another way would not be in the document.
#[test]
fn only_the_reference_registers_routes() {
    fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => sources(&path, found),
                false => found.push((
                    path.display().to_string(),
                    fs::read_to_string(&path).unwrap_or_default(),
                )),
            }
        }
    }
    let mut all = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/server"), &mut all);
    let ways = [".route(", ".route_service(", ".nest(", ".nest_service("];
    let registers = |text: &str| ways.iter().any(|way| text.contains(way));
    let found: Vec<_> = all.iter().filter(|(_, text)| registers(text)).collect();
    assert!(found.len() == 1 && found[0].0.ends_with("reference/mod.rs"), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_asked_for_where_the_document_says_so() {
    let options = Options { api_keys: vec!["sk-one".to_owned()], ..Options::default() };
    let server = start(options).await;
    for (path, method, operation) in operations(&server).await {
        let none = server.ask(&method, &filled(&path), None, None).await;
        let wants = operation.get("security").is_some();
        assert_eq!(none.status == 401, wants, "{method} {path}: {}", none.status);
    }
}

/// A value of every kind.
pub(crate) fn kinds() -> [(&'static str, Value); 6] {
    [
        ("boolean", json!(true)),
        ("integer", json!(1)),
        ("number", json!(0.5)),
        ("string", json!("x")),
        ("array", json!([])),
        ("object", json!({})),
    ]
}

/// Every field of every body with a value of every kind: the parser takes the types that the
/// document names, and refuses the others by the name of the field. What is required is missed.
#[tokio::test(flavor = "multi_thread")]
async fn fields_have_the_types_that_the_document_says() {
    let (server, [key]) = start_with([NewKey { admin: true, ..new("boss", "school") }]).await;
    let ask = async |method: &str, path: &str, body: Map<String, Value>| {
        let answer = server.ask(method, path, Some(&key), Some(Value::Object(body))).await;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        match answer.status {
            400.. => (text(&answer.error()["code"]), text(&answer.error()["param"])),
            _ => Default::default(),
        }
    };
    let mut wrong = Vec::new();
    for (path, method, operation) in operations(&server).await {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let Some(example) = schema["examples"].get(0).filter(|_| !is_neighbour(&path)) else {
            continue;
        };
        let mut base: Map<String, Value> = example.as_object().unwrap().clone();
        base.remove("stream");
        if base.contains_key("model") {
            base.insert("model".to_owned(), json!(MODEL));
        }
        let path = filled(&path);
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        for name in required {
            let mut body = base.clone();
            body.remove(name.as_str().unwrap());
            let (code, param) = ask(&method, &path, body).await;
            if code != "missing_required_parameter" || param != name.as_str().unwrap() {
                wrong.push(format!("{path}: {name} is missing: {code} {param}"));
            }
        }
        for (name, field) in schema["properties"].as_object().unwrap() {
            let types = match &field["type"] {
                Value::String(one) => vec![one.as_str()],
                Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
                _ => continue,
            };
            for (kind, value) in kinds() {
                let mut body = base.clone();
                body.insert(name.clone(), value);
                let (code, param) = ask(&method, &path, body).await;
                let fits = types.contains(&kind) || kind == "integer" && types.contains(&"number");
                // Some parsers call a wrong type a wrong value; a right one may be that too.
                let right = match fits {
                    true => param != *name || code != "invalid_type",
                    false => param == *name && ["invalid_type", "invalid_value"].contains(&&*code),
                };
                if !right {
                    let said = format!("{path}: {name} as {kind}, said {types:?}: {code} {param}");
                    wrong.push(said);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Past the end of a range, and with a word that nobody knows: refused as the document says.
#[tokio::test(flavor = "multi_thread")]
async fn fields_have_the_ranges_and_words_that_the_document_says() {
    let full = Full::start().await;
    let (mut wrong, mut tried) = (Vec::new(), 0);
    for (path, method, operation) in operations(&full.server).await {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let Some(base) = example(schema).filter(|_| !is_neighbour(&path)) else { continue };
        for (name, field) in schema["properties"].as_object().unwrap() {
            let mut cases = Vec::new();
            if let (Some(low), Some(high)) = (field.get("minimum"), field.get("maximum")) {
                let bounds = format!("between {} and {}", plain(low), plain(high));
                let next = |bound: &Value, step: i8| match bound.as_i64() {
                    Some(i64::MAX) => json!(i64::MAX as u64 + 1),
                    Some(whole) => json!(whole + i64::from(step)),
                    None => json!(bound.as_f64().unwrap() + f64::from(step)),
                };
                let (below, above) = (next(low, -1), next(high, 1));
                cases.extend([(below, bounds.clone(), true), (above, bounds, true)]);
            }
            let words = field["enum"].as_array().into_iter().flatten();
            cases.extend(words.clone().map(|word| (word.clone(), "Invalid".to_owned(), false)));
            if words.count() > 0 {
                cases.push((json!("such-a-word"), String::new(), true));
            }
            for (value, said, is_refused) in cases {
                tried += 1;
                let mut body = base.clone();
                body.insert(name.clone(), value.clone());
                let answer = full.ask(&method, &full.real(&path), Some(Value::Object(body))).await;
                let error = if answer.status < 400 { Value::Null } else { answer.error() };
                let message = error["message"].as_str().unwrap_or_default();
                let about = error["param"] == name.as_str() && message.contains(&said);
                let refused = about && error["code"] == "invalid_value";
                if refused != is_refused {
                    wrong.push(format!("{path}: {name} = {value}: {} {error}", answer.status));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert!(tried > 100, "{tried}");
}

/// A bound as errors write it.
fn plain(bound: &Value) -> String {
    bound.as_i64().map_or_else(|| bound.as_f64().unwrap().to_string(), |n| n.to_string())
}

/// `operationId` by path in OpenAI's specification 2.3.0 of 2026-08-21.
const OPENAI_NAMES: &str = "
    post /batches createBatch | get /batches listBatches
    get /batches/{batch_id} retrieveBatch | post /batches/{batch_id}/cancel cancelBatch
    get /chat/completions listChatCompletions | post /chat/completions createChatCompletion
    get /chat/completions/{completion_id} getChatCompletion
    post /chat/completions/{completion_id} updateChatCompletion
    delete /chat/completions/{completion_id} deleteChatCompletion
    get /chat/completions/{completion_id}/messages getChatCompletionMessages
    post /completions createCompletion | post /embeddings createEmbedding
    post /conversations createConversation
    get /conversations/{conversation_id} getConversation
    post /conversations/{conversation_id} updateConversation
    delete /conversations/{conversation_id} deleteConversation
    post /conversations/{conversation_id}/items createConversationItems
    get /conversations/{conversation_id}/items listConversationItems
    get /conversations/{conversation_id}/items/{item_id} getConversationItem
    delete /conversations/{conversation_id}/items/{item_id} deleteConversationItem
    get /files listFiles | post /files createFile
    get /files/{file_id} retrieveFile | delete /files/{file_id} deleteFile
    get /files/{file_id}/content downloadFile
    get /models listModels
    get /models/{model} retrieveModel | delete /models/{model} deleteModel
    post /responses createResponse | get /responses/{response_id} getResponse
    delete /responses/{response_id} deleteResponse
    post /responses/{response_id}/cancel cancelResponse
    get /responses/{response_id}/input_items listInputItems
    post /responses/input_tokens Getinputtokencounts
    post /responses/compact Compactconversation
    post /uploads createUpload | post /uploads/{upload_id}/cancel cancelUpload
    post /uploads/{upload_id}/complete completeUpload
    post /uploads/{upload_id}/parts addUploadPart
    get /organization/usage/completions usage-completions
    get /organization/usage/embeddings usage-embeddings";

#[tokio::test(flavor = "multi_thread")]
async fn operations_have_the_names_that_openai_gave_them() {
    let server = start(Options::default()).await;
    let mut names = BTreeMap::new();
    for (path, method, operation) in operations(&server).await {
        let name = operation["operationId"].as_str().expect("a name").to_owned();
        let route = format!("{} {path}", method.to_lowercase());
        assert_eq!(names.insert(name, route), None, "a name stands twice");
    }
    let known = OPENAI_NAMES.split(['|', '\n']).map(str::trim).filter(|line| !line.is_empty());
    for line in known {
        let [method, path, name] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        assert_eq!(names.get(name), Some(&format!("{method} /v1{path}")), "{name}");
    }
}

/// The page needs nothing but the server it comes from, and says so to the browser.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_whole() {
    let server = start(Options::default()).await;
    let page = server.get("/docs").await;
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    let policy = page.header("content-security-policy").unwrap();
    for rule in ["default-src 'none'", "connect-src 'self'", "script-src 'sha256-"] {
        assert!(policy.contains(rule), "{policy}");
    }
    for elsewhere in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.body.contains(elsewhere), "the page names {elsewhere}");
    }
    assert!(page.body.contains("\"use strict\"") && page.body.contains("prefers-color-scheme"));
}
