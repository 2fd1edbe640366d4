//! The one device that all tests share, and what a test says about its errors.

use std::sync::{LazyLock, Mutex, PoisonError};

use half::bf16;
use hearth_kernels::Pool;
use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{Error, Gpu, Result};

static GPU: LazyLock<std::result::Result<Mutex<Gpu>, String>> = LazyLock::new(|| {
    let gpu = Gpu::new(0).map_err(|error| error.to_string())?;
    println!("device: {}", gpu.name());
    Ok(Mutex::new(gpu))
});
/// Where the driver failed: nothing that is asked of the device after that means anything.
static LOST: Mutex<Option<String>> = Mutex::new(None);
/// Threads for the truth.
pub static POOL: LazyLock<Pool> =
    LazyLock::new(|| Pool::new(hearth_kernels::pool::default_threads()));

/// How far a result may be off.
#[derive(Clone, Copy)]
pub struct Tolerance {
    /// `||got - want|| / ||want||`
    pub norm: f64,
    /// The largest of `|got - want| / max(|want|, rms(want))`.
    pub each: f64,
}

impl Tolerance {
    pub const fn new(norm: f64) -> Self {
        Self { norm, each: 5.0 * norm }
    }
}

/// Arithmetic in f32, another order of sums.
pub const FLOATS: Tolerance = Tolerance::new(2e-5);
/// The same on tensor cores, which cut off what they add.
pub const TENSOR: Tolerance = Tolerance::new(1e-4);
/// The same with weights that become bf16 on their way: a few round to the neighbour.
pub const NARROWED: Tolerance = Tolerance::new(5e-4);
/// As [`FLOATS`], rounded to bf16 once: half a unit in the last place is at most 2^-8 = 3.9e-3 of a
/// number.
pub const ROUNDED: Tolerance = Tolerance { norm: 4e-3, each: 5e-3 };
/// Rounded twice, the second time after something small was added.
pub const TWICE: Tolerance = Tolerance { norm: 6e-3, each: 2e-2 };

/// Numbers that bf16 holds.
pub fn rounded(x: Vec<f32>) -> Vec<f32> {
    x.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
}

/// Random numbers in [-1, 1) that bf16 holds.
pub fn narrow(len: usize, seed: u64) -> Vec<f32> {
    rounded(randoms(len, seed))
}

/// Runs a test on the device, alone.
pub fn on_gpu(test: &str, work: impl FnOnce(&Gpu, &mut Report)) {
    let gpu = match &*GPU {
        Ok(gpu) => gpu.lock().unwrap_or_else(PoisonError::into_inner),
        Err(error) => {
            let wanted = std::env::var("HEARTH_GPU").is_ok_and(|value| value == "1");
            assert!(!wanted, "there is no GPU: {error}");
            println!("{test}: there is no GPU ({error})");
            return;
        }
    };
    let mut report = Report::new(test);
    let start = std::time::Instant::now();
    work(&gpu, &mut report);
    drop(gpu);
    report.finish(start.elapsed().as_secs_f32());
}

/// Cases of a test, and how far off they were.
pub struct Report {
    test: String,
    cases: usize,
    /// The worst, as a part of what is allowed.
    norm: (f64, String),
    each: (f64, String),
    failures: Vec<String>,
}

impl Report {
    fn new(test: &str) -> Self {
        let none = || (0.0, "none".to_owned());
        Self { test: test.into(), cases: 0, norm: none(), each: none(), failures: Vec::new() }
    }

    /// A result of the device, unless it failed.
    pub fn ask<T>(&mut self, case: &str, work: impl FnOnce() -> Result<T>) -> Option<T> {
        self.cases += 1;
        if let Some(place) = &*LOST.lock().unwrap_or_else(PoisonError::into_inner) {
            self.failures.push(format!("{case}: not tried, the device was lost at {place}"));
            return None;
        }
        match work() {
            Ok(made) => Some(made),
            Err(error) => {
                if matches!(error, Error::Driver(_)) {
                    let place = format!("{} [{case}]: {error}", self.test);
                    *LOST.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
                }
                self.failures.push(format!("{case}: {error}"));
                None
            }
        }
    }

