//! Hidden states of tiny random encoders equal those of Hugging Face `transformers` in both paths,
//! from every kind of file; a text has the same bits alone and in company; what is not understood
//! is refused by name.
//!
//! `tests/goldens/make_encoder_goldens.py` says what the goldens are.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use hearth_kernels::Pool;
use hearth_models::{AnyFile, Compute, EncoderBatch, EncoderFile, TextEncoder};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    path: String,
    golden: String,
}

struct Golden {
    texts: Vec<Vec<u32>>,
    /// `[T, hidden]`
    hidden: Vec<f32>,
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens")
}

fn cases() -> Vec<Case> {
    let index = fs::read(goldens().join("encoders.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&index).unwrap();
    assert!(cases.len() >= 3);
    cases
}

fn read_golden(path: &Path) -> Golden {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let ints = |name: &str| -> Vec<u32> {
        let values: Vec<i32> = tensors[name].to_vec1().unwrap();
        values.into_iter().map(|id| id as u32).collect()
    };
    let (ids, cu_q) = (ints("ids"), ints("cu_q"));
    let text = |b: &[u32]| ids[b[0] as usize..b[1] as usize].to_vec();
    Golden {
        texts: cu_q.windows(2).map(text).collect(),
        hidden: tensors["hidden"].flatten_all().unwrap().to_vec1().unwrap(),
    }
}

fn plain() -> Compute {
    Compute::Plain(Device::Cpu, DType::F32)
}

fn fused(threads: usize) -> Compute {
    Compute::Fused(Arc::new(Pool::new(threads)))
}

fn open(path: &Path) -> EncoderFile {
    match hearth_models::open_any(path).unwrap() {
        AnyFile::Encoder(file) => file,
        AnyFile::Decoder(_) => panic!("{} is no encoder", path.display()),
    }
}

fn load(path: &str, compute: &Compute) -> Box<dyn TextEncoder> {
    open(&goldens().join(path)).load(compute, &mut |_| {}).unwrap()
}

fn hidden(model: &dyn TextEncoder, texts: &[Vec<u32>]) -> Vec<f32> {
    let mut batch = EncoderBatch::default();
    texts.iter().for_each(|text| batch.push(text));
    model.forward(&batch).unwrap()
}

#[test]
fn both_paths_equal_transformers() {
    for (name, compute) in [("plain", plain()), ("fused", fused(2))] {
        for case in cases() {
            let golden = read_golden(&goldens().join(&case.golden));
            let got = hidden(&*load(&case.path, &compute), &golden.texts);
            assert_eq!(got.len(), golden.hidden.len());
            let errors = got.iter().zip(&golden.hidden).map(|(a, b)| (a - b).abs());
            let error = errors.fold(0.0, f32::max);
            println!("{name} {:<14} {error:.1e}", case.path);
            assert!(error <= 1e-4, "{name} {}: {error}", case.path);
        }
    }
}

#[test]
fn a_text_has_the_same_bits_alone_in_company_and_on_any_number_of_threads() {
    let texts = read_golden(&goldens().join("bert/golden.safetensors")).texts;
    let bits = |states: Vec<f32>| states.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let want = bits(hidden(&*load("bert", &fused(1)), &texts));
    let model = load("bert", &fused(3));
    assert_eq!(bits(hidden(&*model, &texts)), want);
    let alone = texts.iter().flat_map(|text| hidden(&*model, std::slice::from_ref(text)));
    assert_eq!(bits(alone.collect()), want);
    assert_eq!(hidden(&*model, &[]), [0.0; 0]);
}

#[test]
fn tokens_and_positions_beyond_the_tables_are_refused() {
    for compute in [plain(), fused(1)] {
        let model = load("bert", &compute);
        for (text, word) in [(vec![1, 131], "vocabulary"), (vec![1; 65], "position 64")] {
            let mut batch = EncoderBatch::default();
            batch.push(&text);
            let error = model.forward(&batch).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let mut batch = EncoderBatch::default();
        batch.push(&[1, 2, 3]);
        batch.cu_q[1] = 4;
        assert!(model.forward(&batch).is_err());
    }
}

type Tensors = Vec<(String, Tensor)>;

/// The golden `bert` with another configuration and other tensors.
fn variant(folder: &Path, config: &dyn Fn(&mut Value), tensors: &dyn Fn(&mut Tensors)) {
    let golden = goldens().join("bert");
    let json = fs::read(golden.join("config.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&json).unwrap();
    config(&mut json);
    fs::write(folder.join("config.json"), json.to_string()).unwrap();
    let all = candle_core::safetensors::load(golden.join("model.safetensors"), &Device::Cpu);
    let mut all: Vec<_> = all.unwrap().into_iter().collect();
    tensors(&mut all);
    let all = all.into_iter().collect();
    candle_core::safetensors::save(&all, folder.join("model.safetensors")).unwrap();
}

#[test]
fn spellings_of_names_do_not_change_the_numbers() {
    let golden = read_golden(&goldens().join("bert/golden.safetensors"));
    let want = hidden(&*load("bert", &fused(1)), &golden.texts);
    let renamed = |name: &str| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        format!("bert.{}", name.replace("LayerNorm.bias", "LayerNorm.beta"))
    };
    let folder = tempfile::tempdir().unwrap();
    variant(folder.path(), &|_| {}, &|tensors| {
        tensors.iter_mut().for_each(|(name, _)| *name = renamed(name));
        let head = Tensor::zeros((2, 48), DType::F32, &Device::Cpu).unwrap();
        tensors.push(("cls.seq_relationship.weight".into(), head));
        let places = Tensor::arange(0i64, 64, &Device::Cpu).unwrap();
        tensors.push(("bert.embeddings.position_ids".into(), places));
    });
    let model = open(folder.path()).load(&fused(1), &mut |_| {}).unwrap();
    assert_eq!(hidden(&*model, &golden.texts), want);
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let refused = |word: &str, config: &dyn Fn(&mut Value), tensors: &dyn Fn(&mut Tensors)| {
        let folder = tempfile::tempdir().unwrap();
        variant(folder.path(), config, tensors);
        let error = hearth_models::open_any(folder.path()).err();
        let error = error.unwrap_or_else(|| panic!("{word} is taken")).to_string();
        assert!(error.contains(word), "`{error}` does not mention `{word}`");
    };
    let keys = [
        ("hidden_act", json!("relu")),
        ("position_embedding_type", json!("relative_key")),
        ("is_decoder", json!(true)),
        ("add_cross_attention", json!(true)),
        ("num_attention_heads", json!(7)),
        ("num_attention_heads", json!(0)),
        ("hidden_size", Value::Null),
        ("layer_norm_eps", json!(-1.0)),
    ];
    for (key, value) in keys {
        refused(key, &|c| c[key] = value.clone(), &|_| {});
    }
    let drop = |name: &'static str| move |tensors: &mut Tensors| tensors.retain(|(n, _)| n != name);
    let bias = "encoder.layer.1.attention.output.LayerNorm.bias";
    refused(bias, &|_| {}, &drop(bias));
    let weight = "encoder.layer.0.output.dense.weight";
    refused(weight, &|_| {}, &drop(weight));
    refused("encoder.layer.0.adapter.weight", &|_| {}, &|tensors| {
        let extra = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        tensors.push(("encoder.layer.0.adapter.weight".into(), extra));
    });
    refused("word_embeddings", &|c| c["vocab_size"] = json!(130), &|_| {});
}

#[test]
fn an_encoder_is_no_language_model_and_says_so() {
    for path in ["bert", "bert.gguf"] {
        let error = hearth_models::open(&goldens().join(path)).err().unwrap().to_string();
        assert!(error.contains("embeds text"), "{error}");
    }
}
