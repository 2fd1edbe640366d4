//! How the byte-level BPE families cut text before merging: GGUF's `tokenizer.ggml.pre`.
//!
//! A GGUF file names its pre-tokeniser instead of containing it. This table gives each name its
//! regular expressions, applied one after the other, each inside the pieces that the previous
//! one left; what an expression does not match is a piece too. The definitions are those of the
//! models' own published tokenizers.

use serde_json::{Value, json};

/// What a `tokenizer.ggml.pre` name implies.
#[derive(Debug, Clone, Copy)]
pub(super) struct PreTokenizerKind {
    /// Expressions to apply in turn, each a list of alternatives.
    splits: &'static [Alternatives],
    /// A whole piece that is a token is taken before any merging (Llama 3, Tekken).
    pub(super) ignore_merges: bool,
    /// BOS is added where the file does not say.
    pub(super) add_bos: bool,
    /// Text is brought to Unicode NFC first.
    pub(super) nfc: bool,
}

/// The alternatives of one expression; the first that matches wins.
type Alternatives = &'static [&'static str];

const fn plain(splits: &'static [Alternatives]) -> PreTokenizerKind {
    PreTokenizerKind { splits, ignore_merges: false, add_bos: false, nfc: false }
}

/// GPT-2; also what a file without a known name gets.
pub(super) const DEFAULT: PreTokenizerKind = plain(&[GPT2]);

const GPT2: Alternatives = &[
    "'s|'t|'re|'ve|'m|'ll|'d",
    r" ?\p{L}+",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    SPACE_BUT_ONE,
    SPACE,
];
const LLAMA3: Alternatives =
    &[CONTRACTION, WORD, UP_TO_3_DIGITS, SYMBOLS, LINE_ENDS, SPACE_BUT_ONE, SPACE];
const QWEN2: Alternatives = &[CONTRACTION, WORD, DIGIT, SYMBOLS, LINE_ENDS, SPACE_BUT_ONE, SPACE];
/// Qwen 3.5 keeps combining marks with their letters.
const QWEN35: Alternatives = &[
    CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    DIGIT,
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    LINE_ENDS,
    SPACE_BUT_ONE,
    SPACE,
];
/// OpenAI's o200k: a word is capitals, then small letters, then perhaps a contraction.
const O200K: Alternatives = &[
    concat!(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    ),
    concat!(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    ),
    UP_TO_3_DIGITS,
    SYMBOLS_AND_SLASHES,
    LINE_ENDS,
    SPACE_BUT_ONE,
    SPACE,
];
const TEKKEN: Alternatives = &[
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    DIGIT,
    SYMBOLS_AND_SLASHES,
    LINE_ENDS,
    SPACE_BUT_ONE,
    SPACE,
];
/// As o200k, with Han characters apart from other letters.
const KIMI: Alternatives = &[
    r"[\p{Han}]+",
    concat!(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    ),
    concat!(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    ),
    UP_TO_3_DIGITS,
    SYMBOLS,
    LINE_ENDS,
    SPACE_BUT_ONE,
    SPACE,
];
const DEEPSEEK3: Alternatives = &[
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    LINE_ENDS,
    SPACE_BUT_ONE,
    SPACE,
];
const BLOOM: Alternatives = &[r" ?[^(\s|[.,!?…。，、।۔،])]+"];

const CONTRACTION: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
/// Letters, with one other character that is no digit and no line end before them.
const WORD: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
const DIGIT: &str = r"\p{N}";
const UP_TO_3_DIGITS: &str = r"\p{N}{1,3}";
const SYMBOLS: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*";
const SYMBOLS_AND_SLASHES: &str = r" ?[^\s\p{L}\p{N}]+[\r\n/]*";
const LINE_ENDS: &str = r"\s*[\r\n]+";
/// A run of spaces leaves its last one to the word after it.
const SPACE_BUT_ONE: &str = r"\s+(?!\S)";
const SPACE: &str = r"\s+";

/// Letters that have case, and the punctuation of DeepSeek's first models.
const CASED_WORD: &str = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+";
const ASCII_AND_WIDE_PUNCTUATION: &str = r"\s?[!-/:-~！-／：-～‘-‟　-。]+";
const CJK: &str = "[一-龥ࠀ-一가-퟿]+";
const CJK_AND_KANA: &str = "[一-龥぀-ゟ゠-ヿ]+";

