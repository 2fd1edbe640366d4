//! Text on vocabularies made here: needs no data from elsewhere.

use hearth::text::{GgufVocab, Special, StopMatcher, TextError, Tokenizer};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Model as _, TokenizerImpl, Trainer as _};

const TEXTS: [&str; 8] = [
    "Once upon a time there was a little cat. The cat sat on the mat, and the mat was red.",
    "從前有一隻小貓,住在台北的巷子裡。小貓喜歡吃魚,也喜歡曬太陽。",
    "🦙🐈‍⬛ emoji: 👩‍👩‍👧‍👦, 🇹🇼, ✅ and ½ ¾ é ü ñ",
    "fn main() {\n    println!(\"hello\");\n\n\t// done\r\n}",
    "  two  spaces   three ",
    "нещо на Български, ქართული, ไทย, 한국어, 日本語",
    "1234567890 3.14159 0x7F",
    "\u{0}\u{1}\u{7f}\u{fffd}\u{feff}",
];

/// A small generator of the same numbers on every run (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// A byte-level BPE trained on [`TEXTS`], as the `tokenizers` crate writes it.
fn trained() -> tokenizers::Tokenizer {
    let mut trainer = BpeTrainer::builder()
        .vocab_size(400)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let words = |text: &str| {
        let bytes = text.split_inclusive(' ').map(|word| {
            let mut normal = tokenizers::NormalizedString::from(word);
            let table = tokenizers::normalizers::byte_level::ByteLevel::new();
            tokenizers::Normalizer::normalize(&table, &mut normal).unwrap();
            normal.get().to_owned()
        });
        Ok(bytes.collect())
    };
    trainer.feed(TEXTS.iter(), words).unwrap();
    let mut model = BPE::default();
    trainer.train(&mut model).unwrap();
    let mut tokenizer: tokenizers::Tokenizer =
        TokenizerImpl::<BPE, tokenizers::NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>::new(
            model,
        )
        .into();
    let byte_level = ByteLevel::new(false, false, true);
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    tokenizer
        .add_special_tokens([
            AddedToken::from("<|im_start|>", true),
            AddedToken::from("<|im_end|>", true),
        ])
        .unwrap();
    tokenizer.add_tokens([AddedToken::from("<tool_call>", false)]).unwrap();
    tokenizer
}

fn byte_level() -> Tokenizer {
    Tokenizer::from_json(trained().to_string(false).unwrap().as_bytes()).unwrap()
}

/// A SentencePiece vocabulary with byte fallback: a few pieces, every byte.
fn sentence_piece_vocab() -> GgufVocab {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    let mut types = vec![2, 3, 3];
    let mut scores = vec![0.0; 3];
    for byte in 0..=255 {
        tokens.push(format!("<0x{byte:02X}>"));
        types.push(6);
        scores.push(0.0);
    }
    let pieces = [
        "▁t",
        "he",
        "▁the",
        "▁c",
        "at",
        "▁cat",
        "▁▁",
        "▁▁▁▁",
        "aa",
        "aaa",
        "小貓",
        "台",
        "北",
        "台北",
        "▁",
        "t",
        "h",
        "e",
        "c",
        "a",
        "s",
        "o",
        "n",
        ".",
        ",",
        "小",
        "貓",
        "<",
        ">",
        "/",
        "<s",
        "</",
        "</s",
    ];
    for (rank, piece) in pieces.iter().enumerate() {
        tokens.push((*piece).into());
        types.push(1);
        scores.push(-(rank as f32));
    }
    GgufVocab {
        model: "llama".into(),
        tokens,
        scores: Some(scores),
        token_types: Some(types),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..GgufVocab::default()
    }
}

fn sentence_piece() -> Tokenizer {
    Tokenizer::from_gguf(&sentence_piece_vocab()).unwrap()
}

#[test]
fn text_survives_encoding_and_decoding() {
    for tokenizer in [byte_level(), sentence_piece()] {
        for text in TEXTS {
            let ids = tokenizer.encode(text, Special::NONE).unwrap();
            assert_eq!(tokenizer.decode(&ids, true), text, "{ids:?}");
        }
    }
}

