//! Adapters merged into a new model say what they say beside the base.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth_kernels::Pool;
use hearth_kernels::lora::Float;
use hearth_models::weights::Mix;
use hearth_models::{
    Adapter, Compute, Export, ForwardBatch, KvDType, LoraSlot, ModelFile, open, tiny,
};

const PROMPT: [u32; 9] = [1, 17, 93, 5, 60, 101, 7, 7, 40];
const SLOT: LoraSlot = LoraSlot(1);

type Weighted = (Arc<Adapter>, f32);

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens")
}

fn compute() -> Compute {
    Compute::Fused(Arc::new(Pool::new(2)))
}

fn logits(file: &ModelFile, adapters: &[Weighted]) -> Vec<f32> {
    let mut model = file.load(&compute(), &mut |_| {}).unwrap();
    model.put_adapters(SLOT, adapters).unwrap();
    let mut kv = model.kv_store(model.config().kv_geometry(1, 16, KvDType::F32)).unwrap();
    let mut batch = ForwardBatch::whole(&PROMPT, 0, 16);
    batch.lora_slot = vec![Some(SLOT)];
    model.forward(&batch, &mut kv).unwrap()
}

/// Logits of the model that comes of the merge.
fn merged(file: &ModelFile, adapters: &[Weighted], mix: &str) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("merged.gguf");
    let pool = Pool::new(2);
    let export = Export { file, mix: Mix::named(mix).unwrap(), pool: &pool, adapters };
    export.write(&path, &mut |_| Ok(()), &mut |_| {}).unwrap();
    logits(&open(&path).unwrap(), &[])
}

fn largest(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Files of both formats, with rows of q and k in both orders.
#[test]
fn merged_files_say_the_same() {
    for (base, adapter) in [
        ("llama", "llama"),
        ("llama.gguf", "llama"),
        ("llama.gguf", "llama.gguf"),
        ("qwen2", "qwen2"),
        ("qwen3.gguf", "qwen3"),
        ("llama-odd", "llama-odd"),
    ] {
        let file = open(&goldens().join(base)).unwrap();
        let path = goldens().join("lora").join(adapter);
        let adapter = Adapter::open(&path, &file, &Pool::new(1)).unwrap();
        let adapters = [(Arc::new(adapter), 1.0)];
        let error = largest(&merged(&file, &adapters, "f32"), &logits(&file, &adapters));
        println!("{base}: {error:.1e}");
        assert!(error <= 1e-4, "{base}: {error}");
    }
}

/// Of a tied model, the embedding and the head go their own ways; weights count. What one of them
/// has in bf16 is taken as f32, in which it is merged: activations would be rounded for the former.
#[test]
fn several_are_merged_by_their_weights() {
    for base in ["qwen2", "qwen3.gguf", "mistral", "gemma3"] {
        let file = open(&goldens().join(base)).unwrap();
        let file = file.quantized(Mix::named("f32").unwrap()).unwrap();
        let random = |rank, seed| tiny::adapter(file.config(), rank, Float::F32, seed).unwrap();
        let adapters = [(Arc::new(random(3, 1)), 0.5), (Arc::new(random(5, 2)), -0.25)];
        let (together, base_alone) = (logits(&file, &adapters), logits(&file, &[]));
        assert!(largest(&together, &base_alone) > 0.1, "{base}: nothing changes");
        let error = largest(&merged(&file, &adapters, "f32"), &together);
        println!("{base}: {error:.1e}");
        assert!(error <= 1e-4, "{base}: {error}");
    }
}

/// A base in 8 bits with the adapter beside it, and the merge in 8 bits.
#[test]
fn a_merge_may_be_quantised() {
    let file = open(&goldens().join("llama-q8_0.gguf")).unwrap();
    let adapter = tiny::adapter(file.config(), 4, Float::F32, 3).unwrap();
    let adapters = [(Arc::new(adapter), 0.5)];
    let (got, want) = (merged(&file, &adapters, "q8_0"), logits(&file, &adapters));
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
    let error = (error / want.iter().map(|x| square(*x)).sum::<f64>()).sqrt();
    println!("{error:.1e}");
    assert!(error < 0.06, "{error}");
}
