//! Which texts are computed together, and whose: a value over what waits.
//!
//! Every tenant has a virtual time, which moves by the tokens computed for it, divided by its
//! weight; the one that is least far has the next text, until the rows of a pass are used up. Of
//! one tenant, requests take turns, one text each. So a short text waits neither for another's two
//! thousand nor for the two hundred requests of a key that has so many. Work in the background has
//! passes in which nobody else has anything. There is no padding, so texts of any length share a
//! batch; they stand in it by length, which lets those of one length be computed alike.

use std::collections::{BTreeMap, VecDeque};

use crate::types::Tenant;

/// A request as the choice sees it: whose it is, lengths of its texts, and how many of them are
/// computed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn<'a> {
    pub tenant: Tenant,
    pub lengths: &'a [usize],
    pub begun: usize,
}

/// One text of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pick {
    pub request: usize,
    pub text: usize,
    pub rows: usize,
}

/// How far every tenant is that has something here, or had so recently that it matters.
#[derive(Debug, Default)]
pub(super) struct Times {
    by_tenant: BTreeMap<u64, u64>,
    /// The least time of those who wait. Who comes begins here. Never goes back.
    clock: u64,
}

/// Virtual time of one token at weight 1.
const TOKEN: u64 = 1 << 20;

/// What a tenant has to be computed in this pass.
struct Party {
    time: u64,
    weight: u64,
    /// Requests in the order of their turns, each with its next text.
    turns: VecDeque<(usize, usize)>,
}

