//! Golden answers: the exact bytes of chunk sequences, and whole objects.

use super::*;
use crate::pipeline::{Prediction, TopLogprob};
use crate::types::Timings;

fn envelope(shape: Shape, prompts: usize, n: usize) -> Envelope {
    Envelope {
        tier: "default",
        shape,
        in_old_words: false,
        id: "id-1".into(),
        created_s: 1700000000,
        model: "m".into(),
        fingerprint: "fp_1".into(),
        n,
        shown: n,
        prompts,
        prompt_tokens: 7,
        logprobs: false,
        prompt_ids: None,
    }
}

fn delta(choice: usize, text: &str) -> TextEvent {
    TextEvent::Delta { choice, text: text.into(), logprobs: vec![] }
}

fn finished(choice: usize, reason: FinishReason, cached: usize, completion: usize) -> TextEvent {
    let usage = Usage { prompt: 7, cached, completion };
    let (reasoning_tokens, timings) = (2 * choice, Timings::default());
    let prediction = Prediction { accepted: 5 * choice, rejected: choice };
    let stop = None;
    TextEvent::Finished { choice, reason, stop, usage, reasoning_tokens, prediction, timings }
}

fn stream(envelope: Envelope, include_usage: bool, events: Vec<TextEvent>) -> String {
    let mut chunks = Chunks::new(envelope, StreamOptions { include_usage });
    let mut out = Vec::new();
    for event in events {
        chunks.event(event, &mut out);
    }
    chunks.end(&mut out);
    String::from_utf8(out).unwrap()
}

const CHAT: &str = r#"data: {"id":"id-1","object":"chat.completion.chunk","created":1700000000,"#;
const COMPLETION: &str = r#"data: {"id":"id-1","object":"text_completion","created":1700000000,"#;

#[test]
fn a_chat_stream_is_role_then_text_then_reason_then_done() {
    let events = vec![delta(0, "Hel"), delta(0, "lo\n"), finished(0, FinishReason::Stop, 0, 3)];
    let got = stream(envelope(Shape::Chat, 1, 1), false, events);
    let head = CHAT.to_owned()
        + r#""model":"m","service_tier":"default","system_fingerprint":"fp_1","choices":"#;
    let role = r#"[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"#;
    let rest = r#""logprobs":null,"finish_reason":null}]}"#;
    let expected = format!(
        "{head}{role}{rest}\n\n\
         {head}[{{\"index\":0,\"delta\":{{\"content\":\"Hel\"}},{rest}\n\n\
         {head}[{{\"index\":0,\"delta\":{{\"content\":\"lo\\n\"}},{rest}\n\n\
         {head}[{{\"index\":0,\"delta\":{{}},\"logprobs\":null,\"finish_reason\":\"stop\"}}]}}\n\n\
         data: [DONE]\n\n"
    );
    assert_eq!(got, expected);
}

#[test]
fn a_completion_stream_repeats_the_whole_object() {
    let events = vec![delta(0, "a"), finished(0, FinishReason::Length, 0, 1)];
    let got = stream(envelope(Shape::Completion, 1, 1), false, events);
    let head = COMPLETION.to_owned() + r#""model":"m","system_fingerprint":"fp_1","choices":"#;
    let expected = format!(
        "{head}[{{\"text\":\"a\",\"index\":0,\"logprobs\":null,\"finish_reason\":null}}]}}\n\n\
         {head}[{{\"text\":\"\",\"index\":0,\"logprobs\":null,\"finish_reason\":\"length\"}}]}}\n\n\
         data: [DONE]\n\n"
    );
    assert_eq!(got, expected);
}

/// The JSON values of a stream, `[DONE]` checked and taken off.
fn values(stream: &str) -> Vec<Value> {
    let mut lines: Vec<_> = stream.split_terminator("\n\n").collect();
    assert_eq!(lines.pop(), Some("data: [DONE]"));
    lines.iter().map(|l| serde_json::from_str(l.strip_prefix("data: ").unwrap()).unwrap()).collect()
}

#[test]
fn usage_is_null_in_every_chunk_and_told_in_one_more() {
    let events = vec![delta(0, "a"), finished(0, FinishReason::Stop, 4, 2)];
    let mut chunks = values(&stream(envelope(Shape::Chat, 1, 1), true, events));
    let last = chunks.pop().unwrap();
    assert_eq!(chunks.len(), 3);
    for chunk in &chunks {
        assert!(chunk.as_object().unwrap().contains_key("usage") && chunk["usage"].is_null());
    }
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"],
        json!({
            "prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0, "audio_tokens": 0,
                "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
            },
        })
    );
}

