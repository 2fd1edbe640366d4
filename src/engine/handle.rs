//! The door of the engine: commands in, events out.
//!
//! Owns the bounded waiting room (`door`: counts behind a lock that nobody holds for long) and the
//! shared counters. Used from any thread. Dropping a [`Generation`] cancels it: the engine sees the
//! closed channel before its next step and frees the blocks. Deliberately absent: text. Everything
//! here is token ids.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

pub use hearth_kernels::sampling::SamplingParams;
use hearth_models::{Adapter, LoraSlot, Model};

use super::door::{Door, Entered, Seat};
use super::events::{self, Inbox, Outbox};
pub use super::events::{Event, Logprobs};
pub use super::grammar::{Allowed, Grammar, Mask, MaskSource};
use super::queue::{self, Refused};
use crate::scheduler::{Newcomer, Outlook};
use crate::shelf::{Digest, Shelf};
use crate::types::{CacheScope, Place, Priority, SeqId, Tenant, TokenId};

/// Rows of one step whose logits are read for the scoring of prompts.
pub const SCORE_CHUNK: usize = 64;
/// Rows of one step whose tokens are only proposed.
pub const PROPOSED_ROWS: usize = 32;

/// A weighted list of adapters and the number that stands for it: never used twice, so whoever
/// holds the list keeps what it began with, whatever is loaded or replaced meanwhile.
#[derive(Debug)]
pub struct AdapterSet {
    /// From 1 on.
    pub slot: LoraSlot,
    /// The adapters; the engine does not look into them.
    pub parts: Vec<(Arc<Adapter>, f32)>,
    /// What they are and how strong: the same in every process.
    pub content: Digest,
}

/// Where an engine keeps the blocks that memory has no room for.
#[derive(Clone, Debug)]
pub struct Keep {
    /// The files.
    pub shelf: Arc<Shelf>,
    /// What the model is, byte by byte.
    pub content: Digest,
}

/// One sequence to generate.
#[derive(Clone, Debug, Default)]
pub struct GenerateRequest {
    /// Never empty.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Added to the logit of a token.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the counter-based generator: same seed, same draws, whatever else runs.
    pub seed: u64,
    /// 0 computes the prompt only (prompt scoring).
    pub max_tokens: usize,
    /// Stop tokens are masked until this many tokens are generated.
    pub min_tokens: usize,
    /// Tokens that end the generation.
    pub stop_ids: Arc<[TokenId]>,
    /// Log-probability of each generated token, with this many alternatives.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// What the answer must look like.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// What the answer is expected to be: it comes faster where that is right, and is the same.
    pub expected: Arc<[TokenId]>,
    /// With what adapters it runs; `None` is the base model.
    pub adapters: Option<Arc<AdapterSet>>,
    /// Kept as long as this is computed, and no longer: what holds the model in memory.
    pub hold: Option<Arc<dyn Any + Send + Sync>>,
    /// With whom it shares the prefixes that are cached; what it says of adapters does not count.
    pub scope: CacheScope,
    /// Who asks.
    pub tenant: Tenant,
    /// Its place among what the same tenant asks.
    pub priority: Priority,
}

impl GenerateRequest {
    /// Keys and values of different adapters are different ones.
    pub(super) fn scope(&self) -> CacheScope {
        let adapter = self.adapters.as_ref().map_or(0, |adapters| adapters.slot.0);
        CacheScope { adapter, ..self.scope }
    }

    /// What it brings to the scheduler, with so many that share its prompt.
    fn newcomer(&self, count: usize) -> Newcomer {
        let Self { tenant, priority, max_tokens: answer_max, .. } = *self;
        Newcomer { tenant, priority, prompt: self.prompt.len(), answer_max, count }
    }

