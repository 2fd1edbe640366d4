//! Adapters: logits equal those of Hugging Face `peft`, from every kind of file and on every kind
//! of base; what is promised of batches holds bit by bit; every parameter has its gradient.
//!
//! `tests/goldens/README.md` says how the goldens are made. Files that are refused are in
//! `lora_refusals.rs`.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType as Float, Device, Tensor, Var};
use hearth_kernels::Pool;
use hearth_kernels::lora::{Factors, Float as Kept};
use hearth_kernels::quant::DType;
use hearth_models::adapter::{Adapter, Delta};
use hearth_models::backend::Plain;
use hearth_models::backend::Routing;
use hearth_models::config::{Knobs, ModelConfig};
use hearth_models::decoder::Decoder;
use hearth_models::weights::Loader;
use hearth_models::{Compute, ForwardBatch, KvDType, KvStore, LoraSlot, Model, tiny};
use serde::Deserialize;

const BLOCK_LEN: usize = 16;
const SLOT: LoraSlot = LoraSlot(7);

fn plain() -> Compute {
    Compute::Plain(Device::Cpu, Float::F32)
}

fn fused() -> Compute {
    Compute::Fused(Arc::new(Pool::new(2)))
}

/// One of `lora/index.json`.
#[derive(Deserialize)]
struct Case {
    adapter: String,
    base: String,
    golden: String,
}

#[test]
fn logits_equal_peft_merged_and_unmerged() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    let index = std::fs::read(goldens.join("lora/index.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&index).unwrap();
    assert!(cases.len() >= 9);
    for case in &cases {
        let file = hearth_models::open(&goldens.join(&case.base)).unwrap();
        let path = goldens.join("lora").join(&case.adapter);
        let adapter = Adapter::open(&path, &file, &Pool::new(2)).unwrap();
        let golden = goldens.join("lora").join(&case.golden).join("golden.safetensors");
        let golden = candle_core::safetensors::load(golden, &Device::Cpu).unwrap();
        let ids = golden["prompt_ids"].to_vec1::<i32>().unwrap();
        let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        let adapters = [(Arc::new(adapter), 1.0)];
        for compute in [plain(), fused()] {
            let mut model = file.load(&compute, &mut |_| {}).unwrap();
            model.put_adapters(SLOT, &adapters).unwrap();
            let got = whole(&*model, &ids, Some(SLOT));
            for kind in ["unmerged", "merged"] {
                let want: Vec<f32> = golden[kind].flatten_all().unwrap().to_vec1().unwrap();
                let error = largest(&got, &want);
                let what = format!("{} on {} {kind}", case.adapter, case.base);
                println!("{what:<40} {:<40} {error:.1e}", compute.describe());
                assert!(error <= 1e-4, "{what}: {error}");
            }
        }
    }
}

fn largest(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Logits of a whole prompt in a store of its own.
fn whole(model: &dyn Model, ids: &[u32], slot: Option<LoraSlot>) -> Vec<f32> {
    let mut kv = store(model, 16);
    let mut batch = ForwardBatch::whole(ids, 0, BLOCK_LEN);
    batch.lora_slot = vec![slot];
    batch.check(model.config().vocab_len, BLOCK_LEN, 16).unwrap();
    model.forward(&batch, &mut kv).unwrap()
}

fn store(model: &dyn Model, blocks: usize) -> KvStore {
    model.kv_store(model.config().kv_geometry(blocks, BLOCK_LEN, KvDType::F32)).unwrap()
}

fn tokens(count: usize, salt: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 31 + i * 17 + salt * 101 + 3) % 512) as u32).collect()
}

/// The base, and what makes rows depend on the order of products and biases.
fn configs() -> [ModelConfig; 3] {
    let biased = Knobs { qkv_bias: true, out_bias: true, mlp_bias: true, ..Knobs::default() };
    let experts = Some(Routing { count: 6, used: 2, normalized: true });
    [
        tiny::config(),
        ModelConfig { knobs: biased, tied: false, ..tiny::config() },
        ModelConfig { experts, ffn_len: 256, ..tiny::config() },
    ]
}

fn adapter(config: &ModelConfig, rank: usize, kept: Kept, seed: u64) -> Arc<Adapter> {
    Arc::new(tiny::adapter(config, rank, kept, seed).unwrap())
}

/// The same adapter with B of zeros.
fn nothing(config: &ModelConfig) -> Arc<Adapter> {
    let zeros = |(role, delta): &(_, Delta)| {
        let f = &delta.factors;
        let shape = [f.n(), f.k(), f.rank()];
        let b = vec![0.0; f.n() * f.rank()];
        let made = if f.is_table() { Factors::of_table } else { Factors::new };
        let factors = Arc::new(made(Kept::F32, shape, &f.to_a(), &b));
        (*role, Delta { factors, ..delta.clone() })
    };
    let full = adapter(config, 4, Kept::F32, 1);
    Arc::new(Adapter::from_deltas(config, full.deltas().iter().map(zeros).collect()).unwrap())
}

