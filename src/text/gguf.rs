//! A tokenizer from GGUF metadata (`tokenizer.ggml.*`).
//!
//! Five kinds of vocabulary: byte-level BPE (`gpt2`), SentencePiece BPE by scores (`llama`) and by
//! merges (`gemma4`), WordPiece (`bert`) and unigram (`t5`). Tokens of type control and unknown
//! become special tokens, user defined ones added tokens. Reading the file is not done
//! here: the registry fills [`GgufVocab`].

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::Precompiled;
use tokenizers::{
    AddedToken, AddedVocabulary, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
};

use super::TextError;
use super::harmony;
use super::pretokenizer::{self, PreTokenizerKind};
use super::spm::ScoreBpe;
use super::template::END_OF_TURN_NAMES;
use super::tokenizer::{Model, NamedIds, Parts};

/// What GGUF metadata says about the vocabulary, key by key.
#[derive(Debug, Clone, Default)]
pub struct GgufVocab {
    /// `model`: `llama`, `gpt2`, `gemma4`, `bert` or `t5`.
    pub model: String,
    /// `pre`: the name of the pre-tokeniser.
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `scores`, by id.
    pub scores: Option<Vec<f32>>,
    /// `token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `merges`, best first, each two tokens with a space between.
    pub merges: Option<Vec<String>>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `unknown_token_id`.
    pub unk: Option<u32>,
    /// `padding_token_id`.
    pub pad: Option<u32>,
    /// `seperator_token_id` (the key is spelled so).
    pub sep: Option<u32>,
    /// `cls_token_id`.
    pub cls: Option<u32>,
    /// `mask_token_id`.
    pub mask: Option<u32>,
    /// `eot_token_id`: end of turn.
    pub eot: Option<u32>,
    /// `eom_token_id`: end of message.
    pub eom: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `remove_extra_whitespaces`.
    pub remove_extra_whitespaces: Option<bool>,
    /// `precompiled_charsmap`: SentencePiece's normalisation table.
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// `tokenizer.chat_template`. Carried for [`super::ChatTemplate`]; not read here.
    pub chat_template: Option<String>,
}

/// The kinds of vocabulary that `tokenizer.ggml.model` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VocabKind {
    /// `gpt2`: byte-level BPE.
    ByteLevelBpe,
    /// `llama`: SentencePiece BPE with scores.
    SentencePiece,
    /// `gemma4`: SentencePiece spelling with a list of merges.
    SentencePieceMerges,
    /// `bert`: WordPiece.
    WordPiece,
    /// `t5`: SentencePiece unigram.
    Unigram,
}

const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const BYTE: i32 = 6;

impl GgufVocab {
    /// The kind of vocabulary.
    pub fn kind(&self) -> Result<VocabKind, TextError> {
        match self.model.as_str() {
            "gpt2" => Ok(VocabKind::ByteLevelBpe),
            "llama" => Ok(VocabKind::SentencePiece),
            "gemma4" => Ok(VocabKind::SentencePieceMerges),
            "bert" => Ok(VocabKind::WordPiece),
            "t5" => Ok(VocabKind::Unigram),
            other => Err(bad(format!(
                "tokenizer.ggml.model is `{other}`; this build knows gpt2, llama, gemma4, bert, t5"
            ))),
        }
    }

