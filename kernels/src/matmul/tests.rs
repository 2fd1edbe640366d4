//! Every format, shape and instruction set against sums in f64; equality of bits where promised.

use std::borrow::Cow;
use std::sync::Mutex;

use half::bf16;

use super::*;
use crate::cases::{assert_same_bits, randoms};
use crate::quant::{DType, dequantize, quantize};

const ROWS: &[usize] = &[0, 1, 2, 3, 5, 8, 13, 16, 17, 32, 33, 65];
const COLUMN_COUNTS: &[usize] = &[0, 1, 15, 16, 17, 48, 100];
const WIDTHS: &[usize] = &[0, 1, 7, 32, 64, 160, 172, 257, 256, 512, 576, 768, 896, 960];

/// `n * k` weights: quantised where there is a quantiser, else random codes with sane scales.
fn weights(dtype: DType, n: usize, k: usize) -> Vec<u8> {
    let values = randoms(n * k, (n * 31 + k) as u64);
    if let Some(bytes) = quantize(dtype, &values) {
        return bytes;
    }
    let len = dtype.row_bytes(n * k).expect("whole blocks");
    let noise = randoms(len, (n + k) as u64);
    let mut bytes: Vec<u8> = noise.iter().map(|x| (x * 128.0) as i8 as u8).collect();
    for (block, noise) in bytes.chunks_exact_mut(dtype.block_bytes()).zip(noise) {
        set_scales(dtype, block, noise * 0.1);
    }
    bytes
}

/// Puts a sane number where a block has its scale (and minimum).
fn set_scales(dtype: DType, block: &mut [u8], d: f32) {
    let halves: &[usize] = match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4NL | DType::IQ4XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        DType::Q2K => &[80, 82],
        DType::Q3K => &[108],
        DType::Q6K => &[208],
        _ => &[],
    };
    for &at in halves {
        block[at..at + 2].copy_from_slice(&half::f16::from_f32(d).to_le_bytes());
    }
    match dtype {
        DType::Q8K => block[..4].copy_from_slice(&(d * 0.1).to_le_bytes()),
        DType::MXFP4 => block[0] = 120 + block[0] % 8,
        _ => {}
    }
}

/// x as the kernels see it: rounded to 8 bits block by block.
fn seen(acts: &Activations, x: &[f32]) -> Vec<f32> {
    let block = match acts.kind() {
        ActivationKind::Float => return x.to_vec(),
        ActivationKind::Brain => return x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
        ActivationKind::Block32 => 32,
        ActivationKind::Block256 => 256,
    };
    let (m, k) = (acts.m(), acts.k());
    let mut seen = vec![0.0; m * k];
    for (i, y) in seen.iter_mut().enumerate() {
        let (row, at) = (i / k, i % k);
        let place = at / block * m + row;
        *y = f32::from(acts.codes[place * block + at % block]) * acts.scales[place];
    }
    seen
}

