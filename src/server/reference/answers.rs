//! What routes answer with: the members of each object, in the words of the tables of fields. A
//! `required` one is always there, an `honoured` one sometimes. A test holds the real answers
//! of all routes against them that need nothing but the built-in model.

mod others;

pub(in crate::server) use self::others::*;
use crate::server::fields::{Field, Takes, honoured as sometimes, required as always};

/// An object of the document, by its name there.
pub(in crate::server) struct Object {
    pub name: &'static str,
    pub fields: &'static [Field],
}

const fn object(name: &'static str, fields: &'static [Field]) -> Object {
    Object { name, fields }
}

/// The member that says what an object is.
const fn is(word: &'static [&'static str]) -> Field {
    always("object", Takes::Word(word))
}

const MAYBE_INTEGER: Takes = Takes::OneOf(&[Takes::Integer, Takes::Null]);
const MAYBE_LIST: Takes = Takes::OneOf(&[Takes::List, Takes::Null]);
const MAYBE_NUMBER: Takes = Takes::OneOf(&[Takes::Number, Takes::Null]);
const MAYBE_OBJECT: Takes = Takes::OneOf(&[Takes::Object, Takes::Null]);
const MAYBE_TEXT: Takes = Takes::OneOf(&[Takes::Text, Takes::Null]);
const TEXT_OR_OBJECT_OR_NULL: Takes = Takes::OneOf(&[Takes::Text, Takes::Object, Takes::Null]);
const TOKEN_LIST: Takes = Takes::Each(&Takes::Integer);
const FINISH: Takes =
    Takes::Word(&["stop", "length", "tool_calls", "content_filter", "function_call"]);

/// Beside the `data` of a list,
pub(super) const LIST: &[Field] = &[is(&["list"])];

/// and of a page of one.
pub(super) const PAGE: &[Field] = &[
    is(&["list"]),
    always("first_id", MAYBE_TEXT),
    always("last_id", MAYBE_TEXT),
    always("has_more", Takes::Bool),
];

/// Beside the `object` of what is deleted.
pub(super) const DELETED: &[Field] = &[always("id", Takes::Text), always("deleted", Takes::Bool)];

const USAGE: &[Field] = &[
    always("prompt_tokens", Takes::Integer),
    always("completion_tokens", Takes::Integer),
    always("total_tokens", Takes::Integer),
    always(
        "prompt_tokens_details",
        Takes::Table(&[
            always("cached_tokens", Takes::Integer),
            always("audio_tokens", Takes::Integer),
        ]),
    ),
    always(
        "completion_tokens_details",
        Takes::Table(&[
            always("reasoning_tokens", Takes::Integer),
            always("audio_tokens", Takes::Integer),
            always("accepted_prediction_tokens", Takes::Integer),
            always("rejected_prediction_tokens", Takes::Integer),
        ]),
    ),
];

/// The usage of a response; that of a batch counts no written cache.
const INPUT_OUTPUT: &[Field] = &[
    always("input_tokens", Takes::Integer),
    always(
        "input_tokens_details",
        Takes::Table(&[
            always("cached_tokens", Takes::Integer),
            sometimes("cache_write_tokens", Takes::Integer),
        ]),
    ),
    always("output_tokens", Takes::Integer),
    always("output_tokens_details", Takes::Table(&[always("reasoning_tokens", Takes::Integer)])),
    always("total_tokens", Takes::Integer),
];

const CALL: &[Field] = &[
    always("id", Takes::Text),
    always("type", Takes::Word(&["function", "custom"])),
    sometimes("function", Takes::Object),
    sometimes("custom", Takes::Object),
];

const CHAT_CHOICE: &[Field] = &[
    always("index", Takes::Integer),
    always(
        "message",
        Takes::Table(&[
            always("role", Takes::Word(&["assistant"])),
            always("content", MAYBE_TEXT),
            always("refusal", MAYBE_TEXT),
            always("annotations", Takes::List),
            sometimes("reasoning_content", Takes::Text),
            sometimes("reasoning", Takes::Text),
            sometimes("tool_calls", Takes::Each(&Takes::Table(CALL))),
            sometimes("function_call", Takes::Object),
        ]),
    ),
    always("logprobs", MAYBE_OBJECT),
    always("finish_reason", FINISH),
    sometimes("token_ids", TOKEN_LIST),
];

macro_rules! chat {
    ($name:literal $(, $more:expr)*) => {
        object($name, &[
            always("id", Takes::Text),
            is(&["chat.completion"]),
            always("created", Takes::Integer),
            always("model", Takes::Text),
            always("service_tier", Takes::Text),
            always("system_fingerprint", Takes::Text),
            always("choices", Takes::Each(&Takes::Table(CHAT_CHOICE))),
            always("usage", Takes::Table(USAGE)),
            sometimes("prompt_token_ids", TOKEN_LIST),
            sometimes("prompt_logprobs", Takes::List),
            $($more),*
        ])
    };
}

pub(in crate::server) static CHAT: Object = chat!("ChatCompletion");

