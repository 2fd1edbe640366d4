//! Two configs. [`RawConfig`] is what flags, environment and a TOML file say, nothing checked;
//! [`Config`] is what holds for the rest of the process: validated once, immutable, printed.
//!
//! Flags win over `HEARTH_*` variables, those over the file, that over the defaults.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use hearth_models::KvDType;
use hearth_models::weights::Mix;
use serde::{Deserialize, Deserializer};

/// What the operator says, flag by flag.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RawConfig {
    /// Model to serve: a .gguf file, a .safetensors file, a folder, or a hub id such as
    /// `org/name`, `org/name:Q4_K_M`, `org/name@revision`. Repeat for several models.
    #[arg(long, short = 'm', env = "HEARTH_MODEL", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pub model: Vec<String>,
    /// Id under which a model is served, in the order of --model (default: the file's or folder's
    /// name).
    #[arg(long, env = "HEARTH_ALIAS", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pub alias: Vec<String>,
    /// Address to listen on (default: 127.0.0.1).
    #[arg(long, env = "HEARTH_HOST")]
    pub host: Option<String>,
    /// Port to listen on; 0 picks one and prints it (default: 8080).
    #[arg(long, env = "HEARTH_PORT")]
    pub port: Option<u16>,
    /// Folder for what must outlive the process; nothing is kept there yet (default:
    /// ~/.local/share/hearth).
    #[arg(long, env = "HEARTH_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Tokens of one request, prompt and completion together (default: what the model was made for
    /// and the free memory holds).
    #[arg(long, short = 'c', env = "HEARTH_CTX_SIZE")]
    pub ctx_size: Option<usize>,
    /// Threads that compute (default: physical cores that this process may use).
    #[arg(long, short = 't', env = "HEARTH_THREADS")]
    pub threads: Option<usize>,
    /// Where to compute: auto, cpu, cuda, cuda:N, metal or plain (candle on the CPU, the reference)
    /// (default: auto).
    #[arg(long, env = "HEARTH_DEVICE")]
    pub device: Option<String>,
    /// Quantise the weights of a model in floats while loading it: q4_k_m, q8_0, ... (what
    /// `hearth quantize --type` takes).
    #[arg(long, env = "HEARTH_QUANTIZE")]
    pub quantize: Option<String>,
    /// Element type of stored keys and values: f16, bf16 or f32 (default: f16).
    #[arg(long, env = "HEARTH_KV_DTYPE")]
    pub kv_dtype: Option<String>,
    /// Key that clients must send; repeat for several. Without one, anyone who reaches the port
    /// may ask.
    #[arg(long, env = "HEARTH_API_KEY", value_delimiter = ',', hide_env_values = true)]
    #[serde(deserialize_with = "one_or_many")]
    pub api_key: Vec<String>,
    /// Requests that run at once (default: 32).
    #[arg(long, env = "HEARTH_MAX_RUNNING")]
    pub max_running: Option<usize>,
    /// Requests that may wait before clients are told to come back (default: 256).
    #[arg(long, env = "HEARTH_MAX_QUEUE")]
    pub max_queue: Option<usize>,
    /// Rows of one forward pass (default: 512).
    #[arg(long, env = "HEARTH_BATCH_TOKENS")]
    pub batch_tokens: Option<usize>,
    /// Largest request body in MB (default: 4).
    #[arg(long, env = "HEARTH_BODY_LIMIT_MB")]
    pub body_limit_mb: Option<usize>,
    /// Warn about request fields that nobody knows instead of refusing them.
    #[arg(
        long,
        env = "HEARTH_LENIENT_FIELDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    pub lenient_fields: Option<bool>,
    /// Log as text or json (default: text).
    #[arg(long, env = "HEARTH_LOG_FORMAT")]
    pub log_format: Option<String>,
}

/// A list in the file, or its only value.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string or a list of strings")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    })
}

/// What holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Models, as given.
    pub models: Vec<String>,
    /// Ids, for the first models.
    pub aliases: Vec<String>,
    /// Address to listen on.
    pub host: IpAddr,
    /// Port; 0 picks one.
    pub port: u16,
    /// Folder for what must outlive the process; `None` where there is no home to put it in.
    pub data_dir: Option<PathBuf>,
    /// Threads that compute.
    pub threads: usize,
    /// Name of the device.
    pub device: String,
    /// Weights in floats are quantised to these types.
    pub quantize: Option<Mix>,
    /// Keys that clients must send.
    pub api_keys: Vec<String>,
    /// Bounds of every engine.
    pub plan: PlanOptions,
    /// Largest request body.
    pub body_limit_bytes: usize,
    /// Unknown request fields are warned about.
    pub lenient_fields: bool,
    /// Logs are JSON lines.
    pub log_json: bool,
    /// A running answer is waited for this long at shutdown.
    pub drain_timeout: Duration,
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
    /// Element type of KV.
    pub kv_dtype: KvDType,
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

