//! From the events of a generation to the JSON of its answer: chunk by chunk, or whole.
//!
//! Pure: no clock, no socket, no engine. [`Chunks`] writes server-sent events, [`Whole`] collects
//! one object; both share the [`Envelope`] and the counting of usage.

use serde_json::{Map, Value, json};

use super::call::{Shape, StreamOptions};
use super::chat::{CallParts, Part};
use super::error::ApiError;
use super::sse::Writer;
use super::{chat, completions, functions};
use crate::error::Error;
use crate::pipeline::{Prediction, TextEvent, TokenLogprob};
use crate::types::{FinishReason, TokenId, Usage};

/// What is the same in every object of one answer.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    pub shape: Shape,
    /// A call is told as the only one of `functions`.
    pub in_old_words: bool,
    pub id: String,
    /// Unix time in seconds.
    pub created_s: u64,
    pub model: String,
    pub fingerprint: String,
    /// Name of the tier.
    pub tier: &'static str,
    /// Choices of each prompt,
    pub n: usize,
    /// and how many of them are shown: the best.
    pub shown: usize,
    pub prompts: usize,
    /// Tokens of all prompts together.
    pub prompt_tokens: usize,
    /// The client asked for log-probabilities.
    pub logprobs: bool,
    /// The client asked for token ids: those of every prompt.
    pub prompt_ids: Option<Vec<Vec<TokenId>>>,
}

impl Envelope {
    fn choices(&self) -> usize {
        self.n * self.prompts
    }

    fn object(&self, name: &str, mut choices: Vec<Value>) -> Map<String, Value> {
        if self.in_old_words {
            choices.iter_mut().for_each(functions::rename);
        }
        let mut object = Map::new();
        object.insert("id".to_owned(), json!(self.id));
        object.insert("object".to_owned(), json!(name));
        object.insert("created".to_owned(), json!(self.created_s));
        object.insert("model".to_owned(), json!(self.model));
        if self.shape == Shape::Chat {
            object.insert("service_tier".to_owned(), json!(self.tier));
        }
        object.insert("system_fingerprint".to_owned(), json!(self.fingerprint));
        object.insert(CHOICES.to_owned(), Value::Array(choices));
        object
    }

    /// Tokens of a prompt, where they were asked for.
    fn prompt_ids_of(&self, prompt: usize) -> Value {
        json!(self.prompt_ids.as_ref().and_then(|all| all.get(prompt)))
    }

    fn logprobs<'a>(&self, tokens: &'a [TokenLogprob]) -> Option<&'a [TokenLogprob]> {
        self.logprobs.then_some(tokens)
    }

    /// The legacy form; `null` unless asked for.
    fn legacy_logprobs(&self, tokens: &[TokenLogprob], offset: &mut usize) -> Value {
        self.logprobs(tokens).map_or(Value::Null, |t| completions::logprobs_object(t, offset))
    }
}

const CHOICES: &str = "choices";
/// vLLM's names for the tokens of a prompt and their log-probabilities.
const PROMPT_IDS: &str = "prompt_token_ids";
const PROMPT_LOGPROBS: &str = "prompt_logprobs";

/// Counts tokens over the choices of an answer: prompts once, completions all.
#[derive(Debug)]
struct Tally {
    prompt: usize,
    completion: usize,
    reasoning: usize,
    prediction: Prediction,
    /// By prompt, the least that any choice found in the prefix cache: what was there before.
    cached: Vec<Option<usize>>,
}

impl Tally {
    fn new(envelope: &Envelope) -> Self {
        let cached = vec![None; envelope.prompts];
        let (prompt, prediction) = (envelope.prompt_tokens, Prediction::default());
        Self { prompt, completion: 0, reasoning: 0, prediction, cached }
    }

    fn add(&mut self, prompt: usize, usage: &Usage, reasoning: usize, prediction: Prediction) {
        self.completion += usage.completion;
        self.reasoning += reasoning;
        self.prediction.accepted += prediction.accepted;
        self.prediction.rejected += prediction.rejected;
        let cached = &mut self.cached[prompt];
        *cached = Some(cached.map_or(usage.cached, |least| least.min(usage.cached)));
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {
                "cached_tokens": self.cached.iter().flatten().sum::<usize>(),
                "audio_tokens": 0,
            },
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": self.prediction.accepted,
                "rejected_prediction_tokens": self.prediction.rejected,
            },
        })
    }
}

/// The answer was cut short without anybody saying why: some choice never finished.
pub(super) fn cut_short() -> ApiError {
    Error::Internal("The generation ended before it was finished.".to_owned()).into()
}

