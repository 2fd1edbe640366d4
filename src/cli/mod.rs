//! The composition root: flags in, rooms built and wired, an exit code out. Owns no logic.

mod bench;
mod chat;
mod doctor;
mod models;
mod open;
mod serve;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Config, RawConfig};

/// The whole OpenAI platform on localhost, in one binary.
#[derive(Debug, Parser)]
#[command(name = "hearth", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve models through the OpenAI API.
    Serve(Common),
    /// Talk to a model in the terminal.
    Chat(chat::ChatArgs),
    /// Continue a text.
    Complete(chat::CompleteArgs),
    /// Fetch, list and inspect models.
    #[command(subcommand)]
    Models(models::ModelsCommand),
    /// Measure prefill and decode speed.
    Bench(bench::BenchArgs),
    /// Show what this machine offers and what would be used.
    Doctor(Common),
}

/// Flags that every command about a model has.
#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// TOML file with the same names as the flags.
    #[arg(long, env = "HEARTH_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    raw: RawConfig,
}

/// What `main` shows when a command fails.
type Failure = Box<dyn std::error::Error>;

impl Common {
    fn validate(self) -> Result<Config, Failure> {
        let file = self.config.as_deref().map(RawConfig::from_file).transpose()?;
        Ok(self.raw.or(file.unwrap_or_default()).validate()?)
    }
}

/// Runs the program.
pub fn run() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve(common) => serve::run(common),
        Command::Chat(args) => chat::chat(args),
        Command::Complete(args) => chat::complete(args),
        Command::Models(command) => models::run(command),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(common) => doctor::run(common),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
