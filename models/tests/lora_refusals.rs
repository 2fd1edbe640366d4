//! Adapters that are hostile, broken, or made for another model are refused, each for its reason:
//! the tensor and both shapes are named, or the key.

use std::path::Path;

use hearth_kernels::Pool;
use hearth_kernels::quant::DType;
use hearth_models::ModelFile;
use hearth_models::adapter::Adapter;
use hearth_models::weights::Value as Meta;
use hearth_models::weights::gguf_writer::GgufWriter;
use serde_json::{Value, json};

fn base() -> ModelFile {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    hearth_models::open(&goldens.join("llama")).unwrap()
}

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

type Tensor = (String, Vec<usize>, Vec<f32>);

/// An update of one projection of a model of 48 columns.
struct Sample {
    config: Value,
    tensors: Vec<Tensor>,
}

impl Sample {
    fn new() -> Self {
        let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4});
        let mut sample = Self { config, tensors: Vec::new() };
        sample.put(&format!("{Q}.lora_A.weight"), &[2, 48]);
        sample.put(&format!("{Q}.lora_B.weight"), &[48, 2]);
        sample
    }

    fn put(&mut self, name: &str, shape: &[usize]) {
        self.tensors.retain(|(known, _, _)| known != name);
        let values = vec![0.5; shape.iter().product()];
        self.tensors.push((name.to_owned(), shape.to_vec(), values));
    }

    fn set(&mut self, key: &str, value: Value) {
        self.config[key] = value;
    }

    fn safetensors(&self) -> Vec<u8> {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, shape, values) in &self.tensors {
            let start = data.len();
            data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            let place = [start, data.len()];
            let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": place});
            header.insert(name.clone(), entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
    }

    /// Writes the folder, and opens it.
    fn open(&self) -> Result<Adapter, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("adapter_config.json"), self.config.to_string()).unwrap();
        std::fs::write(folder.path().join("adapter_model.safetensors"), self.safetensors())
            .unwrap();
        open(folder.path())
    }
}

fn open(path: &Path) -> Result<Adapter, String> {
    Adapter::open(path, &base(), &Pool::new(1)).map_err(|e| e.to_string())
}

fn refused(change: impl FnOnce(&mut Sample), words: &[&str]) {
    let mut sample = Sample::new();
    change(&mut sample);
    let error = sample.open().expect_err(&format!("{words:?} was accepted"));
    for word in words {
        assert!(error.contains(word), "`{error}` does not mention `{word}`");
    }
}

#[test]
fn the_sample_is_an_adapter() {
    let adapter = Sample::new().open().unwrap();
    let [(_, delta)] = adapter.deltas() else { panic!("one update") };
    assert_eq!((delta.factors.rank(), delta.scale), (2, 2.0));
    // Keys that change nothing, known or not.
    let mut sample = Sample::new();
    for (key, value) in [
        ("task_type", json!("CAUSAL_LM")),
        ("inference_mode", json!(true)),
        ("target_modules", json!(["q_proj"])),
        ("modules_to_save", Value::Null),
        ("layers_to_transform", json!([0])),
        ("something_of_next_year", json!(false)),
        ("init_lora_weights", json!(true)),
    ] {
        sample.set(key, value);
    }
    sample.open().unwrap();
}

#[test]
fn settings_that_make_another_model_are_refused_by_name() {
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("peft_type", json!("ADALORA")),
        ("task_type", json!("SEQ_CLS")),
        ("bias", json!("all")),
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("init_lora_weights", json!("pissa")),
        ("lora_bias", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["mlp.experts.down_proj"])),
        ("alora_invocation_tokens", json!([5])),
        ("something_of_next_year", json!(3)),
        ("r", json!(0)),
        ("r", json!("8")),
        ("lora_alpha", json!("8")),
        ("rank_pattern", json!([1])),
        ("rank_pattern", json!({"(": 1})),
        ("use_dora", json!("yes")),
    ] {
        refused(|s| s.set(key, value), &[key]);
    }
    refused(|s| drop(s.config.as_object_mut().unwrap().remove("peft_type")), &["peft_type"]);
    refused(|s| s.config = json!([]), &["adapter_config.json"]);
    refused(|s| s.config = json!({"peft_type": "x".repeat(2 << 20)}), &["larger"]);
}

