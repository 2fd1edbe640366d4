//! What a server takes of the machine. Resident memory while a model loads: at most 1.15 times its
//! file, at every moment; and when it is unloaded, gone. Processor time while nobody asks: none.
//!
//! A real process loads a real file from disk; the system says what it took at most. The file is
//! large enough for what the program itself takes (about 25 MB) to fit in the 15 %.

#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

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

    let mut server = Server::start(&["--model", path.to_str().unwrap()]);
    let peak = server.peak_bytes();
    println!("file {file_bytes}, peak {peak}: {:.3}", peak as f64 / file_bytes as f64);
    assert!(peak > file_bytes, "the weights are in memory");
    assert!(peak as f64 <= 1.15 * file_bytes as f64, "{peak} bytes for a file of {file_bytes}");
}

#[test]
fn a_model_that_leaves_gives_its_memory_back() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
    write_model(&a);
    std::fs::hard_link(&a, &b).unwrap();
    let file_bytes = a.metadata().unwrap().len();
    // One fits, and two do not.
    let budget = format!("{}M", (file_bytes >> 20) * 3 / 2);
    let flags = ["--models-dir", folder.path().to_str().unwrap(), "--memory-budget", &budget];
    let small = ["--max-running", "1", "--batch-tokens", "64"];
    let server = Server::start(&[&flags[..], &small].concat());
    let share = |bytes: u64| bytes as f64 / file_bytes as f64;
    let empty = server.resident_bytes();
    assert!(share(empty) < 0.25, "nothing is loaded, and {empty} bytes are resident");
    for round in 0..3 {
        server.load("a");
        let with_a = server.resident_bytes();
        server.load("b");
        // The thread that lets go of the other one may be a moment behind.
        let start = Instant::now();
        while share(server.resident_bytes()) >= 1.25 && start.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let with_b = server.resident_bytes();
        println!("round {round}: {empty}, a {with_a}, b {with_b} bytes; file {file_bytes}");
        assert!(share(with_a) > 0.9, "{with_a}");
        assert!(share(with_b) > 0.9 && share(with_b) < 1.25, "a is gone: {with_b}");
    }
    assert_eq!(server.post("b/unload"), 200);
    let start = Instant::now();
    while share(server.resident_bytes().saturating_sub(empty)) > 0.1 {
        let resident = server.resident_bytes();
        assert!(start.elapsed() < Duration::from_secs(30), "{resident} bytes, {empty} at first");
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("at the end {} bytes", server.resident_bytes());
}

#[test]
fn an_idle_server_uses_no_processor() {
    let server = Server::start(&[]);
    for asked in [false, true] {
        if asked {
            let body = r#"{"model":"hearth-tiny","prompt":"Once","max_tokens":32}"#;
            assert_eq!(server.ask("/v1/completions", body), 200);
        }
        std::thread::sleep(Duration::from_secs(1)); // what a start and an answer leave to do
        let before = server.ticks();
        std::thread::sleep(Duration::from_secs(5));
        let used = server.ticks() - before;
        println!("asked {asked}: {used} hundredths of a second in five seconds");
        assert!(used <= 2, "{used} hundredths of a second in five seconds of nothing to do");
    }
}

#[test]
fn keys_and_values_have_their_memory_from_the_start_on_if_asked() {
    // 512 sequences of 64 tokens, of which the built-in model stores two heads of 64 for each
    // of four layers, two bytes a number and a scale a head.
    const KV_BYTES: f64 = (512 * 64 * 4 * 2 * 2 * (64 * 2 + 4)) as f64;
    // The first huge page of a layer has what lies before it, too.
    let ranks = |count| ["--tensor-parallel", count];
    let draft = ["--draft-model", "hearth-tiny"];
    for (flags, wanted) in [(ranks("1"), KV_BYTES), (ranks("2"), KV_BYTES), (draft, 2.0 * KV_BYTES)]
    {
        let taken = |extra: &[&str]| {
            let flags = [&["--max-running", "512"], &flags[..], extra].concat();
            Server::start(&flags).status("RssAnon:") as f64
        };
        let (later, now) = (taken(&[]), taken(&["--kv-prefault"]));
        println!("{flags:?}: {later} and {now} bytes, keys and values are {wanted}");
        assert!((now - later - wanted).abs() < 0.2 * wanted, "{later} {now} {wanted}");
    }
}

/// A server that has loaded what it loads at the start; gone when dropped.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(extra: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("HEARTH_") {
                command.env_remove(name);
            }
        }
        let flags = ["serve", "--port", "0", "--threads", "2", "--ctx-size", "64"];
        command.args(flags).args(["--data-dir", "none"]).args(extra).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://");
        let address = address.unwrap_or_else(|| panic!("{line}")).to_owned();
        Self { child, address }
    }

    /// The most that was ever resident.
    fn peak_bytes(&mut self) -> u64 {
        self.status("VmHWM:")
    }

    /// What is resident now.
    fn resident_bytes(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// Has the operator load a model, and waits until it is there.
    fn load(&self, model: &str) {
        assert_eq!(self.post(&format!("{model}/load")), 200);
    }

    /// The status of the answer to something that the operator asks.
    fn post(&self, path: &str) -> u16 {
        self.ask(&format!("/v1/admin/models/{path}"), "")
    }

    /// The status of the answer.
    fn ask(&self, path: &str, body: &str) -> u16 {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json");
        let len = body.len();
        write!(stream, "{head}\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n{body}")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Processor time of all threads so far, in hundredths of a second (`man 5 proc`).
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The name, in brackets, may hold anything.
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap()..].split(' ').collect();
        [fields[12], fields[13]].iter().map(|field| field.parse::<u64>().unwrap()).sum()
    }

    fn status(&self, key: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
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
