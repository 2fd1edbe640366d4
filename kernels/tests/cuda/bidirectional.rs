//! Attention of encoders.

use hearth_kernels::Isa;
use hearth_kernels::attention::{Heads, bidirectional};
use hearth_kernels::cuda::Float;

use crate::report::{POOL, Tolerance, narrow, on_gpu};

/// Weights and output are rounded to bf16.
const BOTH: Tolerance = Tolerance { norm: 4e-3, each: 3e-2 };

#[test]
fn encoders() {
    const LENS: &[&[usize]] =
        &[&[1], &[5, 1, 128], &[129, 0, 64, 63, 65], &[300, 2, 17], &[512], &[127, 127]];
    on_gpu("bidirectional", |gpu, report| {
        for [count, dim] in [[2, 64], [12, 64], [3, 128], [12, 32], [5, 80], [2, 256], [3, 16]] {
            for (i, lens) in LENS.iter().enumerate() {
                let mut cu_q = vec![0u32];
                cu_q.extend(lens.iter().scan(0, |end, &len| {
                    *end += len as u32;
                    Some(*end)
                }));
                let rows: usize = lens.iter().sum();
                let some = |seed: u64| narrow(rows * count * dim, 10 * i as u64 + seed);
                let [q, k, v] = [some(1), some(2), some(3)];
                let scale = 2.0 / (dim as f32).sqrt();
                let heads = Heads { count, dim, scale };
                let mut want = vec![0.0; q.len()];
                bidirectional(&POOL, Isa::best(), [&q, &k, &v], &cu_q, &heads, &mut want);
                report.near(&format!("{count} heads of {dim}, {lens:?}"), BOTH, &want, || {
                    let rows = |x: &[f32]| gpu.rows_from(x, rows, Float::BF16);
                    let (q, k, v) = (rows(&q)?, rows(&k)?, rows(&v)?);
                    gpu.read(gpu.bidirectional([&q, &k, &v], &cu_q, (count, dim), scale)?)
                });
            }
        }
    });
}
