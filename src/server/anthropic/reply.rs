//! From the events of a generation to a `message`, and to the events of its stream.
//!
//! Pure: no clock, no socket, no engine. The order is Anthropic's: `message_start`, then for every
//! block `content_block_start`, deltas and `content_block_stop`, with one `ping` behind the first
//! start, then `message_delta` and `message_stop`.

use serde_json::{Value, json};

use crate::pipeline::TextEvent;
use crate::server::dialect::Dialect;
use crate::server::error::ApiError;
use crate::server::sse::Writer;
use crate::server::{ids, objects};
use crate::types::{FinishReason, Usage};

/// A message while it comes to be.
#[derive(Debug)]
pub(super) struct Reply {
    id: String,
    model: String,
    request_id: String,
    prompt_tokens: usize,
    /// The client wants to read thought.
    shows_thought: bool,
    /// It goes on until the context is full, which is less than it asked for.
    fills_context: bool,
    content: Vec<Value>,
    open: Option<Open>,
    pinged: bool,
    outcome: Option<Outcome>,
}

/// The block that is being said.
#[derive(Debug)]
enum Open {
    Text(String),
    Thinking(String),
    ToolUse { id: String, name: String, input: String },
}

#[derive(Debug)]
struct Outcome {
    reason: FinishReason,
    stop: Option<String>,
    usage: Usage,
    reasoning_tokens: usize,
}

impl Reply {
    pub(super) fn new(
        model: &str,
        request_id: &str,
        prompt_tokens: usize,
        shows_thought: bool,
        fills_context: bool,
    ) -> Self {
        Self {
            id: ids::random("msg_"),
            model: model.to_owned(),
            request_id: request_id.to_owned(),
            prompt_tokens,
            shows_thought,
            fills_context,
            content: Vec::new(),
            open: None,
            pinged: false,
            outcome: None,
        }
    }

    /// The whole object. `None` when it broke off.
    pub(super) fn message(mut self, out: &mut Vec<u8>) -> Option<Value> {
        self.close(out);
        let outcome = self.outcome.as_ref()?;
        let mut message = self.object();
        message["content"] = json!(self.content);
        message["stop_reason"] = json!(self.stop_reason(outcome));
        message["stop_sequence"] = json!(self.stop_sequence(outcome));
        message["usage"] = usage(outcome);
        message["usage"]["service_tier"] = json!("standard");
        Some(message)
    }

    fn object(&self) -> Value {
        // What was cached is known when the prompt is computed; the end says it.
        let usage = json!({
            "input_tokens": self.prompt_tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0, "output_tokens": 0, "service_tier": "standard",
        });
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": [], "stop_reason": null, "stop_sequence": null, "usage": usage,
        })
    }

    fn stop_reason(&self, outcome: &Outcome) -> &'static str {
        match outcome.reason {
            FinishReason::ToolCalls => "tool_use",
            FinishReason::Stop if outcome.stop.is_some() => "stop_sequence",
            FinishReason::Stop => "end_turn",
            FinishReason::Length if self.fills_context => "model_context_window_exceeded",
            FinishReason::Length => "max_tokens",
        }
    }

    fn stop_sequence<'a>(&self, outcome: &'a Outcome) -> Option<&'a str> {
        let told = self.stop_reason(outcome) == "stop_sequence";
        outcome.stop.as_deref().filter(|_| told)
    }

    fn text(&mut self, more: &str, out: &mut Vec<u8>) {
        if more.is_empty() {
            return;
        }
        if !matches!(self.open, Some(Open::Text(_))) {
            self.start(Open::Text(String::new()), out);
        }
        if let Some(Open::Text(text)) = &mut self.open {
            text.push_str(more);
        }
        self.delta(json!({"type": "text_delta", "text": more}), out);
    }

    fn thought(&mut self, more: &str, out: &mut Vec<u8>) {
        if more.is_empty() || !self.shows_thought {
            return;
        }
        if !matches!(self.open, Some(Open::Thinking(_))) {
            self.start(Open::Thinking(String::new()), out);
        }
        if let Some(Open::Thinking(text)) = &mut self.open {
            text.push_str(more);
        }
        self.delta(json!({"type": "thinking_delta", "thinking": more}), out);
    }

    fn start(&mut self, open: Open, out: &mut Vec<u8>) {
        self.close(out);
        let mut block = block(&open);
        if let Open::ToolUse { .. } = open {
            block["input"] = json!({});
        }
        self.open = Some(open);
        let index = self.content.len();
        emit("content_block_start", json!({"index": index, "content_block": block}), out);
        if !std::mem::replace(&mut self.pinged, true) {
            emit("ping", json!({}), out);
        }
    }

    fn delta(&self, delta: Value, out: &mut Vec<u8>) {
        emit("content_block_delta", json!({"index": self.content.len(), "delta": delta}), out);
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        let Some(open) = self.open.take() else { return };
        emit("content_block_stop", json!({"index": self.content.len()}), out);
        self.content.push(block(&open));
    }
}

