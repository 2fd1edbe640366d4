//! Messages of an answer, however it is cut and whatever is wrong with it.

use super::tests::{join, short};
use super::{HarmonyParser, OutputParser, Piece};
use crate::text::harmony_tests::speaker;
use crate::text::{Special, Tokenizer};

/// A part of an answer: text in ordinary tokens, or a mark.
#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(String),
    Mark(u32),
}

/// Letters between marks. What stands in `«»` is spelled in ordinary tokens, `<|...|>` without.
fn parts(tokenizer: &Tokenizer, text: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut spelled = false;
    for piece in text.split_inclusive(['«', '»']) {
        let special = if spelled { Special::NONE } else { Special::PARSE };
        spelled = piece.ends_with('«');
        let piece = piece.trim_end_matches(['«', '»']);
        let mut bytes = Vec::new();
        for id in tokenizer.encode(piece, special).unwrap() {
            if tokenizer.is_special(id) {
                parts.push(Part::Text(String::from_utf8(std::mem::take(&mut bytes)).unwrap()));
                parts.push(Part::Mark(id));
            } else {
                bytes.extend(tokenizer.token_bytes(id).unwrap());
            }
        }
        parts.push(Part::Text(String::from_utf8(bytes).unwrap()));
    }
    parts.retain(|part| !matches!(part, Part::Text(text) if text.is_empty()));
    parts
}

fn parser() -> HarmonyParser {
    HarmonyParser::new(speaker().1, vec!["f".to_owned(), "get_weather".to_owned()])
}

fn parse(parts: &[Part], cut: bool) -> Vec<Piece> {
    let mut parser = parser();
    let mut out = Vec::new();
    for part in parts {
        match part {
            Part::Text(text) => parser.push(text, &mut out),
            // Other special tokens are not in the text.
            Part::Mark(id) if parser.is_mark(*id) => parser.mark(*id, &mut out),
            Part::Mark(_) => {}
        }
    }
    parser.finish(cut, &mut out);
    join(out)
}

