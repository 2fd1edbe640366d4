//! `/tokenize`, `/detokenize` and `/apply-template`: a prompt as the model sees it.
//!
//! Not OpenAI's. Both conventions in use are spoken: vLLM's (`prompt` or `messages` in, `tokens`
//! and `count` out) and llama.cpp's (`content` in, `tokens` out). Without `model` the first one
//! that is served answers.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::extract::Fields;
use super::reference::{Routes, answers, post};
use super::{App, call, fields, functions, messages, tools};
use crate::auth::Caller;
use crate::pipeline::{Prompt, TextRequest};
use crate::registry::{Kind, Lease, ServedModel};
use crate::text::Special;

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Tokens";
    let example = json!({"messages": [{"role": "user", "content": "Hello"}]});
    Routes::new()
        .add(
            post(PATHS[0], "tokenize", GROUP, "The tokens of a text or a conversation.")
                .answers(&answers::TOKENS)
                .json(fields::TOKENIZE)
                .example(json!({"prompt": "Hello"})),
            tokenize,
        )
        .add(
            post(PATHS[1], "detokenize", GROUP, "The text of tokens.")
                .answers(&answers::TEXT)
                .json(fields::DETOKENIZE)
                .example(json!({"tokens": [72, 105]})),
            detokenize,
        )
        .add(
            post(PATHS[2], "applyTemplate", GROUP, "A conversation as the model reads it.")
                .answers(&answers::PROMPT)
                .json(fields::APPLY_TEMPLATE)
                .example(example),
            apply_template,
        )
}

/// The paths, which want a key like those under `/v1/`.
pub(super) const PATHS: [&str; 3] = ["/tokenize", "/detokenize", "/apply-template"];

/// `POST /tokenize`.
pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut body = app.body(request).await?;
    let lenient = app.config.lenient_fields;
    fields::check(body.map(), fields::TOKENIZE, "", lenient)?;
    let model = model(&app, &caller, &mut body).await?;
    let content = body.string("content")?;
    let prompt = body.string("prompt")?;
    let spelled = body.bool("return_token_strs")?.unwrap_or(false);
    let pieces = body.bool("with_pieces")?.unwrap_or(false);
    let parse = body.bool("parse_special")?.unwrap_or(true);
    let llama_cpp = content.is_some();
    let add = body.bool("add_special")?.unwrap_or(false);
    let add = body.bool("add_special_tokens")?.unwrap_or(!llama_cpp && prompt.is_some()) || add;
    let request = match (content.or(prompt), body.map().contains_key("messages")) {
        (Some(_), true) => {
            let message = "Invalid 'messages': it cannot stand beside 'prompt' or 'content'.";
            return Err(ApiError::invalid("messages", message));
        }
        (Some(text), false) => {
            text_alone(&body)?;
            TextRequest::new(model.id(), Prompt::Text(text))
        }
        (None, true) => chat(&model, &mut body, lenient)?,
        (None, false) => return Err(ApiError::missing("prompt")),
    };
    let (_, tokens) = app.pipeline.prompt(&model, request, Special { parse, add }).await?;
    let text = |id: &u32| model.tokenizer().token_text(*id).unwrap_or_default();
    if llama_cpp {
        let piece = |id| json!({"id": id, "piece": text(id)});
        let tokens = if pieces { tokens.iter().map(piece).collect() } else { json!(tokens) };
        return Ok(Json(json!({"tokens": tokens})));
    }
    let strings = spelled.then(|| tokens.iter().map(text).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokens.len(), "max_model_len": model.context_len(), "tokens": tokens,
        "token_strs": strings,
    })))
}

/// `POST /detokenize`.
pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::DETOKENIZE, "", app.config.lenient_fields)?;
    let model = model(&app, &caller, &mut body).await?;
    let list = match body.value("tokens") {
        None => return Err(ApiError::missing("tokens")),
        Some(Value::Array(list)) => call::tokens("tokens", &list)?,
        Some(other) => {
            let got = super::extract::kind(&other);
            return Err(ApiError::wrong_type("tokens", "an array of token ids", got));
        }
    };
    let vocab_len = model.engine().limits().vocab_len;
    if let Some(place) = list.iter().position(|&id| id as usize >= vocab_len) {
        let path = format!("tokens[{place}]");
        let message = format!("Invalid '{path}': the vocabulary has {vocab_len} tokens.");
        return Err(ApiError::invalid(&path, message));
    }
    let text = model.tokenizer().decode(&list, false);
    Ok(Json(json!({"prompt": text, "content": text})))
}

/// `POST /apply-template`.
pub(super) async fn apply_template(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut body = app.body(request).await?;
    let lenient = app.config.lenient_fields;
    fields::check(body.map(), fields::APPLY_TEMPLATE, "", lenient)?;
    let model = model(&app, &caller, &mut body).await?;
    let request = chat(&model, &mut body, lenient)?;
    let (prompt, _) = app.pipeline.prompt(&model, request, Special::PROMPT).await?;
    Ok(Json(json!({"prompt": prompt})))
}

/// What belongs to a conversation does nothing for a text.
fn text_alone(body: &Fields) -> Result<(), ApiError> {
    const OF_CHATS: [&str; 4] =
        ["tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs"];
    let asks = |name: &&&str| body.map().get(**name).is_some_and(|value| !value.is_null());
    match OF_CHATS.iter().find(asks) {
        None => Ok(()),
        Some(name) => {
            let message = format!("Invalid '{name}': it is only allowed with 'messages'.");
            Err(ApiError::invalid(name, message))
        }
    }
}

fn chat(model: &ServedModel, body: &mut Fields, lenient: bool) -> Result<TextRequest, ApiError> {
    let template_kwargs: Map<String, Value> =
        body.object("chat_template_kwargs")?.unwrap_or_default();
    let tools = tools::read(body, lenient)?;
    let mut messages = body.value("messages");
    functions::translate(&mut messages)?;
    let messages = messages::normalise(messages, lenient)?;
    let prompt = Prompt::Chat { messages, template_kwargs };
    Ok(TextRequest { tools, ..TextRequest::new(model.id(), prompt) })
}

async fn model(
    app: &App,
    caller: &Caller,
    body: &mut Fields,
) -> Result<Lease<ServedModel>, ApiError> {
    let generates = |kind: Kind| matches!(kind, Kind::Text { .. });
    let first = || app.pipeline.registry().cards().find(|card| generates(card.kind));
    let named = body.string("model")?;
    let name = named.as_deref().or_else(|| first().map(|card| card.id.as_str()));
    let name = name.ok_or_else(|| ApiError::missing("model"))?;
    Ok(app.pipeline.model(name, caller.tenant, None).await?)
}
