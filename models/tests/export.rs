//! What is written to GGUF is the model that was read: every family, every mix, both ways to
//! quantise.

use std::path::Path;
use std::sync::Arc;

use hearth_kernels::Pool;
use hearth_kernels::cases::randoms;
use hearth_kernels::lora::Float;
use hearth_models::weights::{DType, Mix, TensorType, Value};
use hearth_models::{Compute, Export, ForwardBatch, KvDType, ModelFile, open, tiny};
use serde_json::json;

const BLOCK_LEN: usize = 16;
const PROMPT: [u32; 9] = [1, 17, 93, 5, 60, 101, 7, 7, 40];

fn logits(file: &ModelFile, compute: &Compute) -> Vec<f32> {
    let model = file.load(compute, &mut |_| {}).unwrap();
    let geometry = model.config().kv_geometry(1, BLOCK_LEN, KvDType::F32);
    let mut kv = model.kv_store(geometry).unwrap();
    model.forward(&ForwardBatch::whole(&PROMPT, 0, BLOCK_LEN), &mut kv).unwrap()
}

fn fused() -> (Arc<Pool>, Compute) {
    let pool = Arc::new(Pool::new(2));
    (Arc::clone(&pool), Compute::Fused(pool))
}

fn export(file: &ModelFile, mix: &str, pool: &Pool, path: &Path) -> hearth_models::Result<()> {
    let mix = Mix::named(mix).unwrap();
    Export { file, mix, pool, adapters: &[] }.write(path, &mut |_| Ok(()), &mut |_| {})
}

fn assert_same_bits(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}: other logits");
}

#[test]
fn every_family_survives_the_way_to_gguf() {
    let (pool, compute) = fused();
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    let folder = tempfile::tempdir().unwrap();
    let names = ["llama", "llama3", "llama-odd-sharded", "mistral", "qwen2", "qwen3", "qwen2-yarn"];
    let gemmas = ["gemma", "gemma2-q8_0.gguf", "gemma3", "gemma3.gguf"];
    let oss = ["gpt-oss", "gpt-oss.gguf", "gpt-oss-mxfp4", "gpt-oss-mxfp4.gguf"];
    let files = ["llama3.gguf", "qwen3.gguf", "qwen2-q4_0.gguf", "qwen3-moe", "qwen3-moe.gguf"];
    for name in names.into_iter().chain(gemmas).chain(oss).chain(files) {
        let source = open(&goldens.join(name)).unwrap();
        let path = folder.path().join(format!("{name}.out.gguf"));
        let mix = match name {
            "qwen2-q4_0.gguf" => "q4_0",
            "gemma2-q8_0.gguf" => "q8_0",
            // As they are: weights in bf16 meet other activations than those in f32.
            "qwen2-yarn" | "gemma" | "gemma3" => "bf16",
            _ => "f32",
        };
        let made = export(&source, mix, &pool, &path);
        if name == "qwen2-q4_0.gguf" {
            // Its tied embedding would be cut from four bits to other six.
            let error = made.unwrap_err().to_string();
            assert!(error.contains("token_embd") && error.contains("Q4_0 already"), "{error}");
            continue;
        }
        made.unwrap();
        let written = open(&path).unwrap();
        assert_eq!(written.config().windows, source.config().windows, "{name}");
        assert_eq!(written.config().tied, source.config().tied, "{name}");
        assert_eq!(written.config().rope.dim, source.config().rope.dim, "{name}");
        assert_eq!(written.config().local_rope, source.config().local_rope, "{name}");
        let (a, b) = (logits(&source, &compute), logits(&written, &compute));
        if name.starts_with("gpt-oss-mxfp4") {
            let info = written.weights().info("blk.1.ffn_up_exps.weight").unwrap();
            assert_eq!(info.ty, TensorType::Readable(DType::MXFP4), "stays what it is");
            assert_eq!(info.shape, [3, 32, 64]);
        }
        if name == "llama3" || name == "qwen2-yarn" {
            // Divisors and factors are f32 in the file.
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4, "{name}: {worst}");
        } else {
            assert_same_bits(&a, &b, name);
        }
    }
    let left = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path());
    let parts: Vec<_> = left.filter(|p| p.extension().is_none_or(|e| e != "gguf")).collect();
    assert!(parts.is_empty(), "unfinished files stay: {parts:?}");
}