#[test]
fn zero_lora_is_the_base_bit_by_bit() {
    for config in configs() {
        for (compute, dtype) in
            [(plain(), DType::F32), (fused(), DType::F32), (fused(), DType::Q4K)]
        {
            let mut model = tiny::load(&config, dtype, 7, &compute).unwrap();
            let ids = tokens(21, 1);
            let want = whole(&*model, &ids, None);
            model.put_adapters(LoraSlot(1), &[(nothing(&config), 1.0)]).unwrap();
            let strong = adapter(&config, 8, Kept::F32, 2);
            model.put_adapters(LoraSlot(2), &[(Arc::clone(&strong), 0.0)]).unwrap();
            model.put_adapters(LoraSlot(3), &[]).unwrap();
            for slot in [None, Some(LoraSlot(1)), Some(LoraSlot(2)), Some(LoraSlot(3))] {
                let got = whole(&*model, &ids, slot);
                assert_eq!(largest(&got, &want), 0.0, "{slot:?}");
            }
            model.put_adapters(LoraSlot(4), &[(strong, 1.0)]).unwrap();
            let moved = largest(&whole(&*model, &ids, Some(LoraSlot(4))), &want);
            assert!(moved > 0.1, "the adapter does nothing: {moved}");
        }
    }
}

/// Eight sequences: base rows, adapters of several ranks and types, compositions, one that two
/// sequences share; prompts, chunks and single rows.
const MIX: [(usize, usize, Option<u64>); 8] = [
    (0, 17, Some(1)),
    (33, 1, Some(2)),
    (16, 16, None),
    (0, 1, Some(3)),
    (70, 5, Some(4)),
    (5, 1, Some(1)),
    (12, 1, Some(5)),
    (40, 1, None),
];

fn put_mix(model: &mut dyn Model) {
    let config = model.config().clone();
    let one = adapter(&config, 4, Kept::F32, 11);
    let two = adapter(&config, 16, Kept::BF16, 12);
    let three = adapter(&config, 7, Kept::F16, 13);
    let lists = [
        vec![(Arc::clone(&one), 1.0)],
        vec![(Arc::clone(&two), 1.0)],
        vec![(Arc::clone(&three), -0.7)],
        vec![(three, 0.5), (one, 0.25), (Arc::clone(&two), 1.0)],
        vec![(two, 0.3)],
    ];
    for (slot, list) in (1..).zip(lists) {
        model.put_adapters(LoraSlot(slot), &list).unwrap();
    }
}

/// Logits of the wanted of each sequence's new rows: all sequences in one batch, or each alone.
fn run_mix(model: &dyn Model, together: bool, wanted: fn(usize) -> bool) -> Vec<f32> {
    let (mut kv, mut batch, mut logits) = (store(model, 64), ForwardBatch::empty(), Vec::new());
    let mut first = 0;
    for (context, rows, slot) in MIX {
        let ids = tokens(context + rows, first as usize);
        let table: Vec<u32> = (first..first + ids.len().div_ceil(BLOCK_LEN) as u32).collect();
        first += table.len() as u32;
        let slot = slot.map(LoraSlot);
        if context > 0 {
            let mut before = ForwardBatch::empty();
            before.push(&ids[..context], 0, table.clone(), BLOCK_LEN);
            before.lora_slot = vec![slot];
            model.forward(&before, &mut kv).unwrap();
        }
        let at = batch.row_count() as u32;
        batch.push(&ids[context..], context, table, BLOCK_LEN);
        *batch.lora_slot.last_mut().unwrap() = slot;
        let own = (0..rows).filter(|&row| wanted(row));
        batch.logit_rows.extend(own.map(|row| at + row as u32));
        if !together {
            batch.check(model.config().vocab_len, BLOCK_LEN, 64).unwrap();
            logits.extend(model.forward(&batch, &mut kv).unwrap());
            batch = ForwardBatch::empty();
        }
    }
    if together {
        batch.check(model.config().vocab_len, BLOCK_LEN, 64).unwrap();
        logits = model.forward(&batch, &mut kv).unwrap();
    }
    logits
}

#[test]
fn a_batch_of_adapters_is_each_of_them_alone() {
    for config in configs() {
        for dtype in [DType::F32, DType::Q8_0, DType::Q4K] {
            for threads in [1, 3] {
                let compute = Compute::Fused(Arc::new(Pool::new(threads)));
                let mut model = tiny::load(&config, dtype, 7, &compute).unwrap();
                put_mix(&mut *model);
                let run = |together| run_mix(&*model, together, |_| true);
                let (got, want) = (run(true), run(false));
                let same = got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same && got.len() == want.len(), "{dtype} on {threads} threads");
            }
        }
    }
}

