//! Files and uploads over the wire: forms in, contents out.

use std::time::Duration;

use hearth::server::ServerConfig;
use serde_json::{Value, json};

use crate::fixture::{Options, Server, start};
use crate::http::{self, Answer, Part};

async fn send_form(server: &Server, path: &str, parts: &[Part<'_>]) -> Answer {
    http::send_form(server.address, path, None, parts).await.answer().await
}

async fn upload(server: &Server, purpose: &str, content: &[u8]) -> Answer {
    let parts = [("purpose", None, purpose.as_bytes()), ("file", Some("a.jsonl"), content)];
    send_form(server, "/v1/files", &parts).await
}

fn id(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["id"].as_str().expect("an id").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_does_not_come_is_not_waited_for() {
    let config = ServerConfig { body_timeout: Duration::from_millis(50), ..Default::default() };
    let server = start(Options { config, ..Options::default() }).await;
    let head = "POST /v1/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                Content-Length: 1000\r\nContent-Type: multipart/form-data; boundary=e\r\n\r\n";
    let file = "--e\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nabc";
    let two = format!("{file}\r\n--e\r\n");
    for half in ["", "--e\r\nContent-", file, two.as_str()] {
        let half = format!("{head}{half}");
        let refused = http::send_raw(server.address, half.as_bytes()).await.answer().await;
        assert_eq!((refused.status, &refused.error()["code"]), (408, &json!("request_timeout")));
    }
}

/// Members of one object are fields all the same: who sends them for ever fills no memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_form_has_a_bounded_number_of_fields() {
    let server = start(Options::default()).await;
    let names: Vec<String> = (0..64).map(|i| format!("expires_after[{i}]")).collect();
    let mut parts: Vec<Part<'_>> = names.iter().map(|name| (&**name, None, &b"1"[..])).collect();
    parts.push(("file", Some("a.jsonl"), b"{}"));
    let refused = send_form(&server, "/v1/files", &parts).await;
    assert_eq!((refused.status, &refused.error()["code"]), (400, &json!("invalid_body")));
    assert_eq!(refused.error()["message"], "The form has more than 64 fields.");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_kept_listed_read_and_forgotten() {
    let server = start(Options::default()).await;
    // Longer than a body of JSON may be.
    let content = "{\"line\": 1}\n".repeat(500_000);
    let made = upload(&server, "batch", content.as_bytes()).await;
    let file = made.json();
    let path = format!("/v1/files/{}", id(&made));
    assert!(file["id"].as_str().is_some_and(|id| id.starts_with("file-")));
    assert_eq!((&file["object"], &file["status"]), (&json!("file"), &json!("processed")));
    assert_eq!((&file["bytes"], &file["filename"]), (&json!(content.len()), &json!("a.jsonl")));
    assert_eq!(server.get(&path).await.json(), file);
    let back = server.get(&format!("{path}/content")).await;
    assert_eq!(back.header("content-type"), Some("application/octet-stream"));
    assert!(back.body == content);
    let second = id(&upload(&server, "user_data", b"x").await);
    let list = server.get("/v1/files").await.json();
    assert_eq!((&list["data"][0]["id"], &list["data"][1]), (&json!(second), &file));
    let batch = server.get("/v1/files?purpose=batch&limit=1").await.json();
    assert_eq!((&batch["data"], &batch["has_more"]), (&json!([file]), &json!(false)));
    let gone = server.ask("DELETE", &path, None, None).await.json();
    assert_eq!(gone, json!({"id": file["id"], "object": "file", "deleted": true}));
    for path in [path.clone(), format!("{path}/content")] {
        assert_eq!(server.get(&path).await.status, 404);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_that_are_wrong_are_refused_by_name() {
    let server = start(Options::default()).await;
    let file: Part<'_> = ("file", Some("a"), b"x");
    let purpose: Part<'_> = ("purpose", None, b"batch");
    let cases: [(&[Part<'_>], &str); 6] = [
        (&[purpose], "file"),
        (&[file], "purpose"),
        (&[file, ("purpose", None, b"fun")], "purpose"),
        (&[file, purpose, ("extra", None, b"1")], "extra"),
        (&[purpose, ("file", Some(""), b"x")], "file"),
        (&[file, purpose, ("expires_after[seconds]", None, b"9")], "expires_after.anchor"),
    ];
    for (parts, param) in cases {
        let answer = send_form(&server, "/v1/files", parts).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(param)));
    }
    let json = server.post("/v1/files", json!({"purpose": "batch"})).await;
    assert_eq!((json.status, &json.error()["code"]), (415, &json!("unsupported_media_type")));
    assert_eq!(server.get("/v1/files").await.json()["data"], json!([]));
    assert_eq!(server.get("/v1/files?limit=10001").await.error()["param"], "limit");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_becomes_a_file() {
    let server = start(Options::default()).await;
    let body = json!({"filename": "big.jsonl", "purpose": "batch", "bytes": 6,
                      "mime_type": "text/jsonl"});
    let path = format!("/v1/uploads/{}", id(&server.post("/v1/uploads", body.clone()).await));
    let add = async |text: &str| {
        let parts = [("data", Some("blob"), text.as_bytes())];
        send_form(&server, &format!("{path}/parts"), &parts).await
    };
    let (b, a) = (add("def").await, add("abc").await);
    assert_eq!(b.json()["object"], "upload.part");
    let complete = async |fields: Value| server.post(&format!("{path}/complete"), fields).await;
    let parts = json!([id(&a), id(&b)]);
    let wrong = complete(json!({"part_ids": parts, "md5": "0"})).await;
    assert_eq!((wrong.status, &wrong.error()["param"]), (400, &json!("md5")));
    for (fields, param) in [
        (json!({}), "part_ids"),
        (json!({"part_ids": [1]}), "part_ids[0]"),
        (json!({"part_ids": [id(&a)]}), "part_ids"),
        (json!({"part_ids": parts, "sha": "x"}), "sha"),
    ] {
        assert_eq!(complete(fields).await.error()["param"], param);
    }
    let md5 = "e80b5017098950fc58aad83c8c14978e";
    let done = complete(json!({"part_ids": parts, "md5": md5})).await.json();
    assert_eq!((&done["status"], &done["file"]["bytes"]), (&json!("completed"), &json!(6)));
    let file = done["file"]["id"].as_str().expect("a file");
    assert_eq!(server.get(&format!("/v1/files/{file}/content")).await.body, "abcdef");
    assert_eq!(add("late").await.status, 400);

    let other = format!("/v1/uploads/{}", id(&server.post("/v1/uploads", body.clone()).await));
    let cancelled = server.ask("POST", &format!("{other}/cancel"), None, None).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    for (field, value) in [("bytes", json!(0)), ("purpose", json!("fun")), ("filename", json!(""))]
    {
        let mut body = body.clone();
        body[field] = value;
        assert_eq!(server.post("/v1/uploads", body).await.error()["param"], field);
    }
    assert_eq!(server.ask("POST", "/v1/uploads/upload_x/cancel", None, None).await.status, 404);
}
