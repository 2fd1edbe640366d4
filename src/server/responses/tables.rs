//! Every field of a response's bodies, and what this server does with it.

use super::request::OUTPUT_TOKENS_MIN;
use crate::server::fields::{self, Field, Takes, honoured, no_effect, refused, required};

const ROOM: Takes = Takes::Count(OUTPUT_TOKENS_MIN as i64, u32::MAX as i64);

/// `POST /v1/responses`.
pub(super) const RESPONSES: &[Field] = &[
    honoured("background", Takes::Bool),
    honoured("conversation", fields::TEXT_OR_OBJECT),
    honoured("include", fields::TEXTS),
    honoured("input", fields::TEXT_OR_LIST),
    honoured("instructions", Takes::Text),
    honoured("max_output_tokens", ROOM),
    honoured("metadata", Takes::Object),
    required("model", Takes::Text),
    honoured("parallel_tool_calls", Takes::Bool),
    honoured("previous_response_id", Takes::Text),
    honoured("reasoning", Takes::Table(REASONING)),
    honoured("service_tier", fields::TIER),
    honoured("store", Takes::Bool),
    honoured("stream", Takes::Bool),
    honoured("stream_options", Takes::Table(STREAM_OPTIONS)),
    honoured("temperature", fields::TEMPERATURE),
    honoured("text", Takes::Table(TEXT)),
    honoured("tool_choice", fields::TEXT_OR_OBJECT),
    honoured("tools", Takes::List),
    honoured("top_logprobs", fields::TOP_LOGPROBS),
    honoured("top_p", fields::SHARE),
    honoured("truncation", Takes::Word(&["auto", "disabled"])),
    no_effect("access_programs", Takes::Object, "who may ask is a matter of keys alone"),
    no_effect("background_options", Takes::Object, "what waits runs as soon as there is room"),
    IMAGE,
    no_effect("max_tool_calls", Takes::Integer, "counts calls of hosted tools, and there are none"),
    CACHE_KEY,
    CACHE_OPTIONS,
    CACHE_RETENTION,
    no_effect("safety_identifier", Takes::Text, "for the abuse monitoring of a hosted service"),
    no_effect("user", Takes::Text, "for the abuse monitoring of a hosted service"),
    refused("context_management", fields::is_empty_list, "nothing is compacted on its own"),
    refused("moderation", fields::never, "moderation inside a response is not supported"),
    refused("prompt", fields::never, "there are no stored prompts yet"),
    // Not OpenAI's: extras that clients of local servers send.
    honoured("adapters", Takes::Each(&Takes::Table(fields::ADAPTER))),
    honoured("chat_template_kwargs", Takes::Object),
    honoured("frequency_penalty", fields::PENALTY),
    honoured("ignore_eos", Takes::Bool),
    honoured("keep_alive", fields::TEXT_OR_NUMBER),
    honoured("min_p", fields::SHARE),
    honoured("presence_penalty", fields::PENALTY),
    honoured("repetition_penalty", fields::REPETITION),
    honoured("seed", Takes::Integer),
    honoured("top_k", fields::TOP_K),
];

const IMAGE: Field = no_effect("image", Takes::Object, "no picture is read");
const CACHED: &str = "what is cached is cached without being asked for";
const CACHE_KEY: Field =
    no_effect("prompt_cache_key", Takes::Text, "a routing hint for many machines; this is one");
const CACHE_OPTIONS: Field = no_effect("prompt_cache_options", Takes::Object, CACHED);
const CACHE_RETENTION: Field = no_effect("prompt_cache_retention", fields::CACHE_RETENTION, CACHED);

/// `POST /v1/responses/compact`.
pub(super) const COMPACT: &[Field] = &[
    IMAGE,
    honoured("input", fields::TEXT_OR_LIST),
    honoured("instructions", Takes::Text),
    required("model", Takes::Text),
    honoured("previous_response_id", Takes::Text),
    honoured("service_tier", fields::TIER),
    CACHE_KEY,
    CACHE_OPTIONS,
    CACHE_RETENTION,
];

/// `POST /v1/responses/input_tokens`. What a chat has no field for does not change how many there
/// are.
pub(super) const INPUT_TOKENS: &[Field] = &[
    honoured("conversation", fields::TEXT_OR_OBJECT),
    honoured("input", fields::TEXT_OR_LIST),
    honoured("instructions", Takes::Text),
    required("model", Takes::Text),
    honoured("parallel_tool_calls", Takes::Bool),
    no_effect("personality", Takes::Text, "no served model has presets of style"),
    honoured("previous_response_id", Takes::Text),
    honoured("reasoning", Takes::Table(REASONING)),
    honoured("text", Takes::Table(TEXT)),
    honoured("tool_choice", fields::TEXT_OR_OBJECT),
    honoured("tools", Takes::List),
    honoured("truncation", Takes::Word(&["auto", "disabled"])),
];

/// `text`.
pub(super) const TEXT: &[Field] = &[
    honoured("format", Takes::Object),
    no_effect("verbosity", fields::VERBOSITY, "a hint that no served model was trained to follow"),
];

const SUMMARY: Takes = Takes::Word(&["auto", "concise", "detailed"]);

/// `reasoning`.
pub(super) const REASONING: &[Field] = &[
    honoured("effort", fields::EFFORT),
    no_effect("summary", SUMMARY, "what is thought is shown as it is"),
    no_effect("generate_summary", SUMMARY, "what is thought is shown as it is"),
];

/// `stream_options`.
pub(super) const STREAM_OPTIONS: &[Field] = &[no_effect(
    "include_obfuscation",
    Takes::Bool,
    "padding against an eavesdropper that localhost has not",
)];
