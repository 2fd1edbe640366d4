//! Residency without a model: the rules one by one, then random traces.

use super::*;

const FOREVER: KeepAlive = KeepAlive::Forever;
const PLACES: usize = 8;
const PERSON: Class = Class::Person;
const WORK: Class = Class::Background;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Models of these sizes under a budget, none in memory.
fn house(budget: u64, bytes: &[u64]) -> Residency {
    let mut house = Residency::new(budget);
    bytes.iter().for_each(|&bytes| house.add(bytes, false, State::Unloaded));
    house
}

/// Brings a model in by a request that lets go at once.
fn bring_in(house: &mut Residency, slot: usize, now: Duration) {
    assert_eq!(house.ask(slot, PERSON, FOREVER, PLACES, now), Ask::Waits);
    assert_eq!(house.decide(now), [Action::Load(slot)]);
    house.loaded(slot, now);
    assert_eq!(house.decide(now), [Action::Serve(slot)]);
    house.release(slot, PERSON, now);
    house.check();
}

#[test]
fn the_least_that_is_enough_goes_and_of_that_the_oldest() {
    let all = || vec![(0, 10), (1, 20), (2, 30), (3, 0)];
    assert_eq!(who_must_go(0, all()), Some(vec![]));
    assert_eq!(who_must_go(10, all()), Some(vec![0]));
    assert_eq!(who_must_go(11, all()), Some(vec![1]), "0 alone is not enough, and 1 is");
    assert_eq!(who_must_go(30, all()), Some(vec![0, 1]));
    assert_eq!(who_must_go(45, all()), Some(vec![1, 2]));
    assert_eq!(who_must_go(60, all()), Some(vec![0, 1, 2]));
    assert_eq!(who_must_go(61, all()), None, "nobody goes in vain");
}

#[test]
fn a_model_is_loaded_when_it_is_asked_for_and_served_when_it_is_there() {
    let mut house = house(100, &[60]);
    assert_eq!(house.decide(s(0)), []);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Waits);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Waits);
    assert_eq!(house.decide(s(0)), [Action::Load(0)]);
    assert_eq!(house.decide(s(0)), [], "nothing twice");
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(1)), Ask::Waits);
    house.loaded(0, s(2));
    assert_eq!(house.decide(s(2)), [Action::Serve(0)]);
    assert_eq!(house.requests(0), (3, 0));
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(3)), Ask::Held);
    assert_eq!((house.requests(0), house.free()), ((4, 0), 40));
    house.check();
}

/// Clients name times; the longest that there is must not be too long.
#[test]
fn a_time_without_end_is_told() {
    let mut house = house(100, &[60]);
    let long = KeepAlive::For(Duration::MAX);
    bring_in(&mut house, 0, s(5));
    assert_eq!(house.ask(0, PERSON, long, PLACES, s(6)), Ask::Held);
    house.release(0, PERSON, s(7));
    assert_eq!(house.stays(0, s(8)), Some(Duration::MAX - s(8)));
    assert_eq!(house.decide(s(9)), []);
}

#[test]
fn the_idle_one_that_was_used_longest_ago_goes() {
    let mut house = house(100, &[40, 40, 40]);
    bring_in(&mut house, 0, s(0));
    bring_in(&mut house, 1, s(1));
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(2)), Ask::Held);
    house.release(0, PERSON, s(3));
    assert_eq!(house.ask(2, PERSON, FOREVER, PLACES, s(4)), Ask::Waits);
    assert_eq!(house.decide(s(4)), [Action::Unload(1, Reason::Evicted)]);
    assert_eq!(house.decide(s(4)), [], "it is on its way");
    house.unloaded(1);
    assert_eq!(house.decide(s(5)), [Action::Load(2)]);
    house.check();
}

#[test]
fn who_is_held_or_pinned_stays_and_the_other_waits() {
    let mut house = house(100, &[60, 60]);
    house.add(30, true, State::Ready);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Waits);
    assert_eq!(house.decide(s(0)), [Action::Load(0)]);
    house.loaded(0, s(0));
    assert_eq!(house.decide(s(0)), [Action::Serve(0)]);
    assert_eq!(house.ask(1, PERSON, FOREVER, PLACES, s(1)), Ask::Waits);
    assert_eq!(house.decide(s(1)), []);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(2)), Ask::Held, "and goes on working");
    house.release(0, PERSON, s(3));
    assert_eq!(house.decide(s(3)), []);
    house.release(0, PERSON, s(4));
    assert_eq!(house.decide(s(4)), [Action::Unload(0, Reason::Evicted)]);
    assert_eq!(house.dismiss(2), Err(Stays::Pinned));
    house.check();
}

