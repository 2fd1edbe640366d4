//! The waiting room as its door sees it: who waits, and whether there is a place.
//!
//! Shared by the threads that submit and the engine's, so it counts and never schedules: whose turn
//! it really is, and when, the scheduler says. What is said here of a place in the queue is what
//! its rules amount to for somebody who has just come in with a prompt of usual length.
//!
//! A place is taken by everybody who is here and does not run: who waits for a first turn, or for
//! another one, who stands aside, and who is over and was not read. So there are never more here
//! than may run and may wait, whatever clients do.

use std::collections::HashMap;
use std::time::Duration;

use crate::types::Tenant;

/// What somebody who came in does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Waits, and has not begun.
    Waiting,
    /// Runs. Takes no place here.
    Running,
    /// Has begun, and waits for another turn.
    Again,
    /// Waits for its client to read, at its end or before.
    Unread,
}

const STAGES: usize = 4;

/// Why somebody does not come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// So many are here and do not run.
    Full(usize),
    /// So many of the same tenant wait for their clients to read.
    Unread(usize),
}

/// Counts of everybody who was let in and has not left.
#[derive(Debug)]
pub(super) struct WaitingRoom {
    places: usize,
    /// By [`Stage`].
    counts: [usize; STAGES],
    /// By tenant; none that has nobody here.
    tenants: HashMap<u64, Party>,
}

#[derive(Clone, Copy, Debug)]
struct Party {
    counts: [usize; STAGES],
    weight: u32,
    background: bool,
}

/// Part of the places that answers of one tenant may fill which nobody reads.
const UNREAD: usize = 4;
/// In a room of fewer places one answer that is being read would be all that may be unread.
const SMALL: usize = 8;
/// What is told to a client that was refused, at least and at most.
const RETRY_S_MIN: u64 = 1;
const RETRY_S_MAX: u64 = 60;

impl WaitingRoom {
    pub fn new(places: usize) -> Self {
        Self { places, counts: [0; STAGES], tenants: HashMap::new() }
    }

    /// Lets `count` of a tenant in, all or none. How many are before them, or why not.
    pub fn enter(&mut self, tenant: Tenant, count: usize) -> Result<usize, Refused> {
        let own = self.tenants.get(&tenant.id).map_or([0; STAGES], |party| party.counts);
        // Those without a key are one tenant, and may be the only one.
        let has_key = tenant.id != 0;
        let unread = own[Stage::Unread as usize];
        if has_key && self.places >= SMALL && unread >= self.places / UNREAD {
            return Err(Refused::Unread(unread));
        }
        let kept = tenant.leaves(self.places, placed(&own));
        let taken = placed(&self.counts);
        if taken + count > self.places - kept {
            return Err(Refused::Full(taken));
        }
        let before = self.before(tenant);
        let Tenant { weight, background, .. } = tenant;
        let weight = weight.max(1);
        self.tenants.insert(tenant.id, Party { counts: own, weight, background });
        self.add(tenant, Stage::Waiting, count as isize);
        Ok(before)
    }

    /// One of a tenant does something else from now on.
    pub fn change(&mut self, tenant: Tenant, from: Stage, to: Stage) {
        self.add(tenant, from, -1);
        self.add(tenant, to, 1);
    }

    /// One that was to be read is here no longer.
    pub fn leave(&mut self, tenant: Tenant) {
        self.add(tenant, Stage::Unread, -1);
        if self.tenants.get(&tenant.id).is_some_and(|party| party.counts == [0; STAGES]) {
            self.tenants.remove(&tenant.id);
        }
    }

    fn add(&mut self, tenant: Tenant, stage: Stage, count: isize) {
        let own = self.tenants.get_mut(&tenant.id).map(|party| &mut party.counts);
        for counts in own.into_iter().chain([&mut self.counts]) {
            let one = &mut counts[stage as usize];
            *one = one.checked_add_signed(count).expect("counted in before; this is a bug");
        }
    }

    /// Of everybody.
    pub fn count(&self, stage: Stage) -> usize {
        self.counts[stage as usize]
    }

    /// Nobody is here who is computed for, or waits for that.
    pub fn is_idle(&self) -> bool {
        [Stage::Waiting, Stage::Running, Stage::Again].iter().all(|stage| self.count(*stage) == 0)
    }

    /// Those who will be admitted before one more of this tenant: its own, and of each other one
    /// as many as come in meanwhile.
    fn before(&self, tenant: Tenant) -> usize {
        let own = self.tenants.get(&tenant.id).map_or(0, Party::waiting);
        let turns = |party: &Party| own * party.weight as usize / tenant.weight.max(1) as usize;
        let others = self.tenants.iter().filter(|(id, _)| **id != tenant.id);
        let before = others.map(|(_, party)| match (party.background, tenant.background) {
            (true, false) => 0,
            (false, true) => party.waiting(),
            _ => party.waiting().min(turns(party)),
        });
        own + before.sum::<usize>()
    }
}

impl Party {
    fn waiting(&self) -> usize {
        self.counts[Stage::Waiting as usize]
    }
}

/// Those who take a place: all who do not run.
fn placed(counts: &[usize; STAGES]) -> usize {
    counts.iter().sum::<usize>() - counts[Stage::Running as usize]
}

