//! What is not understood is not loaded, and the error names the thing: a tensor, a key, a word.
//!
//! Every case is a sound model of `tests/goldens` with one change. Files that break their format
//! are `weights_hostile.rs`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor, safetensors};
use hearth_kernels::Pool;
use hearth_kernels::quant::{self, DType};
use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::{Value as GgufValue, Weights};
use hearth_models::{Compute, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

type Tensors = HashMap<String, Tensor>;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(name)
}

/// Opens, which refuses all that is ever refused, and loads on both paths.
fn load(path: &Path) -> Result<()> {
    let file = hearth_models::open(path)?;
    for compute in
        [Compute::Plain(Device::Cpu, candle_core::DType::F32), Compute::Fused(Pool::new(1).into())]
    {
        file.load(&compute, &mut |_| {}).expect("it was opened");
    }
    Ok(())
}

/// The refusal mentions every one of `words`.
fn assert_refused(path: &Path, words: &[&str]) {
    let Err(error) = load(path) else { panic!("loaded, although {words:?}") };
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "`{text}` does not mention `{word}`");
    }
}

/// A golden folder with another config or other tensors.
fn folder(
    name: &str,
    config: impl FnOnce(&mut Value),
    tensors: impl FnOnce(&mut Tensors),
) -> TempDir {
    let (from, to) = (golden(name), TempDir::new().unwrap());
    let mut json = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    config(&mut json);
    fs::write(to.path().join("config.json"), json.to_string()).unwrap();
    let mut all = safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    tensors(&mut all);
    safetensors::save(&all, to.path().join("model.safetensors")).unwrap();
    to
}

fn assert_config_refused(name: &str, change: impl FnOnce(&mut Value), words: &[&str]) {
    assert_refused(folder(name, change, |_| {}).path(), words);
}

fn assert_tensors_refused(name: &str, change: impl FnOnce(&mut Tensors), words: &[&str]) {
    assert_refused(folder(name, |_| {}, change).path(), words);
}

#[test]
fn unchanged_copies_load() {
    for name in ["llama", "qwen2", "qwen3", "mistral", "gpt-oss", "gpt-oss-mxfp4"] {
        load(folder(name, |_| {}, |_| {}).path()).unwrap();
    }
    load(&gguf("llama.gguf", |_, _| Edit::Keep, &[]).1).unwrap();
}

#[test]
fn unknown_words_in_the_config() {
    let set = |key: &'static str, value: Value| move |c: &mut Value| c[key] = value;
    for (key, value, words) in [
        ("model_type", json!("mamba"), &["model_type", "mamba", "llama", "qwen3"][..]),
        ("hidden_act", json!("gelu"), &["hidden_act", "gelu"]),
        ("rope_scaling", json!({"rope_type": "longrope"}), &["rope", "longrope"]),
        ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), &["rope", "dynamic"]),
        ("rope_scaling", json!({"rope_type": "linear"}), &["rope", "factor"]),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), &["low_freq_factor"]),
        ("rope_scaling", json!({"rope_type": "linear", "factor": -1.0}), &["factor"]),
        ("quantization_config", json!({"quant_method": "gptq"}), &["quantization_config", "gptq"]),
    ] {
        assert_config_refused("llama", set(key, value), words);
    }
}

