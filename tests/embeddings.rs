//! `POST /v1/embeddings` over a real socket, with a small random encoder beside a small random chat
//! model: what comes over the wire, from every kind of file, and what is refused.
//!
//! What the fields of a body may be is tested beside their parser, the queue beside itself. Numbers
//! are held against `transformers` in `models/tests/encoders.rs`; here they are held against a
//! forward pass of the model itself.

#[allow(dead_code, reason = "shared with the surface tests")]
#[path = "openai_surface/fixture.rs"]
mod fixture;
#[allow(dead_code, reason = "shared with the surface tests")]
#[path = "openai_surface/http.rs"]
mod http;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hearth::embeddings::{Bounds, EmbeddingModel};
use hearth::registry::{Loaded, OpenEmbedding, Registry};
use hearth_kernels::Pool;
use hearth_models::{AnyFile, Compute, EncoderBatch};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use fixture::{Options, Server};
use http::Answer;

const ENCODER: &str = "org/bert:F32";
const ALIAS: &str = "text-embedding-3-small";
const CLS: u32 = 2;
const SEP: u32 = 3;
const MEAN: &str = r#"{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}"#;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn compute() -> Compute {
    Compute::Fused(Arc::new(Pool::new(1)))
}

/// The golden encoder with a tokenizer, as sentence-transformers keeps one.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(goldens().join("bert").join(name), folder.path().join(name)).expect("a copy");
    }
    put(&folder, "tokenizer.json", &tokenizer().to_string());
    put(
        &folder,
        "modules.json",
        r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#,
    );
    fs::create_dir(folder.path().join("1_Pooling")).expect("a folder");
    put(&folder, "1_Pooling/config.json", MEAN);
    put(&folder, "sentence_bert_config.json", r#"{"max_seq_length": 40}"#);
    folder
}

fn put(folder: &TempDir, name: &str, text: &str) {
    fs::write(folder.path().join(name), text).expect("a file");
}

fn change(folder: &TempDir, name: &str, change: impl Fn(&mut Value)) {
    let text = fs::read(folder.path().join(name)).expect("a file");
    let mut value = serde_json::from_slice(&text).expect("JSON");
    change(&mut value);
    put(folder, name, &value.to_string());
}

/// Letters, each as a word and as a continuation; it asks for padding and truncation, as that of
/// MiniLM does.
fn tokenizer() -> Value {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let words = ('a'..='z').map(String::from);
    let more = ('a'..='z').map(|c| format!("##{c}"));
    let rest = ["the", "of", "##ing"].map(String::from);
    let all = special.map(String::from).into_iter().chain(words).chain(more).chain(rest);
    let vocab: Map<_, _> = all.zip(0..).map(|(word, id): (_, u32)| (word, json!(id))).collect();
    let added: Vec<_> = special
        .iter()
        .zip(0..)
        .map(|(content, id): (_, u32)| {
            json!({"id": id, "content": content, "special": true, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false})
        })
        .collect();
    let special = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    json!({
        "version": "1.0",
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0,
                       "direction": "Right"},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": special("[CLS]", CLS), "[SEP]": special("[SEP]", SEP)},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    })
}

/// Ids of a text of letters and spaces, special ones included.
fn ids(text: &str) -> Vec<u32> {
    let word = |word: &str| -> Vec<u32> {
        let mut letters = word.bytes().map(|c| u32::from(c - b'a'));
        let first = letters.next().map(|c| 5 + c);
        first.into_iter().chain(letters.map(|c| 31 + c)).collect()
    };
    let inside = text.split(' ').flat_map(word);
    [CLS].into_iter().chain(inside).chain([SEP]).collect()
}

fn understood(path: &Path) -> Result<OpenEmbedding, String> {
    match hearth_models::open_any(path).map_err(|e| e.to_string())? {
        AnyFile::Encoder(file) => OpenEmbedding::new(file).map_err(|e| e.to_string()),
        AnyFile::Decoder(_) => panic!("{} is no encoder", path.display()),
    }
}

fn loaded(path: &Path, id: &str, queue_len: usize) -> EmbeddingModel {
    let bounds = Bounds { queue_len, batch_tokens: 64 };
    let model = understood(path).expect("it is understood");
    model.load(id.to_owned(), &compute(), bounds, &mut |_, _| {}).expect("it loads")
}

async fn serve(folder: &TempDir) -> Server {
    let embedder = loaded(folder.path(), ENCODER, 8);
    let model = fixture::model(&Options::default());
    let registry = Registry::of(vec![model.into(), embedder.into()]).expect("a thread");
    let aliases = vec![(ALIAS.to_owned(), ENCODER.to_owned())];
    let registry = registry.with_aliases(aliases).expect("a served model");
    fixture::serve_all(registry, Options::default()).await
}

async fn embed(server: &Server, mut fields: Value) -> Answer {
    fields["model"] = json!(ENCODER);
    server.post("/v1/embeddings", fields).await
}

/// The vectors of an answer.
fn floats(answer: &Answer) -> Vec<Vec<f32>> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    let items = body["data"].as_array().expect("a list").iter().enumerate();
    let vector = |(index, item): (usize, &Value)| {
        assert_eq!((&item["index"], &item["object"]), (&json!(index), &json!("embedding")));
        match &item["embedding"] {
            Value::String(text) => {
                let bytes = STANDARD.decode(text).expect("base64");
                let number = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
                bytes.chunks_exact(4).map(number).collect()
            }
            list => {
                let number = |x: &Value| x.as_f64().expect("a number") as f32;
                list.as_array().expect("a list").iter().map(number).collect()
            }
        }
    };
    items.map(vector).collect()
}

