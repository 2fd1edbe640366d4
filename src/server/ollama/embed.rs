//! `POST /api/embed`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;

use super::{known, model_name, nanos, options};
use crate::pipeline::EmbedRequest;
use crate::server::error::ApiError;
use crate::server::extract::Fields;
use crate::server::fields::{self, Field, Takes, honoured, required};
use crate::server::observe::Watch;
use crate::server::{App, call, embeddings};

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

#[derive(Serialize)]
struct Answer {
    model: String,
    embeddings: Vec<Vec<f32>>,
    total_duration: Value,
    load_duration: Value,
    prompt_eval_count: usize,
}

pub(super) async fn embed(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    request: Request,
) -> Result<Response, ApiError> {
    let began = Instant::now();
    let mut body = app.body(request).await?;
    let (name, mut request) = read(&mut body, app.config.lenient_fields)?;
    request.model = known(app.pipeline.registry(), &name).to_owned();
    let keep_alive = request.keep_alive;
    let lease = app.pipeline.registry().embedder(&request.model, keep_alive).await?;
    let load = began.elapsed();
    let made = app.pipeline.embed_with(&lease, request).await?;
    drop(lease);
    watch.generating(&made.model, made.prompt_tokens, 0);
    let answer = Answer {
        model: name,
        embeddings: made.vectors,
        total_duration: nanos(began.elapsed()),
        load_duration: nanos(load),
        prompt_eval_count: made.prompt_tokens,
    };
    Ok(Json(answer).into_response())
}

fn read(body: &mut Fields, lenient: bool) -> Result<(String, EmbedRequest), ApiError> {
    fields::check(body.map(), EMBED, "", lenient)?;
    let name = model_name(body)?;
    if let Some(options) = body.object("options")? {
        options::check(&options, lenient)?;
    }
    let request = EmbedRequest {
        model: name.clone(),
        inputs: embeddings::inputs(body.value("input"))?,
        dimensions: body.count("dimensions", 1..=u32::MAX)?,
        truncate: body.bool("truncate")?.unwrap_or(true),
        keep_alive: call::keep_alive(body)?,
    };
    Ok((name, request))
}
