//! One choice of a request: tokens in, certain text out.
//!
//! Between the engine's events and the client's stand the incremental decoder (no half character),
//! the stop matcher (no beginning of a stop string) and the parser that tells words from thought
//! and calls. A token that is a mark to the parser passes beside the text. A stop string that
//! appears ends the choice here; the engine learns of it by the stopped generation.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use super::form::Form;
use super::meter::Meter;
use super::tools::{self, Tools};
use super::{Prompt, TextEvent, TextRequest, TokenLogprob, TopLogprob, random_seed};
use crate::engine::handle::{Event, GenerateRequest, Generation, Logprobs};
use crate::error::Error;
use crate::registry::{Lease, ServedModel};
use crate::text::{DecodeStream, OutputParser, Piece, StopMatcher};
use crate::types::{FinishReason, Timings, TokenId, Usage};

/// Tokens of a text that the client expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prediction {
    /// Those that came, in the place where they were expected.
    pub accepted: usize,
    /// The others.
    pub rejected: usize,
}

/// Tokens without text are told beside the next text, or when there are so many of them: they
/// take a hundred times what their ids do.
const HELD_MAX: usize = 32;

pub(super) struct Choice {
    index: usize,
    meter: Arc<Meter>,
    /// `None` once the choice has ended.
    generation: Option<Generation>,
    /// Not held: what it has said can be told without it.
    model: Arc<ServedModel>,
    decoder: DecodeStream,
    stop: StopMatcher,
    parser: Box<dyn OutputParser>,
    tools: Option<Tools>,
    calls: Calls,
    prompt: Vec<TokenId>,
    stop_ids: Arc<[TokenId]>,
    /// Tokens before which no end counts that is none to the engine.
    end_from: usize,
    /// The log-probabilities of the prompt are wanted: in the text, and by themselves.
    scored: [Option<usize>; 2],
    token_ids: bool,
    /// Tokens whose text is not out yet, with the bytes of text before each.
    held: VecDeque<(usize, TokenLogprob)>,
    /// Tokens whose text is out of the matcher, and not of the parser.
    told: Vec<TokenLogprob>,
    /// Bytes of text decoded, and of those sent.
    decoded: usize,
    sent: usize,
    generated: usize,
    reasoning: usize,
    /// Tokens of the answer that the client expected, and tokens that it expected in all.
    expected: [usize; 2],
    /// Prompt tokens that were found in the prefix cache; `None` until the prompt is computed.
    cached: Option<usize>,
    started: Instant,
    first_token: Option<Instant>,
    ready: VecDeque<TextEvent>,
}

/// The calls of a choice.
#[derive(Default)]
struct Calls {
    /// How many have begun,
    begun: usize,
    /// and how many are complete.
    complete: usize,
    /// Arguments of a custom tool, which are told as a text at the end.
    custom: Option<String>,
}

impl Choice {
    pub fn new(
        index: usize,
        generation: Generation,
        model: &Lease<ServedModel>,
        request: &TextRequest,
        generate: &GenerateRequest,
        form: &Form,
        meter: &Arc<Meter>,
    ) -> Self {
        let mut choice = Self {
            index,
            meter: Arc::clone(meter),
            generation: Some(generation),
            decoder: decoder(model, request, &generate.prompt, form),
            model: Arc::clone(model.parts().0),
            stop: StopMatcher::new(request.stop.clone()),
            parser: form.parser(),
            tools: request.tools.clone(),
            calls: Calls::default(),
            prompt: generate.prompt.clone(),
            stop_ids: Arc::clone(&generate.stop_ids),
            end_from: if request.ignore_eos { usize::MAX } else { generate.min_tokens },
            // By themselves they are told once, by the first.
            scored: [
                request.logprobs.filter(|_| request.echo),
                request.prompt_logprobs.filter(|_| index == 0),
            ],
            token_ids: request.token_ids,
            held: VecDeque::new(),
            told: Vec::new(),
            decoded: 0,
            sent: 0,
            generated: 0,
            reasoning: 0,
            expected: [0, generate.expected.len()],
            cached: None,
            started: Instant::now(),
            first_token: None,
            ready: VecDeque::new(),
        };
        // With log-probabilities the prompt comes back when the engine has scored it.
        if request.echo && request.logprobs.is_none() {
            let text = match &request.prompt {
                Prompt::Text(text) => text.clone(),
                Prompt::Chat { .. } | Prompt::Tokens(_) => choice.prompt_text(),
            };
            choice.ready.push_back(TextEvent::Echo { choice: choice.index, text });
        }
        choice
    }

