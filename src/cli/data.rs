//! `hearth data`: copy a data directory, bring the copy back, clear out what has expired.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};

use super::Failure;
use super::common::read;
use crate::config::data_dir;
use crate::files::{self, Files, Quota};
use crate::store::{self, Store};

#[derive(Clone, Debug, Subcommand)]
pub(super) enum DataCommand {
    /// Copy everything, as it is at one moment, into a new folder. A server may be running.
    Backup {
        /// The folder; it must be empty or not there.
        to: PathBuf,
        #[command(flatten)]
        data: DataDir,
    },
    /// Put a backup in the place of what is there. No server may be running.
    Restore {
        /// A folder that `backup` wrote.
        from: PathBuf,
        #[command(flatten)]
        data: DataDir,
    },
    /// Remove what has expired, and give its space back.
    Gc {
        #[command(flatten)]
        data: DataDir,
    },
}

/// Where the durable state lies.
#[derive(Args, Clone, Debug)]
pub(super) struct DataDir {
    /// Folder for what must outlive the process (default: ~/.local/share/hearth).
    #[arg(long, env = "HEARTH_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// TOML file that may name it.
    #[arg(long, env = "HEARTH_CONFIG")]
    config: Option<PathBuf>,
}

impl DataDir {
    fn path(&self) -> Result<PathBuf, Failure> {
        let file = self.config.as_deref().map(read).transpose()?;
        let named = self.data_dir.clone().or(file.and_then(|file| file.server.data_dir));
        data_dir(named).ok_or_else(|| "--data-dir: nothing is kept in 'none'".into())
    }

    pub(super) fn store(&self) -> Result<Store, Failure> {
        Ok(Store::visit(&self.path()?)?)
    }
}

pub(super) fn run(command: DataCommand) -> Result<(), Failure> {
    match command {
        DataCommand::Backup { to, data } => {
            let store = Arc::new(data.store()?);
            store::backup(&store, &to)?;
            Files::open(store, Quota { project_bytes_max: 0 })?.copy_to(&to)?;
            println!("{}", to.display());
        }
        DataCommand::Restore { from, data } => {
            let folder = data.path()?;
            // Contents first: afterwards the database speaks of them.
            files::restore(&from, &folder)?;
            store::restore(&from, &folder)?;
            println!("{}", folder.display());
        }
        DataCommand::Gc { data } => {
            let store = Arc::new(data.store()?);
            let found = store.gc()?;
            let freed = Files::open(store, Quota { project_bytes_max: 0 })?.gc()?;
            println!("{} expired objects, {} bytes", found.documents, found.bytes + freed);
        }
    }
    Ok(())
}
