//! `y = x Wᵀ`: every weight format, every shape, packed once.
//!
//! [`Packed`] is W in the kernel layout (`layout.rs` draws it), [`Activations`] is x as the weights
//! want it, and [`matmul`] does both steps. Quantised weights meet activations in 8 bits: products
//! are integers within a block, floats across blocks. Weights in bf16 meet activations in bf16,
//! which some processors multiply twice as fast as f32.
//!
//! # Contract
//! A row of y has the same bits whatever `m`, the other rows, the thread count and the instruction
//! set are: the tolerance between versions is zero, but for products of bf16 with numbers below
//! 2^-126, which an instruction takes for zeros. `scalar.rs` states the order of the sums. What may
//! depend on the machine beside is only how the work is cut.
//!
//! Deliberately absent: bias, activation functions, LoRA, and tensors.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod brain;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod float;
mod layout;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed;
mod scalar;

use std::ops::Range;

pub use activations::{ActivationBuffers, ActivationKind, Activations};
pub use packed::{Packed, Rows};

use crate::{Isa, Pool};
use activations::in_pairs;
#[cfg(target_arch = "x86_64")]
use avx2::{FOURS, PAIRS};
use layout::{COLUMNS, Storage};
#[cfg(target_arch = "aarch64")]
use neon::{DOT, MATRIX, PLAIN};

/// Rows of x that are computed together: their sums stay in the first cache.
const ROWS_MAX: usize = 64;
/// Length of a partial sum over float weights.
const FLOAT_CHUNK: usize = 256;

impl Packed {
    /// The form in which this matrix wants its input.
    pub fn activation_kind(&self) -> ActivationKind {
        match self.storage {
            Storage::F32 | Storage::F16 => ActivationKind::Float,
            Storage::BF16 => ActivationKind::Brain,
            Storage::Blocks(_) => ActivationKind::Block32,
            Storage::Supers(_) => ActivationKind::Block256,
        }
    }
}

/// `y = x Wᵀ`: `x` is `[m, k]`, `y` is `[m, n]`, W is `w`.
///
/// # Panics
/// If a slice has another length than its shape.
pub fn matmul(pool: &Pool, x: &[f32], m: usize, w: &Packed, y: &mut [f32]) {
    matmul_isa(Isa::best(), pool, x, m, w, y);
}

/// [`matmul`] with a given instruction set, for tests and benches.
pub fn matmul_isa(isa: Isa, pool: &Pool, x: &[f32], m: usize, w: &Packed, y: &mut [f32]) {
    let memory = ActivationBuffers::default();
    let acts = Activations::with_isa(isa, memory, pool, x, m, w.k(), w.activation_kind());
    products_isa(isa, pool, [Product { acts: &acts, w, y }]);
}

/// [`matmul`] with an input that is prepared: `y` is `[acts.m(), n]`.
///
/// # Panics
/// If the input has another width or kind than `w` wants, or `y` another length.
pub fn matmul_prepared(pool: &Pool, acts: &Activations, w: &Packed, y: &mut [f32]) {
    products(pool, [Product { acts, w, y }]);
}

/// One of several products that are computed together.
pub struct Product<'a> {
    /// x
    pub acts: &'a Activations<'a>,
    /// W
    pub w: &'a Packed,
    /// `[acts.m(), n]`
    pub y: &'a mut [f32],
}

/// Several products in one run of the pool: threads wait for each other once (q, k and v; gate and
/// up).
///
/// # Panics
/// As [`matmul_prepared`].
pub fn products<const N: usize>(pool: &Pool, products: [Product<'_>; N]) {
    products_isa(Isa::best(), pool, products);
}

/// A product in which each run of rows meets a matrix of its own: those of its expert.
pub struct Grouped<'a> {
    /// x
    pub acts: &'a Activations<'a>,
    /// Runs of rows, ascending, and their W, all of one shape.
    pub groups: &'a [(Range<usize>, &'a Packed)],
    /// `[acts.m(), n]`; rows of no run are not written.
    pub y: &'a mut [f32],
}

