//! Which models are in memory, as a value: a state for each, and who must go so that another fits.
//!
//! Time is passed in, as the time since some start. The rules, in the order of their force:
//!
//! - What is in memory, comes in or leaves takes its bytes, and all of them together never more
//!   than the budget.
//! - A model is held by the requests that use it, and a held one never leaves. Nor does a pinned
//!   one.
//! - Who is asked for first is loaded first. When there is no room, idle models leave, the one
//!   that was used longest ago first, and only when that makes room.
//! - Where it does not, the first in line waits until holders are done. After [`PATIENCE`] those
//!   models in its way take no new requests: they join the line, so that a busy model cannot keep
//!   another out for ever.
//! - An idle model whose time has come leaves.
//!
//! Deliberately absent: models, threads, clocks. `keeper` does what is decided here.

use std::time::Duration;

use crate::types::KeepAlive;

/// How long a model may be kept out by busy ones before these let nobody else in, and how long one
/// that came in is safe from that.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Where a model is between the disk and the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not in memory.
    Unloaded,
    /// On its way in.
    Loading,
    /// In memory.
    Ready,
    /// On its way out.
    Unloading,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Unloaded, Self::Loading, Self::Ready, Self::Unloading];

    /// Its name in metrics and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unloaded => "unloaded",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Unloading => "unloading",
        }
    }
}

/// Why a model leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nobody asked for it for as long as it was to be kept.
    Idle,
    /// Another needs the room.
    Evicted,
    /// The operator wants it so.
    Asked,
}

/// What is to be done now. The state says already that it is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Everybody who waits for this model holds it from now on: tell them.
    Serve(usize),
    /// Bring it in; then [`Residency::loaded`] or [`Residency::failed`].
    Load(usize),
    /// Take it out; then [`Residency::unloaded`].
    Unload(usize, Reason),
}

/// What becomes of a request for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// It holds the model.
    Held,
    /// It waits.
    Waits,
    /// So many wait already; it does not.
    Full(usize),
}

/// Why a model is not taken out on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stays {
    /// It is pinned.
    Pinned,
    /// So many requests hold it or wait for it.
    Busy(usize),
    /// It is on its way in.
    Loading,
}

/// All models and the budget they share. Models are numbers here.
#[derive(Clone, Debug)]
pub struct Residency {
    budget: u64,
    slots: Vec<Slot>,
}

#[derive(Clone, Debug)]
struct Slot {
    bytes: u64,
    pinned: bool,
    state: State,
    /// Requests that use it.
    held: usize,
    /// Requests that wait until they may.
    waiting: usize,
    /// Since when somebody waits.
    since: Option<Duration>,
    keep_alive: KeepAlive,
    /// When it came in.
    came: Duration,
    /// When it was last let go of, or came in.
    used: Duration,
    /// Lets nobody in: the first in line waits for its memory.
    yields: bool,
}

impl Slot {
    fn is_idle(&self) -> bool {
        let wanted = self.waiting > 0 && !self.yields;
        self.state == State::Ready && self.held == 0 && !self.pinned && !wanted
    }

    /// When it leaves if nobody asks for it.
    fn expires(&self) -> Option<Duration> {
        match self.keep_alive {
            KeepAlive::For(time) if self.is_idle() => self.used.checked_add(time),
            KeepAlive::For(_) | KeepAlive::Forever => None,
        }
    }
}

impl Residency {
    /// Nothing in memory, for models that share `budget` bytes.
    pub fn new(budget: u64) -> Self {
        Self { budget, slots: Vec::new() }
    }

    /// One model more, which takes `bytes`. Its number counts up from 0.
    pub fn add(&mut self, bytes: u64, pinned: bool, state: State) {
        self.slots.push(Slot {
            bytes,
            pinned,
            state,
            held: 0,
            waiting: 0,
            since: None,
            keep_alive: KeepAlive::Forever,
            came: Duration::ZERO,
            used: Duration::ZERO,
            yields: false,
        });
    }

    /// What it needs and what it can get at most, where the one is more than the other: it can
    /// never come in.
    pub fn never_fits(&self, slot: usize) -> Option<(u64, u64)> {
        let others = self.slots.iter().enumerate().filter(|(i, s)| *i != slot && s.pinned);
        let most = self.budget.saturating_sub(others.map(|(_, s)| s.bytes).sum());
        let bytes = self.slots[slot].bytes;
        (bytes > most).then_some((bytes, most))
    }

    /// Room that is neither taken nor promised.
    fn free(&self) -> u64 {
        let taken = |s: &Slot| if s.state == State::Unloaded { 0 } else { s.bytes };
        self.budget.saturating_sub(self.slots.iter().map(taken).sum())
    }

