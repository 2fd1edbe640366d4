//! The tokenizer: text to ids and back, whatever the file it came from.
//!
//! The stages (added tokens, normaliser, pre-tokeniser, model, post-processor) are those of the
//! `tokenizers` crate, held one by one: so that SentencePiece vocabularies from GGUF run on our
//! own [`ScoreBpe`], and so that special-token text can be parsed or not parsed call by call.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use tokenizers::{
    AddedVocabulary, DecoderWrapper, Model as _, ModelWrapper, NormalizerWrapper, OffsetType,
    PostProcessor as _, PostProcessorWrapper, PreTokenizer as _, PreTokenizerWrapper,
};

use super::TextError;
use super::detokenize::{DecodeStream, Detokenizer};
use super::gguf::{self, GgufVocab};
use super::spm::ScoreBpe;

/// How special tokens are treated when text is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Special {
    /// Text such as `<|im_end|>` becomes its one id; otherwise it is ordinary text. (Added tokens
    /// that are not special, such as runs of spaces, are always found.)
    pub parse: bool,
    /// BOS / EOS are added as the tokenizer's post-processor says. A BOS that the text already
    /// begins with is not doubled.
    pub add: bool,
}

impl Special {
    /// Ordinary text, nothing added: pieces of a document, untrusted text.
    pub const NONE: Self = Self { parse: false, add: false };
    /// Special-token text is parsed, nothing added.
    pub const PARSE: Self = Self { parse: true, add: false };
    /// A whole prompt: special-token text is parsed, BOS added unless the text has it.
    pub const PROMPT: Self = Self { parse: true, add: true };
    /// A whole untrusted text for an encoder: nothing parsed, `[CLS]`, `[SEP]` or BOS added.
    pub const ADD: Self = Self { parse: false, add: true };
}

/// A tokenizer. Cheap to clone; `Send + Sync`.
#[derive(Clone)]
pub struct Tokenizer {
    stages: Arc<Stages>,
    named: Arc<NamedIds>,
}

/// The algorithm behind the vocabulary.
pub(super) enum Model {
    /// Any model of the `tokenizers` crate.
    Wrapped(Box<ModelWrapper>),
    /// SentencePiece BPE driven by scores (GGUF `llama`).
    Score(ScoreBpe),
}

/// The stages of one tokenizer, in the order in which text passes through them.
struct Stages {
    added: AddedVocabulary,
    /// The same added vocabulary with special tokens hidden from matching.
    added_plain: AddedVocabulary,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    model: Model,
    post_processor: Option<PostProcessorWrapper>,
    detokenizer: Detokenizer,
    /// See [`Tokenizer::tokens_at_least`].
    longest: OnceLock<Option<usize>>,
}

