//! Truth, bitwise equalities, and what must not leak.

use super::*;
use crate::cases;
use crate::kv::KvShape;

const BLOCK_LEN: usize = 16;

/// Sequences with their own random K, V and Q, in blocks that are shuffled over one slab.
struct World {
    kv: KvSlab,
    n_heads: usize,
    /// Of each sequence: blocks, and Q of all its positions, `[len, n_heads, head_dim]`.
    seqs: Vec<(Vec<u32>, Vec<f32>)>,
}

impl World {
    fn new(lens: &[usize], n_heads: usize, n_kv_heads: usize, dim: usize, ty: KvType) -> World {
        let blocks: Vec<usize> = lens.iter().map(|len| len.div_ceil(BLOCK_LEN)).collect();
        let n_blocks = blocks.iter().sum::<usize>() + 1;
        let shape = KvShape { n_blocks, block_len: BLOCK_LEN, n_kv_heads, head_dim: dim };
        let mut kv = KvSlab::new(shape, ty);
        // Whatever nobody owns is poison.
        let poison = vec![f32::NAN; n_blocks * BLOCK_LEN * n_kv_heads * dim];
        kv.write(
            &Pool::new(1),
            &poison,
            &poison,
            &(0..(n_blocks * BLOCK_LEN) as u32).collect::<Vec<_>>(),
        );
        let mut ids: Vec<u32> = (0..n_blocks as u32).collect();
        for i in (1..ids.len()).rev() {
            ids.swap(i, i * 7919 % (i + 1));
        }
        let mut seqs = Vec::new();
        for (s, (len, blocks)) in lens.iter().zip(blocks).enumerate() {
            let table: Vec<u32> = ids.drain(..blocks).collect();
            let slot = |p: usize| table[p / BLOCK_LEN] * BLOCK_LEN as u32 + (p % BLOCK_LEN) as u32;
            let slots: Vec<u32> = (0..*len).map(slot).collect();
            let row = n_kv_heads * dim;
            let seed = 100 * s as u64;
            kv.write(
                &Pool::new(1),
                &cases::randoms(len * row, seed),
                &cases::randoms(len * row, seed + 1),
                &slots,
            );
            seqs.push((table, cases::randoms(len * n_heads * dim, seed + 2)));
        }
        World { kv, n_heads, seqs }
    }

    /// The first `blocks` blocks of a sequence are those of another from now on.
    fn lend(&mut self, from: usize, to: usize, blocks: usize) {
        let lent = self.seqs[from].0[..blocks].to_vec();
        self.seqs[to].0[..blocks].copy_from_slice(&lent);
    }

    fn params(&self) -> AttentionParams<'static> {
        let scale = 3.0 / (self.kv.shape().head_dim as f32).sqrt();
        AttentionParams { n_heads: self.n_heads, scale, softcap: None, window: None, sinks: None }
    }

    /// Runs `f` with the batch of `(sequence, positions)` parts; gives its output.
    fn output(
        &self,
        parts: &[(usize, Range<usize>)],
        f: impl FnOnce(&[f32], &AttentionBatch<'_>, &mut [f32]),
    ) -> Vec<f32> {
        let row = self.n_heads * self.kv.shape().head_dim;
        let (mut q, mut cu_q) = (Vec::new(), vec![0]);
        for (s, positions) in parts {
            q.extend_from_slice(&self.seqs[*s].1[positions.start * row..positions.end * row]);
            cu_q.push((q.len() / row) as u32);
        }
        let context_len: Vec<u32> = parts.iter().map(|(_, p)| p.end as u32).collect();
        let tables: Vec<&[u32]> = parts.iter().map(|(s, _)| &self.seqs[*s].0[..]).collect();
        let mut out = vec![0.0; q.len()];
        let batch =
            AttentionBatch { cu_q: &cu_q, context_len: &context_len, block_tables: &tables };
        f(&q, &batch, &mut out);
        out
    }

    fn fast(
        &self,
        pool: &Pool,
        isa: Isa,
        params: &AttentionParams<'_>,
        parts: &[(usize, Range<usize>)],
    ) -> Vec<f32> {
        self.output(parts, |q, batch, out| attention(pool, isa, q, &self.kv, batch, params, out))
    }

    fn truth(&self, params: &AttentionParams<'_>, parts: &[(usize, Range<usize>)]) -> Vec<f32> {
        self.output(parts, |q, batch, out| scalar::attention(q, &self.kv, batch, params, out))
    }
}

/// Sinks of twenty heads, below, among and far above the scores.
const SINKS: [f32; 20] = [
    0.5,
    -1.0,
    40.0,
    -90.0,
    2.0,
    0.0,
    8.0,
    -3.0,
    1.5,
    f32::NEG_INFINITY,
    0.1,
    3.0,
    -0.5,
    5.0,
    12.0,
    -20.0,
    0.25,
    1.0,
    -2.0,
    6.0,
];

