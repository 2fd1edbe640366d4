//! Truth, bitwise equalities, and what must not leak.

use super::*;
use crate::cases;
use crate::kv::KvShape;

const BLOCK_LEN: usize = 16;
/// Types whose sums are of integers.
const INTEGERS: [KvType; 2] = [KvType::Q16_0, KvType::Q8_0];

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
    // Also heads that are no whole number of words, or of vectors.
    let dims = [cases::HEAD_DIMS, &[1, 5, 6, 20]].concat();
    let heads = [(1, 1), (4, 4), (14, 2), (6, 2), (3, 1), (20, 1), (8, 4)];
    for ty in KvType::ALL {
        let tolerance = match ty {
            KvType::Q8_0 => 2e-2,
            KvType::Q16_0 => 5e-4,
            _ => 2e-5,
        };
        for (&dim, (n_heads, n_kv_heads)) in dims.iter().zip(heads.into_iter().cycle()) {
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
    for (ty, (n_heads, n_kv_heads, dim)) in [KvType::F16, KvType::Q16_0, KvType::Q8_0]
        .iter()
        .flat_map(|ty| heads.map(|heads| (*ty, heads)))
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
    for ty in [KvType::F32, KvType::Q16_0, KvType::Q8_0] {
        let world = World::new(&[3000, 2900], 8, 2, 64, ty);
        let params = AttentionParams { sinks: Some(&SINKS[..8]), ..world.params() };
        let parts = [(0, 2999..3000), (1, 2898..2900)];
        let truth = world.truth(&params, &parts);
        let one = world.fast(&Pool::new(1), Isa::best(), &params, &parts);
        // Of many keys the errors cancel each other.
        let tolerance = match ty {
            KvType::Q8_0 => 2e-3,
            KvType::Q16_0 => 1e-4,
            _ => 2e-5,
        };
        assert!(cases::max_abs_diff(&truth, &one) < tolerance, "{ty:?}");
        for threads in [2, 4] {
            let got = world.fast(&Pool::new(threads), Isa::best(), &params, &parts);
            cases::assert_same_bits(&one, &got, &format!("{ty:?}, {threads} threads"));
        }
    }
}

/// One key that matters, and many of which each is less than half of the least step of an integer,
/// and all of them up to 30 % of the whole (of i16: 0.3): what they say must not be lost.
#[test]
fn integers_hear_a_multitude_of_quiet_keys() {
    const DIM: usize = 16;
    const KEYS: usize = 256;
    let shape = KvShape { n_blocks: KEYS / 16, block_len: 16, n_kv_heads: 1, head_dim: DIM };
    let blocks: Vec<u32> = (0..KEYS as u32 / 16).collect();
    let batch =
        AttentionBatch { cu_q: &[0, 1], context_len: &[KEYS as u32], block_tables: &[&blocks] };
    let params =
        AttentionParams { n_heads: 1, scale: 1.0, softcap: None, window: None, sinks: None };
    let cases = [(0, 700.0_f32), (77, 700.0), (255, 600.0), (9, 1500.0)];
    let bytes = cases.map(|case| (KvType::Q8_0, case));
    let wide = cases.map(|(loud, weight)| (KvType::Q16_0, (loud, 120.0 * weight)));
    for (ty, (loud, weight)) in bytes.into_iter().chain(wide) {
        let (mut k, mut v) = (vec![0.0; KEYS * DIM], vec![0.0; KEYS * DIM]);
        for (key, v) in v.chunks_exact_mut(DIM).enumerate() {
            v[usize::from(key != loud)] = 1.0;
        }
        k[loud * DIM] = 1.0;
        let mut kv = KvSlab::new(shape, ty);
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

/// What `ints.rs` says that it does, in f64, of one head of one row.
fn rounded_as_told(q: &[f32], scale: f32, kv: &KvSlab, keys: usize) -> Vec<f64> {
    let bytes = kv.kv_type() == KvType::Q8_0;
    let grid = |x: f64| x.round_ties_even();
    let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let largest = |x: &[f64]| x.iter().fold(0.0_f64, |a, b| a.max(b.abs()));
    let q: Vec<f64> = q.iter().map(|q| f64::from(q * scale)).collect();
    let step = if bytes { largest(&q) / 127.0 } else { length(&q) / 32_700.0 };
    let mut all = vec![(f64::NEG_INFINITY, 0.0, vec![0.0; q.len()])];
    for chunk in (0..keys).collect::<Vec<_>>().chunks(CHUNK) {
        let mut seen = Vec::new();
        for &key in chunk {
            let (mut k, mut v) = (vec![0.0; q.len()], vec![0.0; q.len()]);
            kv.read(key as u32, &mut k, &mut v);
            let terms = q.iter().zip(&k).map(|(q, k)| grid(q / step) * step * f64::from(*k));
            let score = terms.sum::<f64>();
            let v: Vec<f64> = v.into_iter().map(f64::from).collect();
            seen.push((score, largest(&v) / if bytes { 127.0 } else { 8191.0 }, v));
        }
        let highest = seen.iter().fold(f64::NEG_INFINITY, |a, (score, ..)| a.max(*score));
        let weight = |score: f64| (score - highest).exp();
        let scaled: Vec<f64> = seen.iter().map(|(s, scale, _)| weight(*s) * scale).collect();
        let step = match bytes {
            true => largest(&scaled) / 255.0,
            false => (largest(&scaled) / 32_700.0).max(scaled.iter().sum::<f64>() / 261_800.0),
        };
        let mut sums = vec![0.0; q.len()];
        for (&key, (scaled, (_, v_scale, v))) in chunk.iter().zip(scaled.iter().zip(&seen)) {
            // The bits of the place from the last to the first say the threshold.
            let reversed = (key as u8 % 16).reverse_bits() >> 4;
            let dither = (f64::from(reversed) + 0.5) / 16.0 - 0.5;
            let whole = grid(scaled / step + dither);
            for (sum, v) in sums.iter_mut().zip(v) {
                *sum += whole * step * v / v_scale;
            }
        }
        all.push((highest, seen.iter().map(|(score, ..)| weight(*score)).sum(), sums));
    }
    let highest = all.iter().fold(f64::NEG_INFINITY, |a, (score, ..)| a.max(*score));
    let total: f64 = all.iter().map(|(score, total, _)| total * (score - highest).exp()).sum();
    let sum = |d: usize| all.iter().map(|(s, _, sums)| sums[d] * (s - highest).exp()).sum::<f64>();
    (0..q.len()).map(|d| sum(d) / total).collect()
}

#[test]
fn integers_are_rounded_as_told() {
    let cases = [(8, 5), (20, 256), (64, 300), (128, 700)];
    for (ty, (dim, keys)) in INTEGERS.iter().flat_map(|ty| cases.map(|case| (*ty, case))) {
        let world = World::new(&[keys], 1, 1, dim, ty);
        let params = world.params();
        let got = world.fast(&Pool::new(1), Isa::Scalar, &params, &[(0, keys - 1..keys)]);
        // Its keys in order, for whoever reads them one by one.
        let shape = KvShape { n_blocks: keys.div_ceil(16), ..world.kv.shape() };
        let mut kv = KvSlab::new(shape, ty);
        for (to, from) in world.seqs[0].0.iter().enumerate() {
            kv.block_mut(to as u32).copy_from_slice(world.kv.block(*from));
        }
        let want = rounded_as_told(&world.seqs[0].1[(keys - 1) * dim..], params.scale, &kv, keys);
        let want: Vec<f32> = want.into_iter().map(|x| x as f32).collect();
        let error = cases::max_abs_diff(&want, &got);
        let limit = if ty == KvType::Q8_0 { 3e-4 } else { 1e-5 };
        assert!(error < limit, "{ty:?}, head {dim}, {keys} keys: {error:e}");
    }
}

/// As much as the sums can hold: heads that are as long as a grid lets them be, and keys that all
/// weigh the same.
#[test]
fn the_longest_sums_do_not_overflow() {
    const KEYS: usize = 300;
    for (ty, dim) in INTEGERS.iter().flat_map(|ty| [1, 16, 1024, 16_384].map(|dim| (*ty, dim))) {
        let shape =
            KvShape { n_blocks: KEYS.div_ceil(16), block_len: 16, n_kv_heads: 1, head_dim: dim };
        let blocks: Vec<u32> = (0..shape.n_blocks as u32).collect();
        let batch =
            AttentionBatch { cu_q: &[0, 1], context_len: &[KEYS as u32], block_tables: &[&blocks] };
        let params =
            AttentionParams { n_heads: 1, scale: 1.0, softcap: None, window: None, sinks: None };
        let flat = vec![1.0 / (dim as f32).sqrt(); dim];
        let mut alone = vec![0.0; dim];
        alone[0] = 1.0;
        for (head, sign) in [(&flat, 1.0), (&alone, 1.0), (&flat, -1.0), (&alone, -1.0)] {
            let all = |x: &[f32]| x.repeat(KEYS);
            // Of another key the score would be 0, and its weight a third of the others'.
            let mut k: Vec<f32> = all(head).iter().map(|x| x * sign).collect();
            let v: Vec<f32> = all(&vec![sign; dim]);
            k[..dim].fill(0.0);
            let mut v = v;
            v[..dim].fill(-sign);
            let mut kv = KvSlab::new(shape, ty);
            kv.write(&Pool::new(1), &k, &v, &(0..KEYS as u32).collect::<Vec<_>>());
            let weight = sign.exp();
            let others = (KEYS - 1) as f32 * weight;
            let want = sign * (others - 1.0) / (others + 1.0);
            for isa in Isa::available() {
                let mut out = vec![0.0; dim];
                attention(&Pool::new(1), *isa, head, &kv, &batch, &params, &mut out);
                let off = out.iter().fold(0.0_f32, |a, x| a.max((x - want).abs()));
                assert!(off < 5e-3, "{ty:?}, head {dim}, {}: {off}", isa.name());
            }
        }
    }
}

#[test]
#[should_panic(expected = "not exact")]
fn a_head_that_is_too_wide_is_refused() {
    let shape = KvShape { n_blocks: 1, block_len: 16, n_kv_heads: 1, head_dim: 16_385 };
    let kv = KvSlab::new(shape, KvType::Q16_0);
    let batch = AttentionBatch { cu_q: &[0, 1], context_len: &[1], block_tables: &[&[0]] };
    let params =
        AttentionParams { n_heads: 1, scale: 1.0, softcap: None, window: None, sinks: None };
    let (q, mut out) = (vec![1.0; 16_385], vec![0.0; 16_385]);
    attention(&Pool::new(1), Isa::best(), &q, &kv, &batch, &params, &mut out);
}

/// What is no number reaches the rows that see it, and no row before it; in V of floats, where 0
/// times NaN is NaN, it may reach rows of its tile.
#[test]
fn poison_reaches_who_sees_it() {
    const DIM: usize = 20;
    const ROWS: usize = 21;
    let shape = KvShape { n_blocks: 2, block_len: 16, n_kv_heads: 1, head_dim: DIM };
    let sinks = [0.5];
    let cases =
        KvType::ALL.iter().flat_map(|ty| Isa::available().iter().map(move |isa| (*ty, *isa)));
    for ((ty, isa), with_sink) in cases.flat_map(|case| [(case, false), (case, true)]) {
        let parts = if INTEGERS.contains(&ty) { 0..3 } else { 0..2 };
        for (part, at) in parts.flat_map(|part| [0, 7, 15, 16, 20].map(|at| (part, at))) {
            let mut qkv = [1, 2, 3].map(|seed| cases::randoms(ROWS * DIM, seed));
            qkv[part][at * DIM + 3] = f32::NAN;
            let [q, k, v] = qkv;
            let mut kv = KvSlab::new(shape, ty);
            kv.write(&Pool::new(1), &k, &v, &(0..ROWS as u32).collect::<Vec<_>>());
            let batch = AttentionBatch {
                cu_q: &[0, ROWS as u32],
                context_len: &[ROWS as u32],
                block_tables: &[&[0, 1]],
            };
            let sinks = with_sink.then_some(&sinks[..]);
            let params =
                AttentionParams { n_heads: 1, scale: 0.3, softcap: None, window: None, sinks };
            let mut out = vec![0.0; q.len()];
            attention(&Pool::new(1), isa, &q, &kv, &batch, &params, &mut out);
            for (row, out) in out.chunks_exact(DIM).enumerate() {
                let sees = if part == 0 { row == at } else { row >= at };
                let (all, any) = (out.iter().all(|x| x.is_nan()), out.iter().any(|x| x.is_nan()));
                let what = format!("{ty:?} {} {part} at {at}, row {row}", isa.name());
                assert_eq!((all, any), (sees, sees), "{what}: {out:?}");
            }
        }
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
