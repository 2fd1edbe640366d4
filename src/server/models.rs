//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::App;
use super::error::ApiError;
use crate::error::Error;
use crate::registry::ServedModel;

/// Everything that is served.
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let registry = app.pipeline.registry();
    let models = registry.models().iter().map(|model| object(model, model.id()));
    let aliases = registry.aliases().iter();
    let aliases = aliases.filter_map(|(name, _)| Some(object(&*registry.get(name)?, name)));
    let data: Vec<_> = models.chain(aliases).collect();
    Json(json!({"object": "list", "data": data}))
}

/// One of them. Ids may contain `/` and `:`, and clients encode them or not.
pub(super) async fn get(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|error| ApiError::invalid("model", error.body_text()))?;
    let model = app.pipeline.registry().get(&id).ok_or_else(|| Error::ModelNotFound(id.clone()))?;
    Ok(Json(object(&model, &id)))
}

/// A model under one of its names.
fn object(model: &ServedModel, id: &str) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": model.created_s(),
        "owned_by": "hearth",
        // Not OpenAI's, but what every client of a local model wants to know.
        "context_length": model.context_len(),
    })
}
