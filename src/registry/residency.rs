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
//!   another out for ever. Nor can one that waits: where holders do not end in a while, the model
//!   takes requests again, and the turns go on, each longer than the one before; and where holders
//!   wait for their clients to read, nobody is kept out for them.
//! - Work in the background comes behind all people: in the line, and nobody yields to it while
//!   somebody else uses the model. What only such work uses yields to people at once.
//! - An idle model whose time has come leaves.
//!
//! Deliberately absent: models, threads, clocks. `keeper` does what is decided here.

use std::time::Duration;

use crate::types::KeepAlive;

/// How long a model may be kept out by busy ones before these let nobody else in, and how long one
/// that came in, or yielded in vain, is safe from that.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How long a busy one lets nobody in the first time; then twice as long, up to
const YIELD: Duration = Duration::from_secs(60);
/// so many times that.
const YIELD_TIMES_MAX: u32 = 8;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Somebody who waits for it.
    Person,
    /// Work in the background.
    Background,
}

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
    /// Requests that use it, by [`Class`].
    held: [usize; 2],
    /// Requests that wait until they may,
    waiting: [usize; 2],
    /// and since when.
    since: [Option<Duration>; 2],
    keep_alive: KeepAlive,
    /// When its turn began: it came in, or had yielded in vain.
    turn: Duration,
    /// When it was last let go of, or came in.
    used: Duration,
    /// Lets nobody in since then: the first in line waits for its memory.
    yields: Option<Duration>,
    /// So often that was in vain.
    in_vain: u32,
    /// Some who hold it wait for their clients to read, and for nothing else.
    unread: bool,
}

impl Slot {
    fn held(&self) -> usize {
        self.held.iter().sum()
    }

    fn waiting(&self) -> usize {
        self.waiting.iter().sum()
    }

    fn is_open(&self) -> bool {
        self.state == State::Ready && self.yields.is_none()
    }

    fn is_idle(&self) -> bool {
        let wanted = self.waiting() > 0 && self.yields.is_none();
        self.is_movable() && self.held() == 0 && !wanted
    }

    fn is_movable(&self) -> bool {
        self.state == State::Ready && !self.pinned
    }

    /// Nobody but work in the background has or wants it.
    fn is_left_to_work(&self) -> bool {
        let person = Class::Person as usize;
        self.held[person] + self.waiting[person] == 0
    }

    /// Where it stands in the line: people first, then who has waited longest.
    fn in_line(&self) -> Option<(Class, Duration)> {
        let [person, background] = self.since;
        let person = person.map(|since| (Class::Person, since));
        person.or(background.map(|since| (Class::Background, since)))
    }

    /// When it takes requests again, whether or not those who hold it are done.
    fn yields_until(&self) -> Option<Duration> {
        let times = 2u32.saturating_pow(self.in_vain).min(YIELD_TIMES_MAX);
        self.yields.map(|since| since + YIELD * times)
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
            held: [0; 2],
            waiting: [0; 2],
            since: [None; 2],
            keep_alive: KeepAlive::Forever,
            turn: Duration::ZERO,
            used: Duration::ZERO,
            yields: None,
            in_vain: 0,
            unread: false,
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
    pub fn ask(
        &mut self,
        slot: usize,
        who: Class,
        keep_alive: KeepAlive,
        places: usize,
        now: Duration,
    ) -> Ask {
        let (slot, class) = (&mut self.slots[slot], who as usize);
        if slot.is_open() && slot.waiting() == 0 {
            slot.held[class] += 1;
            slot.keep_alive = keep_alive;
            return Ask::Held;
        }
        if slot.waiting() >= places {
            return Ask::Full(slot.waiting());
        }
        slot.keep_alive = keep_alive;
        slot.waiting[class] += 1;
        slot.since[class].get_or_insert(now);
        Ask::Waits
    }

    /// A request that waited has gone away.
    pub fn leave(&mut self, slot: usize, who: Class) {
        let (slot, class) = (&mut self.slots[slot], who as usize);
        slot.waiting[class] -= 1;
        slot.since[class].take_if(|_| slot.waiting[class] == 0);
    }

    /// A request lets go.
    pub fn release(&mut self, slot: usize, who: Class, now: Duration) {
        let slot = &mut self.slots[slot];
        slot.held[who as usize] -= 1;
        slot.used = now;
    }

    /// Whether some who hold it wait for their clients to read, and for nothing else: it cannot
    /// leave soon, so to keep others out is of no use.
    pub fn waits_for_readers(&mut self, slot: usize, unread: bool) {
        self.slots[slot].unread = unread;
    }

    /// It has come in.
    pub fn loaded(&mut self, slot: usize, now: Duration) {
        let slot = &mut self.slots[slot];
        debug_assert_eq!(slot.state, State::Loading);
        (slot.state, slot.turn, slot.used) = (State::Ready, now, now);
        slot.in_vain = 0;
    }

    /// It could not come in. Nobody waits for it any more: the caller tells them.
    pub fn failed(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        debug_assert_eq!(slot.state, State::Loading);
        (slot.state, slot.waiting, slot.since) = (State::Unloaded, [0; 2], [None; 2]);
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
            _ if own.held() + own.waiting() > 0 => Err(Stays::Busy(own.held() + own.waiting())),
            State::Loading => Err(Stays::Loading),
            State::Ready => Ok(Some(self.send_away(slot, Reason::Asked))),
        }
    }

