//! What flags, environment and a TOML file say, nothing checked: groups of flags, of which every
//! command takes those that mean something to it, and one file for all of them.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use super::{ConfigError, wrong};

/// What the operator says: every flag of `hearth serve`, and every key of a TOML file. Other
/// commands have the groups that mean something to them.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct RawConfig {
    /// Which model, and what computes it.
    #[command(flatten)]
    pub model: ModelArgs,
    /// How the engine runs it.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// How many requests there may be.
    #[command(flatten)]
    pub capacity: CapacityArgs,
    /// Which models are in memory, and when.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Adapters of the models.
    #[command(flatten)]
    pub lora: LoraArgs,
    /// What clients meet.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which model, and what computes it.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Model to load: a .gguf file, a .safetensors file, a folder, or a hub id such as
    /// `org/name`, `org/name:Q4_K_M`, `org/name@revision`. Repeat to serve several; in the
    /// variable they stand between commas.
    #[arg(long, short = 'm', env = "HEARTH_MODEL")]
    #[serde(deserialize_with = "one_or_many")]
    pub model: Vec<String>,
    /// Where to compute: auto, cpu, cuda, cuda:N, metal or plain (candle on the CPU, the reference)
    /// (default: auto).
    #[arg(long, env = "HEARTH_DEVICE")]
    pub device: Option<String>,
    /// Devices among which every layer of a model is divided: with `cuda:K` the GPUs K, K+1, ...
    /// (feature `nccl`), on the CPU parts of its threads, which is no faster and is there to try.
    /// Encoders run on the first (default: 1).
    #[arg(long, env = "HEARTH_TENSOR_PARALLEL")]
    pub tensor_parallel: Option<usize>,
    /// Threads that compute (default: physical cores that this process may use).
    #[arg(long, short = 't', env = "HEARTH_THREADS")]
    pub threads: Option<usize>,
    /// Quantise the weights of a model in floats while loading it: q4_k_m, q8_0, ... (what
    /// `hearth quantize --type` takes).
    #[arg(long, env = "HEARTH_QUANTIZE")]
    pub quantize: Option<String>,
    /// Element type of stored keys and values: f16, bf16, on the CPU q16_0 (integers with scales,
    /// in two bytes like f16) or f32, or in half the memory of f16 q8_0 (bytes with scales) or fp8
    /// (E4M3, fewer bits, clipped at 448) (default: q16_0 on the CPU; f16 elsewhere, and
    /// with `auto` in builds for accelerators).
    #[arg(long, env = "HEARTH_KV_DTYPE")]
    pub kv_dtype: Option<String>,
}

/// How the engine runs a model.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Tokens of one request, prompt and completion together (default: what the model was made for
    /// and the free memory holds).
    #[arg(long, short = 'c', env = "HEARTH_CTX_SIZE")]
    pub ctx_size: Option<usize>,
    /// Rows of one forward pass (default: 512).
    #[arg(long, env = "HEARTH_BATCH_TOKENS")]
    pub batch_tokens: Option<usize>,
    /// How answers are guessed ahead, which makes them faster and changes no token: off, ngram
    /// (what they quote from the prompt and from themselves) or draft (a smaller model) (default:
    /// off, or draft where --draft-model names one).
    #[arg(long, env = "HEARTH_SPECULATE")]
    pub speculate: Option<String>,
    /// Smaller model with the same vocabulary that guesses for the one that is served; named as
    /// --model is.
    #[arg(long, env = "HEARTH_DRAFT_MODEL")]
    pub draft_model: Option<String>,
}

/// How many requests there may be, and how long they wait.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
#[command(next_help_heading = "Capacity")]
pub struct CapacityArgs {
    /// Requests that run at once (default: 32).
    #[arg(long, env = "HEARTH_MAX_RUNNING")]
    pub max_running: Option<usize>,
    /// Requests that may wait, or be left unread, before clients are told to come back (default:
    /// 256).
    #[arg(long, env = "HEARTH_MAX_QUEUE")]
    pub max_queue: Option<usize>,
    /// Milliseconds that a running answer may wait for its next token while prompts are computed,
    /// and up to twice as long where more of them wait than answers run (default: 100).
    #[arg(long, env = "HEARTH_TARGET_ITL_MS")]
    pub target_itl_ms: Option<usize>,
    /// Seconds that a request may wait before it is begun; then it is given up (default: for ever).
    #[arg(long, env = "HEARTH_QUEUE_TIMEOUT_S")]
    pub queue_timeout_s: Option<usize>,
}

