//! Weight files that are in order: what comes out is what was put in.

use hearth_kernels::quant::dequantize;
use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::safetensors::unreadable_quantization;
use hearth_models::weights::{Array, DType, Error, Format, TensorType, Value, Weights};
use serde_json::json;
use std::path::{Path, PathBuf};

fn shared(path: &str) -> Option<PathBuf> {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(path);
    if !found.exists() {
        println!("SKIPPED: {} is not here", found.display());
    }
    found.exists().then_some(found)
}

/// A GGUF with the given tensors of f32 zeros counted up from `first`, plus metadata.
fn gguf(names: &[&str], metadata: impl Fn(&mut GgufWriter)) -> Vec<u8> {
    let mut writer = GgufWriter::new();
    metadata(&mut writer);
    names.iter().for_each(|name| writer.tensor(name, &[2, 4], DType::F32).unwrap());
    let mut body = writer.write_header(Vec::new()).unwrap();
    for (i, _) in names.iter().enumerate() {
        let bytes: Vec<u8> = (0..8).flat_map(|x| ((i * 8 + x) as f32).to_le_bytes()).collect();
        body.write_tensor(&bytes).unwrap();
    }
    body.finish().unwrap()
}

fn safetensors(tensors: &[(&str, &str, &[usize], usize)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, dtype, shape, len) in tensors {
        let offsets = [end, end + len];
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert((*name).to_owned(), entry);
        end += len;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend((0..end).map(|i| i as u8));
    bytes
}

#[test]
fn every_metadata_type_survives_the_writer() {
    let bytes = gguf(&[], |w| {
        w.put("u8", Value::U8(200)).unwrap();
        w.put("i8", Value::I8(-5)).unwrap();
        w.put("u16", Value::U16(60_000)).unwrap();
        w.put("i16", Value::I16(-600)).unwrap();
        w.put("u32", Value::U32(4_000_000_000)).unwrap();
        w.put("i32", Value::I32(-7)).unwrap();
        w.put("u64", Value::U64(1 << 60)).unwrap();
        w.put("i64", Value::I64(-(1 << 60))).unwrap();
        w.put("f32", Value::F32(0.25)).unwrap();
        w.put("f64", Value::F64(0.1)).unwrap();
        w.put("bool", Value::Bool(true)).unwrap();
        w.put("text", Value::Str("héllo")).unwrap();
        w.put_strings("texts", &["a", "", "文"]).unwrap();
        w.put_f32s("floats", &[1.5, -2.0]).unwrap();
        w.put_i32s("ints", &[-1, 2, 3]).unwrap();
    });
    let weights = Weights::from_bytes("memory", bytes).unwrap();
    let m = weights.metadata().unwrap();
    assert_eq!(m.get::<u32>("u8").unwrap(), 200);
    assert_eq!(m.get::<i32>("i8").unwrap(), -5);
    assert_eq!(m.get::<usize>("u16").unwrap(), 60_000);
    assert_eq!(m.get::<i64>("i16").unwrap(), -600);
    assert_eq!(m.get::<u64>("u32").unwrap(), 4_000_000_000);
    assert_eq!(m.get::<i32>("i32").unwrap(), -7);
    assert_eq!(m.get::<u64>("u64").unwrap(), 1 << 60);
    assert_eq!(m.get::<i64>("i64").unwrap(), -(1 << 60));
    assert_eq!(m.get::<f32>("f32").unwrap(), 0.25);
    assert_eq!(m.get::<f64>("f64").unwrap(), 0.1);
    assert_eq!(m.get::<f32>("i32").unwrap(), -7.0);
    assert!(m.get::<bool>("bool").unwrap());
    assert_eq!(m.get::<&str>("text").unwrap(), "héllo");
    let texts: Vec<&str> = m.get_array("texts").unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(texts, ["a", "", "文"]);
    assert_eq!(m.get_array::<f32>("floats").unwrap().len(), 2);
    let ints: Vec<i32> = m.get_array("ints").unwrap().map(Result::unwrap).collect();
    assert_eq!(ints, [-1, 2, 3]);
    assert_eq!(m.keys().count(), 15);
    assert!(weights.is_empty());

    // A wrong question names the key, what was expected and what is there.
    let text = |e: Error| e.to_string();
    assert_eq!(m.get_opt::<u32>("absent").unwrap(), None);
    assert!(text(m.get::<u32>("absent").unwrap_err()).contains("`absent`: is missing"));
    let wrong = text(m.get::<u32>("i32").unwrap_err());
    assert!(
        wrong.contains("`i32`: expected a whole number that fits u32, found I32 -7"),
        "{wrong}"
    );
    assert!(text(m.get_opt::<&str>("u8").unwrap_err()).contains("`u8`: expected text, found U8"));
    let ints: Result<Vec<u32>, Error> = m.get_array("ints").unwrap().collect();
    assert!(text(ints.unwrap_err()).contains("`ints`: element 0: expected a whole number"));

    // An array read from one file can be written to another.
    let copied = gguf(&[], |w| {
        w.put("again", Value::Array(m.get::<Array>("texts").unwrap())).unwrap();
    });
    let copied = Weights::from_bytes("copy", copied).unwrap();
    let texts = copied.metadata().unwrap().get_array::<&str>("again").unwrap();
    assert_eq!(texts.collect::<Result<Vec<_>, _>>().unwrap(), ["a", "", "文"]);
}

#[test]
fn gguf_tensors_come_back_outermost_dimension_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut writer = GgufWriter::new();
    writer.tensor("rows", &[3, 64], DType::Q8_0).unwrap();
    writer.tensor("cube", &[2, 3, 5], DType::BF16).unwrap();
    let rows: Vec<u8> = (0..3 * 68).map(|i| i as u8).collect();
    let cube: Vec<u8> = (100..160).collect();
    let mut body = writer.write_header(std::fs::File::create(&path).unwrap()).unwrap();
    body.write_tensor(&rows).unwrap();
    body.write_tensor(&cube).unwrap();
    body.finish().unwrap();

    let weights = Weights::open(&path).unwrap();
    assert_eq!(weights.format(), Format::Gguf);
    assert_eq!(weights.names().collect::<Vec<_>>(), ["cube", "rows"]);
    let view = weights.tensor("rows").unwrap();
    assert_eq!((view.dtype, view.shape, view.bytes), (DType::Q8_0, &[3, 64][..], &rows[..]));
    let view = weights.tensor("cube").unwrap();
    assert_eq!((view.dtype, view.shape, view.bytes), (DType::BF16, &[2, 3, 5][..], &cube[..]));
    assert_eq!(weights.tensor_bytes(), (rows.len() + cube.len()) as u64);
    assert_eq!(weights.file_bytes(), std::fs::metadata(&path).unwrap().len());
    let missing = weights.tensor("nope").unwrap_err();
    assert!(matches!(&missing, Error::NoSuchTensor { tensor, .. } if tensor == "nope"));

    // Released pages are read again from the file.
    weights.will_need("rows");
    weights.release("rows");
    weights.release("cube");
    assert_eq!(weights.tensor("rows").unwrap().bytes, rows);
    assert_eq!(weights.tensor("cube").unwrap().bytes, cube);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let mut writer = GgufWriter::new();
    writer.tensor("t", &[2, 32], DType::Q4_0).unwrap();
    assert!(writer.tensor("t", &[2, 32], DType::Q4_0).is_err(), "a second `t`");
    assert!(writer.tensor("u", &[2, 33], DType::Q4_0).is_err(), "a broken block");
    assert!(writer.tensor("u", &[], DType::F32).is_err(), "no dimensions");
    writer.put("k", Value::U8(1)).unwrap();
    assert!(writer.put("k", Value::U8(2)).is_err(), "a second `k`");
    let mut body = writer.write_header(Vec::new()).unwrap();
    assert!(body.write_tensor(&[0; 35]).is_err(), "one byte short");
    let mut writer = GgufWriter::new();
    writer.tensor("t", &[1], DType::F32).unwrap();
    assert!(writer.write_header(Vec::new()).unwrap().finish().is_err(), "`t` is not written");
}

