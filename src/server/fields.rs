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
    /// Taken, if it is of its type, and changes nothing, because of this.
    NoEffect(&'static str),
    /// A 400 naming the field and this reason, unless the value asks for nothing.
    Refused { harmless: fn(&Value) -> bool, reason: &'static str },
}

/// What a field may be. Of an honoured one its parser decides, and the reference is told here; a
/// test over the wire holds the two together.
#[derive(Clone, Copy)]
pub(super) enum Takes {
    Any,
    Bool,
    Integer,
    Number,
    List,
    Object,
    Text,
    /// One of these texts.
    Word(&'static [&'static str]),
    OneOf(&'static [Takes]),
    /// An object with a table of its own.
    Table(&'static [Field]),
}

impl Takes {
    /// The types of JSON Schema that fit; none where all do.
    pub(super) fn types(self) -> Vec<&'static str> {
        match self {
            Self::Any => Vec::new(),
            Self::Bool => vec!["boolean"],
            Self::Integer => vec!["integer"],
            Self::Number => vec!["number"],
            Self::List => vec!["array"],
            Self::Object | Self::Table(_) => vec!["object"],
            Self::Text | Self::Word(_) => vec!["string"],
            Self::OneOf(list) => list.iter().flat_map(|takes| takes.types()).collect(),
        }
    }

    fn check(self, name: &str, value: &Value) -> Result<(), ApiError> {
        let fits = |kind: &&str| match *kind {
            "boolean" => value.is_boolean(),
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            _ => value.is_string(),
        };
        let types = self.types();
        if !value.is_null() && !types.is_empty() && !types.iter().any(fits) {
            let article = if types[0].starts_with(['a', 'i', 'o']) { "an" } else { "a" };
            let expected = format!("{article} {}", types.join(" or "));
            return Err(ApiError::wrong_type(name, &expected, kind(value)));
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

pub(super) const TEXT_OR_LIST: Takes = Takes::OneOf(&[Takes::Text, Takes::List]);
pub(super) const TEXT_OR_OBJECT: Takes = Takes::OneOf(&[Takes::Text, Takes::Object]);
pub(super) const TEXT_OR_NUMBER: Takes = Takes::OneOf(&[Takes::Text, Takes::Number]);
/// A JSON schema, or the text of one.
const SCHEMA: Takes = Takes::OneOf(&[Takes::Object, Takes::Text, Takes::Bool]);

/// `verbosity` of a chat and of the text of a response.
pub(super) const VERBOSITY: Takes = Takes::Word(&["low", "medium", "high"]);

/// The last spelling is that of older clients.
pub(super) const CACHE_RETENTION: Takes = Takes::Word(&["in_memory", "24h", "in-memory"]);

pub(super) struct Field {
    pub name: &'static str,
    pub takes: Takes,
    pub required: bool,
    pub treatment: Treatment,
}

pub(super) const fn honoured(name: &'static str, takes: Takes) -> Field {
    Field { name, takes, required: false, treatment: Treatment::Honoured }
}

/// An honoured one that must be there.
pub(super) const fn required(name: &'static str, takes: Takes) -> Field {
    Field { name, takes, required: true, treatment: Treatment::Honoured }
}

pub(super) const fn no_effect(name: &'static str, takes: Takes, reason: &'static str) -> Field {
    Field { name, takes, required: false, treatment: Treatment::NoEffect(reason) }
}

pub(super) const fn refused(
    name: &'static str,
    harmless: fn(&Value) -> bool,
    reason: &'static str,
) -> Field {
    let treatment = Treatment::Refused { harmless, reason };
    Field { name, takes: Takes::Any, required: false, treatment }
}

/// `POST /v1/chat/completions`.
pub(super) const CHAT: &[Field] = &[
    required("messages", Takes::List),
    required("model", Takes::Text),
    honoured("max_completion_tokens", Takes::Integer),
    honoured("max_tokens", Takes::Integer),
    honoured("n", Takes::Integer),
    honoured("stop", TEXT_OR_LIST),
    honoured("stream", Takes::Bool),
    honoured("stream_options", Takes::Table(STREAM_OPTIONS)),
    honoured("logprobs", Takes::Bool),
    honoured("top_logprobs", Takes::Integer),
    honoured("temperature", Takes::Number),
    honoured("top_p", Takes::Number),
    honoured("frequency_penalty", Takes::Number),
    honoured("presence_penalty", Takes::Number),
    honoured("logit_bias", Takes::Object),
    honoured("seed", Takes::Integer),
    honoured("service_tier", Takes::Text),
    // A variable for the chat template, where models that know it read it.
    honoured("reasoning_effort", Takes::Text),
    honoured("response_format", Takes::Object),
    honoured("parallel_tool_calls", Takes::Bool),
    honoured("tool_choice", TEXT_OR_OBJECT),
    honoured("tools", Takes::List),
    // What the two before were called first.
    honoured("function_call", TEXT_OR_OBJECT),
    honoured("functions", Takes::List),
    // Labels of a stored completion; checked, and of no effect without `store`.
    honoured("metadata", Takes::Object),
    honoured("prediction", Takes::Table(PREDICTION)),
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
    refused("moderation", never, "moderation inside a completion is not supported"),
    refused("modalities", is_text_only, "only the modality 'text' is supported"),
    honoured("store", Takes::Bool),
    refused("web_search_options", never, "web search is not supported"),
    // Not OpenAI's: extras that clients of local servers send.
    honoured("adapters", Takes::List),
    honoured("chat_template_kwargs", Takes::Object),
    honoured("guided_choice", Takes::List),
    honoured("guided_grammar", Takes::Text),
    honoured("guided_json", SCHEMA),
    honoured("guided_regex", Takes::Text),
    honoured("ignore_eos", Takes::Bool),
    honoured("keep_alive", TEXT_OR_NUMBER),
    honoured("min_p", Takes::Number),
    honoured("min_tokens", Takes::Integer),
    honoured("prompt_logprobs", Takes::Integer),
    honoured("repetition_penalty", Takes::Number),
    honoured("return_token_ids", Takes::Bool),
    honoured("stop_token_ids", Takes::List),
    honoured("structured_outputs", Takes::Table(STRUCTURED_OUTPUTS)),
    honoured("top_k", Takes::Integer),
];

/// `POST /v1/completions`.
pub(super) const COMPLETIONS: &[Field] = &[
    required("model", Takes::Text),
    required("prompt", TEXT_OR_LIST),
    honoured("best_of", Takes::Integer),
    honoured("echo", Takes::Bool),
    honoured("frequency_penalty", Takes::Number),
    honoured("logit_bias", Takes::Object),
    honoured("logprobs", Takes::Integer),
    honoured("max_tokens", Takes::Integer),
    honoured("n", Takes::Integer),
    honoured("presence_penalty", Takes::Number),
    honoured("seed", Takes::Integer),
    honoured("stop", TEXT_OR_LIST),
    honoured("stream", Takes::Bool),
    honoured("stream_options", Takes::Table(STREAM_OPTIONS)),
    honoured("temperature", Takes::Number),
    honoured("top_p", Takes::Number),
    no_effect("user", Takes::Text, "for the abuse monitoring of a hosted service"),
    // Honoured by models that learned to fill in the middle; the others refuse it.
    honoured("suffix", Takes::Text),
    // Not OpenAI's: extras that clients of local servers send.
    honoured("adapters", Takes::List),
    honoured("guided_choice", Takes::List),
    honoured("guided_grammar", Takes::Text),
    honoured("guided_json", SCHEMA),
    honoured("guided_regex", Takes::Text),
    honoured("ignore_eos", Takes::Bool),
    honoured("keep_alive", TEXT_OR_NUMBER),
    honoured("min_p", Takes::Number),
    honoured("min_tokens", Takes::Integer),
    honoured("prompt_logprobs", Takes::Integer),
    honoured("repetition_penalty", Takes::Number),
    honoured("return_token_ids", Takes::Bool),
    honoured("stop_token_ids", Takes::List),
    honoured("structured_outputs", Takes::Table(STRUCTURED_OUTPUTS)),
    honoured("top_k", Takes::Integer),
];

/// One of `adapters`.
pub(super) const ADAPTER: &[Field] =
    &[required("id", Takes::Text), honoured("weight", Takes::Number)];

/// `POST /v1/load_lora_adapter`, as vLLM has it; the last two are ours.
pub(super) const LOAD_ADAPTER: &[Field] = &[
    required("lora_name", Takes::Text),
    required("lora_path", Takes::Text),
    honoured("load_inplace", Takes::Bool),
    honoured("base_model_name", Takes::Text),
    honoured("pinned", Takes::Bool),
];

/// `POST /v1/unload_lora_adapter`.
pub(super) const UNLOAD_ADAPTER: &[Field] = &[
    required("lora_name", Takes::Text),
    no_effect("lora_int_id", Takes::Integer, "adapters have names here"),
];

/// `POST /v1/embeddings`.
pub(super) const EMBEDDINGS: &[Field] = &[
    required("input", TEXT_OR_LIST),
    required("model", Takes::Text),
    // Honoured where the model was trained for it.
    honoured("dimensions", Takes::Integer),
    honoured("encoding_format", Takes::Text),
    no_effect("user", Takes::Text, "for the abuse monitoring of a hosted service"),
    // Not OpenAI's.
    honoured("keep_alive", TEXT_OR_NUMBER),
];

/// `POST /tokenize`.
pub(super) const TOKENIZE: &[Field] = &[
    honoured("model", Takes::Text),
    honoured("prompt", Takes::Text),
    honoured("content", Takes::Text),
    honoured("messages", Takes::List),
    honoured("tools", Takes::List),
    honoured("tool_choice", TEXT_OR_OBJECT),
    honoured("parallel_tool_calls", Takes::Bool),
    honoured("chat_template_kwargs", Takes::Object),
    honoured("add_special", Takes::Bool),
    honoured("add_special_tokens", Takes::Bool),
    honoured("parse_special", Takes::Bool),
    honoured("return_token_strs", Takes::Bool),
    honoured("with_pieces", Takes::Bool),
];

/// `POST /detokenize`.
pub(super) const DETOKENIZE: &[Field] =
    &[honoured("model", Takes::Text), required("tokens", Takes::List)];

/// `POST /apply-template`.
pub(super) const APPLY_TEMPLATE: &[Field] = &[
    honoured("model", Takes::Text),
    required("messages", Takes::List),
    honoured("tools", Takes::List),
    honoured("tool_choice", TEXT_OR_OBJECT),
    honoured("parallel_tool_calls", Takes::Bool),
    honoured("chat_template_kwargs", Takes::Object),
];

/// `prediction`.
pub(super) const PREDICTION: &[Field] =
    &[required("type", Takes::Text), required("content", TEXT_OR_LIST)];

/// `tools[i].function`.
pub(super) const FUNCTION: &[Field] = &[
    required("name", Takes::Text),
    honoured("description", Takes::Text),
    honoured("parameters", Takes::Object),
    honoured("strict", Takes::Bool),
];

/// `tools[i].custom`.
pub(super) const CUSTOM_TOOL: &[Field] = &[
    required("name", Takes::Text),
    honoured("description", Takes::Text),
    honoured("format", Takes::Object),
];

/// `response_format.json_schema`.
pub(super) const JSON_SCHEMA: &[Field] = &[
    required("name", Takes::Text),
    required("schema", SCHEMA),
    no_effect(
        "description",
        Takes::Text,
        "a hint for models that see it; here the grammar is enough",
    ),
    no_effect("strict", Takes::Bool, "the schema is enforced in any case"),
];

/// `structured_outputs`, as vLLM has it.
pub(super) const STRUCTURED_OUTPUTS: &[Field] = &[
    honoured("choice", Takes::List),
    honoured("grammar", Takes::Text),
    honoured("json", SCHEMA),
    honoured("json_object", Takes::Bool),
    honoured("regex", Takes::Text),
];

/// `POST /v1/admin/keys`.
pub(super) const ADMIN_KEY: &[Field] = &[
    required("name", Takes::Text),
    honoured("project", Takes::Text),
    honoured("admin", Takes::Bool),
    honoured("weight", Takes::Integer),
    honoured("max_running", Takes::Integer),
    honoured("requests_per_min", Takes::Integer),
    honoured("tokens_per_min", Takes::Integer),
    honoured("expires_at", Takes::Integer),
];

/// The bodies that set the labels of an object and nothing else.
pub(super) const METADATA: &[Field] = &[honoured("metadata", Takes::Object)];

/// `POST /v1/conversations`.
pub(super) const CONVERSATION: &[Field] =
    &[honoured("items", Takes::List), honoured("metadata", Takes::Object)];

/// `POST /v1/conversations/{id}/items`.
pub(super) const CONVERSATION_ITEMS: &[Field] = &[required("items", Takes::List)];

/// `POST /v1/files`, beside the file itself.
pub(super) const FILE: &[Field] =
    &[required("purpose", Takes::Text), honoured("expires_after", Takes::Table(EXPIRES_AFTER))];

/// `POST /v1/uploads`.
pub(super) const UPLOAD: &[Field] = &[
    required("filename", Takes::Text),
    required("purpose", Takes::Text),
    required("bytes", Takes::Integer),
    required("mime_type", Takes::Text),
    honoured("expires_after", Takes::Table(EXPIRES_AFTER)),
];

/// `POST /v1/uploads/{id}/parts`, beside the part itself.
pub(super) const UPLOAD_PART: &[Field] = &[];

/// `POST /v1/uploads/{id}/complete`.
pub(super) const UPLOAD_COMPLETE: &[Field] =
    &[required("part_ids", Takes::List), honoured("md5", Takes::Text)];

/// `expires_after` of files and uploads, `output_expires_after` of batches.
pub(super) const EXPIRES_AFTER: &[Field] =
    &[required("anchor", Takes::Text), required("seconds", Takes::Integer)];

/// `POST /v1/batches`.
pub(super) const BATCH: &[Field] = &[
    required("input_file_id", Takes::Text),
    required("endpoint", Takes::Text),
    required("completion_window", Takes::Text),
    honoured("metadata", Takes::Object),
    honoured("output_expires_after", Takes::Table(EXPIRES_AFTER)),
];

/// A line of the file of a batch.
pub(super) const BATCH_LINE: &[Field] = &[
    required("custom_id", Takes::Text),
    required("method", Takes::Text),
    required("url", Takes::Text),
    required("body", Takes::Object),
];

/// `stream_options` of both.
pub(super) const STREAM_OPTIONS: &[Field] = &[
    honoured("include_usage", Takes::Bool),
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
            Treatment::NoEffect(reason) => {
                field.takes.check(&format!("{path}{name}"), value)?;
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

fn is_text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(|word| word == "text"))
}

#[cfg(test)]
#[path = "fields_tests.rs"]
mod tests;
