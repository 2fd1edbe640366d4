//! The formats against values computed by other people's code, and the quantisers against the
//! decoder.

use std::path::PathBuf;

use super::*;
use crate::cases::{assert_same_bits, randoms};

#[test]
fn the_table_has_the_order_of_the_declaration() {
    for (i, line) in TABLE.iter().enumerate() {
        assert_eq!(line.0 as usize, i, "{}", line.2);
        assert_eq!(DType::from_ggml(line.0.ggml_id()), Some(line.0));
    }
    assert_eq!(DType::from_ggml(16), None);
    assert_eq!(DType::IQ4NL.row_bytes(576), Some(324));
    assert_eq!(DType::Q4K.row_bytes(512), Some(288));
    assert_eq!(DType::Q4K.row_bytes(576), None);
    assert_eq!(DType::Q8_0.row_bytes(576), Some(612));
    assert_eq!(DType::F32.row_bytes(usize::MAX), None);
}

/// A quantised value is at most half a step (and the rounding of the scales) off.
#[test]
fn quantisers_stay_within_half_a_step() {
    let x: Vec<f32> = randoms(1024, 7).iter().map(|x| x * x * x * 3.0).collect();
    let mut back = vec![0.0; x.len()];
    // 3 is the largest magnitude, 6 the range.
    let tolerances = [
        (DType::F32, 0.0),
        (DType::F16, 0.002),
        (DType::BF16, 0.016),
        (DType::Q8_0, 0.0121),
        (DType::Q4_0, 0.38), // the code 16 does not exist: a full step at one end
        (DType::Q4_1, 0.21),
        (DType::Q5_0, 0.19),
        (DType::Q5_1, 0.105),
        (DType::IQ4NL, 0.36),
        (DType::Q2K, 1.2), // the search gives up some of the peak for the rest
        (DType::Q3K, 0.76),
        (DType::Q4K, 0.26),
        (DType::Q5K, 0.13),
        (DType::Q6K, 0.1),
    ];
    for (dtype, tolerance) in tolerances {
        let bytes = quantize(dtype, &x).expect("a quantiser");
        assert_eq!(Some(bytes.len()), dtype.row_bytes(x.len()));
        dequantize(dtype, &bytes, &mut back);
        let worst = crate::cases::max_abs_diff(&x, &back);
        assert!(worst <= tolerance, "{dtype}: {worst}");
        let zeros = quantize(dtype, &[0.0; 256]).expect("a quantiser");
        let mut back = [1.0; 256];
        dequantize(dtype, &zeros, &mut back);
        assert!(back.iter().all(|&x| x == 0.0), "{dtype}: zeros");
    }
    let without = DType::all().filter(|&dtype| quantize(dtype, &[0.0; 256]).is_none());
    assert!(without.eq([DType::Q8K, DType::IQ4XS, DType::MXFP4]));
}

/// What is exactly representable comes back: every code, in every place.
#[test]
fn quantisers_find_what_a_block_can_hold() {
    let goldens = goldens();
    for (dtype, tolerance) in [
        (DType::Q4_0, 0.1),
        (DType::Q4_1, 0.04),
        (DType::Q5_0, 0.05),
        (DType::Q5_1, 0.03),
        (DType::Q8_0, 0.01),
        (DType::IQ4NL, 1e-3),
        (DType::Q2K, 0.16),
        (DType::Q3K, 0.08),
        (DType::Q4K, 0.03),
        (DType::Q5K, 0.02),
        (DType::Q6K, 0.02),
    ] {
        let x = golden_values(&goldens, dtype);
        let mut back = vec![0.0; x.len()];
        dequantize(dtype, &quantize(dtype, &x).expect("a quantiser"), &mut back);
        let error = relative_error(&x, &back);
        assert!(error <= tolerance, "{dtype}: {error}");
    }
}

/// The plain formats are written byte for byte as the `gguf` package writes them.
#[test]
fn plain_quantisers_agree_with_gguf() {
    let goldens = goldens();
    let x = floats(safetensors_bytes(&goldens, "normal.values"));
    for dtype in [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0] {
        let want = safetensors_bytes(&goldens, &format!("normal.{dtype}"));
        assert!(quantize(dtype, &x).as_deref() == Some(want), "{dtype}");
    }
}

