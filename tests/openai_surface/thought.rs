//! Thought over a real socket: told apart from the answer, counted, kept, and switched off.
//!
//! The template opens a thought that the random model never closes, so all it says is thought
//! unless the template is told otherwise.

use serde_json::{Value, json};

use crate::fixture::{MODEL, Options, Server, start};
use crate::greedy;
use crate::responses::{PATH, body, events, respond};

/// As those of Qwen3 and DeepSeek R1 are made.
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}\
    {{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\
    {% if enable_thinking is defined and not enable_thinking %}\n</think>\n{% endif %}{% endif %}";

async fn thinker() -> Server {
    start(Options { template: TEMPLATE, ..Options::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thought_is_told_apart_from_the_answer_and_can_be_switched_off() {
    let server = thinker().await;
    let whole = server.chat(greedy(20, json!({}))).await.json();
    let message = &whole["choices"][0]["message"];
    let thought = message["reasoning_content"].as_str().expect("a thought");
    assert!(!thought.is_empty() && message["content"] == "", "{message}");
    assert_eq!(message["reasoning"], thought);
    let counted = |answer: &Value| {
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().expect("a count")
    };
    assert_eq!(counted(&whole), 20);
    let chunks = server.chat(greedy(20, json!({"stream": true}))).await.chunks();
    for name in ["reasoning_content", "reasoning"] {
        let parts = chunks.iter().filter_map(|c| c["choices"][0]["delta"][name].as_str());
        assert_eq!(parts.collect::<String>(), thought);
    }
    assert!(chunks.iter().all(|c| c["choices"][0]["delta"]["content"].as_str() != Some(thought)));

    let mut texts = Vec::new();
    for fields in [
        json!({"reasoning_effort": "none"}),
        json!({"reasoning_effort": "minimal"}),
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
    ] {
        let answer = server.chat(greedy(20, fields)).await.json();
        let message = &answer["choices"][0]["message"];
        assert!(message.get("reasoning_content").is_none(), "{message}");
        assert_eq!(counted(&answer), 0);
        texts.push(message["content"].clone());
    }
    assert!(texts[0] != "" && texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    let high = server.chat(greedy(20, json!({"reasoning_effort": "high"}))).await.json();
    assert_eq!(high["choices"][0]["message"]["reasoning_content"], thought);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_keeps_its_thought_as_an_item_that_can_be_sent_back() {
    let server = thinker().await;
    let response = respond(&server, json!({})).await;
    let item = &response["output"][0];
    let text = item["content"][0]["text"].as_str().expect("a thought");
    assert_eq!((&item["type"], &item["summary"]), (&json!("reasoning"), &json!([])));
    assert_eq!(item["content"][0]["type"], "reasoning_text");
    assert!(item["encrypted_content"].is_null() && !text.is_empty());
    assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 20);
    let events = events(&server.post(PATH, body(json!({"stream": true}))).await);
    let parts = events.iter().filter(|event| event["type"] == "response.reasoning_text.delta");
    assert_eq!(parts.filter_map(|event| event["delta"].as_str()).collect::<String>(), text);
    let none = respond(&server, json!({"reasoning": {"effort": "none"}})).await;
    assert_eq!(none["output"][0]["type"], "message");

    // Sealed, it says the same to whoever made it, and nothing to anybody else.
    let include = json!({"store": false, "include": ["reasoning.encrypted_content"]});
    let sealed = respond(&server, include).await["output"][0].clone();
    assert_eq!(sealed["content"], item["content"]);
    let thought =
        |field: &str, value: &Value| json!({"type": "reasoning", "summary": [], field: value});
    let count = async |thought: Option<Value>| {
        let mut input = vec![json!({"role": "user", "content": "Well?"})];
        input.extend(thought);
        input.push(json!({"role": "assistant", "content": "So."}));
        let fields = json!({"model": MODEL, "input": input});
        let count = server.post("/v1/responses/input_tokens", fields).await.json();
        count["input_tokens"].as_u64().unwrap_or_else(|| panic!("{count}"))
    };
    let with = count(Some(thought("content", &item["content"]))).await;
    assert_eq!(count(Some(thought("encrypted_content", &sealed["encrypted_content"]))).await, with);
    assert!(with > count(None).await);
    assert_eq!(count(Some(thought("encrypted_content", &json!("gAAAA")))).await, count(None).await);
}
