//! `hearth quantize`: a model to a GGUF file with fewer bits.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use hearth_kernels::{Pool, pool};
use hearth_models::Export;
use hearth_models::weights::Mix;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Failure, open};
use crate::registry;
use crate::registry::hub::HubOptions;
use crate::registry::source::ModelSource;

#[derive(Clone, Debug, clap::Args)]
pub(super) struct QuantizeArgs {
    /// A SafeTensors folder or file, a GGUF file in floats or Q8_0, or a hub id.
    source: String,
    /// The GGUF file to write.
    #[arg(long, short = 'o')]
    output: PathBuf,
    /// Types of the weights: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_m,
    /// q3_k_s, q2_k, q5_1, q5_0, q4_1, q4_0 or iq4_nl.
    #[arg(long = "type", short = 't', default_value = "q4_k_m", value_parser = mix)]
    mix: Mix,
    /// Replace the output if it is there.
    #[arg(long)]
    force: bool,
    /// Threads that compute (default: physical cores that this process may use).
    #[arg(long)]
    threads: Option<usize>,
}

fn mix(name: &str) -> Result<Mix, String> {
    Mix::named(name).ok_or_else(|| format!("not one of {}", Mix::names()))
}

pub(super) fn run(args: QuantizeArgs) -> Result<(), Failure> {
    let output = args.output.display();
    if args.output.exists() && !args.force {
        return Err(format!("{output} exists; --force replaces it").into());
    }
    if args.output.is_dir() {
        return Err(format!("{output} is a folder; name the file to write").into());
    }
    let path = open::path_of(ModelSource::parse(&args.source)?, &HubOptions::from_env())?;
    let file = hearth_models::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    if file.weights().files().any(|source| same(source, &args.output)) {
        return Err(format!("{output} is the source itself").into());
    }
    let bar = ProgressBar::new(file.weights().tensor_bytes());
    let style = ProgressStyle::with_template("  quantising {bar:32} {bytes}/{total_bytes} {eta}");
    bar.set_style(style.expect("the template is fixed; this is a bug"));
    let pool = Pool::new(args.threads.unwrap_or_else(pool::default_threads));
    let export = Export { file: &file, mix: args.mix, pool: &pool, adapters: &[] };
    let done = registry::write_gguf(&export, &args.output, &mut |bytes| bar.inc(bytes as u64));
    bar.finish_and_clear();
    done?;
    let (before, after) = (file.weights().file_bytes(), args.output.metadata()?.len());
    let (name, mb) = (args.mix.name(), |bytes: u64| bytes.div_ceil(1 << 20));
    writeln!(io::stdout(), "{output}: {name}, {} MB of {} MB", mb(after), mb(before))?;
    Ok(())
}

/// Whether two paths lead to one file.
fn same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
