//! `POST /v1/embeddings`: its body in, its list of vectors out.

use axum::Json;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::Value;

use super::App;
use super::call;
use super::error::ApiError;
use super::extract::{Fields, kind};
use super::fields;
use super::observe::Watch;
use crate::auth::Caller;
use crate::pipeline::{EmbedInput, EmbedRequest};
use crate::types::Tenant;

/// Inputs of one request, as at OpenAI.
const INPUTS_MAX: usize = 2048;

/// One call, read and validated.
#[derive(Debug)]
pub(super) struct Call {
    request: EmbedRequest,
    encoding: Encoding,
}

impl Call {
    /// The model that it asks.
    pub(super) fn model(&self) -> &str {
        &self.request.model
    }

    /// How many texts there are.
    pub(super) fn inputs(&self) -> usize {
        self.request.inputs.len()
    }
}

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// A list of numbers.
    Float,
    /// Their bytes, f32 in little-endian order, in base64. The official clients ask for it.
    Base64,
}

/// Reads a body.
///
/// # Errors
/// The first field that is unknown, malformed or out of range.
pub(super) fn parse(mut body: Fields, lenient: bool) -> Result<Call, ApiError> {
    fields::check(body.map(), fields::EMBEDDINGS, "", lenient)?;
    let model = call::model(&mut body)?;
    let inputs = inputs(body.value("input"))?;
    let dimensions = body.count("dimensions", 1..=u32::MAX)?;
    let keep_alive = call::keep_alive(&mut body)?;
    let encoding = match body.string("encoding_format")?.as_deref() {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(other) => {
            let message = format!(
                "Invalid 'encoding_format': expected 'float' or 'base64', but got '{other}' \
                 instead."
            );
            return Err(ApiError::invalid("encoding_format", message));
        }
    };
    let truncate = false;
    let tenant = Tenant::default(); // who asks, the answer knows
    let request = EmbedRequest { model, inputs, dimensions, truncate, keep_alive, tenant };
    Ok(Call { request, encoding })
}

/// Answers a call. Dropping the future cancels it.
pub(super) async fn answer(
    app: &App,
    watch: &Watch,
    caller: &Caller,
    call: Call,
) -> Result<Response, ApiError> {
    let request = EmbedRequest { tenant: caller.tenant, ..call.request };
    let embedding = app.pipeline.embed(request).await?;
    watch.embedding(&embedding);
    let embeddings = embedding.wait().await?;
    watch.embedded();
    let (model, prompt_tokens) = (embeddings.model, embeddings.prompt_tokens);
    let item = |(index, vector)| Item {
        object: "embedding",
        index,
        embedding: match call.encoding {
            Encoding::Float => Vector::Float(vector),
            Encoding::Base64 => Vector::Base64(base64(&vector)),
        },
    };
    let data = embeddings.vectors.into_iter().enumerate().map(item).collect();
    let usage = Usage { prompt_tokens, total_tokens: prompt_tokens };
    Ok(Json(List { object: "list", data, model, usage }).into_response())
}

// The answer is written from these and not from a `Value`, which would widen every number to f64
// and spell out the digits of that.

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Item>,
    model: String,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

fn base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

/// `string | [string] | [token] | [[token]]`.
pub(super) fn inputs(input: Option<Value>) -> Result<Vec<EmbedInput>, ApiError> {
    let list = match input {
        None => return Err(ApiError::missing("input")),
        Some(Value::String(text)) => return Ok(vec![one_text("input", text)?]),
        Some(Value::Array(list)) => list,
        Some(other) => {
            let expected = "a string, an array of strings, or an array of token ids";
            return Err(ApiError::wrong_type("input", expected, kind(&other)));
        }
    };
    if matches!(list.first(), Some(Value::Number(_))) {
        return Ok(vec![EmbedInput::Tokens(call::tokens("input", &list)?)]);
    }
    if list.is_empty() || list.len() > INPUTS_MAX {
        let message = format!(
            "Invalid 'input': expected between 1 and {INPUTS_MAX} inputs, but got {}.",
            list.len()
        );
        return Err(ApiError::invalid("input", message));
    }
    let texts = matches!(list.first(), Some(Value::String(_)));
    let read = |(i, value): (usize, Value)| {
        let name = format!("input[{i}]");
        match value {
            Value::String(text) if texts => one_text(&name, text),
            Value::Array(ids) if !texts && ids.is_empty() => Err(empty(&name, "array")),
            Value::Array(ids) if !texts => call::tokens(&name, &ids).map(EmbedInput::Tokens),
            other => {
                let expected = if texts { "a string" } else { "an array of token ids" };
                Err(ApiError::wrong_type(&name, expected, kind(&other)))
            }
        }
    };
    list.into_iter().enumerate().map(read).collect()
}

