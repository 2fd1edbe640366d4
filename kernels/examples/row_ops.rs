//! Microseconds of the small ops of a decode step and of a prefill, on this machine.
//!
//! ```text
//! cargo run --release -p hearth-kernels --example row_ops [threads]
//! ```

use hearth_kernels::activation::{Gate, gate_up_with};
use hearth_kernels::norm::rms_norm_with;
use hearth_kernels::pool::default_threads;
use hearth_kernels::rope::rope_with;
use hearth_kernels::sampling::{SamplingParams, Scratch, log_probs_with, sample_with};
use hearth_kernels::{Isa, Pool, cases};
use std::time::{Duration, Instant};

const HIDDEN: usize = 896;
const INTER: usize = 4864;
const VOCAB: usize = 151_936;

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok());
    let pool = Pool::new(threads.unwrap_or_else(default_threads));
    println!("{} threads", pool.threads());
    report("pool.run of 2 tasks", Isa::best(), || pool.run(2, &|_| {}));
    for isa in Isa::available() {
        for rows in [1, 128] {
            row_ops(&pool, *isa, rows);
        }
        sampling(*isa);
    }
}

fn row_ops(pool: &Pool, isa: Isa, rows: usize) {
    let x = cases::randoms(rows * HIDDEN, 1);
    let (weight, mut out) = (cases::randoms(HIDDEN, 2), vec![0.0; rows * HIDDEN]);
    report(&format!("rms_norm {rows} x {HIDDEN}"), isa, || {
        rms_norm_with(isa, pool, &x, &weight, 1e-6, rows, HIDDEN, &mut out);
    });
    let (cos, sin, mut q) = (cases::randoms(rows * 32, 3), cases::randoms(rows * 32, 4), x);
    report(&format!("rope {rows} x 14 x 64"), isa, || {
        rope_with(isa, pool, &mut q, &cos, &sin, 14, 64, 64);
    });
    let (packed, mut out) = (cases::randoms(rows * 2 * INTER, 5), vec![0.0; rows * INTER]);
    report(&format!("silu gate {rows} x {INTER}"), isa, || {
        gate_up_with(isa, pool, Gate::Silu, &packed, INTER, &mut out);
    });
}

fn sampling(isa: Isa) {
    let logits: Vec<f32> = cases::randoms(VOCAB, 6).iter().map(|x| x * 12.0).collect();
    let base = SamplingParams::default();
    let kinds = [
        ("greedy", SamplingParams { temperature: 0.0, ..base }),
        ("temperature", base),
        ("top_k 40", SamplingParams { top_k: 40, ..base }),
        ("top_p 0.9", SamplingParams { top_p: 0.9, ..base }),
        ("all filters", SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.05, ..base }),
    ];
    let mut scratch = Scratch::new();
    for (name, params) in kinds {
        report(&format!("sample, {name}"), isa, || {
            sample_with(isa, &logits, &params, 1, 2, &mut scratch);
        });
    }
    report("log_probs, top 5", isa, || {
        log_probs_with(isa, &logits, 7, 5);
    });
}

/// The best of many calls.
fn report(name: &str, isa: Isa, mut f: impl FnMut()) {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < Duration::from_millis(200) {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{name:<24} {:<7} {:>10.1} us", isa.name(), best * 1e6);
}
