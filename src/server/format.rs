//! What an answer must look like: `response_format`, and the names that local servers have for it.
//!
//! Every form is enforced by a grammar, `strict` or not. The schema itself is judged by whoever
//! compiles it; here is only the wire.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::extract::{Fields, kind};
use super::fields;
use crate::pipeline::Format;
use crate::text::Shape;

/// Reads all fields that may ask for a form. Two of them at once are refused.
pub(super) fn read(body: &mut Fields, lenient: bool) -> Result<Option<Format>, ApiError> {
    let mut formats = Vec::new();
    if let Some(format) = body.object("response_format")? {
        formats.extend(response_format(format, lenient)?);
    }
    for (param, name) in
        [("guided_json", "json"), ("guided_regex", "regex"), ("guided_choice", "choice")]
            .into_iter()
            .chain([("guided_grammar", "grammar")])
    {
        if let Some(value) = body.value(param) {
            formats.push(format(param, param, shape(param, name, value)?));
        }
    }
    if let Some(outputs) = body.object("structured_outputs")? {
        formats.extend(structured_outputs(outputs, lenient)?);
    }
    if let [first, second, ..] = formats.as_slice() {
        let message = format!(
            "Only one of '{}' and '{}' can say what the answer looks like.",
            first.param, second.param
        );
        return Err(ApiError::invalid(second.param, message));
    }
    Ok(formats.pop())
}

fn format(param: &'static str, what: &str, shape: Shape) -> Format {
    Format { shape, param, refusal: format!("Invalid '{what}'") }
}

const RESPONSE_FORMAT: &str = "response_format";

fn response_format(object: Map<String, Value>, lenient: bool) -> Result<Option<Format>, ApiError> {
    let mut object = object;
    let path = "response_format.type";
    let found = match object.remove("type") {
        None | Some(Value::Null) => return Err(ApiError::missing(path)),
        Some(Value::String(word)) => word,
        Some(other) => return Err(ApiError::wrong_type(path, "a string", kind(&other))),
    };
    let format = match found.as_str() {
        "text" => None,
        "json_object" => Some(format(RESPONSE_FORMAT, RESPONSE_FORMAT, Shape::object())),
        "json_schema" => Some(json_schema(object.remove("json_schema"), lenient)?),
        other => {
            let message = format!(
                "Invalid value: '{other}'. Supported values are: 'text', 'json_object' and \
                 'json_schema'."
            );
            return Err(ApiError::invalid(path, message));
        }
    };
    if let Some((name, _)) = object.iter().find(|(_, value)| !value.is_null()) {
        fields::unknown(&format!("{RESPONSE_FORMAT}.{name}"), lenient)?;
    }
    Ok(format)
}

fn json_schema(object: Option<Value>, lenient: bool) -> Result<Format, ApiError> {
    let path = "response_format.json_schema";
    let object = match object {
        None | Some(Value::Null) => return Err(ApiError::missing(path)),
        Some(Value::Object(object)) => object,
        Some(other) => return Err(ApiError::wrong_type(path, "an object", kind(&other))),
    };
    fields::check(&object, fields::JSON_SCHEMA, "response_format.json_schema.", lenient)?;
    let mut object = Fields::within(path, object);
    let name = object.string("name")?;
    let name = name.ok_or_else(|| ApiError::missing(&object.at("name")))?;
    check_name(&object.at("name"), &name)?;
    let schema = match object.value("schema") {
        None => return Ok(named(&name, Shape::object())),
        Some(schema @ Value::Object(_)) => schema,
        Some(other) => {
            return Err(ApiError::wrong_type(&object.at("schema"), "an object", kind(&other)));
        }
    };
    Ok(named(&name, Shape::Json { schema, lenient: false }))
}

fn named(name: &str, shape: Shape) -> Format {
    let refusal = format!("Invalid schema for {RESPONSE_FORMAT} '{name}'");
    Format { shape, param: RESPONSE_FORMAT, refusal }
}

/// What OpenAI lets schemas and functions be called.
pub(super) fn check_name(path: &str, name: &str) -> Result<(), ApiError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if (1..=64).contains(&name.len()) && name.chars().all(allowed) {
        return Ok(());
    }
    let message = format!(
        "Invalid '{path}': expected 1 to 64 letters, digits, underscores or hyphens, but got \
         '{name}'."
    );
    Err(ApiError::invalid(path, message))
}

fn structured_outputs(
    object: Map<String, Value>,
    lenient: bool,
) -> Result<Option<Format>, ApiError> {
    const PARAM: &str = "structured_outputs";
    fields::check(&object, fields::STRUCTURED_OUTPUTS, "structured_outputs.", lenient)?;
    let mut object = Fields::within(PARAM, object);
    let mut shapes = Vec::new();
    for name in ["json", "regex", "choice", "grammar"] {
        if let Some(value) = object.value(name) {
            shapes.push(shape(&object.at(name), name, value)?);
        }
    }
    if object.bool("json_object")?.unwrap_or(false) {
        shapes.push(Shape::object());
    }
    if shapes.len() > 1 {
        let message = format!("Invalid '{PARAM}': it can have only one form.");
        return Err(ApiError::invalid(PARAM, message));
    }
    Ok(shapes.pop().map(|shape| format(PARAM, PARAM, shape)))
}