#[test]
fn a_busy_model_cannot_keep_another_out_for_ever() {
    let mut house = house(100, &[60, 60]);
    bring_in(&mut house, 0, s(0));
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Held);
    assert_eq!(house.ask(1, PERSON, FOREVER, PLACES, s(1)), Ask::Waits);
    assert_eq!(house.decide(s(1)), []);
    assert_eq!(house.next_change(s(1)), Some(PATIENCE));
    let late = s(1) + PATIENCE;
    assert_eq!(house.decide(late), [], "who holds it goes on");
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, late), Ask::Waits, "and nobody else comes in");
    house.release(0, PERSON, late);
    assert_eq!(house.decide(late), [Action::Unload(0, Reason::Evicted)]);
    house.unloaded(0);
    assert_eq!(house.decide(late), [Action::Load(1)]);
    house.loaded(1, late + s(30));
    // The other has waited for long too, but this one has only come.
    assert_eq!(house.decide(late + s(30)), [Action::Serve(1)]);
    assert_eq!(house.ask(1, PERSON, FOREVER, PLACES, late + s(31)), Ask::Held);
    house.release(1, PERSON, late + s(31));
    house.release(1, PERSON, late + s(31));
    assert_eq!(house.decide(late + s(31)), [Action::Unload(1, Reason::Evicted)]);
    house.check();
}

#[test]
fn who_gives_up_waiting_gives_way() {
    let mut house = house(100, &[60, 60]);
    bring_in(&mut house, 0, s(0));
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Held);
    assert_eq!(house.ask(1, PERSON, FOREVER, PLACES, s(1)), Ask::Waits);
    house.decide(s(40));
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(40)), Ask::Waits);
    house.leave(1, PERSON);
    assert_eq!(house.decide(s(41)), [Action::Serve(0)]);
    assert_eq!(house.requests(0), (2, 0));
    house.check();
}

#[test]
fn an_idle_model_leaves_when_its_time_has_come_and_not_before() {
    let mut house = house(100, &[60]);
    bring_in(&mut house, 0, s(0));
    assert_eq!(house.next_change(s(0)), None, "kept for ever");
    assert_eq!(house.ask(0, PERSON, KeepAlive::For(s(5)), PLACES, s(1)), Ask::Held);
    assert_eq!(house.decide(s(100)), [], "a request holds it");
    house.release(0, PERSON, s(100));
    assert_eq!(house.next_change(s(100)), Some(s(105)));
    assert_eq!(house.decide(s(104)), []);
    assert_eq!(house.decide(s(105)), [Action::Unload(0, Reason::Idle)]);
    house.unloaded(0);
    // The last request decides.
    house.ask(0, PERSON, KeepAlive::For(s(0)), PLACES, s(106));
    assert_eq!(house.decide(s(106)), [Action::Load(0)]);
    house.loaded(0, s(107));
    assert_eq!(house.decide(s(107)), [Action::Serve(0)]);
    house.release(0, PERSON, s(108));
    assert_eq!(house.decide(s(108)), [Action::Unload(0, Reason::Idle)]);
    house.check();
}

#[test]
fn a_failed_load_is_over_and_the_next_request_tries_again() {
    let mut house = house(100, &[60]);
    house.ask(0, PERSON, FOREVER, PLACES, s(0));
    house.decide(s(0));
    house.failed(0);
    house.check();
    assert_eq!((house.decide(s(1)), house.free()), (vec![], 100));
    house.ask(0, PERSON, FOREVER, PLACES, s(2));
    assert_eq!(house.decide(s(2)), [Action::Load(0)]);
}

#[test]
fn the_line_is_bounded_and_what_never_fits_says_so() {
    let mut house = house(100, &[60, 80, 101]);
    house.add(30, true, State::Ready);
    for _ in 0..PLACES {
        assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Waits);
    }
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Full(PLACES));
    assert_eq!(house.never_fits(0), None);
    assert_eq!(house.never_fits(1), Some((80, 70)), "beside the pinned one");
    assert_eq!(house.never_fits(2), Some((101, 70)));
    assert_eq!(house.never_fits(3), None);
}

#[test]
fn first_come_first_loaded() {
    let mut house = house(100, &[100, 10, 90]);
    bring_in(&mut house, 0, s(0));
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Held);
    house.ask(2, PERSON, FOREVER, PLACES, s(1));
    house.ask(1, PERSON, FOREVER, PLACES, s(2));
    assert_eq!(house.decide(s(3)), []);
    house.release(0, PERSON, s(3));
    assert_eq!(house.decide(s(3)), [Action::Unload(0, Reason::Evicted)]);
    house.unloaded(0);
    assert_eq!(house.decide(s(4)), [Action::Load(2), Action::Load(1)]);
    house.check();
}

