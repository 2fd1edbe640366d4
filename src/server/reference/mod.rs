//! The reference: every route is registered together with what is said of it, so `/openapi.json`
//! and `/docs` know each of them, and nothing else. Fields come from the tables of `fields`.
//!
//! Both are served without a key: they say what this program can do, and nothing of who uses it.

pub(super) mod answers;
mod document;
mod page;
mod schema;

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::Bytes;
use axum::handler::Handler;
use axum::http::{Method, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use serde_json::Value;

use super::App;
use super::error::ApiError;
use super::fields::{Field, Takes};
use super::paging::PageRule;
use super::responses::INCLUDABLE;
use crate::error::Error;

/// Routes, and what is said of them.
pub(super) struct Routes {
    router: Router<Arc<App>>,
    operations: Vec<Operation>,
}

impl Routes {
    pub(super) fn new() -> Self {
        Self { router: Router::new(), operations: Vec::new() }
    }

    /// One route: the only place that registers any.
    pub(super) fn add<H, T>(mut self, operation: Operation, handler: H) -> Self
    where
        H: Handler<T, Arc<App>>,
        T: 'static,
    {
        let filter = match operation.method {
            Method::GET => MethodFilter::GET,
            Method::DELETE => MethodFilter::DELETE,
            _ => MethodFilter::POST,
        };
        self.router = self.router.route(operation.path, on(filter, handler));
        self.operations.push(operation);
        self
    }

    pub(super) fn merge(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
        self.operations.extend(other.operations);
        self
    }

    pub(super) fn into_router(self) -> Router<Arc<App>> {
        self.router
    }
}

/// What a route is for, what it reads and what it answers.
pub(super) struct Operation {
    method: Method,
    path: &'static str,
    /// What generated clients call it: OpenAI's own name where the route is OpenAI's.
    name: &'static str,
    /// The paths as clients know them with their names, where one pattern serves several or runs
    /// over slashes.
    shown: &'static [(&'static str, &'static str)],
    group: &'static str,
    summary: &'static str,
    query: Vec<Parameter>,
    body: Body,
    example: Option<Value>,
    answer: Answer,
    /// A list comes in pages.
    paged: bool,
    /// A 201 where it goes well.
    creates: bool,
    /// Another status that it answers with, and how.
    other: Option<(u16, &'static answers::Object)>,
    /// The type of what it answers piece by piece, where it is asked to.
    streams: Option<&'static str>,
    admin: bool,
}

/// A parameter of a URL: name, type, what it says.
type Parameter = (&'static str, Takes, &'static str);

/// The type of `include`.
pub(super) const INCLUDE: Takes = Takes::Each(&Takes::Word(&INCLUDABLE));

enum Body {
    None,
    Json(&'static [Field]),
    /// The name of the file, and the fields beside it.
    Form(&'static str, &'static [Field]),
}

#[derive(Clone, Copy)]
enum Answer {
    Object(&'static answers::Object),
    /// A list of these.
    List(&'static answers::Object),
    /// That something is gone, by the word for it.
    Deleted(&'static str),
    /// Content of this type.
    Content(&'static str),
}

fn operation(
    method: Method,
    path: &'static str,
    name: &'static str,
    group: &'static str,
    summary: &'static str,
) -> Operation {
    Operation {
        method,
        path,
        name,
        shown: &[],
        group,
        summary,
        query: Vec::new(),
        body: Body::None,
        example: None,
        answer: Answer::Content("application/json"),
        paged: false,
        creates: false,
        other: None,
        streams: None,
        admin: false,
    }
}

pub(super) fn get(
    path: &'static str,
    name: &'static str,
    group: &'static str,
    summary: &'static str,
) -> Operation {
    operation(Method::GET, path, name, group, summary)
}

pub(super) fn post(
    path: &'static str,
    name: &'static str,
    group: &'static str,
    summary: &'static str,
) -> Operation {
    operation(Method::POST, path, name, group, summary)
}

pub(super) fn delete(
    path: &'static str,
    name: &'static str,
    group: &'static str,
    summary: &'static str,
) -> Operation {
    operation(Method::DELETE, path, name, group, summary)
}

impl Operation {
    pub(super) fn shown(mut self, paths: &'static [(&'static str, &'static str)]) -> Self {
        self.shown = paths;
        self
    }

    pub(super) fn query(mut self, parameters: &[Parameter]) -> Self {
        self.query.extend(parameters);
        self
    }

    /// A list that is read page by page.
    pub(super) fn paged(self, rule: PageRule, object: &'static answers::Object) -> Self {
        self.pages(object).query(&[
            ("after", Takes::Text, "The id of the last object of the page before."),
            ("limit", Takes::Count(1, rule.max as i64), "How many objects at most."),
            ("order", Takes::Word(&["asc", "desc"]), "By the time of creation."),
        ])
    }

    /// One page of a list.
    pub(super) fn pages(mut self, object: &'static answers::Object) -> Self {
        self.paged = true;
        self.lists(object)
    }

    /// A list that is whole.
    pub(super) fn lists(mut self, object: &'static answers::Object) -> Self {
        self.answer = Answer::List(object);
        self
    }

    /// It says that something is gone, in this word.
    pub(super) fn deletes(mut self, word: &'static str) -> Self {
        self.answer = Answer::Deleted(word);
        self
    }

    /// Its body is JSON with these fields.
    pub(super) fn json(mut self, table: &'static [Field]) -> Self {
        self.body = Body::Json(table);
        self
    }

    /// Its body is a form with a file and these fields.
    pub(super) fn form(mut self, file: &'static str, table: &'static [Field]) -> Self {
        self.body = Body::Form(file, table);
        self
    }

    pub(super) fn example(mut self, body: Value) -> Self {
        self.example = Some(body);
        self
    }

    pub(super) fn answers(mut self, object: &'static answers::Object) -> Self {
        self.answer = Answer::Object(object);
        self
    }

    pub(super) fn content(mut self, kind: &'static str) -> Self {
        self.answer = Answer::Content(kind);
        self
    }

    /// With `stream` it answers in server-sent events.
    pub(super) fn streams(mut self) -> Self {
        self.streams = Some("text/event-stream");
        self
    }

    /// Unless `stream` is false it answers in lines of JSON.
    pub(super) fn lines(mut self) -> Self {
        self.streams = Some("application/x-ndjson");
        self
    }

    /// It answers with a 201.
    pub(super) fn created(mut self) -> Self {
        self.creates = true;
        self
    }

    /// Or, for reasons of its own, with this.
    pub(super) fn or(mut self, status: u16, object: &'static answers::Object) -> Self {
        self.other = Some((status, object));
        self
    }

    /// It wants an admin key where keys are asked for.
    pub(super) fn admin(mut self) -> Self {
        self.admin = true;
        self
    }
}

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Server";
    let document =
        get("/openapi.json", "openapi", GROUP, "This document.").content("application/json");
    let page = get("/docs", "docs", GROUP, "A page that shows this document and tries requests.");
    Routes::new().add(document, openapi).add(page.content("text/html"), page::show)
}

async fn openapi() -> Result<Response, ApiError> {
    static DOCUMENT: LazyLock<Result<Bytes, String>> = LazyLock::new(|| {
        let document = document::of(&super::routes().operations).to_json();
        document.map(Bytes::from).map_err(|error| error.to_string())
    });
    let document = DOCUMENT.clone().map_err(Error::Internal)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], document).into_response())
}
