//! Two configs. [`RawConfig`] is what flags, environment and a TOML file say, nothing checked;
//! [`Config`] is what holds for the rest of the process: validated once, immutable, printed.
//!
//! Flags win over `HEARTH_*` variables, those over the file, that over the defaults.

mod describe;
mod raw;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hearth_models::weights::Mix;
use hearth_models::{Compute, KvDType};

use crate::types::KeepAlive;

pub use raw::{CapacityArgs, EngineArgs, LoraArgs, MemoryArgs, ModelArgs, RawConfig, ServerArgs};

/// What holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Models, as given.
    pub models: Vec<String>,
    /// Ids, for the first models.
    pub aliases: Vec<String>,
    /// Other names of served models: name and id.
    pub model_aliases: Vec<(String, String)>,
    /// Adapters: the model where one is named, the id and the path.
    pub loras: Vec<(Option<String>, String, PathBuf)>,
    /// Folders whose adapters are served: the model where one is named, and the path.
    pub lora_dirs: Vec<(Option<String>, PathBuf)>,
    /// Bytes that adapters may take while nobody uses them.
    pub lora_bytes: u64,
    /// Address to listen on.
    pub host: IpAddr,
    /// Port; 0 picks one.
    pub port: u16,
    /// Files of the certificate and of its key, where the port speaks https.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Folder for what must outlive the process; `None` keeps everything in memory.
    pub data_dir: Option<PathBuf>,
    /// Folder for keys and values that memory has no room for, and its size in bytes.
    pub kv_store: Option<(PathBuf, u64)>,
    /// Threads that compute.
    pub threads: usize,
    /// Name of the device.
    pub device: String,
    /// Devices among which a model is divided.
    pub tensor_parallel: usize,
    /// Weights in floats are quantised to these types.
    pub quantize: Option<Mix>,
    /// What guesses how answers go on.
    pub speculate: Speculate,
    /// Keys that clients must send.
    pub api_keys: Vec<String>,
    /// Other machines may be served without a key.
    pub insecure: bool,
    /// Origins whose pages may ask from a browser.
    pub cors_origins: Vec<String>,
    /// Bounds of every engine.
    pub plan: PlanOptions,
    /// Which models are in memory, and when.
    pub memory: MemoryOptions,
    /// Largest request body.
    pub body_limit_bytes: usize,
    /// A connection that takes nothing of its answer for so long is closed.
    pub send_timeout: Duration,
    /// Bytes of the files of one project together.
    pub files_quota_bytes: u64,
    /// Days that stored answers are remembered; `None` is for ever.
    pub store_days: Option<u64>,
    /// Unknown request fields are warned about.
    pub lenient_fields: bool,
    /// Logs are JSON lines.
    pub log_json: bool,
    /// A running answer is waited for this long at shutdown.
    pub drain_timeout: Duration,
}

/// What guesses how answers go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Speculate {
    /// Nothing.
    Off,
    /// What they quote.
    Ngram,
    /// This model, as given.
    Draft(String),
}

/// What the operator asked of the memory; `registry::plan` divides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// Tokens of one request; `None` is as many as the model was made for and the memory holds.
    pub ctx_size: Option<usize>,
    /// Sequences that may run at once.
    pub running_len: usize,
    /// Requests that may wait.
    pub queue_len: usize,
    /// Rows of one forward pass.
    pub batch_tokens: usize,
    /// How long a forward pass with running answers should take at most.
    pub target_itl: Duration,
    /// A request that waited this long and was not begun is given up.
    pub queue_timeout: Option<Duration>,
    /// Element type of KV.
    pub kv_dtype: KvDType,
    /// Its memory is taken as a model loads, not as it is first used.
    pub kv_prefault: bool,
}

/// Which models are in memory, and when; `registry` sees to it.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryOptions {
    /// Bytes for all models; `None`: what is free at the start, less a reserve.
    pub budget_bytes: Option<u64>,
    /// Folder of models that are loaded on demand.
    pub models_dir: Option<PathBuf>,
    /// How long a model that nobody asks for stays.
    pub keep_alive: KeepAlive,
    /// Ids of models that stay.
    pub pins: Vec<String>,
}