impl RawConfig {
    /// What a TOML file says; keys are the long flags.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).or_else(|e| wrong(&name, e.to_string())),
            Err(e) => wrong(&name, e.to_string()),
        }
    }

    /// `self`, and `file` where `self` says nothing.
    pub fn or(self, file: Self) -> Self {
        fn list<T>(a: Vec<T>, b: Vec<T>) -> Vec<T> {
            if a.is_empty() { b } else { a }
        }
        Self {
            // Ids belong to the models that stand with them.
            alias: if self.model.is_empty() { list(self.alias, file.alias) } else { self.alias },
            model: list(self.model, file.model),
            host: self.host.or(file.host),
            port: self.port.or(file.port),
            data_dir: self.data_dir.or(file.data_dir),
            ctx_size: self.ctx_size.or(file.ctx_size),
            threads: self.threads.or(file.threads),
            device: self.device.or(file.device),
            quantize: self.quantize.or(file.quantize),
            kv_dtype: self.kv_dtype.or(file.kv_dtype),
            api_key: list(self.api_key, file.api_key),
            max_running: self.max_running.or(file.max_running),
            max_queue: self.max_queue.or(file.max_queue),
            batch_tokens: self.batch_tokens.or(file.batch_tokens),
            body_limit_mb: self.body_limit_mb.or(file.body_limit_mb),
            lenient_fields: self.lenient_fields.or(file.lenient_fields),
            log_format: self.log_format.or(file.log_format),
        }
    }

    /// Checks every value against its range and the others.
    pub fn validate(self) -> Result<Config, ConfigError> {
        let in_range = |option: &str, value: Option<usize>, default: usize, max: usize| match value
        {
            Some(n) if n == 0 || n > max => {
                wrong(option, format!("{n} is not between 1 and {max}"))
            }
            other => Ok(other.unwrap_or(default)),
        };
        let host = self.host.as_deref().unwrap_or("127.0.0.1");
        let host = if host == "localhost" { "127.0.0.1" } else { host };
        let Ok(host) = host.parse() else {
            return wrong("--host", format!("`{host}` is not an IP address"));
        };
        let kv_dtype = match self.kv_dtype.as_deref().unwrap_or("f16") {
            "f32" => KvDType::F32,
            "f16" => KvDType::F16,
            "bf16" => KvDType::BF16,
            other => return wrong("--kv-dtype", format!("`{other}` is not f16, bf16 or f32")),
        };
        let quantize = self.quantize.as_deref().map(mix).transpose()?;
        let log_json = match self.log_format.as_deref().unwrap_or("text") {
            "text" => false,
            "json" => true,
            other => return wrong("--log-format", format!("`{other}` is not text or json")),
        };
        if self.alias.len() > self.model.len() {
            return wrong("--alias", "there are more of them than of --model");
        }
        if self.model.iter().any(|m| m.trim().is_empty()) {
            return wrong("--model", "must not be empty");
        }
        if self.alias.iter().any(|a| a.trim().is_empty()) {
            return wrong("--alias", "must not be empty");
        }
        if self.api_key.iter().any(|k| k.trim().is_empty()) {
            return wrong("--api-key", "must not be empty");
        }
        let ctx_size = self.ctx_size.map(|n| in_range("--ctx-size", Some(n), n, 1 << 24));
        Ok(Config {
            models: self.model,
            aliases: self.alias,
            host,
            port: self.port.unwrap_or(8080),
            data_dir: self.data_dir.or_else(default_data_dir),
            threads: in_range(
                "--threads",
                self.threads,
                hearth_kernels::pool::default_threads(),
                1024,
            )?,
            device: self.device.unwrap_or_else(|| "auto".to_owned()),
            quantize,
            api_keys: self.api_key.iter().map(|key| key.trim().to_owned()).collect(),
            plan: PlanOptions {
                ctx_size: ctx_size.transpose()?,
                running_len: in_range("--max-running", self.max_running, 32, 4096)?,
                queue_len: in_range("--max-queue", self.max_queue, 256, 1 << 20)?,
                batch_tokens: in_range("--batch-tokens", self.batch_tokens, 512, 1 << 16)?,
                kv_dtype,
            },
            body_limit_bytes: in_range("--body-limit-mb", self.body_limit_mb, 4, 4096)? << 20,
            lenient_fields: self.lenient_fields.unwrap_or(false),
            log_json,
            drain_timeout: Duration::from_secs(30),
        })
    }
}