/// An answer, and what it means: thought in `(...)`, a call as `name!arguments.`.
const CASES: &[(&str, &str)] = &[
    ("", ""),
    (
        "<|channel|>analysis<|message|>The user\nasks.<|end|><|start|>assistant\
         <|channel|>final<|message|>Hi 天!<|return|>",
        "(The user\nasks.)Hi 天!",
    ),
    ("<|channel|>final<|message|>At once.", "At once."),
    // Calls, as the model, its template and its mistakes write them.
    (
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>",
        "f!{\"a\": 1}.",
    ),
    ("<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>", "f!{}."),
    (" to=functions.f<|channel|>commentary json<|message|>{\"a\": [1]}<|call|>", "f!{\"a\": [1]}."),
    (
        "<|channel|>analysis<|message|>Call.<|end|><|start|>assistant to=functions.get_weather\
         <|channel|>commentary <|constrain|>json<|message|>{\"city\": \"Rio }\"}<|call|>",
        "(Call.)get_weather!{\"city\": \"Rio }\"}.",
    ),
    ("<|channel|>analysis to=functions.f code<|message|>{}<|call|>", "f!{}."),
    ("<|channel|>commentary to=f<|message|>{}<|call|>", "f!{}."),
    ("<|channel|>commentary to=functions.f json<|message|> <|call|>", "f!{}."),
    ("<|channel|>commentary to=functions.f json<|message|>not json<|call|>", "f!not json."),
    // Its end is not written where a grammar says that it is complete, and only there.
    ("<|channel|>commentary to=functions.f json<|message|>{\"a\": {}}\n", "f!{\"a\": {}}\n."),
    ("<|channel|>commentary to=functions.f json<|message|>{\"a\": {}", "f!{\"a\": {}"),
    (
        "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant<|channel|>\
         commentary to=functions.f json<|message|>{}<|call|>",
        "Let me look.f!{}.",
    ),
    (
        "<|channel|>commentary to=functions.f json<|message|>{}<|end|><|start|>assistant\
         <|channel|>commentary to=functions.f json<|message|>{\"b\": 2}<|call|>",
        "f!{}.f!{\"b\": 2}.",
    ),
    // Messages of one kind are apart from each other.
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b\
         <|end|><|start|>assistant<|channel|>analysis<|message|>c<|end|><|start|>assistant\
         <|channel|>final<|message|>d<|return|>",
        "(a)b(c)d",
    ),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b\
         <|end|><|start|>assistant<|channel|>commentary<|message|>c<|end|><|start|>assistant\
         <|channel|>final<|message|>d<|return|>",
        "(a\n\nb)c\n\nd",
    ),
    // Nobody here answers these.
    ("<|channel|>analysis to=python code<|message|>print(1)<|call|>", "(print(1))"),
    ("<|channel|>commentary to=browser.search<|message|>{\"q\": 1}<|call|>", "({\"q\": 1})"),
    (" to=functions.unknown<|channel|>commentary json<|message|>{}<|call|>", "({})"),
    // What is spelled in ordinary tokens is text.
    (
        "<|channel|>final<|message|>Write «<|channel|>analysis<|message|>» or «<|end|>».<|return|>",
        "Write <|channel|>analysis<|message|> or <|end|>.",
    ),
    ("«<|channel|>final<|message|>Hello»", "<|channel|>final<|message|>Hello"),
    ("<|channel|>analysis<|message|>«<|end|>» is a mark<|end|>", "(<|end|> is a mark)"),
    // Heads that are not as they should be.
    ("Hello there.<|return|>", "Hello there."),
    (" Hello", " Hello"),
    ("t", "t"),
    ("toast", "toast"),
    ("to=", ""),
    (" to=functions.f", ""),
    ("<|message|>Hello<|return|>", "Hello"),
    ("<|end|><|start|>assistant<|message|>Hello<|return|>", "Hello"),
    ("<|end|>Hello<|return|>", "Hello"),
    ("<|end|>assistant<|channel|>final<|message|>Hello", "Hello"),
    ("<|end|><|start|>assistant Hello<|end|>", "Hello"),
    ("<|channel|>summary<|message|>Hello<|return|>", "Hello"),
    ("<|channel|><|message|>Hello<|return|>", "Hello"),
    ("<|channel|>final Hello there<|return|>", "Hello there"),
    ("<|channel|>final\nHello there", "Hello there"),
    ("<|channel|>analysis Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi", "(Hm.)Hi"),
    ("<|channel|>commentary json<|end|>", ""),
    ("<|channel|>summary<|return|>", ""),
    ("<|channel|>commentary to=functions.f json{}<|call|>", ""),
    ("<|channel|>final <|constrain|>json<|message|>{\"a\": 1}<|return|>", "{\"a\": 1}"),
    ("<|channel|>analysis<|channel|>final<|message|>Hi", "Hi"),
    ("<|channel|>commentary to=functions.f<|channel|>commentary<|message|>{}<|call|>", "f!{}."),
    ("<|start|>assistant<|channel|>final<|message|>Hi", "Hi"),
    // Marks in the middle of a text.
    ("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|reserved|>d", "abcd"),
    ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "(a)b"),
    ("<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b", "(a)b"),
    ("<|channel|>final<|message|>a<|end|>", "a"),
    ("<|channel|>final<|message|>a<|end|><|start|>assistant", "a"),
    // The last channel decides, whoever a message was for under the ones before.
    (
        "<|channel|>commentary to=assistant<|channel|>final<|message|>It is 42.<|return|>",
        "It is 42.",
    ),
    ("<|channel|>commentary<|channel|>final<|message|>42", "42"),
    ("<|channel|>commentary to=python<|channel|>final<|message|>42", "42"),
    ("<|channel|>commentary to=assistant<|channel|>analysis<|message|>a<|end|>", "(a)"),
    ("<|channel|>final to=user<|message|>42<|return|>", "42"),
    ("<|channel|>commentary to=all<|message|>42<|return|>", "42"),
    (" to=user<|channel|>final<|message|>42<|return|>", "42"),
    (" to=assistant<|channel|>commentary<|message|>42<|return|>", "42"),
    (" to=python<|channel|>commentary<|channel|>commentary<|message|>1<|call|>", "(1)"),
    ("<|channel|>commentary to=functions.f<|channel|>analysis<|message|>{}<|call|>", "f!{}."),
    ("<|channel|>final to=functions.f<|message|>{}<|call|>", "f!{}."),
    ("<|channel|>commentaryto=functions.f<|message|>{}<|call|>", "f!{}."),
    // The recipient of a call behind the kind of its text.
    ("<|channel|>commentary <|constrain|>json to=functions.f<|message|>{}<|call|>", "f!{}."),
    // What others would say is no answer, and no call.
    (
        "<|channel|>final<|message|>Hi<|end|><|start|>user<|message|>What else?<|end|>\
         <|start|>assistant<|channel|>final<|message|>Much.",
        "Hi(What else?)Much.",
    ),
    (
        "<|end|><|start|>functions.f to=assistant<|channel|>commentary<|message|>{\"sun\": 1}",
        "({\"sun\": 1})",
    ),
    ("<|end|><|start|>functions.x<|channel|>commentary<|message|>{\"sun\": 1}", "({\"sun\": 1})"),
    ("<|end|><|start|>user to=functions.f<|channel|>commentary<|message|>{}<|call|>", "({})"),
    ("<|end|><|start|>python<|channel|>final<|message|>1", "(1)"),
    ("<|end|><|start|>user<|end|>", ""),
    // A channel without its mark.
    ("<|end|>analysis<|message|>secret<|end|>", "(secret)"),
    ("<|end|><|start|>analysis<|message|>secret<|end|>", "(secret)"),
    ("<|end|><|start|>assistantanalysis<|message|>secret<|end|>", "(secret)"),
    ("<|end|><|start|>assistant final<|message|>Hi<|return|>", "Hi"),
    ("<|end|><|start|>analysis secret<|end|>", "(secret)"),
    ("analysis<|message|>secret<|end|>", "(secret)"),
    ("assistantfinal<|message|>Hi", "Hi"),
    ("assistant<|channel|>final<|message|>Hi", "Hi"),
    ("assistant professors", "assistant professors"),
    ("finally", "finally"),
    ("final answer: 42", "final answer: 42"),
    // Text and kinds without the mark between them.
    ("<|channel|>final <|constrain|>json{\"a\": 1}<|return|>", "{\"a\": 1}"),
    ("<|channel|>final json ", ""),
    ("<|channel|>analysis code<|end|>", ""),
    ("<|channel|>final c<|return|>", "c"),
];

