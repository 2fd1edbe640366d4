//! `POST /v1/chat/completions`: its body in, and the choices of its objects out.

use serde_json::{Map, Value, json};

use super::call::{Call, Common, Shape};
use super::error::ApiError;
use super::extract::Fields;
use super::{extract, fields, functions, messages, pairs, stored, tools};
use crate::pipeline::{Prompt, TextRequest, TokenLogprob};
use crate::types::Priority;

/// Reads a body.
///
/// # Errors
/// The first field that is unknown, refused, malformed or out of range.
pub(super) fn parse(body: Fields, lenient: bool) -> Result<Call, ApiError> {
    let paired = pairs::of_chat(body.map().get("messages"));
    let call = read(body, lenient)?;
    paired.map(|()| call)
}

/// The same, where somebody else sees to it that calls and results belong together.
pub(super) fn read(mut body: Fields, lenient: bool) -> Result<Call, ApiError> {
    fields::check(body.map(), fields::CHAT, "", lenient)?;
    let keep = stored::wanted(&mut body)?;
    let common = Common::read(&mut body, lenient)?;
    let (max_tokens, max_tokens_param) = max_tokens(&mut body)?;
    common.check_min_tokens(max_tokens)?;
    let template_kwargs = template_kwargs(&mut body)?;
    let logprobs = logprobs(&mut body)?;
    let priority = priority(&mut body)?;
    let prediction = prediction(&mut body, lenient)?;
    let functions = functions::read(&mut body, lenient)?;
    let in_old_words = functions.is_some();
    let tools = match functions {
        Some(functions) => Some(functions),
        None => tools::read(&mut body, lenient)?,
    };
    let mut messages = body.value("messages");
    functions::translate(&mut messages)?;
    let messages = messages::normalise(messages, lenient)?;
    let prompt = Prompt::Chat { messages, template_kwargs };
    let request = TextRequest {
        max_tokens,
        max_tokens_param,
        logprobs,
        prediction,
        tools,
        priority,
        ..common.request(prompt)
    };
    Ok(Call {
        shape: Shape::Chat,
        model: common.model,
        requests: vec![request],
        in_old_words,
        shown: common.n,
        logprobs: logprobs.is_some(),
        stream: common.stream,
        keep,
        keep_alive: common.keep_alive,
    })
}

/// `choices[i]` of the first chunk of a choice.
pub(super) fn first_choice(index: usize) -> Value {
    let delta = json!({"role": "assistant", "content": "", "refusal": null});
    json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null})
}

