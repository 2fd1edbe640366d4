//! Marks, ends, efforts, and answers that are held to a form.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::harmony::{Harmony, MARKS};
use super::*;

/// Everything that a template needs to write messages.
pub(super) const TEMPLATE: &str = "{% for m in messages %}<|start|>{{ m.role }}\
    {{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}\
    {{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}\
    {% if add_generation_prompt %}<|start|>assistant{% endif %}";

/// Bytes as byte-level vocabularies spell them, and these special tokens behind them.
pub(super) fn tokenizer(special: &[&str]) -> Tokenizer {
    let mut spare = 256..;
    let letter = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => spare.next().and_then(char::from_u32).unwrap(),
    };
    let mut tokens: Vec<String> = (0..=255).map(letter).map(String::from).collect();
    let mut token_types = vec![1; 256];
    tokens.extend(special.iter().map(|token| (*token).to_owned()));
    token_types.resize(tokens.len(), 3);
    Tokenizer::from_gguf(&GgufVocab {
        model: "gpt2".into(),
        pre: Some("gpt-4o".into()),
        merges: Some(Vec::new()),
        token_types: Some(token_types),
        tokens,
        eos: Some(256),
        ..GgufVocab::default()
    })
    .unwrap()
}

/// The first one is the end that the file names.
const SPECIAL: [&str; 9] = [
    "<|return|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|constrain|>",
    "<|call|>",
    "<|endoftext|>",
    "<|reserved|>",
];

pub(super) fn speaker() -> (Tokenizer, Harmony) {
    let tokenizer = tokenizer(&SPECIAL);
    let template = ChatTemplate::new(TEMPLATE, None, None).unwrap();
    let harmony = Harmony::of(&template, &tokenizer).unwrap();
    (tokenizer, harmony)
}

#[test]
fn a_template_and_its_tokens_tell_the_format() {
    let of = |template: &str, special: &[&str]| {
        let template = ChatTemplate::new(template, None, None).unwrap();
        Harmony::of(&template, &tokenizer(special))
    };
    assert!(of(TEMPLATE, &SPECIAL).is_some());
    // Without a token for one of the marks, or with none of the words for them.
    for mark in ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"] {
        let special = SPECIAL.map(|other| if other == mark { "<|other|>" } else { other });
        assert_eq!(of(TEMPLATE, &special), None, "{mark}");
        assert_eq!(of(&TEMPLATE.replace(mark, "<|other|>"), &SPECIAL), None, "{mark}");
    }
    // A file may call the marks tokens of its user, or of its text.
    let mut tokens: Vec<String> = MARKS.map(str::to_owned).to_vec();
    tokens.push("a".to_owned());
    let vocab = GgufVocab {
        model: "gpt2".into(),
        token_types: Some(vec![4, 1, 4, 1, 4, 1, 4, 1]),
        tokens,
        merges: Some(Vec::new()),
        ..GgufVocab::default()
    };
    let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
    assert!((0..7).all(|id| tokenizer.is_special(id)) && !tokenizer.is_special(7));
    let template = ChatTemplate::new(TEMPLATE, None, None).unwrap();
    assert!(Harmony::of(&template, &tokenizer).is_some());
    // Where one of them is missing the others are what the file says, but for ends.
    let mut other = vocab.clone();
    other.tokens[0] = "<|begin|>".to_owned();
    let tokenizer = Tokenizer::from_gguf(&other).unwrap();
    let special: Vec<u32> = (0..8).filter(|&id| tokenizer.is_special(id)).collect();
    let ends = ["<|end|>", "<|return|>"].map(|end| tokenizer.id_of(end).unwrap());
    assert_eq!(special, ends);
}

#[test]
fn an_answer_ends_with_a_call_and_not_with_a_thought() {
    let (tokenizer, harmony) = speaker();
    let id = |token: &str| tokenizer.id_of(token).unwrap();
    let mut ends = vec![id("<|return|>"), id("<|end|>")];
    harmony.mend_ends(&mut ends);
    ends.sort_unstable();
    ends.dedup();
    let mut expected = ["<|return|>", "<|call|>", "<|endoftext|>"].map(id);
    expected.sort_unstable();
    assert_eq!(ends, expected);
}