#[test]
fn messages_are_thought_words_or_calls() {
    let (tokenizer, _) = speaker();
    for (text, expected) in CASES {
        assert_eq!(short(&parse(&parts(&tokenizer, text), false)), *expected, "{text}");
    }
}

/// Every way to cut each text in two, and letter by letter, means the same.
#[test]
fn how_the_text_is_cut_changes_nothing() {
    let (tokenizer, _) = speaker();
    for (text, _) in CASES {
        let whole = parts(&tokenizer, text);
        for cut in [false, true] {
            let expected = parse(&whole, cut);
            let mut letters = Vec::new();
            for (i, part) in whole.iter().enumerate() {
                let Part::Text(text) = part else {
                    letters.push(part.clone());
                    continue;
                };
                letters.extend(text.chars().map(|c| Part::Text(c.to_string())));
                for (at, _) in text.char_indices() {
                    let (a, b) = text.split_at(at);
                    let both = [a, b].map(|text| Part::Text(text.to_owned()));
                    let split = [&whole[..i], &both, &whole[i + 1..]].concat();
                    assert_eq!(parse(&split, cut), expected, "{a:?} + {b:?} of {whole:?}");
                }
            }
            assert_eq!(parse(&letters, cut), expected, "{whole:?}");
        }
    }
}