/// Which models are in memory, and when.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
#[command(next_help_heading = "Memory")]
pub struct MemoryArgs {
    /// Memory that all models may take together, weights, keys and values: `12G`, `800M`; on each
    /// of several GPUs (default: what is free at the start, less a reserve).
    #[arg(long, env = "HEARTH_MEMORY_BUDGET")]
    pub memory_budget: Option<String>,
    /// Folder whose models are offered and loaded on demand: .gguf files, and folders with a
    /// config.json.
    #[arg(long, env = "HEARTH_MODELS_DIR")]
    pub models_dir: Option<PathBuf>,
    /// How long a model that nobody asks for stays in memory: seconds, `5m`, 0 for not at all, -1
    /// until its memory is needed; a request's `keep_alive` wins (default: -1).
    #[arg(long, env = "HEARTH_KEEP_ALIVE", allow_negative_numbers = true)]
    #[serde(deserialize_with = "text_or_number")]
    pub keep_alive: Option<String>,
    /// Id of a model that is loaded at the start and stays; repeat for several.
    #[arg(long, env = "HEARTH_PIN")]
    #[serde(deserialize_with = "one_or_many")]
    pub pin: Vec<String>,
}

/// Adapters of the models.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
#[command(next_help_heading = "Adapters")]
pub struct LoraArgs {
    /// LoRA adapter to serve, as `ID=PATH` (a PEFT folder or a GGUF file), or `MODEL:ID=PATH` where
    /// several models are served; repeat for several. It is read when it is asked for first.
    #[arg(long, env = "HEARTH_LORA")]
    #[serde(deserialize_with = "one_or_many")]
    pub lora: Vec<String>,
    /// Folder whose adapters are served as they come and go, each named like its folder or `.gguf`
    /// file; `MODEL=DIR` where several models are served; repeat for several.
    #[arg(long, env = "HEARTH_LORA_DIR")]
    #[serde(deserialize_with = "one_or_many")]
    pub lora_dir: Vec<String>,
    /// Memory that adapters may take while nobody uses them, besides the models (default: 1G).
    #[arg(long, env = "HEARTH_LORA_MEMORY")]
    pub lora_memory: Option<String>,
}

/// What clients meet.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Id under which a model is served, in the order of --model (default: the file's or folder's
    /// name).
    #[arg(long, env = "HEARTH_ALIAS")]
    #[serde(deserialize_with = "one_or_many")]
    pub alias: Vec<String>,
    /// Another name for a served model, as `gpt-4o-mini=hearth-tiny`, for clients that insist on
    /// theirs; repeat for several.
    #[arg(long, env = "HEARTH_MODEL_ALIAS")]
    #[serde(deserialize_with = "one_or_many")]
    pub model_alias: Vec<String>,
    /// Address to listen on (default: 127.0.0.1).
    #[arg(long, env = "HEARTH_HOST")]
    pub host: Option<String>,
    /// Port to listen on; 0 picks one and prints it (default: 8080).
    #[arg(long, env = "HEARTH_PORT")]
    pub port: Option<u16>,
    /// PEM file with the certificate, and those between it and its authority: the port then speaks
    /// https alone. Needs --tls-key.
    #[arg(long, env = "HEARTH_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the private key of --tls-cert.
    #[arg(long, env = "HEARTH_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// Folder for what must outlive the process: keys, stored answers; `none` keeps everything in
    /// memory (default: ~/.local/share/hearth).
    #[arg(long, env = "HEARTH_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Folder for keys and values of prompts that are long, asked twice, or leave memory: what was
    /// computed once is read again, also after a restart. Texts can be read out of it (default:
    /// none).
    #[arg(long, env = "HEARTH_KV_STORE")]
    pub kv_store: Option<PathBuf>,
    /// Size of that folder; what was not used longest goes first (default: 10G).
    #[arg(long, env = "HEARTH_KV_STORE_SIZE")]
    pub kv_store_size: Option<String>,
    /// Take the memory of keys and values as a model loads, and not a little ahead of its use: no
    /// step waits for the system to find it. On a GPU it is so anyway (default: no).
    #[arg(
        long,
        env = "HEARTH_KV_PREFAULT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    pub kv_prefault: Option<bool>,
    /// Key that clients must send, besides those of `hearth keys`; repeat for several. Without any
    /// key at all, anyone who reaches the port may ask.
    #[arg(long, env = "HEARTH_API_KEY", hide_env_values = true)]
    #[serde(deserialize_with = "one_or_many")]
    pub api_key: Vec<String>,
    /// Serve other machines although no key is asked for.
    #[arg(
        long,
        env = "HEARTH_INSECURE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    pub insecure: Option<bool>,
    /// Origin whose pages may ask from a browser, such as `https://app.example`; repeat for
    /// several, `*` for all (default: none).
    #[arg(long, env = "HEARTH_CORS_ORIGIN")]
    #[serde(deserialize_with = "one_or_many")]
    pub cors_origin: Vec<String>,
    /// Largest request body in MB (default: 4).
    #[arg(long, env = "HEARTH_BODY_LIMIT_MB")]
    pub body_limit_mb: Option<usize>,
    /// Seconds after which a connection is closed that takes nothing of its answer, or whose other
    /// end has vanished (default: 60).
    #[arg(long, env = "HEARTH_SEND_TIMEOUT_S")]
    pub send_timeout_s: Option<usize>,
    /// GB of uploaded files that one project may have (default: 20).
    #[arg(long, env = "HEARTH_FILES_QUOTA_GB")]
    pub files_quota_gb: Option<usize>,
    /// Days after which stored responses and chat completions are removed; 0 keeps them for ever
    /// (default: 30).
    #[arg(long, env = "HEARTH_STORE_DAYS")]
    pub store_days: Option<usize>,
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