#[test]
fn choices_interleave_and_each_begins_with_its_role() {
    let events = vec![
        delta(1, "x"),
        delta(0, "a"),
        finished(1, FinishReason::Stop, 4, 1),
        delta(0, "b"),
        finished(0, FinishReason::Length, 0, 2),
    ];
    let chunks = values(&stream(envelope(Shape::Chat, 1, 2), true, events));
    let seen: Vec<_> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"].get(0))
        .map(|c| (c["index"].as_u64().unwrap(), c["delta"]["role"] == "assistant"))
        .collect();
    let expected =
        [(1, true), (1, false), (0, true), (0, false), (1, false), (0, false), (0, false)];
    assert_eq!(seen, expected);
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(usage["prompt_tokens"], 7);
    assert_eq!(usage["completion_tokens"], 3);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    let details = &usage["completion_tokens_details"];
    assert_eq!(details["accepted_prediction_tokens"], 5);
    assert_eq!(details["rejected_prediction_tokens"], 1);
}

#[test]
fn a_choice_without_text_still_has_its_role() {
    let events = vec![finished(0, FinishReason::Stop, 0, 1)];
    let chunks = values(&stream(envelope(Shape::Chat, 1, 1), false, events));
    assert_eq!(chunks.len(), 2);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks[1]["choices"][0]["finish_reason"], "stop");
}

#[test]
fn a_stream_that_breaks_off_ends_with_an_error_and_is_not_done() {
    let got = stream(envelope(Shape::Chat, 1, 1), false, vec![delta(0, "a")]);
    assert!(!got.contains("[DONE]"));
    let last = got.split_terminator("\n\n").last().unwrap().strip_prefix("data: ").unwrap();
    let error: Value = serde_json::from_str(last).unwrap();
    assert_eq!(error["error"]["type"], "server_error");
    assert!(Whole::new(envelope(Shape::Chat, 1, 1)).end().is_err());
}

#[test]
fn a_whole_chat_has_every_required_key() {
    let mut whole = Whole::new(envelope(Shape::Chat, 1, 1));
    let events = [delta(0, "Hel"), delta(0, "lo"), finished(0, FinishReason::Stop, 0, 3)];
    events.into_iter().for_each(|event| whole.event(event));
    let expected = r#"{"id":"id-1","object":"chat.completion","created":1700000000,"model":"m","#
        .to_owned()
        + r#""service_tier":"default","system_fingerprint":"fp_1","choices":[{"index":0,"#
        + r#""message":{"role":"assistant","content":"Hello","refusal":null,"annotations":[]},"#
        + r#""logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"#
        + r#""completion_tokens":3,"total_tokens":10,"prompt_tokens_details":{"cached_tokens":0,"#
        + r#""audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"#
        + r#""audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}"#;
    assert_eq!(whole.end().unwrap().to_string(), expected);
}

fn scored(choice: usize, text: &str, logprob: f32) -> TextEvent {
    let bytes = text.as_bytes().to_vec();
    let top = vec![TopLogprob { id: 1, text: text.into(), bytes: bytes.clone(), logprob }];
    let (chars, logprob) = (text.chars().count(), Some(logprob));
    let token = TokenLogprob { id: 1, text: text.into(), bytes, chars, logprob, top };
    TextEvent::Delta { choice, text: text.into(), logprobs: vec![token] }
}

#[test]
fn streamed_logprobs_are_the_whole_ones_in_pieces() {
    let events =
        || vec![scored(0, "ab", -0.5), scored(0, "c", -1.0), finished(0, FinishReason::Stop, 0, 2)];
    for shape in [Shape::Chat, Shape::Completion] {
        let mut envelope = envelope(shape, 1, 1);
        envelope.logprobs = true;
        let mut whole = Whole::new(envelope.clone());
        events().into_iter().for_each(|event| whole.event(event));
        let whole = whole.end().unwrap();
        let whole = whole["choices"][0]["logprobs"].as_object().unwrap();
        let chunks = values(&stream(envelope, false, events()));
        for (key, list) in whole.iter().filter(|(_, value)| value.is_array()) {
            let pieces = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"][key].as_array());
            assert_eq!(Value::Array(pieces.flatten().cloned().collect()), *list, "{key}");
            assert_eq!(list.as_array().unwrap().len(), 2);
        }
        if shape == Shape::Completion {
            assert_eq!(whole["text_offset"], json!([0, 2]));
        }
    }
}

