//! What the choices of one prompt have used, however they end.
//!
//! `Finished` tells it of a choice that was read to its end; of one that was dropped, or that
//! failed, nobody else would. A token that the engine is choosing at that moment is nobody's.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::types::Usage;

/// Counts each choice once, when it is dropped.
#[derive(Debug)]
pub struct Meter {
    /// Tokens of the prompt, once it was computed.
    prompt: AtomicUsize,
    /// The least that any choice found in the prefix cache: what was there before.
    cached: AtomicUsize,
    /// Tokens of all choices.
    completion: AtomicUsize,
}

impl Default for Meter {
    fn default() -> Self {
        let [prompt, completion] = [0, 0].map(AtomicUsize::new);
        Self { prompt, cached: AtomicUsize::new(usize::MAX), completion }
    }
}

impl Meter {
    /// A choice whose prompt was computed.
    pub(super) fn add(&self, usage: Usage) {
        self.prompt.fetch_max(usage.prompt, Ordering::Relaxed);
        self.cached.fetch_min(usage.cached, Ordering::Relaxed);
        self.completion.fetch_add(usage.completion, Ordering::Relaxed);
    }

    /// All of them so far.
    pub fn usage(&self) -> Usage {
        let prompt = self.prompt.load(Ordering::Relaxed);
        let cached = self.cached.load(Ordering::Relaxed).min(prompt);
        Usage { prompt, cached, completion: self.completion.load(Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_share_a_prompt() {
        let meter = Meter::default();
        assert_eq!(meter.usage(), Usage::default());
        meter.add(Usage { prompt: 9, cached: 8, completion: 3 });
        meter.add(Usage { prompt: 9, cached: 2, completion: 4 });
        assert_eq!(meter.usage(), Usage { prompt: 9, cached: 2, completion: 7 });
    }
}
