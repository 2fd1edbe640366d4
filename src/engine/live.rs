//! One sequence between submission and end: its client, its clock, its counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::grammar::{Allowed, Guide, Masks};
use super::handle::{Event, GenerateRequest, Logprobs, Submission};
use super::sampler::{History, Sampler};
use crate::types::{FinishReason, Tenant, Timings, TokenId, Usage};

/// A sequence that waits or runs.
pub(super) struct Live {
    request: GenerateRequest,
    events: UnboundedSender<Event>,
    stopped: Arc<AtomicBool>,
    history: History,
    guide: Option<Guide>,
    /// Logits whose grammar did not know yet what may come.
    held: Option<Vec<f32>>,
    generated: usize,
    prompt_logprobs: Vec<Logprobs>,
    /// Prompt tokens that were found in the prefix cache; `None` until the prompt is computed.
    cached: Option<usize>,
    arrived: Instant,
    /// First step with rows of it.
    begun: Option<Instant>,
    /// First generated token.
    answered: Option<Instant>,
}

/// What became of a row of logits.
pub(super) enum Choice {
    Token(Sampled),
    /// The grammar says that the answer is complete.
    Complete,
    /// No token can be chosen, because of this.
    Stuck(String),
    /// The grammar does not know yet what may come.
    Later,
}

/// A token that was chosen.
pub(super) struct Sampled {
    pub id: TokenId,
    pub logprobs: Option<Logprobs>,
}

impl Live {
    pub fn new(submission: Submission, masks: &Masks) -> Self {
        let Submission { id: _, request, events, stopped, arrived, deadline: _ } = submission;
        let history = History::new(&request);
        let guide = request.grammar.as_deref().map(|grammar| Guide::new(grammar, masks));
        Self {
            request,
            events,
            stopped,
            history,
            guide,
            held: None,
            generated: 0,
            prompt_logprobs: Vec::new(),
            cached: None,
            arrived,
            begun: None,
            answered: None,
        }
    }

    /// The reader has all that it wants: a stop string.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Notes the first step; true when this is it.
    pub fn begin(&mut self, now: Instant) -> bool {
        let first = self.begun.is_none();
        self.begun.get_or_insert(now);
        first
    }

    pub fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    pub fn tenant(&self) -> Tenant {
        self.request.tenant
    }

    /// It will not be begun any more.
    pub fn expire(&self) {
        self.send(Event::Expired { waited: self.arrived.elapsed() });
    }

    pub fn wants_no_token(&self) -> bool {
        self.request.max_tokens == 0
    }

    /// Log-probability of the prompt token after `position`; after the last one comes none.
    pub fn score(&mut self, position: usize, logits: &[f32], sampler: &mut Sampler) {
        let top = self.request.prompt_logprobs.unwrap_or(0);
        if let Some(&token) = self.request.prompt.get(position + 1) {
            self.prompt_logprobs.push(sampler.logprobs(logits, token, top));
        }
    }

    /// The log-probabilities of the whole prompt, once.
    pub fn take_prompt_logprobs(&mut self) -> Vec<Logprobs> {
        std::mem::take(&mut self.prompt_logprobs)
    }

    /// The prompt is computed; true when it is so for the first time.
    pub fn prompt_done(&mut self, cached: usize, logprobs: Vec<Logprobs>) -> bool {
        let first = self.cached.replace(cached).is_none();
        if first {
            self.send(Event::Prompt { cached, logprobs });
        }
        first
    }

    /// Chooses the next token. Logits that come before their grammar are kept.
    pub fn sample(&mut self, logits: &[f32], sampler: &mut Sampler) -> Choice {
        let choice = self.choose(logits, sampler, Duration::ZERO);
        if matches!(choice, Choice::Later) {
            self.held = Some(logits.to_vec());
        }
        choice
    }

    /// The same with the logits that were kept, if there are any.
    pub fn sample_held(&mut self, sampler: &mut Sampler, patience: Duration) -> Choice {
        let Some(logits) = self.held.take() else { return Choice::Later };
        let choice = self.choose(&logits, sampler, patience);
        if matches!(choice, Choice::Later) {
            self.held = Some(logits);
        }
        choice
    }

    /// It keeps logits.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Its rows will be computed again.
    pub fn preempted(&mut self) {
        self.held = None;
    }

    fn choose(&mut self, logits: &[f32], sampler: &mut Sampler, patience: Duration) -> Choice {
        let mask = match &mut self.guide {
            None => None,
            Some(guide) => match guide.allowed(patience) {
                None => return Choice::Later,
                Some(Allowed::End) => return Choice::Complete,
                Some(Allowed::Failed(why)) => {
                    return Choice::Stuck(format!("the grammar cannot go on: {why}"));
                }
                Some(Allowed::Any) => None,
                Some(Allowed::Only(mask)) => Some(mask),
            },
        };
        let id = sampler.sample(logits, &self.request, &self.history, self.generated, mask);
        let Some(id) = id else {
            return Choice::Stuck("the model's output leaves no token to choose".to_owned());
        };
        let logprobs = self.request.logprobs.map(|top| sampler.logprobs(logits, id, top));
        Choice::Token(Sampled { id, logprobs })
    }

    /// Sends a token; says whether it was the last.
    pub fn emit(&mut self, token: Sampled, now: Instant) -> Option<FinishReason> {
        self.answered.get_or_insert(now);
        self.generated += 1;
        self.history.push(token.id);
        let stops = self.request.stop_ids.contains(&token.id);
        self.send(Event::Token { id: token.id, logprobs: token.logprobs });
        if stops {
            return Some(FinishReason::Stop);
        }
        if let Some(guide) = &mut self.guide {
            guide.advance(token.id);
        }
        (self.generated >= self.request.max_tokens).then_some(FinishReason::Length)
    }

    pub fn finish(&self, reason: FinishReason) {
        let now = Instant::now();
        let begun = self.begun.unwrap_or(now);
        let answered = self.answered.unwrap_or(now);
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
        let cached = self.cached.unwrap_or(0);
        let usage = Usage { prompt: self.prompt_len(), cached, completion: self.generated };
        let timings = Timings {
            queue_ms: ms(self.arrived, begun),
            prefill_ms: ms(begun, answered),
            decode_ms: ms(answered, now),
        };
        self.send(Event::Finished { reason, usage, timings });
    }

    pub fn fail(&self, message: &str) {
        self.send(Event::Failed(message.to_owned()));
    }

    /// A closed channel is seen as cancellation before the next step.
    fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }
}