/// The last hidden states of a text by a forward pass of its own. `[tokens][hidden]`
fn states(text: &str) -> Vec<Vec<f32>> {
    let file = match hearth_models::open_any(&goldens().join("bert")).expect("the golden") {
        AnyFile::Encoder(file) => file,
        AnyFile::Decoder(_) => unreachable!("it is an encoder"),
    };
    let model = file.load(&compute(), &mut |_| {}).expect("it loads");
    let mut batch = EncoderBatch::default();
    batch.push(&ids(text));
    model.forward(&batch).expect("a pass").chunks(48).map(<[f32]>::to_vec).collect()
}

fn mean(states: &[Vec<f32>]) -> Vec<f32> {
    let number = |i: usize| states.iter().map(|s| s[i]).sum::<f32>() / states.len() as f32;
    (0..states[0].len()).map(number).collect()
}

fn unit(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    vector.iter().map(|x| x / length).collect()
}

fn assert_near(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    let error = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error < 1e-6, "{error:e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_is_its_mean_state_at_length_one_in_every_form_of_request() {
    let folder = folder();
    let server = serve(&folder).await;
    // Longer and shorter than what the tokenizer's file asks for: padding and truncation to 8.
    let (a, b) = ("an old fox ran", "x");
    assert!(ids(b).len() < 8 && ids(a).len() > 8);
    let answer = embed(&server, json!({"input": a})).await;
    let one = floats(&answer);
    assert_near(&one[0], &unit(&mean(&states(a))));
    let body = answer.json();
    assert_eq!((&body["object"], &body["model"]), (&json!("list"), &json!(ENCODER)));
    let used = json!({"prompt_tokens": 13, "total_tokens": 13});
    assert_eq!(body["usage"], used);

    let both = floats(&embed(&server, json!({"input": [b, a], "user": "u"})).await);
    assert_eq!(both[1], one[0], "the same bits in company");
    assert_near(&both[0], &unit(&mean(&states(b))));
    let base64 = json!({"input": [b, a], "encoding_format": "base64", "dimensions": 48});
    let answer = embed(&server, base64).await;
    assert!(answer.json()["data"][0]["embedding"].is_string());
    assert_eq!(floats(&answer), both);
    let tokens = json!({"input": ids(b), "encoding_format": "float"});
    assert_eq!(floats(&embed(&server, tokens).await), both[..1]);
    assert_eq!(server.metric("hearth_embedding_texts_total").await, 6.0);
    assert_eq!(server.metric("hearth_embedding_requests_waiting").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_with_the_field_and_the_reason() {
    let folder = folder();
    let server = serve(&folder).await;
    let long = "a ".repeat(39);
    let cases = [
        (json!({"input": ["a", long]}), "input", "context_length_exceeded", "41"),
        (json!({"input": [1, 131]}), "input", "invalid_value", "131"),
        (json!({"input": "a", "dimensions": 16}), "dimensions", "invalid_value", "48"),
        (json!({"input": "a", "dimensions": 49}), "dimensions", "invalid_value", "48"),
        (json!({"input": "a", "truncate": true}), "truncate", "unknown_parameter", "truncate"),
    ];
    for (fields, param, code, word) in cases {
        let answer = embed(&server, fields.clone()).await;
        let error = answer.error();
        assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{fields}: {error}");
        assert_eq!(error["code"], code, "{fields}");
        assert!(error["message"].as_str().is_some_and(|m| m.contains(word)), "{error}");
    }
    // Both lengths are named.
    let answer = embed(&server, json!({"input": long})).await;
    let message = answer.error()["message"].to_string();
    assert!(message.contains("41") && message.contains("40"), "{message}");
    assert_eq!(floats(&embed(&server, json!({"input": "a ".repeat(38)})).await).len(), 1);

    let unknown = server.post("/v1/embeddings", json!({"model": "no", "input": "a"})).await;
    assert_eq!((unknown.status, &unknown.error()["code"]), (404, &json!("model_not_found")));
    let get = server.get("/v1/embeddings").await;
    assert_eq!(get.status, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_a_batch_are_embedded_as_the_live_route_embeds() {
    let folder = folder();
    let server = serve(&folder).await;
    let body = |i: usize| json!({"model": ENCODER, "input": "ab ".repeat(1 + i % 9)});
    let line = |i: usize| {
        json!({"custom_id": i.to_string(), "method": "POST", "url": "/v1/embeddings",
               "body": body(i)})
    };
    let text: String = (0..50).map(|i| format!("{}\n", line(i))).collect();
    let file = server.upload(None, "batch", &text).await;
    let new = json!({"input_file_id": file, "endpoint": "/v1/embeddings",
                     "completion_window": "24h"});
    let batch = server.post("/v1/batches", new).await.json();
    let batch = server.ended(None, &batch).await;
    assert_eq!(batch["request_counts"], json!({"total": 50, "completed": 50, "failed": 0}));
    let output = batch["output_file_id"].as_str().expect("a file");
    let output = server.get(&format!("/v1/files/{output}/content")).await.body;
    let mut tokens = 0;
    for (i, line) in output.lines().enumerate() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let live = server.post("/v1/embeddings", body(i)).await.json();
        assert_eq!(line["response"]["body"], live, "bit by bit");
        tokens += live["usage"]["total_tokens"].as_u64().expect("a count");
    }
    assert_eq!((&batch["usage"]["input_tokens"], output.lines().count()), (&json!(tokens), 50));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_computed_for_a_client_that_left_is_counted() {
    let server = serve(&folder()).await;
    let long = json!({"model": ENCODER, "input": vec!["a ".repeat(38); 2048]});
    let left = server.begin("/v1/embeddings", &long).await;
    while server.metric("hearth_embedding_passes_total").await < 3.0 {
        tokio::task::yield_now().await;
    }
    drop(left);
    server.wait_for_metric("hearth_embedding_requests_waiting", 0.0).await;
    let computed = server.metric("hearth_embedding_tokens_total").await as u64;
    assert!(computed < 2048 * 40, "it was not cut off");
    let usage = async || {
        let page = server.get("/v1/organization/usage/embeddings?limit=1").await.json();
        let sums = page["data"][0]["results"][0].clone();
        ["num_model_requests", "input_tokens"].map(|name| sums[name].as_u64().unwrap_or_default())
    };
    while usage().await[0] == 0 {
        tokio::task::yield_now().await;
    }
    // A pass may have begun in the moment in which the client left.
    let [requests, counted] = usage().await;
    assert!(requests == 1 && (computed - 64..=computed).contains(&counted), "{counted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_of_both_kinds_are_listed_and_do_not_do_each_others_work() {
    let folder = folder();
    let server = serve(&folder).await;
    let list = server.get("/v1/models").await.json();
    let ids: Vec<_> = list["data"].as_array().expect("a list").iter().map(|m| &m["id"]).collect();
    assert_eq!(ids, [fixture::MODEL, ENCODER, ALIAS]);
    let body = json!({"model": ALIAS, "input": "a"});
    assert_eq!(server.post("/v1/embeddings", body).await.json()["model"], ENCODER);
    let one = server.get("/v1/models/org%2Fbert%3AF32").await.json();
    assert_eq!(one, list["data"][1]);
    assert_eq!((&one["context_length"], &one["embedding_length"]), (&json!(40), &json!(48)));

    let messages = json!([{"role": "user", "content": "a"}]);
    let chat = json!({"model": ENCODER, "messages": messages});
    let wrong = [
        ("/v1/chat/completions", chat),
        ("/v1/completions", json!({"model": ENCODER, "prompt": "a"})),
        ("/v1/embeddings", json!({"model": fixture::MODEL, "input": "a"})),
    ];
    for (path, body) in wrong {
        let answer = server.post(path, body).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("model")), "{path}");
        assert!(answer.error()["message"].to_string().contains("embed"), "{path}");
    }
    assert_eq!(server.chat(json!({"max_tokens": 1})).await.status, 200);
    assert_eq!(server.get("/ready").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_are_cut_where_the_model_was_trained_for_it() {
    let folder = folder();
    change(&folder, "config.json", |config| config["matryoshka_dimensions"] = json!([8, 16]));
    let server = serve(&folder).await;
    let whole = floats(&embed(&server, json!({"input": "abc"})).await);
    let cut = floats(&embed(&server, json!({"input": "abc", "dimensions": 16})).await);
    assert_near(&cut[0], &unit(&whole[0][..16]));
    let refused = embed(&server, json!({"input": "abc", "dimensions": 12})).await;
    assert!(refused.error()["message"].to_string().contains("8, 16 or 48"), "{}", refused.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gguf_file_gives_the_vector_of_the_folder() {
    // The file says CLS.
    let folder = folder();
    put(&folder, "1_Pooling/config.json", r#"{"pooling_mode_cls_token": true}"#);
    let gguf = goldens().join("bert.gguf");
    assert_eq!(understood(&gguf).expect("it is understood").name(), "bert");
    let models = [loaded(&gguf, "gguf", 8), loaded(folder.path(), "folder", 8)];
    let registry = Registry::of(models.map(Loaded::from).to_vec()).expect("a thread");
    let server = fixture::serve_all(registry, Options::default()).await;
    let mut vectors = Vec::new();
    for model in ["gguf", "folder"] {
        let body = json!({"model": model, "input": "Spelling the BEE"});
        vectors.push(floats(&server.post("/v1/embeddings", body).await).remove(0));
    }
    assert_eq!(vectors[0], vectors[1]);
    let plain = json!({"model": "gguf", "input": "ab c"});
    let got = floats(&server.post("/v1/embeddings", plain).await);
    assert_near(&got[0], &unit(&states("ab c")[0]));
}

#[test]
fn steps_that_this_build_does_not_run_are_refused_by_name() {
    let refused = |word: &str, change: &dyn Fn(&TempDir)| {
        let folder = folder();
        change(&folder);
        let error = understood(folder.path()).err();
        let error = error.unwrap_or_else(|| panic!("{word} is taken"));
        assert!(error.contains(word), "`{error}` does not mention `{word}`");
    };
    let dense = r#"[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]"#;
    refused("models.Dense", &|f| put(f, "modules.json", dense));
    let outside = r#"[{"path": "../1_Pooling", "type": "x.Pooling"}]"#;
    refused("../1_Pooling", &|f| put(f, "modules.json", outside));
    refused("modules.json", &|f| put(f, "modules.json", "{"));
    let last = r#"{"pooling_mode_lasttoken": true}"#;
    refused("lasttoken", &|f| put(f, "1_Pooling/config.json", last));
    let two = r#"{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}"#;
    refused("mean_tokens and max_tokens", &|f| put(f, "1_Pooling/config.json", two));
    refused("tokenizer.json", &|f| {
        fs::remove_file(f.path().join("tokenizer.json")).expect("it was there");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn ollamas_route_gives_the_same_vectors_and_cuts_what_is_too_long() {
    let server = serve(&folder()).await;
    let ask = async |mut fields: Value| {
        fields["model"] = json!(format!("{ALIAS}:latest"));
        server.post("/api/embed", fields).await
    };
    let vectors = |answer: &Answer| {
        assert_eq!(answer.status, 200, "{}", answer.body);
        serde_json::from_value::<Vec<Vec<f32>>>(answer.json()["embeddings"].clone()).expect("rows")
    };
    let answer = ask(json!({"input": ["the cat", "a dog"]})).await;
    let want = floats(&embed(&server, json!({"input": ["the cat", "a dog"]})).await);
    assert_eq!(vectors(&answer), want);
    let body = answer.json();
    assert_eq!(body["model"], format!("{ALIAS}:latest"));
    assert!(body["prompt_eval_count"].as_u64() > Some(4) && body["total_duration"].is_u64());

    // 40 tokens with the marks at both ends.
    let (long, whole) = ("a ".repeat(50), "a ".repeat(38));
    let cut = vectors(&ask(json!({"input": long})).await);
    assert_eq!(cut, floats(&embed(&server, json!({"input": whole})).await));
    let refused = ask(json!({"input": long, "truncate": false})).await;
    assert_eq!(refused.status, 400);
    assert!(refused.json()["error"].as_str().is_some_and(|why| why.contains("40")));

    // As it was called before, for one text.
    let one = async |prompt: Value| {
        let fields = json!({"model": ALIAS, "prompt": prompt, "options": {"num_thread": 2}});
        server.post("/api/embeddings", fields).await
    };
    let answer = one(json!("a dog")).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let vector: Vec<f32> = serde_json::from_value(answer.json()["embedding"].clone()).expect("row");
    assert_eq!(vector, want[1]);
    for prompt in [json!(""), json!(null), json!(["a dog"])] {
        let refused = one(prompt).await;
        let why = refused.json()["error"].as_str().unwrap_or_default().to_owned();
        assert!(refused.status == 400 && why.contains("prompt"), "{}", refused.body);
    }
}

/// The golden's weights with more positions: its own, again and again.
fn lengthened(folder: &TempDir, positions: usize) {
    let path = folder.path().join("model.safetensors");
    let file = fs::read(&path).expect("the weights");
    let (len, rest) = file.split_at(8);
    let len = u64::from_le_bytes(len.try_into().expect("eight bytes")) as usize;
    let (header, data) = rest.split_at(len);
    let mut header: Value = serde_json::from_slice(header).expect("JSON");
    let number = |value: &Value| value.as_u64().expect("a number") as usize;
    // Without holes, as the format wants it.
    let mut all = Vec::new();
    for (name, tensor) in header.as_object_mut().expect("an object") {
        let Some(offsets) = tensor.get("data_offsets") else { continue };
        let own = &data[number(&offsets[0])..number(&offsets[1])];
        let begin = all.len();
        if name == "embeddings.position_embeddings.weight" {
            let row = own.len() / number(&tensor["shape"][0]);
            all.extend(own.iter().copied().cycle().take(positions * row));
            tensor["shape"][0] = json!(positions);
        } else {
            all.extend(own);
        }
        tensor["data_offsets"] = json!([begin, all.len()]);
    }
    let header = header.to_string();
    let parts = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &all];
    fs::write(path, parts.concat()).expect("a file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_300_000_tokens_at_most() {
    let folder = folder();
    lengthened(&folder, 256);
    change(&folder, "config.json", |config| config["max_position_embeddings"] = json!(256));
    put(&folder, "sentence_bert_config.json", r#"{"max_seq_length": 256}"#);
    let server = serve(&folder).await;
    // 1,199 texts of 250 tokens with the marks at both ends, and one of the rest.
    let inputs = |last: usize| {
        let mut inputs = vec!["a ".repeat(248); 1199];
        inputs.push("a ".repeat(last - 2));
        json!({"input": inputs, "encoding_format": "base64"})
    };
    let all = embed(&server, inputs(250)).await;
    assert_eq!(all.status, 200, "{}", all.body);
    assert_eq!(all.json()["usage"]["total_tokens"], 300_000);
    let refused = embed(&server, inputs(251)).await;
    let error = refused.error();
    assert_eq!((refused.status, &error["param"]), (400, &json!("input")), "{error}");
    assert!(error["message"].as_str().is_some_and(|why| why.contains("300000")), "{error}");
}
