//! `/v1/conversations`: lists of items that responses read and append to.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Path, Request, State};
use axum::http::Uri;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::extract::{Fields, kind};
use super::paging::{self, PageRule, Query};
use super::reference::{INCLUDE, Routes, answers, delete, get, post};
use super::{App, aside, fields, ids, items, metadata, responses};
use crate::auth::Caller;

/// 20 of at most 100, newest first.
const PAGE: PageRule = PageRule { limit: 20, max: 100, descending: true };
/// Items that one request may add.
const ITEMS_MAX: usize = 20;

const GROUP: &str = "Conversations";
const ITEM: &str = "/v1/conversations/{conversation_id}/items/{item_id}";

type Answer = Result<Json<Value>, ApiError>;

pub(super) fn routes() -> Routes {
    let item = json!([{"role": "user", "content": "Hello"}]);
    let include = ("include", INCLUDE, "Taken, and of no effect: everything is there.");
    let one = "/v1/conversations/{conversation_id}";
    let items = "/v1/conversations/{conversation_id}/items";
    Routes::new()
        .add(
            post("/v1/conversations", "createConversation", GROUP, "Begins a conversation.")
                .json(fields::CONVERSATION)
                .example(json!({"items": item.clone()}))
                .answers(&answers::CONVERSATION),
            create,
        )
        .add(
            get(one, "getConversation", GROUP, "A conversation.").answers(&answers::CONVERSATION),
            show,
        )
        .add(
            post(one, "updateConversation", GROUP, "Sets the labels of a conversation.")
                .json(fields::METADATA)
                .example(json!({"metadata": {"topic": "tea"}}))
                .answers(&answers::CONVERSATION),
            update,
        )
        .add(
            delete(one, "deleteConversation", GROUP, "Deletes a conversation.")
                .deletes("conversation.deleted"),
            delete_one,
        )
        .add(
            post(items, "createConversationItems", GROUP, "Adds items.")
                .json(fields::CONVERSATION_ITEMS)
                .example(json!({"items": item}))
                .query(&[include])
                .pages(&answers::ITEM),
            add,
        )
        .add(
            get(items, "listConversationItems", GROUP, "Lists items.")
                .paged(PAGE, &answers::ITEM)
                .query(&[include]),
            list,
        )
        .add(
            get(ITEM, "getConversationItem", GROUP, "An item.")
                .answers(&answers::ITEM)
                .query(&[include]),
            self::item,
        )
        .add(
            delete(ITEM, "deleteConversationItem", GROUP, "Deletes an item.")
                .answers(&answers::CONVERSATION),
            remove,
        )
}

async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Answer {
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::CONVERSATION, "", app.config.lenient_fields)?;
    let labels = metadata::read(&mut body)?.unwrap_or_default();
    let items = new_items(&mut body, app.config.lenient_fields)?.unwrap_or_default();
    let (id, history) = (ids::random("conv_"), Arc::clone(&app.rooms.history));
    let project = caller.project;
    let made = aside(move || history.create_conversation(project, &id, labels, &items));
    Ok(Json(made.await?))
}

async fn show(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Answer {
    let history = Arc::clone(&app.rooms.history);
    Ok(Json(aside(move || history.conversation(caller.project, &id)).await?))
}

async fn update(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::METADATA, "", app.config.lenient_fields)?;
    let named = body.map().contains_key("metadata");
    let labels = metadata::read(&mut body)?.or_else(|| named.then(Map::new));
    let labels = labels.ok_or_else(|| ApiError::missing("metadata"))?;
    let history = Arc::clone(&app.rooms.history);
    Ok(Json(aside(move || history.label_conversation(caller.project, &id, labels)).await?))
}

async fn delete_one(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Answer {
    let history = Arc::clone(&app.rooms.history);
    let deleted = json!({"id": id, "object": "conversation.deleted", "deleted": true});
    aside(move || history.delete_conversation(caller.project, &id)).await?;
    Ok(Json(deleted))
}

async fn add(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
    request: Request,
) -> Answer {
    include(&uri)?.end(app.config.lenient_fields)?;
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::CONVERSATION_ITEMS, "", app.config.lenient_fields)?;
    let items = new_items(&mut body, app.config.lenient_fields)?;
    let items = items.ok_or_else(|| ApiError::missing("items"))?;
    let name = |item: Option<&Value>| item.map(|item| item["id"].clone());
    let list = json!({"object": "list", "first_id": name(items.first()),
                      "last_id": name(items.last()), "has_more": false, "data": items});
    let history = Arc::clone(&app.rooms.history);
    aside(move || history.add_items(caller.project, &id, &items)).await?;
    Ok(Json(list))
}

async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
) -> Answer {
    let (query, history) = (include(&uri)?, Arc::clone(&app.rooms.history));
    paging::answer(&app, &caller, query, PAGE, move |page| history.items(caller.project, &id, page))
        .await
}

async fn item(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path((id, item)): Path<(String, String)>,
    uri: Uri,
) -> Answer {
    include(&uri)?.end(app.config.lenient_fields)?;
    let history = Arc::clone(&app.rooms.history);
    Ok(Json(aside(move || history.item(caller.project, &id, &item)).await?))
}

async fn remove(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path((id, item)): Path<(String, String)>,
) -> Answer {
    let history = Arc::clone(&app.rooms.history);
    Ok(Json(aside(move || history.delete_item(caller.project, &id, &item)).await?))
}

/// The query, but for `include`, which asks for what is always there.
fn include(uri: &Uri) -> Result<Query, ApiError> {
    let mut query = Query::parse(uri)?;
    responses::take_include(&mut query)?;
    Ok(query)
}

fn new_items(body: &mut Fields, lenient: bool) -> Result<Option<Vec<Value>>, ApiError> {
    let list = match body.value("items") {
        None => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(ApiError::wrong_type("items", "an array", kind(&other))),
    };
    if list.len() > ITEMS_MAX {
        let got = list.len();
        let message = format!("Invalid 'items': at most {ITEMS_MAX} at once, but got {got}.");
        return Err(ApiError::invalid("items", message));
    }
    let items = items::read("items", list, lenient)?;
    match items.iter().position(|item| item["type"] == "item_reference") {
        None => Ok(Some(items)),
        Some(i) => {
            let path = format!("items[{i}].type");
            let message = "A conversation has items of its own, and no references to others.";
            Err(ApiError::unsupported(&path, message))
        }
    }
}