#[test]
fn byte_level_agrees_with_the_crate() {
    let (theirs, ours) = (trained(), byte_level());
    assert_eq!(ours.vocab_len(), theirs.get_vocab_size(true));
    for text in TEXTS {
        let ids = ours.encode(text, Special::NONE).unwrap();
        assert_eq!(ids, theirs.encode(text, false).unwrap().get_ids(), "{text:?}");
    }
    let mut dice = Dice(7);
    for _ in 0..500 {
        let ids: Vec<u32> =
            (0..dice.below(30)).map(|_| dice.below(theirs.get_vocab_size(true)) as u32).collect();
        assert_eq!(ours.decode(&ids, false), theirs.decode(&ids, false).unwrap());
        assert_eq!(ours.decode(&ids, true), theirs.decode(&ids, true).unwrap());
    }
}

/// Random ids make invalid UTF-8 of every kind; each push must add whole characters only, and
/// nothing that was said may change.
#[test]
fn streamed_text_is_whole_text() {
    let mut dice = Dice(42);
    for (tokenizer, strips) in [(byte_level(), false), (sentence_piece(), true)] {
        for round in 0..2000 {
            let mut ids: Vec<u32> =
                (0..dice.below(24)).map(|_| dice.below(tokenizer.vocab_len()) as u32).collect();
            if round % 2 == 0 {
                let text = TEXTS[dice.below(TEXTS.len())];
                let good = tokenizer.encode(text, Special::NONE).unwrap();
                let at = dice.below(good.len());
                ids.extend(&good[at..]);
            }
            // The truth, found another way: all bytes first, then UTF-8.
            let plain = ids.iter().filter(|&&id| !tokenizer.is_special(id));
            let bytes: Vec<u8> = plain.flat_map(|&id| tokenizer.token_bytes(id).unwrap()).collect();
            let bytes = bytes.strip_prefix(b" ").filter(|_| strips).unwrap_or(&bytes);
            let whole = String::from_utf8_lossy(bytes);
            assert_eq!(tokenizer.decode(&ids, true), whole, "{ids:?}");

            let mut stream = tokenizer.stream();
            let mut streamed = String::new();
            for &id in &ids {
                if let Some(text) = stream.push(id) {
                    assert!(!text.is_empty());
                    streamed.push_str(&text);
                }
                assert!(whole.starts_with(&streamed), "{ids:?}: {streamed:?}");
            }
            streamed.extend(stream.flush());
            assert_eq!(streamed, whole, "{ids:?}");
        }
    }
}

#[test]
fn half_a_character_waits() {
    let tokenizer = sentence_piece();
    let bytes = |text: &str| text.bytes().map(|b| 3 + u32::from(b)).collect::<Vec<_>>();
    let llama = bytes("🦙");
    let mut stream = tokenizer.stream();
    assert_eq!(llama[..3].iter().find_map(|&id| stream.push(id)), None);
    assert_eq!(stream.push(llama[3]).as_deref(), Some("🦙"));
    assert_eq!(stream.flush(), None);
    // Cut short, it is one replacement character, at the end or before the next text.
    let mut stream = tokenizer.stream();
    assert_eq!(llama[..3].iter().find_map(|&id| stream.push(id)), None);
    assert_eq!(stream.push(tokenizer.id_of("▁cat").unwrap()).as_deref(), Some("\u{fffd} cat"));
    assert_eq!(stream.push(llama[0]), None);
    assert_eq!(stream.flush().as_deref(), Some("\u{fffd}"));
}