#[test]
fn tensors_that_do_not_fit_are_refused_with_both_shapes() {
    let a = format!("{Q}.lora_A.weight");
    let b = format!("{Q}.lora_B.weight");
    refused(|s| s.put(&b, &[64, 2]), &[&b, "[64, 2]", "[48, 2]", "[48, 48]"]);
    refused(|s| s.put(&a, &[2, 64]), &[&a, "[2, 64]", "[2, 48]"]);
    refused(|s| s.put(&a, &[3, 48]), &[&a, "[3, 48]", "[2, 48]"]);
    refused(|s| s.put(&a, &[96]), &[&a, "[96]"]);
    let none = |s: &mut Sample| {
        s.put(&a, &[0, 48]);
        s.put(&b, &[48, 0]);
    };
    refused(none, &[&b, "rank 0"]);
    let three = |s: &mut Sample| {
        s.put(&a, &[3, 48]);
        s.put(&b, &[48, 3]);
    };
    refused(three, &[&b, "rank 3", "says 2"]);
    refused(|s| s.set("rank_pattern", json!({"q_proj": 4})), &[&b, "rank 2", "says 4"]);
    for number in [f32::NAN, f32::INFINITY] {
        refused(|s| s.tensors[1].2[7] = number, &[&b, "not finite"]);
    }
    refused(|s| s.tensors.truncate(1), &["model.layers.0.self_attn.q_proj", "has no B"]);
    refused(|s| s.tensors.clear(), &["no tensors"]);
    refused(|s| s.set("use_dora", json!(true)), &["magnitude"]);
    let magnitude = format!("{Q}.lora_magnitude_vector");
    refused(|s| s.put(&magnitude, &[48]), &[&magnitude, "use_dora"]);
    let short = |s: &mut Sample| {
        s.set("use_dora", json!(true));
        s.put(&magnitude, &[47]);
    };
    refused(short, &[&magnitude, "[47]", "[48]"]);
}

#[test]
fn tensors_without_a_place_are_refused_by_name() {
    for (name, why) in [
        ("base_model.model.lm_head.weight", "modules_to_save"),
        ("base_model.model.model.norm.weight", "modules_to_save"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "lora_bias"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "no place"),
        ("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight", "experts"),
        ("base_model.model.model.layers.0.input_layernorm.lora_A.weight", "no place"),
        ("base_model.model.score.lora_A.weight", "no place"),
    ] {
        refused(|s| s.put(name, &[2, 48]), &[name, why]);
    }
    // The base's own weight beside the update is no news, unless it is another base's.
    let own = "base_model.model.lm_head.base_layer.weight";
    refused(|s| s.put(own, &[300, 48]), &[own, "[300, 48]", "[264, 48]"]);
    let mut sample = Sample::new();
    sample.put(own, &[264, 48]);
    assert_eq!(sample.open().unwrap().deltas().len(), 1);
}

#[test]
fn files_that_are_no_adapter_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("adapter_model.safetensors");
    std::fs::write(&weights, Sample::new().safetensors()).unwrap();
    assert!(open(folder.path()).unwrap_err().contains("adapter_config.json"));
    assert!(open(&weights).unwrap_err().contains("adapter_config.json"));
    std::fs::write(folder.path().join("adapter_config.json"), Sample::new().config.to_string())
        .unwrap();
    open(folder.path()).unwrap();
    open(&weights).unwrap();
    std::fs::remove_file(&weights).unwrap();
    std::fs::write(folder.path().join("adapter_model.bin"), b"pickled").unwrap();
    assert!(open(folder.path()).unwrap_err().contains("adapter_model.bin"));
    assert!(open(&folder.path().join("nowhere")).unwrap_err().contains("nowhere"));
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama.gguf");
    assert!(open(&base).unwrap_err().contains("general.type"));
}

