//! Lengths of the rows of `W + scale * B A`, W as the model computes with it: quantised or not.
//!
//! Sums are in f64 and in a fixed order, whatever the number of threads.

use std::sync::Mutex;

use hearth_kernels::Pool;
use hearth_kernels::matmul::Rows;
use hearth_kernels::quant;

use crate::Result;
use crate::open::ModelFile;
use crate::weights::{MatrixSource, Role};

/// Rows of W to a task.
const ROWS: usize = 64;

/// `a` is `[rank, k]`, `b` is `[n, rank]`. Of an embedding, whose outputs are its columns, the
/// lengths of those. `[n]`
pub(super) fn lengths(
    base: &ModelFile,
    role: Role,
    scale: f32,
    rank: usize,
    a: &[f32],
    b: &[f32],
    pool: &Pool,
) -> Result<Vec<f32>> {
    let stored = match role {
        Role::Head if base.config().tied => Role::Embedding,
        _ => role,
    };
    let squares = base.matrix(stored, |source| {
        Ok(match role {
            // Row v of the table is updated by column v of A.
            Role::Embedding => {
                let ids = source.n;
                let left: Vec<f32> =
                    (0..rank * ids).map(|i| a[i % rank * ids + i / rank]).collect();
                let right: Vec<f32> = (0..rank * source.k).map(|i| turned(b, rank, i)).collect();
                columns(source, scale, rank, &left, &right, pool)
            }
            _ => rows(source, scale, rank, b, a, pool),
        })
    })?;
    Ok(squares.into_iter().map(|square| square.sqrt() as f32).collect())
}

/// Element `i` of the transpose of `b [_, rank]`.
fn turned(b: &[f32], rank: usize, i: usize) -> f32 {
    let n = b.len() / rank;
    b[i % n * rank + i / n]
}

/// Squares of the lengths of rows; `left` is `[n, rank]`, `right` is `[rank, k]`.
fn rows(
    source: &MatrixSource<'_>,
    scale: f32,
    rank: usize,
    left: &[f32],
    right: &[f32],
    pool: &Pool,
) -> Vec<f64> {
    let mut out = vec![0.0; source.n];
    let parts: Vec<Mutex<&mut [f64]>> = out.chunks_mut(ROWS).map(Mutex::new).collect();
    pool.run(parts.len(), &|task| {
        let mut part = parts[task].lock().expect("one task a part; this is a bug");
        for (i, out) in part.iter_mut().enumerate() {
            let row = updated(source, task * ROWS + i, scale, rank, left, right);
            *out = row.iter().map(|x| x * x).sum();
        }
    });
    drop(parts);
    out
}

/// The same of columns.
fn columns(
    source: &MatrixSource<'_>,
    scale: f32,
    rank: usize,
    left: &[f32],
    right: &[f32],
    pool: &Pool,
) -> Vec<f64> {
    let tasks = source.n.div_ceil(ROWS);
    let parts: Vec<Mutex<Vec<f64>>> = (0..tasks).map(|_| Mutex::default()).collect();
    pool.run(tasks, &|task| {
        let mut sums = vec![0.0; source.k];
        for row in task * ROWS..source.n.min((task + 1) * ROWS) {
            let row = updated(source, row, scale, rank, left, right);
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
        }
        *parts[task].lock().expect("one task a part; this is a bug") = sums;
    });
    let mut out = vec![0.0; source.k];
    for part in parts {
        let part = part.into_inner().expect("one task a part; this is a bug");
        out.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
    out
}

/// Row `row` of `W + scale * left right`.
fn updated(
    source: &MatrixSource<'_>,
    row: usize,
    scale: f32,
    rank: usize,
    left: &[f32],
    right: &[f32],
) -> Vec<f64> {
    let mut values = vec![0.0f32; source.k];
    quant::dequantize(source.dtype, &source.row(row), &mut values);
    let mut out: Vec<f64> = values.into_iter().map(f64::from).collect();
    for (r, right) in right.chunks_exact(source.k).enumerate() {
        let left = f64::from(scale) * f64::from(left[row * rank + r]);
        out.iter_mut().zip(right).for_each(|(x, right)| *x += left * f64::from(*right));
    }
    out
}
