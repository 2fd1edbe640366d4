//! What chat and completions have in common: the fields that say how to generate.

use serde_json::Value;

use super::error::ApiError;
use super::extract::{self, Fields};
use super::stored::Keep;
use super::{fields, format};
use crate::pipeline::{Format, Prompt, TextRequest};
use crate::registry::Weighted;
use crate::types::{KeepAlive, SamplingOverrides, TokenId};

/// One call of an endpoint, read and validated.
#[derive(Debug)]
pub(super) struct Call {
    /// Which objects the answer is made of.
    pub shape: Shape,
    /// Calls are told as the only one of `functions`.
    pub in_old_words: bool,
    /// Id of the model, as the client named it.
    pub model: String,
    /// One per prompt, never empty, all alike but for the prompt.
    pub requests: Vec<TextRequest>,
    /// The client asked for log-probabilities.
    pub logprobs: bool,
    /// Choices of each prompt that the answer shows: the best of those that are made.
    pub shown: usize,
    /// `None`: one object at the end.
    pub stream: Option<StreamOptions>,
    /// The answer is to be stored.
    pub keep: Option<Keep>,
    /// How long the model stays in memory after it.
    pub keep_alive: Option<KeepAlive>,
}

/// The two families of objects that carry text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// `chat.completion` and `chat.completion.chunk`.
    Chat,
    /// `text_completion`.
    Completion,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StreamOptions {
    /// End with a chunk that carries the usage.
    pub include_usage: bool,
}

/// The fields that mean the same in both bodies.
#[derive(Debug)]
pub(super) struct Common {
    pub model: String,
    pub n: usize,
    pub stream: Option<StreamOptions>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<TokenId>,
    pub ignore_eos: bool,
    pub min_tokens: usize,
    pub prompt_logprobs: Option<usize>,
    pub token_ids: bool,
    pub format: Option<Format>,
    pub sampling: SamplingOverrides,
    pub keep_alive: Option<KeepAlive>,
    pub adapters: Vec<Weighted>,
}

impl Common {
    pub(super) fn read(body: &mut Fields, lenient: bool) -> Result<Self, ApiError> {
        Ok(Self {
            prompt_logprobs: prompt_logprobs(body)?,
            model: model(body)?,
            n: body.count("n", 1..=128)?.unwrap_or(1),
            stream: stream(body, lenient)?,
            stop: stop(body)?,
            stop_token_ids: token_list(body, "stop_token_ids")?,
            ignore_eos: body.bool("ignore_eos")?.unwrap_or(false),
            min_tokens: body.count("min_tokens", 0..=u32::MAX)?.unwrap_or(0),
            token_ids: body.bool("return_token_ids")?.unwrap_or(false),
            format: format::read(body, lenient)?,
            sampling: sampling(body)?,
            keep_alive: keep_alive(body)?,
            adapters: adapters(body)?,
        })
    }

    /// A request with these fields; what is not common is left open.
    pub(super) fn request(&self, prompt: Prompt) -> TextRequest {
        TextRequest {
            n: self.n,
            min_tokens: self.min_tokens,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            prompt_logprobs: self.prompt_logprobs,
            token_ids: self.token_ids,
            format: self.format.clone(),
            sampling: self.sampling.clone(),
            keep_alive: self.keep_alive,
            adapters: self.adapters.clone(),
            ..TextRequest::new(&self.model, prompt)
        }
    }

