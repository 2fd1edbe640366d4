//! `hearth lora merge`: a model with adapters in its weights.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth_kernels::{Pool, pool};
use hearth_models::weights::Mix;
use hearth_models::{Adapter, Export};

use super::quantize::{self, Writing};
use super::{Failure, open};

#[derive(Debug, clap::Subcommand)]
pub(super) enum LoraCommand {
    /// Write a model with adapters merged into its weights as a GGUF file.
    Merge(MergeArgs),
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
    let LoraCommand::Merge(args) = command;
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
