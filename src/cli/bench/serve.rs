//! `hearth bench serve`: load on a server that speaks the OpenAI API, and what it felt like.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::Failure;
use crate::loadtest::{
    self, Extent, Measurement, Point, Pressure, Progress, Prompts, Report, Server, Slo,
};

/// Pressure of a run that names none.
const CLIENTS: usize = 8;
/// Length of a measurement that names none.
const DURATION: Duration = Duration::from_secs(30);
/// Words of the two questions that find out how many tokens a word has.
const SAMPLE_WORDS: [usize; 2] = [16, 96];

#[derive(Clone, Debug, clap::Args)]
pub(super) struct ServeArgs {
    /// Base URL, as OpenAI clients take it.
    #[arg(long, default_value = "http://127.0.0.1:8080/v1")]
    url: String,
    /// Model to ask (default: the first that the server lists).
    #[arg(long, short = 'm')]
    model: Option<String>,
    /// Key to send.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Closed loop: clients that ask again when they have their answer; several numbers between
    /// commas are measured one after the other (default: 8).
    #[arg(long, value_delimiter = ',', value_parser = clients)]
    clients: Vec<usize>,
    /// Closed loop: seconds that a client thinks before each question, its first too; on average,
    /// exponentially distributed (default: it asks again at once).
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["rate", "requests"],
        value_parser = seconds)]
    think: Option<Duration>,
    /// Closed loop: seconds between the first question of a client and that of the next (default:
    /// all begin at once).
    #[arg(long, value_name = "SECONDS", conflicts_with = "rate", value_parser = seconds)]
    stagger: Option<Duration>,
    /// Open loop: requests a second at random moments (Poisson), whether or not the server keeps
    /// up; several between commas are measured one after the other.
    #[arg(long, value_delimiter = ',', conflicts_with = "clients", value_parser = rate)]
    rate: Vec<f64>,
    /// Ask this many times in each measurement.
    #[arg(long, conflicts_with = "duration", value_parser = count)]
    requests: Option<usize>,
    /// Ask for this many seconds in each measurement; answers that run are waited for
    /// (default: 30).
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    duration: Option<Duration>,
    /// Prompts to ask in turn: one JSON object a line, with `prompt` or `messages`, and
    /// `max_tokens` where it differs (default: made-up words, every prompt another).
    #[arg(long, value_name = "FILE.jsonl", conflicts_with = "prompt_tokens")]
    prompts: Option<PathBuf>,
    /// Tokens of a made-up prompt, about; the server's own count says how many words that is.
    #[arg(long, default_value_t = 200, value_parser = count)]
    prompt_tokens: usize,
    /// Tokens of an answer at most.
    #[arg(long, short = 'n', default_value_t = 64, value_parser = count)]
    max_tokens: usize,
    /// Let no token end an answer earlier: an extension that Hearth and some others have.
    #[arg(long)]
    ignore_eos: bool,
    /// Ask /completions instead of /chat/completions: for models without a chat template.
    #[arg(long)]
    completions: bool,
    /// A request counts as good only with its first token within this many milliseconds.
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    slo_ttft: Option<f64>,
    /// ... and with this many milliseconds a token after it on average.
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    slo_itl: Option<f64>,
    /// Seconds after which a request is given up.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    timeout: Duration,
    /// Same seed, same prompts and same moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write all figures as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the curves as a page that stands alone.
    #[arg(long, value_name = "FILE.html")]
    plot: Option<PathBuf>,
}

fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number, at least 1".to_owned()),
        Ok(number) => Ok(number),
    }
}

fn clients(text: &str) -> Result<usize, String> {
    match count(text)? {
        number if number <= 2048 => Ok(number),
        _ => Err("expected at most 2048".to_owned()),
    }
}

fn positive(text: &str, max: f64) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= max => Ok(number),
        _ => Err(format!("expected a number above 0, at most {max}")),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    positive(text, 10_000.0)
}

fn milliseconds(text: &str) -> Result<f64, String> {
    positive(text, 1e9)
}

fn seconds(text: &str) -> Result<Duration, String> {
    positive(text, 1e6).map(Duration::from_secs_f64)
}

