//! What a forward pass has to know of its batch, on the device: one upload, at fixed places.
//!
//! Sequences with few new rows are *items* of the decode kernel, one for each row; those with more
//! are cut into *tiles* of the prefill kernel. Everything lies in one buffer whose layout depends
//! on the [`StepShape`] alone, so a recorded pass of a shape reads the numbers of whichever batch
//! was uploaded last. A shape may be larger than its batch: rows beyond it are padding, which
//! writes nothing to the keys and values and attends to nothing.

use std::sync::PoisonError;

use cudarc::driver::{CudaEvent, PinnedHostSlice, result, sys};

use super::attention::{CHUNK, TILE};
use super::gpu::{Arg, Grid};
use super::memory::Buffer;
use super::{Error, Gpu, Result};

/// How much of everything there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct StepShape {
    /// Rows.
    pub rows: usize,
    /// Rows whose logits are wanted.
    pub logits: usize,
    /// Rows of sequences with few of them.
    pub items: usize,
    /// Tiles of the other sequences.
    pub tiles: usize,
    /// Chunks of the longest context of an item.
    pub chunks: usize,
}

/// Where each list begins, in words of 4 bytes.
#[derive(Clone, Copy)]
struct Places {
    tokens: usize,
    positions: usize,
    slots: usize,
    logit_rows: usize,
    item_row: usize,
    item_table: usize,
    item_context: usize,
    /// 1 for an item, 0 for padding.
    item_rows: usize,
    item_position: usize,
    tile: [usize; 5],
    tables: usize,
}

impl Places {
    fn of(shape: &StepShape) -> Self {
        let mut next = 0;
        let mut list = |len: usize| {
            let start = next;
            next += len.next_multiple_of(4);
            start
        };
        let tokens = list(shape.rows);
        let positions = list(shape.rows);
        let slots = list(shape.rows);
        let logit_rows = list(shape.logits);
        let [item_row, item_table, item_context, item_rows, item_position] =
            [(); 5].map(|()| list(shape.items));
        let tile = [(); 5].map(|()| list(shape.tiles));
        let tables = list(0);
        Self {
            tokens,
            positions,
            slots,
            logit_rows,
            item_row,
            item_table,
            item_context,
            item_rows,
            item_position,
            tile,
            tables,
        }
    }
}

/// One sequence of a batch, as the host has it.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// First of its new rows.
    pub row: usize,
    /// New rows.
    pub rows: usize,
    /// Keys, new ones included.
    pub context: usize,
    /// Its blocks.
    pub blocks: &'a [u32],
}

/// A batch as the host has it; every number has been checked by the caller.
pub struct HostStep<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Rows whose token was chosen last, and from which row of those logits; it may not be known
    /// to anybody yet. What stands in `tokens` for them is of no meaning.
    pub chosen: &'a [(u32, u32)],
    /// Position of each row.
    pub positions: &'a [u32],
    /// Where each row's key and value go.
    pub slots: &'a [u32],
    /// Rows whose logits are wanted.
    pub logit_rows: &'a [u32],
    /// The sequences, in order of their rows.
    pub spans: Vec<Span<'a>>,
}

/// In place of a token, with a row of the last choice: `take_chosen` puts the token there.
const CHOSEN: u32 = 1 << 31;
/// In front of a list: these are tokens, which may change on the device, and no rows.
const TOKENS: u32 = u32::MAX;

/// A sequence with more new rows is cut into tiles: a tile that is mostly empty costs more than so
/// many rows on their own.
const FEW: usize = 8;

