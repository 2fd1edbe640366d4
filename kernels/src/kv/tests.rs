//! Storage against its promises: every type, shapes, blocks, pages.

use super::*;
use crate::cases;

/// What may be stored of rows of heads: from, to. Of q16_0 the length is summed up in some order.
fn rounded(kv_type: KvType, row: &[f32], head_dim: usize, of_k: bool) -> Vec<(f32, f32)> {
    let to_grid = |head: &[f32]| {
        let largest = head.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        let (scale, inverse) = (largest / 127.0, 127.0 / largest);
        // A byte has one zero.
        let stored = |x: &f32| (x * inverse).round_ties_even() * scale + 0.0;
        head.iter().map(stored).collect::<Vec<f32>>()
    };
    let near = |head: &[f32]| {
        let squares: f64 = head.iter().map(|x| f64::from(*x).powi(2)).sum();
        let largest = head.iter().fold(0.0_f64, |a, b| a.max(f64::from(b.abs())));
        let step = if of_k { squares.sqrt() / 32_700.0 } else { largest / 8191.0 };
        let off = (step * 0.501) as f32;
        head.iter().map(|x| (x - off, x + off)).collect::<Vec<_>>()
    };
    let exact = |x: Vec<f32>| x.into_iter().map(|x| (x, x)).collect();
    match kv_type {
        KvType::F32 => exact(row.to_vec()),
        KvType::F16 => exact(row.iter().map(|x| f16::from_f32(*x).to_f32()).collect()),
        KvType::BF16 => exact(row.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()),
        KvType::Q16_0 => row.chunks(head_dim).flat_map(near).collect(),
        KvType::Q8_0 => exact(row.chunks(head_dim).flat_map(to_grid).collect()),
        KvType::Fp8 => exact(row.iter().map(|x| fp8::to_f32(fp8::from_f32(*x))).collect()),
    }
}

#[test]
fn what_is_written_is_read() {
    for (kv_type, &head_dim) in
        KvType::ALL.iter().flat_map(|t| [1, 5].iter().chain(cases::HEAD_DIMS).map(move |d| (*t, d)))
    {
        let shape = KvShape { n_blocks: 3, block_len: 32, n_kv_heads: 2, head_dim };
        let mut slab = KvSlab::new(shape, kv_type);
        let slots: Vec<u32> = vec![95, 0, 31, 32, 17, 50];
        let row = 2 * head_dim;
        let (k, v) = (cases::randoms(6 * row, 1), cases::randoms(6 * row, 2));
        slab.write(&Pool::new(1), &k, &v, &slots);
        for (i, slot) in [(0, 95), (1, 0), (2, 31), (3, 32), (4, 17), (5, 50)] {
            let (mut got_k, mut got_v) = (vec![0.0; row], vec![0.0; row]);
            slab.read(slot, &mut got_k, &mut got_v);
            for (x, got, of_k) in [(&k, got_k, true), (&v, got_v, false)] {
                let limits = rounded(kv_type, &x[i * row..][..row], head_dim, of_k);
                if kv_type != KvType::Q16_0 {
                    let exact: Vec<f32> = limits.iter().map(|(x, _)| *x).collect();
                    cases::assert_same_bits(&exact, &got, kv_type.name());
                }
                let inside = limits.iter().zip(&got).all(|((a, b), x)| (a..=b).contains(&x));
                assert!(inside, "{kv_type:?}, head {head_dim}, K {of_k}: {got:?} in {limits:?}");
            }
        }
    }
}

#[test]
fn huge_numbers_saturate_and_nan_stays() {
    let shape = KvShape { n_blocks: 1, block_len: 16, n_kv_heads: 1, head_dim: 8 };
    let mut slab = KvSlab::new(shape, KvType::F16);
    let row = [1e9, -1e9, f32::NAN, f32::INFINITY, 65504.0, 0.0, -0.0, 1e-9];
    slab.write(&Pool::new(1), &row, &row, &[3]);
    let (mut k, mut v) = ([0.0; 8], [0.0; 8]);
    slab.read(3, &mut k, &mut v);
    assert_eq!((k[0], k[1], k[3], k[4]), (65504.0, -65504.0, f32::INFINITY, 65504.0));
    assert!(v[2].is_nan());
    let mut slab = KvSlab::new(shape, KvType::BF16);
    slab.write(&Pool::new(1), &[f32::MAX; 8], &[f32::MIN; 8], &[0]);
    slab.read(0, &mut k, &mut v);
    assert_eq!((k[0], v[0]), (bf16::MAX.to_f32(), bf16::MIN.to_f32()));
    let mut slab = KvSlab::new(shape, KvType::Fp8);
    slab.write(&Pool::new(1), &row, &row, &[3]);
    slab.read(3, &mut k, &mut v);
    assert_eq!((k[0], k[1], k[4], v[5], v[7]), (448.0, -448.0, 448.0, 0.0, 0.0));
    assert!(v[2].is_nan() && k[3].is_nan(), "there is no infinity in eight bits");
}

