//! `POST /api/embed`, and `/api/embeddings` as it was before: one text, one vector.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;

use super::{known, model_name, nanos, options};
use crate::auth::Caller;
use crate::pipeline::{EmbedInput, EmbedRequest, Embeddings};
use crate::server::error::ApiError;
use crate::server::extract::Fields;
use crate::server::fields::{self, Field, Takes, honoured, required};
use crate::server::observe::Watch;
use crate::server::{App, call, embeddings};
use crate::types::Tenant;

/// `POST /api/embed`.
pub(super) const EMBED: &[Field] = &[
    required("model", Takes::Text),
    honoured("input", fields::TEXT_OR_LIST),
    honoured("truncate", Takes::Bool),
    // Honoured where the model was trained for it.
    honoured("dimensions", Takes::Integer),
    honoured("keep_alive", fields::TEXT_OR_NUMBER),
    // Checked by name; none of them changes a vector.
    honoured("options", Takes::Table(options::OPTIONS)),
];

/// `POST /api/embeddings`.
pub(super) const EMBEDDINGS: &[Field] = &[
    required("model", Takes::Text),
    required("prompt", Takes::Text),
    honoured("keep_alive", fields::TEXT_OR_NUMBER),
    honoured("options", Takes::Table(options::OPTIONS)),
];

#[derive(Serialize)]
struct Answer {
    model: String,
    embeddings: Vec<Vec<f32>>,
    total_duration: Value,
    load_duration: Value,
    prompt_eval_count: usize,
}

#[derive(Serialize)]
struct One {
    embedding: Vec<f32>,
}

pub(super) async fn embed(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let began = Instant::now();
    let mut body = app.body(request).await?;
    let inputs = |body: &mut Fields| embeddings::inputs(body.value("input"));
    let request = read(&mut body, EMBED, app.config.lenient_fields, inputs)?;
    let model = request.model.clone();
    let (made, load) = make(&app, &watch, &caller, request).await?;
    let answer = Answer {
        model,
        embeddings: made.vectors,
        total_duration: nanos(began.elapsed()),
        load_duration: nanos(load),
        prompt_eval_count: made.prompt_tokens,
    };
    Ok(Json(answer).into_response())
}

pub(super) async fn embed_one(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut body = app.body(request).await?;
    let prompt = |body: &mut Fields| match body.string("prompt")? {
        Some(text) if !text.is_empty() => Ok(vec![EmbedInput::Text(text)]),
        Some(_) => Err(ApiError::invalid("prompt", "Invalid 'prompt': it is empty.")),
        None => Err(ApiError::missing("prompt")),
    };
    let request = read(&mut body, EMBEDDINGS, app.config.lenient_fields, prompt)?;
    let (made, _) = make(&app, &watch, &caller, request).await?;
    let embedding = made.vectors.into_iter().next().unwrap_or_default();
    Ok(Json(One { embedding }).into_response())
}

/// The vectors, and how long their model took to come.
async fn make(
    app: &App,
    watch: &Watch,
    caller: &Caller,
    mut request: EmbedRequest,
) -> Result<(Embeddings, Duration), ApiError> {
    let began = Instant::now();
    request.tenant = caller.tenant;
    request.model = known(app.pipeline.registry(), &request.model).to_owned();
    let EmbedRequest { model, tenant, keep_alive, .. } = &request;
    let lease = app.pipeline.registry().embedder(model, *tenant, *keep_alive).await?;
    let load = began.elapsed();
    let embedding = app.pipeline.embed_with(&lease, request).await?;
    watch.embedding(&embedding);
    let made = embedding.wait().await?;
    watch.embedded();
    Ok((made, load))
}

/// Reads a body; what is to be embedded stands in a field of its own name.
fn read(
    body: &mut Fields,
    table: &[Field],
    lenient: bool,
    inputs: impl FnOnce(&mut Fields) -> Result<Vec<EmbedInput>, ApiError>,
) -> Result<EmbedRequest, ApiError> {
    fields::check(body.map(), table, "", lenient)?;
    let model = model_name(body)?;
    if let Some(options) = body.object("options")? {
        options::check(&options, lenient)?;
    }
    Ok(EmbedRequest {
        model,
        inputs: inputs(body)?,
        dimensions: body.count("dimensions", 1..=u32::MAX)?,
        truncate: body.bool("truncate")?.unwrap_or(true),
        keep_alive: call::keep_alive(body)?,
        tenant: Tenant::default(), // who asks, the route knows
    })
}
