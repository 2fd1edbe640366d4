//! What steps cost on the average of the last while. The guess that plans the next step follows the
//! last two; a wait of thousands of steps that followed these would be told several times as long
//! after a few that were held up.

/// The average goes over so much time of its steps, milliseconds,
const MEMORY_MS: f64 = 1000.0;
/// and over as many steps at least.
const STEPS_MIN: f64 = 8.0;
/// Of a row no more than this is believed, or twice what was expected.
const ROW_MS: f64 = 50.0;

/// Sums over the last while. Times are milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Calm {
    answering: Sum,
    prompts: Sum,
}

/// Steps of one kind: their time, how many they are, and how many rows they had.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    ms: f64,
    steps: f64,
    rows: f64,
}

impl Calm {
    /// A step with so many answers and nothing else took so long.
    pub fn learn_answers(&mut self, answers: usize, took_ms: f64) {
        let expected_ms = self.answering.ms / self.answering.steps;
        self.answering.add(answers, took_ms, expected_ms, MEMORY_MS);
    }

    /// So many rows of prompts added so much to a step.
    pub fn learn_rows(&mut self, rows: usize, took_ms: f64) {
        let part = rows as f64 / self.prompts.rows;
        let most_ms = (ROW_MS * rows as f64).min(MEMORY_MS);
        self.prompts.add(rows, took_ms, self.prompts.ms * part, most_ms);
    }

    /// A step with answers only, and how many these are.
    pub fn answers(&self) -> (f64, f64) {
        let Sum { ms, steps, rows } = self.answering;
        if steps > 0.0 { (ms / steps, rows / steps) } else { (0.0, 0.0) }
    }

    /// What one more row adds; `None` before the first prompt.
    pub fn row_ms(&self) -> Option<f64> {
        (self.prompts.rows > 0.0).then(|| self.prompts.ms / self.prompts.rows)
    }
}

impl Sum {
    /// One more step. What took longer than this and than twice what was expected was held up by
    /// something else.
    fn add(&mut self, rows: usize, took_ms: f64, expected_ms: f64, most_ms: f64) {
        let most = if self.steps > 0.0 { most_ms.max(2.0 * expected_ms) } else { took_ms };
        self.ms += took_ms.min(most);
        self.steps += 1.0;
        self.rows += rows as f64;
        let memory = MEMORY_MS.max(STEPS_MIN * self.ms / self.steps);
        if self.ms > memory {
            let kept = memory / self.ms;
            (self.ms, self.steps, self.rows) = (memory, self.steps * kept, self.rows * kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_steps_that_were_held_up_change_little() {
        let mut calm = Calm::default();
        (0..10_000).for_each(|_| calm.learn_answers(2, 0.1));
        (0..5).for_each(|_| calm.learn_answers(2, 10.0));
        let (answers_ms, answers) = calm.answers();
        assert!((0.1..0.11).contains(&answers_ms), "{answers_ms}");
        assert!((answers - 2.0).abs() < 1e-9, "{answers}");
        calm.learn_answers(2, f64::MAX);
        assert!(calm.answers().0 < 0.3, "{:?}", calm.answers());
    }

    #[test]
    fn a_slow_start_is_forgotten_as_fast_as_other_steps_come() {
        let mut calm = Calm::default();
        calm.learn_answers(1, 50.0);
        (0..999).for_each(|_| calm.learn_answers(1, 0.1));
        assert!((0.1..0.2).contains(&calm.answers().0), "{:?}", calm.answers());
    }

    #[test]
    fn what_stays_is_believed_within_some_memory() {
        let mut calm = Calm::default();
        (0..100).for_each(|_| calm.learn_answers(4, 20.0));
        (0..100).for_each(|_| calm.learn_answers(30, 60.0)); // six seconds
        let (answers_ms, answers) = calm.answers();
        assert!((58.0..60.0).contains(&answers_ms), "{answers_ms}");
        assert!((28.7..30.0).contains(&answers), "{answers}");
        (0..40).for_each(|_| calm.learn_answers(1, 4000.0)); // a step is longer than the memory
        assert!(calm.answers().0 > 3700.0, "{:?}", calm.answers());
    }

    /// The last token of a prompt that was computed before is a step's only row.
    #[test]
    fn a_row_counts_as_one_however_few_are_in_a_step() {
        let mut calm = Calm::default();
        assert_eq!(calm.row_ms(), None);
        (0..100).for_each(|_| calm.learn_rows(512, 512.0 * 0.2));
        (0..3).for_each(|_| calm.learn_rows(1, 20.0));
        let row_ms = calm.row_ms().unwrap();
        assert!((0.2..0.23).contains(&row_ms), "{row_ms}");
        (0..2).for_each(|_| calm.learn_rows(1, 5000.0));
        assert!(calm.row_ms().unwrap() < 0.3, "{:?}", calm.row_ms());
        (0..40).for_each(|_| calm.learn_rows(16, 320.0)); // short ones, and it stays so
        assert!(calm.row_ms().unwrap() > 15.0, "{:?}", calm.row_ms());
    }
}
