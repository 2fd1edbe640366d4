//! The `hearth` binary.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    hearth::cli::run()
}
