//! Pages of other origins: none may ask, but those that the operator names.
//!
//! Off by default, because a page that anybody opens in a browser could otherwise use a server on
//! localhost. Credentials of the browser (cookies) are never allowed: keys travel in a header that
//! the page itself must know.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::Response;

/// Headers of ours that a page may read.
const EXPOSED: &str = "x-request-id, openai-processing-ms, retry-after, retry-after-ms, \
    x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, \
    x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, \
    x-should-retry, x-hearth-queue-position, x-hearth-estimated-wait-ms";
/// How long a browser may remember a permission, in seconds.
const MAX_AGE_S: u64 = 600;

/// The origin of a request, where it is one of `allowed`; `*` allows every one.
pub(super) fn allowed(allowed: &[String], headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let known = |entry: &String| entry == "*" || entry.as_bytes() == origin.as_bytes();
    allowed.iter().any(known).then(|| origin.clone())
}

/// The answer to a browser that asks whether its page may ask; `None` for any other request.
pub(super) fn preflight(request: &Request) -> Option<Response> {
    let asked = request.headers().get(header::ACCESS_CONTROL_REQUEST_METHOD);
    if request.method() != Method::OPTIONS || asked.is_none() {
        return None;
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    let methods = HeaderValue::from_static("GET, POST, DELETE");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    if let Some(wanted) = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
    }
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE_S.into());
    Some(response)
}

/// Lets the page of this origin read an answer.
pub(super) fn mark(origin: HeaderValue, headers: &mut HeaderMap) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    headers.append(header::VARY, HeaderValue::from_static("origin"));
}
