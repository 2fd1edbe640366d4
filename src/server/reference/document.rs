//! Operations and tables of fields as an OpenAPI 3.1 document, put together by types that can
//! say nothing else.

use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::info::{InfoBuilder, License};
use utoipa::openapi::path::{
    HttpMethod, Operation as Described, OperationBuilder, Parameter, ParameterBuilder, ParameterIn,
    ParameterStyle, PathItem, PathsBuilder,
};
use utoipa::openapi::request_body::{RequestBody, RequestBodyBuilder};
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::schema::{Array, ObjectBuilder, Type};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    Components, ComponentsBuilder, Content, OpenApi, OpenApiBuilder, Ref, RefOr, Required, Schema,
    ServerBuilder,
};

use super::answers::{self, Object};
use super::schema::{self, Extra};
use super::{Answer, Body, Operation};
use crate::server::dialect::Dialect;
use crate::server::fields::Takes;
use crate::server::wants_key;

const ABOUT: &str = "The OpenAI API on this machine. A field that stands in no table is refused \
    (`--lenient-fields` passes it over); `null` is the same as absent. Keys are asked for where \
    the server has any: `hearth keys create` makes one.";

/// The whole document.
pub(super) fn of(operations: &[Operation]) -> OpenApi {
    let mut paths = PathsBuilder::new();
    for operation in operations {
        let own = [(operation.path, operation.name)];
        let shown = if operation.shown.is_empty() { &own } else { operation.shown };
        for (path, name) in shown {
            let method = match operation.method.as_str() {
                "GET" => HttpMethod::Get,
                "DELETE" => HttpMethod::Delete,
                _ => HttpMethod::Post,
            };
            paths = paths.path(*path, PathItem::new(method, described(path, name, operation)));
        }
    }
    let mut groups: Vec<&str> = operations.iter().map(|operation| operation.group).collect();
    groups.sort_unstable();
    groups.dedup();
    let mut license = License::new("Apache-2.0");
    license.identifier = Some("Apache-2.0".to_owned());
    let info = InfoBuilder::new()
        .title("Hearth")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(ABOUT))
        .license(Some(license));
    OpenApiBuilder::new()
        .info(info)
        .servers(Some([ServerBuilder::new().url("/").build()]))
        .tags(Some(groups.iter().map(|name| TagBuilder::new().name(*name).build())))
        .paths(paths)
        .components(Some(components(operations)))
        .build()
}

/// What is said once: objects by name, refusals by dialect, the key.
fn components(operations: &[Operation]) -> Components {
    let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    let mut all = ComponentsBuilder::new().security_scheme("bearer", bearer);
    let answers = operations.iter().flat_map(|operation| {
        let made = match operation.answer {
            Answer::Object(object) | Answer::List(object) => Some(object),
            Answer::Deleted(_) | Answer::Content(_) => None,
        };
        made.into_iter().chain(operation.other.map(|(_, object)| object))
    });
    for error in [&answers::ERROR, &answers::ANTHROPIC_ERROR, &answers::OLLAMA_ERROR] {
        let seconds = HeaderBuilder::new()
            .schema(ObjectBuilder::new().schema_type(Type::Integer))
            .description(Some("Seconds, where it is too much for now: a 429 or a 503."))
            .build();
        let refusal = ResponseBuilder::new()
            .description("Why it was refused.")
            .header("Retry-After", seconds)
            .content("application/json", Content::new(Some(reference(error))));
        all = all
            .schema(error.name, schema::object(error.fields, Extra::Allowed))
            .response(error.name, refusal);
    }
    answers
        .fold(all, |all, object| {
            all.schema(object.name, schema::object(object.fields, Extra::Allowed))
        })
        .build()
}

