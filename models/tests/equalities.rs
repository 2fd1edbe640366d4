//! Two paths, one answer, on random in-memory models: plain == fused within a written table, and
//! what the fused path promises bit by bit (batch == single, chunked == whole, paged ==
//! contiguous, any thread count, any instruction set).
//!
//! Equality with the outside world is `goldens.rs`.

use std::process::Command;
use std::sync::Arc;

use candle_core::Device;
use hearth_kernels::quant::DType;
use hearth_kernels::{Isa, Pool};
use hearth_models::backend::Routing;
use hearth_models::config::ModelConfig;
use hearth_models::{Compute, ForwardBatch, KvDType, KvStore, Model, tiny};

#[path = "equalities/configs.rs"]
mod configs;

use configs::configs;

const BLOCK_LEN: usize = 16;
const SEED: u64 = 7;
/// Weight types of every kind: floats, blocks of 32, blocks of 256.
const WEIGHTS: [DType; 7] =
    [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4K, DType::Q6K];
const KV: [KvDType; 6] = KvDType::ALL;
/// What the order of sums, and the few roundings that it turns over, may make of logits with each.
const ORDER_OF_SUMS: [f64; KV.len()] = [3e-6, 5e-5, 4e-4, 8e-5, 1e-3, 2e-2];

/// Allowed error of the fused path against the plain path with f32 KV and the same (dequantised)
/// weights: root mean square of the error over that of the logits, about twice what is measured.
/// f16 keys and values keep 11 bits, bf16 ones 8, q8_0 ones 8 below the largest of a head, q16_0
/// ones 12 to 14, fp8 4.
/// Weights in bf16 meet activations of bf16, of which one is off by a 512th of itself at most.
/// Quantised weights meet 8-bit activations with one scale for 32 of them (K types: for 256), which
/// hides the rounding of KV.
fn tolerance(weights: DType, kv: KvDType) -> f64 {
    match (weights, kv) {
        (DType::F32 | DType::F16, KvDType::F32) => 3e-6,
        (DType::F32 | DType::F16, KvDType::F16) => 1e-3,
        (DType::F32 | DType::F16, KvDType::Q16_0) => 4e-4,
        (DType::F32 | DType::F16, KvDType::BF16) => 7e-3,
        (DType::F32 | DType::F16, KvDType::Q8_0) => 2e-2,
        (_, KvDType::Fp8) => 0.12,
        (DType::BF16, KvDType::Q8_0) => 0.03,
        (DType::BF16, KvDType::BF16) => 0.014,
        (DType::BF16, _) => 0.012,
        (DType::Q8_0 | DType::Q4_0, _) => 0.04,
        (DType::Q4K | DType::Q6K, _) => 0.05,
        (other, _) => panic!("no tolerance for {other}"),
    }
}

fn plain() -> Compute {
    Compute::Plain(Device::Cpu, candle_core::DType::F32)
}

fn fused(threads: usize) -> Compute {
    Compute::Fused(Arc::new(Pool::new(threads)))
}

fn model(config: &ModelConfig, weights: DType, compute: &Compute) -> Box<dyn Model> {
    tiny::load(config, weights, SEED, compute).unwrap()
}

/// Tokens without a pattern that a position could be confused with.
fn tokens(count: usize, salt: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 31 + i * 17 + salt * 101 + 3) % 512) as u32).collect()
}

/// One sequence in a store, fed piece by piece.
struct Sequence {
    ids: Vec<u32>,
    table: Vec<u32>,
}

impl Sequence {
    /// Blocks in order from `first`.
    fn new(ids: Vec<u32>, first: u32) -> Self {
        let blocks = ids.len().div_ceil(BLOCK_LEN) as u32;
        Self { ids, table: (first..first + blocks).collect() }
    }

    /// Adds the rows at `range` to a batch, all logits wanted.
    fn push(&self, batch: &mut ForwardBatch, range: std::ops::Range<usize>) {
        let first = batch.row_count() as u32;
        batch.push(&self.ids[range.clone()], range.start, self.table.clone(), BLOCK_LEN);
        batch.logit_rows.extend(first..batch.row_count() as u32);
    }
}

/// A model and its store of 64 blocks.
struct Bench {
    model: Box<dyn Model>,
    kv: KvStore,
}

impl Bench {
    const BLOCKS: usize = 272;

    fn new(model: Box<dyn Model>, kv: KvDType) -> Self {
        let kv = model.kv_store(model.config().kv_geometry(Self::BLOCKS, BLOCK_LEN, kv)).unwrap();
        Self { model, kv }
    }

    fn forward(&mut self, batch: &ForwardBatch) -> Vec<f32> {
        batch.check(self.model.config().vocab_len, BLOCK_LEN, Self::BLOCKS).unwrap();
        self.model.forward(batch, &mut self.kv).unwrap()
    }

