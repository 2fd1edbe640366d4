//! `hearth serve`: load, listen, answer, drain.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;

use super::common::Common;
use super::{Failure, open};
use crate::auth::Keyring;
use crate::config::{Config, RawConfig};
use crate::files::{Files, Quota};
use crate::history::History;
use crate::jobs::{self, Batches};
use crate::ledger::Ledger;
use crate::pipeline::{self, Pipeline};
use crate::registry::hub::HubOptions;
use crate::registry::offer::ModelBounds;
use crate::registry::{Kind, builtin};
use crate::server::{self, Rooms, ServerConfig, Tls};
use crate::store::Store;

const DAY_S: u64 = 24 * 3600;
/// Silence on a stream is broken this often.
const HEARTBEAT: Duration = Duration::from_secs(5);

pub(super) fn run(common: Common<RawConfig>) -> Result<(), Failure> {
    let config = common.validate()?;
    open::names(&config)?;
    check_port(&config)?;
    let tls = config.tls.as_ref().map(|(cert, key)| Tls::open(cert, key)).transpose()?;
    let store = Arc::new(open_store(&config)?);
    let keyring = Arc::new(Keyring::new(Arc::clone(&store), &config.api_keys));
    let door = check_door(&config, keyring.is_open()?)?;
    start_log(&config);
    tell(format_args!("hearth {}\n{}", env!("CARGO_PKG_VERSION"), config.describe()));
    tell(format_args!("  keys            {door}"));
    let started = Instant::now();
    let compute = open::compute(&config)?;
    let shelf = open::shelf(&config, &compute, store.identity()?)?;
    let offer = open::offer(&config, &compute, &HubOptions::from_env(), shelf)?;
    tell(format_args!("  memory-budget   {}", budget(&config, offer.budget_bytes)));
    offer.models.iter().for_each(|planned| tell(describe(planned)));
    offer.refused.iter().for_each(|(_, why)| tell(format_args!("  not offered     {why}")));
    let registry = Arc::new(open::serve(&config, offer)?);
    open::watch_loras(&registry, &config)?;
    if registry.card(builtin::NAME).is_ok() {
        tell(format_args!("  {} is {}", builtin::NAME, builtin::NOTICE));
    }
    tell(format_args!("  ready after     {:.2} s", started.elapsed().as_secs_f64()));
    let pipeline = Arc::new(Pipeline::new(Arc::clone(&registry)));
    let quota = Quota { project_bytes_max: config.files_quota_bytes };
    let files = Arc::new(Files::open(Arc::clone(&store), quota)?);
    let lifetime = config.store_days.map(|days| Duration::from_secs(days * DAY_S));
    let history = Arc::new(History::new(Arc::clone(&store)).forgetting(lifetime));
    history.fail_interrupted()?;
    let ledger = Arc::new(Ledger::open(Arc::clone(&store))?);
    let batches = Arc::new(Batches::open(Arc::clone(&store), Arc::clone(&files))?);
    let sweep = jobs::sweep(store, Arc::clone(&files));
    let rooms = Rooms { keyring, history, files, batches, ledger: Arc::clone(&ledger) };
    let drain_timeout = config.drain_timeout;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.threads.clamp(1, 4))
        // Each kind of work has a number of its own, so none waits for threads of another.
        .max_blocking_threads(pipeline::THREADS + server::THREADS + jobs::THREADS)
        .enable_all()
        .build()?;
    drop(runtime.spawn(sweep));
    let stopped = runtime.block_on(listen(config, tls, pipeline, rooms))?;
    if !registry.drain(drain_timeout.saturating_sub(stopped.elapsed())) {
        tracing::warn!("some answers did not finish in time");
    }
    // Prompts that are still being encoded are nobody's any more. What was used is told by whoever
    // worked for it, at the latest when that is dropped.
    runtime.shutdown_timeout(LAST_WORDS);
    ledger.flush();
    Ok(())
}

/// For what is cut off to say what it used.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Open files for more connections than clients of one machine have any use for.
const FILES_MAX: u64 = 1 << 15;