    /// What is to be done at this moment, and nothing twice.
    pub fn decide(&mut self, now: Duration) -> Vec<Action> {
        self.take_turns(now);
        let mut actions = Vec::new();
        for (i, slot) in self.slots.iter_mut().enumerate() {
            if slot.is_open() && slot.waiting() > 0 {
                (0..2).for_each(|class| slot.held[class] += slot.waiting[class]);
                (slot.waiting, slot.since) = ([0; 2], [None; 2]);
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
        let since = self.first_in_line().and_then(|i| self.slots[i].in_line());
        let ready = || self.slots.iter().filter(|s| s.state == State::Ready);
        let begun = ready().map(|s| s.turn);
        let turns = since.into_iter().flat_map(|(_, since)| begun.clone().chain([since]));
        let ends = ready().filter_map(Slot::yields_until);
        let turns = turns.map(|from| from + PATIENCE).chain(ends).filter(|at| *at > now);
        expires.chain(turns).min()
    }

    /// Somebody waits for a model that is not there: who waits for readers is of interest.
    pub fn has_line(&self) -> bool {
        self.first_in_line().is_some()
    }

    /// Where a model is.
    pub fn state(&self, slot: usize) -> State {
        self.slots[slot].state
    }

    /// Requests that hold it, and that wait for it.
    pub fn requests(&self, slot: usize) -> (usize, usize) {
        (self.slots[slot].held(), self.slots[slot].waiting())
    }

    /// How long it stays yet, if nobody asks for it from now on; `None`: for ever.
    pub fn stays(&self, slot: usize, now: Duration) -> Option<Duration> {
        let slot = &self.slots[slot];
        match slot.keep_alive {
            KeepAlive::For(_) if slot.pinned => None,
            KeepAlive::For(time) if slot.held() > 0 => Some(time),
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
            let waits = slot.waiting.map(|count| count > 0);
            assert_eq!(waits, slot.since.map(|since| since.is_some()), "{i}: since when");
            assert!(slot.held() == 0 || slot.state == State::Ready, "{i}: held while {slot:?}");
            assert!(!slot.pinned || slot.state != State::Unloading, "{i}: pinned, and leaves");
            let yields = slot.yields.is_some();
            assert!(!yields || slot.state == State::Ready && !slot.pinned, "{i}: yields");
            taken += if slot.state == State::Unloaded { 0 } else { slot.bytes };
        }
        assert!(taken <= self.budget, "{taken} bytes of {}", self.budget);
    }

    /// The model that has been asked for longest of those that are not in memory, by people if by
    /// any.
    fn first_in_line(&self) -> Option<usize> {
        let out = |s: &Slot| matches!(s.state, State::Unloaded | State::Unloading);
        let line = self.slots.iter().enumerate().filter(|(_, s)| out(s));
        let line = line.filter_map(|(i, s)| {
            let (class, since) = s.in_line()?;
            Some((class == Class::Background, since, i))
        });
        line.min().map(|(.., i)| i)
    }

    /// Which busy models let nobody in, because the first in line has waited long enough.
    fn take_turns(&mut self, now: Duration) {
        let yield_now = self.who_yields(now);
        let nobody_waits = self.first_in_line().is_none();
        for (i, slot) in self.slots.iter_mut().enumerate() {
            if nobody_waits {
                slot.in_vain = 0;
            }
            if !yield_now.contains(&i) {
                slot.yields = None;
            } else if !slot.is_left_to_work() && slot.yields_until().is_some_and(|at| at <= now) {
                (slot.yields, slot.turn, slot.in_vain) = (None, now, slot.in_vain + 1);
            } else {
                slot.yields.get_or_insert(now);
            }
        }
    }

    fn who_yields(&self, now: Duration) -> Vec<usize> {
        let first = self.first_in_line().map(|i| &self.slots[i]);
        let Some((first, (class, since))) = first.and_then(|s| Some((s, s.in_line()?))) else {
            return Vec::new();
        };
        let missing = first.bytes.saturating_sub(self.free() + self.leaving());
        // Whoever yields and is empty has yielded for this.
        let unused = |s: &Slot| s.is_movable() && s.held() + s.waiting() == 0;
        if who_must_go(missing, self.candidates(unused)).is_some() {
            return Vec::new();
        }
        let yields = |s: &Slot| {
            // Who has just come in has a turn of its own.
            let overdue = since.max(s.turn) + PATIENCE <= now;
            let may = match class {
                Class::Person => overdue || s.is_left_to_work(),
                Class::Background => overdue && s.is_left_to_work(),
            };
            s.is_movable() && may && !(s.unread && s.held() > 0)
        };
        let may_go = |s: &Slot| unused(s) || yields(s);
        who_must_go(missing, self.candidates(may_go)).unwrap_or_default()
    }

    /// Models that may go, those used longest ago first: their numbers and bytes.
    fn candidates(&self, may_go: impl Fn(&Slot) -> bool) -> Vec<(usize, u64)> {
        let mut found: Vec<usize> = (0..self.slots.len()).collect();
        found.retain(|&i| may_go(&self.slots[i]));
        // One that is held is used now.
        found.sort_by_key(|&i| (self.slots[i].held() > 0, self.slots[i].used, i));
        found.into_iter().map(|i| (i, self.slots[i].bytes)).collect()
    }

    /// Bytes that are being given back.
    fn leaving(&self) -> u64 {
        let leaving = self.slots.iter().filter(|s| s.state == State::Unloading);
        leaving.map(|s| s.bytes).sum()
    }

    fn send_away(&mut self, slot: usize, reason: Reason) -> Action {
        (self.slots[slot].state, self.slots[slot].yields) = (State::Unloading, None);
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
