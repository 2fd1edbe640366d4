//! From a scheduler's batch to a model's batch, and back to logits. No decisions.

use std::collections::BTreeMap;
use std::ops::Range;

use hearth_models::{
    ForwardBatch, Kept, KvDType, KvStore, LoraSlot, Model, Output, Pass, RowOutput, Walk, Wanted,
};

use super::handle::{AdapterSet, Limits};
use crate::scheduler::{Batch, Scheduler};
use crate::types::{BlockId, SeqId};

/// The model and its KV.
pub(super) struct Runner {
    model: Box<dyn Model>,
    kv: KvStore,
    block_len: usize,
    block_count: usize,
    /// What each sequence with adapters runs with.
    slots: BTreeMap<SeqId, LoraSlot>,
    /// Sequences of each slot that the model knows.
    holders: BTreeMap<LoraSlot, usize>,
    /// Whose one token the last pass chooses on its device, and out of which logit row.
    picked: BTreeMap<SeqId, u32>,
}

/// A pass that was asked for.
pub(super) struct Asked {
    way: Way,
    vocab_len: usize,
    entries: Vec<EntryRows>,
    kept: Vec<(SeqId, Kept)>,
}

/// How far it is.
enum Way {
    /// There was nothing to compute.
    Nothing,
    /// Between two layers.
    Walk(Walk),
    /// All of it was asked for.
    Pass(Pass),
}

impl Asked {
    /// Rows that stay on the device, by whose they are.
    pub fn take_kept(&mut self) -> Vec<(SeqId, Kept)> {
        std::mem::take(&mut self.kept)
    }

    /// Waits for what became of it.
    pub fn wait(self) -> Result<Logits, hearth_models::Error> {
        let output = match self.way {
            Way::Nothing => Output::default(),
            Way::Walk(_) => {
                let what = "a pass was waited for before its last layer; this is a bug";
                return Err(hearth_models::Error::Batch(what.into()));
            }
            Way::Pass(pass) => pass.wait()?,
        };
        Ok(Logits { output, vocab_len: self.vocab_len, entries: self.entries })
    }
}

/// What became of the rows that a batch wanted.
pub(super) struct Logits {
    output: Output,
    vocab_len: usize,
    /// One for each entry of the batch.
    pub entries: Vec<EntryRows>,
}

/// Which logit rows belong to an entry.
pub(super) struct EntryRows {
    /// Rows of its scored positions.
    pub score: Range<usize>,
    /// Rows from which a token is wanted: of its newest token, and of those that are proposed.
    pub sample: Range<usize>,
}

impl Logits {
    /// One row: its logits, or the token that was chosen from them.
    pub fn row(&self, row: usize) -> RowOutput<'_> {
        self.output.row(row, self.vocab_len)
    }
}

/// Where a model's keys and values go.
pub(super) fn store(
    model: &dyn Model,
    limits: &Limits,
    kv_dtype: KvDType,
) -> Result<KvStore, hearth_models::Error> {
    let geometry = model.config().kv_geometry(limits.kv_blocks, limits.block_len, kv_dtype);
    let mut kv = model.kv_store(geometry)?;
    if limits.kv_prefault {
        kv.prefault();
    }
    Ok(kv)
}

impl Runner {
    pub fn new(
        model: Box<dyn Model>,
        limits: &Limits,
        kv_dtype: KvDType,
    ) -> Result<Self, hearth_models::Error> {
        let kv = store(&*model, limits, kv_dtype)?;
        Ok(Self {
            model,
            kv,
            block_len: limits.block_len,
            block_count: limits.kv_blocks,
            slots: BTreeMap::new(),
            holders: BTreeMap::new(),
            picked: BTreeMap::new(),
        })
    }

    /// Passes may be asked for before the one before them is done.
    pub fn runs_ahead(&self) -> bool {
        self.model.runs_ahead()
    }

    /// The last pass chooses its token, and the next one may read it.
    pub fn is_picked(&self, id: SeqId) -> bool {
        self.picked.contains_key(&id)
    }

    /// What the bytes of a block mean.
    ///
    /// # Errors
    /// Blocks do not leave this store.
    pub fn layout(&self) -> Result<String, hearth_models::Error> {
        let what = "--kv-store: keys and values do not leave this device";
        self.kv.layout().ok_or_else(|| hearth_models::Error::Device(what.into()))
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.kv.block_bytes()
    }

    /// Copies a block; false when that cannot be.
    pub fn export(&self, block: BlockId, out: &mut Vec<u8>) -> bool {
        self.kv.export_block(block.0, out).is_ok()
    }

    /// Fills a block with what was exported once.
    pub fn import(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), hearth_models::Error> {
        self.kv.import_block(block.0, bytes)
    }

    /// Has the system provide pages of memory that the first `blocks` blocks lack; false when they
    /// have all.
    pub fn provide(&mut self, blocks: usize) -> bool {
        self.kv.provide(blocks)
    }

    /// The sequence runs with these adapters until it is released; also where the model fails to
    /// take them, which may leave it a part.
    pub fn hold(&mut self, id: SeqId, adapters: &AdapterSet) -> Result<(), hearth_models::Error> {
        self.slots.insert(id, adapters.slot);
        let holders = self.holders.entry(adapters.slot).or_default();
        *holders += 1;
        match *holders {
            1 => self.model.put_adapters(adapters.slot, &adapters.parts),
            _ => Ok(()),
        }
    }

