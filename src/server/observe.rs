//! One request as the operator sees it: its id, its headers, its times, one line in the log.
//!
//! A [`Watch`] is born with the request and shared by everybody who works on it; the line is
//! written when the last of them lets go, whether that is the end of the answer, an error, or a
//! client that went away. Never in the log: what was asked and what was answered.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use futures_util::stream::{self, StreamExt};

use super::App;
use super::dialect::Dialect;
use super::error::{ApiError, Refusal};
use super::linger::Unread;
use super::metrics::Metrics;
use super::{auth, chat, cors, ids};
use crate::auth::limits::Limiter;
use crate::error::Error;
use crate::ledger::{Account, Ledger, Used, Work};
use crate::pipeline::{Embedding, Meter, TextEvent, TextStream};
use crate::types::{FinishReason, Priority, Tenant, Timings, Usage, unix_now_s};

/// The outermost layer: watches, lets pass or refuses, and survives a panic.
pub(super) async fn layer(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let watch = Arc::new(Watch::new(&app, &request));
    request.extensions_mut().insert(watch.clone());
    let dialect = Dialect::of(request.uri().path());
    let unread = request.extensions().get::<Unread>().cloned();
    let (request, read) = until_read(request);
    let origin = cors::allowed(&app.config.cors_origins, request.headers());
    let asks = origin.as_ref().and_then(|_| cors::preflight(&request));
    let mut response = match asks {
        Some(permission) => permission,
        None => admitted(&app, &watch, request, next).await,
    };
    response = dialect.refusal(response, &watch.request_id);
    watch.answered(&response);
    let refused = response.status().as_u16() >= 400;
    let headers = response.headers_mut();
    if refused && !read.load(Ordering::Acquire) {
        // What is left of the body goes nowhere, and no other request should follow it there.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        unread.iter().for_each(Unread::note);
    }
    if let Some(origin) = origin {
        cors::mark(origin, headers);
    }
    if let Some(limiter) = watch.limiter.get() {
        auth::limit_headers(limiter, headers);
    }
    let id = HeaderValue::from_str(&watch.request_id)
        .expect("ids are hexadecimal digits; this is a bug");
    dialect.mark(&id, headers);
    headers.insert("x-request-id", id);
    headers.insert("openai-processing-ms", (watch.started.elapsed().as_millis() as u64).into());
    headers.insert("openai-version", HeaderValue::from_static("2020-10-01"));
    headers.insert("openai-organization", HeaderValue::from_static("hearth"));
    response
}

/// The same request, and whether its body was read to the end.
fn until_read(request: Request) -> (Request, Arc<AtomicBool>) {
    let read = Arc::new(AtomicBool::new(request.body().is_end_stream()));
    if read.load(Ordering::Acquire) {
        return (request, read);
    }
    let noted = Arc::clone(&read);
    let request = request.map(|body| {
        let pieces = (body.into_data_stream(), noted);
        Body::from_stream(stream::unfold(pieces, |(mut body, noted)| async move {
            let piece = body.next().await;
            if piece.is_none() {
                noted.store(true, Ordering::Release);
            }
            Some((piece?, (body, noted)))
        }))
    });
    (request, read)
}

/// Lets a request pass if its key does, and survives a panic behind it.
async fn admitted(app: &App, watch: &Watch, mut request: Request, next: Next) -> Response {
    if !is_text(request.uri().path()) {
        return ApiError::unknown_route(&watch.method, request.uri().path()).into_response();
    }
    let mut whose = None;
    match app.caller(&request) {
        Err(error) => return error.into_response(),
        Ok(None) => {}
        Ok(Some(caller)) => {
            whose = Some(caller.tenant.id);
            if let Some(limiter) = &caller.limiter {
                watch.limiter.get_or_init(|| Arc::clone(limiter));
            }
            if let Err(error) = app.admit(&caller, &request) {
                return error.into_response();
            }
            watch.tenant.get_or_init(|| caller.tenant);
            request.extensions_mut().insert(caller);
        }
    }
    if let Some(error) = whose.and_then(|_| app.unsent.admit(whose).err()) {
        return ApiError::from(error).into_response();
    }
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => {
            app.unsent.hold(response, whose).await.unwrap_or_else(ApiError::into_response)
        }
        Err(_) => {
            let error = Error::Internal("The server failed on this request.".to_owned());
            ApiError::from(error).into_response()
        }
    }
}

