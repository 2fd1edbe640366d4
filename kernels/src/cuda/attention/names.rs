//! What the kernels of each type of keys and values are called, and the shared memory they take.

use super::KvKind;

/// Rotation and storage.
pub fn rope_name(kind: KvKind) -> &'static str {
    match kind {
        KvKind::BF16 => "rope_store_bf16",
        KvKind::F16 => "rope_store_f16",
        KvKind::Q8 => "rope_store_q8",
        KvKind::Fp8 => "rope_store_e4m3",
    }
}

/// Attention of heads of any width.
pub fn any_name(kind: KvKind) -> &'static str {
    match kind {
        KvKind::BF16 => "attention_any_bf16",
        KvKind::F16 => "attention_any_f16",
        KvKind::Q8 => "attention_any_q8",
        KvKind::Fp8 => "attention_any_e4m3",
    }
}

/// Attention of single rows, by the heads of a group that a block has.
pub fn decode_name(kind: KvKind, dim: usize, group: usize) -> &'static str {
    macro_rules! names {
        ($($kind:ident $text:literal),*) => {
            match (kind, dim, group) {
                $(
                    (KvKind::$kind, 64, 1) => concat!("attention_decode_", $text, "_d64_g1"),
                    (KvKind::$kind, 64, 2) => concat!("attention_decode_", $text, "_d64_g2"),
                    (KvKind::$kind, 64, 4) => concat!("attention_decode_", $text, "_d64_g4"),
                    (KvKind::$kind, 64, _) => concat!("attention_decode_", $text, "_d64_g8"),
                    (KvKind::$kind, 128, 1) => concat!("attention_decode_", $text, "_d128_g1"),
                    (KvKind::$kind, 128, 2) => concat!("attention_decode_", $text, "_d128_g2"),
                    (KvKind::$kind, 128, 4) => concat!("attention_decode_", $text, "_d128_g4"),
                    (KvKind::$kind, 128, _) => concat!("attention_decode_", $text, "_d128_g8"),
                    (KvKind::$kind, _, 1) => concat!("attention_decode_", $text, "_d256_g1"),
                    (KvKind::$kind, _, 2) => concat!("attention_decode_", $text, "_d256_g2"),
                    (KvKind::$kind, _, 4) => concat!("attention_decode_", $text, "_d256_g4"),
                    (KvKind::$kind, _, _) => concat!("attention_decode_", $text, "_d256_g8"),
                )*
            }
        };
    }
    names!(BF16 "bf16", F16 "f16", Q8 "q8", Fp8 "e4m3")
}

/// A chunk of values, or what 64 KiB hold of it, slots, and of bytes the scales of both.
pub fn decode_shared(kind: KvKind, dim: usize) -> usize {
    match kind {
        KvKind::BF16 | KvKind::F16 => (512 * dim).min(64 << 10) + 1024,
        KvKind::Q8 | KvKind::Fp8 => 256 * dim + 3072,
    }
}

/// The tensor-core kernel for heads of this width, and its shared memory: its queries and two tiles
/// of keys and values, or, of bytes, one as it is multiplied, two as they are stored, and their
/// scales.
pub fn prefill_name(kind: KvKind, dim: usize) -> Option<(&'static str, u32)> {
    let (name, scales) = match (kind, dim) {
        (KvKind::BF16, 64) => ("attention_prefill_bf16_d64", 0),
        (KvKind::F16, 64) => ("attention_prefill_f16_d64", 0),
        (KvKind::Q8, 64) => ("attention_prefill_q8_d64", 512),
        (KvKind::Fp8, 64) => ("attention_prefill_e4m3_d64", 512),
        (KvKind::BF16, 128) => ("attention_prefill_bf16_d128", 0),
        (KvKind::F16, 128) => ("attention_prefill_f16_d128", 0),
        (KvKind::Q8, 128) => ("attention_prefill_q8_d128", 512),
        (KvKind::Fp8, 128) => ("attention_prefill_e4m3_d128", 512),
        (KvKind::BF16, 256) => ("attention_prefill_bf16_d256", 0),
        (KvKind::F16, 256) => ("attention_prefill_f16_d256", 0),
        (KvKind::Q8, 256) => ("attention_prefill_q8_d256", 512),
        (KvKind::Fp8, 256) => ("attention_prefill_e4m3_d256", 512),
        _ => return None,
    };
    Some((name, (768 * dim as u32).min(96 << 10) + scales))
}
