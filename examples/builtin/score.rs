//! Asking a served model the questions of the evaluation split, greedily, and counting.

use std::error::Error;

use futures_util::{StreamExt, TryStreamExt, stream};
use hearth::pipeline::{Pipeline, Prompt, TextEvent, TextRequest};
use hearth::types::SamplingOverrides;
use hearth_models::train::Rng;
use serde_json::{Map, Value};

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
    (task, lang): (Task, Lang),
    count: usize,
) -> Result<Vec<Answered>, Box<dyn Error>> {
    let mut rng = Rng::new(2026);
    let asked: Vec<Conversation> =
        (0..count).map(|_| corpus::evaluation(&mut rng, lang, task)).collect();
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
    let mut template_kwargs = Map::new();
    if let Some(tools) = &conversation.tools {
        template_kwargs.insert("tools".to_owned(), tools.clone());
    }
    let messages = Value::Array(conversation.split_last().0.to_vec());
    let request = TextRequest {
        model: model.to_owned(),
        prompt: Prompt::Chat { messages, template_kwargs },
        n: 1,
        max_tokens: Some(ANSWER_TOKENS_MAX),
        max_tokens_param: "max_tokens",
        min_tokens: 0,
        stop: Vec::new(),
        stop_token_ids: Vec::new(),
        ignore_eos: false,
        logprobs: None,
        echo: false,
        sampling: SamplingOverrides { temperature: Some(0.0), ..SamplingOverrides::default() },
        tenant: hearth::types::Tenant::default(),
    };
    let mut stream = pipeline.generate(request).await?;
    let mut answer = String::new();
    while let Some(event) = stream.next().await {
        if let TextEvent::Delta { text, .. } = event? {
            answer.push_str(&text);
        }
    }
    Ok(answer)
}

/// `bread [1]` is `bread`.
fn without_citation(answer: &str) -> &str {
    answer.rsplit_once(" [").map_or(answer, |(value, _)| value)
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
