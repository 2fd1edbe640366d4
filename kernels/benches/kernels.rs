//! Our kernels beside the limits of this machine.
//!
//! `cargo bench -p hearth-kernels --bench kernels [-- PART_OF_A_NAME...]`. First what the machine
//! can do, reading memory and multiplying bytes, then every op with the bytes it must read, the
//! operations it must do, and both as percent of those limits. The larger percentage says what
//! bounds an op. Cells are medians.

use std::time::Instant;

use hearth_kernels::activation::{self, Gate};
use hearth_kernels::attention::{AttentionBatch, AttentionParams, attention};
use hearth_kernels::buffer::HugeBuf;
use hearth_kernels::cases::randoms;
use hearth_kernels::kv::{KvShape, KvSlab, KvType};
use hearth_kernels::matmul::{
    ActivationBuffers, ActivationKind, Activations, Packed, matmul_prepared,
};
use hearth_kernels::quant::{DType, quantize};
use hearth_kernels::{Isa, Pool, norm, pool};

/// Larger than the last cache: between two calls, what a decode step would have evicted is evicted.
const COLD_BYTES: usize = 128 << 20;
const BLOCK_LEN: usize = 16;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let pool = Pool::new(pool::default_threads());
    let limits = Limits::measure(&pool);
    let one = Limits::measure(&Pool::new(1));
    for (threads, limits) in [(1, &one), (pool.threads(), &limits)] {
        println!(
            "limits, {threads} threads: read {:.1} GB/s, 8-bit products {:.0} GOP/s, f32 {:.0} \
             GFLOP/s, bf16 {:.0}",
            limits.read, limits.bytes, limits.floats, limits.brains
        );
    }
    let [tail, most] = steadiness(&pool);
    println!("the same work again and again: p95 {tail:.2}, at most {most:.2} of the median");
    println!("| op | shape | us | GB/s | % | GOP/s | % |");
    println!("|---|---|---|---|---|---|---|");
    let table = Table { limits, wanted: args };
    matmuls(&pool, &table);
    attentions(&pool, &table);
    classes(&pool, &table);
    small(&pool, &table);
}

/// Speeds of the machine, in 1e9 per second.
struct Limits {
    /// Bytes read from memory.
    read: f64,
    /// Additions and multiplications of bytes.
    bytes: f64,
    /// The same of f32.
    floats: f64,
    /// The same of bf16, which are f32 where the processor has no instruction for them.
    brains: f64,
}

impl Limits {
    fn measure(pool: &Pool) -> Limits {
        let mut memory = HugeBuf::<u64>::zeroed(64 << 20);
        memory.fill(1); // Pages that nobody has written are all one page.
        let part = memory.len() / pool.threads();
        let read = best(8, || {
            pool.run(pool.threads(), &|i| {
                let mut sums = [0_u64; 32];
                for words in memory[i * part..(i + 1) * part].chunks_exact(32) {
                    sums.iter_mut().zip(words).for_each(|(sum, word)| *sum |= word);
                }
                std::hint::black_box(sums);
            });
        });
        let rate = |peak: fn(usize) -> f64| {
            let rounds = 1 << 20;
            let seconds = best(5, || {
                pool.run(pool.threads(), &|_| {
                    peak(rounds);
                });
            });
            pool.threads() as f64 * peak(1) * rounds as f64 / seconds / 1e9
        };
        Limits {
            read: (8 * part * pool.threads()) as f64 / read / 1e9,
            bytes: rate(byte_products),
            floats: rate(float_products),
            brains: rate(brain_products),
        }
    }
}

/// What a busy neighbour does to a pass: thirty turns of some two milliseconds on all threads,
/// which wait for each other after each as between layers, for ten seconds. The 95th percentile
/// and the largest of their times, by the median.
fn steadiness(pool: &Pool) -> [f64; 2] {
    let (began, mut times) = (Instant::now(), Vec::new());
    while began.elapsed().as_secs() < 10 {
        let pass = Instant::now();
        for _ in 0..30 {
            pool.run(pool.threads(), &|_| {
                std::hint::black_box(float_products(1 << 20));
            });
        }
        times.push(pass.elapsed().as_secs_f64());
    }
    times.sort_unstable_by(f64::total_cmp);
    let of = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    [0.95, 1.0].map(|part| of(part) / of(0.5))
}

