//! What a request lets the model call.

use serde_json::{Value, json};

use crate::text::{CallRule, Shape};

/// The tools of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// All of them, as the prompt shows them.
    pub list: Vec<Tool>,
    /// Whether one is called.
    pub choice: ToolChoice,
    /// More than one call in an answer.
    pub parallel: bool,
    /// The field that they came in, for errors.
    pub param: &'static str,
}

/// One tool.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What the template is given: `{"type": "function", "function": {...}}`.
    pub definition: Value,
    /// What its arguments must look like.
    pub arguments: Shape,
    /// It takes a text, which models that know functions only give as its argument `input`.
    pub custom: bool,
    /// It may be called in this answer.
    pub callable: bool,
    /// The field to blame for its arguments.
    pub param: String,
}

/// Whether a tool is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// Never; the model is not told of them either.
    None,
    /// As the model likes.
    Auto,
    /// Always.
    Required,
}

/// The only argument of a custom tool.
const INPUT: &str = "input";

impl Tools {
    /// None yet, to be called as the model likes, one in an answer.
    pub fn of(param: &'static str) -> Self {
        Self { list: Vec::new(), choice: ToolChoice::Auto, parallel: false, param }
    }

    /// What the template is given.
    pub(super) fn definitions(&self) -> Option<Value> {
        let told = self.choice != ToolChoice::None && !self.list.is_empty();
        told.then(|| self.list.iter().map(|tool| tool.definition.clone()).collect())
    }

    /// Those that may be called.
    pub(super) fn callable(&self) -> impl Iterator<Item = &Tool> {
        self.list.iter().filter(|tool| tool.callable)
    }

    /// Whether the tool of this name takes a text.
    pub(super) fn is_custom(&self, name: &str) -> bool {
        self.list.iter().any(|tool| tool.custom && tool.name == name)
    }
}

impl Tool {
    /// A tool that takes a text, all of which matches `pattern` where there is one.
    pub fn custom(name: String, description: Option<String>, pattern: Option<String>) -> Self {
        let mut input = json!({"type": "string"});
        if let Some(pattern) = pattern {
            input["pattern"] = Value::from(format!("^(?:{pattern})$"));
        }
        let schema = json!({
            "type": "object", "properties": {INPUT: input},
            "required": [INPUT], "additionalProperties": false,
        });
        let mut function = json!({"name": name, "parameters": schema});
        if let Some(description) = description {
            function["description"] = Value::from(description);
        }
        Self {
            name,
            definition: json!({"type": "function", "function": function}),
            arguments: Shape::Json { schema, lenient: false },
            custom: true,
            callable: true,
            param: "tools".to_owned(),
        }
    }

    pub(super) fn rule(&self) -> CallRule {
        CallRule { name: self.name.clone(), arguments: self.arguments.clone() }
    }
}

/// What a custom tool is given, out of its arguments. What is not as it should be, because the
/// answer was cut off, is given as it is.
pub(super) fn input(arguments: &str) -> String {
    let value: Value = serde_json::from_str(arguments).unwrap_or_default();
    value[INPUT].as_str().unwrap_or(arguments).to_owned()
}