/// Writes an answer as server-sent events.
#[derive(Debug)]
pub(super) struct Chunks {
    envelope: Envelope,
    options: StreamOptions,
    tally: Tally,
    /// Choices that have not finished.
    open: usize,
    /// By choice: its first chunk is out.
    begun: Vec<bool>,
    /// By choice: where its next token begins, in characters.
    offsets: Vec<usize>,
    /// By choice: its last call is of a custom tool.
    custom: Vec<bool>,
    /// By choice: the tokens of its prompt are out. A chat has one prompt and tells it once.
    told: Vec<bool>,
}

impl Chunks {
    pub(super) fn new(envelope: Envelope, options: StreamOptions) -> Self {
        let (tally, open) = (Tally::new(&envelope), envelope.choices());
        Self {
            envelope,
            options,
            tally,
            open,
            begun: vec![false; open],
            offsets: vec![0; open],
            custom: vec![false; open],
            told: vec![false; open],
        }
    }
}

impl Writer for Chunks {
    fn event(&mut self, event: TextEvent, out: &mut Vec<u8>) {
        match event {
            TextEvent::Delta { choice, text, logprobs } => {
                self.text(choice, &text, &logprobs, out);
            }
            TextEvent::Echo { choice, text } => self.text(choice, &text, &[], out),
            // A stream is refused that asks for it.
            TextEvent::Prompt { .. } => {}
            TextEvent::Tokens { choice, ids } => self.tokens(choice, &ids, out),
            TextEvent::Reasoning { choice, text, logprobs } => {
                self.part(choice, &Part::Reasoning(&text), &logprobs, out);
            }
            TextEvent::ToolCall { choice, index, id, name, custom } => {
                self.custom[choice] = custom;
                let call = Part::Call { index, id: &id, name: &name, custom };
                self.part(choice, &call, &[], out);
            }
            TextEvent::ToolArguments { choice, index, text, logprobs } => {
                let custom = self.custom[choice];
                let arguments = Part::Arguments { index, text: &text, custom };
                self.part(choice, &arguments, &logprobs, out);
            }
            TextEvent::Finished { choice, reason, usage, reasoning_tokens, prediction, .. } => {
                self.begin(choice, out);
                self.open -= 1;
                let prompt = choice / self.envelope.n;
                self.tally.add(prompt, &usage, reasoning_tokens, prediction);
                let reason = reason.as_str();
                let part = match self.envelope.shape {
                    Shape::Chat => chat::last_choice(choice, json!(reason)),
                    Shape::Completion => completions::choice(choice, "", Value::Null, Some(reason)),
                };
                self.write(vec![part], Value::Null, out);
            }
        }
    }

    /// The end: usage where it is wanted, then `[DONE]`.
    fn end(&mut self, out: &mut Vec<u8>) {
        if self.open > 0 {
            return data(&cut_short().body(), out);
        }
        if self.options.include_usage {
            self.write(Vec::new(), self.tally.usage(), out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        data(&error.body(), out);
    }
}

impl Chunks {
    fn text(&mut self, choice: usize, text: &str, logprobs: &[TokenLogprob], out: &mut Vec<u8>) {
        if self.envelope.shape == Shape::Chat {
            return self.part(choice, &Part::Text(text), logprobs, out);
        }
        let logprobs = self.envelope.legacy_logprobs(logprobs, &mut self.offsets[choice]);
        self.write(vec![completions::choice(choice, text, logprobs, None)], Value::Null, out);
    }

    /// Tokens of an answer; with the first of them come those of the prompt, which vLLM puts beside
    /// the choices of a chat and into those of a completion.
    fn tokens(&mut self, choice: usize, ids: &[TokenId], out: &mut Vec<u8>) {
        self.begin(choice, out);
        let mut part = match self.envelope.shape {
            Shape::Chat => chat::last_choice(choice, Value::Null),
            Shape::Completion => completions::choice(choice, "", Value::Null, None),
        };
        part["token_ids"] = json!(ids);
        let is_chat = self.envelope.shape == Shape::Chat;
        let mut beside = None;
        if !std::mem::replace(&mut self.told[if is_chat { 0 } else { choice }], true) {
            let prompt = self.envelope.prompt_ids_of(choice / self.envelope.n);
            match is_chat {
                true => beside = Some((PROMPT_IDS.to_owned(), prompt)),
                false => part[PROMPT_IDS] = prompt,
            }
        }
        let mut chunk = self.chunk(vec![part], Value::Null);
        chunk.extend(beside);
        data(&Value::Object(chunk), out);
    }

    /// A part of a chat.
    fn part(
        &mut self,
        choice: usize,
        part: &Part<'_>,
        logprobs: &[TokenLogprob],
        out: &mut Vec<u8>,
    ) {
        self.begin(choice, out);
        let logprobs = self.envelope.logprobs(logprobs);
        self.write(vec![chat::delta_choice(choice, part, logprobs)], Value::Null, out);
    }

    /// A chat tells the role before the first word.
    fn begin(&mut self, choice: usize, out: &mut Vec<u8>) {
        let begun = std::mem::replace(&mut self.begun[choice], true);
        if !begun && self.envelope.shape == Shape::Chat {
            self.write(vec![chat::first_choice(choice)], Value::Null, out);
        }
    }

    fn write(&self, choices: Vec<Value>, usage: Value, out: &mut Vec<u8>) {
        data(&Value::Object(self.chunk(choices, usage)), out);
    }

    fn chunk(&self, choices: Vec<Value>, usage: Value) -> Map<String, Value> {
        let name = match self.envelope.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Completion => "text_completion",
        };
        let mut chunk = self.envelope.object(name, choices);
        if self.options.include_usage {
            chunk.insert("usage".to_owned(), usage);
        }
        chunk
    }
}

fn data(value: &Value, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    write(value, out); // JSON has no raw line breaks, so one value is one line
    out.extend_from_slice(b"\n\n");
}

fn write(value: &Value, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value)
        .expect("a JSON value can always be written to memory; this is a bug");
}