#[test]
fn the_first_space_is_dropped_unless_the_text_continues() {
    let tokenizer = sentence_piece();
    let cat = tokenizer.id_of("▁cat").unwrap();
    assert_eq!(tokenizer.decode(&[cat, cat], true), "cat cat");
    assert_eq!(tokenizer.decode(&[1, cat, cat], true), "cat cat");
    assert_eq!(tokenizer.decode(&[1, cat], false), "<s> cat");
    assert_eq!(tokenizer.stream().continuing().push(cat).as_deref(), Some(" cat"));
    assert_eq!(tokenizer.stream().keep_special().push(1).as_deref(), Some("<s>"));
    assert_eq!(tokenizer.token_bytes(cat).unwrap(), b" cat");
    assert_eq!(tokenizer.token_bytes(3 + 0xE6).unwrap(), [0xE6]);
    assert_eq!(tokenizer.token_text(3 + 0xE6).unwrap(), "\u{fffd}");
    assert_eq!(tokenizer.token_bytes(100_000), None);
    assert_eq!(tokenizer.decode(&[cat, 100_000], true), "cat");
}

#[test]
fn sentence_piece_joins_by_score_then_from_the_left() {
    let tokenizer = sentence_piece();
    let pieces = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, Special::NONE).unwrap();
        ids.iter().map(|&id| tokenizer.token_text(id).unwrap()).collect()
    };
    assert_eq!(pieces("the cat"), [" the", " cat"]);
    assert_eq!(pieces("aaaaa"), [" ", "aa", "aaa"]);
    assert_eq!(pieces("小貓台北"), [" ", "小貓", "台北"]);
    assert!(tokenizer.encode("", Special::NONE).unwrap().is_empty());
    // A character without a piece: its bytes.
    let ids = tokenizer.encode("é", Special::NONE).unwrap();
    assert_eq!(ids[1..], [3 + 0xC3, 3 + 0xA9]);
    // Plain text never becomes a control token, though `</s` and `>` are pieces.
    let ids = tokenizer.encode("</s>", Special::NONE).unwrap();
    assert!(!ids.contains(&2), "{ids:?}");
    assert_eq!(tokenizer.encode("</s>", Special::PARSE).unwrap(), [2]);
}

/// The same spelling with a list of merges, and no space put before the text.
#[test]
fn sentence_piece_by_merges() {
    let merges = ["t h", "▁ t", "h e", "▁t he", "a a", "小 貓"].map(String::from);
    let tokenizer = Tokenizer::from_gguf(&GgufVocab {
        model: "gemma4".into(),
        merges: Some(merges.into()),
        ..sentence_piece_vocab()
    })
    .unwrap();
    let ids = tokenizer.encode("a the小貓é", Special::PROMPT).unwrap();
    let texts: Vec<_> = ids.iter().map(|&id| tokenizer.token_text(id).unwrap()).collect();
    assert_eq!(texts, ["<s>", "a", " the", "小貓", "\u{fffd}", "\u{fffd}"]);
    assert_eq!(tokenizer.decode(&ids, true), "a the小貓é");
    assert_eq!(tokenizer.decode(&tokenizer.encode(" the", Special::NONE).unwrap(), true), " the");
}

#[test]
fn special_tokens_are_parsed_only_on_request_and_bos_is_not_doubled() {
    let tokenizer = sentence_piece();
    let ids = |text: &str, special| tokenizer.encode(text, special).unwrap();
    let cat = tokenizer.id_of("▁cat").unwrap();
    assert_eq!(ids("cat", Special::PROMPT), [1, cat]);
    assert_eq!(ids("<s>cat", Special::PROMPT), [1, cat]);
    assert_eq!(ids("<s>cat", Special::PARSE), [1, cat]);
    assert_eq!(ids("cat</s>", Special::PARSE), [cat, 2]);
    assert_eq!(ids("<s>cat", Special::ADD)[0], 1);
    assert!(ids("<s>cat", Special::ADD).len() > 3);

    let tokenizer = byte_level();
    let end = tokenizer.id_of("<|im_end|>").unwrap();
    let call = tokenizer.id_of("<tool_call>").unwrap();
    assert!(tokenizer.is_special(end) && !tokenizer.is_special(call) && tokenizer.is_added(call));
    let text = "a<|im_end|><tool_call>";
    let parsed = tokenizer.encode(text, Special::PARSE).unwrap();
    assert_eq!(parsed[parsed.len() - 2..], [end, call]);
    let plain = tokenizer.encode(text, Special::NONE).unwrap();
    assert!(!plain.contains(&end) && plain.contains(&call));
    assert_eq!(tokenizer.decode(&parsed, true), "a<tool_call>");
    assert_eq!(tokenizer.decode(&parsed, false), text);
    let named = tokenizer.with_bos_eos(None, Some("<|im_end|>"));
    assert_eq!((named.bos_id(), named.eos_id()), (None, Some(end)));
    assert_eq!(named.end_ids(), [end]);
}

