//! `/metrics`: what the engines count, and what the server itself sees of time and statuses.
//!
//! Engine numbers are read from their counters at the moment of the scrape, labelled by model, so
//! they are never copied and never stale. Text format: OpenMetrics, which Prometheus reads.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::embeddings::EmbeddingModel;
use crate::pipeline::Pipeline;
use crate::registry::{Loaded, ServedModel, Standing, State};

/// What goes with [`Metrics::encode`].
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The server's own measurements, and the door to the engines'.
pub(super) struct Metrics {
    registry: Registry,
    first_token_s: Family<ByModel, Histogram, fn() -> Histogram>,
    inter_token_s: Family<ByModel, Histogram, fn() -> Histogram>,
    request_s: Family<ByModel, Histogram, fn() -> Histogram>,
    responses: Family<ByRoute, Counter>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByModel {
    model: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByRoute {
    route: String,
    status: u16,
}

/// Upper bounds in seconds: fine enough for fast decoding, long enough for a long prompt on a CPU.
const FAST_S: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const SLOW_S: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];

impl Metrics {
    pub(super) fn new(pipeline: Arc<Pipeline>) -> Self {
        let fast: fn() -> Histogram = || Histogram::new(FAST_S);
        let slow: fn() -> Histogram = || Histogram::new(SLOW_S);
        let first_token_s = Family::new_with_constructor(slow);
        let inter_token_s = Family::new_with_constructor(fast);
        let request_s = Family::new_with_constructor(slow);
        let responses = Family::default();
        let mut registry = Registry::with_prefix("hearth");
        registry.register(
            "time_to_first_token_seconds",
            "From the arrival of a request to its first text",
            first_token_s.clone(),
        );
        registry.register(
            "inter_token_seconds",
            "Between two pieces of text of one choice",
            inter_token_s.clone(),
        );
        registry.register(
            "request_seconds",
            "From the arrival of a request for text to the end of its answer",
            request_s.clone(),
        );
        registry.register(
            "http_responses",
            "Answers by route and status; 499 is a client that left before one",
            responses.clone(),
        );
        registry.register_collector(Box::new(Engines(pipeline)));
        Self { registry, first_token_s, inter_token_s, request_s, responses }
    }

    pub(super) fn first_token(&self, model: &str, wait: Duration) {
        observe(&self.first_token_s, model, wait);
    }

    pub(super) fn inter_token(&self, model: &str, gap: Duration) {
        observe(&self.inter_token_s, model, gap);
    }

    pub(super) fn request(&self, model: &str, took: Duration) {
        observe(&self.request_s, model, took);
    }

    pub(super) fn response(&self, route: &str, status: u16) {
        self.responses.get_or_create(&ByRoute { route: route.to_owned(), status }).inc();
    }

