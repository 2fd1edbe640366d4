//! The one way from a failure to the wire: status, and `{"error": {message, type, param, code}}`.
//!
//! Everything that a client is ever refused with is an [`ApiError`]. The request errors of the
//! rooms below come in through the one `match` of `From<Error>`; the rest (routes, keys, JSON) is
//! HTTP's own and has a constructor here.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::Error;

const INVALID_REQUEST: &str = "invalid_request_error";

/// A refusal or failure, as a client sees it.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    pub status: StatusCode,
    /// The family: `invalid_request_error`, `rate_limit_error`, ...
    pub kind: &'static str,
    pub code: Option<&'static str>,
    /// The field to blame, as a path: `messages[2].content`.
    pub param: Option<String>,
    pub message: String,
    /// When it is worth trying again.
    pub retry_after: Option<Duration>,
}

/// What the log may know about a refusal: not its message, which may quote the request, unless the
/// failure is the server's own.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub code: &'static str,
    pub param: Option<String>,
    pub failure: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into(), retry_after: None }
    }

    fn bad_request(code: &'static str, param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message).code(code).param(param)
    }

    fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The same, blamed on a field.
    pub(super) fn param(mut self, param: &str) -> Self {
        self.param = Some(param.to_owned());
        self
    }

    fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// A field that must be there and is not.
    pub(super) fn missing(param: &str) -> Self {
        let message = format!("Missing required parameter: '{param}'.");
        Self::bad_request("missing_required_parameter", param, message)
    }

    /// A field of the wrong JSON type. `expected` and `got` carry their article: "a string".
    pub(super) fn wrong_type(param: &str, expected: &str, got: &str) -> Self {
        let message =
            format!("Invalid type for '{param}': expected {expected}, but got {got} instead.");
        Self::bad_request("invalid_type", param, message)
    }

    /// A field that nobody knows.
    pub(super) fn unknown_field(param: &str) -> Self {
        let message = format!("Unrecognized request argument supplied: {param}");
        Self::bad_request("unknown_parameter", param, message)
    }

    /// A field with a wrong value.
    pub(super) fn invalid(param: &str, message: impl Into<String>) -> Self {
        Error::invalid(param, message).into()
    }

    /// A field that is known and not supported.
    pub(super) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Error::unsupported(param, message).into()
    }

    /// A body that is not JSON, or not an object. `message` names the position.
    pub(super) fn bad_json(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message).code("invalid_json")
    }

    /// A body that does not say it is JSON.
    pub(super) fn not_json() -> Self {
        let message = "The request body must be JSON, with the header \
                       'Content-Type: application/json'.";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID_REQUEST, message)
            .code("unsupported_media_type")
    }

    /// A body that is compressed.
    pub(super) fn encoded() -> Self {
        let message = "The request body must come as it is, without a 'Content-Encoding'.";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID_REQUEST, message)
            .code("unsupported_media_type")
    }

    /// Plain HTTP to a port that speaks TLS.
    pub(super) fn wants_https() -> Self {
        let message = "This port speaks https, and the request came in plain http.";
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message).code("https_required")
    }

    /// A body that does not say it is a form, or says it wrongly.
    pub(super) fn not_a_form(why: &str) -> Self {
        let message = format!("The request body must be a form of type multipart/form-data: {why}");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID_REQUEST, message)
            .code("unsupported_media_type")
    }

    /// A form with so many fields that nobody reads it to its end.
    pub(super) fn too_many_fields(max: usize) -> Self {
        let message = format!("The form has more than {max} fields.");
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message).code("invalid_body")
    }

    /// So many long bodies come at once that there is no memory for one more.
    pub(super) fn too_many_bodies() -> Self {
        let message = "Too many long requests are being sent at once. Please retry later.";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .code("rate_limit_exceeded")
            .retry_after(Duration::from_secs(1))
    }

    /// A body beyond the limit.
    pub(super) fn body_too_large(limit_bytes: usize) -> Self {
        let message = format!("The request body is larger than the limit of {limit_bytes} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID_REQUEST, message).code("request_too_large")
    }

    /// A body that took too long to come.
    pub(super) fn body_too_slow(limit: Duration) -> Self {
        let message = format!("The request body was not complete after {} s.", limit.as_secs_f64());
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID_REQUEST, message).code("request_timeout")
    }

    /// A body that could not be read to its end.
    pub(super) fn unreadable_body() -> Self {
        let message = "The request body could not be read.";
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message).code("invalid_body")
    }

    /// No key, or a wrong one.
    pub(super) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, INVALID_REQUEST, message).code("invalid_api_key")
    }

    /// A right key that may not do this.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, INVALID_REQUEST, message).code("insufficient_permissions")
    }

    /// No such route.
    pub(super) fn unknown_route(method: &str, path: &str) -> Self {
        let message = format!("Invalid URL ({method} {path})");
        Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, message).code("unknown_url")
    }

    /// The route exists, the method does not.
    pub(super) fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("Not allowed to {method} on {path}.");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID_REQUEST, message)
            .code("method_not_supported")
    }

    /// The `error` object: all four keys, always.
    pub(super) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::ModelNotFound(_) => Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, message)
                .code("model_not_found")
                .param("model"),
            Error::InvalidValue { param, .. } => {
                Self::bad_request("invalid_value", &param, message)
            }
            Error::Unsupported { param, .. } => {
                Self::bad_request("unsupported_parameter", &param, message)
            }
            Error::ContextLengthExceeded { param, .. } => {
                Self::bad_request("context_length_exceeded", param, message)
            }
            Error::QueueFull { retry_after, .. } | Error::Unread { retry_after, .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
                    .code("rate_limit_exceeded")
                    .retry_after(retry_after)
            }
            Error::NotFound { .. } => {
                Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, message).code("not_found")
            }
            Error::PreviousNotFound(_) => {
                Self::bad_request("previous_response_not_found", "previous_response_id", message)
            }
            Error::RateLimited { unit, retry_after, .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, unit, message)
                    .code("rate_limit_exceeded")
                    .retry_after(retry_after)
            }
            Error::TooLarge { code, .. } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID_REQUEST, message).code(code)
            }
            Error::StorageFull(_) => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", message)
                    .code("storage_full")
            }
            Error::Expired { waited } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message)
                    .code("queue_timeout")
                    .retry_after(waited)
            }
            Error::LoadFailed { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
                    .code("model_load_failed")
                    .param("model")
            }
            Error::Stays { .. } => {
                Self::new(StatusCode::CONFLICT, INVALID_REQUEST, message).code("model_in_use")
            }
            Error::ShuttingDown => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message)
                    .code("shutting_down")
                    .retry_after(Duration::from_secs(1))
            }
            Error::Internal(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
                    .code("internal_error")
            }
        }
    }
}