/// A golden model with other words in its `config.json`.
fn changed(golden: &str, folder: &Path, changes: &[(&str, serde_json::Value)]) -> ModelFile {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(golden);
    let weights = "model.safetensors";
    std::fs::copy(source.join(weights), folder.join(weights)).unwrap();
    let text = std::fs::read(source.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    changes.iter().for_each(|(key, value)| config[*key] = value.clone());
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    open(folder).unwrap()
}

/// What would be something else for a reader of GGUF is not dropped; the rest arrives.
#[test]
fn what_gguf_has_no_word_for_is_refused() {
    let (pool, compute) = fused();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made.gguf");
    let width = ("query_pre_attn_scalar", json!(16)); // of a head
    for (key, value) in [
        ("query_pre_attn_scalar", json!(24)),
        ("attn_logit_softcapping", json!(null)),
        ("final_logit_softcapping", json!(null)),
    ] {
        let file = changed("gemma2", folder.path(), &[width.clone(), (key, value)]);
        let error = export(&file, "f32", &pool, &path).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
    let base = ("rope_local_base_freq", json!(50.0));
    for (golden, change) in [("gemma2", width), ("gemma3", base)] {
        let file = changed(golden, folder.path(), &[change]);
        export(&file, "bf16", &pool, &path).unwrap();
        let written = open(&path).unwrap();
        assert_eq!(written.config().windows, file.config().windows);
        assert_eq!(written.config().local_rope, file.config().local_rope);
        assert_same_bits(&logits(&file, &compute), &logits(&written, &compute), golden);
    }
    let softmax = ("norm_topk_prob", json!(false));
    let file = changed("qwen3-moe", folder.path(), &[softmax]);
    let error = export(&file, "f32", &pool, &path).unwrap_err().to_string();
    assert!(error.contains("norm_topk_prob"), "{error}");
    // A head of its own is not what readers of Gemma 2 look for.
    let file = changed("gemma2", folder.path(), &[("query_pre_attn_scalar", json!(16))]);
    let adapter = tiny::adapter(file.config(), 2, Float::F32, 7).unwrap();
    let (mix, adapters) = (Mix::named("f32").unwrap(), [(Arc::new(adapter), 1.0)]);
    let merged = Export { file: &file, mix, pool: &pool, adapters: &adapters };
    let error = merged.write(&path, &mut |_| Ok(()), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("tie_word_embeddings"), "{error}");
}

/// A Llama folder in bf16 whose MLP is 320 wide: no whole block of 256, and f16 never.
fn write_folder(folder: &Path) {
    let (hidden, ffn, vocab, layers, kv) = (256, 320, 300, 8, 128);
    let config = json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": vocab, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![vocab, hidden]),
        ("lm_head.weight".into(), vec![vocab, hidden]),
        ("model.norm.weight".into(), vec![hidden]),
    ];
    for l in 0..layers {
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{l}.{name}.weight"), shape.to_vec()));
        };
        add("self_attn.q_proj", &[hidden, hidden]);
        add("self_attn.k_proj", &[kv, hidden]);
        add("self_attn.v_proj", &[kv, hidden]);
        add("self_attn.o_proj", &[hidden, hidden]);
        add("mlp.gate_proj", &[ffn, hidden]);
        add("mlp.up_proj", &[ffn, hidden]);
        add("mlp.down_proj", &[hidden, ffn]);
        add("input_layernorm", &[hidden]);
        add("post_attention_layernorm", &[hidden]);
    }
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (i, (name, shape)) in tensors.iter().enumerate() {
        let start = data.len();
        let size = if shape.len() == 1 { 1.0 } else { 0.12 };
        for x in randoms(shape.iter().product(), i as u64) {
            let x = if shape.len() == 1 { 1.0 + 0.1 * x } else { x };
            data.extend(half::bf16::from_f32(x * size).to_le_bytes());
        }
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

#[test]
fn quantised_while_loading_is_quantised_in_a_file() {
    let (pool, compute) = fused();
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path());
    let source = || open(folder.path()).unwrap();
    let exact = logits(&source(), &compute);
    let size = exact.iter().map(|x| x * x).sum::<f32>();
    // Root mean square of the error over that of the logits: what eight layers of random weights,
    // which no training made robust, make of rounding.
    for (mix, tolerance) in [
        ("f16", 1e-2),
        ("q8_0", 0.05),
        ("q6_k", 0.1),
        ("q5_k_m", 0.2),
        ("q4_k_m", 0.35),
        ("q4_k_s", 0.35),
        ("iq4_nl", 0.4),
        ("q4_0", 0.5),
        ("q4_1", 0.45),
        ("q5_0", 0.3),
        ("q5_1", 0.25),
        ("q3_k_m", 0.8),
        ("q2_k", 1.3),
    ] {
        let path = folder.path().join(format!("{mix}.gguf"));
        export(&source(), mix, &pool, &path).unwrap();
        let written = open(&path).unwrap();
        let named = Mix::named(mix).unwrap();
        let meta = written.weights().metadata().unwrap();
        assert_eq!(meta.value("general.file_type").unwrap(), Some(Value::U32(named.file_type())));
        let loaded = source().quantized(named).unwrap();
        assert_eq!(
            loaded.weight_bytes(&compute),
            written.weight_bytes(&compute),
            "{mix}: the memory plan knows the types"
        );
        let (a, b) = (logits(&loaded, &compute), logits(&written, &compute));
        assert_same_bits(&a, &b, mix);
        let error = a.iter().zip(&exact).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
        let error = (error / size).sqrt();
        println!("{mix}: {error:.4}");
        assert!(error <= tolerance, "{mix}: {error}");
    }
    let ty = |file: &str, name: &str| {
        let weights = open(&folder.path().join(file)).unwrap();
        weights.weights().info(name).unwrap().ty.clone()
    };
    for (name, dtype) in [
        ("output.weight", DType::Q6K),
        ("token_embd.weight", DType::Q4K),
        ("blk.0.attn_v.weight", DType::Q6K),
        ("blk.1.attn_v.weight", DType::Q4K),
        ("blk.0.ffn_down.weight", DType::Q8_0), // rows of 320 for Q6_K
        ("blk.1.ffn_down.weight", DType::Q5_0), // and for Q4_K
        ("blk.1.ffn_norm.weight", DType::F32),
    ] {
        assert_eq!(ty("q4_k_m.gguf", name), TensorType::Readable(dtype), "{name}");
    }

    let error = open(&folder.path().join("q4_k_m.gguf")).unwrap();
    let error = error.quantized(Mix::named("q8_0").unwrap()).map(drop).unwrap_err().to_string();
    assert!(error.contains("already"), "{error}");
}

#[test]
fn numbers_that_are_not_finite_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path());
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len() - 2 * 256 * 4; // in a matrix, before the last two norms
    bytes[end..end + 2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let out = folder.path().join("out.gguf");
    let error = export(&open(folder.path()).unwrap(), "q8_0", &Pool::new(1), &out).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left behind");
}

