//! How models stand, for those who watch: metrics, the operator.

use std::time::Duration;

use super::residency::State;

/// What is known of a model from outside.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// Its id.
    pub id: String,
    /// Where it is.
    pub state: State,
    /// Requests that hold it.
    pub held: usize,
    /// Requests that wait for it to come in.
    pub waiting: usize,
    /// It never leaves.
    pub pinned: bool,
    /// How long it stays yet, if nobody asks; `None`: until its memory is needed.
    pub stays: Option<Duration>,
    /// What it takes at most while it is in memory: weights, working memory, keys and values.
    pub bytes: u64,
    /// What happened to it so far.
    pub counts: Counts,
}

/// What happened to a model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Loads that went well. The last one made the generation that is in memory.
    pub loads: u64,
    /// Loads that failed.
    pub failures: u64,
    /// Times it left because another needed the room,
    pub evicted: u64,
    /// because nobody asked for it,
    pub idle: u64,
    /// because the operator wanted it so.
    pub asked: u64,
    /// Time that the loads took.
    pub load_time: Duration,
}
