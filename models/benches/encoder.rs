//! Whole encoders against candle-transformers' `BertModel`, in one process, in turns.
//!
//! `cargo bench -p hearth-models --bench encoder -- FOLDER [--ours]`: a folder with `config.json`
//! and `model.safetensors` of a BERT model. Texts of one length, so that the peer needs no padding;
//! both sides use the threads that `RAYON_NUM_THREADS` says (default: two). A cell is the median of
//! its rounds.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use hearth_kernels::Pool;
use hearth_models::{AnyFile, Compute, EncoderBatch, TextEncoder};

/// Texts, and tokens of each.
const SHAPES: [(usize, usize); 6] = [(1, 16), (1, 256), (32, 16), (8, 64), (2, 256), (16, 256)];
const ROUNDS: usize = 9;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let Some(folder) = args.iter().find(|arg| !arg.starts_with("--")) else {
        println!("no folder named, nothing to measure");
        return;
    };
    let threads = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let ours = ours(Path::new(folder), threads);
    let peer = (!args.iter().any(|arg| arg == "--ours")).then(|| peer(Path::new(folder)));
    println!("| texts x tokens | ours, texts/s | candle, texts/s | ratio |");
    println!("|---|---|---|---|");
    for (texts, tokens) in SHAPES {
        let ids: Vec<u32> = (0..tokens as u32).map(|i| 1000 + i * 37 % 20_000).collect();
        let mut batch = EncoderBatch::default();
        (0..texts).for_each(|_| batch.push(&ids));
        let input = Tensor::from_vec(ids.repeat(texts), (texts, tokens), &Device::Cpu);
        let input = input.expect("a tensor");
        let types = input.zeros_like().expect("a tensor");
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..=ROUNDS {
            let time = |work: &dyn Fn() -> usize| {
                let started = Instant::now();
                assert!(work() > 0);
                started.elapsed()
            };
            mine.push(time(&|| ours.forward(&batch).expect("a pass").len()));
            if let Some(peer) = &peer {
                let pass = || peer.forward(&input, &types, None).expect("a pass").elem_count();
                theirs.push(time(&pass));
            }
        }
        let (mine, theirs) = (median(mine), peer.is_some().then(|| median(theirs)));
        let per_s = |time: Duration| texts as f64 / time.as_secs_f64();
        let told = theirs.map_or("| |".to_owned(), |theirs| {
            let ratio = theirs.as_secs_f64() / mine.as_secs_f64();
            format!("| {:.0} | {ratio:.2} |", per_s(theirs))
        });
        println!("| {texts} x {tokens} | {:.0} {told}", per_s(mine));
    }
}

/// Without the first, which finds cold caches and sleeping threads.
fn median(mut times: Vec<Duration>) -> Duration {
    times.remove(0);
    times.sort();
    times[times.len() / 2]
}

fn ours(folder: &Path, threads: usize) -> Box<dyn TextEncoder> {
    let AnyFile::Encoder(file) = hearth_models::open_any(folder).expect("a model") else {
        panic!("{} is no encoder", folder.display());
    };
    file.load(&Compute::Fused(Arc::new(Pool::new(threads))), &mut |_| {}).expect("it loads")
}

fn peer(folder: &Path) -> BertModel {
    let text = std::fs::read_to_string(folder.join("config.json")).expect("a configuration");
    let config: Config = serde_json::from_str(&text).expect("a configuration");
    let bytes = std::fs::read(folder.join("model.safetensors")).expect("weights");
    let weights = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu);
    BertModel::load(weights.expect("weights"), &config).expect("it loads")
}
