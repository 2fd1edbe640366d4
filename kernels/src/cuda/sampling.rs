//! Tokens out of logits on the device (`cuda/sampling.cu`): the CPU's meaning, and its generator.

use std::sync::PoisonError;

use super::gpu::{Arg, Grid};
use super::memory::Buffer;
use super::parcel::Parcel;
use super::{Error, Float, Gpu, Result, Rows};
use crate::sampling::{SamplingParams, TokenEdit};

/// How a token is to be chosen from one row.
#[derive(Clone, Debug)]
pub struct Pick {
    /// What is done to the logits before, each token once.
    pub edits: Vec<TokenEdit>,
    /// Temperature, `top_k`, `top_p`, `min_p`.
    pub params: SamplingParams,
    /// Key of the generator.
    pub seed: u64,
    /// Position of the token in the answer.
    pub position: u64,
    /// The tokens that may be chosen: bit `i % 32` of word `i / 32` is token `i`; `None` is all.
    pub mask: Option<Vec<u32>>,
}

/// Words of the numbers of one row: two numbers of two, five of one.
const ROW_WORDS: usize = 9;
/// A row from which nothing is chosen.
const LEFT_OUT: i32 = -2;
/// A row that may become any token.
const NO_MASK: u32 = u32::MAX;

/// Tokens that are chosen, one for each row.
pub struct Choices(Parcel);

impl Choices {
    /// Waits for them: each token, or `None` where every one is ruled out. Rows without a pick
    /// yield `None` on the outside.
    pub fn open(self) -> Result<Vec<Option<Option<u32>>>> {
        let ids: Vec<i32> = self.0.open()?;
        let chosen = |id: i32| (id != LEFT_OUT).then(|| u32::try_from(id).ok());
        Ok(ids.into_iter().map(chosen).collect())
    }
}

impl Gpu {
    /// Chooses from the rows that have a pick, out of the first `vocab_len` tokens. What is chosen
    /// stays where [`Gpu::step`] finds it, until the next choice.
    pub fn choose(
        &self,
        logits: &Rows,
        vocab_len: usize,
        picks: &[Option<Pick>],
    ) -> Result<Choices> {
        let (choices, out) = self.chosen_by(logits, vocab_len, picks)?;
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        *chosen = Some((out, picks.len()));
        Ok(choices)
    }

    /// The same of rows that belong to no pass: what the last one chose stays where it is.
    pub fn choose_apart(
        &self,
        logits: &Rows,
        vocab_len: usize,
        picks: &[Option<Pick>],
    ) -> Result<Choices> {
        Ok(self.chosen_by(logits, vocab_len, picks)?.0)
    }

    /// What is chosen, on its way and on the device.
    fn chosen_by(
        &self,
        logits: &Rows,
        vocab_len: usize,
        picks: &[Option<Pick>],
    ) -> Result<(Choices, Buffer)> {
        let count = picks.len();
        if logits.float != Float::F32 || count > logits.count || vocab_len > logits.width {
            return Err(Error::Missing("logits of every row that is chosen from".into()));
        }
        self.edit(logits, vocab_len, picks)?;
        let sent = self.send_words(&words(vocab_len, picks))?;
        let out = self.arena.take(4 * count)?;
        let list = |words_before: usize| sent.at(4 * words_before * count).into();
        let args = [
            logits.at(),
            vocab_len.into(),
            logits.width.into(),
            list(4),
            list(5),
            list(6),
            list(7),
            list(0),
            list(2),
            list(8),
            list(ROW_WORDS),
            out.at(0).into(),
        ];
        // SAFETY: lists of `count` numbers, laid out by `words`, and as many masks of the
        // vocabulary as the last of them counts; `count` rows of logits.
        unsafe { self.launch("sample", Grid::new(count, 1024), &args)? };
        let choices = self.fetch(out.at(0), count)?;
        Ok((Choices(choices), out))
    }
}

