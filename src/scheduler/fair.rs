//! Who is next: the waiting room, and weighted fair queueing over tenants.
//!
//! Every tenant has a virtual time, which moves by the tokens computed for it, prompts and answers
//! alike, divided by its weight. A prompt is due at the time that its tenant will have when it is
//! computed, and what is due first is served first, to its end: thirty prompts of thirty tenants
//! that come together are done one after the other, about as soon as if all went on at once, or
//! sooner (Demers, Keshav, Shenker 1989). Within a tenant priority decides, then order of arrival.
//! So a tenant with two hundred requests and one with a single request wait for each other's turns,
//! not for each other's queues. Who was away comes back at the time of a tenant that would have had
//! its share throughout, less a credit: asking seldom is asking cheaply, but nobody saves for ever.
//! Tenants in the background are behind all others, whatever their time, make way for them, and
//! share among themselves what is left. Deliberately absent: rows, blocks, and what a turn is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::Sequence;
use super::outlook::Party;
use crate::types::{SeqId, Tenant};

/// All tenants that have something here, or had so recently that it matters.
#[derive(Clone, Debug, Default)]
pub(super) struct Tenants {
    accounts: BTreeMap<u64, Account>,
    /// The time of a tenant that has its share throughout, and of one in the background. Never go
    /// back.
    clocks: [u64; 2],
    /// Tokens that were computed since the clocks were set, in virtual time at weight 1.
    served: [u64; 2],
}

/// Who is before whom: those in the background come last, then time decides.
pub(super) type Turn = (bool, u64);

/// All that have something here: how many of theirs run, and what they weigh.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crowd {
    running: u64,
    weights: u64,
}

impl Crowd {
    /// Several of it run, and more than its weight would have of all that run.
    fn has_less_than(self, account: &Account) -> bool {
        let share = self.running * account.weight();
        account.running > 1 && account.running as u64 * self.weights > share
    }

    /// As many of it run as its weight has of all that run, or more.
    fn has_no_more_than(self, account: &Account) -> bool {
        account.running as u64 * self.weights >= self.running * account.weight()
    }
}

#[derive(Clone, Debug)]
struct Account {
    tenant: Tenant,
    /// Virtual time.
    time: u64,
    /// What was computed for it and is less than a unit of that.
    rest: u64,
    /// Sequences that hold blocks.
    running: usize,
    /// In order of priority, then of id.
    waiting: VecDeque<Sequence>,
    /// Those that wait for nothing but to be brought back.
    aside: BTreeMap<SeqId, Sequence>,
}

/// Virtual time of one token at weight 1.
const TOKEN: u64 = 1 << 20;
/// Tokens, at weight 1, by which somebody who comes back may be ahead of those who stayed.
const CREDIT: u64 = 4096;

impl Account {
    fn is_active(&self) -> bool {
        self.running > 0 || !self.waiting.is_empty()
    }

    fn weight(&self) -> u64 {
        u64::from(self.tenant.weight.max(1))
    }

    fn turn(&self) -> Turn {
        (self.tenant.background, self.time)
    }

    /// When it has so many tokens more.
    fn due(&self, tokens: usize) -> Turn {
        let (background, time) = self.turn();
        (background, time + tokens as u64 * TOKEN / self.weight())
    }

    /// It would not be missed by anybody who waits.
    fn can_yield(&self) -> bool {
        self.running > usize::from(!self.tenant.background)
    }

    /// How many more of it may run. Those that stand aside have begun, and count.
    fn room(&self) -> usize {
        let begun = self.running + self.aside.len();
        self.tenant.max_running.map_or(usize::MAX, |max| max.saturating_sub(begun))
    }

    /// Whether one more may run.
    fn is_open(&self) -> bool {
        self.room() > 0
    }
}

