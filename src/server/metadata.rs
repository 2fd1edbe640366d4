//! `metadata`: at most 16 labels of short text.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::extract::{Fields, kind};

const PAIRS_MAX: usize = 16;
const KEY_CHARS_MAX: usize = 64;
const VALUE_CHARS_MAX: usize = 512;

/// Reads the field of this name.
///
/// # Errors
/// Too many pairs, too long a key or value, or a value that is no string; by its path.
pub(super) fn read(body: &mut Fields) -> Result<Option<Map<String, Value>>, ApiError> {
    let Some(metadata) = body.object("metadata")? else { return Ok(None) };
    if metadata.len() > PAIRS_MAX {
        let got = metadata.len();
        let message = format!("Invalid 'metadata': at most {PAIRS_MAX} pairs, but got {got}.");
        return Err(ApiError::invalid("metadata", message));
    }
    for (key, value) in &metadata {
        let path = format!("metadata.{key}");
        let Value::String(text) = value else {
            return Err(ApiError::wrong_type(&path, "a string", kind(value)));
        };
        if key.chars().count() > KEY_CHARS_MAX {
            let message =
                format!("Invalid 'metadata': keys have at most {KEY_CHARS_MAX} characters.");
            return Err(ApiError::invalid("metadata", message));
        }
        if text.chars().count() > VALUE_CHARS_MAX {
            let message =
                format!("Invalid '{path}': values have at most {VALUE_CHARS_MAX} characters.");
            return Err(ApiError::invalid(&path, message));
        }
    }
    Ok(Some(metadata))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_are_few_and_short() {
        let read = |metadata: Value| {
            let body = json!({"metadata": metadata}).to_string();
            read(&mut Fields::parse(body.as_bytes()).unwrap())
        };
        let pairs = |n: usize| (0..n).map(|i| (i.to_string(), json!("v"))).collect::<Map<_, _>>();
        assert!(read(pairs(16).into()).unwrap().is_some_and(|map| map.len() == 16));
        assert!(read(Value::Null).unwrap().is_none());
        assert!(read(json!({"k".repeat(64): "v".repeat(512)})).is_ok());
        for (bad, param) in [
            (pairs(17).into(), "metadata"),
            (json!({"k".repeat(65): "v"}), "metadata"),
            (json!({"k": "v".repeat(513)}), "metadata.k"),
            (json!({"k": 1}), "metadata.k"),
            (json!([]), "metadata"),
        ] {
            assert_eq!(read(bad).unwrap_err().param.as_deref(), Some(param));
        }
    }
}
