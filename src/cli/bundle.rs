//! `hearth bundle`: a folder for a machine without a network, made and checked.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Failure, open};
use crate::bundle::{Binary, Bundle, Contents, ModelSource, Origin, Plan};
use crate::registry::hub::HubOptions;
use crate::registry::{builtin, source};

#[derive(Clone, Debug, Subcommand)]
pub(super) enum BundleCommand {
    /// Make a folder with models, configuration, programs, start scripts and checksums.
    Create(CreateArgs),
    /// Read every file of a bundle, compare it with the manifest and open every model.
    Verify {
        /// The bundle.
        folder: PathBuf,
    },
}

#[derive(Clone, Debug, clap::Args)]
pub(super) struct CreateArgs {
    /// Model to put in: a file, a folder or a hub id, as for `hearth serve`; repeat for several
    /// (default: the built-in one).
    #[arg(long, short = 'm', value_name = "SOURCE")]
    model: Vec<String>,
    /// Id under which a model is served, in the order of --model (default: the file's or folder's
    /// name, or the hub id).
    #[arg(long)]
    alias: Vec<String>,
    /// LoRA adapter to put in, a file or a folder; repeat for several. They are served where there
    /// is one model; of several, hearth.toml has a line that is to say which.
    #[arg(long, value_name = "PATH")]
    adapter: Vec<PathBuf>,
    /// Program for a platform that the bundle starts on; repeat for several (default: this one).
    #[arg(long, value_name = "[PLATFORM=]PATH")]
    binary: Vec<String>,
    /// The folder to make.
    #[arg(long, short = 'o', value_name = "DIR")]
    out: PathBuf,
    /// Replace a bundle that is there.
    #[arg(long)]
    force: bool,
}

pub(super) fn run(command: BundleCommand) -> Result<(), Failure> {
    match command {
        BundleCommand::Create(args) => create(args),
        BundleCommand::Verify { folder } => verify(&folder),
    }
}

fn create(args: CreateArgs) -> Result<(), Failure> {
    let contents = Contents {
        models: models(&args)?,
        adapters: args.adapter,
        binaries: match args.binary.is_empty() {
            true => vec![Binary::this()?],
            false => args.binary.iter().map(|b| Binary::parse(b)).collect::<Result<_, _>>()?,
        },
    };
    let plan = Plan::new(&contents)?;
    for path in plan.too_long_for_fat32() {
        eprintln!("warning: {path} has 4 GiB or more: a FAT32 stick cannot hold it, exFAT can");
    }
    let bar = bar(plan.bytes());
    let written = plan.write(&args.out, args.force, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let (manifest, sha256) = written?;
    let out = &mut io::stdout().lock();
    let folder = args.out.display();
    writeln!(out, "{folder}: {} files, {} MB", manifest.files.len(), mb(manifest.bytes()))?;
    for (kind, parts) in [
        ("model", &manifest.models),
        ("adapter", &manifest.adapters),
        ("program", &manifest.binaries),
    ] {
        for part in parts {
            writeln!(out, "  {kind:<9} {} ({})", part.id, part.path)?;
        }
    }
    writeln!(out, "  manifest  sha256 {sha256}")?;
    Ok(writeln!(out, "after copying it: hearth bundle verify {folder}")?)
}

/// The models to put in; those on the hub are fetched first.
fn models(args: &CreateArgs) -> Result<Vec<ModelSource>, Failure> {
    let names = match (args.model.is_empty(), builtin::bytes()) {
        (true, None) => return Err(open::NO_BUILTIN.into()),
        (true, Some(_)) => vec![builtin::NAME.to_owned()],
        (false, _) => args.model.clone(),
    };
    if args.alias.len() > names.len() {
        return Err("--alias: there are more of them than of --model".into());
    }
    if args.alias.iter().any(|alias| alias.trim().is_empty()) {
        return Err("--alias: must not be empty".into());
    }
    let model = |(index, name): (usize, &String)| {
        let source = source::ModelSource::parse(name)?;
        let hub_name = matches!(source, source::ModelSource::Hub(_)).then(|| name.clone());
        let origin = match source {
            source::ModelSource::Builtin => {
                Origin::Builtin(builtin::bytes().ok_or(open::NO_BUILTIN)?)
            }
            source => Origin::Path(open::path_of(source, &HubOptions::from_env())?),
        };
        Ok(ModelSource { id: args.alias.get(index).cloned().or(hub_name), origin })
    };
    names.iter().enumerate().map(model).collect()
}

fn verify(folder: &Path) -> Result<(), Failure> {
    let bundle = Bundle::open(folder)?;
    let manifest = bundle.manifest();
    let bar = bar(manifest.bytes());
    let report = bundle.verify(&mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let report = report?;
    let out = &mut io::stdout().lock();
    let (files, size) = (manifest.files.len(), mb(manifest.bytes()));
    let version = manifest.hearth.escape_debug();
    writeln!(out, "{}: {files} files, {size} MB, by hearth {version}", folder.display())?;
    for (id, what) in &report.opened {
        writeln!(out, "  opens       {}: {what}", id.escape_debug())?;
    }
    for binary in &manifest.binaries {
        writeln!(out, "  program     {}", binary.id.escape_debug())?;
    }
    writeln!(out, "  manifest    sha256 {}", bundle.sha256())?;
    for path in &report.ignored {
        writeln!(out, "  ignored     {}", path.escape_debug())?;
    }
    for problem in &report.problems {
        writeln!(out, "  {problem}")?;
    }
    match report.problems.len() {
        0 => Ok(writeln!(out, "whole: every file is as it was written")?),
        1 => Err("one thing is wrong with this bundle".into()),
        n => Err(format!("{n} things are wrong with this bundle").into()),
    }
}

fn mb(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn bar(bytes: u64) -> ProgressBar {
    let template = "  {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(bytes).with_style(style.expect("the template is fixed; this is a bug"))
}
