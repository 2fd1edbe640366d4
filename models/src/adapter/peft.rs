//! Adapters as Hugging Face PEFT writes them: `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! A tensor is `base_model.model.MODULE.lora_A.weight` (or `lora_B`, `lora_embedding_A`, ...). The
//! configuration says how `B A` is scaled, for each module where patterns say so. A key that
//! changes what the model computes and is not understood here is refused by name, and so is a key
//! that nobody knows, unless its value switches nothing on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use super::{Planned, Scale, targets};
use crate::config::ModelConfig;
use crate::weights::{self, Role, Weights};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// No configuration is larger.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// No pattern takes more, compiled.
const PATTERN_BYTES_MAX: usize = 1 << 18;

/// Keys that say how an adapter was made or found, and change nothing of what it computes.
const WITHOUT_EFFECT: [&str; 17] = [
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "velora_config",
];

/// What a path leads to.
pub(super) struct Files {
    pub weights: PathBuf,
    /// The text of the configuration.
    pub config: Option<String>,
}

/// The files of an adapter.
pub(super) fn files(path: &Path) -> Result<Files> {
    let read = |file: &Path| -> Result<Option<String>> {
        let io = |source| weights::Error::Io { path: file.to_owned(), source };
        let file = match File::open(file) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(io)?,
        };
        let mut text = String::new();
        file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(io)?;
        match text.len() as u64 > CONFIG_BYTES_MAX {
            true => Err(Error::config(CONFIG, format!("is larger than {CONFIG_BYTES_MAX} bytes"))),
            false => Ok(Some(text)),
        }
    };
    if !path.is_dir() {
        let config = path.with_file_name(CONFIG);
        return Ok(Files { weights: path.to_owned(), config: read(&config)? });
    }
    let config = read(&path.join(CONFIG))?;
    let usual = path.join(WEIGHTS);
    let pickled = path.join("adapter_model.bin");
    if config.is_some() && !usual.exists() && pickled.exists() {
        let what = format!("is not read: save the adapter as `{WEIGHTS}`");
        return Err(Error::config("adapter_model.bin", what));
    }
    // A folder without a configuration may hold one GGUF file.
    let weights = if config.is_some() || usual.exists() { usual } else { path.to_owned() };
    Ok(Files { weights, config })
}

pub(super) fn plan(weights: &Weights, json: &str, config: &ModelConfig) -> Result<Vec<Planned>> {
    let known: BTreeMap<String, Role> = (targets(config).into_iter())
        .map(|role| (role.name(false, "weight").replace(".weight", ""), role))
        .collect();
    let settings = Settings::read(json)?;
    let mut modules: BTreeMap<&str, Module> = BTreeMap::new();
    for name in weights.names() {
        let (module, part) = part(name)?;
        let Some(&role) = known.get(module) else { return Err(stray(name, module)) };
        let entry = modules.entry(module).or_insert_with(|| Module::new(role));
        let slot = match part {
            Part::A => &mut entry.a,
            Part::B => &mut entry.b,
            Part::Magnitude => &mut entry.magnitude,
            Part::Base => {
                same_as_base(weights, name, role, config)?;
                continue;
            }
        };
        *slot = Some(name.to_owned());
    }
    modules.retain(|_, m| m.a.is_some() || m.b.is_some() || m.magnitude.is_some());
    let plan: Result<Vec<Planned>> =
        modules.into_iter().map(|(name, module)| module.planned(name, &settings)).collect();
    match plan {
        Ok(plan) if plan.is_empty() => Err(Error::config("adapter", "has no tensors")),
        plan => plan,
    }
}

/// The tensors of one module.
struct Module {
    role: Role,
    a: Option<String>,
    b: Option<String>,
    magnitude: Option<String>,
}

impl Module {
    fn new(role: Role) -> Self {
        Self { role, a: None, b: None, magnitude: None }
    }

    fn planned(self, name: &str, settings: &Settings) -> Result<Planned> {
        let absent = |what: &str| {
            let what = format!("has no {what} in the adapter");
            Error::Tensor { name: name.to_owned(), what }
        };
        let (a, b) = (self.a.ok_or_else(|| absent("A"))?, self.b.ok_or_else(|| absent("B"))?);
        match (&self.magnitude, settings.dora) {
            (None, true) => return Err(absent("magnitude vector, and `use_dora` is on")),
            (Some(name), false) => {
                let what = "is of DoRA, and `use_dora` is off".into();
                return Err(Error::Tensor { name: name.clone(), what });
            }
            _ => {}
        }
        let scale = settings.scale(name);
        Ok(Planned { role: self.role, a, a_is_turned: false, b, magnitude: self.magnitude, scale })
    }
}

/// What a tensor is to its module.
enum Part {
    A,
    B,
    Magnitude,
    /// The base's own weight, saved beside the update of an embedding or a head.
    Base,
}

/// Module and part of a tensor's name.
fn part(name: &str) -> Result<(&str, Part)> {
    let own = name.strip_prefix("base_model.model.").unwrap_or(name);
    let endings = [
        (".lora_A.weight", Part::A),
        (".lora_B.weight", Part::B),
        (".lora_embedding_A", Part::A),
        (".lora_embedding_B", Part::B),
        (".lora_magnitude_vector", Part::Magnitude),
        (".lora_magnitude_vector.weight", Part::Magnitude),
        (".base_layer.weight", Part::Base),
    ];
    for (ending, part) in endings {
        if let Some(module) = own.strip_suffix(ending) {
            return Ok((module, part));
        }
    }
    let refused = |what: &str| Error::Tensor { name: name.to_owned(), what: what.to_owned() };
    Err(match own.ends_with(".lora_B.bias") {
        true => refused("is a bias of an update (`lora_bias`), which is not supported"),
        false => refused("is a whole module (`modules_to_save`), which is not supported"),
    })
}