/// Collects an answer into one object.
#[derive(Debug)]
pub(super) struct Whole {
    envelope: Envelope,
    tally: Tally,
    choices: Vec<Choice>,
}

#[derive(Clone, Debug, Default)]
struct Choice {
    text: String,
    reasoning: String,
    token_ids: Vec<TokenId>,
    prompt: Option<Vec<TokenLogprob>>,
    calls: Vec<CallParts>,
    logprobs: Vec<TokenLogprob>,
    reason: Option<FinishReason>,
}

impl Whole {
    pub(super) fn new(envelope: Envelope) -> Self {
        let choices = vec![Choice::default(); envelope.choices()];
        Self { tally: Tally::new(&envelope), choices, envelope }
    }

    pub(super) fn event(&mut self, event: TextEvent) {
        match event {
            TextEvent::Delta { choice, text, logprobs } => {
                let choice = &mut self.choices[choice];
                choice.text.push_str(&text);
                choice.logprobs.extend(logprobs);
            }
            TextEvent::Echo { choice, text } => self.choices[choice].text.push_str(&text),
            TextEvent::Prompt { choice, tokens } => self.choices[choice].prompt = Some(tokens),
            TextEvent::Tokens { choice, ids } => self.choices[choice].token_ids.extend(ids),
            TextEvent::Reasoning { choice, text, logprobs } => {
                let choice = &mut self.choices[choice];
                choice.reasoning.push_str(&text);
                choice.logprobs.extend(logprobs);
            }
            TextEvent::ToolCall { choice, id, name, custom, .. } => {
                let arguments = String::new();
                self.choices[choice].calls.push(CallParts { id, name, arguments, custom });
            }
            TextEvent::ToolArguments { choice, index, text, logprobs } => {
                let choice = &mut self.choices[choice];
                choice.logprobs.extend(logprobs);
                if let Some(call) = choice.calls.get_mut(index) {
                    call.arguments.push_str(&text);
                }
            }
            TextEvent::Finished { choice, reason, usage, reasoning_tokens, prediction, .. } => {
                self.choices[choice].reason = Some(reason);
                let prompt = choice / self.envelope.n;
                self.tally.add(prompt, &usage, reasoning_tokens, prediction);
            }
        }
    }

    /// Tokens of which something is told: those of the answer, and of a prompt that was scored.
    pub(super) fn tokens(&self) -> usize {
        let prompt = |choice: &Choice| choice.prompt.as_ref().map_or(0, Vec::len);
        let scored = self.choices.iter().map(|choice| prompt(choice) + choice.logprobs.len());
        self.tally.completion + scored.sum::<usize>()
    }

