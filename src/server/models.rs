//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::App;
use super::error::ApiError;
use crate::embeddings::EmbeddingModel;
use crate::error::Error;
use crate::registry::ServedModel;

/// Everything that is served.
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let registry = app.pipeline.registry();
    let models = registry.models().iter().map(|model| object(model));
    let embedders = registry.embedders().iter().map(|model| embedder(model));
    let data: Vec<_> = models.chain(embedders).collect();
    Json(json!({"object": "list", "data": data}))
}

/// One of them. Ids may contain `/` and `:`, and clients encode them or not.
pub(super) async fn get(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|error| ApiError::invalid("model", error.body_text()))?;
    let registry = app.pipeline.registry();
    if let Some(model) = registry.get(&id) {
        return Ok(Json(object(&model)));
    }
    let model = registry.embedders().iter().find(|model| model.id() == id);
    Ok(Json(embedder(model.ok_or(Error::ModelNotFound(id))?)))
}

fn object(model: &ServedModel) -> Value {
    json!({
        "id": model.id(),
        "object": "model",
        "created": model.created_s(),
        "owned_by": "hearth",
        // Not OpenAI's, but what every client of a local model wants to know.
        "context_length": model.context_len(),
    })
}

fn embedder(model: &EmbeddingModel) -> Value {
    json!({
        "id": model.id(),
        "object": "model",
        "created": model.created_s(),
        "owned_by": "hearth",
        "context_length": model.settings().context_len,
        "embedding_length": model.vector_len(),
    })
}
