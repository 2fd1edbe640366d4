//! Tokens out of logits on the device (`cuda/sampling.cu`): the CPU's meaning, and its generator.

use std::sync::PoisonError;

use super::gpu::{Arg, Grid};
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
}

/// Bytes of the numbers of one row: two of 8, four of 4.
const ROW_BYTES: usize = 32;
/// A row from which nothing is chosen.
const LEFT_OUT: i32 = -2;

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
        let count = picks.len();
        if logits.float != Float::F32 || count > logits.count || vocab_len > logits.width {
            return Err(Error::Missing("logits of every row that is chosen from".into()));
        }
        self.edit(logits, vocab_len, picks)?;
        let numbers = self.send(&numbers(picks))?;
        let out = self.arena.take(4 * count)?;
        let list = |bytes_before: usize| numbers.at(bytes_before * count).into();
        let args = [
            logits.at(),
            vocab_len.into(),
            logits.width.into(),
            list(16),
            list(20),
            list(24),
            list(28),
            list(0),
            list(8),
            out.at(0).into(),
        ];
        // SAFETY: lists of `count` numbers, laid out by `numbers`; `count` rows of logits.
        unsafe { self.launch("sample", Grid::new(count, 1024), &args)? };
        let choices = self.fetch(out.at(0), count)?;
        *self.chosen.lock().unwrap_or_else(PoisonError::into_inner) = Some((out, count));
        Ok(Choices(choices))
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
        let sent = self.send(&lists.concat())?;
        let mut args: Vec<Arg> = vec![logits.at(), logits.width.into()];
        args.extend((0..lists.len()).map(|i| Arg::from(sent.at(4 * i * all.len()))));
        args.push(all.len().into());
        // SAFETY: rows of `picks`, which are those of the logits; tokens within the vocabulary.
        unsafe { self.launch("edit_logits", Grid::new(all.len().div_ceil(256), 256), &args) }
    }
}

/// Seeds, positions, temperatures, `top_k`, `top_p`, `min_p`: a list of each, one behind the other.
fn numbers(picks: &[Option<Pick>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(picks.len() * ROW_BYTES);
    let mut list = |number: &dyn Fn(&Pick) -> Vec<u8>, absent: &[u8]| {
        for pick in picks {
            match pick {
                Some(pick) => bytes.extend(number(pick)),
                None => bytes.extend(absent),
            }
        }
    };
    list(&|p| p.seed.to_ne_bytes().to_vec(), &[0; 8]);
    list(&|p| p.position.to_ne_bytes().to_vec(), &[0; 8]);
    list(&|p| p.params.temperature.to_ne_bytes().to_vec(), &f32::NAN.to_ne_bytes());
    let top_k = |p: &Pick| i32::try_from(p.params.top_k).unwrap_or(i32::MAX);
    list(&|p| top_k(p).to_ne_bytes().to_vec(), &[0; 4]);
    list(&|p| p.params.top_p.to_ne_bytes().to_vec(), &[0; 4]);
    list(&|p| p.params.min_p.to_ne_bytes().to_vec(), &[0; 4]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_stands_in_its_list() {
        let params = SamplingParams::default();
        let pick = |seed| Pick { edits: Vec::new(), params, seed, position: 7 };
        let bytes = numbers(&[Some(pick(5)), None]);
        assert_eq!(bytes.len(), 2 * ROW_BYTES);
        assert_eq!(bytes[..8], 5u64.to_ne_bytes());
        assert_eq!(bytes[16..24], 7u64.to_ne_bytes());
        assert_eq!(bytes[32..36], 1f32.to_ne_bytes());
        assert!(f32::from_ne_bytes(bytes[36..40].try_into().unwrap()).is_nan());
    }
}
