//! `/v1/responses`: create (whole, streamed, in the background), show, cancel, delete.
//!
//! A response is a chat with a memory: [`request`] reads the body and hands what both have to the
//! parser of chats, [`reply`] makes the object and its events, [`background`] runs what nobody
//! waits for, [`fit`] cuts and [`compact`] sums up what is too long. Deliberately absent: hosted
//! tools and pictures, which are refused by name.

mod background;
mod compact;
mod fit;
mod reply;
mod request;
mod tables;

pub(super) use background::Backgrounds;

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Path, Request, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream, StreamExt};
use serde_json::{Map, Value, json};

use self::reply::{Event, Reply};
use self::request::own_names;
pub(super) use self::request::{Draft, INCLUDABLE, read, take_include};
use super::error::ApiError;
use super::observe::Watch;
use super::paging::{self, PageRule, Query};
use super::reference::{self, INCLUDE, Routes, answers, get, post};
use super::{App, answer, aside, chat, fields, ids, objects, pairs, sse};
use crate::auth::Caller;
use crate::error::Error;
use crate::history::{self, History, Page};
use crate::pipeline::TextEvent;
use crate::registry::{Lease, ServedModel};
use crate::types::{Place, Priority, ProjectId, Tenant, unix_now_s};

const GROUP: &str = "Responses";
const ONE: &str = "/v1/responses/{response_id}";

/// Where it cannot be written, one in the background is kept later: it is tried this often.
const PAUSE: Duration = Duration::from_secs(2);

/// Items of a list: 20 of at most 100, newest first.
const PAGE: PageRule = PageRule { limit: 20, max: 100, descending: true };

const INCLUDED: (&str, fields::Takes, &str) =
    ("include", INCLUDE, "Taken, and of no effect: everything is there.");

/// The query of a response that is asked for again.
const AGAIN: [(&str, fields::Takes, &str); 4] = [
    ("stream", fields::Takes::Bool, "The events of one in the background, as they come."),
    ("starting_after", fields::Takes::Integer, "Only events after this number."),
    ("include_obfuscation", fields::Takes::Bool, "Taken, and of no effect."),
    INCLUDED,
];

pub(super) fn routes() -> Routes {
    let hello = || json!({"model": "hearth-tiny", "input": "Hello"});
    let mut stream = hello();
    (stream["stream"], stream["max_output_tokens"]) = (true.into(), 64.into());
    Routes::new()
        .add(
            post("/v1/responses", "createResponse", GROUP, "Answers, and remembers.")
                .json(tables::RESPONSES)
                .example(stream)
                .answers(&answers::RESPONSE)
                .streams(),
            create,
        )
        .add(
            post(
                "/v1/responses/input_tokens",
                "Getinputtokencounts",
                GROUP,
                "Counts the tokens of a request.",
            )
            .json(tables::INPUT_TOKENS)
            .example(hello())
            .answers(&answers::INPUT_TOKENS),
            input_tokens,
        )
        .add(
            post("/v1/responses/compact", "Compactconversation", GROUP, "Sums a conversation up.")
                .json(tables::COMPACT)
                .example(hello())
                .answers(&answers::COMPACTION),
            compact::compact,
        )
        .add(
            get(ONE, "getResponse", GROUP, "A response.")
                .query(&AGAIN)
                .answers(&answers::RESPONSE)
                .streams(),
            show,
        )
        .add(
            reference::delete(ONE, "deleteResponse", GROUP, "Deletes a response.")
                .deletes("response.deleted"),
            delete,
        )
        .add(
            post(
                "/v1/responses/{response_id}/cancel",
                "cancelResponse",
                GROUP,
                "Stops one in the background.",
            )
            .answers(&answers::RESPONSE),
            cancel,
        )
        .add(
            get(
                "/v1/responses/{response_id}/input_items",
                "listInputItems",
                GROUP,
                "Lists what a response read.",
            )
            .paged(PAGE, &answers::ITEM)
            .query(&[INCLUDED]),
            input_items,
        )
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
    pairs::of_items(&said)?;
    let model = hold(app, caller.tenant, &draft, &said).await?;
    let read = fit::fitting(app, &model, &draft, &said).await?;
    let begun = begin(app, &watch, caller, &model, &draft, read).await?;
    let reply = Reply::new(shell(&draft, &begun), draft.included);
    let Begun { events, place, .. } = begun;
    let waits = draft.background;
    let keep = Keep { history: Arc::clone(&app.rooms.history), project, draft };
    let mut run = Run { events, reply, keep, waits, last: Last::Not };
    let response = match (run.keep.draft.background, run.keep.draft.stream) {
        (true, _) => background::start(app, watch, run).await?,
        (false, true) => {
            run.reply.begin();
            watch.streaming();
            let pieces = stream::unfold(run, |mut run| async {
                let events = run.step().await?;
                Some((bytes(events), run))
            });
            sse::pieces(pieces.boxed(), app.config.heartbeat)
        }
        (false, false) => {
            run.reply.begin();
            while run.step().await.is_some() {}
            match run.last {
                Last::Object(object) => Json(object).into_response(),
                Last::Error(error) => return Err(error),
                Last::Not => return Err(objects::cut_short()),
            }
        }
    };
    Ok(answer::placed(response, place))
}

/// An answer that has begun.
struct Begun {
    model: Lease<ServedModel>,
    /// What the answer calls it.
    title: String,
    priority: Priority,
    place: Place,
    events: BoxStream<'static, Result<TextEvent, Error>>,
}

