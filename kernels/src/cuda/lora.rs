//! Low-rank updates of some rows (`cuda/lora.cu`): the groups of `crate::lora`, on the device.

use half::bf16;

use super::gpu::{Arg, Grid};
use super::memory::Buffer;
use super::{Error, Float, Gpu, Result, Rows, Vector};
use crate::lora::Factors;

/// One adapter's update of one weight `[n, k]`, in bf16.
pub struct LoraPart {
    a: Buffer,
    b: Buffer,
    rank: usize,
    k: usize,
    n: usize,
    scale: f32,
    ratio: Option<Vector>,
}

/// What the updates are of.
#[derive(Clone, Copy)]
pub enum LoraInput<'a> {
    /// x. `[m, k]`
    Rows(&'a Rows),
    /// Every row is the unit vector of an id. `[m]`
    Ids(&'a [u32]),
}

/// The most that the kernel keeps of a row between A and B.
const MAX_RANK: usize = 512;

impl Gpu {
    /// Takes an update; `scale` multiplies `B A`, `ratio` each of its outputs.
    pub fn lora_part(
        &self,
        factors: &Factors,
        scale: f32,
        ratio: Option<&[f32]>,
    ) -> Result<LoraPart> {
        let (rank, k, n) = (factors.rank(), factors.k(), factors.n());
        if rank > MAX_RANK || (!factors.is_table() && !k.is_multiple_of(8)) {
            let what = format!("adapters of rank {MAX_RANK} at most, inputs in eights");
            return Err(Error::Missing(format!("on a GPU: {what}; this one has {rank} and {k}")));
        }
        let narrow =
            |values: Vec<f32>| -> Vec<bf16> { values.into_iter().map(bf16::from_f32).collect() };
        let (a, b) = (self.upload(&narrow(factors.to_a()))?, self.upload(&narrow(factors.to_b()))?);
        let ratio = ratio.map(|ratio| self.vector(ratio)).transpose()?;
        Ok(LoraPart { a, b, rank, k, n, scale, ratio })
    }

    /// Adds to the listed rows of `y` what the adapters of a group make of their inputs: first
    /// `gain * y`, then the updates in order.
    pub fn add_lora(
        &self,
        input: LoraInput<'_>,
        y: &Rows,
        rows: &[u32],
        gain: Option<&Vector>,
        parts: &[LoraPart],
    ) -> Result<()> {
        let fits = |part: &LoraPart| match input {
            LoraInput::Rows(x) => x.width == part.k && x.count == y.count && part.n == y.width,
            LoraInput::Ids(ids) => {
                let known = ids.iter().all(|&id| (id as usize) < part.k);
                known && ids.len() <= y.count && part.n == y.width
            }
        };
        let there = rows.iter().all(|&row| (row as usize) < y.count);
        if !there || !parts.iter().all(fits) || gain.is_some_and(|gain| gain.len() != y.width) {
            return Err(Error::Missing("updates of the rows and widths given".into()));
        }
        let list = self.list(rows)?;
        let (count, n) = (rows.len(), y.width);
        let wide = i32::from(y.float == Float::F32);
        if let Some(gain) = gain {
            let args = [y.at(), list, count.into(), n.into(), gain.at(), wide.into()];
            let grid = Grid::new((count * n).div_ceil(256).min(4096), 256);
            // SAFETY: rows and widths as checked above; so in the launches below.
            unsafe { self.launch("lora_gain", grid, &args)? };
        }
        for part in parts {
            let h = self.rows(count, part.rank, Float::F32)?;
            self.shrink(input, part, list, count, &h)?;
            let args = [
                y.at(),
                list,
                count.into(),
                n.into(),
                part.rank.into(),
                h.at(),
                part.b.at(0).into(),
                part.ratio.as_ref().map_or(Arg::NULL, Vector::at),
                part.scale.into(),
                wide.into(),
            ];
            let grid = Grid::of((n.div_ceil(128), count.div_ceil(8), 1), 128, 0);
            // SAFETY: see above.
            unsafe { self.launch("lora_expand", grid, &args)? };
        }
        Ok(())
    }

    fn shrink(
        &self,
        input: LoraInput<'_>,
        part: &LoraPart,
        list: Arg,
        count: usize,
        h: &Rows,
    ) -> Result<()> {
        let rest =
            [list, count.into(), part.k.into(), part.rank.into(), part.a.at(0).into(), h.at()];
        match input {
            LoraInput::Rows(x) => {
                let narrow = self.as_bf16(x)?;
                let mut args = vec![narrow.as_ref().unwrap_or(x).at()];
                args.extend(rest);
                let grid = Grid::of((part.rank.div_ceil(16), count.div_ceil(16), 1), 256, 0);
                // SAFETY: as in `add_lora`.
                unsafe { self.launch("lora_shrink", grid, &args) }
            }
            LoraInput::Ids(ids) => {
                let mut args = vec![self.list(ids)?];
                args.extend(rest);
                let grid = Grid::new((count * part.rank).div_ceil(256), 256);
                // SAFETY: as in `add_lora`.
                unsafe { self.launch("lora_shrink_ids", grid, &args) }
            }
        }
    }
}
