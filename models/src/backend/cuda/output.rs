//! The end of a pass: logits on their way to the host, tokens chosen where they are, and rows that
//! stay.

use std::sync::Arc;

use hearth_kernels::cuda::{self, Gpu, Rows};

use crate::Result;
use crate::batch::{Kept, Made, Output, Pass, Pick, Wanted};

/// What is wanted of each row, or all logits.
pub(super) fn of(gpu: &Arc<Gpu>, logits: Rows, wanted: Vec<Wanted>) -> Result<Pass> {
    let all = |one: &Wanted| match one {
        Wanted::Logits => Made::Logits,
        Wanted::Token(_) => Made::Token(None), // until it is known
        Wanted::Kept => Made::Kept,
    };
    let mut made: Vec<Made> = wanted.iter().map(all).collect();
    let rows =
        |kind: Made| made.iter().enumerate().filter(move |(_, m)| **m == kind).map(|(i, _)| i);
    let read_out: Vec<u32> = rows(Made::Logits).map(|row| row as u32).collect();
    if read_out.len() == made.len() {
        let all = gpu.fetch_rows(logits)?;
        return Ok(Pass::new(move || Ok(Output::of_logits(all.open()?))));
    }
    let kept = rows(Made::Kept).map(|row| Ok((row, keep(gpu, &logits, row)?)));
    let kept = kept.collect::<Result<Vec<_>>>()?;
    let picks = wanted.into_iter().map(|one| match one {
        Wanted::Token(pick) => Some(pick),
        Wanted::Logits | Wanted::Kept => None,
    });
    let chosen = choose(picks.collect(), |len, picks| gpu.choose(&logits, len, picks))?;
    let rest = match read_out.is_empty() {
        true => None,
        false => Some(gpu.fetch_rows(gpu.select(&logits, &read_out)?)?),
    };
    // Behind rows that only stay there is nothing else to wait for.
    let end = match rest.is_none() && chosen.is_none() {
        true => Some(gpu.fetch_nothing()?),
        false => None,
    };
    let pass = Pass::new(move || {
        end.map(cuda::Parcel::open::<u32>).transpose()?;
        let rest = rest.map_or_else(|| Ok(Vec::new()), cuda::Parcel::open)?;
        let chosen = chosen.map_or_else(|| Ok(Vec::new()), cuda::Choices::open)?;
        for (made, token) in made.iter_mut().zip(chosen) {
            if let Some(token) = token {
                *made = Made::Token(token);
            }
        }
        Ok(Output::new(rest, made))
    });
    Ok(pass.keeping(kept))
}

/// A row of logits, copied, until somebody chooses from it.
fn keep(gpu: &Arc<Gpu>, logits: &Rows, row: usize) -> Result<Kept> {
    let gpu = Arc::clone(gpu);
    let kept = gpu.keep(logits, row)?;
    Ok(Kept::new(move |pick| {
        let apart = |len, picks: &[Option<cuda::Pick>]| gpu.choose_apart(&kept, len, picks);
        let chosen = choose(vec![Some(pick)], apart)?;
        Ok(Pass::new(move || {
            let chosen = chosen.map_or_else(|| Ok(Vec::new()), cuda::Choices::open)?;
            let made = chosen.into_iter().map(|token| Made::Token(token.flatten()));
            Ok(Output::new(Vec::new(), made.collect()))
        }))
    }))
}

/// Tells the device how tokens are chosen, where one is.
fn choose(
    picks: Vec<Option<Pick>>,
    ask: impl FnOnce(usize, &[Option<cuda::Pick>]) -> cuda::Result<cuda::Choices>,
) -> Result<Option<cuda::Choices>> {
    let Some(vocab_len) = picks.iter().flatten().map(|pick| pick.vocab_len).next() else {
        return Ok(None);
    };
    let picks = picks.into_iter().map(|pick| {
        let Pick { params, edits, seed, position, vocab_len: _, mask } = pick?;
        Some(cuda::Pick { params, edits, seed, position, mask })
    });
    Ok(Some(ask(vocab_len, &picks.collect::<Vec<_>>())?))
}