/// Several of them in one run of the pool.
///
/// # Panics
/// As [`matmul_prepared`], or if runs overlap or reach beyond the input.
pub fn grouped<const N: usize>(pool: &Pool, products: [Grouped<'_>; N]) {
    grouped_isa(Isa::best(), pool, products);
}

fn grouped_isa<const N: usize>(isa: Isa, pool: &Pool, products: [Grouped<'_>; N]) {
    let tiles = |w: &Packed| w.n().div_ceil(COLUMNS);
    let all_tiles: usize =
        products.iter().flat_map(|p| p.groups.iter().map(|(_, w)| tiles(w))).sum();
    let mut jobs = Vec::new();
    for Grouped { acts, groups, y } in products {
        let (mut end, y_len, y) = (0, y.len(), y.as_mut_ptr());
        for (rows, w) in groups {
            check(isa, acts, w, y_len);
            let ascending = end <= rows.start && rows.start <= rows.end && rows.end <= acts.m();
            assert!(ascending, "runs of rows, ascending");
            end = rows.end;
            let cut = Cut::new(rows.len(), tiles(w), all_tiles, pool.threads());
            jobs.push((Job { w, acts, y: Shared(y) }, Cut { first: rows.start, ..cut }));
        }
    }
    run_jobs(isa, pool, &jobs);
}

/// Input and output of a product, against its matrix.
fn check(isa: Isa, acts: &Activations<'_>, w: &Packed, y_len: usize) {
    assert_eq!(acts.kind(), w.activation_kind(), "kind of the input");
    assert_eq!(acts.in_pairs, in_pairs(isa, acts.kind()), "form of the input");
    assert_eq!(acts.k(), w.k(), "width of the input");
    assert_eq!(Some(y_len), acts.m().checked_mul(w.n()), "elements of y");
}

fn products_isa<const N: usize>(isa: Isa, pool: &Pool, products: [Product<'_>; N]) {
    let all_tiles: usize = products.iter().map(|p| p.w.n().div_ceil(COLUMNS)).sum();
    let jobs = products.map(|Product { acts, w, y }| {
        check(isa, acts, w, y.len());
        let cut = Cut::new(acts.m(), w.n().div_ceil(COLUMNS), all_tiles, pool.threads());
        (Job { w, acts, y: Shared(y.as_mut_ptr()) }, cut)
    });
    run_jobs(isa, pool, &jobs);
}

fn run_jobs(isa: Isa, pool: &Pool, jobs: &[(Job<'_>, Cut)]) {
    assert!(Isa::available().contains(&isa), "{} on this processor", isa.name());
    pool.run(jobs.iter().map(|(_, cut)| cut.tasks()).sum(), &|mut task| {
        for (job, cut) in jobs {
            match task.checked_sub(cut.tasks()) {
                Some(beyond) => task = beyond,
                None => return run_task(isa, job, cut, task),
            }
        }
    });
}

fn run_task(isa: Isa, job: &Job, cut: &Cut, task: usize) {
    let (tiles, rows) = cut.task(task);
    let four = (Cut::TILES * job.w.tile(0).len()).max(1);
    let together = Cut::TILES * (Cut::TILE_BYTES / four).max(1);
    for first in tiles.clone().step_by(together) {
        let tiles = first..tiles.end.min(first + together);
        for first in rows.clone().step_by(ROWS_MAX) {
            let rows = first..rows.end.min(first + ROWS_MAX);
            run(isa, job, tiles.clone(), rows);
        }
    }
}

/// One product, as the kernels see it. Kernels write the columns and rows that they are given.
struct Job<'a> {
    w: &'a Packed,
    acts: &'a Activations<'a>,
    /// (m, n)
    y: Shared<f32>,
}

fn run(isa: Isa, job: &Job, tiles: Range<usize>, rows: Range<usize>) {
    match (isa, job.w.activation_kind()) {
        (Isa::Scalar, _) => scalar::run(job, tiles, rows),
        // SAFETY: the instruction set was checked, tiles and rows come from the job's own cut, in
        // which no two tasks share a column of a row; jobs of one y have rows of their own
        // (`grouped_isa` asserts it).
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, ActivationKind::Brain) => unsafe { avx512::pairs(job, tiles, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, _) => unsafe { avx512::run(job, tiles, rows) },
        // SAFETY: as above.
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        (_, ActivationKind::Float | ActivationKind::Brain) => unsafe {
            float::run(isa, job, tiles, rows);
        },
        // SAFETY: as above; the products are those of the instruction set.
        #[cfg(target_arch = "x86_64")]
        (Isa::AvxVnni, _) => unsafe { avx2::run::<FOURS>(job, tiles, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => unsafe { avx2::run::<PAIRS>(job, tiles, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        (Isa::NeonI8mm, _) => unsafe { neon::run::<DOT, MATRIX>(job, tiles, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        (Isa::NeonDot, _) => unsafe { neon::run::<DOT, DOT>(job, tiles, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon, _) => unsafe { neon::run::<PLAIN, PLAIN>(job, tiles, rows) },
        _ => unreachable!("not on this architecture; this is a bug"),
    }
}

/// How a product is cut into tasks: by tiles, and by rows too when there are few tiles.
struct Cut {
    /// The first row.
    first: usize,
    m: usize,
    tiles: usize,
    /// Per task.
    tiles_each: usize,
    rows_each: usize,
}

impl Cut {
    /// Tiles of a task, and those that a kernel is given at once, come in whole multiples of this:
    /// kernels of floats take several side by side.
    const TILES: usize = 4;
    /// Bytes of the tiles that a kernel is given at once, where [`Cut::TILES`] are no more: they
    /// stay in the second cache, and so do those rows, while the more they are, the less often all
    /// rows are read.
    const TILE_BYTES: usize = 256 << 10;
    /// Tasks per thread, so that a thread that is interrupted does not hold up the others.
    const TASKS_PER_THREAD: usize = 8;
    /// Fewer of a single row, where each is a stream from memory that has to get going.
    const TASKS_OF_ONE_ROW: usize = 4;

    /// A product of `tiles` of the `all_tiles` that one run computes.
    fn new(m: usize, tiles: usize, all_tiles: usize, threads: usize) -> Cut {
        let each = if m == 1 { Cut::TASKS_OF_ONE_ROW } else { Cut::TASKS_PER_THREAD };
        let wanted = if threads == 1 { 1 } else { threads * each };
        let tiles_each = all_tiles.div_ceil(wanted).next_multiple_of(Cut::TILES);
        let columns = all_tiles.div_ceil(tiles_each.max(1)).max(1);
        let rows_each = m.div_ceil(wanted.div_ceil(columns)).next_multiple_of(ROWS_MAX);
        Cut { first: 0, m, tiles, tiles_each, rows_each }
    }

    fn tasks(&self) -> usize {
        if self.m == 0 || self.tiles == 0 {
            return 0;
        }
        self.tiles.div_ceil(self.tiles_each) * self.m.div_ceil(self.rows_each)
    }

    fn task(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let row_cuts = self.m.div_ceil(self.rows_each);
        let (tile, row) = (task / row_cuts * self.tiles_each, task % row_cuts * self.rows_each);
        let tiles = tile..self.tiles.min(tile + self.tiles_each);
        let rows = row..self.m.min(row + self.rows_each);
        (tiles, self.first + rows.start..self.first + rows.end)
    }
}

/// A pointer that tasks share. Who dereferences it says why no two tasks touch the same element.
struct Shared<T>(*mut T);

// SAFETY: it is only an address; every use of it carries its own reason.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The element at `index`, which must lie within the array.
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

#[cfg(test)]
mod tests;