/// The search against trying hundreds of scales (and of minima) on every sub-block, each of
/// which may have any scale it likes; the rest is what rounding the sub-scales costs.
#[test]
fn searched_scales_are_near_the_best_there_are() {
    let x: Vec<f32> = randoms(2048, 3).iter().map(|x| x * x * x + 0.1 * x).collect();
    for (dtype, sub, grid, slack) in [
        (DType::IQ4NL, 32, Grid::Book, 1.03),
        (DType::Q3K, 16, Grid::Signed(4.0), 1.05),
        (DType::Q6K, 16, Grid::Signed(32.0), 1.25),
        (DType::Q2K, 16, Grid::Unsigned(3.0), 1.15),
        (DType::Q4K, 32, Grid::Unsigned(15.0), 1.1),
        (DType::Q5K, 32, Grid::Unsigned(31.0), 1.25),
    ] {
        let mut back = vec![0.0; x.len()];
        dequantize(dtype, &quantize(dtype, &x).expect("a quantiser"), &mut back);
        let (mut ours, mut best) = (0.0, 0.0);
        for (x, back) in x.chunks_exact(sub).zip(back.chunks_exact(sub)) {
            let rms = (x.iter().map(|x| x * x).sum::<f32>() / sub as f32).sqrt();
            let error = |value: &dyn Fn(f32) -> f32| -> f32 {
                x.iter().map(|&x| (rms + x.abs()) * (value(x) - x).powi(2)).sum()
            };
            let mut left = back.iter();
            ours += x
                .iter()
                .map(|x| (rms + x.abs()) * (left.next().expect("as many") - x).powi(2))
                .sum::<f32>();
            best += grid.brute_force(x, &error);
        }
        println!("{dtype}: {:.3} of the best", ours / best);
        assert!(ours <= slack * best, "{dtype}: {ours}, brute force {best}");
    }
}

/// The error of a block, by what becomes of each weight.
type Error<'a> = dyn Fn(&dyn Fn(f32) -> f32) -> f32 + 'a;

enum Grid {
    Signed(f32),
    Unsigned(f32),
    Book,
}

impl Grid {
    /// The least error over a fine grid of scales, and of minima where there are any.
    fn brute_force(&self, x: &[f32], error: &Error<'_>) -> f32 {
        let peak = x.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
        let (low, top) = x.iter().fold((0.0_f32, 0.0_f32), |(l, t), &x| (l.min(x), t.max(x)));
        let mut least = f32::INFINITY;
        for step in 1..400 {
            let part = step as f32 / 320.0;
            match self {
                Grid::Signed(offset) => {
                    for d in [peak * part / offset, -peak * part / offset] {
                        let code = |x: f32| (x / d).round().clamp(-offset, offset - 1.0);
                        least = least.min(error(&|x| d * code(x)));
                    }
                }
                Grid::Unsigned(high) => {
                    let d = (top - low) * part / high;
                    for cut in 0..60 {
                        let low = low * cut as f32 / 50.0;
                        let code = |x: f32| ((x - low) / d).round().clamp(0.0, *high);
                        least = least.min(error(&|x| d * code(x) + low));
                    }
                }
                Grid::Book => {
                    for d in [peak * part / 113.0, -peak * part / 113.0] {
                        let levels = IQ4_BOOK.map(|level| d * (f32::from(level) - 128.0));
                        let near = |x: f32| {
                            let far =
                                |a: &&f32, b: &&f32| (*a - x).abs().total_cmp(&(*b - x).abs());
                            *levels.iter().min_by(far).expect("sixteen")
                        };
                        least = least.min(error(&near));
                    }
                }
            }
        }
        least
    }
}

/// Root of the squared error over that of the values.
fn relative_error(x: &[f32], y: &[f32]) -> f32 {
    let error: f32 = x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum();
    (error / x.iter().map(|x| x * x).sum::<f32>()).sqrt()
}

fn goldens() -> Vec<u8> {
    let path = "../tests/goldens/quants.safetensors";
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read(path).expect("committed goldens")
}

fn golden_values(goldens: &[u8], dtype: DType) -> Vec<f32> {
    floats(safetensors_bytes(goldens, &format!("{dtype}.values")))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let chunks = bytes.chunks_exact(4);
    chunks.map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
}

/// Blocks of every format as the `gguf` Python package reads them (`tests/goldens/make_quants.py`).
#[test]
fn formats_agree_with_gguf() {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/quants.safetensors");
    let goldens = std::fs::read(path).expect("committed goldens");
    for dtype in DType::all().filter(|dtype| dtype.block_len() > 1) {
        let blocks = safetensors_bytes(&goldens, &format!("{dtype}.blocks"));
        let want = golden_values(&goldens, dtype);
        let mut got = vec![0.0; want.len()];
        dequantize(dtype, blocks, &mut got);
        assert_same_bits(&got, &want, dtype.name());
    }
}

/// The bytes of a tensor. Just enough of SafeTensors.
fn safetensors_bytes<'a>(file: &'a [u8], name: &str) -> &'a [u8] {
    let header = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let text = std::str::from_utf8(&file[8..8 + header]).expect("JSON");
    let entry = &text[text.find(&format!("\"{name}\"")).expect("the tensor")..];
    let range = &entry[entry.find("data_offsets\":[").expect("offsets") + 15..];
    let range = &range[..range.find(']').expect("a bracket")];
    let (from, to) = range.split_once(',').expect("two numbers");
    let from: usize = from.parse().expect("a number");
    let to: usize = to.parse().expect("a number");
    &file[8 + header + from..8 + header + to]
}