/// Operations of one round, after `rounds` rounds of independent products: 0 where the processor
/// has no instruction for them.
fn byte_products(rounds: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f,avx512vnni")]
        fn run(rounds: usize) -> f64 {
            let mut sums = [_mm512_setzero_si512(); 16];
            let x = std::hint::black_box(_mm512_set1_epi8(1));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbusd_epi32(*sum, x, x);
                }
            }
            std::hint::black_box(sums);
            (16 * 64 * 2) as f64
        }
        #[target_feature(enable = "avxvnni")]
        fn run_avx_vnni(rounds: usize) -> f64 {
            let mut sums = [_mm256_setzero_si256(); 12];
            let x = std::hint::black_box(_mm256_set1_epi8(1));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm256_dpbusd_avx_epi32(*sum, x, x);
                }
            }
            std::hint::black_box(sums);
            (12 * 32 * 2) as f64
        }
        #[target_feature(enable = "avx2")]
        fn run_avx2(rounds: usize) -> f64 {
            let mut sums = [_mm256_setzero_si256(); 12];
            let x = std::hint::black_box(_mm256_set1_epi8(1));
            let ones = std::hint::black_box(_mm256_set1_epi16(1));
            for _ in 0..rounds {
                for sum in &mut sums {
                    let pairs = _mm256_maddubs_epi16(x, *sum);
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
            std::hint::black_box(sums);
            (12 * 32 * 2) as f64
        }
        if Isa::available().contains(&Isa::Avx512) {
            // SAFETY: the processor has AVX-512 with VNNI.
            return unsafe { run(rounds) };
        }
        if Isa::available().contains(&Isa::AvxVnni) {
            // SAFETY: the processor has AVX-VNNI.
            return unsafe { run_avx_vnni(rounds) };
        }
        if Isa::available().contains(&Isa::Avx2) {
            // SAFETY: the processor has AVX2.
            return unsafe { run_avx2(rounds) };
        }
    }
    std::hint::black_box(rounds);
    0.0
}

/// As [`byte_products`], of f32.
fn float_products(rounds: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f")]
        fn run(rounds: usize) -> f64 {
            let mut sums = [_mm512_setzero_ps(); 16];
            let x = std::hint::black_box(_mm512_set1_ps(0.5));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(x, x, *sum);
                }
            }
            std::hint::black_box(sums);
            (16 * 16 * 2) as f64
        }
        #[target_feature(enable = "avx2,fma")]
        fn run_avx2(rounds: usize) -> f64 {
            let mut sums = [_mm256_setzero_ps(); 12];
            let x = std::hint::black_box(_mm256_set1_ps(0.5));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(x, x, *sum);
                }
            }
            std::hint::black_box(sums);
            (12 * 8 * 2) as f64
        }
        if Isa::available().contains(&Isa::Avx512) {
            // SAFETY: the processor has AVX-512.
            return unsafe { run(rounds) };
        }
        if Isa::available().contains(&Isa::Avx2) {
            // SAFETY: the processor has AVX2 and FMA.
            return unsafe { run_avx2(rounds) };
        }
    }
    std::hint::black_box(rounds);
    0.0
}

/// As [`byte_products`], of bf16.
fn brain_products(rounds: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if Isa::available().contains(&Isa::Avx512Bf16) {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn run(rounds: usize) -> f64 {
            let mut sums = [_mm512_setzero_ps(); 16];
            // SAFETY: 32 bf16 are any 64 bytes.
            let x = unsafe { std::mem::transmute::<[u8; 64], __m512bh>([0x3f; 64]) };
            let x = std::hint::black_box(x);
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, x, x);
                }
            }
            std::hint::black_box(sums);
            (16 * 32 * 2) as f64
        }
        // SAFETY: the processor has AVX512_BF16.
        return unsafe { run(rounds) };
    }
    float_products(rounds)
}

/// The printed table.
struct Table {
    limits: Limits,
    /// Rows whose name (of attention: and shape) contains one of these; all when empty.
    wanted: Vec<String>,
}

impl Table {
    fn wants(&self, op: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|part| op.contains(part.as_str()))
    }

    /// One row: `call(i)` reads `bytes` and does `operations`, against `limit` of these.
    fn row(
        &self,
        op: &str,
        shape: &str,
        bytes: usize,
        operations: f64,
        limit: f64,
        call: impl FnMut(usize),
    ) {
        let seconds = median(call);
        let (read, done) = (bytes as f64 / seconds / 1e9, operations / seconds / 1e9);
        println!(
            "| {op} | {shape} | {:.1} | {read:.1} | {:.0} | {done:.0} | {:.0} |",
            seconds * 1e6,
            100.0 * read / self.limits.read,
            100.0 * done / limit
        );
    }
}

/// Seconds of the fastest of some calls.
fn best(calls: usize, mut call: impl FnMut()) -> f64 {
    let once = || {
        let started = Instant::now();
        call();
        started.elapsed().as_secs_f64()
    };
    std::iter::repeat_with(once).take(calls).fold(f64::INFINITY, f64::min)
}

