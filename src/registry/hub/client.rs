//! The hub's three routes over HTTP: a repository's file list, a file's head, a file's bytes.

use super::cache::{is_plain_name, is_plain_path};
use super::{HubError, HubOptions};
use crate::registry::source::HubId;
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

/// A file list longer than this is not a model's.
const LISTING_BYTES_MAX: u64 = 32 << 20;
/// Redirects within the hub (a repository that was renamed) before a file's head.
const REDIRECTS_MAX: usize = 5;

/// Talks to one hub with one token.
pub(super) struct Client<'a> {
    options: &'a HubOptions,
    /// Follows redirects; the token stays on the hub's own host.
    agent: Agent,
    /// Follows none: a file's commit and hash stand in the hub's own answer, not in the storage's.
    heads: Agent,
}

/// What the hub says about a revision.
pub(super) struct Listing {
    /// The commit that the revision is now.
    pub(super) commit: String,
    /// Names of all files.
    pub(super) files: Vec<String>,
}

/// What the hub says about a file.
pub(super) struct FileHead {
    /// Names the content; for large files its SHA-256.
    pub(super) etag: String,
    /// Size in bytes, where the hub tells it.
    pub(super) len: Option<u64>,
}

impl<'a> Client<'a> {
    pub(super) fn new(options: &'a HubOptions) -> Self {
        let config = || {
            Agent::config_builder()
                .http_status_as_error(false)
                .user_agent(concat!("hearth/", env!("CARGO_PKG_VERSION")))
                .timeout_connect(Some(options.connect_timeout))
                .timeout_resolve(Some(options.connect_timeout))
                .timeout_recv_response(Some(Duration::from_secs(60)))
                .timeout_per_read(Some(Duration::from_secs(60)))
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        };
        let heads = config().max_redirects(0).build().new_agent();
        Self { options, agent: config().build().new_agent(), heads }
    }

    /// All files of a revision.
    pub(super) fn list(&self, id: &HubId) -> Result<Listing, HubError> {
        let revision = encoded(id.revision(), false);
        let url = format!("{}/api/models/{}/revision/{revision}", self.options.endpoint, id.repo);
        let answer = self.authorized(self.agent.get(&url)).call();
        let mut answer = self.checked(id, None, answer)?;
        let body = answer.body_mut().with_config().limit(LISTING_BYTES_MAX).read_to_vec();
        let body = body.map_err(|e| self.unreachable(e.to_string()))?;
        let listing: RepoListing = serde_json::from_slice(&body)
            .map_err(|e| self.confused(format!("{url}: not a file list: {e}")))?;
        let files: Vec<String> = listing.siblings.into_iter().map(|file| file.rfilename).collect();
        if let Some(odd) = files.iter().find(|name| !is_plain_path(name)) {
            return Err(self.confused(format!("{url}: it lists a file `{}`", odd.escape_debug())));
        }
        if !is_plain_name(&listing.sha) {
            return Err(self.confused(format!("{url}: commit `{}`", listing.sha.escape_debug())));
        }
        Ok(Listing { commit: listing.sha, files })
    }

    /// Name and size of a file's content.
    pub(super) fn head(&self, id: &HubId, commit: &str, file: &str) -> Result<FileHead, HubError> {
        let mut url = self.url(id, commit, file);
        for _ in 0..REDIRECTS_MAX {
            // Compressed answers would have another length.
            let request = self.authorized(self.heads.head(&url));
            let answer = self.checked(id, Some(file), request.call())?;
            let headers = answer.headers();
            let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
            if let Some(etag) = etag.filter(|_| text(headers, "x-repo-commit").is_some()) {
                let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
                if !is_plain_name(&etag) {
                    return Err(self.confused(format!("{url}: ETag `{}`", etag.escape_debug())));
                }
                let own_len =
                    || text(headers, "content-length").filter(|_| answer.status().is_success());
                let len = text(headers, "x-linked-size").or_else(own_len);
                return Ok(FileHead { etag, len: len.and_then(|len| len.parse().ok()) });
            }
            let next = text(headers, "location").filter(|_| answer.status().is_redirection());
            match next.and_then(|next| self.on_this_hub(next)) {
                Some(next) => url = next,
                None => return Err(self.confused(format!("{url}: no commit and ETag in its head"))),
            }
        }
        Err(self.confused(format!("{url}: more than {REDIRECTS_MAX} redirects")))
    }

