//! What no client sends, to every documented endpoint: each refuses it with a 4xx that names the
//! field, and the server lives on.
//!
//! The endpoints and their fields come from the document, so none is forgotten. Wrong types and
//! missing fields are tried in `reference`.

use hearth::auth::NewKey;
use serde_json::{Map, Value, json};

use crate::fixture::{MODEL, Server, chat_body};
use crate::http::{self, Answer, Part};
use crate::keys::{new, start_with};
use crate::reference::{is_neighbour, operations};

/// A server with one of everything on it.
pub(crate) struct Full {
    pub server: Server,
    pub key: String,
    /// The start of a path with an id, and the same with the id of what is there.
    real: Vec<(&'static str, String)>,
    /// Everything found wrong: a list tells more than the first of it.
    wrong: Vec<String>,
}

impl Full {
    pub(crate) async fn start() -> Self {
        let (server, [key]) = start_with([NewKey { admin: true, ..new("boss", "school") }]).await;
        let mut full = Self { server, key, real: Vec::new(), wrong: Vec::new() };
        let file = full.server.upload(Some(&full.key), "batch", "no line\n").await;
        let batch = json!({"input_file_id": file, "endpoint": "/v1/completions",
            "completion_window": "24h"});
        let text = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 16});
        let upload = json!({"filename": "a", "purpose": "batch", "bytes": 3, "mime_type": "a/b"});
        let talk = json!({"items": [{"role": "user", "content": "Hi"}]});
        for (list, body) in [
            ("/v1/chat/completions", chat_body(json!({"store": true, "max_tokens": 1}))),
            ("/v1/responses", text),
            ("/v1/conversations", talk),
            ("/v1/uploads", upload),
            ("/v1/batches", batch),
            ("/v1/admin/keys", json!({"name": "another"})),
        ] {
            let made = full.ask("POST", list, Some(body)).await;
            assert!(made.status < 300, "{list}: {}", made.body);
            let id = made.json()["id"].as_str().expect("an id").to_owned();
            full.real.push((list, format!("{list}/{id}")));
        }
        full.real.push(("/v1/files", format!("/v1/files/{file}")));
        for list in ["/v1/models", "/v1/admin/models"] {
            full.real.push((list, format!("{list}/org%2Ftiny%3AF32")));
        }
        let items = full.real("/v1/conversations/{conversation_id}") + "/items";
        let item = full.ask("GET", &items, None).await.json()["data"][0]["id"].clone();
        full.real.insert(
            0,
            ("/v1/conversations/{conversation_id}/items", format!("{items}/{}", text_of(&item))),
        );
        full
    }

    pub(crate) async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        self.server.ask(method, path, Some(&self.key), body).await
    }

    async fn raw(&self, method: &str, path: &str, kind: Option<&str>, body: &[u8]) -> Answer {
        let bearer = format!("Bearer {}", self.key);
        let mut headers = vec![("Authorization", bearer.as_str())];
        headers.extend(kind.map(|kind| ("Content-Type", kind)));
        http::send(self.server.address, method, path, &headers, body).await.answer().await
    }

    /// A path with the id of something that is there.
    pub(crate) fn real(&self, path: &str) -> String {
        if !path.contains('{') {
            return path.to_owned();
        }
        let found = self.real.iter().find_map(|(start, with_id)| {
            let rest = path.strip_prefix(start)?.strip_prefix("/{")?;
            Some(with_id.clone() + rest.split_once('}')?.1)
        });
        found.unwrap_or_else(|| panic!("make something for {path}"))
    }

    /// Notes what is not as it should be. The shape of an error is checked on the way.
    fn expect(&mut self, said: &str, answer: &Answer, is_right: impl FnOnce(u16, &Value) -> bool) {
        let error = if answer.status >= 400 { answer.error() } else { Value::Null };
        if answer.status >= 500 || !is_right(answer.status, &error) {
            self.wrong.push(format!("{said}: {} {error}", answer.status));
        }
    }

    /// The end of each test: all was right, and the server still does its work.
    async fn end(self) {
        assert!(self.wrong.is_empty(), "\n{}", self.wrong.join("\n"));
        let chat = self.ask(
            "POST",
            "/v1/chat/completions",
            Some(chat_body(json!({
                "max_tokens": 3
            }))),
        );
        assert_eq!(chat.await.status, 200);
        assert_eq!(self.server.metric("hearth_failures_total").await, 0.0);
        assert_eq!(self.server.get("/ready").await.status, 200);
    }
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The body of an operation with one field: of the example, as short as may be.
pub(crate) fn example(schema: &Value) -> Option<Map<String, Value>> {
    let mut body = schema["examples"].get(0)?.as_object()?.clone();
    body.remove("stream");
    if body.contains_key("model") {
        body.insert("model".to_owned(), json!(MODEL));
    }
    for name in ["max_tokens", "max_output_tokens"] {
        body.entry(name).and_modify(|value| *value = json!(16));
    }
    Some(body)
}

