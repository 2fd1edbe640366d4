//! Reading a JSON body field by field, with errors that name the field.
//!
//! Taken by hand from a map instead of through serde, because a client deserves
//! "Invalid type for 'messages[2].content'" and not the position of a byte in a struct. `null` is
//! the same as absent everywhere, as it is at OpenAI.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields;

/// The fields of one object of the body that are not read yet.
pub(super) struct Fields {
    /// Where the object stands in the body; empty for the body itself.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// It is not JSON (with line and column), or not an object.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { path: String::new(), map }),
            Ok(other) => Err(ApiError::bad_json(format!(
                "The request body must be a JSON object, but it is {}.",
                kind(&other)
            ))),
            Err(error) => {
                Err(ApiError::bad_json(format!("The request body is not valid JSON: {error}.")))
            }
        }
    }

    /// The fields of an object inside the body, at `path`.
    pub(super) fn within(path: &str, map: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), map }
    }

    /// The path of a field, for errors.
    pub(super) fn at(&self, name: &str) -> String {
        match self.path.as_str() {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        }
    }

    /// What is left is unknown, but for what clients send back of an answer, unread.
    pub(super) fn end(&self, echoed: &[&str], lenient: bool) -> Result<(), ApiError> {
        let left = self
            .map
            .iter()
            .filter(|(name, value)| !value.is_null() && !echoed.contains(&name.as_str()));
        left.map(|(name, _)| name).try_for_each(|name| fields::unknown(&self.at(name), lenient))
    }

    pub(super) fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The value itself; `None` when absent or null.
    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::wrong_type(&self.at(name), "a boolean", kind(&other))),
        }
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::wrong_type(&self.at(name), "a string", kind(&other))),
        }
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Object(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::wrong_type(&self.at(name), "an object", kind(&other))),
        }
    }

    pub(super) fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f32>, ApiError> {
        self.value(name).map(|value| number(&self.at(name), &value, range)).transpose()
    }

    pub(super) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        self.value(name).map(|value| integer(&self.at(name), &value, range)).transpose()
    }

    /// An integer that counts something.
    pub(super) fn count(
        &mut self,
        name: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<usize>, ApiError> {
        let range = i64::from(*range.start())..=i64::from(*range.end());
        Ok(self.integer(name, range)?.map(|count| count as usize))
    }
}

/// A number within a range.
pub(super) fn number(
    name: &str,
    value: &Value,
    range: RangeInclusive<f64>,
) -> Result<f32, ApiError> {
    let number =
        value.as_f64().ok_or_else(|| ApiError::wrong_type(name, "a number", kind(value)))?;
    if !range.contains(&number) {
        return Err(out_of_range(name, value, range.start(), range.end()));
    }
    Ok(number as f32)
}

/// An integer within a range. `5.0` is not one.
pub(super) fn integer(
    name: &str,
    value: &Value,
    range: RangeInclusive<i64>,
) -> Result<i64, ApiError> {
    let Value::Number(number) = value else {
        return Err(ApiError::wrong_type(name, "an integer", kind(value)));
    };
    if number.is_f64() {
        return Err(ApiError::wrong_type(name, "an integer", "a decimal number"));
    }
    // Only integers beyond `i64::MAX` are not one.
    match number.as_i64() {
        Some(integer) if range.contains(&integer) => Ok(integer),
        _ => Err(out_of_range(name, value, range.start(), range.end())),
    }
}

/// What a value is, with its article.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn out_of_range<T: std::fmt::Display>(name: &str, got: &Value, low: T, high: T) -> ApiError {
    let message = format!(
        "Invalid '{name}': expected a value between {low} and {high}, but got {got} instead."
    );
    ApiError::invalid(name, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap_or_else(|e| panic!("{json}: {}", e.message))
    }

    #[test]
    fn a_body_that_is_no_object_is_refused_with_its_position() {
        for (body, part) in [
            ("", "line 1 column 0"),
            ("{\"a\": 1,\n \"b\" 2}", "line 2 column 6"),
            ("{\"a\": 1e999}", "out of range"),
            ("[1]", "an array"),
            ("\"x\"", "a string"),
            ("{\"a\": 1} trailing", "line 1"),
        ] {
            let error = Fields::parse(body.as_bytes()).err().unwrap();
            assert_eq!((error.status.as_u16(), error.code), (400, Some("invalid_json")));
            assert!(error.message.contains(part), "{}", error.message);
        }
        assert!(Fields::parse(b"{\"a\": \"\xff\"}").is_err());
        assert!(Fields::parse("[".repeat(100_000).as_bytes()).is_err());
    }

    #[test]
    fn null_is_absent() {
        let mut fields = fields(r#"{"a": null}"#);
        assert_eq!(fields.bool("a").unwrap(), None);
        assert_eq!(fields.number("a", 0.0..=1.0).unwrap(), None);
        assert_eq!(fields.number("b", 0.0..=1.0).unwrap(), None);
    }

    #[test]
    fn wrong_types_and_ranges_name_the_field() {
        let error = fields(r#"{"t": "hot"}"#).number("t", 0.0..=2.0).unwrap_err();
        assert_eq!(error.code, Some("invalid_type"));
        assert_eq!(
            error.message,
            "Invalid type for 't': expected a number, but got a string instead."
        );
        let error = fields(r#"{"t": 2.5}"#).number("t", 0.0..=2.0).unwrap_err();
        assert_eq!(error.code, Some("invalid_value"));
        assert_eq!(
            error.message,
            "Invalid 't': expected a value between 0 and 2, but got 2.5 instead."
        );
        for bad in ["1.0", "1.5", "\"1\"", "true", "[1]", "129", "0", "-1", "99999999999999999999"]
        {
            let error = fields(&format!(r#"{{"n": {bad}}}"#)).count("n", 1..=128).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("n"), "{bad}");
        }
        assert_eq!(fields(r#"{"n": 128}"#).count("n", 1..=128).unwrap(), Some(128));
    }
}