/// A part of an answer that a chunk carries.
pub(super) enum Part<'a> {
    Text(&'a str),
    Reasoning(&'a str),
    Call { index: usize, id: &'a str, name: &'a str, custom: bool },
    Arguments { index: usize, text: &'a str, custom: bool },
}

impl Part<'_> {
    fn delta(&self) -> Value {
        match *self {
            Self::Text(text) => json!({"content": text}),
            // Two names are in use for the same thing.
            Self::Reasoning(text) => json!({"reasoning_content": text, "reasoning": text}),
            Self::Call { index, id, name, custom } => {
                let mut call = call_object(id, name, "", custom);
                call.insert("index".to_owned(), json!(index));
                json!({"tool_calls": [call]})
            }
            Self::Arguments { index, text, custom: false } => {
                json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            }
            Self::Arguments { index, text, custom: true } => {
                json!({"tool_calls": [{"index": index, "custom": {"input": text}}]})
            }
        }
    }
}

/// `choices[i]` of a chunk in the middle.
pub(super) fn delta_choice(
    index: usize,
    part: &Part<'_>,
    logprobs: Option<&[TokenLogprob]>,
) -> Value {
    json!({
        "index": index,
        "delta": part.delta(),
        "logprobs": logprobs.map(logprobs_object),
        "finish_reason": null,
    })
}

/// `choices[i]` of a chunk without a word: the last one of a choice has a reason.
pub(super) fn last_choice(index: usize, reason: Value) -> Value {
    json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": reason})
}

/// A call of an answer.
#[derive(Clone, Debug)]
pub(super) struct CallParts {
    pub id: String,
    pub name: String,
    pub arguments: String,
    pub custom: bool,
}

/// `choices[i]` of the whole object.
pub(super) fn whole_choice(
    index: usize,
    text: &str,
    reasoning: &str,
    calls: &[CallParts],
    logprobs: Option<&[TokenLogprob]>,
    reason: &str,
) -> Value {
    let content = if text.is_empty() && !calls.is_empty() { Value::Null } else { json!(text) };
    let mut message =
        json!({"role": "assistant", "content": content, "refusal": null, "annotations": []});
    if !reasoning.is_empty() {
        message["reasoning_content"] = json!(reasoning);
        message["reasoning"] = json!(reasoning);
    }
    if !calls.is_empty() {
        let calls = calls.iter().map(|c| call_object(&c.id, &c.name, &c.arguments, c.custom));
        message["tool_calls"] = calls.map(Value::Object).collect();
    }
    json!({
        "index": index,
        "message": message,
        "logprobs": logprobs.map(logprobs_object),
        "finish_reason": reason,
    })
}

fn call_object(id: &str, name: &str, arguments: &str, custom: bool) -> Map<String, Value> {
    let (kind, inner) = match custom {
        false => ("function", json!({"name": name, "arguments": arguments})),
        true => ("custom", json!({"name": name, "input": arguments})),
    };
    Map::from_iter([
        ("id".to_owned(), json!(id)),
        ("type".to_owned(), json!(kind)),
        (kind.to_owned(), inner),
    ])
}

/// What stands for the logarithm of zero, which JSON has no word for.
pub(super) const LOGPROB_MIN: f32 = -9999.0;

pub(super) fn logprobs_object(tokens: &[TokenLogprob]) -> Value {
    let entry = |token: &TokenLogprob| {
        let top = token.top.iter().map(|top| {
            json!({
                "token": top.text,
                "logprob": top.logprob.max(LOGPROB_MIN),
                "bytes": top.bytes,
            })
        });
        json!({
            "token": token.text,
            "logprob": token.logprob.map(|logprob| logprob.max(LOGPROB_MIN)),
            "bytes": token.bytes,
            "top_logprobs": top.collect::<Vec<_>>(),
        })
    };
    json!({"content": tokens.iter().map(entry).collect::<Vec<_>>(), "refusal": null})
}

fn max_tokens(body: &mut Fields) -> Result<(Option<usize>, &'static str), ApiError> {
    let new = body.count("max_completion_tokens", 1..=u32::MAX)?;
    let old = body.count("max_tokens", 1..=u32::MAX)?;
    match (new, old) {
        (Some(_), Some(_)) => Err(ApiError::invalid(
            "max_tokens",
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
        )),
        (None, Some(old)) => Ok((Some(old), "max_tokens")),
        (new, None) => Ok((new, "max_completion_tokens")),
    }
}

fn logprobs(body: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = body.bool("logprobs")?.unwrap_or(false);
    let top = body.count("top_logprobs", 0..=20)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid(
            "top_logprobs",
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
        )),
    }
}

/// The tier that an answer names.
pub(super) fn tier(priority: Priority) -> &'static str {
    match priority {
        Priority::Flex => "flex",
        Priority::Default => "default",
        Priority::Priority => "priority",
    }
}

fn priority(body: &mut Fields) -> Result<Priority, ApiError> {
    match body.string("service_tier")?.as_deref() {
        // Reserved capacity is a matter of hosted services; the answer says what was had.
        None | Some("auto" | "default" | "scale") => Ok(Priority::Default),
        Some("flex") => Ok(Priority::Flex),
        // The answer names both alike, as OpenAI has it.
        Some("priority" | "fast") => Ok(Priority::Priority),
        Some(other) => {
            let message = format!(
                "Invalid 'service_tier': '{other}' is none of auto, default, flex, scale, \
                 priority, fast."
            );
            Err(ApiError::invalid("service_tier", message))
        }
    }
}