/// The product in f64, and the sum of the magnitudes of its terms.
fn truth(x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Vec<(f64, f64)> {
    let term = |row: usize, column: usize, i: usize| {
        f64::from(x[row * k + i]) * f64::from(w[column * k + i])
    };
    let sum = |at: usize| {
        (0..k).map(|i| term(at / n, at % n, i)).fold((0.0, 0.0), |s, t| (s.0 + t, s.1 + t.abs()))
    };
    (0..m * n).map(sum).collect()
}

#[test]
fn every_format_and_shape_is_right_in_every_instruction_set() {
    let pool = Pool::new(2);
    for dtype in DType::all() {
        for &k in WIDTHS {
            if dtype.row_bytes(k).is_none() {
                continue;
            }
            for &n in COLUMN_COUNTS {
                // The largest product first; every smaller m must repeat its rows bit by bit.
                let m_max = ROWS[ROWS.len() - 1];
                let bytes = weights(dtype, n, k);
                let w = Packed::pack(&pool, dtype, n, k, &bytes);
                let mut values = vec![0.0; n * k];
                dequantize(dtype, &bytes, &mut values);
                let x: Vec<f32> = randoms(m_max * k, 99).iter().map(|x| x * 3.0).collect();
                let mut whole = vec![f32::NAN; m_max * n];
                matmul_isa(Isa::Scalar, &pool, &x, m_max, &w, &mut whole);
                let acts = Activations::new(&pool, &x, m_max, k, w.activation_kind());
                let truth = truth(&seen(&acts, &x), &values, m_max, n, k);
                for (i, (y, (sum, size))) in whole.iter().zip(truth).enumerate() {
                    let error = (f64::from(*y) - sum).abs();
                    let what = format!("{dtype} n {n} k {k} element {i}: {y} for {sum}");
                    assert!(error <= 2e-6 * size + 1e-6, "{what} (terms {size})");
                }
                for &isa in Isa::available() {
                    for &m in ROWS {
                        let mut y = vec![f32::NAN; m * n];
                        matmul_isa(isa, &pool, &x[..m * k], m, &w, &mut y);
                        let what = format!("{dtype} {} m {m} n {n} k {k}", isa.name());
                        assert_same_bits(&y, &whole[..m * n], &what);
                    }
                }
            }
        }
    }
}

#[test]
fn rows_of_packed_weights_are_the_dequantised_rows() {
    let pool = Pool::new(2);
    for dtype in DType::all() {
        for &k in WIDTHS.iter().filter(|&&k| dtype.row_bytes(k).is_some()) {
            for &n in COLUMN_COUNTS {
                let bytes = weights(dtype, n, k);
                let w = Packed::pack(&pool, dtype, n, k, &bytes);
                let mut want = vec![0.0; n * k];
                dequantize(dtype, &bytes, &mut want);
                let mut row = vec![0.0; k];
                for r in 0..n {
                    w.row(r, &mut row);
                    assert_same_bits(&row, &want[r * k..(r + 1) * k], &format!("{dtype} row {r}"));
                }
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_threads_neighbours_or_sharing() {
    let (n, k, m) = (600, 512, 130);
    let x = randoms(m * k, 5);
    for dtype in DType::all() {
        let bytes = weights(dtype, n, k);
        let one = Pool::new(1);
        let w = Packed::pack(&one, dtype, n, k, &bytes);
        let mut whole = vec![0.0; m * n];
        matmul(&one, &x, m, &w, &mut whole);
        for threads in [2, 3, 5] {
            let pool = Pool::new(threads);
            let acts = Activations::new(&pool, &x, m, k, w.activation_kind());
            let mut y = vec![0.0; m * n];
            matmul_prepared(&pool, &acts, &w, &mut y);
            assert_same_bits(&y, &whole, &format!("{dtype}, {threads} threads"));
        }
        let mut y = vec![0.0; n];
        for row in [0, 63, 64, 129] {
            matmul(&one, &x[row * k..(row + 1) * k], 1, &w, &mut y);
            assert_same_bits(&y, &whole[row * n..(row + 1) * n], &format!("{dtype} row {row}"));
        }
    }
}

#[test]
fn products_together_are_products_alone() {
    let k = 256;
    let shapes = [
        (DType::Q4K, 600),
        (DType::Q6K, 33),
        (DType::BF16, 5),
        (DType::F32, 20),
        (DType::Q8_0, 64),
    ];
    let one = Pool::new(1);
    let ws = shapes.map(|(dtype, n)| Packed::pack(&one, dtype, n, k, &weights(dtype, n, k)));
    let mut buffers = Vec::new();
    // More rows, then fewer, in the same memory; and that of one kind for another.
    for (m, threads) in [(0, 1), (130, 3), (3, 1), (1, 2), (70, 2)] {
        let (pool, x) = (Pool::new(threads), randoms(m * k, m as u64));
        let mut ys = ws.each_ref().map(|w| vec![f32::NAN; m * w.n()]);
        let mut lent = ys.iter_mut();
        let acts = ws.each_ref().map(|w| {
            let memory = buffers.pop().unwrap_or_default();
            Activations::new_in(memory, &pool, &x, m, k, w.activation_kind())
        });
        let mut inputs = acts.iter();
        products(
            &pool,
            ws.each_ref().map(|w| Product {
                acts: inputs.next().unwrap(),
                w,
                y: lent.next().unwrap(),
            }),
        );
        for (w, y) in ws.iter().zip(&ys) {
            let mut alone = vec![0.0; m * w.n()];
            matmul(&one, &x, m, w, &mut alone);
            assert_same_bits(y, &alone, &format!("{} of {m} rows", w.dtype()));
        }
        buffers.extend(acts.map(Activations::into_buffers));
    }
}

/// Matrices that share memory are the same matrices, and each run of rows meets its own.
#[test]
fn grouped_products_are_products_alone() {
    struct Whole<'a>(&'a [u8], usize);
    impl Rows for Whole<'_> {
        fn row(&self, row: usize) -> std::borrow::Cow<'_, [u8]> {
            std::borrow::Cow::Borrowed(&self.0[row * self.1..][..self.1])
        }
    }
    let (k, count) = (256, 5);
    let coded = [(DType::Q4K, 50), (DType::Q8_0, 16), (DType::MXFP4, 33)];
    for (dtype, n) in coded.into_iter().chain([(DType::F32, 7), (DType::BF16, 9)]) {
        let all = weights(dtype, n * count, k);
        let each = all.len() / count;
        let sources: Vec<_> = all.chunks_exact(each).map(|part| Whole(part, each / n)).collect();
        let stacked =
            Packed::stack(&Pool::new(2), dtype, n, k, &sources.iter().collect::<Vec<_>>());
        let (m, groups) = (90, [(0, 2..3), (2, 3..70), (3, 70..70), (4, 80..90)]);
        let x = randoms(m * k, 3);
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let acts = Activations::new(&pool, &x, m, k, stacked[0].activation_kind());
            let parts: Vec<_> =
                groups.iter().map(|(e, rows)| (rows.clone(), &stacked[*e])).collect();
            let mut y = vec![f32::NAN; m * n];
            grouped(&pool, [Grouped { acts: &acts, groups: &parts, y: &mut y }]);
            for isa in Isa::available() {
                let memory = ActivationBuffers::default();
                let kind = stacked[0].activation_kind();
                let acts = Activations::with_isa(*isa, memory, &pool, &x, m, k, kind);
                let mut own = vec![f32::NAN; m * n];
                let product = Grouped { acts: &acts, groups: &parts, y: &mut own };
                grouped_isa(*isa, &pool, [product]);
                assert_same_bits(&own, &y, &format!("{dtype}, {}", isa.name()));
            }
            for (row, y) in y.chunks_exact(n).enumerate() {
                let Some((e, _)) = groups.iter().find(|(_, rows)| rows.contains(&row)) else {
                    assert!(y.iter().all(|y| y.is_nan()), "a row of no run is not written");
                    continue;
                };
                let w = Packed::pack(&pool, dtype, n, k, &all[e * each..(e + 1) * each]);
                assert_eq!(w.bytes(), stacked[*e].bytes());
                let mut want = vec![0.0; n];
                matmul(&pool, &x[row * k..][..k], 1, &w, &mut want);
                assert_same_bits(y, &want, &format!("{dtype}, row {row}, {threads} threads"));
            }
        }
    }
}

#[test]
fn activations_are_quantised_as_documented() {
    for isa in Isa::available() {
        [67, 150].into_iter().for_each(|m| check_quantised(*isa, m));
    }
}

fn check_quantised(isa: Isa, m: usize) {
    let (pool, k) = (Pool::new(2), 512);
    let mut x = randoms(m * k, 11);
    x[..32].fill(0.0);
    x[32..64].fill(1e-31);
    // Ties, for blocks of either size: a peak of 127 makes every half a tie.
    for (i, x) in x[k..2 * k].iter_mut().enumerate() {
        *x = if i % 32 == 0 { 127.0 } else { (i % 13) as f32 - 6.5 };
    }
    x[3 * k + 7] = f32::NAN;
    for (kind, block) in [(ActivationKind::Block32, 32), (ActivationKind::Block256, 256)] {
        let memory = ActivationBuffers::default();
        let acts = Activations::with_isa(isa, memory, &pool, &x, m, k, kind);
        for (i, x) in x.chunks_exact(block).enumerate() {
            let (row, at) = (i / (k / block), i % (k / block));
            let place = at * m + row;
            let codes = &acts.codes[place * block..(place + 1) * block];
            let peak = x.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
            let poisoned = x.iter().any(|x| x.is_nan());
            let scale = match peak {
                _ if poisoned => f32::NAN,
                peak if peak < 1e-30 => 0.0,
                peak => peak / 127.0,
            };
            assert!(acts.scales[place].to_bits() == scale.to_bits(), "{kind:?} block {i}");
            for (code, x) in codes.iter().zip(x) {
                let zero = poisoned || peak < 1e-30;
                let want = if zero { 0.0 } else { (x * (127.0 / peak)).round_ties_even() };
                assert_eq!(f32::from(*code), want, "{kind:?} block {i}, {x}");
            }
            let sum = |codes: &[i8]| codes.iter().map(|&q| i32::from(q)).sum::<i32>();
            if block == 32 {
                assert_eq!(acts.sums[place], sum(codes));
            } else {
                let sums = &acts.sub_sums[place * 24..place * 24 + 24];
                let wanted = codes.chunks(16).chain(codes.chunks(32)).map(sum);
                assert!(sums.iter().map(|&s| i32::from(s)).eq(wanted), "sums of block {i}");
            }
        }
    }
}

/// Sums of 16 bits are the narrow place of AVX2: the largest codes of both sides and both signs,
/// for few rows and for many.
#[test]
fn extreme_codes_do_not_saturate() {
    let pool = Pool::new(1);
    let (most, n, k) = (20, 16, 256);
    let x: Vec<f32> = (0..most * k).map(|i| if i / k % 2 == 0 { 1.0 } else { -1.0 }).collect();
    for dtype in DType::all().filter(|dtype| dtype.block_len() > 1) {
        for fill in [0xff, 0x00, 0x80, 0x7f, 0x81] {
            let mut bytes = vec![fill; dtype.row_bytes(n * k).expect("whole blocks")];
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                set_scales(dtype, block, 0.5);
            }
            let w = Packed::pack(&pool, dtype, n, k, &bytes);
            let mut values = vec![0.0; n * k];
            dequantize(dtype, &bytes, &mut values);
            let want = truth(&x, &values, most, n, k);
            for (isa, m) in Isa::available().iter().flat_map(|&isa| [(isa, 2), (isa, most)]) {
                let mut y = vec![f32::NAN; m * n];
                matmul_isa(isa, &pool, &x[..m * k], m, &w, &mut y);
                for (y, (want, size)) in y.iter().zip(&want) {
                    let what = format!("{dtype} {} of {fill:#x}: {y} for {want}", isa.name());
                    assert!((f64::from(*y) - want).abs() <= 1e-5 * size, "{what}");
                }
            }
        }
    }
}

