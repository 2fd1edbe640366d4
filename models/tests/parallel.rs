//! A model that is divided among ranks is the model: logits within 1e-4 of those of one rank, for
//! every knob of the families, on both paths of the CPU; and what is promised bit by bit holds
//! among ranks too. The same decoder runs on GPUs, where NCCL adds up (`equalities/cuda.rs`).

use std::sync::Arc;

use candle_core::Device;
use hearth_kernels::lora::Float;
use hearth_kernels::quant::DType;
use hearth_models::adapter::{Adapter, Delta, Dora};
use hearth_models::backend::{Gate, Routing};
use hearth_models::config::{Knobs, ModelConfig, Naming};
use hearth_models::{Compute, ForwardBatch, KvDType, KvStore, LoraSlot, Model, tiny};

const BLOCK_LEN: usize = 16;
const BLOCKS: usize = 32;

fn plain() -> Compute {
    Compute::Plain(Device::Cpu, candle_core::DType::F32)
}

fn fused() -> Compute {
    tiny::compute(2)
}

/// A model, and a store of its own.
struct Bench {
    model: Box<dyn Model>,
    kv: KvStore,
}

impl Bench {
    fn new(config: &ModelConfig, weights: DType, compute: Compute, ranks: usize) -> Self {
        let compute = compute.divided(ranks).unwrap();
        let model = tiny::load(config, weights, 7, &compute).unwrap();
        let geometry = config.kv_geometry(BLOCKS, BLOCK_LEN, KvDType::F32);
        let kv = model.kv_store(geometry).unwrap();
        let stores = if let KvStore::Ranks(stores) = &kv { stores.len() } else { 1 };
        assert_eq!(stores, ranks);
        Self { model, kv }
    }

    fn forward(&mut self, batch: &ForwardBatch) -> Vec<f32> {
        batch.check(self.model.config().vocab_len, BLOCK_LEN, BLOCKS).unwrap();
        self.model.forward(batch, &mut self.kv).unwrap()
    }
}

fn tokens(count: usize, salt: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 31 + i * 17 + salt * 101 + 3) % 512) as u32).collect()
}

/// Tokens, and blocks that lie anywhere, of three sequences.
fn sequences() -> [(Vec<u32>, Vec<u32>); 3] {
    [(45, vec![9, 2, 30]), (20, vec![0, 17]), (33, vec![5, 31, 4])]
        .map(|(len, table)| (tokens(len, len), table))
}

/// Logits of all rows of three sequences, in ragged batches: prompts whole and in chunks beside
/// single rows, and a block that moves.
fn ragged(bench: &mut Bench, slots: [Option<LoraSlot>; 3]) -> Vec<f32> {
    const STEPS: [[usize; 3]; 5] = [[17, 0, 1], [27, 5, 15], [1, 13, 0], [0, 1, 16], [0, 1, 1]];
    let (mut at, mut logits, mut sequences) = ([0; 3], Vec::new(), sequences());
    for (step, rows) in STEPS.iter().enumerate() {
        if step == 3 {
            bench.kv.copy_block(17, 11).unwrap();
            sequences[1].1[1] = 11;
        }
        let mut batch = ForwardBatch::empty();
        for (s, &rows) in rows.iter().enumerate().filter(|(_, rows)| **rows > 0) {
            let (ids, table) = &sequences[s];
            batch.push(&ids[at[s]..at[s] + rows], at[s], table.clone(), BLOCK_LEN);
            batch.run_last_with(slots[s]);
            at[s] += rows;
        }
        batch.logit_rows = (0..batch.row_count() as u32).collect();
        logits.extend(bench.forward(&batch));
    }
    assert_eq!(at.to_vec(), sequences.map(|(ids, _)| ids.len()).to_vec());
    logits
}

fn largest(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    assert!(!want.is_empty() && got.iter().all(|x| x.is_finite()));
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// What the families differ in, and what lies differently when a tensor is cut.
fn configs() -> Vec<(&'static str, ModelConfig)> {
    let base = ModelConfig { kv_head_count: 4, ..tiny::config() };
    let with = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = base.clone();
        change(&mut config);
        config
    };
    let qkv = Knobs { qkv_bias: true, ..Knobs::default() };
    let biases = Knobs { qkv_bias: true, out_bias: true, mlp_bias: true, ..Knobs::default() };
    vec![
        ("Llama: two queries a key, tied", base.clone()),
        ("Llama from a GGUF file", with(&|c| c.knobs.interleaved_qk = true)),
        ("Llama, untied, one query a key", with(&|c| (c.tied, c.kv_head_count) = (false, 8))),
        ("Mistral: windows", with(&|c| c.windows = vec![Some(11), None])),
        ("Qwen2: biases of q, k and v", with(&|c| c.knobs = qkv)),
        ("Qwen2 from a GGUF file of pairs", {
            with(&|c| (c.knobs, c.knobs.interleaved_qk) = (qkv, true))
        }),
        ("biases everywhere", with(&|c| (c.knobs, c.tied) = (biases, false))),
        (
            "Gemma 2",
            with(&|c| {
                (c.knobs.post_norms, c.knobs.gate) = (true, Gate::GeluTanh);
                (c.knobs.attention_softcap, c.knobs.logit_softcap) = (Some(2.0), Some(3.0));
                (c.knobs.embedding_scale, c.windows) = (Some(16.0), vec![Some(11), None]);
            }),
        ),
        ("Qwen3 with experts", {
            let routing = Routing { count: 6, used: 2, normalized: true };
            with(&|c| (c.knobs.qk_norm, c.experts) = (true, Some(routing)))
        }),
        ("gpt-oss", {
            let routing = Routing { count: 6, used: 2, normalized: true };
            with(&|c| {
                (c.knobs, c.experts) = (biases, Some(routing));
                (c.knobs.sinks, c.knobs.gate) = (true, Gate::ClampedSwiglu);
                c.knobs.naming = Naming::GptOss;
            })
        }),
        ("Qwen3: norms of heads of 64", {
            with(&|c| (c.knobs.qk_norm, c.head_dim, c.rope.dim) = (true, 64, 64))
        }),
        ("heads of 80, half of one rotates", with(&|c| (c.head_dim, c.rope.dim) = (80, 40))),
    ]
}

