//! `hearth quantize` and `--quantize`, through the binary: what is written answers as what was
//! read, and what must not happen does not.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use hearth::text::{self, Special, Tokenizer};
use hearth_kernels::cases::randoms;
use hearth_models::weights::{DType, TensorType, Weights};
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn shared(path: &str) -> Option<PathBuf> {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(path);
    if !found.exists() {
        println!("SKIPPED: {} is not here", found.display());
    }
    found.exists().then_some(found)
}

fn hearth(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("HEARTH_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

fn said(args: &[&str]) -> String {
    let output = hearth(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn refused(args: &[&str], words: &[&str]) {
    let output = hearth(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !error.contains("panicked"), "{args:?}: {error}");
    for word in words {
        assert!(error.contains(word), "`{error}` does not mention `{word}`");
    }
}

/// Greedy text of a model.
fn greedy(model: &Path, more: &[&str]) -> String {
    let model = model.to_str().unwrap();
    let flags = ["complete", "the a in", "-n", "24", "--temperature", "0", "--model", model];
    said(&[&flags[..], more].concat())
}

/// The `qwen3` golden with a tokenizer of its 264 tokens beside it.
fn folder_with_tokenizer(folder: &Path) {
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(golden("qwen3").join(name), folder.join(name)).unwrap();
    }
    let shown = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 256;
    let mut vocab: Vec<String> = Vec::new();
    for byte in 0..256 {
        let stand_in = if shown(byte) { byte } else { next };
        next += u32::from(!shown(byte));
        vocab.push(char::from_u32(stand_in).unwrap().into());
    }
    let merges = ["t h", "th e", "Ġ the", "Ġ a", "i n"];
    vocab.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let ids: serde_json::Map<String, Value> =
        vocab.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(i, content)| {
            json!({ "id": 261 + i, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false })
        })
        .collect();
    let words = concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    let level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
        "use_regex": false });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": words }, "behavior": "Isolated",
              "invert": false }, level ] },
        "post_processor": level, "decoder": level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": ids, "merges": merges },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({ "eos_token": "<|im_end|>", "bos_token": null,
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}" });
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn a_folder_becomes_one_file_that_answers_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    fs::create_dir(&source).unwrap();
    folder_with_tokenizer(&source);
    let out = folder.path().join("out.gguf");
    let (from, to) = (source.to_str().unwrap(), out.to_str().unwrap());
    let told = said(&["quantize", from, "-o", to, "--type", "F32"]);
    assert!(told.contains("out.gguf: f32"), "{told}");
    assert_eq!(greedy(&out, &[]), greedy(&source, &[]));
    let weights = Weights::open(&out).unwrap();
    let meta = weights.metadata().unwrap();
    assert_eq!(meta.get::<&str>("tokenizer.ggml.pre").unwrap(), "qwen2");
    assert_eq!(meta.get::<u32>("tokenizer.ggml.eos_token_id").unwrap(), 263);
    assert!(meta.get::<&str>("tokenizer.chat_template").unwrap().contains("m.content"));
    assert_eq!(meta.get::<f32>("general.sampling.temp").unwrap(), 0.0);

    // The same types, whether in a file or while loading.
    let small = folder.path().join("small.gguf");
    said(&["quantize", from, "-o", small.to_str().unwrap(), "--type", "q8_0"]);
    assert_eq!(greedy(&small, &[]), greedy(&source, &["--quantize", "q8_0"]));
    // From the file in floats too, with all its metadata.
    let again = folder.path().join("again.gguf");
    said(&["quantize", to, "-o", again.to_str().unwrap(), "--type", "q8_0"]);
    assert_eq!(greedy(&again, &[]), greedy(&small, &[]));
    let copied = Weights::open(&again).unwrap();
    let keys: Vec<&str> = meta.keys().collect();
    assert!(copied.metadata().unwrap().keys().eq(keys), "metadata is kept");
}