/// Rows in another order than they lie in.
struct Shuffled<'a> {
    bytes: &'a [u8],
    n: usize,
    told: Mutex<Vec<Vec<usize>>>,
}

impl Rows for Shuffled<'_> {
    fn row(&self, row: usize) -> Cow<'_, [u8]> {
        let row_bytes = self.bytes.len() / self.n;
        Cow::Borrowed(&self.bytes[(row * 7 + 3) % self.n * row_bytes..][..row_bytes])
    }

    fn packed(&self, rows: Range<usize>) {
        self.told.lock().expect("no panic").push(rows.collect());
    }
}

#[test]
fn pack_with_takes_rows_from_anywhere() {
    let pool = Pool::new(2);
    let (n, k) = (40, 256);
    let bytes = weights(DType::Q4K, n, k);
    let source = Shuffled { bytes: &bytes, n, told: Mutex::default() };
    let w = Packed::pack_with(&pool, DType::Q4K, n, k, &source);
    let mut told = source.told.lock().expect("no panic").concat();
    told.sort_unstable();
    assert!(told.into_iter().eq(0..n), "every row is told to be packed, once");
    let (mut got, mut want) = (vec![0.0; k], vec![0.0; k]);
    for r in 0..n {
        w.row(r, &mut got);
        dequantize(DType::Q4K, &source.row(r), &mut want);
        assert_same_bits(&got, &want, "row");
    }
}

