//! `/v1/responses`: create (whole, streamed, in the background), show, cancel, delete.
//!
//! A response is a chat with a memory: [`request`] reads the body and hands what both have to the
//! parser of chats, [`reply`] makes the object and its events, [`background`] runs what nobody
//! waits for. Deliberately absent: hosted tools, pictures, and truncation, which are refused by
//! name.

mod background;
mod reply;
mod request;

pub(super) use background::Backgrounds;

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, Path, Request, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream::{self, BoxStream, StreamExt};
use serde_json::{Map, Value, json};

use self::reply::{Event, Reply};
use self::request::own_names;
pub(super) use self::request::{Draft, read};
use super::answer::merge;
use super::error::ApiError;
use super::observe::Watch;
use super::paging::{self, PageRule, Query};
use super::{App, aside, fields, ids, objects, sse};
use crate::auth::Caller;
use crate::error::Error;
use crate::history::{self, History, Page};
use crate::pipeline::TextEvent;
use crate::text::Special;
use crate::types::{ProjectId, unix_now_s};

/// Items of a list: 20 of at most 100, newest first.
const PAGE: PageRule = PageRule { limit: 20, max: 100, descending: true };

/// What a chat has no field for does not change the number of its tokens.
const INPUT_TOKENS: &[fields::Field] = &[
    fields::honoured("conversation"),
    fields::honoured("input"),
    fields::honoured("instructions"),
    fields::honoured("model"),
    fields::honoured("parallel_tool_calls"),
    fields::honoured("previous_response_id"),
    fields::honoured("reasoning"),
    fields::honoured("text"),
    fields::honoured("tool_choice"),
    fields::honoured("tools"),
    fields::honoured("truncation"),
];

pub(super) fn router() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/responses", post(create))
        .route("/v1/responses/input_tokens", post(input_tokens))
        .route("/v1/responses/{id}", get(show).delete(delete))
        .route("/v1/responses/{id}/cancel", post(cancel))
        .route("/v1/responses/{id}/input_items", get(input_items))
}

async fn create(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let draft = request::read(app.body(request).await?, app.config.lenient_fields)?;
    answer(&app, watch, &caller, draft).await
}

/// Answers a request. Dropping the future, or the body of the answer, cancels everything behind it.
pub(super) async fn answer(
    app: &Arc<App>,
    watch: Arc<Watch>,
    caller: &Caller,
    mut draft: Draft,
) -> Result<Response, ApiError> {
    let project = caller.project;
    let said = said(app, project, &mut draft).await?;
    let call = draft.call(&said)?;
    let model = call.model.clone();
    let model = app.pipeline.registry().generator(&model)?;
    let shell = shell(&draft, model.defaults().temperature, model.defaults().top_p);
    let reply = Reply::new(shell, draft.logprobs);
    let mut texts = Vec::new();
    for mut request in call.requests {
        request.tenant = caller.tenant;
        texts.push(app.pipeline.generate(request).await.map_err(|e| own_names(e.into()))?);
    }
    let prompt_tokens = texts.iter().map(|text| text.prompt_tokens()).sum();
    watch.generating(model.id(), prompt_tokens, 1);
    let watcher = Arc::clone(&watch);
    let events = merge(texts, 1).inspect(move |event| watcher.event(event)).boxed();
    let keep = Keep { history: Arc::clone(&app.rooms.history), project, draft };
    let mut run = Run { events, reply, keep, last: Last::Not };
    if run.keep.draft.background {
        return background::start(app, watch, run).await;
    }
    run.reply.begin(false);
    if run.keep.draft.stream {
        watch.streaming();
        let pieces = stream::unfold(run, |mut run| async {
            let events = run.step().await?;
            Some((bytes(events), run))
        });
        return Ok(sse::pieces(pieces.boxed(), app.config.heartbeat));
    }
    while run.step().await.is_some() {}
    match run.last {
        Last::Object(object) => Ok(Json(object).into_response()),
        Last::Error(error) => Err(error),
        Last::Not => Err(objects::cut_short()),
    }
}

/// Everything that the model reads: what was said before, and what is said now. References to
/// earlier items are replaced by these.
async fn said(app: &App, project: ProjectId, draft: &mut Draft) -> Result<Vec<Value>, ApiError> {
    let history = Arc::clone(&app.rooms.history);
    let (previous, conversation) = (draft.previous.clone(), draft.conversation.clone());
    let mut input = std::mem::take(&mut draft.input);
    let (said, input) = aside(move || {
        let mut said = match (previous, conversation) {
            (Some(id), _) => history.said_until(project, &id)?,
            (None, Some(id)) => history.all_items(project, &id)?,
            (None, None) => Vec::new(),
        };
        for (i, item) in input.iter_mut().enumerate() {
            if item["type"] == "item_reference" {
                let id = item["id"].as_str().unwrap_or_default();
                let found = history.find_item(project, id)?;
                let missing = || {
                    let message = format!("Item with id '{id}' not found.");
                    Error::invalid(format!("input[{i}].id"), message)
                };
                *item = found.ok_or_else(missing)?;
            }
        }
        said.extend(input.iter().cloned());
        Ok((said, input))
    })
    .await?;
    draft.input = input;
    Ok(said)
}

