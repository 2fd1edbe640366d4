//! How a template treats messages and tools, and conversations in the form that it takes.

use super::*;
use hearth::text::CallFormat;

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
        let style = template.with_clock(clock()).style();
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
    let style = ChatTemplate::new(source, None, None).unwrap().style();
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
    let style = template.style();
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
    let style = ChatTemplate::new(plain, None, None).unwrap().style();
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
    let style = template.style();
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
        let style = template.style();
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
    let prints = "{{ tools | tojson if tools }}\
        {% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}\
        {{ m.tool_calls | tojson }}{% endif %}{% endfor %}";
    for (source, takes_null) in [
        (prints.replace("m.content }", "m.content if m.content else '' }"), true),
        (prints.replace("m.content }", "'None' if m.content is none else m.content }"), false),
        (prints.replace("{{ m.content", "{{ '' if 'x' in m.content else m.content"), false),
    ] {
        let style = ChatTemplate::new(&source, None, None).unwrap().style();
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
    let or = "{{ tools | tojson if tools }}\
        {% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}\
        {{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let no = "{{ tools | tojson if tools }}\
        {% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}\
        {% else %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}";
    for source in [or, no] {
        let template = ChatTemplate::new(source, None, None).unwrap();
        let style = template.style();
        assert!(style.shows_calls && !style.takes_both, "{style:?}");
        let (messages, _) = style.adapt(json!([user, both]), None);
        let text = template.render(&messages, None, true, &Map::new()).unwrap();
        assert!(text.starts_with("<user>u<assistant>Wait.<assistant>[{"), "{text}");
    }
    let and = "{{ tools | tojson if tools }}\
        {% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}\
        {{ m.tool_calls | tojson }}{% endif %}{% endfor %}";
    let style = ChatTemplate::new(and, None, None).unwrap().style();
    assert!(style.takes_both);
    assert_eq!(style.adapt(json!([user, both]), None).0, json!([user, both]));
}