impl HostStep<'_> {
    /// The smallest shape that holds it.
    pub fn shape(&self) -> StepShape {
        let (items, others): (Vec<&Span<'_>>, Vec<_>) =
            self.spans.iter().partition(|span| span.rows <= FEW);
        StepShape {
            rows: self.tokens.len(),
            logits: self.logit_rows.len(),
            items: items.iter().map(|span| span.rows).sum(),
            tiles: others.iter().map(|span| span.rows.div_ceil(TILE)).sum(),
            chunks: items.iter().map(|span| span.context.div_ceil(CHUNK)).max().unwrap_or(0),
        }
    }

    /// Fills `words`, which are laid out for `shape`; returns how many there are.
    fn write(&self, shape: &StepShape, words: &mut Vec<u32>) {
        let places = Places::of(shape);
        words.clear();
        words.resize(places.tables, 0);
        words[places.tokens..][..self.tokens.len()].copy_from_slice(self.tokens);
        for &(row, from) in self.chosen {
            words[places.tokens + row as usize] = CHOSEN | from;
        }
        words[places.positions..][..self.positions.len()].copy_from_slice(self.positions);
        words[places.slots..][..shape.rows].fill(u32::MAX); // padding is not stored
        words[places.slots..][..self.slots.len()].copy_from_slice(self.slots);
        words[places.logit_rows..][..self.logit_rows.len()].copy_from_slice(self.logit_rows);
        let mut tables = Vec::new();
        let mut tiles = Vec::with_capacity(shape.tiles);
        let mut item = 0;
        for span in &self.spans {
            let table = tables.len() as u32;
            tables.extend_from_slice(span.blocks);
            let first = span.context - span.rows;
            if span.rows <= FEW {
                for row in 0..span.rows {
                    words[places.item_row + item] = (span.row + row) as u32;
                    words[places.item_table + item] = table;
                    words[places.item_context + item] = (first + row) as u32 + 1;
                    words[places.item_rows + item] = 1;
                    words[places.item_position + item] = (first + row) as u32;
                    item += 1;
                }
                continue;
            }
            for start in (0..span.rows).step_by(TILE) {
                let rows = TILE.min(span.rows - start);
                tiles.push([span.row + start, rows, first + start, table as usize, span.context]);
            }
        }
        // Those that see most begin first.
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile[2] + tile[1]));
        for (i, tile) in tiles.iter().enumerate() {
            for (place, number) in places.tile.iter().zip(tile) {
                words[place + i] = *number as u32;
            }
        }
        words.extend_from_slice(&tables);
    }
}

/// Room for the words of a step, on both sides: on the host for two, so that one is written while
/// the other is on its way.
pub(super) struct StepRoom {
    pinned: [(PinnedHostSlice<u32>, CudaEvent); 2],
    device: Buffer,
    words: Vec<u32>,
    /// Counts how often the device side moved: what was recorded before is of no use then.
    pub generation: u64,
}

/// The batch that was uploaded last.
pub struct Step {
    /// Its shape.
    pub shape: StepShape,
    base: sys::CUdeviceptr,
    places: Places,
    /// Generation of the room that it lies in.
    pub generation: u64,
}

impl Step {
    fn at(&self, word: usize) -> Arg {
        (self.base + 4 * word as sys::CUdeviceptr).into()
    }

    pub(super) fn tokens(&self) -> Arg {
        self.at(self.places.tokens)
    }

    pub(super) fn positions(&self) -> Arg {
        self.at(self.places.positions)
    }

    pub(super) fn slots(&self) -> Arg {
        self.at(self.places.slots)
    }

    pub(super) fn logit_rows(&self) -> Arg {
        self.at(self.places.logit_rows)
    }

    /// Row, table and context of the items from one on.
    pub(super) fn items(&self, first: usize) -> [Arg; 3] {
        let places = [self.places.item_row, self.places.item_table, self.places.item_context];
        places.map(|place| self.at(place + first))
    }

    /// The items as tiles of one row.
    pub(super) fn items_as_tiles(&self) -> [Arg; 5] {
        let p = &self.places;
        [p.item_row, p.item_rows, p.item_position, p.item_table, p.item_context]
            .map(|place| self.at(place))
    }

