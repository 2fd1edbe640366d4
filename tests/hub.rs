//! The hub, spoken to over a real socket: a small server in this process knows its routes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hearth::registry::hub::{HubError, HubOptions, Progress, list, resolve};
use hearth::registry::source::HubId;
use serde_json::json;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has, and how it misbehaves.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    commit: String,
    /// The one revision there is.
    revision: String,
    /// Every route answers with this status and `X-Error-Code`.
    refuse: Option<(u16, &'static str)>,
    /// Large files: close the connection after so many bytes, once for each entry.
    cuts: Vec<usize>,
    no_ranges: bool,
    /// Bytes are not those that the hash names.
    corrupt: bool,
    /// Overrides the ETag of every file.
    etag: Option<&'static str>,
    /// `old/name` answers with a redirect to `org/name`.
    renamed: bool,
    log: Vec<Request>,
}

#[derive(Clone, Debug)]
struct Request {
    method: String,
    path: String,
    range: Option<String>,
    token: Option<String>,
}

#[derive(Clone)]
struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Server {
    fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect();
        let (commit, revision) = (COMMIT.to_owned(), "main".to_owned());
        let state = State { files, commit, revision, ..State::default() };
        let server = Self { port, state: Arc::new(Mutex::new(state)) };
        let own = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = own.clone();
                std::thread::spawn(move || server.answer(stream));
            }
        });
        server
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// Takes what was asked since the last call.
    fn log(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    fn options(&self, cache: &Path) -> HubOptions {
        HubOptions {
            endpoint: format!("http://127.0.0.1:{}", self.port),
            cache: cache.to_owned(),
            token: Some("secret".to_owned()),
            offline: false,
            attempts: 3,
            retry_pause: Duration::from_millis(1),
            connect_timeout: Duration::from_secs(5),
        }
    }

    fn answer(&self, stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let Some(Ok(first)) = lines.next() else { return };
        let mut words = first.split(' ');
        let (method, path) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
        let mut request = Request { method, path, range: None, token: None };
        for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap();
            match name.to_ascii_lowercase().as_str() {
                "range" => request.range = Some(value.to_owned()),
                "authorization" => request.token = Some(value.to_owned()),
                _ => {}
            }
        }
        let mut state = self.state.lock().unwrap();
        state.log.push(request.clone());
        let mut answer = self.route(&mut state, &request);
        drop(state);
        answer.send(stream, request.method == "HEAD");
    }

    fn route(&self, state: &mut State, request: &Request) -> Answer {
        if let Some((status, code)) = state.refuse {
            return Answer::new(status).header("X-Error-Code", code);
        }
        if let Some(rest) = request.path.strip_prefix("/storage/") {
            let name = state.files.keys().find(|name| *name == rest).cloned();
            return storage(state, &name.unwrap(), request);
        }
        if state.renamed && request.path.contains("old/name") {
            let target = request.path.replace("old/name", "org/name");
            return Answer::new(307).header("Location", &target);
        }
        if let Some(revision) = request.path.strip_prefix("/api/models/org/name/revision/") {
            if revision != state.revision.replace('/', "%2F") {
                return Answer::new(404).header("X-Error-Code", "RevisionNotFound");
            }
            let siblings: Vec<_> = state.files.keys().map(|n| json!({"rfilename": n})).collect();
            let body = json!({"id": "org/name", "sha": state.commit, "siblings": siblings});
            return Answer::new(200).body(body.to_string().into_bytes());
        }
        let prefix = format!("/org/name/resolve/{}/", state.commit);
        match request.path.strip_prefix(&prefix).and_then(|name| state.files.get_key_value(name)) {
            Some((name, bytes)) => self.resolve(state, name, bytes),
            None => Answer::new(404).header("X-Error-Code", "RepoNotFound"),
        }
    }

    /// Small files come from the hub itself, weights by a redirect to a storage on another host.
    fn resolve(&self, state: &State, name: &str, bytes: &[u8]) -> Answer {
        let is_large = name.ends_with(".safetensors") || name.ends_with(".gguf");
        let etag = match state.etag {
            Some(etag) => etag.to_owned(),
            None if is_large => sha256(bytes),
            None => format!("git{}", sha256(bytes).split_at(37).0),
        };
        if !is_large {
            let answer = Answer::new(200).header("X-Repo-Commit", &state.commit);
            return answer.header("ETag", &format!("W/\"{etag}\"")).body(bytes.to_vec());
        }
        Answer::new(302)
            .header("X-Repo-Commit", &state.commit)
            .header("X-Linked-Etag", &format!("\"{etag}\""))
            .header("X-Linked-Size", &bytes.len().to_string())
            .header("ETag", "\"of-the-redirect\"")
            .header("Location", &format!("http://localhost:{}/storage/{name}", self.port))
    }
}