impl Gpu {
    /// Applies the edits of all rows.
    fn edit(&self, logits: &Rows, vocab_len: usize, picks: &[Option<Pick>]) -> Result<()> {
        let rows = picks.iter().enumerate().filter_map(|(row, pick)| Some((row, pick.as_ref()?)));
        let all: Vec<(u32, TokenEdit)> = rows
            .flat_map(|(row, pick)| pick.edits.iter().map(move |edit| (row as u32, *edit)))
            .filter(|(_, edit)| (edit.token as usize) < vocab_len)
            .collect();
        if all.is_empty() {
            return Ok(());
        }
        let list = |of: &dyn Fn(&(u32, TokenEdit)) -> u32| all.iter().map(of).collect::<Vec<_>>();
        let lists = [
            list(&|(row, _)| *row),
            list(&|(_, edit)| edit.token),
            list(&|(_, edit)| edit.divide.to_bits()),
            list(&|(_, edit)| edit.subtract.to_bits()),
            list(&|(_, edit)| edit.add.to_bits()),
        ];
        let sent = self.send_words(&lists.concat())?;
        let mut args: Vec<Arg> = vec![logits.at(), logits.width.into()];
        args.extend((0..lists.len()).map(|i| Arg::from(sent.at(4 * i * all.len()))));
        args.push(all.len().into());
        // SAFETY: rows of `picks`, which are those of the logits; tokens within the vocabulary.
        unsafe { self.launch("edit_logits", Grid::new(all.len().div_ceil(256), 256), &args) }
    }
}

/// Seeds, positions, temperatures, `top_k`, `top_p`, `min_p`, which mask: a list of each, one
/// behind the other; then the masks, each as long as the vocabulary.
fn words(vocab_len: usize, picks: &[Option<Pick>]) -> Vec<u32> {
    let masks = picks.iter().flatten().filter_map(|pick| pick.mask.as_ref());
    let (count, len) = (picks.len(), vocab_len.div_ceil(32));
    let mut words = Vec::with_capacity(count * ROW_WORDS + len * masks.clone().count());
    let wide = |x: u64| [x as u32, (x >> 32) as u32];
    let pairs: [&dyn Fn(&Pick) -> u64; 2] = [&|p| p.seed, &|p| p.position];
    for pair in pairs {
        let number = |pick: &Option<Pick>| pick.as_ref().map_or(0, pair);
        words.extend(picks.iter().flat_map(|pick| wide(number(pick))));
    }
    let nothing = f32::NAN.to_bits();
    let top_k = |p: &Pick| i32::try_from(p.params.top_k).unwrap_or(i32::MAX) as u32;
    let mut list = |absent: u32, number: &dyn Fn(&Pick) -> u32| {
        words.extend(picks.iter().map(|pick| pick.as_ref().map_or(absent, number)));
    };
    list(nothing, &|p| p.params.temperature.to_bits());
    list(0, &top_k);
    list(0, &|p| p.params.top_p.to_bits());
    list(0, &|p| p.params.min_p.to_bits());
    let mut place = 0;
    words.extend(picks.iter().map(|pick| {
        let masked = pick.as_ref().is_some_and(|pick| pick.mask.is_some());
        place += u32::from(masked);
        if masked { place - 1 } else { NO_MASK }
    }));
    for mask in masks {
        let known = &mask[..mask.len().min(len)];
        words.extend_from_slice(known);
        words.extend(std::iter::repeat_n(0, len - known.len()));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_stands_in_its_list() {
        let params = SamplingParams::default();
        let pick = |seed, mask: Option<Vec<u32>>| {
            Some(Pick { edits: Vec::new(), params, seed, position: 7, mask })
        };
        let picks =
            [pick(5 << 32 | 6, None), None, pick(1, Some(vec![9])), pick(2, Some(vec![8; 4]))];
        let words = words(70, &picks);
        assert_eq!(words.len(), 4 * ROW_WORDS + 2 * 3);
        assert_eq!(words[..8], [6, 5, 0, 0, 1, 0, 2, 0], "two words each, the low one first");
        assert_eq!(words[8..16], [7, 0, 0, 0, 7, 0, 7, 0]);
        assert_eq!(words[16], 1f32.to_bits());
        assert!(f32::from_bits(words[17]).is_nan(), "nothing is chosen");
        assert_eq!(words[32..36], [NO_MASK, NO_MASK, 0, 1]);
        assert_eq!(words[36..], [9, 0, 0, 8, 8, 8], "as long as the vocabulary");
    }
}
