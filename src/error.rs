//! The error of a request, as the rooms above the engine speak of it. A leaf.
//!
//! Deliberately absent: HTTP. `server::error` has the one match from here to a status code.

use std::time::Duration;

/// Why a request was refused or failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Nothing is served under this id.
    #[error("The model `{0}` does not exist or you do not have access to it.")]
    ModelNotFound(String),
    /// A field has a value that it cannot have.
    #[error("{message}")]
    InvalidValue {
        /// The field, as the wire names it.
        param: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A known field, or a value of one, that this build does not support.
    #[error("{message}")]
    Unsupported {
        /// The field, as the wire names it.
        param: String,
        /// What is not supported.
        message: String,
    },
    /// The prompt, or prompt and `max_tokens` together, never fit into the context.
    #[error(
        "This model's maximum context length is {max} tokens. However, your request has {prompt} \
         prompt tokens{}. Please reduce the length of the prompt or the completion.",
        if *.completion > 0 { format!(" and asks for {completion} more") } else { String::new() }
    )]
    ContextLengthExceeded {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for, 0 when the prompt alone is too long.
        completion: usize,
        /// Tokens that fit.
        max: usize,
        /// The field to blame, as the wire names it.
        param: &'static str,
    },
    /// The waiting room is full.
    #[error("The server is busy: {waiting} requests are already waiting. Please retry later.")]
    QueueFull {
        /// Requests that wait, for a turn or for their clients.
        waiting: usize,
        /// A guess at when it is worth trying again.
        retry_after: Duration,
    },
    /// Too much that the same key asked for is not read.
    #[error(
        "{unread} answers to this API key are not read by their clients, which is as many as may \
         be. Please read them, or close their connections."
    )]
    Unread {
        /// Answers that wait for their clients.
        unread: usize,
        /// A guess at when it is worth trying again.
        retry_after: Duration,
    },
    /// No such object, or it is another project's, which is the same to who asks.
    #[error("No {what} found with id '{id}'.")]
    NotFound {
        /// What was looked for: "chat completion".
        what: &'static str,
        /// Under which id.
        id: String,
    },
    /// A response that is to be continued is not there.
    #[error("Previous response with id '{0}' not found.")]
    PreviousNotFound(String),
    /// The caller's own limit, not the server's.
    #[error(
        "Rate limit reached for {unit} per minute of this API key: limit {limit}, used {used}. \
         Please try again in {:.3}s.", .retry_after.as_secs_f64()
    )]
    RateLimited {
        /// What is counted: "requests" or "tokens".
        unit: &'static str,
        /// In a minute.
        limit: u32,
        /// Of these, used.
        used: u32,
        /// From then on it is worth trying again.
        retry_after: Duration,
    },
    /// More than one object, or one project, may have.
    #[error("{message}")]
    TooLarge {
        /// Which limit: `file_too_large`, `storage_quota_exceeded`.
        code: &'static str,
        /// What is too large, and how large it may be.
        message: String,
    },
    /// There is no room to keep what should be kept.
    #[error("{0}")]
    StorageFull(String),
    /// The request waited longer than the operator allows, and was not begun.
    #[error(
        "The request waited {:.0} s and was not begun: the server is too busy. Please retry later.",
        .waited.as_secs_f64()
    )]
    Expired {
        /// How long it waited.
        waited: Duration,
    },
    /// A model was asked for and could not be brought into memory. The next request tries again.
    #[error("The model `{model}` could not be loaded: {error}")]
    LoadFailed {
        /// Its id.
        model: String,
        /// Why.
        error: String,
    },
    /// A model is not taken out of memory.
    #[error("The model `{id}` stays in memory: {why}.")]
    Stays {
        /// Its id.
        id: String,
        /// What keeps it.
        why: String,
    },
    /// The server drains and takes nothing new.
    #[error("The server is shutting down.")]
    ShuttingDown,
    /// Ours.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// A field with a wrong value.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::InvalidValue { param: param.into(), message: message.into() }
    }

    /// A field that is known and not supported.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Unsupported { param: param.into(), message: message.into() }
    }
}
