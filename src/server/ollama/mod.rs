//! Ollama's API, as front ends and editors speak it: `/api/chat`, `/api/generate`, `/api/embed`
//! (`/api/embeddings` before it), and the models (`tags`, `show`, `ps`, `version`). A neighbour's
//! words for the house's own request.
//!
//! [`request`] reads bodies, [`options`] their options, [`reply`] writes answers as lines of JSON,
//! [`models`] tells what there is. Keys, limits, queue and pipeline are those of every other route.
//! Deliberately absent: fetching, making, copying and deleting models, which are the operator's.

mod embed;
mod models;
mod options;
mod reply;
mod request;
#[cfg(test)]
mod request_tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use futures_util::stream::StreamExt;
use serde_json::json;

use self::reply::{Reply, Shape};
use super::error::ApiError;
use super::extract::Fields;
use super::observe::Watch;
use super::reference::{Routes, answers, get, post};
use super::sse::Writer;
use super::{App, answer, objects, sse};
use crate::auth::Caller;
use crate::registry::{self, Registry, ServedModel};
use crate::types::KeepAlive;

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Ollama";
    const MODEL: &str = "hearth-tiny";
    let said = json!([{"role": "user", "content": "Hello"}]);
    let chats = post("/api/chat", "ollamaChat", GROUP, "Answers a conversation.")
        .json(request::CHAT)
        .example(json!({"model": MODEL, "messages": said, "stream": false}));
    let texts = post("/api/generate", "ollamaGenerate", GROUP, "Continues a text.")
        .json(request::GENERATE)
        .example(json!({"model": MODEL, "prompt": "Hello", "stream": false}));
    let embeds = post("/api/embed", "ollamaEmbed", GROUP, "Makes vectors of texts.")
        .json(embed::EMBED)
        .example(json!({"model": "all-MiniLM-L6-v2", "input": ["Hello"]}));
    let one = post("/api/embeddings", "ollamaEmbeddings", GROUP, "Makes a vector of a text.")
        .json(embed::EMBEDDINGS)
        .example(json!({"model": "all-MiniLM-L6-v2", "prompt": "Hello"}));
    let shows = post("/api/show", "ollamaShow", GROUP, "Tells about a model.")
        .json(models::SHOW)
        .example(json!({"model": MODEL}));
    Routes::new()
        .add(chats.answers(&answers::OLLAMA_CHAT).lines(), chat)
        .add(texts.answers(&answers::OLLAMA_TEXT).lines(), generate)
        .add(embeds.answers(&answers::OLLAMA_VECTORS), embed::embed)
        .add(one.answers(&answers::OLLAMA_VECTOR), embed::embed_one)
        .add(
            get("/api/tags", "ollamaTags", GROUP, "Lists the models.")
                .answers(&answers::OLLAMA_MODELS),
            models::tags,
        )
        .add(shows.answers(&answers::OLLAMA_SHOWN), models::show)
        .add(
            get("/api/ps", "ollamaPs", GROUP, "Lists the models in memory.")
                .answers(&answers::OLLAMA_MODELS),
            models::ps,
        )
        .add(
            get("/api/version", "ollamaVersion", GROUP, "Tells the version.")
                .answers(&answers::OLLAMA_VERSION),
            models::version,
        )
}

async fn chat(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    answer(&app, watch, &caller, request, Shape::Chat).await
}

async fn generate(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    answer(&app, watch, &caller, request, Shape::Generate).await
}

/// Answers. Dropping the future, or the body of the answer, cancels everything behind it.
async fn answer(
    app: &App,
    watch: Arc<Watch>,
    caller: &Caller,
    request: Request,
    shape: Shape,
) -> Result<Response, ApiError> {
    let began = Instant::now();
    let body = app.body(request).await?;
    let asked = match shape {
        Shape::Chat => request::chat(body, app.config.lenient_fields)?,
        Shape::Generate => request::generate(body, app.config.lenient_fields)?,
    };
    let registry = app.pipeline.registry();
    let name = known(registry, &asked.model).to_owned();
    let gone = asked.keep_alive == Some(KeepAlive::For(Duration::ZERO));
    if gone && asked.request.is_none() && !is_there(registry, &name)? {
        let reply = Reply::new(shape, &asked.model, began, Duration::ZERO);
        return Ok(Json(reply.nothing("unload")).into_response());
    }
    let model = app.pipeline.model(&name, caller.tenant, asked.keep_alive).await?;
    let load = began.elapsed();
    let reply = Reply::new(shape, &asked.model, began, load);
    // To ask nothing is to ask that the model be there, or be gone.
    let Some(mut request) = asked.request else {
        let reason = if gone { "unload" } else { "load" };
        return Ok(Json(reply.nothing(reason)).into_response());
    };
    request.model = name;
    check_think(&model, asked.thinks)?;
    let begun = answer::begin_in_room(app, &watch, caller, &model, request).await?;
    let (answer::Begun { place, mut events, .. }, _) = begun;
    if asked.stream {
        watch.streaming();
        return Ok(answer::placed(sse::response(events, reply, app.config.heartbeat), place));
    }
    let (mut reply, mut unsent) = (reply, Vec::new());
    while let Some(event) = events.next().await {
        reply.event(event?, &mut unsent);
        unsent.clear();
    }
    let whole = reply.whole().ok_or_else(objects::cut_short)?;
    Ok(answer::placed(Json(whole).into_response(), place))
}

/// It is in memory, or on its way there.
fn is_there(registry: &Registry, name: &str) -> Result<bool, ApiError> {
    let id = &registry.generates(name)?.id;
    let standings = registry.standings();
    Ok(standings.iter().any(|model| model.id == *id && model.state != registry::State::Unloaded))
}

fn check_think(model: &ServedModel, thinks: bool) -> Result<(), ApiError> {
    if !thinks || model.thinks() {
        return Ok(());
    }
    let message = format!("'think': the template of `{}` knows no thought.", model.id());
    Err(ApiError::unsupported("think", message))
}

/// The name that the house has for a model: `:latest` is what a name without a tag means.
fn known<'a>(registry: &Registry, name: &'a str) -> &'a str {
    match name.strip_suffix(":latest") {
        Some(short) if registry.card(name).is_err() => short,
        _ => name,
    }
}

/// `model`, or `name` as it was called before.
fn model_name(body: &mut Fields) -> Result<String, ApiError> {
    let (model, name) = (body.string("model")?, body.string("name")?);
    let given = model.into_iter().chain(name).find(|name| !name.is_empty());
    given.ok_or_else(|| ApiError::missing("model"))
}

/// Nanoseconds, as every duration of Ollama is told.
fn nanos(time: Duration) -> serde_json::Value {
    json!(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}
