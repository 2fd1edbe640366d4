//! API keys on the wire: who sends a request, what its key may use, and the routes that manage
//! keys.
//!
//! `OpenAI-Project` and `OpenAI-Organization` are read by nobody: a key belongs to one project.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::StatusCode};
use serde_json::{Value, json};

use super::error::ApiError;
use super::extract::Fields;
use super::reference::{Routes, answers, delete, get, post};
use super::{App, aside, fields};
use crate::auth::admin;
use crate::auth::limits::Limiter;
use crate::auth::{Caller, Denied, KeyRow, Keyring, NewKey};

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Keys";
    Routes::new()
        .add(
            get("/v1/admin/keys", "listKeys", GROUP, "Lists keys.").lists(&answers::KEY).admin(),
            list,
        )
        .add(
            post("/v1/admin/keys", "createKey", GROUP, "Makes a key, and shows it once.")
                .json(fields::ADMIN_KEY)
                .example(json!({"name": "laptop"}))
                .answers(&answers::NEW_KEY)
                .created()
                .admin(),
            create,
        )
        .add(
            delete("/v1/admin/keys/{key_id}", "revokeKey", GROUP, "Revokes a key.")
                .deletes("api_key.deleted")
                .admin(),
            revoke,
        )
}

/// Who sends a request.
///
/// # Errors
/// A key is wanted, and there is none or the wrong one.
pub(super) fn caller(keyring: &Keyring, headers: &HeaderMap) -> Result<Caller, ApiError> {
    keyring.caller(bearer(headers).or(api_key(headers)))?.map_err(shut_out)
}

pub(super) fn shut_out(denied: Denied) -> ApiError {
    ApiError::unauthorized(match denied {
        Denied::Missing => {
            "You didn't provide an API key. Send it in the header \
             'Authorization: Bearer YOUR_KEY' or 'x-api-key: YOUR_KEY'."
        }
        Denied::Unknown => "Incorrect API key provided.",
        Denied::Revoked => "The API key provided has been revoked.",
        Denied::Expired => "The API key provided has expired.",
    })
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

/// As Anthropic's clients send it.
fn api_key(headers: &HeaderMap) -> Option<&str> {
    let key = headers.get("x-api-key")?.to_str().ok()?.trim();
    (!key.is_empty()).then_some(key)
}

const REQUESTS: [&str; 3] =
    ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
const TOKENS: [&str; 3] =
    ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];

/// Tells a client how its key stands.
pub(super) fn limit_headers(limiter: &Limiter, headers: &mut HeaderMap) {
    for (names, standing) in [REQUESTS, TOKENS].into_iter().zip(limiter.standing(Instant::now())) {
        let Some(standing) = standing else { continue };
        let [limit, remaining, reset] = names.map(HeaderName::from_static);
        headers.insert(limit, standing.limit.into());
        headers.insert(remaining, standing.remaining.into());
        let time = HeaderValue::from_str(&duration(standing.reset));
        headers.insert(reset, time.expect("digits and units; this is a bug"));
    }
}

/// As OpenAI writes it: `120ms`, `7.66s`, `6m0s`.
fn duration(time: Duration) -> String {
    let ms = time.as_millis();
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..60_000 => format!("{}s", ms as f64 / 1e3),
        _ => format!("{}m{}s", ms / 60_000, ms % 60_000 / 1000),
    }
}

/// `GET /v1/admin/keys`.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, ApiError> {
    only_admins(&caller)?;
    let store = Arc::clone(app.rooms.keyring.store());
    let rows = aside(move || admin::list(&store)).await?;
    let data: Vec<_> = rows.iter().map(object).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `POST /v1/admin/keys`.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    only_admins(&caller)?;
    let new = new_key(app.body(request).await?, app.config.lenient_fields)?;
    let store = Arc::clone(app.rooms.keyring.store());
    let created = aside(move || admin::create(&store, &new)).await?;
    app.rooms.keyring.forget();
    let mut key = object(&created.row);
    key["value"] = created.secret.into();
    Ok((StatusCode::CREATED, Json(key)).into_response())
}