fn storage(state: &mut State, name: &str, request: &Request) -> Answer {
    let mut bytes = state.files[name].clone();
    if state.corrupt {
        bytes[0] ^= 1;
    }
    let total = bytes.len();
    let start = request.range.as_deref().filter(|_| !state.no_ranges);
    let mut answer = match start {
        None => Answer::new(200).body(bytes),
        Some(range) => {
            let start = range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap();
            let start: usize = start.parse().unwrap();
            let content_range = format!("bytes {start}-{}/{total}", total - 1);
            Answer::new(206).header("Content-Range", &content_range).body(bytes.split_off(start))
        }
    };
    if !state.cuts.is_empty() {
        answer.cut = Some(state.cuts.remove(0));
    }
    answer
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), cut: None }
    }
    fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
    fn body(mut self, body: Vec<u8>) -> Self {
        self.body = body;
        self
    }
    fn send(&mut self, mut stream: TcpStream, head_only: bool) {
        let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", self.status);
        self.headers.push(("Content-Length".to_owned(), self.body.len().to_string()));
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let len = self.cut.unwrap_or(self.body.len());
        let _ = stream.write_all(head.as_bytes());
        if !head_only {
            let _ = stream.write_all(&self.body[..len]);
        }
        let _ = stream.flush();
    }
}

fn sha256(bytes: &[u8]) -> String {
    let hash = ring::digest::digest(&ring::digest::SHA256, bytes);
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Keeps what it is told.
#[derive(Default)]
struct Told {
    /// File, bytes that were there, bytes that came.
    files: Vec<(String, u64, u64)>,
    finished: usize,
    warnings: Vec<String>,
}

impl Progress for Told {
    fn start(&mut self, file: &str, have: u64, _total: u64) {
        self.files.push((file.to_owned(), have, 0));
    }
    fn advance(&mut self, bytes: u64) {
        self.files.last_mut().unwrap().2 += bytes;
    }
    fn finish(&mut self) {
        self.finished += 1;
    }
    fn warn(&mut self, message: &str) {
        self.warnings.push(message.to_owned());
    }
}

fn pull(id: &str, options: &HubOptions) -> Result<std::path::PathBuf, HubError> {
    resolve(&HubId::parse(id).unwrap(), options, &mut Told::default())
}

fn noise(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + i / 251) as u8).wrapping_add(seed)).collect()
}

fn sharded() -> Vec<(&'static str, Vec<u8>)> {
    let map = json!({"weight_map": {"a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"}});
    vec![
        ("README.md", b"# hello".to_vec()),
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", noise(5000, 1)),
        ("pytorch_model.bin", noise(100, 2)),
        ("model.safetensors.index.json", map.to_string().into_bytes()),
        ("model-00001-of-00002.safetensors", noise(300_000, 3)),
        ("model-00002-of-00002.safetensors", noise(70_000, 4)),
    ]
}

fn one_gguf() -> Vec<(&'static str, Vec<u8>)> {
    vec![("m-Q8_0.gguf", noise(1_000_000, 9))]
}

