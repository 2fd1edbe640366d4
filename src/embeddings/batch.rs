//! Which texts are computed together: a pure function over what waits.
//!
//! Requests take turns, one text each, until the rows of a pass are used up, so a request of one
//! short text does not wait for another's two thousand. There is no padding, so texts of any length
//! share a batch; they stand in it by length, which lets those of one length be computed alike.

/// A request as the choice sees it: lengths of its texts, and how many of them are computed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn<'a> {
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

/// The next batch: at most `rows_max` rows, or one text that is longer than that alone. Requests
/// come in the order of their turns; the texts of one in theirs. Longest first.
pub(super) fn choose(turns: &[Turn<'_>], rows_max: usize) -> Vec<Pick> {
    let mut picks: Vec<Pick> = Vec::new();
    let (mut rows, mut round) = (0, 0);
    loop {
        let before = picks.len();
        for (request, turn) in turns.iter().enumerate() {
            let text = turn.begun + round;
            let Some(&len) = turn.lengths.get(text) else { continue };
            if rows > 0 && rows + len > rows_max {
                // What does not fit waits; to let shorter ones pass would starve it.
                return by_length(picks);
            }
            rows += len;
            picks.push(Pick { request, text, rows: len });
        }
        if picks.len() == before {
            return by_length(picks);
        }
        round += 1;
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

    fn chosen(turns: &[(&[usize], usize)], rows_max: usize) -> Vec<(usize, usize)> {
        let turns: Vec<_> = turns.iter().map(|&(lengths, begun)| Turn { lengths, begun }).collect();
        choose(&turns, rows_max).iter().map(|pick| (pick.request, pick.text)).collect()
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
        let mut begun = [0; 7];
        loop {
            let turns: Vec<_> =
                (0..7).map(|r| Turn { lengths: &lengths[r], begun: begun[r] }).collect();
            let picks = choose(&turns, 64);
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
}