    /// Lengths and ids are consistent.
    fn check(&self) -> Result<(), TextError> {
        let count = self.tokens.len();
        if count == 0 || u32::try_from(count).is_err() {
            return Err(bad(format!("tokenizer.ggml.tokens has {count} entries")));
        }
        let lengths = [
            ("scores", self.scores.as_ref().map(Vec::len)),
            ("token_type", self.token_types.as_ref().map(Vec::len)),
        ];
        for (name, length) in lengths {
            if let Some(length) = length.filter(|&length| length != count) {
                return Err(bad(format!(
                    "tokenizer.ggml.{name} has {length} entries for {count} tokens"
                )));
            }
        }
        for (name, id) in self.named() {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return Err(bad(format!(
                    "tokenizer.ggml.{name}_token_id is {id}, but there are {count} tokens"
                )));
            }
        }
        Ok(())
    }

    fn named(&self) -> [(&'static str, Option<u32>); 9] {
        [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unknown", self.unk),
            ("padding", self.pad),
            ("seperator", self.sep),
            ("cls", self.cls),
            ("mask", self.mask),
            ("eot", self.eot),
            ("eom", self.eom),
        ]
    }

    fn type_of(&self, id: usize) -> i32 {
        self.token_types.as_ref().map_or(1, |types| types[id])
    }

    /// Special: control and unknown tokens, every token with a role, and end-of-turn tokens that
    /// the file calls normal, or its user's, by mistake; so marks of messages, where all are there.
    fn is_special(&self, id: usize) -> bool {
        matches!(self.type_of(id), CONTROL | UNKNOWN)
            || self.named().iter().any(|&(_, role)| role == u32::try_from(id).ok())
            || END_OF_TURN_NAMES.contains(&self.tokens[id].as_str())
            || (harmony::MARKS.contains(&self.tokens[id].as_str()) && self.has_messages())
    }

    /// One such mark alone may be a word of any vocabulary.
    fn has_messages(&self) -> bool {
        harmony::FRAME.iter().all(|mark| self.tokens.iter().any(|token| token == mark))
    }

    /// Whether a special token swallows the whitespace after it: so in Phi-3, whose file does
    /// not say it.
    fn strips_right(&self, token: &str) -> bool {
        let phi3 = ["<|assistant|>", "<|end|>", "<|placeholder1|>"];
        self.model == "llama"
            && token.starts_with("<|")
            && token != "<|endoftext|>"
            && phi3.iter().all(|name| self.tokens.iter().any(|t| t == name))
    }

    fn added_tokens(&self) -> Vec<AddedToken> {
        let strips = self.tokens.iter().any(|token| self.strips_right(token));
        (0..self.tokens.len())
            .filter(|&id| self.is_special(id) || self.type_of(id) == USER_DEFINED)
            .map(|id| {
                let token = &self.tokens[id];
                AddedToken::from(token.clone(), self.is_special(id))
                    .normalized(false)
                    .rstrip(strips && self.strips_right(token))
            })
            .collect()
    }

    fn token(&self, id: Option<u32>) -> Option<&str> {
        id.map(|id| self.tokens[id as usize].as_str())
    }

    /// The first id of every token.
    fn ids(&self) -> Vocab {
        let mut ids = Vocab::with_capacity(self.tokens.len());
        for (id, token) in (0u32..).zip(&self.tokens) {
            ids.entry(token.clone()).or_insert(id);
        }
        ids
    }
}

/// Builds the stages of the tokenizer.
pub(super) fn build(vocab: &GgufVocab) -> Result<Parts, TextError> {
    vocab.check()?;
    match vocab.kind()? {
        VocabKind::ByteLevelBpe => byte_level_bpe(vocab),
        VocabKind::SentencePiece => sentence_piece(vocab),
        VocabKind::SentencePieceMerges => sentence_piece_merges(vocab),
        VocabKind::WordPiece => word_piece(vocab),
        VocabKind::Unigram => unigram(vocab),
    }
}

fn byte_level_bpe(vocab: &GgufVocab) -> Result<Parts, TextError> {
    let kind = pre_tokenizer_kind(vocab.pre.as_deref());
    let model = bpe(vocab)?.ignore_merges(kind.ignore_merges).build();
    let model = model.map_err(|e| bad(e.to_string()))?;
    let ends = Ends {
        first: vocab.bos.filter(|_| vocab.add_bos.unwrap_or(kind.add_bos)),
        last: vocab.eos.filter(|_| vocab.add_eos.unwrap_or(false)),
    };
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let normalizer = kind.nfc.then(|| json!({ "type": "NFC" }));
    parts(vocab, wrapped(model), ends, normalizer, Some(kind.to_json()), byte_level)
}

/// A BPE model of the file's tokens and merges.
fn bpe(vocab: &GgufVocab) -> Result<BpeBuilder, TextError> {
    let ids = vocab.ids();
    let merges = vocab.merges.as_ref().ok_or_else(|| bad("tokenizer.ggml.merges is missing"))?;
    // A merge whose parts or result are no tokens can never apply; some files have them.
    let known = |left: &str, right: &str| {
        [left, right, &[left, right].concat()].iter().all(|&token| ids.contains_key(token))
    };
    let merges = merges
        .iter()
        .filter_map(|merge| split_merge(merge))
        .filter(|&(left, right)| known(left, right))
        .map(|(left, right)| (left.to_owned(), right.to_owned()))
        .collect();
    Ok(BPE::builder().vocab_and_merges(ids, merges))
}