impl Times {
    /// The next batch: at most `rows_max` rows, or one text that is longer than that alone.
    /// Requests come in the order of their turns; the texts of one in theirs. Longest first.
    pub(super) fn choose(&mut self, turns: &[Turn<'_>], rows_max: usize) -> Vec<Pick> {
        let mut parties = self.parties(turns);
        let mut picks: Vec<Pick> = Vec::new();
        let mut rows = 0;
        while let Some(party) = parties
            .values_mut()
            .filter(|party| !party.turns.is_empty())
            .min_by_key(|party| (party.time, party.turns.front().copied()))
        {
            let Some((request, text)) = party.turns.pop_front() else { break };
            let lengths = turns[request].lengths;
            let len = lengths[text];
            if rows > 0 && rows + len > rows_max {
                break; // What does not fit waits; to let shorter ones pass would starve it.
            }
            rows += len;
            picks.push(Pick { request, text, rows: len });
            party.time += (len as u64 * TOKEN / party.weight).max(1);
            if text + 1 < lengths.len() {
                party.turns.push_back((request, text + 1));
            }
        }
        self.by_tenant.extend(parties.iter().map(|(id, party)| (*id, party.time)));
        by_length(picks)
    }

    /// Who takes part in the next pass. Sets the clock, and forgets who is gone and owes nothing.
    fn parties(&mut self, turns: &[Turn<'_>]) -> BTreeMap<u64, Party> {
        let background = turns.iter().all(|turn| turn.tenant.background);
        let here = || turns.iter().filter(|turn| turn.tenant.background == background);
        let known = here().filter_map(|turn| self.by_tenant.get(&turn.tenant.id)).min();
        self.clock = self.clock.max(known.copied().unwrap_or_default());
        let clock = self.clock;
        self.by_tenant.retain(|_, time| *time > clock);
        let mut parties = BTreeMap::new();
        for (request, turn) in turns.iter().enumerate() {
            let Tenant { id, weight, max_running, .. } = turn.tenant;
            if turn.tenant.background != background || turn.begun >= turn.lengths.len() {
                continue;
            }
            let time = self.by_tenant.get(&id).copied().unwrap_or(clock);
            let weight = u64::from(weight.max(1));
            let new = || Party { time, weight, turns: VecDeque::new() };
            let party = parties.entry(id).or_insert_with(new);
            if max_running.is_none_or(|max| party.turns.len() < max) {
                party.turns.push_back((request, turn.begun));
            }
        }
        parties
    }
}

/// Longest first; equal ones as they came.
fn by_length(mut picks: Vec<Pick>) -> Vec<Pick> {
    picks.sort_by_key(|pick| std::cmp::Reverse(pick.rows));
    picks
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: u64 = 0;

    fn tenant(id: u64, weight: u32) -> Tenant {
        Tenant { id, weight, ..Tenant::default() }
    }

    fn chosen(turns: &[(&[usize], usize)], rows_max: usize) -> Vec<(usize, usize)> {
        let turn = |&(lengths, begun)| Turn { tenant: tenant(NOBODY, 1), lengths, begun };
        let turns: Vec<_> = turns.iter().map(turn).collect();
        let picks = Times::default().choose(&turns, rows_max);
        picks.iter().map(|pick| (pick.request, pick.text)).collect()
    }

    #[test]
    fn requests_take_turns_and_texts_stand_by_length() {
        assert_eq!(chosen(&[(&[2, 3, 9], 0), (&[5], 0)], 100), [(0, 2), (1, 0), (0, 1), (0, 0)]);
        assert_eq!(chosen(&[(&[4, 4, 4, 4], 0), (&[4], 0)], 8), [(0, 0), (1, 0)]);
        assert_eq!(chosen(&[(&[4, 4, 4, 4], 2), (&[4], 1)], 8), [(0, 2), (0, 3)]);
    }

    #[test]
    fn a_pass_is_never_fuller_than_allowed_but_for_one_long_text() {
        assert_eq!(chosen(&[(&[20, 1], 0)], 8), [(0, 0)]);
        assert_eq!(chosen(&[(&[3], 0), (&[20], 0), (&[1], 0)], 8), [(0, 0)]);
        assert_eq!(chosen(&[], 8), []);
        assert_eq!(chosen(&[(&[1, 2], 2)], 8), []);
    }

    #[test]
    fn every_text_is_chosen_once() {
        let lengths: Vec<Vec<usize>> =
            (0..7).map(|r| (0..r * 5).map(|t| 1 + (r * 31 + t * 17) % 40).collect()).collect();
        let (mut begun, mut times) = ([0; 7], Times::default());
        loop {
            let turn = |r: usize| Turn {
                tenant: tenant(r as u64 % 3, 1),
                lengths: &lengths[r],
                begun: begun[r],
            };
            let turns: Vec<_> = (0..7).map(turn).collect();
            let picks = times.choose(&turns, 64);
            let rows: usize = picks.iter().map(|pick| pick.rows).sum();
            assert!(rows <= 64);
            if picks.is_empty() {
                break;
            }
            let mut texts: Vec<_> = picks.iter().map(|p| (p.request, p.text, p.rows)).collect();
            texts.sort_unstable();
            for (request, text, rows) in texts {
                assert_eq!((text, rows), (begun[request], lengths[request][text]));
                begun[request] += 1;
            }
        }
        assert!((0..7).all(|r| begun[r] == lengths[r].len()));
    }

    /// Rows of each tenant in so many passes, when all of them always have enough.
    fn rows_of(tenants: &[Tenant], times: &mut Times, passes: usize) -> BTreeMap<u64, usize> {
        let lengths = vec![4; 64];
        let turn = |tenant: &Tenant| Turn { tenant: *tenant, lengths: &lengths, begun: 0 };
        let turns: Vec<_> = tenants.iter().map(turn).collect();
        let mut rows = BTreeMap::new();
        for pick in (0..passes).flat_map(|_| times.choose(&turns, 64)) {
            *rows.entry(tenants[pick.request].id).or_default() += pick.rows;
        }
        rows
    }

    #[test]
    fn keys_share_by_weight_however_many_requests_they_have() {
        let (greedy, one, heavy) = (tenant(1, 1), tenant(2, 1), tenant(3, 2));
        let crowd: Vec<_> = [vec![greedy; 200], vec![one, heavy]].concat();
        let rows = rows_of(&crowd, &mut Times::default(), 40);
        assert_eq!((rows[&1], rows[&2], rows[&3]), (640, 640, 1280));
    }

    #[test]
    fn who_comes_is_served_at_once_and_saves_nothing_while_it_is_away() {
        let mut times = Times::default();
        let (greedy, one) = (tenant(1, 1), tenant(2, 1));
        assert_eq!(rows_of(&[greedy; 9], &mut times, 100)[&1], 6400);
        let first = rows_of(&[greedy, greedy, one], &mut times, 1);
        assert_eq!(first[&2], 32, "half of the first pass, and no more for what it did not use");
        let mut rows = [0; 2];
        for pass in 0..40 {
            let here = if pass % 2 == 0 { vec![greedy, one] } else { vec![greedy] };
            for (id, count) in rows_of(&here, &mut times, 1) {
                rows[id as usize - 1] += count;
            }
        }
        assert_eq!(rows, [1920, 640], "an absent key saves nothing");
    }

    #[test]
    fn work_in_the_background_has_the_passes_that_nobody_else_wants() {
        let (work, one) = (tenant(1, 9).in_background(), tenant(1, 1));
        let mut times = Times::default();
        let rows = rows_of(&[work, one, work], &mut times, 3);
        assert_eq!((rows.get(&1), rows.len()), (Some(&192), 1));
        assert_eq!(rows_of(&[work], &mut times, 1)[&work.id], 64);
    }

    #[test]
    fn no_more_requests_of_a_key_take_turns_than_may_run() {
        let tenant = Tenant { max_running: Some(1), ..tenant(1, 1) };
        let turn = |lengths| Turn { tenant, lengths, begun: 0 };
        let picks = Times::default().choose(&[turn(&[4; 8]), turn(&[4; 8])], 16);
        assert!(picks.len() == 4 && picks.iter().all(|pick| pick.request == 0), "{picks:?}");
    }
}