    /// Everything, as text.
    pub(super) fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

fn observe(family: &Family<ByModel, Histogram, fn() -> Histogram>, model: &str, time: Duration) {
    family.get_or_create(&ByModel { model: model.to_owned() }).observe(time.as_secs_f64());
}

/// One number of a model. Counters get their `_total` from the encoder.
struct ModelMetric<M> {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    read: fn(&M) -> u64,
}

const fn gauge<M>(name: &'static str, help: &'static str, read: fn(&M) -> u64) -> ModelMetric<M> {
    ModelMetric { name, help, kind: MetricType::Gauge, read }
}

const fn counter<M>(name: &'static str, help: &'static str, read: fn(&M) -> u64) -> ModelMetric<M> {
    ModelMetric { name, help, kind: MetricType::Counter, read }
}

const ENGINE_METRICS: [ModelMetric<ServedModel>; 29] = [
    gauge("requests_running", "Sequences admitted and not finished", |m| {
        m.engine().stats().running.load(Ordering::Relaxed) as u64
    }),
    gauge(
        "requests_aside",
        "Sequences of these that stand still, their clients not reading",
        |m| m.engine().stats().aside.load(Ordering::Relaxed) as u64,
    ),
    gauge(
        "requests_unread",
        "Sequences that take a place in the queue until their clients read: aside, or over",
        |m| m.engine().stats().unread.load(Ordering::Relaxed) as u64,
    ),
    gauge("requests_waiting", "Sequences submitted and not yet admitted", |m| {
        m.engine().stats().waiting.load(Ordering::Relaxed) as u64
    }),
    gauge("kv_blocks_used", "KV blocks held by sequences", |m| {
        m.engine().stats().kv_blocks_used.load(Ordering::Relaxed) as u64
    }),
    gauge("kv_blocks_total", "KV blocks there are", |m| m.engine().limits().kv_blocks as u64),
    gauge("kv_blocks_cached", "KV blocks that nobody holds and the prefix cache remembers", |m| {
        m.engine().stats().kv_blocks_cached.load(Ordering::Relaxed) as u64
    }),
    counter("prefix_cache_hits", "Prompts that began with something cached", |m| {
        m.engine().stats().prefix_hits.load(Ordering::Relaxed)
    }),
    counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache", |m| {
        m.engine().stats().prefix_hit_tokens.load(Ordering::Relaxed)
    }),
    counter("prefix_cache_evictions", "KV blocks that the prefix cache had to forget", |m| {
        m.engine().stats().prefix_evictions.load(Ordering::Relaxed)
    }),
    gauge(
        "kv_store_waiting_blocks",
        "KV blocks worth a file in --kv-store that are not written and flushed",
        |m| m.engine().stats().kv_waiting() as u64,
    ),
    counter("kv_store_spilled_blocks", "KV blocks written to --kv-store", |m| {
        m.engine().stats().kv_spilled.load(Ordering::Relaxed)
    }),
    counter("kv_store_reloaded_blocks", "KV blocks that came back from it", |m| {
        m.engine().stats().kv_reloaded.load(Ordering::Relaxed)
    }),
    counter(
        "kv_store_dropped_blocks",
        "KV blocks not written: too many at once, or a pause",
        |m| m.engine().stats().kv_dropped.load(Ordering::Relaxed),
    ),
    counter("kv_store_failures", "KV blocks that could not be written", |m| {
        m.engine().stats().kv_spill_failures.load(Ordering::Relaxed)
    }),
    counter("kv_store_corrupt_blocks", "Files that were not what they should be, removed", |m| {
        m.engine().stats().kv_corrupt.load(Ordering::Relaxed)
    }),
    gauge("kv_store_bytes", "Bytes that the model has in --kv-store", |m| {
        let bytes = m.engine().stats().kv_store_bytes.get();
        bytes.map_or(0, |bytes| bytes.load(Ordering::Relaxed))
    }),
    counter("requests", "Sequences ever submitted", |m| {
        m.engine().stats().requests.load(Ordering::Relaxed)
    }),
    counter("prompt_tokens", "Tokens of the prompts admitted", |m| {
        m.engine().stats().prompt_tokens.load(Ordering::Relaxed)
    }),
    counter("computed_tokens", "Rows of all forward passes", |m| {
        m.engine().stats().computed_tokens.load(Ordering::Relaxed)
    }),
    counter("generated_tokens", "Tokens generated", |m| {
        m.engine().stats().generated_tokens.load(Ordering::Relaxed)
    }),
    counter("proposed_tokens", "Tokens of answers computed before they were chosen", |m| {
        m.engine().stats().proposed_tokens.load(Ordering::Relaxed)
    }),
    counter("accepted_tokens", "Proposed tokens that were right", |m| {
        m.engine().stats().accepted_tokens.load(Ordering::Relaxed)
    }),
    counter("steps", "Forward passes", |m| m.engine().stats().steps.load(Ordering::Relaxed)),
    counter("preemptions", "Sequences whose blocks were taken and computed again", |m| {
        m.engine().stats().preemptions.load(Ordering::Relaxed)
    }),
    counter("interjections", "Passes of newcomers' prompts alone, before the others'", |m| {
        m.engine().stats().interjected.load(Ordering::Relaxed)
    }),
    counter("cancelled", "Sequences whose client went away", |m| {
        m.engine().stats().cancelled.load(Ordering::Relaxed)
    }),
    counter("expired", "Sequences that waited too long and were not begun", |m| {
        m.engine().stats().expired.load(Ordering::Relaxed)
    }),
    counter("failures", "Batches that failed", |m| {
        m.engine().stats().failures.load(Ordering::Relaxed)
    }),
];

/// Of models of which it is known.
const ESTIMATES: [ModelMetric<ServedModel>; 1] = [gauge(
    "estimated_wait_ms",
    "How long a request would wait that came behind all others",
    |m| m.engine().estimated_wait().unwrap_or_default().as_millis() as u64,
)];