#[test]
fn sharded_safetensors_are_pulled_once_into_the_shared_layout() {
    let (cache, files) = (tempfile::tempdir().unwrap(), sharded());
    let server = Server::new(&files);
    let options = server.options(cache.path());
    let mut told = Told::default();
    let folder = resolve(&HubId::parse("org/name").unwrap(), &options, &mut told).unwrap();

    let repo = cache.path().join("models--org--name");
    assert_eq!(folder, repo.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let wanted: Vec<_> = files.iter().filter(|(n, _)| !n.starts_with(['R', 'p'])).collect();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), wanted.len());
    for (name, bytes) in &wanted {
        assert!(fs::read(folder.join(name)).unwrap() == *bytes, "{name}");
        let blob = fs::canonicalize(folder.join(name)).unwrap();
        assert_eq!(blob.parent().unwrap().file_name().unwrap(), "blobs", "{name}");
    }
    assert_eq!(told.finished, wanted.len());
    for (name, have, came) in &told.files {
        let bytes = wanted.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.len());
        assert_eq!((*have, Some(*came as usize)), (0, bytes), "{name}");
    }

    // The token is for the hub, not for the storage it redirects to.
    for request in server.log() {
        let expected = (!request.path.starts_with("/storage/")).then(|| "Bearer secret".to_owned());
        assert_eq!(request.token, expected, "{request:?}");
    }
    // Again: only the file list is asked for.
    assert_eq!(pull("org/name", &options).unwrap(), folder);
    let log = server.log();
    assert!(log.len() == 1 && log[0].path.starts_with("/api/"), "{log:?}");
}

#[test]
fn a_new_commit_fetches_only_what_changed() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new(&sharded());
    let options = server.options(cache.path());
    let old = pull("org/name", &options).unwrap();
    server.log();
    server.set(|state| {
        state.commit = COMMIT.replace('0', "f");
        state.files.insert("config.json".to_owned(), b"{\"new\": 1}".to_vec());
    });
    let new = pull("org/name", &options).unwrap();
    assert_eq!(fs::read(new.join("config.json")).unwrap(), b"{\"new\": 1}");
    assert_eq!(fs::read(old.join("config.json")).unwrap(), b"{}");
    let got: Vec<_> = server.log().into_iter().filter(|r| r.method == "GET").collect();
    assert_eq!(got.len(), 2, "the list and config.json: {got:?}");
    // The old commit can still be named.
    server.set(|state| state.refuse = Some((503, "")));
    assert_eq!(pull(&format!("org/name@{COMMIT}"), &options).unwrap(), old);
}

#[test]
fn a_cut_connection_is_continued() {
    let (cache, files) = (tempfile::tempdir().unwrap(), one_gguf());
    let server = Server::new(&files);
    server.set(|state| state.cuts = vec![400_000, 0, 100_000]);
    let path = pull("org/name", &server.options(cache.path())).unwrap();
    assert!(fs::read(path).unwrap() == files[0].1);
    let log = server.log();
    let ranges: Vec<_> = log.iter().filter(|r| r.path.starts_with("/storage/")).collect();
    let starts: Vec<_> = ranges.iter().map(|r| r.range.as_deref().unwrap_or("none")).collect();
    assert_eq!(starts, ["none", "bytes=400000-", "bytes=400000-", "bytes=500000-"]);
}