#[test]
fn ranks_equal_one_with_every_knob() {
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for (name, config) in configs() {
        for (path, compute) in [("plain", plain()), ("fused", fused())] {
            let run = |ranks| {
                ragged(&mut Bench::new(&config, DType::F32, compute.clone(), ranks), [None; 3])
            };
            let want = run(1);
            for ranks in [2, 4] {
                let error = largest(&run(ranks), &want);
                println!("{name:<40} {path}, {ranks} ranks: {error:.1e}");
                assert!(error <= 1e-4, "{name}, {path}, {ranks} ranks: {error}");
            }
            if path == "fused" {
                assert!(!seen.contains(&want), "`{name}` changes nothing");
                seen.push(want);
            }
        }
    }
}

/// Blocks of weights stay whole, so only the order of sums differs; where the input of a product is
/// made bytes or bf16, a sum that is rounded otherwise turns over one of them here and there.
#[test]
fn quantised_weights_are_cut_between_blocks() {
    // 16 heads of 64: a quarter of what `out` reads is a block of 256.
    let config = ModelConfig { ffn_len: 1024, kv_head_count: 8, head_count: 16, ..tiny::config() };
    let mut config = ModelConfig { head_dim: 64, ..config };
    config.rope.dim = 64;
    for weights in [DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4K, DType::Q6K] {
        for (path, compute) in [("plain", plain()), ("fused", fused())] {
            let run = |ranks| {
                ragged(&mut Bench::new(&config, weights, compute.clone(), ranks), [None; 3])
            };
            let want = run(1);
            for ranks in [2, 4] {
                let got = run(ranks);
                let (error, relative) = (largest(&got, &want), relative(&got, &want));
                println!("{weights:<5} {path}, {ranks} ranks: {error:.1e}, {relative:.1e}");
                match weights {
                    DType::BF16 if path == "fused" => {
                        assert!(relative <= 1e-3, "{weights}, {ranks} ranks: {relative}");
                    }
                    _ if path == "fused" && weights.block_len() > 1 => {
                        assert!(relative <= 1e-2, "{weights}, {ranks} ranks: {relative}");
                    }
                    _ => assert!(error <= 1e-4, "{weights}, {path}, {ranks} ranks: {error}"),
                }
            }
        }
    }
}

