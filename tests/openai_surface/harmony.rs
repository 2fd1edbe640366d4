//! OpenAI's harmony format over a real socket: a random model whose template and tokens are those
//! of gpt-oss. Its files name the end of a message as that of an answer, as some do.

use serde_json::{Value, json};

use crate::fixture::{MODEL, Options, Server, start, with_model};
use crate::greedy;
use crate::responses::{PATH, events};

const TEMPLATE: &str = "<|start|>system<|message|>Reasoning: \
    {{ reasoning_effort | default('medium') }}<|end|>\
    {% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}\
    {% for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}\
    {% if m.thinking and m.content %}{{ raise_exception('one of both') }}{% endif %}\
    {% if m.thinking or m.content %}<|start|>assistant<|channel|>analysis<|message|>\
    {{ m.thinking or m.content }}<|end|>{% endif %}\
    <|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>\
    {{ call.arguments | tojson }}<|call|>\
    {% else %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>\
    {{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}\
    {% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}";

const SPECIAL: [&str; 8] = [
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|constrain|>",
    "<|call|>",
    "<|return|>",
    "<|endoftext|>",
];

fn id(mark: &str) -> usize {
    256 + SPECIAL.iter().position(|special| *special == mark).expect("a mark")
}

async fn speaker() -> Server {
    start(Options { template: TEMPLATE, special: SPECIAL, eos: "<|end|>", ..Options::default() })
        .await
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rio", "台北"]}, "celsius": {"type": "boolean"}},
            "required": ["city", "celsius"], "additionalProperties": false}}},
        {"type": "custom", "custom": {"name": "dice", "format": {
            "type": "grammar", "grammar": {"syntax": "regex", "definition": "[1-6]d[1-6]"}}}},
    ])
}

/// Thoughts come to an end, and come at all more or less often: their channel is the one with this
/// first letter. So are the tools called by turns.
fn brief(mut fields: Value) -> Value {
    let seed = fields["seed"].as_u64().unwrap_or(0);
    let thinks = [-20, 1, 3, 6][seed as usize % 4];
    let other = if seed % 8 < 4 { b'd' } else { b'g' };
    fields["temperature"] = json!(2.0);
    fields["logit_bias"] = json!({id("<|end|>").to_string(): 8, b'a'.to_string(): thinks,
                                  other.to_string(): -20});
    fields["max_tokens"] = json!(600);
    fields
}

/// A thought that found no end has nothing behind it.
fn is_cut(choice: &Value) -> bool {
    let message = &choice["message"];
    let cut = choice["finish_reason"] == "length";
    if cut {
        assert!(message["reasoning_content"].is_string() && message["content"] == "", "{choice}");
        assert!(message.get("tool_calls").is_none(), "{choice}");
    }
    cut
}

/// A call of the right form.
fn check(call: &Value) {
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")), "{call}");
    if call["type"] == "custom" {
        let input = call["custom"]["input"].as_str().expect("a text");
        assert!(input.len() == 3 && input.as_bytes()[1] == b'd', "{call}");
        return;
    }
    let arguments = call["function"]["arguments"].as_str().expect("a text");
    let arguments: Value = serde_json::from_str(arguments).expect("JSON");
    assert!(arguments["city"] == "Rio" || arguments["city"] == "台北", "{arguments}");
    assert!(arguments["celsius"].is_boolean() && call["function"]["name"] == "get_weather");
}

/// The parts of a streamed choice put together, and why it ended.
fn add_up(chunks: &[Value]) -> (Value, Value, usize) {
    let (mut content, mut thought, mut tokens) = (String::new(), String::new(), 0);
    let mut calls: Vec<Value> = Vec::new();
    for chunk in chunks {
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        thought += delta["reasoning_content"].as_str().unwrap_or_default();
        tokens += choice["logprobs"]["content"].as_array().map_or(0, Vec::len);
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            if call["id"].is_string() {
                calls.push(call.clone());
                calls.last_mut().and_then(Value::as_object_mut).expect("a call").remove("index");
                continue;
            }
            let last = calls.last_mut().expect("a call");
            for (kind, text) in [("function", "arguments"), ("custom", "input")] {
                if let Some(more) = call[kind][text].as_str() {
                    let all = last[kind][text].as_str().expect("a text");
                    last[kind][text] = json!(format!("{all}{more}"));
                }
            }
        }
    }
    let last = chunks.last().expect("chunks");
    let message = json!({"content": content, "reasoning_content": thought, "tool_calls": calls});
    (message, last["choices"][0]["finish_reason"].clone(), tokens)
}