    /// A file's bytes from `start` on. The answer may hold the whole file (status 200) when the
    /// server does not do ranges, and says so when there is nothing from `start` on (416).
    pub(super) fn get(
        &self,
        id: &HubId,
        commit: &str,
        file: &str,
        start: u64,
    ) -> Result<Response<Body>, HubError> {
        let mut request = self.authorized(self.agent.get(self.url(id, commit, file)));
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
        }
        match request.call() {
            Ok(answer) if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE => Ok(answer),
            answer => self.checked(id, Some(file), answer),
        }
    }

    /// Attempts in a row that may bring nothing.
    pub(super) fn attempts(&self) -> u32 {
        self.options.attempts
    }

    /// The wait after so many attempts that brought nothing.
    pub(super) fn pause(&self, fruitless: u32) -> Duration {
        self.options.retry_pause * 2u32.pow(fruitless.saturating_sub(1).min(5))
    }

    /// The hub does not answer, or answers that it cannot now.
    pub(super) fn unreachable(&self, reason: String) -> HubError {
        HubError::Unreachable { endpoint: self.options.endpoint.clone(), reason }
    }

    fn confused(&self, reason: String) -> HubError {
        HubError::Confused { endpoint: self.options.endpoint.clone(), reason }
    }

    fn url(&self, id: &HubId, commit: &str, file: &str) -> String {
        let (endpoint, repo) = (&self.options.endpoint, &id.repo);
        format!("{endpoint}/{repo}/resolve/{commit}/{}", encoded(file, true))
    }

    /// The absolute form of a redirect that stays on the hub.
    fn on_this_hub(&self, location: &str) -> Option<String> {
        let endpoint = &self.options.endpoint;
        if location.starts_with('/') && !location.starts_with("//") {
            let scheme_end = endpoint.find("://").map_or(0, |at| at + 3);
            let host_end =
                endpoint[scheme_end..].find('/').map_or(endpoint.len(), |at| scheme_end + at);
            return Some(format!("{}{location}", &endpoint[..host_end]));
        }
        location.starts_with(&format!("{endpoint}/")).then(|| location.to_owned())
    }

    fn authorized<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.options.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    /// Turns statuses into errors that say what to do.
    fn checked(
        &self,
        id: &HubId,
        file: Option<&str>,
        answer: Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, HubError> {
        let answer = answer.map_err(|e| self.unreachable(e.to_string()))?;
        let status = answer.status();
        let code = text(answer.headers(), "x-error-code").unwrap_or_default();
        let not_found = || HubError::NotFound {
            what: match (file, code) {
                (Some(file), _) => format!("file `{file}` of `{}`", id.repo),
                (None, "RevisionNotFound") => {
                    format!("revision `{}` of `{}`", id.revision(), id.repo)
                }
                (None, _) if id.revision.is_some() => {
                    format!("repository `{}` or its revision `{}`", id.repo, id.revision())
                }
                (None, _) => format!("repository `{}`", id.repo),
            },
            endpoint: self.options.endpoint.clone(),
        };
        match status {
            s if s.is_success() || s.is_redirection() => Ok(answer),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(HubError::Gated {
                repo: id.repo.clone(),
                page: format!("{}/{}", self.options.endpoint, id.repo),
                status: status.as_u16(),
                advice: match self.options.token {
                    None => "set HF_TOKEN to the token of an account that may read it",
                    Some(_) => "the token in use may not read it",
                },
            }),
            StatusCode::NOT_FOUND => Err(not_found()),
            s if s.is_server_error() || s == StatusCode::TOO_MANY_REQUESTS => {
                Err(self.unreachable(format!("it answers with status {s}")))
            }
            s => Err(self.confused(format!("status {s} for `{id}`"))),
        }
    }
}

#[derive(serde::Deserialize)]
struct RepoListing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(serde::Deserialize)]
struct Sibling {
    rfilename: String,
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Percent-encodes what a URL's path cannot hold.
fn encoded(text: &str, keep_slash: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
        if plain || (keep_slash && byte == b'/') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
