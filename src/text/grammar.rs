//! Grammars over text as sets of tokens: JSON schemas, regular expressions, choices, Lark.
//!
//! A [`Vocabulary`] is built once per tokenizer: the bytes of every token in a trie, special tokens
//! apart from text. It compiles [`Rules`] into a [`Grammar`]; a [`Follower`] walks along one answer
//! and says after each token what may come next. The parser is `llguidance`'s, and so are its
//! bounds on the work of one step. Deliberately absent: the engine, threads, the wire.

mod follow;
mod gbnf;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

pub use self::follow::{Follower, Next, Opening, Thinking, Trigger};
use super::{TextError, Tokenizer};

/// What a text must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// An instance of a JSON schema. With `lenient`, keywords that cannot be enforced are passed
    /// over; otherwise they are an error.
    Json {
        /// The schema.
        schema: Value,
        /// Whether unknown keywords are passed over.
        lenient: bool,
    },
    /// The whole text matches a regular expression.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in `llguidance`'s dialect of Lark, with the rule `start`.
    Lark(String),
}

impl Shape {
    /// Any JSON object.
    pub fn object() -> Self {
        Self::Json { schema: json!({"type": "object"}), lenient: false }
    }

    fn named(&self, name: &str) -> GrammarWithLexer {
        let mut grammar = match self {
            Self::Json { schema, lenient } => {
                GrammarWithLexer::from_json_schema(with_options(schema.clone(), *lenient))
            }
            Self::Regex(regex) => GrammarWithLexer::from_regex(regex),
            Self::Choice(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| lark_string(text)).collect();
                GrammarWithLexer::from_lark(format!("start: {}", texts.join(" | ")))
            }
            Self::Lark(lark) => GrammarWithLexer::from_lark(lark.clone()),
        };
        grammar.name = Some(name.to_owned());
        grammar
    }
}

/// White space that a model may put between the parts of a JSON text: what pretty printers write,
/// and no more, so that no model loses itself in it.
const JSON_SPACE: &str = r" |\n[ \t]{0,32}";

/// The compiler reads its options from the schema itself.
fn with_options(schema: Value, lenient: bool) -> Value {
    let mut schema = match schema {
        Value::Object(map) => map,
        // `true` and `false` are schemas too.
        other => serde_json::Map::from_iter([("allOf".to_owned(), json!([other]))]),
    };
    let options = json!({"whitespace_pattern": JSON_SPACE, "lenient": lenient});
    schema.insert("x-guidance".to_owned(), options);
    Value::Object(schema)
}

/// A text as a literal of Lark.
pub(super) fn lark_string(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Named parts, and the Lark text that puts them together: `@name` is a part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// Has the rule `start`.
    pub lark: String,
    /// What `lark` refers to.
    pub parts: Vec<(String, Shape)>,
}

impl Rules {
    /// A single part.
    pub fn of(shape: Shape) -> Self {
        const CONTENT: &str = "content";
        Self { lark: format!("start: @{CONTENT}"), parts: vec![(CONTENT.to_owned(), shape)] }
    }

    /// The same, beginning with one of its rules.
    pub fn starting(mut self, rule: &str) -> Self {
        self.lark = format!("start: {rule}\n{}", self.lark);
        self
    }

    /// Calls, or what the other rules say.
    pub fn or(mut self, content: Self) -> Self {
        let lark = content.lark.replacen("start:", "content:", 1);
        self.lark = format!("start: calls | content\n{}\n{lark}", self.lark);
        self.parts.extend(content.parts);
        self
    }

    fn to_grammar(&self) -> TopLevelGrammar {
        let mut grammar = TopLevelGrammar::from_lark(self.lark.clone());
        grammar.grammars.extend(self.parts.iter().map(|(name, shape)| shape.named(name)));
        grammar
    }
}

/// The tokens of one model as a grammar sees them. Cheap to clone.
#[derive(Clone)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    factory: Arc<ParserFactory>,
}