    fn rows(&mut self, sequence: &Sequence, range: std::ops::Range<usize>) -> Vec<f32> {
        let mut batch = ForwardBatch::empty();
        sequence.push(&mut batch, range);
        self.forward(&batch)
    }

    /// Logits of every row, computed `chunk` rows at a time.
    fn chunked(&mut self, sequence: &Sequence, chunk: usize) -> Vec<f32> {
        let len = sequence.ids.len();
        let starts = (0..len).step_by(chunk);
        starts.flat_map(|at| self.rows(sequence, at..len.min(at + chunk))).collect()
    }

    /// A prefill and then one row at a time.
    fn prefill_and_decode(&mut self, sequence: &Sequence, prefill: usize) -> Vec<f32> {
        let mut logits = self.rows(sequence, 0..prefill);
        for at in prefill..sequence.ids.len() {
            logits.extend(self.rows(sequence, at..at + 1));
        }
        logits
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Where two runs differ first, for a message that helps.
fn assert_same_bits(got: &[f32], want: &[f32], what: &str) {
    assert!(!want.is_empty() && want.iter().all(|x| x.is_finite()), "{what}: no logits");
    assert_eq!(got.len(), want.len(), "{what}: number of logits");
    if let Some(i) = (0..want.len()).find(|&i| got[i].to_bits() != want[i].to_bits()) {
        panic!("{what}: row {}, token {}: {} != {}", i / 512, i % 512, got[i], want[i]);
    }
}

#[test]
fn plain_equals_fused_with_every_knob() {
    let (fused, mut seen) = (fused(2), Vec::new());
    for (name, config) in configs() {
        let sequence = Sequence::new(tokens(45, 0), 3);
        let want = Bench::new(model(&config, DType::F32, &plain()), KvDType::F32)
            .prefill_and_decode(&sequence, 37);
        let got = Bench::new(model(&config, DType::F32, &fused), KvDType::F32)
            .prefill_and_decode(&sequence, 37);
        assert_eq!(got.len(), want.len());
        let error = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{name:<64} {error:.1e}");
        assert!(error <= 1e-4, "{name}: {error}");
        // A knob that changes nothing is not tested.
        let twin = seen.iter().find(|(_, logits)| *logits == bits(&want));
        assert!(twin.is_none(), "`{name}` gives the logits of `{}`", twin.unwrap().0);
        seen.push((name, bits(&want)));
    }
}

#[test]
fn plain_equals_fused_with_every_weight_and_kv_type() {
    let (config, fused) = (tiny::config(), fused(2));
    let sequence = Sequence::new(tokens(45, 1), 0);
    let mut failures = Vec::new();
    for weights in WEIGHTS {
        let want = Bench::new(model(&config, weights, &plain()), KvDType::F32)
            .prefill_and_decode(&sequence, 37);
        for kv in KV {
            let got =
                Bench::new(model(&config, weights, &fused), kv).prefill_and_decode(&sequence, 37);
            let (error, limit) = (relative_error(&got, &want), tolerance(weights, kv));
            println!("{weights:<5} {kv:?}: {error:.1e} of {limit:.0e}");
            if error.is_nan() || error > limit {
                failures.push((weights, kv, error));
            }
        }
    }
    assert!(failures.is_empty(), "beyond the tolerance: {failures:?}");
}

/// Both paths round keys and values alike, so they are near each other with every type; what is
/// left is the order of sums and the few roundings that this turns over. Over integers the fused
/// path rounds queries and weights as well.
#[test]
fn plain_equals_fused_with_the_same_kv_type() {
    let (config, sequence) = (tiny::config(), Sequence::new(tokens(45, 9), 1));
    for (kv, limit) in KV.into_iter().zip(ORDER_OF_SUMS) {
        let limit = match kv {
            KvDType::Q8_0 => 2e-2,
            KvDType::Q16_0 => 2e-4,
            _ => limit,
        };
        let [want, got] = [plain(), fused(2)].map(|compute| {
            Bench::new(model(&config, DType::F32, &compute), kv).prefill_and_decode(&sequence, 37)
        });
        let error = relative_error(&got, &want);
        println!("{kv:?}: {error:.1e} of {limit:.0e}");
        assert!(error < limit, "{kv:?}: {error}");
    }
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    (error / want.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

#[test]
fn plain_path_needs_no_store_for_whole_sequences() {
    let sequence = Sequence::new(tokens(45, 2), 0);
    let mut stored = Bench::new(model(&tiny::config(), DType::F32, &plain()), KvDType::F32);
    let want = stored.rows(&sequence, 0..45);
    stored.kv = KvStore::Nothing;
    assert_same_bits(&stored.rows(&sequence, 0..45), &want, "nothing stored");
}

/// Contexts and new rows of five sequences: whole prompts, a chunk, single rows, resumed ones.
const RAGGED: [(usize, usize); 5] = [(0, 17), (33, 1), (16, 16), (0, 1), (70, 5)];

/// Every layer has experts.
fn with_experts() -> ModelConfig {
    let experts = Some(Routing { count: 8, used: 2, normalized: true });
    ModelConfig { experts, ffn_len: 256, ..tiny::config() }
}

#[test]
fn batch_equals_single() {
    let fused = fused(2);
    let types = || WEIGHTS.into_iter().zip(KV.into_iter().cycle());
    let dense = types().map(|types| (tiny::config(), types));
    for (config, (weights, kv)) in dense.chain(types().map(|types| (with_experts(), types))) {
        let mut bench = Bench::new(model(&config, weights, &fused), kv);
        let mut first = 0;
        let sequences = RAGGED.map(|(context, rows)| {
            let sequence = Sequence::new(tokens(context + rows, first as usize), first);
            first += sequence.table.len() as u32;
            sequence
        });
        let mut batch = ForwardBatch::empty();
        let mut want = Vec::new();
        for (sequence, (context, rows)) in sequences.iter().zip(RAGGED) {
            let mut alone = Bench::new(model(&config, weights, &fused), kv);
            if context > 0 {
                alone.rows(sequence, 0..context);
                bench.rows(sequence, 0..context);
            }
            want.extend(alone.rows(sequence, context..context + rows));
            sequence.push(&mut batch, context..context + rows);
        }
        assert_same_bits(&bench.forward(&batch), &want, &format!("{weights} {kv:?}"));
    }
}

/// Of which rows logits are wanted changes none of them, nor the keys and values of the others.
#[test]
fn rows_of_which_nothing_is_wanted_may_be_there() {
    let wanted: [fn(usize) -> bool; 3] = [|row| row % 3 == 1, |row| row == 34, |_| false];
    for compute in [fused(2), plain()] {
        let run = |wanted: fn(usize) -> bool| {
            let mut bench = Bench::new(model(&tiny::config(), DType::F32, &compute), KvDType::F32);
            let sequences = [Sequence::new(tokens(31, 1), 0), Sequence::new(tokens(6, 2), 9)];
            let (mut batch, mut after) = (ForwardBatch::empty(), ForwardBatch::empty());
            for sequence in &sequences {
                let last = sequence.ids.len() - 1;
                sequence.push(&mut batch, 0..last);
                sequence.push(&mut after, last..last + 1);
            }
            batch.logit_rows.retain(|&row| wanted(row as usize));
            (bench.forward(&batch), bench.forward(&after))
        };
        let (all, after) = run(|_| true);
        for wanted in wanted {
            let (some, then) = run(wanted);
            let rows = all.chunks_exact(512).enumerate().filter(|(row, _)| wanted(*row));
            let want: Vec<f32> = rows.flat_map(|(_, row)| row.to_vec()).collect();
            match &compute {
                Compute::Plain(..) => {
                    assert!(want.is_empty() == some.is_empty());
                    assert!(want.is_empty() || relative_error(&some, &want) < 1e-6);
                    assert!(relative_error(&then, &after) < 1e-6);
                }
                _ => {
                    assert_eq!(bits(&some), bits(&want));
                    assert_same_bits(&then, &after, "the next rows");
                }
            }
        }
    }
}

#[test]
fn chunked_equals_whole() {
    let (fused, sequence) = (fused(2), Sequence::new(tokens(70, 3), 5));
    let mut windowed = tiny::config();
    windowed.windows = vec![Some(21), None];
    for config in [tiny::config(), windowed, with_experts()] {
        for (weights, kv) in WEIGHTS.into_iter().zip(KV.into_iter().cycle()) {
            let mut bench = Bench::new(model(&config, weights, &fused), kv);
            let whole = bench.rows(&sequence, 0..70);
            for chunk in [1, 3, 16, 17, 33] {
                // A fresh store: what the whole run wrote must not help.
                let mut bench = Bench::new(model(&config, weights, &fused), kv);
                let got = bench.chunked(&sequence, chunk);
                assert_same_bits(&got, &whole, &format!("{weights} {kv:?} by {chunk}"));
            }
        }
    }
}

/// The plain path too sees every key and value as the store keeps it, so cutting a prompt changes
/// no more than the order of sums, and the few roundings that this turns over. The limits are a
/// fifth of the error that unrounded new rows would leave; of q16_0, which rounds less, 0.6 of it.
#[test]
fn plain_path_chunked_equals_whole() {
    let sequence = Sequence::new(tokens(45, 8), 2);
    for (kv, limit) in KV.into_iter().zip(ORDER_OF_SUMS) {
        let bench = || Bench::new(model(&tiny::config(), DType::F32, &plain()), kv);
        let whole = bench().rows(&sequence, 0..45);
        for chunk in [1, 17] {
            let error = relative_error(&bench().chunked(&sequence, chunk), &whole);
            println!("{kv:?} by {chunk}: {error:.1e}");
            assert!(error < limit, "{kv:?} by {chunk}: {error}");
        }
    }
}

#[test]
fn paged_equals_contiguous() {
    let fused = fused(2);
    for kv in KV {
        let ordered = Sequence::new(tokens(75, 4), 0);
        let shuffled = Sequence { ids: ordered.ids.clone(), table: vec![41, 2, 63, 0, 17] };
        let run = |sequence: &Sequence| {
            Bench::new(model(&tiny::config(), DType::Q8_0, &fused), kv)
                .prefill_and_decode(sequence, 50)
        };
        assert_same_bits(&run(&shuffled), &run(&ordered), &format!("{kv:?}"));
    }
}

#[test]
fn thread_count_changes_nothing() {
    let sequence = Sequence::new(tokens(45, 5), 0);
    for config in [tiny::config(), with_experts()] {
        for weights in WEIGHTS {
            let [one, two, three] = [1, 2, 3].map(|threads| {
                Bench::new(model(&config, weights, &fused(threads)), KvDType::default())
                    .prefill_and_decode(&sequence, 41)
            });
            assert_same_bits(&two, &one, &format!("{weights}, 2 threads"));
            assert_same_bits(&three, &one, &format!("{weights}, 3 threads"));
        }
    }
}

/// A row with a full window behind it sees its last key and not the one before.
#[test]
fn window_ends_where_it_says() {
    const WINDOW: usize = 20;
    let mut config = tiny::config();
    (config.layer_count, config.windows) = (1, vec![Some(WINDOW)]);
    for compute in [plain(), fused(2)] {
        for position in [WINDOW - 1, WINDOW, WINDOW + 1, 47, 48] {
            let last_row = |changed: Option<usize>| {
                let mut ids = tokens(position + 1, 6);
                if let Some(at) = changed {
                    ids[at] ^= 1;
                }
                let mut bench = Bench::new(model(&config, DType::F32, &compute), KvDType::F32);
                let sequence = Sequence::new(ids, 0);
                bench.rows(&sequence, 0..position);
                bench.rows(&sequence, position..position + 1)
            };
            let (want, oldest) = (last_row(None), position + 1 - WINDOW);
            assert_ne!(bits(&last_row(Some(oldest))), bits(&want), "{position}: key {oldest}");
            if oldest > 0 {
                let what = format!("{position}: key {}", oldest - 1);
                assert_same_bits(&last_row(Some(oldest - 1)), &want, &what);
            }
        }
    }
}

/// `HEARTH_ISA` is read once in a process, so each instruction set gets a process of its own: this
/// test runs itself.
#[test]
fn instruction_set_changes_nothing() {
    const CHILD: &str = "HEARTH_EQUALITIES_CHILD";
    if std::env::var_os(CHILD).is_some() {
        println!("\n{} {}", Isa::best().name(), hash_of_logits());
        return;
    }
    let program = std::env::current_exe().unwrap();
    let hashes: Vec<String> = Isa::available()
        .iter()
        .map(|isa| {
            let output = Command::new(&program)
                .args(["--exact", "instruction_set_changes_nothing", "--nocapture"])
                .env(CHILD, "1")
                .env("HEARTH_ISA", isa.name())
                .output()
                .unwrap();
            assert!(output.status.success(), "{}: {output:?}", isa.name());
            let text = String::from_utf8(output.stdout).unwrap();
            let hash = text.lines().find_map(|l| l.strip_prefix(&format!("{} ", isa.name())));
            hash.unwrap_or_else(|| panic!("{} did not run: {text}", isa.name())).to_owned()
        })
        .collect();
    assert_eq!(hashes.len(), Isa::available().len());
    for (isa, hash) in Isa::available().iter().zip(&hashes) {
        println!("{:<10}{hash}", isa.name());
        assert_eq!(hash, &hashes[0], "{} against {}", isa.name(), Isa::available()[0].name());
    }
}

/// One line with a hash for each weight type, KV types in turn.
fn hash_of_logits() -> String {
    let (config, fused) = (tiny::config(), fused(2));
    let sequence = Sequence::new(tokens(45, 7), 0);
    let hashes = WEIGHTS.into_iter().zip(KV.into_iter().cycle()).map(|(weights, kv)| {
        let logits =
            Bench::new(model(&config, weights, &fused), kv).prefill_and_decode(&sequence, 37);
        let hash = bits(&logits).into_iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, bits| {
            (hash ^ u64::from(bits)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        format!("{weights}={hash:016x}")
    });
    hashes.collect::<Vec<_>>().join(" ")
}

#[cfg(feature = "cuda")]
#[path = "equalities/cuda.rs"]
mod cuda;
