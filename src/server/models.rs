//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::App;
use super::error::ApiError;
use crate::embeddings::EmbeddingModel;
use crate::error::Error;
use crate::registry::{Registry, ServedModel};

/// Everything that is served.
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let registry = app.pipeline.registry();
    let models = registry.models().iter().map(|model| object(model, model.id()));
    let embedders = registry.embedders().iter().map(|model| embedder(model, model.id()));
    let aliases = registry.aliases().iter().filter_map(|(name, _)| named(registry, name).ok());
    let data: Vec<_> = models.chain(embedders).chain(aliases).collect();
    Json(json!({"object": "list", "data": data}))
}

/// One of them. Ids may contain `/` and `:`, and clients encode them or not.
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(named(app.pipeline.registry(), &id)?))
}

/// The model behind an id or another name.
fn named(registry: &Registry, id: &str) -> Result<Value, Error> {
    match registry.get(id) {
        Some(model) => Ok(object(&model, id)),
        None => registry.embedder(id).map(|model| embedder(&model, id)),
    }
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

fn embedder(model: &EmbeddingModel, id: &str) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": model.created_s(),
        "owned_by": "hearth",
        "context_length": model.settings().context_len,
        "embedding_length": model.vector_len(),
    })
}