/// Whether a path is UTF-8 once it is decoded. Nothing has a name that is none.
fn is_text(path: &str) -> bool {
    let mut parts = path.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend_from_slice(&part.as_bytes()[2..]);
            }
            None => bytes.extend_from_slice(part.as_bytes()),
        }
    }
    std::str::from_utf8(&bytes).is_ok()
}

/// What is known of one request so far.
pub(super) struct Watch {
    metrics: Arc<Metrics>,
    ledger: Arc<Ledger>,
    /// On whose account it is.
    tenant: OnceLock<Tenant>,
    /// Nobody waits for the answer, so its times say nothing about the service.
    background: bool,
    _in_work: Arc<()>,
    pub request_id: String,
    client_request_id: Option<String>,
    method: String,
    route: String,
    started: Instant,
    /// Pays for the tokens, where the key has a limit.
    limiter: OnceLock<Arc<Limiter>>,
    facts: Mutex<Facts>,
}

#[derive(Default)]
struct Facts {
    status: Option<u16>,
    refusal: Option<Refusal>,
    model: Option<String>,
    /// What accounts call it.
    title: Option<String>,
    prompt_tokens: usize,
    /// What was used, by prompt, and told when what computes it is dropped.
    meters: Vec<Arc<Meter>>,
    tier: Priority,
    /// Tokens of vectors that were made, where vectors are asked for.
    embedded: Option<Arc<AtomicUsize>>,
    /// Tokens of the prompt that the limiter knows of,
    paid: usize,
    /// and of the answer.
    charged: usize,
    /// The longest of all choices.
    timings: Timings,
    finish: Vec<FinishReason>,
    /// What went wrong, when it was the server's fault.
    failure: Option<String>,
    streaming: bool,
    /// When the last text of each choice came.
    last_text: Vec<Option<Instant>>,
    /// Pieces of text of each choice.
    deltas: Vec<usize>,
    choices: usize,
}

/// The method of a line of a batch.
const BATCH: &str = "BATCH";

/// Longer client ids are cut in the log.
const CLIENT_ID_LEN_MAX: usize = 512;

impl Watch {
    fn new(app: &App, request: &Request) -> Self {
        let route = request.extensions().get::<MatchedPath>();
        let client_id = request.headers().get("x-client-request-id");
        let cut = |id: &str| id.chars().take(CLIENT_ID_LEN_MAX).collect();
        Self {
            metrics: Arc::clone(&app.metrics),
            ledger: Arc::clone(&app.rooms.ledger),
            tenant: OnceLock::new(),
            background: false,
            _in_work: Arc::clone(&app.in_work),
            request_id: ids::random("req_"),
            client_request_id: client_id.and_then(|id| id.to_str().ok()).map(cut),
            method: request.method().to_string(),
            // A path that no route knows is the client's invention and would flood the labels.
            route: route.map_or("unmatched", MatchedPath::as_str).to_owned(),
            started: Instant::now(),
            limiter: OnceLock::new(),
            facts: Mutex::default(),
        }
    }

    /// Of a line of a batch: no shutdown waits for it, and it appears in no measurement.
    pub(super) fn of_line(
        app: &App,
        endpoint: &str,
        tenant: Tenant,
        limiter: Option<Arc<Limiter>>,
    ) -> Self {
        Self {
            metrics: Arc::clone(&app.metrics),
            ledger: Arc::clone(&app.rooms.ledger),
            tenant: OnceLock::from(tenant),
            background: true,
            _in_work: Arc::default(),
            request_id: ids::random("req_"),
            client_request_id: None,
            method: BATCH.to_owned(),
            route: endpoint.to_owned(),
            started: Instant::now(),
            limiter: limiter.map_or_else(OnceLock::new, OnceLock::from),
            facts: Mutex::default(),
        }
    }