impl RawConfig {
    /// What a TOML file says; keys are the long flags.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|e| e.to_string());
        let read = text.and_then(|text| Self::from_toml(&text));
        read.or_else(|what| wrong(&path.display().to_string(), what))
    }

    /// The groups are read one by one from the same text: each knows its own keys, all of them
    /// together every key.
    pub(super) fn from_toml(text: &str) -> Result<Self, String> {
        fn group<T: DeserializeOwned>(text: &str) -> Result<T, String> {
            toml::from_str(text).map_err(|e| e.to_string())
        }
        let keys: toml::Table = group(text)?;
        let command = Self::augment_args(clap::Command::new("hearth"));
        let known: Vec<&str> = command.get_arguments().filter_map(|a| a.get_long()).collect();
        if let Some(odd) = keys.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(format!("unknown key `{odd}`, expected one of {}", known.join(", ")));
        }
        Ok(Self {
            model: group(text)?,
            engine: group(text)?,
            capacity: group(text)?,
            memory: group(text)?,
            lora: group(text)?,
            server: group(text)?,
        })
    }

    /// `self`, and `file` where `self` says nothing.
    pub fn or(self, file: Self) -> Self {
        fn list<T>(a: Vec<T>, b: Vec<T>) -> Vec<T> {
            if a.is_empty() { b } else { a }
        }
        let Self { model, engine, capacity, memory, lora, server } = self;
        Self {
            lora: LoraArgs {
                lora: list(lora.lora, file.lora.lora),
                lora_dir: list(lora.lora_dir, file.lora.lora_dir),
                lora_memory: lora.lora_memory.or(file.lora.lora_memory),
            },
            server: ServerArgs {
                // Ids belong to the models that stand with them.
                alias: match model.model.is_empty() {
                    true => list(server.alias, file.server.alias),
                    false => server.alias,
                },
                model_alias: list(server.model_alias, file.server.model_alias),
                host: server.host.or(file.server.host),
                port: server.port.or(file.server.port),
                tls_cert: server.tls_cert.or(file.server.tls_cert),
                tls_key: server.tls_key.or(file.server.tls_key),
                data_dir: server.data_dir.or(file.server.data_dir),
                kv_store: server.kv_store.or(file.server.kv_store),
                kv_store_size: server.kv_store_size.or(file.server.kv_store_size),
                kv_prefault: server.kv_prefault.or(file.server.kv_prefault),
                api_key: list(server.api_key, file.server.api_key),
                insecure: server.insecure.or(file.server.insecure),
                cors_origin: list(server.cors_origin, file.server.cors_origin),
                body_limit_mb: server.body_limit_mb.or(file.server.body_limit_mb),
                send_timeout_s: server.send_timeout_s.or(file.server.send_timeout_s),
                files_quota_gb: server.files_quota_gb.or(file.server.files_quota_gb),
                store_days: server.store_days.or(file.server.store_days),
                lenient_fields: server.lenient_fields.or(file.server.lenient_fields),
                log_format: server.log_format.or(file.server.log_format),
            },
            model: ModelArgs {
                model: list(model.model, file.model.model),
                device: model.device.or(file.model.device),
                tensor_parallel: model.tensor_parallel.or(file.model.tensor_parallel),
                threads: model.threads.or(file.model.threads),
                quantize: model.quantize.or(file.model.quantize),
                kv_dtype: model.kv_dtype.or(file.model.kv_dtype),
            },
            engine: EngineArgs {
                ctx_size: engine.ctx_size.or(file.engine.ctx_size),
                batch_tokens: engine.batch_tokens.or(file.engine.batch_tokens),
                speculate: engine.speculate.or(file.engine.speculate),
                draft_model: engine.draft_model.or(file.engine.draft_model),
            },
            memory: MemoryArgs {
                memory_budget: memory.memory_budget.or(file.memory.memory_budget),
                models_dir: memory.models_dir.or(file.memory.models_dir),
                keep_alive: memory.keep_alive.or(file.memory.keep_alive),
                pin: list(memory.pin, file.memory.pin),
            },
            capacity: CapacityArgs {
                max_running: capacity.max_running.or(file.capacity.max_running),
                max_queue: capacity.max_queue.or(file.capacity.max_queue),
                target_itl_ms: capacity.target_itl_ms.or(file.capacity.target_itl_ms),
                queue_timeout_s: capacity.queue_timeout_s.or(file.capacity.queue_timeout_s),
            },
        }
    }
}

