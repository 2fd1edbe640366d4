//! Every field of a request body, and what this server does with it. One table per endpoint.
//!
//! The tables are the promise of the wire: a field is honoured, or accepted without effect for a
//! reason that stands here, or refused by name when its value would change the answer. What stands
//! in no table is refused too, unless the operator chose lenient fields. A test holds the tables
//! against the list of property names in OpenAI's specification.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::extract::kind;

/// What becomes of a field.
pub(super) enum Treatment {
    /// It does what the specification says.
    Honoured,
    /// Taken, if it is of this type, and changes nothing, because of this.
    NoEffect(Takes, &'static str),
    /// A 400 naming the field and this reason, unless the value asks for nothing.
    Refused { harmless: fn(&Value) -> bool, reason: &'static str },
}

/// What a field may be that nobody else looks at.
#[derive(Clone, Copy)]
pub(super) enum Takes {
    Bool,
    Integer,
    Number,
    Object,
    Text,
    /// One of these texts.
    Word(&'static [&'static str]),
}

impl Takes {
    fn check(self, name: &str, value: &Value) -> Result<(), ApiError> {
        let (fits, expected) = match self {
            Self::Bool => (value.is_boolean(), "a boolean"),
            Self::Integer => (value.is_i64() || value.is_u64(), "an integer"),
            Self::Number => (value.is_number(), "a number"),
            Self::Object => (value.is_object(), "an object"),
            Self::Text | Self::Word(_) => (value.is_string(), "a string"),
        };
        if !fits && !value.is_null() {
            return Err(ApiError::wrong_type(name, expected, kind(value)));
        }
        match (self, value.as_str()) {
            (Self::Word(words), Some(word)) if !words.contains(&word) => {
                let words = words.join("', '");
                let message = format!("Invalid value: '{word}'. Supported values are: '{words}'.");
                Err(ApiError::invalid(name, message))
            }
            _ => Ok(()),
        }
    }
}

/// `verbosity` of a chat and of the text of a response.
pub(super) const VERBOSITY: Takes = Takes::Word(&["low", "medium", "high"]);

/// The last spelling is that of older clients.
pub(super) const CACHE_RETENTION: Takes = Takes::Word(&["in_memory", "24h", "in-memory"]);

pub(super) struct Field {
    pub name: &'static str,
    pub treatment: Treatment,
}

pub(super) const fn honoured(name: &'static str) -> Field {
    Field { name, treatment: Treatment::Honoured }
}

pub(super) const fn no_effect(name: &'static str, takes: Takes, reason: &'static str) -> Field {
    Field { name, treatment: Treatment::NoEffect(takes, reason) }
}

pub(super) const fn refused(
    name: &'static str,
    harmless: fn(&Value) -> bool,
    reason: &'static str,
) -> Field {
    Field { name, treatment: Treatment::Refused { harmless, reason } }
}

/// `POST /v1/chat/completions`.
pub(super) const CHAT: &[Field] = &[
    honoured("messages"),
    honoured("model"),
    honoured("max_completion_tokens"),
    honoured("max_tokens"),
    honoured("n"),
    honoured("stop"),
    honoured("stream"),
    honoured("stream_options"),
    honoured("logprobs"),
    honoured("top_logprobs"),
    honoured("temperature"),
    honoured("top_p"),
    honoured("frequency_penalty"),
    honoured("presence_penalty"),
    honoured("logit_bias"),
    honoured("seed"),
    honoured("service_tier"),
    // A variable for the chat template, where models that know it read it.
    honoured("reasoning_effort"),
    honoured("response_format"),
    honoured("parallel_tool_calls"),
    honoured("tool_choice"),
    honoured("tools"),
    // Labels of a stored completion; checked, and of no effect without `store`.
    honoured("metadata"),
    honoured("prediction"),
    no_effect("prompt_cache_key", Takes::Text, "a routing hint for many machines; this is one"),
    no_effect("prompt_cache_options", Takes::Object, "every prefix is cached while there is room"),
    no_effect(
        "prompt_cache_retention",
        CACHE_RETENTION,
        "every prefix is cached while there is room",
    ),
    no_effect("safety_identifier", Takes::Text, "for the abuse monitoring of a hosted service"),
    no_effect("user", Takes::Text, "for the abuse monitoring of a hosted service"),
    no_effect("verbosity", VERBOSITY, "a hint that no served model was trained to follow"),
    refused("audio", never, "audio output is not supported"),
    refused("function_call", is_word_none_or_auto, "functions are called as 'tools' here"),
    refused("functions", is_empty_list, "functions are called as 'tools' here"),
    refused("moderation", never, "moderation inside a completion is not supported"),
    refused("modalities", is_text_only, "only the modality 'text' is supported"),
    honoured("store"),
    refused("web_search_options", never, "web search is not supported"),
    // Not OpenAI's: extras that clients of local servers send.
    honoured("adapters"),
    honoured("chat_template_kwargs"),
    honoured("guided_choice"),
    honoured("guided_grammar"),
    honoured("guided_json"),
    honoured("guided_regex"),
    honoured("ignore_eos"),
    honoured("keep_alive"),
    honoured("min_p"),
    honoured("min_tokens"),
    honoured("prompt_logprobs"),
    honoured("repetition_penalty"),
    honoured("return_token_ids"),
    honoured("stop_token_ids"),
    honoured("structured_outputs"),
    honoured("top_k"),
];

/// `POST /v1/completions`.
pub(super) const COMPLETIONS: &[Field] = &[
    honoured("model"),
    honoured("prompt"),
    honoured("best_of"),
    honoured("echo"),
    honoured("frequency_penalty"),
    honoured("logit_bias"),
    honoured("logprobs"),
    honoured("max_tokens"),
    honoured("n"),
    honoured("presence_penalty"),
    honoured("seed"),
    honoured("stop"),
    honoured("stream"),
    honoured("stream_options"),
    honoured("temperature"),
    honoured("top_p"),
    no_effect("user", Takes::Text, "for the abuse monitoring of a hosted service"),
    // Honoured by models that learned to fill in the middle; the others refuse it.
    honoured("suffix"),
    // Not OpenAI's: extras that clients of local servers send.
    honoured("adapters"),
    honoured("guided_choice"),
    honoured("guided_grammar"),
    honoured("guided_json"),
    honoured("guided_regex"),
    honoured("ignore_eos"),
    honoured("keep_alive"),
    honoured("min_p"),
    honoured("min_tokens"),
    honoured("prompt_logprobs"),
    honoured("repetition_penalty"),
    honoured("return_token_ids"),
    honoured("stop_token_ids"),
    honoured("structured_outputs"),
    honoured("top_k"),
];

/// One of `adapters`.
pub(super) const ADAPTER: &[Field] = &[honoured("id"), honoured("weight")];

/// `POST /v1/load_lora_adapter`, as vLLM has it; the last two are ours.
pub(super) const LOAD_ADAPTER: &[Field] = &[
    honoured("lora_name"),
    honoured("lora_path"),
    honoured("load_inplace"),
    honoured("base_model_name"),
    honoured("pinned"),
];

/// `POST /v1/unload_lora_adapter`.
pub(super) const UNLOAD_ADAPTER: &[Field] =
    &[honoured("lora_name"), no_effect("lora_int_id", Takes::Integer, "adapters have names here")];

/// `POST /v1/embeddings`.
pub(super) const EMBEDDINGS: &[Field] = &[
    honoured("input"),
    honoured("model"),
    // Honoured where the model was trained for it.
    honoured("dimensions"),
    honoured("encoding_format"),
    no_effect("user", Takes::Text, "for the abuse monitoring of a hosted service"),
    // Not OpenAI's.
    honoured("keep_alive"),
];

/// `POST /tokenize`.
pub(super) const TOKENIZE: &[Field] = &[
    honoured("model"),
    honoured("prompt"),
    honoured("content"),
    honoured("messages"),
    honoured("tools"),
    honoured("tool_choice"),
    honoured("parallel_tool_calls"),
    honoured("chat_template_kwargs"),
    honoured("add_special"),
    honoured("add_special_tokens"),
    honoured("parse_special"),
    honoured("return_token_strs"),
    honoured("with_pieces"),
];

/// `POST /detokenize`.
pub(super) const DETOKENIZE: &[Field] = &[honoured("model"), honoured("tokens")];

/// `POST /apply-template`.
pub(super) const APPLY_TEMPLATE: &[Field] = &[
    honoured("model"),
    honoured("messages"),
    honoured("tools"),
    honoured("tool_choice"),
    honoured("parallel_tool_calls"),
    honoured("chat_template_kwargs"),
];

/// `prediction`.
pub(super) const PREDICTION: &[Field] = &[honoured("type"), honoured("content")];

/// `tools[i].function`.
pub(super) const FUNCTION: &[Field] =
    &[honoured("name"), honoured("description"), honoured("parameters"), honoured("strict")];

/// `tools[i].custom`.
pub(super) const CUSTOM_TOOL: &[Field] =
    &[honoured("name"), honoured("description"), honoured("format")];

/// `response_format.json_schema`.
pub(super) const JSON_SCHEMA: &[Field] = &[
    honoured("name"),
    honoured("schema"),
    no_effect(
        "description",
        Takes::Text,
        "a hint for models that see it; here the grammar is enough",
    ),
    no_effect("strict", Takes::Bool, "the schema is enforced in any case"),
];

/// `structured_outputs`, as vLLM has it.
pub(super) const STRUCTURED_OUTPUTS: &[Field] = &[
    honoured("choice"),
    honoured("grammar"),
    honoured("json"),
    honoured("json_object"),
    honoured("regex"),
];

/// `POST /v1/admin/keys`.
pub(super) const ADMIN_KEY: &[Field] = &[
    honoured("name"),
    honoured("project"),
    honoured("admin"),
    honoured("weight"),
    honoured("max_running"),
    honoured("requests_per_min"),
    honoured("tokens_per_min"),
    honoured("expires_at"),
];

/// The bodies that set the labels of an object and nothing else.
pub(super) const METADATA: &[Field] = &[honoured("metadata")];

/// `POST /v1/conversations`.
pub(super) const CONVERSATION: &[Field] = &[honoured("items"), honoured("metadata")];

/// `POST /v1/conversations/{id}/items`.
pub(super) const CONVERSATION_ITEMS: &[Field] = &[honoured("items")];

/// `POST /v1/files`, beside the file itself.
pub(super) const FILE: &[Field] = &[honoured("purpose"), honoured("expires_after")];

/// `POST /v1/uploads`.
pub(super) const UPLOAD: &[Field] = &[
    honoured("filename"),
    honoured("purpose"),
    honoured("bytes"),
    honoured("mime_type"),
    honoured("expires_after"),
];

/// `POST /v1/uploads/{id}/parts`, beside the part itself.
pub(super) const UPLOAD_PART: &[Field] = &[];

/// `POST /v1/uploads/{id}/complete`.
pub(super) const UPLOAD_COMPLETE: &[Field] = &[honoured("part_ids"), honoured("md5")];

/// `expires_after` of files and uploads, `output_expires_after` of batches.
pub(super) const EXPIRES_AFTER: &[Field] = &[honoured("anchor"), honoured("seconds")];

/// `POST /v1/batches`.
pub(super) const BATCH: &[Field] = &[
    honoured("input_file_id"),
    honoured("endpoint"),
    honoured("completion_window"),
    honoured("metadata"),
    honoured("output_expires_after"),
];

/// A line of the file of a batch.
pub(super) const BATCH_LINE: &[Field] =
    &[honoured("custom_id"), honoured("method"), honoured("url"), honoured("body")];

/// `stream_options` of both.
pub(super) const STREAM_OPTIONS: &[Field] = &[
    honoured("include_usage"),
    no_effect(
        "include_obfuscation",
        Takes::Bool,
        "padding against an eavesdropper that localhost has not",
    ),
];

/// Holds a body against its table. `path` is the prefix of the names in errors: "", or
/// "stream_options.".
///
/// # Errors
/// The first field, in the order of the body, that nobody knows or that is refused.
pub(super) fn check(
    body: &Map<String, Value>,
    table: &[Field],
    path: &str,
    lenient: bool,
) -> Result<(), ApiError> {
    for (name, value) in body {
        let Some(field) = table.iter().find(|field| field.name == name) else {
            unknown(&format!("{path}{name}"), lenient)?;
            continue;
        };
        match field.treatment {
            Treatment::Honoured => {}
            Treatment::NoEffect(takes, reason) => {
                takes.check(&format!("{path}{name}"), value)?;
                tracing::debug!(field = field.name, reason, "a field without effect");
            }
            Treatment::Refused { harmless, reason } => {
                if !value.is_null() && !harmless(value) {
                    let name = format!("{path}{name}");
                    let message = format!("Unsupported parameter: '{name}': {reason}.");
                    return Err(ApiError::unsupported(&name, message));
                }
            }
        }
    }
    Ok(())
}

/// A field that stands in no table: refused, or passed over with a warning.
pub(super) fn unknown(name: &str, lenient: bool) -> Result<(), ApiError> {
    if !lenient {
        return Err(ApiError::unknown_field(name));
    }
    tracing::warn!(field = name, "a request field that nobody knows was passed over");
    Ok(())
}

pub(super) fn never(_: &Value) -> bool {
    false
}

pub(super) fn is_empty_list(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

fn is_word_none_or_auto(value: &Value) -> bool {
    value == "none" || value == "auto"
}

fn is_text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(|word| word == "text"))
}

#[cfg(test)]
#[path = "fields_tests.rs"]
mod tests;
