//! How many rows of prompts a step may carry without making running answers wait.
//!
//! A step is taken to cost what its answers cost, and something more for every row of a prompt.
//! Both are learned from the steps themselves, which come in as numbers: no clock here. Where the
//! two guesses are off, a step that was too long makes the next one shorter all the same: the only
//! number of rows that stays is the one that meets the target, which is stretched where more
//! prompts wait than answers run. Deliberately absent: what a row costs by its position. A long
//! context makes rows dearer slowly, and the guess follows.
//!
//! What a row of a proposed token costs is learned apart: it reads the weights that an answer reads
//! anyway, so it is far cheaper than a row of a prompt where memory is the limit, and no cheaper
//! where it is not.

mod calm;
mod company;

use std::time::Duration;

use self::calm::Calm;
use self::company::Company;

/// The guess, and what it is for. Times are milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    target_ms: f64,
    /// A step with answers only, lately,
    answers_ms: f64,
    /// and how many these were.
    answers: f64,
    /// What one more row adds; `None` before the first prompt.
    row_ms: Option<f64>,
    /// What a proposed row adds; `None` before the first one.
    proposed_ms: Option<f64>,
    /// The shortest steps of all, the longest of these first: so many took no longer, so a step
    /// costs no more than that before its first row. One alone may be a clock's mistake.
    least_ms: [f64; 4],
    /// Steps have to take so long before somebody is computed apart again.
    owed_ms: f64,
    /// For waits of many steps.
    calm: Calm,
    company: Company,
    /// Others may come in at any moment, and wait for the end of a step.
    in_company: bool,
}

/// Rows of the very first prompt, of which nothing is known.
const FIRST_ROWS: usize = 64;
/// A prompt is never cut smaller than this, so that it always arrives.
const ROWS_MIN: usize = 16;
/// Fewer of them, and nothing else, say what a step costs and not what a row does.
const ROWS_TELLING: usize = 4 * ROWS_MIN;
/// A prompt that waits in line with others takes as long in a step as so many answers.
const SPREAD: usize = 8;
/// Where no answer waits and nobody else is expected, a longer step computes a little faster.
const ALONE: f64 = 4.0;
/// Prompts may take this part of what the answers take, where those fill the target on their own.
const SHARE: f64 = 0.5;
/// Where more prompts wait than answers run, a step may take so many times its target: then a first
/// token is missed more than a quick one.
const STRETCH: f64 = 2.0;
/// A pass apart may take so many times the target. Of a prompt that is just too long for one the
/// second part waits for a step, which has to be little beside what it takes alone.
const APART: f64 = 2.3;
/// Between two passes apart steps take so many times as long: answers lose a fifth of the time.
const OWED: f64 = 4.0;
/// The part of the target that a step may take while nobody waits for any of it.
const BACKGROUND: f64 = 0.5;
/// From this part of the target on answers are a heavy load.
const HEAVY: f64 = 0.25;
/// Weight of the newest step in the guess.
const NEWEST: f64 = 0.5;
/// A proposed row has to be worth this much more than it costs.
const MARGIN: f64 = 1.25;
/// The price of a proposed row before one was seen, and the least that is believed.
const PRICE_FIRST: f64 = 0.25;
const PRICE_MIN: f64 = 0.05;
/// What a step says of proposed rows counts as if it had so many more, and not more than `TELLING`:
/// one row says less than several, but dear ones must be found out while there are few.
const ROWS_MORE: f64 = 3.0;
const TELLING: f64 = 8.0;
/// With every step without any, what they cost is believed a little less: a guess that was too high
/// would never be corrected.
const FORGET: f64 = 0.998;
/// One step changes a guess at most as if it had been this much longer than expected.
const SURPRISE_MAX: f64 = 2.0;

impl Pace {
    pub fn new(target_ms: f64) -> Self {
        let (answers_ms, answers, least_ms) = (0.0, 0.0, [f64::INFINITY; 4]);
        let (row_ms, proposed_ms, owed_ms) = (None, None, 0.0);
        let (calm, company, in_company) = (Calm::default(), Company::default(), false);
        Self {
            target_ms,
            answers_ms,
            answers,
            row_ms,
            proposed_ms,
            least_ms,
            owed_ms,
            calm,
            company,
            in_company,
        }
    }