/// A call, its id and name; the city is that of the call alone.
fn called(id: &str, name: &str) -> Value {
    let arguments = json!({"city": format!("city of {name}")}).to_string();
    json!({"id": id, "type": "function",
           "function": {"name": name, "arguments": arguments}})
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// Words that must be in the text, whatever a template does with them: of system messages, and of
/// turns and results, in their order.
fn words_of(messages: &[Value]) -> [Vec<String>; 2] {
    let mut words = [Vec::new(), Vec::new()];
    for message in messages {
        let of_turns = message["role"] != "system";
        let text = message["content"].as_str().filter(|text| !text.is_empty());
        let calls = message["tool_calls"].as_array().into_iter().flatten();
        let cities =
            calls.map(|call| format!("city of {}", call["function"]["name"].as_str().unwrap()));
        words[usize::from(of_turns)].extend(text.map(str::to_owned).into_iter().chain(cities));
    }
    words
}

/// One call to a message (Llama 3): two are two messages, each with its result behind it.
#[test]
fn calls_come_one_by_one_where_there_is_one_to_a_message() {
    let source = "{{ tools | tojson if tools }}\
        {% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% if m.tool_calls %}\
        {% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}\
        {{ m.tool_calls[0].function | tojson }}{% endif %}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let style = template.style();
    assert!(style.shows_calls && !style.takes_two_calls, "{style:?}");
    let mut talk = json!({"role": "assistant", "content": "Wait.",
                          "tool_calls": [called("a", "f"), called("b", "g")]});
    let result =
        |id: &str, text: &str| json!({"role": "tool", "tool_call_id": id, "content": text});
    let messages =
        json!([said("user", "u"), talk, result("b", "2"), result("a", "1"), result("c", "3")]);
    let (messages, _) = style.adapt(messages, None);
    let text = template.render(&messages, None, true, &Map::new()).unwrap();
    let call =
        |name| format!("{{\"name\": \"{name}\", \"arguments\": {{\"city\": \"city of {name}\"}}}}");
    let expected = format!(
        "<user>u<assistant>Wait.{}<tool>1<assistant>{}<tool>2<tool>3",
        call("f"),
        call("g"),
    );
    assert_eq!(text, expected);
    talk["tool_calls"] = json!([called("a", "f")]);
    let one = json!([said("user", "u"), talk]);
    let (kept, _) = style.adapt(one, None);
    assert_eq!(kept.as_array().unwrap().len(), 2);
}

/// Ids that are not there, or there twice, name no call twice; thoughts are not said again.
#[test]
fn results_go_to_calls_one_each() {
    let source = "{{ tools | tojson if tools }}\
        {% for m in messages %}<{{ m.role }}>\
        {{ m.reasoning_content }}{{ m.content or '' }}{% if m.tool_calls %}\
        {% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}\
        {{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}\
        {% endif %}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let style = template.style();
    assert!(style.shows_calls && !style.takes_two_calls, "{style:?}");
    for ids in [["x", "x"], ["", ""], ["a", "b"]] {
        let calls = json!([called(ids[0], "f"), called(ids[1], "g")]);
        let talk = json!({"role": "assistant", "content": null, "tool_calls": calls,
                          "reasoning_content": "thought"});
        let results = ["1", "2", "3"].map(|text| {
            json!({"role": "tool", "content": text,
                   "tool_call_id": ids[text.parse::<usize>().unwrap() % 2]})
        });
        let list = [&[said("user", "u"), talk][..], &results].concat();
        let (messages, _) = style.adapt(Value::from(list), None);
        let text = template.render(&messages, None, true, &Map::new()).unwrap();
        let [f, g] = ["f", "g"].map(|name| format!("{name}{{\"city\": \"city of {name}\"}}"));
        let swapped = ids == ["a", "b"];
        let [first, second] = if swapped { [2, 1] } else { [1, 2] };
        let expected =
            format!("<user>u<assistant>thought{f}<tool>{first}<assistant>{g}<tool>{second}<tool>3");
        assert_eq!(text, expected);
    }
}

/// The last system message stands for all (DeepSeek's distillations): what came before is not lost.
#[test]
fn a_system_message_that_would_replace_another_does_not() {
    let source = "{% set ns = namespace(system='') %}{% for m in messages %}\
        {% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}\
        {{ ns.system }}{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\
        {% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let style = template.style();
    assert!(style.takes_system && !style.two_systems && !style.late_system, "{style:?}");
    let render = |messages: Value| {
        let (messages, _) = style.adapt(messages, None);
        template.render(&messages, None, true, &Map::new()).unwrap()
    };
    let (a, b) = (said("system", "A"), said("system", "B"));
    assert_eq!(render(json!([a, b, said("user", "u")])), "A\n\nB<user>u");
    let late = json!([a, said("user", "u"), said("assistant", "v"), b, said("user", "w")]);
    assert_eq!(render(late), "A<user>u<assistant>v<user>B\n\nw");
}

/// A conversation that begins with a greeting has an empty question before it, where roles are
/// counted.
#[test]
fn the_assistant_may_begin() {
    let source = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('in turns') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let style = template.style();
    assert!(style.alternates && !style.takes_greeting, "{style:?}");
    let greeting = json!([said("assistant", "Hello!"), said("user", "Hi.")]);
    let (messages, _) = style.adapt(greeting.clone(), None);
    let text = template.render(&messages, None, true, &Map::new()).unwrap();
    assert_eq!(text, "<user><assistant>Hello!<user>Hi.");
    let plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    let style = ChatTemplate::new(plain, None, None).unwrap().style();
    assert!(style.takes_greeting);
    assert_eq!(style.adapt(greeting.clone(), None).0, greeting);
}

/// A call whose words are `null` is read in the middle of a conversation (QwQ cuts thoughts out of
/// these), and one whose words are empty is shown (DeepSeek's distillations show one or the other).
#[test]
fn no_words_are_what_the_template_reads() {
    let split = "{{ tools | tojson if tools }}\
        {% for m in messages %}{% if m.role == 'assistant' and not loop.last %}\
        {% set content = m.content.split('x')[-1] %}{% else %}{% set content = m.content %}\
        {% endif %}<{{ m.role }}>{{ content }}{{ m.tool_calls | tojson if m.tool_calls }}\
        {% endfor %}";
    let or = "{{ tools | tojson if tools }}\
        {% for m in messages %}<{{ m.role }}>{% if m.content is none %}\
        {{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    for (source, takes) in [(split, [false, true]), (or, [true, false])] {
        let template = ChatTemplate::new(source, None, None).unwrap();
        let style = template.style();
        assert_eq!([style.takes_null, style.takes_empty], takes, "{source}");
        for words in [Value::Null, json!("")] {
            let call = json!({"role": "assistant", "content": words,
                              "tool_calls": [called("a", "f")]});
            let result = json!({"role": "tool", "tool_call_id": "a", "content": "1"});
            let (messages, _) = style.adapt(json!([said("user", "u"), call, result]), None);
            let text = template.render(&messages, None, true, &Map::new()).unwrap();
            assert!(text.contains("city of f") && text.ends_with("<tool>1"), "{text}");
        }
    }
}

