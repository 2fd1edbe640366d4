//! One row of logits to one token, for one request. The arithmetic is `hearth_kernels::sampling`.

use std::collections::HashMap;

use hearth_kernels::sampling::{self, Scratch, Seen};

use super::grammar::Mask;
use super::handle::{GenerateRequest, Logprobs};
use crate::types::TokenId;

/// Working memory of the engine thread.
pub(super) struct Sampler {
    /// Ids from here on are padding of the embedding and are never seen.
    vocab_len: usize,
    row: Vec<f32>,
    scratch: Scratch,
}

/// The tokens that a sequence has, for penalties. Empty when none is asked for.
pub(super) struct History {
    seen: Vec<Seen>,
    place: HashMap<TokenId, usize>,
    wanted: bool,
}

impl History {
    pub fn new(request: &GenerateRequest) -> Self {
        let p = &request.sampling;
        let wanted =
            p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0;
        let mut history = Self { seen: Vec::new(), place: HashMap::new(), wanted };
        request.prompt.iter().for_each(|&token| history.note(token, 0));
        history
    }

    /// A generated token.
    pub fn push(&mut self, token: TokenId) {
        self.note(token, 1);
    }

    fn note(&mut self, token: TokenId, count: u32) {
        if !self.wanted {
            return;
        }
        let seen = &mut self.seen;
        let place = *self.place.entry(token).or_insert_with(|| {
            seen.push(Seen { token, in_output: 0 });
            seen.len() - 1
        });
        seen[place].in_output += count;
    }
}

impl Sampler {
    pub fn new(vocab_len: usize) -> Self {
        Self { vocab_len, row: Vec::new(), scratch: Scratch::new() }
    }

    /// Ids from here on are padding.
    pub fn vocab_len(&self) -> usize {
        self.vocab_len
    }

    /// The token at `position` of the answer, out of `mask` where there is one; `None` when none is
    /// left to choose (the logits are not numbers, or everything is forbidden).
    pub fn sample(
        &mut self,
        logits: &[f32],
        request: &GenerateRequest,
        history: &History,
        position: usize,
        mask: Option<&Mask>,
    ) -> Option<TokenId> {
        let row = &mut self.row;
        row.clear();
        row.extend_from_slice(&logits[..self.vocab_len]);
        sampling::penalise(row, &request.sampling, &history.seen);
        sampling::bias(row, &request.logit_bias);
        if position < request.min_tokens {
            let known = |id: &&TokenId| (**id as usize) < self.vocab_len;
            let stops: Vec<TokenId> = request.stop_ids.iter().filter(known).copied().collect();
            sampling::forbid(row, &stops);
        }
        if let Some(mask) = mask {
            mask.apply(row);
        }
        let (params, scratch) = (&request.sampling, &mut self.scratch);
        sampling::sample(row, params, request.seed, position as u64, scratch)
    }

    /// Log-probability of `token` under the raw logits, and the `top` best alternatives.
    pub fn logprobs(&mut self, logits: &[f32], token: TokenId, top: usize) -> Logprobs {
        let found = sampling::log_probs(&logits[..self.vocab_len], token, top);
        Logprobs { logprob: found.chosen, top: found.top }
    }
}