/// Ids that have a role.
#[derive(Debug, Clone, Default)]
pub(super) struct NamedIds {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// End of turn, end of message: known from GGUF only.
    pub(super) other_ends: Vec<u32>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Its padding and truncation are ignored: some files ask for
    /// padding to a fixed length, which is never what a runtime wants.
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        let json = std::fs::read(path)
            .map_err(|source| TextError::Io { path: path.display().to_string(), source })?;
        Self::from_json(&json)
            .map_err(|e| TextError::BadTokenizer(format!("{}: {e}", path.display())))
    }

    /// The same from the bytes of a `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, TextError> {
        let parsed = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| TextError::BadTokenizer(e.to_string()))?;
        let bos = leading_special(parsed.get_post_processor());
        Ok(Self::assemble(Parts {
            added: parsed.get_added_vocabulary().clone(),
            normalizer: parsed.get_normalizer().cloned(),
            pre_tokenizer: parsed.get_pre_tokenizer().cloned(),
            post_processor: parsed.get_post_processor().cloned(),
            decoder: parsed.get_decoder().cloned(),
            model: Model::Wrapped(Box::new(parsed.get_model().clone())),
            named: NamedIds { bos, ..NamedIds::default() },
        }))
    }

    /// Builds the tokenizer that GGUF metadata describes.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, TextError> {
        gguf::build(vocab).map(Self::assemble)
    }

    fn assemble(parts: Parts) -> Self {
        let mut added_plain = parts.added.clone();
        added_plain.set_encode_special_tokens(true);
        let mut added = parts.added;
        added.set_encode_special_tokens(false);
        let stages = Stages {
            added,
            added_plain,
            normalizer: parts.normalizer,
            pre_tokenizer: parts.pre_tokenizer,
            model: parts.model,
            post_processor: parts.post_processor,
            detokenizer: Detokenizer::new(parts.decoder),
            longest: OnceLock::new(),
        };
        Self { stages: Arc::new(stages), named: Arc::new(parts.named) }
    }

    /// The same tokenizer with its BOS and EOS named, as `tokenizer_config.json` names them.
    /// A `tokenizer.json` does not say; without this, BOS is what the post-processor puts first.
    pub fn with_bos_eos(self, bos: Option<&str>, eos: Option<&str>) -> Self {
        let named = NamedIds {
            bos: bos.and_then(|token| self.id_of(token)).or(self.named.bos),
            eos: eos.and_then(|token| self.id_of(token)).or(self.named.eos),
            other_ends: self.named.other_ends.clone(),
        };
        Self { named: Arc::new(named), ..self }
    }

    /// Text to ids.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, TextError> {
        let stages = &*self.stages;
        let fail = |e: tokenizers::Error| TextError::Encode(e.to_string());
        let added = if special.parse { &stages.added } else { &stages.added_plain };
        let mut pieces = added.extract_and_normalize(stages.normalizer.as_ref(), text);
        if let Some(pre_tokenizer) = &stages.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(fail)?;
        }
        pieces.tokenize(|piece| stages.model.tokenize(piece.get())).map_err(fail)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(fail)?;
        let Some(post_processor) = stages.post_processor.as_ref().filter(|_| special.add) else {
            return Ok(encoding.get_ids().to_vec());
        };
        let begins_with_bos =
            self.named.bos.is_some() && encoding.get_ids().first() == self.named.bos.as_ref();
        let processed = post_processor.process(encoding, None, true).map_err(fail)?;
        let mut ids = processed.get_ids().to_vec();
        if begins_with_bos && ids.get(1) == self.named.bos.as_ref() {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// As many tokens a text of this many bytes has at least, found without reading it: no token
    /// is longer than the longest. 0 where a tokenizer may drop text.
    pub fn tokens_at_least(&self, len_bytes: usize) -> usize {
        let longest = self.stages.longest.get_or_init(|| self.longest_token());
        longest.map_or(0, |longest| len_bytes / longest)
    }

    /// Bytes of text that one token may stand for, where every byte of a text is in some token.
    fn longest_token(&self) -> Option<usize> {
        /// Unicode's composed form takes at least a third of the bytes of any other.
        const COMPOSED: usize = 3;
        let shrinks = match &self.stages.normalizer {
            None => 1,
            Some(NormalizerWrapper::NFC(_)) => COMPOSED,
            Some(_) => return None,
        };
        let is_bytes = |p: &PreTokenizerWrapper| matches!(p, PreTokenizerWrapper::ByteLevel(_));
        let all_bytes = match self.stages.pre_tokenizer.as_ref()? {
            PreTokenizerWrapper::Sequence(list) => list.as_ref().last().is_some_and(is_bytes),
            one => is_bytes(one),
        };
        let added = self.stages.added.get_added_tokens_decoder().values();
        if !all_bytes || added.clone().any(|token| token.lstrip || token.rstrip) {
            return None;
        }
        // In a byte-level vocabulary a letter is a byte.
        let ids = 0..u32::try_from(self.stages.model.vocab_size()).ok()?;
        let lengths = ids.filter_map(|id| Some(self.raw_token(id)?.chars().count()));
        Some(lengths.chain(added.map(|token| token.content.len())).max()? * shrinks)
    }

    /// Ids to text: the bytes of all tokens in a row, read as UTF-8, with U+FFFD for what is not.
    /// An id outside the vocabulary is nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let stream = self.stream();
        let mut stream = if skip_special { stream } else { stream.keep_special() };
        let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        text.extend(stream.flush());
        text
    }

    /// Incremental [`Tokenizer::decode`], special tokens skipped (see [`DecodeStream`] to keep
    /// them, and to continue a prompt).
    pub fn stream(&self) -> DecodeStream {
        DecodeStream::new(self.clone())
    }

    /// The exact bytes that a token stands for in the middle of a text: `▁the` is ` the`,
    /// `<0xE6>` is one byte, a byte-level token what its letters encode.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.raw_token(id).map(|token| self.stages.detokenizer.piece(&token, false))
    }

    /// [`Tokenizer::token_bytes`] as text, U+FFFD for bytes that are no UTF-8 by themselves.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.token_bytes(id).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The id of a token by its exact spelling in the vocabulary.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.stages
            .added
            .get_vocab()
            .get(token)
            .copied()
            .or_else(|| self.stages.model.token_to_id(token))
    }

    /// How many ids there are: one more than the greatest. (The model's logits may be longer.)
    pub fn vocab_len(&self) -> usize {
        let added = self.stages.added.get_added_tokens_decoder().keys().max();
        self.stages.model.vocab_size().max(added.map_or(0, |&id| id as usize + 1))
    }

    /// Whether a token is special: skipped when text is decoded for the user.
    pub fn is_special(&self, id: u32) -> bool {
        self.stages.added.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// The texts of all special tokens.
    pub fn special_texts(&self) -> Vec<String> {
        let added = self.stages.added.get_added_tokens_decoder().values();
        added.filter(|token| token.special).map(|token| token.content.clone()).collect()
    }

    /// Whether a token was added beside the model's own vocabulary: special tokens, and others
    /// such as `<tool_call>` that are found in text before tokenization.
    pub fn is_added(&self, id: u32) -> bool {
        self.stages.added.get_added_tokens_decoder().contains_key(&id)
    }

    /// Beginning of sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.named.bos
    }

    /// End of sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.named.eos
    }

    /// Every id that the vocabulary itself names as an end: EOS and, from GGUF, end of turn and
    /// end of message.
    pub fn end_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.named.eos.into_iter().collect();
        ids.extend(&self.named.other_ends);
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The token as the decoder wants it.
    pub(super) fn raw_token(&self, id: u32) -> Option<String> {
        self.stages.added.simple_id_to_token(id).or_else(|| self.stages.model.id_to_token(id))
    }

    pub(super) fn detokenizer(&self) -> &Detokenizer {
        &self.stages.detokenizer
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_len", &self.vocab_len()).finish_non_exhaustive()
    }
}