#[test]
fn a_byte_level_gguf_is_the_same_tokenizer() {
    let theirs = trained();
    let json: serde_json::Value = serde_json::from_str(&theirs.to_string(false).unwrap()).unwrap();
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges =
        merges.map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
    let count = theirs.get_vocab_size(true) as u32;
    let vocab = GgufVocab {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: (0..count).map(|id| theirs.id_to_token(id).unwrap()).collect(),
        token_types: Some((0..count).map(|id| if id < count - 3 { 1 } else { 3 }).collect()),
        merges: Some(merges.collect()),
        ..GgufVocab::default()
    };
    let ours = Tokenizer::from_gguf(&vocab).unwrap();
    for text in TEXTS {
        let ids = ours.encode(text, Special::NONE).unwrap();
        assert_eq!(ids, theirs.encode(text, false).unwrap().get_ids(), "{text:?}");
    }
    // A pre-tokeniser that nobody knows is a warning, not an error.
    let unknown = GgufVocab { pre: Some("no-such".into()), ..vocab };
    Tokenizer::from_gguf(&unknown).unwrap();
}

#[test]
fn every_known_pre_tokeniser_compiles_and_loses_nothing() {
    let names = [
        "default",
        "gpt-2",
        "llama-bpe",
        "dbrx",
        "qwen2",
        "qwen35",
        "starcoder",
        "falcon",
        "bloom",
        "viking",
        "gpt-4o",
        "tekken",
        "kimi-k2",
        "deepseek-llm",
        "deepseek-coder",
        "deepseek-v3",
        "chameleon",
        "stablelm2",
        "glm4",
        "exaone",
    ];
    let theirs = trained();
    let vocab = GgufVocab {
        model: "gpt2".into(),
        tokens: (0..theirs.get_vocab_size(false) as u32)
            .map(|id| theirs.get_model().id_to_token(id).unwrap())
            .collect(),
        merges: Some(Vec::new()),
        ..GgufVocab::default()
    };
    for name in names {
        let vocab = GgufVocab { pre: Some(name.into()), ..vocab.clone() };
        let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
        for text in TEXTS {
            let ids = tokenizer.encode(text, Special::NONE).unwrap();
            assert_eq!(tokenizer.decode(&ids, true), text, "{name}");
        }
    }
}

