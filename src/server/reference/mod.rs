//! The reference: every route is registered together with what is said of it, so `/openapi.json`
//! and `/docs` know each of them, and nothing else. Fields come from the tables of `fields`.
//!
//! Both are served without a key: they say what this program can do, and nothing of who uses it.

mod document;
mod page;

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::Bytes;
use axum::handler::Handler;
use axum::http::{Method, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use serde_json::Value;

use super::App;
use super::fields::Field;

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
    /// The paths as clients know them, where one pattern serves several or runs over slashes.
    shown: &'static [&'static str],
    group: &'static str,
    summary: &'static str,
    query: Vec<Parameter>,
    body: Body,
    example: Option<Value>,
    answer: Answer,
    streams: bool,
    admin: bool,
}

/// A parameter of a URL: name, type, what it says.
type Parameter = (&'static str, &'static str, &'static str);

enum Body {
    None,
    Json(&'static [Field]),
    /// The name of the file, and the fields beside it.
    Form(&'static str, &'static [Field]),
}

#[derive(Clone, Copy)]
enum Answer {
    /// JSON whose `object` is this.
    Object(&'static str),
    /// JSON without such a word.
    Json,
    /// Content of this type.
    Content(&'static str),
}

fn operation(
    method: Method,
    path: &'static str,
    group: &'static str,
    summary: &'static str,
) -> Operation {
    Operation {
        method,
        path,
        shown: &[],
        group,
        summary,
        query: Vec::new(),
        body: Body::None,
        example: None,
        answer: Answer::Json,
        streams: false,
        admin: false,
    }
}

pub(super) fn get(path: &'static str, group: &'static str, summary: &'static str) -> Operation {
    operation(Method::GET, path, group, summary)
}

pub(super) fn post(path: &'static str, group: &'static str, summary: &'static str) -> Operation {
    operation(Method::POST, path, group, summary)
}

pub(super) fn delete(path: &'static str, group: &'static str, summary: &'static str) -> Operation {
    operation(Method::DELETE, path, group, summary)
}

impl Operation {
    pub(super) fn shown(mut self, paths: &'static [&'static str]) -> Self {
        self.shown = paths;
        self
    }

    pub(super) fn query(mut self, parameters: &[Parameter]) -> Self {
        self.query.extend(parameters);
        self
    }

    /// A list that is read page by page.
    pub(super) fn paged(self) -> Self {
        self.answers("list").query(&[
            ("after", "string", "The id of the last object of the page before."),
            ("limit", "integer", "How many objects at most."),
            ("order", "string", "`asc` or `desc`, by the time of creation."),
        ])
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

    pub(super) fn answers(mut self, object: &'static str) -> Self {
        self.answer = Answer::Object(object);
        self
    }

    pub(super) fn content(mut self, kind: &'static str) -> Self {
        self.answer = Answer::Content(kind);
        self
    }

    /// With `stream` it answers in server-sent events.
    pub(super) fn streams(mut self) -> Self {
        self.streams = true;
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
    let document = get("/openapi.json", GROUP, "This document.").content("application/json");
    let page = get("/docs", GROUP, "A page that shows this document and tries requests.");
    Routes::new().add(document, openapi).add(page.content("text/html"), page::show)
}

async fn openapi() -> Response {
    static DOCUMENT: LazyLock<Bytes> =
        LazyLock::new(|| Bytes::from(document::of(&super::routes().operations).to_string()));
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.clone()).into_response()
}
