//! Places of lines: a bounded number for all batches, of which keys have their shares.
//!
//! A place that is free goes to the key that has fewest for its weight, and of those to who waits
//! longest. So a key with one batch is not behind one with ten, in its own project or another. Who
//! comes waits for a line to end: nobody is told to leave a place. A batch that keeps what a line
//! gave asks for the next place after that, and leaves this one to others meanwhile.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::types::Tenant;

/// All of them.
#[derive(Debug)]
pub(super) struct Places {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// By key; none that has none.
    taken: HashMap<u64, usize>,
    /// In the order in which they came.
    line: Vec<Waiting>,
    /// That of the next who comes.
    number: u64,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    key: u64,
    weight: u32,
}

/// One of them, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    key: u64,
}

/// Who stands in the line, until it is dropped.
struct Standing<'a> {
    places: &'a Places,
    number: u64,
}

impl Places {
    pub(super) fn new(count: usize) -> Self {
        let state = State { free: count, taken: HashMap::new(), line: Vec::new(), number: 0 };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    /// Waits for one.
    pub(super) async fn take(self: Arc<Self>, tenant: Tenant) -> Place {
        let standing = self.stand(tenant);
        loop {
            // Asked for before the look, so that no change is missed in between.
            let changed = self.changed.notified();
            if self.state().enter(standing.number) {
                return Place { places: Arc::clone(&self), key: tenant.key() };
            }
            changed.await;
        }
    }

    fn stand(&self, tenant: Tenant) -> Standing<'_> {
        let mut state = self.state();
        let (number, key, weight) = (state.number, tenant.key(), tenant.weight.max(1));
        state.number += 1;
        state.line.push(Waiting { number, key, weight });
        Standing { places: self, number }
    }

    /// Counts: whoever panicked beside them left them whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Gives a place to who has this number, if it is its turn.
    fn enter(&mut self, number: u64) -> bool {
        /// What a place counts for a key of weight 1.
        const PLACE: u64 = 1 << 32;
        let taken = |key| self.taken.get(&key).copied().unwrap_or_default() as u64;
        let share = |one: &Waiting| (taken(one.key) + 1) * PLACE / u64::from(one.weight);
        // The first of those that are equal.
        let next = self.line.iter().enumerate().min_by_key(|(_, one)| share(one));
        let Some((at, key)) = next.map(|(at, one)| (at, one.key)) else { return false };
        let is_its_turn = self.free > 0 && self.line[at].number == number;
        if is_its_turn {
            self.line.remove(at);
            self.free -= 1;
            *self.taken.entry(key).or_default() += 1;
        }
        is_its_turn
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.places.state().line.retain(|one| one.number != self.number);
        self.places.changed.notify_waiters();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.state();
        state.free += 1;
        match state.taken.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(state.taken.remove(&self.key)),
        }
        drop(state);
        self.places.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    type Taking = Pin<Box<dyn Future<Output = Place>>>;

    fn ask(places: &Arc<Places>, key: u64, weight: u32) -> Taking {
        let tenant = Tenant { id: key, weight, ..Tenant::default() }.in_background();
        let mut taking: Taking = Box::pin(Arc::clone(places).take(tenant));
        // It stands in the line from the first look on.
        match taking.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(place) => Box::pin(std::future::ready(place)),
            Poll::Pending => taking,
        }
    }

    /// Keys of those who have a place now.
    fn enter(line: &mut Vec<Taking>, places: &mut Vec<Place>) -> Vec<u64> {
        let before = places.len();
        let mut again = true;
        while again {
            again = false;
            line.retain_mut(|taking| {
                let polled = taking.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                let Poll::Ready(place) = polled else { return true };
                places.push(place);
                again = true;
                false
            });
        }
        places[before..].iter().map(|place| place.key).collect()
    }

    #[test]
    fn who_has_fewest_is_next_and_of_these_who_waits_longest() {
        let all = Arc::new(Places::new(4));
        let mut line: Vec<_> = (0..10).map(|_| ask(&all, 1, 1)).collect();
        line.extend([ask(&all, 2, 1), ask(&all, 3, 1), ask(&all, 2, 1)]);
        let mut places = Vec::new();
        assert_eq!(enter(&mut line, &mut places), [1; 4], "nobody else was there");
        let mut order = Vec::new();
        for _ in 0..5 {
            places.remove(0);
            order.extend(enter(&mut line, &mut places));
        }
        assert_eq!(order, [2, 3, 1, 1, 2]);
        drop((line, places));
        let state = all.state();
        assert_eq!((state.free, state.taken.len(), state.line.len()), (4, 0, 0));
    }

    #[test]
    fn places_are_shared_by_weight_and_who_leaves_the_line_loses_none() {
        let all = Arc::new(Places::new(6));
        let first = ask(&all, 9, 1);
        let held: Vec<_> = (0..5).map(|_| ask(&all, 9, 1)).collect();
        let gone = ask(&all, 1, 1);
        let mut line: Vec<_> = (0..9).flat_map(|_| [ask(&all, 1, 1), ask(&all, 2, 2)]).collect();
        drop((gone, first, held));
        let mut places = Vec::new();
        let mut order = enter(&mut line, &mut places);
        order.sort_unstable();
        assert_eq!(order, [1, 1, 2, 2, 2, 2]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nobody_who_waits_is_forgotten() {
        let all = Arc::new(Places::new(3));
        let mut tasks = tokio::task::JoinSet::new();
        for i in 0..400 {
            let places = Arc::clone(&all);
            tasks.spawn(async move {
                let tenant = Tenant { id: i % 7, ..Tenant::default() };
                let taking = places.take(tenant);
                if i % 5 == 0 {
                    let soon = std::time::Duration::from_micros(i * 10);
                    drop(tokio::time::timeout(soon, taking).await);
                } else {
                    let _place = taking.await;
                    tokio::task::yield_now().await;
                }
            });
        }
        let done = tokio::time::timeout(std::time::Duration::from_secs(60), tasks.join_all());
        assert_eq!(done.await.expect("all had a place").len(), 400);
        assert_eq!(all.state().free, 3);
    }
}
