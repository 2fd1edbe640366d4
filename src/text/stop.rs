//! Stop strings in a stream of text.

use std::cmp::Reverse;

/// Cuts streamed text before the first stop string.
///
/// Text that could be the beginning of a stop string is held back until it is certain, so the
/// client never sees a prefix of one. The stop string that *completes* first in the text wins
/// (among those that complete at the same place, the one that begins first): what a client would
/// see who looked for stop strings after every character, so chunk borders do not matter.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// Text that is a prefix of some stop string.
    held: String,
    hit: Option<StopHit>,
}

/// The stop string that ended the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopHit {
    /// Which one, as an index into the list given to [`StopMatcher::new`].
    pub index: usize,
    /// The string itself.
    pub text: String,
}

#[derive(Debug, Clone)]
struct Stop {
    index: usize,
    chars: Vec<char>,
    /// Knuth-Morris-Pratt: `fallback[n]` is the longest proper border of the first `n + 1` chars.
    fallback: Vec<usize>,
    /// How many characters of the stop string the text ends with.
    matched: usize,
}

impl StopMatcher {
    /// Empty strings are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.iter().enumerate().filter(|(_, text)| !text.is_empty());
        let stops = stops.map(|(index, text)| Stop::new(index, text)).collect();
        Self { stops, held: String::new(), hit: None }
    }

    /// Takes text; returns what is certain to come before any stop string. After a hit, nothing.
    pub fn push(&mut self, text: &str) -> String {
        if self.hit.is_some() {
            return String::new();
        }
        for c in text.chars() {
            self.held.push(c);
            let complete = self.stops.iter_mut().filter_map(|stop| stop.step(c).then_some(&*stop));
            if let Some(stop) = complete.min_by_key(|stop| Reverse(stop.chars.len())) {
                let text: String = stop.chars.iter().collect();
                self.held.truncate(self.held.len() - text.len());
                self.hit = Some(StopHit { index: stop.index, text });
                return std::mem::take(&mut self.held);
            }
        }
        let keep = self.stops.iter().map(Stop::matched_bytes).max().unwrap_or(0);
        let certain = self.held.len() - keep;
        self.held.drain(..certain).collect()
    }

    /// Ends the text: returns what was held back. Nothing after a hit.
    pub fn flush(&mut self) -> String {
        for stop in &mut self.stops {
            stop.matched = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// The stop string that was found, if any.
    pub fn hit(&self) -> Option<&StopHit> {
        self.hit.as_ref()
    }
}

impl Stop {
    fn new(index: usize, text: &str) -> Self {
        let chars: Vec<char> = text.chars().collect();
        let mut fallback = vec![0; chars.len()];
        let mut border = 0;
        for at in 1..chars.len() {
            while border > 0 && chars[at] != chars[border] {
                border = fallback[border - 1];
            }
            border += usize::from(chars[at] == chars[border]);
            fallback[at] = border;
        }
        Self { index, chars, fallback, matched: 0 }
    }

    /// Advances by one character; true when the stop string is complete.
    fn step(&mut self, c: char) -> bool {
        while self.matched > 0 && self.chars[self.matched] != c {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(self.chars[self.matched] == c);
        self.matched == self.chars.len()
    }

    fn matched_bytes(&self) -> usize {
        self.chars[..self.matched].iter().map(|c| c.len_utf8()).sum()
    }
}