    /// Two answers to one prompt, which is computed once for both.
    fn shares_prompt_with(&self, other: &Self) -> bool {
        let wants =
            |r: &Self| (r.max_tokens == 0, r.prompt_logprobs, r.scope(), r.tenant, r.priority);
        wants(self) == wants(other) && self.prompt == other.prompt
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// Prompt, or prompt and `max_tokens`, never fit.
    #[error("{prompt} prompt tokens and {max_tokens} more do not fit into {max}")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// Tokens that fit.
        max: usize,
    },
    /// The prompt is empty.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// A token id that the vocabulary does not have.
    #[error("token id {0} is not in the vocabulary")]
    UnknownToken(TokenId),
    /// The waiting room is full.
    #[error("{waiting} requests are waiting")]
    QueueFull {
        /// Requests that wait, for a turn or for their clients.
        waiting: usize,
        /// A guess at when it is worth trying again.
        retry_after: Duration,
    },
    /// Too much that the same key asked for is not read.
    #[error("{unread} answers are not read")]
    Unread {
        /// Answers that wait for their clients.
        unread: usize,
        /// A guess at when it is worth trying again.
        retry_after: Duration,
    },
    /// The engine drains or is gone.
    #[error("the engine is shutting down")]
    ShuttingDown,
}

/// Bounds derived once at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of one sequence, prompt and completion together.
    pub context_len: usize,
    /// Ids below this one may appear in a prompt and be sampled.
    pub vocab_len: usize,
    /// Requests that may wait, or may be left unread.
    pub queue_len: usize,
    /// Sequences that may run at once.
    pub running_len: usize,
    /// Rows of one forward pass.
    pub batch_tokens: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Tokens of one block.
    pub block_len: usize,
    /// How long a step with running answers should take, or up to twice as long where more prompts
    /// wait than answers run.
    pub target_itl: Duration,
    /// A request that waited this long and was not begun is given up.
    pub queue_timeout: Option<Duration>,
    /// Memory of keys and values is taken at the start, and not as it is first used.
    pub kv_prefault: bool,
}

/// What guesses how answers go on. A right guess saves a step, and none changes a token. Answers
/// under a grammar go on alone: what may come next is known one token at a time.
#[derive(Default)]
pub struct Speculation {
    /// Answers are read for what they quote.
    pub lookup: bool,
    /// A model that guesses.
    pub draft: Option<DraftModel>,
    /// What a guess costs, as a part of a token; `None`: as it is measured.
    pub price: Option<f64>,
}

/// A smaller model with the vocabulary of the one that answers.
pub struct DraftModel {
    /// Its weights.
    pub model: Box<dyn Model>,
    /// Its context and its KV blocks; the rest is of no meaning.
    pub limits: Limits,
}

impl Speculation {
    pub(super) fn is_on(&self) -> bool {
        self.lookup || self.draft.is_some()
    }
}

/// Counters and gauges that the engine publishes after every step.
#[derive(Debug, Default)]
pub struct Stats {
    /// Submitted and not yet admitted.
    pub waiting: AtomicUsize,
    /// Admitted and not finished.
    pub running: AtomicUsize,
    /// Those of them that stand aside, because their clients do not read.
    pub aside: AtomicUsize,
    /// Sequences that stand aside, and those that are over and were not read.
    pub unread: AtomicUsize,
    /// KV blocks held by sequences.
    pub kv_blocks_used: AtomicUsize,
    /// KV blocks that nobody holds and that the prefix cache remembers.
    pub kv_blocks_cached: AtomicUsize,
    /// Prompts that began with something cached.
    pub prefix_hits: AtomicU64,
    /// Prompt tokens that were not computed because they were cached.
    pub prefix_hit_tokens: AtomicU64,
    /// Blocks that the prefix cache had to forget.
    pub prefix_evictions: AtomicU64,
    /// Blocks that are worth a place on the shelf and wait for it,
    pub kv_unkept: AtomicUsize,
    /// that are on their way there,
    pub kv_sent: AtomicUsize,
    /// and that were written and not flushed.
    pub kv_unflushed: AtomicUsize,
    /// Blocks that were written to the shelf,
    pub kv_spilled: AtomicU64,
    /// that came back from it,
    pub kv_reloaded: AtomicU64,
    /// that had to go there and could not: no buffer was free, or writing paused;
    pub kv_dropped: AtomicU64,
    /// writes that failed,
    pub kv_spill_failures: AtomicU64,
    /// and files that were not what they should be.
    pub kv_corrupt: AtomicU64,
    /// Bytes of the model's files; not set without a shelf.
    pub kv_store_bytes: OnceLock<Arc<AtomicU64>>,
    /// Requests ever submitted.
    pub requests: AtomicU64,
    /// Tokens of the prompts that were admitted.
    pub prompt_tokens: AtomicU64,
    /// Rows of all forward passes; more than prompts and answers when sequences were preempted, or
    /// proposals were wrong, or a step ran ahead of the end of an answer.
    pub computed_tokens: AtomicU64,
    /// Tokens generated.
    pub generated_tokens: AtomicU64,
    /// Tokens of answers that were proposed and computed before they were chosen.
    pub proposed_tokens: AtomicU64,
    /// Those of them that were right.
    pub accepted_tokens: AtomicU64,
    /// Forward passes.
    pub steps: AtomicU64,
    /// Sequences whose blocks were taken away and computed again later.
    pub preemptions: AtomicU64,
    /// Passes of newcomers' prompts alone: between two layers of another, or before the next step.
    pub interjected: AtomicU64,
    /// Sequences whose client went away.
    pub cancelled: AtomicU64,
    /// Sequences that waited too long to be begun.
    pub expired: AtomicU64,
    /// Batches that failed.
    pub failures: AtomicU64,
}