    /// A request asks for a model; at most `places` may wait for it. The last to ask says how long
    /// it is kept.
    pub fn ask(&mut self, slot: usize, keep_alive: KeepAlive, places: usize, now: Duration) -> Ask {
        let slot = &mut self.slots[slot];
        if slot.state == State::Ready && !slot.yields && slot.waiting == 0 {
            slot.held += 1;
            slot.keep_alive = keep_alive;
            return Ask::Held;
        }
        if slot.waiting >= places {
            return Ask::Full(slot.waiting);
        }
        slot.keep_alive = keep_alive;
        slot.waiting += 1;
        slot.since.get_or_insert(now);
        Ask::Waits
    }

    /// A request that waited has gone away.
    pub fn leave(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        slot.waiting -= 1;
        if slot.waiting == 0 {
            slot.since = None;
        }
    }

    /// A request lets go.
    pub fn release(&mut self, slot: usize, now: Duration) {
        let slot = &mut self.slots[slot];
        slot.held -= 1;
        slot.used = now;
    }

    /// It has come in.
    pub fn loaded(&mut self, slot: usize, now: Duration) {
        let slot = &mut self.slots[slot];
        debug_assert_eq!(slot.state, State::Loading);
        (slot.state, slot.came, slot.used) = (State::Ready, now, now);
    }

    /// It could not come in. Nobody waits for it any more: the caller tells them.
    pub fn failed(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        debug_assert_eq!(slot.state, State::Loading);
        (slot.state, slot.waiting, slot.since) = (State::Unloaded, 0, None);
    }

    /// It is gone.
    pub fn unloaded(&mut self, slot: usize) {
        debug_assert_eq!(self.slots[slot].state, State::Unloading);
        self.slots[slot].state = State::Unloaded;
    }

    /// The operator wants it gone: now, or not at all. `None` when it is gone or going.
    pub fn dismiss(&mut self, slot: usize) -> Result<Option<Action>, Stays> {
        let own = &self.slots[slot];
        match own.state {
            State::Unloaded | State::Unloading => Ok(None),
            _ if own.pinned => Err(Stays::Pinned),
            _ if own.held + own.waiting > 0 => Err(Stays::Busy(own.held + own.waiting)),
            State::Loading => Err(Stays::Loading),
            State::Ready => Ok(Some(self.send_away(slot, Reason::Asked))),
        }
    }

    /// What is to be done at this moment, and nothing twice.
    pub fn decide(&mut self, now: Duration) -> Vec<Action> {
        self.take_turns(now);
        let mut actions = Vec::new();
        for (i, slot) in self.slots.iter_mut().enumerate() {
            if slot.state == State::Ready && slot.waiting > 0 && !slot.yields {
                slot.held += slot.waiting;
                (slot.waiting, slot.since) = (0, None);
                actions.push(Action::Serve(i));
            }
        }
        for i in 0..self.slots.len() {
            if self.slots[i].expires().is_some_and(|at| at <= now) {
                actions.push(self.send_away(i, Reason::Idle));
            }
        }
        while let Some(first) = self.first_in_line() {
            let (bytes, free) = (self.slots[first].bytes, self.free());
            if bytes <= free && self.slots[first].state == State::Unloaded {
                self.slots[first].state = State::Loading;
                actions.push(Action::Load(first));
                continue;
            }
            let missing = bytes.saturating_sub(free + self.leaving());
            let gone = who_must_go(missing, self.candidates(Slot::is_idle)).unwrap_or_default();
            actions.extend(gone.into_iter().map(|i| self.send_away(i, Reason::Evicted)));
            break;
        }
        actions
    }

    /// When [`Residency::decide`] has something new to say although nothing happens.
    pub fn next_change(&self, now: Duration) -> Option<Duration> {
        let expires = self.slots.iter().filter_map(Slot::expires);
        let since = self.first_in_line().and_then(|i| self.slots[i].since);
        let came = self.slots.iter().filter(|s| s.state == State::Ready).map(|s| s.came);
        let turns = since.into_iter().flat_map(|since| [since].into_iter().chain(came.clone()));
        let turns = turns.map(|from| from + PATIENCE).filter(|at| *at > now);
        expires.chain(turns).min()
    }

    /// Where a model is.
    pub fn state(&self, slot: usize) -> State {
        self.slots[slot].state
    }

    /// Requests that hold it, and that wait for it.
    pub fn requests(&self, slot: usize) -> (usize, usize) {
        (self.slots[slot].held, self.slots[slot].waiting)
    }