#[test]
fn efforts_are_those_that_the_model_knows() {
    let (_, harmony) = speaker();
    let settled = |kwargs: Value| {
        let mut kwargs: Map<String, Value> = kwargs.as_object().unwrap().clone();
        harmony.settle_effort(&mut kwargs).unwrap();
        kwargs.remove("reasoning_effort")
    };
    for (asked, known) in [
        ("none", "low"),
        ("minimal", "low"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("xhigh", "high"),
        ("max", "high"),
        ("as you like", "as you like"),
    ] {
        assert_eq!(settled(json!({"reasoning_effort": asked})), Some(json!(known)));
        let off = json!({"reasoning_effort": asked, "enable_thinking": false});
        assert_eq!(settled(off), Some(json!(known)));
    }
    assert_eq!(settled(json!({"enable_thinking": false})), Some(json!("low")));
    assert_eq!(settled(json!({"enable_thinking": true})), None);
    assert_eq!(settled(json!({})), None);
    assert_eq!(settled(json!({"reasoning_effort": null})), None);
    let off = json!({"reasoning_effort": null, "enable_thinking": false});
    assert_eq!(settled(off), Some(json!("low")));
    for wrong in [json!(3), json!(["low"]), json!(true)] {
        let mut kwargs = Map::from_iter([("reasoning_effort".to_owned(), wrong)]);
        assert!(harmony.settle_effort(&mut kwargs).is_err(), "{kwargs:?}");
    }
}

fn call(name: &str) -> CallRule {
    let schema = json!({"type": "object", "properties": {"a": {"enum": [1, 2]}},
                        "required": ["a"], "additionalProperties": false});
    CallRule { name: name.to_owned(), arguments: Shape::Json { schema, lenient: false } }
}

/// How far an answer keeps to rules: `None` where it leaves them, else whether it may end.
fn keeps(tools: &[&str], must_call: bool, words: Option<Shape>, text: &str) -> Option<bool> {
    let (tokenizer, harmony) = speaker();
    let ends = ["<|return|>", "<|call|>", "<|endoftext|>"].map(|t| tokenizer.id_of(t).unwrap());
    let vocabulary = Vocabulary::new(&tokenizer, tokenizer.vocab_len(), &ends).unwrap();
    let tools: Vec<CallRule> = tools.iter().map(|name| call(name)).collect();
    let rules = harmony.rules(&tools, must_call, words, &vocabulary);
    let grammar = vocabulary.compile(rules).unwrap();
    let mut follower = Follower::new(Arc::new(grammar), Arc::new(Opening::default()));
    let allows = |next: &Next, id: u32| match next {
        Next::Any => true,
        Next::Only(words) => words[id as usize / 32] >> (id % 32) & 1 == 1,
        Next::End | Next::Failed(_) => false,
    };
    for id in tokenizer.encode(text, Special::PARSE).unwrap() {
        if !allows(&follower.allowed(), id) {
            return None;
        }
        follower.push(id);
    }
    let next = follower.allowed();
    Some(next == Next::End || ends.iter().any(|&end| allows(&next, end)))
}

const THOUGHT: &str = "<|channel|>analysis<|message|>hm, 天<br>\n<|end|><|start|>assistant";
const PREAMBLE: &str = "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant";
const CALLS: [&str; 5] = [
    "<|channel|>commentary to=functions.foo <|constrain|>json<|message|>{\"a\": 1}",
    "<|channel|>commentary to=functions.foo<|constrain|>json<|message|>{\"a\": 1}",
    "<|channel|>commentary to=functions.foo<|message|>{\"a\":2}",
    " to=functions.foo<|channel|>commentary json<|message|>{\"a\": 2}",
    " to=functions.fo<|channel|>commentary <|constrain|>json<|message|>{\"a\": 1}",
];

#[test]
fn a_call_has_its_head_and_its_arguments() {
    for must_call in [false, true] {
        let keeps = |text: &str| keeps(&["fo", "foo"], must_call, None, text);
        for call in CALLS {
            for before in ["", THOUGHT, &THOUGHT.repeat(2)] {
                assert_eq!(keeps(&[before, call].concat()), Some(true), "{before}{call}");
            }
            assert_eq!(keeps(&call[..call.len() - 1]), Some(false));
            assert_eq!(keeps(&call.replace("foo", "bar").replace("fo<", "x<")), None, "{call}");
            assert_eq!(keeps(&call.replace("\"a\"", "\"b\"")), None, "{call}");
            assert_eq!(keeps(&call.replace("functions.", "")), None, "{call}");
        }
        assert_eq!(keeps("<|channel|>analysis to=python"), None);
        assert_eq!(keeps(" to=browser"), None);
        // Words are not for those who insist on a call.
        let spoken = if must_call { None } else { Some(true) };
        assert_eq!(keeps("<|channel|>final<|message|>Well, {no}"), spoken);
        assert_eq!(keeps(&[PREAMBLE, CALLS[0]].concat()), spoken);
        assert_eq!(keeps(THOUGHT), Some(false));
        assert_eq!(keeps("<|channel|>summary"), None);
        assert_eq!(keeps("Hello"), None);
    }
}

/// Models have habits that their own format does not.
#[test]
fn heads_that_models_write_are_permitted() {
    let arguments = "<|message|>{\"a\": 1}";
    let (commentary, to) = ("<|channel|>commentary", " to=functions.foo");
    for head in [
        // Calls on another channel.
        format!("<|channel|>analysis{to} code"),
        format!("{to}<|channel|>analysis code"),
        format!("{to}<|channel|>analysis"),
        // Any kind.
        format!("{commentary}{to} code"),
        format!("{commentary}{to} <|constrain|>python-3_x"),
        format!("{to}{commentary}<|constrain|>text"),
    ] {
        let text = [&head, arguments].concat();
        assert_eq!(keeps(&["foo"], true, None, &text), Some(true), "{head}");
        let two = text.replace(arguments, &format!(" or{arguments}"));
        assert_eq!(keeps(&["foo"], true, None, &two), None, "{two}");
    }
    let shape = || Some(Shape::Choice(vec!["yes".into()]));
    for kind in ["", " json", " <|constrain|>json", "<|constrain|>json"] {
        let text = format!("<|channel|>final{kind}<|message|>yes");
        assert_eq!(keeps(&[], false, shape(), &text), Some(true), "{kind}");
        assert_eq!(keeps(&["foo"], false, None, &text), Some(true), "{kind}");
    }
    // Another channel before the one that counts.
    for stray in [commentary, "<|channel|>commentary to=assistant"] {
        for tools in [&[][..], &["foo"]] {
            let keeps = |text: String| keeps(tools, false, shape(), &text);
            assert_eq!(keeps(format!("{stray}<|channel|>final<|message|>yes")), Some(true));
            let thought = [stray, THOUGHT].concat();
            let text = format!("{thought}{stray}<|channel|>final<|message|>yes");
            assert_eq!(keeps(text), Some(true));
            assert_eq!(keeps(format!("{stray}<|message|>")), None);
            assert_eq!(keeps(format!("{stray}{stray}")), None);
        }
    }
}

#[test]
fn words_of_a_form_come_behind_a_thought_or_at_once() {
    let shape = || Some(Shape::Choice(vec!["yes".into(), "no".into()]));
    for tools in [&[][..], &["foo"]] {
        let keeps = |text: &str| keeps(tools, false, shape(), text);
        for before in ["", THOUGHT, &THOUGHT.repeat(2)] {
            let text = |words: &str| format!("{before}<|channel|>final<|message|>{words}");
            assert_eq!(keeps(&text("yes")), Some(true));
            assert_eq!(keeps(&text("ye")), Some(false));
            assert_eq!(keeps(&text("yes, but")), None);
        }
        // What comes before them would not be of the form.
        assert_eq!(keeps(PREAMBLE), None);
        let called = if tools.is_empty() { None } else { Some(true) };
        assert_eq!(keeps(CALLS[0]), called);
    }
    // A form that fits no text at once.
    let any = keeps(&[], false, Some(Shape::Regex("a*".into())), "<|channel|>final<|message|>");
    assert_eq!(any, Some(true));
}

/// A mark that is spelled in ordinary tokens is text, in thoughts and in words.
#[test]
fn marks_that_are_spelled_end_nothing() {
    let (tokenizer, harmony) = speaker();
    let ends = [tokenizer.id_of("<|return|>").unwrap()];
    let vocabulary = Vocabulary::new(&tokenizer, tokenizer.vocab_len(), &ends).unwrap();
    let rules = harmony.rules(&[call("foo")], true, None, &vocabulary);
    let grammar = Arc::new(vocabulary.compile(rules).unwrap());
    let mut follower = Follower::new(grammar, Arc::new(Opening::default()));
    let mut push = |text: &str, special: Special| {
        for id in tokenizer.encode(text, special).unwrap() {
            let Next::Only(words) = follower.allowed() else { panic!("{text}") };
            assert!(words[id as usize / 32] >> (id % 32) & 1 == 1, "{text}: {id}");
            follower.push(id);
        }
    };
    push("<|channel|>analysis<|message|>I write ", Special::PARSE);
    push("<|end|><|start|>assistant to=functions.foo<|channel|>", Special::NONE);
    push(" and go on<|end|><|start|>assistant<|channel|>commentary to=", Special::PARSE);
}
