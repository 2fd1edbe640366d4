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
    /// An integer from one to another.
    Count(i64, i64),
    Number,
    /// A number from one to another.
    Between(f64, f64),
    List,
    /// A list of these.
    Each(&'static Takes),
    Object,
    Text,
    /// One of these texts.
    Word(&'static [&'static str]),
    OneOf(&'static [Takes]),
    /// An object with a table of its own.
    Table(&'static [Field]),
    /// `null`, of answers: in a body it is the same as absent.
    Null,
}

impl Takes {
    /// The types of JSON Schema that fit; none where all do.
    pub(super) fn types(self) -> Vec<&'static str> {
        match self {
            Self::Any => Vec::new(),
            Self::Bool => vec!["boolean"],
            Self::Integer | Self::Count(..) => vec!["integer"],
            Self::Number | Self::Between(..) => vec!["number"],
            Self::List | Self::Each(_) => vec!["array"],
            Self::Object | Self::Table(_) => vec!["object"],
            Self::Text | Self::Word(_) => vec!["string"],
            Self::Null => vec!["null"],
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

/// The words of `service_tier`; the answer says what was had.
pub(super) const TIER: Takes =
    Takes::Word(&["auto", "default", "flex", "scale", "priority", "fast"]);
pub(super) const EFFORT: Takes = Takes::Word(&super::chat::EFFORTS);

/// A count may be this large.
const MOST: i64 = u32::MAX as i64;
const COUNT: Takes = Takes::Count(0, MOST);
/// A count that may not be nothing.
pub(super) const SOME: Takes = Takes::Count(1, MOST);
pub(super) const SHARE: Takes = Takes::Between(0.0, 1.0);
pub(super) const PENALTY: Takes = Takes::Between(-2.0, 2.0);
pub(super) const REPETITION: Takes = Takes::Between(0.01, 10.0);
pub(super) const TEMPERATURE: Takes = Takes::Between(0.0, 2.0);
/// -1 is all, as 0 is.
pub(super) const TOP_K: Takes = Takes::Count(-1, MOST);
pub(super) const TOP_LOGPROBS: Takes = Takes::Count(0, 20);
pub(super) const TEXTS: Takes = Takes::Each(&Takes::Text);
const TOKENS: Takes = Takes::Each(&COUNT);
const OBJECTS: Takes = Takes::Each(&Takes::Object);

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
    required("messages", OBJECTS),
    required("model", Takes::Text),
    honoured("max_completion_tokens", SOME),
    honoured("max_tokens", SOME),
    honoured("n", Takes::Count(1, 128)),
    honoured("stop", TEXT_OR_LIST),
    honoured("stream", Takes::Bool),
    honoured("stream_options", Takes::Table(STREAM_OPTIONS)),
    honoured("logprobs", Takes::Bool),
    honoured("top_logprobs", TOP_LOGPROBS),
    honoured("temperature", TEMPERATURE),
    honoured("top_p", SHARE),
    honoured("frequency_penalty", PENALTY),
    honoured("presence_penalty", PENALTY),
    honoured("logit_bias", Takes::Object),
    honoured("seed", Takes::Integer),
    honoured("service_tier", TIER),
    // A variable for the chat template, where models that know it read it.
    honoured("reasoning_effort", EFFORT),
    honoured("response_format", Takes::Object),
    honoured("parallel_tool_calls", Takes::Bool),
    honoured("tool_choice", TEXT_OR_OBJECT),
    honoured("tools", OBJECTS),
    // What the two before were called first.
    honoured("function_call", TEXT_OR_OBJECT),
    honoured("functions", OBJECTS),
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
    honoured("adapters", Takes::Each(&Takes::Table(ADAPTER))),
    honoured("chat_template_kwargs", Takes::Object),
    honoured("guided_choice", Takes::List),
    honoured("guided_grammar", Takes::Text),
    honoured("guided_json", SCHEMA),
    honoured("guided_regex", Takes::Text),
    honoured("ignore_eos", Takes::Bool),
    honoured("keep_alive", TEXT_OR_NUMBER),
    honoured("min_p", SHARE),
    honoured("min_tokens", COUNT),
    honoured("prompt_logprobs", TOP_LOGPROBS),
    honoured("repetition_penalty", REPETITION),
    honoured("return_token_ids", Takes::Bool),
    honoured("stop_token_ids", TOKENS),
    honoured("structured_outputs", Takes::Table(STRUCTURED_OUTPUTS)),
    honoured("top_k", TOP_K),
];

/// `POST /v1/completions`.
pub(super) const COMPLETIONS: &[Field] = &[
    required("model", Takes::Text),
    required("prompt", TEXT_OR_LIST),
    honoured("best_of", Takes::Count(1, 20)),
    honoured("echo", Takes::Bool),
    honoured("frequency_penalty", PENALTY),
    honoured("logit_bias", Takes::Object),
    honoured("logprobs", Takes::Count(0, 5)),
    honoured("max_tokens", COUNT),
    honoured("n", Takes::Count(1, 128)),
    honoured("presence_penalty", PENALTY),
    honoured("seed", Takes::Integer),
    honoured("stop", TEXT_OR_LIST),
    honoured("stream", Takes::Bool),
    honoured("stream_options", Takes::Table(STREAM_OPTIONS)),
    honoured("temperature", TEMPERATURE),
    honoured("top_p", SHARE),
    no_effect("user", Takes::Text, "for the abuse monitoring of a hosted service"),
    // Honoured by models that learned to fill in the middle; the others refuse it.
    honoured("suffix", Takes::Text),
    // Not OpenAI's: extras that clients of local servers send.
    honoured("adapters", Takes::Each(&Takes::Table(ADAPTER))),
    honoured("guided_choice", Takes::List),
    honoured("guided_grammar", Takes::Text),
    honoured("guided_json", SCHEMA),
    honoured("guided_regex", Takes::Text),
    honoured("ignore_eos", Takes::Bool),
    honoured("keep_alive", TEXT_OR_NUMBER),
    honoured("min_p", SHARE),
    honoured("min_tokens", COUNT),
    honoured("prompt_logprobs", TOP_LOGPROBS),
    honoured("repetition_penalty", REPETITION),
    honoured("return_token_ids", Takes::Bool),
    honoured("stop_token_ids", TOKENS),
    honoured("structured_outputs", Takes::Table(STRUCTURED_OUTPUTS)),
    honoured("top_k", TOP_K),
];

/// One of `adapters`.
pub(super) const ADAPTER: &[Field] =
    &[required("id", Takes::Text), honoured("weight", Takes::Between(-16.0, 16.0))];

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
    honoured("dimensions", SOME),
    honoured("encoding_format", Takes::Word(&["float", "base64"])),
    no_effect("user", Takes::Text, "for the abuse monitoring of a hosted service"),
    // Not OpenAI's.
    honoured("keep_alive", TEXT_OR_NUMBER),
];

/// `POST /tokenize`.
pub(super) const TOKENIZE: &[Field] = &[
    honoured("model", Takes::Text),
    honoured("prompt", Takes::Text),
    honoured("content", Takes::Text),
    honoured("messages", OBJECTS),
    honoured("tools", OBJECTS),
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
    &[honoured("model", Takes::Text), required("tokens", TOKENS)];

/// `POST /apply-template`.
pub(super) const APPLY_TEMPLATE: &[Field] = &[
    honoured("model", Takes::Text),
    required("messages", OBJECTS),
    honoured("tools", OBJECTS),
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
    honoured("weight", SOME),
    honoured("max_running", SOME),
    honoured("requests_per_min", SOME),
    honoured("tokens_per_min", SOME),
    honoured("queue_timeout_s", SOME),
    honoured("expires_at", Takes::Count(0, i64::MAX)),
];

/// The bodies that set the labels of an object and nothing else.
pub(super) const METADATA: &[Field] = &[honoured("metadata", Takes::Object)];

/// `POST /v1/conversations`.
pub(super) const CONVERSATION: &[Field] =
    &[honoured("items", OBJECTS), honoured("metadata", Takes::Object)];

/// `POST /v1/conversations/{conversation_id}/items`.
pub(super) const CONVERSATION_ITEMS: &[Field] = &[required("items", OBJECTS)];

const PURPOSE: Takes = Takes::Word(&crate::files::PURPOSES);

/// `POST /v1/files`, beside the file itself.
pub(super) const FILE: &[Field] =
    &[required("purpose", PURPOSE), honoured("expires_after", Takes::Table(EXPIRES_AFTER))];

/// `POST /v1/uploads`.
pub(super) const UPLOAD: &[Field] = &[
    required("filename", Takes::Text),
    required("purpose", PURPOSE),
    required("bytes", Takes::Count(1, crate::files::UPLOAD_BYTES_MAX as i64)),
    required("mime_type", Takes::Text),
    honoured("expires_after", Takes::Table(EXPIRES_AFTER)),
];

/// `POST /v1/uploads/{upload_id}/parts`, beside the part itself.
pub(super) const UPLOAD_PART: &[Field] = &[];

/// `POST /v1/uploads/{upload_id}/complete`.
pub(super) const UPLOAD_COMPLETE: &[Field] =
    &[required("part_ids", TEXTS), honoured("md5", Takes::Text)];

const LIFETIME: Takes =
    Takes::Count(*super::files::LIFETIME_S.start(), *super::files::LIFETIME_S.end());

/// `expires_after` of files and uploads, `output_expires_after` of batches.
pub(super) const EXPIRES_AFTER: &[Field] =
    &[required("anchor", Takes::Word(&["created_at"])), required("seconds", LIFETIME)];

/// `POST /v1/batches`.
pub(super) const BATCH: &[Field] = &[
    required("input_file_id", Takes::Text),
    required("endpoint", Takes::Word(&super::batches::ENDPOINTS)),
    required("completion_window", Takes::Word(&[crate::jobs::WINDOW])),
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
