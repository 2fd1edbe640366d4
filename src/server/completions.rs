//! `POST /v1/completions`: its body in, and the choices of its objects out.

use serde_json::{Map, Value, json};

use super::call::{self, Call, Common, Shape};
use super::chat::LOGPROB_MIN;
use super::error::ApiError;
use super::extract::{Fields, kind};
use super::fields;
use crate::pipeline::{Prompt, TextRequest, TokenLogprob};

/// Tokens generated when the client does not say, as at OpenAI.
const MAX_TOKENS_DEFAULT: usize = 16;

/// Reads a body.
///
/// # Errors
/// The first field that is unknown, refused, malformed or out of range.
pub(super) fn parse(mut body: Fields, lenient: bool) -> Result<Call, ApiError> {
    fields::check(body.map(), fields::COMPLETIONS, "", lenient)?;
    let common = Common::read(&mut body, lenient)?;
    let made = best_of(&mut body, &common)?;
    let max_tokens = body.count("max_tokens", 0..=u32::MAX)?.unwrap_or(MAX_TOKENS_DEFAULT);
    common.check_min_tokens(Some(max_tokens))?;
    let logprobs = body.count("logprobs", 0..=5)?;
    let echo = body.bool("echo")?.unwrap_or(false);
    let suffix = body.string("suffix")?.filter(|text| !text.is_empty());
    if echo && suffix.is_some() {
        let message = "Invalid 'echo': with a 'suffix' the answer does not follow the prompt.";
        return Err(ApiError::invalid("echo", message));
    }
    let prompts = prompts(body.value("prompt"))?;
    let request = |prompt| TextRequest {
        max_tokens: Some(max_tokens),
        max_tokens_param: "max_tokens",
        n: made,
        // The best are those of the highest log-probability per token.
        logprobs: logprobs.or((made > common.n).then_some(0)),
        echo,
        suffix: suffix.clone(),
        ..common.request(prompt)
    };
    let requests = prompts.into_iter().map(request).collect();
    Ok(Call {
        shape: Shape::Completion,
        in_old_words: false,
        model: common.model,
        requests,
        shown: common.n,
        logprobs: logprobs.is_some(),
        stream: common.stream,
        keep: None,
        keep_alive: common.keep_alive,
    })
}

/// `choices[i]`, of a chunk or of the whole object: they are the same here.
pub(super) fn choice(index: usize, text: &str, logprobs: Value, reason: Option<&str>) -> Value {
    json!({"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason})
}

/// The legacy form of log-probabilities: parallel lists. `offset` is where the first token begins,
/// in characters of the choice's text, and moves to where the next one will.
pub(super) fn logprobs_object(tokens: &[TokenLogprob], offset: &mut usize) -> Value {
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(*offset);
        *offset += token.chars;
    }
    json!({
        "tokens": tokens.iter().map(|t| token_name(&t.text, &t.bytes)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprob.map(finite)).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top_logprobs).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

/// The alternatives and always the token itself, so there may be one more than asked for.
fn top_logprobs(token: &TokenLogprob) -> Option<Map<String, Value>> {
    let own = (token_name(&token.text, &token.bytes), json!(finite(token.logprob?)));
    let top = token.top.iter();
    let mut map: Map<String, Value> =
        top.map(|t| (token_name(&t.text, &t.bytes), json!(finite(t.logprob)))).collect();
    map.entry(own.0).or_insert(own.1);
    Some(map)
}

/// Tokens are keys here, so those that are not text on their own are spelled out, as OpenAI does.
fn token_name(text: &str, bytes: &[u8]) -> String {
    if std::str::from_utf8(bytes).is_ok() {
        return text.to_owned();
    }
    bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}"))
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

/// How many choices are made, of which the best `n` are shown.
fn best_of(body: &mut Fields, common: &Common) -> Result<usize, ApiError> {
    match body.count("best_of", 1..=20)? {
        Some(best_of) if best_of > common.n && common.stream.is_some() => Err(ApiError::invalid(
            "best_of",
            "Invalid 'best_of': the best are known at the end, so they cannot be streamed.",
        )),
        Some(best_of) if best_of < common.n => {
            Err(ApiError::invalid("best_of", "Invalid 'best_of': it must be at least 'n'."))
        }
        best_of => Ok(best_of.unwrap_or(common.n)),
    }
}

/// `string | [string] | [token] | [[token]]`.
fn prompts(prompt: Option<Value>) -> Result<Vec<Prompt>, ApiError> {
    let list = match prompt {
        None => return Err(ApiError::missing("prompt")),
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(list)) => list,
        Some(other) => {
            let expected = "a string, an array of strings, or an array of token ids";
            return Err(ApiError::wrong_type("prompt", expected, kind(&other)));
        }
    };
    match list.first() {
        None => Err(empty_prompt("prompt")),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(call::tokens("prompt", &list)?)]),
        Some(Value::String(_)) => each(list, "a string", |_, value| match value {
            Value::String(text) => Some(Ok(Prompt::Text(text))),
            _ => None,
        }),
        Some(_) => each(list, "an array of token ids", |name, value| match value {
            Value::Array(ids) if ids.is_empty() => Some(Err(empty_prompt(name))),
            Value::Array(ids) => Some(call::tokens(name, &ids).map(Prompt::Tokens)),
            _ => None,
        }),
    }
}

