//! `hearth keys`: make, list and revoke the API keys of a data directory. A running server sees it
//! within a second.

use std::io::{self, Write};

use clap::{Args, Subcommand};
use jiff::{Span, Timestamp, Zoned};

use super::Failure;
use super::data::DataDir;
use crate::auth::admin;
use crate::auth::{KeyRow, NewKey};

#[derive(Clone, Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Make a key and print it; it is shown this once and never again.
    Create(CreateArgs),
    /// Show every key that ever was, without the keys themselves.
    List {
        #[command(flatten)]
        data: DataDir,
    },
    /// Shut a key out.
    Revoke {
        /// Its id (`key_3`), or its name where that is unique.
        key: String,
        #[command(flatten)]
        data: DataDir,
    },
}

#[derive(Args, Clone, Debug)]
pub(super) struct CreateArgs {
    /// Name, for lists.
    #[arg(long)]
    name: String,
    /// Project whose files, conversations and stored answers the key sees.
    #[arg(long, default_value = "default")]
    project: String,
    /// Let it manage keys over the API too.
    #[arg(long)]
    admin: bool,
    /// Share of the machine beside other keys that want it too.
    #[arg(long, default_value_t = 1)]
    weight: u32,
    /// Requests that run at once, unread ones too; more wait (default: as many as the server runs).
    #[arg(long)]
    max_running: Option<u32>,
    /// Requests in a minute (default: no limit).
    #[arg(long)]
    requests_per_min: Option<u32>,
    /// Tokens in a minute, of prompts and answers together (default: no limit).
    #[arg(long)]
    tokens_per_min: Option<u32>,
    /// Seconds that a request for an answer may wait to be begun (default: as the server has it).
    #[arg(long)]
    queue_timeout_s: Option<u32>,
    /// Time until it opens nothing any more: `12h`, `30d`, `1y` (default: never).
    #[arg(long)]
    expires: Option<Span>,
    #[command(flatten)]
    data: DataDir,
}

pub(super) fn run(command: KeysCommand) -> Result<(), Failure> {
    let out = &mut io::stdout().lock();
    match command {
        KeysCommand::Create(args) => create(out, args),
        KeysCommand::List { data } => list(out, &data),
        KeysCommand::Revoke { key, data } => {
            let row = admin::revoke(&data.store()?, &key)?;
            writeln!(out, "revoked {} {}", admin::id_of(&row), row.key.name)?;
            Ok(())
        }
    }
}

fn create(out: &mut impl Write, args: CreateArgs) -> Result<(), Failure> {
    let store = args.data.store()?;
    let expires_s = match args.expires {
        None => None,
        Some(span) => Some(u64::try_from(Zoned::now().checked_add(span)?.timestamp().as_second())?),
    };
    let new = NewKey {
        name: args.name,
        project: args.project,
        admin: args.admin,
        weight: args.weight,
        max_running: args.max_running,
        requests_per_min: args.requests_per_min,
        tokens_per_min: args.tokens_per_min,
        queue_timeout_s: args.queue_timeout_s,
        expires_s,
    };
    let created = admin::create(&store, &new)?;
    // The key alone goes to standard output, so that a script can take it.
    eprintln!("{} of project {}; it is not shown again:", admin::id_of(&created.row), new.project);
    writeln!(out, "{}", created.secret)?;
    Ok(())
}

fn list(out: &mut impl Write, data: &DataDir) -> Result<(), Failure> {
    let rows = admin::list(&data.store()?)?;
    writeln!(
        out,
        "{:<8} {:<20} {:<14} {:<6} {:<7} {:>7} {:>8} {:>9} {:>11} {:<8} state",
        "id",
        "name",
        "project",
        "ends",
        "role",
        "weight",
        "at once",
        "req/min",
        "tokens/min",
        "waits s"
    )?;
    for row in &rows {
        let KeyRow { hint, key, .. } = row;
        let limit = |limit: Option<u32>| limit.map_or("-".to_owned(), |n| n.to_string());
        writeln!(
            out,
            "{:<8} {:<20} {:<14} {:<6} {:<7} {:>7} {:>8} {:>9} {:>11} {:<8} {}",
            admin::id_of(row),
            key.name,
            key.project,
            hint,
            if key.admin { "admin" } else { "user" },
            key.weight,
            limit(key.max_running),
            limit(key.requests_per_min),
            limit(key.tokens_per_min),
            limit(key.queue_timeout_s),
            state(row)?
        )?;
    }
    Ok(())
}

fn state(row: &KeyRow) -> Result<String, Failure> {
    let at = |at_s: u64| Ok::<_, Failure>(Timestamp::from_second(i64::try_from(at_s)?)?);
    Ok(match (row.revoked_s, row.key.expires_s) {
        (Some(revoked_s), _) => format!("revoked {}", at(revoked_s)?),
        (None, Some(s)) if at(s)? <= Timestamp::now() => format!("expired {}", at(s)?),
        (None, Some(expires_s)) => format!("until {}", at(expires_s)?),
        (None, None) => "open".to_owned(),
    })
}
