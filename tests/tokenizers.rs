//! Tokenizers against the vectors of their families (`../shared/data/tokenizers`), and streamed
//! text against whole text. What needs the shared data says SKIPPED when it is not there.

use std::path::{Path, PathBuf};

use hearth::text::{ChatTemplate, GgufVocab, Special, Tokenizer};
use hearth_models::weights::{FromValue, Metadata, Weights};
use serde_json::Value;

/// The shared test data, if this machine has it.
fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(path);
    if !path.exists() {
        println!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn gguf_vocab(path: &Path) -> GgufVocab {
    let weights = Weights::open(path).unwrap();
    let meta = weights.metadata().unwrap();
    fn get<'a, T: FromValue<'a>>(meta: &'a Metadata, key: &str) -> Option<T> {
        meta.get_opt(&format!("tokenizer.ggml.{key}")).unwrap()
    }
    fn list<'a, T: FromValue<'a>>(meta: &'a Metadata, key: &'a str) -> Option<Vec<T>> {
        meta.has(key).then(|| meta.get_array(key).unwrap().map(Result::unwrap).collect())
    }
    fn texts(meta: &Metadata, key: &str) -> Option<Vec<String>> {
        list::<&str>(meta, key).map(|list| list.into_iter().map(str::to_owned).collect())
    }
    GgufVocab {
        model: get::<&str>(meta, "model").unwrap().into(),
        pre: get::<&str>(meta, "pre").map(Into::into),
        tokens: texts(meta, "tokenizer.ggml.tokens").unwrap(),
        scores: list(meta, "tokenizer.ggml.scores"),
        token_types: list(meta, "tokenizer.ggml.token_type"),
        merges: texts(meta, "tokenizer.ggml.merges"),
        bos: get(meta, "bos_token_id"),
        eos: get(meta, "eos_token_id"),
        unk: get(meta, "unknown_token_id"),
        pad: get(meta, "padding_token_id"),
        sep: get(meta, "seperator_token_id"),
        cls: get(meta, "cls_token_id"),
        mask: get(meta, "mask_token_id"),
        add_bos: get(meta, "add_bos_token"),
        add_eos: get(meta, "add_eos_token"),
        add_space_prefix: get(meta, "add_space_prefix"),
        chat_template: meta.get_opt::<&str>("tokenizer.chat_template").unwrap().map(Into::into),
        ..GgufVocab::default()
    }
}

/// What a GGUF file made from this `tokenizer.json` (a byte-level BPE) would say.
fn vocab_of_tokenizer_json(path: &Path, pre: &str) -> GgufVocab {
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let model = json["model"]["vocab"].as_object().unwrap();
    let added = json["added_tokens"].as_array().unwrap();
    let entries = model.iter().map(|(token, id)| (token.clone(), id.as_u64().unwrap(), 1)).chain(
        added.iter().map(|token| {
            let kind = if token["special"] == true { 3 } else { 4 };
            (token["content"].as_str().unwrap().to_owned(), token["id"].as_u64().unwrap(), kind)
        }),
    );
    let mut entries: Vec<(String, u64, i32)> = entries.collect();
    entries.sort_by_key(|&(_, id, _)| id);
    let merges = json["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge {
        Value::String(merge) => merge.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    });
    GgufVocab {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        merges: Some(merges.collect()),
        token_types: Some(entries.iter().map(|entry| entry.2).collect()),
        tokens: entries.into_iter().map(|entry| entry.0).collect(),
        ..GgufVocab::default()
    }
}

/// The texts and ids of one pair of `.inp` and `.out` files.
fn vectors(inp: &Path) -> Vec<(String, Vec<u32>)> {
    let texts = std::fs::read_to_string(inp).unwrap();
    let ids = std::fs::read_to_string(inp.with_extension("out")).unwrap();
    let texts = texts.split("\n__ggml_vocab_test__\n").map(str::to_owned);
    let ids = ids
        .split('\n')
        .map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<u32>>());
    let vectors: Vec<_> = texts.zip(ids).collect();
    assert_eq!(vectors.len(), 47);
    vectors
}

fn check_vectors(tokenizer: &Tokenizer, inp: &Path, name: &str) {
    for (text, expected) in vectors(inp) {
        let ids = tokenizer.encode(&text, Special::NONE).unwrap();
        assert_eq!(ids, expected, "{name}: {text:?}");
    }
}

#[test]
fn gguf_vocabularies_match_their_vectors() {
    let Some(folder) = shared("tokenizers/llama.cpp-vocabs") else { return };
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .collect();
    names.sort();
    assert!(names.len() >= 6, "{names:?}");
    for path in names {
        let tokenizer = Tokenizer::from_gguf(&gguf_vocab(&path)).unwrap();
        let mut inp = path.clone().into_os_string();
        inp.push(".inp");
        check_vectors(&tokenizer, Path::new(&inp), &path.display().to_string());
    }
}

