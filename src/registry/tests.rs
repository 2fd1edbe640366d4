//! The keeper with real engines on a small random model: under random traces of requests, clients
//! that leave, failing loads and the operator, what a model says never changes, and the books are
//! right at the end.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use hearth_models::weights::DType;
use hearth_models::{Compute, KvDType, tiny};

use super::*;
use crate::engine::handle::{Event, GenerateRequest, Limits, SamplingParams, Speculation};
use crate::text::Tokenizer;
use crate::types::{SamplingOverrides, TokenId};

/// What each model is said to take; two fit.
const BYTES: u64 = 40;
const BUDGET: u64 = 100;
const NAMES: [&str; 3] = ["a", "b", "c"];

fn limits() -> Limits {
    Limits {
        context_len: 64,
        vocab_len: 512,
        queue_len: 64,
        running_len: 4,
        batch_tokens: 64,
        kv_blocks: 16,
        block_len: 16,
        target_itl: Duration::from_millis(100),
        queue_timeout: None,
        kv_prefault: false,
    }
}

/// A model that is made of its name.
fn tiny_model(name: &str) -> Result<Loaded, LoadError> {
    static COMPUTE: OnceLock<Compute> = OnceLock::new();
    let compute = COMPUTE.get_or_init(|| tiny::compute(1));
    let seed = u64::from(name.as_bytes()[0]);
    let failed = |source| LoadError::Model { path: name.into(), source };
    let model = tiny::load(&tiny::config(), DType::Q8_0, seed, compute);
    let (model, alone) = (model.map_err(failed)?, Speculation::default());
    let spawned = crate::engine::spawn(model, KvDType::F16, limits(), alone, None);
    let (engine, thread) = spawned.map_err(failed)?;
    // For adapters, of which there are none here.
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama");
    let file = hearth_models::open(&file).map_err(failed)?;
    let tokenizer = r#"{"version": "1.0", "model":
        {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}"#;
    Ok(Loaded::from(ServedModel {
        id: name.to_owned(),
        fingerprint: "fp".to_owned(),
        file: Arc::new(file),
        engine,
        thread: Mutex::new(Some(thread)),
        tokenizer: Tokenizer::from_json(tokenizer.as_bytes()).unwrap(),
        vocabulary: OnceLock::new(),
        template: None,
        style: None,
        harmony: None,
        stop_ids: Vec::new(),
        defaults: SamplingOverrides::default(),
    }))
}

fn entry(
    name: &'static str,
    load: impl Fn() -> Result<Loaded, LoadError> + Send + Sync + 'static,
) -> Entry {
    let kind = Kind::Text { context_len: 64 };
    let details = Arc::default();
    let card = Card { id: name.to_owned(), created_s: 0, kind, details };
    let load: Load = Box::new(load);
    let (loaded, progress) = (None, Arc::default());
    Entry { card, bytes: BYTES, pinned: false, loaded, load: Some(load), progress }
}

fn registry(entries: Vec<Entry>, queue_len: usize) -> Registry {
    let bounds = Bounds { budget_bytes: Some(BUDGET), queue_len, ..Bounds::default() };
    Registry::new(entries, bounds).unwrap()
}

fn all() -> Registry {
    registry(NAMES.map(|name| entry(name, move || tiny_model(name))).into(), 64)
}

async fn a(registry: &Registry) -> Result<Lease<ServedModel>, Error> {
    registry.generator("a", Tenant::default(), None).await
}