#[test]
fn what_is_not_finite_reaches_its_own_row_and_no_other() {
    let pool = Pool::new(1);
    let (n, k, m) = (17, 256, 3);
    for dtype in DType::all() {
        let w = Packed::pack(&pool, dtype, n, k, &weights(dtype, n, k));
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = randoms(m * k, 1);
            x[k + 40] = poison;
            for &isa in Isa::available() {
                let mut y = vec![0.0; m * n];
                matmul_isa(isa, &pool, &x, m, &w, &mut y);
                assert!(y[n..2 * n].iter().all(|y| !y.is_finite()), "{dtype} {poison}");
                assert!(y[..n].iter().chain(&y[2 * n..]).all(|y| y.is_finite()), "{dtype}");
            }
        }
    }
}

/// Rows of an odd width end in a zero, whatever was there before.
#[test]
fn memory_of_wider_rows_is_as_good_as_new() {
    let pool = Pool::new(1);
    for &isa in Isa::available() {
        let mut memory = ActivationBuffers::default();
        for (m, n, k) in [(9, 17, 64), (9, 17, 33), (2, 5, 7), (5, 20, 9)] {
            let (w, x) = (weights(DType::BF16, n, k), randoms(m * k, 8));
            let w = Packed::pack(&pool, DType::BF16, n, k, &w);
            let acts = Activations::with_isa(isa, memory, &pool, &x, m, k, w.activation_kind());
            let [mut y, mut fresh] = [vec![f32::NAN; m * n], vec![f32::NAN; m * n]];
            products_isa(isa, &pool, [Product { acts: &acts, w: &w, y: &mut y }]);
            matmul_isa(isa, &pool, &x, m, &w, &mut fresh);
            assert_same_bits(&y, &fresh, &format!("{} {m} x {k}", isa.name()));
            memory = acts.into_buffers();
        }
    }
}