fn stray(name: &str, module: &str) -> Error {
    let expert = ["experts", "block_sparse_moe", "mlp.router", "shared_expert"];
    let what = match expert.iter().any(|word| module.contains(word)) {
        true => "updates experts, which is not supported".to_owned(),
        false => format!("updates `{module}`, which has no place in this architecture"),
    };
    Error::Tensor { name: name.to_owned(), what }
}

/// A vocabulary that was enlarged makes another model of it.
fn same_as_base(weights: &Weights, name: &str, role: Role, config: &ModelConfig) -> Result<()> {
    let wanted = role.shape(config);
    match weights.info(name).map(|info| &info.shape) {
        Some(found) if *found == wanted => Ok(()),
        found => {
            let found = found.cloned().unwrap_or_default();
            let what = format!("has shape {found:?}, the model's own weight is {wanted:?}");
            Err(Error::Tensor { name: name.to_owned(), what })
        }
    }
}

/// What `adapter_config.json` says of the arithmetic.
struct Settings {
    rank: usize,
    alpha: f32,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f32)>,
    rslora: bool,
    dora: bool,
}

impl Settings {
    fn read(json: &str) -> Result<Self> {
        let unreadable = |e| Error::config(CONFIG, format!("cannot be read: {e}"));
        let map: Map<String, Value> = serde_json::from_str(json).map_err(unreadable)?;
        refuse(&map)?;
        let rank = |key: &str, value: &Value| match value.as_u64() {
            Some(rank @ 1..=0xffff_ffff) => Ok(rank as usize),
            _ => Err(Error::config(key, format!("is {value}, a rank is a whole number from 1"))),
        };
        let alpha = |key: &str, value: &Value| match value.as_f64().map(|alpha| alpha as f32) {
            Some(alpha) if alpha.is_finite() => Ok(alpha),
            _ => Err(Error::config(key, format!("is {value}, a number is wanted"))),
        };
        let eight = Value::from(8);
        let get = |key: &str| map.get(key).unwrap_or(&eight);
        Ok(Self {
            rank: rank("r", get("r"))?,
            alpha: alpha("lora_alpha", get("lora_alpha"))?,
            rank_pattern: patterns(&map, "rank_pattern", rank)?,
            alpha_pattern: patterns(&map, "alpha_pattern", alpha)?,
            rslora: flag(&map, "use_rslora")?,
            dora: flag(&map, "use_dora")?,
        })
    }

    fn scale(&self, module: &str) -> Scale {
        let rank = matching(&self.rank_pattern, module).unwrap_or(self.rank);
        let alpha = matching(&self.alpha_pattern, module).unwrap_or(self.alpha);
        let divisor = match self.rslora {
            true => (rank as f64).sqrt(),
            false => rank as f64,
        };
        Scale::Known { scale: (f64::from(alpha) / divisor) as f32, rank }
    }
}

fn matching<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
}

/// Keys are regular expressions that match the end of a module's name; the first that does counts.
fn patterns<T>(
    map: &Map<String, Value>,
    key: &str,
    value_of: impl Fn(&str, &Value) -> Result<T>,
) -> Result<Vec<(Regex, T)>> {
    let entries = match map.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(Error::config(key, format!("is {other}, an object is wanted"))),
    };
    let compiled = |(pattern, value): (&String, &Value)| {
        let mut regex = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
        let regex = regex.size_limit(PATTERN_BYTES_MAX).build();
        let regex = regex.map_err(|e| Error::config(key, format!("`{pattern}`: {e}")))?;
        Ok((regex, value_of(&format!("{key}.{pattern}"), value)?))
    };
    entries.iter().map(compiled).collect()
}

fn flag(map: &Map<String, Value>, key: &str) -> Result<bool> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(other) => Err(Error::config(key, format!("is {other}, true or false is wanted"))),
    }
}

/// Everything that is on and cannot be honoured.
fn refuse(map: &Map<String, Value>) -> Result<()> {
    for (key, value) in map {
        let text = value.as_str();
        let fine = match key.as_str() {
            "r" | "lora_alpha" | "rank_pattern" | "alpha_pattern" => true,
            "use_rslora" | "use_dora" => true,
            "peft_type" => text == Some("LORA"),
            "task_type" => matches!(text, None | Some("CAUSAL_LM")),
            "bias" => matches!(text, None | Some("none")),
            // The others change the base's weights when training begins.
            "init_lora_weights" => {
                matches!(text, None | Some("gaussian" | "eva" | "orthogonal"))
            }
            key => WITHOUT_EFFECT.contains(&key) || switches_nothing_on(value),
        };
        if !fine {
            let what = format!("is {value}, which is not supported");
            return Err(Error::config(key, what));
        }
    }
    match map.contains_key("peft_type") {
        true => Ok(()),
        false => Err(Error::config("peft_type", "is missing")),
    }
}

fn switches_nothing_on(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}