fn mix(name: &str) -> Result<Mix, ConfigError> {
    let unknown = || format!("`{name}` is not one of {}", Mix::names());
    Mix::named(name).map_or_else(|| wrong("--quantize", unknown()), Ok)
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

    /// One line for each value, keys hidden.
    pub fn describe(&self) -> String {
        let plan = &self.plan;
        let ctx = plan.ctx_size.map_or("what fits".to_owned(), |n| n.to_string());
        let lines = [
            (
                "models",
                match self.models.is_empty() {
                    true => "none named: the built-in one, if this build has it".to_owned(),
                    false => self.models.join(", "),
                },
            ),
            ("listen", self.address().to_string()),
            ("device", self.device.clone()),
            ("threads", self.threads.to_string()),
            ("ctx-size", ctx),
            ("quantize", self.quantize.map_or("no", |mix| mix.name()).to_owned()),
            ("kv-dtype", format!("{:?}", plan.kv_dtype).to_lowercase()),
            ("max-running", plan.running_len.to_string()),
            ("max-queue", plan.queue_len.to_string()),
            ("batch-tokens", plan.batch_tokens.to_string()),
            ("body-limit-mb", (self.body_limit_bytes >> 20).to_string()),
            (
                "api-key",
                match self.api_keys.len() {
                    0 => "none, open to whoever reaches the port".to_owned(),
                    n => format!("{n} set"),
                },
            ),
            ("lenient-fields", self.lenient_fields.to_string()),
            (
                "data-dir",
                self.data_dir
                    .as_ref()
                    .map_or("none".into(), |d| format!("{} (unused so far)", d.display())),
            ),
        ];
        lines.map(|(name, value)| format!("  {name:<15} {value}")).join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toml(text: &str) -> RawConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = toml("port = 9000\nmodel = [\"a.gguf\"]\nthreads = 3");
        let flags = RawConfig { port: Some(1), ..RawConfig::default() };
        let config = flags.or(file).validate().unwrap();
        assert_eq!((config.port, config.threads, config.plan.queue_len), (1, 3, 256));
        assert_eq!(config.models, ["a.gguf"]);
    }

    #[test]
    fn ids_of_the_file_do_not_name_models_of_the_flags() {
        let file = toml("model = \"a.gguf\"\nalias = \"llama\"");
        let flags = RawConfig { model: vec!["b.gguf".into()], ..RawConfig::default() };
        let config = flags.or(file).validate().unwrap();
        assert_eq!((config.models, config.aliases), (vec!["b.gguf".to_owned()], vec![]));
    }

    #[test]
    fn a_key_that_nobody_knows_is_an_error() {
        let error = toml::from_str::<RawConfig>("prot = 1").unwrap_err();
        assert!(error.to_string().contains("prot"), "{error}");
    }

    #[test]
    fn wrong_values_name_their_flag() {
        let cases = [
            (RawConfig { threads: Some(0), ..Default::default() }, "--threads"),
            (RawConfig { host: Some("here".into()), ..Default::default() }, "--host"),
            (RawConfig { kv_dtype: Some("f8".into()), ..Default::default() }, "--kv-dtype"),
            (RawConfig { quantize: Some("q9".into()), ..Default::default() }, "--quantize"),
            (RawConfig { alias: vec!["a".into()], ..Default::default() }, "--alias"),
            (RawConfig { api_key: vec![" ".into()], ..Default::default() }, "--api-key"),
            (RawConfig { model: vec!["".into()], ..Default::default() }, "--model"),
            (
                RawConfig { model: vec!["m".into()], alias: vec!["".into()], ..Default::default() },
                "--alias",
            ),
            (RawConfig { ctx_size: Some(0), ..Default::default() }, "--ctx-size"),
            (RawConfig { log_format: Some("xml".into()), ..Default::default() }, "--log-format"),
        ];
        for (raw, flag) in cases {
            assert_eq!(raw.validate().unwrap_err().option, flag);
        }
    }

    #[test]
    fn an_address_of_version_6_is_told_from_its_port() {
        let raw = RawConfig { host: Some("::1".into()), port: Some(80), ..Default::default() };
        assert!(raw.validate().unwrap().describe().contains("[::1]:80"));
    }

    #[test]
    fn one_value_is_a_list_of_one() {
        let one = toml("model = \"a.gguf\"\napi-key = \"k\"");
        let list = toml("model = [\"a.gguf\"]\napi-key = [\"k\"]");
        assert_eq!(one, list);
        assert!(toml::from_str::<RawConfig>("model = 3").is_err());
    }

    #[test]
    fn keys_are_not_printed() {
        let raw = RawConfig { api_key: vec!["sk-secret".into()], ..Default::default() };
        assert!(!raw.validate().unwrap().describe().contains("secret"));
    }
}