/// What the client expects most of the answer to be.
fn prediction(body: &mut Fields, lenient: bool) -> Result<Option<String>, ApiError> {
    let Some(map) = body.object("prediction")? else { return Ok(None) };
    fields::check(&map, fields::PREDICTION, "prediction.", lenient)?;
    let mut inner = Fields::within("prediction", map);
    match inner.string("type")?.as_deref() {
        Some("content") => {}
        Some(other) => {
            let message = format!("Invalid 'prediction.type': '{other}' is not 'content'.");
            return Err(ApiError::invalid("prediction.type", message));
        }
        None => return Err(ApiError::missing("prediction.type")),
    }
    match inner.value("content") {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) => {
            messages::join_parts("prediction.content", parts, "user", lenient).map(Some)
        }
        Some(other) => {
            let found = extract::kind(&other);
            Err(ApiError::wrong_type("prediction.content", "a string or a list of parts", found))
        }
        None => Err(ApiError::missing("prediction.content")),
    }
}

pub(super) const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// Variables of a template that its caller may not replace.
const RESERVED: [&str; 3] = ["messages", "tools", "documents"];

fn template_kwargs(body: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let mut kwargs = body.object("chat_template_kwargs")?.unwrap_or_default();
    if let Some(name) = RESERVED.iter().find(|name| kwargs.contains_key(**name)) {
        let param = format!("chat_template_kwargs.{name}");
        let message = format!("Invalid '{param}': `{name}` is a field of the request itself.");
        return Err(crate::error::Error::invalid(param, message).into());
    }
    if let Some(effort) = body.string("reasoning_effort")? {
        if !EFFORTS.contains(&effort.as_str()) {
            let message = format!(
                "Invalid 'reasoning_effort': supported values are: {}.",
                EFFORTS.join(", ")
            );
            return Err(ApiError::invalid("reasoning_effort", message));
        }
        kwargs.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    Ok(kwargs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Call, ApiError> {
        parse(Fields::parse(body.to_string().as_bytes())?, false)
    }

    /// A body with one more field.
    fn with(name: &str, value: Value) -> Value {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        body[name] = value;
        body
    }

    #[test]
    fn a_bare_chat_is_one_request_without_limits() {
        let call = read(with("user", json!("ann"))).unwrap();
        assert_eq!((call.shape, call.stream), (Shape::Chat, None));
        let [request] = call.requests.as_slice() else { panic!("one request") };
        assert_eq!((request.n, request.max_tokens, request.logprobs), (1, None, None));
        let Prompt::Chat { messages, template_kwargs } = &request.prompt else { panic!("a chat") };
        assert_eq!(*messages, json!([{"role": "user", "content": "hi"}]));
        assert!(template_kwargs.is_empty());
    }

    #[test]
    fn both_names_of_the_limit_work_and_are_blamed_by_their_own_name() {
        for name in ["max_tokens", "max_completion_tokens"] {
            let call = read(with(name, json!(5))).unwrap();
            let request = &call.requests[0];
            assert_eq!((request.max_tokens, request.max_tokens_param), (Some(5), name));
            for bad in [json!(0), json!(-1), json!(1.5), json!("5")] {
                assert_eq!(read(with(name, bad)).unwrap_err().param.as_deref(), Some(name));
            }
        }
        let mut both = with("max_tokens", json!(5));
        both["max_completion_tokens"] = json!(5);
        assert_eq!(read(both).unwrap_err().param.as_deref(), Some("max_tokens"));
    }

    #[test]
    fn top_logprobs_need_logprobs() {
        let mut body = with("top_logprobs", json!(3));
        assert_eq!(read(body.clone()).unwrap_err().param.as_deref(), Some("top_logprobs"));
        body["logprobs"] = json!(true);
        assert_eq!(read(body.clone()).unwrap().requests[0].logprobs, Some(3));
        body["top_logprobs"] = json!(21);
        assert_eq!(read(body).unwrap_err().param.as_deref(), Some("top_logprobs"));
        assert_eq!(read(with("logprobs", json!(true))).unwrap().requests[0].logprobs, Some(0));
        assert_eq!(read(with("logprobs", json!(false))).unwrap().requests[0].logprobs, None);
    }

    #[test]
    fn template_variables_arrive() {
        let mut body = with("chat_template_kwargs", json!({"enable_thinking": false}));
        body["reasoning_effort"] = json!("low");
        let call = read(body).unwrap();
        let Prompt::Chat { template_kwargs, .. } = &call.requests[0].prompt else { panic!() };
        let expected = json!({"enable_thinking": false, "reasoning_effort": "low"});
        assert_eq!(Value::Object(template_kwargs.clone()), expected);
        let error = read(with("reasoning_effort", json!("huge"))).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("reasoning_effort"));
    }

    #[test]
    fn a_tier_is_a_priority() {
        let priority = |word: &str| {
            read(with("service_tier", json!(word))).map(|call| call.requests[0].priority)
        };
        assert_eq!(priority("auto").unwrap(), Priority::Default);
        assert_eq!(priority("flex").unwrap(), Priority::Flex);
        assert_eq!(priority("priority").unwrap(), Priority::Priority);
        assert_eq!(priority("fast").unwrap(), Priority::Priority);
        assert_eq!(priority("slow").unwrap_err().param.as_deref(), Some("service_tier"));
        assert!(Priority::Flex < Priority::Default && Priority::Default < Priority::Priority);
    }

    #[test]
    fn a_prediction_is_a_text() {
        let prediction = |value| read(with("prediction", value));
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        for (content, text) in [(json!("a"), "a"), (parts, "a\nb")] {
            let call = prediction(json!({"type": "content", "content": content})).unwrap();
            assert_eq!(call.requests[0].prediction.as_deref(), Some(text));
        }
        assert_eq!(prediction(json!(null)).unwrap().requests[0].prediction, None);
        for (bad, field) in [
            (json!("a"), "prediction"),
            (json!({"content": "a"}), "prediction.type"),
            (json!({"type": "text", "content": "a"}), "prediction.type"),
            (json!({"type": "content"}), "prediction.content"),
            (json!({"type": "content", "content": 3}), "prediction.content"),
            (json!({"type": "content", "content": []}), "prediction.content"),
            (json!({"type": "content", "content": [{}]}), "prediction.content[0].type"),
            (json!({"type": "content", "content": "a", "x": 1}), "prediction.x"),
        ] {
            assert_eq!(prediction(bad).unwrap_err().param.as_deref(), Some(field));
        }
    }

    #[test]
    fn min_tokens_fit_under_the_limit() {
        let mut body = with("min_tokens", json!(6));
        assert!(read(body.clone()).is_ok());
        body["max_tokens"] = json!(5);
        assert_eq!(read(body).unwrap_err().param.as_deref(), Some("min_tokens"));
    }

    #[test]
    fn refused_and_unknown_fields_stop_a_chat() {
        let error = read(with("tools", json!([{"type": "function"}]))).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools[0].function"));
        let error = read(with("audio", json!({"voice": "alloy"}))).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("audio"));
        let error = read(with("foo", json!(1))).unwrap_err();
        assert_eq!(error.code, Some("unknown_parameter"));
        for accepted in [
            ("metadata", json!({"k": "v"})),
            ("service_tier", json!("auto")),
            ("prediction", json!({"type": "content", "content": "x"})),
            ("parallel_tool_calls", json!(true)),
            ("response_format", json!({"type": "text"})),
        ] {
            assert!(read(with(accepted.0, accepted.1)).is_ok(), "{}", accepted.0);
        }
    }

    #[test]
    fn logprobs_name_tokens_bytes_and_alternatives() {
        let token = TokenLogprob {
            id: 7,
            text: "\u{fffd}".into(),
            bytes: vec![0xe2, 0x82],
            chars: 1,
            logprob: Some(-0.5),
            top: vec![crate::pipeline::TopLogprob {
                id: 9,
                text: "a".into(),
                bytes: vec![97],
                logprob: f32::NEG_INFINITY,
            }],
        };
        let expected = json!({"content": [{
            "token": "\u{fffd}", "logprob": -0.5, "bytes": [0xe2, 0x82],
            "top_logprobs": [{"token": "a", "logprob": -9999.0, "bytes": [97]}],
        }], "refusal": null});
        assert_eq!(logprobs_object(&[token]), expected);
    }
}