/// What the contract says of bf16: below 2^-126 is zero for x everywhere, for weights and sums with
/// the instruction.
#[test]
fn products_of_bf16_that_are_too_small_are_exact_or_nothing() {
    let pool = Pool::new(1);
    let (tiny, small) = (2_f32.powi(-130), 2_f32.powi(-100));
    for (w, x, exact) in [
        (small, 2_f32.powi(-30), tiny),           // a sum
        (tiny, 2_f32.powi(100), 2_f32.powi(-30)), // a weight
        (2_f32.powi(100), tiny, 0.0),             // x
        (small, 2_f32.powi(-26), 2_f32.powi(-126)),
    ] {
        let bytes: Vec<u8> = [bf16::from_f32(w), bf16::ZERO].map(bf16::to_le_bytes).concat();
        let packed = Packed::pack(&pool, DType::BF16, 1, 2, &bytes);
        for &isa in Isa::available() {
            let mut y = [f32::NAN];
            matmul_isa(isa, &pool, &[x, 0.0], 1, &packed, &mut y);
            let flushed = isa == Isa::Avx512Bf16 && (w == tiny || exact == tiny);
            assert_eq!(y[0], if flushed { 0.0 } else { exact }, "{} {w:e} {x:e}", isa.name());
        }
    }
}

#[test]
fn packed_weights_take_about_the_bytes_of_the_file() {
    let pool = Pool::new(1);
    for dtype in DType::all() {
        let bytes = weights(dtype, 32, 1024);
        let packed = Packed::pack(&pool, dtype, 32, 1024, &bytes).bytes();
        assert!(packed * 100 <= bytes.len() * 107, "{dtype}: {packed} for {}", bytes.len());
    }
}
