//! The truth: what every version computes, bit by bit.
//!
//! Integers are exact in any order. Floats are accumulated in one order, one block after the other:
//!
//! ```text
//! block of 32    acc = fma(d * s, dot, acc)      dot = sum (code - offset) * q
//!   with minimum acc = fma(m * s, sum q, acc)    after the line above, dot = sum code * q
//! block of 256   acc = fma(d * s, isum, acc)     isum = sum_sub scale * sum (code - offset) * q
//!   with minimum acc = fma(-(dmin * s), msum, acc)       msum = sum_sub min * sum q
//! float          part = fma(x, w, part) over 256 weights; acc = acc + part
//!   bf16         the same, x rounded to bf16, of every two weights the second first
//! ```
//! The order of bf16 is that of `vdpbf16ps`, whose sums are these unless a weight or a sum is below
//! 2^-126: it takes those for zeros (of x, everybody does).
//!
//! (`d`, `m`, `dmin`, codes, scales: the weights'; `s`, `q`: scale and codes of x.)

use std::ops::Range;

use half::{bf16, f16};

use super::layout::{COLUMNS, Record, STEP, Storage};
use super::{ActivationKind, FLOAT_CHUNK, Job, ROWS_MAX};

/// Computes the columns of `tiles` for `rows` (at most [`ROWS_MAX`]).
pub(super) fn run(job: &Job, tiles: Range<usize>, rows: Range<usize>) {
    debug_assert!(rows.len() <= ROWS_MAX);
    for tile in tiles {
        let bytes = job.w.tile(tile);
        let mut acc = [[0.0; COLUMNS]; ROWS_MAX];
        let acc = &mut acc[..rows.len()];
        match &job.w.storage {
            Storage::F32 => float(job, &rows, acc, |i, column| {
                let at = 64 * i + 4 * column;
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }),
            storage @ (Storage::F16 | Storage::BF16) => float(job, &rows, acc, |i, column| {
                let at = storage.half_at(i, column);
                let two = [bytes[at], bytes[at + 1]];
                match storage {
                    Storage::F16 => f16::from_le_bytes(two).to_f32(),
                    _ => bf16::from_le_bytes(two).to_f32(),
                }
            }),
            Storage::Blocks(record) => blocks(job, record, bytes, &rows, acc),
            Storage::Supers(record) => supers(job, record, bytes, &rows, acc),
        }
        let first = tile * COLUMNS;
        let columns = COLUMNS.min(job.w.n() - first);
        for (row, acc) in rows.clone().zip(acc) {
            // SAFETY: the job promises that y has `m` rows of `n` elements and that nobody else
            // touches these columns of these rows.
            let y = unsafe {
                std::slice::from_raw_parts_mut(job.y.at(row * job.w.n() + first), columns)
            };
            y.copy_from_slice(&acc[..columns]);
        }
    }
}

fn float(
    job: &Job,
    rows: &Range<usize>,
    acc: &mut [[f32; COLUMNS]],
    weight: impl Fn(usize, usize) -> f32,
) {
    let (x, stride) = job.acts.floats();
    for from in (0..stride).step_by(FLOAT_CHUNK) {
        let mut part = [[0.0_f32; COLUMNS]; ROWS_MAX];
        for i in from..stride.min(from + FLOAT_CHUNK) {
            let i = if job.acts.kind == ActivationKind::Brain { i ^ 1 } else { i };
            let w: [f32; COLUMNS] = std::array::from_fn(|column| weight(i, column));
            for (row, part) in rows.clone().zip(&mut part) {
                let x = x[row * stride + i];
                for (part, w) in part.iter_mut().zip(w) {
                    *part = x.mul_add(w, *part);
                }
            }
        }
        for (acc, part) in acc.iter_mut().zip(&part) {
            for (acc, part) in acc.iter_mut().zip(part) {
                *acc += part;
            }
        }
    }
}

fn blocks(
    job: &Job,
    record: &Record,
    tile: &[u8],
    rows: &Range<usize>,
    acc: &mut [[f32; COLUMNS]],
) {
    for block in 0..job.acts.k / STEP {
        let bytes = &tile[block / record.steps * record.bytes..][..record.bytes];
        let step = block % record.steps;
        let groups = record.codes_of(record.step(bytes, step));
        let d_m: [_; COLUMNS] = std::array::from_fn(|column| record.d_m(bytes, step, column));
        for (row, acc) in rows.clone().zip(&mut *acc) {
            let at = block * job.acts.m + row;
            let (s, sum) = (job.acts.scales[at], job.acts.sums[at]);
            let dot = dots(&groups, &job.acts.codes[at * STEP..][..STEP]);
            for (column, acc) in acc.iter_mut().enumerate() {
                let (d, m) = d_m[column];
                let dot = dot[column] - record.codes.offset * sum;
                *acc = (d * s).mul_add(dot as f32, *acc);
                if record.codes.has_min {
                    *acc = (m * s).mul_add(sum as f32, *acc);
                }
            }
        }
    }
}

fn supers(
    job: &Job,
    record: &Record,
    tile: &[u8],
    rows: &Range<usize>,
    acc: &mut [[f32; COLUMNS]],
) {
    for (block, bytes) in tile.chunks_exact(record.bytes).enumerate() {
        let mut isum = [[0_i32; COLUMNS]; ROWS_MAX];
        let mut msum = [[0_i32; COLUMNS]; ROWS_MAX];
        let per_step = STEP / record.codes.sub; // sub-blocks
        for step in 0..record.steps {
            let groups = record.codes_of(record.step(bytes, step));
            for sub in 0..per_step {
                let groups = &groups[sub * 8 / per_step..(sub + 1) * 8 / per_step];
                let index = step * per_step + sub;
                let scales: [_; COLUMNS] =
                    std::array::from_fn(|column| record.scale_min(bytes, index, column));
                for (i, row) in rows.clone().enumerate() {
                    let at = (block * job.acts.m + row) * 256 + index * record.codes.sub;
                    let q = &job.acts.codes[at..at + record.codes.sub];
                    let sum: i32 = q.iter().map(|&q| i32::from(q)).sum();
                    let dot = dots(groups, q);
                    for (column, (scale, min)) in scales.iter().enumerate() {
                        let dot = dot[column] - record.codes.offset * sum;
                        isum[i][column] += i32::from(*scale) * dot;
                        msum[i][column] += i32::from(*min) * sum;
                    }
                }
            }
        }
        for (i, row) in rows.clone().enumerate() {
            let s = job.acts.scales[block * job.acts.m + row];
            for (column, acc) in acc[i].iter_mut().enumerate() {
                let (d, dmin) = record.d_m(bytes, 0, column);
                *acc = (d * s).mul_add(isum[i][column] as f32, *acc);
                if record.codes.has_min {
                    *acc = (-(dmin * s)).mul_add(msum[i][column] as f32, *acc);
                }
            }
        }
    }
}

/// Per column: the sum of code times q over the groups.
fn dots(groups: &[[u8; 64]], q: &[i8]) -> [i32; COLUMNS] {
    let mut dot = [0; COLUMNS];
    for (group, q) in groups.iter().zip(q.chunks_exact(4)) {
        for (dot, codes) in dot.iter_mut().zip(group.chunks_exact(4)) {
            for (&code, &q) in codes.iter().zip(q) {
                *dot += i32::from(code) * i32::from(q);
            }
        }
    }
    dot
}