impl Tenants {
    /// Takes a sequence in, new or preempted, at its place.
    pub fn enter(&mut self, seq: Sequence) {
        let (tenant, clock) = (seq.tenant, self.clocks[usize::from(seq.tenant.background)]);
        let account = self.accounts.entry(tenant.id).or_insert_with(|| {
            let (time, rest, running) = (0, 0, 0);
            let (waiting, aside) = (VecDeque::new(), BTreeMap::new());
            Account { tenant, time, rest, running, waiting, aside }
        });
        account.tenant = tenant; // as the latest request has it
        if !account.is_active() {
            let credit = CREDIT * TOKEN / account.weight();
            account.time = account.time.max(clock.saturating_sub(credit));
        }
        let rank = |s: &Sequence| (Reverse(s.priority), s.id);
        let place = account.waiting.partition_point(|s| rank(s) < rank(&seq));
        account.waiting.insert(place, seq);
    }

    /// The tenant whose turn it is to let a sequence in, and when that one is due: so many tokens
    /// are `left` up to its end.
    pub fn next(&self, left: impl Fn(&Sequence) -> usize) -> Option<(Turn, u64)> {
        let ready = self.accounts.iter().filter(|(_, a)| a.is_open());
        let heads = ready.filter_map(|(id, a)| {
            let front = a.waiting.front()?;
            Some((a.due(left(front)), front.id, *id))
        });
        heads.min().map(|(due, _, id)| (due, id))
    }

    /// The sequence that it would be.
    pub fn front(&self, tenant: u64) -> &Sequence {
        let front = self.accounts.get(&tenant).and_then(|a| a.waiting.front());
        front.expect("it is this tenant's turn; this is a bug")
    }

    /// Lets it run.
    pub fn pop(&mut self, tenant: u64) -> Sequence {
        let account = self.account(tenant);
        account.running += 1;
        account.waiting.pop_front().expect("it is this tenant's turn; this is a bug")
    }

    /// A sequence of this tenant that never waited runs too.
    pub fn forked(&mut self, tenant: u64) {
        self.account(tenant).running += 1;
    }

    /// A sequence of this tenant does not run any more.
    pub fn left(&mut self, tenant: u64) {
        self.account(tenant).running -= 1;
    }

    /// A sequence that neither runs nor waits any more holds no turn, and no place but in the
    /// counts of its tenant.
    pub fn set_aside(&mut self, seq: Sequence) {
        self.account(seq.tenant.id).aside.insert(seq.id, seq);
    }

    /// It waits again, at its old place.
    pub fn bring_back(&mut self, id: SeqId) {
        let found = self.accounts.values_mut().find_map(|account| account.aside.remove(&id));
        found.into_iter().for_each(|seq| self.enter(seq));
    }

    /// Rows were computed for it.
    pub fn charge(&mut self, tenant: u64, rows: usize) {
        let account = self.account(tenant);
        let tokens = rows as u64 * TOKEN;
        let paid = account.rest + tokens;
        account.time += paid / account.weight();
        account.rest = paid % account.weight();
        let class = usize::from(account.tenant.background);
        self.served[class] += tokens;
    }

    /// The clocks go on; who owes nothing and is owed nothing is forgotten.
    pub fn settle(&mut self) {
        for background in [false, true] {
            let class = usize::from(background);
            let (clock, served) =
                (&mut self.clocks[class], std::mem::take(&mut self.served[class]));
            let of_class = |a: &&Account| a.is_active() && a.tenant.background == background;
            let active = || self.accounts.values().filter(of_class);
            let Some(least) = active().map(|a| a.time).min() else {
                let of_others = |a: &Account| a.tenant.background != background;
                self.accounts.retain(|_, a| of_others(a) || !a.aside.is_empty());
                continue;
            };
            // Not the least time alone: who waits for long would hold it, and newcomers before it.
            let weights: u64 = active().map(Account::weight).sum();
            *clock = (*clock + served / weights).max(least);
            let settled = |a: &Account| a.time + CREDIT * TOKEN / a.weight() <= *clock;
            let stays = |a: &Account| {
                let others = a.tenant.background != background;
                others || a.is_active() || !a.aside.is_empty() || !settled(a)
            };
            self.accounts.retain(|_, a| stays(a));
        }
    }