/// Writes parts of one tensor each, as `model-0000N-of-0000M.gguf`.
fn write_split(folder: &Path, count: u16, tensors_said: i32) -> PathBuf {
    for no in 0..count {
        let bytes = gguf(&[&format!("t{no}")], |w| {
            w.put("split.no", Value::U16(no)).unwrap();
            w.put("split.count", Value::U16(count)).unwrap();
            w.put("split.tensors.count", Value::I32(tensors_said)).unwrap();
        });
        let name = format!("model-{:05}-of-{count:05}.gguf", no + 1);
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    folder.join(format!("model-00001-of-{count:05}.gguf"))
}

#[test]
fn a_split_gguf_opens_from_its_first_part() {
    let folder = tempfile::tempdir().unwrap();
    let first = write_split(folder.path(), 3, 3);
    for path in [first.as_path(), folder.path()] {
        let weights = Weights::open(path).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["t0", "t1", "t2"]);
        assert_eq!(weights.files().count(), 3);
        assert_eq!(weights.tensor("t2").unwrap().bytes.len(), 32);
    }
    let second = folder.path().join("model-00002-of-00003.gguf");
    let message = Weights::open(&second).unwrap_err().to_string();
    assert!(message.contains("part 2 of 3: open part 1"), "{message}");

    std::fs::copy(folder.path().join("model-00003-of-00003.gguf"), &second).unwrap();
    let message = Weights::open(&first).unwrap_err().to_string();
    assert!(message.contains("says it is part 3 of 3, its name says part 2 of 3"), "{message}");

    std::fs::remove_file(&second).unwrap();
    let message = Weights::open(&first).unwrap_err().to_string();
    assert!(message.contains("model-00002-of-00003.gguf"), "{message}");
    assert!(message.contains("part 2 of 3 of this model is missing"), "{message}");

    write_split(folder.path(), 3, 4);
    let message = Weights::open(&first).unwrap_err().to_string();
    assert!(message.contains("says 4 tensors, the 3 parts hold 3"), "{message}");

    let renamed = folder.path().join("other.gguf");
    std::fs::rename(&first, &renamed).unwrap();
    let message = Weights::open(&renamed).unwrap_err().to_string();
    assert!(message.contains("-00001-of-00003.gguf"), "{message}");
}