/// What a model says to a prompt; `None` when it is asked to stop after so many tokens.
async fn say(model: &ServedModel, prompt: TokenId, stop_after: usize) -> Option<Vec<TokenId>> {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let prompt = vec![prompt, 7, 11];
    let request = GenerateRequest { prompt, sampling, max_tokens: 12, ..Default::default() };
    let mut generation = model.engine().submit(request).unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < stop_after {
        match generation.next().await.unwrap() {
            Event::Token { id, .. } => tokens.push(id),
            Event::Prompt { .. } => {}
            Event::Finished { .. } => return Some(tokens),
            other => panic!("{other:?}"),
        }
    }
    None
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// One client: asks, leaves while it waits or in the middle, unloads.
async fn client(registry: &Registry, seed: u64, right: &HashMap<(String, u32), Vec<TokenId>>) {
    let mut dice = Dice(seed * 0x9e37_79b9 + 1);
    for _ in 0..40 {
        let name = NAMES[dice.below(3) as usize];
        let keep = [None, Some(KeepAlive::For(Duration::ZERO)), Some(KeepAlive::Forever)];
        let keep = keep[dice.below(3) as usize];
        let prompt = dice.below(4) as u32;
        match dice.below(8) {
            0 => drop(registry.unload(name)),
            1 => {
                let patience = Duration::from_millis(dice.below(4));
                let lease = registry.generator(name, Tenant::default(), keep);
                drop(tokio::time::timeout(patience, lease).await);
            }
            kind => match registry.generator(name, Tenant::default(), keep).await {
                Ok(model) => {
                    let stop_after = if kind == 2 { 3 } else { usize::MAX };
                    if let Some(said) = say(&model, prompt, stop_after).await {
                        assert_eq!(said, right[&(name.to_owned(), prompt)], "{name} {prompt}");
                    }
                }
                Err(error) => assert!(matches!(error, Error::LoadFailed { .. }), "{error}"),
            },
        }
    }
}

#[test]
fn reloading_is_safe_under_random_traces() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let right: HashMap<_, _> = runtime.block_on(async {
        let registry = all();
        let mut right = HashMap::new();
        for name in NAMES {
            let model = registry.generator(name, Tenant::default(), None).await.unwrap();
            for prompt in 0..4 {
                let said = say(&model, prompt, usize::MAX).await.unwrap();
                right.insert((name.to_owned(), prompt), said);
            }
        }
        right
    });
    assert_ne!(right[&("a".to_owned(), 0)], right[&("b".to_owned(), 0)], "they differ");
    let tries = Arc::new(AtomicUsize::new(0));
    let sometimes = move || match tries.fetch_add(1, Ordering::Relaxed) % 3 {
        1 => Err(LoadError::File { path: "c".into(), what: "not this time".to_owned() }),
        _ => tiny_model("c"),
    };
    let mut entries: Vec<Entry> =
        ["a", "b"].map(|name| entry(name, move || tiny_model(name))).into();
    entries.push(entry("c", sometimes));
    let (registry, right) = (Arc::new(registry(entries, 64)), Arc::new(right));
    let clients: Vec<_> = (1..=6)
        .map(|seed| {
            let (registry, right) = (Arc::clone(&registry), Arc::clone(&right));
            runtime.spawn(async move { client(&registry, seed, &right).await })
        })
        .collect();
    for client in clients {
        runtime.block_on(client).unwrap();
    }
    // Everybody is gone: nothing is held, nobody waits, and what is under way comes to an end.
    for _ in 0..1000 {
        registry.keeper.check();
        let standings = registry.standings();
        let still = |s: &Standing| {
            s.held + s.waiting > 0 || matches!(s.state, State::Loading | State::Unloading)
        };
        if !standings.iter().any(still) {
            let loads: u64 = standings.iter().map(|s| s.counts.loads).sum();
            println!("{loads} loads: {standings:?}");
            assert!(loads > 10, "{loads}");
            assert!(registry.drain(Duration::from_secs(10)));
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{:?}", registry.standings());
}

#[tokio::test]
async fn a_failed_load_tells_everybody_who_waits_and_is_tried_again() {
    let tries = Arc::new(AtomicUsize::new(0));
    let load = move || match tries.fetch_add(1, Ordering::Relaxed) {
        0 => {
            std::thread::sleep(Duration::from_millis(100));
            Err(LoadError::File { path: "a".into(), what: "bad luck".to_owned() })
        }
        1 => panic!("asked to"),
        _ => tiny_model("a"),
    };
    let registry = registry(vec![entry("a", load)], 64);
    let (one, two) = tokio::join!(a(&registry), a(&registry));
    for error in [one.err(), two.err()] {
        let error = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("`a`") && error.contains("bad luck"), "{error}");
    }
    let error = a(&registry).await.err();
    assert!(error.is_some_and(|error| error.to_string().contains("panicked")));
    assert!(a(&registry).await.is_ok());
    let counts = registry.standings()[0].counts;
    assert_eq!((counts.loads, counts.failures), (1, 2));
}

#[tokio::test]
async fn the_line_is_bounded_and_closing_tells_who_waits() {
    let load = || {
        std::thread::sleep(Duration::from_millis(300));
        tiny_model("a")
    };
    let registry = registry(vec![entry("a", load)], 1);
    let (first, second) = tokio::join!(a(&registry), a(&registry));
    assert!(first.is_ok());
    let full = second.err();
    assert!(matches!(full, Some(Error::QueueFull { waiting: 1, .. })), "{full:?}");
    let registry = self::registry(vec![entry("a", load)], 1);
    let close = async {
        tokio::task::yield_now().await;
        assert!(registry.drain(Duration::from_secs(10)));
    };
    let (told, ()) = tokio::join!(a(&registry), close);
    assert!(matches!(told.err(), Some(Error::ShuttingDown)));
    assert!(matches!(a(&registry).await.err(), Some(Error::ShuttingDown)));
}

#[tokio::test]
async fn a_request_gives_up_after_the_time_that_the_operator_allows() {
    let load = || {
        std::thread::sleep(Duration::from_millis(200));
        tiny_model("a")
    };
    let queue_timeout = Some(Duration::from_millis(20));
    let registry =
        Registry::new(vec![entry("a", load)], Bounds { queue_timeout, ..Bounds::default() });
    let registry = registry.unwrap();
    let error = a(&registry).await.err();
    assert!(matches!(error, Some(Error::Expired { .. })), "{error:?}");
    assert_eq!(registry.standings()[0].waiting, 0, "it has left the line");
}

#[tokio::test]
async fn one_key_leaves_places_in_the_line_of_a_model_to_others() {
    let load = || {
        std::thread::sleep(Duration::from_millis(300));
        tiny_model("a")
    };
    let registry = registry(vec![entry("a", load)], 16);
    let key = |id| Tenant { id, ..Tenant::default() };
    let ask = |tenant| registry.generator("a", tenant, None);
    let work = futures_util::future::join_all((0..20).map(|_| ask(key(1).in_background())));
    let many = futures_util::future::join_all((0..20).map(|_| ask(key(1))));
    let (work, many, other) = tokio::join!(work, many, ask(key(2)));
    let came_in = |all: Vec<Result<_, _>>| all.into_iter().filter(Result::is_ok).count();
    assert_eq!((came_in(work), came_in(many)), (4, 10), "a quarter, and all but an eighth");
    assert!(other.is_ok(), "there was no place left");
}
