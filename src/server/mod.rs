//! The OpenAI API over HTTP. The only room that names axum and the wire.
//!
//! A request walks `observe` (id, panic, log) -> [`App::admit`] (drain, key) -> a route below ->
//! `chat` or `completions` (body to `TextRequest`) -> `answer` (pipeline) -> `objects` (events to
//! JSON) -> `sse` when it streams. Deliberately absent: binding the socket, signals, and draining
//! the engines, which are the caller's.

mod adapters;
mod answer;
mod anthropic;
mod auth;
mod batches;
mod call;
mod chat;
mod completions;
mod conversations;
mod cors;
mod crowd;
mod dialect;
mod embeddings;
mod error;
mod extract;
mod fields;
mod files;
mod format;
mod functions;
mod ids;
mod items;
mod linger;
mod listen;
mod messages;
mod metadata;
mod metrics;
mod models;
mod objects;
mod observe;
mod ollama;
mod paging;
mod pairs;
mod reference;
mod responses;
mod sse;
mod stored;
mod tls;
mod tokens;
mod tools;
mod unsent;
mod usage;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, FromRequest, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, middleware};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use self::crowd::{Crowd, Guest};
use self::error::ApiError;
use self::extract::Fields;
use self::listen::Door;
use self::metrics::Metrics;
use self::observe::Watch;
use self::reference::{Routes, answers, get, post};
use self::responses::Backgrounds;
pub use self::tls::Tls;
use self::unsent::Unsent;
use crate::auth::{Caller, Keyring};
use crate::error::Error;
use crate::files::Files;
use crate::history::History;
use crate::jobs::Batches;
use crate::ledger::Ledger;
use crate::pipeline::Pipeline;

/// How to serve. Validated by whoever makes it.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The certificate and key of a port that speaks https; without, it speaks http.
    pub tls: Option<Tls>,
    /// Origins whose pages may ask from a browser; none by default, `*` is every one.
    pub cors_origins: Vec<String>,
    /// Connections at once, three quarters of them from one address; others are closed.
    pub connections_max: usize,
    /// Longer bodies are refused with a 413.
    pub body_limit_bytes: usize,
    /// A connection on which no whole head of a request comes in this time is closed.
    pub head_timeout: Duration,
    /// A body that is not there after this time is refused with a 408.
    pub body_timeout: Duration,
    /// A connection that takes nothing of its answer for so long is closed, and so is one whose
    /// other end has vanished. At least a second.
    pub send_timeout: Duration,
    /// Pass over fields that nobody knows, with a warning, instead of refusing them.
    pub lenient_fields: bool,
    /// Streams are never silent for twice as long as this.
    pub heartbeat: Duration,
    /// Answers that still run this long after the shutdown began are cut off.
    pub drain_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            tls: None,
            cors_origins: Vec::new(),
            connections_max: 16_384,
            body_limit_bytes: 4 << 20,
            head_timeout: Duration::from_secs(75),
            body_timeout: Duration::from_secs(60),
            send_timeout: Duration::from_secs(60),
            lenient_fields: false,
            heartbeat: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// What stands behind the wire besides text.
#[derive(Clone)]
pub struct Rooms {
    /// Who may ask.
    pub keyring: Arc<Keyring>,
    /// What is remembered.
    pub history: Arc<History>,
    /// What was uploaded.
    pub files: Arc<Files>,
    /// What runs in the background.
    pub batches: Arc<Batches>,
    /// Who used what.
    pub ledger: Arc<Ledger>,
}

/// Serves until `shutdown`, then takes nothing new and lets running answers finish, for at most
/// `drain_timeout`. Batches stop at once and go on at the next start. The engines are left running:
/// draining them is the caller's.
pub async fn serve(
    config: ServerConfig,
    pipeline: Arc<Pipeline>,
    rooms: Rooms,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) {
    let ServerConfig { drain_timeout, head_timeout, send_timeout, .. } = config;
    let crowd = Arc::new(Crowd::new(config.connections_max));
    let door = Door { listener, tls: config.tls.clone(), crowd, head_timeout, send_timeout };
    let app = Arc::new(App::new(config, pipeline, rooms));
    let lines = Arc::new(batches::Lines::new(Arc::clone(&app)));
    let batches = tokio::spawn(Arc::clone(&app.rooms.batches).run(lines));
    let stop = async {
        shutdown.await;
        app.draining.store(true, Ordering::Release);
        batches.abort();
    };
    let closed = listen::until(stop, door, router(Arc::clone(&app))).await;
    let left = async {
        closed.await;
        // What is left has no connection: responses in the background.
        while Arc::strong_count(&app.in_work) > 1 {
            tokio::time::sleep(LOOK).await;
        }
    };
    let over = async {
        tokio::select! { () = left => {}, () = app.idle() => {} }
    };
    if tokio::time::timeout(drain_timeout, over).await.is_err() {
        tracing::warn!(?drain_timeout, "answers still run after the drain timeout");
    }
}

