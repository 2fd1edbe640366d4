//! `options`: how to generate, by Ollama's names.

use serde_json::{Map, Value};

use crate::pipeline::TextRequest;
use crate::server::call;
use crate::server::error::ApiError;
use crate::server::extract::{Fields, kind};
use crate::server::fields::{self, Field, Takes, honoured, no_effect, refused};
use crate::types::SamplingOverrides;

const MACHINE: &str = "how the machine is used is settled when the server starts";
const MEMORY: &str = "how a model lies in memory is settled when the server starts";
const MIROSTAT: &str = "it does nothing without mirostat, which is refused";

/// Every option that Ollama has or had.
pub(super) const OPTIONS: &[Field] = &[
    honoured("num_predict", Takes::Integer),
    honoured("temperature", Takes::Between(0.0, 100.0)),
    honoured("top_k", Takes::Integer),
    honoured("top_p", fields::SHARE),
    honoured("min_p", fields::SHARE),
    honoured("seed", Takes::Integer),
    honoured("stop", fields::TEXT_OR_LIST),
    honoured("repeat_penalty", fields::REPETITION),
    honoured("presence_penalty", fields::PENALTY),
    honoured("frequency_penalty", fields::PENALTY),
    // All of the text (-1) or none (0); another window would change the answer.
    honoured("repeat_last_n", Takes::Integer),
    no_effect(
        "num_ctx",
        Takes::Integer,
        "a context is as long as the server planned; what does not fit is refused, never cut",
    ),
    no_effect("num_keep", Takes::Integer, "nothing of a prompt is ever cut away"),
    no_effect("num_batch", Takes::Integer, MACHINE),
    no_effect("num_gpu", Takes::Integer, MACHINE),
    no_effect("main_gpu", Takes::Integer, MACHINE),
    no_effect("num_thread", Takes::Integer, MACHINE),
    no_effect("numa", Takes::Bool, MACHINE),
    no_effect("low_vram", Takes::Bool, MEMORY),
    no_effect("f16_kv", Takes::Bool, MEMORY),
    no_effect("use_mmap", Takes::Bool, MEMORY),
    no_effect("use_mlock", Takes::Bool, MEMORY),
    no_effect("mirostat_tau", Takes::Number, MIROSTAT),
    no_effect("mirostat_eta", Takes::Number, MIROSTAT),
    refused("mirostat", is_zero, "this sampler is not here"),
    refused("tfs_z", is_one, "this sampler is not here"),
    refused("typical_p", is_one, "this sampler is not here"),
    refused("penalize_newline", is_true, "line breaks are tokens like others"),
    refused("logits_all", is_false, "ask for 'logprobs'"),
    refused("vocab_only", is_false, "a model is served whole"),
    refused("embedding_only", is_false, "a model is what its files say"),
];

/// Reads the options into a request.
///
/// # Errors
/// The first one that is unknown, refused, malformed or out of range.
pub(super) fn read(
    body: &mut Fields,
    request: TextRequest,
    lenient: bool,
) -> Result<TextRequest, ApiError> {
    let Some(map) = body.object("options")? else { return Ok(request) };
    fields::check(&map, OPTIONS, "options.", lenient)?;
    let mut options = Fields::within("options", map);
    let max_tokens = options.integer("num_predict", -2..=i64::from(u32::MAX))?;
    let mut sampling = SamplingOverrides {
        temperature: options.number("temperature", 0.0..=100.0)?,
        top_p: options.number("top_p", 0.0..=1.0)?,
        top_k: options.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as usize),
        min_p: options.number("min_p", 0.0..=1.0)?,
        repetition_penalty: options.number("repeat_penalty", 0.01..=10.0)?,
        presence_penalty: options.number("presence_penalty", -2.0..=2.0)?,
        frequency_penalty: options.number("frequency_penalty", -2.0..=2.0)?,
        // -1 is no seed.
        seed: options.integer("seed", i64::MIN..=i64::MAX)?.filter(|s| *s != -1).map(|s| s as u64),
        ..SamplingOverrides::default()
    };
    repeat_last_n(&mut options, &mut sampling)?;
    let stop = stop(options.value("stop"))?;
    Ok(TextRequest {
        // What is not positive means no limit.
        max_tokens: max_tokens.filter(|max| *max > 0).map(|max| max as usize),
        max_tokens_param: "options.num_predict",
        stop,
        sampling,
        ..request
    })
}

/// For `embed`, where none of them changes a vector.
pub(super) fn check(options: &Map<String, Value>, lenient: bool) -> Result<(), ApiError> {
    fields::check(options, OPTIONS, "options.", lenient)
}

/// The penalties here look at the whole text.
fn repeat_last_n(options: &mut Fields, sampling: &mut SamplingOverrides) -> Result<(), ApiError> {
    const NAME: &str = "options.repeat_last_n";
    let penalised = sampling.repetition_penalty.is_some_and(|penalty| penalty != 1.0)
        || [sampling.presence_penalty, sampling.frequency_penalty]
            .iter()
            .any(|penalty| penalty.is_some_and(|penalty| penalty != 0.0));
    match options.integer("repeat_last_n", -1..=i64::from(u32::MAX))? {
        None | Some(-1) => Ok(()),
        Some(0) => {
            sampling.repetition_penalty = Some(1.0);
            (sampling.presence_penalty, sampling.frequency_penalty) = (Some(0.0), Some(0.0));
            Ok(())
        }
        Some(_) if !penalised => Ok(()),
        Some(_) => {
            let message = format!(
                "Unsupported '{NAME}': penalties look at the whole text (-1) or at nothing (0)."
            );
            Err(ApiError::unsupported(NAME, message))
        }
    }
}

fn stop(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "options.stop";
    let list = match value {
        None => return Ok(Vec::new()),
        Some(one @ Value::String(_)) => vec![one],
        Some(Value::Array(list)) => list,
        Some(other) => {
            let expected = "a string or an array of strings";
            return Err(ApiError::wrong_type(NAME, expected, kind(&other)));
        }
    };
    call::check_stops(NAME, list.len())?;
    let text = |(i, value)| match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        Value::String(_) => {
            let path = format!("{NAME}[{i}]");
            Err(ApiError::invalid(&path, format!("Invalid '{path}': the text is empty.")))
        }
        other => Err(ApiError::wrong_type(&format!("{NAME}[{i}]"), "a string", kind(&other))),
    };
    list.into_iter().enumerate().map(text).collect()
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_true(value: &Value) -> bool {
    value == true
}

fn is_false(value: &Value) -> bool {
    value == false
}