    /// Whether something holds.
    pub fn holds(&mut self, case: &str, it: bool) {
        self.cases += 1;
        if !it {
            self.failures.push(case.to_owned());
        }
    }

    /// A result that is near the truth.
    pub fn near(
        &mut self,
        case: &str,
        tolerance: Tolerance,
        want: &[f32],
        got: impl FnOnce() -> Result<Vec<f32>>,
    ) {
        let Some(got) = self.ask(case, got) else { return };
        let Tolerance { norm: norm_limit, each: each_limit } = tolerance;
        if got.len() != want.len() {
            self.failures.push(format!("{case}: {} numbers for {}", got.len(), want.len()));
            return;
        }
        let (norm, each) = errors(&got, want);
        let keep = |worst: &mut (f64, String), error: f64, limit: f64| {
            if error / limit > worst.0 {
                *worst = (error / limit, format!("{error:.2e} of {limit:.1e}, {case}"));
            }
        };
        keep(&mut self.norm, norm, norm_limit);
        keep(&mut self.each, each.iter().copied().fold(0.0, f64::max), each_limit);
        let bad = |&i: &usize| each[i] > each_limit;
        let count = (0..each.len()).filter(bad).count();
        if norm > norm_limit || count > 0 {
            let first = (0..each.len()).find(bad).unwrap_or(0);
            let values = want.get(first).map(|want| (got[first], want));
            self.failures.push(format!(
                "{case}: off by {norm:.2e} (limit {norm_limit:.1e}); {count} of {} elements, at \
                 {first} (got, want) {values:?}",
                each.len()
            ));
        }
    }

    /// A result that is the truth, bit by bit; a NaN is a NaN.
    pub fn same(&mut self, case: &str, want: &[f32], got: impl FnOnce() -> Result<Vec<f32>>) {
        let Some(got) = self.ask(case, got) else { return };
        if got.len() != want.len() {
            self.failures.push(format!("{case}: {} numbers for {}", got.len(), want.len()));
            return;
        }
        let equal = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        let bad = |&i: &usize| !equal(got[i], want[i]);
        if let Some(first) = (0..got.len()).find(bad) {
            let count = (0..got.len()).filter(bad).count();
            self.failures.push(format!(
                "{case}: not equal: {count} of {} elements, at {first} {:e} for {:e}",
                got.len(),
                got[first],
                want[first]
            ));
        }
    }

    fn finish(self, seconds: f32) {
        let Self { test, cases, norm, each, failures } = self;
        println!(
            "{test}: {cases} cases in {seconds:.2} s, {} failed\n  worst error: {}\n  \
             of an element: {}",
            failures.len(),
            norm.1,
            each.1
        );
        if !failures.is_empty() {
            let shown = failures.iter().take(40).cloned().collect::<Vec<_>>().join("\n  ");
            panic!("{test}: {} of {cases} cases failed:\n  {shown}", failures.len());
        }
    }
}

/// Of all numbers together, and of each; a NaN is infinitely wrong.
fn errors(got: &[f32], want: &[f32]) -> (f64, Vec<f64>) {
    let square = |x: f64| x * x;
    let size: f64 = want.iter().map(|&x| square(f64::from(x))).sum();
    let rms = (size / want.len().max(1) as f64).sqrt();
    let real = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
    let apart = |a: f32, b: f32| if a == b { 0.0 } else { (f64::from(a) - f64::from(b)).abs() };
    let over = |x: f64, y: f64| if x == 0.0 { 0.0 } else { real(x / y) };
    let distance: f64 = got.iter().zip(want).map(|(a, b)| square(apart(*a, *b))).sum();
    let each = got.iter().zip(want).map(|(a, b)| over(apart(*a, *b), rms.max(f64::from(b.abs()))));
    (over(distance.sqrt(), size.sqrt()), each.collect())
}