fn variants(base: AttentionParams<'static>) -> [AttentionParams<'static>; 7] {
    let sinks = Some(&SINKS[..base.n_heads]);
    [
        base,
        AttentionParams { window: Some(20), ..base },
        AttentionParams { window: Some(300), ..base },
        AttentionParams { softcap: Some(0.7), ..base },
        AttentionParams { softcap: Some(50.0), window: Some(20), ..base },
        AttentionParams { sinks, ..base },
        AttentionParams { sinks, window: Some(20), softcap: Some(0.7), ..base },
    ]
}

#[test]
fn near_the_truth_for_every_isa_type_and_head_size() {
    let (one, three) = (Pool::new(1), Pool::new(3));
    for ty in KvType::ALL {
        let tolerance = if ty == KvType::Q8_0 { 2e-2 } else { 2e-5 };
        for (&dim, (n_heads, n_kv_heads)) in
            cases::HEAD_DIMS.iter().zip([(1, 1), (4, 4), (14, 2), (6, 2), (3, 1), (20, 1), (8, 4)])
        {
            let world = World::new(&[21, 300, 1, 17], n_heads, n_kv_heads, dim, ty);
            let parts = [(0, 0..21), (1, 299..300), (2, 0..1), (1, 254..258), (3, 16..17)];
            for params in variants(world.params()) {
                let truth = world.truth(&params, &parts);
                let first = world.fast(&one, Isa::Scalar, &params, &parts);
                let error = cases::max_abs_diff(&truth, &first);
                assert!(error < tolerance, "{ty:?} head {dim} {params:?}: {error:e}");
                for isa in Isa::available() {
                    let got = world.fast(&three, *isa, &params, &parts);
                    cases::assert_same_bits(&first, &got, isa.name());
                }
            }
        }
    }
}

#[test]
fn batch_chunking_and_threads_change_no_bit() {
    let pools = [Pool::new(1), Pool::new(2), Pool::new(5)];
    let isa = Isa::best();
    let heads = [(14, 2, 64), (2, 2, 80), (4, 1, 8)];
    for (ty, (n_heads, n_kv_heads, dim)) in
        [KvType::F16, KvType::Q8_0].iter().flat_map(|ty| heads.map(|heads| (*ty, heads)))
    {
        let lens = [600, 33, 1025];
        let world = World::new(&lens, n_heads, n_kv_heads, dim, ty);
        for params in variants(world.params()) {
            let whole: Vec<Vec<f32>> =
                (0..3).map(|s| world.fast(&pools[0], isa, &params, &[(s, 0..lens[s])])).collect();
            let row = n_heads * dim;
            let mixes: [&[(usize, Range<usize>)]; 5] = [
                &[(2, 1024..1025)],
                &[(2, 1000..1025), (0, 599..600), (1, 0..33), (0, 100..357)],
                &[(0, 0..1), (1, 32..33), (2, 255..256), (2, 256..257), (2, 511..514)],
                &[(1, 5..12), (0, 590..600)],
                &[(0, 0..600), (2, 7..900)],
            ];
            for parts in mixes {
                let expected: Vec<f32> = parts
                    .iter()
                    .flat_map(|(s, p)| whole[*s][p.start * row..p.end * row].to_vec())
                    .collect();
                for pool in &pools {
                    let got = world.fast(pool, isa, &params, parts);
                    cases::assert_same_bits(&expected, &got, &format!("{parts:?} {params:?}"));
                }
            }
        }
    }
}

#[test]
fn sequences_that_begin_alike_are_as_alone() {
    let pools = [Pool::new(1), Pool::new(2), Pool::new(5)];
    let heads = [(14, 2, 64), (4, 2, 80), (16, 1, 8)];
    for (ty, (n_heads, n_kv_heads, dim)) in
        KvType::ALL.iter().flat_map(|ty| heads.map(|heads| (*ty, heads)))
    {
        let mut world =
            World::new(&[1300, 1200, 700, 900, 1300, 300, 1030], n_heads, n_kv_heads, dim, ty);
        // All chunks, half of them, one, parts of one; and one that shares nothing.
        for (to, blocks) in [(1, 64), (2, 32), (4, 81), (5, 16), (6, 40)] {
            world.lend(0, to, blocks);
        }
        let parts = [
            (0, 1299..1300),
            (6, 1024..1030),
            (1, 1198..1200),
            (2, 699..700),
            (3, 880..900),
            (4, 1299..1300),
            (4, 511..513),
            (5, 299..300),
        ];
        for params in variants(world.params()) {
            let alone = |part| world.fast(&pools[0], Isa::best(), &params, &[part]);
            let expected: Vec<f32> = parts.iter().cloned().flat_map(alone).collect();
            for pool in &pools {
                for isa in Isa::available() {
                    let got = world.fast(pool, *isa, &params, &parts);
                    let what = format!("{ty:?}, {n_heads}/{n_kv_heads} heads, {params:?}");
                    cases::assert_same_bits(&expected, &got, &what);
                }
            }
        }
    }
}

