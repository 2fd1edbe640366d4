//! Low-rank updates of some rows (`cuda/lora.cu`): the groups of `crate::lora`, on the device.

use std::ffi::c_void;

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

    /// Updates several projections of one input: each group's rows first get `gain * y`, then what
    /// its adapters make of the input, in order. Groups of one projection have different rows.
    pub fn add_lora(&self, input: LoraInput<'_>, groups: &[LoraGroup<'_>]) -> Result<()> {
        for group in groups {
            group.check(&input)?;
            self.gain(group)?;
        }
        let depth = groups.iter().map(|group| group.parts.len()).max().unwrap_or(0);
        for part in 0..depth {
            let mut jobs = Vec::new();
            for group in groups.iter().filter(|group| !group.rows.is_empty()) {
                let Some(part) = group.parts.get(part) else { continue };
                let h = self.rows(group.rows.len(), part.rank, Float::F32)?;
                jobs.push((Job::new(group, part, self.list(group.rows)?, &h), h));
            }
            for float in [Float::BF16, Float::F32] {
                let alike = jobs.iter().map(|(job, _)| *job).filter(|job| job.float == float);
                for jobs in alike.collect::<Vec<_>>().chunks(MAX_JOBS) {
                    self.shrink(&input, jobs)?;
                    self.expand(jobs, float)?;
                }
            }
        }
        Ok(())
    }

    fn gain(&self, group: &LoraGroup<'_>) -> Result<()> {
        let Some(gain) = group.gain else { return Ok(()) };
        let (count, n) = (group.rows.len(), group.y.width);
        let wide = i32::from(group.y.float == Float::F32);
        let list = self.list(group.rows)?;
        let args = [group.y.at(), list, count.into(), n.into(), gain.at(), wide.into()];
        let grid = Grid::new((count * n).div_ceil(256).min(4096), 256);
        // SAFETY: rows and widths as `check` found them.
        unsafe { self.launch("lora_gain", grid, &args) }
    }

    fn shrink(&self, input: &LoraInput<'_>, jobs: &[Job]) -> Result<()> {
        let (count, rank) = (most(jobs, 0), most(jobs, 1));
        let narrow;
        let (name, grid, mut first) = match input {
            LoraInput::Rows(x) => {
                narrow = self.as_bf16(x)?;
                let grid = (rank.div_ceil(16), count.div_ceil(16), jobs.len());
                ("lora_shrink", Grid::of(grid, 256, 0), narrow.as_ref().unwrap_or(x).at())
            }
            LoraInput::Ids(ids) => {
                let blocks = (count * rank).div_ceil(256).clamp(1, 1024);
                ("lora_shrink_ids", Grid::of((blocks, 1, jobs.len()), 256, 0), self.ids(ids)?)
            }
        };
        let (mut k, mut table) = (jobs[0].k, Table::of(jobs));
        let mut params = [
            std::ptr::from_mut(&mut first).cast::<c_void>(),
            std::ptr::from_mut(&mut k).cast(),
            std::ptr::from_mut(&mut table).cast(),
        ];
        // SAFETY: the arguments of both kernels; the jobs are of checked groups.
        unsafe { self.launch_with(name, grid, &mut params) }
    }

    fn expand(&self, jobs: &[Job], float: Float) -> Result<()> {
        let (count, n) = (most(jobs, 0), most(jobs, 2));
        let grid = Grid::of((n.div_ceil(128), count.div_ceil(8), jobs.len()), 128, 0);
        let (mut table, mut wide) = (Table::of(jobs), i32::from(float == Float::F32));
        let mut params =
            [std::ptr::from_mut(&mut table).cast::<c_void>(), std::ptr::from_mut(&mut wide).cast()];
        // SAFETY: the arguments of the kernel; the jobs are of checked groups.
        unsafe { self.launch_with("lora_expand", grid, &mut params) }
    }
}

/// Rows that run with the same adapters, in one projection.
pub struct LoraGroup<'a> {
    /// The output so far. `[m, n]`
    pub y: &'a Rows,
    /// Rows of it.
    pub rows: &'a [u32],
    /// Added before everything else: `gain * y`. `[n]`
    pub gain: Option<&'a Vector>,
    /// In the order in which they are added.
    pub parts: &'a [LoraPart],
}

impl LoraGroup<'_> {
    fn check(&self, input: &LoraInput<'_>) -> Result<()> {
        let (n, rows) = (self.y.width, self.y.count);
        let (inputs, fits): (usize, &dyn Fn(&LoraPart) -> bool) = match input {
            LoraInput::Rows(x) => (x.count, &|part| x.width == part.k),
            LoraInput::Ids(ids) => {
                (ids.len(), &|part| ids.iter().all(|&id| (id as usize) < part.k))
            }
        };
        let there = self.rows.iter().all(|&row| (row as usize) < rows.min(inputs));
        let wide = self.parts.iter().all(|part| part.n == n && fits(part));
        match there && wide && self.gain.is_none_or(|gain| gain.len() == n) {
            true => Ok(()),
            false => Err(Error::Missing("updates of the rows and widths given".into())),
        }
    }
}

/// One part of one group.
#[derive(Clone, Copy)]
struct Job {
    of_table: TableJob,
    float: Float,
    k: i32,
}

impl Job {
    fn new(group: &LoraGroup<'_>, part: &LoraPart, rows: Arg, h: &Rows) -> Self {
        let int = |size: usize| i32::try_from(size).expect("a size that a kernel can count");
        let ratio = part.ratio.as_ref().map_or(Arg::NULL, Vector::at);
        let of_table = TableJob {
            places: [part.a.at(0).into(), part.b.at(0).into(), ratio, rows, h.at(), group.y.at()],
            sizes: [group.rows.len(), part.rank, part.n].map(int),
            scale: part.scale,
        };
        Self { of_table, float: group.y.float, k: int(part.k) }
    }
}

/// The largest of one of the sizes.
fn most(jobs: &[Job], size: usize) -> usize {
    jobs.iter().map(|job| job.of_table.sizes[size] as usize).max().unwrap_or(0)
}

/// Jobs of one launch; as many as `MAX_JOBS` in `cuda/lora.cu`.
const MAX_JOBS: usize = 32;

/// `LoraJobs` of `cuda/lora.cu`.
#[repr(C)]
struct Table([TableJob; MAX_JOBS]);

/// `LoraJob` of `cuda/lora.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct TableJob {
    /// A, B, ratio, rows, h, y.
    places: [Arg; 6],
    /// Rows, rank, outputs.
    sizes: [i32; 3],
    scale: f32,
}

impl Table {
    fn of(jobs: &[Job]) -> Self {
        let none = TableJob { places: [Arg::NULL; 6], sizes: [0; 3], scale: 0.0 };
        Self(std::array::from_fn(|i| jobs.get(i).map_or(none, |job| job.of_table)))
    }
}