/// Root mean square of the error over that of the logits.
fn relative(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    (error / want.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

#[test]
fn what_ranks_compute_is_the_same_every_time() {
    let config = ModelConfig { kv_head_count: 4, ..tiny::config() };
    for weights in [DType::F32, DType::Q8_0] {
        let run = |threads| {
            let compute = tiny::compute(threads);
            ragged(&mut Bench::new(&config, weights, compute, 4), [None; 3])
        };
        let want = run(4);
        for threads in [1, 4, 8] {
            assert!(run(threads) == want, "{weights}, {threads} threads");
        }
        let mut whole = Vec::new();
        let mut bench = Bench::new(&config, weights, fused(), 4);
        for (ids, table) in sequences() {
            let mut batch = ForwardBatch::empty();
            batch.push(&ids, 0, table, BLOCK_LEN);
            batch.logit_rows = (0..ids.len() as u32).collect();
            whole.extend(bench.forward(&batch));
        }
        assert_eq!(sorted(&whole), sorted(&want), "{weights}: cut otherwise, and on their own");
    }
}

fn sorted(logits: &[f32]) -> Vec<u32> {
    let mut bits: Vec<u32> = logits.iter().map(|x| x.to_bits()).collect();
    bits.sort_unstable();
    bits
}

/// With DoRA's lengths too, which stretch what a rank has of a row.
#[test]
fn adapters_are_divided_with_their_weights() {
    let biases = Knobs { qkv_bias: true, out_bias: true, mlp_bias: true, ..Knobs::default() };
    let config = ModelConfig { kv_head_count: 4, knobs: biases, tied: false, ..tiny::config() };
    let stretched = |(role, delta): &(_, Delta)| {
        let length = |i: usize| 1.0 + (i % 5) as f32 / 10.0;
        let n = delta.factors.n();
        let dora = Dora { magnitude: (0..n).map(length).collect(), norm: vec![1.1; n] };
        (*role, Delta { dora: Some(Arc::new(dora)), ..delta.clone() })
    };
    let first = tiny::adapter(&config, 6, Float::F32, 40).unwrap();
    let dora = first.deltas().iter().map(stretched).collect();
    let adapters = [
        Arc::new(Adapter::from_deltas(&config, dora).unwrap()),
        Arc::new(tiny::adapter(&config, 3, Float::BF16, 41).unwrap()),
    ];
    for compute in [plain(), fused()] {
        let run = |ranks: usize, known: bool| {
            let mut bench = Bench::new(&config, DType::F32, compute.clone(), ranks);
            if !known {
                return ragged(&mut bench, [None; 3]);
            }
            let [first, second] = adapters.clone().map(|adapter| (adapter, 0.7));
            bench.model.put_adapters(LoraSlot(1), std::slice::from_ref(&first)).unwrap();
            bench.model.put_adapters(LoraSlot(2), &[first.clone(), second]).unwrap();
            let taken = bench.model.put_adapters(LoraSlot(2), &[first]).unwrap_err();
            assert!(taken.to_string().contains("taken"), "{taken}");
            let logits = ragged(&mut bench, [Some(LoraSlot(1)), None, Some(LoraSlot(2))]);
            bench.model.drop_adapters(LoraSlot(1));
            let mut batch = ForwardBatch::whole(&[1, 2], 0, BLOCK_LEN);
            batch.run_last_with(Some(LoraSlot(1)));
            let error = bench.model.forward(&batch, &mut bench.kv).unwrap_err();
            assert!(error.to_string().contains("not known"), "{error}");
            logits
        };
        let want = run(1, true);
        for ranks in [2, 4] {
            let error = largest(&run(ranks, true), &want);
            assert!(error <= 1e-4, "{ranks} ranks: {error}");
        }
        assert!(largest(&run(2, false), &want) > 0.1, "adapters that change nothing");
    }
}

#[test]
fn what_cannot_be_divided_is_refused_by_name() {
    let refused = |config: &ModelConfig, weights, ranks| {
        let compute = fused().divided(ranks).unwrap();
        let error = tiny::load(config, weights, 7, &compute).err().expect("refused");
        error.to_string()
    };
    let base = tiny::config();
    let error = refused(&base, DType::F32, 3);
    assert!(error.contains("num_attention_heads 8") && error.contains("3 devices"), "{error}");
    let error = refused(&base, DType::F32, 4);
    assert!(error.contains("num_key_value_heads 2"), "{error}");
    let odd = ModelConfig { ffn_len: 511, ..base.clone() };
    assert!(refused(&odd, DType::F32, 2).contains("intermediate_size 511"));
    // Half of 256 columns is no block of 256.
    let error = refused(&base, DType::Q4K, 2);
    assert!(error.contains("blk.0.attn_output.weight") && error.contains("256"), "{error}");
    assert!(fused().divided(0).is_err());
    assert!(fused().divided(2).unwrap().divided(2).is_err());
    assert!(fused().divided(2).unwrap().trainable().is_err());
}

/// Experts by columns, and as codes with scales apart where those of a rank are whole blocks.
#[test]
fn experts_of_folders_are_divided() {
    let goldens = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    let file = hearth_models::open(&goldens.join("gpt-oss")).unwrap();
    for (path, compute) in [("plain", plain()), ("fused", fused())] {
        let run = |ranks| {
            let compute = compute.clone().divided(ranks).unwrap();
            let (mut told, total) = (0, file.weights().tensor_bytes() as usize);
            let model = file.load(&compute, &mut |bytes| told += bytes).unwrap();
            assert_eq!(told, total, "{path}, {ranks} ranks: bytes that were told of");
            let mut kv = model.kv_store(model.config().kv_geometry(3, 16, KvDType::F32)).unwrap();
            let ids: Vec<u32> = tokens(40, 5).into_iter().map(|id| id % 264).collect();
            model.forward(&ForwardBatch::whole(&ids, 0, BLOCK_LEN), &mut kv).unwrap()
        };
        let error = largest(&run(2), &run(1));
        println!("{path}: {error:.1e}");
        assert!(error <= 1e-4, "{path}: {error}");
    }
    let codes = hearth_models::open(&goldens.join("gpt-oss-mxfp4")).unwrap();
    let refused = codes.check(&fused().divided(2).unwrap()).unwrap_err().to_string();
    assert!(refused.contains("MXFP4") && refused.contains("blocks of 32"), "{refused}");
    let mut told = 0;
    codes.load(&fused(), &mut |bytes| told += bytes).unwrap();
    assert_eq!(told as u64, codes.weights().tensor_bytes(), "codes and scales are told of");
}