/// When it is worth asking again after a refusal, where a newcomer would wait so long for a turn:
/// half of those who wait are gone by then.
pub(super) fn retry_after(wait: Option<Duration>) -> Duration {
    let half = wait.unwrap_or_default() / 2;
    half.clamp(Duration::from_secs(RETRY_S_MIN), Duration::from_secs(RETRY_S_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(id: u64, weight: u32) -> Tenant {
        Tenant { id, weight, ..Tenant::default() }
    }

    /// One goes, read or not.
    fn end(room: &mut WaitingRoom, tenant: Tenant, stage: Stage) {
        room.change(tenant, stage, Stage::Unread);
        room.leave(tenant);
    }

    #[test]
    fn all_come_in_or_none() {
        let mut room = WaitingRoom::new(4);
        assert_eq!(room.enter(tenant(0, 1), 3), Ok(0));
        assert_eq!(room.enter(tenant(0, 1), 2), Err(Refused::Full(3)));
        assert_eq!(room.enter(tenant(0, 1), 1), Ok(3));
        end(&mut room, tenant(0, 1), Stage::Waiting);
        assert_eq!(room.count(Stage::Waiting), 3);
    }

    #[test]
    fn somebody_who_fills_the_room_leaves_places_for_others() {
        let mut room = WaitingRoom::new(16);
        while room.enter(tenant(1, 1), 1).is_ok() {}
        assert_eq!(room.count(Stage::Waiting), 14);
        assert_eq!(room.enter(tenant(2, 1), 2), Ok(0));
        assert_eq!(room.enter(tenant(3, 1), 1), Err(Refused::Full(16)));
    }

    #[test]
    fn everybody_who_does_not_run_takes_a_place_until_nobody_is_interested() {
        let (mut room, one) = (WaitingRoom::new(2), tenant(0, 1));
        assert_eq!(room.enter(one, 1), Ok(0));
        let mut stage = Stage::Waiting;
        for (next, free) in [
            (Stage::Waiting, 1),
            (Stage::Running, 2),
            (Stage::Again, 1),
            (Stage::Running, 2),
            (Stage::Unread, 1),
            (Stage::Again, 1),
            (Stage::Unread, 1),
        ] {
            room.change(one, stage, next);
            stage = next;
            assert_eq!(room.enter(one, free + 1), Err(Refused::Full(2 - free)), "{stage:?}");
            assert_eq!(room.count(Stage::Waiting), usize::from(stage == Stage::Waiting));
        }
        room.leave(one);
        assert_eq!((room.enter(one, 2), room.tenants.len()), (Ok(0), 1));
    }

    #[test]
    fn what_one_key_does_not_read_fills_a_quarter_and_no_more_of_it_comes_in() {
        let mut room = WaitingRoom::new(16);
        let unread = |room: &mut WaitingRoom, tenant: Tenant| {
            let entered = room.enter(tenant, 1);
            if entered.is_ok() {
                room.change(tenant, Stage::Waiting, Stage::Running);
                room.change(tenant, Stage::Running, Stage::Unread);
            }
            entered
        };
        let (greedy, other, no_key) = (tenant(1, 1), tenant(2, 1), tenant(0, 1));
        assert!((0..4).all(|_| unread(&mut room, greedy) == Ok(0)), "nobody is before it");
        assert_eq!(unread(&mut room, greedy), Err(Refused::Unread(4)));
        assert!((0..10).all(|i| room.enter(other, 1) == Ok(i)), "others hardly notice");
        assert_eq!(room.enter(other, 1), Err(Refused::Full(14)));
        room.leave(greedy);
        assert_eq!(room.enter(greedy, 1), Ok(0), "there is room again");
        let mut room = WaitingRoom::new(16);
        assert!((0..16).all(|_| unread(&mut room, no_key).is_ok()), "who has no key may be many");
        assert_eq!(unread(&mut room, no_key), Err(Refused::Full(16)));
        let mut room = WaitingRoom::new(7);
        assert!((0..7).all(|_| unread(&mut room, greedy).is_ok()), "it is a small room");
        assert_eq!(unread(&mut room, greedy), Err(Refused::Full(7)));
    }

    #[test]
    fn work_in_the_background_fills_a_quarter_and_comes_in_whole_when_nothing_of_it_waits() {
        let mut room = WaitingRoom::new(16);
        let background = tenant(1, 1).in_background();
        while room.enter(background, 1).is_ok() {}
        assert_eq!(room.count(Stage::Waiting), 4);
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
    fn who_is_refused_comes_back_when_half_of_the_wait_is_over() {
        let second = Duration::from_secs(1);
        assert_eq!(retry_after(Some(10 * second)), 5 * second);
        assert_eq!([retry_after(None), retry_after(Some(second))], [second; 2]);
        assert_eq!(retry_after(Some(Duration::MAX)), 60 * second);
    }

    #[test]
    fn a_room_is_idle_when_nothing_is_to_be_computed() {
        let (mut room, one) = (WaitingRoom::new(4), tenant(0, 1));
        assert!(room.is_idle());
        room.enter(one, 1).unwrap();
        let mut stage = Stage::Waiting;
        for next in [Stage::Running, Stage::Again, Stage::Unread] {
            assert!(!room.is_idle(), "{stage:?}");
            room.change(one, stage, next);
            stage = next;
        }
        assert!(room.is_idle(), "it only has to be read");
    }
}
