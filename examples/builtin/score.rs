//! Asking a served model the questions of the evaluation split, greedily, and counting.

use std::error::Error;

use futures_util::{StreamExt, TryStreamExt, stream};
use hearth::pipeline::{Pipeline, Prompt, TextEvent, TextRequest, Tool, Tools};
use hearth::text::Shape;
use hearth::types::{FinishReason, SamplingOverrides};
use hearth_models::train::Rng;
use serde_json::{Map, Value};

use super::corpus::world::Split;
use super::corpus::{self, Conversation, Lang, Task};

/// Questions that are asked at the same time.
const AT_ONCE: usize = 8;
/// Longer than any right answer.
const ANSWER_TOKENS_MAX: usize = 96;

/// One question, what was expected and what came.
pub struct Answered {
    pub conversation: Conversation,
    pub answer: String,
}

/// Right answers of one task in one language.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    pub asked: usize,
    /// What the task is about: the value, valid JSON, the tool with its arguments, the text.
    pub right: usize,
    /// The whole answer as the corpus has it (with the citation, with the right values).
    pub exact: usize,
}

impl Score {
    pub fn of(answers: &[Answered]) -> Self {
        Self {
            asked: answers.len(),
            right: answers.iter().filter(|a| a.is_right()).count(),
            exact: answers.iter().filter(|a| a.is_exact()).count(),
        }
    }

    pub fn right_percent(&self) -> f64 {
        100.0 * self.right as f64 / self.asked.max(1) as f64
    }

    pub fn exact_percent(&self) -> f64 {
        100.0 * self.exact as f64 / self.asked.max(1) as f64
    }
}

impl Answered {
    pub fn expected(&self) -> &str {
        self.conversation.split_last().1
    }

    pub fn is_exact(&self) -> bool {
        self.answer.trim() == self.expected()
    }

    pub fn is_right(&self) -> bool {
        let (answer, expected) = (self.answer.trim(), self.expected());
        match self.conversation.task {
            Task::Extract => without_citation(answer) == without_citation(expected),
            Task::Choose => passage(answer).is_some_and(|n| Some(n) == passage(expected)),
            Task::Json => shape(answer).is_some_and(|s| Some(s) == shape(expected)),
            Task::Tool => call(answer).is_some_and(|c| Some(c) == call(expected)),
            _ => answer == expected,
        }
    }
}

/// Asks `count` questions of one task. The same seed asks the same questions.
pub async fn ask(
    pipeline: &Pipeline,
    model: &str,
    (task, lang, split): (Task, Lang, Split),
    count: usize,
) -> Result<Vec<Answered>, Box<dyn Error>> {
    let mut rng = Rng::new(2026);
    let asked: Vec<Conversation> =
        (0..count).map(|_| corpus::question(&mut rng, (lang, task), split)).collect();
    let answers = asked.into_iter().map(|conversation| async {
        let answer = complete(pipeline, model, &conversation).await?;
        Ok(Answered { conversation, answer })
    });
    stream::iter(answers).buffered(AT_ONCE).try_collect().await
}

async fn complete(
    pipeline: &Pipeline,
    model: &str,
    conversation: &Conversation,
) -> Result<String, Box<dyn Error>> {
    let template_kwargs = Map::new();
    let messages = Value::Array(conversation.split_last().0.to_vec());
    let request = TextRequest {
        max_tokens: Some(ANSWER_TOKENS_MAX),
        tools: conversation.tools.as_ref().map(tools),
        sampling: SamplingOverrides { temperature: Some(0.0), ..SamplingOverrides::default() },
        ..TextRequest::new(model, Prompt::Chat { messages, template_kwargs })
    };
    let mut stream = pipeline.generate(request).await?;
    let mut answer = String::new();
    while let Some(event) = stream.next().await {
        match event? {
            TextEvent::Delta { text, .. } | TextEvent::ToolArguments { text, .. } => {
                answer.push_str(&text);
            }
            // As the corpus writes it; what follows the arguments is the same for every call.
            TextEvent::ToolCall { name, .. } => {
                answer.push_str(&format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": "));
            }
            TextEvent::Finished { reason: FinishReason::ToolCalls, .. } => {
                answer.push_str("}\n</tool_call>");
            }
            TextEvent::Reasoning { .. }
            | TextEvent::Prompt { .. }
            | TextEvent::Tokens { .. }
            | TextEvent::Echo { .. }
            | TextEvent::Finished { .. } => {}
        }
    }
    Ok(answer)
}

/// Tools that the model may call, once.
fn tools(definitions: &Value) -> Tools {
    let tool = |definition: &Value| {
        let function = &definition["function"];
        Tool {
            name: function["name"].as_str().unwrap_or_default().to_owned(),
            definition: definition.clone(),
            arguments: Shape::Json { schema: function["parameters"].clone(), lenient: false },
            custom: false,
            callable: true,
            param: "tools".to_owned(),
        }
    };
    let list = definitions.as_array().into_iter().flatten().map(tool).collect();
    Tools { list, ..Tools::of("tools") }
}

/// `bread [1]` is `bread`.
fn without_citation(answer: &str) -> &str {
    answer.rsplit_once(" [").map_or(answer, |(value, _)| value)
}

/// `bread: passage [1]` is `1`.
fn passage(answer: &str) -> Option<&str> {
    Some(answer.rsplit_once('[')?.1.split_once(']')?.0)
}

/// The keys of an object with the kinds of their values, in order.
fn shape(text: &str) -> Option<Vec<(String, &'static str)>> {
    let object: Map<String, Value> = serde_json::from_str(text).ok()?;
    let kind = |v: &Value| match v {
        Value::String(_) => "string",
        Value::Number(n) if n.is_u64() => "integer",
        _ => "other",
    };
    Some(object.into_iter().map(|(key, value)| (key, kind(&value))).collect())
}

/// The call between the tags.
fn call(text: &str) -> Option<Value> {
    let inner = text.strip_prefix("<tool_call>")?.strip_suffix("</tool_call>")?;
    serde_json::from_str(inner).ok()
}
