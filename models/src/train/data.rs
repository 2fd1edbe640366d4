//! From tokens to batches: sequences of like length together, padded to the longest.

use crate::batch::ForwardBatch;

/// One sequence with the tokens that are to be learned.
#[derive(Clone, Debug)]
pub struct Example {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// How much the prediction of each token counts; 0 is not at all. `[tokens]`
    pub weights: Vec<f32>,
}

/// Sequences of one length that make one forward pass.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Rows whose logits are wanted are those with a target.
    pub forward: ForwardBatch,
    /// The token that each logit row should predict.
    pub targets: Vec<u32>,
    /// What each prediction counts. `[targets]`
    pub weights: Vec<f32>,
}

impl Batch {
    /// Pads all examples to the longest; padding is never seen (attention is causal) nor learned.
    pub fn new(examples: &[Example]) -> Self {
        let len = examples.iter().map(|e| e.tokens.len()).max().unwrap_or(0);
        let mut forward = ForwardBatch::empty();
        let (mut targets, mut weights) = (Vec::new(), Vec::new());
        for (i, example) in examples.iter().enumerate() {
            let mut tokens = example.tokens.clone();
            tokens.resize(len, 0);
            let start = forward.row_count();
            for row in 0..example.tokens.len().saturating_sub(1) {
                if example.weights[row + 1] > 0.0 {
                    forward.logit_rows.push((start + row) as u32);
                    targets.push(example.tokens[row + 1]);
                    weights.push(example.weights[row + 1]);
                }
            }
            forward.push(&tokens, 0, vec![i as u32], len.max(1));
        }
        Self { forward, targets, weights }
    }

    /// The sum of all weights: what a mean over the batch divides by.
    pub fn weight(&self) -> f32 {
        self.weights.iter().sum()
    }
}

/// Makes batches of about one size in tokens out of a stream of examples.
pub struct Loader<I> {
    examples: I,
    /// Examples read ahead, so that a batch finds others of its length.
    shelf: Vec<Example>,
    /// Examples to read ahead.
    shelf_len: usize,
    /// Tokens of a batch, padding included.
    pub batch_tokens: usize,
}

impl<I: Iterator<Item = Example>> Loader<I> {
    /// Reads `shelf_len` examples ahead.
    pub fn new(examples: I, batch_tokens: usize, shelf_len: usize) -> Self {
        Self { examples, shelf: Vec::new(), shelf_len, batch_tokens }
    }

    /// The next batch, in `parts` of nearly equal size. Examples are taken around `place` (0 to 1)
    /// of the lengths on the shelf, so that a caller with random places sees all lengths.
    pub fn next(&mut self, parts: usize, place: f64) -> Option<Vec<Batch>> {
        while self.shelf.len() < self.shelf_len {
            match self.examples.next() {
                Some(example) => self.shelf.push(example),
                None => break,
            }
        }
        self.shelf.sort_by_key(|e| e.tokens.len());
        let start = ((self.shelf.len() as f64 * place) as usize).min(self.shelf.len());
        let mut start = start.min(self.shelf.len().saturating_sub(1));
        let mut end = start;
        let fits = |start: usize, end: usize, shelf: &[Example]| {
            (end - start) * shelf[end - 1].tokens.len() <= self.batch_tokens
        };
        while end < self.shelf.len() && (end == start || fits(start, end + 1, &self.shelf)) {
            end += 1;
        }
        while start > 0 && fits(start - 1, end, &self.shelf) {
            start -= 1;
        }
        let taken: Vec<Example> = self.shelf.drain(start..end).collect();
        let size = taken.len().div_ceil(parts.max(1)).max(1);
        (!taken.is_empty()).then(|| taken.chunks(size).map(Batch::new).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(len: usize) -> Example {
        let weights = (0..len).map(|i| if i >= len / 2 { 1.0 } else { 0.0 }).collect();
        Example { tokens: (1..=len as u32).collect(), weights }
    }

    #[test]
    fn rows_point_at_the_token_before_their_target() {
        let batch = Batch::new(&[example(3), example(5)]);
        assert_eq!(batch.forward.row_count(), 10, "both are five long now");
        assert!(batch.forward.is_even());
        assert_eq!(batch.forward.logit_rows, [0, 1, 6, 7, 8]);
        assert_eq!(batch.targets, [2, 3, 3, 4, 5]);
        assert_eq!(batch.weight(), 5.0);
    }

    #[test]
    fn every_example_comes_once_and_no_batch_is_too_large() {
        let mut loader = Loader::new((2..40).map(example), 64, 16);
        let (mut seen, mut step) = (0, 0);
        while let Some(parts) = loader.next(2, f64::from(step % 7) / 7.0) {
            assert!(parts.len() <= 2);
            assert!(parts.iter().map(|b| b.forward.row_count()).sum::<usize>() <= 64);
            seen += parts.iter().map(|b| b.forward.sequence_count()).sum::<usize>();
            step += 1;
        }
        assert_eq!(seen, 38);
    }
}
