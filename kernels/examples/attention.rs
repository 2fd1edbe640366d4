//! How fast attention reads K and V (decode) and multiplies (prefill) on this machine.
//!
//! ```text
//! cargo run --release -p hearth-kernels --example attention [threads]
//! ```
//! GB/s counts K and V once per decoded token; GFLOP/s counts two products of two operations for
//! every visible (row, key, head, number of the head).

use hearth_kernels::attention::{AttentionBatch, AttentionParams, attention};
use hearth_kernels::kv::{KvShape, KvSlab, KvType};
use hearth_kernels::pool::default_threads;
use hearth_kernels::{Isa, Pool, cases};
use std::time::{Duration, Instant};

/// Query heads, KV heads, head size, and a model that has them.
const MODELS: [(usize, usize, usize, &str); 3] =
    [(14, 2, 64, "Qwen2.5 0.5B"), (32, 8, 64, "Llama 3.2 1B"), (32, 32, 128, "Llama 2 7B")];

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok());
    let pool = Pool::new(threads.unwrap_or_else(default_threads));
    println!("{} threads", pool.threads());
    println!("{:<14} {:<5} {:<7} {:>10} {:>10}", "model", "KV", "isa", "keys", "speed");
    for model in MODELS {
        for kv_type in [KvType::F32, KvType::F16, KvType::BF16] {
            for isa in Isa::available().iter().filter(|isa| **isa != Isa::Scalar) {
                [2048, 8192].iter().for_each(|depth| decode(&pool, *isa, model, kv_type, *depth));
                prefill(&pool, *isa, model, kv_type, 512);
            }
        }
    }
}

fn decode(
    pool: &Pool,
    isa: Isa,
    model: (usize, usize, usize, &str),
    kv_type: KvType,
    depth: usize,
) {
    let seconds = time(pool, isa, model, kv_type, 1, depth);
    let (_, n_kv_heads, dim, name) = model;
    let bytes = 2 * depth * n_kv_heads * dim * kv_type.size();
    let speed = bytes as f64 / seconds / 1e9;
    print_line(name, kv_type, isa, &format!("1 x {depth}"), &format!("{speed:.1} GB/s"));
}

fn prefill(
    pool: &Pool,
    isa: Isa,
    model: (usize, usize, usize, &str),
    kv_type: KvType,
    rows: usize,
) {
    let seconds = time(pool, isa, model, kv_type, rows, rows);
    let (n_heads, _, dim, name) = model;
    let pairs = rows * (rows + 1) / 2;
    let speed = (4 * pairs * n_heads * dim) as f64 / seconds / 1e9;
    print_line(name, kv_type, isa, &format!("{rows} x {rows}"), &format!("{speed:.0} GFLOP/s"));
}

fn print_line(name: &str, kv_type: KvType, isa: Isa, keys: &str, speed: &str) {
    println!("{name:<14} {:<5} {:<7} {keys:>10} {speed:>10}", format!("{kv_type:?}"), isa.name());
}

/// Seconds of one call, the best of many.
fn time(
    pool: &Pool,
    isa: Isa,
    (n_heads, n_kv_heads, head_dim, _): (usize, usize, usize, &str),
    kv_type: KvType,
    rows: usize,
    depth: usize,
) -> f64 {
    let n_blocks = depth / 16;
    let shape = KvShape { n_blocks, block_len: 16, n_kv_heads, head_dim };
    let mut kv = KvSlab::new(shape, kv_type);
    let slots: Vec<u32> = (0..depth as u32).collect();
    let numbers = depth * n_kv_heads * head_dim;
    kv.write(&cases::randoms(numbers, 1), &cases::randoms(numbers, 2), &slots);
    let table: Vec<u32> = (0..n_blocks as u32).map(|i| i * 7919 % n_blocks as u32).collect();
    let q = cases::randoms(rows * n_heads * head_dim, 3);
    let mut out = vec![0.0; q.len()];
    let batch = AttentionBatch {
        cu_q: &[0, rows as u32],
        context_len: &[depth as u32],
        block_tables: &[&table],
    };
    let params = AttentionParams { n_heads, scale: 0.1, window: None, softcap: None };
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < Duration::from_millis(300) {
        let start = Instant::now();
        attention(pool, isa, &q, &kv, &batch, &params, &mut out);
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
