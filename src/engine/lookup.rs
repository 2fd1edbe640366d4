//! What an answer will say next, read out of what was said before.
//!
//! An answer that quotes stands at some place of an older text: of its own prompt, of itself, or of
//! what the client says it expects. The place is found by the last tokens that both have in common,
//! and followed for as long as the answer goes on in the same words. Every token shows for nothing
//! whether the guess before it was right, so how much a guess is worth is known before a row is
//! spent on it: an answer that never quotes costs a look into a table for each token, and soon no
//! row. Deliberately absent: whether a guess changes a token. It does not.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::types::TokenId;

/// One answer and the texts that it may quote.
pub(super) struct Lookup {
    /// What the client expects, the prompt, the answer so far.
    text: Vec<TokenId>,
    expected_len: usize,
    /// The place behind the latest occurrence of some tokens,
    latest: HashMap<[TokenId; GRAM], u32>,
    /// and for each place the one behind the occurrence before, or 0.
    before: Vec<u32>,
    place: Option<Place>,
    /// How often guesses are right, by how long the place has been followed.
    odds: [f64; ODDS_FIRST.len()],
}

/// Where the answer is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// The next token is expected to be this one.
    at: usize,
    /// So many tokens were as they are there.
    len: usize,
    /// It is in what the client expects.
    expected: bool,
}

/// Tokens that two places must have in common.
const GRAM: usize = 3;
/// Places that are compared for the longest common past, and how much of it.
const PLACES: usize = 8;
const PAST: usize = 32;
/// What is believed of a place that was followed for less than 4, 8, 16 tokens, and of others.
const ODDS_FIRST: [f64; 4] = [0.3, 0.5, 0.7, 0.85];
/// Weight of the newest guess in the odds.
const NEWEST: f64 = 0.1;
/// What the client expects is believed from the start as a place that was followed so far.
const EXPECTED: usize = 8;

impl Lookup {
    /// Before the first token of an answer.
    pub fn new(expected: &[TokenId], prompt: &[TokenId]) -> Self {
        let mut lookup = Self {
            text: Vec::with_capacity(expected.len() + prompt.len()),
            expected_len: 0,
            latest: HashMap::new(),
            before: vec![0],
            place: None,
            odds: ODDS_FIRST,
        };
        expected.iter().for_each(|&token| lookup.append(token));
        lookup.expected_len = expected.len();
        prompt.iter().for_each(|&token| lookup.append(token));
        lookup.place = match expected.is_empty() {
            true => lookup.search(),
            false => Some(Place { at: 0, len: EXPECTED, expected: true }),
        };
        lookup
    }

    /// The next token of the answer; true when it stands in what the client expects, at the place
    /// where that was being followed.
    pub fn push(&mut self, token: TokenId) -> bool {
        let right = self.guess(0).is_some_and(|guess| guess == token);
        if let Some(Place { len, .. }) = self.place {
            let odds = &mut self.odds[rank(len)];
            *odds += NEWEST * (f64::from(u8::from(right)) - *odds);
        }
        let followed = self.place.filter(|_| right);
        self.append(token);
        self.place = followed.map(|p| Place { at: p.at + 1, len: p.len + 1, ..p });
        if self.guess(0).is_none() {
            self.place = self.search();
        }
        followed.is_some_and(|place| place.expected)
    }

    /// The tokens that may come next, as many as are right more often than `price`, `max` at most.
    pub fn propose(&self, price: f64, max: usize) -> Vec<TokenId> {
        let Some(place) = self.place else { return Vec::new() };
        let mut chance = 1.0;
        let guesses = (0..max).map_while(|ahead| {
            chance *= self.odds[rank(place.len + ahead)];
            self.guess(ahead).filter(|_| chance > price)
        });
        guesses.collect()
    }

    /// The token so many places ahead. What the client expects has an end; the answer itself goes
    /// on as it is guessed to.
    fn guess(&self, ahead: usize) -> Option<TokenId> {
        let place = self.place?;
        match place.expected {
            true => self.text[..self.expected_len].get(place.at + ahead).copied(),
            false => Some(self.text[place.at + ahead % (self.text.len() - place.at)]),
        }
    }

