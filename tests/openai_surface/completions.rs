//! Legacy completions over the wire: the forms of a prompt, its scores, its cache, the best of
//! many.

use serde_json::{Value, json};

use crate::fixture::{MODEL, Options, start};
use crate::{greedy, streamed_text};

#[tokio::test(flavor = "multi_thread")]
async fn prompts_come_in_four_forms_and_choices_in_prompt_major_order() {
    let server = start(Options::default()).await;
    let text = |answer: &Value, i: usize| answer["choices"][i]["text"].clone();
    let a = server.complete(greedy(20, json!({"prompt": "Once"}))).await.json();
    let b = server.complete(greedy(20, json!({"prompt": "Upon"}))).await.json();
    assert!(a["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")));
    assert_ne!(text(&a, 0), text(&b, 0));
    // The tokenizer's ids are the bytes.
    let ids = json!([b"Once", b"Upon"]);
    for prompt in [json!(["Once", "Upon"]), ids.clone()] {
        let both = server.complete(greedy(20, json!({"prompt": prompt, "n": 2}))).await.json();
        let texts: Vec<_> = (0..4).map(|i| text(&both, i)).collect();
        assert_eq!(texts, [text(&a, 0), text(&a, 0), text(&b, 0), text(&b, 0)]);
        assert_eq!(both["usage"]["prompt_tokens"], 8);
        assert_eq!(both["usage"]["completion_tokens"], 80);
    }
    let one = server.complete(greedy(20, json!({"prompt": ids[0]}))).await.json();
    assert_eq!(text(&one, 0), text(&a, 0));

    let fields = json!({"prompt": ["Once", "Upon"], "stream": true});
    let chunks = server.complete(greedy(20, fields)).await.chunks();
    assert_eq!(streamed_text(&chunks, 0), text(&a, 0));
    assert_eq!(streamed_text(&chunks, 1), text(&b, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn text_offsets_point_into_the_text() {
    let server = start(Options::default()).await;
    // A special token, which the text does not show, then "Hé".
    let prompt = json!([260, b'H', 0xc3, 0xa9]);
    let fields = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 0});
    let choice = &server.complete(fields).await.json()["choices"][0];
    assert_eq!(choice["text"], "Hé");
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 1, 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn long_prompts_take_turns_and_all_are_answered() {
    let server = start(Options::default()).await;
    let long = "word ".repeat(40_000);
    let fields = json!({"prompt": long, "max_tokens": 1});
    let answers = (0..6).map(|_| server.complete(fields.clone()));
    for answer in futures_util::future::join_all(answers).await {
        assert_eq!(
            (answer.status, &answer.error()["code"]),
            (400, &json!("context_length_exceeded"))
        );
    }
    assert_eq!(server.complete(json!({"prompt": "short", "max_tokens": 1})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_comes_back_is_no_first_token() {
    let server = start(Options::default()).await;
    let fields = json!({"prompt": "Once upon", "max_tokens": 1, "echo": true, "ignore_eos": true});
    let answer = server.complete(greedy(1, fields)).await.json();
    let text = answer["choices"][0]["text"].as_str().expect("a text");
    assert!(text.starts_with("Once upon") && text.len() > 9, "{answer}");
    server.wait_for_metric("hearth_time_to_first_token_seconds_count", 1.0).await;
    let metrics = server.get("/metrics").await.body;
    let mut pauses = metrics.lines().filter(|l| l.starts_with("hearth_inter_token_seconds_count"));
    assert!(pauses.all(|line| line.ends_with(" 0")), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_can_be_scored_without_generating() {
    let server = start(Options::default()).await;
    let fields = json!({"prompt": "Once upon", "max_tokens": 0, "echo": true, "logprobs": 3});
    let scored = server.complete(fields).await.json();
    let choice = &scored["choices"][0];
    assert_eq!(choice["text"], "Once upon");
    assert_eq!(choice["finish_reason"], "length");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().map(Vec::len), Some(9));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4, 5, 6, 7, 8]));
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    for i in 1..9 {
        let own = logprobs["token_logprobs"][i].as_f64().expect("a number");
        let top = logprobs["top_logprobs"][i].as_object().expect("alternatives");
        let name = logprobs["tokens"][i].as_str().expect("a text");
        assert!(own < 0.0 && top[name].as_f64() == Some(own) && (3..=4).contains(&top.len()));
    }
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_was_seen_is_cached_and_usage_says_so() {
    let server = start(Options::default()).await;
    let prompt = "the same long beginning ".repeat(20);
    let complete = async |rest: &str| {
        let body = json!({
            "model": MODEL, "prompt": format!("{prompt}{rest}"), "max_tokens": 3, "temperature": 0,
        });
        let answer = server.post("/v1/completions", body).await.json();
        let details = &answer["usage"]["prompt_tokens_details"];
        (details["cached_tokens"].as_u64().unwrap(), answer["usage"]["prompt_tokens"].clone())
    };
    // A byte is a token here, and a block has sixteen.
    assert_eq!(complete("one").await, (0, json!(483)));
    assert_eq!(complete("two").await, (480, json!(483)));
    let chat = async || server.chat(greedy(2, json!({}))).await.json();
    assert_eq!(chat().await["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let again = chat().await;
    let prompt_tokens = again["usage"]["prompt_tokens"].as_u64().unwrap();
    let cached = (prompt_tokens - 1) / 16 * 16;
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], cached);
    server.wait_for_metric("hearth_prefix_cache_hit_tokens_total", 480.0 + cached as f64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_best_of_several_is_the_likeliest_and_all_are_counted() {
    let server = start(Options::default()).await;
    let ask = async |fields: Value| {
        let mut body = json!({
            "model": MODEL, "prompt": "abc", "max_tokens": 8, "temperature": 1.5, "seed": 11,
            "ignore_eos": true,
        });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.post("/v1/completions", body).await.json()
    };
    let all = ask(json!({"n": 5, "logprobs": 0})).await;
    let mean = |choice: &Value| {
        let list = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        list.iter().map(|l| l.as_f64().unwrap()).sum::<f64>() / list.len() as f64
    };
    let mut choices = all["choices"].as_array().unwrap().clone();
    choices.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let best = ask(json!({"n": 2, "best_of": 5})).await;
    let texts = |list: &[Value]| list.iter().map(|c| c["text"].clone()).collect::<Vec<_>>();
    let given = best["choices"].as_array().unwrap();
    assert_eq!(texts(given), texts(&choices[..2]));
    assert_eq!(given[0]["logprobs"], Value::Null, "they were not asked for");
    assert_eq!(best["usage"]["completion_tokens"], 40);
    assert_eq!(best["usage"]["prompt_tokens"], 3);
}