const EMBEDDING_METRICS: [ModelMetric<EmbeddingModel>; 6] = [
    gauge("embedding_requests_waiting", "Requests submitted and not yet answered", |m| {
        m.queue().stats().waiting.load(Ordering::Relaxed) as u64
    }),
    counter("embedding_texts", "Texts embedded", |m| {
        m.queue().stats().texts.load(Ordering::Relaxed)
    }),
    counter("embedding_tokens", "Rows of all passes of the encoder", |m| {
        m.queue().stats().computed_tokens.load(Ordering::Relaxed)
    }),
    counter("embedding_passes", "Forward passes of the encoder", |m| {
        m.queue().stats().passes.load(Ordering::Relaxed)
    }),
    counter("embedding_cancelled", "Requests whose client went away", |m| {
        m.queue().stats().cancelled.load(Ordering::Relaxed)
    }),
    counter("embedding_failures", "Passes that failed", |m| {
        m.queue().stats().failures.load(Ordering::Relaxed)
    }),
];

const STANDING_METRICS: [ModelMetric<Standing>; 9] = [
    gauge("model_requests_held", "Requests that hold a model in memory", |m| m.held as u64),
    gauge("model_requests_waiting", "Requests that wait until a model is in memory", |m| {
        m.waiting as u64
    }),
    gauge(
        "model_resident_bytes",
        "What a model in memory may take: weights, working memory, keys and values",
        |m| if m.state == State::Unloaded { 0 } else { m.bytes },
    ),
    counter("model_loads", "Times a model came into memory", |m| m.counts.loads),
    counter("model_load_failures", "Times it could not", |m| m.counts.failures),
    counter("model_load_milliseconds", "Time that loads took", |m| {
        m.counts.load_time.as_millis() as u64
    }),
    counter("model_evictions", "Times a model left because another needed the room", |m| {
        m.counts.evicted
    }),
    counter("model_idle_unloads", "Times a model left because nobody asked for it", |m| {
        m.counts.idle
    }),
    counter("model_asked_unloads", "Times a model left because the operator wanted it so", |m| {
        m.counts.asked
    }),
];

/// Reads every served model at every scrape.
struct Engines(Arc<Pipeline>);

impl fmt::Debug for Engines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Engines")
    }
}

impl Collector for Engines {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let registry = self.0.registry();
        let (mut models, mut embedders) = (Vec::new(), Vec::new());
        for loaded in registry.loaded() {
            match loaded {
                Loaded::Text(model) => models.push(model),
                Loaded::Embedding(model) => embedders.push(model),
            }
        }
        let standings: Vec<_> = registry.standings().into_iter().map(Arc::new).collect();
        states(&mut encoder, &standings)?;
        read_all(&mut encoder, &STANDING_METRICS, &standings, |standing| &standing.id)?;
        read_all(&mut encoder, &ENGINE_METRICS, &models, ServedModel::id)?;
        models.retain(|model| model.engine().estimated_wait().is_some());
        read_all(&mut encoder, &ESTIMATES, &models, ServedModel::id)?;
        read_all(&mut encoder, &EMBEDDING_METRICS, &embedders, EmbeddingModel::id)
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByState {
    model: String,
    state: &'static str,
}

/// Of every model's states the one that holds is 1.
fn states(
    encoder: &mut DescriptorEncoder<'_>,
    standings: &[Arc<Standing>],
) -> Result<(), fmt::Error> {
    let help = "Where a model is: 1 for the state that holds";
    let mut family = encoder.encode_descriptor("model_state", help, None, MetricType::Gauge)?;
    for standing in standings {
        for state in State::ALL {
            let labels = ByState { model: standing.id.clone(), state: state.as_str() };
            family.encode_family(&labels)?.encode_gauge(&u64::from(standing.state == state))?;
        }
    }
    Ok(())
}

fn read_all<M>(
    encoder: &mut DescriptorEncoder<'_>,
    metrics: &[ModelMetric<M>],
    models: &[Arc<M>],
    id: fn(&M) -> &str,
) -> Result<(), fmt::Error> {
    for metric in metrics.iter().filter(|_| !models.is_empty()) {
        let mut family = encoder.encode_descriptor(metric.name, metric.help, None, metric.kind)?;
        for model in models {
            let labels = ByModel { model: id(model).to_owned() };
            let value = (metric.read)(model);
            let mut one = family.encode_family(&labels)?;
            match metric.kind {
                MetricType::Gauge => one.encode_gauge(&value)?,
                _ => one.encode_counter(&value, None::<&Exemplar<ByModel, u64>>)?,
            }
        }
    }
    Ok(())
}
