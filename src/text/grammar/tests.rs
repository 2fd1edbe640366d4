//! What may come next, held against what should.

use serde_json::json;

use super::*;
use crate::text::Special;

/// Tokens: the 256 bytes, some words, and the special ones.
const WORDS: [&str; 8] = ["{\"", "\":", "true", "false", " a", "ok<", "tool", "call>{"];
const SPECIAL: [&str; 3] = ["<|end|>", "<think>", "</think>"];

/// GPT-2's letter of a byte.
fn letter(byte: u8) -> char {
    let plain = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match plain(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|&b| !plain(b)).count() as u32;
            char::from_u32(0x100 + before).unwrap()
        }
    }
}

fn tokenizer() -> Tokenizer {
    let mut vocab: Vec<String> = (0..=255).map(|b| letter(b).to_string()).collect();
    vocab.extend(WORDS.iter().map(|w| w.bytes().map(letter).collect()));
    let ids: serde_json::Map<_, _> =
        vocab.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let added: Vec<_> = (SPECIAL.iter().enumerate())
        .map(|(i, token)| {
            json!({"id": vocab.len() + i, "content": token, "special": i == 0, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false})
        })
        .collect();
    let json = json!({
        "version": "1.0", "added_tokens": added,
        "model": {"type": "BPE", "vocab": ids, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                          "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                    "use_regex": false},
    });
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

fn vocabulary() -> Vocabulary {
    let tokenizer = tokenizer();
    let end = tokenizer.id_of(SPECIAL[0]).unwrap();
    Vocabulary::new(&tokenizer, tokenizer.vocab_len(), &[end]).unwrap()
}

fn follower(rules: Rules, opening: Opening) -> Follower {
    Follower::new(Arc::new(vocabulary().compile(rules).unwrap()), Arc::new(opening))
}

fn allows(next: &Next, id: u32) -> bool {
    match next {
        Next::Any => true,
        Next::Only(words) => words[id as usize / 32] >> (id % 32) & 1 == 1,
        Next::End | Next::Failed(_) => false,
    }
}

/// Feeds tokens of a text; says whether the grammar let all of them pass, and what is next.
fn walk(follower: &mut Follower, text: &str) -> Option<Next> {
    let ids = tokenizer().encode(text, Special::PARSE).unwrap();
    for id in ids {
        if !allows(&follower.allowed(), id) {
            return None;
        }
        follower.push(id);
    }
    Some(follower.allowed())
}

/// The text is accepted as a whole answer.
fn accepts(shape: &Shape, text: &str) -> bool {
    let end = tokenizer().id_of(SPECIAL[0]).unwrap();
    let next = walk(&mut follower(Rules::of(shape.clone()), Opening::default()), text);
    next.is_some_and(|next| next == Next::End || allows(&next, end))
}

fn schema(schema: Value) -> Shape {
    Shape::Json { schema, lenient: false }
}

#[test]
fn a_schema_lets_its_instances_pass_and_nothing_else() {
    let shape = schema(json!({
        "type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", 5]}},
        "required": ["a"], "additionalProperties": false,
    }));
    for good in
        [r#"{"a":true}"#, r#"{"a": false, "b": 5}"#, "{\n    \"a\": true,\n    \"b\": \"x\"\n}"]
    {
        assert!(accepts(&shape, good), "{good}");
    }
    let wide = format!("{{\"a\":{}true}}", " ".repeat(3));
    for bad in [r#"{"a":1}"#, r#"{"b":5}"#, r#"{"a":true,"c":1}"#, r#"{"a":true"#, "x", "", &wide] {
        assert!(!accepts(&shape, bad), "{bad}");
    }
}

