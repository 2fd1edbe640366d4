//! `POST /v1/responses/compact`: a long conversation as a short one, to go on with.
//!
//! What the model was told stays word for word; what it said, called and heard from tools becomes a
//! summary that it writes itself, in one answer without thought. Nothing is stored: the items that
//! come back are the whole result.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use futures_util::stream::StreamExt;
use serde_json::{Value, json};

use super::request::{self, OUTPUT_TOKENS_MIN};
use super::{App, Begun, answer, begin, fields, fit, hold, ids, objects, reply, said, tables};
use crate::auth::Caller;
use crate::error::Error;
use crate::pipeline::TextEvent;
use crate::server::error::ApiError;
use crate::server::items;
use crate::server::observe::Watch;
use crate::types::unix_now_s;

/// What the model is asked at the end of the conversation.
const ASK: &str = "Summarise our conversation for whoever goes on with it: the facts, the results \
                   of tools, what was decided and done, and what is still open. My own messages \
                   are kept, so do not repeat them. Write the summary and nothing else.";
/// Tokens of a summary: so much of the context, and at most so many.
const PART_OF_CONTEXT: usize = 4;
const SUMMARY_TOKENS_MAX: usize = 2048;

pub(super) async fn compact(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let lenient = app.config.lenient_fields;
    let body = app.body(request).await?;
    fields::check(body.map(), tables::COMPACT, "", lenient)?;
    let mut draft = request::read(body, lenient)?;
    let mut said = said(&app, caller.project, &mut draft).await?;
    let told = |item: &&Value| item["type"] == "message" && item["role"] != "assistant";
    let mut output: Vec<Value> = said.iter().filter(told).cloned().collect();
    said.push(items::user_text(ASK));

    let model = hold(&app, caller.tenant, &draft, &said).await?;
    let prompt = fit::count(&app, &model, &draft, &said).await?;
    let max = model.context_len();
    let room = max.saturating_sub(prompt);
    if room < OUTPUT_TOKENS_MIN as usize {
        let completion = OUTPUT_TOKENS_MIN as usize;
        return Err(Error::ContextLengthExceeded { prompt, completion, max, param: "input" }.into());
    }
    draft.brief(room.min(SUMMARY_TOKENS_MAX).min(max / PART_OF_CONTEXT));

    let Begun { mut events, place, .. } =
        begin(&app, &watch, &caller, &model, &draft, &said).await?;
    let (mut summary, mut usage) = (String::new(), None);
    while let Some(event) = events.next().await {
        match event? {
            TextEvent::Delta { text, .. } => summary.push_str(&text),
            TextEvent::Finished { usage: used, reasoning_tokens, .. } => {
                usage = Some(reply::usage_object(&used, reasoning_tokens));
            }
            _ => {}
        }
    }
    let usage = usage.ok_or_else(objects::cut_short)?;
    if summary.trim().is_empty() {
        return Err(Error::Internal("The model wrote no summary.".to_owned()).into());
    }
    output.push(items::compaction(summary.trim()));
    let object = json!({
        "id": ids::random("resp_"),
        "object": "response.compaction",
        "created_at": unix_now_s(),
        "output": output,
        "usage": usage,
    });
    Ok(answer::placed(Json(object).into_response(), place))
}