    /// Where it stands.
    pub fn turn(&self, tenant: u64) -> Turn {
        self.accounts.get(&tenant).map_or((false, self.clocks[0]), Account::turn)
    }

    /// When a prompt is due with so many tokens of its tenant before its end.
    pub fn due(&self, tenant: u64, tokens: usize) -> Turn {
        let unknown = || (false, self.clocks[0]);
        self.accounts.get(&tenant).map_or_else(unknown, |a| a.due(tokens))
    }

    /// Something of it runs.
    pub fn has_begun(&self, tenant: u64) -> bool {
        self.accounts.get(&tenant).is_some_and(|a| a.running > 0)
    }

    /// How many more of it may run.
    pub fn room(&self, tenant: u64) -> usize {
        self.accounts.get(&tenant).map_or(usize::MAX, Account::room)
    }

    /// Somebody is here who is not in the background.
    pub fn in_foreground(&self) -> bool {
        self.foreground().next().is_some()
    }

    /// Those who are.
    pub fn foreground(&self) -> impl Iterator<Item = u64> {
        let here = self.accounts.iter().filter(|(_, a)| a.is_active() && !a.tenant.background);
        here.map(|(id, _)| *id)
    }

    /// Several of it run, and more than its weight would have of all that run.
    pub fn is_over_share(&self, tenant: u64, crowd: Crowd) -> bool {
        self.accounts.get(&tenant).is_some_and(|a| crowd.has_less_than(a))
    }

    /// Its share runs, or more, and something of it waits all the same. Not where there are no
    /// keys: who comes in next is the same tenant's, and behind its queue.
    pub fn is_queueing(&self, tenant: u64, crowd: Crowd) -> bool {
        let account = self.accounts.get(&tenant).filter(|a| !a.waiting.is_empty());
        let has_keys = tenant != Tenant::default().id || self.accounts.len() > 1;
        has_keys && account.is_some_and(|a| crowd.has_no_more_than(a))
    }

    /// More than its share runs, or its share and something of it waits.
    pub fn has_much(&self, tenant: u64, crowd: Crowd) -> bool {
        self.is_over_share(tenant, crowd) || self.is_queueing(tenant, crowd)
    }

