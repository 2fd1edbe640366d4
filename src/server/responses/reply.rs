//! From the events of a generation to a `response` object and to the events of its stream.
//!
//! Pure: no clock, no socket, no engine. The order and the identities are OpenAI's: every item is
//! added once under the next `output_index`, keeps its id and its type, and is done before the next
//! begins; the last event carries the whole object.

use serde_json::{Map, Value, json};

use super::request::Included;
use crate::pipeline::{TextEvent, TokenLogprob};
use crate::server::error::ApiError;
use crate::server::{chat, items};
use crate::types::{FinishReason, Usage, unix_now_s};

/// One event of a stream.
#[derive(Clone, Debug)]
pub(super) struct Event {
    /// From 0, without a gap.
    pub sequence: u64,
    /// As it goes over the wire.
    pub bytes: Vec<u8>,
}

/// A response while it comes to be.
#[derive(Debug)]
pub(super) struct Reply {
    /// The object, as it was when it began.
    shell: Map<String, Value>,
    /// What makes the ids of its items its own.
    key: String,
    included: Included,
    sequence: u64,
    output: Vec<Value>,
    open: Option<Open>,
    outcome: Option<(FinishReason, Usage, usize)>,
    events: Vec<Event>,
}

/// The item that is being said.
#[derive(Debug)]
enum Open {
    Message { text: String, logprobs: Vec<Value> },
    Reasoning { text: String },
    Call { call_id: String, name: String, arguments: String, custom: bool },
}

impl Reply {
    /// `shell` is the object with everything that is known from the start.
    pub(super) fn new(shell: Map<String, Value>, included: Included) -> Self {
        let id = shell.get("id").and_then(Value::as_str).unwrap_or_default();
        Self {
            key: id.trim_start_matches("resp_").to_owned(),
            shell,
            included,
            sequence: 0,
            output: Vec::new(),
            open: None,
            outcome: None,
            events: Vec::new(),
        }
    }

    /// Events that have come since the last time.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// It is there. One in the background waits first; returns its object.
    pub(super) fn queue(&mut self) -> Value {
        let queued = self.object("queued");
        self.lifecycle("created", queued.clone());
        self.lifecycle("queued", queued.clone());
        queued
    }

    /// It is there, and begins at once.
    pub(super) fn begin(&mut self) {
        self.lifecycle("created", self.object("in_progress"));
        self.proceed();
    }

    /// It begins. Returns its object.
    pub(super) fn proceed(&mut self) -> Value {
        let object = self.object("in_progress");
        self.lifecycle("in_progress", object.clone());
        object
    }

    /// More of it. Only one choice is ever asked for.
    pub(super) fn event(&mut self, event: TextEvent) {
        match event {
            TextEvent::Delta { text, logprobs, .. } => self.text(&text, &logprobs),
            TextEvent::Reasoning { text, .. } => self.thought(&text),
            // A response has no fields that ask for these.
            TextEvent::Echo { .. } | TextEvent::Prompt { .. } | TextEvent::Tokens { .. } => {}
            TextEvent::ToolCall { id, name, custom, .. } => {
                self.close("completed");
                let arguments = String::new();
                self.open(Open::Call { call_id: id, name, arguments, custom });
            }
            TextEvent::ToolArguments { text: more, .. } => {
                let Some(Open::Call { arguments, custom, .. }) = &mut self.open else { return };
                arguments.push_str(&more);
                let kind = match custom {
                    true => "custom_tool_call_input.delta",
                    false => "function_call_arguments.delta",
                };
                self.emit(kind, self.place([("delta", json!(more))]));
            }
            TextEvent::Finished { reason, usage, reasoning_tokens, .. } => {
                self.outcome = Some((reason, usage, reasoning_tokens));
            }
        }
    }

    /// The end of what was said; the last item is done. `None` when it broke off.
    pub(super) fn end(&mut self) -> Option<Value> {
        let reason = self.outcome.as_ref()?.0;
        if self.output.is_empty() && self.open.is_none() {
            self.open(Open::Message { text: String::new(), logprobs: Vec::new() });
        }
        let whole = reason != FinishReason::Length;
        self.close(if whole { "completed" } else { "incomplete" });
        let mut object = self.object(if whole { "completed" } else { "incomplete" });
        match whole {
            true => object["completed_at"] = json!(unix_now_s()),
            false => object["incomplete_details"] = json!({"reason": "max_output_tokens"}),
        }
        Some(object)
    }

