//! The composition root: flags in, rooms built and wired, an exit code out. Owns no logic.

mod bench;
mod bundle;
mod chat;
mod common;
mod data;
mod doctor;
mod keys;
mod lora;
mod models;
mod open;
mod quantize;
mod serve;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use self::common::{Common, without_empty_variables};
use crate::config::RawConfig;

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
    Serve(Box<Common<RawConfig>>),
    /// Talk to a model in the terminal.
    Chat(chat::ChatArgs),
    /// Continue a text.
    Complete(chat::CompleteArgs),
    /// Fetch, list and inspect models.
    #[command(subcommand)]
    Models(models::ModelsCommand),
    /// Write a model as a GGUF file with fewer bits.
    Quantize(quantize::QuantizeArgs),
    /// Work with LoRA adapters: in a file, and in a server that runs.
    #[command(subcommand)]
    Lora(lora::LoraCommand),
    /// Make or check a folder for a machine without a network.
    #[command(subcommand)]
    Bundle(bundle::BundleCommand),
    /// Make, list and revoke API keys.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Back up, restore and tidy the data directory.
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Measure prefill and decode speed of a model, or load a server.
    Bench(Box<bench::BenchArgs>),
    /// Show what this machine offers and what would be used.
    Doctor(Common<doctor::DoctorArgs>),
}

/// What `main` shows when a command fails.
type Failure = Box<dyn std::error::Error>;

/// Runs the program.
pub fn run() -> ExitCode {
    let matches = without_empty_variables(Cli::command()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let done = match cli.command {
        Command::Serve(common) => serve::run(*common),
        Command::Chat(args) => chat::chat(args),
        Command::Complete(args) => chat::complete(args),
        Command::Models(command) => models::run(command),
        Command::Quantize(args) => quantize::run(args),
        Command::Lora(command) => lora::run(command),
        Command::Bundle(command) => bundle::run(command),
        Command::Keys(command) => keys::run(command),
        Command::Data(command) => data::run(command),
        Command::Bench(args) => bench::run(*args),
        Command::Doctor(common) => doctor::run(common),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if nobody_reads(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `hearth models list | head`: the reader had enough, which is no failure.
fn nobody_reads(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Reads a number between two bounds, both allowed.
fn within<const LOW: i32, const HIGH: i32>(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(number) if (LOW as f32..=HIGH as f32).contains(&number) => Ok(number),
        _ => Err(format!("expected a number between {LOW} and {HIGH}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        assert_eq!(within::<0, 2>("0"), Ok(0.0));
        assert_eq!(within::<0, 2>("2"), Ok(2.0));
        for bad in ["-0.1", "2.01", "nan", "inf", "", "warm"] {
            assert!(within::<0, 2>(bad).is_err(), "{bad}");
        }
        let parse = |value: &str| Cli::try_parse_from(["hearth", "chat", "--temperature", value]);
        assert!(parse("0.7").is_ok());
        let error = parse("-1").unwrap_err().to_string();
        assert!(error.contains("between 0 and 2"), "{error}");
    }

    #[test]
    fn a_reader_that_had_enough_is_no_failure() {
        let pipe: Failure = io::Error::from(io::ErrorKind::BrokenPipe).into();
        let disk: Failure = io::Error::from(io::ErrorKind::StorageFull).into();
        assert!(nobody_reads(&*pipe) && !nobody_reads(&*disk));
    }
}
