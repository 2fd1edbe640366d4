//! A server with a small random model, in this process, on a port of its own.
//!
//! The weights are those of the Qwen3 golden; beside them stand a tokenizer whose first 256 ids are
//! the bytes, and a short chat template. What it says means nothing, and much of it is broken
//! UTF-8, which is what a wire should be tested with.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hearth::auth::Keyring;
use hearth::config::PlanOptions;
use hearth::engine::handle::Speculation;
use hearth::files::{Files, Quota};
use hearth::history::History;
use hearth::jobs::Batches;
use hearth::ledger::Ledger;
use hearth::pipeline::Pipeline;
use hearth::registry::{self, LoadOptions, Registry, ServedModel, plan};
use hearth::server::{Rooms, ServerConfig, serve};
use hearth::store::Store;
use hearth_kernels::Pool;
use hearth_models::{Compute, KvDType};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::http::{self, Answer, Pending};

/// The id under which the model is served: with what needs encoding in a URL.
pub(crate) const MODEL: &str = "org/tiny:F32";

/// Another name of it.
pub(crate) const ALIAS: &str = "gpt-4o-mini";

/// Tokens of one request. Long enough that a whole answer takes seconds.
pub(crate) const CONTEXT_LEN: usize = 32_768;

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// What differs between tests.
pub(crate) struct Options {
    pub(crate) config: ServerConfig,
    pub(crate) store: Store,
    /// Keys that stand in no table.
    pub(crate) api_keys: Vec<String>,
    pub(crate) files_bytes_max: u64,
    pub(crate) running_len: usize,
    pub(crate) queue_len: usize,
    pub(crate) queue_timeout: Option<Duration>,
    /// The model's chat template.
    pub(crate) template: &'static str,
    /// Its special tokens, from id 256 on, and the one that its files call the end.
    pub(crate) special: [&'static str; 8],
    pub(crate) eos: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config: ServerConfig::default(),
            store: Store::in_memory().expect("a store"),
            api_keys: Vec::new(),
            files_bytes_max: 20 << 20,
            running_len: 8,
            queue_len: 64,
            queue_timeout: None,
            template: TEMPLATE,
            special: SPECIAL,
            eos: "<|263|>",
        }
    }
}

pub(crate) async fn start(options: Options) -> Server {
    let registry = Registry::of(vec![model(&options).into()]).expect("a thread");
    let registry = registry.with_aliases(vec![(ALIAS.to_owned(), MODEL.to_owned())]);
    serve_all(registry.expect("a served model"), options).await
}

/// Serves what is in a registry.
pub(crate) async fn serve_all(registry: Registry, options: Options) -> Server {
    let pipeline = Arc::new(Pipeline::new(Arc::new(registry)));
    let store = Arc::new(options.store);
    let keyring = Arc::new(Keyring::new(Arc::clone(&store), &options.api_keys));
    let quota = Quota { project_bytes_max: options.files_bytes_max };
    let files = Arc::new(Files::open(Arc::clone(&store), quota).expect("a folder"));
    let history = Arc::new(History::new(Arc::clone(&store)));
    let ledger = Arc::new(Ledger::open(Arc::clone(&store)).expect("a thread"));
    let batches = Arc::new(Batches::open(store, Arc::clone(&files)).expect("a store"));
    let rooms = Rooms { keyring, history, files, batches, ledger };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (stop, stopped) = oneshot::channel();
    let shutdown = async move {
        // A test that ends without a word stops its server too.
        let _ = stopped.await;
    };
    let task = tokio::spawn(serve(options.config, pipeline, rooms, listener, shutdown));
    Server { address, stop: Some(stop), task }
}

impl Server {
    pub(crate) async fn get(&self, path: &str) -> Answer {
        http::send(self.address, "GET", path, &[], b"").await.answer().await
    }

    /// Any request, with a key or without.
    pub(crate) async fn ask(
        &self,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: Option<Value>,
    ) -> Answer {
        let bearer = key.map(|key| format!("Bearer {key}"));
        let mut headers: Vec<_> =
            bearer.iter().map(|bearer| ("Authorization", bearer.as_str())).collect();
        let body = body.map(|body| body.to_string());
        headers.extend(body.iter().map(|_| ("Content-Type", "application/json")));
        let body = body.unwrap_or_default();
        http::send(self.address, method, path, &headers, body.as_bytes()).await.answer().await
    }

    /// Sends JSON and does not wait.
    pub(crate) async fn begin(&self, path: &str, body: &Value) -> Pending {
        let headers = [("Content-Type", "application/json")];
        http::send(self.address, "POST", path, &headers, body.to_string().as_bytes()).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.begin(path, &body).await.answer().await
    }

