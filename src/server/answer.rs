//! Runs a [`Call`]: one text stream per prompt, merged, and answered as a stream or as a whole.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::Semaphore;

use super::call::{Call, Shape};
use super::chat;
use super::error::ApiError;
use super::ids;
use super::objects::{Chunks, Envelope, Whole};
use super::observe::Watch;
use super::sse;
use super::stored::Keeper;
use super::{App, aside};
use crate::auth::Caller;
use crate::error::Error;
use crate::pipeline::{TextEvent, TextRequest, TextStream};
use crate::registry::{Lease, ServedModel};
use crate::types::{Place, Priority, unix_now_s};

/// Answers a call. Dropping the future, or the body of the answer, cancels everything behind it.
pub(super) async fn answer(
    app: &App,
    watch: Arc<Watch>,
    caller: &Caller,
    call: Call,
) -> Result<Response, ApiError> {
    let model = app.pipeline.model(&call.model, caller.tenant, call.keep_alive).await?;
    check_choices(&model, &call)?;
    let mut envelope = envelope(app, &model, &call)?;
    let priority = call.requests.first().map_or(Priority::Default, |request| request.priority);
    let requests = call.requests.into_iter();
    let requests = requests.map(|request| TextRequest { tenant: caller.tenant, ..request });
    let texts = app.pipeline.generate_all(&model, requests.collect()).await?;
    let place = texts.first().map_or_else(Place::default, TextStream::place);
    if envelope.prompt_ids.is_some() {
        envelope.prompt_ids = Some(texts.iter().map(|text| text.prompt_ids().to_vec()).collect());
    }
    envelope.prompt_tokens = texts.iter().map(TextStream::prompt_tokens).sum();
    watch.generating(model.id(), &envelope.model, priority, &texts, envelope.n);
    let watcher = watch.clone();
    let mut events = merge(texts, envelope.n).inspect(move |event| watcher.event(event)).boxed();
    if call.stream.is_none() || call.keep.is_some() {
        let times = if call.shape == Shape::Completion { envelope.n } else { 1 };
        events = app.unsent.count(events, Some(caller.tenant.id), times);
    }
    if let Some(keep) = call.keep {
        let history = Arc::clone(&app.rooms.history);
        let request_id = watch.request_id.clone();
        let keeper = Keeper { history, project: caller.project, request_id };
        events = keep.follow(events, Whole::new(envelope.clone()), keeper);
    }
    if let Some(options) = call.stream {
        watch.streaming();
        let chunks = Chunks::new(envelope, options);
        return Ok(placed(sse::response(events, chunks, app.config.heartbeat), place));
    }
    let mut whole = Whole::new(envelope);
    while let Some(event) = events.next().await {
        whole.event(event?);
    }
    let bytes = apart(whole).await?;
    Ok(placed(([(header::CONTENT_TYPE, "application/json")], bytes).into_response(), place))
}

/// A whole answer as JSON; a long one on a thread that may take its time, one after the other: it
/// takes several times its bytes meanwhile.
async fn apart(whole: Whole) -> Result<Vec<u8>, ApiError> {
    static TURN: Semaphore = Semaphore::const_new(1);
    if whole.tokens() <= SHORT {
        return whole.bytes();
    }
    let turn = TURN.acquire().await; // it is never closed
    aside(move || {
        let _turn = turn;
        Ok(whole.bytes())
    })
    .await?
}

/// Tokens of an answer that is written at once.
const SHORT: usize = 512;

/// One answer that has begun.
pub(super) struct Begun {
    pub place: Place,
    pub prompt_tokens: usize,
    pub events: BoxStream<'static, Result<TextEvent, Error>>,
}

/// Begins one answer of a model that is held, watched. Dropping the events cancels it.
pub(super) async fn begin(
    app: &App,
    watch: &Arc<Watch>,
    caller: &Caller,
    model: &Lease<ServedModel>,
    request: TextRequest,
) -> Result<Begun, Error> {
    let priority = request.priority;
    let title = app.pipeline.registry().title(&request.model)?;
    let request = TextRequest { tenant: caller.tenant, ..request };
    let texts = app.pipeline.generate_all(model, vec![request]).await?;
    let place = texts.first().map_or_else(Place::default, TextStream::place);
    let prompt_tokens = texts.iter().map(TextStream::prompt_tokens).sum();
    watch.generating(model.id(), &title, priority, &texts, 1);
    let watcher = Arc::clone(watch);
    let events = merge(texts, 1).inspect(move |event| watcher.event(event)).boxed();
    // Streams of these tell all of it again at their end.
    let events = app.unsent.count(events, Some(caller.tenant.id), 1);
    Ok(Begun { place, prompt_tokens, events })
}

