//! The waiting room as its door sees it: who waits, whether there is a place, and for how long.
//!
//! Shared by the threads that submit and the engine's, so it counts and never schedules: whose turn
//! it really is, the scheduler says. What is said here of a place in the queue is what its rules
//! amount to for somebody who has just come in with a prompt of usual length.

use std::collections::HashMap;
use std::time::Duration;

use crate::types::Tenant;

/// Counts of everybody who was submitted and not yet admitted.
#[derive(Debug)]
pub(super) struct WaitingRoom {
    places: usize,
    waiting: usize,
    /// By tenant; none that has nobody here.
    tenants: HashMap<u64, Party>,
}

#[derive(Clone, Copy, Debug)]
struct Party {
    waiting: usize,
    weight: u32,
    background: bool,
}

/// Part of the places that is kept for tenants of whom nobody waits yet.
const KEPT: usize = 8;
/// Part of the places that work in the background may fill.
const BACKGROUND: usize = 4;
/// What is told to a client that was refused, at least and at most.
const RETRY_S_MIN: u64 = 1;
const RETRY_S_MAX: u64 = 60;

impl WaitingRoom {
    pub fn new(places: usize) -> Self {
        Self { places, waiting: 0, tenants: HashMap::new() }
    }

    /// Lets `count` of a tenant in, all or none. How many are before them, or how many wait.
    pub fn enter(&mut self, tenant: Tenant, count: usize) -> Result<usize, usize> {
        let own = self.tenants.get(&tenant.id).map_or(0, |party| party.waiting);
        // Those without a key are one tenant, and may be the only one.
        let kept = match own {
            1.. if tenant.background => self.places - self.places / BACKGROUND,
            1.. if tenant.id != 0 => self.places / KEPT,
            _ => 0,
        };
        if self.waiting + count > self.places - kept {
            return Err(self.waiting);
        }
        let before = self.before(tenant);
        self.waiting += count;
        let weight = tenant.weight.max(1);
        let waiting = own + count;
        let party = Party { waiting, weight, background: tenant.background };
        self.tenants.insert(tenant.id, party);
        Ok(before)
    }

    /// One of a tenant was admitted, or went away.
    pub fn leave(&mut self, tenant: Tenant) {
        self.waiting -= 1;
        if let Some(party) = self.tenants.get_mut(&tenant.id) {
            party.waiting -= 1;
            if party.waiting == 0 {
                self.tenants.remove(&tenant.id);
            }
        }
    }

    /// Everybody.
    pub fn len(&self) -> usize {
        self.waiting
    }

    /// Those who will be admitted before one more of this tenant: its own, and of each other one
    /// as many as come in meanwhile.
    fn before(&self, tenant: Tenant) -> usize {
        let own = self.tenants.get(&tenant.id).map_or(0, |party| party.waiting);
        let turns = |party: &Party| own * party.weight as usize / tenant.weight.max(1) as usize;
        let others = self.tenants.iter().filter(|(id, _)| **id != tenant.id);
        let before = others.map(|(_, party)| match (party.background, tenant.background) {
            (true, false) => 0,
            (false, true) => party.waiting,
            _ => party.waiting.min(turns(party)),
        });
        own + before.sum::<usize>()
    }
}

/// How long it takes until one more is admitted, when there are `before` others and one is
/// admitted every `interval`; `None` where that is not known and not zero.
pub(super) fn wait(before: usize, free: usize, interval: Option<Duration>) -> Option<Duration> {
    match (before + 1).saturating_sub(free) {
        0 => Some(Duration::ZERO),
        turns => Some(interval?.saturating_mul(u32::try_from(turns).unwrap_or(u32::MAX))),
    }
}

/// When it is worth asking again after a refusal: half of those who wait are gone by then.
pub(super) fn retry_after(waiting: usize, interval: Duration) -> Duration {
    let half = interval.saturating_mul(u32::try_from(waiting / 2).unwrap_or(u32::MAX));
    half.clamp(Duration::from_secs(RETRY_S_MIN), Duration::from_secs(RETRY_S_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(id: u64, weight: u32) -> Tenant {
        Tenant { id, weight, ..Tenant::default() }
    }

    #[test]
    fn all_come_in_or_none() {
        let mut room = WaitingRoom::new(4);
        assert_eq!(room.enter(tenant(0, 1), 3), Ok(0));
        assert_eq!(room.enter(tenant(0, 1), 2), Err(3));
        assert_eq!(room.enter(tenant(0, 1), 1), Ok(3));
        room.leave(tenant(0, 1));
        assert_eq!(room.len(), 3);
    }

    #[test]
    fn somebody_who_fills_the_room_leaves_places_for_others() {
        let mut room = WaitingRoom::new(16);
        while room.enter(tenant(1, 1), 1).is_ok() {}
        assert_eq!(room.len(), 14);
        assert_eq!(room.enter(tenant(2, 1), 2), Ok(0));
        assert_eq!(room.enter(tenant(3, 1), 1), Err(16));
    }

    #[test]
    fn work_in_the_background_fills_a_quarter_and_comes_in_whole_when_nothing_of_it_waits() {
        let mut room = WaitingRoom::new(16);
        let background = tenant(1, 1).in_background();
        while room.enter(background, 1).is_ok() {}
        assert_eq!(room.len(), 4);
        assert_eq!(room.enter(tenant(1, 1), 4), Ok(0));
        assert_eq!(room.enter(tenant(1, 1), 4), Ok(4), "its own, and none of the work");
        let mut room = WaitingRoom::new(16);
        assert_eq!(room.enter(background, 16), Ok(0), "sixteen answers to one prompt");
    }

    #[test]
    fn a_place_in_the_queue_is_by_turns() {
        let mut room = WaitingRoom::new(1000);
        assert_eq!(room.enter(tenant(1, 1), 200), Ok(0));
        assert_eq!(room.enter(tenant(2, 1), 1), Ok(0), "its turn is next");
        assert_eq!(room.enter(tenant(2, 1), 1), Ok(2), "its own and one of the others");
        assert_eq!(room.enter(tenant(1, 1), 1), Ok(202));
        assert_eq!(room.enter(tenant(3, 2), 1), Ok(0));
        assert_eq!(room.enter(tenant(3, 2), 1), Ok(1), "twice the weight: half a turn of others");
    }

    #[test]
    fn waits_follow_the_measured_rate() {
        let second = Duration::from_secs(1);
        assert_eq!(wait(0, 1, Some(second)), Some(Duration::ZERO));
        assert_eq!(wait(0, 0, Some(second)), Some(second));
        assert_eq!(wait(9, 2, Some(second)), Some(8 * second));
        assert_eq!([wait(0, 1, None), wait(1, 1, None)], [Some(Duration::ZERO), None]);
        assert_eq!(retry_after(10, second), 5 * second);
        assert_eq!(retry_after(10, Duration::ZERO), second);
        assert_eq!(retry_after(usize::MAX, second), 60 * second);
    }
}