    /// The request is for text of this model, under this name (that of an adapter, where one is
    /// asked for): `n` choices of every prompt.
    pub(super) fn generating(
        &self,
        model: &str,
        title: &str,
        tier: Priority,
        texts: &[TextStream],
        n: usize,
    ) {
        let prompt_tokens = texts.iter().map(TextStream::prompt_tokens).sum();
        let choices = texts.len() * n;
        let mut facts = self.facts();
        (facts.model, facts.title) = (Some(model.to_owned()), Some(title.to_owned()));
        facts.prompt_tokens = prompt_tokens;
        facts.meters = texts.iter().map(|text| Arc::clone(text.meter())).collect();
        facts.tier = tier;
        facts.last_text = vec![None; choices];
        facts.deltas = vec![0; choices];
        facts.choices = choices;
        // A line of a batch may find no place, and comes again: it pays once it was computed.
        if !self.background {
            self.charge(prompt_tokens);
            facts.paid = prompt_tokens;
        }
    }

    /// The request is for these vectors.
    pub(super) fn embedding(&self, embedding: &Embedding) {
        let mut facts = self.facts();
        let model = embedding.model();
        (facts.model, facts.title) = (Some(model.to_owned()), Some(model.to_owned()));
        facts.prompt_tokens = embedding.prompt_tokens();
        facts.embedded = Some(embedding.computed());
    }

    /// They were made.
    pub(super) fn embedded(&self) {
        let mut facts = self.facts();
        facts.paid = facts.prompt_tokens;
        self.charge(facts.paid);
    }

    fn charge(&self, tokens: usize) {
        if let Some(limiter) = self.limiter.get() {
            limiter.tokens(tokens, Instant::now());
        }
    }

    /// The answer is a stream, whose end is not the end of the handler.
    pub(super) fn streaming(&self) {
        self.facts().streaming = true;
    }

    /// Sees every event on its way to the client.
    pub(super) fn event(&self, event: &Result<TextEvent, Error>) {
        let mut facts = self.facts();
        match event {
            Err(error) => facts.failure = Some(error.to_string()),
            Ok(
                TextEvent::Delta { choice, .. }
                | TextEvent::Reasoning { choice, .. }
                | TextEvent::ToolArguments { choice, .. },
            ) => self.text(&mut facts, *choice),
            Ok(
                TextEvent::Echo { .. }
                | TextEvent::ToolCall { .. }
                | TextEvent::Prompt { .. }
                | TextEvent::Tokens { .. },
            ) => {}
            Ok(TextEvent::Finished { choice, reason, usage, timings, .. }) => {
                // Every piece of text was paid for as one token when it came; now comes the truth.
                let more = usage.completion.saturating_sub(facts.deltas[*choice]);
                self.charge(more);
                facts.charged += more;
                facts.finished(*reason, timings);
            }
        }
    }

    fn text(&self, facts: &mut Facts, choice: usize) {
        let now = Instant::now();
        let first = facts.last_text.iter().all(Option::is_none);
        let before = facts.last_text[choice].replace(now);
        facts.deltas[choice] += 1;
        facts.charged += 1;
        self.charge(1);
        if self.background {
            return;
        }
        let model = facts.model.as_deref().unwrap_or_default();
        if first {
            self.metrics.first_token(model, now - self.started);
        }
        if let Some(before) = before {
            self.metrics.inter_token(model, now - before);
        }
    }

    /// The handler is done.
    pub(super) fn answered(&self, response: &Response) {
        let mut facts = self.facts();
        facts.status = Some(response.status().as_u16());
        facts.refusal = response.extensions().get::<Refusal>().cloned();
        let failure = facts.refusal.as_mut().and_then(|refusal| refusal.failure.take());
        facts.failure = facts.failure.take().or(failure);
    }