/// `hearth lora merge`: the new model says what the old one says with the adapter.
#[test]
fn a_merged_model_answers_as_with_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    fs::create_dir(&source).unwrap();
    folder_with_tokenizer(&source);
    let adapter = golden("lora/qwen3").to_str().unwrap().to_owned();
    let bent = greedy(&source, &["--lora", &format!("bent={adapter}")]);
    assert_ne!(bent, greedy(&source, &[]), "the adapter changes what is said");
    let out = folder.path().join("merged.gguf");
    let (from, to) = (source.to_str().unwrap(), out.to_str().unwrap());
    let told = said(&["lora", "merge", from, "--lora", &adapter, "-o", to, "--type", "f32"]);
    assert!(told.contains("merged.gguf: 1 merged, f32"), "{told}");
    assert_eq!(greedy(&out, &[]), bent);
    let nothing = format!("{adapter}=0");
    said(&["lora", "merge", from, "--lora", &nothing, "-o", to, "-t", "f32", "--force"]);
    assert_eq!(greedy(&out, &[]), greedy(&source, &[]));

    let other = golden("lora/llama");
    let other = other.to_str().unwrap();
    let wrong = ["lora", "merge", from, "--lora", other, "-o", to, "--force"];
    refused(&wrong, &["lora/llama", "k_proj.lora_B", "[24, 4]", "[32, 4]"]);
    refused(&["complete", "a", "--model", from, "--lora", &format!("x={from}")], &["--lora: x"]);
    let nowhere = tempfile::tempdir().unwrap();
    let nowhere = nowhere.path().to_str().unwrap();
    refused(
        &["serve", "--model", from, "--lora", &format!("x={nowhere}"), "--port", "0"],
        &["--lora: x", "adapter_model.safetensors"],
    );
}

#[test]
fn what_must_not_happen_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source.gguf");
    fs::copy(golden("llama.gguf"), &source).unwrap();
    let (from, out) = (source.to_str().unwrap(), folder.path().join("out.gguf"));
    let to = out.to_str().unwrap();
    fs::write(&out, "precious").unwrap();
    refused(&["quantize", from, "-o", to], &["out.gguf exists", "--force"]);
    assert_eq!(fs::read(&out).unwrap(), b"precious");
    refused(&["quantize", from, "-o", to, "--type", "q9"], &["q9", "q4_k_m"]);
    refused(&["quantize", from, "-o", from, "--force"], &["is the source itself"]);
    refused(&["quantize", from, "-o", folder.path().to_str().unwrap(), "--force"], &["a folder"]);
    let nowhere = folder.path().join("no/where.gguf");
    refused(&["quantize", from, "-o", nowhere.to_str().unwrap()], &["where.gguf"]);
    said(&["quantize", from, "-o", to, "--force", "--type", "q4_0"]);
    // 48 is no whole block of 32: these rows stay f16.
    let weights = Weights::open(&out).unwrap();
    let ty = &weights.info("blk.0.attn_q.weight").unwrap().ty;
    assert_eq!(*ty, TensorType::Readable(DType::F16));

    let quantised = golden("qwen2-q4_0.gguf");
    let quantised = quantised.to_str().unwrap();
    refused(&["quantize", quantised, "-o", to, "--force", "--type", "q8_0"], &["Q4_0 already"]);
    assert!(Weights::open(&out).is_ok(), "the old file is whole");
    refused(
        &["complete", "a", "--model", quantised, "--quantize", "q8_0"],
        &["--quantize", "Q4_0 already"],
    );
    refused(&["complete", "a", "--model", from, "--quantize", "x"], &["--quantize", "`x`"]);
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(names.len(), 2, "nothing unfinished stays: {names:?}");
}

#[test]
fn a_trained_model_tells_the_same_story() {
    let Some(source) = shared("models/stories260K-hf") else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("stories.gguf");
    said(&["quantize", source.to_str().unwrap(), "-o", out.to_str().unwrap(), "-t", "f32"]);
    let story = |model: &Path| {
        let model = model.to_str().unwrap();
        let prompt = "Once upon a time, there was";
        said(&["complete", prompt, "-n", "100", "--temperature", "0", "--model", model])
    };
    assert_eq!(story(&out), story(&source));
}

