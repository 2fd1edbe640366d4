//! What an answer means, however it was cut.

use super::*;

fn parser(format: Option<CallFormat>, think: Option<bool>) -> Box<dyn OutputParser> {
    let rest: Box<dyn OutputParser> = match format {
        Some(format) => Box::new(CallParser::new(format)),
        None => Box::new(PlainParser),
    };
    match think {
        Some(begun) => Box::new(ThinkParser::new(begun, rest)),
        None => rest,
    }
}

/// The parts of a text that comes in these pieces, those of one kind joined.
fn parse<'a>(
    mut parser: Box<dyn OutputParser>,
    pieces: impl IntoIterator<Item = &'a str>,
) -> Vec<Piece> {
    let mut out = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut out);
    }
    parser.finish(false, &mut out);
    join(out)
}

/// Parts of one kind in a row as one.
pub(super) fn join(out: Vec<Piece>) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in out {
        match (joined.last_mut(), piece) {
            (Some(Piece::Text(all)), Piece::Text(more))
            | (Some(Piece::Reasoning(all)), Piece::Reasoning(more))
            | (Some(Piece::Arguments(all)), Piece::Arguments(more)) => all.push_str(&more),
            (_, piece) => joined.push(piece),
        }
    }
    joined
}

/// `parts` in short: text as it is, thought in `(...)`, a call as `name!arguments.`.
pub(super) fn short(parts: &[Piece]) -> String {
    let one = |part: &Piece| match part {
        Piece::Text(text) => text.clone(),
        Piece::Reasoning(text) => format!("({text})"),
        Piece::Call { name } => format!("{name}!"),
        Piece::Arguments(text) => text.clone(),
        Piece::CallEnd => ".".to_owned(),
    };
    parts.iter().map(one).collect()
}

const HERMES: Option<CallFormat> = Some(CallFormat::Hermes);
const LLAMA: Option<CallFormat> = Some(CallFormat::Llama);
const MISTRAL: Option<CallFormat> = Some(CallFormat::MistralList);
const ARGS_STYLE: Option<CallFormat> = Some(CallFormat::MistralArgs);

type Case = (Option<CallFormat>, Option<bool>, &'static str, &'static str);

/// Format, thought, text, and what it means in short.
const CASES: &[Case] = &[
    (None, None, "just <tool_call> text", "just <tool_call> text"),
    (None, Some(false), "<think>\nhm, 天\n</think>\n\nyes ", "(hm, 天)yes "),
    (None, Some(true), "hm\n\nmore </th </think>\nyes", "(hm\n\nmore </th)yes"),
    (None, Some(false), " no <think>thought</think>", " no <think>thought</think>"),
    (None, Some(false), "<thin", "<thin"),
    (None, Some(false), "<think>cut off </thi", "(cut off </thi)"),
    (None, Some(true), "</think>at once", "at once"),
    (HERMES, None, "Hello <b>you</b>\n", "Hello <b>you</b>\n"),
    (
        HERMES,
        None,
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Rio }]\\\"\"}}\n</tool_call>",
        "f!{\"city\": \"Rio }]\\\"\"}.",
    ),
    (
        HERMES,
        None,
        "Let me see.\n\n<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n\
         <tool_call>\n{\"arguments\": {\"a\": [1, {}]}, \"id\": 7, \"name\": \"g\"}</tool_call>\n",
        "Let me see.f!{}.g!{\"a\": [1, {}]}.",
    ),
    (HERMES, None, "<tool_call>{\"name\": \"f\"}</tool_call> done", "f!{}.done"),
    (HERMES, None, "<tool_call>{\"name\": \"f\", \"arguments\": null}</tool_call>", "f!{}."),
    (
        HERMES,
        None,
        "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>",
        "f!{\"a\": 1}.",
    ),
    (HERMES, None, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1", "f!{\"a\": 1"),
    (HERMES, None, "a <tool_call> is a mark", "a<tool_call> is a mark"),
    (HERMES, None, "<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>"),
    (
        HERMES,
        None,
        "<tool_call>{\"name\": 5, \"arguments\": {}}",
        "<tool_call>{\"name\": 5, \"arguments\": {}}",
    ),
    (HERMES, None, "<tool_call>{\"x\": {}}</tool_call>", "<tool_call>{\"x\": {}}</tool_call>"),
    (
        HERMES,
        None,
        "<tool_call><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
        "<tool_call>f!{}.",
    ),
    (HERMES, None, "<tool_call>{\"na", "<tool_call>{\"na"),
    (HERMES, None, "<tool_call", "<tool_call"),
    (
        HERMES,
        None,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}]]</tool_call>",
        "f!{\"a\": 1}.]]</tool_call>",
    ),
    (
        HERMES,
        Some(false),
        "<think>\nI call\n</think>\n<tool_call>{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
        "(I call)f!{}.",
    ),
    (LLAMA, None, "{\"name\": \"f\", \"parameters\": {\"a\": \"b\"}}", "f!{\"a\": \"b\"}."),
    (
        LLAMA,
        None,
        "<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}; \
         {\"name\": \"g\", \"parameters\": {}}",
        "f!{}.g!{}.",
    ),
    (LLAMA, None, "I say {\"name\": \"f\"}", "I say {\"name\": \"f\"}"),
    (LLAMA, None, " {\"answer\": 42}", " {\"answer\": 42}"),
    (
        MISTRAL,
        None,
        "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}, \"id\": \"abcdefghi\"}, \
         {\"name\": \"g\", \"arguments\": {}}]",
        "f!{\"a\": 1}.g!{}.",
    ),
    (MISTRAL, None, "[TOOL_CALL] is no mark", "[TOOL_CALL] is no mark"),
    (
        ARGS_STYLE,
        None,
        "Well.[TOOL_CALLS]get_weather[ARGS]{\"city\": \"台北\"}[TOOL_CALLS]g[CALL_ID]x1[ARGS]{}",
        "Well.get_weather!{\"city\": \"台北\"}.g!{}.",
    ),
    (ARGS_STYLE, None, "[TOOL_CALLS]never\nmind", "[TOOL_CALLS]never\nmind"),
];