impl Writer for Reply {
    fn begin(&mut self, out: &mut Vec<u8>) {
        emit("message_start", json!({"message": self.object()}), out);
    }

    fn event(&mut self, event: TextEvent, out: &mut Vec<u8>) {
        match event {
            TextEvent::Delta { text, .. } => self.text(&text, out),
            TextEvent::Reasoning { text, .. } => self.thought(&text, out),
            // A message has no fields that ask for these.
            TextEvent::Echo { .. } | TextEvent::Prompt { .. } | TextEvent::Tokens { .. } => {}
            TextEvent::ToolCall { id, name, .. } => {
                let id = format!("toolu_{}", id.trim_start_matches("call_"));
                self.start(Open::ToolUse { id, name, input: String::new() }, out);
            }
            TextEvent::ToolArguments { text, .. } => {
                let Some(Open::ToolUse { input, .. }) = &mut self.open else { return };
                input.push_str(&text);
                self.delta(json!({"type": "input_json_delta", "partial_json": text}), out);
            }
            TextEvent::Finished { reason, stop, usage, reasoning_tokens, .. } => {
                self.outcome = Some(Outcome { reason, stop, usage, reasoning_tokens });
            }
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        self.close(out);
        let Some(outcome) = &self.outcome else { return self.fail(&objects::cut_short(), out) };
        let (reason, sequence) = (self.stop_reason(outcome), self.stop_sequence(outcome));
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        emit("message_delta", json!({"delta": delta, "usage": usage(outcome)}), out);
        emit("message_stop", json!({}), out);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        emit("error", Dialect::Anthropic.error(error, &self.request_id), out);
    }
}

/// Anthropic counts what came out of the cache apart.
fn usage(outcome: &Outcome) -> Value {
    let Usage { prompt, cached, completion } = outcome.usage;
    json!({
        "input_tokens": prompt.saturating_sub(cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
        "output_tokens_details": {"thinking_tokens": outcome.reasoning_tokens},
    })
}

/// A block as it stands. The input of a call that was cut off is no object, and shown as none.
fn block(open: &Open) -> Value {
    match open {
        Open::Text(text) => json!({"type": "text", "text": text}),
        Open::Thinking(text) => json!({"type": "thinking", "thinking": text, "signature": ""}),
        Open::ToolUse { id, name, input } => {
            let input = serde_json::from_str(input).ok().filter(Value::is_object);
            let input = input.unwrap_or_else(|| json!({}));
            json!({"type": "tool_use", "id": id, "name": name, "input": input})
        }
    }
}

fn emit(kind: &str, fields: Value, out: &mut Vec<u8>) {
    let mut event = json!({"type": kind});
    for (name, value) in fields.as_object().into_iter().flatten() {
        event[name.as_str()] = value.clone();
    }
    out.extend_from_slice(format!("event: {kind}\ndata: {event}\n\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Prediction;
    use crate::types::Timings;

    fn finished(reason: FinishReason, stop: Option<&str>) -> TextEvent {
        TextEvent::Finished {
            choice: 0,
            reason,
            stop: stop.map(str::to_owned),
            usage: Usage { prompt: 9, cached: 4, completion: 5 },
            reasoning_tokens: 2,
            prediction: Prediction::default(),
            timings: Timings::default(),
        }
    }

    fn said() -> Vec<TextEvent> {
        let (choice, logprobs) = (0, Vec::new());
        let arguments = |text: &str| TextEvent::ToolArguments {
            choice,
            index: 0,
            text: text.into(),
            logprobs: Vec::new(),
        };
        let call = TextEvent::ToolCall {
            choice,
            index: 0,
            id: "call_7".into(),
            name: "f".into(),
            custom: false,
        };
        vec![
            TextEvent::Reasoning { choice, text: "hm".into(), logprobs: logprobs.clone() },
            TextEvent::Delta { choice, text: "a".into(), logprobs: logprobs.clone() },
            TextEvent::Delta { choice, text: "b".into(), logprobs },
            call,
            arguments("{\"x\":"),
            arguments("1}"),
            finished(FinishReason::ToolCalls, None),
        ]
    }

    fn stream(shows_thought: bool, events: Vec<TextEvent>) -> Vec<Value> {
        let mut reply = Reply::new("m", "req_1", 9, shows_thought, false);
        let mut out = Vec::new();
        reply.begin(&mut out);
        events.into_iter().for_each(|event| reply.event(event, &mut out));
        reply.end(&mut out);
        let text = String::from_utf8(out).unwrap();
        let parse = |block: &str| {
            let (head, data) = block.split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(head, format!("event: {}", data["type"].as_str().unwrap()));
            data
        };
        text.split_terminator("\n\n").map(parse).collect()
    }

    #[test]
    fn events_come_in_anthropics_order() {
        let events = stream(true, said());
        let names: Vec<_> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
        let block = ["content_block_start", "content_block_delta", "content_block_stop"];
        let [start, delta, stop] = block;
        let expected = [
            &["message_start", start, "ping", delta, stop][..],
            &[start, delta, delta, stop],
            &[start, delta, delta, stop],
            &["message_delta", "message_stop"],
        ];
        assert_eq!(names, expected.concat());
        let of = |kind: &str| events.iter().filter(|e| e["type"] == kind).collect::<Vec<_>>();
        let indices: Vec<_> = of(start).iter().map(|e| e["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, [0, 1, 2]);
        let call = json!({"type": "tool_use", "id": "toolu_7", "name": "f", "input": {}});
        assert_eq!(of(start)[2]["content_block"], call);
        let last = of("message_delta")[0];
        assert_eq!(last["delta"], json!({"stop_reason": "tool_use", "stop_sequence": null}));
        assert_eq!(last["usage"]["input_tokens"], 5);
        assert_eq!(last["usage"]["cache_read_input_tokens"], 4);
    }

    #[test]
    fn a_message_is_what_its_stream_adds_up_to() {
        let mut reply = Reply::new("m", "req_1", 9, false, false);
        said().into_iter().for_each(|event| reply.event(event, &mut Vec::new()));
        let message = reply.message(&mut Vec::new()).unwrap();
        let content = json!([
            {"type": "text", "text": "ab"},
            {"type": "tool_use", "id": "toolu_7", "name": "f", "input": {"x": 1}},
        ]);
        assert_eq!(message["content"], content);
        assert_eq!(message["usage"]["output_tokens_details"]["thinking_tokens"], 2);
    }

    #[test]
    fn every_end_has_its_reason() {
        for (reason, stop, fills, told) in [
            (FinishReason::Stop, None, false, "end_turn"),
            (FinishReason::Stop, Some("x"), false, "stop_sequence"),
            (FinishReason::Length, None, false, "max_tokens"),
            (FinishReason::Length, None, true, "model_context_window_exceeded"),
            (FinishReason::ToolCalls, Some("x"), false, "tool_use"),
        ] {
            let mut reply = Reply::new("m", "req_1", 9, true, fills);
            reply.event(finished(reason, stop), &mut Vec::new());
            let message = reply.message(&mut Vec::new()).unwrap();
            assert_eq!(message["stop_reason"], told);
            let sequence = stop.filter(|_| told == "stop_sequence");
            assert_eq!(message["stop_sequence"], json!(sequence));
        }
    }

    #[test]
    fn what_breaks_off_ends_with_an_error() {
        let events = stream(true, Vec::new());
        let last = events.last().unwrap();
        assert_eq!(last["type"], "error");
        assert_eq!(last["error"]["type"], "api_error");
        assert_eq!(last["request_id"], "req_1");
    }
}
