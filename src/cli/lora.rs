//! `hearth lora`: a model with adapters in its weights, and the adapters of a server that runs.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hearth_kernels::{Pool, pool};
use hearth_models::weights::Mix;
use hearth_models::{Adapter, Export};
use serde_json::{Value, json};

use super::quantize::{self, Writing};
use super::{Failure, open};
use crate::client::{Client, Failed};
use crate::config;

/// The server may have to load the model of an adapter first.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Debug, clap::Subcommand)]
pub(super) enum LoraCommand {
    /// Write a model with adapters merged into its weights as a GGUF file.
    Merge(MergeArgs),
    /// Let a running server serve an adapter; answers that run keep what they began with.
    Load(LoadArgs),
    /// Let a running server forget an adapter; answers that run keep it.
    Unload {
        /// Id of the adapter.
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// The adapters of a running server, each with its model.
    List(ServerArgs),
}

/// A server that runs.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ServerArgs {
    /// Its base URL, as OpenAI clients take it.
    #[arg(long, default_value = "http://127.0.0.1:8080/v1")]
    url: String,
    /// A key, where it asks for keys: an admin key to change anything.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

#[derive(Clone, Debug, clap::Args)]
pub(super) struct LoadArgs {
    /// `ID=PATH` or `MODEL:ID=PATH`, as for `hearth serve --lora`; the server reads the files.
    lora: String,
    /// Take the place of an adapter of the same id.
    #[arg(long)]
    replace: bool,
    /// Keep it in memory.
    #[arg(long)]
    pin: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Clone, Debug, clap::Args)]
pub(super) struct MergeArgs {
    /// The model: a SafeTensors folder or file, a GGUF file in floats or Q8_0, or a hub id.
    source: String,
    /// A PEFT folder or a GGUF adapter, or `PATH=WEIGHT`; repeat for several.
    #[arg(long, required = true)]
    lora: Vec<String>,
    /// The GGUF file to write.
    #[arg(long, short = 'o')]
    output: PathBuf,
    /// Types of the weights, as for `hearth quantize`.
    #[arg(long = "type", short = 't', default_value = "f16", value_parser = quantize::mix)]
    mix: Mix,
    /// Replace the output if it is there.
    #[arg(long)]
    force: bool,
    /// Threads that compute (default: physical cores that this process may use).
    #[arg(long)]
    threads: Option<usize>,
}

pub(super) fn run(command: LoraCommand) -> Result<(), Failure> {
    let said = match command {
        LoraCommand::Merge(args) => return merge(args),
        LoraCommand::Load(args) => load(&args)?,
        LoraCommand::Unload { id, server } => {
            server.ask(|client| client.post("unload_lora_adapter", &json!({"lora_name": id})))?
        }
        LoraCommand::List(server) => list(&server.ask(|client| client.get("models"))?)?,
    };
    writeln!(io::stdout(), "{}", said.trim_end())?;
    Ok(())
}

impl ServerArgs {
    /// What the server says; a refusal in its words.
    fn ask<T>(&self, ask: impl Fn(&Client) -> Result<T, Failed>) -> Result<T, Failure> {
        let client = Client::new(&self.url, self.api_key.as_deref(), PATIENCE);
        let answer = client.and_then(|client| ask(&client));
        answer.map_err(|failed| {
            let hint = match failed.kind.as_str() {
                "connect" => "; is `hearth serve` running there? --url names another server",
                _ => "",
            };
            format!("{}: {failed}{hint}", self.url).into()
        })
    }
}

fn load(args: &LoadArgs) -> Result<String, Failure> {
    let (base, id, path) = config::named_lora(&args.lora)?;
    // The server was perhaps started in another folder.
    let path = std::path::absolute(path)?;
    let mut body = json!({
        "lora_name": id, "lora_path": path, "load_inplace": args.replace, "pinned": args.pin,
    });
    if let Some(base) = base {
        body["base_model_name"] = base.into();
    }
    args.server.ask(|client| client.post("load_lora_adapter", &body))
}

/// A line for each model of the list that is an adapter.
fn list(models: &str) -> Result<String, Failure> {
    let models: Value = serde_json::from_str(models)?;
    let models = models["data"].as_array().ok_or("the server's list of models is none")?;
    let line = |model: &Value| {
        let (id, parent) = (model["id"].as_str()?, model["parent"].as_str()?);
        Some(format!("{id}  of {parent}"))
    };
    let lines: Vec<String> = models.iter().filter_map(line).collect();
    Ok(if lines.is_empty() { "no adapters".to_owned() } else { lines.join("\n") })
}

fn merge(args: MergeArgs) -> Result<(), Failure> {
    let writing = Writing { output: &args.output, force: args.force };
    writing.check()?;
    let file = open::named(&args.source, None)?;
    writing.is_not_of(&file)?;
    let pool = Pool::new(args.threads.unwrap_or_else(pool::default_threads));
    let mut adapters = Vec::new();
    for lora in &args.lora {
        let (path, weight) = path_and_weight(lora);
        let adapter = Adapter::open(&path, &file, &pool)
            .map_err(|e| format!("--lora {}: {e}", path.display()))?;
        adapters.push((Arc::new(adapter), weight));
    }
    let export = Export { file: &file, mix: args.mix, pool: &pool, adapters: &adapters };
    writing.write(&export, "merging")?;
    let (output, name) = (args.output.display(), args.mix.name());
    let mb = args.output.metadata()?.len().div_ceil(1 << 20);
    writeln!(io::stdout(), "{output}: {} merged, {name}, {mb} MB", adapters.len())?;
    Ok(())
}

/// `PATH=0.5` where that is no file itself.
fn path_and_weight(lora: &str) -> (PathBuf, f32) {
    let weighted = lora.rsplit_once('=').filter(|_| !Path::new(lora).exists());
    let weight = weighted.and_then(|(_, weight)| weight.parse::<f32>().ok());
    match (weighted, weight.filter(|weight| weight.is_finite())) {
        (Some((path, _)), Some(weight)) => (PathBuf::from(path), weight),
        _ => (PathBuf::from(lora), 1.0),
    }
}