    /// These tenants are here now.
    pub fn see(&mut self, here: impl Iterator<Item = u64>, now: Duration) {
        self.in_company = self.company.see(here, now);
    }

    /// Others than those who are here may come in at any moment.
    pub fn in_company(&self) -> bool {
        self.in_company
    }

    /// Of so many answers of one tenant, those that move in a step with so many rows of its
    /// prompts: all that fit into the target, where somebody else is expected, and a half at least.
    pub fn moving(&self, answers: usize, prompt_rows: usize) -> usize {
        let rows_ms = self.rows_ms(prompt_rows as f64).unwrap_or(0.0);
        let over_ms = self.expected_ms(answers) + rows_ms - self.target_ms;
        match self.row_ms {
            Some(row_ms) if self.in_company && over_ms > 0.0 && row_ms > 0.0 => {
                let over = (over_ms / row_ms).ceil() as usize;
                answers.saturating_sub(over).max(answers.div_ceil(2))
            }
            _ => answers,
        }
    }

    /// Rows of prompts for a step that also carries `answers` rows of answers, while so many
    /// prompts wait.
    pub fn prompt_rows(&self, answers: usize, waiting: usize) -> usize {
        let Some(row_ms) = self.row_ms else { return FIRST_ROWS };
        let left_ms = match answers {
            0 if self.in_company => self.target_ms,
            0 => self.target_ms * ALONE,
            _ => {
                let stretch = (waiting as f64 / answers as f64).clamp(1.0, STRETCH);
                let target_ms = self.target_ms * stretch;
                let answers_ms = self.expected_ms(answers);
                (target_ms - answers_ms).max(answers_ms * SHARE)
            }
        };
        // A float beyond the integers becomes the largest one, which is what is meant.
        ((left_ms / row_ms) as usize).max(ROWS_MIN)
    }

    /// The same where all of them are in the background: who comes in next waits for the end of
    /// this step, so it is shorter.
    pub fn background_rows(&self, answers: usize) -> usize {
        let Some(row_ms) = self.row_ms else { return FIRST_ROWS };
        let answers_ms = if answers > 0 { self.expected_ms(answers) } else { 0.0 };
        let left_ms = (self.target_ms * BACKGROUND - answers_ms).max(0.0);
        ((left_ms / row_ms) as usize).max(ROWS_MIN)
    }

    /// Rows of prompts for a pass of their own while another one waits: none before it is known
    /// what they take, or while such passes have had their part of the time.
    pub fn rows_apart(&self) -> usize {
        let row_ms = self.row_ms.filter(|_| self.owed_ms <= 0.0);
        row_ms.map_or(0, |row_ms| (self.target_ms * APART / row_ms) as usize)
    }

    /// A pass took this long: one apart, or a step.
    pub fn passed(&mut self, apart: bool, took_ms: f64) {
        self.owed_ms = match apart {
            true => self.owed_ms + took_ms * OWED,
            false => (self.owed_ms - took_ms).max(0.0),
        };
    }

    /// Rows of prompts that nobody misses soon, beside `answers` and `free` places without one: for
    /// each of these as long as some answers take. So as many prompts come forward as answers end,
    /// and no step is much longer than the others: who comes in next waits for the end of one.
    pub fn spread_rows(&self, answers: usize, free: usize) -> usize {
        match self.row_ms {
            Some(row_ms) if row_ms > 0.0 && answers > 0 => {
                let answer_ms = self.expected_ms(answers) / answers as f64;
                let left_ms = answer_ms * (free * SPREAD) as f64;
                ((left_ms / row_ms) as usize).max(ROWS_MIN)
            }
            _ => usize::MAX,
        }
    }

    /// The pace of the last while in place of that of the last steps, for what takes many.
    pub fn calm(self) -> Self {
        let (answers_ms, answers) = self.calm.answers();
        Self { answers_ms, answers, row_ms: self.calm.row_ms(), ..self }
    }

    /// What a step takes with so many answers and rows of prompts, as far as that is known.
    pub fn step_ms(&self, answers: usize, prompt_rows: usize) -> f64 {
        let answers_ms = if answers > 0 { self.expected_ms(answers) } else { 0.0 };
        answers_ms + self.rows_ms(prompt_rows as f64).unwrap_or(0.0)
    }

