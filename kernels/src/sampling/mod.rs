//! One row of logits to one token.
//!
//! The steps, in the order in which a caller takes them; each is a function on one row, f32:
//!
//! 1. [`forbid_from`] the padding of the vocabulary;
//! 2. [`log_probs`] of the raw row, where they are wanted (OpenAI's `logprobs`; needs the token,
//!    so on a copy or before the next steps write);
//! 3. [`penalise`], [`bias`], then [`allow_only`] (grammars) and [`forbid`];
//! 4. [`sample`]: `temperature` (0 is greedy), softmax, then `top_k`, `top_p` over what top_k left,
//!    `min_p` relative to the best token; then one draw.
//!
//! This is the order of Hugging Face `generate`. A logit of minus infinity is a token that is never
//! chosen, and NaN counts as such. Tokens of equal weight rank by id, the lowest first.
//!
//! The draw depends on seed and position alone ([`uniform`]), and a row's weights on the row alone,
//! bit by bit, for every instruction set: so a seeded request repeats, whatever it is batched with.
//!
//! Deliberately absent: beam search, state, and text. Nothing here sorts a whole vocabulary.

mod philox;
mod rank;
mod softmax;

pub use philox::{philox4x32_10, uniform};
pub use rank::Scratch;
pub use softmax::{LogProbs, log_probs, log_probs_with};

use crate::Isa;

/// How a token is chosen. The default is OpenAI's: temperature 1 and nothing else.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it; 0 (or less) takes the best token.
    pub temperature: f32,
    /// Only this many best tokens; 0 is all.
    pub top_k: usize,
    /// Only the fewest best tokens that together have this probability; 1 or more is all.
    pub top_p: f32,
    /// Only tokens at least this probable relative to the best one; 0 is all.
    pub min_p: f32,
    /// Logits of tokens in prompt or output are divided by it if positive, else multiplied.
    pub repetition_penalty: f32,
    /// Taken from the logit of every token that the output has.
    pub presence_penalty: f32,
    /// Taken from the logit of a token once for each time that the output has it.
    pub frequency_penalty: f32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

/// A token of prompt or output; a list has each token once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its id.
    pub token: u32,
    /// How often the output has it; 0 when only the prompt does.
    pub in_output: u32,
}

/// What penalties, biases and forbidden tokens come to for one token: its logit is divided if it is
/// positive, else multiplied, then `subtract` is taken from it and `add` added.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenEdit {
    /// Its id.
    pub token: u32,
    /// 1 changes nothing.
    pub divide: f32,
    /// 0 changes nothing.
    pub subtract: f32,
    /// 0 changes nothing; minus infinity forbids it.
    pub add: f32,
}

/// Applies the repetition, presence and frequency penalties.
///
/// # Panics
/// When a token is outside the row; so do the other functions that take ids.
pub fn penalise(logits: &mut [f32], params: &SamplingParams, seen: &[Seen]) {
    for Seen { token, in_output } in seen {
        let logit = &mut logits[*token as usize];
        if params.repetition_penalty != 1.0 {
            let penalty = params.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        if *in_output > 0 {
            *logit -= params.presence_penalty + params.frequency_penalty * *in_output as f32;
        }
    }
}

/// Adds to the logits of chosen tokens (OpenAI's `logit_bias`).
pub fn bias(logits: &mut [f32], biases: &[(u32, f32)]) {
    for (token, bias) in biases {
        logits[*token as usize] += bias;
    }
}

/// Rules out some tokens.
pub fn forbid(logits: &mut [f32], tokens: &[u32]) {
    for token in tokens {
        logits[*token as usize] = f32::NEG_INFINITY;
    }
}

/// Rules out every token from `first` on: the padding of a vocabulary.
pub fn forbid_from(logits: &mut [f32], first: usize) {
    let first = first.min(logits.len());
    logits[first..].fill(f32::NEG_INFINITY);
}

/// Rules out every token whose bit is 0. Bit `i % 32` of word `i / 32` is token `i`; tokens beyond
/// the last word are ruled out.
pub fn allow_only(logits: &mut [f32], allowed: &[u32]) {
    for (word, logits) in allowed.iter().zip(logits.chunks_mut(32)) {
        if *word == 0 {
            logits.fill(f32::NEG_INFINITY);
        } else if *word != u32::MAX {
            for (bit, logit) in logits.iter_mut().enumerate() {
                *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
            }
        }
    }
    forbid_from(logits, allowed.len() * 32);
}

/// The token with the largest logit, the lowest id among equals; `None` when every token is ruled
/// out.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let largest = softmax::largest(Isa::best(), logits);
    if largest == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|x| *x == largest).map(|id| id as u32)
}

/// Chooses the token at `position` of a sequence with this seed; `None` when every token is ruled
/// out.
pub fn sample(
    logits: &[f32],
    params: &SamplingParams,
    seed: u64,
    position: u64,
    scratch: &mut Scratch,
) -> Option<u32> {
    sample_with(Isa::best(), logits, params, seed, position, scratch)
}

/// [`sample`] with a chosen instruction set.
pub fn sample_with(
    isa: Isa,
    logits: &[f32],
    params: &SamplingParams,
    seed: u64,
    position: u64,
    scratch: &mut Scratch,
) -> Option<u32> {
    let largest = softmax::largest(isa, logits);
    if params.temperature <= 0.0 || params.top_k == 1 || !largest.is_finite() {
        return argmax(logits);
    }
    scratch.weigh(isa, logits, largest, params.temperature);
    if params.top_k > 0 {
        scratch.keep_count(params.top_k);
    }
    if params.top_p < 1.0 {
        scratch.keep_mass(f64::from(params.top_p));
    }
    if params.min_p > 0.0 {
        scratch.keep_weight(params.min_p);
    }
    scratch.draw(uniform(seed, position))
}

#[cfg(test)]
mod tests;
