//! Places: a bounded number, of which keys have their shares.
//!
//! A place that is free goes to the key that has fewest for its weight, and of those to who waits
//! longest; work in the background comes after all other. So a key that wants one is not behind one
//! that wants hundreds. Who has a place is never told to leave it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::types::Tenant;

/// All of them.
#[derive(Debug)]
pub struct Places {
    state: Mutex<State>,
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
    tenant: Tenant,
    turn: oneshot::Sender<Place>,
}

/// One of them, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    key: u64,
}

/// Who stands in the line, until it is dropped.
struct Standing<'a> {
    places: &'a Arc<Places>,
    number: u64,
}

impl Places {
    /// So many.
    pub fn new(count: usize) -> Arc<Self> {
        let state = State { free: count, taken: HashMap::new(), line: Vec::new(), number: 0 };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Waits for one.
    pub async fn take(self: Arc<Self>, tenant: Tenant) -> Place {
        let (turn, place) = oneshot::channel();
        let number = self.state().stand(tenant, turn);
        let _standing = Standing { places: &self, number };
        self.give();
        place.await.expect("who stands in the line gets a place; this is a bug")
    }

    /// Gives places that are free to those whose turn it is.
    fn give(self: &Arc<Self>) {
        let mut state = self.state();
        let given: Vec<_> = std::iter::from_fn(|| state.next()).collect();
        drop(state);
        for Waiting { tenant, turn, .. } in given {
            // Who has left meanwhile drops the place, and another gets it.
            drop(turn.send(Place { places: Arc::clone(self), key: tenant.key() }));
        }
    }

    /// Counts: whoever panicked beside them left them whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn stand(&mut self, tenant: Tenant, turn: oneshot::Sender<Place>) -> u64 {
        let number = self.number;
        self.number += 1;
        self.line.push(Waiting { number, tenant, turn });
        number
    }

    /// Whose turn it is, which has one place more then.
    fn next(&mut self) -> Option<Waiting> {
        /// What a place counts for a key of weight 1.
        const PLACE: u64 = 1 << 32;
        if self.free == 0 {
            return None;
        }
        let taken = |key| self.taken.get(&key).copied().unwrap_or_default() as u64;
        let share = |one: &Tenant| (taken(one.key()) + 1) * PLACE / u64::from(one.weight.max(1));
        let rank = |one: &Waiting| (one.tenant.background, share(&one.tenant));
        // The first of those that are equal.
        let (at, _) = self.line.iter().enumerate().min_by_key(|(_, one)| rank(one))?;
        let next = self.line.remove(at);
        self.free -= 1;
        *self.taken.entry(next.tenant.key()).or_default() += 1;
        Some(next)
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.places.state().line.retain(|one| one.number != self.number);
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
        self.places.give();
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
        let all = Places::new(4);
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
        let all = Places::new(6);
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

    #[test]
    fn the_background_comes_last() {
        let all = Places::new(1);
        let held = ask(&all, 9, 1);
        let tenant = |id| Tenant { id, ..Tenant::default() };
        let mut line = vec![ask(&all, 1, 100)];
        for id in [2, 2] {
            let mut taking: Taking = Box::pin(Arc::clone(&all).take(tenant(id)));
            let polled = taking.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert!(polled.is_pending());
            line.push(taking);
        }
        drop(held);
        let mut order = Vec::new();
        for _ in 0..3 {
            let mut places = Vec::new();
            order.extend(enter(&mut line, &mut places));
        }
        assert_eq!(order, [2, 2, 1]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nobody_who_waits_is_forgotten() {
        let all = Places::new(3);
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