/// The same of a whole message, without the ids of its calls.
fn same(message: &Value) -> Value {
    let text = |name: &str| json!(message[name].as_str().unwrap_or_default());
    let mut calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
    calls.iter_mut().for_each(|call| call["id"] = json!("call_"));
    json!({"content": text("content"), "reasoning_content": text("reasoning_content"),
           "tool_calls": calls})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_call_comes_behind_thoughts_and_streams_as_it_is() {
    let server = speaker().await;
    let (mut thoughts, mut customs, mut functions) = (0, 0, 0);
    for seed in 0..16 {
        let fields = |stream: bool| {
            brief(json!({"tools": tools(), "tool_choice": "required", "seed": seed,
                         "logprobs": true, "stream": stream, "return_token_ids": !stream}))
        };
        let answer = server.chat(fields(false)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let answer = answer.json();
        let choice = &answer["choices"][0];
        let message = &choice["message"];
        if is_cut(choice) {
            continue;
        }
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        assert!(message["content"].is_null(), "{message}");
        assert_eq!(message["tool_calls"].as_array().map(Vec::len), Some(1));
        check(&message["tool_calls"][0]);
        let custom = message["tool_calls"][0]["type"] == "custom";
        *(if custom { &mut customs } else { &mut functions }) += 1;
        // Thought is counted, and is nothing but what was thought.
        let ids: Vec<u64> = choice["token_ids"]
            .as_array()
            .expect("tokens")
            .iter()
            .map(|id| id.as_u64().expect("a token"))
            .collect();
        let ends = ids.iter().filter(|&&token| token == id("<|end|>") as u64).count();
        let counted = &answer["usage"]["completion_tokens_details"]["reasoning_tokens"];
        let thought = message["reasoning_content"].as_str();
        assert_eq!(counted.as_u64().is_some_and(|n| n > 0), ends > 0, "{answer}");
        thoughts += usize::from(thought.is_some());
        let seen = [thought.unwrap_or_default(), &message["tool_calls"].to_string()].concat();
        assert!(!seen.contains("commentary") && !seen.contains("functions."), "{seen}");

        let chunks = server.chat(fields(true)).await.chunks();
        let (streamed, reason, tokens) = add_up(&chunks);
        assert_eq!(same(&streamed), same(message));
        assert_eq!(reason, choice["finish_reason"]);
        assert_eq!(Some(tokens), choice["logprobs"]["content"].as_array().map(Vec::len));
    }
    assert!(thoughts > 0 && customs > 0 && functions > 0, "{thoughts}, {customs}, {functions}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_function_is_the_only_one_that_is_called() {
    let server = speaker().await;
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    let mut calls = 0;
    for seed in 0..4 {
        let fields = json!({"tools": tools(), "tool_choice": named, "seed": seed});
        let choice = server.chat(brief(fields)).await.json()["choices"][0].clone();
        if is_cut(&choice) {
            continue;
        }
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        let call = &choice["message"]["tool_calls"][0];
        assert_eq!(call["function"]["name"], "get_weather");
        check(call);
        calls += 1;
    }
    assert!(calls > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_is_that_of_the_words_behind_the_thought() {
    let server = speaker().await;
    let schema = json!({"type": "object", "properties": {"n": {"enum": [1, 2]}},
                        "required": ["n"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    let mut thoughts = 0;
    let choice = async |fields: Value| {
        let choice = server.chat(brief(fields)).await.json()["choices"][0].clone();
        (!is_cut(&choice)).then_some(choice)
    };
    for seed in 0..8 {
        let Some(words) = choice(json!({"response_format": format, "seed": seed})).await else {
            continue;
        };
        let text = words["message"]["content"].as_str().expect("a text");
        let object: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!(object["n"] == 1 || object["n"] == 2, "{text}");
        assert_eq!(words["finish_reason"], "stop");
        thoughts += usize::from(words["message"]["reasoning_content"].is_string());
        if let Some(words) = choice(json!({"guided_choice": ["yes", "no"], "seed": seed})).await {
            let text = &words["message"]["content"];
            assert!(text == "yes" || text == "no", "{text}");
        }
        // With tools it is the form, or a call.
        let fields = json!({"response_format": format, "seed": seed, "tools": tools()});
        let Some(either) = choice(fields).await else { continue };
        match either["message"]["tool_calls"].get(0) {
            Some(call) => check(call),
            None => {
                let text = either["message"]["content"].as_str().expect("a text");
                let object: Value = serde_json::from_str(text).expect("JSON");
                assert!(object["n"].is_u64(), "{text}");
            }
        }
    }
    assert!(thoughts > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_that_may_be_called_are_called_as_they_should_or_not_at_all() {
    let server = speaker().await;
    let (mut called, mut spoke) = (0, 0);
    for seed in 0..12 {
        let mut fields = brief(json!({"tools": tools(), "seed": seed}));
        fields["logit_bias"][id("<|return|>").to_string()] = json!(4);
        let choice = server.chat(fields).await.json()["choices"][0].clone();
        let message = &choice["message"];
        match message["tool_calls"].get(0) {
            Some(call) => {
                check(call);
                assert_eq!(choice["finish_reason"], "tool_calls");
                called += 1;
            }
            None => {
                assert!(message["content"].is_string() && choice["finish_reason"] != "tool_calls");
                spoke += 1;
            }
        }
    }
    assert!(called > 0 && spoke > 0, "{called} calls, {spoke} without");
    // Where none may be called, the model is not told of them, and nothing is a call.
    for seed in 0..4 {
        let mut fields = brief(json!({"tools": tools(), "tool_choice": "none", "seed": seed}));
        fields["max_tokens"] = json!(60);
        let choice = server.chat(fields).await.json()["choices"][0].clone();
        assert!(choice["message"].get("tool_calls").is_none(), "{choice}");
    }
}

/// Free of any form a random model writes heads, marks and text in any order.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_written_streams_as_it_is_and_shows_no_mark() {
    let server = speaker().await;
    let bias: serde_json::Map<_, _> =
        (256..264).map(|id: u32| (id.to_string(), json!(2))).collect();
    for seed in 0..4 {
        let fields = |stream: bool| {
            json!({"seed": seed, "temperature": 1.0, "max_tokens": 300, "ignore_eos": true,
                   "logit_bias": bias, "logprobs": true, "stream": stream})
        };
        let whole = server.chat(fields(false)).await.json()["choices"][0].clone();
        assert_eq!(whole["finish_reason"], "length");
        assert_eq!(whole["logprobs"]["content"].as_array().map(Vec::len), Some(300));
        let (streamed, reason, tokens) = add_up(&server.chat(fields(true)).await.chunks());
        assert_eq!(same(&streamed), same(&whole["message"]));
        assert_eq!((reason, tokens), (whole["finish_reason"].clone(), 300));
        let text = whole["message"]["content"].as_str().expect("a text");
        assert!(!text.is_empty() && SPECIAL.iter().all(|mark| !text.contains(mark)), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_are_looked_for_in_texts_and_not_in_heads() {
    let server = speaker().await;
    let fields = |stop: Value| {
        brief(json!({"guided_choice": ["to be final, or not"], "seed": 1, "stop": stop,
                     "logit_bias": {}}))
    };
    let ask = async |stop: Value| {
        let mut fields = fields(stop);
        // No thought: its channel has another first letter.
        fields["logit_bias"] = json!({b'a'.to_string(): -100});
        server.chat(fields).await.json()["choices"][0].clone()
    };
    let whole = ask(json!(["final<", "assistant", "<|message|>"])).await;
    assert_eq!(whole["message"]["content"], "to be final, or not");
    let cut = ask(json!(["final"])).await;
    assert_eq!(cut["message"]["content"], "to be ");
    assert_eq!(cut["finish_reason"], "stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_ends_an_answer_and_the_end_of_a_message_does_not() {
    let server = speaker().await;
    for (mark, reason, tokens) in [
        ("<|call|>", "stop", 1),
        ("<|return|>", "stop", 1),
        ("<|endoftext|>", "stop", 1),
        ("<|end|>", "length", 5),
    ] {
        let fields = json!({"logit_bias": {id(mark).to_string(): 100}, "max_tokens": 5});
        let answer = server.chat(fields).await.json();
        assert_eq!(answer["choices"][0]["finish_reason"], reason, "{mark}");
        assert_eq!(answer["usage"]["completion_tokens"], tokens, "{mark}");
        assert_eq!(answer["choices"][0]["message"]["content"], "", "{mark}");
    }
}

/// Other APIs ask first whether a model thinks.
#[tokio::test(flavor = "multi_thread")]
async fn neighbours_may_ask_for_a_thought() {
    let server = speaker().await;
    let said = json!([{"role": "user", "content": "Hello"}]);
    let ollama = json!({"model": MODEL, "messages": said, "think": "low", "stream": false,
                        "options": {"num_predict": 5}});
    let answer = server.post("/api/chat", ollama).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    // With a tool a head is ruled, and some answers begin with a thought, which is shown as one.
    let mut thoughts = 0;
    for seed in 0..40 {
        let ollama = json!({"model": MODEL, "messages": said, "think": true, "stream": false,
                            "tools": [tools()[0]],
                            "options": {"num_predict": 60, "temperature": 2.0, "seed": seed}});
        let message = server.post("/api/chat", ollama).await.json()["message"].clone();
        let thought = message["thinking"].as_str().unwrap_or_default();
        assert!(!thought.starts_with("analysis"), "{message}");
        thoughts += usize::from(!thought.is_empty());
    }
    assert!(thoughts > 0, "none of forty is thought");
    let thinking = json!({"type": "enabled", "budget_tokens": 1024});
    let anthropic = json!({"model": MODEL, "messages": said, "thinking": thinking,
                           "max_tokens": 1100, "stop_sequences": ["e"]});
    let answer = server.post("/v1/messages", anthropic).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn efforts_reach_the_template_in_its_words() {
    let server = speaker().await;
    let tokens = async |fields: Value| {
        let mut fields = fields;
        fields["max_tokens"] = json!(1);
        let usage = server.chat(fields).await.json()["usage"].clone();
        usage["prompt_tokens"].as_u64().expect("a count")
    };
    let medium = tokens(json!({})).await;
    for (effort, word) in [
        ("none", "low"),
        ("minimal", "low"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("xhigh", "high"),
        ("max", "high"),
    ] {
        let count = tokens(json!({"reasoning_effort": effort})).await;
        assert_eq!(count + 6, medium + word.len() as u64, "{effort}");
    }
    assert_eq!(
        tokens(json!({"chat_template_kwargs": {"enable_thinking": false}})).await,
        medium - 3
    );
    // One that is `null` is none, and a number is no effort.
    assert_eq!(tokens(json!({"chat_template_kwargs": {"reasoning_effort": null}})).await, medium);
    let answer = server.chat(json!({"chat_template_kwargs": {"reasoning_effort": 3}})).await;
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert_eq!(answer.json()["error"]["param"], "chat_template_kwargs.reasoning_effort");
    // Anthropic's clients say nothing where they want no thought; this is no wish for less.
    let count = async |thinking: Value| {
        let asked = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}],
                           "thinking": thinking});
        let answer = server.post("/v1/messages/count_tokens", asked).await.json();
        answer["input_tokens"].as_u64().unwrap_or_else(|| panic!("{answer}"))
    };
    let silent = count(json!(null)).await;
    assert_eq!(count(json!({"type": "adaptive"})).await, silent);
    assert_eq!(count(json!({"type": "disabled"})).await + 3, silent);
    let count = async |fields: Value| {
        let fields = with_model(fields);
        let answer = server.post("/v1/responses/input_tokens", fields).await.json();
        answer["input_tokens"].as_u64().unwrap_or_else(|| panic!("{answer}"))
    };
    let asked = |effort: &str| json!({"input": "hi", "reasoning": {"effort": effort}});
    assert_eq!(count(asked("low")).await + 3, count(asked("medium")).await);
    assert_eq!(count(asked("none")).await, count(asked("low")).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_has_items_of_thought_and_calls_that_can_be_sent_back() {
    let server = speaker().await;
    let tool = json!({"type": "function", "name": "f", "strict": true, "parameters": {
        "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
        "additionalProperties": false}});
    let mut thought = None;
    // About one of eight thinks.
    for seed in 0..300 {
        let asked = json!({"model": MODEL, "input": "Call it.", "tools": [tool],
                           "tool_choice": "required", "max_output_tokens": 3000, "stream": true,
                           "temperature": 2, "seed": seed});
        let events = events(&server.post(PATH, asked).await);
        let last = events.last().expect("events");
        let response = &last["response"];
        if last["type"] != "response.completed" {
            continue; // a thought without end
        }
        let output = response["output"].as_array().expect("items").clone();
        let call = output.last().expect("an item");
        assert_eq!((&call["type"], &call["name"]), (&json!("function_call"), &json!("f")));
        let arguments: Value =
            serde_json::from_str(call["arguments"].as_str().expect("a text")).expect("JSON");
        assert!(arguments["a"].is_u64());
        assert!(output.iter().all(|item| item["type"] != "message"), "{response}");
        let deltas = |kind: &str| -> String {
            let of_kind = events.iter().filter(|event| event["type"] == kind);
            of_kind.filter_map(|event| event["delta"].as_str()).collect()
        };
        assert_eq!(deltas("response.function_call_arguments.delta"), call["arguments"]);
        if output.len() == 2 {
            assert_eq!(output[0]["type"], "reasoning");
            assert_eq!(deltas("response.reasoning_text.delta"), output[0]["content"][0]["text"]);
            println!("seed {seed} thinks");
            thought = Some(output);
            break;
        }
    }
    let output = thought.expect("one of so many thinks and comes to an end");
    // Sent back, the thought stands before its call, and only there.
    let count = async |items: &[Value], fields: Value| {
        let mut input = vec![json!({"role": "user", "content": "Call it."})];
        input.extend(items.iter().cloned());
        input.push(json!({"type": "function_call_output", "output": "7",
                          "call_id": output[1]["call_id"]}));
        let mut fields = with_model(fields);
        fields["input"] = json!(input);
        let answer = server.post("/v1/responses/input_tokens", fields).await.json();
        answer["input_tokens"].as_u64().unwrap_or_else(|| panic!("{answer}"))
    };
    let text = output[0]["content"][0]["text"].as_str().expect("a text");
    let head = 4 + "assistant".len() + "analysis".len();
    let [with, without] = [&output[..], &output[1..]];
    let more = count(with, json!({})).await - count(without, json!({})).await;
    assert_eq!(more as usize, head + text.len());
}

/// A template that writes marks which the vocabulary has no tokens for is read like any other.
#[tokio::test(flavor = "multi_thread")]
async fn without_tokens_for_the_marks_an_answer_is_text() {
    let server = start(Options { template: TEMPLATE, ..Options::default() }).await;
    let answer = server.chat(greedy(20, json!({}))).await.json();
    let message = &answer["choices"][0]["message"];
    assert!(message["content"].as_str().is_some_and(|text| !text.is_empty()), "{message}");
    assert!(message.get("reasoning_content").is_none());
    let thinking = json!({"type": "enabled", "budget_tokens": 1024});
    let asked = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}],
                       "thinking": thinking, "max_tokens": 1100});
    let answer = server.post("/v1/messages", asked).await;
    assert_eq!(answer.status, 400, "{}", answer.body);
}
