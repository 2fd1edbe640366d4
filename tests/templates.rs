//! Chat templates against what Hugging Face's own renderer prints.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth::text::{ChatTemplate, Clock, GgufVocab, TextError, Tokenizer};
use serde_json::{Map, Value, json};

#[path = "templates/harmony.rs"]
mod harmony;
#[path = "templates/style.rs"]
mod style;

fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(path);
    if !path.exists() {
        println!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// 2025-07-10, noon, UTC.
fn clock() -> Clock {
    let noon: jiff::Timestamp = "2025-07-10T12:00:00Z".parse().unwrap();
    Arc::new(move || noon.to_zoned(jiff::tz::TimeZone::UTC))
}

#[test]
fn golden_conversations_render_exactly() {
    let Some(path) = shared("chat-templates/goldens/rendered.json") else { return };
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(cases.len(), 27);
    let mut wrong = 0;
    for case in &cases {
        let mut data: Map<String, Value> = case["data"].as_object().unwrap().clone();
        let messages = data.remove("messages").unwrap();
        let tools = data.remove("tools");
        let prompt = data.remove("add_generation_prompt").is_some_and(|v| v == true);
        let template = case["chat_template"].as_str().unwrap();
        let rendered = ChatTemplate::new(template, None, None)
            .map(|template| template.with_clock(clock()))
            .and_then(|template| template.render(&messages, tools.as_ref(), prompt, &data));
        if !matches!(&rendered, Ok(text) if *text == case["target"].as_str().unwrap()) {
            wrong += 1;
            println!("{}: expected {}\n got {rendered:?}", case["name"], case["target"]);
        }
    }
    assert_eq!(wrong, 0, "of {} conversations", cases.len());
}

/// Every real template renders a plain conversation; most also one with tools.
#[test]
fn real_templates_render() {
    let Some(folder) = shared("chat-templates/templates") else { return };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "jinja"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 28);
    let messages = json!([
        { "role": "user", "content": "What is the capital of Taiwan?" },
        { "role": "assistant", "content": "Taipei." },
        { "role": "user", "content": "And its mayor?" },
    ]);
    let tools = json!([{ "type": "function", "function": {
        "name": "search", "description": "Searches.",
        "parameters": { "type": "object", "properties": {
            "query": { "type": "string", "description": "what" } }, "required": ["query"] },
    }}]);
    // Firefunction expects these two.
    let extra = json!({ "datetime": "10 July 2025", "functions": "[]" });
    let extra = extra.as_object().unwrap();
    let mut failed = Vec::new();
    for path in &paths {
        let source = std::fs::read_to_string(path).unwrap();
        let template = ChatTemplate::new(&source, Some("<BOS>"), Some("<EOS>")).unwrap();
        let template = template.with_clock(clock());
        for tools in [None, Some(&tools)] {
            match template.render(&messages, tools, true, extra) {
                Ok(text) => assert!(text.contains("And its mayor?"), "{path:?}: {text}"),
                Err(error) => failed.push(format!("{path:?} tools={}: {error}", tools.is_some())),
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + \
    message.content + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

const LLAMA3: &str = "{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{ message.content | trim }}{% endgeneration -%}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
";

fn render(source: &str, messages: &Value) -> Result<String, TextError> {
    let template = ChatTemplate::new(source, Some("<|begin_of_text|>"), Some("<|eot_id|>"))?;
    template.with_clock(clock()).render(messages, None, true, &Map::new())
}

fn expression(source: &str) -> String {
    render(source, &json!([])).unwrap()
}

fn conversation() -> Value {
    json!([
        { "role": "user", "content": "早安 " },
        { "role": "assistant", "content": "Good morning." },
    ])
}

#[test]
fn our_own_templates_render() {
    assert_eq!(
        render(CHATML, &conversation()).unwrap(),
        "<|im_start|>user\n早安 <|im_end|>\n<|im_start|>assistant\nGood morning.<|im_end|>\n\
         <|im_start|>assistant\n"
    );
    let rendered = render(LLAMA3, &conversation()).unwrap();
    assert_eq!(
        rendered,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n早安<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\nGood morning.<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    let template = ChatTemplate::new(LLAMA3, Some("<|begin_of_text|>"), None).unwrap();
    assert!(template.starts_with_bos(&rendered));
    assert!(!template.starts_with_bos("hello"));
}

#[test]
fn values_print_as_in_python() {
    for (source, expected) in [
        ("{{ true }} {{ none }} {{ 1.0 }} {{ 1e20 }} {{ nothing }}|", "True None 1.0 1e+20 |"),
        ("{{ [1, 'a', \"b'c\", none, {'k': 1e-7}] }}", "[1, 'a', \"b'c\", None, {'k': 1e-07}]"),
        ("{{ {'z': [1, 2], 'a': '中<&>\n'} | tojson }}", r#"{"z": [1, 2], "a": "中<&>\n"}"#),
        (
            "{{ {'z': 1, 'a': []} | tojson(indent=2, sort_keys=true) }}",
            "{\n  \"a\": [],\n  \"z\": 1\n}",
        ),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ '  x '.strip() }}{{ 'a-b'.split('-') }}", "x['a', 'b']"),
        ("{{ 'abc'.removeprefix('a') }}{{ 'a/b/c'.rsplit('/', 1) }}", "bc['a/b', 'c']"),
        ("{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "b1a2"),
        (
            "{% set n = namespace(i=0) %}{% for x in [1, 2, 3] %}{% if x == 3 %}{% break %}\
          {% endif %}{% set n.i = n.i + x %}{% endfor %}{{ n.i }}",
            "3",
        ),
        ("{{ 'a' is sequence }} {{ {} is sequence }} {{ none is iterable }}", "True True False"),
        ("  {% if true %}\n  yes\n  {% endif %}\nno\n", "  yes\nno"),
        ("{{ '{\n' | indent(2, first=true) }}{{ 'a\n\nb' | indent }}", "  {\na\n\n    b"),
        ("{{ 'a\n\nb' | indent('> ', true, true) }}", "> a\n> \n> b"),
        ("{{ strftime_now('%d %b %Y') }}", "10 Jul 2025"),
        ("{{ ['X', 'Y'] | lower }}{{ ['X'] | string }}", "['x', 'y'][\"X\"]"),
    ] {
        assert_eq!(expression(source), expected, "{source}");
    }
}

#[test]
fn refusals_and_mistakes_are_told_apart() {
    let wrong_role = json!([{ "role": "wizard", "content": "x" }]);
    match render(LLAMA3, &wrong_role) {
        Err(TextError::Refused(message)) => assert_eq!(message, "no role wizard"),
        other => panic!("{other:?}"),
    }
    let undefined = "{% macro m() %}{{ messages.nothing.deeper }}{% endmacro %}{{ m() }}";
    assert!(matches!(render(undefined, &json!([])), Err(TextError::Render(_))));
    assert!(matches!(render("{% if %}", &json!([])), Err(TextError::BadTemplate(_))));
    assert!(matches!(render("{{ x | nofilter }}", &json!([])), Err(TextError::Render(_))));
    assert!(matches!(render("{{ strftime_now('%!') }}", &json!([])), Err(TextError::Render(_))));
}

#[test]
fn templates_come_from_the_tokenizer_config() {
    let from = |config: Value, file| ChatTemplate::from_tokenizer_config(&config, file);
    let show = |template: ChatTemplate, tools: Option<&Value>| {
        template.render(&json!([]), tools, false, &Map::new()).unwrap()
    };
    assert!(from(json!({}), None).unwrap().is_none());
    let config = json!({
        "bos_token": { "content": "<s>", "lstrip": false },
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}one{{ eos_token }}",
    });
    assert_eq!(show(from(config.clone(), None).unwrap().unwrap(), None), "<s>one</s>");
    let file = from(config, Some("{{ bos_token }}file")).unwrap().unwrap();
    assert_eq!(show(file, None), "<s>file");
    let named = json!({ "chat_template": [
        { "name": "default", "template": "plain" },
        { "name": "tool_use", "template": "{{ tools | length }} tools" },
    ]});
    let named = from(named, None).unwrap().unwrap();
    assert_eq!(show(named.clone(), None), "plain");
    assert_eq!(show(named, Some(&json!([1, 2]))), "2 tools");
    let nameless = from(json!({ "chat_template": [{ "name": "rag", "template": "" }] }), None);
    assert!(matches!(nameless, Err(TextError::BadTemplate(_))));
}

#[test]
fn extra_variables_win() {
    let template = ChatTemplate::new("{{ enable_thinking }} {{ bos_token }}", Some("a"), None);
    let mut extra = Map::new();
    extra.insert("enable_thinking".into(), json!(false));
    extra.insert("bos_token".into(), json!("b"));
    let rendered = template.unwrap().render(&json!([]), None, false, &extra).unwrap();
    assert_eq!(rendered, "False b");
}

/// A template is a program by somebody else. It may not loop or recurse without end, nor print
/// without end. Run on a thread with a small stack, as a server's are.
#[test]
fn hostile_templates_are_stopped() {
    for source in [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}\
         {% endfor %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set x = 'x' * 100000 %}{% for a in range(100000) %}{{ x }}{% endfor %}",
        "{{ 'x' * 100000000000 }}",
        "{{ range(10000000000) | list }}",
        "{% set n = namespace(x=[]) %}{% for a in range(5000) %}{% set n.x = [n.x] %}\
         {% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[]) %}{% for a in range(5000) %}{% set n.x = {'a': n.x} %}\
         {% endfor %}{{ n.x | tojson }}",
    ] {
        let run = move || render(source, &json!([]));
        let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap();
        let result = thread.join().unwrap();
        assert!(matches!(result, Err(TextError::Render(_))), "{source}: {result:?}");
    }
}

/// A vocabulary of single bytes with the special tokens that are asked for.
fn byte_vocab(special: &[&str], eos: Option<u32>) -> Tokenizer {
    let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut token_types = vec![6; 256];
    tokens.extend(special.iter().map(|token| token.to_string()));
    token_types.resize(tokens.len(), 3);
    Tokenizer::from_gguf(&GgufVocab {
        model: "llama".into(),
        scores: Some(vec![0.0; tokens.len()]),
        token_types: Some(token_types),
        tokens,
        eos,
        ..GgufVocab::default()
    })
    .unwrap()
}

#[test]
fn the_end_of_turn_is_read_off_the_template() {
    let special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|custom|>"];
    let tokenizer = byte_vocab(&special, Some(257));
    let id = |token: &str| tokenizer.id_of(token).unwrap();
    let stops = |source: &str| {
        ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap().stop_ids(&tokenizer)
    };
    assert_eq!(stops(CHATML), [id("<|im_end|>")]);
    assert_eq!(stops(LLAMA3), [id("<|eot_id|>")]);
    let custom = "{% for m in messages %}{{ m.content }} {{ '<|custom|>' }}{% endfor %}";
    assert_eq!(stops(custom), [id("<|custom|>")]);
    let eos = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}";
    assert_eq!(stops(eos), [id("</s>")]);
    let parts = "{% for m in messages %}{% for p in m.content %}{{ p.text + '' }}{% endfor %}\
                 {{ '<|custom|>' }}{% endfor %}";
    assert_eq!(stops(parts), [id("<|custom|>")]);
    // Nothing to be seen: the names that are known and in the vocabulary.
    let bare = "{% for m in messages %}{{ m.content }}\n{% endfor %}";
    assert_eq!(stops(bare), [id("<|im_end|>"), id("<|eot_id|>")]);
}
