//! Adapters on the wire: named like models, composed, loaded and unloaded while answers run.

use std::time::Duration;

use std::path::{Path, PathBuf};

use hearth::registry::Registry;
use hearth::types::Tenant;
use serde_json::{Value, json};

use crate::fixture::{self, MODEL, Options, Server};

fn lora(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/lora").join(name)
}

/// The fixture's model with one adapter of its own family.
pub(crate) async fn server(options: Options) -> Server {
    let registry = Registry::of(vec![fixture::model(&options).into()]).expect("a thread");
    let list = vec![(None, "bent".to_owned(), lora("qwen3"))];
    let registry = registry.with_adapters(1 << 20, list).expect("a served model");
    fixture::serve_all(registry, options).await
}

fn body(model: &str, fields: Value) -> Value {
    let mut body = json!({
        "model": model, "prompt": "Tell me a story.", "max_tokens": 24, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true, "logprobs": 1,
    });
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

async fn answer(server: &Server, model: &str, fields: Value) -> (Value, Value) {
    let answer = server.post("/v1/completions", body(model, fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let json = answer.json();
    // Named like the adapter that was asked for, however it was.
    assert_eq!(json["model"], model.strip_prefix(&format!("{MODEL}:")).unwrap_or(model));
    let choice = &json["choices"][0];
    (choice["token_ids"].clone(), choice["logprobs"]["token_logprobs"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_a_model_with_a_parent() {
    let server = server(Options::default()).await;
    let list = server.get("/v1/models").await.json();
    let bent = list["data"].as_array().unwrap().iter().find(|m| m["id"] == "bent").unwrap().clone();
    assert_eq!((&bent["root"], &bent["parent"]), (&json!(MODEL), &json!(MODEL)));
    assert_eq!(server.get("/v1/models/bent").await.json()["parent"], json!(MODEL));
    let base = answer(&server, MODEL, json!({})).await;
    let bent = answer(&server, "bent", json!({})).await;
    assert_ne!(base, bent);
    assert_eq!(answer(&server, &format!("{MODEL}:bent"), json!({})).await, bent);
    let listed = json!({"adapters": [{"id": "bent"}]});
    assert_eq!(answer(&server, MODEL, listed).await, bent);
    let weak = answer(&server, MODEL, json!({"adapters": [{"id": "bent", "weight": 0.25}]})).await;
    assert!(weak != bent && weak != base);
    let nothing = json!({"adapters": [{"id": "bent", "weight": 0}]});
    assert_eq!(answer(&server, MODEL, nothing).await, base);
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "model": "bent",
        "max_tokens": 3, "adapters": []});
    let chat = server.post("/v1/chat/completions", chat).await;
    assert_eq!((chat.status, &chat.json()["model"]), (200, &json!("bent")));
    let response = json!({"input": "Hi", "model": MODEL, "max_output_tokens": 16,
        "adapters": [{"id": "bent"}]});
    let response = server.post("/v1/responses", response).await;
    assert_eq!((response.status, &response.json()["model"]), (200, &json!(MODEL)));
    let response = json!({"input": "Hi", "model": "bent", "max_output_tokens": 16});
    let response = server.post("/v1/responses", response).await;
    assert_eq!((response.status, &response.json()["model"]), (200, &json!("bent")));
}

/// Base rows and adapters in one batch answer as each alone.
#[tokio::test(flavor = "multi_thread")]
async fn requests_of_all_kinds_run_together() {
    let server = server(Options::default()).await;
    let kinds = [
        (MODEL, json!({})),
        ("bent", json!({})),
        (MODEL, json!({"adapters": [{"id": "bent", "weight": -1}]})),
        (MODEL, json!({"adapters": [{"id": "bent", "weight": 0.5}]})),
    ];
    let mut alone = Vec::new();
    for (model, fields) in &kinds {
        alone.push(answer(&server, model, fields.clone()).await.0);
    }
    let mut running = Vec::new();
    for (model, fields) in kinds.iter().chain(&kinds) {
        running.push(server.begin("/v1/completions", &body(model, fields.clone())).await);
    }
    for (pending, want) in running.into_iter().zip(alone.iter().chain(&alone)) {
        let json = pending.answer().await.json();
        assert_eq!(&json["choices"][0]["token_ids"], want);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_come_and_go_while_answers_run() {
    let server = server(Options::default()).await;
    let bent = answer(&server, "bent", json!({})).await;
    let long = body("bent", json!({"max_tokens": 600}));
    let running = server.begin("/v1/completions", &long).await;
    let load = |name: &str, path: &str, more: Value| {
        let mut body = json!({"lora_name": name, "lora_path": lora(path)});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/load_lora_adapter", body)
    };
    let loaded = load("twin", "qwen3", json!({})).await;
    assert_eq!(loaded.status, 200, "{}", loaded.body);
    assert!(loaded.body.contains("'twin' added"));
    assert_eq!(answer(&server, "twin", json!({})).await, bent);
    assert_eq!(load("twin", "qwen3", json!({})).await.status, 400);
    let replaced = load("twin", "qwen3", json!({"load_inplace": true, "pinned": true})).await;
    assert_eq!(replaced.status, 200, "{}", replaced.body);
    for name in ["twin", "bent"] {
        let body = json!({"lora_name": name});
        assert_eq!(server.post("/v1/unload_lora_adapter", body.clone()).await.status, 200);
        assert_eq!(server.post("/v1/unload_lora_adapter", body).await.status, 400);
        let gone = server.post("/v1/completions", body_of(name)).await;
        assert_eq!(
            (gone.status, gone.json()["error"]["code"].clone()),
            (404, "model_not_found".into())
        );
    }
    // OpenAI's word for it.
    assert_eq!(load("tuned", "qwen3", json!({})).await.status, 200);
    let delete =
        async |id: &str| server.ask("DELETE", &format!("/v1/models/{id}"), None, None).await;
    let gone = delete("tuned").await;
    assert_eq!(gone.json(), json!({"id": "tuned", "object": "model", "deleted": true}));
    for (id, status, code) in
        [("tuned", 404, "model_not_found"), ("org%2Ftiny%3AF32", 403, "insufficient_permissions")]
    {
        let refused = delete(id).await;
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (status, &json!(code)));
    }
    // It began with an adapter that is gone, and ends with it.
    let ended = running.answer().await.json();
    assert_eq!(ended["usage"]["completion_tokens"], 600);
    let first: Vec<Value> = ended["choices"][0]["token_ids"].as_array().unwrap()[..24].to_vec();
    assert_eq!(json!(first), bent.0);
}

fn body_of(model: &str) -> Value {
    body(model, json!({}))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_by_name() {
    let server = server(Options::default()).await;
    for (fields, param) in [
        (json!({"lora_path": "x"}), "lora_name"),
        (json!({"lora_name": "x"}), "lora_path"),
        (json!({"lora_name": "x", "lora_path": "/nowhere"}), "lora_path"),
        (json!({"lora_name": "x", "lora_path": lora("llama")}), "lora_path"),
        (json!({"lora_name": MODEL, "lora_path": lora("qwen3")}), "lora_name"),
        (json!({"lora_name": "x", "lora_path": "y", "base_model_name": "z"}), "base_model_name"),
        (json!({"lora_name": "x", "lora_path": "y", "rank": 3}), "rank"),
    ] {
        let answer = server.post("/v1/load_lora_adapter", fields.clone()).await;
        assert!(matches!(answer.status, 400 | 404), "{fields}: {}", answer.body);
        assert_eq!(answer.json()["error"]["param"], param, "{fields}: {}", answer.body);
    }
    for list in [
        json!([{"id": "none"}]),
        json!([{"id": "bent"}, {"id": "bent"}]),
        json!("bent"),
        json!([{"id": "bent", "weight": "much"}]),
    ] {
        let answer = server.complete(json!({"prompt": "x", "adapters": list})).await;
        assert_eq!(answer.status, 400, "{list}: {}", answer.body);
        let param = answer.json()["error"]["param"].as_str().unwrap_or_default().to_owned();
        assert!(param.starts_with("adapters"), "{list}: {param}");
    }
}

/// An adapter whose files are of no use fails whoever asks for it, who is not told where they lie.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_adapter_does_not_tell_where_it_lies() {
    let registry = Registry::of(vec![fixture::model(&Options::default()).into()]).unwrap();
    let list =
        vec![(None, "odd".to_owned(), lora("llama")), (None, "no".to_owned(), "/a/b".into())];
    let registry = registry.with_adapters(1 << 20, list).unwrap();
    let server = fixture::serve_all(registry, Options::default()).await;
    for id in ["odd", "no"] {
        let answer = server.post("/v1/completions", body_of(id)).await;
        assert_eq!(answer.status, 500, "{}", answer.body);
        assert!(answer.body.contains(id) && !answer.body.contains('/'), "{}", answer.body);
    }
}

/// Adapters in a folder come, change and go with their files.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_followed() {
    let registry = Registry::of(vec![fixture::model(&Options::default()).into()]).unwrap();
    let list = vec![(None, "taken".to_owned(), lora("qwen3"))];
    let registry = registry.with_adapters(1 << 20, list).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let put = |id: &str| {
        let to = folder.path().join(id);
        std::fs::create_dir_all(&to).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(lora("qwen3").join(file), to.join(file)).unwrap();
        }
    };
    let ids = |registry: &Registry| -> Vec<String> {
        let all = registry.adapters().cards().into_iter().map(|card| card.id);
        all.filter(|id| id != "taken").collect()
    };
    put("first");
    put("taken");
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    let open = |r: &Registry| r.folder_of_adapters(None, folder.path().to_owned());
    assert!(open(&registry).unwrap_err().to_string().contains("`taken` is loaded already"));
    std::fs::remove_dir_all(folder.path().join("taken")).unwrap();
    registry.adapters().remove("first").ok();
    let mut watched = open(&registry).unwrap();
    assert_eq!(ids(&registry), ["first"]);
    // New ones, when two looks agree.
    put("second");
    put("taken");
    watched.look(&registry);
    assert_eq!(ids(&registry), ["first"]);
    watched.look(&registry);
    assert_eq!(ids(&registry), ["first", "second"], "a taken name does no harm");
    // A change makes a new generation, and no more than one.
    let lease = registry.generator(MODEL, Tenant::default(), None).await.unwrap();
    let slot = |id: &str| {
        let wanted = registry.wanted(id, &[]).unwrap();
        let set = registry.adapters().set(MODEL, lease.file(), &wanted).unwrap();
        set.unwrap().slot.0
    };
    let (first, second) = (slot("first"), slot("second"));
    let config = folder.path().join("first/adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}\n")).unwrap();
    watched.look(&registry);
    assert_eq!(slot("first"), first, "it may still be being written");
    watched.look(&registry);
    let changed = slot("first");
    assert_ne!(changed, first);
    watched.look(&registry);
    watched.look(&registry);
    assert_eq!((slot("first"), slot("second")), (changed, second));
    std::fs::remove_dir_all(folder.path().join("second")).unwrap();
    watched.look(&registry);
    assert_eq!(ids(&registry), ["first", "second"], "one look may be wrong");
    watched.look(&registry);
    assert_eq!(ids(&registry), ["first"]);
    // A folder that is away takes nothing with it.
    let away = folder.path().with_extension("away");
    std::fs::rename(folder.path(), &away).unwrap();
    watched.look(&registry);
    assert_eq!(ids(&registry), ["first"]);
    std::fs::rename(&away, folder.path()).unwrap();
}

/// Where there are keys, the operator's is wanted.
#[tokio::test(flavor = "multi_thread")]
async fn loading_is_the_operators() {
    let options = Options { api_keys: vec!["sk-plain".to_owned()], ..Options::default() };
    let server = server(options).await;
    let body = json!({"lora_name": "x", "lora_path": lora("qwen3")});
    for (method, path) in [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("DELETE", "/v1/models/bent"),
    ] {
        let plain = server.ask(method, path, Some("sk-plain"), Some(body.clone())).await;
        assert_eq!(plain.status, 403, "{}", plain.body);
    }
}

/// Reads of a disk that does not answer, here pipes into which nobody writes.
#[cfg(unix)]
#[test]
fn adapters_that_cannot_be_read_now_leave_threads_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let stuck: Vec<PathBuf> = (0..10).map(|i| folder.path().join(format!("stuck-{i}"))).collect();
    let pipes: Vec<_> = stuck.iter().map(|path| path.join("adapter_config.json")).collect();
    for (path, pipe) in stuck.iter().zip(&pipes) {
        std::fs::create_dir(path).unwrap();
        std::fs::copy(lora("qwen3").join(WEIGHTS), path.join(WEIGHTS)).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(pipe).status().unwrap().success());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(hearth::pipeline::THREADS)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let options = Options::default();
        let registry = Registry::of(vec![fixture::model(&options).into()]).expect("a thread");
        let mut list: Vec<_> =
            (0..).zip(stuck).map(|(i, path)| (None, format!("stuck-{i}"), path)).collect();
        list.push((None, "bent".to_owned(), lora("qwen3")));
        let registry = registry.with_adapters(1 << 20, list).expect("a served model");
        let server = fixture::serve_all(registry, options).await;
        let bent = answer(&server, "bent", json!({})).await;
        let mut waiting = Vec::new();
        for i in 0..10 {
            let body = body_of(&format!("stuck-{i}"));
            waiting.push(server.begin("/v1/completions", &body).await);
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        // Neither who wants no adapter nor who wants one that is there waits for them.
        let others = async {
            answer(&server, MODEL, json!({})).await;
            assert_eq!(answer(&server, "bent", json!({})).await, bent);
        };
        tokio::time::timeout(Duration::from_secs(30), others).await.expect("no thread is left");
    });
    runtime.shutdown_background();
}

const WEIGHTS: &str = "adapter_model.safetensors";
