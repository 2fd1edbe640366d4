//! Products of weights in blocks on the tensor cores: `cuda/quantized_wide.cu` for up to 32 rows,
//! `cuda/quantized_tall.cu` for more.

use super::gpu::Grid;
use super::linear::{Each, of_matrices};
use super::matrix::Names;
use super::{Gpu, Result, Rows};

/// Rows of a wide product at most. Fewer than nine are multiplied in bytes.
pub(super) const WIDE: usize = 32;
/// Rows of a tall product at most: with more it was faster to make the weights numbers first.
pub(super) const TALL: usize = 128;
/// Elements of k that a block takes at once.
const STEP: usize = 256;
/// What a wave of blocks takes beside its steps, in steps.
const WAVE: usize = 2;

/// How the kernel for some rows is launched.
pub(super) struct Shape {
    name: &'static str,
    /// Rows of x of a block, and of W.
    rows: [usize; 2],
    shared: usize,
}

impl Gpu {
    /// The kernel for so many rows, if there is one and the device has the shared memory for it.
    pub(super) fn tensor_shape(&self, names: &Names, count: usize) -> Option<Shape> {
        let wide = |i: usize, x: usize| {
            let shared = 3 * (64 * names.slots[0] + 512 * x) + 128 * 64;
            Shape { name: names.wide[i], rows: [x, 64], shared }
        };
        let tall = |i: usize, x: usize| {
            let scales = if names.one_pair { 8192 } else { 16384 };
            let shared = 1024 + 2 * (512 * x + 128 * names.slots[1]) + scales;
            Shape { name: names.tall[i], rows: [x, 128], shared }
        };
        let shape = match count {
            ..=16 => wide(0, 16),
            17..=WIDE => wide(1, 32),
            _ if count > self.tall_rows => return None,
            _ if count <= 64 => tall(0, 64),
            _ => tall(1, 128),
        };
        (shape.shared <= self.shared_most).then_some(shape)
    }

    /// Weights of one format, read once for the rows of a block.
    pub(super) fn tensor_rows(&self, x: &Rows, shape: &Shape, each: &[Each<'_>]) -> Result<()> {
        let narrow = self.as_bf16(x)?;
        let [of_x, of_w] = shape.rows;
        let blocks: usize = each.iter().map(|(w, _, _)| w.n.div_ceil(of_w)).sum();
        // The kernel for 64 rows and that for 128 share k alike.
        let at_once = if of_w == 64 { 2 * self.processors } else { self.processors };
        let splits = splits(blocks, x.width.div_ceil(STEP), at_once);
        let sums = if splits > 1 { splits * x.count * blocks * of_w } else { 0 };
        let parts = self.arena.take(4 * sums)?;
        let mut args = vec![narrow.as_ref().unwrap_or(x).at()];
        args.extend(of_matrices(x, [0, x.count], each));
        args.insert(3, parts.at(0).into());
        let grid = (blocks, splits, x.count.div_ceil(of_x));
        // SAFETY: the contract of the kernel; shapes were compared by `linear`, and there is room
        // for the parts of all sums.
        unsafe { self.launch(shape.name, Grid::of(grid, 256, shape.shared as u32), &args)? };
        if splits == 1 {
            return Ok(());
        }
        let mut args = vec![parts.at(0).into(), splits.into(), of_w.into(), x.count.into()];
        args.extend(of_matrices(x, [0, x.count], each).into_iter().skip(2));
        let grid = ((blocks * of_w).div_ceil(128), x.count.div_ceil(8), 1);
        // SAFETY: as above.
        unsafe { self.launch("linear_sum", Grid::of(grid, 256, 0), &args) }
    }
}

/// How many blocks share k: as many as make the waves of blocks short. It depends on the weights
/// alone, so that the bits of a row do not change with the others.
fn splits(blocks: usize, steps: usize, at_once: usize) -> usize {
    let each = |splits: usize| steps.div_ceil(splits);
    let cost = |splits: usize| (blocks * splits).div_ceil(at_once) * (each(splits) + WAVE);
    // None without a step.
    let all = (1..=8).filter(|&splits| (splits - 1) * each(splits) < steps);
    all.min_by_key(|&splits| cost(splits)).unwrap_or(1)
}
