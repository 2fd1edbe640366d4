//! How long answers are, as far as those tell that came before.
//!
//! What a request allows says little of how long its answer is: most end by themselves. So it is
//! learned how many of the answers that had come so far ended there, by octaves of length. Those
//! that were cut off by their limit, and those that run, count as far as they came and bend nothing
//! (Kaplan, Meier 1958). And what part of a prompt is known when it comes. A value.

/// What has been seen, lately more than earlier.
#[derive(Clone, Debug, Default)]
pub(super) struct Lengths {
    octaves: [Octave; OCTAVES],
    /// An answer is over, however it ended.
    seen: bool,
    /// Tokens of prompts, and those of them that were known.
    prompts: [f64; 2],
}

/// Answers of a length between a power of two and the next, less one.
#[derive(Clone, Copy, Debug, Default)]
struct Octave {
    /// Their tokens.
    tokens: f64,
    /// How many ended by themselves.
    ends: f64,
}

const OCTAVES: usize = 24;
/// With every answer that is over, and every prompt, those before it count so much less.
const FORGET: f64 = 1.0 - 1.0 / 128.0;
/// An octave is believed to be as all others until so many tokens of it were seen.
const PRIOR: f64 = 64.0;
/// Of so many answers less than one is left, and no more is asked of them.
const FEW: f64 = 1e-9;

impl Lengths {
    /// An answer that had `before` tokens has one more.
    pub fn grew(&mut self, before: usize) {
        self.octaves[octave(before)].tokens += 1.0;
    }

    /// An answer is over at this length; it might have had `max` tokens.
    pub fn is_over(&mut self, len: usize, max: usize) {
        self.seen = true;
        for octave in &mut self.octaves {
            octave.tokens *= FORGET;
            octave.ends *= FORGET;
        }
        if len < max {
            self.octaves[octave(len)].ends += 1.0;
        }
    }

    /// A prompt came, of which so much was known.
    pub fn came(&mut self, prompt: usize, known: usize) {
        self.prompts = self.prompts.map(|tokens| tokens * FORGET);
        self.prompts[0] += prompt as f64;
        self.prompts[1] += known as f64;
    }

    /// The part of the next prompt that is probably not known.
    pub fn new_part(&self) -> f64 {
        let [all, known] = self.prompts;
        if all > 0.0 { 1.0 - known / all } else { 1.0 }
    }

    /// What follows from it; `None` while no answer is over.
    pub fn curve(&self) -> Option<Curve> {
        self.seen.then(|| {
            let sum = |of: fn(&Octave) -> f64| self.octaves.iter().map(of).sum::<f64>();
            let usual = sum(|o| o.ends) / sum(|o| o.tokens).max(1.0);
            let rate = |o: &Octave| (o.ends + usual * PRIOR) / (o.tokens + PRIOR);
            Curve::new(self.octaves.each_ref().map(rate))
        })
    }
}

/// How many of all answers are still there at a length, and how many tokens they have had.
#[derive(Clone, Debug)]
pub(super) struct Curve([Part; OCTAVES]);

/// One octave.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    /// At its beginning: the part of all answers that is left, and tokens so far for each of all.
    alive: f64,
    tokens: f64,
    /// What ends with every token of those that are left.
    rate: f64,
}

impl Curve {
    fn new(rates: [f64; OCTAVES]) -> Self {
        let (mut alive, mut tokens) = (1.0, 0.0);
        let mut i = 0;
        Self(rates.map(|rate| {
            let part = Part { alive, tokens, rate };
            (alive, tokens) = part.after((1u64 << i) as f64);
            i += 1;
            part
        }))
    }

    /// Tokens that an answer of so many will probably still have, of no more than `max` in all.
    pub fn left(&self, len: usize, max: usize) -> f64 {
        let most = max.saturating_sub(len) as f64;
        let ((alive, before), (_, end)) = (self.at(len), self.at(max));
        ((end - before) / alive).clamp(most.min(1.0), most)
    }

