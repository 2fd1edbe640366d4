//! Anthropic's `POST /v1/messages` and `POST /v1/messages/count_tokens`: a neighbour's words for
//! the house's own request.
//!
//! [`request`] reads a body to a `TextRequest`, [`talk`] its conversation, [`reply`] writes the
//! events of its answer; in between is the same pipeline, and before it the same keys, limits and
//! queue, as for every other route. Deliberately absent: hosted tools, pictures and documents, the
//! end of an answer that somebody else began, all of which are refused by name.

mod reply;
mod request;
#[cfg(test)]
mod request_tests;
mod talk;

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use futures_util::stream::StreamExt;
use serde_json::{Value, json};

use self::reply::Reply;
use self::request::Thinking;
use super::error::ApiError;
use super::observe::Watch;
use super::reference::{Routes, answers, post};
use super::sse::Writer;
use super::{App, answer, objects, sse};
use crate::auth::Caller;
use crate::pipeline::{Prompt, TextRequest};
use crate::registry::ServedModel;
use crate::text::Special;

/// The versions of the protocol. The second only refuses more: documents and citations, which are
/// refused here anyway, and how to sample, which a model of one's own may well be told.
const VERSIONS: [&str; 2] = ["2023-06-01", "2026-10-21"];

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Anthropic";
    let messages_of = post("/v1/messages", "createMessage", GROUP, "Answers a conversation.");
    let count = post(
        "/v1/messages/count_tokens",
        "countMessageTokens",
        GROUP,
        "Counts the tokens of a conversation.",
    );
    let said = json!([{"role": "user", "content": "Hello"}]);
    let short = json!({"model": "hearth-tiny", "messages": said});
    let mut whole = short.clone();
    (whole["max_tokens"], whole["stream"]) = (64.into(), true.into());
    Routes::new()
        .add(
            messages_of
                .json(request::MESSAGES)
                .example(whole)
                .answers(&answers::ANTHROPIC_MESSAGE)
                .streams(),
            messages,
        )
        .add(
            count.json(request::COUNT_TOKENS).example(short).answers(&answers::ANTHROPIC_COUNT),
            count_tokens,
        )
}

async fn messages(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    check_version(request.headers())?;
    let mut asked = request::read(app.body(request).await?, app.config.lenient_fields)?;
    let model = app.pipeline.model(&asked.request.model, caller.tenant, None).await?;
    check_thinking(&model, asked.thinking, &mut asked.request)?;
    let title = app.pipeline.registry().title(&asked.request.model)?;
    let begun = answer::begin_in_room(&app, &watch, &caller, &model, asked.request).await?;
    let (answer::Begun { place, prompt_tokens, mut events }, fills_context) = begun;
    let shown = asked.thinking.shown;
    let mut reply = Reply::new(&title, &watch.request_id, prompt_tokens, shown, fills_context);
    if asked.stream {
        watch.streaming();
        return Ok(answer::placed(sse::response(events, reply, app.config.heartbeat), place));
    }
    // The events that a stream would have had go nowhere.
    let mut unsent = Vec::new();
    while let Some(event) = events.next().await {
        reply.event(event?, &mut unsent);
        unsent.clear();
    }
    let message = reply.message(&mut unsent).ok_or_else(objects::cut_short)?;
    Ok(answer::placed(Json(message).into_response(), place))
}

async fn count_tokens(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    check_version(request.headers())?;
    let (mut request, thinking) =
        request::read_prompt(app.body(request).await?, app.config.lenient_fields)?;
    let model = app.pipeline.model(&request.model, caller.tenant, None).await?;
    check_thinking(&model, thinking, &mut request)?;
    let (_, tokens) = app.pipeline.prompt(&model, request, Special::PROMPT).await?;
    Ok(Json(json!({"input_tokens": tokens.len()})))
}

/// Who names no version may mean any of them.
fn check_version(headers: &HeaderMap) -> Result<(), ApiError> {
    match headers.get("anthropic-version") {
        Some(version) if !VERSIONS.iter().any(|known| version == known) => {
            let known = VERSIONS.join("' and '");
            let message = format!("Invalid 'anthropic-version': '{known}' are spoken here.");
            Err(ApiError::invalid("anthropic-version", message))
        }
        _ => Ok(()),
    }
}

fn check_thinking(
    model: &ServedModel,
    thinking: Thinking,
    request: &mut TextRequest,
) -> Result<(), ApiError> {
    // Such a model always thinks; less than it would by itself is for those who ask for it.
    if model.harmony().is_some()
        && !thinking.said
        && let Prompt::Chat { template_kwargs, .. } = &mut request.prompt
    {
        template_kwargs.retain(|name, _| !request::SWITCHES.contains(&name.as_str()));
    }
    if !thinking.insists || model.thinks() {
        return Ok(());
    }
    let message =
        format!("'thinking' cannot be enabled: the template of `{}` knows no thought.", model.id());
    Err(ApiError::unsupported("thinking", message))
}