#[test]
fn long_decode_is_near_the_truth_and_threads_change_no_bit() {
    for ty in [KvType::F32, KvType::Q8_0] {
        let world = World::new(&[3000, 2900], 8, 2, 64, ty);
        let params = AttentionParams { sinks: Some(&SINKS[..8]), ..world.params() };
        let parts = [(0, 2999..3000), (1, 2898..2900)];
        let truth = world.truth(&params, &parts);
        let one = world.fast(&Pool::new(1), Isa::best(), &params, &parts);
        // Of many keys the errors cancel each other.
        let tolerance = if ty == KvType::Q8_0 { 2e-3 } else { 2e-5 };
        assert!(cases::max_abs_diff(&truth, &one) < tolerance, "{ty:?}");
        for threads in [2, 4] {
            let got = world.fast(&Pool::new(threads), Isa::best(), &params, &parts);
            cases::assert_same_bits(&one, &got, &format!("{ty:?}, {threads} threads"));
        }
    }
}

/// One key that matters, and many of which each is less than half of the least step of a byte, and
/// all of them a third of the whole: what they say must not be lost.
#[test]
fn bytes_hear_a_multitude_of_quiet_keys() {
    const DIM: usize = 16;
    const KEYS: usize = 256;
    let shape = KvShape { n_blocks: KEYS / 16, block_len: 16, n_kv_heads: 1, head_dim: DIM };
    let blocks: Vec<u32> = (0..KEYS as u32 / 16).collect();
    let batch =
        AttentionBatch { cu_q: &[0, 1], context_len: &[KEYS as u32], block_tables: &[&blocks] };
    let params =
        AttentionParams { n_heads: 1, scale: 1.0, softcap: None, window: None, sinks: None };
    for (loud, weight) in [(0, 700.0_f32), (77, 700.0), (255, 600.0), (9, 1500.0)] {
        let (mut k, mut v) = (vec![0.0; KEYS * DIM], vec![0.0; KEYS * DIM]);
        for (key, v) in v.chunks_exact_mut(DIM).enumerate() {
            v[usize::from(key != loud)] = 1.0;
        }
        k[loud * DIM] = 1.0;
        let mut kv = KvSlab::new(shape, KvType::Q8_0);
        kv.write(&Pool::new(1), &k, &v, &(0..KEYS as u32).collect::<Vec<_>>());
        let (mut q, mut out) = ([0.0; DIM], [0.0; DIM]);
        q[0] = weight.ln();
        attention(&Pool::new(1), Isa::best(), &q, &kv, &batch, &params, &mut out);
        let quiet = (KEYS - 1) as f32 / weight;
        let truth = [1.0 / (1.0 + quiet), quiet / (1.0 + quiet)];
        assert!((out[0] - truth[0]).abs() < 1e-3, "{loud}: {out:?}, not {truth:?}");
        assert!((out[1] / truth[1] - 1.0).abs() < 0.15, "{loud}: {out:?}, not {truth:?}");
    }
}

#[test]
fn larger_blocks_change_no_bit() {
    let (dim, len) = (64, 700);
    let (k, v) = (cases::randoms(len * dim, 1), cases::randoms(len * dim, 2));
    let q = cases::randoms(2 * 4 * dim, 3);
    let pool = Pool::new(2);
    let outputs: Vec<Vec<f32>> = [16, 32, 48, 256, 1024]
        .iter()
        .map(|&block_len| {
            let n_blocks = len.div_ceil(block_len);
            let shape = KvShape { n_blocks, block_len, n_kv_heads: 1, head_dim: dim };
            let mut kv = KvSlab::new(shape, KvType::BF16);
            let table: Vec<u32> = (0..n_blocks as u32).rev().collect();
            let slot = |p: usize| table[p / block_len] * block_len as u32 + (p % block_len) as u32;
            kv.write(&Pool::new(1), &k, &v, &(0..len).map(slot).collect::<Vec<_>>());
            let batch = AttentionBatch {
                cu_q: &[0, 2],
                context_len: &[len as u32],
                block_tables: &[&table],
            };
            let params = AttentionParams {
                n_heads: 4,
                scale: 0.125,
                softcap: None,
                window: None,
                sinks: None,
            };
            let mut out = vec![0.0; q.len()];
            attention(&pool, Isa::best(), &q, &kv, &batch, &params, &mut out);
            out
        })
        .collect();
    outputs.iter().for_each(|out| cases::assert_same_bits(&outputs[0], out, "block_len"));
}

#[test]
fn an_empty_batch_is_no_work() {
    let world = World::new(&[5], 2, 1, 8, KvType::F32);
    assert!(world.fast(&Pool::new(2), Isa::best(), &world.params(), &[]).is_empty());
    assert!(world.fast(&Pool::new(2), Isa::best(), &world.params(), &[(0, 3..3)]).is_empty());
}
