//! Logits of tiny random models equal those of Hugging Face `transformers`, in both paths, from
//! every kind of file: a 40-token prefill and 32 greedy decode steps.
//!
//! `tests/goldens/README.md` says what each case exercises and how the goldens are made.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use hearth_kernels::Pool;
use hearth_models::weights::Mix;
use hearth_models::{Compute, ForwardBatch, KvDType, KvStore, Model};
use serde::Deserialize;

const BLOCK_LEN: usize = 16;

#[derive(Deserialize)]
struct Case {
    path: String,
    golden: String,
    family: String,
    weights: String,
}

struct Golden {
    /// Prompt, then greedy ids.
    ids: Vec<u32>,
    prompt_len: usize,
    /// Logits of every prompt row and of every step. `[rows, vocab]`
    logits: Vec<f32>,
}

#[test]
fn plain_path_equals_transformers() {
    run(&Compute::Plain(Device::Cpu, DType::F32), |_| Some((Limit::Largest(1e-4), None)));
}

/// Quantised weights meet 8-bit activations in the fused path, an error of about one part in 250
/// for each product, and weights in bf16 meet activations in bf16, so these logits are held by
/// their mean error over each step.
#[test]
fn fused_path_equals_transformers() {
    run(&Compute::Fused(Arc::new(Pool::new(2))), |case| {
        let limit = match case.weights.as_str() {
            "float32" | "float16" => Limit::Largest(1e-4),
            // Of these the GGUF file is in f16.
            "bfloat16" if case.path.ends_with(".gguf") => Limit::Largest(1e-4),
            "bfloat16" if case.path == "gemma" => Limit::Relative(0.08),
            "bfloat16" => Limit::Relative(0.02),
            "Q8_0" | "Q4_0" | "MXFP4" => Limit::Relative(0.06),
            other => panic!("no tolerance for {other}"),
        };
        Some((limit, None))
    });
}

/// The same numbers as f32 meet activations in f32.
#[test]
fn what_is_in_bf16_equals_transformers_as_f32() {
    let mix = Mix::named("f32").unwrap();
    run(&Compute::Fused(Arc::new(Pool::new(2))), |case| {
        (case.weights == "bfloat16").then_some((Limit::Largest(1e-4), Some(mix)))
    });
}

/// The table of allowed errors.
#[derive(Clone, Copy, Debug)]
enum Limit {
    /// Of any logit.
    Largest(f32),
    /// Root mean square of the error over that of the logits.
    Relative(f32),
}

impl Limit {
    /// How much of the limit is used; at most 1 passes.
    fn used(self, got: &[f32], want: &[f32]) -> f32 {
        assert_eq!(got.len(), want.len());
        let errors = got.iter().zip(want).map(|(a, b)| (a - b).abs());
        match self {
            Self::Largest(limit) => errors.fold(0.0, f32::max) / limit,
            Self::Relative(limit) => {
                let square = |sum: f32, x: f32| sum + x * x;
                let (error, size) =
                    (errors.fold(0.0, square), want.iter().copied().fold(0.0, square));
                (error / size).sqrt() / limit
            }
        }
    }
}

/// Runs the cases that have a limit, with their weights as they are or in a mix.
fn run(compute: &Compute, of: impl Fn(&Case) -> Option<(Limit, Option<Mix>)>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    let index = std::fs::read(folder.join("index.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&index).unwrap();
    assert!(cases.len() >= 15);
    let (mut failures, mut count) = (Vec::new(), 0);
    for case in &cases {
        let Some((limit, mix)) = of(case) else { continue };
        count += 1;
        let (prefill, decode) = errors(compute, &folder, case, limit, mix);
        println!("{:<40} {limit:?}: prefill {prefill:.3}, decode {decode:.3}", case.path);
        if !(prefill <= 1.0 && decode <= 1.0) {
            failures.push(&case.path);
        }
    }
    assert!(count > 0 && failures.is_empty(), "beyond the tolerance: {failures:?}");
}

/// Share of the limit that the prefill and the worst decode step use.
fn errors(
    compute: &Compute,
    folder: &Path,
    case: &Case,
    limit: Limit,
    mix: Option<Mix>,
) -> (f32, f32) {
    let mut file = hearth_models::open(&folder.join(&case.path)).unwrap();
    if let Some(mix) = mix {
        file = file.quantized(mix).unwrap();
    }
    // GGUF has no family of its own for Mistral.
    assert_eq!(file.config().family, case.family, "{}", case.path);
    let model = file.load(compute, &mut |_| {}).unwrap();
    let golden = read_golden(&folder.join(&case.golden));
    let vocab = model.config().vocab_len;
    let mut kv = store(&*model, golden.ids.len());
    let prompt = &golden.ids[..golden.prompt_len];
    let logits = model.forward(&ForwardBatch::whole(prompt, 0, BLOCK_LEN), &mut kv).unwrap();
    let (want, steps) = golden.logits.split_at(golden.prompt_len * vocab);
    let prefill = limit.used(&logits, want);
    let mut decode = 0f32;
    let blocks: Vec<u32> = (0..golden.ids.len().div_ceil(BLOCK_LEN) as u32).collect();
    for (step, want) in steps.chunks_exact(vocab).enumerate() {
        let position = golden.prompt_len + step;
        let mut batch = ForwardBatch::empty();
        batch.push(&golden.ids[position..=position], position, blocks.clone(), BLOCK_LEN);
        batch.logit_rows = vec![0];
        let logits = model.forward(&batch, &mut kv).unwrap();
        decode = decode.max(limit.used(&logits, want));
    }
    (prefill, decode)
}

fn store(model: &dyn Model, tokens: usize) -> KvStore {
    let blocks = tokens.div_ceil(BLOCK_LEN);
    model.kv_store(model.config().kv_geometry(blocks, BLOCK_LEN, KvDType::F32)).unwrap()
}

fn read_golden(path: &Path) -> Golden {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        tensors[name].to_vec1::<i32>().unwrap().into_iter().map(|id| id as u32).collect()
    };
    let logits =
        |name: &str| -> Vec<f32> { tensors[name].flatten_all().unwrap().to_vec1().unwrap() };
    let prompt = ids("prompt_ids");
    let prompt_len = prompt.len();
    Golden {
        ids: [prompt, ids("decode_ids")].concat(),
        prompt_len,
        logits: [logits("prefill_logits"), logits("decode_logits")].concat(),
    }
}