#[test]
fn numbers_that_do_not_fit() {
    for (key, value, words) in [
        ("num_key_value_heads", json!(3), &["num_key_value_heads", "3"][..]),
        ("num_key_value_heads", json!(0), &["num_key_value_heads", "0"]),
        ("hidden_size", json!(0), &["hidden_size", "0"]),
        ("head_dim", json!(7), &["head_dim", "7"]),
        ("vocab_size", json!(null), &["vocab_size", "missing"]),
        ("num_hidden_layers", json!(100_000), &["num_hidden_layers", "100000"]),
        ("intermediate_size", json!(1u64 << 40), &["intermediate_size"]),
        ("hidden_size", json!(-4), &["config.json"]),
        ("partial_rotary_factor", json!(2.0), &["partial_rotary_factor", "24"]),
        ("rope_theta", json!(-1.0), &["rope_theta", "-1"]),
        ("num_hidden_layers", json!(1 << 24), &["num_hidden_layers", "absurd"]),
        ("rms_norm_eps", json!(-1.0), &["rms_norm_eps"]),
    ] {
        assert_config_refused("llama", |c| c[key] = value, words);
    }
    assert_config_refused("mistral", |c| c["sliding_window"] = json!(0), &["sliding_window"]);
    let other = |key: &'static str, by: u64| {
        move |c: &mut Value| c[key] = json!(c[key].as_u64().unwrap() + by)
    };
    assert_config_refused("llama", other("vocab_size", 1), &["embed_tokens", "shape"]);
    assert_config_refused("llama", other("intermediate_size", 32), &["gate_proj", "shape"]);
    assert_config_refused("llama", other("num_hidden_layers", 1), &["no tensor", "layers."]);
}

/// A layer that the configuration does not mention is not silently left out.
#[test]
fn fewer_layers_than_the_file() {
    let fewer = |c: &mut Value| {
        c["num_hidden_layers"] = json!(c["num_hidden_layers"].as_u64().unwrap() - 1);
        // Qwen lists a kind for each layer; Llama has no such list.
        c.as_object_mut().unwrap().shift_remove("layer_types");
    };
    for name in ["llama", "qwen3"] {
        assert_config_refused(name, fewer, &["model.layers.", "no place"]);
    }
}

#[test]
fn tensors_that_are_missing_or_strange() {
    let up = "model.layers.1.mlp.up_proj.weight";
    assert_tensors_refused("llama", |t| drop(t.remove(up)), &[up, "no tensor"]);
    let norm = "model.norm.weight";
    assert_tensors_refused("llama", |t| drop(t.remove(norm)), &[norm, "no tensor"]);
    // Not tied in silence: the configuration says that there is a head.
    let head = "lm_head.weight";
    assert_tensors_refused("llama", |t| drop(t.remove(head)), &[head, "no tensor"]);
    let bias = "model.layers.0.self_attn.k_proj.bias";
    assert_tensors_refused("qwen2", |t| drop(t.remove(bias)), &[bias, "no tensor"]);
    let head_norm = "model.layers.0.self_attn.q_norm.weight";
    assert_tensors_refused("qwen3", |t| drop(t.remove(head_norm)), &[head_norm, "no tensor"]);

    let transpose = |name: &'static str| {
        move |t: &mut Tensors| {
            let turned = t[name].t().unwrap().contiguous().unwrap();
            t.insert(name.to_owned(), turned);
        }
    };
    assert_tensors_refused("llama", transpose(up), &[up, "shape"]);
    let shorten = |t: &mut Tensors| {
        let short = t[norm].narrow(0, 1, 3).unwrap().contiguous().unwrap();
        t.insert(norm.to_owned(), short);
    };
    assert_tensors_refused("llama", shorten, &[norm, "shape", "[3]"]);

    let stray = "model.layers.0.self_attn.q_norm.weight";
    let add = |t: &mut Tensors| {
        t.insert(stray.to_owned(), Tensor::ones(8, candle_core::DType::F32, &Device::Cpu).unwrap());
    };
    assert_tensors_refused("llama", add, &[stray, "no place"]);
    let integers = |t: &mut Tensors| {
        let zeros = Tensor::zeros(t[up].shape(), candle_core::DType::U32, &Device::Cpu).unwrap();
        t.insert(up.to_owned(), zeros);
    };
    assert_tensors_refused("llama", integers, &[up, "U32"]);
}

