//! Answers of routes that OpenAI has not: the operator's, the neighbours', and every error.

use super::{MAYBE_INTEGER, MAYBE_TEXT, Object, always, is, object, sometimes};
use crate::server::fields::{Field, Takes};

pub(in crate::server) static STATUS: Object = object("Status", &[always("status", Takes::Text)]);

macro_rules! key {
    ($name:literal $(, $more:expr)*) => {
        object($name, &[
            always("id", Takes::Text),
            is(&["api_key"]),
            always("name", Takes::Text),
            always("project", Takes::Text),
            always("admin", Takes::Bool),
            always("weight", Takes::Integer),
            always("max_running", MAYBE_INTEGER),
            always("requests_per_min", MAYBE_INTEGER),
            always("tokens_per_min", MAYBE_INTEGER),
            always("queue_timeout_s", MAYBE_INTEGER),
            always("redacted_value", Takes::Text),
            always("created_at", Takes::Integer),
            always("expires_at", MAYBE_INTEGER),
            always("revoked_at", MAYBE_INTEGER),
            $($more),*
        ])
    };
}

pub(in crate::server) static KEY: Object = key!("Key");

pub(in crate::server) static NEW_KEY: Object = key!("NewKey", always("value", Takes::Text));

/// A page of buckets of sums.
macro_rules! usage {
    ($name:literal $(, $more:expr)*) => {
        object($name, &[
            is(&["page"]),
            always("data", Takes::Each(&Takes::Table(&[
                is(&["bucket"]),
                always("start_time", Takes::Integer),
                always("end_time", Takes::Integer),
                always("results", Takes::Each(&Takes::Table(&[
                    always("object", Takes::Text),
                    always("input_tokens", Takes::Integer),
                    always("num_model_requests", Takes::Integer),
                    always("project_id", MAYBE_TEXT),
                    always("user_id", Takes::Null),
                    always("api_key_id", MAYBE_TEXT),
                    always("model", MAYBE_TEXT),
                    $($more),*
                ]))),
            ]))),
            always("has_more", Takes::Bool),
            always("next_page", MAYBE_TEXT),
        ])
    };
}

pub(in crate::server) static USAGE_OF_TEXT: Object = usage!(
    "CompletionsUsage",
    always("input_cached_tokens", Takes::Integer),
    always("input_uncached_tokens", Takes::Integer),
    always("output_tokens", Takes::Integer),
    always("input_audio_tokens", Takes::Integer),
    always("output_audio_tokens", Takes::Integer),
    always("batch", Takes::OneOf(&[Takes::Bool, Takes::Null])),
    always("service_tier", MAYBE_TEXT)
);

pub(in crate::server) static USAGE_OF_VECTORS: Object = usage!("EmbeddingsUsage");

pub(in crate::server) static STANDING: Object = object(
    "Standing",
    &[
        always("id", Takes::Text),
        is(&["model.standing"]),
        always("state", Takes::Text),
        always("pinned", Takes::Bool),
        always("requests_running", Takes::Integer),
        always("requests_waiting", Takes::Integer),
        always("memory_bytes", MAYBE_INTEGER),
        always("loads", Takes::Integer),
    ],
);

pub(in crate::server) static ANTHROPIC_MESSAGE: Object = object(
    "AnthropicMessage",
    &[
        always("id", Takes::Text),
        always("type", Takes::Word(&["message"])),
        always("role", Takes::Word(&["assistant"])),
        always("model", Takes::Text),
        always("content", Takes::Each(&Takes::Object)),
        always("stop_reason", MAYBE_TEXT),
        always("stop_sequence", MAYBE_TEXT),
        always(
            "usage",
            Takes::Table(&[
                always("input_tokens", Takes::Integer),
                always("cache_creation_input_tokens", Takes::Integer),
                always("cache_read_input_tokens", Takes::Integer),
                always("output_tokens", Takes::Integer),
                always("output_tokens_details", Takes::Object),
                always("service_tier", Takes::Text),
            ]),
        ),
    ],
);

pub(in crate::server) static ANTHROPIC_COUNT: Object =
    object("AnthropicCount", &[always("input_tokens", Takes::Integer)]);

/// What a chat and a text have beside their words.
macro_rules! ollama_text {
    ($name:literal $(, $more:expr)*) => {
        object($name, &[
            always("model", Takes::Text),
            always("created_at", Takes::Text),
            $($more,)*
            always("done", Takes::Bool),
            sometimes("done_reason", Takes::Text),
            sometimes("total_duration", Takes::Integer),
            sometimes("load_duration", Takes::Integer),
            sometimes("prompt_eval_count", Takes::Integer),
            sometimes("prompt_eval_duration", Takes::Integer),
            sometimes("eval_count", Takes::Integer),
            sometimes("eval_duration", Takes::Integer),
            sometimes("logprobs", Takes::List),
        ])
    };
}

pub(in crate::server) static OLLAMA_CHAT: Object =
    ollama_text!("OllamaChat", always("message", Takes::Object));

pub(in crate::server) static OLLAMA_TEXT: Object =
    ollama_text!("OllamaText", always("response", Takes::Text), sometimes("thinking", Takes::Text));

pub(in crate::server) static OLLAMA_VECTORS: Object = object(
    "OllamaVectors",
    &[
        always("model", Takes::Text),
        always("embeddings", Takes::Each(&Takes::Each(&Takes::Number))),
        always("total_duration", Takes::Integer),
        always("load_duration", Takes::Integer),
        sometimes("prompt_eval_count", Takes::Integer),
    ],
);

pub(in crate::server) static OLLAMA_VECTOR: Object =
    object("OllamaVector", &[always("embedding", Takes::Each(&Takes::Number))]);

pub(in crate::server) static OLLAMA_SHOWN: Object = object(
    "OllamaModelDetails",
    &[
        always("modelfile", Takes::Text),
        always("parameters", Takes::Text),
        always("template", Takes::Text),
        always("details", Takes::Object),
        always("model_info", Takes::Object),
        always("capabilities", Takes::Each(&Takes::Text)),
        always("modified_at", Takes::Text),
    ],
);

pub(in crate::server) static OLLAMA_MODELS: Object = object(
    "OllamaModels",
    &[always(
        "models",
        Takes::Each(&Takes::Table(&[
            always("name", Takes::Text),
            always("model", Takes::Text),
            always("modified_at", Takes::Text),
            always("size", Takes::Integer),
            always("digest", Takes::Text),
            always("details", Takes::Object),
            // Of those in memory.
            sometimes("expires_at", Takes::Text),
            sometimes("context_length", Takes::Integer),
            sometimes("size_vram", Takes::Integer),
        ])),
    )],
);

pub(in crate::server) static OLLAMA_VERSION: Object =
    object("OllamaVersion", &[always("version", Takes::Text), always("hearth", Takes::Text)]);

const ERROR_FIELDS: &[Field] = &[
    always("message", Takes::Text),
    always("type", Takes::Text),
    always("param", MAYBE_TEXT),
    always("code", MAYBE_TEXT),
];

pub(in crate::server) static ERROR: Object =
    object("Error", &[always("error", Takes::Table(ERROR_FIELDS))]);

pub(in crate::server) static ANTHROPIC_ERROR: Object = object(
    "AnthropicError",
    &[
        always("type", Takes::Word(&["error"])),
        always(
            "error",
            Takes::Table(&[always("type", Takes::Text), always("message", Takes::Text)]),
        ),
        always("request_id", Takes::Text),
    ],
);

pub(in crate::server) static OLLAMA_ERROR: Object =
    object("OllamaError", &[always("error", Takes::Text)]);
