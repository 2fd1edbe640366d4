//! The tables of fields: that every field has a place, and what each place does.

use std::collections::HashSet;

use serde_json::json;

use super::*;

/// Property names of `CreateChatCompletionRequest`, its parents included, in OpenAI's
/// specification 2.3.0 of 2026-08-21.
const OPENAI_CHAT: &str = "metadata top_logprobs temperature top_p user safety_identifier \
    prompt_cache_key prompt_cache_retention prompt_cache_options messages model service_tier \
    modalities verbosity reasoning_effort max_completion_tokens frequency_penalty \
    presence_penalty web_search_options response_format audio store moderation stream stop \
    logit_bias logprobs max_tokens n prediction seed stream_options tools tool_choice \
    parallel_tool_calls function_call functions";
/// The same of `CreateCompletionRequest`.
const OPENAI_COMPLETIONS: &str = "model prompt best_of echo frequency_penalty logit_bias \
    logprobs max_tokens n presence_penalty seed stop stream stream_options suffix temperature \
    top_p user";
/// The same of `CreateEmbeddingRequest`.
const OPENAI_EMBEDDINGS: &str = "input model encoding_format dimensions user";
/// The same of `CreateBatchRequest`.
const OPENAI_BATCH: &str = "input_file_id endpoint completion_window metadata output_expires_after";
/// The same of `ChatCompletionStreamOptions`.
const OPENAI_STREAM_OPTIONS: &str = "include_usage include_obfuscation";

#[test]
fn every_field_of_the_specification_stands_in_its_table_once() {
    let tables = [
        (CHAT, OPENAI_CHAT, 37),
        (COMPLETIONS, OPENAI_COMPLETIONS, 18),
        (EMBEDDINGS, OPENAI_EMBEDDINGS, 5),
        (BATCH, OPENAI_BATCH, 5),
        (STREAM_OPTIONS, OPENAI_STREAM_OPTIONS, 2),
    ];
    for (table, openai, count) in tables {
        let names: HashSet<_> = table.iter().map(|field| field.name).collect();
        assert_eq!(names.len(), table.len(), "a name stands twice");
        assert_eq!(openai.split_whitespace().count(), count);
        for name in openai.split_whitespace() {
            assert!(names.contains(name), "{name} is missing");
        }
    }
}

fn check_one(table: &[Field], name: &str, value: Value) -> Result<(), ApiError> {
    let body = Map::from_iter([(name.to_owned(), value)]);
    check(&body, table, "", false)
}

#[test]
fn refused_fields_are_refused_by_name_only_when_they_ask_for_something() {
    let chat = [
        ("audio", json!({"voice": "alloy", "format": "mp3"}), vec![json!(null)]),
        ("modalities", json!(["text", "audio"]), vec![json!(["text"]), json!(null)]),
        ("moderation", json!({"model": "omni"}), vec![json!(null)]),
        ("web_search_options", json!({}), vec![json!(null)]),
    ];
    let covered: HashSet<_> = chat.iter().map(|case| case.0).collect();
    for (name, asks, harmless) in chat {
        let error = check_one(CHAT, name, asks).unwrap_err();
        assert_eq!(error.code, Some("unsupported_parameter"));
        assert_eq!(error.param.as_deref(), Some(name));
        assert!(error.message.contains(name));
        for value in harmless {
            assert!(check_one(CHAT, name, value.clone()).is_ok(), "{name}: {value}");
        }
    }
    let refused = |field: &&Field| matches!(field.treatment, Treatment::Refused { .. });
    for field in CHAT.iter().filter(refused) {
        assert!(covered.contains(field.name), "{} has no case here", field.name);
    }
}

#[test]
fn a_field_without_effect_has_its_type_all_the_same() {
    for (name, bad, good) in [
        ("user", json!(5), json!("ann")),
        ("prompt_cache_retention", json!("1h"), json!("24h")),
        ("verbosity", json!("loud"), json!("low")),
        ("safety_identifier", json!([]), json!(null)),
    ] {
        assert_eq!(check_one(CHAT, name, bad).unwrap_err().param.as_deref(), Some(name));
        assert!(check_one(CHAT, name, good).is_ok(), "{name}");
    }
    let error = check_one(STREAM_OPTIONS, "include_obfuscation", json!("no")).unwrap_err();
    assert_eq!(error.code, Some("invalid_type"));
    let error = check_one(CHAT, "verbosity", json!("loud")).unwrap_err();
    assert_eq!(error.code, Some("invalid_value"));
}

#[test]
fn a_field_that_nobody_knows_is_refused_unless_lenient() {
    let body = Map::from_iter([("tempature".to_owned(), json!(0.5))]);
    let error = check(&body, CHAT, "", false).unwrap_err();
    assert_eq!(error.code, Some("unknown_parameter"));
    assert_eq!(error.param.as_deref(), Some("tempature"));
    assert_eq!(error.message, "Unrecognized request argument supplied: tempature");
    assert!(check(&body, CHAT, "", true).is_ok());
    let error = check(&body, STREAM_OPTIONS, "stream_options.", false).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("stream_options.tempature"));
}
