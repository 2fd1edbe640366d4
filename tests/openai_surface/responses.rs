//! Responses and conversations over the wire: streamed and whole, remembered, in the background.

use std::time::Duration;

use serde_json::{Value, json};

use crate::fixture::{ALIAS, MODEL, Options, Server, start};
use crate::http::Answer;

pub(crate) const PATH: &str = "/v1/responses";

pub(crate) fn body(mut fields: Value) -> Value {
    fields["model"] = json!(MODEL);
    fields["temperature"] = json!(0);
    fields["ignore_eos"] = json!(true);
    for (name, value) in [("input", json!("Tell me.")), ("max_output_tokens", json!(20))] {
        if fields[name].is_null() {
            fields[name] = value;
        }
    }
    fields
}

pub(crate) async fn respond(server: &Server, fields: Value) -> Value {
    let answer = server.post(PATH, body(fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

pub(crate) fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().expect("a text")
}

fn id(object: &Value) -> &str {
    object["id"].as_str().expect("an id")
}

/// The events of a stream, whose names and numbers are as they must be.
pub(crate) fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let blocks = answer.body.split_terminator("\n\n").filter(|block| !block.starts_with(':'));
    let parse = |block: &str| {
        let (name, data) = block.split_once("\ndata: ").expect("an event with data");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
        data
    };
    blocks.map(parse).collect()
}

/// Every field of the object that the specification or a strict client wants.
const FIELDS: [&str; 35] = [
    "id",
    "object",
    "created_at",
    "completed_at",
    "status",
    "background",
    "error",
    "incomplete_details",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "model",
    "output",
    "parallel_tool_calls",
    "previous_response_id",
    "conversation",
    "prompt",
    "reasoning",
    "service_tier",
    "store",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
    "top_logprobs",
    "truncation",
    "usage",
    "user",
    "metadata",
    "presence_penalty",
    "frequency_penalty",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_response_says_what_the_whole_one_says() {
    let server = start(Options::default()).await;
    let whole = respond(&server, json!({"metadata": {"k": "v"}, "top_p": 0.5})).await;
    for field in FIELDS {
        assert!(whole.get(field).is_some(), "{field}");
    }
    assert_eq!((&whole["status"], &whole["temperature"]), (&json!("incomplete"), &json!(0)));
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!((&whole["top_p"], &whole["metadata"]), (&json!(0.5), &json!({"k": "v"})));
    assert_eq!(whole["usage"]["output_tokens"], 20);
    assert!(id(&whole).starts_with("resp_") && id(&whole["output"][0]).starts_with("msg_"));
    let answer = server.post(PATH, body(json!({"stream": true}))).await;
    let events = events(&answer);
    assert!(events.iter().zip(0..).all(|(event, i)| event["sequence_number"] == i));
    let deltas = events.iter().filter(|e| e["type"] == "response.output_text.delta");
    let streamed: String = deltas.filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(streamed, text(&whole));
    let last = events.last().expect("events");
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(text(&last["response"]), streamed);
    // What the stream said last is what is kept.
    let kept = server.get(&format!("{PATH}/{}", id(&last["response"]))).await.json();
    assert_eq!(kept, last["response"]);
    assert!(!answer.body.contains("[DONE]"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_follows_another_without_its_instructions() {
    let server = start(Options::default()).await;
    let first = respond(&server, json!({"instructions": "Be brief."})).await;
    let next = json!({"input": "Go on.", "previous_response_id": first["id"]});
    let next = respond(&server, next).await;
    assert_eq!(next["previous_response_id"], first["id"]);
    // The same as saying all of it at once.
    let spoken = json!({"input": [
        {"role": "user", "content": "Tell me."},
        {"role": "assistant", "content": text(&first)},
        {"role": "user", "content": "Go on."},
    ]});
    let spoken = respond(&server, spoken).await;
    assert_eq!(text(&next), text(&spoken));
    assert_eq!(next["usage"]["input_tokens"], spoken["usage"]["input_tokens"]);
    let items = server.get(&format!("{PATH}/{}/input_items", id(&spoken))).await.json();
    let roles: Vec<_> =
        items["data"].as_array().expect("items").iter().map(|i| i["role"].clone()).collect();
    assert_eq!(roles, ["user", "assistant", "user"]);
    assert_eq!(items["data"][0]["content"][0]["text"], "Go on.");
    // An item may be named instead of being said again.
    let named = json!({"input": [
        {"role": "user", "content": "Tell me."},
        {"type": "item_reference", "id": id(&first["output"][0])},
        {"role": "user", "content": "Go on."},
    ]});
    assert_eq!(text(&respond(&server, named).await), text(&next));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_stored_or_is_deleted_cannot_be_followed() {
    let server = start(Options::default()).await;
    let unstored = respond(&server, json!({"store": false})).await;
    let deleted = respond(&server, json!({})).await;
    let path = format!("{PATH}/{}", id(&deleted));
    let gone = server.ask("DELETE", &path, None, None).await.json();
    assert_eq!(gone, json!({"id": deleted["id"], "object": "response.deleted", "deleted": true}));
    for response in [unstored, deleted] {
        let path = format!("{PATH}/{}", id(&response));
        for path in [path.clone(), format!("{path}/input_items")] {
            assert_eq!(server.get(&path).await.status, 404);
        }
        let fields = json!({"previous_response_id": response["id"]});
        let next = server.post(PATH, body(fields)).await;
        assert_eq!((next.status, &next.error()["param"]), (400, &json!("previous_response_id")));
        assert_eq!(next.error()["code"], "previous_response_not_found");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_the_names_of_responses() {
    let server = start(Options::default()).await;
    for (fields, status, param) in [
        (json!({"foo": 1}), 400, json!("foo")),
        (json!({"max_output_tokens": 100_000}), 400, json!("max_output_tokens")),
        (json!({"input": "long ".repeat(10_000)}), 400, json!("input")),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), 400, json!("input[0].id")),
        // Where the instructions alone are too long, the input is not to blame.
        (json!({"instructions": "long ".repeat(10_000)}), 400, json!("instructions")),
        (json!({"instructions": "long ".repeat(50_000)}), 400, json!("instructions")),
        (json!({"instructions": "x", "input": "long ".repeat(10_000)}), 400, json!("input")),
        (json!({"conversation": "conv_x"}), 404, json!("conversation")),
    ] {
        let answer = server.post(PATH, body(fields)).await;
        assert_eq!((answer.status, &answer.error()["param"]), (status, &param), "{}", answer.body);
    }
    let mut unknown = body(json!({}));
    unknown["model"] = json!("gpt-5");
    assert_eq!(server.post(PATH, unknown).await.error()["code"], "model_not_found");
    let done = respond(&server, json!({})).await;
    let cancel = server.ask("POST", &format!("{PATH}/{}/cancel", id(&done)), None, None).await;
    assert_eq!(cancel.status, 400);
    assert_eq!(server.get(&format!("{PATH}/{}?stream=true", id(&done))).await.status, 400);
    assert_eq!(server.get(&format!("{PATH}/{}?x=1", id(&done))).await.error()["param"], "x");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_a_custom_tool_is_answered_and_followed() {
    let server = start(Options::default()).await;
    let dice = json!({"type": "custom", "name": "dice", "format": {
        "type": "grammar", "syntax": "regex", "definition": "[1-6]d[1-6]"}});
    let fields = json!({"tools": [dice], "max_output_tokens": 400,
                        "tool_choice": {"type": "custom", "name": "dice"}});
    let first = respond(&server, fields).await;
    let call = &first["output"][0];
    assert_eq!((&call["type"], &call["name"]), (&json!("custom_tool_call"), &json!("dice")));
    assert_eq!(call["input"].as_str().map(str::len), Some(3));
    let output = json!({"type": "custom_tool_call_output", "call_id": call["call_id"],
                        "output": "7"});
    // The call is in what came before, and wants an answer.
    for (fields, said) in [
        (json!({"input": [output]}), "No tool call found"),
        (json!({"previous_response_id": first["id"]}), "No tool output found"),
    ] {
        for path in [PATH, "/v1/responses/input_tokens"] {
            let fields = match path {
                PATH => body(fields.clone()),
                _ => json!({"model": MODEL, "input": body(fields.clone())["input"],
                            "previous_response_id": fields["previous_response_id"]}),
            };
            let refused = server.post(path, fields).await;
            let error = refused.error();
            assert_eq!((refused.status, &error["param"]), (400, &json!("input")), "{error}");
            let message = error["message"].as_str().expect("a text");
            let id = call["call_id"].as_str().expect("an id");
            assert!(message.contains(said) && message.contains(id), "{message}");
        }
    }
    let fields = json!({"input": [output], "previous_response_id": first["id"]});
    let next = respond(&server, fields).await;
    // The same as sending everything back.
    let told = json!({"role": "user", "content": "Tell me."});
    let spoken = respond(&server, json!({"input": [told, call, output]})).await;
    assert_eq!(text(&next), text(&spoken));
    assert_eq!(next["usage"]["input_tokens"], spoken["usage"]["input_tokens"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_says_what_it_had_and_where_it_waited() {
    let server = start(Options::default()).await;
    let shapes = [json!({}), json!({"stream": true}), json!({"background": true})];
    for mut fields in shapes {
        fields["service_tier"] = json!("flex");
        let mut fields = body(fields);
        fields["model"] = json!(ALIAS);
        let answer = server.post(PATH, fields).await;
        assert_eq!(answer.header("x-hearth-queue-position"), Some("0"));
        assert_eq!(answer.header("x-hearth-estimated-wait-ms"), Some("0"));
        assert!(answer.body.contains("\"service_tier\":\"flex\""), "{}", answer.body);
        assert!(answer.body.contains(&format!("\"model\":\"{MODEL}\"")), "{}", answer.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_counted_as_a_response_counts_them() {
    let server = start(Options::default()).await;
    let done = respond(&server, json!({"instructions": "Be."})).await;
    let fields = json!({"model": MODEL, "input": "Tell me.", "instructions": "Be."});
    let count = async |fields: Value| {
        let count = server.post("/v1/responses/input_tokens", fields).await.json();
        assert_eq!(count["object"], "response.input_tokens", "{count}");
        count["input_tokens"].clone()
    };
    assert_eq!(count(fields).await, done["usage"]["input_tokens"]);
    // What was said before counts, where it is read.
    let talk = json!({"items": [{"role": "user", "content": "Well?"}]});
    let talk = server.post("/v1/conversations", talk).await.json();
    for (name, value) in [("previous_response_id", &done["id"]), ("conversation", &talk["id"])] {
        let counted = count(json!({"model": MODEL, "input": "Go on.", name: value})).await;
        let answered = respond(&server, json!({"input": "Go on.", name: value})).await;
        assert_eq!(counted, answered["usage"]["input_tokens"], "{name}");
    }
    let nobody = json!({"input": "Tell me."});
    let refused = server.post("/v1/responses/input_tokens", nobody).await;
    assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("model")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_grows_with_its_responses() {
    let server = start(Options::default()).await;
    let fields = json!({"items": [{"role": "system", "content": "Be."}], "metadata": {"k": "v"}});
    let made = server.post("/v1/conversations", fields).await.json();
    assert_eq!((&made["object"], &made["metadata"]), (&json!("conversation"), &json!({"k": "v"})));
    let path = format!("/v1/conversations/{}", id(&made));
    assert_eq!(server.get(&path).await.json(), made);
    let first = respond(&server, json!({"conversation": made["id"]})).await;
    assert_eq!(first["conversation"], json!({"id": made["id"]}));
    let fields = json!({"conversation": {"id": made["id"]}, "input": "Go on."});
    let second = respond(&server, fields).await;
    let spoken = respond(
        &server,
        json!({"input": [
            {"role": "system", "content": "Be."}, {"role": "user", "content": "Tell me."},
            {"role": "assistant", "content": text(&first)}, {"role": "user", "content": "Go on."},
        ]}),
    );
    assert_eq!(text(&second), text(&spoken.await));
    let list = async |query: &str| server.get(&format!("{path}/items{query}")).await.json();
    let all = list("?order=asc&include[]=message.output_text.logprobs").await;
    let roles: Vec<_> =
        all["data"].as_array().expect("items").iter().map(|i| i["role"].clone()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!(all["data"][2], first["output"][0]);
    let newest = list("?limit=2").await;
    assert_eq!((&newest["data"][0], &newest["has_more"]), (&second["output"][0], &json!(true)));
    let item = format!("{path}/items/{}", id(&all["data"][2]));
    assert_eq!(server.get(&item).await.json(), first["output"][0]);
    assert_eq!(server.ask("DELETE", &item, None, None).await.json(), made);
    assert_eq!(server.get(&item).await.status, 404);
    let updated = server.post(&path, json!({"metadata": {}})).await.json();
    assert_eq!(updated["metadata"], json!({}));
    let gone = server.ask("DELETE", &path, None, None).await.json();
    assert_eq!(gone["object"], "conversation.deleted");
    assert_eq!(server.get(&format!("{path}/items")).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn items_of_a_conversation_are_checked_by_name() {
    let server = start(Options::default()).await;
    let made = server.post("/v1/conversations", json!({})).await.json();
    let path = format!("/v1/conversations/{}/items", id(&made));
    let user = json!({"role": "user", "content": "hi"});
    let added = server.post(&path, json!({"items": [user, user]})).await.json();
    assert_eq!((&added["object"], &added["has_more"]), (&json!("list"), &json!(false)));
    assert_eq!(added["last_id"], added["data"][1]["id"]);
    for (fields, param) in [
        (json!({}), "items"),
        (json!({"items": vec![user.clone(); 21]}), "items"),
        (json!({"items": [{"role": "user"}]}), "items[0].content"),
        (json!({"items": [{"type": "item_reference", "id": "x"}]}), "items[0].type"),
        (json!({"items": [added["data"][0]]}), "items"),
        (json!({"items": [], "x": 1}), "x"),
    ] {
        let answer = server.post(&path, fields).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(param)));
    }
    assert_eq!(server.get(&path).await.json()["data"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        server.post("/v1/conversations/conv_x/items", json!({"items": []})).await.status,
        404
    );
}

async fn poll(server: &Server, path: &str) -> Value {
    for _ in 0..500 {
        let response = server.get(path).await.json();
        if response["status"] != "queued" && response["status"] != "in_progress" {
            return response;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it never ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_in_the_background_is_polled_and_streamed_again() {
    let server = start(Options::default()).await;
    let queued = respond(&server, json!({"background": true})).await;
    assert_eq!((&queued["status"], &queued["output"]), (&json!("queued"), &json!([])));
    let path = format!("{PATH}/{}", id(&queued));
    let done = poll(&server, &path).await;
    assert_eq!(done["status"], "incomplete");
    assert_eq!(text(&done), text(&respond(&server, json!({})).await));
    let all = events(&server.get(&format!("{path}?stream=true")).await);
    let kinds: Vec<_> = all.iter().take(3).map(|event| event["type"].clone()).collect();
    assert_eq!(kinds, ["response.created", "response.queued", "response.in_progress"]);
    assert_eq!(all.last().expect("events")["response"], done);
    let rest = events(&server.get(&format!("{path}?stream=true&starting_after=4")).await);
    assert_eq!(rest, all[5..]);
    // One that is streamed from the start goes on when its client leaves.
    let fields = body(json!({"background": true, "stream": true, "max_output_tokens": 300}));
    let mut pending = server.begin(PATH, &fields).await;
    pending.wait_for("response.output_text.delta").await;
    let head = pending.so_far();
    let from = head.find("resp_").expect("an id");
    let path = format!("{PATH}/{}", &head[from..from + "resp_".len() + 32]);
    drop(pending);
    let done = poll(&server, &path).await;
    assert_eq!(done["usage"]["output_tokens"], 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_in_the_background_is_cancelled() {
    let server = start(Options::default()).await;
    let fields = json!({"background": true, "max_output_tokens": 30_000});
    let queued = respond(&server, fields).await;
    let path = format!("{PATH}/{}", id(&queued));
    server.wait_for_metric("hearth_requests_running", 1.0).await;
    let begun = async || server.get(&path).await.json()["status"] == "in_progress";
    for _ in 0..500 {
        if begun().await {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(begun().await, "what runs does not wait");
    let cancelled = server.ask("POST", &format!("{path}/cancel"), None, None).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    server.wait_for_metric("hearth_requests_running", 0.0).await;
    assert_eq!(server.get(&path).await.json()["status"], "cancelled");
    let again = server.ask("POST", &format!("{path}/cancel"), None, None).await;
    assert_eq!((again.status, again.json()["status"].clone()), (200, json!("cancelled")));
}

/// It has nowhere to go, and whoever polls for it must hear of that.
#[tokio::test(flavor = "multi_thread")]
async fn a_response_whose_conversation_goes_meanwhile_has_failed() {
    let server = start(Options::default()).await;
    let conversation = server.post("/v1/conversations", json!({})).await.json();
    let fields = json!({"background": true, "max_output_tokens": 2000,
        "conversation": conversation["id"]});
    let path = format!("{PATH}/{}", id(&respond(&server, fields).await));
    let gone = format!("/v1/conversations/{}", id(&conversation));
    assert_eq!(server.ask("DELETE", &gone, None, None).await.json()["deleted"], true);
    let done = poll(&server, &path).await;
    assert_eq!(
        (&done["status"], &done["error"]["code"]),
        (&json!("failed"), &json!("server_error"))
    );
    assert!(done["error"]["message"].as_str().is_some_and(|text| text.contains("conversation")));
}