#[test]
fn every_isa_and_thread_writes_the_same_bytes() {
    for (kv_type, &head_dim) in
        KvType::ALL.iter().flat_map(|t| [1, 5].iter().chain(cases::HEAD_DIMS).map(move |d| (*t, d)))
    {
        let shape = KvShape { n_blocks: 9, block_len: 16, n_kv_heads: 3, head_dim };
        // Many rows, out of order; the last one takes the place of the first.
        let slots: Vec<u32> = (0..144).map(|i| i * 7 % 144).chain([0]).collect();
        let len = slots.len() * 3 * head_dim;
        let mut k: Vec<f32> = cases::randoms(len, 1).iter().map(|x| x * 1e5).collect();
        let v: Vec<f32> = cases::randoms(len, 2).iter().map(|x| x.powi(9)).collect();
        (k[5], k[6], k[7]) = (f32::INFINITY, f32::NEG_INFINITY, f32::MAX);
        let written = |isa, threads| {
            let mut slab = KvSlab::new(shape, kv_type);
            slab.write_with(isa, &Pool::new(threads), &k, &v, &slots);
            slab.memory.to_vec()
        };
        let truth = written(Isa::Scalar, 1);
        for isa in Isa::available() {
            assert!(truth == written(*isa, 3), "{kv_type:?} {head_dim} {}", isa.name());
        }
    }
}

#[test]
fn bytes_are_counted() {
    let shape = KvShape { n_blocks: 5, block_len: 16, n_kv_heads: 2, head_dim: 64 };
    assert_eq!(shape.bytes(KvType::F16), 5 * 16 * 2 * 64 * 2 * 2);
    assert_eq!(KvSlab::new(shape, KvType::F32).bytes(), 5 * 16 * 2 * 64 * 2 * 4);
    let tokens = 5 * 16 * 2;
    assert_eq!(shape.bytes(KvType::Q8_0), tokens * (64 * 2 + 2 * 4), "numbers and scales");
    assert_eq!(shape.bytes(KvType::Q16_0), tokens * (64 * 4 + 2 * 4), "numbers and scales");
    assert_eq!(shape.bytes(KvType::Fp8), tokens * 64 * 2);
    let none = KvShape { n_blocks: 0, ..shape };
    assert_eq!(KvSlab::new(none, KvType::F32).bytes(), 0);
}

#[test]
fn memory_is_provided_a_huge_page_at_a_time_and_what_is_stored_stays() {
    // 16 KiB a block: 100 are less than a huge page, 300 more than two.
    for n_blocks in [3, 100, 300] {
        let shape = KvShape { n_blocks, block_len: 16, n_kv_heads: 2, head_dim: 128 };
        let mut slab = KvSlab::layer(shape, KvType::F16, 1, 3);
        let numbers = cases::randoms(256, 1);
        let last = n_blocks as u32 * 16 - 1;
        slab.write(&Pool::new(1), &numbers, &numbers, &[last]);
        let half = n_blocks / 2;
        assert!(!slab.lacks(0), "nothing is asked for");
        assert!(n_blocks == 3 || !TOLD || !are_present(&slab.memory[..4096]));
        let mut pages = 0;
        for blocks in [half, half, n_blocks, n_blocks + 1] {
            while slab.lacks(blocks) {
                slab.provide(blocks);
                pages += 1;
            }
            let until = (blocks * slab.bytes() / n_blocks).min(slab.bytes());
            assert!(!TOLD || are_present(&slab.memory[..until]), "{blocks} of {n_blocks}");
        }
        assert!((1..=2 + slab.bytes() / (2 << 20) + 1).contains(&pages), "{pages} pages");
        let mut other = KvSlab::layer(shape, KvType::F16, 1, 3);
        other.write(&Pool::new(1), &numbers, &numbers, &[last]);
        assert!(*slab.memory == *other.memory, "{n_blocks}");
    }
    let none = KvShape { n_blocks: 0, block_len: 16, n_kv_heads: 2, head_dim: 128 };
    assert!(!KvSlab::new(none, KvType::F16).lacks(1));
}

/// Whether the system says where memory is, of pages of 4 KiB (an emulator says it of its own).
const TOLD: bool = cfg!(all(target_os = "linux", target_arch = "x86_64"));

/// The system has given all pages of it (`Documentation/admin-guide/mm/pagemap.rst`, bit 63).
fn are_present(bytes: &[u8]) -> bool {
    use std::io::{Read, Seek, SeekFrom};
    let mut map = std::fs::File::open("/proc/self/pagemap").unwrap();
    let (first, behind) = (bytes.as_ptr().addr() / 4096, (bytes.as_ptr().addr() + bytes.len()));
    map.seek(SeekFrom::Start(first as u64 * 8)).unwrap();
    let mut entries = vec![0; (behind.div_ceil(4096) - first) * 8];
    map.read_exact(&mut entries).unwrap();
    entries.chunks_exact(8).all(|entry| entry[7] & 0x80 != 0)
}