/// xorshift64*: the same trace for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// A residency, and beside it what a caller knows: what is being done, who holds and who waits.
struct Trace {
    house: Residency,
    now: Duration,
    busy: Vec<Action>,
    /// By model and class: requests that hold it, and that wait.
    people: Vec<[(usize, usize); 2]>,
}

impl Trace {
    fn new(dice: &mut Dice) -> Self {
        let mut house = Residency::new(100);
        let count = 1 + dice.below(6);
        for i in 0..count {
            let pinned = i == 0 && dice.below(3) == 0;
            let state = if pinned { State::Ready } else { State::Unloaded };
            house.add(10 + dice.below(50) as u64 / if pinned { 3 } else { 1 }, pinned, state);
        }
        Self { house, now: s(0), busy: Vec::new(), people: vec![[(0, 0); 2]; count] }
    }

    /// Something new: a request, somebody who gives up, the operator.
    fn begin(&mut self, slot: usize, dice: &mut Dice) {
        let keep = [FOREVER, KeepAlive::For(s(0)), KeepAlive::For(s(9))][dice.below(3)];
        let who = [PERSON, WORK][dice.below(2)];
        self.house.waits_for_readers(slot, dice.below(4) == 0);
        let all: usize = self.people[slot].iter().map(|(held, waiting)| held + waiting).sum();
        let (held, waiting) = &mut self.people[slot][who as usize];
        match dice.below(4) {
            0 if *waiting > 0 => {
                self.house.leave(slot, who);
                *waiting -= 1;
            }
            1 => match self.house.dismiss(slot) {
                Ok(None) => assert_ne!(self.house.state(slot), State::Ready),
                Ok(Some(action)) => self.busy.push(action),
                Err(Stays::Busy(n)) => assert_eq!(n, all),
                Err(Stays::Pinned | Stays::Loading) => {}
            },
            _ => match self.house.ask(slot, who, keep, PLACES, self.now) {
                Ask::Held => *held += 1,
                Ask::Waits => *waiting += 1,
                Ask::Full(n) => assert_eq!(n, PLACES),
            },
        }
    }

    /// Something ends: a request lets go, or a load or an unload is over.
    fn end(&mut self, slot: usize, may_fail: bool, dice: &mut Dice) {
        if dice.below(2) == 0 {
            let who = [PERSON, WORK][dice.below(2)];
            if self.people[slot][who as usize].0 > 0 {
                self.house.release(slot, who, self.now);
                self.people[slot][who as usize].0 -= 1;
            }
            self.house.waits_for_readers(slot, false);
            return;
        }
        let Some(at) = self.busy.len().checked_sub(1).map(|last| dice.below(last + 1)) else {
            return;
        };
        match self.busy.swap_remove(at) {
            Action::Load(i) if may_fail && dice.below(4) == 0 => {
                self.house.failed(i);
                self.people[i].iter_mut().for_each(|(_, waiting)| *waiting = 0);
            }
            Action::Load(i) => self.house.loaded(i, self.now),
            Action::Unload(i, _) => {
                assert!(self.people[i].iter().all(|who| who.0 == 0), "a request holds it");
                self.house.unloaded(i);
            }
            Action::Serve(_) => unreachable!("done at once"),
        }
    }

    fn decide(&mut self) {
        for action in self.house.decide(self.now) {
            match action {
                Action::Serve(i) => {
                    self.people[i] = self.people[i].map(|(held, waiting)| (held + waiting, 0));
                }
                other => self.busy.push(other),
            }
        }
        self.house.check();
        for (i, counted) in self.people.iter().enumerate() {
            let [(a, b), (c, d)] = *counted;
            assert_eq!(self.house.requests(i), (a + c, b + d), "model {i}");
        }
    }
}

/// Requests, failures, departures and the operator at random; the state is recounted after every
/// event, and when nothing new begins everybody is served in the end.
#[test]
fn random_traces_keep_the_books_and_serve_everybody() {
    for seed in 1..200 {
        let mut dice = Dice(seed * 0x9e37_79b9);
        let mut trace = Trace::new(&mut dice);
        let mut possible: Vec<usize> = (0..trace.people.len()).collect();
        possible.retain(|&i| trace.house.never_fits(i).is_none());
        for step in 0..6000 {
            trace.now += Duration::from_millis(dice.below(4000) as u64);
            let slot = possible[dice.below(possible.len())];
            match step < 2000 && dice.below(2) == 0 {
                true => trace.begin(slot, &mut dice),
                false => trace.end(slot, step < 2000, &mut dice),
            }
            trace.decide();
        }
        assert!(trace.people.iter().all(|who| *who == [(0, 0); 2]), "{seed}: {:?}", trace.house);
    }
}