    /// What rows of prompts add to a step: each no more than an answer alone, where only short
    /// prompts have come; `None` where nothing has.
    pub fn rows_ms(&self, rows: f64) -> Option<f64> {
        let answer_ms = (self.answers > 0.0).then(|| self.answers_ms / self.answers);
        Some(rows * self.row_ms.or(answer_ms)?)
    }

    /// So many answers add more to a step than one costs that holds them alone, and are no heavy
    /// load.
    pub fn is_cheap_apart(&self, answers: usize) -> bool {
        2.0 * self.least_ms[0] < self.expected_ms(answers) && !self.are_heavy(answers)
    }

    /// So many answers take so much of the target that prompts come forward slowly.
    pub fn are_heavy(&self, answers: usize) -> bool {
        self.expected_ms(answers) > self.target_ms * HEAVY
    }

    /// A step with so many answers and nothing else: as lately, and a row for each one more.
    fn expected_ms(&self, answers: usize) -> f64 {
        let more = answers as f64 - self.answers;
        (self.answers_ms + more * self.row_ms.unwrap_or(0.0)).max(0.0)
    }

    /// What a proposed row costs beside so many answers, as a part of what one of these costs.
    pub fn price(&self, answers: usize) -> f64 {
        let token_ms = self.expected_ms(answers) / answers.max(1) as f64;
        match self.proposed_ms {
            Some(row_ms) if token_ms > 0.0 => (MARGIN * row_ms / token_ms).max(PRICE_MIN),
            _ => PRICE_FIRST,
        }
    }

    /// A step took this long.
    pub fn learn(&mut self, answers: usize, proposed: usize, prompt_rows: usize, took_ms: f64) {
        let answers_ms = if answers > 0 { self.expected_ms(answers) } else { 0.0 };
        if answers + proposed + prompt_rows > 0 {
            self.least_ms[0] = took_ms.min(self.least_ms[0]);
            self.least_ms.sort_unstable_by(|a, b| b.total_cmp(a));
        }
        match (prompt_rows, self.row_ms) {
            // Of a few rows most is what the step would have cost without them.
            (rows, None) if answers == 0 && rows < ROWS_MIN => {}
            (rows, Some(_)) if answers == 0 && rows < ROWS_TELLING => {}
            (0, _) if proposed > 0 => self.learn_proposed(answers, proposed, took_ms),
            (0, _) => {
                self.answers_ms = nearer(self.expected_ms(answers), took_ms);
                self.answers = answers as f64;
                self.calm.learn_answers(answers, took_ms);
                self.proposed_ms = self.proposed_ms.map(|ms| ms * FORGET);
            }
            (rows, known) => {
                let others_ms = answers_ms + proposed as f64 * self.proposed_ms.unwrap_or(0.0);
                let rows_ms = (took_ms - others_ms).max(0.0);
                let row_ms = rows_ms / rows as f64;
                self.calm.learn_rows(rows, rows_ms);
                self.row_ms = Some(known.map_or(row_ms, |known| nearer(known, row_ms)));
            }
        }
    }

    /// A step with answers and proposed rows took this long. The more of them, the more it says.
    fn learn_proposed(&mut self, answers: usize, proposed: usize, took_ms: f64) {
        let (answers_ms, rows) = (self.expected_ms(answers), proposed as f64);
        if answers_ms == 0.0 {
            return; // nothing to compare it with
        }
        // A row is not dearer than a token alone: a step of that kind was held up by something.
        let token_ms = answers_ms / answers as f64;
        let seen = ((took_ms - answers_ms) / rows).clamp(0.0, token_ms);
        let weight = (rows + ROWS_MORE).min(TELLING) / TELLING * NEWEST;
        let known = self.proposed_ms.unwrap_or(seen);
        self.proposed_ms = Some(known + weight * (seen - known));
    }
}