#[test]
fn an_interrupted_pull_is_continued_by_the_next_one() {
    let (cache, files) = (tempfile::tempdir().unwrap(), one_gguf());
    let server = Server::new(&files);
    let options = server.options(cache.path());
    server.set(|state| state.cuts = vec![600_000, 0, 0, 0]);
    let error = pull("org/name", &options).unwrap_err().to_string();
    assert!(error.contains("cannot be reached") && error.contains("cache"), "{error}");
    let partial = format!("models--org--name/blobs/{}.incomplete", sha256(&files[0].1));
    assert_eq!(fs::metadata(cache.path().join(&partial)).unwrap().len(), 600_000);
    server.set(|state| state.cuts.clear());
    server.log();

    let mut told = Told::default();
    let path = resolve(&HubId::parse("org/name").unwrap(), &options, &mut told).unwrap();
    assert!(fs::read(path).unwrap() == files[0].1);
    assert_eq!(told.files, [("m-Q8_0.gguf".to_owned(), 600_000, 400_000)]);
    assert!(server.log().iter().any(|r| r.range.as_deref() == Some("bytes=600000-")));
    assert!(!cache.path().join(partial).exists());
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let (cache, files) = (tempfile::tempdir().unwrap(), one_gguf());
    let server = Server::new(&files);
    server.set(|state| {
        state.cuts = vec![400_000];
        state.no_ranges = true;
    });
    let path = pull("org/name", &server.options(cache.path())).unwrap();
    assert!(fs::read(path).unwrap() == files[0].1);
}

#[test]
fn damaged_bytes_are_found_and_removed() {
    let (cache, files) = (tempfile::tempdir().unwrap(), one_gguf());
    let server = Server::new(&files);
    let options = server.options(cache.path());
    server.set(|state| state.corrupt = true);
    let error = pull("org/name", &options).unwrap_err();
    assert!(matches!(&error, HubError::Damaged { file, .. } if file == "org/name/m-Q8_0.gguf"));
    assert_eq!(fs::read_dir(cache.path().join("models--org--name/blobs")).unwrap().count(), 0);
    server.set(|state| state.corrupt = false);
    assert!(fs::read(pull("org/name", &options).unwrap()).unwrap() == files[0].1);
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new(&one_gguf());
    let options = server.options(cache.path());
    let anonymous = HubOptions { token: None, ..options.clone() };
    let message = |options: &HubOptions, id: &str| pull(id, options).unwrap_err().to_string();

    server.set(|state| state.refuse = Some((401, "GatedRepo")));
    let text = message(&anonymous, "org/name");
    assert!(text.contains("`org/name` is gated") && text.contains("set HF_TOKEN"), "{text}");
    server.set(|state| state.refuse = Some((403, "GatedRepo")));
    let text = message(&options, "org/name");
    assert!(text.contains("the token in use may not read it"), "{text}");
    assert!(text.contains(&format!("{}/org/name", options.endpoint)), "{text}");

    server.set(|state| state.refuse = None);
    let text = message(&options, "org/other");
    assert!(text.contains("repository `org/other` was not found"), "{text}");
    let text = message(&options, "org/name@v2");
    assert!(text.contains("revision `v2` of `org/name` was not found"), "{text}");
    server.set(|state| {
        let index = json!({"weight_map": {"a": "gone.safetensors"}}).to_string();
        state.files.insert("model.safetensors.index.json".to_owned(), index.into_bytes());
    });
    let text = message(&options, "org/name");
    assert!(text.contains("file `gone.safetensors` of `org/name` was not found"), "{text}");
    assert!(!text.contains("secret"), "{text}");
}

#[test]
fn one_quantisation_is_chosen_by_name() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new(&[
        ("m-Q4_K_M.gguf", noise(10, 1)),
        ("m-Q8_0.gguf", noise(10, 2)),
        ("big/m-F16-00001-of-00002.gguf", noise(10, 3)),
        ("big/m-F16-00002-of-00002.gguf", noise(10, 4)),
    ]);
    let options = server.options(cache.path());
    let path = pull("org/name:q4_k_m", &options).unwrap();
    assert!(path.ends_with("m-Q4_K_M.gguf") && fs::read(path).unwrap() == noise(10, 1));
    let path = pull("org/name:F16", &options).unwrap();
    assert!(path.ends_with("big/m-F16-00001-of-00002.gguf"), "{}", path.display());
    assert_eq!(fs::read(&path).unwrap(), noise(10, 3));
    assert_eq!(fs::read(path.with_file_name("m-F16-00002-of-00002.gguf")).unwrap(), noise(10, 4));
    assert!(!path.parent().unwrap().with_file_name("m-Q8_0.gguf").exists());
    let text = pull("org/name", &options).unwrap_err().to_string();
    assert!(text.contains("choose one") && text.contains("m-Q8_0.gguf"), "{text}");
    let text = pull("org/name:Q2_K", &options).unwrap_err().to_string();
    assert!(text.contains("`Q2_K`") && text.contains("m-Q4_K_M.gguf"), "{text}");
    assert!(pull("org/name:m-Q8_0.gguf", &options).unwrap().ends_with("m-Q8_0.gguf"));
}