/// Seconds of `call`, which is told how often it has been called: the median of rounds that
/// together take about half a second.
fn median(mut call: impl FnMut(usize)) -> f64 {
    call(0);
    let started = Instant::now();
    call(1);
    let calls = (0.01 / started.elapsed().as_secs_f64()).ceil().clamp(1.0, 200.0) as usize;
    let mut next = 2;
    let mut times = Vec::new();
    for _ in 0..25 {
        let started = Instant::now();
        (next..next + calls).for_each(&mut call);
        times.push(started.elapsed().as_secs_f64() / calls as f64);
        next += calls;
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn matmuls(pool: &Pool, table: &Table) {
    let shapes = [
        (DType::Q4K, 3072, 1024),
        (DType::Q6K, 1024, 3072),
        (DType::Q6K, 16384, 1024),
        (DType::Q8_0, 3072, 1024),
        (DType::Q4_0, 8192, 2048),
        (DType::F16, 3072, 1024),
        (DType::BF16, 3072, 1024),
        (DType::F32, 3072, 1024),
    ];
    for (dtype, n, k) in shapes {
        let op = format!("matmul {dtype}");
        if !table.wants(&op) {
            continue;
        }
        let values: Vec<f32> = randoms(n * k, 1).iter().map(|x| x * 0.05).collect();
        let bytes = quantize(dtype, &values).expect("a format that we write");
        let copies = COLD_BYTES.div_ceil(bytes.len());
        let weights: Vec<Packed> =
            (0..copies).map(|_| Packed::pack(pool, dtype, n, k, &bytes)).collect();
        for m in [1, 8, 512] {
            let x = randoms(m * k, 3);
            let kind = weights[0].activation_kind();
            let acts = Activations::new(pool, &x, m, k, kind);
            let mut y = vec![0.0; m * n];
            let limit = match dtype {
                DType::F32 | DType::F16 => table.limits.floats,
                DType::BF16 => table.limits.brains,
                _ => table.limits.bytes,
            };
            let shape = format!("{n} x {k}, m = {m}");
            table.row(&op, &shape, bytes.len(), 2.0 * (m * n * k) as f64, limit, |i| {
                matmul_prepared(pool, &acts, &weights[i % copies], &mut y);
            });
        }
    }
}

/// Rows of one sequence against its keys: query heads, KV heads, head size, rows, keys.
const ATTENTIONS: &[(usize, usize, usize, usize, usize)] = &[
    (16, 8, 128, 1, 256),
    (16, 8, 128, 1, 2048),
    (16, 8, 128, 1, 8192),
    (32, 8, 64, 1, 2048),
    (16, 8, 128, 512, 512),
    (16, 8, 128, 512, 2048),
    (16, 8, 128, 100, 1600),
    (16, 8, 128, 100, 100),
    (32, 8, 64, 100, 1600),
    (32, 8, 64, 512, 512),
];

fn attentions(pool: &Pool, table: &Table) {
    for (&(n_heads, n_kv_heads, head_dim, rows, keys), kv_type) in
        ATTENTIONS.iter().flat_map(|a| KvType::ALL[1..].iter().map(move |t| (a, *t)))
    {
        let op = format!("attention {}", kv_type.name());
        let what = format!("{n_heads}/{n_kv_heads} heads of {head_dim}, {rows} rows, {keys} keys");
        if !table.wants(&format!("{op} {what}")) {
            continue;
        }
        let shape = KvShape {
            n_blocks: keys.div_ceil(BLOCK_LEN),
            block_len: BLOCK_LEN,
            n_kv_heads,
            head_dim,
        };
        let slots: Vec<u32> = (0..keys as u32).collect();
        let numbers = randoms(keys * n_kv_heads * head_dim, 5);
        let copies = if rows == 1 { COLD_BYTES.div_ceil(shape.bytes(kv_type)) } else { 1 };
        let slabs: Vec<KvSlab> = (0..copies)
            .map(|_| {
                let mut slab = KvSlab::new(shape, kv_type);
                slab.write(pool, &numbers, &numbers, &slots);
                slab
            })
            .collect();
        let blocks: Vec<u32> = (0..shape.n_blocks as u32).collect();
        let batch = AttentionBatch {
            cu_q: &[0, rows as u32],
            context_len: &[keys as u32],
            block_tables: &[&blocks],
        };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let params = AttentionParams { n_heads, scale, softcap: None, window: None, sinks: None };
        let q = randoms(rows * n_heads * head_dim, 6);
        let mut out = vec![0.0; q.len()];
        let seen = rows * keys - rows * (rows - 1) / 2;
        let operations = 4.0 * (seen * n_heads * head_dim) as f64;
        let bytes = shape.bytes(kv_type);
        table.row(&op, &what, bytes, operations, table.limits.floats, |i| {
            attention(pool, Isa::best(), &q, &slabs[i % copies], &batch, &params, &mut out);
        });
    }
}

/// A class: thirty answers, a row each, behind keys of which none or most are the same blocks.
fn classes(pool: &Pool, table: &Table) {
    const SEQS: usize = 30;
    const N_HEADS: usize = 16;
    const N_KV_HEADS: usize = 8;
    const HEAD_DIM: usize = 128;
    let lens = [(1600, 0), (1600, 1536), (8448, 8192)];
    for (kv_type, (len, shared)) in
        [KvType::F16, KvType::Q16_0, KvType::Q8_0].iter().flat_map(|t| lens.map(|lens| (*t, lens)))
    {
        let op = format!("attention {}", kv_type.name());
        let what = format!("{SEQS} sequences of {len} keys, {shared} shared");
        if !table.wants(&format!("{op} {what}")) {
            continue;
        }
        let blocks_each = len / BLOCK_LEN;
        let n_blocks = SEQS * blocks_each;
        let shape =
            KvShape { n_blocks, block_len: BLOCK_LEN, n_kv_heads: N_KV_HEADS, head_dim: HEAD_DIM };
        let mut slab = KvSlab::new(shape, kv_type);
        let numbers = randoms(len * N_KV_HEADS * HEAD_DIM, 5);
        for seq in 0..SEQS {
            let slots: Vec<u32> = (seq * len..(seq + 1) * len).map(|slot| slot as u32).collect();
            slab.write(pool, &numbers, &numbers, &slots);
        }
        let table_of = |seq: usize| -> Vec<u32> {
            let own = |i: usize| if i < shared / BLOCK_LEN { i } else { seq * blocks_each + i };
            (0..blocks_each).map(|i| own(i) as u32).collect()
        };
        let tables: Vec<Vec<u32>> = (0..SEQS).map(table_of).collect();
        let tables: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        let cu_q: Vec<u32> = (0..=SEQS as u32).collect();
        let batch =
            AttentionBatch { cu_q: &cu_q, context_len: &[len as u32; SEQS], block_tables: &tables };
        let params = AttentionParams {
            n_heads: N_HEADS,
            scale: 0.1,
            softcap: None,
            window: None,
            sinks: None,
        };
        let q = randoms(SEQS * N_HEADS * HEAD_DIM, 6);
        let mut out = vec![0.0; q.len()];
        let operations = 4.0 * (SEQS * len * N_HEADS * HEAD_DIM) as f64;
        let bytes = shape.bytes(kv_type) / (SEQS * len) * (SEQS * (len - shared) + shared);
        table.row(&op, &what, bytes, operations, table.limits.floats, |_| {
            attention(pool, Isa::best(), &q, &slab, &batch, &params, &mut out);
        });
    }
}

/// What is not a product: it should not take time.
fn small(pool: &Pool, table: &Table) {
    for rows in [1, 512] {
        let (dim, ffn) = (1024, 3072);
        let (x, weight) = (randoms(rows * dim, 1), randoms(dim, 2));
        let (gate, ones) = (randoms(rows * ffn, 3), vec![1.0; rows * ffn]);
        let (mut out, mut wide) = (vec![0.0; rows * dim], vec![40.0; rows * ffn]);
        let floats = table.limits.floats;
        if table.wants("rms norm") {
            table.row("rms norm", &format!("{rows} x {dim}"), 4 * x.len(), 0.0, floats, |_| {
                norm::rms_norm(pool, &x, &weight, 1e-6, rows, dim, &mut out);
            });
        }
        if table.wants("silu") {
            table.row("silu", &format!("{rows} x {ffn}"), 8 * gate.len(), 0.0, floats, |_| {
                // In place: of 40 and 1 it makes 40 again.
                activation::gate_mul(pool, Gate::Silu, &mut wide, &ones);
            });
        }
        for (kind, name) in [
            (ActivationKind::Block32, "quantise by 32"),
            (ActivationKind::Block256, "quantise by 256"),
        ] {
            if !table.wants(name) {
                continue;
            }
            let mut memory = Some(ActivationBuffers::default());
            table.row(name, &format!("{rows} x {ffn}"), 4 * gate.len(), 0.0, floats, |_| {
                let used = memory.take().unwrap_or_default();
                let acts = Activations::new_in(used, pool, &gate, rows, ffn, kind);
                memory = Some(std::hint::black_box(acts).into_buffers());
            });
        }
        for kv_type in [KvType::F16, KvType::Q16_0, KvType::Q8_0] {
            let op = format!("kv write {}", kv_type.name());
            if !table.wants(&op) {
                continue;
            }
            let n_blocks = rows.div_ceil(BLOCK_LEN);
            let shape = KvShape { n_blocks, block_len: BLOCK_LEN, n_kv_heads: 8, head_dim: 128 };
            let mut slab = KvSlab::new(shape, kv_type);
            let slots: Vec<u32> = (0..rows as u32).collect();
            table.row(&op, &format!("{rows} x 8 x 128"), 8 * x.len(), 0.0, floats, |_| {
                slab.write(pool, &x, &x, &slots);
            });
        }
    }
}
