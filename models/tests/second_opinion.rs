//! A second implementation as judge: candle-transformers' own decoders on the same files, over a
//! prompt that is longer than the goldens and almost fills the context, then a few steps.
//!
//! Only what both implement alike is asked for: no sliding window (candle's is one position wider
//! than the published one), no rope scaling, heads that divide the hidden size. Not Gemma 3, whose
//! cache does not run there.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{gemma, gemma2, llama, mistral, qwen2, qwen3, qwen3_moe};
use hearth_models::{Compute, ForwardBatch, KvDType, Model};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const PROMPT_LEN: usize = 240;
const STEP_COUNT: usize = 8;
const BLOCK_LEN: usize = 16;
const TOLERANCE: f32 = 1e-4;

/// What candle-transformers computes: `(token ids, position of the first)` to the logits of the
/// last.
type Judge = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;

#[test]
fn candle_transformers_agrees() {
    for family in ["llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "softmax", "gemma", "gemma2"]
    {
        let folder = tempfile::tempdir().unwrap();
        let config = prepare(family, folder.path());
        let mut judge = judge(family, &config, folder.path()).unwrap();
        let file = hearth_models::open(folder.path()).unwrap();
        let plain = Compute::Plain(Device::Cpu, DType::F32);
        let model = file.load(&plain, &mut |_| {}).unwrap();
        let error = largest_error(&*model, &mut judge);
        println!("{family}: largest error {error:e}");
        assert!(error <= TOLERANCE, "{family}: logits differ by {error}");
    }
}

/// The golden model of a family in a folder of its own, without a window.
fn prepare(family: &str, folder: &Path) -> Value {
    let of = if family == "softmax" { "qwen3-moe" } else { family };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(of);
    std::fs::copy(golden.join("model.safetensors"), folder.join("model.safetensors")).unwrap();
    let text = std::fs::read(golden.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    assert!(
        PROMPT_LEN + STEP_COUNT <= config["max_position_embeddings"].as_u64().unwrap() as usize
    );
    match family {
        "mistral" => config["sliding_window"] = Value::Null,
        // Experts weigh what the softmax over all of them says.
        "softmax" => config["norm_topk_prob"] = json!(false),
        "gemma2" => {
            config["sliding_window"] = json!(1 << 20);
            config["query_pre_attn_scalar"] = config["head_dim"].clone();
        }
        _ => {}
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    config
}

fn judge(family: &str, config: &Value, folder: &Path) -> Result<Judge> {
    let device = Device::Cpu;
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &device)?;
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &device);
    Ok(match family {
        "llama" => {
            let config = read::<llama::LlamaConfig>(config, &[]).into_config(false);
            let mut cache = llama::Cache::new(true, DType::F32, &config, &device)?;
            let model = llama::Llama::load(weights, &config)?;
            Box::new(move |ids, start| model.forward(ids, start, &mut cache))
        }
        "mistral" => {
            let config = read(config, &[("use_flash_attn", json!(false))]);
            let mut model = mistral::Model::new(&config, weights)?;
            Box::new(move |ids, start| model.forward(ids, start)?.squeeze(1))
        }
        "qwen2" => {
            // Read even where `use_sliding_window` is false.
            let config = read(config, &[("sliding_window", json!(1 << 20))]);
            let mut model = qwen2::ModelForCausalLM::new(&config, weights)?;
            Box::new(move |ids, start| model.forward(ids, start)?.squeeze(1))
        }
        "qwen3" => {
            let mut model = qwen3::ModelForCausalLM::new(&read(config, &[]), weights)?;
            Box::new(move |ids, start| model.forward(ids, start)?.squeeze(1))
        }
        "qwen3-moe" | "softmax" => {
            let mut model = qwen3_moe::ModelForCausalLM::new(&read(config, &[]), weights)?;
            Box::new(move |ids, start| model.forward(ids, start)?.squeeze(1))
        }
        "gemma" => {
            let config = read(config, &[("hidden_act", Value::Null)]);
            let mut model = gemma::Model::new(false, &config, weights)?;
            Box::new(move |ids, start| model.forward(ids, start)?.squeeze(1))
        }
        "gemma2" => {
            let mut model = gemma2::Model::new(false, &read(config, &[]), weights)?;
            Box::new(move |ids, start| model.forward(ids, start)?.squeeze(1))
        }
        other => panic!("{other} is not here"),
    })
}

/// A config of candle-transformers, with the fields that only it knows.
fn read<T: DeserializeOwned>(config: &Value, more: &[(&str, Value)]) -> T {
    let mut config = config.clone();
    for (key, value) in more {
        config[*key] = value.clone();
    }
    serde_json::from_value(config).unwrap()
}

/// Over the last row of the prompt and every step.
fn largest_error(model: &dyn Model, judge: &mut Judge) -> f32 {
    let vocab = model.config().vocab_len;
    let all = PROMPT_LEN + STEP_COUNT;
    let ids: Vec<u32> = (0..all).map(|i| ((i * i * 31 + i * 17 + 3) % vocab) as u32).collect();
    let blocks: Vec<u32> = (0..all.div_ceil(BLOCK_LEN) as u32).collect();
    let geometry = model.config().kv_geometry(blocks.len(), BLOCK_LEN, KvDType::F32);
    let mut kv = model.kv_store(geometry).unwrap();
    let mut largest = 0f32;
    let pieces = std::iter::once(0..PROMPT_LEN).chain((PROMPT_LEN..all).map(|i| i..i + 1));
    for piece in pieces {
        let mut batch = ForwardBatch::empty();
        batch.push(&ids[piece.clone()], piece.start, blocks.clone(), BLOCK_LEN);
        batch.logit_rows = vec![piece.len() as u32 - 1];
        let ours = model.forward(&batch, &mut kv).unwrap();
        let input = Tensor::new(&ids[piece.clone()], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let theirs = judge(&input, piece.start).unwrap().flatten_all().unwrap();
        let theirs: Vec<f32> = theirs.to_vec1().unwrap();
        assert_eq!(ours.len(), theirs.len());
        let errors = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
        largest = errors.fold(largest, f32::max);
    }
    largest
}