pub(super) fn run(args: ServeArgs) -> Result<(), Failure> {
    let mut server = Server::new(&args.url, args.api_key.as_deref(), args.timeout)?;
    server.ignore_eos = args.ignore_eos;
    server.completions = args.completions;
    server.model = match &args.model {
        Some(model) => model.clone(),
        None => {
            let first = server.models()?.into_iter().next();
            first
                .ok_or_else(|| format!("{} lists no model; name one with --model", server.url()))?
        }
    };
    let prompts = prompts(&args, &mut server)?;
    let slo = Slo { ttft_ms: args.slo_ttft, itl_ms: args.slo_itl };
    let mut report = Report::new(&server, slo);
    report.think_s = args.think.map(|think| think.as_secs_f64());
    report.stagger_s = args.stagger.map(|stagger| stagger.as_secs_f64());
    let thought = report.think_s.map(|s| format!(", clients think {s} s")).unwrap_or_default();
    let out = &mut io::stdout().lock();
    let apart = report.stagger_s.map(|s| format!(", they begin {s} s apart")).unwrap_or_default();
    writeln!(out, "{} at {}{thought}{apart}", report.model, report.url)?;
    let mut first_prompt = 0;
    for (index, pressure) in args.pressures().into_iter().enumerate() {
        let bar = bar(pressure);
        let show = |progress: Progress| {
            bar.set_position((progress.share * 1e3) as u64);
            bar.set_message(format!("{} answered, {} failed", progress.answered, progress.failed));
        };
        let measured = Measurement {
            server: &server,
            prompts: &prompts,
            first_prompt,
            pressure,
            extent: args.extent(),
            think: args.think.unwrap_or_default(),
            stagger: args.stagger.unwrap_or_default(),
            seed: args.seed.wrapping_add(index as u64),
            progress: &show,
        }
        .run();
        bar.finish_and_clear();
        let (records, wall_s) = measured?;
        first_prompt += records.len();
        let point = Point::of(pressure, &records, wall_s, &slo);
        writeln!(out, "\n{point}")?;
        report.points.push(point);
        // After each: a run that is broken off leaves what it has.
        args.write(&report)?;
    }
    match report.points.iter().any(|point| point.answered > 0) {
        true => Ok(()),
        false => Err("no request was answered".into()),
    }
}

impl ServeArgs {
    fn pressures(&self) -> Vec<Pressure> {
        match (&self.clients[..], &self.rate[..]) {
            ([], []) => vec![Pressure::Clients(CLIENTS)],
            (clients, []) => clients.iter().copied().map(Pressure::Clients).collect(),
            (_, rates) => rates.iter().copied().map(Pressure::Rate).collect(),
        }
    }

    fn extent(&self) -> Extent {
        let duration = Extent::Duration(self.duration.unwrap_or(DURATION));
        self.requests.map_or(duration, Extent::Requests)
    }

    fn write(&self, report: &Report) -> Result<(), Failure> {
        let write = |path: &PathBuf, text: String| {
            fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
        };
        if let Some(path) = &self.json {
            write(path, serde_json::to_string_pretty(report)? + "\n")?;
        }
        if let Some(path) = &self.plot {
            write(path, loadtest::html(report))?;
        }
        Ok(())
    }
}

/// What will be asked. One request goes ahead in any case, so that a wrong key, model or file is
/// an error at once and not a table of them; made-up prompts need two, to learn how many tokens the
/// server counts for a word.
fn prompts(args: &ServeArgs, server: &mut Server) -> Result<Prompts, Failure> {
    if let Some(path) = &args.prompts {
        let prompts = Prompts::read(path)?;
        let is_chat =
            |prompt: &loadtest::Prompt| matches!(prompt.content, loadtest::Content::Messages(_));
        if let Prompts::Listed(listed) = &prompts
            && args.completions
            && listed.iter().any(is_chat)
        {
            return Err("--completions asks with texts, and --prompts has `messages`".into());
        }
        server.max_tokens = args.max_tokens;
        server.probe(&prompts.get(0))?;
        return Ok(prompts);
    }
    // What is asked here is asked with another seed than what is measured.
    let seed = !args.seed;
    server.max_tokens = 1;
    let mut counts = [0.0; 2];
    for (count, words) in counts.iter_mut().zip(SAMPLE_WORDS) {
        let record = server.probe(&Prompts::Synthetic { words, seed }.get(words))?;
        let told = record.prompt_tokens.ok_or_else(|| {
            format!("{} counts no tokens (usage), so prompts need --prompts", server.url())
        })?;
        *count = told as f64;
    }
    let span = (SAMPLE_WORDS[1] - SAMPLE_WORDS[0]) as f64;
    let of_word = ((counts[1] - counts[0]) / span).max(0.1);
    let more = (args.prompt_tokens as f64 - counts[0]) / of_word;
    let words = (SAMPLE_WORDS[0] as f64 + more).round().max(1.0) as usize;
    server.max_tokens = args.max_tokens;
    Ok(Prompts::Synthetic { words, seed: args.seed })
}

/// In thousandths of the work.
fn bar(pressure: Pressure) -> ProgressBar {
    let name = match pressure {
        Pressure::Clients(clients) => format!("{clients} clients"),
        Pressure::Rate(rate) => format!("{rate} requests/s"),
    };
    let style = ProgressStyle::with_template("  {prefix} {bar:32} {percent} % {eta} {msg}");
    let style = style.expect("the template is fixed; this is a bug");
    ProgressBar::new(1000).with_style(style).with_prefix(name)
}
