//! What tools and their choice may be.

use super::*;

fn read_one(body: Value) -> Result<Option<Tools>, ApiError> {
    read(&mut Fields::parse(body.to_string().as_bytes())?, false)
}

fn weather() -> Value {
    json!({"type": "function", "function": {
        "name": "get_weather", "description": "The weather.", "strict": null,
        "parameters": {"properties": {"city": {"type": "string"}}},
    }})
}

fn sql() -> Value {
    json!({"type": "custom", "custom": {"name": "sql", "description": "SQL."}})
}

/// Both tools with one more field.
fn with(name: &str, value: Value) -> Value {
    json!({"tools": [weather(), sql()], name: value})
}

#[test]
fn tools_and_every_form_of_choice_arrive() {
    let tools = read_one(json!({"tools": [weather(), sql()]})).unwrap().unwrap();
    assert_eq!((tools.choice, tools.parallel), (ToolChoice::Auto, true));
    let [weather, sql] = tools.list.as_slice() else { panic!("two") };
    assert_eq!((weather.name.as_str(), weather.custom), ("get_weather", false));
    assert_eq!(weather.param, "tools[0].function.parameters");
    let Shape::Json { schema, lenient: true } = &weather.arguments else { panic!("not strict") };
    assert_eq!(schema["type"], "object");
    assert_eq!(weather.definition["function"].get("strict"), None);
    assert!(sql.custom && sql.definition["function"]["parameters"]["required"] == json!(["input"]));

    let function = |name: &str| json!({"type": "function", "function": {"name": name}});
    let allowed = |mode: &str| {
        json!({"type": "allowed_tools", "allowed_tools": {
            "mode": mode, "tools": [{"type": "custom", "custom": {"name": "sql"}}]}})
    };
    let cases = [
        (json!("none"), ToolChoice::None, [true, true], true),
        (json!("auto"), ToolChoice::Auto, [true, true], true),
        (json!("required"), ToolChoice::Required, [true, true], true),
        (function("get_weather"), ToolChoice::Required, [true, false], false),
        (allowed("auto"), ToolChoice::Auto, [false, true], true),
        (allowed("required"), ToolChoice::Required, [false, true], true),
    ];
    for (choice, expected, callable, parallel) in cases {
        let tools = read_one(with("tool_choice", choice)).unwrap().unwrap();
        let can: Vec<bool> = tools.list.iter().map(|tool| tool.callable).collect();
        assert_eq!((tools.choice, tools.parallel), (expected, parallel));
        assert_eq!(can, callable);
    }
    let single = read_one(with("parallel_tool_calls", json!(false))).unwrap().unwrap();
    assert!(!single.parallel);
    for nothing in [json!({}), json!({"tools": null, "tool_choice": "auto"})] {
        assert_eq!(read_one(nothing).unwrap(), None);
    }
}

#[test]
fn a_strict_function_and_a_custom_pattern_are_kept_to() {
    let mut strict = weather();
    strict["function"]["strict"] = json!(true);
    let mut pattern = sql();
    pattern["custom"]["format"] =
        json!({"type": "grammar", "grammar": {"syntax": "regex", "definition": "a|b"}});
    let tools = read_one(json!({"tools": [strict, pattern]})).unwrap().unwrap();
    assert!(matches!(&tools.list[0].arguments, Shape::Json { lenient: false, .. }));
    let Shape::Json { schema, .. } = &tools.list[1].arguments else { panic!("JSON") };
    assert_eq!(schema["properties"]["input"]["pattern"], "^(?:a|b)$");
}

#[test]
fn bad_tools_are_refused_by_path() {
    let function = |value: Value| json!({"tools": [{"type": "function", "function": value}]});
    let custom =
        |format: Value| json!({"type": "custom", "custom": {"name": "c", "format": format}});
    let custom = |format: Value| json!({"tools": [custom(format)]});
    let many: Vec<Value> = (0..129).map(|_| weather()).collect();
    let cases = [
        (json!({"tools": {}}), "tools"),
        (json!({"tools": []}), "tools"),
        (json!({"tools": many}), "tools"),
        (json!({"tools": ["f"]}), "tools[0]"),
        (json!({"tools": [{}]}), "tools[0].type"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": [weather(), {"type": "custom", "custom": 1}]}), "tools[1].custom"),
        (function(json!({})), "tools[0].function.name"),
        (function(json!({"name": ""})), "tools[0].function.name"),
        (function(json!({"name": "a b"})), "tools[0].function.name"),
        (function(json!({"name": 1})), "tools[0].function.name"),
        (function(json!({"name": "f", "description": 1})), "tools[0].function.description"),
        (function(json!({"name": "f", "parameters": []})), "tools[0].function.parameters"),
        (function(json!({"name": "f", "strict": "yes"})), "tools[0].function.strict"),
        (function(json!({"name": "f", "foo": 1})), "tools[0].function.foo"),
        (custom(json!({})), "tools[0].custom.format.type"),
        (custom(json!({"type": "yaml"})), "tools[0].custom.format.type"),
        (custom(json!({"type": "grammar"})), "tools[0].custom.format.grammar"),
        (
            custom(json!({"type": "grammar", "grammar": {"definition": "x", "syntax": "lark"}})),
            "tools[0].custom.format.grammar.syntax",
        ),
        (with("parallel_tool_calls", json!("no")), "parallel_tool_calls"),
        (with("tool_choice", json!("maybe")), "tool_choice"),
        (with("tool_choice", json!(1)), "tool_choice"),
        (with("tool_choice", json!({})), "tool_choice.type"),
        (with("tool_choice", json!({"type": "hosted"})), "tool_choice.type"),
        (with("tool_choice", json!({"type": "function"})), "tool_choice.function"),
        (
            with("tool_choice", json!({"type": "function", "function": {"name": "sql"}})),
            "tool_choice.function.name",
        ),
        (
            with(
                "tool_choice",
                json!({"type": "allowed_tools", "allowed_tools": {"mode": "none"}}),
            ),
            "tool_choice.allowed_tools.mode",
        ),
        (
            with(
                "tool_choice",
                json!({"type": "allowed_tools",
                                       "allowed_tools": {"mode": "auto", "tools": []}}),
            ),
            "tool_choice.allowed_tools.tools",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
    ];
    for (body, param) in cases {
        let error = read_one(body.clone()).unwrap_err();
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}");
    }
}
