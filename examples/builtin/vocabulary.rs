//! The vocabulary: byte-level BPE over the corpus, with the tokens of the chat template behind it.

use hearth::text::GgufVocab;
use hearth_models::train::Rng;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    SplitDelimiterBehavior, TokenizerImpl,
};

use super::{TEMPLATE, corpus};

/// Ends every turn.
pub const END_OF_TURN: &str = "<|im_end|>";
/// Tokens in all.
const SIZE: usize = 2048;
/// Conversations to learn the vocabulary from.
const SAMPLE: usize = 15_000;
/// What merges are learned in: finer than Qwen2's words, which the file names as its pre-tokenizer.
/// Nothing merges across these bounds, so a name has the same tokens wherever it stands: at the
/// start of an answer, behind a space or a quotation mark, between any two Chinese characters.
const WORDS: &str = r"\p{Han}|[^\P{L}\p{Han}]+|\p{N}|[\r\n]+|\s|[^\s\p{L}\p{N}]+[\r\n]*";
/// With their types in GGUF: 3 is control, 4 is user defined (shown as text).
const ADDED: [(&str, i32); 5] = [
    ("<|endoftext|>", 3),
    ("<|im_start|>", 3),
    (END_OF_TURN, 3),
    ("<tool_call>", 4),
    ("</tool_call>", 4),
];

type Trained = TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// Learns it.
pub fn train(seed: u64) -> Result<GgufVocab, Box<dyn std::error::Error + Send + Sync>> {
    let words = SplitPattern::Regex(WORDS.to_owned());
    let split = Split::new(words, SplitDelimiterBehavior::Isolated, false)?;
    let stages = vec![split.into(), ByteLevel::new(false, false, false).into()];
    let mut tokenizer: Trained = TokenizerImpl::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(stages))));
    let mut trainer: BpeTrainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(SIZE - ADDED.len())
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut rng = Rng::new(seed);
    let texts = (0..SAMPLE).flat_map(|_| {
        let conversation = corpus::training(&mut rng, 1.0);
        let text = |m: serde_json::Value| m["content"].as_str().unwrap_or_default().to_owned();
        let tools = conversation.tools.map(|t| corpus::skills::spaced(&t));
        let texts: Vec<String> = conversation.messages.into_iter().map(text).chain(tools).collect();
        texts
    });
    // The words of the template itself are to be single tokens.
    let roles = std::iter::repeat_n("system\nuser\nassistant\ntool\nTools:\n".to_owned(), 1000);
    tokenizer.train(&mut trainer, texts.chain(roles))?;
    let model = serde_json::to_value(tokenizer.get_model())?;
    let mut tokens = vec![String::new(); tokenizer.get_model().get_vocab_size()];
    for (token, id) in model["vocab"].as_object().into_iter().flatten() {
        tokens[id.as_u64().unwrap_or_default() as usize] = token.clone();
    }
    let merge = |m: &serde_json::Value| match m {
        serde_json::Value::String(text) => text.clone(),
        pair => [&pair[0], &pair[1]].map(|p| p.as_str().unwrap_or_default()).join(" "),
    };
    let merges = model["merges"].as_array().into_iter().flatten().map(merge).collect();
    Ok(vocab(tokens, merges))
}

fn vocab(mut tokens: Vec<String>, merges: Vec<String>) -> GgufVocab {
    let mut types = vec![1; tokens.len()];
    for (token, kind) in ADDED {
        tokens.push(token.to_owned());
        types.push(kind);
    }
    let id = |name: &str| tokens.iter().position(|t| t == name).map(|id| id as u32);
    GgufVocab {
        model: "gpt2".to_owned(),
        pre: Some("qwen2".to_owned()),
        eos: id(END_OF_TURN),
        pad: id("<|endoftext|>"),
        eot: id(END_OF_TURN),
        add_bos: Some(false),
        chat_template: Some(TEMPLATE.to_owned()),
        token_types: Some(types),
        merges: Some(merges),
        tokens,
        ..GgufVocab::default()
    }
}
