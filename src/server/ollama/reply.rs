//! From the events of a generation to Ollama's objects: one a line, or one at the end.
//!
//! A call of a tool is told when it is complete, with its arguments as an object, as Ollama does.

use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::nanos;
use crate::pipeline::{TextEvent, TokenLogprob};
use crate::server::chat::LOGPROB_MIN;
use crate::server::dialect::Dialect;
use crate::server::error::ApiError;
use crate::server::objects;
use crate::server::sse::{Wire, Writer};
use crate::types::{FinishReason, Timings, Usage};

/// The two routes that carry text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// `message`.
    Chat,
    /// `response`.
    Generate,
}

/// An answer while it comes to be.
#[derive(Debug)]
pub(super) struct Reply {
    shape: Shape,
    /// As the client named it.
    model: String,
    began: Instant,
    load: Duration,
    text: String,
    thought: String,
    calls: Vec<Value>,
    logprobs: Vec<Value>,
    /// A call that is being said: id, name, arguments.
    open: Option<(String, String, String)>,
    outcome: Option<(FinishReason, Usage, Timings)>,
}

impl Reply {
    pub(super) fn new(shape: Shape, model: &str, began: Instant, load: Duration) -> Self {
        Self {
            shape,
            model: model.to_owned(),
            began,
            load,
            text: String::new(),
            thought: String::new(),
            calls: Vec::new(),
            logprobs: Vec::new(),
            open: None,
            outcome: None,
        }
    }

    /// The answer to a request that asks nothing.
    pub(super) fn nothing(&self, reason: &str) -> Value {
        let mut object = self.object(Said::default());
        object["done"] = json!(true);
        object["done_reason"] = json!(reason);
        object
    }

    /// The whole object. `None` when it broke off.
    pub(super) fn whole(mut self) -> Option<Value> {
        self.outcome?;
        let (text, thought) = (std::mem::take(&mut self.text), std::mem::take(&mut self.thought));
        let calls = std::mem::take(&mut self.calls);
        let mut object = self.object(Said { text: &text, thought: &thought, calls });
        if !self.logprobs.is_empty() {
            object["logprobs"] = json!(self.logprobs);
        }
        self.finish(&mut object);
        Some(object)
    }

    fn object(&self, said: Said<'_>) -> Value {
        let mut object = json!({"model": self.model, "created_at": Timestamp::now().to_string()});
        match self.shape {
            Shape::Chat => {
                let mut message = json!({"role": "assistant", "content": said.text});
                if !said.thought.is_empty() {
                    message["thinking"] = json!(said.thought);
                }
                if !said.calls.is_empty() {
                    message["tool_calls"] = Value::Array(said.calls);
                }
                object["message"] = message;
            }
            Shape::Generate => {
                object["response"] = json!(said.text);
                if !said.thought.is_empty() {
                    object["thinking"] = json!(said.thought);
                }
            }
        }
        object["done"] = json!(false);
        object
    }

    fn finish(&self, object: &mut Value) {
        let Some((reason, usage, timings)) = &self.outcome else { return };
        let time = |ms: f64| nanos(Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default());
        object["done"] = json!(true);
        object["done_reason"] = json!(match reason {
            FinishReason::Length => "length",
            FinishReason::Stop | FinishReason::ToolCalls => "stop",
        });
        object["total_duration"] = nanos(self.began.elapsed());
        object["load_duration"] = nanos(self.load);
        object["prompt_eval_count"] = json!(usage.prompt);
        object["prompt_eval_duration"] = time(timings.prefill_ms);
        object["eval_count"] = json!(usage.completion);
        object["eval_duration"] = time(timings.decode_ms);
    }

    fn say(&mut self, said: Said<'_>, logprobs: &[TokenLogprob], out: &mut Vec<u8>) {
        if said.is_empty() && logprobs.is_empty() {
            return;
        }
        let logprobs: Vec<_> = logprobs.iter().map(logprob).collect();
        let mut object = self.object(said);
        if !logprobs.is_empty() {
            object["logprobs"] = json!(logprobs);
            self.logprobs.extend(logprobs);
        }
        line(&object, out);
    }

    /// The open call is complete; one that was cut off is not told.
    fn close(&mut self, out: &mut Vec<u8>) {
        let Some((id, name, arguments)) = self.open.take() else { return };
        let arguments = serde_json::from_str::<Value>(&arguments).ok().filter(Value::is_object);
        let Some(arguments) = arguments else { return };
        let function = json!({"index": self.calls.len(), "name": name, "arguments": arguments});
        let call = json!({"id": id, "function": function});
        self.calls.push(call.clone());
        self.say(Said { calls: vec![call], ..Said::default() }, &[], out);
    }
}

/// What one object says.
#[derive(Default)]
struct Said<'a> {
    text: &'a str,
    thought: &'a str,
    calls: Vec<Value>,
}

impl Said<'_> {
    fn is_empty(&self) -> bool {
        self.text.is_empty() && self.thought.is_empty() && self.calls.is_empty()
    }
}

impl Writer for Reply {
    fn event(&mut self, event: TextEvent, out: &mut Vec<u8>) {
        match event {
            TextEvent::Delta { text, logprobs, .. } => {
                self.close(out);
                self.text.push_str(&text);
                self.say(Said { text: &text, ..Said::default() }, &logprobs, out);
            }
            TextEvent::Reasoning { text, logprobs, .. } => {
                self.thought.push_str(&text);
                self.say(Said { thought: &text, ..Said::default() }, &logprobs, out);
            }
            // There are no fields that ask for these.
            TextEvent::Echo { .. } | TextEvent::Prompt { .. } | TextEvent::Tokens { .. } => {}
            TextEvent::ToolCall { id, name, .. } => {
                self.close(out);
                self.open = Some((id, name, String::new()));
            }
            TextEvent::ToolArguments { text, logprobs, .. } => {
                if let Some((_, _, arguments)) = &mut self.open {
                    arguments.push_str(&text);
                }
                self.say(Said::default(), &logprobs, out);
            }
            TextEvent::Finished { reason, usage, timings, .. } => {
                self.close(out);
                self.outcome = Some((reason, usage, timings));
            }
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.outcome.is_none() {
            return self.fail(&objects::cut_short(), out);
        }
        let mut object = self.object(Said::default());
        self.finish(&mut object);
        line(&object, out);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        line(&Dialect::Ollama.error(error, ""), out);
    }

    /// A line cannot be a comment; one that says nothing is the nearest to it.
    fn wire(&self) -> Wire {
        let mut beat = Vec::new();
        line(&self.object(Said::default()), &mut beat);
        Wire { content_type: "application/x-ndjson", beat: Bytes::from(beat) }
    }
}

fn logprob(token: &TokenLogprob) -> Value {
    let mut own = entry(&token.text, &token.bytes, token.logprob.unwrap_or_default());
    if !token.top.is_empty() {
        let top = token.top.iter().map(|top| entry(&top.text, &top.bytes, top.logprob));
        own["top_logprobs"] = top.collect();
    }
    own
}

fn entry(text: &str, bytes: &[u8], logprob: f32) -> Value {
    json!({"token": text, "logprob": logprob.max(LOGPROB_MIN), "bytes": bytes})
}

fn line(value: &Value, out: &mut Vec<u8>) {
    // JSON has no raw line breaks, so one value is one line.
    out.extend_from_slice(value.to_string().as_bytes());
    out.push(b'\n');
}