    /// `min_tokens` must leave room under the limit that is given.
    pub(super) fn check_min_tokens(&self, max_tokens: Option<usize>) -> Result<(), ApiError> {
        match max_tokens {
            Some(max) if self.min_tokens > max => Err(ApiError::invalid(
                "min_tokens",
                format!(
                    "Invalid 'min_tokens': {} is more than the limit of {max}.",
                    self.min_tokens
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// As vLLM has it; it comes with the whole object alone.
fn prompt_logprobs(body: &mut Fields) -> Result<Option<usize>, ApiError> {
    let top = body.count("prompt_logprobs", 0..=20)?;
    if top.is_some() && body.map().get("stream") == Some(&Value::Bool(true)) {
        let message = "Unsupported parameter: 'prompt_logprobs' is not told in a stream.";
        return Err(ApiError::unsupported("prompt_logprobs", message));
    }
    Ok(top)
}

/// Reads a list of token ids.
pub(super) fn tokens(name: &str, list: &[Value]) -> Result<Vec<TokenId>, ApiError> {
    let token = |(i, value): (usize, &Value)| {
        extract::integer(&format!("{name}[{i}]"), value, 0..=i64::from(u32::MAX))
    };
    list.iter().enumerate().map(|item| token(item).map(|id| id as TokenId)).collect()
}

pub(super) fn model(body: &mut Fields) -> Result<String, ApiError> {
    match body.string("model")? {
        Some(model) if !model.is_empty() => Ok(model),
        _ => Err(ApiError::missing("model")),
    }
}

/// As Ollama has it: seconds, `"5m"`, 0 to let the model go at once, -1 to keep it.
pub(super) fn keep_alive(body: &mut Fields) -> Result<Option<KeepAlive>, ApiError> {
    let name = "keep_alive";
    let wrong = |why: &str| ApiError::invalid(name, format!("Invalid '{name}': {why}."));
    let too_long = "it is longer than can be counted";
    match body.value(name) {
        None => Ok(None),
        Some(Value::Number(n)) => {
            let time = n.as_f64().and_then(KeepAlive::from_secs);
            time.map(Some).ok_or_else(|| wrong(too_long))
        }
        Some(Value::String(text)) => {
            text.parse().map(Some).map_err(|why| wrong(&format!("'{text}' {why}")))
        }
        Some(other) => {
            let expected = "seconds, or a time such as \"5m\"";
            Err(ApiError::wrong_type(name, expected, extract::kind(&other)))
        }
    }
}

/// `[{"id": "formal", "weight": 0.5}]`: adapters of the model, added up.
fn adapters(body: &mut Fields) -> Result<Vec<Weighted>, ApiError> {
    const NAME: &str = "adapters";
    let list = match body.value(NAME) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(ApiError::wrong_type(NAME, "an array", extract::kind(&other)));
        }
    };
    let one = |(i, value): (usize, Value)| {
        let path = format!("{NAME}[{i}]");
        let Value::Object(map) = value else {
            return Err(ApiError::wrong_type(&path, "an object", extract::kind(&value)));
        };
        fields::check(&map, fields::ADAPTER, &format!("{path}."), false)?;
        let mut fields = Fields::within(&path, map);
        let id = fields.string("id")?.ok_or_else(|| ApiError::missing(&fields.at("id")))?;
        let weight = fields.number("weight", -16.0..=16.0)?.unwrap_or(1.0);
        Ok(Weighted { id, weight })
    };
    list.into_iter().enumerate().map(one).collect()
}

fn stream(body: &mut Fields, lenient: bool) -> Result<Option<StreamOptions>, ApiError> {
    let stream = body.bool("stream")?.unwrap_or(false);
    let options = body.object("stream_options")?;
    if !stream {
        return match options {
            None => Ok(None),
            Some(_) => Err(options_without_stream()),
        };
    }
    let Some(mut options) = options else { return Ok(Some(StreamOptions::default())) };
    fields::check(&options, fields::STREAM_OPTIONS, "stream_options.", lenient)?;
    let include_usage = match options.remove("include_usage") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(include)) => include,
        Some(other) => {
            let name = "stream_options.include_usage";
            return Err(ApiError::wrong_type(name, "a boolean", extract::kind(&other)));
        }
    };
    Ok(Some(StreamOptions { include_usage }))
}

pub(super) fn options_without_stream() -> ApiError {
    let message = "The 'stream_options' parameter is only allowed when 'stream' is enabled.";
    ApiError::invalid("stream_options", message)
}

/// At most this many stop strings, as at OpenAI.
const STOP_MAX: usize = 4;
/// The neighbours name no bound; every character of an answer meets every stop.
const NEIGHBOURS_STOP_MAX: usize = 64;

/// Refuses more stop strings than a neighbour may send.
pub(super) fn check_stops(name: &str, count: usize) -> Result<(), ApiError> {
    if count <= NEIGHBOURS_STOP_MAX {
        return Ok(());
    }
    let message = format!(
        "Invalid '{name}': at most {NEIGHBOURS_STOP_MAX} strings are allowed, got {count}."
    );
    Err(ApiError::invalid(name, message))
}

fn stop(body: &mut Fields) -> Result<Vec<String>, ApiError> {
    let list = match body.value("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![Value::String(one)],
        Some(Value::Array(list)) => list,
        Some(other) => {
            let expected = "a string or an array of strings";
            return Err(ApiError::wrong_type("stop", expected, extract::kind(&other)));
        }
    };
    if list.len() > STOP_MAX {
        let message =
            format!("Invalid 'stop': at most {STOP_MAX} strings are allowed, got {}.", list.len());
        return Err(ApiError::invalid("stop", message));
    }
    let text = |(i, value): (usize, Value)| match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        Value::String(_) => {
            Err(ApiError::invalid("stop", "Invalid 'stop': a stop string cannot be empty."))
        }
        other => {
            Err(ApiError::wrong_type(&format!("stop[{i}]"), "a string", extract::kind(&other)))
        }
    };
    list.into_iter().enumerate().map(text).collect()
}

fn token_list(body: &mut Fields, name: &str) -> Result<Vec<TokenId>, ApiError> {
    match body.value(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => tokens(name, &list),
        Some(other) => {
            Err(ApiError::wrong_type(name, "an array of token ids", extract::kind(&other)))
        }
    }
}

fn sampling(body: &mut Fields) -> Result<SamplingOverrides, ApiError> {
    Ok(SamplingOverrides {
        temperature: body.number("temperature", 0.0..=2.0)?,
        top_p: body.number("top_p", 0.0..=1.0)?,
        // -1 is how some clients say "all", which is 0 here.
        top_k: body.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as usize),
        min_p: body.number("min_p", 0.0..=1.0)?,
        repetition_penalty: body.number("repetition_penalty", 0.01..=10.0)?,
        presence_penalty: body.number("presence_penalty", -2.0..=2.0)?,
        frequency_penalty: body.number("frequency_penalty", -2.0..=2.0)?,
        logit_bias: logit_bias(body)?,
        // Any 64 bits are a key; a negative seed is as good as its two's complement.
        seed: body.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
    })
}

