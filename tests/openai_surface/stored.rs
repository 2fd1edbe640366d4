//! Stored chat completions: kept when asked for, listed, labelled, forgotten.

use hearth::store::{Document, Kind, Store};
use hearth::types::ProjectId;
use serde_json::{Value, json};

use crate::fixture::{MODEL, Options, Server, chat_body, start};
use crate::http;

async fn keep(server: &Server, metadata: Value, mut fields: Value) -> Value {
    fields["store"] = json!(true);
    fields["max_tokens"] = json!(3);
    fields["metadata"] = metadata;
    let answer = server.chat(fields).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn ids(list: &Value) -> Vec<Value> {
    list["data"].as_array().expect("a list").iter().map(|object| object["id"].clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_kept_whole_with_its_messages() {
    let server = start(Options::default()).await;
    let fields = json!({"temperature": 0.5, "user": "ann", "n": 2});
    let said = keep(&server, json!({"k": "v"}), fields).await;
    let path = format!("/v1/chat/completions/{}", said["id"].as_str().expect("an id"));
    let kept = server.get(&path).await.json();
    for name in ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"] {
        assert_eq!(kept[name], said[name], "{name}");
    }
    assert_eq!(kept["choices"].as_array().map(Vec::len), Some(2));
    assert_eq!((&kept["temperature"], &kept["input_user"]), (&json!(0.5), &json!("ann")));
    assert_eq!((&kept["metadata"], &kept["tools"]), (&json!({"k": "v"}), &Value::Null));
    assert!(kept["request_id"].as_str().is_some_and(|id| id.starts_with("req_")));
    let messages = server.get(&format!("{path}/messages")).await.json();
    let id = format!("{}-0", said["id"].as_str().expect("an id"));
    let message = json!({"id": id, "role": "user", "content": "Tell me a story.", "name": null,
                         "content_parts": null, "refusal": null});
    assert_eq!(messages["data"], json!([message]));
    assert_eq!((&messages["first_id"], &messages["has_more"]), (&json!(id), &json!(false)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_answer_is_kept_when_it_is_complete_and_an_unwanted_one_never() {
    let server = start(Options::default()).await;
    let fields = json!({"store": true, "stream": true, "max_tokens": 20, "temperature": 0});
    let chunks = server.chat(fields).await.chunks();
    server.chat(json!({"store": false, "metadata": {"k": "v"}, "max_tokens": 2})).await;
    let list = server.get("/v1/chat/completions").await.json();
    assert_eq!(ids(&list), [chunks[0]["id"].clone()]);
    let text: String =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(list["data"][0]["choices"][0]["message"]["content"], text);
    // A client that leaves in the middle has no answer, and neither has the store.
    let fields = json!({"store": true, "stream": true, "max_tokens": 20_000, "ignore_eos": true});
    let mut pending = server.begin("/v1/chat/completions", &chat_body(fields)).await;
    pending.wait_for("data: ").await;
    drop(pending);
    server.wait_for_metric("hearth_requests_running", 0.0).await;
    assert_eq!(ids(&server.get("/v1/chat/completions").await.json()).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_and_paged() {
    let server = start(Options::default()).await;
    let mut kept = Vec::new();
    for label in ["a", "b", "a", "a"] {
        kept.push(
            keep(&server, json!({"k": label, "odd key": "x y"}), json!({})).await["id"].clone(),
        );
    }
    let list =
        async |query: &str| server.get(&format!("/v1/chat/completions?{query}")).await.json();
    assert_eq!(ids(&list("").await), kept);
    assert_eq!(ids(&list("metadata[k]=b").await), [kept[1].clone()]);
    assert_eq!(ids(&list("metadata%5Bk%5D=a&metadata%5Bodd+key%5D=x%20y").await).len(), 3);
    assert_eq!(ids(&list(&format!("model={}", MODEL.replace('/', "%2F"))).await), kept);
    assert!(ids(&list("model=other").await).is_empty());
    let first = list("limit=3&order=desc").await;
    assert_eq!(ids(&first), [kept[3].clone(), kept[2].clone(), kept[1].clone()]);
    assert_eq!(first["has_more"], true);
    let after = first["last_id"].as_str().expect("an id");
    let rest = list(&format!("limit=3&order=desc&after={after}")).await;
    assert_eq!((ids(&rest), &rest["has_more"]), (vec![kept[0].clone()], &json!(false)));
    for (query, param) in
        [("limit=0", "limit"), ("order=up", "order"), ("after=x", "after"), ("x=1", "x")]
    {
        let answer = server.get(&format!("/v1/chat/completions?{query}")).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(param)), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_are_replaced_and_answers_forgotten() {
    let server = start(Options::default()).await;
    let id = keep(&server, json!({"k": "v"}), json!({})).await["id"].clone();
    let path = format!("/v1/chat/completions/{}", id.as_str().expect("an id"));
    let updated = server.post(&path, json!({"metadata": {"new": "label"}})).await.json();
    assert_eq!(updated["metadata"], json!({"new": "label"}));
    assert_eq!(server.get(&path).await.json(), updated);
    for (body, param) in [
        (json!({}), "metadata"),
        (json!({"metadata": {"k": 5}}), "metadata.k"),
        (json!({"metadata": {}, "model": "x"}), "model"),
    ] {
        let answer = server.post(&path, body).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(param)));
    }
    let gone = server.ask("DELETE", &path, None, None).await.json();
    assert_eq!(gone, json!({"object": "chat.completion.deleted", "id": id, "deleted": true}));
    for path in [path.clone(), format!("{path}/messages")] {
        assert_eq!(server.get(&path).await.status, 404);
    }
    assert_eq!(server.ask("DELETE", &path, None, None).await.status, 404);
    let bad = server.chat(json!({"store": true, "metadata": {"k": "x".repeat(513)}})).await;
    assert_eq!((bad.status, &bad.error()["param"]), (400, &json!("metadata.k")));
}

/// Somebody who looks through everything that is stored, again and again, is in nobody's way: keys
/// are looked up, and prompts encoded, beside it.
#[tokio::test(flavor = "multi_thread")]
async fn answers_do_not_wait_for_lists() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path()).expect("a store");
    let body = json!({"model": MODEL, "metadata": {"a": "b"}, "text": "x".repeat(4000)});
    let stored = |i: usize| Document {
        id: i.to_string(),
        parent: String::new(),
        created_s: 1,
        expires_s: None,
        body: body.clone(),
    };
    let filled = store.write(|tx| {
        let mut all = (0..20_000).map(stored);
        all.try_for_each(|one| tx.insert(ProjectId::DEFAULT, Kind::Completion, &one))
    });
    filled.expect("room");
    let server = start(Options { store, ..Options::default() }).await;
    let mut lists = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let address = server.address;
        lists.spawn(async move {
            let path = "/v1/chat/completions?metadata[no]=where";
            let list = http::send(address, "GET", path, &[], b"").await.answer().await;
            assert_eq!((list.status, &list.json()["data"]), (200, &json!([])));
        });
    }
    // The first of them is done, so the others are at it.
    lists.join_next().await.expect("a list").expect("no panic");
    let answer = server.chat(json!({"max_tokens": 2})).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut over = 0;
    while let Some(done) = lists.try_join_next() {
        done.expect("no panic");
        over += 1;
    }
    assert!(over < 12, "{over} lists were made before the answer");
    lists.join_all().await;
}