    fn at(&self, len: usize) -> (f64, f64) {
        let octave = octave(len);
        self.0[octave].after(len as f64 - ((1u64 << octave) - 1) as f64)
    }
}

impl Part {
    /// The same after so many tokens.
    fn after(self, count: f64) -> (f64, f64) {
        let Self { alive, tokens, rate } = self;
        let ended = -(-rate * count).exp_m1(); // exact also where hardly any ends
        let left = alive * (1.0 - ended);
        let had = if rate > 0.0 { alive * ended / rate } else { alive * count };
        (left.max(FEW), tokens + had)
    }
}

/// 0; 1, 2; 3 to 6; 7 to 14; ...
fn octave(len: usize) -> usize {
    (len.saturating_add(1).ilog2() as usize).min(OCTAVES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_hardly_any_ends_by_itself_all_is_still_to_come() {
        let mut lengths = Lengths::default();
        answers(&mut lengths, [(50, 4000)].into_iter());
        answers(&mut lengths, (0..5000).map(|_| (256, 256)));
        let left = lengths.curve().map(|curve| curve.left(0, 256));
        assert!(left.is_some_and(|left| left > 250.0), "{left:?}");
    }

    fn answers(lengths: &mut Lengths, all: impl Iterator<Item = (usize, usize)>) {
        for (len, max) in all {
            (0..len).for_each(|before| lengths.grew(before));
            lengths.is_over(len, max);
        }
    }

    #[test]
    fn where_all_have_what_they_may_all_of_it_is_expected() {
        let mut lengths = Lengths::default();
        assert!(lengths.curve().is_none());
        answers(&mut lengths, [(10, 10), (400, 400), (3000, 3000)].into_iter());
        let curve = lengths.curve().unwrap();
        for (len, max) in [(0, 1), (0, 400), (399, 400), (5, 8000), (0, 1 << 20)] {
            let left = curve.left(len, max);
            assert!((left - (max - len) as f64).abs() < 1e-6 * max as f64, "{left}");
        }
        assert_eq!(curve.left(7, 7), 0.0);
        assert!(curve.left(0, usize::MAX) > 1e6);
    }

    #[test]
    fn answers_that_end_by_themselves_are_as_long_as_they_were() {
        let mut lengths = Lengths::default();
        // About 150 tokens each, cut off or not.
        answers(&mut lengths, (0..400).map(|i| (100 + 25 * (i % 5), 4000)));
        answers(&mut lengths, (0..100).map(|_| (16, 16)));
        let curve = lengths.curve().unwrap();
        let left = curve.left(0, 4000);
        assert!((120.0..190.0).contains(&left), "{left}");
        assert!((15.5..=16.0).contains(&curve.left(0, 16)), "{}", curve.left(0, 16));
        assert!(curve.left(140, 4000) < 110.0, "{}", curve.left(140, 4000));
        assert_eq!(curve.left(199, 200), 1.0, "one is there at least");
    }

    #[test]
    fn those_who_run_count_as_far_as_they_came() {
        let mut lengths = Lengths::default();
        // One of ten is short; the others have long gone past it.
        for _ in 0..20 {
            answers(&mut lengths, std::iter::once((10, 4000)));
            (0..9 * 1000).for_each(|i| lengths.grew(i % 1000));
        }
        let left = lengths.curve().unwrap().left(0, 4000);
        assert!(left > 1500.0, "{left}");
    }

    #[test]
    fn what_is_known_of_prompts_is_expected_of_the_next() {
        let mut lengths = Lengths::default();
        assert_eq!(lengths.new_part(), 1.0);
        (0..300).for_each(|_| lengths.came(1000, 900));
        assert!((lengths.new_part() - 0.1).abs() < 1e-6);
        (0..100).for_each(|_| lengths.came(1000, 0));
        assert!((0.5..0.7).contains(&lengths.new_part()), "{}", lengths.new_part());
    }
}
