//! Chat templates against what Hugging Face's own renderer prints.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth::text::{CallFormat, ChatTemplate, Clock, GgufVocab, TextError, Tokenizer};
use serde_json::{Map, Value, json};

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

/// What a conversation with a known call tells about a template: the format of calls, whether it
/// shows tools, whether it wants arguments as text.
#[test]
fn how_a_template_treats_tools_is_found_out() {
    let Some(folder) = shared("chat-templates/templates") else { return };
    let cases = [
        ("Qwen-Qwen2.5-7B-Instruct", CallFormat::Hermes, true, false),
        ("Qwen-Qwen3-0.6B", CallFormat::Hermes, true, false),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", CallFormat::Hermes, true, false),
        ("meta-llama-Llama-3.1-8B-Instruct", CallFormat::Llama, true, false),
        ("meta-llama-Llama-3.2-3B-Instruct", CallFormat::Llama, true, false),
        ("mistralai-Mistral-Nemo-Instruct-2407", CallFormat::MistralList, true, false),
        ("Mistral-Small-3.2-24B-Instruct-2506", CallFormat::MistralArgs, true, false),
        ("google-gemma-2-2b-it", CallFormat::Hermes, false, false),
        ("microsoft-Phi-3.5-mini-instruct", CallFormat::Hermes, false, false),
    ];
    let mut wrong = Vec::new();
    for (name, format, shows_tools, text_arguments) in cases {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let template = ChatTemplate::new(&source, Some("<s>"), Some("</s>")).unwrap();
        let style = template.with_clock(clock()).tool_style();
        if (style.format, style.shows_tools, style.text_arguments)
            != (format, shows_tools, text_arguments)
        {
            wrong.push(format!("{name}: {style:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_template_without_words_for_tools_is_told_in_its_own() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    let style = ChatTemplate::new(source, None, None).unwrap().tool_style();
    assert!(!style.shows_tools && !style.shows_calls);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let call = json!({"id": "call_1", "type": "function",
                      "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    let messages = json!([
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Call it."},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]);
    let (messages, tools) = style.adapt(messages, Some(tools));
    assert_eq!(tools, None);
    let text = messages[0]["content"].as_str().unwrap();
    assert!(
        text.starts_with("Be kind.\n\n") && text.contains("{\"name\":\"f\",\"parameters\":{}}")
    );
    let expected = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\":1}}\n</tool_call>";
    assert_eq!(messages[2], json!({"role": "assistant", "content": expected}));
    let expected = "<tool_response>\n2\n</tool_response>";
    assert_eq!(messages[3], json!({"role": "user", "content": expected}));
}

/// Gemma refuses system messages, and messages of the user that follow each other.
#[test]
fn what_a_template_refuses_is_said_in_the_words_that_it_has() {
    let source = "{% for m in messages %}\
        {% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
        {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turns') }}\
        {% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let style = template.tool_style();
    assert!(!style.takes_system && style.alternates);
    let render = |messages: Value, tools: Option<Value>| {
        let (messages, tools) = style.adapt(messages, tools);
        template.render(&messages, tools.as_ref(), true, &Map::new()).unwrap()
    };
    let messages = json!([
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ]);
    let expected = "<user>Be kind.\n\nHello.\n\nWho are you?";
    assert_eq!(render(messages, None), expected);
    let call = |id: &str| {
        json!({"id": id, "type": "function",
                                 "function": {"name": "f", "arguments": "{}"}})
    };
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let messages = json!([
        {"role": "user", "content": "Call it twice."},
        {"role": "assistant", "content": null, "tool_calls": [call("a"), call("b")]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
    ]);
    let text = render(messages, Some(tools));
    assert!(text.contains("\"name\":\"f\"") && text.contains("\n\nCall it twice."), "{text}");
    let results = "1\n</tool_response>\n\n<tool_response>\n2\n";
    assert!(text.contains(results), "{text}");
    // Where there are words, they are used.
    let plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    let style = ChatTemplate::new(plain, None, None).unwrap().tool_style();
    assert!(style.takes_system && style.late_system && !style.alternates);
    let twice = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
    assert_eq!(style.adapt(twice.clone(), None).0, twice);
}

/// One system message, at the beginning, and turns behind it, as Gemma 3 and Mistral have it.
#[test]
fn what_comes_late_or_twice_is_a_part_of_a_turn() {
    let source = "{% set first = messages[0].role == 'system' %}\
        {% set rest = messages[1:] if first else messages %}\
        {% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('in turns') }}{% endif %}<{{ m.role }}>\
        {% if loop.first and first %}[{{ messages[0].content }}]{% endif %}{{ m.content }}\
        {% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let style = template.tool_style();
    assert!(style.takes_system && !style.late_system && style.alternates);
    let said = |role: &str, content: &str| json!({"role": role, "content": content});
    let render = |messages: &[Value]| {
        let (messages, _) = style.adapt(Value::from(messages), None);
        template.render(&messages, None, true, &Map::new()).unwrap()
    };
    let two = [said("system", "A"), said("system", "B"), said("user", "u")];
    assert_eq!(render(&two), "<user>[A\n\nB]u");
    let late = [said("user", "u"), said("assistant", "a"), said("system", "S"), said("user", "v")];
    assert_eq!(render(&late), "<user>u<assistant>a<user>S\n\nv");
    let empty = [said("user", ""), said("user", "v")];
    assert_eq!(render(&empty), "<user>v");
    let call = json!({"id": "a", "type": "function",
                      "function": {"name": "f", "arguments": "{}"}});
    let calls = json!({"role": "assistant", "content": null, "tool_calls": [call]});
    let result = json!({"role": "tool", "tool_call_id": "a", "content": "1"});
    let talk = [said("user", "u"), said("assistant", "Let me look."), calls, result];
    let text = render(&[&talk[..], &[said("user", "And?")]].concat());
    assert!(text.contains("<assistant>Let me look.\n\n<tool_call>"), "{text}");
    assert!(text.ends_with("</tool_response>\n\nAnd?"), "{text}");

    let Some(folder) = shared("chat-templates/templates") else { return };
    for (name, takes_system, alternates) in [
        ("google-gemma-2-2b-it", false, true),
        ("Qwen-Qwen3-0.6B", true, false),
        ("meta-llama-Llama-3.1-8B-Instruct", true, false),
        ("mistralai-Mistral-Nemo-Instruct-2407", true, true),
    ] {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let template = ChatTemplate::new(&source, Some("<s>"), Some("</s>")).unwrap();
        let template = template.with_clock(clock());
        let style = template.tool_style();
        assert_eq!((style.takes_system, style.alternates), (takes_system, alternates), "{name}");
        // A key is a key, whatever it holds: Llama's sees a call in every message that has one.
        let bare = json!([{"role": "user", "content": "u", "tool_calls": null}]);
        let reads_keys = template.render(&bare, None, true, &Map::new()).is_err();
        assert_eq!(reads_keys, name.contains("Llama"), "{name}");
        let tools = json!([{"type": "function", "function": {"name": "f", "description": "It.",
            "parameters": {"type": "object", "properties": {}}}}]);
        let messages = [two.to_vec(), talk[1..].to_vec(), vec![said("user", "And?")]].concat();
        let (messages, tools) = style.adapt(Value::from(messages), Some(tools));
        let text = template.render(&messages, tools.as_ref(), true, &Map::new());
        let all = |text: &String| {
            ["And?", "Let me look.", "\"f\"", "u"].iter().all(|part| text.contains(part))
        };
        assert!(text.as_ref().is_ok_and(all), "{name}: {text:?}");
    }
}

/// What cannot read `null`, or prints it, has empty words.
#[test]
fn words_that_are_null_are_empty_where_that_is_no_text() {
    let call = json!({"id": "a", "type": "function",
                      "function": {"name": "f", "arguments": "{}"}});
    let talk = [
        json!({"role": "user", "content": "u"}),
        json!({"role": "assistant", "content": null, "tool_calls": [call]}),
    ];
    let prints = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}\
        {{ m.tool_calls | tojson }}{% endif %}{% endfor %}";
    for (source, takes_null) in [
        (prints.replace("m.content }", "m.content if m.content else '' }"), true),
        (prints.replace("m.content }", "'None' if m.content is none else m.content }"), false),
        (prints.replace("{{ m.content", "{{ '' if 'x' in m.content else m.content"), false),
    ] {
        let style = ChatTemplate::new(&source, None, None).unwrap().tool_style();
        assert!(style.shows_calls && style.takes_null == takes_null, "{source}: {style:?}");
        let (messages, _) = style.adapt(Value::from(&talk[..]), None);
        assert_eq!(messages[1]["content"], if takes_null { Value::Null } else { json!("") });
    }
}

/// Some templates print words or calls, and none of the others of a message.
#[test]
fn words_before_a_call_are_a_message_where_one_would_be_lost() {
    let call = json!({"id": "a", "type": "function",
                      "function": {"name": "f", "arguments": {}}});
    let user = json!({"role": "user", "content": "u"});
    let both = json!({"role": "assistant", "content": "Wait.", "tool_calls": [call]});
    let or = "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}\
        {{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let no = "{% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}\
        {% else %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}";
    for source in [or, no] {
        let template = ChatTemplate::new(source, None, None).unwrap();
        let style = template.tool_style();
        assert!(style.shows_calls && !style.takes_both, "{style:?}");
        let (messages, _) = style.adapt(json!([user, both]), None);
        let text = template.render(&messages, None, true, &Map::new()).unwrap();
        assert!(text.starts_with("<user>u<assistant>Wait.<assistant>[{"), "{text}");
    }
    let and = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}\
        {{ m.tool_calls | tojson }}{% endif %}{% endfor %}";
    let style = ChatTemplate::new(and, None, None).unwrap().tool_style();
    assert!(style.takes_both);
    assert_eq!(style.adapt(json!([user, both]), None).0, json!([user, both]));
}