#[test]
fn safetensors_in_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = safetensors(&[
        ("w", "F32", &[2, 3], 24),
        ("n", "BF16", &[4], 8),
        ("h", "F16", &[], 2),
        ("ids", "I64", &[1, 2], 16),
        ("none", "F32", &[0, 3], 0),
    ]);
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.format(), Format::SafeTensors);
    let w = weights.tensor("w").unwrap();
    assert_eq!((w.dtype, w.shape), (DType::F32, &[2, 3][..]));
    assert_eq!(w.bytes, (0..24).collect::<Vec<u8>>());
    let n = weights.tensor("n").unwrap();
    assert_eq!((n.dtype, n.shape, n.bytes[0]), (DType::BF16, &[4][..], 24));
    let h = weights.tensor("h").unwrap();
    assert_eq!((h.dtype, h.shape, h.bytes), (DType::F16, &[][..], &[32, 33][..]));
    assert_eq!(weights.tensor("none").unwrap().bytes, b"");
    assert_eq!(weights.info("ids").unwrap().ty, TensorType::Unreadable("I64".to_owned()));
    let message = weights.tensor("ids").unwrap_err().to_string();
    assert!(
        message.contains("tensor `ids` has type I64, which this build cannot read"),
        "{message}"
    );
}

#[test]
fn safetensors_in_shards() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("a.safetensors"), safetensors(&[("x", "F32", &[2], 8)])).unwrap();
    std::fs::write(at("b.safetensors"), safetensors(&[("y", "F16", &[3], 6)])).unwrap();
    let index = |map: serde_json::Value| {
        let text = json!({"metadata": {"total_size": 14}, "weight_map": map}).to_string();
        std::fs::write(at("model.safetensors.index.json"), text).unwrap();
        Weights::open(folder.path())
    };
    let good = index(json!({"x": "a.safetensors", "y": "b.safetensors"})).unwrap();
    assert_eq!(good.names().collect::<Vec<_>>(), ["x", "y"]);
    assert_eq!(good.tensor("y").unwrap().bytes.len(), 6);

    let refused = |map, expected: &str| {
        let message = index(map).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    refused(json!({"x": "gone.safetensors"}), "the shard `gone.safetensors`, which is missing");
    refused(json!({"z": "a.safetensors"}), "tensor `z`: is listed in `a.safetensors`");
    refused(json!({"x": "b.safetensors", "y": "a.safetensors"}), "tensor `x`: is listed in `b.");
    refused(json!({"x": "../a.safetensors"}), "`../a.safetensors` is not a plain file name");
    refused(json!({}), "lists no tensors");
    refused(json!([1]), "is not an index of shards");
    std::fs::write(at("b.safetensors"), safetensors(&[("x", "F32", &[2], 8)])).unwrap();
    refused(
        json!({"x": "a.safetensors", "y": "b.safetensors"}),
        "tensor `x`: the name appears twice",
    );
}