/// Between two looks at who is in work, and so many in vain are a second.
const LOOK: Duration = Duration::from_millis(100);
const LOOKS: usize = 10;

/// What every request shares.
struct App {
    config: ServerConfig,
    pipeline: Arc<Pipeline>,
    rooms: Rooms,
    metrics: Arc<Metrics>,
    backgrounds: Backgrounds,
    unsent: Unsent,
    lists: paging::Turns,
    /// Whose long bodies are being read.
    bodies: Arc<Crowd<u64>>,
    draining: AtomicBool,
    /// Held once more by every request in work.
    in_work: Arc<()>,
}

impl App {
    fn new(config: ServerConfig, pipeline: Arc<Pipeline>, rooms: Rooms) -> Self {
        let metrics = Arc::new(Metrics::new(pipeline.clone()));
        let draining = AtomicBool::new(false);
        let bodies = (BODIES_BYTES / config.body_limit_bytes.max(1)).clamp(4, 64);
        Self {
            config,
            pipeline,
            rooms,
            metrics,
            backgrounds: Backgrounds::default(),
            unsent: Unsent::default(),
            lists: paging::Turns::default(),
            bodies: Arc::new(Crowd::new(bodies)),
            draining,
            in_work: Arc::default(),
        }
    }

    /// Before anything is read: `/v1` and `/api` want a key.
    fn caller(&self, request: &Request) -> Result<Option<Caller>, ApiError> {
        wants_key(request.uri().path())
            .then(|| auth::caller(&self.rooms.keyring, request.headers()))
            .transpose()
    }

    /// Whoever sends work finds a server that stays, and has not used up what its key may use.
    fn admit(&self, caller: &Caller, request: &Request) -> Result<(), ApiError> {
        if request.method() != Method::POST {
            return Ok(());
        }
        if self.is_draining() {
            return Err(Error::ShuttingDown.into());
        }
        let limiter = caller.limiter.as_ref();
        Ok(limiter.map_or(Ok(()), |limiter| limiter.request(Instant::now()))?)
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Returns when no request has been in work for a second: long enough for the last words to
    /// leave. Whoever is connected still has not finished asking, and may wait for ever with it.
    async fn idle(&self) {
        let mut looks = 0;
        while looks < LOOKS {
            tokio::time::sleep(LOOK).await;
            looks = if Arc::strong_count(&self.in_work) == 1 { looks + 1 } else { 0 };
        }
    }

    /// A place among the long bodies: they are in memory before anybody knows what they ask.
    async fn place_for_body(&self, key: u64) -> Result<Guest<u64>, ApiError> {
        for _ in 0..BODY_LOOKS {
            if let Some(guest) = self.bodies.enter(key, key == 0) {
                return Ok(guest);
            }
            tokio::time::sleep(BODY_LOOK).await;
        }
        Err(ApiError::too_many_bodies())
    }

    /// Reads the body of a request.
    async fn body(&self, request: Request) -> Result<Fields, ApiError> {
        if !says_json(request.headers()) {
            return Err(ApiError::not_json());
        }
        if let Some(coding) = request.headers().get(header::CONTENT_ENCODING)
            && !coding.as_bytes().eq_ignore_ascii_case(b"identity")
        {
            return Err(ApiError::encoded());
        }
        let most = self.config.body_limit_bytes;
        if declared_len(request.headers()).is_some_and(|len| len > most as u64) {
            return Err(ApiError::body_too_large(most)); // unread: it may wait to be told to go on
        }
        let key = request.extensions().get::<Caller>().map_or(0, |caller| caller.tenant.key());
        let _place = match is_long(request.headers()) {
            true => Some(self.place_for_body(key).await?),
            false => None,
        };
        let limit = self.config.body_timeout;
        let body = tokio::time::timeout(limit, Bytes::from_request(request, &())).await;
        let body = body.map_err(|_| ApiError::body_too_slow(limit))?;
        let body = body.map_err(|error| match error.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::body_too_large(most),
            _ => ApiError::unreadable_body(),
        })?;
        Fields::parse(&body)
    }
}

/// Bodies from this length on are counted, and together no longer than that while they are read.
const LONG_BODY_BYTES: u64 = 64 << 10;
const BODIES_BYTES: usize = 256 << 20;
/// So often, and with so much time between, a place is looked for: others are read in milliseconds.
const BODY_LOOKS: usize = 50;
const BODY_LOOK: Duration = Duration::from_millis(20);

/// Whether a body is long, or may be.
fn is_long(headers: &HeaderMap) -> bool {
    declared_len(headers).is_none_or(|len| len >= LONG_BODY_BYTES)
}