#[test]
fn tokenizer_json_and_gguf_of_the_same_vocabulary_match_the_vectors() {
    let Some(folder) = shared("tokenizers") else { return };
    for (name, pre, vectors) in [
        ("qwen", "qwen2", "qwen2"),
        ("qwen", "deepseek-r1-qwen", "deepseek-r1-qwen"),
        ("llama3", "llama-bpe", "llama-bpe"),
    ] {
        let json = folder.join(name).join("tokenizer.json");
        let inp = folder.join(format!("llama.cpp-vocabs/ggml-vocab-{vectors}.gguf.inp"));
        check_vectors(&Tokenizer::from_file(&json).unwrap(), &inp, name);
        let gguf = Tokenizer::from_gguf(&vocab_of_tokenizer_json(&json, pre)).unwrap();
        check_vectors(&gguf, &inp, &format!("{name} as GGUF"));
    }
    let inp = folder.join("llama.cpp-vocabs/ggml-vocab-phi-3.gguf.inp");
    let phi3 = Tokenizer::from_file(&folder.join("phi-3-mini/tokenizer.json")).unwrap();
    check_vectors(&phi3, &inp, "phi-3");
}

/// A WordPiece vocabulary file as GGUF would hold it.
fn vocab_of_word_list(path: &Path) -> GgufVocab {
    let text = std::fs::read_to_string(path).unwrap();
    let tokens = text.lines().map(|line| match line.strip_prefix("##") {
        Some(part) => part.to_owned(),
        None if line.starts_with('[') && line.ends_with(']') => line.to_owned(),
        None => format!("▁{line}"),
    });
    let tokens: Vec<String> = tokens.collect();
    let id = |token: &str| tokens.iter().position(|t| t == token).map(|id| id as u32);
    GgufVocab {
        model: "bert".into(),
        unk: id("[UNK]"),
        cls: id("[CLS]"),
        sep: id("[SEP]"),
        pad: id("[PAD]"),
        mask: id("[MASK]"),
        tokens,
        ..GgufVocab::default()
    }
}

/// The vectors' decoder removes spaces before punctuation afterwards ("clean up tokenization
/// spaces"), which loses text; we do not, so both sides are compared without them.
fn tidied(text: &str) -> String {
    let mut text = text.to_owned();
    for mark in [".", "?", "!", ","] {
        text = text.replace(&format!(" {mark}"), mark);
    }
    text = text.replace(" ' ", "'");
    for ending in ["n't", "'m", "'s", "'ve", "'re"] {
        text = text.replace(&format!(" {ending}"), ending);
    }
    text
}

