//! `hearth chat` and `hearth complete`: the pipeline without the server.

use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::common::Common;
use super::{Failure, open};
use crate::config::{EngineArgs, LoraArgs, ModelArgs, RawConfig};
use crate::pipeline::{Pipeline, Prompt, TextEvent, TextRequest};
use crate::registry::{Registry, Weighted};
use crate::types::{SamplingOverrides, Tenant, Timings, Usage};

#[derive(Clone, Debug, clap::Args)]
pub(super) struct ChatArgs {
    /// What the assistant is told before the conversation.
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    common: Common<TalkArgs>,
}

#[derive(Clone, Debug, clap::Args)]
pub(super) struct CompleteArgs {
    /// Text to continue; standard input when absent.
    prompt: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    common: Common<TalkArgs>,
}

/// Flags of a model that answers one request at a time.
#[derive(Clone, Debug, clap::Args)]
struct TalkArgs {
    /// LoRA adapter that the model runs with, as `ID=PATH` (a PEFT folder or a GGUF file); repeat
    /// to add several up.
    #[arg(long)]
    lora: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

impl From<TalkArgs> for RawConfig {
    fn from(TalkArgs { lora, model, engine }: TalkArgs) -> Self {
        Self { model, engine, lora: LoraArgs { lora, ..LoraArgs::default() }, ..Self::default() }
    }
}

#[derive(Clone, Debug, clap::Args)]
struct SamplingArgs {
    /// Tokens of the answer at most.
    #[arg(long, short = 'n')]
    max_tokens: Option<usize>,
    /// 0 is greedy (0 to 2).
    #[arg(long, allow_negative_numbers = true, value_parser = super::within::<0, 2>)]
    temperature: Option<f32>,
    /// Keep the smallest set of tokens with at least this probability (0 to 1).
    #[arg(long, allow_negative_numbers = true, value_parser = super::within::<0, 1>)]
    top_p: Option<f32>,
    /// Keep this many tokens.
    #[arg(long)]
    top_k: Option<usize>,
    /// Same seed, same text.
    #[arg(long)]
    seed: Option<u64>,
}

impl SamplingArgs {
    fn request(&self, model: &str, prompt: Prompt) -> TextRequest {
        TextRequest {
            max_tokens: self.max_tokens,
            sampling: SamplingOverrides {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                seed: self.seed,
                ..SamplingOverrides::default()
            },
            ..TextRequest::new(model, prompt)
        }
    }
}

/// A conversation, line by line, until the end of input.
pub(super) fn chat(args: ChatArgs) -> Result<(), Failure> {
    let session = Session::open(args.common)?;
    if !session.has_template()? {
        let model = &session.model;
        return Err(format!("{model} has no chat template; `hearth complete` runs it").into());
    }
    let mut messages: Vec<Value> = Vec::new();
    messages.extend(args.system.map(|text| json!({"role": "system", "content": text})));
    let terminal = io::stdin().is_terminal();
    for line in lines(terminal) {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        messages.push(json!({"role": "user", "content": line}));
        let prompt =
            Prompt::Chat { messages: Value::Array(messages.clone()), template_kwargs: Map::new() };
        match session.print(args.sampling.request(&session.model, prompt), terminal) {
            Ok(answer) => messages.push(json!({"role": "assistant", "content": answer})),
            Err(error) if terminal => {
                eprintln!("error: {error}");
                messages.pop();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// One text.
pub(super) fn complete(args: CompleteArgs) -> Result<(), Failure> {
    let text = match args.prompt {
        Some(text) => text,
        None => io::read_to_string(io::stdin())?,
    };
    let session = Session::open(args.common)?;
    let request = args.sampling.request(&session.model, Prompt::Text(text));
    session.print(request, false)?;
    Ok(())
}

/// Lines of standard input, with a prompt before each on a terminal.
fn lines(terminal: bool) -> impl Iterator<Item = io::Result<String>> {
    let mut lines = io::stdin().lock().lines();
    std::iter::from_fn(move || {
        if terminal {
            eprint!("> ");
        }
        lines.next()
    })
}

struct Session {
    pipeline: Pipeline,
    registry: Arc<Registry>,
    model: String,
    adapters: Vec<Weighted>,
    runtime: tokio::runtime::Runtime,
}

impl Session {
    fn open(common: Common<TalkArgs>) -> Result<Self, Failure> {
        let mut config = common.validate_one()?;
        // Nobody else asks, and memory is taken for what is asked.
        (config.plan.running_len, config.plan.queue_len) = (1, 1);
        config.plan.kv_prefault = false; // the file may be a server's
        let registry = Arc::new(open::models(&config)?);
        let model = registry.cards().next().map(|card| card.id.clone()).unwrap_or_default();
        let adapters =
            config.loras.iter().map(|(_, id, _)| Weighted { id: id.clone(), weight: 1.0 });
        let adapters = adapters.collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let pipeline = Pipeline::new(Arc::clone(&registry));
        Ok(Self { pipeline, registry, model, adapters, runtime })
    }

    fn has_template(&self) -> Result<bool, Failure> {
        let model =
            self.runtime.block_on(self.pipeline.model(&self.model, Tenant::default(), None))?;
        Ok(model.template().is_some())
    }

    /// Streams an answer to standard output and returns it.
    fn print(&self, request: TextRequest, show_speed: bool) -> Result<String, Failure> {
        let mut answer = String::new();
        let (usage, timings) = self.runtime.block_on(async {
            let request = TextRequest { adapters: self.adapters.clone(), ..request };
            let mut stream = self.pipeline.generate(request).await?;
            let mut end = Default::default();
            while let Some(event) = stream.next().await {
                match event? {
                    TextEvent::Delta { text, .. } => {
                        write!(io::stdout(), "{text}")?;
                        io::stdout().flush()?;
                        answer.push_str(&text);
                    }
                    TextEvent::Reasoning { text, .. } => {
                        write!(io::stdout(), "{text}")?;
                        io::stdout().flush()?;
                    }
                    // Only a request with tools has them.
                    TextEvent::ToolCall { .. } | TextEvent::ToolArguments { .. } => {}
                    // Nobody asked for numbers.
                    TextEvent::Echo { .. }
                    | TextEvent::Prompt { .. }
                    | TextEvent::Tokens { .. } => {}
                    TextEvent::Finished { usage, timings, .. } => end = (usage, timings),
                }
            }
            Ok::<(Usage, Timings), Failure>(end)
        })?;
        writeln!(io::stdout())?;
        if show_speed {
            eprintln!("{}", speed(usage, timings));
        }
        Ok(answer)
    }
}

/// The first token belongs to the prefill, so one alone has no speed.
fn speed(usage: Usage, timings: Timings) -> String {
    let prompt = format!("{} prompt tokens in {:.0} ms", usage.prompt, timings.prefill_ms);
    match usage.completion {
        0 | 1 => format!("[{prompt}, {} token]", usage.completion),
        n => format!("[{prompt}, {n} tokens at {:.1}/s]", (n - 1) as f64 / timings.decode_ms * 1e3),
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.registry.drain(Duration::from_secs(1));
    }
}