/// The most that was resident of a process that ends well.
#[cfg(target_os = "linux")]
fn peak_bytes(args: &[&str]) -> u64 {
    let mut child = command(args).stdout(Stdio::null()).spawn().unwrap();
    let mut peak = 0;
    let ended = loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        // One that has ended has no memory, and no such line.
        if let Some(line) = status.lines().find(|line| line.starts_with("VmHWM:")) {
            peak = line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
        }
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(ended.success(), "{args:?}");
    peak
}

/// A model of 270 MB in bf16 whose largest matrix has 8 MB; every row is the same.
#[cfg(target_os = "linux")]
fn large_folder(folder: &Path) {
    const LAYERS: usize = 8;
    const HIDDEN: usize = 1024;
    const FFN: usize = 4096;
    folder_with_tokenizer(folder);
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("hidden_size", HIDDEN),
        ("intermediate_size", FFN),
        ("num_hidden_layers", LAYERS),
        ("max_window_layers", LAYERS),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 16),
        ("head_dim", 64),
    ] {
        config[key] = json!(value);
    }
    fs::write(path, config.to_string()).unwrap();
    let layer = [
        ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
        ("self_attn.k_proj", vec![HIDDEN, HIDDEN]),
        ("self_attn.v_proj", vec![HIDDEN, HIDDEN]),
        ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
        ("mlp.gate_proj", vec![FFN, HIDDEN]),
        ("mlp.up_proj", vec![FFN, HIDDEN]),
        ("mlp.down_proj", vec![HIDDEN, FFN]),
        ("self_attn.q_norm", vec![64]),
        ("self_attn.k_norm", vec![64]),
        ("input_layernorm", vec![HIDDEN]),
        ("post_attention_layernorm", vec![HIDDEN]),
    ];
    let names = (0..LAYERS).flat_map(|l| {
        layer.iter().map(move |(name, shape)| (format!("layers.{l}.{name}"), shape.clone()))
    });
    let ends = [("embed_tokens", vec![264, HIDDEN]), ("norm", vec![HIDDEN])];
    let ends = ends.map(|(name, shape)| (name.to_owned(), shape));
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in names.chain(ends) {
        let end = at + 2 * shape.iter().product::<usize>();
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] });
        header.insert(format!("model.{name}.weight"), entry);
        at = end;
    }
    let header = Value::Object(header).to_string();
    let row = randoms(HIDDEN, 1);
    let row: Vec<u8> = row.iter().flat_map(|x| x.to_bits().to_le_bytes()[2..].to_vec()).collect();
    let mut file = BufWriter::new(fs::File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut left = at;
    while left > 0 {
        let some = row.len().min(left);
        file.write_all(&row[..some]).unwrap();
        left -= some;
    }
    file.into_inner().unwrap();
}

/// Neither way holds the floats: what is made and a tensor of the source at most, and the program.
#[cfg(target_os = "linux")]
#[test]
fn floats_of_a_large_model_are_never_all_in_memory() {
    const MIB: u64 = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    fs::create_dir(&source).unwrap();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    folder_with_tokenizer(&small);
    large_folder(&source);
    let out = folder.path().join("out.gguf");
    let (from, to) = (source.to_str().unwrap(), out.to_str().unwrap());
    let floats = source.join("model.safetensors").metadata().unwrap().len();
    assert!(floats > 250 * MIB, "{floats}");

    let complete = |model: &Path, more: &[&str]| {
        let model = model.to_str().unwrap();
        let flags = ["complete", "the", "-n", "1", "-t", "2", "--ctx-size", "64", "-m", model];
        peak_bytes(&[&flags[..], more].concat())
    };
    let program = complete(&small, &[]);
    let file = peak_bytes(&["quantize", from, "-o", to, "--type", "q8_0"]);
    let made = out.metadata().unwrap().len();
    let load = complete(&source, &["--quantize", "q8_0"]);
    println!("floats {floats}, made {made}, program {program}; file {file}, load {load} bytes");
    // A tensor of 8 MiB, what it becomes, and the pages that a few threads have just read.
    assert!(file <= program + 24 * MIB, "writing a file took {file}, the program {program}");
    assert!(load > made, "the weights are in memory");
    assert!(load <= made + program + 24 * MIB, "loading took {load} for {made}");
}

