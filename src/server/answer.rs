//! Runs a [`Call`]: one text stream per prompt, merged, and answered as a stream or as a whole.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream, StreamExt};

use super::App;
use super::call::{Call, Shape};
use super::error::ApiError;
use super::ids;
use super::objects::{Chunks, Envelope, Whole};
use super::observe::Watch;
use super::sse;
use super::stored::Keeper;
use crate::auth::Caller;
use crate::error::Error;
use crate::pipeline::{TextEvent, TextStream};
use crate::registry::ServedModel;

/// Answers a call. Dropping the future, or the body of the answer, cancels everything behind it.
pub(super) async fn answer(
    app: &App,
    watch: Arc<Watch>,
    caller: &Caller,
    call: Call,
) -> Result<Response, ApiError> {
    let registry = app.pipeline.registry();
    let model = registry.get(&call.model).ok_or(Error::ModelNotFound(call.model.clone()))?;
    check_choices(&model, &call)?;
    let mut envelope = envelope(&model, &call);
    let mut texts = Vec::with_capacity(call.requests.len());
    for mut request in call.requests {
        request.tenant = caller.tenant;
        texts.push(app.pipeline.generate(request).await?);
    }
    if envelope.prompt_ids.is_some() {
        envelope.prompt_ids = Some(texts.iter().map(|text| text.prompt_ids().to_vec()).collect());
    }
    envelope.prompt_tokens = texts.iter().map(TextStream::prompt_tokens).sum();
    watch.generating(model.id(), envelope.prompt_tokens, envelope.n * envelope.prompts);
    let watcher = watch.clone();
    let mut events = merge(texts, envelope.n).inspect(move |event| watcher.event(event)).boxed();
    if let Some(keep) = call.keep {
        let history = Arc::clone(&app.rooms.history);
        let request_id = watch.request_id.clone();
        let keeper = Keeper { history, project: caller.project, request_id };
        events = keep.follow(events, Whole::new(envelope.clone()), keeper);
    }
    if let Some(options) = call.stream {
        watch.streaming();
        return Ok(sse::response(events, Chunks::new(envelope, options), app.config.heartbeat));
    }
    let mut whole = Whole::new(envelope);
    while let Some(event) = events.next().await {
        whole.event(event?);
    }
    Ok(Json(whole.end()?).into_response())
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

fn envelope(model: &ServedModel, call: &Call) -> Envelope {
    let prefix = match call.shape {
        Shape::Chat => "chatcmpl-",
        Shape::Completion => "cmpl-",
    };
    let first = call.requests.first();
    Envelope {
        shape: call.shape,
        id: ids::random(prefix),
        created_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        model: model.id().to_owned(),
        fingerprint: model.fingerprint().to_owned(),
        n: first.map_or(1, |request| request.n),
        prompts: call.requests.len(),
        prompt_tokens: 0,
        prompt_ids: first.filter(|request| request.token_ids).map(|_| Vec::new()),
        logprobs: first.is_some_and(|request| request.logprobs.is_some()),
    }
}

/// The events of all prompts, as they come, with choices numbered in prompt-major order. A panic
/// below ends the answer with an error, not the connection.
fn merge(texts: Vec<TextStream>, n: usize) -> BoxStream<'static, Result<TextEvent, Error>> {
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
        | TextEvent::Prompt { choice, .. }
        | TextEvent::Tokens { choice, .. }
        | TextEvent::Reasoning { choice, .. }
        | TextEvent::ToolCall { choice, .. }
        | TextEvent::ToolArguments { choice, .. }
        | TextEvent::Finished { choice, .. } => *choice += first,
    }
    event
}