    /// The id of a new file.
    pub(crate) async fn upload(&self, key: Option<&str>, purpose: &str, content: &str) -> String {
        let file = ("file", Some("a.jsonl"), content.as_bytes());
        let parts = [("purpose", None, purpose.as_bytes()), file];
        let answer = http::send_form(self.address, "/v1/files", key, &parts).await.answer().await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["id"].as_str().expect("an id").to_owned()
    }

    /// The batch of this id at its end.
    pub(crate) async fn ended(&self, key: Option<&str>, batch: &Value) -> Value {
        let path = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));
        for _ in 0..3000 {
            let batch = self.ask("GET", &path, key, None).await.json();
            let status = batch["status"].as_str().expect("a status");
            if ["completed", "failed", "expired", "cancelled"].contains(&status) {
                return batch;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{path} does not end");
    }

    /// A chat with `fields` besides model and message.
    pub(crate) async fn chat(&self, fields: Value) -> Answer {
        self.post("/v1/chat/completions", chat_body(fields)).await
    }

    /// A completion with `fields` besides the model.
    pub(crate) async fn complete(&self, fields: Value) -> Answer {
        self.post("/v1/completions", with_model(fields)).await
    }

    /// One sample of `/metrics`.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.body;
        let sample = text.lines().find(|line| line.split(['{', ' ']).next() == Some(name));
        let sample = sample.unwrap_or_else(|| panic!("no {name} in {text}"));
        sample.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }

    /// Waits until a sample has a value.
    pub(crate) async fn wait_for_metric(&self, name: &str, value: f64) {
        for _ in 0..500 {
            if self.metric(name).await == value {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{name} is {} and never became {value}", self.metric(name).await);
    }

    /// Tells it to stop.
    pub(crate) fn stop(&mut self) {
        self.stop.take().expect("told once").send(()).expect("it still runs");
    }

    /// Waits until it has.
    pub(crate) async fn stopped(self) {
        let done = tokio::time::timeout(Duration::from_secs(60), self.task).await;
        done.expect("it stops in time").expect("it does not panic");
    }
}

pub(crate) fn with_model(mut fields: Value) -> Value {
    fields["model"] = json!(MODEL);
    fields
}

pub(crate) fn chat_body(mut fields: Value) -> Value {
    fields["messages"] = json!([{"role": "user", "content": "Tell me a story."}]);
    with_model(fields)
}

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

const SPECIAL: [&str; 8] = [
    "<|256|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|fim_prefix|>",
    "<|260|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|263|>",
];

pub(crate) fn model(options: &Options) -> ServedModel {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/qwen3");
    let folder = tempfile::tempdir().expect("a folder");
    let put = |name: &str, value: &Value| {
        fs::write(folder.path().join(name), value.to_string()).expect("a file");
    };
    let config = fs::read(golden.join("config.json")).expect("the golden's config");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    config["max_position_embeddings"] = json!(CONTEXT_LEN);
    put("config.json", &config);
    put("tokenizer.json", &tokenizer(&options.special));
    put(
        "tokenizer_config.json",
        &json!({"eos_token": options.eos, "chat_template": options.template}),
    );
    let weights = "model.safetensors";
    fs::copy(golden.join(weights), folder.path().join(weights)).expect("the golden's weights");
    let compute = Compute::Fused(Arc::new(Pool::new(1)));
    let bounds = PlanOptions {
        ctx_size: None,
        running_len: options.running_len,
        queue_len: options.queue_len,
        batch_tokens: 64,
        target_itl: Duration::from_millis(100),
        queue_timeout: options.queue_timeout,
        kv_dtype: KvDType::F32,
        kv_prefault: false,
    };
    let file = hearth_models::open(folder.path()).expect("the fixture opens");
    let model = registry::open(file).expect("the fixture is understood");
    let limits =
        plan::plan(&[model.demand(&compute)], &bounds, None, 0).remove(0).expect("it fits");
    let options = LoadOptions {
        id: MODEL.to_owned(),
        compute,
        limits,
        kv_dtype: bounds.kv_dtype,
        speculation: Speculation { lookup: true, ..Speculation::default() },
        shelf: None,
        progress: &mut |_, _| {},
    };
    model.load(options).expect("the fixture loads")
}

/// Ids 0 to 255 are the bytes, spelled as byte-level vocabularies spell them; the rest is special.
fn tokenizer(special: &[&str]) -> Value {
    let mut spare = 256..;
    let spell = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => spare.next().and_then(char::from_u32).expect("a spare character"),
    };
    let bytes = (0..=255).map(spell).zip(0..);
    let vocab: Map<_, _> = bytes.map(|(c, id): (char, u32)| (c.to_string(), json!(id))).collect();
    let special = (256..).zip(special).map(|(id, content): (u32, &&str)| {
        json!({
            "id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        })
    });
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": special.collect::<Vec<_>>(),
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": [],
        },
    })
}