fn logit_bias(body: &mut Fields) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let bias = |(key, value): (String, Value)| {
        let name = format!("logit_bias.{key}");
        let Ok(id) = key.parse::<TokenId>() else {
            let message = format!("Invalid key in 'logit_bias': '{key}' is not a token id.");
            return Err(ApiError::invalid("logit_bias", message));
        };
        Ok((id, extract::number(&name, &value, -100.0..=100.0)?))
    };
    body.object("logit_bias")?.unwrap_or_default().into_iter().map(bias).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<Common, ApiError> {
        Common::read(&mut Fields::parse(body.to_string().as_bytes())?, false)
    }

    #[test]
    fn a_bare_request_overrides_nothing() {
        let common = read(json!({"model": "m"})).unwrap();
        assert_eq!((common.n, common.stream, common.min_tokens), (1, None, 0));
        let s = common.sampling;
        assert!(s.temperature.is_none() && s.top_p.is_none() && s.seed.is_none());
        assert!(s.logit_bias.is_empty() && common.stop.is_empty());
    }

    #[test]
    fn every_field_arrives() {
        let common = read(json!({
            "model": "m", "n": 3, "stop": ["a", "b"], "stop_token_ids": [7, 8], "ignore_eos": true,
            "min_tokens": 4, "temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1,
            "repetition_penalty": 1.1, "presence_penalty": -2, "frequency_penalty": 2,
            "logit_bias": {"50256": -100, "3": 1.5}, "seed": -1,
            "adapters": [{"id": "a"}, {"id": "b", "weight": -0.5}],
            "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false},
        }))
        .unwrap();
        assert_eq!(common.n, 3);
        assert_eq!(common.stop, ["a", "b"]);
        assert_eq!(common.stop_token_ids, [7, 8]);
        assert!(common.ignore_eos);
        assert_eq!(common.stream, Some(StreamOptions { include_usage: true }));
        let s = common.sampling;
        assert_eq!((s.temperature, s.top_p, s.top_k), (Some(0.0), Some(0.5), Some(0)));
        assert_eq!((s.presence_penalty, s.frequency_penalty), (Some(-2.0), Some(2.0)));
        assert_eq!(s.logit_bias, [(50256, -100.0), (3, 1.5)]);
        assert_eq!(s.seed, Some(u64::MAX));
        let weighted = |id: &str, weight| Weighted { id: id.to_owned(), weight };
        assert_eq!(common.adapters, [weighted("a", 1.0), weighted("b", -0.5)]);
    }

    #[test]
    fn a_single_stop_string_is_a_list_of_one() {
        assert_eq!(read(json!({"model": "m", "stop": "END"})).unwrap().stop, ["END"]);
        assert!(read(json!({"model": "m", "stop": []})).unwrap().stop.is_empty());
    }

    #[test]
    fn a_model_is_kept_as_ollama_says_it() {
        let minutes = |n: u64| Some(KeepAlive::For(std::time::Duration::from_secs(60 * n)));
        let forever = Some(KeepAlive::Forever);
        for (value, want) in [
            (json!(null), None),
            (json!("5m"), minutes(5)),
            (json!(300), minutes(5)),
            (json!(0), minutes(0)),
            (json!("0"), minutes(0)),
            (json!(-1), forever),
            (json!("-1m"), forever),
        ] {
            let common = read(json!({"model": "m", "keep_alive": value})).unwrap();
            assert_eq!(common.keep_alive, want, "{value}");
        }
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let cases = [
            (json!({}), "model"),
            (json!({"model": ""}), "model"),
            (json!({"model": 3}), "model"),
            (json!({"model": "m", "n": 0}), "n"),
            (json!({"model": "m", "n": 129}), "n"),
            (json!({"model": "m", "temperature": -0.1}), "temperature"),
            (json!({"model": "m", "temperature": 2.1}), "temperature"),
            (json!({"model": "m", "temperature": "0"}), "temperature"),
            (json!({"model": "m", "top_p": 1.01}), "top_p"),
            (json!({"model": "m", "top_k": -2}), "top_k"),
            (json!({"model": "m", "min_p": 2}), "min_p"),
            (json!({"model": "m", "repetition_penalty": 0}), "repetition_penalty"),
            (json!({"model": "m", "presence_penalty": 2.5}), "presence_penalty"),
            (json!({"model": "m", "frequency_penalty": -3}), "frequency_penalty"),
            (json!({"model": "m", "seed": 1.5}), "seed"),
            (json!({"model": "m", "logit_bias": {"cat": 1}}), "logit_bias"),
            (json!({"model": "m", "logit_bias": {"5": 101}}), "logit_bias.5"),
            (json!({"model": "m", "logit_bias": [1]}), "logit_bias"),
            (json!({"model": "m", "stop": ""}), "stop"),
            (json!({"model": "m", "stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"model": "m", "stop": ["a", 5]}), "stop[1]"),
            (json!({"model": "m", "stop_token_ids": [1, -1]}), "stop_token_ids[1]"),
            (json!({"model": "m", "stop_token_ids": "1"}), "stop_token_ids"),
            (json!({"model": "m", "stream": "yes"}), "stream"),
            (json!({"model": "m", "keep_alive": "soon"}), "keep_alive"),
            (json!({"model": "m", "keep_alive": 1e300}), "keep_alive"),
            (json!({"model": "m", "keep_alive": [5]}), "keep_alive"),
            (json!({"model": "m", "adapters": "a"}), "adapters"),
            (json!({"model": "m", "adapters": [{}]}), "adapters[0].id"),
            (json!({"model": "m", "adapters": [{"id": "a", "scale": 1}]}), "adapters[0].scale"),
            (json!({"model": "m", "adapters": [{"id": "a", "weight": 17}]}), "adapters[0].weight"),
            (json!({"model": "m", "stream_options": {}}), "stream_options"),
            (
                json!({"model": "m", "stream": true, "stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
            ),
            (
                json!({"model": "m", "stream": true, "stream_options": {"usage": true}}),
                "stream_options.usage",
            ),
        ];
        for (body, param) in cases {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.status, 400, "{body}");
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }
}
