//! The one thread pool of the process.
//!
//! [`Pool::run`] cuts one piece of work into numbered tasks; the calling thread takes part as
//! worker 0, the others are threads that the pool owns. A decode step of a small model makes about
//! 200 runs, so an idle worker spins for a moment before it sleeps, and a run that finds its
//! workers spinning costs one store and one claim per task.
//!
//! # How a run is published
//! One 64-bit word, `state`, holds `[run number | open | active workers]`.
//!
//! ```text
//! caller   write job, next = 0; state = [run+1 | open | 0]; claim tasks until none is left;
//!          clear `open`; wait until active == 0; return
//! worker   wait for an open run that it has not served; compare-exchange active += 1;
//!          claim tasks until none is left; active -= 1
//! ```
//! The job (a pointer into the caller's stack) is read only between a worker's entry and its exit.
//! Entry succeeds only while `open` is set, and the caller returns only after it cleared `open` and
//! saw `active == 0`, so a worker that wakes up late finds a closed run and touches nothing.
//!
//! Deliberately absent: work stealing, nested parallelism (a run inside a task runs inline),
//! pinning to cores, and any promise about which worker runs which task.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A pool of threads. Several threads may share one: their runs take turns.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held for the length of a run: one run at a time.
    caller: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

/// Threads worth starting: the processors that the scheduler lets this process use, at most the
/// cgroup quota (both from the standard library, which reads v1 and v2), with the hyper-threads of
/// one core counted once. At least 1.
pub fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    physical_cores().map_or(allowed, |cores| cores.min(allowed)).max(1)
}

impl Pool {
    /// A pool of `threads` threads, of which the caller of [`Pool::run`] is one. 0 counts as 1.
    /// Should the system refuse a thread, the pool is smaller; [`Pool::threads`] says how large.
    pub fn new(threads: usize) -> Pool {
        let available = std::thread::available_parallelism().map_or(1, |n| n.get());
        let patience = if threads > available { Patience::CROWDED } else { Patience::ALONE };
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            patience,
        });
        let spawn = |index: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("hearth-pool-{}", index + 1))
                .spawn(move || shared.serve(index))
                .ok()
        };
        let workers = (0..threads.saturating_sub(1)).map_while(spawn).collect();
        Pool { shared, caller: Mutex::new(()), workers }
    }

    /// Threads that take part in a run, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` once with every number in `0..tasks`, on any of the threads and in any order, and
    /// returns when all calls have returned.
    ///
    /// # Panics
    /// When a task panics, tasks that nobody has claimed yet are dropped, and the first panic is
    /// raised again here after every thread has left the run.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || IN_TASK.get() {
            (0..tasks).for_each(f);
            return;
        }
        let turn = lock(&self.caller);
        // SAFETY: only the lifetime changes. The pointer is used by workers that entered this run,
        // and `close` returns after the last of them has left, before `f` goes out of scope.
        let f = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), TaskFn>(std::ptr::from_ref(f))
        };
        self.shared.publish(Job { f, tasks });
        self.wake(tasks - 1);
        self.shared.work(Job { f, tasks });
        self.shared.close();
        let panic = lock(&self.shared.panic).take();
        drop(turn);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Wakes at most `wanted` of the workers that sleep.
    fn wake(&self, wanted: usize) {
        let mut left = wanted;
        for (asleep, worker) in self.shared.asleep.iter().zip(&self.workers) {
            if left == 0 {
                return;
            }
            // SeqCst here and in `sleep`: either this load sees the flag, or the worker that set
            // it sees the run that was published before this load.
            if asleep.load(Ordering::SeqCst) && asleep.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
                left -= 1;
            }
        }
    }
}

/// Cuts `rows` rows of `row_len` numbers into ranges and calls `f` with each. A range has enough
/// numbers to be worth the trip to another thread; small work stays on this one, in one piece.
pub(crate) fn run_rows(
    pool: &Pool,
    rows: usize,
    row_len: usize,
    f: &(dyn Fn(Range<usize>) + Sync),
) {
    const NUMBERS_PER_TASK: usize = 16 * 1024;
    let per_task = NUMBERS_PER_TASK.div_ceil(row_len.max(1));
    if rows <= per_task || pool.threads() == 1 {
        return f(0..rows);
    }
    pool.run(rows.div_ceil(per_task), &|task| {
        f(task * per_task..rows.min((task + 1) * per_task));
    });
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for (asleep, worker) in self.shared.asleep.iter().zip(self.workers.drain(..)) {
            asleep.store(false, Ordering::SeqCst);
            worker.thread().unpark();
            // A worker catches the panics of tasks, so it has none of its own to report.
            let _ = worker.join();
        }
    }
}