/// One that is stored says how it was asked for, too.
pub(in crate::server) static STORED: Object = chat!(
    "StoredChatCompletion",
    always("tool_choice", TEXT_OR_OBJECT_OR_NULL),
    always("seed", MAYBE_INTEGER),
    always("top_p", MAYBE_NUMBER),
    always("temperature", MAYBE_NUMBER),
    always("presence_penalty", MAYBE_NUMBER),
    always("frequency_penalty", MAYBE_NUMBER),
    always("tools", MAYBE_LIST),
    always("response_format", MAYBE_OBJECT),
    always("reasoning_effort", MAYBE_TEXT),
    always("input_user", MAYBE_TEXT),
    always("request_id", Takes::Text),
    always("metadata", Takes::Object)
);

pub(in crate::server) static MESSAGE: Object = object(
    "StoredMessage",
    &[
        always("id", Takes::Text),
        always("role", Takes::Text),
        always("content", MAYBE_TEXT),
        always("name", MAYBE_TEXT),
        always("content_parts", MAYBE_LIST),
        always("refusal", MAYBE_TEXT),
        sometimes("tool_calls", Takes::Each(&Takes::Table(CALL))),
        sometimes("tool_call_id", Takes::Text),
    ],
);

pub(in crate::server) static COMPLETION: Object = object(
    "Completion",
    &[
        always("id", Takes::Text),
        is(&["text_completion"]),
        always("created", Takes::Integer),
        always("model", Takes::Text),
        always("system_fingerprint", Takes::Text),
        always(
            "choices",
            Takes::Each(&Takes::Table(&[
                always("text", Takes::Text),
                always("index", Takes::Integer),
                always("logprobs", MAYBE_OBJECT),
                always("finish_reason", FINISH),
                sometimes("token_ids", TOKEN_LIST),
                sometimes("prompt_token_ids", TOKEN_LIST),
                sometimes("prompt_logprobs", Takes::List),
            ])),
        ),
        always("usage", Takes::Table(USAGE)),
    ],
);

pub(in crate::server) static EMBEDDINGS: Object = object(
    "Embeddings",
    &[
        is(&["list"]),
        always(
            "data",
            Takes::Each(&Takes::Table(&[
                is(&["embedding"]),
                always("index", Takes::Integer),
                // A text where base64 was asked for: the bytes of little-endian floats.
                always("embedding", Takes::OneOf(&[Takes::Each(&Takes::Number), Takes::Text])),
            ])),
        ),
        always("model", Takes::Text),
        always(
            "usage",
            Takes::Table(&[
                always("prompt_tokens", Takes::Integer),
                always("total_tokens", Takes::Integer),
            ]),
        ),
    ],
);

pub(in crate::server) static TOKENS: Object = object(
    "Tokens",
    &[
        // With `with_pieces` each is an object of its id and its text.
        always("tokens", Takes::List),
        sometimes("count", Takes::Integer),
        sometimes("max_model_len", Takes::Integer),
        sometimes("token_strs", MAYBE_LIST),
    ],
);

pub(in crate::server) static TEXT: Object =
    object("Text", &[always("prompt", Takes::Text), always("content", Takes::Text)]);

pub(in crate::server) static PROMPT: Object = object("Prompt", &[always("prompt", Takes::Text)]);

/// A part of a conversation; its type says which of these it has.
const ITEM_FIELDS: &[Field] = &[
    always("id", Takes::Text),
    always(
        "type",
        Takes::Word(&[
            "message",
            "function_call",
            "function_call_output",
            "custom_tool_call",
            "custom_tool_call_output",
            "reasoning",
            "compaction",
        ]),
    ),
    sometimes("status", MAYBE_TEXT),
    sometimes("role", Takes::Text),
    sometimes("content", MAYBE_LIST),
    sometimes("phase", MAYBE_TEXT),
    sometimes("call_id", Takes::Text),
    sometimes("name", Takes::Text),
    sometimes("arguments", Takes::Text),
    sometimes("input", Takes::Text),
    sometimes("output", Takes::OneOf(&[Takes::Text, Takes::List])),
    sometimes("summary", Takes::List),
    sometimes("encrypted_content", MAYBE_TEXT),
];

pub(in crate::server) static ITEM: Object = object("Item", ITEM_FIELDS);

