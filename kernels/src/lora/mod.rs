//! Low-rank updates of some rows: `y[r] += weight * B (A x[r])`, the rows of each adapter in a
//! group of their own.
//!
//! Two steps. *Shrink* makes `h = weight * A x`, as long as the rank; *expand* adds `B h` to the
//! row. Both walk the adapters' numbers once for up to four rows of a group, so prompts of one
//! adapter share them, and both cut their work for threads by ranks and by columns, so a single row
//! keeps all threads busy.
//!
//! # Contract
//! A row has the same bits whatever the other rows, their groups, the thread count and the
//! instruction set are: an element of `h` has sixteen partial sums over `k` that are added as a
//! tree; an element of `B h` is summed in order of the rank; parts of a group are added in their
//! order. A row that is in no group is not touched. Against f64 the update is within 2e-5 of the
//! largest for the sizes of real models.
//!
//! Deliberately absent: which request wants which adapter, and tensors.

mod factors;
mod steps;

#[cfg(test)]
mod tests;

use std::ops::Range;

pub use factors::{Factors, Float};

use self::factors::{COLUMNS, Elements};
use self::steps::{Expand, Shrink};
use crate::parts::Parts;
use crate::simd::run;
use crate::{Isa, Pool};

/// One adapter for the rows of a group.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// A and B.
    pub factors: &'a Factors,
    /// Multiplies the update.
    pub weight: f32,
    /// Multiplies each output of the update. `[n]`
    pub ratio: Option<&'a [f32]>,
}

/// Rows that run with the same adapters.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// Rows of the batch, each in one group at most.
    pub rows: &'a [u32],
    /// Added to the rows before everything else: `gain * y`. `[n]`
    pub gain: Option<&'a [f32]>,
    /// In the order in which they are added.
    pub parts: Vec<Part<'a>>,
}

/// What the updates are of.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// x. `[m, k]`
    Rows(&'a [f32]),
    /// Every row is the unit vector of an id: A is looked up instead of multiplied. `[m]`
    Ids(&'a [u32]),
}

/// The groups of one projection.
#[derive(Debug)]
pub struct Update<'a> {
    /// What goes in.
    pub input: Input<'a>,
    /// The output so far. `[m, n]`
    pub y: &'a mut [f32],
    /// Disjoint.
    pub groups: &'a [Group<'a>],
}

