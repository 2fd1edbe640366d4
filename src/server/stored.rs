//! Stored chat completions: kept when `store` is set, and the routes that show them.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Path, Request, State};
use axum::http::Uri;
use futures_util::stream::{self, BoxStream, StreamExt};
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::extract::Fields;
use super::objects::Whole;
use super::paging::{self, PageRule, Query};
use super::reference::{self, Routes, answers, post};
use super::{App, aside, fields, metadata};
use crate::auth::Caller;
use crate::error::Error;
use crate::history::{History, Page};
use crate::pipeline::TextEvent;
use crate::types::ProjectId;

/// What a request to be stored leaves behind, besides its answer.
#[derive(Clone, Debug)]
pub(super) struct Keep {
    messages: Vec<Value>,
    metadata: Map<String, Value>,
    /// Fields of the request that the stored object repeats.
    echo: Map<String, Value>,
}

/// Fields of the request that the stored object repeats, as `null` where they were left out.
const ECHO: [&str; 9] = [
    "tool_choice",
    "seed",
    "top_p",
    "temperature",
    "presence_penalty",
    "frequency_penalty",
    "tools",
    "response_format",
    "reasoning_effort",
];

const ONE: &str = "/v1/chat/completions/{completion_id}";

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Stored chat completions";
    let some = [
        ("model", fields::Takes::Text, "Only those of this model."),
        ("metadata", fields::Takes::Object, "Only those with these labels: `metadata[key]=value`."),
    ];
    Routes::new()
        .add(
            reference::get(
                "/v1/chat/completions",
                "listChatCompletions",
                GROUP,
                "Lists what was stored.",
            )
            .paged(PageRule::ASCENDING, &answers::STORED)
            .query(&some),
            list,
        )
        .add(
            reference::get(ONE, "getChatCompletion", GROUP, "A stored completion.")
                .answers(&answers::STORED),
            get,
        )
        .add(
            post(ONE, "updateChatCompletion", GROUP, "Sets its labels.")
                .json(fields::METADATA)
                .example(json!({"metadata": {"topic": "tea"}}))
                .answers(&answers::STORED),
            update,
        )
        .add(
            reference::delete(ONE, "deleteChatCompletion", GROUP, "Deletes it.")
                .deletes("chat.completion.deleted"),
            delete,
        )
        .add(
            reference::get(
                "/v1/chat/completions/{completion_id}/messages",
                "getChatCompletionMessages",
                GROUP,
                "Lists its messages.",
            )
            .paged(PageRule::ASCENDING, &answers::MESSAGE),
            messages,
        )
}

/// Reads `store` and `metadata`; looks at the rest of the body and leaves it.
pub(super) fn wanted(body: &mut Fields) -> Result<Option<Keep>, ApiError> {
    let metadata = metadata::read(body)?.unwrap_or_default();
    if !body.bool("store")?.unwrap_or(false) {
        return Ok(None);
    }
    let field = |name: &str| body.map().get(name).cloned().unwrap_or(Value::Null);
    let messages = field("messages").as_array().cloned().unwrap_or_default();
    let echo = ECHO.iter().map(|name| ((*name).to_owned(), field(name)));
    let user = ("input_user".to_owned(), field("user"));
    Ok(Some(Keep { messages, metadata, echo: echo.chain([user]).collect() }))
}

impl Keep {
    /// The same events, with one more thing to do after the last: the answer is on the disk before
    /// the client learns that it is complete.
    pub(super) fn follow(
        self,
        events: BoxStream<'static, Result<TextEvent, Error>>,
        whole: Whole,
        keeper: Keeper,
    ) -> BoxStream<'static, Result<TextEvent, Error>> {
        let state = Following { events, whole: Some((whole, self)), keeper };
        stream::unfold(state, |mut state| async {
            let next = state.next().await?;
            Some((next, state))
        })
        .boxed()
    }

    fn object(&self, whole: Whole, request_id: String) -> Option<Value> {
        // An answer that was cut short is an error on the wire, and nothing to remember.
        let Ok(Value::Object(mut object)) = whole.end() else { return None };
        object.extend(self.echo.clone());
        object.insert("request_id".to_owned(), request_id.into());
        object.insert("metadata".to_owned(), Value::Object(self.metadata.clone()));
        Some(Value::Object(object))
    }
}

/// Where an answer is kept, and for whom.
pub(super) struct Keeper {
    pub history: Arc<History>,
    pub project: ProjectId,
    pub request_id: String,
}

struct Following {
    events: BoxStream<'static, Result<TextEvent, Error>>,
    whole: Option<(Whole, Keep)>,
    keeper: Keeper,
}

impl Following {
    async fn next(&mut self) -> Option<Result<TextEvent, Error>> {
        match self.events.next().await {
            Some(Ok(event)) => {
                if let Some((whole, _)) = &mut self.whole {
                    whole.event(event.clone());
                }
                Some(Ok(event))
            }
            Some(Err(error)) => {
                self.whole = None;
                Some(Err(error))
            }
            None => {
                let (whole, keep) = self.whole.take()?;
                let Keeper { history, project, request_id } = &self.keeper;
                let object = keep.object(whole, request_id.clone())?;
                let (history, project) = (Arc::clone(history), *project);
                let kept = aside(move || history.keep_completion(project, object, &keep.messages));
                kept.await.err().map(Err)
            }
        }
    }
}

/// `GET /v1/chat/completions`.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let mut query = Query::parse(&uri)?;
    let (model, labels) = (query.take("model"), query.object("metadata"));
    let (history, project) = (Arc::clone(&app.rooms.history), caller.project);
    let list = move |page: &Page| history.completions(project, model.as_deref(), &labels, page);
    paging::answer(&app, &caller, query, PageRule::ASCENDING, list).await
}

/// `GET /v1/chat/completions/{completion_id}`.
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let history = Arc::clone(&app.rooms.history);
    Ok(Json(aside(move || history.completion(caller.project, &id)).await?))
}

/// `POST /v1/chat/completions/{completion_id}`.
pub(super) async fn update(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::METADATA, "", app.config.lenient_fields)?;
    // Null clears; to leave it out asks for nothing.
    let named = body.map().contains_key("metadata");
    let labels = metadata::read(&mut body)?;
    let labels = labels.or_else(|| named.then(Map::new));
    let labels = labels.ok_or_else(|| ApiError::missing("metadata"))?;
    let history = Arc::clone(&app.rooms.history);
    Ok(Json(aside(move || history.label_completion(caller.project, &id, labels)).await?))
}

/// `DELETE /v1/chat/completions/{completion_id}`.
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let history = Arc::clone(&app.rooms.history);
    let deleted = json!({"object": "chat.completion.deleted", "id": id, "deleted": true});
    aside(move || history.delete_completion(caller.project, &id)).await?;
    Ok(Json(deleted))
}

/// `GET /v1/chat/completions/{completion_id}/messages`.
pub(super) async fn messages(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let (query, history) = (Query::parse(&uri)?, Arc::clone(&app.rooms.history));
    let list = move |page: &Page| history.completion_messages(caller.project, &id, page);
    paging::answer(&app, &caller, query, PageRule::ASCENDING, list).await
}