/// A text in the file, or a number.
fn text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string or a number")]
    enum TextOrNumber {
        Text(String),
        Number(i64),
    }
    Ok(Some(match TextOrNumber::deserialize(deserializer)? {
        TextOrNumber::Text(text) => text,
        TextOrNumber::Number(number) => number.to_string(),
    }))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Vec<clap::Arg> {
        let command = RawConfig::augment_args(clap::Command::new("hearth"));
        command.get_arguments().cloned().collect()
    }

    #[test]
    fn every_flag_is_a_key_of_the_file_and_has_a_variable() {
        for flag in flags() {
            let key = flag.get_long().unwrap();
            let error = RawConfig::from_toml(&format!("{key} = {{}}")).unwrap_err();
            assert!(error.contains("line 1") && error.contains("expected"), "{key}: {error}");
            let variable = format!("HEARTH_{}", key.to_uppercase().replace('-', "_"));
            assert_eq!(flag.get_env().unwrap(), variable.as_str());
        }
    }

    #[test]
    fn a_key_that_nobody_knows_is_an_error() {
        let error = RawConfig::from_toml("prot = 1").unwrap_err();
        assert!(error.contains("`prot`") && error.contains("port"), "{error}");
    }

    #[test]
    fn one_value_is_a_list_of_one() {
        let one = RawConfig::from_toml("model = \"a.gguf\"\napi-key = \"k\"");
        assert_eq!(one, RawConfig::from_toml("model = [\"a.gguf\"]\napi-key = [\"k\"]"));
        assert!(RawConfig::from_toml("model = 3").is_err());
    }

    #[test]
    fn what_the_flags_do_not_say_the_file_says() {
        let all = "model = \"m\"\ndevice = \"cpu\"\ntensor-parallel = 2\nthreads = 1\n\
            kv-dtype = \"f32\"\nctx-size = 2\nquantize = \"q8_0\"\nbatch-tokens = 3\n\
            target-itl-ms = 8\nqueue-timeout-s = 9\n\
            max-running = 4\nmax-queue = 5\nalias = \"a\"\n\
            speculate = \"draft\"\ndraft-model = \"d\"\n\
            model-alias = \"x=a\"\nlora = \"y=b\"\nlora-dir = \"l\"\nlora-memory = \"1G\"\n\
            host = \"::1\"\n\
            port = 6\ntls-cert = \"c\"\ntls-key = \"k\"\n\
            data-dir = \"d\"\napi-key = \"k\"\ninsecure = true\n\
            cors-origin = \"*\"\nbody-limit-mb = 7\nfiles-quota-gb = 8\n\
            store-days = 9\nsend-timeout-s = 9\nlenient-fields = true\nlog-format = \"json\"\n\
            kv-store = \"k\"\nkv-store-size = \"1G\"\nkv-prefault = true\n\
            memory-budget = \"2G\"\nmodels-dir = \"d\"\nkeep-alive = -1\npin = \"a\"";
        assert_eq!(all.lines().count(), flags().len());
        let all = RawConfig::from_toml(all).unwrap();
        assert_eq!(RawConfig::default().or(all.clone()), all);
        assert_eq!(all.clone().or(RawConfig::default()), all);
    }
}