/// The object as it is at the beginning, every field in its place.
fn shell(draft: &Draft, temperature: Option<f32>, top_p: Option<f32>) -> Map<String, Value> {
    let mut shell = Map::new();
    for (name, value) in [
        ("id", json!(ids::random("resp_"))),
        ("object", json!("response")),
        ("created_at", json!(unix_now_s())),
        ("completed_at", Value::Null),
        ("status", Value::Null),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
        ("output", json!([])),
        ("usage", Value::Null),
    ] {
        shell.insert(name.to_owned(), value);
    }
    shell.extend(draft.echo.clone());
    // What holds when the request does not say.
    for (name, own) in [("temperature", temperature), ("top_p", top_p)] {
        if shell[name].is_null() {
            shell[name] = json!(own.unwrap_or(1.0));
        }
    }
    shell
}

/// Where a response is kept.
struct Keep {
    history: Arc<History>,
    project: ProjectId,
    draft: Draft,
}

impl Keep {
    async fn keep(&self, object: &Value) -> Result<(), Error> {
        let Draft { store, conversation, input, .. } = &self.draft;
        if !store && conversation.is_none() {
            return Ok(());
        }
        let reply = history::Reply {
            object: object.clone(),
            input: input.clone(),
            conversation: conversation.clone(),
            store: *store,
        };
        let (history, project) = (Arc::clone(&self.history), self.project);
        aside(move || history.keep_response(project, &reply)).await
    }
}

/// A response that is being made.
struct Run {
    events: BoxStream<'static, Result<TextEvent, Error>>,
    reply: Reply,
    keep: Keep,
    last: Last,
}

/// How it ended.
enum Last {
    Not,
    Object(Value),
    Error(ApiError),
}

impl Run {
    /// Goes on until there is something to tell. `None` after the end. The object is kept before
    /// anybody is told that it is complete.
    async fn step(&mut self) -> Option<Vec<Event>> {
        loop {
            let events = self.reply.take_events();
            if !events.is_empty() {
                return Some(events);
            }
            if !matches!(self.last, Last::Not) {
                return None;
            }
            match self.events.next().await {
                Some(Ok(event)) => self.reply.event(event),
                Some(Err(error)) => self.failed(error.into()).await,
                None => match self.reply.end() {
                    None => self.failed(objects::cut_short()).await,
                    Some(object) => match self.keep.keep(&object).await {
                        Ok(()) => {
                            self.reply.ended(object.clone());
                            self.last = Last::Object(object);
                        }
                        Err(error) => self.failed(error.into()).await,
                    },
                },
            }
        }
    }

    /// One in the background has nobody to tell but the store.
    async fn failed(&mut self, error: ApiError) {
        let object = self.reply.failed(&error);
        if self.keep.draft.background
            && let Err(error) = self.keep.keep(&object).await
        {
            tracing::error!(%error, "a failed response could not be kept");
        }
        self.last = Last::Error(error);
    }
}

fn bytes(events: Vec<Event>) -> Vec<u8> {
    events.into_iter().flat_map(|event| event.bytes).collect()
}

/// `POST /v1/responses/input_tokens`.
async fn input_tokens(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let lenient = app.config.lenient_fields;
    let body = app.body(request).await?;
    fields::check(body.map(), INPUT_TOKENS, "", lenient)?;
    let mut draft = request::read(body, lenient)?;
    let said = said(&app, caller.project, &mut draft).await?;
    let mut call = draft.call(&said)?;
    let request = call.requests.pop().ok_or_else(objects::cut_short)?;
    let prompt = app.pipeline.prompt(request, Special::PROMPT).await;
    let (_, tokens) = prompt.map_err(|error| own_names(error.into()))?;
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": tokens.len()})))
}

/// `GET /v1/responses/{id}`, as an object or as the stream of one in the background.
async fn show(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let mut query = Query::parse(&uri)?;
    let (stream, after) = (query.flag("stream")?, query.take("starting_after"));
    query.list("include");
    query.take("include_obfuscation");
    query.end(app.config.lenient_fields)?;
    let after = after.map(|text| text.parse::<u64>()).transpose().map_err(|_| {
        let message = "Invalid 'starting_after': expected the sequence number of an event.";
        ApiError::invalid("starting_after", message)
    })?;
    let history = Arc::clone(&app.rooms.history);
    let (project, name) = (caller.project, id.clone());
    let object = aside(move || history.response(project, &name)).await?;
    if !stream {
        return Ok(Json(object).into_response());
    }
    let Some(log) = app.backgrounds.log(project, &id) else {
        let message = "Only a response in the background can be streamed again, while this server \
                       remembers its events.";
        return Err(ApiError::invalid("stream", message));
    };
    Ok(sse::pieces(log.follow(after), app.config.heartbeat))
}

/// `DELETE /v1/responses/{id}`.
async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let history = Arc::clone(&app.rooms.history);
    let (project, name) = (caller.project, id.clone());
    aside(move || history.delete_response(project, &name)).await?;
    app.backgrounds.stop(project, &id);
    Ok(Json(json!({"id": id, "object": "response.deleted", "deleted": true})))
}

/// `POST /v1/responses/{id}/cancel`.
async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    _body: Body,
) -> Result<Json<Value>, ApiError> {
    let history = Arc::clone(&app.rooms.history);
    let (project, name) = (caller.project, id.clone());
    let object = aside(move || history.cancel_response(project, &name)).await?;
    app.backgrounds.stop(project, &id);
    Ok(Json(object))
}

/// `GET /v1/responses/{id}/input_items`.
async fn input_items(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let mut query = Query::parse(&uri)?;
    query.list("include");
    let history = Arc::clone(&app.rooms.history);
    let list = move |page: &Page| history.response_input(caller.project, &id, page);
    paging::answer(&app, query, PAGE, list).await
}