    /// How many may come in soon, less those in the background and of tenants that have more than
    /// their share; with the prompts that run.
    pub fn waiting_in_share<'a>(&self, begun: impl Iterator<Item = &'a Sequence>) -> usize {
        let crowd = self.crowd();
        let in_share = |a: &&Account| !a.tenant.background && !crowd.has_less_than(a);
        let open = self.accounts.values().filter(|a| a.is_open());
        let waiting: usize = open.filter(in_share).map(|a| a.waiting.len()).sum();
        let begun = begun.filter_map(|s| self.accounts.get(&s.tenant.id)).filter(in_share);
        waiting + begun.count()
    }

    /// All that have something here.
    pub fn crowd(&self) -> Crowd {
        let active = || self.accounts.values().filter(|a| a.is_active());
        let running = active().map(|a| a.running as u64).sum();
        Crowd { running, weights: active().map(Account::weight).sum() }
    }

    /// The tenant that has to give a sequence back when blocks run out: one in the background, or
    /// of those with more than one the one with the most for its weight.
    pub fn largest(&self) -> Option<u64> {
        let several = self.accounts.iter().filter(|(_, a)| a.can_yield());
        several.max_by(|a, b| by_share(a.1, b.1)).map(|(id, _)| *id)
    }

    /// The tenant that has to make way for a sequence of another that is due then: one in the
    /// background, or one that is beyond that already, and has more for its weight even after it.
    pub fn must_yield_to(&self, tenant: u64, due: Turn) -> Option<u64> {
        let own = self.accounts.get(&tenant)?;
        let several = self.accounts.iter().filter(|(id, a)| **id != tenant && a.can_yield());
        let over = several.filter(|(_, a)| {
            let (theirs, ours) = (a.running as u64, own.running as u64 + 1);
            let more = theirs * own.weight() > ours * a.weight();
            a.turn() > due && (more || a.tenant.background != own.tenant.background)
        });
        over.max_by(|a, b| by_share(a.1, b.1)).map(|(id, _)| *id)
    }

    /// Takes a sequence out that waits, or stands aside.
    pub fn remove(&mut self, id: SeqId) -> Option<Sequence> {
        let aside = self.accounts.values_mut().find_map(|account| account.aside.remove(&id));
        aside.or_else(|| self.remove_waiting(id, |_| true))
    }

    /// Takes one out that waits, if it `may` go.
    pub fn remove_waiting(
        &mut self,
        id: SeqId,
        may: impl Fn(&Sequence) -> bool,
    ) -> Option<Sequence> {
        self.accounts.values_mut().find_map(|account| {
            let place = account.waiting.iter().position(|s| s.id == id && may(s))?;
            account.waiting.remove(place)
        })
    }

    /// Takes those out that have waited past their deadline and were never begun.
    pub fn expire(&mut self, now: Duration) -> Vec<SeqId> {
        let mut expired = Vec::new();
        for account in self.accounts.values_mut() {
            account.waiting.retain(|s| {
                let late = s.is_new() && s.deadline.is_some_and(|deadline| deadline < now);
                if late {
                    expired.push(s.id);
                    expired.extend(&s.forks);
                }
                !late
            });
        }
        expired
    }

    /// All tenants, in order of id, without those who wait.
    pub fn standings(&self) -> impl Iterator<Item = Party> {
        self.accounts.values().map(|a| Party {
            id: a.tenant.id,
            background: a.tenant.background,
            weight: a.weight() as f64,
            time: a.time as f64 / TOKEN as f64,
            running: a.running,
            room: a.room(),
            waiting: Vec::new(),
        })
    }

    /// Those of a tenant who wait, in order.
    pub fn queue(&self, tenant: u64) -> impl Iterator<Item = &Sequence> {
        self.accounts.get(&tenant).into_iter().flat_map(|a| &a.waiting)
    }

    /// The times of a tenant that has its share throughout, and of one in the background; and by
    /// how much, at weight 1, somebody who comes back may be ahead of it. In tokens.
    pub fn clocks(&self) -> ([f64; 2], f64) {
        (self.clocks.map(|clock| clock as f64 / TOKEN as f64), CREDIT as f64)
    }

    /// Everybody who waits.
    pub fn waiting(&self) -> impl Iterator<Item = &Sequence> {
        self.accounts.values().flat_map(|a| &a.waiting)
    }

    /// The same, to change them.
    pub fn waiting_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.accounts.values_mut().flat_map(|a| &mut a.waiting)
    }

    /// Everybody who stands aside.
    pub fn aside(&self) -> impl Iterator<Item = &Sequence> {
        self.accounts.values().flat_map(|a| a.aside.values())
    }

    /// Counts again who runs.
    pub fn check(&self, running: &[Sequence]) -> Result<(), String> {
        for (id, account) in &self.accounts {
            let counted = running.iter().filter(|s| s.tenant.id == *id).count();
            if counted != account.running {
                let kept = account.running;
                return Err(format!("tenant {id}: {counted} run, {kept} are kept"));
            }
            let rank = |s: &Sequence| (Reverse(s.priority), s.id);
            if !account.waiting.iter().map(rank).is_sorted() {
                return Err(format!("tenant {id} waits out of order"));
            }
        }
        match running.iter().find(|s| !self.accounts.contains_key(&s.tenant.id)) {
            Some(s) => Err(format!("{} runs for nobody", s.id)),
            None => Ok(()),
        }
    }

    fn account(&mut self, tenant: u64) -> &mut Account {
        self.accounts.get_mut(&tenant).expect("a tenant with sequences is known; this is a bug")
    }
}

/// Who is in the background, or has more for its weight; the one further ahead where that is
/// equal.
fn by_share(a: &Account, b: &Account) -> std::cmp::Ordering {
    let (left, right) = (a.running as u64 * b.weight(), b.running as u64 * a.weight());
    let background = a.tenant.background.cmp(&b.tenant.background);
    background.then(left.cmp(&right)).then(a.time.cmp(&b.time))
}