fn one_text(name: &str, text: String) -> Result<EmbedInput, ApiError> {
    match text.is_empty() {
        true => Err(empty(name, "string")),
        false => Ok(EmbedInput::Text(text)),
    }
}

fn empty(name: &str, what: &str) -> ApiError {
    ApiError::invalid(name, format!("Invalid '{name}': the {what} cannot be empty."))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<Call, ApiError> {
        parse(Fields::parse(body.to_string().as_bytes())?, false)
    }

    fn inputs_of(input: Value) -> Vec<String> {
        let call = read(json!({"model": "m", "input": input})).unwrap();
        let name = |input: &EmbedInput| match input {
            EmbedInput::Text(text) => text.clone(),
            EmbedInput::Tokens(ids) => format!("{ids:?}"),
        };
        call.request.inputs.iter().map(name).collect()
    }

    #[test]
    fn all_four_forms_of_an_input() {
        assert_eq!(inputs_of(json!("a")), ["a"]);
        assert_eq!(inputs_of(json!(["a", "b"])), ["a", "b"]);
        assert_eq!(inputs_of(json!([1, 2])), ["[1, 2]"]);
        assert_eq!(inputs_of(json!([[1, 2], [3]])), ["[1, 2]", "[3]"]);
        assert_eq!(inputs_of(json!(vec!["a"; INPUTS_MAX])).len(), INPUTS_MAX);
        // One text of many tokens is one input.
        assert_eq!(inputs_of(json!(vec![1; INPUTS_MAX + 1])).len(), 1);
    }

    #[test]
    fn bad_fields_are_refused_by_path() {
        let cases = [
            (json!({"input": "a"}), "model", "missing_required_parameter"),
            (json!({"model": "", "input": "a"}), "model", "missing_required_parameter"),
            (json!({"model": "m"}), "input", "missing_required_parameter"),
            (json!({"model": "m", "input": null}), "input", "missing_required_parameter"),
            (json!({"model": "m", "input": 5}), "input", "invalid_type"),
            (json!({"model": "m", "input": {}}), "input", "invalid_type"),
            (json!({"model": "m", "input": ""}), "input", "invalid_value"),
            (json!({"model": "m", "input": []}), "input", "invalid_value"),
            (json!({"model": "m", "input": vec!["a"; 2049]}), "input", "invalid_value"),
            (json!({"model": "m", "input": ["a", ""]}), "input[1]", "invalid_value"),
            (json!({"model": "m", "input": ["a", 1]}), "input[1]", "invalid_type"),
            (json!({"model": "m", "input": [1, "a"]}), "input[1]", "invalid_type"),
            (json!({"model": "m", "input": [1, -1]}), "input[1]", "invalid_value"),
            (json!({"model": "m", "input": [1, 1.5]}), "input[1]", "invalid_type"),
            (json!({"model": "m", "input": [[1], []]}), "input[1]", "invalid_value"),
            (json!({"model": "m", "input": [[1], "a"]}), "input[1]", "invalid_type"),
            (json!({"model": "m", "input": [[1], [2, "x"]]}), "input[1][1]", "invalid_type"),
            (json!({"model": "m", "input": [true]}), "input[0]", "invalid_type"),
            (json!({"model": "m", "input": "a", "dimensions": 0}), "dimensions", "invalid_value"),
            (json!({"model": "m", "input": "a", "dimensions": "8"}), "dimensions", "invalid_type"),
            (
                json!({"model": "m", "input": "a", "encoding_format": "int8"}),
                "encoding_format",
                "invalid_value",
            ),
            (
                json!({"model": "m", "input": "a", "encoding_format": 1}),
                "encoding_format",
                "invalid_type",
            ),
            (json!({"model": "m", "input": "a", "inputs": []}), "inputs", "unknown_parameter"),
        ];
        for (body, param, code) in cases {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
            assert_eq!(error.code, Some(code), "{body}");
        }
    }

    #[test]
    fn vectors_are_little_endian_and_numbers_are_short() {
        assert_eq!(base64(&[1.0, -2.0]), "AACAPwAAAMA=");
        let numbers = serde_json::to_string(&Vector::Float(vec![0.1, -2.0])).unwrap();
        assert_eq!(numbers, "[0.1,-2.0]");
    }
}