pub(in crate::server) static RESPONSE: Object = object(
    "Response",
    &[
        always("id", Takes::Text),
        is(&["response"]),
        always("created_at", Takes::Integer),
        always("completed_at", MAYBE_INTEGER),
        always(
            "status",
            Takes::Word(&[
                "completed",
                "failed",
                "in_progress",
                "cancelled",
                "queued",
                "incomplete",
            ]),
        ),
        always("error", MAYBE_OBJECT),
        always("incomplete_details", MAYBE_OBJECT),
        always("output", Takes::Each(&Takes::Table(ITEM_FIELDS))),
        always("usage", Takes::OneOf(&[Takes::Table(INPUT_OUTPUT), Takes::Null])),
        always("background", Takes::Bool),
        always("instructions", MAYBE_TEXT),
        always("max_output_tokens", MAYBE_INTEGER),
        always("max_tool_calls", MAYBE_INTEGER),
        always("model", Takes::Text),
        always("parallel_tool_calls", Takes::Bool),
        always("presence_penalty", Takes::Number),
        always("frequency_penalty", Takes::Number),
        always("previous_response_id", MAYBE_TEXT),
        always("conversation", MAYBE_OBJECT),
        always("prompt", MAYBE_OBJECT),
        always("prompt_cache_key", MAYBE_TEXT),
        always("prompt_cache_retention", MAYBE_TEXT),
        always("reasoning", Takes::Object),
        always("safety_identifier", MAYBE_TEXT),
        always("service_tier", Takes::Text),
        always("store", Takes::Bool),
        always("temperature", Takes::Number),
        always("text", Takes::Object),
        always("tool_choice", Takes::OneOf(&[Takes::Text, Takes::Object])),
        always("tools", Takes::List),
        always("top_logprobs", Takes::Integer),
        always("top_p", Takes::Number),
        always("truncation", Takes::Text),
        always("user", MAYBE_TEXT),
        always("metadata", Takes::Object),
    ],
);

pub(in crate::server) static INPUT_TOKENS: Object = object(
    "InputTokens",
    &[is(&["response.input_tokens"]), always("input_tokens", Takes::Integer)],
);

pub(in crate::server) static COMPACTION: Object = object(
    "Compaction",
    &[
        always("id", Takes::Text),
        is(&["response.compaction"]),
        always("created_at", Takes::Integer),
        always("output", Takes::Each(&Takes::Table(ITEM_FIELDS))),
        always("usage", Takes::Table(INPUT_OUTPUT)),
    ],
);

pub(in crate::server) static CONVERSATION: Object = object(
    "Conversation",
    &[
        always("id", Takes::Text),
        is(&["conversation"]),
        always("created_at", Takes::Integer),
        always("metadata", Takes::Object),
    ],
);

const FILE_FIELDS: &[Field] = &[
    always("id", Takes::Text),
    is(&["file"]),
    always("bytes", Takes::Integer),
    always("created_at", Takes::Integer),
    sometimes("expires_at", Takes::Integer),
    always("filename", Takes::Text),
    always("purpose", Takes::Text),
    always("status", Takes::Text),
    always("status_details", MAYBE_TEXT),
    always("sha256", Takes::Text),
];

pub(in crate::server) static FILE: Object = object("File", FILE_FIELDS);

pub(in crate::server) static UPLOAD: Object = object(
    "Upload",
    &[
        always("id", Takes::Text),
        is(&["upload"]),
        always("bytes", Takes::Integer),
        always("created_at", Takes::Integer),
        always("filename", Takes::Text),
        always("purpose", Takes::Text),
        always("status", Takes::Word(&["pending", "completed", "cancelled", "expired"])),
        always("expires_at", Takes::Integer),
        always("file", Takes::OneOf(&[Takes::Table(FILE_FIELDS), Takes::Null])),
    ],
);

pub(in crate::server) static PART: Object = object(
    "UploadPart",
    &[
        always("id", Takes::Text),
        is(&["upload.part"]),
        always("created_at", Takes::Integer),
        always("upload_id", Takes::Text),
    ],
);

pub(in crate::server) static BATCH: Object = object(
    "Batch",
    &[
        always("id", Takes::Text),
        is(&["batch"]),
        always("endpoint", Takes::Text),
        always("model", MAYBE_TEXT),
        always("errors", MAYBE_OBJECT),
        always("input_file_id", Takes::Text),
        always("completion_window", Takes::Text),
        always(
            "status",
            Takes::Word(&[
                "validating",
                "in_progress",
                "finalizing",
                "completed",
                "failed",
                "expired",
                "cancelling",
                "cancelled",
            ]),
        ),
        always("output_file_id", MAYBE_TEXT),
        always("error_file_id", MAYBE_TEXT),
        always("created_at", Takes::Integer),
        always("in_progress_at", MAYBE_INTEGER),
        always("expires_at", MAYBE_INTEGER),
        always("finalizing_at", MAYBE_INTEGER),
        always("completed_at", MAYBE_INTEGER),
        always("failed_at", MAYBE_INTEGER),
        always("expired_at", MAYBE_INTEGER),
        always("cancelling_at", MAYBE_INTEGER),
        always("cancelled_at", MAYBE_INTEGER),
        always(
            "request_counts",
            Takes::Table(&[
                always("total", Takes::Integer),
                always("completed", Takes::Integer),
                always("failed", Takes::Integer),
            ]),
        ),
        always("usage", Takes::Table(INPUT_OUTPUT)),
        always("metadata", MAYBE_OBJECT),
    ],
);

pub(in crate::server) static MODEL: Object = object(
    "Model",
    &[
        always("id", Takes::Text),
        is(&["model"]),
        always("created", Takes::Integer),
        always("owned_by", Takes::Text),
        sometimes("context_length", Takes::Integer),
        sometimes("embedding_length", Takes::Integer),
        sometimes("root", Takes::Text),
        sometimes("parent", MAYBE_TEXT),
    ],
);