impl Vocabulary {
    /// Takes a second for a large vocabulary. `stop_ids` are the tokens that end an answer; ids
    /// from `vocab_len` on are never allowed.
    pub fn new(
        tokenizer: &Tokenizer,
        vocab_len: usize,
        stop_ids: &[u32],
    ) -> Result<Self, TextError> {
        let word = |id: u32| match tokenizer.is_special(id) || stop_ids.contains(&id) {
            true => {
                let spelled = tokenizer.raw_token(id).unwrap_or_default();
                [&[TokTrie::SPECIAL_TOKEN_MARKER], spelled.as_bytes()].concat()
            }
            // A byte that no text has would be taken for the mark of a special token.
            false => tokenizer
                .token_bytes(id)
                .filter(|bytes| bytes.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER))
                .unwrap_or_default(),
        };
        let words: Vec<Vec<u8>> = (0..vocab_len as u32).map(word).collect();
        let stop_ids: Vec<u32> =
            stop_ids.iter().copied().filter(|&id| (id as usize) < vocab_len).collect();
        let info = TokRxInfo::new(words.len() as u32, *stop_ids.first().unwrap_or(&u32::MAX));
        let mut trie = TokTrie::from(&info, &words);
        if !stop_ids.is_empty() {
            trie = trie.with_eos_tokens(&stop_ids);
        }
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|e| TextError::Grammar(e.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { tokenizer: tokenizer.clone(), factory: Arc::new(factory) })
    }

    /// Compiles rules.
    ///
    /// # Errors
    /// [`TextError::Grammar`] says which keyword, rule or character is at fault.
    pub fn compile(&self, rules: Rules) -> Result<Grammar, TextError> {
        let start = self.matcher(&rules)?;
        // One that fits no text at all would only be found out by the first token.
        if let Next::Failed(_) = follow::allowed(&mut start.clone()) {
            return Err(TextError::Grammar("no text fits it".to_owned()));
        }
        Ok(Grammar { vocabulary: self.clone(), rules, start })
    }

    /// A special token as a symbol of Lark, by its text.
    pub(super) fn special(&self, text: &str) -> Option<String> {
        let id = self.tokenizer.id_of(text).filter(|&id| self.tokenizer.is_special(id))?;
        ((id as usize) < self.vocab_len()).then(|| format!("<[{id}]>"))
    }

    /// A mark as a symbol of Lark: a special token where there is one, else its text.
    pub(super) fn mark(&self, text: &str) -> String {
        self.special(text).unwrap_or_else(|| lark_string(text))
    }

    fn matcher(&self, rules: &Rules) -> Result<Matcher, TextError> {
        let fail = |e: String| TextError::Grammar(first_words(&e));
        let parser = self.factory.create_parser(rules.to_grammar());
        let matcher = Matcher::new(Ok(parser.map_err(|e| fail(e.to_string()))?));
        match matcher.get_error() {
            Some(error) => Err(fail(error)),
            None => Ok(matcher),
        }
    }

    fn vocab_len(&self) -> usize {
        self.factory.tok_env().tok_trie().vocab_size()
    }
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("len", &self.vocab_len()).finish_non_exhaustive()
    }
}

/// Rules that were understood. Every answer follows them from the start.
pub struct Grammar {
    vocabulary: Vocabulary,
    rules: Rules,
    start: Matcher,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("rules", &self.rules).finish_non_exhaustive()
    }
}

/// A lexer state takes up to 2 kB, so one grammar takes at most 100 MB.
fn limits() -> ParserLimits {
    ParserLimits { max_lexer_states: 50_000, verbose_errors: false, ..ParserLimits::default() }
}

/// What an error says, without the state of the parser that follows it.
fn first_words(error: &str) -> String {
    const CHARS_MAX: usize = 400;
    let error = error.split("\n<state>").next().unwrap_or_default().trim();
    error.chars().take(CHARS_MAX).collect()
}
