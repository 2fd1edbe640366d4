//! How fast to learn at each step: a line up, a hold, a line down to (almost) nothing.
//!
//! The shape is that of "warm-up, stable, decay": training may go on from the stable part for as
//! long as there is time, and the decay is short.

/// Learning rate by step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The rate that holds between warm-up and decay.
    pub peak: f64,
    /// Steps of the rise.
    pub warmup_steps: f64,
    /// Part of the whole that the fall takes, at its end.
    pub decay_share: f64,
}

impl Schedule {
    /// The rate of `step` when `done` (0 to 1) of the whole is over.
    pub fn rate(&self, step: usize, done: f64) -> f64 {
        let rise = (step as f64 + 1.0) / self.warmup_steps.max(1.0);
        let fall = (1.0 - done) / self.decay_share.max(f64::MIN_POSITIVE);
        self.peak * rise.min(fall).clamp(0.01, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_holds_and_falls() {
        let schedule = Schedule { peak: 1.0, warmup_steps: 10.0, decay_share: 0.2 };
        assert!((schedule.rate(0, 0.0) - 0.1).abs() < 1e-12);
        assert_eq!(schedule.rate(10, 0.5), 1.0);
        assert!((schedule.rate(1000, 0.9) - 0.5).abs() < 1e-12);
        assert_eq!(schedule.rate(1000, 1.0), 0.01, "never nothing");
    }
}