/// A guess, corrected.
fn nearer(guess: f64, seen: f64) -> f64 {
    if guess == 0.0 {
        return seen;
    }
    guess + NEWEST * (seen.min(guess * SURPRISE_MAX) - guess)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine: milliseconds of a step, with a part that no guess knows of.
    fn machine(answers: usize, rows: usize, position: usize) -> f64 {
        let weights_ms = 12.0;
        weights_ms + 2.5 * answers as f64 + rows as f64 * (2.0 + position as f64 / 2000.0)
    }

    #[test]
    fn steps_meet_the_target_from_the_third_on_while_rows_become_dearer() {
        let mut pace = Pace::new(100.0);
        for _ in 0..20 {
            pace.learn(4, 0, 0, machine(4, 0, 0));
        }
        let (mut position, mut steps) = (0, Vec::new());
        while position < 4000 {
            let rows = pace.prompt_rows(4, 1);
            let took_ms = machine(4, rows, position);
            pace.learn(4, 0, rows, took_ms);
            position += rows;
            steps.push(took_ms);
        }
        assert!(steps[0] < 200.0, "{}", steps[0]);
        assert!(steps[2..].iter().all(|ms| (80.0..115.0).contains(ms)), "{steps:?}");
    }

    #[test]
    fn a_target_that_was_never_learned_without_prompts_is_met_all_the_same() {
        let mut pace = Pace::new(100.0);
        let mut took_ms = 0.0;
        for _ in 0..40 {
            let rows = pace.prompt_rows(8, 1);
            took_ms = machine(8, rows, 500);
            pace.learn(8, 0, rows, took_ms);
        }
        assert!((90.0..105.0).contains(&took_ms), "{took_ms}");
    }

    #[test]
    fn answers_that_fill_the_target_leave_prompts_half_as_much_again() {
        let mut pace = Pace::new(100.0);
        for _ in 0..60 {
            pace.learn(40, 0, 0, machine(40, 0, 0)); // 112 ms
            let rows = pace.prompt_rows(40, 1);
            pace.learn(40, 0, rows, machine(40, rows, 0));
        }
        let took_ms = machine(40, pace.prompt_rows(40, 1), 0);
        assert!((150.0..180.0).contains(&took_ms), "{took_ms}");
    }

    #[test]
    fn one_long_step_does_not_stop_the_prompts() {
        let mut pace = Pace::new(100.0);
        for _ in 0..20 {
            pace.learn(4, 0, 0, machine(4, 0, 0));
            pace.learn(4, 0, 30, machine(4, 30, 0));
        }
        let before = pace.prompt_rows(4, 1);
        pace.learn(4, 0, before, 60_000.0);
        assert!(pace.prompt_rows(4, 1) >= before / 2, "{} after {before}", pace.prompt_rows(4, 1));
        pace.learn(4, 0, 30, f64::MAX);
        assert!(pace.prompt_rows(4, 1) >= ROWS_MIN);
    }

    #[test]
    fn where_nobody_waits_steps_are_longer() {
        let mut pace = Pace::new(100.0);
        assert_eq!(pace.prompt_rows(0, 1), FIRST_ROWS);
        pace.learn(0, 0, 64, 64.0 * 2.0);
        assert_eq!((pace.prompt_rows(0, 1), pace.prompt_rows(1, 1)), (200, 49));
        pace.see([1, 2].into_iter(), Duration::ZERO);
        assert_eq!(pace.prompt_rows(0, 1), 50, "somebody may come in");
    }

    #[test]
    fn the_more_prompts_wait_beside_few_answers_the_longer_a_step_but_no_more_than_twice() {
        let mut pace = Pace::new(100.0);
        (0..20).for_each(|_| pace.learn(4, 0, 0, 20.0));
        pace.learn(4, 0, 40, 100.0); // 2 ms a row
        let rows = |waiting| pace.prompt_rows(4, waiting);
        assert_eq!([1, 4, 6, 8, 100].map(rows), [40, 40, 65, 90, 90]);
        assert_eq!(pace.prompt_rows(0, 100), pace.prompt_rows(0, 1), "nobody waits for this step");
    }

    #[test]
    fn prompts_in_a_queue_come_forward_as_answers_end() {
        let mut pace = Pace::new(100.0);
        assert_eq!(pace.spread_rows(32, 1), usize::MAX, "nothing is known");
        pace.learn(32, 0, 0, 4.0);
        pace.learn(32, 0, 64, 8.0); // two rows are as dear as an answer
        assert_eq!([1, 2, 10].map(|free| pace.spread_rows(32, free)), [16, 32, 160]);
        assert_eq!(pace.spread_rows(0, 32), usize::MAX, "nothing else would be in the step");
    }

    #[test]
    fn passes_apart_have_a_fifth_of_the_time() {
        let mut pace = Pace::new(100.0);
        assert_eq!(pace.rows_apart(), 0, "nobody knows what a row takes");
        pace.learn(0, 0, 64, 160.0);
        assert!((91..=92).contains(&pace.rows_apart()), "{}", pace.rows_apart());
        pace.passed(true, 50.0);
        let steps = (0..).take_while(|_| {
            pace.passed(false, 30.0);
            pace.rows_apart() == 0
        });
        assert_eq!(steps.count(), 6, "200 ms of steps");
        pace.passed(false, 1000.0);
        pace.passed(true, 10.0);
        assert_eq!(pace.rows_apart(), 0, "nothing is saved");
    }

    #[test]
    fn where_others_are_expected_answers_beyond_the_target_take_turns() {
        let mut pace = Pace::new(100.0);
        (0..20).for_each(|_| pace.learn(32, 0, 0, 90.0));
        pace.learn(32, 0, 16, 90.0 + 40.0); // 2.5 ms a row
        assert_eq!(pace.moving(32, 16), 32, "nobody is expected");
        pace.see([1, 2].into_iter(), Duration::ZERO);
        assert_eq!([0, 4, 16, 99].map(|rows| pace.moving(32, rows)), [32, 32, 20, 16]);
    }

    #[test]
    fn answers_are_cheap_apart_where_a_step_costs_little_without_them() {
        let mut pace = Pace::new(100.0);
        (0..4).for_each(|_| pace.learn(30, 0, 0, 15.0));
        assert!(!pace.is_cheap_apart(30), "no step was shorter");
        pace.learn(30, 0, 40, 60.0);
        pace.learn(0, 0, 0, 0.0); // nothing was computed
        assert!(!pace.is_cheap_apart(30));
        (0..3).for_each(|_| pace.learn(0, 0, 20, 5.0));
        assert!(!pace.is_cheap_apart(30), "too few to be believed");
        pace.learn(0, 0, 20, 5.0);
        assert!(pace.is_cheap_apart(30) && !pace.is_cheap_apart(1));
        (0..9).for_each(|_| pace.learn(30, 0, 0, 50.0));
        assert!(!pace.is_cheap_apart(30), "they are a heavy load");
    }

    #[test]
    fn a_proposed_row_has_the_price_that_was_measured() {
        let mut pace = Pace::new(100.0);
        assert_eq!(pace.price(1), PRICE_FIRST);
        let cost = |answers: usize, rows: usize| 14.0 + answers as f64 + 1.5 * rows as f64;
        for rows in [0, 0, 4, 8, 0, 2, 8, 8, 0, 1] {
            pace.learn(1, rows, 0, cost(1, rows));
        }
        assert!((pace.price(1) - 1.25 * 0.1).abs() < 0.01, "{}", pace.price(1));
        // Beside many answers a token is cheap, so a row is dear.
        (0..20).for_each(|_| pace.learn(16, 0, 0, cost(16, 0)));
        assert!(pace.price(16) > 0.8, "{}", pace.price(16));
    }

    #[test]
    fn a_row_that_seemed_too_dear_is_tried_again() {
        let mut pace = Pace::new(100.0);
        (0..5).for_each(|_| pace.learn(1, 0, 0, 15.0));
        pace.learn(1, 4, 0, 5000.0); // the machine was busy
        assert_eq!(pace.price(1), MARGIN);
        let steps = (0..).take_while(|_| {
            pace.learn(1, 0, 0, 15.0);
            pace.price(1) > 0.8
        });
        assert!((50..400).contains(&steps.count()));
        // and where there never was a plain step, a row costs nothing that is known
        let mut pace = Pace::new(100.0);
        pace.learn(1, 4, 0, 20.0);
        assert_eq!(pace.price(1), PRICE_FIRST);
    }

    #[test]
    fn rows_of_prompts_are_not_taken_for_cheap_because_proposed_ones_are() {
        let mut pace = Pace::new(100.0);
        for _ in 0..20 {
            pace.learn(1, 0, 0, 15.0);
            pace.learn(1, 8, 0, 19.0);
            pace.learn(1, 4, 20, 15.0 + 2.0 + 40.0);
        }
        assert!((40..=43).contains(&pace.prompt_rows(1, 1)), "{}", pace.prompt_rows(1, 1));
    }

    #[test]
    fn a_clock_that_stands_still_means_no_bound() {
        let mut pace = Pace::new(100.0);
        pace.learn(1, 0, 64, 0.0);
        assert!(pace.prompt_rows(1, 1) > 1 << 40);
    }
}