impl Stats {
    /// Blocks that are worth a place on the shelf and are not safe there. Asked in the order in
    /// which they move, so none is missed.
    pub fn kv_waiting(&self) -> usize {
        let stages = [&self.kv_unkept, &self.kv_sent, &self.kv_unflushed];
        stages.map(|stage| stage.load(Ordering::Acquire)).iter().sum()
    }
}

/// A request on its way to the engine thread.
#[derive(Debug)]
pub(super) struct Submission {
    pub id: SeqId,
    pub request: GenerateRequest,
    pub events: Outbox,
    pub seat: Seat,
    /// Set by [`Generation::stop`].
    pub stopped: Arc<AtomicBool>,
    pub arrived: Instant,
    pub deadline: Option<Instant>,
}

/// What the engine thread is told.
#[derive(Debug)]
pub(super) enum Command {
    /// Several that share their prompt. Never empty.
    Submit(Vec<Submission>),
    /// Finish what runs and waits, then stop.
    Drain,
}

/// A running generation. Dropping it cancels.
#[derive(Debug)]
pub struct Generation {
    /// The engine's name for it.
    pub id: SeqId,
    /// Where it came in.
    pub place: Place,
    events: Inbox,
    stopped: Arc<AtomicBool>,
}

impl Generation {
    /// Ends it because it said enough, such as a stop string: no cancellation, but a finish.
    pub fn stop(self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Cancels it. What it told and nobody has read.
    pub fn unread(mut self) -> Vec<Event> {
        self.events.close().collect()
    }

    /// The next event; `None` only after `Finished` or `Failed`, or when the engine is gone.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.next().await
    }

    /// The same, for a thread that is not async.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_next()
    }

    /// The same, polled.
    pub fn poll_next(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<Event>> {
        self.events.poll_next(cx)
    }
}

/// Cheap to clone; every clone talks to the same engine thread.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: std_mpsc::Sender<Command>,
    limits: Arc<Limits>,
    stats: Arc<Stats>,
    door: Door,
    next_id: Arc<AtomicU64>,
}

impl EngineHandle {
    /// The engine counts time from `started` on, and sees nobody yet.
    pub(super) fn new(
        limits: Limits,
        outlook: Outlook,
        started: Instant,
    ) -> (Self, std_mpsc::Receiver<Command>) {
        let (commands, receiver) = std_mpsc::channel();
        let stats = Arc::<Stats>::default();
        let door = Door::new(limits.queue_len, &stats, outlook, started);
        let handle =
            Self { commands, limits: Arc::new(limits), stats, door, next_id: Arc::default() };
        (handle, receiver)
    }