#[test]
fn every_shape_is_enforced() {
    assert!(accepts(&Shape::object(), r#"{"any": [1, {"x": null}]}"#));
    assert!(!accepts(&Shape::object(), "[1]"));
    assert!(accepts(&schema(json!(true)), "[1]"));
    let regex = Shape::Regex(r"[a-c]{2}\d".into());
    assert!(accepts(&regex, "ab7") && !accepts(&regex, "abc"));
    let choice = Shape::Choice(vec!["yes".into(), "no\"\n\u{7f}天".into()]);
    assert!(accepts(&choice, "yes") && accepts(&choice, "no\"\n\u{7f}天"));
    assert!(!accepts(&choice, "ye"));
    let lark = Shape::grammar("start: item (\",\" item)*\nitem: /[0-9]+/").unwrap();
    assert!(accepts(&lark, "1,22,3") && !accepts(&lark, "1,"));
}

#[test]
fn gbnf_is_lark_in_other_letters() {
    let grammar = Shape::grammar(concat!(
        "# a sum\n",
        "root  ::= number-1 (op Number_1)+ # at least one\n",
        "number-1 ::= [0-9]{1,3} | \"\\x78\"\n",
        "Number_1 ::= number-1 |\n",
        "   \"::=\"\n",
        "op ::= [-+*/] | \" \" [^\\]a-z] .",
    ))
    .unwrap();
    for good in ["1+2", "123/x-::=", "x A\n1"] {
        assert!(accepts(&grammar, good), "{good}");
    }
    for bad in ["1", "1234+1", "1+", "x ]x7", "x aA1"] {
        assert!(!accepts(&grammar, bad), "{bad}");
    }
    for (bad, why) in [
        ("x ::= \"a\"", "root"),
        ("root ::= \"a", "line 1: a text has no closing quote"),
        ("root ::= [a", "line 1"),
        ("root ::= a)", "line 1"),
        ("hello\nroot ::= \"a\"", "line 1"),
    ] {
        let error = Shape::grammar(bad).unwrap_err();
        assert!(error.contains(why), "{bad}: {error}");
    }
}

#[test]
fn what_cannot_be_enforced_is_named() {
    let refused = |shape: Shape| match vocabulary().compile(Rules::of(shape)) {
        Err(TextError::Grammar(why)) => why,
        other => panic!("{other:?}"),
    };
    let unique = json!({"type": "array", "uniqueItems": true, "contains": {"type": "null"}});
    assert!(refused(schema(unique.clone())).contains("uniqueItems"));
    assert!(vocabulary().compile(Rules::of(Shape::Json { schema: unique, lenient: true })).is_ok());
    assert!(refused(schema(json!({"type": "banana"}))).contains("banana"));
    assert!(refused(schema(json!({"$ref": "#/$defs/no"}))).contains("no"));
    assert!(refused(schema(json!(false))).contains("nsatisfiable"));
    refused(Shape::Regex("(".into()));
    refused(Shape::Lark("start: missing".into()));
    assert!(refused(Shape::Lark("start: start".into())).contains("no text"));
}

#[test]
fn an_answer_may_think_first_and_then_keeps_to_its_form() {
    let opening = |begun| Opening {
        thinking: Some(Thinking { open: SPECIAL[1].into(), close: SPECIAL[2].into(), begun }),
        triggers: Vec::new(),
    };
    let rules = || Rules::of(Shape::Choice(vec!["yes".into(), "no".into()]));
    for text in ["<think>hm</think>yes", "<think>yes{</think>no", "yes"] {
        assert_eq!(walk(&mut follower(rules(), opening(false)), text), Some(Next::End), "{text}");
    }
    assert_eq!(walk(&mut follower(rules(), opening(true)), "hm</think>no"), Some(Next::End));
    for text in ["hm", "<think>hm</think>hm"] {
        assert_eq!(walk(&mut follower(rules(), opening(false)), text), None, "{text}");
    }
}

#[test]
fn free_text_comes_under_the_rules_at_a_trigger() {
    let trigger = |at_start| Opening {
        thinking: None,
        triggers: vec![Trigger { text: "<toolcall>".into(), at_start }],
    };
    let rules = || Rules {
        lark: "start: \"<toolcall>\" @body".into(),
        parts: vec![("body".into(), Shape::object())],
    };
    // The trigger shares tokens with the text before it and the body after it: "ok<", "call>{".
    for text in ["no call at all", "ok<toolcall>{}", "<toolcall>{\"a\":true}", "< <toolcall>{}"] {
        let mut follower = follower(rules(), trigger(false));
        let next = walk(&mut follower, text).unwrap_or_else(|| panic!("{text}"));
        assert_eq!(next == Next::End, text.ends_with('}'), "{text}");
    }
    assert_eq!(walk(&mut follower(rules(), trigger(false)), "ok<toolcall>[1]"), None);
    // Too late, so it is text.
    assert_eq!(walk(&mut follower(rules(), trigger(true)), "ok<toolcall>[1]"), Some(Next::Any));
    assert_eq!(walk(&mut follower(rules(), trigger(true)), " <toolcall>{}"), Some(Next::End));
}