#[test]
fn bad_vocabularies_are_refused_by_name() {
    let refused = |change: &dyn Fn(&mut GgufVocab), says: &str| {
        let mut vocab = sentence_piece_vocab();
        change(&mut vocab);
        match Tokenizer::from_gguf(&vocab) {
            Err(TextError::BadTokenizer(message)) => assert!(message.contains(says), "{message}"),
            other => panic!("{other:?}"),
        }
    };
    refused(&|v| v.model = "rwkv".into(), "rwkv");
    refused(&|v| v.tokens.clear(), "tokens");
    refused(&|v| v.scores = None, "scores");
    refused(&|v| v.scores = Some(vec![0.0; 5]), "scores has 5 entries");
    refused(&|v| v.token_types = Some(vec![1]), "token_type has 1 entries");
    refused(&|v| v.eos = Some(9_999), "eos_token_id is 9999");
    refused(&|v| v.model = "gpt2".into(), "merges");
    refused(&|v| (v.model, v.unk) = ("bert".into(), None), "unknown token");
    for json in
        [&b"{"[..], b"[]", b"{}", br#"{"model":{"type":"BPE","vocab":{},"merges":["a b"]}}"#]
    {
        assert!(matches!(Tokenizer::from_json(json), Err(TextError::BadTokenizer(_))));
    }
    let missing = Tokenizer::from_file(std::path::Path::new("/nowhere/tokenizer.json"));
    assert!(matches!(missing, Err(TextError::Io { .. })));
}

/// Merges that name no tokens, duplicates, empty tokens, scores that are no numbers: no panic.
#[test]
fn odd_vocabularies_do_not_panic() {
    let mut vocab = sentence_piece_vocab();
    vocab.tokens[290] = String::new();
    vocab.tokens[281] = vocab.tokens[280].clone();
    vocab.scores.as_mut().unwrap()[265] = f32::NAN;
    vocab.unk = None;
    let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
    for text in TEXTS {
        tokenizer.decode(&tokenizer.encode(text, Special::PROMPT).unwrap(), false);
    }
    let merges = ["", " ", "a", "a a", "zz yy", "t h", "  ", "▁ t h"].map(String::from);
    let vocab =
        GgufVocab { model: "gpt2".into(), merges: Some(merges.into()), ..sentence_piece_vocab() };
    let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
    for text in TEXTS {
        tokenizer.encode(text, Special::PROMPT).unwrap();
    }
}

/// The truth for stop strings: after every character, does the text end with one?
fn cut_at_stop(text: &str, stops: &[String]) -> (String, Option<usize>) {
    for end in text.char_indices().map(|(at, c)| at + c.len_utf8()) {
        let seen = &text[..end];
        let found = stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && seen.ends_with(*s));
        if let Some((index, stop)) = found.min_by_key(|(_, s)| std::cmp::Reverse(s.len())) {
            return (seen[..end - stop.len()].to_owned(), Some(index));
        }
    }
    (text.to_owned(), None)
}

#[test]
fn stop_strings_are_found_however_the_text_is_cut() {
    let mut dice = Dice(3);
    // Few letters, so that prefixes, overlaps and multi-byte characters meet often.
    let letters = ['a', 'b', '貓', '🦙'];
    let word = |dice: &mut Dice, max: usize| -> String {
        (0..dice.below(max + 1)).map(|_| letters[dice.below(letters.len())]).collect()
    };
    let mut hits = 0;
    for _ in 0..5000 {
        let stops: Vec<String> = (0..dice.below(4)).map(|_| word(&mut dice, 4)).collect();
        let text = word(&mut dice, 24);
        let (expected, index) = cut_at_stop(&text, &stops);
        let mut matcher = StopMatcher::new(stops.clone());
        let mut out = String::new();
        let chars: Vec<char> = text.chars().collect();
        let mut at = 0;
        while at < chars.len() {
            let len = 1 + dice.below(4).min(chars.len() - at - 1);
            out.push_str(&matcher.push(&chars[at..at + len].iter().collect::<String>()));
            at += len;
            assert!(expected.starts_with(&out), "leak: {text:?} {stops:?} {out:?}");
        }
        out.push_str(&matcher.flush());
        assert_eq!(out, expected, "{text:?} {stops:?}");
        assert_eq!(matcher.hit().map(|hit| hit.index), index, "{text:?} {stops:?}");
        hits += usize::from(index.is_some());
    }
    assert!(hits > 1000, "{hits}");
}

#[test]
fn a_stop_string_is_held_back_only_as_long_as_it_may_come() {
    let mut matcher = StopMatcher::new(vec!["\nUser:".into()]);
    assert_eq!(matcher.push("Hello"), "Hello");
    assert_eq!(matcher.push(" there\nUs"), " there");
    assert_eq!(matcher.push("ual"), "\nUsual");
    assert_eq!(matcher.push("\nUser"), "");
    assert_eq!(matcher.push(": me"), "");
    let hit = matcher.hit().unwrap();
    assert_eq!((hit.index, hit.text.as_str()), (0, "\nUser:"));
    assert_eq!(matcher.push("more"), "");
    assert_eq!(matcher.flush(), "");
    let mut matcher = StopMatcher::new(vec!["END".into()]);
    assert_eq!(matcher.push("the EN"), "the ");
    assert_eq!(matcher.flush(), "EN");
}