fn pre_tokenizer_kind(name: Option<&str>) -> PreTokenizerKind {
    let Some(name) = name else {
        tracing::warn!("the GGUF file names no pre-tokeniser; using GPT-2's");
        return pretokenizer::DEFAULT;
    };
    pretokenizer::by_name(name).unwrap_or_else(|| {
        tracing::warn!(name, "unknown pre-tokeniser in GGUF; using GPT-2's");
        pretokenizer::DEFAULT
    })
}

/// `"Ġ t"` -> `("Ġ", "t")`. The first letter may itself be a space.
fn split_merge(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge[first..].find(' ')?;
    Some((&merge[..at], &merge[at + 1..]))
}

fn sentence_piece(vocab: &GgufVocab) -> Result<Parts, TextError> {
    let scores = vocab.scores.as_ref().ok_or_else(|| bad("tokenizer.ggml.scores is missing"))?;
    let scores = scores
        .iter()
        .enumerate()
        .map(|(id, &score)| {
            let text = !vocab.is_special(id) && vocab.type_of(id) != BYTE;
            text.then_some(score)
        })
        .collect();
    let model = ScoreBpe::new(vocab.tokens.clone(), scores, vocab.unk);
    sentence_piece_parts(vocab, Model::Score(model), vocab.add_space_prefix.unwrap_or(true))
}

fn sentence_piece_merges(vocab: &GgufVocab) -> Result<Parts, TextError> {
    let mut model = bpe(vocab)?.byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = vocab.token(vocab.unk) {
        model = model.unk_token(unknown.to_owned());
    }
    let model = wrapped(model.build().map_err(|e| bad(e.to_string()))?);
    sentence_piece_parts(vocab, model, vocab.add_space_prefix.unwrap_or(false))
}

/// Spaces are spelled `▁`, bytes `<0xXX>`; `prefix` puts a space before the text.
fn sentence_piece_parts(vocab: &GgufVocab, model: Model, prefix: bool) -> Result<Parts, TextError> {
    let ends = Ends {
        first: vocab.bos.filter(|_| vocab.add_bos.unwrap_or(true)),
        last: vocab.eos.filter(|_| vocab.add_eos.unwrap_or(false)),
    };
    let escape = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let mut normalizers = vec![escape];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let normalizer = json!({ "type": "Sequence", "normalizers": normalizers });
    let decoder = json!({ "type": "Sequence", "decoders": decoders });
    parts(vocab, model, ends, Some(normalizer), None, decoder)
}

/// GGUF marks the beginning of a word with `▁`; WordPiece marks its continuation with `##`.
fn word_piece(vocab: &GgufVocab) -> Result<Parts, TextError> {
    let spelled: Vec<String> = vocab
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| match token.strip_prefix('▁') {
            Some(word) => word.to_owned(),
            None if token.starts_with('[') && token.ends_with(']') => token.clone(),
            None if vocab.is_special(id) => token.clone(),
            None => format!("##{token}"),
        })
        .collect();
    let vocab = &GgufVocab { tokens: spelled, ..vocab.clone() };
    let unknown = vocab.token(vocab.unk).unwrap_or("[UNK]").to_owned();
    if !vocab.tokens.contains(&unknown) {
        return Err(bad("a WordPiece vocabulary needs an unknown token"));
    }
    let model = WordPiece::builder()
        .vocab(vocab.ids())
        .unk_token(unknown)
        .continuing_subword_prefix("##".to_owned())
        .build()
        .map_err(|e| bad(e.to_string()))?;
    let ends = Ends {
        first: vocab.cls.or(vocab.bos).filter(|_| vocab.add_bos.unwrap_or(true)),
        last: vocab.sep.or(vocab.eos).filter(|_| vocab.add_eos.unwrap_or(true)),
    };
    // The file does not say whether text is lowercased; a vocabulary of capitalised words is cased.
    let capitalised = |token: &str| {
        let word = token.trim_start_matches("##");
        word.chars().all(char::is_alphabetic) && word.bytes().any(|b| b.is_ascii_uppercase())
    };
    let cased = vocab.tokens.iter().any(|token| capitalised(token));
    let normalizer = json!({
        "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
        "strip_accents": null, "lowercase": !cased,
    });
    let pre_tokenizer = json!({ "type": "BertPreTokenizer" });
    let decoder = json!({ "type": "WordPiece", "prefix": "##", "cleanup": true });
    let model = wrapped(model);
    parts(vocab, model, ends, Some(normalizer), Some(pre_tokenizer), decoder)
}

