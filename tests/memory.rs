//! Resident memory while a model loads: at most 1.15 times its file, at every moment.
//!
//! A real process loads a real file from disk; the system says what it took at most. The file is
//! large enough for what the program itself takes (about 25 MB) to fit in the 15 %.

#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use hearth_kernels::cases::randoms;
use hearth_kernels::quant::quantize;
use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::{DType, Value};

const LAYERS: usize = 28;
const HIDDEN: usize = 1024;
const FFN: usize = 4096;
const VOCAB: usize = 32_000;

#[test]
fn loading_never_takes_more_than_the_file_and_fifteen_percent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.gguf");
    write_model(&path);
    let file_bytes = path.metadata().unwrap().len();
    assert!(file_bytes > 250_000_000, "{file_bytes}");

    let mut server = Server::start(&path);
    let peak = server.peak_bytes();
    println!("file {file_bytes}, peak {peak}: {:.3}", peak as f64 / file_bytes as f64);
    assert!(peak > file_bytes, "the weights are in memory");
    assert!(peak as f64 <= 1.15 * file_bytes as f64, "{peak} bytes for a file of {file_bytes}");
}

/// A server that has loaded its model; gone when dropped.
struct Server(Child);

impl Server {
    fn start(model: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("HEARTH_") {
                command.env_remove(name);
            }
        }
        let flags = ["serve", "--port", "0", "--threads", "2", "--ctx-size", "64", "--model"];
        command.args(flags).arg(model).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert!(line.starts_with("listening"), "{line}");
        Self(child)
    }

    /// The most that was ever resident.
    fn peak_bytes(&mut self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A Llama with the mix of a Q4_K_M file. Every row is the same: loading does not look at values.
fn write_model(path: &Path) {
    let mut tensors: Vec<(String, Vec<usize>, DType)> =
        vec![("token_embd.weight".into(), vec![VOCAB, HIDDEN], DType::Q6K)];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize], dtype| {
            tensors.push((format!("blk.{layer}.{name}.weight"), shape.to_vec(), dtype));
        };
        let more = if layer % 2 == 0 { DType::Q6K } else { DType::Q4K };
        add("attn_q", &[HIDDEN, HIDDEN], DType::Q4K);
        add("attn_k", &[HIDDEN, HIDDEN], DType::Q4K);
        add("attn_v", &[HIDDEN, HIDDEN], more);
        add("attn_output", &[HIDDEN, HIDDEN], DType::Q4K);
        add("ffn_gate", &[FFN, HIDDEN], DType::Q4K);
        add("ffn_up", &[FFN, HIDDEN], DType::Q4K);
        add("ffn_down", &[HIDDEN, FFN], more);
        add("attn_norm", &[HIDDEN], DType::F32);
        add("ffn_norm", &[HIDDEN], DType::F32);
    }
    tensors.push(("output_norm.weight".into(), vec![HIDDEN], DType::F32));

    let mut writer = GgufWriter::new();
    put_metadata(&mut writer);
    for (name, shape, dtype) in &tensors {
        writer.tensor(name, shape, *dtype).unwrap();
    }
    let file = BufWriter::new(File::create(path).unwrap());
    let mut body = writer.write_header(file).unwrap();
    for (_, shape, dtype) in &tensors {
        let row = quantize(*dtype, &randoms(shape[shape.len() - 1], 1)).unwrap();
        let rows = if shape.len() == 2 { shape[0] } else { 1 };
        body.write_tensor(&row.repeat(rows)).unwrap();
    }
    body.finish().unwrap();
}

fn put_metadata(writer: &mut GgufWriter) {
    writer.put("general.architecture", Value::Str("llama")).unwrap();
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", 2048),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", FFN),
        ("attention.head_count", 16),
    ] {
        writer.put(&format!("llama.{key}"), Value::U32(value as u32)).unwrap();
    }
    writer.put("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)).unwrap();
    writer.put("tokenizer.ggml.model", Value::Str("llama")).unwrap();
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let types = [[2, 3, 3].as_slice(), &[6; 256]].concat();
    writer.put_strings("tokenizer.ggml.tokens", &tokens).unwrap();
    writer.put_f32s("tokenizer.ggml.scores", &vec![0.0; tokens.len()]).unwrap();
    writer.put_i32s("tokenizer.ggml.token_type", &types).unwrap();
}
