//! `hearth quantize`: a model to a GGUF file with fewer bits.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use hearth_kernels::{Pool, pool};
use hearth_models::weights::Mix;
use hearth_models::{Export, ModelFile};
use indicatif::{ProgressBar, ProgressStyle};

use super::{Failure, open};
use crate::registry;

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

pub(super) fn mix(name: &str) -> Result<Mix, String> {
    Mix::named(name).ok_or_else(|| format!("not one of {}", Mix::names()))
}

pub(super) fn run(args: QuantizeArgs) -> Result<(), Failure> {
    let writing = Writing { output: &args.output, force: args.force };
    writing.check()?;
    let file = open::named(&args.source, None)?;
    writing.is_not_of(&file)?;
    let pool = Pool::new(args.threads.unwrap_or_else(pool::default_threads));
    let export = Export { file: &file, mix: args.mix, pool: &pool, adapters: &[] };
    writing.write(&export, "quantising")?;
    let (before, after) = (file.weights().file_bytes(), args.output.metadata()?.len());
    let (name, mb) = (args.mix.name(), |bytes: u64| bytes.div_ceil(1 << 20));
    let output = args.output.display();
    writeln!(io::stdout(), "{output}: {name}, {} MB of {} MB", mb(after), mb(before))?;
    Ok(())
}

/// A GGUF file that is to be written.
pub(super) struct Writing<'a> {
    pub output: &'a Path,
    /// What is there is replaced.
    pub force: bool,
}

impl Writing<'_> {
    /// Before anything is read.
    pub fn check(&self) -> Result<(), Failure> {
        let output = self.output.display();
        match (self.output.exists(), self.output.is_dir()) {
            (_, true) => Err(format!("{output} is a folder; name the file to write").into()),
            (true, _) if !self.force => Err(format!("{output} exists; --force replaces it").into()),
            _ => Ok(()),
        }
    }

    /// A model is not written over itself.
    pub fn is_not_of(&self, file: &ModelFile) -> Result<(), Failure> {
        match file.weights().files().any(|source| same(source, self.output)) {
            true => Err(format!("{} is the source itself", self.output.display()).into()),
            false => Ok(()),
        }
    }

    /// With a bar on the terminal that says `what`.
    pub fn write(&self, export: &Export<'_>, what: &str) -> Result<(), Failure> {
        let bar = ProgressBar::new(export.file.weights().tensor_bytes());
        let style = format!("  {what} {{bar:32}} {{bytes}}/{{total_bytes}} {{eta}}");
        let style = ProgressStyle::with_template(&style);
        bar.set_style(style.expect("the template is fixed; this is a bug"));
        let done = registry::write_gguf(export, self.output, &mut |bytes| bar.inc(bytes as u64));
        bar.finish_and_clear();
        Ok(done?)
    }
}

/// Whether two paths lead to one file.
fn same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