/// Reads every prompt of a list, all of one kind.
fn each(
    list: Vec<Value>,
    expected: &str,
    read: impl Fn(&str, Value) -> Option<Result<Prompt, ApiError>>,
) -> Result<Vec<Prompt>, ApiError> {
    let one = |(i, value): (usize, Value)| {
        let (name, got) = (format!("prompt[{i}]"), kind(&value));
        read(&name, value).unwrap_or_else(|| Err(ApiError::wrong_type(&name, expected, got)))
    };
    list.into_iter().enumerate().map(one).collect()
}

fn empty_prompt(name: &str) -> ApiError {
    ApiError::invalid(name, format!("Invalid '{name}': the array cannot be empty."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::TopLogprob;

    fn read(body: Value) -> Result<Call, ApiError> {
        parse(Fields::parse(body.to_string().as_bytes())?, false)
    }

    fn prompts_of(prompt: Value) -> Vec<String> {
        let call = read(json!({"model": "m", "prompt": prompt})).unwrap();
        let name = |request: &TextRequest| match &request.prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Tokens(ids) => format!("{ids:?}"),
            Prompt::Chat { .. } => panic!("no chat"),
        };
        call.requests.iter().map(name).collect()
    }

    #[test]
    fn all_four_forms_of_a_prompt() {
        assert_eq!(prompts_of(json!("a")), ["a"]);
        assert_eq!(prompts_of(json!(["a", "b"])), ["a", "b"]);
        assert_eq!(prompts_of(json!([1, 2])), ["[1, 2]"]);
        assert_eq!(prompts_of(json!([[1, 2], [3]])), ["[1, 2]", "[3]"]);
    }

    #[test]
    fn bad_prompts_are_refused_by_path() {
        for (prompt, param) in [
            (json!(null), "prompt"),
            (json!(5), "prompt"),
            (json!({}), "prompt"),
            (json!([]), "prompt"),
            (json!([[]]), "prompt[0]"),
            (json!([[1], [2, -3]]), "prompt[1][1]"),
            (json!(["a", 1]), "prompt[1]"),
            (json!([1, "a"]), "prompt[1]"),
            (json!([[1], "a"]), "prompt[1]"),
            (json!([1, 4_294_967_296_u64]), "prompt[1]"),
            (json!([true]), "prompt[0]"),
        ] {
            let error = read(json!({"model": "m", "prompt": prompt})).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{prompt}");
        }
    }

    #[test]
    fn the_limit_is_sixteen_unless_said_and_may_be_zero() {
        let limit = |body: Value| read(body).unwrap().requests[0].max_tokens;
        assert_eq!(limit(json!({"model": "m", "prompt": "a"})), Some(16));
        assert_eq!(limit(json!({"model": "m", "prompt": "a", "max_tokens": null})), Some(16));
        let scoring = read(json!({
            "model": "m", "prompt": "a", "max_tokens": 0, "echo": true, "logprobs": 5,
        }))
        .unwrap();
        let request = &scoring.requests[0];
        assert_eq!((request.max_tokens, request.echo, request.logprobs), (Some(0), true, Some(5)));
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for (name, value) in [
            ("logprobs", json!(6)),
            ("logprobs", json!(true)),
            ("echo", json!("yes")),
            ("max_tokens", json!(-1)),
            ("best_of", json!(0)),
            ("best_of", json!(21)),
            ("suffix", json!(5)),
            ("prompt_logprobs", json!(21)),
            ("return_token_ids", json!(1)),
            ("messages", json!([])),
        ] {
            let mut body = json!({"model": "m", "prompt": "a"});
            body[name] = value;
            assert_eq!(read(body).unwrap_err().param.as_deref(), Some(name));
        }
        let both = json!({"model": "m", "prompt": "a", "suffix": "b", "echo": true});
        assert_eq!(read(both).unwrap_err().param.as_deref(), Some("echo"));
        assert!(read(json!({"model": "m", "prompt": "a", "n": 2, "best_of": 2})).is_ok());
        let best = read(json!({"model": "m", "prompt": "a", "n": 2, "best_of": 5})).unwrap();
        assert_eq!((best.requests[0].n, best.shown, best.logprobs), (5, 2, false));
        assert_eq!(best.requests[0].logprobs, Some(0));
        let streamed = json!({"model": "m", "prompt": "a", "best_of": 2, "stream": true});
        assert_eq!(read(streamed).unwrap_err().param.as_deref(), Some("best_of"));
    }

    #[test]
    fn legacy_logprobs_are_parallel_lists_with_character_offsets() {
        let token = |text: &str, bytes: &[u8], chars, logprob, top| TokenLogprob {
            id: 0,
            text: text.into(),
            bytes: bytes.into(),
            chars,
            logprob,
            top,
        };
        let b = TopLogprob { id: 1, text: "b".into(), bytes: vec![98], logprob: -1.0 };
        let tokens = [
            token("é", "é".as_bytes(), 1, None, vec![]),
            token("a", b"a", 1, Some(-2.0), vec![b]),
            token("\u{fffd}", &[0xe2, 0x82], 1, Some(-0.5), vec![]),
            token("\u{fffd}", &[0xac], 0, Some(f32::NEG_INFINITY), vec![]),
        ];
        let mut offset = 3;
        let expected = json!({
            "tokens": ["é", "a", "bytes:\\xe2\\x82", "bytes:\\xac"],
            "token_logprobs": [null, -2.0, -0.5, -9999.0],
            "top_logprobs": [
                null, {"b": -1.0, "a": -2.0}, {"bytes:\\xe2\\x82": -0.5}, {"bytes:\\xac": -9999.0}
            ],
            "text_offset": [3, 4, 5, 6],
        });
        assert_eq!(logprobs_object(&tokens, &mut offset), expected);
        assert_eq!(offset, 6);
    }
}