/// Of an answer that ends anywhere the client sees a beginning of what it would have seen, and no
/// mark, channel or recipient.
#[test]
fn an_answer_that_is_cut_off_shows_a_beginning() {
    let (tokenizer, _) = speaker();
    let answers = CASES.iter().filter(|(text, _)| text.starts_with("<|channel|>"));
    for (text, _) in answers.take(17) {
        let whole = parts(&tokenizer, text);
        let mut letters = Vec::new();
        for part in &whole {
            match part {
                Part::Text(text) => {
                    letters.extend(text.chars().map(|c| Part::Text(c.to_string())));
                }
                mark => letters.push(mark.clone()),
            }
        }
        let expected = short(&parse(&whole, false));
        for len in 0..letters.len() {
            let seen = short(&parse(&letters[..len], true));
            // In short a thought that goes on has its bracket, and a call its end.
            let seen = seen.strip_suffix([')', '.']).unwrap_or(&seen);
            assert!(expected.starts_with(seen), "{seen:?} of {expected:?}");
        }
    }
    for (text, expected) in [
        ("<|chan", "<|chan"),
        ("b", "b"),
        ("a", ""),
        ("assistant fin", ""),
        (" to=func", ""),
        ("<|channel|>", ""),
        ("<|channel|>fin", ""),
        ("<|channel|>final", ""),
        ("<|channel|>commentary to=functions.f <|constrain|>js", ""),
        ("<|channel|>final Hel", "Hel"),
        ("<|channel|>final<|message|>Hel", "Hel"),
        ("<|channel|>analysis<|message|>Hm", "(Hm)"),
        ("<|channel|>analysis<|message|>Hm<|end|><|start|>assi", "(Hm)"),
        ("<|channel|>commentary to=functions.f json<|message|>", "f!"),
        ("<|channel|>commentary to=functions.f json<|message|>{\"a\": 1", "f!{\"a\": 1"),
        // It is whole, though nothing may follow it.
        ("<|channel|>commentary to=functions.f json<|message|>{\"a\": 1}", "f!{\"a\": 1}."),
        ("<|channel|>commentary to=functions.f json<|message|>{\"a\": 1} ", "f!{\"a\": 1} ."),
        ("<|channel|>commentary to=functions.f json<|message|>not js", "f!not js"),
        ("<|end|><|start|>assistant Hello wor", "Hello wor"),
        ("<|end|>Hello", "Hello"),
        ("<|end|>us", ""),
        ("<|end|><|start|>functions.f", ""),
        ("<|end|>anal", ""),
        ("<|channel|>final <|constrain|>json{\"a\"", "{\"a\""),
        ("<|channel|>commentary <|constrain|>json t", ""),
        ("<|channel|>final cod", ""),
        ("<|channel|>commentary to=functions.f json<|message|>{}<|call|>", "f!{}."),
    ] {
        assert_eq!(short(&parse(&parts(&tokenizer, text), true)), expected, "{text}");
    }
}

/// What never ends is no head.
#[test]
fn a_head_has_a_length() {
    let (tokenizer, _) = speaker();
    let long = "word ".repeat(200);
    for (head, expected) in [
        ("<|channel|>final ", long.as_str()),
        ("<|end|>", &long),
        ("<|channel|>analysis ", &format!("({long})")),
        ("<|channel|>final <|constrain|>", ""),
    ] {
        let mut parser = parser();
        let mut out = Vec::new();
        for part in parts(&tokenizer, head) {
            match part {
                Part::Text(text) => parser.push(&text, &mut out),
                Part::Mark(id) => parser.mark(id, &mut out),
            }
        }
        for word in long.split_inclusive(' ') {
            parser.push(word, &mut out);
        }
        assert!(!parser.reads_head(), "{head}");
        let said = short(&join(std::mem::take(&mut out)));
        match expected.is_empty() {
            true => assert!(long.ends_with(&said) && !said.is_empty()),
            false => assert_eq!(said, expected),
        }
    }
    // What is for somebody is not for the reader, however long its head is.
    let text = format!("<|channel|>commentary to=functions.f {long}<|message|>x<|call|>");
    let said = short(&parse(&parts(&tokenizer, &text), false));
    assert!(said.starts_with('(') && !said.contains("functions"), "{said}");
}