fn unigram(vocab: &GgufVocab) -> Result<Parts, TextError> {
    let scores = vocab.scores.as_ref().ok_or_else(|| bad("tokenizer.ggml.scores is missing"))?;
    let pieces: Vec<(String, f64)> =
        vocab.tokens.iter().cloned().zip(scores.iter().map(|&s| f64::from(s))).collect();
    let bytes = (0..vocab.tokens.len()).any(|id| vocab.type_of(id) == BYTE);
    let model = Unigram::from(pieces, vocab.unk.map(|id| id as usize), bytes)
        .map_err(|e| bad(e.to_string()))?;
    let ends = Ends {
        first: vocab.bos.filter(|_| vocab.add_bos.unwrap_or(false)),
        last: vocab.eos.filter(|_| vocab.add_eos.unwrap_or(true)),
    };
    let prefix = if vocab.add_space_prefix.unwrap_or(true) { "always" } else { "never" };
    let metaspace = json!({
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix, "split": true,
    });
    let pre_tokenizer = if vocab.remove_extra_whitespaces.unwrap_or(false) {
        let stages = [json!({ "type": "WhitespaceSplit" }), metaspace.clone()];
        json!({ "type": "Sequence", "pretokenizers": stages })
    } else {
        metaspace.clone()
    };
    let model = wrapped(model);
    let mut parts = parts(vocab, model, ends, None, Some(pre_tokenizer), metaspace)?;
    if let Some(table) = &vocab.precompiled_charsmap {
        let table = Precompiled::from(table)
            .map_err(|e| bad(format!("tokenizer.ggml.precompiled_charsmap: {e}")))?;
        parts.normalizer = Some(NormalizerWrapper::Precompiled(table));
    }
    Ok(parts)
}

/// The tokens put around a text.
struct Ends {
    first: Option<u32>,
    last: Option<u32>,
}

impl Ends {
    fn post_processor(&self, vocab: &GgufVocab) -> Result<PostProcessorWrapper, TextError> {
        let special = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let text = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
        let (first, last) = (vocab.token(self.first), vocab.token(self.last));
        let around = |texts: Vec<Value>| -> Vec<Value> {
            first.map(special).into_iter().chain(texts).chain(last.map(special)).collect()
        };
        let ids: serde_json::Map<String, Value> = [(first, self.first), (last, self.last)]
            .into_iter()
            .filter_map(|(token, id)| {
                let token = token?;
                Some((token.into(), json!({ "id": token, "ids": [id?], "tokens": [token] })))
            })
            .collect();
        from_json(json!({
            "type": "TemplateProcessing", "single": around(vec![text("A")]),
            "pair": around(vec![text("A"), text("B")]), "special_tokens": ids,
        }))
    }
}

fn wrapped(model: impl Into<ModelWrapper>) -> Model {
    Model::Wrapped(Box::new(model.into()))
}

fn parts(
    vocab: &GgufVocab,
    model: Model,
    ends: Ends,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    decoder: Value,
) -> Result<Parts, TextError> {
    let normalizer: Option<NormalizerWrapper> = normalizer.map(from_json).transpose()?;
    let mut added = AddedVocabulary::new();
    let tokens = vocab.added_tokens();
    match &model {
        Model::Wrapped(model) => added.add_tokens(tokens, &**model, normalizer.as_ref()),
        Model::Score(model) => added.add_tokens(tokens, model, normalizer.as_ref()),
    }
    .map_err(|e| bad(e.to_string()))?;
    let named = NamedIds {
        bos: vocab.bos.or(ends.first),
        eos: vocab.eos,
        other_ends: [vocab.eot, vocab.eom].into_iter().flatten().collect(),
    };
    Ok(Parts {
        added,
        post_processor: Some(ends.post_processor(vocab)?),
        normalizer,
        pre_tokenizer: pre_tokenizer.map(from_json).transpose()?,
        decoder: Some(from_json(decoder)?),
        model,
        named,
    })
}

fn from_json<T: DeserializeOwned>(json: Value) -> Result<T, TextError> {
    serde_json::from_value(json).map_err(|e| bad(e.to_string()))
}

fn bad(message: impl Into<String>) -> TextError {
    TextError::BadTokenizer(message.into())
}