    /// First row, rows, first position, table and keys of the tiles.
    pub(super) fn tiles(&self) -> [Arg; 5] {
        self.places.tile.map(|place| self.at(place))
    }

    pub(super) fn tables(&self) -> Arg {
        self.at(self.places.tables)
    }
}

impl Gpu {
    /// Sends lists that a pass will ask for, so that it may be recorded; whoever keeps the record
    /// keeps them. Their memory is not of the arena: passes recorded before write to what was free
    /// there then.
    pub fn send_lists<'a>(&self, all: impl Iterator<Item = &'a [u32]>) -> Result<Vec<Buffer>> {
        let mut kept = Vec::new();
        for numbers in all {
            let list = self.upload(numbers)?;
            let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
            lists.insert(numbers.to_vec(), list.alias());
            kept.push(list);
        }
        Ok(kept)
    }

    /// A list of rows or ids on the device, sent once for each batch.
    pub(super) fn list(&self, numbers: &[u32]) -> Result<Arg> {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = lists.get(numbers) {
            return Ok(list.at(0).into());
        }
        let list = self.send(numbers)?;
        let place = list.at(0);
        lists.insert(numbers.to_vec(), list);
        Ok(place.into())
    }

    /// Tokens of the batch that was uploaded last, or ids that are sent.
    pub(super) fn ids(&self, ids: &[u32]) -> Result<Arg> {
        let tokens = {
            let lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
            lists.get(&as_tokens(ids)).map(|tokens| tokens.at(0).into())
        };
        tokens.map_or_else(|| self.list(ids), Ok)
    }

    /// Uploads a batch in a shape that holds it, behind what was asked for before: a pass that is
    /// under way still reads the batch before it.
    pub fn step(&self, host: &HostStep<'_>, shape: StepShape) -> Result<Step> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let mut words = room.as_mut().map_or_else(Vec::new, |r| std::mem::take(&mut r.words));
        host.write(&shape, &mut words);
        if room.as_ref().is_none_or(|room| room.device.bytes() < 4 * words.len()) {
            let generation = room.as_ref().map_or(0, |room| room.generation + 1);
            let len = (2 * words.len()).next_multiple_of(1 << 16);
            let pinned = || -> Result<_> {
                // SAFETY: every word that is sent is written first.
                let words = unsafe { self.context.alloc_pinned::<u32>(len)? };
                Ok((words, self.context.new_event(None)?))
            };
            let pinned = [pinned()?, pinned()?];
            let device = Buffer::new(&self.context, 4 * len)?;
            self.synchronize()?; // what is under way reads the old ones
            *room = Some(StepRoom { pinned, device, words: Vec::new(), generation });
        }
        let room = room.as_mut().expect("made above; this is a bug");
        room.pinned.rotate_left(1);
        let (pinned, sent) = &mut room.pinned[0];
        sent.synchronize()?; // the copy of the batch before the last one
        let pinned = &mut pinned.as_mut_slice()?[..words.len()];
        pinned.copy_from_slice(&words);
        self.context.bind_to_thread()?;
        // SAFETY: the device side is as long as the pinned one, and that is not written again
        // before the mark behind this copy.
        unsafe {
            result::memcpy_htod_async(room.device.at(0), pinned, self.stream.cu_stream())?;
        }
        sent.record(&self.stream)?;
        room.words = words;
        let places = Places::of(&shape);
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        lists.clear();
        // They are there already, and stay at their place whatever they are.
        lists.insert(as_tokens(host.tokens), room.device.part(4 * places.tokens));
        let step = Step { shape, base: room.device.at(0), places, generation: room.generation };
        self.take_chosen(host, &step)?;
        Ok(step)
    }

    /// Puts tokens that were chosen last where the batch has none.
    fn take_chosen(&self, host: &HostStep<'_>, step: &Step) -> Result<()> {
        let Some(last) = host.chosen.iter().map(|(_, from)| *from as usize).max() else {
            return Ok(());
        };
        let chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = chosen.as_ref().filter(|(_, count)| last < *count);
        let (chosen, count) =
            chosen.ok_or_else(|| Error::Missing("tokens that were chosen last".into()))?;
        let rows = step.shape.rows;
        let args = [step.tokens(), chosen.at(0).into(), rows.into(), (*count).into()];
        // SAFETY: as many tokens as rows; every row of the choice that is named is there.
        unsafe { self.launch("take_chosen", Grid::new(rows.div_ceil(256), 256), &args) }
    }
}