#[test]
fn prompts_of_one_completion_are_counted_each_and_ordered() {
    let mut whole = Whole::new(envelope(Shape::Completion, 2, 2));
    for choice in [3, 1, 0, 2] {
        whole.event(delta(choice, &choice.to_string()));
        // The first prompt's choices found 1 and 2 cached tokens, the second's 3 and 4.
        whole.event(finished(choice, FinishReason::Length, choice + 1, 5));
    }
    let whole = whole.end().unwrap();
    let texts: Vec<_> = whole["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
    assert_eq!(texts, ["0", "1", "2", "3"]);
    assert_eq!(whole["usage"]["completion_tokens"], 20);
    assert_eq!(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 1 + 3);
}

/// Thought, words, a call of a function and one of a custom tool.
fn calling() -> Vec<TextEvent> {
    let reasoning =
        |text: &str| TextEvent::Reasoning { choice: 0, text: text.into(), logprobs: vec![] };
    let call = |index, name: &str, custom| TextEvent::ToolCall {
        choice: 0,
        index,
        id: format!("call_{index}"),
        name: name.into(),
        custom,
    };
    let arguments = |index, text: &str| TextEvent::ToolArguments {
        choice: 0,
        index,
        text: text.into(),
        logprobs: vec![],
    };
    vec![
        reasoning("h"),
        reasoning("m"),
        call(0, "f", false),
        arguments(0, "{\"a\""),
        arguments(0, ":1}"),
        call(1, "sql", true),
        arguments(1, "SELECT 1"),
        finished(0, FinishReason::ToolCalls, 0, 9),
    ]
}

#[test]
fn streamed_calls_name_themselves_once_and_grow() {
    let chunks = values(&stream(envelope(Shape::Chat, 1, 1), false, calling()));
    let deltas: Vec<Value> = chunks.iter().map(|c| c["choices"][0]["delta"].clone()).collect();
    assert_eq!(deltas[1], json!({"reasoning_content": "h", "reasoning": "h"}));
    let first = json!([{"id": "call_0", "type": "function",
                        "function": {"name": "f", "arguments": ""}, "index": 0}]);
    assert_eq!(deltas[3]["tool_calls"], first);
    let more = json!([{"index": 0, "function": {"arguments": "{\"a\""}}]);
    assert_eq!(deltas[4], json!({"tool_calls": more}));
    assert_eq!(deltas[6]["tool_calls"][0]["custom"], json!({"name": "sql", "input": ""}));
    assert_eq!(deltas[7], json!({"tool_calls": [{"index": 1, "custom": {"input": "SELECT 1"}}]}));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn a_whole_chat_with_calls_has_no_content_and_tells_its_thought() {
    let mut whole = Whole::new(envelope(Shape::Chat, 1, 1));
    calling().into_iter().for_each(|event| whole.event(event));
    let whole = whole.end().unwrap();
    let message = &whole["choices"][0]["message"];
    assert!(message["content"].is_null() && message["refusal"].is_null());
    assert_eq!(message["reasoning_content"], "hm");
    assert_eq!(
        message["tool_calls"][0]["function"],
        json!({"name": "f", "arguments": "{\"a\":1}"})
    );
    assert_eq!(message["tool_calls"][1]["custom"], json!({"name": "sql", "input": "SELECT 1"}));
    assert_eq!(message["tool_calls"][0]["id"], "call_0");
}

#[test]
fn the_best_of_many_are_shown_and_all_are_counted() {
    let mut envelope = envelope(Shape::Completion, 2, 3);
    envelope.shown = 2;
    let mut whole = Whole::new(envelope);
    for (choice, logprob) in [-3.0, -1.0, -2.0, -1.0, -2.0, -3.0].into_iter().enumerate() {
        whole.event(scored(choice, &choice.to_string(), logprob));
        whole.event(finished(choice, FinishReason::Length, 0, 5));
    }
    let whole = whole.end().unwrap();
    let texts: Vec<_> = whole["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
    assert_eq!(texts, ["1", "2", "3", "4"]);
    assert_eq!(whole["choices"][3]["index"], 3);
    assert!(whole["choices"][0]["logprobs"].is_null());
    assert_eq!(whole["usage"]["completion_tokens"], 30);
}

/// A whole answer is written choice by choice, and is the object.
#[test]
fn what_is_written_is_the_object() {
    for (shape, old) in [(Shape::Chat, false), (Shape::Chat, true), (Shape::Completion, false)] {
        let mut envelope = envelope(shape, 2, 3);
        (envelope.shown, envelope.logprobs, envelope.in_old_words) = (2, true, old);
        envelope.prompt_ids = Some(vec![vec![1, 2], vec![3]]);
        let whole = || {
            let mut whole = Whole::new(envelope.clone());
            for choice in 0..6 {
                if choice % 3 == 0 {
                    let token = || match scored(choice, "p", -1.0) {
                        TextEvent::Delta { logprobs, .. } => logprobs,
                        other => panic!("{other:?}"),
                    };
                    whole.event(TextEvent::Prompt { choice, tokens: token() });
                }
                whole.event(scored(choice, &format!("{choice} \"words\""), -(choice as f32)));
                whole.event(finished(choice, FinishReason::Stop, 0, 2));
            }
            whole
        };
        let (object, bytes) = (whole().end().unwrap(), whole().bytes().unwrap());
        assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), object);
        let scores = match shape {
            Shape::Chat => &object["prompt_logprobs"],
            Shape::Completion => &object["choices"][3]["prompt_logprobs"],
        };
        assert!(scores[0].is_object(), "the first choice has them for all: {object}");
    }
    assert!(Whole::new(envelope(Shape::Chat, 1, 1)).bytes().is_err());
}
