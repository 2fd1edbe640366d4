//! Which jobs are at work: a bounded number, in turns of the projects that have any, and of their
//! keys.
//!
//! Knows of a job its name and its key; what it is and what it still has to do stands in the store,
//! from where it is taken up again after a restart.

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
    /// Takes the job out that waits longest, of the key that has fewest at work, of the project
    /// that has. A quarter of the places is for projects that have none, and a quarter of the
    /// others for keys that have none: some jobs pause, until their key may go on.
    fn next(&mut self, at_once: usize) -> Option<Job> {
        let taken = self.running.len();
        if taken >= at_once {
            return None;
        }
        let for_projects = at_once - at_once / 4;
        let for_keys = for_projects - for_projects / 4;
        let order = self.waiting.iter().enumerate().map(|(place, job)| {
            let of_project = self.running.iter().filter(|(r, _)| r.project == job.project);
            let of_key = of_project.clone().filter(|(r, _)| r.key == job.key);
            (of_project.count(), of_key.count(), place)
        });
        let may = |project, key| match (project, key) {
            (0, _) => true,
            (_, 0) => taken < for_projects,
            _ => taken < for_keys,
        };
        let (.., place) = order.filter(|(project, key, _)| may(*project, *key)).min()?;
        self.waiting.remove(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ProjectId;

    fn job(project: i64, id: &str) -> Job {
        job_of(project, 0, id)
    }

    fn job_of(project: i64, key: u64, id: &str) -> Job {
        Job { project: ProjectId(project), key, id: id.to_owned() }
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
    fn keys_of_a_project_take_turns() {
        let runner = Runner::default();
        for (key, id) in [(1, "a"), (1, "b"), (1, "c"), (2, "d"), (2, "e")] {
            runner.add(job_of(1, key, id));
        }
        let begin = || runner.begin(16).map(|(job, _)| job.id).unwrap_or_default();
        assert_eq!([(); 6].map(|()| begin()), ["a", "d", "b", "e", "c", ""]);
    }

    #[test]
    fn one_key_leaves_places_to_others_and_so_does_one_project() {
        let runner = Runner::default();
        let begin = || runner.begin(16).map(|(job, _)| (job.project.0, job.key));
        let add = |project, key| (0..16).for_each(|_| runner.add(job_of(project, key, "x")));
        let all = || std::iter::from_fn(begin).collect::<Vec<_>>();
        add(1, 1);
        assert_eq!(all(), [(1, 1); 9]);
        (2..8).for_each(|key| add(1, key));
        assert_eq!(all(), [(1, 2), (1, 3), (1, 4)]);
        [2, 2, 3].into_iter().for_each(|project| add(project, project as u64 * 10));
        assert_eq!(all(), [(2, 20), (3, 30)]);
        (4..9).for_each(|project| add(project, 0));
        assert_eq!(all(), [(4, 0), (5, 0)]);
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
