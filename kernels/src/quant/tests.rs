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
    let tolerances = [
        (DType::F32, 0.0),
        (DType::F16, 0.002),
        (DType::BF16, 0.016),
        (DType::Q8_0, 0.0121),
        (DType::Q4_0, 0.38), // the code 16 does not exist: a full step at one end
        (DType::Q4K, 0.24),
        (DType::Q6K, 0.06),
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
    assert!(quantize(DType::Q2K, &[0.0; 256]).is_none());
}

/// Blocks of every format as the `gguf` Python package reads them (`tests/goldens/make_quants.py`).
#[test]
fn formats_agree_with_gguf() {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/quants.safetensors");
    let goldens = std::fs::read(path).expect("committed goldens");
    for dtype in DType::all().filter(|dtype| dtype.block_len() > 1) {
        let blocks = safetensors_bytes(&goldens, &format!("{dtype}.blocks"));
        let want = safetensors_bytes(&goldens, &format!("{dtype}.values"));
        let want: Vec<f32> = want
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")))
            .collect();
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