    /// The account hears of what was used. Everybody who computed for the request has let go.
    fn note(&self, facts: &Facts, usage: Usage) {
        let (Some(title), Some(tenant)) = (&facts.title, self.tenant.get()) else { return };
        if usage.prompt == 0 {
            return; // nothing was computed: a line that found no place, who left while waiting
        }
        // What was withheld from a client that left: a stop string in the making, what was unread,
        // and vectors that were not all there.
        let unpaid = usage.prompt.saturating_sub(facts.paid);
        self.charge(unpaid + usage.completion.saturating_sub(facts.charged));
        let account = Account {
            minute_s: unix_now_s() / 60 * 60,
            project: tenant.project.0,
            key: tenant.row().unwrap_or_default(),
            model: title.clone(),
            work: if facts.embedded.is_some() { Work::Embeddings } else { Work::Completions },
            batch: self.method == BATCH,
            tier: chat::tier(facts.tier),
        };
        let Usage { prompt, cached, completion } = usage;
        let [input, cached, output] = [prompt, cached, completion].map(|tokens| tokens as u64);
        self.ledger.note(account, Used { requests: 1, input, cached, output });
    }

    /// The facts are plain numbers: whoever panicked beside them left them whole.
    fn facts(&self) -> std::sync::MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Facts {
    fn finished(&mut self, reason: FinishReason, timings: &Timings) {
        self.finish.push(reason);
        self.timings.queue_ms = self.timings.queue_ms.max(timings.queue_ms);
        self.timings.prefill_ms = self.timings.prefill_ms.max(timings.prefill_ms);
        self.timings.decode_ms = self.timings.decode_ms.max(timings.decode_ms);
    }

    /// All that was used, whoever read it.
    fn usage(&self) -> Usage {
        let vectors = self.embedded.as_ref().map(|computed| computed.load(Ordering::Relaxed));
        let mut sum = Usage { prompt: vectors.unwrap_or_default(), ..Usage::default() };
        for usage in self.meters.iter().map(|meter| meter.usage()) {
            sum.prompt += usage.prompt;
            sum.cached += usage.cached;
            sum.completion += usage.completion;
        }
        sum
    }

    /// How it ended, in a word.
    fn outcome(&self) -> &'static str {
        match self.status {
            _ if self.failure.is_some() => "failed",
            None => "disconnected",
            Some(200..300) if self.streaming && self.finish.len() < self.choices => "disconnected",
            Some(200..300) => "done",
            Some(_) => "refused",
        }
    }
}

/// What nginx calls a client that closed its connection before there was a status.
const CLIENT_CLOSED: u16 = 499;

impl Drop for Watch {
    fn drop(&mut self) {
        let facts = std::mem::take(&mut *self.facts());
        let status = facts.status.unwrap_or(CLIENT_CLOSED);
        let took = self.started.elapsed();
        let usage = facts.usage();
        self.note(&facts, usage);
        if !self.background {
            self.metrics.response(&self.route, status);
            if let Some(model) = &facts.model {
                self.metrics.request(model, took);
            }
        }
        if let Some(failure) = &facts.failure {
            tracing::error!(request_id = self.request_id, failure, "request failed");
        }
        // Probes come every few seconds and say nothing; lines come by the ten thousand.
        let asks = self.route.starts_with("/v1/") || self.route.starts_with("/api/");
        let is_probe = !asks && status < 400;
        if self.background || is_probe {
            tracing::debug!(request_id = self.request_id, route = self.route, status, "request");
            return;
        }
        let finish: Vec<_> = facts.finish.iter().map(|reason| reason.as_str()).collect();
        tracing::info!(
            request_id = self.request_id,
            client_request_id = self.client_request_id,
            method = self.method,
            route = self.route,
            status,
            outcome = facts.outcome(),
            code = facts.refusal.as_ref().map(|refusal| refusal.code),
            param = facts.refusal.as_ref().and_then(|refusal| refusal.param.as_deref()),
            project = self.tenant.get().map(|tenant| tenant.project.0),
            key = self.tenant.get().and_then(|tenant| tenant.row()),
            model = facts.model,
            prompt_tokens = facts.prompt_tokens,
            cached_tokens = usage.cached,
            completion_tokens = usage.completion,
            queue_ms = tenths(facts.timings.queue_ms),
            prefill_ms = tenths(facts.timings.prefill_ms),
            decode_ms = tenths(facts.timings.decode_ms),
            total_ms = tenths(took.as_secs_f64() * 1e3),
            finish = finish.join(","),
            "request"
        );
    }
}

/// Rounded for reading.
fn tenths(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}
