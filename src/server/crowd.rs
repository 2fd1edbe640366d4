//! How many of something there are at once, and whose: connections by address, long bodies by key.
//! Nobody, by a program that leaks them or on purpose, holds all that the process may open or has
//! memory for.
//!
//! A quarter is for those of whom none is here yet.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Part of the places that each one leaves to others.
const KEPT: usize = 4;

/// Everybody who is here, by `K`.
#[derive(Debug)]
pub(super) struct Crowd<K: Eq + Hash> {
    most: usize,
    here: Mutex<Here<K>>,
}

#[derive(Debug)]
struct Here<K> {
    count: usize,
    by_name: HashMap<K, usize>,
}

/// One of them, counted until this is dropped.
#[derive(Debug)]
pub(super) struct Guest<K: Eq + Hash> {
    crowd: Arc<Crowd<K>>,
    name: K,
}

impl<K: Copy + Eq + Hash> Crowd<K> {
    pub(super) fn new(most: usize) -> Self {
        Self { most, here: Mutex::new(Here { count: 0, by_name: HashMap::new() }) }
    }

    /// Lets one in, if there is room for it; all of it, where there is nobody else.
    pub(super) fn enter(self: &Arc<Self>, name: K, alone: bool) -> Option<Guest<K>> {
        let mut here = self.here();
        let own = here.by_name.get(&name).copied().unwrap_or_default();
        let kept = if own == 0 || alone { 0 } else { self.most / KEPT };
        if here.count >= self.most - kept {
            return None;
        }
        here.count += 1;
        here.by_name.insert(name, own + 1);
        Some(Guest { crowd: Arc::clone(self), name })
    }
}

impl<K: Eq + Hash> Crowd<K> {
    /// Numbers: whoever panicked beside them left them whole.
    fn here(&self) -> MutexGuard<'_, Here<K>> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Guest<K> {
    fn drop(&mut self) {
        let mut here = self.crowd.here();
        here.count -= 1;
        match here.by_name.get_mut(&self.name) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(here.by_name.remove(&self.name)),
        }
    }
}

/// Whose an address is: in version 6 one machine has 64 bits of them to choose from.
pub(super) fn house(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    #[test]
    fn each_one_leaves_a_quarter_to_others() {
        let crowd = Arc::new(Crowd::new(8));
        let mut greedy: Vec<_> = std::iter::from_fn(|| crowd.enter(1, false)).collect();
        assert_eq!(greedy.len(), 6);
        let other = crowd.enter(2, false).unwrap();
        assert!(crowd.enter(2, false).is_none(), "it is here already");
        let third = crowd.enter(3, true).unwrap();
        assert!(crowd.enter(4, true).is_none(), "full");
        drop((other, third));
        greedy.truncate(5);
        assert!(crowd.enter(1, false).is_some());
        drop(greedy);
        let here = crowd.here();
        assert_eq!((here.count, here.by_name.len()), (0, 0));
    }

    #[test]
    fn a_machine_with_many_addresses_is_one() {
        assert_eq!(house(from("::ffff:10.0.0.1")), from("10.0.0.1"));
        assert_eq!(house(from("fd00:1:2:3:4::5")), house(from("fd00:1:2:3:ffff::1")));
        assert_ne!(house(from("fd00:1:2:3::1")), house(from("fd00:1:2:4::1")));
    }
}