/// What is wrong, and where.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {what}")]
pub struct ConfigError {
    /// The flag or the file.
    pub option: String,
    /// What is wrong and what would be right.
    pub what: String,
}

fn wrong<T>(option: &str, what: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError { option: option.to_owned(), what: what.into() })
}

fn not_empty(option: &str, texts: &[String]) -> Result<(), ConfigError> {
    match texts.iter().any(|text| text.trim().is_empty()) {
        true => wrong(option, "must not be empty"),
        false => Ok(()),
    }
}

fn mix(name: &str) -> Result<Mix, ConfigError> {
    let unknown = || format!("`{name}` is not one of {}", Mix::names());
    Mix::named(name).map_or_else(|| wrong("--quantize", unknown()), Ok)
}

impl RawConfig {
    /// Checks every value against its range and the others.
    pub fn validate(self) -> Result<Config, ConfigError> {
        let Self { model, engine, capacity, memory, lora, server } = self;
        let gb = |option, value, default| {
            in_range(option, value, default, 1 << 20).map(|gb| (gb as u64) << 30)
        };
        let host = server.host.as_deref().unwrap_or("127.0.0.1");
        let host = if host == "localhost" { "127.0.0.1" } else { host };
        let Ok(host) = host.parse() else {
            return wrong("--host", format!("`{host}` is not an IP address"));
        };
        let kv_dtype = kv_dtype(model.kv_dtype.as_deref(), model.device.as_deref())?;
        let log_json = match server.log_format.as_deref().unwrap_or("text") {
            "text" => false,
            "json" => true,
            other => return wrong("--log-format", format!("`{other}` is not text or json")),
        };
        if server.alias.len() > model.model.len() {
            return wrong("--alias", "there are more of them than of --model");
        }
        not_empty("--model", &model.model)?;
        not_empty("--alias", &server.alias)?;
        not_empty("--api-key", &server.api_key)?;
        if let Some(origin) = server.cors_origin.iter().find(|origin| !is_origin(origin)) {
            let what = format!("`{origin}` is not an origin such as https://app.example, or *");
            return wrong("--cors-origin", what);
        }
        Ok(Config {
            models: model.model,
            aliases: server.alias,
            model_aliases: model_aliases(&server.model_alias)?,
            loras: lora.lora.iter().map(|text| named_lora(text)).collect::<Result<_, _>>()?,
            lora_dirs: lora.lora_dir.iter().map(|text| lora_dir(text)).collect(),
            lora_bytes: match lora.lora_memory.as_deref() {
                Some(text) => size("--lora-memory", text)?,
                None => 1 << 30,
            },
            host,
            port: server.port.unwrap_or(8080),
            tls: match (server.tls_cert, server.tls_key) {
                (Some(cert), Some(key)) => Some((cert, key)),
                (None, None) => None,
                (Some(_), None) => return wrong("--tls-cert", "needs a --tls-key"),
                (None, Some(_)) => return wrong("--tls-key", "needs a --tls-cert"),
            },
            data_dir: data_dir(server.data_dir),
            kv_store: kv_store(server.kv_store, server.kv_store_size.as_deref())?,
            threads: in_range(
                "--threads",
                model.threads,
                hearth_kernels::pool::default_threads(),
                1024,
            )?,
            device: model.device.unwrap_or_else(|| DEVICE.to_owned()),
            tensor_parallel: in_range("--tensor-parallel", model.tensor_parallel, 1, 64)?,
            quantize: model.quantize.as_deref().map(mix).transpose()?,
            speculate: speculate(engine.speculate.as_deref(), engine.draft_model.as_deref())?,
            api_keys: server.api_key.iter().map(|key| key.trim().to_owned()).collect(),
            insecure: server.insecure.unwrap_or(false),
            cors_origins: server.cors_origin,
            plan: plan(&engine, &capacity, kv_dtype, server.kv_prefault.unwrap_or(false))?,
            memory: memory_options(memory)?,
            body_limit_bytes: in_range("--body-limit-mb", server.body_limit_mb, 4, 4096)? << 20,
            send_timeout: seconds("--send-timeout-s", server.send_timeout_s, 60)?,
            files_quota_bytes: gb("--files-quota-gb", server.files_quota_gb, 20)?,
            store_days: store_days(server.store_days)?,
            lenient_fields: server.lenient_fields.unwrap_or(false),
            log_json,
            drain_timeout: Duration::from_secs(30),
        })
    }
}