    /// The last event, once the object is kept.
    pub(super) fn ended(&mut self, object: Value) {
        let status = object["status"].as_str().unwrap_or_default().to_owned();
        self.lifecycle(&status, object);
    }

    /// It failed; returns the object that says so.
    pub(super) fn failed(&mut self, error: &ApiError) -> Value {
        let mut object = self.object("failed");
        let code = match error.status.as_u16() {
            429 => "rate_limit_exceeded",
            _ => "server_error",
        };
        object["error"] = json!({"code": code, "message": error.message});
        self.lifecycle("failed", object.clone());
        object
    }

    fn text(&mut self, more: &str, tokens: &[TokenLogprob]) {
        if more.is_empty() && tokens.is_empty() {
            return;
        }
        if !matches!(self.open, Some(Open::Message { .. })) {
            if more.is_empty() {
                return; // tokens without text, of no item
            }
            self.close("completed");
            self.open(Open::Message { text: String::new(), logprobs: Vec::new() });
        }
        let new = match self.included.logprobs {
            true => chat::logprobs_object(tokens)["content"].take(),
            false => json!([]),
        };
        if let Some(Open::Message { text, logprobs }) = &mut self.open {
            text.push_str(more);
            logprobs.extend(new.as_array().into_iter().flatten().cloned());
        }
        let fields = [("content_index", json!(0)), ("delta", json!(more)), ("logprobs", new)];
        self.emit("output_text.delta", self.place(fields));
    }

    fn thought(&mut self, more: &str) {
        if more.is_empty() {
            return;
        }
        if !matches!(self.open, Some(Open::Reasoning { .. })) {
            self.close("completed");
            self.open(Open::Reasoning { text: String::new() });
        }
        if let Some(Open::Reasoning { text }) = &mut self.open {
            text.push_str(more);
        }
        let fields = [("content_index", json!(0)), ("delta", json!(more))];
        self.emit("reasoning_text.delta", self.place(fields));
    }

    fn open(&mut self, open: Open) {
        self.open = Some(open);
        let item = self.item("in_progress", true);
        let index = self.output.len();
        self.emit("output_item.added", json!({"output_index": index, "item": item}));
        let part = match &self.open {
            Some(Open::Message { .. }) => text_part("", &[]),
            Some(Open::Reasoning { .. }) => json!({"type": "reasoning_text", "text": ""}),
            _ => return,
        };
        let fields = [("content_index", json!(0)), ("part", part)];
        self.emit("content_part.added", self.place(fields));
    }

    fn close(&mut self, status: &str) {
        let Some(open) = &self.open else { return };
        let first = ("content_index", json!(0));
        let (kind, done, part) = match open {
            Open::Message { text, logprobs } => (
                "output_text.done",
                self.place([first.clone(), ("text", json!(text)), ("logprobs", json!(logprobs))]),
                Some(text_part(text, logprobs)),
            ),
            Open::Reasoning { text } => (
                "reasoning_text.done",
                self.place([first.clone(), ("text", json!(text))]),
                Some(json!({"type": "reasoning_text", "text": text})),
            ),
            Open::Call { arguments, custom: true, .. } => {
                let done = self.place([("input", json!(arguments))]);
                ("custom_tool_call_input.done", done, None)
            }
            Open::Call { name, arguments, .. } => {
                let fields = [("name", json!(name)), ("arguments", json!(arguments))];
                ("function_call_arguments.done", self.place(fields), None)
            }
        };
        self.emit(kind, done);
        if let Some(part) = part {
            self.emit("content_part.done", self.place([first, ("part", part)]));
        }
        let item = self.item(status, false);
        let index = self.output.len();
        self.emit("output_item.done", json!({"output_index": index, "item": item}));
        self.output.push(item);
        self.open = None;
    }

    /// The open item; at its beginning it has said nothing.
    fn item(&self, status: &str, empty: bool) -> Value {
        let id = self.item_id();
        match &self.open {
            Some(Open::Message { text, logprobs }) => {
                let content = if empty { json!([]) } else { json!([text_part(text, logprobs)]) };
                json!({"id": id, "type": "message", "status": status, "role": "assistant",
                       "content": content})
            }
            Some(Open::Reasoning { text }) => {
                let part = json!({"type": "reasoning_text", "text": text});
                let content = if empty { json!([]) } else { json!([part]) };
                let sealed = (self.included.sealed && !empty).then(|| items::seal(text));
                json!({"id": id, "type": "reasoning", "summary": [], "content": content,
                       "encrypted_content": sealed, "status": status})
            }
            Some(Open::Call { call_id, name, arguments, custom: true }) => {
                json!({"id": id, "type": "custom_tool_call", "status": status, "call_id": call_id,
                       "name": name, "input": arguments})
            }
            Some(Open::Call { call_id, name, arguments, .. }) => {
                json!({"id": id, "type": "function_call", "status": status, "call_id": call_id,
                       "name": name, "arguments": arguments})
            }
            None => Value::Null,
        }
    }

