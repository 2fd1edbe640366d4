//! `/v1/batches`: files of requests, run in the background. [`lines`] runs one of them.

mod lines;

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Path, Request, State};
use axum::http::Uri;
use serde_json::{Value, json};

pub(super) use self::lines::Lines;
use super::error::ApiError;
use super::extract::Fields;
use super::paging::{self, PageRule, Query};
use super::reference::{Routes, answers, get, post};
use super::{App, aside, fields, files, ids, metadata};
use crate::auth::Caller;
use crate::jobs::{NewBatch, WINDOW};
use crate::types::Tenant;

/// 20 of at most 100, newest first.
const PAGE: PageRule = PageRule { limit: 20, max: 100, descending: true };

/// What lines may ask.
pub(super) const ENDPOINTS: [&str; 4] =
    ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];
/// What they may ask at OpenAI and not here.
const NOT_HERE: [&str; 4] =
    ["/v1/moderations", "/v1/images/generations", "/v1/images/edits", "/v1/videos"];

const GROUP: &str = "Batches";

type Answer = Result<Json<Value>, ApiError>;

pub(super) fn routes() -> Routes {
    let example = json!({"input_file_id": "file-", "endpoint": "/v1/chat/completions",
        "completion_window": "24h"});
    Routes::new()
        .add(
            post(
                "/v1/batches",
                "createBatch",
                GROUP,
                "Runs the lines of a file in the background.",
            )
            .json(fields::BATCH)
            .example(example)
            .answers(&answers::BATCH),
            create,
        )
        .add(
            get("/v1/batches", "listBatches", GROUP, "Lists batches.").paged(PAGE, &answers::BATCH),
            list,
        )
        .add(
            get("/v1/batches/{batch_id}", "retrieveBatch", GROUP, "A batch.")
                .answers(&answers::BATCH),
            one,
        )
        .add(
            post("/v1/batches/{batch_id}/cancel", "cancelBatch", GROUP, "Stops a batch.")
                .answers(&answers::BATCH),
            cancel,
        )
}

async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Answer {
    let new = read(app.body(request).await?, caller.tenant, app.config.lenient_fields)?;
    let (id, batches) = (ids::random("batch_"), Arc::clone(&app.rooms.batches));
    Ok(Json(aside(move || batches.create(&id, &new)).await?))
}

async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
) -> Answer {
    let (query, batches) = (Query::parse(&uri)?, Arc::clone(&app.rooms.batches));
    paging::answer(&app, &caller, query, PAGE, move |page| batches.list(caller.project, page)).await
}

async fn one(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Answer {
    let batches = Arc::clone(&app.rooms.batches);
    Ok(Json(aside(move || batches.get(caller.project, &id)).await?))
}

async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Answer {
    let batches = Arc::clone(&app.rooms.batches);
    Ok(Json(aside(move || batches.cancel(caller.project, &id)).await?))
}

/// Reads a body.
fn read(mut body: Fields, tenant: Tenant, lenient: bool) -> Result<NewBatch, ApiError> {
    fields::check(body.map(), fields::BATCH, "", lenient)?;
    let mut wanted = |name| body.string(name)?.ok_or_else(|| ApiError::missing(name));
    let input_file_id = wanted("input_file_id")?;
    let endpoint = wanted("endpoint")?;
    let window = wanted("completion_window")?;
    let list = ENDPOINTS.map(|endpoint| format!("'{endpoint}'")).join(", ");
    if NOT_HERE.contains(&endpoint.as_str()) {
        let message = format!("Batches for '{endpoint}' are not supported; these are: {list}.");
        return Err(ApiError::unsupported("endpoint", message));
    }
    if !ENDPOINTS.contains(&endpoint.as_str()) {
        let message = format!("Invalid value: '{endpoint}'. Supported values are: {list}.");
        return Err(ApiError::invalid("endpoint", message));
    }
    if window != WINDOW {
        let message = format!("Invalid value: '{window}'. The only supported value is '{WINDOW}'.");
        return Err(ApiError::invalid("completion_window", message));
    }
    let metadata = metadata::read(&mut body)?;
    let output_lifetime_s = files::lifetime(&mut body, "output_expires_after")?;
    Ok(NewBatch { input_file_id, endpoint, metadata, output_lifetime_s, tenant })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn body(name: &str, value: Value) -> Value {
        let mut body = json!({"input_file_id": "file-1", "endpoint": "/v1/chat/completions",
                              "completion_window": "24h"});
        body[name] = value;
        body
    }

    fn new(body: &Value) -> Result<NewBatch, ApiError> {
        read(Fields::parse(body.to_string().as_bytes())?, Tenant::default(), false)
    }

    #[test]
    fn bodies_are_read_and_wrong_ones_refused_by_field() {
        let expires = json!({"anchor": "created_at", "seconds": 3600});
        let good = new(&body("output_expires_after", expires)).unwrap();
        assert_eq!((good.output_lifetime_s, good.endpoint.as_str()), (Some(3600), ENDPOINTS[0]));
        let cases = [
            ("input_file_id", Value::Null, "input_file_id", "missing_required_parameter"),
            ("input_file_id", json!(5), "input_file_id", "invalid_type"),
            ("endpoint", Value::Null, "endpoint", "missing_required_parameter"),
            ("endpoint", json!("/v1/chat"), "endpoint", "invalid_value"),
            ("endpoint", json!("/v1/moderations"), "endpoint", "unsupported_parameter"),
            ("completion_window", Value::Null, "completion_window", "missing_required_parameter"),
            ("completion_window", json!("48h"), "completion_window", "invalid_value"),
            ("metadata", json!({"k": 1}), "metadata.k", "invalid_type"),
            ("output_expires_after", json!(3600), "output_expires_after", "invalid_type"),
            (
                "output_expires_after",
                json!({"anchor": "created_at", "seconds": 1}),
                "output_expires_after.seconds",
                "invalid_value",
            ),
            ("priority", json!(1), "priority", "unknown_parameter"),
        ];
        for (name, value, param, code) in cases {
            let error = new(&body(name, value)).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code), (Some(param), Some(code)));
        }
    }
}