fn as_tokens(ids: &[u32]) -> Vec<u32> {
    [&[TOKENS], ids].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_place() {
        let numbers: Vec<u32> = (100..112).collect();
        let (tokens, positions, slots) = (&numbers[..], &numbers[..], &numbers[..]);
        let spans = vec![
            Span { row: 0, rows: 9, context: 10, blocks: &[1] },
            Span { row: 9, rows: 1, context: 41, blocks: &[2, 6, 4] },
            Span { row: 10, rows: 2, context: 300, blocks: &[7; 19] },
        ];
        let chosen = &[(9, 3)];
        let step = HostStep { tokens, chosen, positions, slots, logit_rows: &[8, 9], spans };
        let exact = step.shape();
        let want = StepShape { rows: 12, logits: 2, items: 3, tiles: 1, chunks: 2 };
        assert_eq!(exact, want);
        let padded = StepShape { rows: 16, items: 5, ..exact };
        for shape in [exact, padded] {
            let mut words = vec![77; 5];
            step.write(&shape, &mut words);
            let p = Places::of(&shape);
            for place in [p.positions, p.slots] {
                assert_eq!(&words[place..][..12], numbers);
            }
            let mut tokens = numbers.clone();
            tokens[9] = CHOSEN | 3;
            assert_eq!(&words[p.tokens..][..12], tokens);
            let padding = &words[p.slots + 12..p.slots + shape.rows];
            assert!(padding.iter().all(|&slot| slot == u32::MAX), "padding is not stored");
            assert_eq!(&words[p.logit_rows..][..2], [8, 9]);
            let items = [p.item_row, p.item_table, p.item_context, p.item_position];
            assert_eq!(items.map(|place| words[place]), [9, 1, 41, 40]);
            assert_eq!(items.map(|place| words[place + 2]), [11, 4, 300, 299]);
            let padding = &words[p.item_context + 3..][..shape.items - 3];
            assert!(padding.iter().all(|&context| context == 0), "padding sees nothing");
            assert_eq!(p.tile.map(|place| words[place]), [0, 9, 1, 0, 10]);
            assert_eq!(&words[p.tables..][..4], [1, 2, 6, 4]);
        }
    }

    #[test]
    fn long_prompts_are_cut_into_tiles_the_heaviest_first() {
        let rows = 2 * TILE + 5;
        let numbers: Vec<u32> = (0..rows as u32).collect();
        let spans = vec![Span { row: 0, rows, context: rows + 10, blocks: &[0; 40] }];
        let (tokens, positions, slots) = (&numbers[..], &numbers[..], &numbers[..]);
        let (chosen, logit_rows) = (&[], &[]);
        let step = HostStep { tokens, chosen, positions, slots, logit_rows, spans };
        let (shape, mut words) = (step.shape(), Vec::new());
        assert_eq!((shape.tiles, shape.items, shape.chunks), (3, 0, 0));
        step.write(&shape, &mut words);
        let p = Places::of(&shape);
        let first = p.tile.map(|place| words[place] as usize);
        assert_eq!(first, [2 * TILE, 5, 2 * TILE + 10, 0, rows + 10]);
        let last = p.tile.map(|place| words[place + 2] as usize);
        assert_eq!(last, [0, TILE, 10, 0, rows + 10]);
    }
}