/// What a name implies; `None` for a name that is not in the table.
pub(super) fn by_name(name: &str) -> Option<PreTokenizerKind> {
    Some(match name {
        "default" | "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" | "jais" | "roberta-bpe"
        | "jina-es" | "jina-de" | "jina-v1-en" | "jina-v2-code" | "jina-v2-es" | "jina-v2-de"
        | "gigachat" | "trillion" | "granite-docling" | "mellum" | "modern-bert" => DEFAULT,
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0"
        | "lfm2" | "smaug-bpe" => {
            PreTokenizerKind { ignore_merges: true, add_bos: true, ..plain(&[LLAMA3]) }
        }
        "dbrx" | "chatglm-bpe" | "glm4" => plain(&[LLAMA3]),
        "qwen2" | "deepseek-r1-qwen" | "megrez" | "stablelm2" | "hunyuan" => {
            PreTokenizerKind { nfc: true, ..plain(&[QWEN2]) }
        }
        "qwen35" => plain(&[QWEN35]),
        "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone" | "minerva-7b" => {
            plain(&[&[DIGIT], GPT2])
        }
        "falcon" => plain(&[&[r"[\p{P}\$\+<=>\^~\|`]+"], GPT2, &["[0-9][0-9][0-9]"]]),
        "bloom" | "poro-chat" | "gpt3-finnish" => plain(&[BLOOM]),
        "viking" => plain(&[BLOOM, &[DIGIT]]),
        "gpt-4o" | "llama4" => plain(&[O200K]),
        "tekken" => PreTokenizerKind { ignore_merges: true, add_bos: true, ..plain(&[TEKKEN]) },
        "kimi-k2" => plain(&[KIMI]),
        "deepseek-llm" => plain(&[
            &[r"[\r\n]"],
            &[CASED_WORD],
            &[ASCII_AND_WIDE_PUNCTUATION],
            &[r"\s+$"],
            &[CJK],
            &[r"\p{N}+"],
        ]),
        "deepseek-coder" => {
            plain(&[&[r"[\r\n]"], &[r"\s?\p{L}+"], &[r"\s?\p{P}+"], &[CJK], &[DIGIT]])
        }
        "deepseek-v3" | "deepseek-r1" | "hunyuan-dense" => {
            plain(&[&[UP_TO_3_DIGITS], &[CJK_AND_KANA], DEEPSEEK3])
        }
        "chameleon" => PreTokenizerKind {
            add_bos: true,
            ..plain(&[
                &["<sentinel:[0-9]+>"],
                &["(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"],
                &[r"([\t\n]|    |  )"],
                &[DIGIT],
                &[r"[\p{P}!-/:-@\[-`{-~]"],
                GPT2,
            ])
        },
        _ => return None,
    })
}

/// Names under which a pre-tokeniser is written; each of a kind of its own.
const WRITTEN: [&str; 13] = [
    "llama-bpe",
    "qwen2",
    "gpt-2",
    "smollm",
    "tekken",
    "gpt-4o",
    "dbrx",
    "falcon",
    "bloom",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "qwen35",
];

/// The name of what a `tokenizer.json` does before merging, if it has one.
pub(super) fn name_of(file: &Value) -> Option<&'static str> {
    let stages = match &file["pre_tokenizer"] {
        Value::Object(stage) if stage["type"] == "Sequence" => stage["pretokenizers"].as_array()?,
        stage => &vec![stage.clone()],
    };
    let mut splits = Vec::new();
    for stage in stages {
        let regex = match stage["type"].as_str()? {
            "Split" if stage["behavior"] == "Isolated" && stage["invert"] != true => {
                stage["pattern"]["Regex"].as_str()?.to_owned()
            }
            "Digits" if stage["individual_digits"] == true => DIGIT.to_owned(),
            "ByteLevel" if stage["add_prefix_space"] == true => return None,
            "ByteLevel" if stage["use_regex"] == false => continue,
            "ByteLevel" => GPT2.join("|"),
            _ => return None,
        };
        splits.push(regex);
    }
    let nfc = match file["normalizer"]["type"].as_str() {
        None => false,
        Some("NFC") => true,
        Some(_) => return None,
    };
    let whole_first = file["model"]["ignore_merges"] == true;
    WRITTEN.into_iter().find(|name| {
        by_name(name).is_some_and(|kind| {
            kind.splits.iter().map(|split| split.join("|")).eq(splits.iter().cloned())
                && (kind.nfc, kind.ignore_merges) == (nfc, whole_first)
        })
    })
}

impl PreTokenizerKind {
    /// The pre-tokeniser in the notation of `tokenizer.json`.
    pub(super) fn to_json(self) -> Value {
        let mut stages: Vec<Value> = self.splits.iter().map(|split| isolate(split)).collect();
        stages.push(json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": false,
        }));
        json!({ "type": "Sequence", "pretokenizers": stages })
    }
}

fn isolate(alternatives: &[&str]) -> Value {
    let regex = alternatives.join("|");
    json!({
        "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false,
    })
}