#[test]
fn a_folder_must_hold_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let message = || Weights::open(folder.path()).unwrap_err().to_string();
    assert!(message().contains("holds no .safetensors or .gguf file"));
    std::fs::write(at("pytorch_model.bin"), b"x").unwrap();
    assert!(message().contains("`pytorch_model.bin` is not read"));
    std::fs::write(at("q4.gguf"), gguf(&["t"], |_| {})).unwrap();
    assert_eq!(Weights::open(folder.path()).unwrap().path(), at("q4.gguf"));
    std::fs::write(at("q8.gguf"), gguf(&["t"], |_| {})).unwrap();
    assert!(message().contains("several models, name one of them: q4.gguf, q8.gguf"));
    let missing = Weights::open(&at("none.gguf")).unwrap_err();
    assert!(matches!(&missing, Error::Io { path, .. } if path.ends_with("none.gguf")));
    std::fs::write(at("notes.txt"), b"hello").unwrap();
    let message = Weights::open(&at("notes.txt")).unwrap_err().to_string();
    assert!(message.contains("is neither a GGUF nor a .safetensors file"), "{message}");
    // A blob of a download cache has no ending: the magic decides.
    std::fs::rename(at("q4.gguf"), at("0badcafe")).unwrap();
    assert_eq!(Weights::open(&at("0badcafe")).unwrap().format(), Format::Gguf);
}

#[test]
fn announced_quantisations_are_named() {
    assert_eq!(unreadable_quantization(&json!({"hidden_size": 4})), None);
    assert_eq!(unreadable_quantization(&json!({"quantization_config": null})), None);
    let gptq = json!({"quantization_config": {"quant_method": "gptq", "bits": 4}});
    assert_eq!(unreadable_quantization(&gptq).as_deref(), Some("gptq, 4 bits"));
    let nested = json!({"text_config": {"quantization_config": {"quant_method": "fp8"}}});
    assert_eq!(unreadable_quantization(&nested).as_deref(), Some("fp8"));
    let unnamed = json!({"compression_config": {}});
    assert_eq!(unreadable_quantization(&unnamed).as_deref(), Some("unnamed scheme"));
}

