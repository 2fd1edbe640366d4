//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them: the operator's.
//!
//! An adapter is read before it is registered, so a broken one is refused here, and running answers
//! keep what they began with. Deliberately absent: asking for an adapter, which is the name of a
//! model in any request.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::error::ApiError;
use super::reference::{Routes, post};
use super::{App, aside, fields, models};
use crate::auth::Caller;
use crate::registry::NewAdapter;

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Adapters";
    Routes::new()
        .add(
            post("/v1/load_lora_adapter", "loadAdapter", GROUP, "Serves a LoRA adapter.")
                .json(fields::LOAD_ADAPTER)
                .example(json!({"lora_name": "mine", "lora_path": "/adapters/mine"}))
                .content("text/plain")
                .admin(),
            load,
        )
        .add(
            post("/v1/unload_lora_adapter", "unloadAdapter", GROUP, "Serves it no more.")
                .json(fields::UNLOAD_ADAPTER)
                .example(json!({"lora_name": "mine"}))
                .content("text/plain")
                .admin(),
            unload,
        )
}

pub(super) async fn load(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    models::only_operators(&app, &caller)?;
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::LOAD_ADAPTER, "", app.config.lenient_fields)?;
    let missing = |name: &'static str| move || ApiError::missing(name);
    let id = body.string("lora_name")?.ok_or_else(missing("lora_name"))?;
    let path = body.string("lora_path")?.ok_or_else(missing("lora_path"))?;
    let replace = body.bool("load_inplace")?.unwrap_or(false);
    let pinned = body.bool("pinned")?.unwrap_or(false);
    let named = body.string("base_model_name")?;
    let registry = Arc::clone(app.pipeline.registry());
    let base = registry.base_of_adapter(named.as_deref())?.id.clone();
    let model = app.pipeline.model(&base, caller.tenant, None).await?;
    let new = NewAdapter { id: id.clone(), base, path: PathBuf::from(path), pinned };
    aside(move || registry.load_adapter(new, &model, replace)).await?;
    Ok(format!("Success: LoRA adapter '{id}' added successfully.").into_response())
}

pub(super) async fn unload(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    models::only_operators(&app, &caller)?;
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::UNLOAD_ADAPTER, "", app.config.lenient_fields)?;
    let id = body.string("lora_name")?.ok_or_else(|| ApiError::missing("lora_name"))?;
    app.pipeline.registry().adapters().remove(&id)?;
    Ok(format!("Success: LoRA adapter '{id}' removed successfully.").into_response())
}