    fn item_id(&self) -> String {
        let prefix = match &self.open {
            Some(Open::Reasoning { .. }) => "rs_",
            Some(Open::Call { custom: true, .. }) => "ctc_",
            Some(Open::Call { .. }) => "fc_",
            _ => "msg_",
        };
        format!("{prefix}{}{:02x}", self.key, self.output.len())
    }

    /// The object as it stands.
    fn object(&self, status: &str) -> Value {
        let mut object = self.shell.clone();
        object["status"] = json!(status);
        object["output"] = Value::Array(self.output.clone());
        if let Some((_, usage, reasoning_tokens)) = &self.outcome {
            object["usage"] = usage_object(usage, *reasoning_tokens);
        }
        Value::Object(object)
    }

    /// The fields of an event about the open item.
    fn place<const N: usize>(&self, fields: [(&str, Value); N]) -> Value {
        let mut object = json!({"item_id": self.item_id(), "output_index": self.output.len()});
        for (name, value) in fields {
            object[name] = value;
        }
        object
    }

    fn lifecycle(&mut self, kind: &str, object: Value) {
        self.emit(kind, json!({"response": object}));
    }

    fn emit(&mut self, kind: &str, fields: Value) {
        let kind = format!("response.{kind}");
        let mut event = json!({"type": kind, "sequence_number": self.sequence});
        for (name, value) in fields.as_object().into_iter().flatten() {
            event[name.as_str()] = value.clone();
        }
        let bytes = format!("event: {kind}\ndata: {event}\n\n").into_bytes();
        self.events.push(Event { sequence: self.sequence, bytes });
        self.sequence += 1;
    }
}

/// `usage` of a response.
pub(super) fn usage_object(usage: &Usage, reasoning_tokens: usize) -> Value {
    json!({
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt + usage.completion,
    })
}

fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Prediction;
    use crate::types::Timings;

    fn reply() -> Reply {
        let shell = json!({"id": "resp_abc", "object": "response", "status": null, "output": [],
                           "usage": null, "error": null, "completed_at": null,
                           "incomplete_details": null});
        let included = Included { logprobs: false, sealed: true };
        Reply::new(shell.as_object().unwrap().clone(), included)
    }

    fn text(text: &str) -> TextEvent {
        TextEvent::Delta { choice: 0, text: text.into(), logprobs: vec![] }
    }

    fn finished(reason: FinishReason) -> TextEvent {
        let usage = Usage { prompt: 3, cached: 1, completion: 2 };
        let timings = Timings::default();
        let prediction = Prediction::default();
        TextEvent::Finished {
            choice: 0,
            reason,
            stop: None,
            usage,
            reasoning_tokens: 1,
            prediction,
            timings,
        }
    }

    /// Runs a whole reply; returns its events and holds them to the rules that every stream keeps.
    fn stream(mut reply: Reply, events: Vec<TextEvent>) -> (Vec<Value>, Value) {
        reply.begin();
        events.into_iter().for_each(|event| reply.event(event));
        let object = reply.end().unwrap();
        reply.ended(object.clone());
        let parse = |event: Event| {
            let text = String::from_utf8(event.bytes).unwrap();
            let (head, data) = text.strip_suffix("\n\n").unwrap().split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(head, format!("event: {}", data["type"].as_str().unwrap()));
            assert_eq!(data["sequence_number"], event.sequence);
            data
        };
        let events: Vec<_> = reply.take_events().into_iter().map(parse).collect();
        assert!(events.iter().zip(0..).all(|(event, i)| event["sequence_number"] == i));
        let added = events.iter().filter(|e| e["type"] == "response.output_item.added");
        let done = events.iter().filter(|e| e["type"] == "response.output_item.done");
        for ((i, added), done) in added.enumerate().zip(done) {
            assert_eq!((&added["output_index"], &done["output_index"]), (&json!(i), &json!(i)));
            let named = |e: &Value| (e["item"]["id"].clone(), e["item"]["type"].clone());
            assert_eq!(named(added), named(done));
            assert_eq!(done["item"], object["output"][i]);
        }
        (events, object)
    }

    fn kinds(events: &[Value]) -> Vec<&str> {
        let all = events.iter().filter_map(|event| event["type"].as_str());
        all.filter_map(|kind| kind.strip_prefix("response.")).collect()
    }

    #[test]
    fn a_text_comes_in_openais_order() {
        let events = vec![text("Hel"), text("lo"), finished(FinishReason::Stop)];
        let (events, object) = stream(reply(), events);
        assert_eq!(
            kinds(&events),
            [
                "created",
                "in_progress",
                "output_item.added",
                "content_part.added",
                "output_text.delta",
                "output_text.delta",
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "completed",
            ]
        );
        assert_eq!(object["output"][0]["content"][0]["text"], "Hello");
        assert_eq!(events[4]["logprobs"], json!([]));
        assert_eq!(events[4]["item_id"], object["output"][0]["id"]);
        assert_eq!(events[9]["response"], object);
        assert_eq!(object["usage"]["total_tokens"], 5);
        assert_eq!(object["usage"]["output_tokens_details"]["reasoning_tokens"], 1);
        assert!(object["completed_at"].is_u64());
    }

    #[test]
    fn thought_then_text_then_calls_are_items_of_their_own() {
        let call = |index, name: &str, custom| TextEvent::ToolCall {
            choice: 0,
            index,
            id: format!("call_{index}"),
            name: name.into(),
            custom,
        };
        let arguments = |index, text: &str| TextEvent::ToolArguments {
            choice: 0,
            index,
            text: text.into(),
            logprobs: vec![],
        };
        let thought = TextEvent::Reasoning { choice: 0, text: "hm".into(), logprobs: vec![] };
        let (events, object) = stream(
            reply(),
            vec![
                thought,
                text("Look:"),
                call(0, "f", false),
                arguments(0, "{\"a\":"),
                arguments(0, "1}"),
                call(1, "g", true),
                arguments(1, "xyz"),
                finished(FinishReason::ToolCalls),
            ],
        );
        let types: Vec<_> =
            object["output"].as_array().unwrap().iter().map(|i| i["type"].clone()).collect();
        assert_eq!(types, ["reasoning", "message", "function_call", "custom_tool_call"]);
        assert_eq!(object["output"][0]["encrypted_content"], items::seal("hm"));
        assert_eq!(object["output"][2]["arguments"], "{\"a\":1}");
        assert_eq!(object["output"][3]["input"], "xyz");
        assert_eq!(object["status"], "completed");
        let kinds = kinds(&events);
        let at = |kind: &str| kinds.iter().position(|k| *k == kind).unwrap();
        assert_eq!(
            kinds[at("reasoning_text.delta") - 2..at("reasoning_text.delta") + 4],
            [
                "output_item.added",
                "content_part.added",
                "reasoning_text.delta",
                "reasoning_text.done",
                "content_part.done",
                "output_item.done",
            ]
        );
        assert_eq!(kinds[at("function_call_arguments.delta") - 1], "output_item.added");
        assert_eq!(kinds[at("function_call_arguments.done") + 1], "output_item.done");
        assert_eq!(kinds[at("custom_tool_call_input.done") + 1], "output_item.done");
        assert_eq!(kinds.iter().filter(|k| **k == "content_part.added").count(), 2);
    }

    #[test]
    fn an_answer_that_is_cut_off_is_incomplete_and_one_without_words_a_message() {
        let (events, object) = stream(reply(), vec![text("a"), finished(FinishReason::Length)]);
        assert_eq!(kinds(&events).last(), Some(&"incomplete"));
        assert_eq!(object["incomplete_details"], json!({"reason": "max_output_tokens"}));
        assert_eq!(object["output"][0]["status"], "incomplete");
        assert!(object["completed_at"].is_null());
        let (_, object) = stream(reply(), vec![finished(FinishReason::Stop)]);
        assert_eq!(object["output"][0]["content"][0]["text"], "");
    }

    #[test]
    fn a_stream_that_breaks_off_has_failed_and_is_not_complete() {
        let mut reply = reply();
        reply.queue();
        reply.event(text("a"));
        assert!(reply.end().is_none());
        let object = reply.failed(&ApiError::unreadable_body());
        assert_eq!(
            (&object["status"], &object["error"]["code"]),
            (&json!("failed"), &json!("server_error"))
        );
        let last = String::from_utf8(reply.take_events().pop().unwrap().bytes).unwrap();
        assert!(last.starts_with("event: response.failed\n"));
    }
}