fn described(path: &str, name: &str, operation: &Operation) -> Described {
    let refusal = match Dialect::of(path) {
        Dialect::OpenAi => &answers::ERROR,
        Dialect::Anthropic => &answers::ANTHROPIC_ERROR,
        Dialect::Ollama => &answers::OLLAMA_ERROR,
    };
    let refusal = || Ref::from_response_name(refusal.name);
    let mut all = OperationBuilder::new()
        .tag(operation.group)
        .operation_id(Some(name))
        .summary(Some(operation.summary))
        .request_body(request(operation))
        .response(if operation.creates { "201" } else { "200" }, answer(operation))
        .response("4XX", refusal())
        .response("5XX", refusal());
    if let Some((status, object)) = operation.other {
        let other = content("application/json", reference(object));
        all = all.response(status.to_string(), response("Not now.", [other]));
    }
    if wants_key(path) {
        let bearer = SecurityRequirement::new("bearer", Vec::<String>::new());
        all = all.securities(Some([bearer, SecurityRequirement::default()]));
    }
    if operation.admin {
        all = all.description(Some("Wants an admin key where keys are asked for."));
    }
    parameters(path, operation).fold(all, OperationBuilder::parameter).build()
}

/// Those in the path, and those behind it.
fn parameters(path: &str, operation: &Operation) -> impl Iterator<Item = Parameter> {
    let names = path.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    let in_path = names.map(|name| parameter(name, ParameterIn::Path, Takes::Text).build());
    let behind = operation.query.iter().map(|(name, takes, says)| {
        let one = parameter(name, ParameterIn::Query, *takes).description(Some(*says));
        match takes {
            Takes::Object => one.style(Some(ParameterStyle::DeepObject)).explode(Some(true)),
            _ => one,
        }
        .build()
    });
    in_path.chain(behind)
}

fn parameter(name: &str, place: ParameterIn, takes: Takes) -> ParameterBuilder {
    let one = ParameterBuilder::new().name(name).parameter_in(place);
    // What stands in the path is required all the same.
    one.required(Required::False).schema(Some(schema::of(takes, Extra::Allowed)))
}

fn request(operation: &Operation) -> Option<RequestBody> {
    let (kind, table, file) = match operation.body {
        Body::None => return None,
        Body::Json(table) => ("application/json", table, None),
        Body::Form(file, table) => ("multipart/form-data", table, Some(file)),
    };
    let mut object = schema::object(table, Extra::Refused);
    if let Some(name) = file {
        object = object.property(name, schema::binary()).required(name);
    }
    if let Some(example) = &operation.example {
        object = object.examples([example.clone()]);
    }
    let needed = file.is_some() || table.iter().any(|field| field.required);
    let body = RequestBodyBuilder::new()
        .required(Some(if needed { Required::True } else { Required::False }))
        .content(kind, Content::new(Some(object)));
    Some(body.build())
}

fn answer(operation: &Operation) -> Response {
    let json = |schema| content("application/json", schema);
    let whole = match operation.answer {
        Answer::Object(object) => json(reference(object)),
        Answer::List(object) => json(list(object, operation.paged)),
        Answer::Deleted(word) => json(deleted(word)),
        Answer::Content(kind @ "application/octet-stream") => content(kind, schema::binary()),
        Answer::Content(kind @ "application/json") => {
            content(kind, schema::of(Takes::Object, Extra::Allowed))
        }
        Answer::Content(kind) => content(kind, schema::of(Takes::Text, Extra::Allowed)),
    };
    let streamed =
        operation.streams.map(|kind| content(kind, schema::of(Takes::Text, Extra::Allowed)));
    response("What was asked for.", std::iter::once(whole).chain(streamed))
}

fn response(says: &str, contents: impl IntoIterator<Item = (&'static str, Content)>) -> Response {
    let start = ResponseBuilder::new().description(says);
    contents.into_iter().fold(start, |all, (kind, content)| all.content(kind, content)).build()
}

fn content(kind: &'static str, schema: RefOr<Schema>) -> (&'static str, Content) {
    (kind, Content::new(Some(schema)))
}

fn reference(object: &Object) -> RefOr<Schema> {
    Ref::from_schema_name(object.name).into()
}

/// Some or all there are; in pages it says where to go on.
fn list(object: &Object, paged: bool) -> RefOr<Schema> {
    let table = if paged { answers::PAGE } else { answers::LIST };
    let data = Array::new(reference(object));
    schema::object(table, Extra::Allowed).property("data", data).required("data").into()
}

fn deleted(word: &str) -> RefOr<Schema> {
    let word = ObjectBuilder::new().schema_type(Type::String).enum_values(Some([word]));
    schema::object(answers::DELETED, Extra::Allowed)
        .property("object", word)
        .required("object")
        .into()
}
