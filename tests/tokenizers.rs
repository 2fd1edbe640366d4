//! Tokenizers against the vectors of their families (`../shared/data/tokenizers`), and streamed
//! text against whole text. What needs the shared data says SKIPPED when it is not there.

use std::path::{Path, PathBuf};

use hearth::text::{GgufVocab, Special, Tokenizer};
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
    let ids = ids.split('\n').map(|line| {
        line.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<u32>>()
    });
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
