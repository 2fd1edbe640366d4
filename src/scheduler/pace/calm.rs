//! What steps cost on the average of the last while. The guess that plans the next step follows the
//! last two; a wait of thousands of steps that followed these would be told several times as long
//! after a few that were held up.

/// The average goes over so much time of its steps, milliseconds,
const MEMORY_MS: f64 = 1000.0;
/// and over as many steps at least.
const STEPS_MIN: f64 = 8.0;

/// Times are milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Calm {
    /// A step with answers only,
    pub answers_ms: f64,
    /// and how many these are.
    pub answers: f64,
    /// What one more row adds; `None` before the first prompt.
    pub row_ms: Option<f64>,
    /// How many steps of each kind count.
    answer_steps: f64,
    row_steps: f64,
}

impl Calm {
    /// A step with so many answers took so long.
    pub fn learn_answers(&mut self, answers: usize, took_ms: f64) {
        let known = self.answer_steps > 0.0;
        let part = part(&mut self.answer_steps, self.answers_ms);
        let took_ms = believed(took_ms, known.then_some(self.answers_ms));
        self.answers_ms += part * (took_ms - self.answers_ms);
        self.answers += part * (answers as f64 - self.answers);
    }

    /// So many rows added so much to a step.
    pub fn learn_rows(&mut self, rows: usize, took_ms: f64) {
        let known_ms = self.row_ms.map(|row_ms| row_ms * rows as f64);
        let part = part(&mut self.row_steps, known_ms.unwrap_or_default());
        let row_ms = believed(took_ms, known_ms) / rows as f64;
        self.row_ms = Some(self.row_ms.map_or(row_ms, |known| known + part * (row_ms - known)));
    }
}

/// One more step counts that is expected to take so long: the weight of it.
fn part(steps: &mut f64, expected_ms: f64) -> f64 {
    let memory = (MEMORY_MS / expected_ms).max(STEPS_MIN);
    *steps = (*steps + 1.0).min(memory);
    1.0 / *steps
}

/// A step that took longer than all that is remembered was held up by something else.
fn believed(took_ms: f64, known_ms: Option<f64>) -> f64 {
    known_ms.map_or(took_ms, |known_ms| took_ms.min(MEMORY_MS.max(2.0 * known_ms)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_steps_that_were_held_up_change_little() {
        let mut calm = Calm::default();
        (0..10_000).for_each(|_| calm.learn_answers(2, 0.1));
        (0..5).for_each(|_| calm.learn_answers(2, 10.0));
        assert!((0.1..0.11).contains(&calm.answers_ms), "{}", calm.answers_ms);
        assert!((calm.answers - 2.0).abs() < 1e-9, "{}", calm.answers);
        calm.learn_answers(2, f64::MAX);
        assert!(calm.answers_ms < 0.3, "{}", calm.answers_ms);
    }

    #[test]
    fn a_slow_start_is_forgotten_as_fast_as_other_steps_come() {
        let mut calm = Calm::default();
        calm.learn_answers(1, 50.0);
        (0..999).for_each(|_| calm.learn_answers(1, 0.1));
        assert!((0.1..0.2).contains(&calm.answers_ms), "{}", calm.answers_ms);
    }

    #[test]
    fn what_stays_is_believed_within_some_memory() {
        let mut calm = Calm::default();
        (0..100).for_each(|_| calm.learn_answers(4, 20.0));
        (0..100).for_each(|_| calm.learn_answers(30, 60.0)); // six seconds
        assert!((58.0..60.0).contains(&calm.answers_ms), "{}", calm.answers_ms);
        assert!((28.7..30.0).contains(&calm.answers), "{}", calm.answers);
        (0..40).for_each(|_| calm.learn_answers(1, 4000.0)); // a step is longer than the memory
        assert!(calm.answers_ms > 3900.0, "{}", calm.answers_ms);
    }

    #[test]
    fn rows_have_their_average_too() {
        let mut calm = Calm::default();
        assert_eq!(calm.row_ms, None);
        (0..100).for_each(|_| calm.learn_rows(50, 100.0));
        calm.learn_rows(50, 1000.0);
        let row_ms = calm.row_ms.unwrap();
        assert!((2.0..5.0).contains(&row_ms), "{row_ms}");
    }
}