#[test]
fn calls_and_thought_are_told_from_text() {
    for &(format, think, text, expected) in CASES {
        assert_eq!(short(&parse(parser(format, think), [text])), expected, "{text}");
    }
}

#[test]
fn how_a_text_is_cut_changes_nothing() {
    for &(format, think, text, _) in CASES {
        let whole = parse(parser(format, think), [text]);
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let cut = parse(parser(format, think), letters.iter().map(String::as_str));
        assert_eq!(cut, whole, "{text:?} letter by letter");
        let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        for &at in &borders {
            let (a, b) = text.split_at(at);
            assert_eq!(parse(parser(format, think), [a, b]), whole, "{a:?} + {b:?}");
        }
        // A few thousand ways to cut it into many, by a fixed rule.
        let mut dice = 0x9e37_79b9_u32;
        for _ in 0..200 {
            let mut pieces = Vec::new();
            let mut from = 0;
            for &at in &borders[1..] {
                dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if dice >> 30 == 0 {
                    pieces.push(&text[from..at]);
                    from = at;
                }
            }
            pieces.push(&text[from..]);
            assert_eq!(parse(parser(format, think), pieces.iter().copied()), whole, "{pieces:?}");
        }
    }
}

#[test]
fn arguments_are_told_as_they_come() {
    let mut parser = CallParser::new(CallFormat::Hermes);
    let mut out = Vec::new();
    parser.push("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\"", &mut out);
    let arguments = |text: &str| Piece::Arguments(text.to_owned());
    assert_eq!(out, [Piece::Call { name: "f".to_owned() }, arguments("{\"a\"")]);
    out.clear();
    parser.push(": 1}", &mut out);
    assert_eq!(out, [arguments(": 1}")]);
    out.clear();
    parser.push("}\n</tool_call>", &mut out);
    assert_eq!(out, [Piece::CallEnd]);
}

/// Texts made of the marks themselves: nothing panics, nothing but marks and space is lost.
#[test]
fn any_text_of_marks_and_braces_is_read_the_same_in_any_pieces() {
    let words = [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        "\"name\"",
        ":",
        "\"f\"",
        ",",
        "\"arguments\"",
        "{\"a\": 1}",
        "\n",
        " ",
        "[",
        "]",
        "[TOOL_CALLS]",
        "[ARGS]",
        "g",
        "<think>",
        "</think>",
        "\\",
        "\"",
        "<|python_tag|>",
        "天",
    ];
    let mut dice = 7u32;
    let mut roll = |sides: usize| {
        dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (dice >> 8) as usize % sides
    };
    for round in 0..3000 {
        let pieces: Vec<&str> = (0..1 + roll(14)).map(|_| words[roll(words.len())]).collect();
        let text = pieces.concat();
        let format = [None, HERMES, LLAMA, MISTRAL, ARGS_STYLE][round % 5];
        let think = [None, Some(false), Some(true)][round % 3];
        let whole = parse(parser(format, think), [text.as_str()]);
        assert_eq!(parse(parser(format, think), pieces.iter().copied()), whole, "{pieces:?}");
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let cut = parse(parser(format, think), letters.iter().map(String::as_str));
        assert_eq!(cut, whole, "{text:?} letter by letter");
    }
}

#[test]
fn a_call_that_is_cut_off_before_it_began_is_not_text() {
    for text in ["<tool_call>", "<tool_call>\n{\"name\": \"f", "<tool_call>{\"arguments\": {\"a\""]
    {
        let mut parser = CallParser::new(CallFormat::Hermes);
        let mut out = Vec::new();
        parser.push(text, &mut out);
        parser.finish(true, &mut out);
        assert_eq!(out, [], "{text}");
    }
}