#[test]
fn arguments_and_thoughts_are_told_as_they_come() {
    let (tokenizer, _) = speaker();
    let mut parser = parser();
    let mut feed = |text: &str| {
        let mut out = Vec::new();
        for part in parts(&tokenizer, text) {
            match part {
                Part::Text(text) => parser.push(&text, &mut out),
                Part::Mark(id) => parser.mark(id, &mut out),
            }
        }
        (short(&out), parser.is_thinking(), parser.reads_head())
    };
    let said = |text: &str, thinks, head| (text.to_owned(), thinks, head);
    assert_eq!(feed("<|channel|>anal"), said("", false, true));
    assert_eq!(feed("ysis<|message|>"), said("", true, false));
    assert_eq!(feed("Hm"), said("(Hm)", true, false));
    assert_eq!(feed("<|end|><|start|>assistant<|channel|>"), said("", false, true));
    assert_eq!(feed("commentary to=functions.f json<|message|>"), said("f!", false, false));
    assert_eq!(feed("{\"a\""), said("{\"a\"", false, false));
    assert_eq!(feed("<|call|>"), said(".", false, true));
}

/// Behind the answer nothing is worth a token, however it ended.
#[test]
fn an_answer_is_over_with_its_last_message() {
    let (tokenizer, _) = speaker();
    for (text, over) in [
        ("<|channel|>final<|message|>Hi", false),
        ("<|channel|>final<|message|>Hi<|end|>", true),
        ("<|channel|>final<|message|>Hi<|start|>", true),
        ("<|end|>", false),
        ("<|channel|>analysis<|message|>Hm<|end|>", false),
        ("<|channel|>commentary<|message|>I look.<|end|>", false),
        ("<|channel|>commentary to=functions.f<|message|>{}<|end|>", false),
        ("<|end|><|start|>user<|channel|>final<|message|>Hi<|end|>", false),
    ] {
        let mut parser = parser();
        let mut out = Vec::new();
        for part in parts(&tokenizer, text) {
            match part {
                Part::Text(text) => parser.push(&text, &mut out),
                Part::Mark(id) => parser.mark(id, &mut out),
            }
        }
        assert_eq!(parser.is_over(), over, "{text}");
    }
}

/// Rows of marks and words: nothing panics, nothing depends on the pieces, and no mark is said.
#[test]
fn any_row_of_marks_and_words_is_read() {
    let (tokenizer, _) = speaker();
    let words = [
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|constrain|>",
        "<|call|>",
        "<|return|>",
        "<|reserved|>",
        "assistant",
        "analysis",
        "commentary",
        "final",
        " to=functions.f",
        " to=python",
        "json",
        "{\"a\": 1}",
        "{",
        " ",
        "\n",
        "天",
        "user",
    ];
    let mut dice = 11u32;
    let mut roll = |sides: usize| {
        dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (dice >> 8) as usize % sides
    };
    for round in 0..4000 {
        let text: String = (0..1 + roll(16)).map(|_| words[roll(words.len())]).collect();
        let whole = parts(&tokenizer, &text);
        let cut = round % 2 == 0;
        let pieces = parse(&whole, cut);
        assert!(!short(&pieces).contains("<|"), "{text}");
        let mut letters = Vec::new();
        for part in whole {
            match part {
                Part::Text(text) => {
                    letters.extend(text.chars().map(|c| Part::Text(c.to_string())));
                }
                mark => letters.push(mark),
            }
        }
        assert_eq!(parse(&letters, cut), pieces, "{text}");
    }
}
