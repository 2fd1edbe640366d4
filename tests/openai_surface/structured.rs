//! Answers that keep to a form, over a real socket: schemas, expressions, choices and grammars,
//! streamed or not, with everything else that a request may ask for at the same time.
//!
//! The model is random, so whatever is right about its answers is right because of the grammar.

use serde_json::{Value, json};

use crate::fixture::{Options, Server, start};

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "likes": {"type": "array", "items": {"enum": ["tea", "rain"]}, "maxItems": 3},
        },
        "required": ["name", "age", "likes"],
        "additionalProperties": false,
    })
}

fn schema(schema: Value) -> Value {
    json!({"type": "json_schema", "json_schema": {
        "name": "person", "strict": true, "schema": schema,
    }})
}

fn check_person(text: &str) {
    let person: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    assert!(person["name"].as_str().is_some_and(|name| name.chars().count() <= 12), "{text}");
    assert!(person["age"].as_u64().is_some_and(|age| age <= 150), "{text}");
    let likes = person["likes"].as_array().expect("a list");
    assert!(likes.len() <= 3 && likes.iter().all(|like| like == "tea" || like == "rain"));
    assert_eq!(person.as_object().map(serde_json::Map::len), Some(3));
}

/// The text of a chat, and why it ended.
async fn chat(server: &Server, fields: Value) -> (String, String) {
    let answer = server.chat(fields).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choice = answer.json()["choices"][0].clone();
    let text = choice["message"]["content"].as_str().expect("a text").to_owned();
    (text, choice["finish_reason"].as_str().expect("a reason").to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_an_instance_of_its_schema() {
    let server = start(Options::default()).await;
    let asked = (0..12).map(|seed| {
        let fields = json!({"response_format": schema(person()), "seed": seed, "temperature": 1.0});
        chat(&server, fields)
    });
    for (text, reason) in futures_util::future::join_all(asked).await {
        check_person(&text);
        assert_eq!(reason, "stop");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_goes_with_streams_seeds_choices_and_log_probabilities() {
    let server = start(Options::default()).await;
    let fields = |stream: bool| {
        json!({
            "response_format": schema(person()), "seed": 5, "temperature": 1.0, "n": 3,
            "logprobs": true, "top_logprobs": 1, "stream": stream,
        })
    };
    let whole = server.chat(fields(false)).await.json();
    let chunks = server.chat(fields(true)).await.chunks();
    let mut texts = Vec::new();
    for index in 0..3 {
        let choice = &whole["choices"][index];
        let text = choice["message"]["content"].as_str().expect("a text");
        check_person(text);
        let mine = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"].get(0).filter(|choice| choice["index"] == index));
        let streamed: String =
            mine.filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(streamed, text);
        let tokens = choice["logprobs"]["content"].as_array().expect("tokens");
        let bytes: Vec<u8> = (tokens.iter())
            .flat_map(|token| token["bytes"].as_array().expect("bytes"))
            .map(|byte| byte.as_u64().expect("a byte") as u8)
            .collect();
        assert_eq!(String::from_utf8_lossy(&bytes), text);
        texts.push(text.to_owned());
    }
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_or_a_stop_string_cuts_a_form_short() {
    let server = start(Options::default()).await;
    let fields = json!({"response_format": schema(person()), "seed": 1, "temperature": 1.0});
    let (whole, _) = chat(&server, fields.clone()).await;
    let mut cut = fields.clone();
    cut["max_tokens"] = json!(9);
    assert_eq!(chat(&server, cut).await, (whole[..9].to_owned(), "length".to_owned()));
    let mut stopped = fields.clone();
    stopped["stop"] = json!(["\"age\""]);
    let (text, reason) = chat(&server, stopped).await;
    assert_eq!((text.as_str(), reason.as_str()), (whole.split("\"age\"").next().unwrap(), "stop"));
    // A form ends an answer even where the model's own end does not.
    let mut endless = fields;
    endless["ignore_eos"] = json!(true);
    assert_eq!(chat(&server, endless).await.0, whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_other_form_holds_too() {
    let server = start(Options::default()).await;
    for seed in 0..4 {
        let with = |name: &str, value: Value| {
            let mut fields = json!({"seed": seed, "temperature": 1.0, "max_tokens": 400});
            fields[name] = value;
            fields
        };
        let (text, _) = chat(&server, with("guided_choice", json!(["red", "green"]))).await;
        assert!(text == "red" || text == "green", "{text:?}");
        let (text, _) = chat(&server, with("guided_regex", json!("[A-F]{3}-[0-9]{2}"))).await;
        assert!(text.len() == 6 && text.as_bytes()[3] == b'-', "{text:?}");
        let gbnf = "root ::= word (\" \" word){1,3}\nword ::= [a-c]{2}";
        for name in ["guided_grammar", "structured_outputs"] {
            let value =
                if name == "guided_grammar" { json!(gbnf) } else { json!({"grammar": gbnf}) };
            let (text, _) = chat(&server, with(name, value)).await;
            let words: Vec<_> = text.split(' ').collect();
            assert!(
                (2..=4).contains(&words.len()) && words.iter().all(|w| w.len() == 2),
                "{text:?}"
            );
        }
        // In a completion as well.
        let fields = json!({"prompt": "a", "guided_choice": ["x", "yz"], "seed": seed});
        let text = server.complete(fields).await.json()["choices"][0]["text"].clone();
        assert!(text == "x" || text == "yz", "{text}");
    }
    let fields = json!({"response_format": {"type": "json_object"}, "seed": 3, "max_tokens": 600});
    let (text, reason) = chat(&server, fields).await;
    let object = serde_json::from_str::<Value>(&text).is_ok_and(|value| value.is_object());
    assert!(text.starts_with('{') && (object || reason == "length"), "{reason}: {text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_cannot_be_enforced_is_refused_by_name() {
    let server = start(Options::default()).await;
    let not = json!({"type": "object", "properties": {"a": {"not": {"type": "string"}}}});
    let cases = [
        (json!({"response_format": schema(not.clone())}), "response_format", "not"),
        (
            json!({"response_format": schema(json!({"type": "banana"}))}),
            "response_format",
            "banana",
        ),
        (
            json!({"guided_json": {"type": "array", "uniqueItems": true}}),
            "guided_json",
            "uniqueItems",
        ),
        (json!({"guided_regex": "(a"}), "guided_regex", "guided_regex"),
        (json!({"guided_grammar": "start: nothing"}), "guided_grammar", "nothing"),
        (json!({"guided_grammar": "start: start"}), "guided_grammar", "no text"),
        (json!({"guided_grammar": "x ::= \"a\""}), "guided_grammar", "root"),
        (json!({"structured_outputs": {"json": not}}), "structured_outputs", "not"),
    ];
    for (fields, param, word) in cases {
        let answer = server.chat(fields).await;
        let error = answer.error();
        assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{error}");
        assert!(error["message"].as_str().is_some_and(|m| m.contains(word)), "{error}");
    }
}