    /// How long it stays yet, if nobody asks for it from now on; `None`: for ever.
    pub fn stays(&self, slot: usize, now: Duration) -> Option<Duration> {
        let slot = &self.slots[slot];
        match slot.keep_alive {
            KeepAlive::For(_) if slot.pinned => None,
            KeepAlive::For(time) if slot.held > 0 => Some(time),
            KeepAlive::For(time) => Some(slot.used.saturating_add(time).saturating_sub(now)),
            KeepAlive::Forever => None,
        }
    }

    /// What must hold at any time.
    ///
    /// # Panics
    /// It does not.
    #[cfg(test)]
    pub fn check(&self) {
        let mut taken = 0;
        for (i, slot) in self.slots.iter().enumerate() {
            assert_eq!(slot.waiting > 0, slot.since.is_some(), "{i}: who waits, since when");
            assert!(slot.held == 0 || slot.state == State::Ready, "{i}: held while {slot:?}");
            assert!(!slot.pinned || slot.state != State::Unloading, "{i}: pinned, and leaves");
            assert!(!slot.yields || slot.state == State::Ready && !slot.pinned, "{i}: yields");
            taken += if slot.state == State::Unloaded { 0 } else { slot.bytes };
        }
        assert!(taken <= self.budget, "{taken} bytes of {}", self.budget);
    }

    /// The model that has been asked for longest of those that are not in memory.
    fn first_in_line(&self) -> Option<usize> {
        let out = |s: &Slot| matches!(s.state, State::Unloaded | State::Unloading);
        let line = self.slots.iter().enumerate().filter(|(_, s)| out(s));
        line.filter_map(|(i, s)| Some((s.since?, i))).min().map(|(_, i)| i)
    }

    /// Whether busy models let nobody in, because the first in line has waited long enough.
    fn take_turns(&mut self, now: Duration) {
        self.slots.iter_mut().for_each(|slot| slot.yields = false);
        let Some(first) = self.first_in_line() else { return };
        let overdue = self.slots[first].since.is_some_and(|since| since + PATIENCE <= now);
        let missing = self.slots[first].bytes.saturating_sub(self.free() + self.leaving());
        if !overdue || who_must_go(missing, self.candidates(Slot::is_idle)).is_some() {
            return;
        }
        // Who has just come in has a turn of its own.
        let had_turn = |s: &Slot| s.came + PATIENCE <= now;
        let movable = |s: &Slot| s.state == State::Ready && !s.pinned && had_turn(s);
        for i in who_must_go(missing, self.candidates(movable)).unwrap_or_default() {
            self.slots[i].yields = true;
        }
    }

    /// Models that may go, those used longest ago first: their numbers and bytes.
    fn candidates(&self, may_go: impl Fn(&Slot) -> bool) -> Vec<(usize, u64)> {
        let mut found: Vec<usize> = (0..self.slots.len()).collect();
        found.retain(|&i| may_go(&self.slots[i]));
        // One that is held is used now.
        found.sort_by_key(|&i| (self.slots[i].held > 0, self.slots[i].used, i));
        found.into_iter().map(|i| (i, self.slots[i].bytes)).collect()
    }

    /// Bytes that are being given back.
    fn leaving(&self) -> u64 {
        let leaving = self.slots.iter().filter(|s| s.state == State::Unloading);
        leaving.map(|s| s.bytes).sum()
    }

    fn send_away(&mut self, slot: usize, reason: Reason) -> Action {
        (self.slots[slot].state, self.slots[slot].yields) = (State::Unloading, false);
        Action::Unload(slot, reason)
    }
}

/// Who must go so that `missing` bytes become free: the first of the candidates (numbers and bytes)
/// that are enough, less those without which the others are enough too. `None` if all are not.
pub fn who_must_go(missing: u64, candidates: Vec<(usize, u64)>) -> Option<Vec<usize>> {
    let (mut gone, mut freed) = (Vec::new(), 0);
    for (slot, bytes) in candidates.into_iter().filter(|(_, bytes)| *bytes > 0) {
        if freed >= missing {
            break;
        }
        freed += bytes;
        gone.push((slot, bytes));
    }
    if freed < missing {
        return None;
    }
    // A small one that was taken before a large one may be spared, the latest used first.
    for at in (0..gone.len()).rev() {
        if freed - gone[at].1 >= missing {
            freed -= gone.remove(at).1;
        }
    }
    Some(gone.into_iter().map(|(slot, _)| slot).collect())
}

#[cfg(test)]
mod tests;
