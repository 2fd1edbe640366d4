//! Operations and tables of fields as an OpenAPI 3.1 document.

use serde_json::{Map, Value, json};

use super::{Answer, Body, Operation};
use crate::server::fields::{Field, Takes, Treatment};
use crate::server::wants_key;

const ABOUT: &str = "The OpenAI API on this machine. A field that stands in no table is refused \
    (`--lenient-fields` passes it over); `null` is the same as absent. Keys are asked for where \
    the server has any: `hearth keys create` makes one.";

/// The whole document.
pub(super) fn of(operations: &[Operation]) -> Value {
    let mut paths = Map::new();
    for operation in operations {
        let own = [operation.path];
        let shown = if operation.shown.is_empty() { &own } else { operation.shown };
        for path in shown {
            let item = paths.entry(*path).or_insert_with(|| json!({}));
            item[operation.method.as_str().to_ascii_lowercase()] = described(path, operation);
        }
    }
    let mut groups: Vec<&str> = operations.iter().map(|operation| operation.group).collect();
    groups.sort_unstable();
    groups.dedup();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Hearth",
            "version": env!("CARGO_PKG_VERSION"),
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": groups.iter().map(|name| json!({"name": name})).collect::<Vec<_>>(),
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": error()},
            "responses": {
                "Error": answer_of("Why it was refused.", "application/json", error_ref()),
                "Later": later(),
            },
        },
    })
}

fn described(path: &str, operation: &Operation) -> Value {
    let Operation { method, group, summary, admin, .. } = operation;
    let words: String = path.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
    let mut all = json!({
        "tags": [group],
        "operationId": format!("{}{words}", method.as_str().to_ascii_lowercase()),
        "summary": summary,
        "responses": {"200": answer(operation)},
    });
    if path == "/v1/admin/keys" && method.as_str() == "POST" {
        let made = all["responses"]["200"].take();
        all["responses"] = json!({"201": made});
    }
    all["responses"]["default"] = json!({"$ref": "#/components/responses/Error"});
    if wants_key(path) {
        all["security"] = json!([{"bearer": []}, {}]);
        all["responses"]["429"] = json!({"$ref": "#/components/responses/Later"});
    }
    if *admin {
        all["description"] = "Wants an admin key where keys are asked for.".into();
    }
    let parameters = parameters(path, operation);
    if !parameters.is_empty() {
        all["parameters"] = parameters.into();
    }
    let (kind, mut schema) = match operation.body {
        Body::None => return all,
        Body::Json(table) => ("application/json", object(table)),
        Body::Form(file, table) => {
            let mut schema = object(table);
            schema["properties"][file] = json!({"type": "string", "format": "binary"});
            let mut required = vec![Value::from(file)];
            required.extend(schema["required"].as_array().into_iter().flatten().cloned());
            schema["required"] = required.into();
            ("multipart/form-data", schema)
        }
    };
    if let Some(example) = &operation.example {
        schema["examples"] = json!([example]);
    }
    let needed = schema.get("required").is_some();
    all["requestBody"] = json!({"required": needed, "content": {kind: {"schema": schema}}});
    all
}

/// Those in the path, and those behind it.
fn parameters(path: &str, operation: &Operation) -> Vec<Value> {
    let names = path.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    let in_path = names.map(
        |name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}),
    );
    let behind = operation.query.iter().map(|(name, kind, says)| match *kind {
        "object" => json!({"name": name, "in": "query", "style": "deepObject", "explode": true,
            "description": says, "schema": {"type": kind}}),
        "array" => json!({"name": name, "in": "query", "description": says,
            "schema": {"type": kind, "items": {"type": "string"}}}),
        _ => json!({"name": name, "in": "query", "description": says, "schema": {"type": kind}}),
    });
    in_path.chain(behind).collect()
}

fn answer(operation: &Operation) -> Value {
    let (kind, schema) = match operation.answer {
        Answer::Object(word) => {
            let properties = json!({"object": {"const": word}});
            ("application/json", json!({"type": "object", "properties": properties}))
        }
        Answer::Json => ("application/json", json!({"type": "object"})),
        Answer::Content(kind) => (kind, json!({})),
    };
    let mut answer = answer_of("What was asked for.", kind, schema);
    if operation.streams {
        answer["content"]["text/event-stream"] = json!({"schema": {"type": "string"}});
    }
    answer
}

fn answer_of(says: &str, kind: &str, schema: Value) -> Value {
    json!({"description": says, "content": {kind: {"schema": schema}}})
}

/// A table as the schema of an object.
fn object(table: &[Field]) -> Value {
    let properties: Map<_, _> =
        table.iter().map(|field| (field.name.to_owned(), schema(field))).collect();
    let mut object =
        json!({"type": "object", "properties": properties, "additionalProperties": false});
    let required: Vec<_> = table.iter().filter(|f| f.required).map(|f| f.name).collect();
    if !required.is_empty() {
        object["required"] = required.into();
    }
    object
}

/// A field: its type, and what becomes of it where that is not what one expects.
fn schema(field: &Field) -> Value {
    let mut schema = match field.takes {
        Takes::Table(table) => object(table),
        takes => match &takes.types()[..] {
            [] => json!({}),
            [one] => json!({"type": one}),
            several => json!({"type": several}),
        },
    };
    if let Takes::Word(words) = field.takes {
        schema["enum"] = words.into();
    }
    let (treatment, reason) = match field.treatment {
        Treatment::Honoured => return schema,
        Treatment::NoEffect(reason) => ("accepted without effect", reason),
        Treatment::Refused { reason, .. } => ("refused", reason),
    };
    schema["x-hearth-treatment"] = treatment.into();
    schema["description"] = reason.into();
    schema
}

fn error_ref() -> Value {
    json!({"$ref": "#/components/schemas/Error"})
}

fn error() -> Value {
    let text = || json!({"type": "string"});
    let maybe = || json!({"type": ["string", "null"]});
    let properties = json!({"message": text(), "type": text(), "param": maybe(), "code": maybe()});
    let required = ["message", "type", "param", "code"];
    let inner = json!({"type": "object", "properties": properties, "required": required});
    json!({"type": "object", "properties": {"error": inner}, "required": ["error"]})
}

fn later() -> Value {
    let mut later =
        answer_of("Too much for now: come back after a while.", "application/json", error_ref());
    let seconds = json!({"description": "Seconds.", "schema": {"type": "integer"}});
    later["headers"] = json!({"Retry-After": seconds});
    later
}
