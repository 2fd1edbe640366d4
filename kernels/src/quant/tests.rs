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

/// Eight rows of 512 weights per format, written and read by the `gguf` Python package.
#[test]
fn formats_agree_with_gguf() {
    let folder = "../../shared/data/models/quant-goldens";
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder);
    let Ok(gguf) = std::fs::read(folder.join("quant-goldens.gguf")) else {
        println!("SKIPPED: {} is not there", folder.display());
        return;
    };
    let expected = std::fs::read(folder.join("expected_f32.safetensors")).expect("golden values");
    let tensors = gguf_tensors(&gguf);
    let mut seen = 0;
    for (name, dtype, bytes) in tensors {
        let want = safetensors_f32(&expected, name);
        let mut got = vec![0.0; want.len()];
        dequantize(dtype, &bytes[..dtype.row_bytes(want.len()).expect("whole blocks")], &mut got);
        assert_same_bits(&got, &want, name);
        seen += 1;
    }
    assert_eq!(seen, 13);
}

/// Name, type and the bytes from its offset on, of every tensor. Just enough of GGUF v3.
fn gguf_tensors(file: &[u8]) -> Vec<(&str, DType, &[u8])> {
    let mut at = 24;
    let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().expect("8 bytes"));
    let text = |at: &mut usize| {
        let len = u64_at(*at) as usize;
        *at += 8 + len;
        std::str::from_utf8(&file[*at - len..*at]).expect("a name")
    };
    for _ in 0..u64_at(16) {
        text(&mut at);
        let kind = u32_at(at);
        at += 4;
        match kind {
            4 => at += 4,
            8 => _ = text(&mut at),
            other => panic!("metadata type {other}"),
        }
    }
    let mut found = Vec::new();
    for _ in 0..u64_at(8) {
        let name = text(&mut at);
        at += 4 + 8 * u32_at(at) as usize;
        let dtype = DType::from_ggml(u32_at(at)).expect("a known type");
        found.push((name, dtype, u64_at(at + 4) as usize));
        at += 12;
    }
    let data = at.next_multiple_of(32);
    found.into_iter().map(|(name, dtype, offset)| (name, dtype, &file[data + offset..])).collect()
}

fn safetensors_f32(file: &[u8], name: &str) -> Vec<f32> {
    let header = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let text = std::str::from_utf8(&file[8..8 + header]).expect("JSON");
    let entry = &text[text.find(&format!("\"{name}\"")).expect("the tensor")..];
    let range = &entry[entry.find("data_offsets\":[").expect("offsets") + 15..];
    let range = &range[..range.find(']').expect("a bracket")];
    let (from, to) = range.split_once(',').expect("two numbers");
    let from: usize = from.parse().expect("a number");
    let to: usize = to.parse().expect("a number");
    let bytes = &file[8 + header + from..8 + header + to];
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
}