type Entry = (&'static str, Meta<'static>);

/// Opens a GGUF adapter with one update; `change` may do anything to it.
fn gguf(change: impl FnOnce(&mut Vec<Entry>, &mut Vec<Tensor>)) -> Result<Adapter, String> {
    let mut entries = vec![
        ("general.architecture", Meta::Str("llama")),
        ("general.type", Meta::Str("adapter")),
        ("adapter.type", Meta::Str("lora")),
        ("adapter.lora.alpha", Meta::F32(4.0)),
    ];
    let tensor = |name: &str, shape: [usize; 2]| {
        (name.to_owned(), shape.to_vec(), vec![0.5; shape.iter().product()])
    };
    let mut tensors = vec![
        tensor("blk.0.attn_q.weight.lora_a", [2, 48]),
        tensor("blk.0.attn_q.weight.lora_b", [48, 2]),
    ];
    change(&mut entries, &mut tensors);
    let mut writer = GgufWriter::new();
    for (key, value) in entries {
        writer.put(key, value).unwrap();
    }
    for (name, shape, _) in &tensors {
        writer.tensor(name, shape, DType::F32).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.gguf");
    let mut body = writer.write_header(std::fs::File::create(&path).unwrap()).unwrap();
    for (_, _, values) in &tensors {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        body.write_tensor(&bytes).unwrap();
    }
    body.finish().unwrap();
    open(&path)
}

#[test]
fn gguf_adapters_are_refused_for_their_reasons() {
    assert_eq!(gguf(|_, _| {}).unwrap().deltas()[0].1.scale, 2.0);
    // llama.cpp takes no alpha as no scaling.
    let unscaled = gguf(|entries, _| entries[3].1 = Meta::F32(0.0)).unwrap();
    assert_eq!(unscaled.deltas()[0].1.scale, 1.0);
    type Change = fn(&mut Vec<Entry>, &mut Vec<Tensor>);
    let cases: [(Change, &[&str]); 8] = [
        (|e, _| e[0].1 = Meta::Str("qwen2"), &["general.architecture", "qwen2", "llama"]),
        (|e, _| e[1].1 = Meta::Str("model"), &["general.type", "model"]),
        (|e, _| e[2].1 = Meta::Str("control_vector"), &["adapter.type", "control_vector"]),
        (|e, _| e[3].1 = Meta::F32(f32::NAN), &["adapter.lora.alpha"]),
        (|_, t| drop(t.pop()), &["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]),
        (|_, t| t[1].0 = "blk.0.attn_norm.weight".into(), &["blk.0.attn_norm.weight"]),
        (|_, t| t[0].0 = "blk.0.a_exps.weight.lora_a".into(), &["a_exps", "experts"]),
        (
            |_, t| (t[1].1, t[1].2) = (vec![32, 2], vec![0.0; 64]),
            &["blk.0.attn_q.weight.lora_b", "[32, 2]", "[48, 2]"],
        ),
    ];
    for (change, words) in cases {
        let error = gguf(change).expect_err(&format!("{words:?} was accepted"));
        for word in words {
            assert!(error.contains(word), "`{error}` does not mention `{word}`");
        }
    }
}

/// A header that promises more than the file has is refused before anything is allocated for it.
#[test]
fn promises_are_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), Sample::new().config.to_string())
        .unwrap();
    let entry = json!({"dtype": "F32", "shape": [2_u64, 1_u64 << 40],
        "data_offsets": [0, 1_u64 << 43]});
    let header = json!({format!("{Q}.lora_A.weight"): entry}).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    std::fs::write(folder.path().join("adapter_model.safetensors"), bytes).unwrap();
    let error = open(folder.path()).unwrap_err();
    assert!(error.contains("shorter than its header promises"), "{error}");
}