    /// The next event; `Ready(None)` after the end.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<TextEvent, Error>>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            let Some(generation) = &mut self.generation else { return Poll::Ready(None) };
            match ready!(generation.poll_next(cx)) {
                Some(Event::Prompt { cached, logprobs }) => self.prompt(cached, &logprobs),
                Some(Event::Token { id, logprobs, expected }) => {
                    self.expected[0] += usize::from(expected);
                    self.token(id, logprobs);
                }
                Some(Event::Finished { reason, usage, timings }) => {
                    self.end(reason, usage, timings);
                }
                Some(Event::Failed(message)) => {
                    self.generation = None;
                    return Poll::Ready(Some(Err(Error::Internal(message))));
                }
                Some(Event::Expired { waited }) => {
                    self.generation = None;
                    return Poll::Ready(Some(Err(Error::Expired { waited })));
                }
                None => {
                    self.generation = None;
                    return Poll::Ready(Some(Err(Error::ShuttingDown)));
                }
            }
        }
    }

    /// The prompt is computed; where it was scored, it is the first delta.
    fn prompt(&mut self, cached: usize, logprobs: &[Logprobs]) {
        self.cached = Some(cached);
        if self.scored == [None; 2] {
            return;
        }
        let scores = std::iter::once(None).chain(logprobs.iter().cloned().map(Some));
        let tokens = self.prompt.iter().zip(scores);
        let mut tokens: Vec<_> = tokens.map(|(&id, score)| self.token_logprob(id, score)).collect();
        let only = |tokens: &[TokenLogprob], top: usize| {
            let mut tokens = tokens.to_vec();
            tokens.iter_mut().for_each(|token| token.top.truncate(top));
            tokens
        };
        if let Some(top) = self.scored[1] {
            let tokens = only(&tokens, top);
            self.ready.push_back(TextEvent::Prompt { choice: self.index, tokens });
        }
        let Some(top) = self.scored[0] else { return };
        tokens = only(&tokens, top);
        let text = self.prompt_text();
        let chars: usize = tokens.iter().map(|token| token.chars).sum();
        if let Some(first) = tokens.iter_mut().find(|token| token.chars > 0) {
            first.chars = first.chars.saturating_sub(chars.saturating_sub(text.chars().count()));
        }
        self.told = tokens;
        self.delta(text);
    }

    fn prompt_text(&self) -> String {
        self.model.tokenizer().decode(&self.prompt, true)
    }

    fn token(&mut self, id: TokenId, logprobs: Option<Logprobs>) {
        self.generated += 1;
        self.first_token.get_or_insert_with(Instant::now);
        if self.token_ids {
            self.ready.push_back(TextEvent::Tokens { choice: self.index, ids: vec![id] });
        }
        let is_mark = self.parser.is_mark(id);
        if is_mark {
            self.flush();
            if self.stop.hit().is_some() {
                return self.stopped();
            }
        }
        if self.stop_ids.contains(&id) {
            if is_mark {
                self.mark(id);
            }
            return; // the end of the text, not a part of it
        }
        let text = match is_mark {
            true => String::new(),
            false => self.decoder.push(id).unwrap_or_default(),
        };
        if let Some(logprobs) = logprobs {
            let mut token = self.token_logprob(id, Some(logprobs));
            let space_dropped = !text.is_empty()
                && self.decoded == 0
                && token.bytes.starts_with(b" ")
                && !text.starts_with(' ');
            token.chars -= usize::from(space_dropped);
            self.held.push_back((self.decoded, token));
        }
        self.decoded += text.len();
        let text = match self.parser.reads_head() {
            true => text,
            false => self.stop.push(&text),
        };
        self.send(text);
        if is_mark {
            self.mark(id);
            if self.parser.is_over() && self.generated >= self.end_from {
                return self.stopped();
            }
        }
        if self.held.len() >= HELD_MAX && self.decoded == self.sent {
            self.told.extend(self.held.drain(..).map(|(_, token)| token));
            self.delta(String::new());
        }
        self.reasoning += usize::from(self.parser.is_thinking());
        if self.stop.hit().is_some() {
            self.stopped();
        }
    }

    /// No letter of the text so far waits for what follows.
    fn flush(&mut self) {
        let rest = self.decoder.flush().unwrap_or_default();
        self.decoded += rest.len();
        let mut text = self.stop.push(&rest);
        text.push_str(&self.stop.flush());
        self.send(text);
    }

    fn mark(&mut self, id: TokenId) {
        let mut pieces = Vec::new();
        self.parser.mark(id, &mut pieces);
        self.tell(pieces);
    }

    /// A stop string is complete: the engine may stop.
    fn stopped(&mut self) {
        let now = Instant::now();
        let first = self.first_token.unwrap_or(now);
        let usage = self.usage();
        let timings = Timings {
            queue_ms: 0.0,
            prefill_ms: first.duration_since(self.started).as_secs_f64() * 1e3,
            decode_ms: now.duration_since(first).as_secs_f64() * 1e3,
        };
        if let Some(generation) = self.generation.take() {
            generation.stop();
        }
        self.finish_text(FinishReason::Stop);
        self.finished(FinishReason::Stop, usage, timings);
    }

    fn usage(&self) -> Usage {
        let (prompt, cached) = (self.prompt.len(), self.cached.unwrap_or_default());
        Usage { prompt, cached, completion: self.generated }
    }

    fn end(&mut self, reason: FinishReason, usage: Usage, timings: Timings) {
        self.flush();
        let reason = match self.stop.hit() {
            Some(_) => FinishReason::Stop,
            None => reason,
        };
        self.told.extend(self.held.drain(..).map(|(_, token)| token));
        self.finish_text(reason);
        self.finished(reason, usage, timings);
    }

    /// The text is over: the parser lets go of what it held.
    fn finish_text(&mut self, reason: FinishReason) {
        let mut pieces = Vec::new();
        self.parser.finish(reason == FinishReason::Length, &mut pieces);
        self.tell(pieces);
        if !self.told.is_empty() {
            self.delta(String::new());
        }
    }

    fn finished(&mut self, reason: FinishReason, usage: Usage, timings: Timings) {
        let reason = match reason {
            FinishReason::Stop if self.calls.complete > 0 => FinishReason::ToolCalls,
            reason => reason,
        };
        let (choice, reasoning_tokens) = (self.index, self.reasoning);
        let stop = self.stop.hit().map(|hit| hit.text.clone());
        let [accepted, expected] = self.expected;
        let prediction = Prediction { accepted, rejected: expected.saturating_sub(accepted) };
        self.ready.push_back(TextEvent::Finished {
            choice,
            reason,
            stop,
            usage,
            reasoning_tokens,
            prediction,
            timings,
        });
        self.generation = None;
    }

    /// Text that became certain, with the tokens that begin in it.
    fn send(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        self.sent += text.len();
        let out = self.held.iter().take_while(|(start, _)| *start < self.sent).count();
        self.told.extend(self.held.drain(..out).map(|(_, token)| token));
        let mut pieces = Vec::new();
        self.parser.push(&text, &mut pieces);
        self.tell(pieces);
    }

    /// What the parser understood, as events.
    fn tell(&mut self, pieces: Vec<Piece>) {
        let choice = self.index;
        for piece in pieces {
            match piece {
                Piece::Text(text) => self.delta(text),
                Piece::Reasoning(text) => {
                    let logprobs = std::mem::take(&mut self.told);
                    self.ready.push_back(TextEvent::Reasoning { choice, text, logprobs });
                }
                Piece::Call { name } => {
                    let custom = self.tools.as_ref().is_some_and(|tools| tools.is_custom(&name));
                    self.calls.custom = custom.then(String::new);
                    let index = self.calls.begun;
                    self.calls.begun += 1;
                    let id = format!("call_{:016x}{:08x}", random_seed(), random_seed() as u32);
                    self.ready.push_back(TextEvent::ToolCall { choice, index, id, name, custom });
                }
                Piece::Arguments(text) => match &mut self.calls.custom {
                    Some(arguments) => arguments.push_str(&text),
                    None => self.arguments(text),
                },
                Piece::CallEnd => {
                    self.calls.complete += 1;
                    if let Some(arguments) = self.calls.custom.take() {
                        self.arguments(tools::input(&arguments));
                    }
                }
            }
        }
    }

    fn arguments(&mut self, text: String) {
        let (choice, index) = (self.index, self.calls.begun.saturating_sub(1));
        let logprobs = std::mem::take(&mut self.told);
        self.ready.push_back(TextEvent::ToolArguments { choice, index, text, logprobs });
    }

    /// Words, with the tokens that were told meanwhile.
    fn delta(&mut self, text: String) {
        let logprobs = std::mem::take(&mut self.told);
        self.ready.push_back(TextEvent::Delta { choice: self.index, text, logprobs });
    }

    fn token_logprob(&self, id: TokenId, logprobs: Option<Logprobs>) -> TokenLogprob {
        let (text, bytes) = self.spell(id);
        let logprob = logprobs.as_ref().map(|l| l.logprob);
        let top = logprobs.map(|l| l.top).unwrap_or_default().into_iter();
        let top = top.map(|(id, logprob)| {
            let (text, bytes) = self.spell(id);
            TopLogprob { id, text, bytes, logprob }
        });
        let begins = |byte: &&u8| **byte & 0xc0 != 0x80;
        let chars = match self.model.tokenizer().is_special(id) {
            true => 0,
            // A character may need the bytes of several tokens; it belongs to the first.
            false => bytes.iter().filter(begins).count(),
        };
        TokenLogprob { id, text, bytes, chars, logprob, top: top.collect() }
    }

    fn spell(&self, id: TokenId) -> (String, Vec<u8>) {
        let bytes = self.model.tokenizer().token_bytes(id).unwrap_or_default();
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        // Of one that is cancelled: it was computed, whether its client read it or not.
        for event in self.generation.take().map(Generation::unread).into_iter().flatten() {
            match event {
                Event::Prompt { cached, .. } => self.cached = Some(cached),
                Event::Token { .. } => self.generated += 1,
                Event::Finished { .. } | Event::Failed(_) | Event::Expired { .. } => {}
            }
        }
        if self.cached.is_some() {
            self.meter.add(self.usage());
        }
    }
}

/// A completion goes on after its prompt: the space before its first word is kept, unless the
/// prompt is nothing but special tokens. An answer in a chat is a text of its own.
///
/// Under a grammar every byte counts, so nothing is dropped.
fn decoder(
    model: &ServedModel,
    request: &TextRequest,
    prompt: &[TokenId],
    form: &Form,
) -> DecodeStream {
    let tokenizer = model.tokenizer();
    let stream = tokenizer.stream().showing(form.shown.clone());
    let answer = matches!(request.prompt, Prompt::Chat { .. });
    let first = answer || prompt.iter().all(|&id| tokenizer.is_special(id));
    match first && request.format.is_none() {
        true => stream,
        false => stream.continuing(),
    }
}