/// The same; an answer for which there is less room than it asks for ends where the context does.
/// So the neighbours have it.
pub(super) async fn begin_in_room(
    app: &App,
    watch: &Arc<Watch>,
    caller: &Caller,
    model: &Lease<ServedModel>,
    request: TextRequest,
) -> Result<(Begun, bool), Error> {
    match begin(app, watch, caller, model, request.clone()).await {
        Err(Error::ContextLengthExceeded { completion: 1.., .. }) => {
            let request = TextRequest { max_tokens: None, ..request };
            Ok((begin(app, watch, caller, model, request).await?, true))
        }
        begun => Ok((begun?, false)),
    }
}

/// Tells where the request came into the queue, and how long that takes if it is known.
pub(super) fn placed(mut response: Response, place: Place) -> Response {
    let headers = response.headers_mut();
    headers.insert("x-hearth-queue-position", place.position.into());
    if let Some(wait) = place.wait {
        headers.insert("x-hearth-estimated-wait-ms", (wait.as_millis() as u64).into());
    }
    response
}

/// More choices than the queue has places would be told to come back later for ever.
fn check_choices(model: &ServedModel, call: &Call) -> Result<(), ApiError> {
    let n = call.requests.iter().map(|request| request.n).sum::<usize>();
    let max = model.engine().limits().queue_len;
    if n <= max {
        return Ok(());
    }
    let param = if call.requests.len() > 1 { "prompt" } else { "n" };
    let message = format!(
        "Invalid '{param}': the request asks for {n} choices, and the server takes at most {max}."
    );
    Err(ApiError::invalid(param, message))
}

fn envelope(app: &App, model: &ServedModel, call: &Call) -> Result<Envelope, ApiError> {
    let prefix = match call.shape {
        Shape::Chat => "chatcmpl-",
        Shape::Completion => "cmpl-",
    };
    let first = call.requests.first();
    Ok(Envelope {
        shape: call.shape,
        in_old_words: call.in_old_words,
        id: ids::random(prefix),
        created_s: unix_now_s(),
        model: app.pipeline.registry().title(&call.model)?,
        fingerprint: model.fingerprint().to_owned(),
        tier: first.map_or("default", |request| chat::tier(request.priority)),
        n: first.map_or(1, |request| request.n),
        shown: call.shown,
        prompts: call.requests.len(),
        prompt_tokens: 0,
        prompt_ids: first.filter(|request| request.token_ids).map(|_| Vec::new()),
        logprobs: call.logprobs,
    })
}

/// The events of all prompts, as they come, with choices numbered in prompt-major order. A panic
/// below ends the answer with an error, not the connection.
pub(super) fn merge(
    texts: Vec<TextStream>,
    n: usize,
) -> BoxStream<'static, Result<TextEvent, Error>> {
    let streams = texts.into_iter().enumerate().map(|(prompt, text)| {
        let next = |mut text: TextStream| async move { Some((text.next().await?, text)) };
        stream::unfold(text, next).map(move |event| event.map(|e| renumber(e, prompt * n))).boxed()
    });
    AssertUnwindSafe(stream::select_all(streams))
        .catch_unwind()
        .map(|event| {
            let failed = || Error::Internal("The server failed on this request.".to_owned());
            event.unwrap_or_else(|_| Err(failed()))
        })
        .boxed()
}

fn renumber(mut event: TextEvent, first: usize) -> TextEvent {
    match &mut event {
        TextEvent::Delta { choice, .. }
        | TextEvent::Echo { choice, .. }
        | TextEvent::Prompt { choice, .. }
        | TextEvent::Tokens { choice, .. }
        | TextEvent::Reasoning { choice, .. }
        | TextEvent::ToolCall { choice, .. }
        | TextEvent::ToolArguments { choice, .. }
        | TextEvent::Finished { choice, .. } => *choice += first,
    }
    event
}