/// Updates several projections in two runs of the pool (q, k and v; gate and up).
///
/// # Panics
/// If a slice has another length than its shape, a row is beyond `y`, or an id beyond A.
pub fn add(pool: &Pool, updates: &mut [Update<'_>]) {
    add_with(Isa::best(), pool, updates);
}

/// [`add`] with a chosen instruction set.
pub fn add_with(isa: Isa, pool: &Pool, updates: &mut [Update<'_>]) {
    updates.iter().for_each(check);
    let mut jobs = Vec::new();
    let mut h_len = 0;
    for (update, u) in updates.iter().enumerate() {
        for (group, g) in u.groups.iter().enumerate() {
            for (part, p) in g.parts.iter().enumerate() {
                jobs.push(Job { update, group, part, start: h_len });
                h_len += g.rows.len() * p.factors.rank();
            }
        }
    }
    let mut h = vec![0.0; h_len];
    shrink(isa, pool, updates, &jobs, &mut h);
    expand(isa, pool, updates, &jobs, &h);
}

/// One part of one group, and where its `h` begins: `[rows, rank]`.
struct Job {
    update: usize,
    group: usize,
    part: usize,
    start: usize,
}

/// Rows and ranks of one task.
const SHRINK_ROWS: usize = 32;
const SHRINK_RANKS: usize = 8;

fn shrink(isa: Isa, pool: &Pool, updates: &[Update<'_>], jobs: &[Job], h: &mut [f32]) {
    let mut tasks: Vec<(&Job, Range<usize>, Range<usize>)> = Vec::new();
    for job in jobs {
        let group = &updates[job.update].groups[job.group];
        let (rows, rank) = (group.rows.len(), group.parts[job.part].factors.rank());
        for row in (0..rows).step_by(SHRINK_ROWS) {
            for r in (0..rank).step_by(SHRINK_RANKS) {
                let rows = row..rows.min(row + SHRINK_ROWS);
                tasks.push((job, rows, r..rank.min(r + SHRINK_RANKS)));
            }
        }
    }
    let h = Parts::new(h);
    pool.run(tasks.len(), &|task| {
        let (job, rows, ranks) = &tasks[task];
        let update = &updates[job.update];
        let group = &update.groups[job.group];
        let part = &group.parts[job.part];
        let start = job.start + rows.start * part.factors.rank();
        let rows = &group.rows[rows.clone()];
        let ids = match update.input {
            Input::Rows(x) => {
                macro_rules! shrink {
                    ($a:expr) => {{
                        let factors = part.factors;
                        let (ranks, weight) = (ranks.clone(), part.weight);
                        run(isa, Shrink { x, rows, factors, a: $a, ranks, weight, h: &h, start })
                    }};
                }
                match part.factors.a() {
                    Elements::F32(a) => shrink!(&a[..]),
                    Elements::F16(a) => shrink!(&a[..]),
                    Elements::BF16(a) => shrink!(&a[..]),
                }
                return;
            }
            Input::Ids(ids) => ids,
        };
        for (i, &row) in rows.iter().enumerate() {
            let start = start + i * part.factors.rank();
            // SAFETY: rows and ranks of the tasks do not overlap.
            let out = unsafe { h.take(start + ranks.start..start + ranks.end) };
            for (out, rank) in out.iter_mut().zip(ranks.clone()) {
                *out = part.weight * part.factors.looked_up(ids[row as usize], rank);
            }
        }
    });
}

fn expand(isa: Isa, pool: &Pool, updates: &mut [Update<'_>], jobs: &[Job], h: &[f32]) {
    // Multiplications worth the trip to another thread.
    const WORK: usize = 1 << 15;
    let mut tasks: Vec<(usize, Range<usize>)> = Vec::new();
    for (index, update) in updates.iter().enumerate() {
        let Some(n) = width(update) else { continue };
        let ranks = |g: &Group<'_>| 1 + g.parts.iter().map(|p| p.factors.rank()).sum::<usize>();
        let tile: usize = update.groups.iter().map(|g| g.rows.len() * ranks(g) * COLUMNS).sum();
        let (tiles, each) = (n.div_ceil(COLUMNS), (WORK / tile.max(1)).max(1));
        let starts = (0..tiles).step_by(each);
        tasks.extend(starts.map(|first| (index, first..tiles.min(first + each))));
    }
    let (ys, groups): (Vec<Parts<'_, f32>>, Vec<&[Group<'_>]>) =
        updates.iter_mut().map(|u| (Parts::new(&mut *u.y), u.groups)).unzip();
    pool.run(tasks.len(), &|task| {
        let (index, tiles) = &tasks[task];
        let own = |job: &&Job| job.update == *index;
        let y = &ys[*index];
        for (number, group) in groups[*index].iter().enumerate() {
            if let Some(gain) = group.gain {
                run(isa, steps::Gain { rows: group.rows, gain, tiles: tiles.clone(), y });
            }
            for job in jobs.iter().filter(own).filter(|job| job.group == number) {
                let part = &group.parts[job.part];
                let h = &h[job.start..][..group.rows.len() * part.factors.rank()];
                macro_rules! expand {
                    ($b:expr) => {{
                        let (rows, tiles) = (group.rows, tiles.clone());
                        run(isa, Expand { rows, part, b: $b, h, tiles, y })
                    }};
                }
                match part.factors.b() {
                    Elements::F32(b) => expand!(&b[..]),
                    Elements::F16(b) => expand!(&b[..]),
                    Elements::BF16(b) => expand!(&b[..]),
                }
            }
        }
    });
}

/// Outputs of a projection, as its groups have it; `None` where nothing is to do.
fn width(update: &Update<'_>) -> Option<usize> {
    let some = update.groups.iter().find(|g| !g.rows.is_empty())?;
    some.gain.map(<[f32]>::len).or_else(|| some.parts.first().map(|p| p.factors.n()))
}

fn check(update: &Update<'_>) {
    let Some(n) = width(update) else { return };
    assert!(n > 0 && update.y.len().is_multiple_of(n), "y is [m, n]");
    let m = update.y.len() / n;
    for group in update.groups {
        assert!(group.rows.iter().all(|&row| (row as usize) < m), "a row beyond y");
        assert!(group.gain.is_none_or(|gain| gain.len() == n), "gain is [n]");
        for part in &group.parts {
            let factors = part.factors;
            assert_eq!(factors.n(), n, "B is [n, rank]");
            assert!(part.ratio.is_none_or(|ratio| ratio.len() == n), "ratio is [n]");
            match update.input {
                Input::Rows(x) => {
                    assert!(!factors.is_table(), "A of ids");
                    assert_eq!(x.len(), m * factors.k(), "x is [m, k]");
                }
                Input::Ids(ids) => {
                    assert!(factors.is_table(), "A of rows");
                    assert_eq!(ids.len(), m, "ids are [m]");
                    let known = |&row: &u32| (ids[row as usize] as usize) < factors.k();
                    assert!(group.rows.iter().all(known), "an id beyond A");
                }
            }
        }
    }
    let mut rows: Vec<u32> = update.groups.iter().flat_map(|g| g.rows).copied().collect();
    rows.sort_unstable();
    assert!(rows.windows(2).all(|two| two[0] < two[1]), "a row in two groups");
}