    /// The sequence is gone; its adapters with the last one that runs with them.
    pub fn release(&mut self, id: SeqId) {
        let Some(slot) = self.slots.remove(&id) else { return };
        let holders = self.holders.entry(slot).or_default();
        *holders = holders.saturating_sub(1);
        if *holders == 0 {
            self.holders.remove(&slot);
            self.model.drop_adapters(slot);
        }
    }

    /// Asks for a forward pass. `wanted` says what becomes of a sequence's row so many rows ahead,
    /// where the device may do it.
    pub fn launch(
        &mut self,
        batch: &Batch,
        scheduler: &Scheduler,
        mut wanted: impl FnMut(SeqId, usize) -> Wanted,
    ) -> Result<Asked, hearth_models::Error> {
        let vocab_len = self.model.config().vocab_len;
        let picked = std::mem::take(&mut self.picked);
        let (forward, entries) = self.pack(batch, scheduler, &picked);
        debug_assert!(batch.copies.is_empty() || forward.row_count() > 0, "copies are lost");
        if forward.row_count() == 0 {
            return Ok(Asked { way: Way::Nothing, vocab_len, entries, kept: Vec::new() });
        }
        forward.check(vocab_len, self.block_len, self.block_count)?;
        if let Some(walk) = self.model.walk(&forward, &mut self.kv)? {
            return Ok(Asked { way: Way::Walk(walk), vocab_len, entries, kept: Vec::new() });
        }
        let mut picked = BTreeMap::new();
        let single = || {
            let all = batch.entries.iter().zip(&entries);
            all.filter(|(_, rows)| rows.sample.len() == 1)
                .map(|(e, rows)| (e.id, rows.sample.start))
        };
        let mut asked = || {
            let all = rows_wanted(batch, &entries, forward.logit_rows.len(), &mut wanted);
            let chosen = single().filter(|(_, row)| matches!(all[*row], Wanted::Token(_)));
            picked = chosen.map(|(id, row)| (id, row as u32)).collect();
            all
        };
        let mut pass = self.model.launch(&forward, &mut self.kv, &mut asked)?;
        let kept = pass.take_kept().into_iter();
        let of = |row: usize| single().find(|(_, own)| *own == row).map(|(id, _)| id);
        let kept = kept.filter_map(|(row, kept)| Some((of(row)?, kept))).collect();
        self.picked = picked;
        Ok(Asked { way: Way::Pass(pass), vocab_len, entries, kept })
    }

    /// Computes the next layer of a pass; false when it was the last, or there is none.
    pub fn go_on(&mut self, asked: &mut Asked) -> Result<bool, hearth_models::Error> {
        let Way::Walk(walk) = &mut asked.way else { return Ok(false) };
        let Some(pass) = self.model.go_on(walk, &mut self.kv)? else { return Ok(true) };
        asked.way = Way::Pass(pass);
        Ok(false)
    }

    fn pack(
        &self,
        batch: &Batch,
        scheduler: &Scheduler,
        picked: &BTreeMap<SeqId, u32>,
    ) -> (ForwardBatch, Vec<EntryRows>) {
        let copies = batch.copies.iter().map(|(from, to)| (from.0, to.0)).collect();
        let mut forward = ForwardBatch { copies, ..ForwardBatch::empty() };
        let mut entries = Vec::with_capacity(batch.entries.len());
        for entry in &batch.entries {
            let seq = scheduler.running(entry.id).expect("scheduled, so running; this is a bug");
            let certain = entry.start + entry.rows - entry.proposed.len();
            let base = forward.row_count();
            let known = certain.min(seq.tokens().len());
            let mut tokens = seq.tokens()[entry.start..known].to_vec();
            if known < certain {
                let from = picked.get(&entry.id);
                let from = *from.expect("its token is chosen by the last pass; this is a bug");
                forward.chosen.push(((base + tokens.len()) as u32, from));
                tokens.push(0);
            }
            tokens.extend(&entry.proposed);
            let table = seq.blocks().iter().map(|b| b.0).collect();
            forward.push(&tokens, entry.start, table, self.block_len);
            forward.run_last_with(self.slots.get(&entry.id).copied());
            let logits = &mut forward.logit_rows;
            let first = logits.len();
            logits
                .extend(entry.score.clone().map(|position| (base + position - entry.start) as u32));
            let score = first..logits.len();
            let newest = (base + certain - entry.start - 1) as u32;
            let first = logits.len() - usize::from(logits.last() == Some(&newest));
            if entry.samples {
                logits.truncate(first); // it may be a scored row too
                logits.extend(newest..(base + entry.rows) as u32);
            }
            let sample = if entry.samples { first..logits.len() } else { first..first };
            entries.push(EntryRows { score, sample });
        }
        (forward, entries)
    }
}

/// What is wanted of each row. Rows that are scored, or that several sequences choose from, are
/// read out.
fn rows_wanted(
    batch: &Batch,
    entries: &[EntryRows],
    row_count: usize,
    mut wanted: impl FnMut(SeqId, usize) -> Wanted,
) -> Vec<Wanted> {
    let mut all = vec![Wanted::Logits; row_count];
    for (entry, rows) in batch.entries.iter().zip(entries).filter(|(e, _)| e.forks.is_empty()) {
        for (ahead, row) in rows.sample.clone().enumerate() {
            if !rows.score.contains(&row) {
                all[row] = wanted(entry.id, ahead);
            }
        }
    }
    all
}