fn shape(path: &str, name: &str, value: Value) -> Result<Shape, ApiError> {
    match (name, value) {
        ("json", schema @ (Value::Object(_) | Value::Bool(_))) => {
            Ok(Shape::Json { schema, lenient: false })
        }
        ("json", Value::String(text)) => match serde_json::from_str(&text) {
            Ok(schema @ (Value::Object(_) | Value::Bool(_))) => {
                Ok(Shape::Json { schema, lenient: false })
            }
            _ => {
                let message = format!("Invalid '{path}': the text is no JSON schema.");
                Err(ApiError::invalid(path, message))
            }
        },
        ("json", other) => Err(ApiError::wrong_type(path, "an object or a string", kind(&other))),
        ("regex", Value::String(regex)) => Ok(Shape::Regex(regex)),
        ("grammar", Value::String(grammar)) => Shape::grammar(&grammar)
            .map_err(|why| ApiError::invalid(path, format!("Invalid '{path}': {why}."))),
        ("choice", Value::Array(list)) => choice(path, list),
        ("choice", other) => Err(ApiError::wrong_type(path, "an array of strings", kind(&other))),
        (_, other) => Err(ApiError::wrong_type(path, "a string", kind(&other))),
    }
}

fn choice(path: &str, list: Vec<Value>) -> Result<Shape, ApiError> {
    if list.is_empty() {
        return Err(ApiError::invalid(path, format!("Invalid '{path}': the array is empty.")));
    }
    let text = |(i, value): (usize, Value)| match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        Value::String(_) => {
            Err(ApiError::invalid(path, format!("Invalid '{path}[{i}]': the text is empty.")))
        }
        other => Err(ApiError::wrong_type(&format!("{path}[{i}]"), "a string", kind(&other))),
    };
    list.into_iter().enumerate().map(text).collect::<Result<_, _>>().map(Shape::Choice)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_one(body: Value) -> Result<Option<Format>, ApiError> {
        read(&mut Fields::parse(body.to_string().as_bytes())?, false)
    }

    #[test]
    fn every_name_for_a_form_arrives() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let json = Shape::Json { schema: schema.clone(), lenient: false };
        let cases = [
            (json!({"response_format": {"type": "json_object"}}), Shape::object()),
            (
                json!({"response_format": {"type": "json_schema", "json_schema":
                    {"name": "x", "schema": schema, "strict": true, "description": "d"}}}),
                json.clone(),
            ),
            (json!({"guided_json": schema}), json.clone()),
            (json!({"guided_json": schema.to_string()}), json.clone()),
            (json!({"guided_regex": "a+"}), Shape::Regex("a+".into())),
            (json!({"guided_choice": ["a", "b"]}), Shape::Choice(vec!["a".into(), "b".into()])),
            (json!({"guided_grammar": "start: \"a\""}), Shape::Lark("start: \"a\"".into())),
            (json!({"structured_outputs": {"json": schema}}), json),
            (json!({"structured_outputs": {"json_object": true}}), Shape::object()),
        ];
        for (body, shape) in cases {
            assert_eq!(read_one(body.clone()).unwrap().map(|f| f.shape), Some(shape), "{body}");
        }
        for nothing in [
            json!({}),
            json!({"response_format": {"type": "text"}}),
            json!({"response_format": null, "guided_json": null}),
            json!({"structured_outputs": {}}),
        ] {
            assert_eq!(read_one(nothing).unwrap(), None);
        }
    }

    #[test]
    fn bad_forms_are_refused_by_path() {
        let format = |value: Value| json!({"type": "json_schema", "json_schema": value});
        let schema = |value: Value| json!({"response_format": format(value)});
        let cases = [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {}}), "response_format.type"),
            (json!({"response_format": {"type": 1}}), "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "text", "x": 1}}), "response_format.x"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (schema(json!([])), "response_format.json_schema"),
            (schema(json!({})), "response_format.json_schema.name"),
            (schema(json!({"name": "a b"})), "response_format.json_schema.name"),
            (schema(json!({"name": "a".repeat(65)})), "response_format.json_schema.name"),
            (schema(json!({"name": "a", "schema": []})), "response_format.json_schema.schema"),
            (schema(json!({"name": "a", "strict": 1})), "response_format.json_schema.strict"),
            (schema(json!({"name": "a", "y": 1})), "response_format.json_schema.y"),
            (json!({"guided_json": 5}), "guided_json"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_regex": ["a"]}), "guided_regex"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_choice": ["a", 1]}), "guided_choice[1]"),
            (json!({"guided_choice": [""]}), "guided_choice"),
            (json!({"guided_grammar": {}}), "guided_grammar"),
            (json!({"structured_outputs": []}), "structured_outputs"),
            (json!({"structured_outputs": {"regex": 1}}), "structured_outputs.regex"),
            (json!({"structured_outputs": {"z": 1}}), "structured_outputs.z"),
            (json!({"structured_outputs": {"json": {}, "regex": "a"}}), "structured_outputs"),
            (json!({"guided_regex": "a", "guided_json": {}}), "guided_regex"),
        ];
        for (body, param) in cases {
            let error = read_one(body.clone()).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(param)),
                "{body}"
            );
        }
    }
}
