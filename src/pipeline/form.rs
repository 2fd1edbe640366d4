//! The form of an answer: what the model must keep to, and how its text is read.
//!
//! Text knows grammars, the engine knows masks; neither knows the other, and here they meet. What a
//! request says about formats and tools, what its prompt has begun and what the model's template is
//! used to become one [`Form`].

use std::sync::Arc;

use super::{Prompt, TextRequest, Tool, ToolChoice};
use crate::engine::handle::{Allowed, Grammar, Mask, MaskSource};
use crate::error::Error;
use crate::registry::ServedModel;
use crate::text::{
    self, CallFormat, CallParser, CallRule, Follower, Harmony, HarmonyParser, Next, Opening,
    OutputParser, PlainParser, Rules, THINK, TextError, ThinkParser, Thinking, Vocabulary,
    call_rules, triggers,
};
use crate::types::TokenId;

/// The form of the answers to one request.
#[derive(Clone, Debug)]
pub(super) struct Form {
    /// What the engine holds them to.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// Special tokens that the parser must see as text.
    pub shown: Vec<TokenId>,
    writing: Writing,
}

/// How an answer is written.
#[derive(Clone, Debug)]
enum Writing {
    /// As text with marks in it.
    Tags {
        /// How calls are written, where there may be some.
        calls: Option<CallFormat>,
        /// Whether it may begin with a thought, and the prompt has begun it.
        thinking: Option<bool>,
    },
    /// As messages.
    Harmony {
        /// Their marks.
        marks: Harmony,
        /// Tools that may be called.
        tools: Vec<String>,
    },
}

impl Form {
    /// The form that a request asks for, given its prompt as text.
    ///
    /// # Errors
    /// What cannot be enforced, by the field that asks for it.
    pub fn new(model: &ServedModel, request: &TextRequest, prompt: &str) -> Result<Self, Error> {
        let writing = Writing::of(model, request, prompt);
        let shown = writing.marks().filter_map(|mark| model.tokenizer().id_of(mark)).collect();
        let grammar = match writing.rules(model, request)? {
            Some((rules, opening)) => {
                let grammar = vocabulary(model)?.compile(rules);
                let grammar = grammar.map_err(|error| blame(model, request, error))?;
                let (grammar, opening) = (Arc::new(grammar), Arc::new(opening));
                Some(Arc::new(Follow { grammar, opening }) as Arc<dyn Grammar>)
            }
            None => None,
        };
        Ok(Self { grammar, shown, writing })
    }

    /// Reads one answer.
    pub fn parser(&self) -> Box<dyn OutputParser> {
        let (calls, thinking) = match &self.writing {
            Writing::Tags { calls, thinking } => (calls, thinking),
            Writing::Harmony { marks, tools } => {
                return Box::new(HarmonyParser::new(*marks, tools.clone()));
            }
        };
        let rest: Box<dyn OutputParser> = match calls {
            Some(format) => Box::new(CallParser::new(*format)),
            None => Box::new(PlainParser),
        };
        match thinking {
            Some(begun) => Box::new(ThinkParser::new(*begun, rest)),
            None => rest,
        }
    }
}

impl Writing {
    fn of(model: &ServedModel, request: &TextRequest, prompt: &str) -> Self {
        let (Prompt::Chat { .. }, Some(template)) = (&request.prompt, model.template()) else {
            return Self::Tags { calls: None, thinking: None };
        };
        let tools = request.tools.as_ref().filter(|tools| tools.choice != ToolChoice::None);
        if let Some(marks) = model.harmony() {
            let tools = tools.into_iter().flat_map(|tools| tools.callable());
            return Self::Harmony { marks, tools: tools.map(|tool| tool.name.clone()).collect() };
        }
        let calls = tools.and(model.style()).map(|style| style.format);
        let begun = || prompt.trim_end().ends_with(THINK[0]);
        Self::Tags { calls, thinking: template.tags_thought().then(begun) }
    }