#[test]
fn codes_and_scales_that_do_not_fit() {
    let of = "gpt-oss-mxfp4";
    let scales = "model.layers.1.mlp.experts.gate_up_proj_scales";
    assert_tensors_refused(of, |t| drop(t.remove(scales)), &[scales, "missing"]);
    let codes = "model.layers.0.mlp.experts.down_proj_blocks";
    assert_tensors_refused(of, |t| drop(t.remove(codes)), &["mlp.experts.down_proj"]);
    let bias = "model.layers.0.mlp.experts.down_proj_bias";
    assert_tensors_refused(of, |t| drop(t.remove(bias)), &[bias, "no tensor"]);
    let sinks = "model.layers.0.self_attn.sinks";
    assert_tensors_refused(of, |t| drop(t.remove(sinks)), &[sinks, "no tensor"]);
    let shorten = |name: &'static str, dim: usize| {
        move |t: &mut Tensors| {
            let short = t[name].narrow(dim, 0, 1).unwrap().contiguous().unwrap();
            t.insert(name.to_owned(), short);
        }
    };
    assert_tensors_refused(of, shorten(scales, 0), &[scales, "[1, 64, 2]", "[3, 64, 2]"]);
    assert_tensors_refused(of, shorten(codes, 1), &[codes, "[3, 1, 1, 16]"]);
    let floats = |t: &mut Tensors| {
        let wide = t[codes].to_dtype(candle_core::DType::F32).unwrap();
        t.insert(codes.to_owned(), wide);
    };
    assert_tensors_refused(of, floats, &[codes, "F32", "U8"]);
    // By columns or by rows: the shape must be that of the file's own kind.
    let turned = "model.layers.1.mlp.experts.down_proj";
    let turn = |t: &mut Tensors| {
        let rows = t[turned].transpose(1, 2).unwrap().contiguous().unwrap();
        t.insert(turned.to_owned(), rows);
    };
    assert_tensors_refused("gpt-oss", turn, &[turned, "shape", "[6, 32, 64]"]);
}

/// A prefix cache on the disk is named after what a model says of itself.
#[test]
fn codes_and_scales_are_told() {
    let told = |path: &Path| {
        let mut all = Vec::new();
        let file = hearth_models::open(path).unwrap();
        file.tell(&mut |bytes| all.extend_from_slice(bytes));
        all
    };
    let of = "gpt-oss-mxfp4";
    let same = [folder(of, |_| {}, |_| {}), folder(of, |_| {}, |_| {})].map(|f| told(f.path()));
    assert_eq!(same[0], same[1]);
    for name in ["gate_up_proj_scales", "down_proj_blocks"] {
        let name = format!("model.layers.1.mlp.experts.{name}");
        let change = |t: &mut Tensors| {
            let zeros = t[&name].zeros_like().unwrap();
            t.insert(name.clone(), zeros);
        };
        assert_ne!(told(folder(of, |_| {}, change).path()), same[0], "{name}");
    }
}

#[test]
fn config_that_is_not_there_or_not_json() {
    let copy = folder("llama", |_| {}, |_| {});
    let config = copy.path().join("config.json");
    fs::write(&config, "{\"model_type\": ").unwrap();
    assert_refused(copy.path(), &["config.json"]);
    fs::remove_file(&config).unwrap();
    assert_refused(copy.path(), &["config.json"]);
}