/// What a loader hands over.
pub(super) struct Parts {
    pub(super) added: AddedVocabulary,
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: Option<PreTokenizerWrapper>,
    pub(super) model: Model,
    pub(super) post_processor: Option<PostProcessorWrapper>,
    pub(super) decoder: Option<DecoderWrapper>,
    pub(super) named: NamedIds,
}

impl Model {
    fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<tokenizers::Token>> {
        match self {
            Self::Wrapped(model) => model.tokenize(text),
            Self::Score(model) => model.tokenize(text),
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Wrapped(model) => model.token_to_id(token),
            Self::Score(model) => model.token_to_id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Self::Wrapped(model) => model.id_to_token(id),
            Self::Score(model) => model.id_to_token(id),
        }
    }

    fn vocab_size(&self) -> usize {
        match self {
            Self::Wrapped(model) => model.get_vocab_size(),
            Self::Score(model) => model.get_vocab_size(),
        }
    }
}

/// The special token that a post-processor puts before a text, found by giving it one.
fn leading_special(post_processor: Option<&PostProcessorWrapper>) -> Option<u32> {
    let text = vec![tokenizers::Token::new(u32::MAX, String::new(), (0, 0))];
    let text = tokenizers::Encoding::from_tokens(text, 0);
    let processed = post_processor?.process(text, None, true).ok()?;
    processed.get_ids().first().copied().filter(|&id| id != u32::MAX)
}