#[test]
fn wanted_rows_keep_their_adapters() {
    let mut model = tiny::load(&tiny::config(), DType::Q8_0, 7, &fused()).unwrap();
    put_mix(&mut *model);
    let all = run_mix(&*model, true, |_| true);
    let some = run_mix(&*model, true, |row| row % 4 == 2);
    let rows = MIX.iter().flat_map(|&(_, rows, _)| 0..rows).zip(all.chunks_exact(512));
    let want = rows.filter(|(row, _)| row % 4 == 2).flat_map(|(_, logits)| logits);
    assert!(some.iter().map(|x| x.to_bits()).eq(want.map(|x| x.to_bits())));
    assert!(!some.is_empty());
}

#[test]
fn plain_equals_fused() {
    for config in configs() {
        let run = |compute: &Compute, dtype| {
            let mut model = tiny::load(&config, dtype, 7, compute).unwrap();
            put_mix(&mut *model);
            run_mix(&*model, true, |_| true)
        };
        let (got, want) = (run(&fused(), DType::F32), run(&plain(), DType::F32));
        let error = largest(&got, &want);
        println!("f32: {error:.1e}");
        assert!(error <= 1e-4, "{error}");
        // Quantised weights meet 8-bit activations: the limit of the base model.
        let (got, want) = (run(&fused(), DType::Q8_0), run(&plain(), DType::Q8_0));
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = got.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
        let error = (error / want.iter().map(|x| square(*x)).sum::<f64>()).sqrt();
        println!("Q8_0: {error:.1e}");
        assert!(error < 0.04, "{error}");
    }
}

/// Every slot has adapters that differ; names that are not known are errors, not panics.
#[test]
fn slots_come_and_go() {
    let config = tiny::config();
    let mut model = tiny::load(&config, DType::F32, 7, &fused()).unwrap();
    let ids = tokens(9, 4);
    let base = whole(&*model, &ids, None);
    let list = [(adapter(&config, 4, Kept::F32, 1), 1.0)];
    model.put_adapters(SLOT, &list).unwrap();
    assert!(model.put_adapters(SLOT, &list).unwrap_err().to_string().contains("taken"));
    assert_ne!(whole(&*model, &ids, Some(SLOT)), base);
    model.drop_adapters(SLOT);
    model.drop_adapters(SLOT);
    let mut batch = ForwardBatch::whole(&ids, 0, BLOCK_LEN);
    batch.lora_slot = vec![Some(SLOT)];
    let mut kv = store(&*model, 4);
    assert!(model.forward(&batch, &mut kv).unwrap_err().to_string().contains("slot 7"));
    assert_eq!(whole(&*model, &ids, None), base);
    let other = ModelConfig { hidden_len: 128, ..config };
    let other = [(adapter(&other, 4, Kept::F32, 1), 1.0)];
    let error = model.put_adapters(SLOT, &other).unwrap_err().to_string();
    assert!(error.contains("has an update of"), "{error}");
}

/// A, B and the lengths of DoRA, of every module.
#[test]
fn every_parameter_of_an_adapter_has_its_gradient() {
    const STEP: f64 = 1e-5;
    for tied in [true, false] {
        let mut config = ModelConfig { tied, ..configs()[1].clone() };
        (config.hidden_len, config.ffn_len, config.vocab_len) = (16, 24, 32);
        (config.head_count, config.kv_head_count, config.head_dim) = (4, 2, 8);
        config.rope.dim = 8;
        let weights = tiny::weights(&config, DType::F32, 11).unwrap();
        let mut progress = |_| {};
        let mut loader = Loader::new(&weights, &config, &mut progress);
        let ops = Plain::new(Device::Cpu, Float::F64).trainable();
        let mut model = Decoder::load(config.clone(), &mut loader, ops).unwrap();
        let list = [(stretched(&config), 1.0), (adapter(&config, 2, Kept::F32, 5), 0.5)];
        model.put_adapters(SLOT, &list).unwrap();
        let tensors = model.adapter_tensors(SLOT);
        assert_eq!(tensors.len(), 2 * 7 + 2);
        let gradients = loss(&model).backward().unwrap();
        for (role, tensors) in tensors {
            assert_eq!(tensors.len(), 5, "{role:?}");
            for (part, tensor) in tensors.iter().enumerate() {
                let what = format!("{role:?} {part}");
                let var = Var::from_tensor(tensor).unwrap();
                let gradient = gradients.get(&var).unwrap_or_else(|| panic!("{what}: none"));
                let direction = random(var.dims(), part as u64 + 100);
                let want = scalar(&(gradient * &direction).unwrap().sum_all().unwrap());
                let here = var.as_tensor().copy().unwrap();
                let at = |step: f64| {
                    var.set(&(&here + (&direction * step).unwrap()).unwrap()).unwrap();
                    scalar(&loss(&model))
                };
                let got = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                var.set(&here).unwrap();
                println!("{what:<24} {want:>12.6} {got:>12.6}");
                assert!(want.abs() > 1e-5, "{what}: the gradient is nothing");
                let error = (got - want).abs();
                assert!(error <= 1e-6 * want.abs().max(1.0), "{what}: {want} {got}");
            }
        }
    }
}