/// The model that is to read these items, in memory until it is let go.
async fn hold(
    app: &App,
    tenant: Tenant,
    draft: &Draft,
    said: &[Value],
) -> Result<Lease<ServedModel>, ApiError> {
    let call = draft.call(said)?;
    Ok(app.pipeline.model(&call.model, tenant, call.keep_alive).await?)
}

/// Begins to answer a draft after these items.
async fn begin(
    app: &App,
    watch: &Arc<Watch>,
    caller: &Caller,
    model: &Lease<ServedModel>,
    draft: &Draft,
    said: &[Value],
) -> Result<Begun, ApiError> {
    let mut call = draft.call(said)?;
    let title = app.pipeline.registry().title(&call.model)?;
    let request = call.requests.pop().ok_or_else(objects::cut_short)?;
    let priority = request.priority;
    let begun = answer::begin(app, watch, caller, model, request).await;
    let answer::Begun { place, events, .. } = match begun {
        Ok(begun) => begun,
        Err(error) => return Err(own_names(error.into())),
    };
    Ok(Begun { model: model.clone(), title, priority, place, events })
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
    .await
    .map_err(|error| match error {
        // The only object that is looked for by the name in a field of its own.
        Error::NotFound { .. } => ApiError::from(error).param("conversation"),
        error => error.into(),
    })?;
    draft.input = input;
    Ok(said)
}

/// The object as it is at the beginning, every field in its place.
fn shell(draft: &Draft, begun: &Begun) -> Map<String, Value> {
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
    // What was had, which may be called otherwise than what was asked for.
    shell.insert("model".to_owned(), json!(begun.title));
    shell.insert("service_tier".to_owned(), json!(chat::tier(begun.priority)));
    // What holds when the request does not say.
    let defaults = begun.model.defaults();
    for (name, own) in [("temperature", defaults.temperature), ("top_p", defaults.top_p)] {
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
        let (object, input, conversation) = (object.clone(), input.clone(), conversation.clone());
        let reply = Arc::new(history::Reply { object, input, conversation, store: *store });
        let mut done = self.write(Arc::clone(&reply)).await;
        if let (Err(error), true) = (&done, self.draft.background) {
            tracing::error!(%error, "a response in the background cannot be kept now");
        }
        // Its client comes back for it, and would find it in progress for ever.
        while matches!(&done, Err(Error::StorageFull(_) | Error::Internal(_)))
            && self.draft.background
        {
            tokio::time::sleep(PAUSE).await;
            done = self.write(Arc::clone(&reply)).await;
        }
        done
    }

    /// One in the background goes on; the conversation hears of it at its end.
    async fn began(&self, object: &Value) -> Result<(), Error> {
        let (object, input) = (object.clone(), Vec::new());
        let reply = history::Reply { object, input, conversation: None, store: true };
        self.write(Arc::new(reply)).await
    }

    async fn write(&self, reply: Arc<history::Reply>) -> Result<(), Error> {
        let (history, project) = (Arc::clone(&self.history), self.project);
        aside(move || history.keep_response(project, &reply)).await
    }
}

/// A response that is being made.
struct Run {
    events: BoxStream<'static, Result<TextEvent, Error>>,
    reply: Reply,
    keep: Keep,
    /// In the background, and nothing has come yet.
    waits: bool,
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
                Some(Ok(event)) => {
                    self.proceed().await;
                    self.reply.event(event);
                }
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

    /// One in the background has waited, and its first word says that it does no longer.
    async fn proceed(&mut self) {
        if !std::mem::take(&mut self.waits) {
            return;
        }
        let object = self.reply.proceed();
        if let Err(error) = self.keep.began(&object).await {
            tracing::warn!(%error, "a response is in progress, and the store still has it queued");
        }
    }

    /// One in the background has nobody to tell but the store.
    async fn failed(&mut self, error: ApiError) {
        let object = self.reply.failed(&error);
        if self.keep.draft.background {
            // It adds nothing to its conversation, which may be gone, and may be why it failed.
            self.keep.draft.conversation = None;
            if let Err(error) = self.keep.keep(&object).await {
                tracing::error!(%error, "a failed response could not be kept");
            }
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
    let mut body = app.body(request).await?;
    fields::check(body.map(), tables::INPUT_TOKENS, "", lenient)?;
    body.value("personality");
    let mut draft = request::read(body, lenient)?;
    let said = said(&app, caller.project, &mut draft).await?;
    pairs::of_items(&said)?;
    let model = hold(&app, caller.tenant, &draft, &said).await?;
    let read = fit::fitting(&app, &model, &draft, &said).await?;
    let input_tokens = fit::count(&app, &model, &draft, read).await?;
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": input_tokens})))
}

/// `GET /v1/responses/{response_id}`, as an object or as the stream of one in the background.
async fn show(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let mut query = Query::parse(&uri)?;
    let (stream, after) = (query.flag("stream")?, query.take("starting_after"));
    take_include(&mut query)?;
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

/// `DELETE /v1/responses/{response_id}`.
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

/// `POST /v1/responses/{response_id}/cancel`.
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

/// `GET /v1/responses/{response_id}/input_items`.
async fn input_items(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let mut query = Query::parse(&uri)?;
    take_include(&mut query)?;
    let history = Arc::clone(&app.rooms.history);
    let list = move |page: &Page| history.response_input(caller.project, &id, page);
    paging::answer(&app, &caller, query, PAGE, list).await
}