/// The plan of memory is that of what is packed, whichever kind of file it comes from.
#[test]
fn experts_are_planned_as_they_are_packed() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    let (_pool, compute) = fused();
    let of = |name: &str, mix: Option<&str>| {
        let file = open(&goldens.join(name)).unwrap();
        let mix = mix.map(|name| Mix::named(name).unwrap());
        mix.map_or(Ok(file), |mix| open(&goldens.join(name)).unwrap().quantized(mix)).unwrap()
    };
    for mix in [None, Some("q8_0"), Some("f32")] {
        let [folder, gguf] = ["gpt-oss-mxfp4", "gpt-oss-mxfp4.gguf"].map(|name| of(name, mix));
        let bytes = [&folder, &gguf].map(|file| file.weight_bytes(&compute));
        // Routers are f32 in the GGUF file and f16 in the folder, and f32 once they are taken.
        assert_eq!(bytes[0], bytes[1], "{mix:?}");
        let (a, b) = (logits(&folder, &compute), logits(&gguf, &compute));
        assert_same_bits(&a, &b, "codes stay what they are");
    }
    let codes = |mix| of("gpt-oss-mxfp4.gguf", mix).weight_bytes(&compute);
    // 3 experts of 32 by 64 in two layers, three matrices each.
    let experts = 2 * 3 * 3 * hearth_kernels::matmul::Packed::bytes_of(DType::MXFP4, 32, 64) as u64;
    assert!(codes(Some("f32")) - codes(None) < 2 * codes(None), "experts did not grow");
    assert!(codes(None) > experts);
}