    /// Hands a sequence to the engine, or says at once why not.
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        let mut one = self.submit_all(vec![request])?;
        Ok(one.pop().expect("one for each request; this is a bug"))
    }

    /// Hands sequences of one tenant to the engine, all or none. Neighbours with the same prompt
    /// share it.
    pub fn submit_all(
        &self,
        requests: Vec<GenerateRequest>,
    ) -> Result<Vec<Generation>, SubmitError> {
        requests.iter().try_for_each(|request| self.check(request))?;
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        let (place, mut alone, seats) = self.enter_queue(first, requests.len())?;
        self.stats.requests.fetch_add(requests.len() as u64, Ordering::Relaxed);
        let first_id = self.next_id.fetch_add(requests.len() as u64, Ordering::Relaxed);
        let unread = Arc::default();
        let mut generations = Vec::with_capacity(requests.len());
        let mut groups: Vec<Vec<Submission>> = Vec::new();
        for ((id, seat), request) in (first_id..).map(SeqId).zip(seats).zip(requests) {
            let (submission, generation) = self.submission(id, request, place, seat, &unread);
            generations.push(generation);
            match groups.last_mut() {
                Some(group) if group[0].request.shares_prompt_with(&submission.request) => {
                    group.push(submission);
                }
                _ => groups.push(vec![submission]),
            }
        }
        for group in groups {
            let newcomer = group[0].request.newcomer(group.len());
            self.door.came(group[0].id, newcomer, std::mem::take(&mut alone));
            self.commands.send(Command::Submit(group)).map_err(|_| SubmitError::ShuttingDown)?;
        }
        Ok(generations)
    }

    fn submission(
        &self,
        id: SeqId,
        request: GenerateRequest,
        place: Place,
        seat: Seat,
        unread: &Arc<AtomicUsize>,
    ) -> (Submission, Generation) {
        let (events, receiver) = events::channel(unread, seat.guest());
        let stopped = Arc::new(AtomicBool::new(false));
        let arrived = Instant::now();
        let own = request.tenant.queue_timeout_s.map(|s| Duration::from_secs(s.into()));
        let timeout = [self.limits.queue_timeout, own].into_iter().flatten().min();
        let deadline = timeout.and_then(|timeout| arrived.checked_add(timeout));
        let generation = Generation { id, place, events: receiver, stopped: Arc::clone(&stopped) };
        (Submission { id, request, events, seat, stopped, arrived, deadline }, generation)
    }

    /// How long somebody would wait who came in now, behind everybody else; `None` while nothing
    /// is known of that.
    pub fn estimated_wait(&self) -> Option<Duration> {
        self.door.wait_of_last()
    }

    /// Lets the engine finish what it has and stop.
    pub fn drain(&self) {
        // The engine being gone already is what was asked for.
        let _ = self.commands.send(Command::Drain);
    }

    /// The bounds in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Counters and gauges.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let max = self.limits.context_len;
        let prompt = request.prompt.len();
        if prompt.saturating_add(request.max_tokens) > max || prompt > max {
            return Err(SubmitError::TooLong { prompt, max_tokens: request.max_tokens, max });
        }
        let biased = request.logit_bias.iter().map(|(id, _)| id);
        let named = request.prompt.iter().chain(biased).chain(request.stop_ids.iter());
        let mut named = named.chain(request.expected.iter());
        match named.find(|&&id| id as usize >= self.limits.vocab_len) {
            Some(&id) => Err(SubmitError::UnknownToken(id)),
            None => Ok(()),
        }
    }

    /// Takes places in the waiting room: where and for how long, and whether nobody else is here.
    fn enter_queue(
        &self,
        first: &GenerateRequest,
        count: usize,
    ) -> Result<(Place, bool, Vec<Seat>), SubmitError> {
        let newcomer = first.newcomer(1);
        let wait = || self.door.wait(&newcomer);
        match self.door.enter(first.tenant, count) {
            Ok(Entered { before: position, alone, seats }) => {
                let wait = if alone { Some(Duration::ZERO) } else { wait() };
                Ok((Place { position, wait }, alone, seats))
            }
            Err(Refused::Full(waiting)) => {
                Err(SubmitError::QueueFull { waiting, retry_after: queue::retry_after(wait()) })
            }
            Err(Refused::Unread(unread)) => {
                Err(SubmitError::Unread { unread, retry_after: queue::retry_after(wait()) })
            }
        }
    }

    /// Where newcomers come in.
    pub(super) fn door(&self) -> &Door {
        &self.door
    }
}