    /// The choices that are shown: of each prompt those of the highest log-probability per token,
    /// when more were made.
    fn best(&self) -> Vec<&Choice> {
        let Envelope { n, shown, .. } = self.envelope;
        let mean = |choice: &Choice| {
            let tokens = choice.logprobs.iter().filter_map(|token| token.logprob);
            tokens.sum::<f32>() / choice.logprobs.len().max(1) as f32
        };
        let best = |choices: &'_ [Choice]| {
            let mut places: Vec<usize> = (0..choices.len()).collect();
            if shown < n {
                places.sort_by(|&a, &b| mean(&choices[b]).total_cmp(&mean(&choices[a])));
            }
            places.truncate(shown);
            places
        };
        let prompts = self.choices.chunks(n.max(1));
        prompts.flat_map(|c| best(c).into_iter().map(|place| &c[place])).collect()
    }

    /// The object.
    ///
    /// # Errors
    /// Some choice never finished.
    pub(super) fn end(self) -> Result<Value, ApiError> {
        let choices = self.best().into_iter().enumerate().map(|(i, choice)| self.choice(i, choice));
        let mut object = self.frame();
        object.insert(CHOICES.to_owned(), choices.collect::<Result<_, _>>()?);
        Ok(Value::Object(object))
    }

    /// The same as JSON. There is never more than one choice of it as a value, which takes several
    /// times as much as its text.
    pub(super) fn bytes(self) -> Result<Vec<u8>, ApiError> {
        let mut out = Vec::new();
        for (i, (name, value)) in self.frame().iter().enumerate() {
            out.push(if i == 0 { b'{' } else { b',' });
            write(&json!(name), &mut out);
            out.push(b':');
            if name != CHOICES {
                write(value, &mut out);
                continue;
            }
            for (i, choice) in self.best().into_iter().enumerate() {
                out.push(if i == 0 { b'[' } else { b',' });
                write(&self.choice(i, choice)?, &mut out);
            }
            out.push(b']'); // there is one at least
        }
        out.push(b'}');
        Ok(out)
    }

    /// The object without its choices.
    fn frame(&self) -> Map<String, Value> {
        let name = match self.envelope.shape {
            Shape::Chat => "chat.completion",
            Shape::Completion => "text_completion",
        };
        let mut object = self.envelope.object(name, Vec::new());
        object.insert("usage".to_owned(), self.tally.usage());
        if self.envelope.shape == Shape::Chat {
            object.extend(self.about_prompt(0).map(|(name, value)| (name.to_owned(), value)));
        }
        object
    }

    /// What was asked for about a prompt: of a chat beside its choices, as vLLM has it.
    fn about_prompt(&self, prompt: usize) -> impl Iterator<Item = (&'static str, Value)> {
        let Envelope { n, prompt_ids, .. } = &self.envelope;
        let ids = prompt_ids.as_ref().map(|_| self.envelope.prompt_ids_of(prompt));
        let scores = self.choices.get(prompt * n).and_then(|first| first.prompt.as_deref());
        let told = [(PROMPT_IDS, ids), (PROMPT_LOGPROBS, scores.map(prompt_logprobs))].into_iter();
        told.filter_map(|(name, value)| Some((name, value?)))
    }

    /// One of those that are shown.
    fn choice(&self, i: usize, choice: &Choice) -> Result<Value, ApiError> {
        let envelope = &self.envelope;
        let reason = choice.reason.ok_or_else(cut_short)?.as_str();
        let mut object = match envelope.shape {
            Shape::Chat => {
                let logprobs = envelope.logprobs(&choice.logprobs);
                let Choice { text, reasoning, calls, .. } = choice;
                chat::whole_choice(i, text, reasoning, calls, logprobs, reason)
            }
            Shape::Completion => {
                let logprobs = envelope.legacy_logprobs(&choice.logprobs, &mut 0);
                completions::choice(i, &choice.text, logprobs, Some(reason))
            }
        };
        if envelope.prompt_ids.is_some() {
            object["token_ids"] = json!(choice.token_ids);
        }
        if envelope.shape == Shape::Completion {
            self.about_prompt(i / envelope.shown).for_each(|(name, v)| object[name] = v);
        }
        if envelope.in_old_words {
            functions::rename(&mut object);
        }
        Ok(object)
    }
}

/// vLLM's form: for every token of the prompt the token itself and its alternatives, by id.
fn prompt_logprobs(tokens: &[TokenLogprob]) -> Value {
    let entry = |logprob: f32, rank: Option<usize>, text: &str| {
        let logprob = logprob.max(chat::LOGPROB_MIN);
        json!({"logprob": logprob, "rank": rank, "decoded_token": text})
    };
    let one = |token: &TokenLogprob| {
        let own = token.logprob?;
        let top = token.top.iter().enumerate();
        let mut map: Map<String, Value> =
            top.map(|(i, t)| (t.id.to_string(), entry(t.logprob, Some(i + 1), &t.text))).collect();
        map.entry(token.id.to_string()).or_insert_with(|| entry(own, None, &token.text));
        Some(map)
    };
    tokens.iter().map(|token| json!(one(token))).collect()
}

#[cfg(test)]
#[path = "objects_tests.rs"]
mod tests;