    /// The place with the longest past in common with the end of the text.
    fn search(&self) -> Option<Place> {
        let mut at = *self.before.last()? as usize;
        let mut best: Option<Place> = None;
        for _ in 0..PLACES {
            // What the client expects ends before the prompt begins.
            if at == 0 {
                break;
            }
            let expected = at <= self.expected_len;
            let first = if expected { 0 } else { self.expected_len };
            let (past, own) = (&self.text[first..at], &self.text[self.expected_len..]);
            let same = past.iter().rev().zip(own.iter().rev()).take(PAST);
            let len = same.take_while(|(a, b)| a == b).count();
            let open = at != self.expected_len;
            if open && len >= GRAM && best.is_none_or(|best| best.len < len) {
                best = Some(Place { at, len, expected });
            }
            at = self.before[at] as usize;
        }
        best
    }

    fn append(&mut self, token: TokenId) {
        self.text.push(token);
        let end = self.text.len();
        let before = match self.text.last_chunk::<GRAM>() {
            None => 0,
            Some(gram) => match self.latest.entry(*gram) {
                Entry::Occupied(mut latest) => latest.insert(end as u32),
                Entry::Vacant(place) => {
                    place.insert(end as u32);
                    0
                }
            },
        };
        self.before.push(before);
    }
}

/// Which odds hold for a place that was followed so far.
fn rank(len: usize) -> usize {
    match len {
        0..4 => 0,
        4..8 => 1,
        8..16 => 2,
        _ => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Vec<TokenId> {
        text.bytes().map(TokenId::from).collect()
    }

    /// After `answer`, what would be guessed at this price.
    fn guess(expected: &str, prompt: &str, answer: &str, price: f64) -> String {
        let mut lookup = Lookup::new(&tokens(expected), &tokens(prompt));
        for token in tokens(answer) {
            lookup.push(token);
        }
        lookup.propose(price, 8).into_iter().map(|token| char::from(token as u8)).collect()
    }

    #[test]
    fn a_quotation_goes_on_as_its_source() {
        let prompt = "the cat sat on the mat. what did it do?";
        assert_eq!(guess("", prompt, " cat s", 0.0), "at on th");
        assert_eq!(guess("", prompt, " xyz", 0.0), "");
    }

    #[test]
    fn the_longest_past_decides_and_then_the_latest() {
        assert_eq!(guess("", "one_abc1 two_abc2 six_abc3|", "two_abc", 0.0), "2 six_ab");
        assert_eq!(guess("", "abc1 abc2 |", "abc", 0.0), "2 |abc2 ");
    }

    #[test]
    fn what_repeats_itself_goes_on_to() {
        assert_eq!(guess("", "?", "0, 1, 0, 1, ", 0.0), "0, 1, 0,");
    }

    #[test]
    fn what_the_client_expects_is_followed_from_the_start_to_its_end() {
        assert_eq!(guess("let a = 1;", "rename a to b", "", 0.0), "let a = ");
        assert_eq!(guess("let a = 1;", "rename a to b", "let a = ", 0.0), "1;");
        assert_eq!(guess("let a = 1;", "rename a to b", "let b = ", 0.0), "1;");
        assert_eq!(guess("abc", "abcdef", "abc", 0.0), "defabcde", "no longer the expectation");
        let mut lookup = Lookup::new(&tokens("let a = 1;"), &tokens("?"));
        let hits = tokens("let b = 1; let a").into_iter().filter(|&t| lookup.push(t)).count();
        assert_eq!(hits, 4 + 2, "the beginning, and what follows ` = `");
    }

    #[test]
    fn guesses_are_as_long_as_they_pay() {
        let prompt = "abcdefghijklmnopqrstuvwxyz|";
        assert_eq!(guess("", prompt, "abc", 0.31), "");
        assert_eq!(guess("", prompt, "abc", 0.29), "d");
        assert_eq!(guess("", prompt, "abcdefghijklm", 0.5), "nop");
    }

    #[test]
    fn who_never_quotes_is_soon_believed_to_never_quote() {
        let prompt = tokens("abcabcabc");
        let mut lookup = Lookup::new(&[], &prompt);
        let (mut next, mut rows) = (100, 0);
        for _ in 0..300 {
            // It begins like the prompt, again and again, and goes on otherwise.
            for token in [97, 98, 99, next] {
                rows += lookup.propose(0.1, 8).len();
                lookup.push(token);
                next += 1;
            }
        }
        assert!(rows < 60, "{rows} rows for 1,200 tokens");
    }
}