/// Bounds of every engine.
fn plan(
    engine: &EngineArgs,
    capacity: &CapacityArgs,
    kv_dtype: KvDType,
    kv_prefault: bool,
) -> Result<PlanOptions, ConfigError> {
    let given = |option, value: Option<usize>, max| {
        value.map(|n| in_range(option, Some(n), n, max)).transpose()
    };
    let target_itl_ms = in_range("--target-itl-ms", capacity.target_itl_ms, 100, 60_000)?;
    let queue_timeout_s = given("--queue-timeout-s", capacity.queue_timeout_s, 1 << 20)?;
    Ok(PlanOptions {
        ctx_size: given("--ctx-size", engine.ctx_size, 1 << 24)?,
        running_len: in_range("--max-running", capacity.max_running, 32, 4096)?,
        queue_len: in_range("--max-queue", capacity.max_queue, 256, 1 << 20)?,
        batch_tokens: in_range("--batch-tokens", engine.batch_tokens, 512, 1 << 16)?,
        target_itl: Duration::from_millis(target_itl_ms as u64),
        queue_timeout: queue_timeout_s.map(|s| Duration::from_secs(s as u64)),
        kv_dtype,
        kv_prefault,
    })
}

fn memory_options(memory: MemoryArgs) -> Result<MemoryOptions, ConfigError> {
    not_empty("--pin", &memory.pin)?;
    let keep_alive = memory.keep_alive.as_deref().unwrap_or("-1");
    Ok(MemoryOptions {
        budget_bytes: (memory.memory_budget.as_deref())
            .map(|text| size("--memory-budget", text))
            .transpose()?,
        models_dir: memory.models_dir,
        keep_alive: keep_alive
            .parse()
            .or_else(|why| wrong("--keep-alive", format!("`{keep_alive}` {why}")))?,
        pins: memory.pin,
    })
}

fn kv_store(
    folder: Option<PathBuf>,
    bytes: Option<&str>,
) -> Result<Option<(PathBuf, u64)>, ConfigError> {
    let bytes = bytes.map(|text| size("--kv-store-size", text)).transpose()?;
    match (folder, bytes) {
        (Some(folder), _) if folder.as_os_str().is_empty() => {
            wrong("--kv-store", "must not be empty")
        }
        (Some(folder), bytes) => Ok(Some((folder, bytes.unwrap_or(10 << 30)))),
        (None, Some(_)) => wrong("--kv-store-size", "is of no use without --kv-store"),
        (None, None) => Ok(None),
    }
}

/// `ID=PATH`, or `MODEL:ID=PATH`.
pub(crate) fn named_lora(text: &str) -> Result<(Option<String>, String, PathBuf), ConfigError> {
    let told = || format!("`{text}` is not ID=PATH or MODEL:ID=PATH");
    let Some((name, path)) = text.split_once('=') else { return wrong("--lora", told()) };
    let (base, id) = match name.rsplit_once(':') {
        Some((base, id)) => (Some(base.trim()), id.trim()),
        None => (None, name.trim()),
    };
    match base == Some("") || id.is_empty() || path.trim().is_empty() {
        true => wrong("--lora", told()),
        false => Ok((base.map(str::to_owned), id.to_owned(), PathBuf::from(path.trim()))),
    }
}

/// `DIR`, or `MODEL=DIR` where that is no folder itself.
fn lora_dir(text: &str) -> (Option<String>, PathBuf) {
    match text.split_once('=').filter(|_| !Path::new(text).is_dir()) {
        Some((base, dir)) => (Some(base.trim().to_owned()), PathBuf::from(dir.trim())),
        None => (None, PathBuf::from(text)),
    }
}

