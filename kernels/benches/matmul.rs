//! Quantised matmul against candle-core's `QMatMul`, in one process, one after the other.
//!
//! `cargo bench -p hearth-kernels --bench matmul [-- FORMAT...]`. Both sides use two threads and
//! the same weights; a cell is the median of its rounds, the sides take turns within a round.
//! Without a peer: `-- --ours` prints only this crate's side, for every format.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};
use hearth_kernels::Pool;
use hearth_kernels::cases::randoms;
use hearth_kernels::matmul::{Packed, matmul};
use hearth_kernels::quant::{DType, quantize};

const THREADS: usize = 2;
const BATCHES: &[usize] = &[1, 8, 128];
/// Format, n, k. The last one is a width that is no multiple of 256.
const SHAPES: &[(DType, usize, usize)] = &[
    (DType::Q4K, 8192, 2048),
    (DType::Q6K, 8192, 2048),
    (DType::Q8_0, 8192, 2048),
    (DType::Q4_0, 8192, 2048),
    (DType::Q8_0, 4864, 896),
];
const OTHERS: &[DType] = &[
    DType::Q2K,
    DType::Q3K,
    DType::Q5K,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::F32,
    DType::F16,
    DType::BF16,
];
/// Larger than the last cache: between two calls, what a decode step would have evicted is evicted.
const COLD_BYTES: usize = 256 << 20;

fn main() {
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", THREADS.to_string()) };
    // SAFETY: as above.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", THREADS.to_string()) };
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let ours_only = args.iter().any(|arg| arg == "--ours");
    let names: Vec<_> = args.iter().filter(|arg| !arg.starts_with("--")).collect();
    let wanted = |dtype: DType| names.is_empty() || names.iter().any(|name| *name == dtype.name());
    let pool = Pool::new(THREADS);
    println!("| format | n x k | m | ours, us | candle, us | ratio | GB/s | GOP/s |");
    println!("|---|---|---|---|---|---|---|---|");
    let others = OTHERS.iter().filter(|_| ours_only).map(|&dtype| (dtype, 8192, 2048));
    for (dtype, n, k) in SHAPES.iter().copied().chain(others).filter(|shape| wanted(shape.0)) {
        compare(&pool, dtype, n, k, !ours_only);
    }
}

fn compare(pool: &Pool, dtype: DType, n: usize, k: usize, with_peer: bool) {
    let bytes = weights(dtype, n, k);
    let row_bytes = bytes.len() / n;
    let started = Instant::now();
    let first = Packed::pack(pool, dtype, n, k, &bytes);
    let packing = bytes.len() as f64 / started.elapsed().as_secs_f64() / 1e9;
    eprintln!("{dtype}: packed at {packing:.2} GB/s, {} of {row_bytes} bytes", first.bytes() / n);
    // As many copies as make the set cold: calls go round them as decoding goes round the layers.
    let copies = COLD_BYTES.div_ceil(bytes.len());
    let mut ours = vec![first];
    ours.extend((1..copies).map(|_| Packed::pack(pool, dtype, n, k, &bytes)));
    let peers: Vec<QMatMul> =
        (0..if with_peer { copies } else { 0 }).map(|_| peer(dtype, n, k, &bytes)).collect();
    for &m in BATCHES {
        let x = randoms(m * k, 3);
        let mut y = vec![0.0; m * n];
        let input = Tensor::from_slice(&x, (m, k), &Device::Cpu).expect("a tensor");
        let calls = copies.min(128 / m).max(2);
        let rounds = if m == 128 { 9 } else { 25 };
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            mine.push(time(&ours[..calls], |w| matmul(pool, &x, m, w, &mut y)));
            if with_peer {
                theirs.push(time(&peers[..calls], |w| {
                    std::hint::black_box(w.forward(&input).expect("a product"));
                }));
            }
        }
        if with_peer {
            check(&peers[0], &input, &y);
        }
        let mine = median(&mut mine);
        let theirs = if with_peer { median(&mut theirs) } else { f64::NAN };
        println!(
            "| {dtype} | {n} x {k} | {m} | {:.0} | {:.0} | {:.2} | {:.1} | {:.0} |",
            mine * 1e6,
            theirs * 1e6,
            theirs / mine,
            bytes.len() as f64 / mine / 1e9,
            2.0 * (m * n * k) as f64 / mine / 1e9,
        );
    }
}

/// Seconds per call, after a pause in which the other side's idle threads stop spinning, and after
/// one call that wakes this side's.
fn time<W>(weights: &[W], mut call: impl FnMut(&W)) -> f64 {
    std::thread::sleep(Duration::from_millis(5));
    call(&weights[weights.len() - 1]);
    let started = Instant::now();
    for w in weights {
        call(w);
    }
    started.elapsed().as_secs_f64() / weights.len() as f64
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn weights(dtype: DType, n: usize, k: usize) -> Vec<u8> {
    let values: Vec<f32> = randoms(n * k, 1).iter().map(|x| x * 0.05).collect();
    // Formats without a quantiser: zeros take the same time.
    let len = dtype.row_bytes(n * k).expect("whole blocks");
    quantize(dtype, &values).unwrap_or_else(|| vec![0; len])
}

fn peer(dtype: DType, n: usize, k: usize, bytes: &[u8]) -> QMatMul {
    let kind = match dtype {
        DType::Q4_0 => GgmlDType::Q4_0,
        DType::Q8_0 => GgmlDType::Q8_0,
        DType::Q4K => GgmlDType::Q4K,
        DType::Q6K => GgmlDType::Q6K,
        other => panic!("no peer for {other}"),
    };
    let storage = QStorage::from_data(bytes.to_vec().into(), &Device::Cpu, kind).expect("storage");
    let tensor = QTensor::new(storage, (n, k)).expect("a tensor");
    QMatMul::from_arc(Arc::new(tensor)).expect("a matrix")
}

/// Both sides must compute the same thing, to what 8-bit activations allow.
fn check(peer: &QMatMul, input: &Tensor, y: &[f32]) {
    let want = peer.forward(input).and_then(|y| y.flatten_all()?.to_vec1::<f32>());
    let want = want.expect("a product");
    let size = (want.iter().map(|y| y * y).sum::<f32>() / want.len() as f32).sqrt();
    let worst = y.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 0.1 * size, "off by {worst}, results of size {size}");
}
