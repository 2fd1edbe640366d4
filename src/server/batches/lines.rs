//! One line of a batch: the parser and the answer of the live route, without the route.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::{Map, Value};

use crate::auth::{Caller, Denied};
use crate::error::Error;
use crate::jobs::{Answer, Checked, Executor, Fault, Later};
use crate::registry::Loaded;
use crate::server::call::Call;
use crate::server::error::{ApiError, Refusal};
use crate::server::extract::Fields;
use crate::server::observe::Watch;
use crate::server::{App, answer, auth, chat, completions, embeddings, fields, responses};
use crate::types::Tenant;

/// Characters of a `custom_id`.
const NAME_CHARS_MAX: usize = 512;
/// When a line is tried again that found no place and was not told when.
const PAUSE: Duration = Duration::from_secs(1);
/// Lines in work at once, where no model that generates text is in memory when the server starts.
const AT_ONCE: usize = 64;
/// Refusals after which a line can be tried again, because it was not begun.
const LATER: [&str; 3] = ["rate_limit_exceeded", "queue_timeout", "shutting_down"];

/// Runs lines on a server.
pub(in crate::server) struct Lines {
    app: Arc<App>,
}

impl Lines {
    pub(in crate::server) fn new(app: Arc<App>) -> Self {
        Self { app }
    }

    /// Reads a line to what its endpoint would do.
    fn read(&self, endpoint: &str, line: &[u8]) -> Result<(String, Task), ApiError> {
        let lenient = self.app.config.lenient_fields;
        let mut line = Fields::parse(line)?;
        fields::check(line.map(), fields::BATCH_LINE, "", lenient)?;
        let custom_id = custom_id(&mut line)?;
        only(&mut line, "method", "POST")?;
        only(&mut line, "url", endpoint)?;
        let body = line.object("body")?.ok_or_else(|| ApiError::missing("body"))?;
        let task = Task::read(endpoint, body, lenient).map_err(of_body)?;
        Ok((custom_id, task))
    }

    async fn answer(
        &self,
        watch: Arc<Watch>,
        tenant: Tenant,
        still: Result<(), Denied>,
        task: Task,
    ) -> Response {
        let caller = Caller { project: tenant.project, tenant, admin: false, limiter: None };
        let app = &self.app;
        // The only way to stop what a lost key began.
        let answered = match (still.map_err(auth::shut_out), task) {
            (Err(shut_out), _) => Err(shut_out),
            (Ok(()), Task::Text(call)) => answer::answer(app, watch, &caller, call).await,
            (Ok(()), Task::Vectors(call)) => embeddings::answer(app, &watch, &caller, call).await,
            (Ok(()), Task::Response(draft)) => responses::answer(app, watch, &caller, *draft).await,
        };
        answered.unwrap_or_else(ApiError::into_response)
    }

    async fn try_run(&self, endpoint: &str, tenant: Tenant, line: &[u8]) -> Result<Answer, Later> {
        let keyring = &self.app.rooms.keyring;
        let limiter = keyring.limiter(tenant).map_err(|_| Later { wait: PAUSE })?;
        let still = keyring.still(tenant).map_err(|_| Later { wait: PAUSE })?;
        let watch = Arc::new(Watch::of_line(&self.app, endpoint, tenant, limiter));
        let request_id = watch.request_id.clone();
        let (custom_id, response) = match self.read(endpoint, line) {
            Ok((custom_id, task)) => {
                (custom_id, self.answer(Arc::clone(&watch), tenant, still, task).await)
            }
            // It was checked, by a server that was started differently.
            Err(error) => (name_of(line), error.into_response()),
        };
        if let Some(later) = later(&response) {
            return Err(later);
        }
        watch.answered(&response);
        let status = response.status().as_u16();
        let bytes = body::to_bytes(response.into_body(), usize::MAX).await;
        let body = bytes.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        match body {
            Some(body) => Ok(Answer { custom_id, status, request_id, body }),
            None => Ok(failed(custom_id, request_id)),
        }
    }
}

impl Executor for Lines {
    fn check(&self, endpoint: &str, line: &[u8]) -> Result<Checked, Fault> {
        let checked = || {
            let (custom_id, task) = self.read(endpoint, line)?;
            let registry = self.app.pipeline.registry();
            let (model, found, inputs) = match &task {
                Task::Text(call) => (&*call.model, registry.generates(&call.model), 0),
                Task::Vectors(call) => (call.model(), registry.embeds(call.model()), call.inputs()),
                Task::Response(draft) => (draft.model(), registry.generates(draft.model()), 0),
            };
            found.map_err(|error| of_body(error.into()))?;
            Ok(Checked { custom_id, model: model.to_owned(), inputs })
        };
        checked().map_err(fault)
    }