#[test]
fn the_same_model_in_both_formats() {
    let (Some(folder), Some(file)) =
        (shared("models/stories260K-hf"), shared("models/stories260K-gguf/stories260K-F32.gguf"))
    else {
        return;
    };
    let (hf, gguf) = (Weights::open(&folder).unwrap(), Weights::open(&file).unwrap());
    let metadata = gguf.metadata().unwrap();
    assert_eq!(metadata.get::<&str>("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.get::<u32>("llama.embedding_length").unwrap(), 64);
    assert_eq!(metadata.get::<u32>("llama.block_count").unwrap(), 5);
    assert_eq!(metadata.get_array::<&str>("tokenizer.ggml.tokens").unwrap().len(), 512);
    // Q and K rows differ by the order that each format gives them; these do not.
    for (ours, theirs) in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ] {
        let (a, b) = (hf.tensor(ours).unwrap(), gguf.tensor(theirs).unwrap());
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{ours}");
        assert!(a.bytes == b.bytes, "{ours}");
    }
}

#[test]
fn an_unreadable_tensor_does_not_hide_the_others() {
    let bytes = gguf(&["a", "b"], |_| {});
    // The type of `b`: its name, one count, two dimensions, then the type.
    let at = bytes.windows(9).position(|w| w == b"\x01\0\0\0\0\0\0\0b").unwrap() + 9 + 4 + 16;
    let mut changed = bytes.clone();
    changed[at..at + 4].copy_from_slice(&16u32.to_le_bytes());
    let weights = Weights::from_bytes("memory", changed).unwrap();
    assert!(weights.tensor("a").is_ok());
    let message = weights.tensor("b").unwrap_err().to_string();
    assert!(message.contains("`b`") && message.contains("IQ2_XXS"), "{message}");
}

/// Every quantised tensor, through the file and the kernels' decoder, equals what another program
/// computed from the same blocks.
#[test]
fn quantised_tensors_decode_to_the_expected_numbers() {
    let Some(folder) = shared("models/quant-goldens") else { return };
    let expected = Weights::open(&folder.join("expected_f32.safetensors")).unwrap();
    let mut types = std::collections::BTreeSet::new();
    let files = ["quant-goldens.gguf", "quant-goldens-iq.gguf"];
    let files = files.map(|name| Weights::open(&folder.join(name)).unwrap());
    for (weights, name) in files.iter().flat_map(|w| w.names().map(move |name| (w, name))) {
        let (view, truth) = (weights.tensor(name).unwrap(), expected.tensor(name).unwrap());
        assert_eq!(view.shape, truth.shape, "{name}");
        let mut decoded = vec![0f32; truth.shape.iter().product()];
        dequantize(view.dtype, view.bytes, &mut decoded);
        let truth = truth.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        for (i, (got, wanted)) in decoded.iter().zip(truth).enumerate() {
            let near = (got - wanted).abs() <= 1e-6 * wanted.abs();
            assert!(near, "{name} ({}), element {i}: {got} instead of {wanted}", view.dtype);
        }
        types.insert(view.dtype.name());
    }
    assert!(types.len() >= 15, "only {types:?}");
}

#[test]
fn real_vocabularies() {
    let Some(folder) = shared("tokenizers/llama.cpp-vocabs") else { return };
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "gguf") {
            continue;
        }
        seen += 1;
        let weights = Weights::open(&path).unwrap();
        let m = weights.metadata().unwrap();
        let tokens: Vec<&str> = m
            .get_array("tokenizer.ggml.tokens")
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(tokens.len() > 10_000, "{}", path.display());
        assert_eq!(m.get_array::<i32>("tokenizer.ggml.token_type").unwrap().len(), tokens.len());
        m.get::<&str>("tokenizer.ggml.model").unwrap();
        for key in m.keys() {
            m.value(key).unwrap();
        }
    }
    assert!(seen > 0);
}