/// Tells the operator. A full disk or a closed terminal is no reason to stop.
fn tell(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Answers until a signal comes and answers are finished; returns when the signal came.
async fn listen(
    config: Config,
    tls: Option<Tls>,
    pipeline: Arc<Pipeline>,
    rooms: Rooms,
) -> Result<Instant, Failure> {
    let listener =
        TcpListener::bind(config.address()).await.map_err(|e| cannot_listen(&config, &e))?;
    let url = config.base_url(listener.local_addr()?);
    let key = if rooms.keyring.is_open()? { "any key" } else { "one of its keys" };
    tell(format_args!("  OpenAI clients  base_url {url}/v1 with {key}"));
    let connections_max = connections();
    tell(format_args!(
        "  connections     {connections_max} at once (half of the files that it may open), three \
         quarters of them from one address"
    ));
    // Who started it may read no further.
    let _ = writeln!(io::stdout(), "listening on {url}");
    let server = ServerConfig {
        tls,
        connections_max,
        cors_origins: config.cors_origins,
        body_limit_bytes: config.body_limit_bytes,
        send_timeout: config.send_timeout,
        lenient_fields: config.lenient_fields,
        heartbeat: HEARTBEAT,
        drain_timeout: config.drain_timeout,
        ..ServerConfig::default()
    };
    let (told, tells) = tokio::sync::oneshot::channel();
    let shutdown = async move {
        stop_signal().await;
        let _ = told.send(Instant::now()); // nobody asks when the listener failed
        tokio::spawn(async {
            stop_signal().await;
            std::process::exit(130); // asked twice: now
        });
    };
    server::serve(server, pipeline, rooms, listener, shutdown).await;
    Ok(tells.await.unwrap_or_else(|_| Instant::now()))
}

/// Connections for which there are files enough: half of those that the process may open, once it
/// has asked for as many as the system grants (shells hand out 1,024, for programs that count them
/// in a fixed set). The others are for the disk.
fn connections() -> usize {
    let mut files = getrlimit(Resource::Nofile);
    let wanted = files.maximum.map_or(FILES_MAX, |most| most.min(FILES_MAX));
    let more = Rlimit { current: Some(wanted), ..files };
    if files.current.is_some_and(|now| now < wanted) && setrlimit(Resource::Nofile, more).is_ok() {
        files = more;
    }
    let files = files.current.map_or(FILES_MAX, |now| now.min(FILES_MAX));
    usize::try_from(files / 2).map_or(1, |most| most.max(1))
}

fn open_store(config: &Config) -> Result<Store, Failure> {
    Ok(match &config.data_dir {
        Some(folder) => Store::open(folder)?,
        None => Store::in_memory()?,
    })
}

/// Who may ask, in a line.
///
/// # Errors
/// Other machines could, without any key, and nobody said that they should.
fn check_door(config: &Config, open: bool) -> Result<&'static str, Failure> {
    match (open, config.host.is_loopback(), config.insecure) {
        (false, ..) => Ok("one is asked for"),
        (true, true, _) => Ok("none: open to every program on this machine (see `hearth keys`)"),
        (true, false, true) => Ok("none: OPEN TO EVERY MACHINE that reaches this one"),
        (true, false, false) => Err(format!(
            "--host {} would serve other machines without asking for a key; make one with `hearth \
             keys create`, set --api-key, or say --insecure",
            config.host
        )
        .into()),
    }
}

/// Before a model is loaded, which may take minutes: whether its port can be had at all.
fn check_port(config: &Config) -> Result<(), Failure> {
    let bound = std::net::TcpListener::bind(config.address());
    bound.map(drop).map_err(|e| cannot_listen(config, &e).into())
}

fn cannot_listen(config: &Config, error: &io::Error) -> String {
    let address = config.address();
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => "; choose another --port, or 0 for any that is free",
        io::ErrorKind::PermissionDenied => "; choose a --port above 1023",
        io::ErrorKind::AddrNotAvailable => "; --host must be an address of this machine",
        _ => "",
    };
    format!("cannot listen on {address}: {error}{hint}")
}

/// Ctrl-C, or what a service manager sends.
async fn stop_signal() {
    // Where a signal cannot be waited for, only the end of the process stops the server.
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    };
    #[cfg(unix)]
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}

/// What models may take together, and who said so.
fn budget(config: &Config, bytes: Option<u64>) -> String {
    let source = match config.memory.budget_bytes {
        Some(_) => "as told",
        None => "what is free, less a reserve",
    };
    bytes.map_or("none: the system does not tell".to_owned(), |bytes| {
        format!("{} MB for all models ({source})", bytes >> 20)
    })
}

fn describe(planned: &open::Planned) -> String {
    let model = &planned.offered;
    let what = match (&model.bounds, model.kind) {
        (ModelBounds::Text(limits), _) => format!(
            "context {} tokens, KV for {} tokens, {} at once",
            limits.context_len,
            limits.kv_blocks * limits.block_len,
            limits.running_len
        ),
        (_, Kind::Embedding { context_len, vector_len }) => {
            format!("embeds: {vector_len} numbers, texts of up to {context_len} tokens")
        }
        (_, Kind::Text { context_len }) => format!("context {context_len} tokens"),
    };
    let mb = model.bytes.div_ceil(1 << 20);
    format!("  serving         {} ({what}; {mb} MB, {})", model.id, planned.when())
}

/// Logs go to standard error; `RUST_LOG` sets what is shown.
fn start_log(config: &Config) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Colours are for people: none in a file or a journal.
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // They would be told on stderr too, and a failure there is a panic.
        .log_internal_errors(false)
        .with_ansi(colours);
    match config.log_json {
        true => log.json().init(),
        false => log.init(),
    }
}