/// Golden texts with special tokens added, there and back.
#[test]
fn golden_texts_encode_and_decode() {
    let Some(folder) = shared("tokenizers") else { return };
    let goldens = std::fs::read(folder.join("goldens/tokenization.json")).unwrap();
    let goldens: Value = serde_json::from_slice(&goldens).unwrap();
    let json = |path: &str| Tokenizer::from_file(&folder.join(path)).unwrap();
    let gguf = |name: &str| {
        let path = folder.join(format!("llama.cpp-vocabs/ggml-vocab-{name}.gguf"));
        Tokenizer::from_gguf(&gguf_vocab(&path)).unwrap()
    };
    let chinese = vocab_of_word_list(&folder.join("bert-base-chinese/vocab.txt"));
    let mut wrong = Vec::new();
    for (name, tokenizer, add) in [
        ("Xenova/Qwen1.5-0.5B-Chat", json("qwen/tokenizer.json"), true),
        ("Xenova/llama3-tokenizer", json("llama3/tokenizer.json"), false),
        ("Xenova/llama3-tokenizer-new", json("llama3/tokenizer.json"), true),
        ("google-t5/t5-small", json("t5-small/tokenizer.json"), true),
        ("Xenova/llama-tokenizer", gguf("llama-spm"), true),
        ("Xenova/bert-base-uncased", gguf("bert-bge"), true),
        ("Xenova/bge-base-zh-v1.5", Tokenizer::from_gguf(&chinese).unwrap(), true),
    ] {
        let cases = goldens[name]["cases"].as_array().unwrap();
        for case in cases.iter().filter(|case| case["text_pair"].is_null()) {
            let text = case["text"].as_str().unwrap();
            let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let ids = tokenizer.encode(text, Special { parse: true, add }).unwrap();
            let decoded = tokenizer.decode(&expected, false);
            assert!(tokenizer.tokens_at_least(text.len()) <= ids.len(), "{name} {text:?}");
            if ids != expected {
                wrong.push(format!("{name} {text:?}: {ids:?}, not {expected:?}"));
            }
            if tidied(&decoded) != tidied(case["decoded"].as_str().unwrap()) {
                wrong.push(format!("{name} {text:?} back: {decoded:?} not {}", case["decoded"]));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let qwen = json("qwen/tokenizer.json");
    let least = qwen.tokens_at_least(4 << 20);
    assert!(least > 10_000, "{least}");
    // The longest tokens there are, and text that the normaliser shortens.
    for text in [" ".repeat(5000), "\u{1112}\u{1161}\u{11ab}".repeat(500), "=".repeat(5000)] {
        let ids = qwen.encode(&text, Special::NONE).unwrap();
        assert!(qwen.tokens_at_least(text.len()) <= ids.len());
    }
}

/// A unigram vocabulary as GGUF would hold it, against the `tokenizer.json` it comes from.
#[test]
fn unigram_from_gguf_is_the_same_tokenizer() {
    let Some(path) = shared("tokenizers/t5-small/tokenizer.json") else { return };
    let theirs = Tokenizer::from_file(&path).unwrap();
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let pieces = json["model"]["vocab"].as_array().unwrap();
    let charsmap = json["normalizer"]["precompiled_charsmap"].as_str().unwrap();
    let special = |id: &u32| theirs.is_special(*id);
    let count = pieces.len() as u32;
    let ours = Tokenizer::from_gguf(&GgufVocab {
        model: "t5".into(),
        tokens: pieces.iter().map(|piece| piece[0].as_str().unwrap().into()).collect(),
        scores: Some(pieces.iter().map(|piece| piece[1].as_f64().unwrap() as f32).collect()),
        token_types: Some((0..count).map(|id| if special(&id) { 3 } else { 1 }).collect()),
        eos: Some(1),
        unk: Some(2),
        remove_extra_whitespaces: Some(true),
        precompiled_charsmap: Some(base64(charsmap)),
        ..GgufVocab::default()
    })
    .unwrap();
    for text in ["How are you doing?", "  two  spaces \n café ﬁne Ｗｉｄｅ", "A </s> b", "🦙 貓"]
    {
        let ids = ours.encode(text, Special::PROMPT).unwrap();
        assert_eq!(ids, theirs.encode(text, Special::PROMPT).unwrap(), "{text:?}");
        assert_eq!(ours.decode(&ids, true), theirs.decode(&ids, true), "{text:?}");
    }
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|&c| c != b'=').map(digit).collect();
    let bits = |four: &[u8]| four.iter().fold(0u32, |bits, &d| bits << 6 | u32::from(d));
    digits
        .chunks(4)
        .flat_map(|four| {
            let bits = bits(four) << (6 * (4 - four.len()));
            bits.to_be_bytes()[1..four.len()].to_vec()
        })
        .collect()
}

/// One model as SafeTensors folder and as GGUF: the same tokens.
#[test]
fn stories_tokenizers_agree() {
    let Some(folder) = shared("models") else { return };
    let json = Tokenizer::from_file(&folder.join("stories260K-hf/tokenizer.json")).unwrap();
    let path = folder.join("stories260K-gguf/stories260K-F32.gguf");
    let gguf = Tokenizer::from_gguf(&gguf_vocab(&path)).unwrap();
    assert_eq!(json.bos_id(), Some(1));
    assert_eq!((gguf.bos_id(), gguf.eos_id()), (Some(1), Some(2)));
    assert_eq!(json.vocab_len(), 512);
    assert_eq!(gguf.vocab_len(), 512);
    for text in [
        "Once upon a time, there was a little girl named Lily.",
        "  She loved\n\nto play outside... \"Look!\" 貓🦙",
        "",
    ] {
        let ids = json.encode(text, Special::PROMPT).unwrap();
        assert_eq!(ids[0], 1);
        assert_eq!(gguf.encode(text, Special::PROMPT).unwrap(), ids, "{text:?}");
        assert_eq!(json.decode(&ids, true), text);
        assert_eq!(gguf.decode(&ids, true), text);
    }
}

/// The end of turn that real templates write, found with their real tokenizers.
#[test]
fn real_templates_show_their_end_of_turn() {
    let Some(folder) = shared("tokenizers") else { return };
    for (tokenizer, template, end) in [
        ("qwen", "Qwen-Qwen3-0.6B", "<|im_end|>"),
        ("qwen", "Qwen-Qwen2.5-7B-Instruct", "<|im_end|>"),
        ("llama3", "meta-llama-Llama-3.2-3B-Instruct", "<|eot_id|>"),
        ("phi-3-mini", "microsoft-Phi-3.5-mini-instruct", "<|end|>"),
    ] {
        let tokenizer = Tokenizer::from_file(&folder.join(tokenizer).join("tokenizer.json"));
        let tokenizer = tokenizer.unwrap();
        let path = folder.join(format!("../chat-templates/templates/{template}.jinja"));
        let source = std::fs::read_to_string(path).unwrap();
        let template = ChatTemplate::new(&source, Some("<BOS>"), Some("<EOS>")).unwrap();
        assert_eq!(template.stop_ids(&tokenizer), [tokenizer.id_of(end).unwrap()]);
    }
}