/// `DELETE /v1/admin/keys/{key_id}`.
pub(super) async fn revoke(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    only_admins(&caller)?;
    let store = Arc::clone(app.rooms.keyring.store());
    let row = aside(move || admin::revoke(&store, &id)).await?;
    app.rooms.keyring.forget();
    Ok(Json(json!({"id": admin::id_of(&row), "object": "api_key.deleted", "deleted": true})))
}

pub(super) fn only_admins(caller: &Caller) -> Result<(), ApiError> {
    if caller.admin {
        return Ok(());
    }
    Err(ApiError::forbidden(
        "You have insufficient permissions for this operation. It needs an admin key: `hearth keys \
         create --admin` makes one.",
    ))
}

fn new_key(mut body: Fields, lenient: bool) -> Result<NewKey, ApiError> {
    fields::check(body.map(), fields::ADMIN_KEY, "", lenient)?;
    let mut limit = |name| {
        let limit = body.integer(name, 1..=u32::MAX.into());
        limit.map(|limit| limit.map(|limit| limit as u32))
    };
    let (weight, max_running) = (limit("weight")?, limit("max_running")?);
    let (requests_per_min, tokens_per_min) = (limit("requests_per_min")?, limit("tokens_per_min")?);
    let queue_timeout_s = limit("queue_timeout_s")?;
    Ok(NewKey {
        name: body.string("name")?.ok_or_else(|| ApiError::missing("name"))?,
        project: body.string("project")?.unwrap_or_else(|| "default".to_owned()),
        admin: body.bool("admin")?.unwrap_or(false),
        weight: weight.unwrap_or(1),
        max_running,
        requests_per_min,
        tokens_per_min,
        queue_timeout_s,
        expires_s: body.integer("expires_at", 0..=i64::MAX)?.map(i64::unsigned_abs),
    })
}

fn object(row: &KeyRow) -> Value {
    let NewKey { name, project, admin, weight, max_running, .. } = &row.key;
    let NewKey { requests_per_min, tokens_per_min, queue_timeout_s, expires_s, .. } = &row.key;
    json!({
        "id": admin::id_of(row),
        "object": "api_key",
        "name": name,
        "project": project,
        "admin": admin,
        "weight": weight,
        "max_running": max_running,
        "requests_per_min": requests_per_min,
        "tokens_per_min": tokens_per_min,
        "queue_timeout_s": queue_timeout_s,
        "redacted_value": format!("{}...{}", admin::PREFIX, row.hint),
        "created_at": row.created_s,
        "expires_at": expires_s,
        "revoked_at": row.revoked_s,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_is_told_from_everything_else() {
        let with =
            |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        for good in ["Bearer sk-one", "bearer sk-one", "BEARER  sk-one "] {
            assert_eq!(bearer(&with(good)), Some("sk-one"), "{good}");
        }
        for bad in ["Bearer ", "Bearer", "Basic sk-one", "sk-one", ""] {
            assert_eq!(bearer(&with(bad)), None, "{bad}");
        }
        assert_eq!(bearer(&HeaderMap::new()), None);
    }

    #[test]
    fn durations_read_as_openai_writes_them() {
        for (ms, text) in [(0, "0ms"), (120, "120ms"), (7660, "7.66s"), (360_000, "6m0s")] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
        assert_eq!(duration(Duration::from_millis(61_500)), "1m1s");
    }

    #[test]
    fn headers_say_what_the_limiter_says() {
        let now = Instant::now();
        let limiter = Limiter::new(Some(60), None, now);
        limiter.request(now).unwrap();
        let mut headers = HeaderMap::new();
        limit_headers(&limiter, &mut headers);
        assert_eq!(headers["x-ratelimit-limit-requests"], "60");
        assert_eq!(headers["x-ratelimit-remaining-requests"], "59");
        assert!(headers.contains_key("x-ratelimit-reset-requests"));
        assert!(!headers.contains_key("x-ratelimit-limit-tokens"));
    }
}