#[test]
fn offline_uses_the_cache_and_never_the_network() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new(&sharded());
    let online = server.options(cache.path());
    let offline = HubOptions { offline: true, ..online.clone() };
    let text = pull("org/name", &offline).unwrap_err().to_string();
    assert!(text.contains("HF_HUB_OFFLINE") && text.contains("download the model"), "{text}");
    assert!(server.log().is_empty());

    let folder = pull("org/name", &online).unwrap();
    server.log();
    assert_eq!(pull("org/name", &offline).unwrap(), folder);
    assert_eq!(pull(&format!("org/name@{COMMIT}"), &offline).unwrap(), folder);
    let text = pull("org/name@v2", &offline).unwrap_err().to_string();
    assert!(text.contains("nothing of revision `v2`"), "{text}");
    // What is there in part does not count.
    let shard = "model-00002-of-00002.safetensors";
    fs::remove_file(fs::canonicalize(folder.join(shard)).unwrap()).unwrap();
    let text = pull("org/name", &offline).unwrap_err().to_string();
    assert!(text.contains(&format!("the shard `{shard}` is missing")), "{text}");
    assert!(server.log().is_empty());
    // And is mended online.
    assert_eq!(fs::read(pull("org/name", &online).unwrap().join(shard)).unwrap(), noise(70_000, 4));
}

#[test]
fn an_unreachable_hub_falls_back_to_the_cache_with_a_warning() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new(&one_gguf());
    let options = server.options(cache.path());
    // A port that was free a moment ago.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dead = HubOptions { endpoint: format!("http://{closed}"), ..options.clone() };
    let text = pull("org/name", &dead).unwrap_err().to_string();
    assert!(text.contains(&closed.to_string()) && text.contains("download the model"), "{text}");

    let path = pull("org/name", &options).unwrap();
    let id = HubId::parse("org/name").unwrap();
    let mut told = Told::default();
    assert_eq!(resolve(&id, &dead, &mut told).unwrap(), path);
    assert!(told.warnings.len() == 1 && told.warnings[0].contains("using what the cache has"));
    // A hub that is down counts as one that cannot be reached.
    server.set(|state| state.refuse = Some((503, "")));
    let mut told = Told::default();
    assert_eq!(resolve(&id, &options, &mut told).unwrap(), path);
    assert!(told.warnings[0].contains("503"), "{:?}", told.warnings);
}

#[test]
fn revisions_with_a_slash_and_renamed_repositories() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new(&one_gguf());
    let options = server.options(cache.path());
    server.set(|state| state.revision = "refs/pr/1".to_owned());
    pull("org/name@refs/pr/1", &options).unwrap();
    let recorded = cache.path().join("models--org--name/refs/refs/pr/1");
    assert_eq!(fs::read_to_string(recorded).unwrap(), COMMIT);
    server.set(|state| {
        state.revision = "main".to_owned();
        state.renamed = true;
    });
    let path = pull("old/name", &options).unwrap();
    assert!(path.starts_with(cache.path().join("models--old--name")));
    assert!(fs::read(path).unwrap() == one_gguf()[0].1);
}