/// Somebody holds the first of two models of which one fits, and somebody waits for the other.
fn one_in_the_way(holder: Class, waits: Class) -> Residency {
    let mut house = house(100, &[60, 60]);
    bring_in(&mut house, 0, s(0));
    assert_eq!(house.ask(0, holder, FOREVER, PLACES, s(0)), Ask::Held);
    assert_eq!(house.ask(1, waits, FOREVER, PLACES, s(0)), Ask::Waits);
    house
}

#[test]
fn who_cannot_end_soon_keeps_nobody_from_their_model() {
    let mut house = one_in_the_way(PERSON, PERSON);
    assert_eq!(house.decide(PATIENCE), []);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, PATIENCE), Ask::Waits);
    // One of its holders waits for a client that does not read: the others go on.
    house.waits_for_readers(0, true);
    assert_eq!(house.decide(PATIENCE + s(1)), [Action::Serve(0)]);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(1000)), Ask::Held);
    assert_eq!(house.decide(s(1000)), []);
    // It reads on, and now it is the turn of the other one.
    house.waits_for_readers(0, false);
    assert_eq!(house.decide(s(1001)), []);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(1001)), Ask::Waits);
    (0..3).for_each(|_| house.release(0, PERSON, s(1002)));
    assert_eq!(house.decide(s(1002)), [Action::Unload(0, Reason::Evicted)]);
    house.check();
}

#[test]
fn turns_alternate_where_holders_take_long_and_those_of_who_waits_become_longer() {
    let mut house = one_in_the_way(PERSON, PERSON);
    let (mut now, mut closed, mut open) = (s(0), Vec::new(), Vec::new());
    let mut since = now;
    let mut is_open = true;
    while now < s(1100) {
        now += s(1);
        house.decide(now);
        house.check();
        if house.ask(0, PERSON, FOREVER, 1, now) == Ask::Held {
            house.release(0, PERSON, now);
            if !is_open {
                closed.push((now - since).as_secs());
                (is_open, since) = (true, now);
            }
        } else if is_open {
            open.push((now - since).as_secs());
            (is_open, since) = (false, now);
        }
    }
    assert_eq!(closed, [60, 120, 240, 480]);
    assert_eq!(open, [20; 5]);
    let at = house.next_change(now);
    assert_eq!(at, Some(since + s(480)), "it looks again by itself");
}

#[test]
fn nobody_yields_to_work_in_the_background_while_people_use_a_model() {
    let mut house = one_in_the_way(PERSON, WORK);
    assert_eq!(house.decide(s(1000)), []);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(1000)), Ask::Held);
    // Work that uses it yields to other work as people do to people, until somebody comes.
    house.release(0, PERSON, s(1001));
    house.release(0, PERSON, s(1001));
    assert_eq!(house.ask(0, WORK, FOREVER, PLACES, s(1001)), Ask::Held);
    assert_eq!(house.decide(s(1001)), []);
    assert_eq!(house.ask(0, WORK, FOREVER, PLACES, s(1001)), Ask::Waits);
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(1001)), Ask::Waits);
    assert_eq!(house.decide(s(1001)), [Action::Serve(0)]);
    house.check();
}

#[test]
fn work_in_the_background_yields_to_people_at_once_and_comes_in_behind_them() {
    let mut house = one_in_the_way(WORK, PERSON);
    assert_eq!(house.decide(s(1)), []);
    assert_eq!(house.ask(0, WORK, FOREVER, PLACES, s(1)), Ask::Waits);
    house.release(0, WORK, s(2));
    assert_eq!(house.decide(s(2)), [Action::Unload(0, Reason::Evicted)]);
    house.unloaded(0);
    assert_eq!(house.decide(s(2)), [Action::Load(1)]);
    // In a line for a third one, who came last is first.
    let mut house = self::house(100, &[60, 60, 60]);
    bring_in(&mut house, 0, s(0));
    assert_eq!(house.ask(0, PERSON, FOREVER, PLACES, s(0)), Ask::Held);
    house.ask(1, WORK, FOREVER, PLACES, s(1));
    house.ask(2, PERSON, FOREVER, PLACES, s(2));
    house.release(0, PERSON, s(3));
    assert_eq!(house.decide(s(3)), [Action::Unload(0, Reason::Evicted)]);
    house.unloaded(0);
    assert_eq!(house.decide(s(3)), [Action::Load(2)]);
    house.check();
}
