//! A `tokenizer.json` in the words of GGUF, where GGUF has words for it.
//!
//! Two kinds do: byte-level BPE whose pre-tokeniser has a name, and SentencePiece BPE with bytes to
//! fall back on, whose merges become scores. Everything else is refused. What was made is read back
//! and must cut a set of awkward texts exactly as the original does.

use std::collections::HashMap;

use serde_json::Value;

use super::gguf::{BYTE, CONTROL, GgufVocab, USER_DEFINED};
use super::pretokenizer;
use super::{Special, TextError, Tokenizer};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const UNUSED: i32 = 5;

/// Texts on which tokenizers differ first.
const PROBES: [&str; 10] = [
    "Hello world, it's 2024-11-05 and I've 12345.678 reasons!  Don't   stop\tnow.",
    "  leading and trailing  ",
    "def f(x):\n    return x**2\n\n\n# done\r\n",
    "繁體中文的測試，混合 English 與 123 數字。",
    "Größe naïve café e\u{301} İstanbul ǅ ﬁ",
    "😀👩‍👩‍👧 ½ ² ٣ ४",
    "a\u{a0}b\u{3000}c\u{200b}d",
    "<|im_start|>user\nHi<|im_end|></s><s>[INST] x [/INST]",
    "https://example.com/a_b-c?d=e&f=%20 #tag @name $5.00",
    "\n",
];

/// The vocabulary of a `tokenizer.json` for a model with `rows` embeddings. `tokenizer` is the same
/// file with its BOS and EOS named.
pub fn export(json: &[u8], tokenizer: &Tokenizer, rows: usize) -> Result<GgufVocab, TextError> {
    let file: Value = serde_json::from_slice(json).map_err(|e| bad(e.to_string()))?;
    let model = &file["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") || model["merges"].is_null() {
        let kind = model["type"].as_str().unwrap_or("without a type");
        return Err(bad(format!("a model of kind {kind} is not written to GGUF, only BPE")));
    }
    let mut made = vocabulary(&file, rows)?;
    let merges = merges(model)?;
    if model["byte_fallback"] == true {
        sentence_piece(&mut made, &file, &merges);
    } else {
        made.model = "gpt2".into();
        let name = pretokenizer::name_of(&file).ok_or_else(|| {
            bad("its pre-tokeniser has no name in GGUF, so the file could not say how to cut text")
        })?;
        made.pre = Some(name.into());
        made.merges = Some(merges.iter().map(|(a, b)| format!("{a} {b}")).collect());
    }
    made.bos = tokenizer.bos_id();
    made.eos = tokenizer.eos_id();
    let unknown = model["unk_token"].as_str().and_then(|token| tokenizer.id_of(token));
    made.unk = unknown;
    let around = tokenizer.encode("a", Special::PROMPT)?;
    made.add_bos = Some(made.bos.is_some() && around.first() == made.bos.as_ref());
    made.add_eos = Some(made.eos.is_some() && around.last() == made.eos.as_ref());
    if let Some(kind) = unknown.and_then(|id| types(&mut made).get_mut(id as usize)) {
        *kind = UNKNOWN;
    }
    check(&made, tokenizer)?;
    Ok(made)
}

/// Tokens and their types; rows of the embedding without a token get a name that no text has.
fn vocabulary(file: &Value, rows: usize) -> Result<GgufVocab, TextError> {
    let none = || bad("model.vocab is missing");
    let model = file["model"]["vocab"].as_object().ok_or_else(none)?;
    let added = file["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; rows];
    let mut put = |id: &Value, token: &str, kind: i32| {
        let place = id.as_u64().and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
        let place = place.ok_or_else(|| {
            bad(format!("token `{token}` has id {id}, the model has {rows} embeddings"))
        })?;
        *place = Some((token.to_owned(), kind));
        Ok::<(), TextError>(())
    };
    for (token, id) in model {
        put(id, token, NORMAL)?;
    }
    // Marks of pictures and sounds may stand behind the embeddings of a model of text.
    let has_row = |token: &&Value| token["id"].as_u64().is_none_or(|id| id < rows as u64);
    for token in added.iter().filter(has_row) {
        let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
        put(&token["id"], token["content"].as_str().unwrap_or_default(), kind)?;
    }
    let named = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)));
    let (tokens, types) = named.unzip();
    Ok(GgufVocab { tokens, token_types: Some(types), ..GgufVocab::default() })
}

fn types(vocab: &mut GgufVocab) -> &mut Vec<i32> {
    vocab.token_types.get_or_insert_default()
}

/// `"a b"` or `["a", "b"]`, best first.
fn merges(model: &Value) -> Result<Vec<(String, String)>, TextError> {
    let wrong = || bad("model.merges is not a list of pairs");
    let pair = |merge: &Value| match merge {
        Value::String(text) => {
            text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).ok_or_else(wrong)
        }
        Value::Array(two) => match two[..] {
            [Value::String(ref a), Value::String(ref b)] => Ok((a.clone(), b.clone())),
            _ => Err(wrong()),
        },
        _ => Err(wrong()),
    };
    model["merges"].as_array().ok_or_else(wrong)?.iter().map(pair).collect()
}

/// A piece scores by the first merge that makes it: SentencePiece joins the best piece first.
fn sentence_piece(made: &mut GgufVocab, file: &Value, merges: &[(String, String)]) {
    let mut first = HashMap::new();
    for (rank, (a, b)) in merges.iter().enumerate() {
        first.entry(format!("{a}{b}")).or_insert(rank);
    }
    let score = |token: &String| -(first.get(token).map_or(merges.len(), |&rank| rank) as f32);
    made.model = "llama".into();
    made.pre = Some("default".into());
    made.scores = Some(made.tokens.iter().map(score).collect());
    let bytes: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    let kinds = made.token_types.get_or_insert_default();
    for (kind, token) in kinds.iter_mut().zip(&made.tokens) {
        if *kind == NORMAL && bytes.contains(token) {
            *kind = BYTE;
        }
    }
    made.add_space_prefix = Some(puts_a_space_first(file));
}

/// Whether a text begins as a word does: the normaliser or the pre-tokeniser says so.
fn puts_a_space_first(file: &Value) -> bool {
    let normalizers = file["normalizer"]["normalizers"].as_array();
    let prepends = normalizers.is_some_and(|all| all.iter().any(|n| n["type"] == "Prepend"));
    let metaspace = &file["pre_tokenizer"];
    let scheme = metaspace["prepend_scheme"].as_str();
    let old = metaspace["add_prefix_space"] == true && scheme.is_none();
    let metaspace =
        metaspace["type"] == "Metaspace" && (old || scheme.is_some_and(|scheme| scheme != "never"));
    prepends || metaspace
}

/// Reads the result as a GGUF file would be read and compares.
fn check(made: &GgufVocab, original: &Tokenizer) -> Result<(), TextError> {
    let again = Tokenizer::from_gguf(made)?;
    for text in PROBES {
        for special in [Special::NONE, Special::PROMPT] {
            if again.encode(text, special)? != original.encode(text, special)? {
                let what = "in the words of GGUF it cuts this text otherwise than before";
                return Err(bad(format!("{what}: {text:?}")));
            }
        }
    }
    Ok(())
}

fn bad(what: impl Into<String>) -> TextError {
    TextError::BadTokenizer(what.into())
}