thread_local! {
    /// True while this thread runs a task, of any pool.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

type TaskFn = *const (dyn Fn(usize) + Sync + 'static);

#[derive(Clone, Copy)]
struct Job {
    f: TaskFn,
    tasks: usize,
}

const OPEN: u64 = 1 << 31;
const ACTIVE: u64 = OPEN - 1;
const RUN: u64 = 1 << 32;

struct Shared {
    /// `[run number: 32 | open: 1 | active workers: 31]`
    state: AtomicU64,
    /// The next task that nobody has claimed; beyond the end when there is none.
    next: AtomicUsize,
    /// Written by the caller while the run is closed and nobody is active; read by those who
    /// entered the run.
    job: UnsafeCell<Option<Job>>,
    /// The first panic of the run.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    /// One per worker: it is parked, or about to be.
    asleep: Box<[AtomicBool]>,
    patience: Patience,
}

// SAFETY: `job` is the only field that is not Sync by itself. Writes and reads of it are separated
// by `state` as the module documentation describes, and the function behind its pointer is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` may be used and forgotten on any thread.
unsafe impl Send for Shared {}

/// How long an idle thread waits before it gives its processor away.
#[derive(Clone, Copy)]
struct Patience {
    spin: Duration,
    yielding: Duration,
}

impl Patience {
    /// A processor for every thread of this pool. Other processes may want it too, so the second
    /// part of the wait offers it to them.
    const ALONE: Patience =
        Patience { spin: Duration::from_micros(30), yielding: Duration::from_micros(30) };
    /// More threads than processors: the thread that is waited for may need this processor.
    const CROWDED: Patience =
        Patience { spin: Duration::ZERO, yielding: Duration::from_micros(20) };

    /// Waits until `ready` says so, or until the patience is over (false).
    fn wait(self, ready: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..32 {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let waited = start.elapsed();
            if waited >= self.spin + self.yielding {
                return false;
            }
            if waited >= self.spin {
                std::thread::yield_now();
            }
        }
    }
}

impl Shared {
    /// Opens a run. The caller holds the turn, so the last run is closed and nobody is active.
    fn publish(&self, job: Job) {
        // SAFETY: nobody reads `job` while the run is closed and no worker is active.
        unsafe { *self.job.get() = Some(job) };
        self.next.store(0, Ordering::Relaxed);
        let run = self.state.load(Ordering::Relaxed) & !(RUN - 1);
        self.state.store(run.wrapping_add(RUN) | OPEN, Ordering::SeqCst);
    }

    /// Closes the run and waits until every worker has left it.
    fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        // Acquire: what the workers wrote is visible once their exits are.
        let all_left = || self.state.load(Ordering::Acquire) & ACTIVE == 0;
        while !self.patience.wait(all_left) {
            std::thread::yield_now();
        }
    }

    /// Claims and runs tasks until none is left.
    fn work(&self, job: Job) {
        IN_TASK.set(true);
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                break;
            }
            // SAFETY: the caller of the run waits for this thread, so the closure is alive.
            let call = AssertUnwindSafe(|| unsafe { (*job.f)(task) });
            if let Err(payload) = catch_unwind(call) {
                // Nobody claims another task. The last claims are few: the sum cannot overflow.
                self.next.store(usize::MAX / 2, Ordering::Relaxed);
                lock(&self.panic).get_or_insert(payload);
            }
        }
        IN_TASK.set(false);
    }

    /// The life of worker `index`.
    fn serve(&self, index: usize) {
        let mut served = 0;
        while !self.stop.load(Ordering::SeqCst) {
            let state = self.state.load(Ordering::SeqCst);
            if !is_new(state, served) {
                if !self.patience.wait(|| self.has_news(served)) {
                    self.sleep(index, served);
                }
                continue;
            }
            let entered = self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            if entered.is_ok() {
                served = state >> 32;
                // SAFETY: this worker is active in an open run: nobody writes `job`.
                let job = unsafe { *self.job.get() };
                self.work(job.expect("an open run has a job; this is a bug"));
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    fn sleep(&self, index: usize, served: u64) {
        let asleep = &self.asleep[index];
        asleep.store(true, Ordering::SeqCst);
        if self.has_news(served) {
            asleep.store(false, Ordering::SeqCst);
            return;
        }
        while asleep.load(Ordering::SeqCst) {
            std::thread::park();
        }
    }

    fn has_news(&self, served: u64) -> bool {
        is_new(self.state.load(Ordering::SeqCst), served) || self.stop.load(Ordering::SeqCst)
    }
}

/// An open run other than the one served last. (After 2^32 runs a number returns; at worst one
/// worker sits out one run.)
fn is_new(state: u64, served: u64) -> bool {
    state & OPEN != 0 && state >> 32 != served
}

/// A panic is passed on by `run`, never by the lock that it happened to hold.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cores behind the processors that this thread may use; `None` where the system does not say.
#[cfg(target_os = "linux")]
fn physical_cores() -> Option<usize> {
    // SAFETY: cpu_set_t is a plain bit set, for which all zeroes is a value.
    let mut allowed: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let size = std::mem::size_of::<libc::cpu_set_t>();
    // SAFETY: the pointer is to `size` writable bytes.
    if unsafe { libc::sched_getaffinity(0, size, &mut allowed) } != 0 {
        return None;
    }
    let mut cores = std::collections::HashSet::new();
    for cpu in 0..libc::CPU_SETSIZE as usize {
        // SAFETY: `cpu` is below the size of the set.
        if unsafe { libc::CPU_ISSET(cpu, &allowed) } {
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            cores.insert(std::fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string()));
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

/// Cores behind the processors that this thread may use; `None` where the system does not say.
#[cfg(not(target_os = "linux"))]
fn physical_cores() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_and_check(pool: &Pool, tasks: usize) {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{tasks} tasks");
    }

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [0, 1, 2, 3, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 3, 7, 64, 1000] {
                run_and_check(&pool, tasks);
            }
        }
    }

    #[test]
    fn stress_of_short_runs_with_pauses() {
        let pool = Pool::new(4);
        for round in 0..20_000 {
            run_and_check(&pool, 2 + round % 5);
            if round % 500 == 0 {
                // Long enough for the workers to fall asleep.
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(7, &|i| {
                            total.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 500 * 21);
    }

    #[test]
    fn writes_of_tasks_are_visible_to_the_caller() {
        let pool = Pool::new(4);
        let cells: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
        for round in 1..2000 {
            pool.run(64, &|i| cells[i].store(round * i, Ordering::Relaxed));
            let sum: usize = cells.iter().map(|c| c.load(Ordering::Relaxed)).sum();
            assert_eq!(sum, round * (63 * 64 / 2));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(3);
        for bad in [0, 5, 99] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|i| assert!(i != bad, "task {i} fails"));
            }));
            let payload = caught.expect_err("the panic is passed on");
            let text = payload.downcast_ref::<String>().map(String::as_str);
            assert_eq!(text, Some(format!("task {bad} fails").as_str()));
            run_and_check(&pool, 50);
        }
    }

    #[test]
    fn a_run_inside_a_task_runs_inline() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(3, &|_| {
                total.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(total.into_inner(), 12);
    }

    #[test]
    fn default_threads_is_within_the_machine() {
        let threads = default_threads();
        assert!(
            (1..=std::thread::available_parallelism().map_or(1, |n| n.get())).contains(&threads)
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn who_may_use_one_processor_starts_one_thread() {
        let bound = std::thread::spawn(|| {
            let size = std::mem::size_of::<libc::cpu_set_t>();
            // SAFETY: of a plain bit set all zeroes are a value; the pointer is to `size` bytes.
            let set = unsafe {
                let mut one: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(libc::sched_getcpu() as usize, &mut one);
                libc::sched_setaffinity(0, size, &one)
            };
            assert_eq!(set, 0);
            default_threads()
        });
        assert_eq!(bound.join().unwrap(), 1);
    }
}