/// What happens to a key or a tensor of a GGUF file on its way into the copy.
enum Edit {
    Keep,
    Drop,
    /// Metadata only: another value.
    Set(GgufValue<'static>),
    /// Tensors only: the first row goes.
    Shorten,
    /// Tensors only: in Q8_0.
    Quantize,
}

/// A GGUF golden with changes, and tensors of one f32 each added.
fn gguf(name: &str, edit: impl Fn(&str, bool) -> Edit, added: &[&str]) -> (TempDir, PathBuf) {
    let (from, folder) = (Weights::open(&golden(name)).unwrap(), TempDir::new().unwrap());
    let mut writer = GgufWriter::new();
    let meta = from.metadata().unwrap();
    for key in meta.keys() {
        match edit(key, false) {
            Edit::Keep => writer.put(key, meta.value(key).unwrap().unwrap()).unwrap(),
            Edit::Set(value) => writer.put(key, value).unwrap(),
            Edit::Drop | Edit::Shorten | Edit::Quantize => {}
        }
    }
    let mut bodies = Vec::new();
    for name in from.names() {
        let view = from.tensor(name).unwrap();
        let (mut shape, mut dtype, mut bytes) = (view.shape.to_vec(), view.dtype, view.bytes);
        let made;
        match edit(name, true) {
            Edit::Drop => continue,
            Edit::Shorten => {
                bytes = &bytes[bytes.len() / shape[0]..];
                shape[0] -= 1;
            }
            Edit::Quantize => {
                let mut values = vec![0.0; shape.iter().product()];
                quant::dequantize(dtype, bytes, &mut values);
                dtype = DType::Q8_0;
                made = quant::quantize(dtype, &values).unwrap();
                bytes = &made;
            }
            Edit::Keep | Edit::Set(_) => {}
        }
        writer.tensor(name, &shape, dtype).unwrap();
        bodies.push(bytes.to_vec());
    }
    for name in added {
        writer.tensor(name, &[1], DType::F32).unwrap();
        bodies.push(vec![0; 4]);
    }
    let mut body = writer.write_header(Vec::new()).unwrap();
    bodies.iter().for_each(|bytes| body.write_tensor(bytes).unwrap());
    let path = folder.path().join("changed.gguf");
    fs::write(&path, body.finish().unwrap()).unwrap();
    (folder, path)
}

fn assert_gguf_refused(edit: impl Fn(&str, bool) -> Edit, added: &[&str], words: &[&str]) {
    let (_folder, path) = gguf("llama.gguf", edit, added);
    assert_refused(&path, words);
}

/// Nobody writes them so, and nothing speaks against it; a bias is refused by its name.
#[test]
fn vectors_in_blocks_are_read_and_biases_are_not() {
    let norm = |name: &str, is_tensor: bool| match is_tensor && name == "output_norm.weight" {
        true => Edit::Quantize,
        false => Edit::Keep,
    };
    let (_folder, path) = gguf("qwen2-q4_0.gguf", norm, &[]);
    load(&path).unwrap();
    let bias = |name: &str, is_tensor: bool| match is_tensor && name == "blk.1.attn_q.bias" {
        true => Edit::Quantize,
        false => Edit::Keep,
    };
    let (_folder, path) = gguf("gpt-oss.gguf", bias, &[]);
    assert_refused(&path, &["blk.1.attn_q.bias", "quantised"]);
}

#[test]
fn gguf_that_is_not_understood() {
    // A key or a tensor of that name is edited, everything else is kept.
    let only = |target: &'static str, make: fn() -> Edit| {
        move |name: &str, _: bool| if name == target { make() } else { Edit::Keep }
    };
    let arch = "general.architecture";
    let set = only(arch, || Edit::Set(GgufValue::Str("falcon")));
    assert_gguf_refused(set, &[], &[arch, "falcon", "llama"]);
    assert_gguf_refused(only(arch, || Edit::Drop), &[], &[arch]);
    let set = only(arch, || Edit::Set(GgufValue::U32(3)));
    assert_gguf_refused(set, &[], &[arch]);

    let set = only("llama.attention.head_count_kv", || Edit::Set(GgufValue::U32(3)));
    assert_gguf_refused(set, &[], &["llama.attention.head_count_kv", "3"]);
    let drop = only("llama.embedding_length", || Edit::Drop);
    assert_gguf_refused(drop, &[], &["llama.embedding_length", "missing"]);
    let set = only("llama.block_count", || Edit::Set(GgufValue::U32(1)));
    assert_gguf_refused(set, &[], &["blk.1.", "no place"]);
    let set = only("llama.feed_forward_length", || Edit::Set(GgufValue::U32(17)));
    assert_gguf_refused(set, &[], &["ffn_", "shape", "17"]);

    let down = "blk.0.ffn_down.weight";
    assert_gguf_refused(only(down, || Edit::Drop), &[], &[down, "no tensor"]);
    assert_gguf_refused(only(down, || Edit::Shorten), &[], &[down, "shape"]);
    let keep = |_: &str, _: bool| Edit::Keep;
    assert_gguf_refused(keep, &["blk.0.ssm_conv1d.weight"], &["ssm_conv1d", "no place"]);
    assert_gguf_refused(keep, &["rope_freqs.weight"], &["rope_freqs.weight", "divisors"]);
}
