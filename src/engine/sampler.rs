//! One row of logits to one token, for one request. The arithmetic is `hearth_kernels::sampling`.

use std::collections::{BTreeMap, HashMap};

use hearth_kernels::sampling::{self, Scratch, Seen};
use hearth_models::TokenEdit;

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

    /// Penalties were asked for.
    pub fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// What [`Sampler::sample`] does to the logits before it chooses, token by token.
    pub fn edits(
        &self,
        request: &GenerateRequest,
        position: usize,
        vocab_len: usize,
    ) -> Vec<TokenEdit> {
        let params = &request.sampling;
        let mut edits: BTreeMap<TokenId, TokenEdit> = BTreeMap::new();
        let mut edit = |token: TokenId, change: &dyn Fn(&mut TokenEdit)| {
            if (token as usize) < vocab_len {
                let none = TokenEdit { token, divide: 1.0, subtract: 0.0, add: 0.0 };
                change(edits.entry(token).or_insert(none));
            }
        };
        for Seen { token, in_output } in &self.seen {
            edit(*token, &|e| {
                e.divide = params.repetition_penalty;
                if *in_output > 0 {
                    let often = params.frequency_penalty * *in_output as f32;
                    e.subtract = params.presence_penalty + often;
                }
            });
        }
        for (token, bias) in &request.logit_bias {
            edit(*token, &|e| e.add += bias);
        }
        if position < request.min_tokens {
            request.stop_ids.iter().for_each(|id| edit(*id, &|e| e.add = f32::NEG_INFINITY));
        }
        edits.into_values().collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::handle::SamplingParams;

    /// The edits of a device and the steps of the host are the same change of a row.
    #[test]
    fn edits_do_what_sampling_does() {
        let sampling = SamplingParams {
            temperature: 0.0,
            repetition_penalty: 1.5,
            presence_penalty: 0.25,
            frequency_penalty: 0.5,
            ..SamplingParams::default()
        };
        let request = GenerateRequest {
            prompt: vec![1, 2],
            sampling,
            logit_bias: vec![(2, 3.0), (4, -1.0), (60, 9.0)],
            stop_ids: [5, 6].into(),
            min_tokens: 3,
            ..GenerateRequest::default()
        };
        let mut history = History::new(&request);
        [2, 3, 3].into_iter().for_each(|token| history.push(token));
        let row: Vec<f32> = (0..8).map(|i| (i as f32 - 3.5) * 0.75).collect();
        for position in [0, 3] {
            let mut host = row.clone();
            sampling::penalise(&mut host, &request.sampling, &history.seen);
            sampling::bias(&mut host, &request.logit_bias[..2]);
            if position < request.min_tokens {
                sampling::forbid(&mut host, &request.stop_ids);
            }
            let mut device = row.clone();
            for edit in history.edits(&request, position, 8) {
                let x = &mut device[edit.token as usize];
                *x = if *x > 0.0 { *x / edit.divide } else { *x * edit.divide };
                *x = *x - edit.subtract + edit.add;
            }
            assert_eq!(device, host, "at {position}");
        }
    }
}
