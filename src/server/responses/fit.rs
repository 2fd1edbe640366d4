//! `truncation: auto`: a conversation that is too long loses its beginning.
//!
//! It is cut before something that was told to the model, never between a call and its result, and
//! as late as it must be: the answer has the room that it asks for. `instructions` stay.

use serde_json::Value;

use super::request::{Draft, own_names};
use super::{App, objects};
use crate::registry::{Lease, ServedModel};
use crate::server::error::ApiError;
use crate::text::Special;

/// Tokens of the prompt that these items become.
pub(super) async fn count(
    app: &App,
    model: &Lease<ServedModel>,
    draft: &Draft,
    said: &[Value],
) -> Result<usize, ApiError> {
    let request = draft.call(said)?.requests.pop().ok_or_else(objects::cut_short)?;
    match app.pipeline.prompt(model, request, Special::PROMPT).await {
        Ok((_, tokens)) => Ok(tokens.len()),
        Err(error) => Err(own_names(error.into())),
    }
}

/// What of these items the model reads: all of them unless they do not fit and may be cut. What
/// cannot be made to fit is left as it is, to be refused by whoever submits it.
pub(super) async fn fitting<'a>(
    app: &App,
    model: &Lease<ServedModel>,
    draft: &Draft,
    said: &'a [Value],
) -> Result<&'a [Value], ApiError> {
    if !draft.truncate || fits(app, model, draft, said).await? {
        return Ok(said);
    }
    let cuts: Vec<usize> = (1..said.len()).filter(|&at| begins_a_turn(&said[at])).collect();
    // The first cut that is enough; all after it are.
    let (mut low, mut high) = (0, cuts.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        match fits(app, model, draft, &said[cuts[middle]..]).await? {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    Ok(cuts.get(low).map_or(said, |&at| &said[at..]))
}

async fn fits(
    app: &App,
    model: &Lease<ServedModel>,
    draft: &Draft,
    said: &[Value],
) -> Result<bool, ApiError> {
    match count(app, model, draft, said).await {
        Ok(tokens) => Ok(tokens.saturating_add(draft.room_wanted()) <= model.context_len()),
        // What is far too long is not even counted.
        Err(error) if error.code == Some("context_length_exceeded") => Ok(false),
        Err(error) => Err(error),
    }
}

fn begins_a_turn(item: &Value) -> bool {
    item["type"] == "message" && item["role"] != "assistant"
}