    /// A line is a request of its key, and pays for its tokens.
    fn admit(&self, tenant: Tenant) -> Result<(), Later> {
        let keyring = &self.app.rooms.keyring;
        if matches!(keyring.still(tenant), Ok(Err(_))) {
            return Ok(()); // refused when it runs
        }
        // An error is the store's, and tried again.
        let limiter = keyring.limiter(tenant).map_err(|_| Later { wait: PAUSE })?;
        let Some(limiter) = limiter else { return Ok(()) };
        limiter.request(Instant::now()).map_err(|error| match error {
            Error::RateLimited { retry_after, .. } => Later { wait: retry_after },
            _ => Later { wait: PAUSE },
        })
    }

    fn run<'a>(
        &'a self,
        endpoint: &'a str,
        tenant: Tenant,
        line: &'a [u8],
    ) -> BoxFuture<'a, Result<Answer, Later>> {
        let run = AssertUnwindSafe(self.try_run(endpoint, tenant, line)).catch_unwind();
        run.map(|done| done.unwrap_or_else(|_| Ok(failed(name_of(line), String::new())))).boxed()
    }

    /// As many as run, and as many again so that a place is never empty; but no more than the part
    /// of the waiting room that is for work in the background.
    fn at_once(&self) -> usize {
        let loaded = self.app.pipeline.registry().loaded();
        let most = loaded.iter().filter_map(|model| match model {
            Loaded::Embedding(_) => None,
            Loaded::Text(model) => {
                let limits = model.engine().limits();
                Some((2 * limits.running_len).min(limits.queue_len / 4).max(1))
            }
        });
        most.max().unwrap_or(AT_ONCE)
    }

    fn line_bytes_max(&self) -> usize {
        self.app.config.body_limit_bytes
    }
}

/// The body of a line, read.
enum Task {
    Text(Call),
    Vectors(embeddings::Call),
    Response(Box<responses::Draft>),
}

impl Task {
    fn read(endpoint: &str, body: Map<String, Value>, lenient: bool) -> Result<Self, ApiError> {
        for name in ["stream", "background"] {
            if body.get(name).is_some_and(|value| value == true) {
                let message = format!("Unsupported parameter: '{name}' means nothing in a batch.");
                return Err(ApiError::unsupported(name, message));
            }
        }
        let body = Fields::within("", body);
        Ok(match endpoint {
            "/v1/chat/completions" => Self::Text(chat::parse(body, lenient)?),
            "/v1/completions" => Self::Text(completions::parse(body, lenient)?),
            "/v1/embeddings" => Self::Vectors(embeddings::parse(body, lenient)?),
            _ => {
                let draft = responses::read(body, lenient)?;
                draft.check()?;
                Self::Response(Box::new(draft))
            }
        })
    }
}

fn custom_id(line: &mut Fields) -> Result<String, ApiError> {
    let name = line.string("custom_id")?.ok_or_else(|| ApiError::missing("custom_id"))?;
    if (1..=NAME_CHARS_MAX).contains(&name.chars().count()) {
        return Ok(name);
    }
    let message = format!("Invalid 'custom_id': expected 1 to {NAME_CHARS_MAX} characters.");
    Err(ApiError::invalid("custom_id", message))
}

/// A member that can say one thing only.
fn only(line: &mut Fields, name: &str, value: &str) -> Result<(), ApiError> {
    match line.string(name)? {
        None => Err(ApiError::missing(name)),
        Some(given) if given == value => Ok(()),
        Some(given) => {
            let message = format!("Invalid '{name}': expected '{value}', but got '{given}'.");
            Err(ApiError::invalid(name, message))
        }
    }
}

/// An error about a body as one about the line that it stands in.
fn of_body(mut error: ApiError) -> ApiError {
    if let Some(param) = &mut error.param {
        let own = format!("body.{param}");
        error.message = error.message.replace(&format!("'{param}"), &format!("'{own}"));
        *param = own;
    }
    error
}

fn fault(error: ApiError) -> Fault {
    let code = match error.code {
        Some("invalid_json") => "invalid_json_line",
        code => code.unwrap_or(error.kind),
    };
    let message = error.message.replace("The request body", "The line");
    Fault { code: code.to_owned(), message, param: error.param }
}

/// Whether there was no place for it: it was not begun, and can be tried again. So it is with what
/// waited too long, and with a server that is about to stop.
fn later(response: &Response) -> Option<Later> {
    let refusal = response.extensions().get::<Refusal>();
    refusal.is_some_and(|refusal| LATER.contains(&refusal.code)).then(|| {
        let ms = response.headers().get("retry-after-ms").and_then(|value| value.to_str().ok());
        let wait = ms.and_then(|ms| ms.parse().ok()).map_or(PAUSE, Duration::from_millis);
        Later { wait }
    })
}

/// What a line calls itself, if that can be read.
fn name_of(line: &[u8]) -> String {
    let line = serde_json::from_slice::<Value>(line).unwrap_or_default();
    line["custom_id"].as_str().unwrap_or_default().to_owned()
}

fn failed(custom_id: String, request_id: String) -> Answer {
    let error = ApiError::from(Error::Internal("The server failed on this request.".to_owned()));
    Answer { custom_id, status: error.status.as_u16(), request_id, body: error.body() }
}
