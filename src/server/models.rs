//! `GET /v1/models`, `GET` and `DELETE /v1/models/{model}`, and the operator's `/v1/admin/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, header};
use serde_json::{Value, json};

use super::error::ApiError;
use super::reference::{self, Routes, answers, post};
use super::{App, auth, says_json};
use crate::auth::Caller;
use crate::error::Error;
use crate::registry::{Card, Kind, Registry, Standing};

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Models";
    Routes::new()
        .add(
            reference::get("/v1/models", "listModels", GROUP, "Lists models and adapters.")
                .lists(&answers::MODEL),
            list,
        )
        .add(
            reference::get(
                "/v1/models/{*model}",
                "retrieveModel",
                GROUP,
                "A model; its id may have slashes.",
            )
            .shown(&[("/v1/models/{model}", "retrieveModel")])
            .answers(&answers::MODEL),
            get,
        )
        .add(
            reference::delete(
                "/v1/models/{*model}",
                "deleteModel",
                GROUP,
                "Serves an adapter no more.",
            )
            .shown(&[("/v1/models/{model}", "deleteModel")])
            .deletes("model")
            .admin(),
            delete,
        )
        .add(
            reference::get("/v1/admin/models", "listStandings", GROUP, "Where every model is.")
                .lists(&answers::STANDING)
                .admin(),
            standings,
        )
        .add(
            post(
                "/v1/admin/models/{*path}",
                "changeStanding",
                GROUP,
                "Brings a model into memory, or out of it.",
            )
            .shown(&[
                ("/v1/admin/models/{model}/load", "loadModel"),
                ("/v1/admin/models/{model}/unload", "unloadModel"),
            ])
            .answers(&answers::STANDING)
            .admin(),
            change,
        )
}

/// Everything that can be asked for, in memory or not.
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let registry = app.pipeline.registry();
    let models = registry.cards().map(|card| object(card, &card.id));
    let adapters = registry.adapters().cards();
    let adapters = adapters.iter().filter_map(|card| named(registry, &card.id).ok());
    let aliases = registry.aliases().iter().filter_map(|(name, _)| named(registry, name).ok());
    let data: Vec<_> = models.chain(adapters).chain(aliases).collect();
    Json(json!({"object": "list", "data": data}))
}

/// One of them. Ids may contain `/` and `:`, and clients encode them or not.
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(named(app.pipeline.registry(), &id)?))
}

/// What was fine-tuned goes, as far as a server can let it go: an adapter is served no more, and
/// its files stay, so that one of the command line is back at the next start. A model of its own
/// is the operator's, who names those that are served.
async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    only_operators(&app, &caller)?;
    let registry = app.pipeline.registry();
    let Some(adapter) = registry.wanted(&id, &[])?.pop() else {
        let message = format!("The model `{id}` is no adapter, and only these can be deleted.");
        return Err(ApiError::forbidden(message));
    };
    // Somebody else may have been faster.
    registry.adapters().remove(&adapter.id).map_err(|_| Error::ModelNotFound(id.clone()))?;
    Ok(Json(json!({"id": id, "object": "model", "deleted": true})))
}

/// The model behind an id or another name.
fn named(registry: &Registry, name: &str) -> Result<Value, Error> {
    let mut object = object(registry.card(name)?, name);
    // A model that is another one with an adapter says which.
    if let Some(adapter) = registry.wanted(name, &[])?.first()
        && let Some(adapter) = registry.adapters().card(&adapter.id)
    {
        object["created"] = adapter.created_s.into();
        object["root"] = adapter.base.clone().into();
        object["parent"] = adapter.base.into();
    }
    Ok(object)
}

/// A model under one of its names.
fn object(card: &Card, name: &str) -> Value {
    let mut object = json!({
        "id": name,
        "object": "model",
        "created": card.created_s,
        "owned_by": "hearth",
    });
    // Not OpenAI's, but what every client of a local model wants to know.
    match card.kind {
        Kind::Text { context_len } => object["context_length"] = context_len.into(),
        Kind::Embedding { context_len, vector_len } => {
            object["context_length"] = context_len.into();
            object["embedding_length"] = vector_len.into();
        }
    }
    object
}

/// `GET /v1/admin/models`: where every model is.
pub(super) async fn standings(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, ApiError> {
    only_operators(&app, &caller)?;
    let data: Vec<_> = app.pipeline.registry().standings().iter().map(standing).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `POST /v1/admin/models/{model}/load` and `.../unload`. The first answers when the model is
/// there; the second when it has begun to leave, and not where a request keeps it.
pub(super) async fn change(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(path): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    only_operators(&app, &caller)?;
    // There is no body to say what it is; but a page in a browser says where it comes from, and a
    // strange one cannot say JSON without asking.
    if headers.contains_key(header::ORIGIN) && !says_json(&headers) {
        return Err(ApiError::not_json());
    }
    let registry = app.pipeline.registry();
    let id = match path.rsplit_once('/') {
        Some((name, "load")) => {
            registry.load(name).await?;
            registry.card(name)?.id.clone()
        }
        Some((name, "unload")) => {
            registry.unload(name)?;
            registry.card(name)?.id.clone()
        }
        _ => return Err(ApiError::unknown_route("POST", &format!("/v1/admin/models/{path}"))),
    };
    let standings = registry.standings();
    let own = standings.iter().find(|standing| standing.id == id);
    Ok(Json(standing(own.ok_or(Error::ModelNotFound(id))?)))
}

/// Where there are keys, an admin key is wanted.
pub(super) fn only_operators(app: &App, caller: &Caller) -> Result<(), ApiError> {
    match app.rooms.keyring.is_open()? {
        true => Ok(()),
        false => auth::only_admins(caller),
    }
}

fn standing(standing: &Standing) -> Value {
    json!({
        "id": standing.id,
        "object": "model.standing",
        "state": standing.state.as_str(),
        "pinned": standing.pinned,
        "requests_running": standing.held,
        "requests_waiting": standing.waiting,
        "memory_bytes": standing.bytes,
        "loads": standing.counts.loads,
    })
}