/// `12G`, `800M`, `1.5GiB`: a number and a unit, in powers of 1024.
fn size(option: &str, text: &str) -> Result<u64, ConfigError> {
    let told = || format!("`{text}` is not a size such as 12G or 800M");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_uppercase();
    let shift = match unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit) {
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return wrong(option, told()),
    };
    match number.parse::<f64>() {
        Ok(number) if number > 0.0 && number < 1e6 => Ok((number * (1_u64 << shift) as f64) as u64),
        _ => wrong(option, told()),
    }
}

/// A count, or what holds without one.
fn in_range(
    option: &str,
    value: Option<usize>,
    default: usize,
    max: usize,
) -> Result<usize, ConfigError> {
    match value {
        Some(n) if n == 0 || n > max => wrong(option, format!("{n} is not between 1 and {max}")),
        other => Ok(other.unwrap_or(default)),
    }
}

fn seconds(option: &str, value: Option<usize>, default: usize) -> Result<Duration, ConfigError> {
    in_range(option, value, default, 1 << 20).map(|s| Duration::from_secs(s as u64))
}

/// 0 is for ever.
fn store_days(days: Option<usize>) -> Result<Option<u64>, ConfigError> {
    match days {
        Some(0) => Ok(None),
        days => in_range("--store-days", days, 30, 36_500).map(|days| Some(days as u64)),
    }
}

/// The folder that is named, or the default one; `None` for `none`, or without a home to put it in.
pub fn data_dir(named: Option<PathBuf>) -> Option<PathBuf> {
    match named {
        Some(folder) => (folder != Path::new("none")).then_some(folder),
        None => default_data_dir(),
    }
}

/// The device where none is named.
const DEVICE: &str = "auto";

fn kv_dtype(word: Option<&str>, device: Option<&str>) -> Result<KvDType, ConfigError> {
    let Some(word) = word else { return Ok(Compute::kv_dtype(device.unwrap_or(DEVICE))) };
    match KvDType::ALL.into_iter().find(|dtype| dtype.name() == word) {
        Some(dtype) => Ok(dtype),
        None => wrong("--kv-dtype", format!("`{word}` is not f16, bf16, f32, q16_0, q8_0 or fp8")),
    }
}

fn speculate(word: Option<&str>, draft: Option<&str>) -> Result<Speculate, ConfigError> {
    match (word, draft) {
        (None | Some("draft"), Some(model)) if !model.trim().is_empty() => {
            Ok(Speculate::Draft(model.to_owned()))
        }
        (None | Some("draft"), Some(_)) => wrong("--draft-model", "must not be empty"),
        (Some("draft"), None) => wrong("--speculate", "draft needs a --draft-model"),
        (Some(word @ ("off" | "ngram")), Some(_)) => {
            wrong("--draft-model", format!("is of no use with --speculate {word}"))
        }
        (None | Some("off"), None) => Ok(Speculate::Off),
        (Some("ngram"), None) => Ok(Speculate::Ngram),
        (Some(other), _) => wrong("--speculate", format!("`{other}` is not off, ngram or draft")),
    }
}

/// `gpt-4o-mini=hearth-tiny` is a name and an id.
fn model_aliases(list: &[String]) -> Result<Vec<(String, String)>, ConfigError> {
    let pair = |text: &String| match text.split_once('=') {
        Some((name, id)) if !name.trim().is_empty() && !id.trim().is_empty() => {
            Ok((name.trim().to_owned(), id.trim().to_owned()))
        }
        _ => wrong("--model-alias", format!("`{text}` is not NAME=ID")),
    };
    list.iter().map(pair).collect()
}

/// A scheme, `://` and a host, with no path: what a browser sends.
fn is_origin(text: &str) -> bool {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    text == "*" || host.is_some_and(|host| !host.is_empty() && !host.contains(['/', ' ']))
}

fn default_data_dir() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let share = set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share")));
    Some(share?.join("hearth"))
}

impl Config {
    /// Where to listen; port 0 until the system has picked one.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.host, self.port)
    }

    /// What clients call the server at an address.
    pub fn base_url(&self, address: SocketAddr) -> String {
        format!("{}://{address}", if self.tls.is_some() { "https" } else { "http" })
    }
}

#[cfg(test)]
mod tests;