/// How long a body is, where that is said before it comes.
fn declared_len(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Whether a path is asked for with a key, where the server has any.
fn wants_key(path: &str) -> bool {
    path.starts_with("/v1/") || path.starts_with("/api/") || tokens::PATHS.contains(&path)
}

fn router(app: Arc<App>) -> Router {
    routes()
        .into_router()
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(app.config.body_limit_bytes))
        .layer(middleware::from_fn_with_state(app.clone(), observe::layer))
        .with_state(app)
}

/// Every route, in the order of the reference.
fn routes() -> Routes {
    const TEXT: &str = "Text";
    const SERVER: &str = "Server";
    let chat = json!({"model": "hearth-tiny", "stream": true, "max_tokens": 64,
        "messages": [{"role": "user", "content": "Hello"}]});
    let text = json!({"model": "hearth-tiny", "prompt": "Once", "max_tokens": 32});
    Routes::new()
        .add(
            post("/v1/chat/completions", "createChatCompletion", TEXT, "Answers a conversation.")
                .json(fields::CHAT)
                .example(chat)
                .answers(&answers::CHAT)
                .streams(),
            chat_completions,
        )
        .merge(stored::routes())
        .add(
            post("/v1/completions", "createCompletion", TEXT, "Continues a text.")
                .json(fields::COMPLETIONS)
                .example(text)
                .answers(&answers::COMPLETION)
                .streams(),
            text_completions,
        )
        .add(
            post("/v1/embeddings", "createEmbedding", TEXT, "Makes vectors of texts.")
                .json(fields::EMBEDDINGS)
                .example(json!({"model": "all-MiniLM-L6-v2", "input": "Hello"}))
                .answers(&answers::EMBEDDINGS),
            text_embeddings,
        )
        .merge(tokens::routes())
        .merge(responses::routes())
        .merge(conversations::routes())
        .merge(files::routes())
        .merge(batches::routes())
        .merge(models::routes())
        .merge(adapters::routes())
        .merge(auth::routes())
        .merge(usage::routes())
        .merge(anthropic::routes())
        .merge(ollama::routes())
        .add(
            get("/health", "health", SERVER, "The process lives.").answers(&answers::STATUS),
            health,
        )
        .add(
            get("/ready", "ready", SERVER, "Requests are welcome.")
                .answers(&answers::STATUS)
                .or(503, &answers::STATUS),
            ready,
        )
        .add(
            get("/metrics", "metrics", SERVER, "Counters for Prometheus.")
                .content("application/openmetrics-text"),
            scrape,
        )
        .merge(reference::routes())
}

async fn chat_completions(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let call = chat::parse(app.body(request).await?, app.config.lenient_fields)?;
    answer::answer(&app, watch, &caller, call).await
}

async fn text_completions(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let call = completions::parse(app.body(request).await?, app.config.lenient_fields)?;
    answer::answer(&app, watch, &caller, call).await
}

/// Threads that may wait which the server takes up at most.
pub const THREADS: usize = 8;

/// Runs what waits for the disk, or takes its time, on a thread that may. There is a number of
/// these, and of all threads of the process it leaves some to prompts.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    static PLACES: Semaphore = Semaphore::const_new(THREADS);
    let place = PLACES.acquire().await; // it is never closed
    let done = tokio::task::spawn_blocking(move || {
        let _place = place;
        work()
    });
    let done = done.await;
    done.unwrap_or_else(|_| Err(Error::Internal("The server failed on this request.".to_owned())))
}

async fn text_embeddings(
    State(app): State<Arc<App>>,
    Extension(watch): Extension<Arc<Watch>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let call = embeddings::parse(app.body(request).await?, app.config.lenient_fields)?;
    embeddings::answer(&app, &watch, &caller, call).await
}

/// The process lives.
async fn health() -> Json<serde_json::Value> {
    Json(json!({"status": "ok"}))
}

/// Requests are welcome here.
async fn ready(State(app): State<Arc<App>>) -> Response {
    let loaded = app.pipeline.registry().loaded();
    let status = match loaded.iter().find(|model| !model.is_alive()) {
        _ if app.is_draining() => "draining".to_owned(),
        Some(model) => format!("the thread of {} has stopped", model.id()),
        None => return Json(json!({"status": "ready"})).into_response(),
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": status}))).into_response()
}

async fn scrape(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = app.metrics.encode().map_err(|error| Error::Internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::unknown_route(method.as_str(), uri.path())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(method.as_str(), uri.path())
}

/// A page in a browser can send anything anywhere without asking, but not with this header; so to
/// insist on it keeps strange pages from using a server on localhost.
fn says_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = value.and_then(|value| value.split(';').next()).unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_json_is_json() {
        let says = |value: &str| {
            let value = value.parse().unwrap();
            says_json(&HeaderMap::from_iter([(header::CONTENT_TYPE, value)]))
        };
        for good in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
            assert!(says(good), "{good}");
        }
        for bad in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""] {
            assert!(!says(bad), "{bad}");
        }
        assert!(!says_json(&HeaderMap::new()));
    }
}