    /// Marks in the text.
    fn marks(&self) -> impl Iterator<Item = &'static str> {
        let (calls, thinks) = match self {
            Self::Tags { calls, thinking } => (*calls, thinking.is_some()),
            Self::Harmony { .. } => (None, false),
        };
        let calls = calls.map_or(&[][..], CallFormat::marks).iter();
        calls.chain(THINK.iter().filter(move |_| thinks)).copied()
    }

    /// What an answer must keep to, and from where on.
    fn rules(
        &self,
        model: &ServedModel,
        request: &TextRequest,
    ) -> Result<Option<(Rules, Opening)>, Error> {
        let (calls, thinking) = match self {
            Self::Tags { calls, thinking } => (*calls, *thinking),
            Self::Harmony { marks, tools } => {
                return harmony_rules(marks, !tools.is_empty(), model, request);
            }
        };
        let content = request.format.as_ref().map(|format| Rules::of(format.shape.clone()));
        let tools = request.tools.as_ref();
        let (rules, triggers) = match (tools, calls, content) {
            (Some(tools), Some(format), content) => {
                let callable: Vec<CallRule> = tools.callable().map(Tool::rule).collect();
                let calls = call_rules(format, &callable, tools.parallel, vocabulary(model)?);
                match (tools.choice, content) {
                    (ToolChoice::Auto, None) => (calls.starting("calls"), triggers(format)),
                    (ToolChoice::Auto, Some(content)) => (calls.or(content), Vec::new()),
                    _ => (calls.starting("calls"), Vec::new()),
                }
            }
            (_, _, Some(content)) => (content, Vec::new()),
            (_, _, None) => return Ok(None),
        };
        let [open, close] = THINK.map(str::to_owned);
        let thinking = thinking.map(|begun| Thinking { open, close, begun });
        Ok(Some((rules, Opening { thinking, triggers })))
    }
}

/// Of an answer in messages thoughts are a part of the rules, which hold from the first token on.
fn harmony_rules(
    marks: &Harmony,
    calls: bool,
    model: &ServedModel,
    request: &TextRequest,
) -> Result<Option<(Rules, Opening)>, Error> {
    if !calls && request.format.is_none() {
        return Ok(None);
    }
    let tools = request.tools.as_ref().filter(|_| calls);
    let must_call = tools.is_some_and(|tools| tools.choice == ToolChoice::Required);
    let callable = tools.into_iter().flat_map(|tools| tools.callable());
    let callable: Vec<CallRule> = callable.map(Tool::rule).collect();
    let words = request.format.as_ref().map(|format| format.shape.clone());
    let rules = marks.rules(&callable, must_call, words, vocabulary(model)?);
    Ok(Some((rules, Opening::default())))
}

/// Finds out which field has what the compiler refused.
fn blame(model: &ServedModel, request: &TextRequest, error: TextError) -> Error {
    let Ok(vocabulary) = model.vocabulary() else { return Error::Internal(error.to_string()) };
    if let Some(format) = &request.format
        && let Err(why) = vocabulary.compile(Rules::of(format.shape.clone()))
    {
        return Error::invalid(format.param, format!("{}: {why}.", format.refusal));
    }
    for tool in request.tools.iter().flat_map(|tools| &tools.list) {
        if let Err(why) = vocabulary.compile(Rules::of(tool.arguments.clone())) {
            let message = format!("Invalid schema for function '{}': {why}.", tool.name);
            return Error::invalid(&tool.param, message);
        }
    }
    Error::invalid("tools", format!("The tools together are too much for a grammar: {error}."))
}

fn vocabulary(model: &ServedModel) -> Result<&Vocabulary, Error> {
    model.vocabulary().map_err(|error| Error::Internal(error.to_string()))
}

/// The engine's view of a grammar.
#[derive(Debug)]
struct Follow {
    grammar: Arc<text::Grammar>,
    opening: Arc<Opening>,
}

impl Grammar for Follow {
    fn start(&self) -> Box<dyn MaskSource> {
        Box::new(Source(Follower::new(Arc::clone(&self.grammar), Arc::clone(&self.opening))))
    }
}

struct Source(Follower);

impl MaskSource for Source {
    fn advance(&mut self, token: TokenId) {
        self.0.push(token);
    }

    fn allowed(&mut self) -> Allowed {
        match self.0.allowed() {
            Next::Any => Allowed::Any,
            Next::Only(words) => Allowed::Only(Mask(words)),
            Next::End => Allowed::End,
            Next::Failed(why) => Allowed::Failed(why),
        }
    }
}