/// An adapter with lengths of its own.
fn stretched(config: &ModelConfig) -> Arc<Adapter> {
    let with_lengths = |(role, delta): &(_, Delta)| {
        let n = delta.factors.n();
        let dora = hearth_models::adapter::Dora {
            magnitude: (0..n).map(|i| 1.0 + i as f32 / 64.0).collect(),
            norm: (0..n).map(|i| 1.5 - i as f32 / 128.0).collect(),
        };
        (*role, Delta { dora: Some(Arc::new(dora)), ..delta.clone() })
    };
    let full = adapter(config, 3, Kept::F32, 9);
    let deltas = full.deltas().iter().map(with_lengths).collect();
    Arc::new(Adapter::from_deltas(config, deltas).unwrap())
}

/// Two sequences with the adapters, one without.
fn loss(model: &Decoder<Plain>) -> Tensor {
    let mut batch = ForwardBatch::whole(&[3, 1, 4, 1, 5, 9, 2], 0, BLOCK_LEN);
    batch.push(&[6, 5, 3, 5, 8], 0, vec![1], BLOCK_LEN);
    batch.push(&[9, 7, 9], 0, vec![2], BLOCK_LEN);
    batch.lora_slot = vec![Some(SLOT), None, Some(SLOT)];
    batch.logit_rows = vec![2, 5, 6, 9, 13, 14];
    let logits = model.logits(&batch, &mut KvStore::Nothing).unwrap();
    (&logits * random(logits.dims(), 1)).unwrap().sum_all().unwrap()
}

fn random(shape: &[usize], salt: u64) -> Tensor {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn scalar(tensor: &Tensor) -> f64 {
    tensor.to_scalar().unwrap()
}

/// What somebody else's arithmetic says of a trained model: first logits at three strengths.
#[derive(Deserialize)]
struct Strength {
    next_logits_first8: Vec<f32>,
    next_argmax: u32,
    greedy_ids: Vec<u32>,
}

#[test]
fn strengths_of_adapters_of_a_trained_model() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/models");
    let folder = models.join("stories260K-lora");
    if !folder.exists() {
        return;
    }
    for base in ["stories260K-hf", "stories260K-gguf/stories260K-F32.gguf"] {
        let file = hearth_models::open(&models.join(base)).unwrap();
        for name in ["lora-a", "lora-b", "lora-rslora"] {
            strengths(&file, &folder.join(name), base);
        }
    }
}

fn strengths(file: &hearth_models::ModelFile, path: &Path, base: &str) {
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("golden.json")).unwrap()).unwrap();
    let adapter = Arc::new(Adapter::open(path, file, &Pool::new(1)).unwrap());
    for compute in [plain(), fused()] {
        let mut model = file.load(&compute, &mut |_| {}).unwrap();
        for (slot, strength) in [0.0, 0.5, 1.0].into_iter().enumerate() {
            let slot = LoraSlot(slot as u64);
            model.put_adapters(slot, &[(Arc::clone(&adapter), strength)]).unwrap();
            let want = &golden["prompts"]["Once upon a time"][format!("{strength:.1}")];
            let want: Strength = serde_json::from_value(want.clone()).unwrap();
            let mut ids = ONCE_UPON_A_TIME.to_vec();
            for (step, &next) in want.greedy_ids.iter().enumerate() {
                let logits = whole(&*model, &ids, Some(slot));
                let last = &logits[logits.len() - 512..];
                let best = (0..512).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
                if step == 0 {
                    let error = largest(&last[..8], &want.next_logits_first8);
                    assert!(error < 1e-3, "{base} {} {strength}: {error}", path.display());
                    assert_eq!(best, want.next_argmax);
                }
                assert_eq!(best, next, "{base} {} {strength} step {step}", path.display());
                ids.push(next);
            }
        }
    }
}

/// With the beginning of text.
const ONCE_UPON_A_TIME: [u32; 5] = [1, 403, 407, 261, 378];