/// Method, path, schema and example of what takes JSON.
async fn json_bodies(full: &Full) -> Vec<(String, String, Value, Map<String, Value>)> {
    let mut all = Vec::new();
    for (path, method, operation) in operations(&full.server).await {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        if schema.is_object() && !is_neighbour(&path) {
            let example = example(schema).unwrap_or_else(|| panic!("{path} has no example"));
            all.push((method, full.real(&path), schema.clone(), example));
        }
    }
    assert!(all.len() >= 19, "{} bodies", all.len());
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_no_object_are_refused() {
    let mut full = Full::start().await;
    let json = Some("application/json");
    let deep = "[".repeat(3000);
    let deeper = format!("{{\"metadata\": {deep}");
    let broken: [&[u8]; 12] = [
        b"",
        b" ",
        b"[]",
        b"null",
        b"3",
        b"\"x\"",
        b"{",
        b"{\"a\":",
        b"{} {}",
        b"\xff",
        deep.as_bytes(),
        deeper.as_bytes(),
    ];
    for (method, path, _, example) in json_bodies(&full).await {
        for body in broken {
            let answer = full.raw(&method, &path, json, body).await;
            let start = String::from_utf8_lossy(&body[..body.len().min(20)]).into_owned();
            full.expect(&format!("{path} {start}"), &answer, |status, error| {
                status == 400 && error["code"] == "invalid_json" && error["param"].is_null()
            });
        }
        let body = Value::Object(example).to_string();
        for kind in [None, Some("text/plain"), Some("multipart/form-data"), Some("é")] {
            let answer = full.raw(&method, &path, kind, body.as_bytes()).await;
            full.expect(&format!("{path} {kind:?}"), &answer, |status, _| status == 415);
        }
    }
    full.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_fields_are_named() {
    let mut full = Full::start().await;
    for (method, path, schema, example) in json_bodies(&full).await {
        let mut body = example.clone();
        body.insert("no_such_field".to_owned(), json!(1));
        let answer = full.ask(&method, &path, Some(Value::Object(body))).await;
        full.expect(&path, &answer, |status, error| {
            status == 400 && error["param"] == "no_such_field"
        });
        for (name, field) in schema["properties"].as_object().expect("fields") {
            if field["properties"].is_object() {
                let mut body = example.clone();
                body.insert(name.clone(), json!({"no_such_field": 1}));
                if name == "stream_options" {
                    body.insert("stream".to_owned(), json!(true));
                }
                let answer = full.ask(&method, &path, Some(Value::Object(body))).await;
                let inside = format!("{name}.no_such_field");
                full.expect(&format!("{path} {inside}"), &answer, |status, error| {
                    status == 400 && error["param"] == inside.as_str()
                });
            }
        }
    }
    full.end().await;
}

/// Whether a field, or something in it, is named.
fn blames(error: &Value, field: &str) -> bool {
    let rest = text_of(&error["param"]).strip_prefix(field);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// What is tried in a field of these types, and whether it must be refused.
fn extremes(
    name: &str,
    field: &Value,
    example: Option<&Value>,
) -> Vec<(&'static str, Value, bool)> {
    let takes = |kind: &str| match &field["type"] {
        Value::Array(several) => several.iter().any(|one| one == kind),
        one => one == kind,
    };
    let idle = field["x-hearth-treatment"] == "accepted without effect";
    let mut all = Vec::new();
    if takes("integer") || takes("number") {
        all.push(("1e308", json!(1e308), !idle));
        // A time may be as long as one likes.
        let bounded = !idle && name != "keep_alive";
        all.push(("2^63", json!(1_u64 << 63), bounded));
        all.push(("-2^63", json!(i64::MIN), bounded && name != "seed"));
    }
    if takes("string") {
        let names = field.get("enum").is_some() || name.ends_with("_id");
        let names = names || ["model", "mime_type"].contains(&name);
        all.push(("a long text", "x".repeat(100_000).into(), names));
        all.push(("a NUL", "\0".into(), names));
    }
    if takes("array") {
        let item = example.and_then(|list| list.get(0)).cloned().unwrap_or_else(|| json!("x"));
        all.push(("a long list", vec![item; 100_000].into(), !idle && !UNBOUNDED.contains(&name)));
        all.push(("an empty list", json!([]), NEVER_EMPTY.contains(&name)));
    }
    all
}

/// Lists with no limit but that of the body.
const UNBOUNDED: [&str; 2] = ["tokens", "part_ids"];

/// Lists that mean nothing when they are empty.
const NEVER_EMPTY: [&str; 4] = ["messages", "prompt", "input", "part_ids"];

#[tokio::test(flavor = "multi_thread")]
async fn huge_and_empty_values_are_refused_by_name() {
    let mut full = Full::start().await;
    let mut tried = 0;
    for (method, path, schema, example) in json_bodies(&full).await {
        let base = full.ask(&method, &path, Some(Value::Object(example.clone()))).await;
        // Some examples fit no model or file of this server, which is said after the fields.
        let usual = if base.status < 400 { Value::Null } else { base.error()["param"].clone() };
        for (name, field) in schema["properties"].as_object().expect("fields") {
            for (what, value, must_fail) in extremes(name, field, example.get(name)) {
                let mut body = example.clone();
                body.insert(name.clone(), value);
                let answer = full.ask(&method, &path, Some(Value::Object(body))).await;
                full.expect(&format!("{path} {name}: {what}"), &answer, |status, error| {
                    let blamed = blames(error, name);
                    let as_usual = status == base.status && error["param"] == usual;
                    // No such id; or the texts of a prompt are too long together.
                    let known = status == 404 || error["code"] == "context_length_exceeded";
                    blamed || !must_fail && (status < 400 || as_usual || known)
                });
                tried += 1;
            }
        }
    }
    assert!(tried > 300, "{tried} values");
    full.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_ids_are_not_found() {
    let mut full = Full::start().await;
    let long = "x".repeat(10_000);
    let odd =
        ["%00", "a%0Ab", "%FF", "%C3%28", "..%2F..", "%2e%2e", "'%22;--", "%F0%9F%92%A9", &long];
    for (path, method, operation) in operations(&full.server).await {
        let Some((start, _)) = path.split_once('{') else { continue };
        for id in odd {
            let rest: String = path[start.len()..]
                .split('/')
                .map(|part| if part.starts_with('{') { id.to_owned() } else { part.to_owned() })
                .collect::<Vec<_>>()
                .join("/");
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            let url = format!("{start}{rest}");
            let answer = full.ask(&method, &url, example(schema).map(Value::Object)).await;
            let said = format!("{method} {path} {:.12}", id);
            full.expect(&said, &answer, |status, _| status == 404);
        }
    }
    full.end().await;
}

/// What reads a query refuses what it does not know of it; what reads none passes it over.
#[tokio::test(flavor = "multi_thread")]
async fn queries_are_refused_by_name() {
    let mut full = Full::start().await;
    for (path, method, operation) in operations(&full.server).await {
        let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
        let reads = |name: &str| {
            parameters
                .iter()
                .any(|one| one["in"] == "query" && (name.is_empty() || one["name"] == name))
        };
        if method != "GET" && !reads("") {
            continue;
        }
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let body = example(schema).map(Value::Object);
        let url = full.real(&path);
        let mut cases = vec![("no_such=1", if reads("") { "no_such" } else { "" })];
        if reads("limit") {
            cases.extend([("limit=0", "limit"), ("limit=-1", "limit"), ("limit=abc", "limit")]);
            cases.extend([("limit=9223372036854775808", "limit"), ("order=up", "order")]);
            cases.extend([("after=none", "after"), ("after=%00", "after"), ("after=%FF", "after")]);
        }
        if reads("include") {
            cases.extend([("include[]=banana", "include[0]"), ("include=", "")]);
            cases.push(("include=message.output_text.logprobs&include[]=banana", "include[1]"));
        }
        for (query, param) in cases {
            let answer = full.ask(&method, &format!("{url}?{query}"), body.clone()).await;
            full.expect(
                &format!("{method} {path}?{query}"),
                &answer,
                |status, error| match param {
                    "" => status == 200,
                    param => status == 400 && error["param"] == param,
                },
            );
        }
    }
    full.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_are_refused_by_name() {
    let mut full = Full::start().await;
    let mut forms = 0;
    for (path, _, operation) in operations(&full.server).await {
        let schema = &operation["requestBody"]["content"]["multipart/form-data"]["schema"];
        if !schema.is_object() {
            continue;
        }
        forms += 1;
        let url = full.real(&path);
        let required: Vec<_> = schema["required"].as_array().expect("names").iter().collect();
        let part = |name: &'static str, content: &'static [u8]| -> Part<'static> {
            (name, (name != "purpose").then_some("a"), content)
        };
        let known = [part("purpose", b"batch"), part("file", b"abc"), part("data", b"abc")];
        let whole: Vec<Part> =
            known.into_iter().filter(|(name, ..)| required.iter().any(|r| *r == name)).collect();
        assert_eq!(whole.len(), required.len(), "{path}: {required:?}");
        let mut cases: Vec<(Vec<Part>, &str)> = Vec::new();
        for i in 0..whole.len() {
            let mut less = whole.clone();
            let (name, ..) = less.remove(i);
            cases.push((less, name));
            cases.push(([whole.clone(), vec![whole[i]]].concat(), name));
        }
        cases.push(([whole.clone(), vec![("no_such", None, b"x")]].concat(), "no_such"));
        cases.push(([whole.clone(), vec![("no_such[a]", None, b"x")]].concat(), "no_such"));
        if schema["properties"]["purpose"].is_object() {
            for content in [&b"\xff"[..], b"", b"nothing", &[b'x'; 5000]] {
                let rest = whole.iter().filter(|(name, ..)| *name != "purpose").copied();
                cases.push((rest.chain([("purpose", None, content)]).collect(), "purpose"));
            }
        }
        for (parts, param) in cases {
            let key = Some(full.key.as_str());
            let sent = http::send_form(full.server.address, &url, key, &parts).await;
            let names: Vec<_> = parts.iter().map(|(name, ..)| *name).collect();
            full.expect(&format!("{path} {names:?}"), &sent.answer().await, |status, error| {
                status == 400 && error["param"] == param
            });
        }
        let kind = |boundary: &str| format!("multipart/form-data; boundary={boundary}");
        let name = whole.last().expect("a file").0;
        let text = format!("--e\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\nabc");
        for (kind, body, status) in [
            (kind("e"), text.as_str(), 400),
            (kind("e"), &text[..10], 400),
            (kind("e"), "", 400),
            (kind("f"), &text, 400),
            ("multipart/form-data".to_owned(), &text, 415),
            ("application/json".to_owned(), "{}", 415),
        ] {
            let answer = full.raw("POST", &url, Some(&kind), body.as_bytes()).await;
            full.expect(&format!("{path} {kind} {body}"), &answer, |got, _| got == status);
        }
    }
    assert_eq!(forms, 2);
    full.end().await;
}
