//! Which jobs are at work: a bounded number, in turns of the projects that have any.
//!
//! Knows a job by its name only; what it is and what it still has to do stands in the store, from
//! where it is taken up again after a restart.

use std::collections::VecDeque;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::Job;

/// Tells a job to stop, once.
pub(super) type Stop = Arc<Notify>;

/// The jobs of one process.
#[derive(Default)]
pub(super) struct Runner {
    jobs: Mutex<Jobs>,
    changed: Notify,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// Those that were told to stop before they began, and end at once.
    stopped: VecDeque<Job>,
    running: Vec<(Job, Stop)>,
}

impl Runner {
    /// Takes a job.
    pub(super) fn add(&self, job: Job) {
        self.jobs().waiting.push_back(job);
        self.changed.notify_one();
    }

    /// Tells a job to stop. One that waits begins at once, to find out that there is nothing to do.
    pub(super) fn stop(&self, job: &Job) {
        let mut jobs = self.jobs();
        if let Some((_, stop)) = jobs.running.iter().find(|(running, _)| running == job) {
            stop.notify_one();
        } else if let Some(place) = jobs.waiting.iter().position(|waiting| waiting == job) {
            let job = jobs.waiting.remove(place);
            jobs.stopped.extend(job);
            self.changed.notify_one();
        }
    }

    /// Works, `at_once` jobs at a time, until it is dropped.
    pub(super) async fn run<F>(&self, at_once: usize, work: impl Fn(Job, Stop) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut tasks = JoinSet::new();
        loop {
            while let Some((job, stop)) = self.begin(at_once) {
                let done = AssertUnwindSafe(work(job.clone(), stop)).catch_unwind();
                tasks.spawn(done.map(move |done| (job, done.is_ok())));
            }
            tokio::select! {
                Some(Ok((job, well))) = tasks.join_next(), if !tasks.is_empty() => {
                    if !well {
                        tracing::error!(id = job.id, "a job failed until the next start");
                    }
                    self.jobs().running.retain(|(running, _)| *running != job);
                }
                () = self.changed.notified() => {}
            }
        }
    }

    /// Begins the job whose turn it is.
    fn begin(&self, at_once: usize) -> Option<(Job, Stop)> {
        let mut jobs = self.jobs();
        let job = jobs.stopped.pop_front().or_else(|| jobs.next(at_once))?;
        let stop = Stop::default();
        jobs.running.push((job.clone(), Arc::clone(&stop)));
        Some((job, stop))
    }

    /// The lists are whole, whoever panicked beside them.
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Jobs {
    /// Takes the job out that waits longest, of the project that has fewest at work. A quarter of
    /// the places is for those that have none: some jobs pause, until their key may go on.
    fn next(&mut self, at_once: usize) -> Option<Job> {
        if self.running.len() >= at_once {
            return None;
        }
        let full = self.running.len() >= at_once - at_once / 4;
        let at_work =
            |job: &Job| self.running.iter().filter(|(r, _)| r.project == job.project).count();
        let order = self.waiting.iter().enumerate().map(|(place, job)| (at_work(job), place));
        let (_, place) = order.filter(|(own, _)| *own == 0 || !full).min()?;
        self.waiting.remove(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ProjectId;

    fn job(project: i64, id: &str) -> Job {
        Job { project: ProjectId(project), id: id.to_owned() }
    }

    #[test]
    fn projects_take_turns_and_what_is_stopped_ends_at_once() {
        let runner = Runner::default();
        for (project, id) in [(1, "a"), (1, "b"), (1, "c"), (2, "d"), (2, "e")] {
            runner.add(job(project, id));
        }
        let begin = |at_once| runner.begin(at_once).map(|(job, _)| job.id);
        assert_eq!(
            [begin(3), begin(3), begin(3), begin(3)].map(Option::unwrap_or_default),
            ["a", "d", "b", ""]
        );
        runner.stop(&job(2, "e"));
        assert_eq!(begin(3).as_deref(), Some("e"));
        assert_eq!(begin(3), None);
        runner.jobs().running.clear();
        assert_eq!((begin(3).as_deref(), begin(3)), (Some("c"), None));
    }

    #[test]
    fn one_project_leaves_places_to_others() {
        let runner = Runner::default();
        (0..8).for_each(|i| runner.add(job(1, &format!("own {i}"))));
        let begin = || runner.begin(8).map(|(job, _)| job.project.0);
        assert_eq!(
            [(); 8].map(|()| begin()),
            [1, 1, 1, 1, 1, 1, 0, 0].map(|p| (p > 0).then_some(p))
        );
        [2, 2, 3].into_iter().for_each(|project| runner.add(job(project, "other")));
        assert_eq!([begin(), begin(), begin()], [Some(2), Some(3), None]);
    }

    #[tokio::test]
    async fn a_job_that_panics_leaves_its_place_to_the_next() {
        let runner = Arc::new(Runner::default());
        let done = Arc::new(Mutex::new(Vec::new()));
        for id in ["a", "b"] {
            runner.add(job(1, id));
        }
        let (ran, all) = (Arc::clone(&done), Arc::new(Notify::new()));
        let told = Arc::clone(&all);
        let work = move |job: Job, _| {
            let (ran, told) = (Arc::clone(&ran), Arc::clone(&told));
            async move {
                ran.lock().unwrap().push(job.id.clone());
                assert!(job.id != "a", "as it must");
                told.notify_one();
            }
        };
        let task = tokio::spawn(async move { runner.run(1, work).await });
        all.notified().await;
        assert_eq!(*done.lock().unwrap(), ["a", "b"]);
        task.abort();
    }
}
