//! Where a command's configuration comes from: its flags, then the environment, then a TOML file.

use std::env;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command};

use super::Failure;
use crate::config::{Config, ModelArgs, RawConfig};
use crate::registry::source;

/// A command's own flags, and the file that says the rest.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Common<A: clap::Args> {
    /// TOML file with the same names as the flags of `hearth serve`; paths in it are relative to
    /// its folder.
    #[arg(long, env = "HEARTH_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: A,
}

impl From<ModelArgs> for RawConfig {
    fn from(model: ModelArgs) -> Self {
        Self { model, ..Self::default() }
    }
}

impl<A: clap::Args + Into<RawConfig>> Common<A> {
    pub(super) fn validate(self) -> Result<Config, Failure> {
        let file = self.config.as_deref().map(read).transpose()?.unwrap_or_default();
        Ok(self.flags.into().or(file).validate()?)
    }

    /// For a command that uses one model: the first, where a file for the server names several.
    pub(super) fn validate_one(self) -> Result<Config, Failure> {
        let mut config = self.validate()?;
        if let [first, _, ..] = &config.models[..] {
            eprintln!("note: of {} models the first is used, {first}", config.models.len());
        }
        config.models.truncate(1);
        config.aliases.truncate(1);
        (config.memory.models_dir, config.memory.pins) = (None, Vec::new());
        Ok(config)
    }
}

/// A TOML file; relative paths in it begin at its folder.
pub(super) fn read(path: &Path) -> Result<RawConfig, Failure> {
    let mut file = RawConfig::from_file(path)?;
    let folder = path.parent().unwrap_or(path);
    for model in &mut file.model.model {
        *model = source::relative_to(folder, model);
    }
    if let Some(draft) = &mut file.engine.draft_model {
        *draft = source::relative_to(folder, draft);
    }
    for lora in &mut file.lora.lora {
        if let Some((name, path)) = lora.split_once('=') {
            *lora = format!("{name}={}", folder.join(path).display());
        }
    }
    for dirs in &mut file.lora.lora_dir {
        let (model, dir) = dirs.split_once('=').unwrap_or(("", dirs));
        let dir = folder.join(dir).display().to_string();
        *dirs = if model.is_empty() { dir } else { format!("{model}={dir}") };
    }
    if let Some(dir) = &mut file.memory.models_dir {
        *dir = folder.join(&*dir);
    }
    if let Some(dir) = file.server.kv_store.as_mut().filter(|dir| !dir.as_os_str().is_empty()) {
        *dir = folder.join(&*dir);
    }
    for pem in [&mut file.server.tls_cert, &mut file.server.tls_key].into_iter().flatten() {
        *pem = folder.join(&*pem);
    }
    // `none` is no folder.
    let named = file.server.data_dir.as_mut().filter(|dir| dir.as_os_str() != "none");
    if let Some(dir) = named {
        *dir = folder.join(&*dir);
    }
    Ok(file)
}

/// The command, with `HEARTH_THREADS=` as if it were not there, and with several values between
/// commas in the variable of a flag that repeats. On the command line a comma is part of the
/// value: a path may have one.
pub(super) fn without_empty_variables(command: Command) -> Command {
    let command = command.mut_args(|arg| {
        let value = arg.get_env().and_then(env::var_os);
        settled(arg, value.as_deref().map(|value| value.to_string_lossy()).as_deref())
    });
    command.mut_subcommands(without_empty_variables)
}

fn settled(arg: Arg, variable: Option<&str>) -> Arg {
    match variable {
        Some("") => arg.env(None::<&str>),
        // A default, like a variable, gives way to the flag.
        Some(list) if matches!(arg.get_action(), ArgAction::Append) => {
            let values: Vec<String> = list.split(',').map(str::to_owned).collect();
            arg.env(None::<&str>).default_values(values).hide_default_value(true)
        }
        _ => arg,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_separate_in_the_variable_and_not_on_the_command_line() {
        let command = || {
            let arg = Arg::new("model").long("model").env("NO_SUCH_VARIABLE");
            settled(arg.action(ArgAction::Append), Some("a,b"))
        };
        let values = |args: &[&str]| -> Vec<String> {
            let matches = Command::new("x").arg(command()).get_matches_from(args);
            matches.get_many("model").into_iter().flatten().cloned().collect()
        };
        assert_eq!(values(&["x"]), ["a", "b"]);
        assert_eq!(values(&["x", "--model", "c,d.gguf"]), ["c,d.gguf"]);
        assert_eq!(values(&["x", "--model", "c", "--model", "d"]), ["c", "d"]);
    }
}
