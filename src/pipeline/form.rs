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
    self, CallFormat, CallParser, CallRule, Follower, Next, Opening, OutputParser, PlainParser,
    Rules, THINK, TextError, ThinkParser, Thinking, Vocabulary, call_rules, triggers,
};
use crate::types::TokenId;

/// The form of the answers to one request.
#[derive(Clone, Debug, Default)]
pub(super) struct Form {
    /// What the engine holds them to.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// How calls are written, where there may be some.
    calls: Option<CallFormat>,
    /// Whether they may begin with a thought, and the prompt has begun it.
    thinking: Option<bool>,
    /// Special tokens that the parser must see.
    pub shown: Vec<TokenId>,
}

impl Form {
    /// The form that a request asks for, given its prompt as text.
    ///
    /// # Errors
    /// What cannot be enforced, by the field that asks for it.
    pub fn new(model: &ServedModel, request: &TextRequest, prompt: &str) -> Result<Self, Error> {
        let (style, thinks) = match (&request.prompt, model.template()) {
            (Prompt::Chat { .. }, Some(template)) => (model.style(), template.thinks()),
            _ => (None, false),
        };
        let tools = request.tools.as_ref().filter(|tools| tools.choice != ToolChoice::None);
        let calls = tools.and(style).map(|style| style.format);
        let thinking = thinks.then(|| prompt.trim_end().ends_with(THINK[0]));
        let mut form = Self { grammar: None, calls, thinking, shown: Vec::new() };
        let marks = calls.map_or(&[][..], CallFormat::marks).iter();
        let marks = marks.chain(THINK.iter().filter(|_| thinks));
        form.shown.extend(marks.filter_map(|mark| model.tokenizer().id_of(mark)));
        form.grammar = form.compile(model, request)?;
        Ok(form)
    }

    /// Reads one answer.
    pub fn parser(&self) -> Box<dyn OutputParser> {
        let rest: Box<dyn OutputParser> = match self.calls {
            Some(format) => Box::new(CallParser::new(format)),
            None => Box::new(PlainParser),
        };
        match self.thinking {
            Some(begun) => Box::new(ThinkParser::new(begun, rest)),
            None => rest,
        }
    }

    fn compile(
        &self,
        model: &ServedModel,
        request: &TextRequest,
    ) -> Result<Option<Arc<dyn Grammar>>, Error> {
        let content = request.format.as_ref().map(|format| Rules::of(format.shape.clone()));
        let tools = request.tools.as_ref();
        let (rules, triggers) = match (tools, self.calls, content) {
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
        let grammar = vocabulary(model)?.compile(rules);
        let grammar = grammar.map_err(|error| blame(model, request, error))?;
        let [open, close] = THINK.map(str::to_owned);
        let thinking = self.thinking.map(|begun| Thinking { open, close, begun });
        let opening = Arc::new(Opening { thinking, triggers });
        Ok(Some(Arc::new(Follow { grammar: Arc::new(grammar), opening })))
    }
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
