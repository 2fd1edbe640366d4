//! Whose words a route speaks, where something goes wrong or is told in headers.
//!
//! Everything that is refused, by a route or before one, is an [`ApiError`] on its way out; here it
//! gets the body that the clients of that API know. Where their body has no place for the field to
//! blame, the message names it.

use axum::Json;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;

/// An API that a route speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    OpenAi,
    Anthropic,
    Ollama,
}

/// Anthropic's status for "not now, for no fault of yours".
const OVERLOADED: u16 = 529;

impl Dialect {
    /// By the path of a request, whether anything is there or not.
    pub(super) fn of(path: &str) -> Self {
        match path.strip_prefix("/v1/messages") {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => Self::Anthropic,
            _ if path.starts_with("/api/") => Self::Ollama,
            _ => Self::OpenAi,
        }
    }

    /// The body of an error.
    pub(super) fn error(self, error: &ApiError, request_id: &str) -> Value {
        match self {
            Self::OpenAi => error.body(),
            Self::Anthropic => json!({
                "type": "error",
                "error": {"type": anthropic_type(error.status), "message": named(error)},
                "request_id": request_id,
            }),
            Self::Ollama => json!({"error": named(error)}),
        }
    }

    /// The same answer, in these words if it is a refusal.
    pub(super) fn refusal(self, mut response: Response, request_id: &str) -> Response {
        let error = response.extensions_mut().remove::<ApiError>();
        let Some(error) = error.filter(|_| self != Self::OpenAi) else { return response };
        let overloaded = self == Self::Anthropic && error.status == StatusCode::SERVICE_UNAVAILABLE;
        let status = match overloaded {
            true => StatusCode::from_u16(OVERLOADED).unwrap_or(error.status),
            false => error.status,
        };
        let body = (status, Json(self.error(&error, request_id))).into_response();
        let (mut head, _) = response.into_parts();
        let (own, body) = body.into_parts();
        head.status = own.status;
        head.headers.extend(own.headers);
        Response::from_parts(head, body)
    }

    /// Headers that only these clients read.
    pub(super) fn mark(self, request_id: &HeaderValue, headers: &mut HeaderMap) {
        if self == Self::Anthropic {
            headers.insert("request-id", request_id.clone());
        }
    }
}

fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// What is wrong, and with which field.
fn named(error: &ApiError) -> String {
    match &error.param {
        Some(param) if !error.message.contains(param.as_str()) => {
            format!("{param}: {}", error.message)
        }
        _ => error.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_who_is_spoken_to() {
        for (path, dialect) in [
            ("/v1/messages", Dialect::Anthropic),
            ("/v1/messages/count_tokens", Dialect::Anthropic),
            ("/v1/messages_of_mine", Dialect::OpenAi),
            ("/v1/chat/completions", Dialect::OpenAi),
            ("/api/nothing", Dialect::Ollama),
            ("/apiary", Dialect::OpenAi),
        ] {
            assert_eq!(Dialect::of(path), dialect, "{path}");
        }
    }

    #[test]
    fn a_message_names_its_field_once() {
        let error = ApiError::missing("max_tokens");
        let body = Dialect::Anthropic.error(&error, "req_1");
        let message = "Missing required parameter: 'max_tokens'.";
        assert_eq!(
            body,
            json!({"type": "error", "request_id": "req_1",
                   "error": {"type": "invalid_request_error", "message": message}})
        );
        let silent = ApiError::invalid("think", "It does not.");
        assert_eq!(Dialect::Ollama.error(&silent, ""), json!({"error": "think: It does not."}));
    }
}