#[test]
fn a_hostile_hub_writes_nothing_outside_the_cache() {
    let outside = tempfile::tempdir().unwrap();
    let cache = outside.path().join("cache");
    let server = Server::new(&one_gguf());
    let options = server.options(&cache);
    let refused = || match pull("org/name", &options).unwrap_err() {
        HubError::Confused { reason, .. } | HubError::Damaged { reason, .. } => reason,
        other => panic!("{other}"),
    };
    server.set(|state| state.commit = "../../../../evil".to_owned());
    assert!(refused().contains("evil"));
    server.set(|state| {
        state.commit = COMMIT.to_owned();
        state.etag = Some("../../../evil");
    });
    assert!(refused().contains("evil"));
    server.set(|state| {
        state.etag = None;
        let index = json!({"weight_map": {"a": "../../../evil"}}).to_string();
        state.files.insert("model.safetensors.index.json".to_owned(), index.into_bytes());
    });
    assert!(refused().contains("evil"));
    server.set(|state| {
        state.files.insert("../../../evil.gguf".to_owned(), vec![1]);
    });
    assert!(refused().contains("evil"));
    let entries: Vec<_> = fs::read_dir(outside.path()).unwrap().flatten().collect();
    assert!(entries.iter().all(|entry| entry.file_name() == "cache"), "{entries:?}");
}

/// A build whose HTTP client has no TLS would fail before it says hello.
#[test]
fn https_endpoints_get_a_tls_hello() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let hello = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut start = [0; 6];
        stream.read_exact(&mut start).unwrap();
        start
    });
    let cache = tempfile::tempdir().unwrap();
    let mut options = Server::new(&[]).options(cache.path());
    options.endpoint = format!("https://127.0.0.1:{port}");
    assert!(pull("org/name", &options).is_err());
    let start = hello.join().unwrap();
    // Record type 22 (handshake), version 3.x, then a handshake message of type 1 (client hello).
    assert_eq!((start[0], start[1], start[5]), (22, 3, 1));
}

#[test]
fn the_environment_is_read_as_the_other_tools_read_it() {
    let from = |vars: &[(&str, &str)]| {
        let vars: BTreeMap<&str, &str> = vars.iter().copied().collect();
        HubOptions::from_vars(|name| vars.get(name).map(|value| (*value).to_owned()))
    };
    let plain = from(&[("HOME", "/home/me")]);
    assert_eq!(plain.cache, Path::new("/home/me/.cache/huggingface/hub"));
    assert_eq!(plain.endpoint, "https://huggingface.co");
    assert!(plain.token.is_none() && !plain.offline);
    assert_eq!(from(&[("XDG_CACHE_HOME", "/c")]).cache, Path::new("/c/huggingface/hub"));
    assert_eq!(from(&[("HF_HOME", "/h")]).cache, Path::new("/h/hub"));
    assert_eq!(from(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/k")]).cache, Path::new("/k"));
    assert_eq!(from(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");
    assert!(
        from(&[("HF_HUB_OFFLINE", "1")]).offline && from(&[("HF_HUB_OFFLINE", "True")]).offline
    );
    assert!(!from(&[("HF_HUB_OFFLINE", "0")]).offline);
    assert_eq!(from(&[("HF_TOKEN", " t\n")]).token.as_deref(), Some("t"));
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "from-file\n").unwrap();
    let home = home.path().to_str().unwrap();
    assert_eq!(from(&[("HF_HOME", home)]).token.as_deref(), Some("from-file"));
    assert_eq!(from(&[("HF_HOME", home), ("HF_TOKEN", "t")]).token.as_deref(), Some("t"));
}

#[test]
fn the_cache_lists_what_it_has() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new(&sharded());
    let options = server.options(cache.path());
    assert!(list(cache.path()).is_empty());
    let path = pull("org/name", &options).unwrap();
    let listed = list(cache.path());
    assert_eq!((listed.len(), listed[0].repo.as_str()), (1, "org/name"));
    assert_eq!(listed[0].path, path);
    assert!(listed[0].weights.len() >= 2);
    for (name, bytes) in &listed[0].weights {
        assert_eq!(*bytes, fs::metadata(path.join(name)).unwrap().len());
    }
}