/// The official clients try again by themselves, and wait so long at most: who must wait longer, or
/// until somebody makes room, is told not to try.
const RETRY_MAX: Duration = Duration::from_secs(120);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            // `Retry-After` counts whole seconds, so round up: never invite too early.
            let wait_s = wait.as_millis().div_ceil(1000) as u64;
            headers.insert(header::RETRY_AFTER, wait_s.into());
            headers.insert("retry-after-ms", (wait.as_millis() as u64).into());
        }
        let soon = self.retry_after.is_none_or(|wait| wait <= RETRY_MAX);
        if self.status == StatusCode::INSUFFICIENT_STORAGE || !soon {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        let code = self.code.unwrap_or(self.kind);
        let ours = self.status == StatusCode::INTERNAL_SERVER_ERROR;
        let failure = ours.then(|| self.message.clone());
        let refusal = Refusal { code, param: self.param.clone(), failure };
        response.extensions_mut().insert(refusal);
        response.extensions_mut().insert(self); // for who says it in other words
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_error_has_its_status_and_code() {
        let wait = Duration::from_millis(1500);
        let too_long =
            Error::ContextLengthExceeded { prompt: 70, completion: 5, max: 64, param: "messages" };
        let cases = [
            (Error::ModelNotFound("x".into()), 404, INVALID_REQUEST, "model_not_found"),
            (Error::invalid("n", "bad"), 400, INVALID_REQUEST, "invalid_value"),
            (Error::unsupported("tools", "no"), 400, INVALID_REQUEST, "unsupported_parameter"),
            (too_long, 400, INVALID_REQUEST, "context_length_exceeded"),
            (
                Error::QueueFull { waiting: 9, retry_after: wait },
                429,
                "rate_limit_error",
                "rate_limit_exceeded",
            ),
            (
                Error::Unread { unread: 9, retry_after: wait },
                429,
                "rate_limit_error",
                "rate_limit_exceeded",
            ),
            (Error::Expired { waited: wait }, 503, "service_unavailable_error", "queue_timeout"),
            (Error::ShuttingDown, 503, "service_unavailable_error", "shutting_down"),
            (Error::Internal("step failed".into()), 500, "server_error", "internal_error"),
        ];
        for (error, status, kind, code) in cases {
            let message = error.to_string();
            let api = ApiError::from(error);
            assert_eq!(api.status.as_u16(), status);
            let body = api.body();
            assert_eq!(body["error"]["type"], kind);
            assert_eq!(body["error"]["code"], code);
            assert_eq!(body["error"]["message"], message);
            let keys: Vec<_> = body["error"].as_object().unwrap().keys().cloned().collect();
            assert_eq!(keys, ["message", "type", "param", "code"]);
        }
    }

    #[test]
    fn a_long_prompt_names_both_lengths_and_the_field() {
        let error =
            Error::ContextLengthExceeded { prompt: 70, completion: 5, max: 64, param: "messages" };
        let body = ApiError::from(error).body();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains("64") && message.contains("70") && message.contains('5'));
        assert_eq!(body["error"]["param"], "messages");
    }

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let error = Error::QueueFull { waiting: 9, retry_after: Duration::from_millis(1500) };
        let response = ApiError::from(error).into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(response.headers()["retry-after-ms"], "1500");
        assert!(!response.headers().contains_key("x-should-retry"));
    }

    #[test]
    fn what_is_tried_again_in_vain_says_so() {
        let retry_after = Duration::from_secs(121);
        let debt = Error::RateLimited { unit: "tokens", limit: 1, used: 1, retry_after };
        for error in [debt, Error::StorageFull("the disk is full".into())] {
            let response = ApiError::from(error).into_response();
            assert_eq!(response.headers()["x-should-retry"], "false");
        }
        let response = ApiError::from(Error::Internal("step failed".into())).into_response();
        assert!(!response.headers().contains_key("x-should-retry"));
    }

    #[test]
    fn param_is_null_when_no_field_is_to_blame() {
        let body = ApiError::unknown_route("GET", "/v1/nothing").body();
        assert_eq!(
            body.to_string(),
            r#"{"error":{"message":"Invalid URL (GET /v1/nothing)","#.to_owned()
                + r#""type":"invalid_request_error","param":null,"code":"unknown_url"}}"#
        );
    }
}
