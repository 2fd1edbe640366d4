//! What there is: `/api/tags`, `/api/show`, `/api/ps`, `/api/version`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{known, model_name};
use crate::registry::{Card, Details, Registry, Skills, State as Where};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::fields::{self, Field, Takes, honoured, no_effect};
use crate::types::unix_now_s;

/// The version of Ollama whose API this is: clients refuse servers that are too old for them.
const API_VERSION: &str = "0.12.11";

/// `POST /api/show`.
pub(super) const SHOW: &[Field] = &[
    honoured("model", Takes::Text),
    honoured("name", Takes::Text),
    no_effect("verbose", Takes::Bool, "vocabularies are not told"),
];

/// `GET /api/version`.
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": API_VERSION, "hearth": env!("CARGO_PKG_VERSION")}))
}

/// `GET /api/tags`: everything that can be asked for, in memory or not.
pub(super) async fn tags(State(app): State<Arc<App>>) -> Json<Value> {
    let registry = app.pipeline.registry();
    let models = registry.cards().map(|card| tag(card, &card.id));
    let adapters = registry.adapters().cards().into_iter().map(|adapter| adapter.id);
    let aliases = registry.aliases().iter().map(|(name, _)| name.clone());
    let others = adapters.chain(aliases);
    let others = others.filter_map(|name| registry.card(&name).ok().map(|card| tag(card, &name)));
    Json(json!({"models": models.chain(others).collect::<Vec<_>>()}))
}

/// `GET /api/ps`: what is in memory.
pub(super) async fn ps(State(app): State<Arc<App>>) -> Json<Value> {
    let registry = app.pipeline.registry();
    let ready = |standing: &crate::registry::Standing| standing.state == Where::Ready;
    let standings = registry.standings().into_iter().filter(ready);
    let models = standings.filter_map(|standing| {
        let card = registry.card(&standing.id).ok()?;
        let mut model = tag(card, &card.id);
        let expires = standing.stays.map(|time| unix_now_s().saturating_add(time.as_secs()));
        model["expires_at"] = json!(expires.map_or(Timestamp::MAX, timestamp).to_string());
        model["context_length"] = json!(size(&card.details, "context_length"));
        // What its memory is for does not say on which device it lies.
        model["size"] = json!(standing.bytes.max(card.details.file_bytes));
        model["size_vram"] = json!(0);
        Some(model)
    });
    Json(json!({"models": models.collect::<Vec<_>>()}))
}

/// `POST /api/show`. Loads nothing.
pub(super) async fn show(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut body = app.body(request).await?;
    fields::check(body.map(), SHOW, "", app.config.lenient_fields)?;
    let name = model_name(&mut body)?;
    let registry: &Registry = app.pipeline.registry();
    let card = registry.card(known(registry, &name))?;
    let found = &card.details;
    let mut info = Map::new();
    info.insert("general.architecture".to_owned(), json!(found.family));
    info.insert("general.parameter_count".to_owned(), json!(found.parameters));
    for (name, value) in &found.sizes {
        info.insert(format!("{}.{name}", found.family), json!(value));
    }
    Ok(Json(json!({
        "modelfile": format!("FROM {}", card.id),
        "parameters": "",
        "template": found.template.as_deref().unwrap_or_default(),
        "details": details(found),
        "model_info": info,
        "capabilities": capabilities(found.skills),
        "modified_at": timestamp(card.created_s).to_string(),
    })))
}

/// A model under one of its names.
fn tag(card: &Card, name: &str) -> Value {
    // A name has a tag after the last `/`.
    let tagged = name.rsplit('/').next().is_some_and(|last| last.contains(':'));
    let name = if tagged { name.to_owned() } else { format!("{name}:latest") };
    json!({
        "name": name,
        "model": name,
        "modified_at": timestamp(card.created_s).to_string(),
        "size": card.details.file_bytes,
        "digest": card.details.digest,
        "details": details(&card.details),
    })
}

fn details(found: &Details) -> Value {
    json!({
        "parent_model": "",
        "format": found.format,
        "family": found.family,
        "families": [found.family],
        "parameter_size": short(found.parameters),
        "quantization_level": found.quantization,
    })
}

fn capabilities(skills: Skills) -> Vec<&'static str> {
    let words = [
        ("completion", skills.completes),
        ("tools", skills.tools),
        ("insert", skills.inserts),
        ("thinking", skills.thinks),
        ("embedding", skills.embeds),
    ];
    words.into_iter().filter(|(_, can)| *can).map(|(word, _)| word).collect()
}

fn size(found: &Details, name: &str) -> Option<u64> {
    found.sizes.iter().find(|(known, _)| *known == name).map(|(_, size)| *size)
}

/// As Ollama writes it: `7.6B`, `494.03M`, `12K`.
fn short(count: u64) -> String {
    let n = count as f64;
    match count {
        0..1_000 => count.to_string(),
        1_000..1_000_000 => format!("{:.0}K", n / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2}M", n / 1e6),
        _ => format!("{:.1}B", n / 1e9),
    }
}

fn timestamp(unix_s: u64) -> Timestamp {
    let seconds = i64::try_from(unix_s).ok();
    seconds.and_then(|s| Timestamp::from_second(s).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_ollama_writes_them() {
        for (count, text) in
            [(999, "999"), (12_345, "12K"), (494_032_768, "494.03M"), (7_615_616_512, "7.6B")]
        {
            assert_eq!(short(count), text);
        }
    }

    #[test]
    fn a_name_without_a_tag_is_the_latest() {
        let id = |name: &str| {
            let kind = crate::registry::Kind::Text { context_len: 1 };
            let card = Card { id: name.into(), created_s: 0, kind, details: Arc::default() };
            tag(&card, name)["name"].as_str().unwrap().to_owned()
        };
        assert_eq!(id("tiny"), "tiny:latest");
        assert_eq!(id("org/tiny:F32"), "org/tiny:F32");
        assert_eq!(id("a:b/tiny"), "a:b/tiny:latest");
    }
}