/// Conversations that a client may have.
fn talks() -> Vec<Vec<Value>> {
    let call = |words: Value, calls: &[Value]| {
        json!({"role": "assistant", "content": words,
               "tool_calls": calls})
    };
    let (one, two) = (called("call_abcdef123", "tool-one"), called("call_abcdef456", "tool-two"));
    let result = |call: &Value, text: &str| {
        json!({"role": "tool", "content": text,
               "tool_call_id": call["id"]})
    };
    let user = |n: &str| said("user", &format!("question-{n}"));
    let (answer, system) = (said("assistant", "answer-one"), said("system", "system-one"));
    let [first, second] = [result(&one, "result-one"), result(&two, "result-two")];
    let calls = [one.clone(), two.clone()];
    let (a, b) = (user("one"), user("two"));
    let late = said("system", "system-late");
    vec![
        vec![system.clone(), a.clone(), answer.clone(), b.clone()],
        vec![a.clone(), b.clone()],
        vec![system.clone(), late.clone(), a.clone()],
        vec![system.clone(), a.clone(), answer.clone(), late, b.clone()],
        vec![answer.clone(), a.clone()],
        vec![system.clone(), answer.clone(), a.clone()],
        vec![a.clone(), call(Value::Null, &calls[..1]), first.clone()],
        vec![a.clone(), call(json!(""), &calls[..1]), first.clone(), answer.clone(), b.clone()],
        vec![a.clone(), call(Value::Null, &calls), first.clone(), second.clone()],
        vec![
            a.clone(),
            call(Value::Null, &calls),
            second.clone(),
            first.clone(),
            answer,
            b.clone(),
        ],
        vec![a.clone(), call(json!("words-one"), &calls[..1]), first.clone(), b.clone()],
        vec![
            system.clone(),
            a.clone(),
            said("assistant", "words-before"),
            call(Value::Null, &calls[..1]),
            first.clone(),
            said("assistant", "answer-one"),
            b.clone(),
        ],
        vec![a.clone(), system.clone(), said("assistant", "answer-one"), b.clone()],
        vec![system, call(Value::Null, &calls[..1]), first, a, said("assistant", "x-one"), b],
    ]
}

/// In every real template: none is refused, of none a word is lost, and what was said stays in its
/// order.
#[test]
fn real_templates_take_every_conversation() {
    let Some(folder) = shared("chat-templates/templates") else { return };
    let tool = |name: &str| {
        let city = json!({"type": "string", "description": "Which."});
        json!({"type": "function", "function": {"name": name, "description": "It.",
               "parameters": {"type": "object", "properties": {"city": city}}}})
    };
    let tools = json!([tool("tool-one"), tool("tool-two")]);
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|ending| ending == "jinja"));
    names.sort();
    assert!(names.len() > 10, "{} templates", names.len());
    let mut wrong = Vec::new();
    for path in names {
        let name = path.file_stem().unwrap().to_string_lossy().to_lowercase();
        let source = std::fs::read_to_string(&path).unwrap();
        let template = ChatTemplate::new(&source, Some("<s>"), Some("</s>")).unwrap();
        let template = template.with_clock(clock());
        let asked = json!([said("user", "u")]);
        let takes = |tools| template.render(&asked, tools, true, &Map::new()).is_ok();
        for talk in &talks() {
            let calls = talk.iter().any(|message| message.get("tool_calls").is_some());
            for tools in [None, Some(&tools)] {
                // One that refuses a question has other reasons.
                if takes(tools) && !(calls && tools.is_none()) {
                    wrong.extend(what_is_wrong(&template, &name, talk, tools));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What a template does with a conversation that it should not.
fn what_is_wrong(
    template: &ChatTemplate,
    name: &str,
    talk: &[Value],
    tools: Option<&Value>,
) -> Option<String> {
    let (messages, tools) = template.style().adapt(Value::from(talk), tools.cloned());
    let text = match template.render(&messages, tools.as_ref(), true, &Map::new()) {
        Err(error) => return Some(format!("{name}: {error}: {messages}")),
        Ok(text) => text,
    };
    // Mistral's write words or calls of a message and not both.
    let known = |word: &String| name.starts_with("mistral") && word == "words-one";
    let [of_systems, of_turns] = words_of(talk);
    let of_turns: Vec<String> = of_turns.into_iter().filter(|word| !known(word)).collect();
    let lost: Vec<&String> =
        of_systems.iter().chain(&of_turns).filter(|word| !text.contains(*word)).collect();
    if !lost.is_empty() {
        return Some(format!("{name}: lost {lost:?}: {messages}"));
    }
    // Words beside a call may stand behind it, and one call to a message moves results.
    let one =
        talk.iter().all(|message| message["tool_calls"].as_array().is_none_or(|c| c.len() < 2));
    let ordered = of_turns.iter().filter(|word| *word != "words-one");
    let places: Vec<_> = ordered.map(|word| text.rfind(word)).collect();
    ((one || template.style().takes_two_calls) && !places.is_sorted())
        .then(|| format!("{name}: out of order {of_turns:?}: {text}"))
}
