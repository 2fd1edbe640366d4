//! One sequence between submission and end: its client, its clock, its counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hearth_models::{Kept, Pick, RowOutput, Wanted};

use super::door::Seat;
use super::events::{Event, Logprobs, Outbox, UNREAD_LITTLE, UNREAD_MAX};
use super::grammar::{Allowed, Guide, Masks};
use super::handle::{GenerateRequest, Submission};
use super::lookup::Lookup;
use super::queue::Stage;
use super::sampler::{History, Sampler};
use crate::types::{FinishReason, Timings, TokenId, Usage};

/// A sequence that waits or runs.
pub(super) struct Live {
    request: GenerateRequest,
    events: Outbox,
    /// Its place in the counts, while the engine has it.
    seat: Option<Seat>,
    stopped: Arc<AtomicBool>,
    history: History,
    guide: Option<Guide>,
    /// A row whose grammar did not know yet what may come.
    held: Option<Held>,
    /// A token was asked for out of such a row.
    late: bool,
    /// What may come next, read out of what came before; where that is wanted, from the first token
    /// on.
    lookup: Option<Lookup>,
    reads: bool,
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

/// A row of logits.
enum Held {
    Logits(Vec<f32>),
    /// On the device.
    Kept(Kept),
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

impl Choice {
    /// The answer goes on, and as it was proposed: the next row is of its text.
    pub fn goes_on_with(&self, proposed: Option<&TokenId>) -> bool {
        matches!(self, Self::Token(token) if token.end.is_none() && Some(&token.id) == proposed)
    }
}

/// A token that was chosen.
pub(super) struct Sampled {
    pub id: TokenId,
    pub logprobs: Option<Logprobs>,
    /// The client expected it here.
    pub expected: bool,
    /// The answer ends with it, because of this.
    pub end: Option<FinishReason>,
}

impl Live {
    pub fn new(submission: Submission, masks: &Masks, reads: bool) -> Self {
        let Submission { id: _, request, events, seat, stopped, arrived, deadline: _ } = submission;
        let history = History::new(&request);
        let guide = request.grammar.as_deref().map(|grammar| Guide::new(grammar, masks));
        Self {
            request,
            events,
            seat: Some(seat),
            stopped,
            history,
            guide,
            held: None,
            late: false,
            lookup: None,
            reads,
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

    /// Its client has left so much unread that it is to stand aside; where it does, until half of
    /// that is read. The first token comes before: until then others may wait for its prompt.
    pub fn is_behind(&self) -> bool {
        let bound = if self.is_aside() { UNREAD_MAX / 2 } else { UNREAD_MAX };
        self.generated > 0 && self.events.unread() > bound
    }

    /// It has no place and no blocks until its client reads.
    pub fn is_aside(&self) -> bool {
        self.seat.as_ref().is_some_and(|seat| seat.is(Stage::Unread))
    }

    /// Stands aside, as after a preemption, or goes on.
    pub fn stand_aside(&mut self, aside: bool) {
        self.set_stage(if aside { Stage::Unread } else { Stage::Again });
        (self.held, self.late) = (None, false);
    }

    /// Its rows will be computed again.
    pub fn preempted(&mut self) {
        (self.held, self.late) = (None, false);
        if self.has_begun() {
            self.set_stage(Stage::Again);
        }
    }

    /// It runs. True when it does for the first time.
    pub fn begin(&mut self, now: Instant) -> bool {
        self.set_stage(Stage::Running);
        let first = self.begun.is_none();
        self.begun.get_or_insert(now);
        first
    }

    /// The engine is done with it; if much of it is not read, that counts on.
    pub fn leave(&mut self) {
        self.request.hold = None;
        if let Some(seat) = self.seat.take()
            && self.events.unread() <= UNREAD_LITTLE
        {
            seat.leave();
        }
    }

    fn set_stage(&mut self, stage: Stage) {
        self.seat.iter_mut().for_each(|seat| seat.set(stage));
    }

    pub fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// It will not be begun any more.
    pub fn expire(&self) {
        self.events.send(Event::Expired { waited: self.arrived.elapsed() });
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
    pub fn prompt_done(&mut self, cached: usize, logprobs: Arc<[Logprobs]>) -> bool {
        let first = self.cached.replace(cached).is_none();
        if first {
            self.events.send(Event::Prompt { cached, logprobs });
        }
        first
    }

    /// What the device may do with the row of the token so many places ahead. It is read out where
    /// the host is asked what else was probable, or knows more of the tokens before it.
    pub fn wanted(&mut self, ahead: usize, vocab_len: usize) -> Wanted {
        let needs_host = self.edits_tokens() || self.guide.is_some();
        if self.request.logprobs.is_some() || (ahead > 0 && needs_host) {
            return Wanted::Logits;
        }
        match self.mask(Duration::ZERO) {
            Some(mask) => Wanted::Token(self.pick(ahead, vocab_len, mask)),
            None => Wanted::Kept,
        }
    }

    fn pick(&self, ahead: usize, vocab_len: usize, mask: Option<Vec<u32>>) -> Pick {
        let (request, position) = (&self.request, self.generated + ahead);
        Pick {
            params: request.sampling,
            edits: self.history.edits(request, position, vocab_len),
            seed: request.seed,
            position: position as u64,
            vocab_len,
            mask,
        }
    }

    /// The tokens out of which one is to be chosen, if that is known and there are any.
    fn mask(&mut self, patience: Duration) -> Option<Option<Vec<u32>>> {
        let Some(guide) = &mut self.guide else { return Some(None) };
        match guide.allowed(patience)? {
            Allowed::Any => Some(None),
            Allowed::Only(mask) => Some(Some(mask.0.clone())),
            Allowed::End | Allowed::Failed(_) => None,
        }
    }

    /// Its row stays on the device.
    pub fn hold(&mut self, kept: Kept) {
        self.held = Some(Held::Kept(kept));
    }

    /// That row, and how its token is to be chosen, once its grammar knows.
    pub fn choose_kept(&mut self, vocab_len: usize, patience: Duration) -> Option<(Kept, Pick)> {
        let Some(Held::Kept(_)) = &self.held else { return None };
        let mask = self.mask(patience)?;
        let pick = self.pick(0, vocab_len, mask);
        let Some(Held::Kept(kept)) = self.held.take() else { return None };
        self.late = true;
        Some((kept, pick))
    }

    /// A token was asked for out of a row that the device kept, and its rows were not given up
    /// since.
    pub fn awaits_late(&self) -> bool {
        self.late
    }

    /// Where the device chooses the token so many places ahead, its row may be asked for before
    /// anybody knows it: there will be one, it is of use, and nothing is known of it that is better
    /// (`price` is what a guess has to be worth).
    pub fn goes_on(&self, ahead: usize, price: f64) -> bool {
        let last = self.generated + ahead + 1 >= self.request.max_tokens;
        let needs_host = self.edits_tokens() || self.guide.is_some();
        !last && !needs_host && self.propose(price, 1).is_empty()
    }

    /// What is chosen depends on the tokens before it beyond their logits.
    fn edits_tokens(&self) -> bool {
        self.history.is_wanted()
    }

    /// Chooses the next token. Logits that come before their grammar are kept.
    pub fn sample(&mut self, row: RowOutput<'_>, sampler: &mut Sampler) -> Choice {
        let logits = match row {
            RowOutput::Logits(logits) => logits,
            RowOutput::Chosen(id) => return self.chosen(id, None),
            RowOutput::Kept => return self.settle(),
        };
        let choice = self.choose(logits, sampler, Duration::ZERO);
        if matches!(choice, Choice::Later) {
            self.held = Some(Held::Logits(logits.to_vec()));
        }
        choice
    }

    /// What can be said of a row that the device keeps: that no token is wanted of it.
    fn settle(&mut self) -> Choice {
        let choice = match self.guide.as_mut().and_then(|guide| guide.allowed(Duration::ZERO)) {
            Some(Allowed::End) => Choice::Complete,
            Some(Allowed::Failed(why)) => stuck(why),
            Some(Allowed::Any | Allowed::Only(_)) | None => return Choice::Later,
        };
        self.held = None;
        choice
    }

    /// The same with the logits that were kept, if there are any.
    pub fn sample_held(&mut self, sampler: &mut Sampler, patience: Duration) -> Choice {
        let logits = match self.held.take() {
            Some(Held::Logits(logits)) => logits,
            kept => {
                self.held = kept;
                return self.settle();
            }
        };
        let choice = self.choose(&logits, sampler, patience);
        if matches!(choice, Choice::Later) {
            self.held = Some(Held::Logits(logits));
        }
        choice
    }

    /// It has a row that waits.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    fn choose(&mut self, logits: &[f32], sampler: &mut Sampler, patience: Duration) -> Choice {
        let mask = match &mut self.guide {
            None => None,
            Some(guide) => match guide.allowed(patience) {
                None => return Choice::Later,
                Some(Allowed::End) => return Choice::Complete,
                Some(Allowed::Failed(why)) => return stuck(why),
                Some(Allowed::Any) => None,
                Some(Allowed::Only(mask)) => Some(mask),
            },
        };
        let id = sampler.sample(logits, &self.request, &self.history, self.generated, mask);
        let logprobs = self.request.logprobs.zip(id);
        let logprobs = logprobs.map(|(top, id)| sampler.logprobs(logits, id, top));
        self.chosen(id, logprobs)
    }

    fn chosen(&mut self, id: Option<TokenId>, logprobs: Option<Logprobs>) -> Choice {
        let Some(id) = id else {
            return Choice::Stuck("the model's output leaves no token to choose".to_owned());
        };
        self.late = false;
        let (expected, end) = self.take(id);
        Choice::Token(Sampled { id, logprobs, expected, end })
    }

    /// The answer has one more token: whether it was expected, and whether it is the last.
    fn take(&mut self, id: TokenId) -> (bool, Option<FinishReason>) {
        self.generated += 1;
        self.history.push(id);
        if self.reads && self.lookup.is_none() {
            self.lookup = Some(Lookup::new(&self.request.expected, &self.request.prompt));
        }
        let expected = self.lookup.as_mut().is_some_and(|lookup| lookup.push(id));
        if self.request.stop_ids.contains(&id) {
            return (expected, Some(FinishReason::Stop));
        }
        if let Some(guide) = &mut self.guide {
            guide.advance(id);
        }
        let full = self.generated >= self.request.max_tokens;
        (expected, full.then_some(FinishReason::Length))
    }

    /// Tokens that may come next, as long as they are right more often than `price`.
    pub fn propose(&self, price: f64, max: usize) -> Vec<TokenId> {
        self.lookup.as_ref().map_or_else(Vec::new, |lookup| lookup.propose(price, max))
    }

    /// Proposals that are of use: the row of its newest token yields one more token in any case.
    pub fn proposals_max(&self) -> usize {
        let left = (self.request.max_tokens - self.generated).saturating_sub(1);
        if self.guide.is_none() { left } else { 0 }
    }

    /// What this answer would choose out of the logits of another model, so many tokens ahead.
    pub fn would_choose(
        &self,
        ahead: usize,
        logits: &[f32],
        sampler: &mut Sampler,
    ) -> Option<TokenId> {
        let position = self.generated + ahead;
        sampler.sample(logits, &self.request, &self.history, position, None)
    }

    /// Sends a token.
    pub fn emit(&mut self, token: Sampled, now: Instant) {
        self.answered.get_or_insert(now);
        let Sampled { id, logprobs, expected, end: _ } = token;
        self.events.send(Event::Token { id, logprobs, expected });
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
        self.events.send(Event::Finished { reason, usage, timings });
    }

    pub fn fail(&self, message: &str) {
        self.events.send(Event::Failed(message.to_owned()));
    }
}

/// Nothing can follow.
fn stuck(why: &str) -> Choice {
    Choice::Stuck(format!("the grammar cannot go on: {why}"))
}