/// A server of llama.cpp; gone when dropped.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended
        let _ = self.0.wait();
    }
}

/// What llama.cpp says greedily, or why it does not.
fn peer_says(server: &Path, model: &Path, prompt: &str, tokens: usize) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    drop(listener);
    let mut command = Command::new(server);
    command.args(["--port", &port, "-t", "2", "-c", "256", "--no-warmup", "-m"]).arg(model);
    let _peer = Peer(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let url = format!("http://127.0.0.1:{port}");
    let curl = |args: &[&str]| Command::new("curl").args(["-fsS"]).args(args).output().unwrap();
    let start = Instant::now();
    while !curl(&[&format!("{url}/health")]).status.success() {
        assert!(start.elapsed() < Duration::from_secs(30), "{} is not loaded", model.display());
        std::thread::sleep(Duration::from_millis(100));
    }
    let ask = json!({ "prompt": prompt, "n_predict": tokens, "temperature": 0 }).to_string();
    let answer = curl(&[&format!("{url}/completion"), "-d", &ask]);
    let answer: Value = serde_json::from_slice(&answer.stdout).unwrap();
    answer["content"].as_str().unwrap().to_owned()
}

/// Where `HEARTH_LLAMA_CPP` names the `llama-server` of a built llama.cpp: it loads what we write,
/// in every type of a mix and at widths that are no multiple of 256, and reads the same in it.
#[test]
fn llama_cpp_reads_what_is_written() {
    let Some(server) = std::env::var_os("HEARTH_LLAMA_CPP").map(PathBuf::from) else {
        return println!("SKIPPED: HEARTH_LLAMA_CPP names no llama-server");
    };
    let Some(source) = shared("models/stories260K-hf") else { return };
    let folder = tempfile::tempdir().unwrap();
    let prompt = "Once upon a time, there was";
    for (mix, same) in [("f32", 200), ("f16", 100), ("q8_0", 60), ("q4_0", 1), ("q4_k_m", 1)] {
        let out = folder.path().join(format!("{mix}.gguf"));
        let (from, to) = (source.to_str().unwrap(), out.to_str().unwrap());
        said(&["quantize", from, "-o", to, "-t", mix]);
        let ours = said(&["complete", prompt, "-n", "60", "--temperature", "0", "-m", to]);
        let theirs = peer_says(&server, &out, prompt, 60);
        println!("{mix}: {ours:?}\n{theirs:?}");
        let ours = ours.strip_prefix(prompt).unwrap_or(&ours);
        let common = ours.bytes().zip(theirs.bytes()).take_while(|(a, b)| a == b).count();
        assert!(common >= same.min(ours.trim_end().len()), "{mix}: {common} bytes are the same");
    }
}

#[test]
fn well_known_tokenizers_have_words_in_gguf() {
    for (folder, rows, model, pre) in [
        ("tokenizers/qwen", 151_936, "gpt2", "qwen2"),
        ("tokenizers/llama3", 128_256, "gpt2", "llama-bpe"),
        ("tokenizers/phi-3-mini", 32_064, "llama", "default"),
    ] {
        let Some(folder) = shared(folder) else { return };
        let files = walk(&folder);
        let found: Vec<&PathBuf> =
            files.iter().filter(|path| path.ends_with("tokenizer.json")).collect();
        assert!(!found.is_empty(), "{}", folder.display());
        for path in found {
            let tokenizer = Tokenizer::from_file(path).unwrap();
            let rows = rows.max(tokenizer.vocab_len());
            let made = text::export(&fs::read(path).unwrap(), &tokenizer, rows);
            let made = made.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert_eq!((&*made.model, made.pre.as_deref()), (model, Some(pre)));
            assert_eq!(made.tokens.len(), rows);
            let again = Tokenizer::from_gguf(&made).unwrap();
            let text = "A text that no probe has: 42 Äpfel, 三十個學生.\n\tif x { y }";
            assert_eq!(
                again.encode(text, Special::PROMPT).unwrap(),
                tokenizer.encode(text, Special::PROMPT).unwrap()
            );
        }
    }
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
