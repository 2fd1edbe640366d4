//! Passes of one model: prompts, single tokens, what the host does meanwhile, adapters.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_kernels::cuda::Gpu;
use hearth_kernels::lora::Float;
use hearth_kernels::sampling::SamplingParams;
use hearth_models::backend::Cuda;
use hearth_models::decoder::Decoder;
use hearth_models::weights::{Mix, Role};
use hearth_models::{
    Adapter, ForwardBatch, KvDType, KvStore, LoraSlot, Model, ModelConfig, Pick, Wanted, tiny,
};

use super::limits::{Ceiling, each};
use super::shapes::{Cost, Shape};
use super::table::{Row, digits, median};
use super::{Failure, weights};

/// Tokens of a block of keys and values.
pub const BLOCK_LEN: usize = 16;
/// Sequences and the keys of each.
const DECODES: [(usize, usize); 10] = [
    (1, 1024),
    (8, 1024),
    (32, 1024),
    (128, 1024),
    (256, 1024),
    (1, 8192),
    (8, 8192),
    (32, 8192),
    (1, 32_768),
    (8, 32_768),
];
const PROMPTS: [usize; 3] = [512, 2048, 8192];
/// Rows of a pass that only fills the store.
const FILLED: usize = 8192;
/// Memory that is left to everything but keys and values.
const RESERVE: usize = 10 << 30;
/// Steps that are timed, after those in which passes are run, seen again and recorded.
const STEPS: usize = 32;
const WARM: usize = 4;
/// No measurement takes much longer.
const PATIENCE: Duration = Duration::from_secs(3);
const RANK: usize = 16;
const ADAPTERS: usize = 8;

/// One model with keys and values of its own.
pub struct Subject<'a> {
    pub gpu: Arc<Gpu>,
    pub model: Decoder<Cuda>,
    pub shape: Shape,
    pub kv: KvStore,
    kind: KvDType,
    /// Out of which tokens are chosen.
    mask: Option<Vec<u32>>,
    blocks: usize,
    ceiling: &'a Ceiling,
}

impl<'a> Subject<'a> {
    /// With room for every measurement, or as much as there is.
    pub fn new(
        gpu: Arc<Gpu>,
        model: Decoder<Cuda>,
        shape: Shape,
        ceiling: &'a Ceiling,
    ) -> Result<Self, Failure> {
        let block_bytes = shape.config.kv_geometry(1, BLOCK_LEN, KvDType::BF16).bytes();
        let (free, _) = gpu.memory()?;
        let wanted = DECODES.iter().map(|(batch, depth)| batch * depth.div_ceil(BLOCK_LEN));
        let wanted = wanted.max().unwrap_or(0);
        let blocks = wanted.min(free.saturating_sub(RESERVE) / block_bytes);
        let kv = model.kv_store(shape.config.kv_geometry(blocks, BLOCK_LEN, KvDType::BF16))?;
        let (kind, mask) = (KvDType::BF16, None);
        let mut subject = Self { gpu, model, shape, kv, kind, mask, blocks, ceiling };
        subject.fill()?;
        Ok(subject)
    }

    /// Writes keys and values everywhere: a model with the same heads and next to nothing else
    /// reads random prompts. Zeros would be cheaper to read than what is there in earnest.
    fn fill(&mut self) -> Result<(), Failure> {
        let (hidden_len, ffn_len, vocab_len, tied) = (256, 256, 512, true);
        let all = self.shape.config.clone();
        let config = ModelConfig { hidden_len, ffn_len, vocab_len, tied, ..all };
        let made = weights::of_model(&config, Mix::named("bf16").expect("a mix that exists"))?;
        let writer = weights::load(&config, &made, &self.gpu)?;
        let each = 128 / BLOCK_LEN;
        let mut random = weights::Random(7);
        for first in (0..self.blocks).step_by(FILLED / BLOCK_LEN) {
            let mut batch = ForwardBatch::empty();
            for start in (first..self.blocks.min(first + FILLED / BLOCK_LEN)).step_by(each) {
                let table: Vec<u32> =
                    (start..self.blocks.min(start + each)).map(|b| b as u32).collect();
                let tokens: Vec<u32> =
                    (0..table.len() * BLOCK_LEN).map(|_| random.below(512)).collect();
                batch.push(&tokens, 0, table, BLOCK_LEN);
            }
            batch.check(config.vocab_len, BLOCK_LEN, self.blocks)?;
            writer.step(&batch, &mut self.kv, &[])?;
        }
        Ok(())
    }

    /// Prompts, each alone in its pass.
    pub fn prefill(&mut self) -> Result<(), Failure> {
        PROMPTS.into_iter().try_for_each(|tokens| self.prompt(tokens, ""))
    }

    /// One prompt; `with` says with what.
    fn prompt(&mut self, tokens: usize, with: &str) -> Result<(), Failure> {
        let what = format!("prefill {tokens}{with}");
        if tokens > self.blocks * BLOCK_LEN {
            self.row(what).part("left out: too little memory".into()).print();
            return Ok(());
        }
        let mut random = weights::Random(tokens as u64);
        let vocab = self.shape.config.vocab_len as u64;
        let ids: Vec<u32> = (0..tokens).map(|_| random.below(vocab)).collect();
        let mut batch = ForwardBatch::whole(&ids, 0, BLOCK_LEN);
        batch.logit_rows = vec![tokens as u32 - 1];
        let time = self.time(&batch, 1, 7)?;
        let cost = self.shape.prefill(tokens);
        let part = cost.flops / time / self.ceiling.product;
        let row = self
            .row(what)
            .ms(time * 1e3)
            .tokens(tokens as f64 / time)
            .rate(format!("{} TFLOP/s", digits(cost.flops / time / 1e12)))
            .part(format!("{:.0} % of the product", 100.0 * part));
        match self.is_8b() && tokens == 8192 && with.is_empty() {
            true => row.target(">= 55 % of the product", part >= 0.55).print(),
            false => row.print(),
        }
        Ok(())
    }

    /// One token of each of some sequences.
    pub fn decode(&mut self) -> Result<(), Failure> {
        for (batch, depth) in DECODES {
            let what = format!("decode {batch} x {depth}");
            let Some((row, cost, time)) = self.decode_row(what, batch, depth)? else { continue };
            let copied = cost.bytes / time / self.ceiling.copy;
            let ideal = cost.at_least(self.ceiling) / time;
            let row = match (self.is_8b(), batch, depth) {
                (true, 1, 1024) if self.shape.name == "8b-bf16" => {
                    row.target(">= 75 % of the copy", copied >= 0.75)
                }
                (true, 1, 1024) => row.target(">= 55 % of the copy", copied >= 0.55),
                (true, 128, _) => row.target(">= 60 % of the roofline", ideal >= 0.6),
                _ => row,
            };
            row.print();
        }
        Ok(())
    }

    /// A row of one shape, unless there is too little memory for it.
    fn decode_row(
        &mut self,
        what: String,
        batch: usize,
        depth: usize,
    ) -> Result<Option<(Row, Cost, f64)>, Failure> {
        if batch * depth.div_ceil(BLOCK_LEN) > self.blocks {
            self.row(what).part("left out: too little memory".into()).print();
            return Ok(None);
        }
        let time = self.time(&self.step(batch, depth), WARM, STEPS)?;
        let cost = self.shape.decode(batch, depth, self.kind);
        Ok(Some((self.against(what, time, batch, &cost), cost, time)))
    }

    /// Some contexts and a prompt with keys and values of each type, in turns.
    pub fn kinds(&mut self) -> Result<(), Failure> {
        for kind in [KvDType::Q8_0, KvDType::Fp8, KvDType::BF16] {
            self.kv = KvStore::Nothing; // the old one goes first
            let geometry = self.shape.config.kv_geometry(self.blocks, BLOCK_LEN, kind);
            (self.kv, self.kind) = (self.model.kv_store(geometry)?, kind);
            self.fill()?;
            let name = kind.name();
            for (batch, depth) in [(128, 1024), (8, 32_768)] {
                let what = format!("decode {batch} x {depth}, kv {name}");
                if let Some((row, ..)) = self.decode_row(what, batch, depth)? {
                    row.print();
                }
            }
            self.prompt(8192, &format!(", kv {name}"))?;
        }
        Ok(())
    }

    /// Steps whose tokens are chosen under a grammar's mask (half of all tokens), against the same
    /// without; and what it takes to bring the logits back in their place.
    pub fn masks(&mut self) -> Result<(), Failure> {
        let words = self.shape.config.vocab_len.div_ceil(32);
        for count in [1, 64] {
            let batch = self.step(count, 1024);
            let free = self.time(&batch, WARM, STEPS)?;
            self.mask = Some(vec![0x5555_5555; words]);
            let masked = self.time(&batch, WARM, STEPS);
            self.mask = None;
            let masked = masked?;
            let mut read_out = Vec::with_capacity(STEPS);
            for _ in 0..STEPS {
                let start = Instant::now();
                self.model.forward(&batch, &mut self.kv)?;
                read_out.push(start.elapsed().as_secs_f64());
            }
            self.row(format!("decode {count} x 1024, each row under a mask"))
                .ms(masked * 1e3)
                .tokens(count as f64 / masked)
                .rate(format!("logits read out: {} ms", digits(median(&read_out) * 1e3)))
                .part(format!("{:.0} % of the rate without", 100.0 * free / masked))
                .print();
        }
        Ok(())
    }

    /// One pass of a few shapes each, operation by operation, which a profiler records if it was
    /// told to wait (`--profile-from-start off`).
    pub fn profile(&mut self) -> Result<(), Failure> {
        for count in [1, 128] {
            let batch = self.step(count, 1024);
            let gpu = Arc::clone(&self.gpu);
            gpu.profiled(|| self.model.logits(&batch, &mut self.kv).map(drop))??;
        }
        Ok(())
    }

    /// What a step takes beyond the device's own time.
    ///
    /// Passes that are asked for one behind the other, without waiting, take the device's time (or
    /// the host's, where that is longer); a step takes that, the choice of the token, and whatever
    /// the host does before and after.
    pub fn host(&mut self) -> Result<(), Failure> {
        let batch = self.step(1, 1024);
        let step = self.time(&batch, WARM, 2 * STEPS)?;
        let mut asked = Vec::with_capacity(STEPS);
        for _ in 0..STEPS {
            let start = Instant::now();
            self.model.logits(&batch, &mut self.kv)?;
            asked.push(start.elapsed().as_secs_f64());
            self.gpu.synchronize()?;
        }
        let (asked, gpu) = (median(&asked), Arc::clone(&self.gpu));
        // Every pass uploads the same numbers to the same place: none has to be waited for.
        let device = each(&gpu, STEPS, || {
            self.model.logits(&batch, &mut self.kv)?;
            Ok(())
        })?;
        let host = step - device;
        let parts = format!("asked for in {:.3} ms, computed in {:.3}", asked * 1e3, device * 1e3);
        self.row("host, a step of 1 x 1024")
            .ms(step * 1e3)
            .rate(parts)
            .part(format!("{:.3} ms around it", host * 1e3))
            .target("< 0.5 ms of the host", host < 0.5e-3)
            .print();
        Ok(())
    }

    /// Sequences with eight different adapters against the same without.
    pub fn lora(&mut self) -> Result<(), Failure> {
        let config = &self.shape.config;
        let full = tiny::adapter(config, RANK, Float::BF16, 1)?;
        let in_layers = full.deltas().iter();
        let in_layers = in_layers.filter(|(r, _)| !matches!(r, Role::Embedding | Role::Head));
        let adapter = Arc::new(Adapter::from_deltas(config, in_layers.cloned().collect())?);
        for slot in 0..ADAPTERS as u64 {
            self.model.put_adapters(LoraSlot(slot), &[(Arc::clone(&adapter), 1.0)])?;
        }
        for count in [8, 64] {
            let mut batch = self.step(count, 1024);
            let base = self.time(&batch, WARM, STEPS)?;
            let slots = (0..count).map(|s| Some(LoraSlot((s % ADAPTERS) as u64)));
            batch.lora_slot = slots.collect();
            let time = self.time(&batch, WARM, STEPS)?;
            self.row(format!("decode {count} x 1024, {ADAPTERS} adapters of rank {RANK}"))
                .ms(time * 1e3)
                .tokens(count as f64 / time)
                .part(format!("{:.0} % of the rate without", 100.0 * base / time))
                .print();
        }
        (0..ADAPTERS as u64).for_each(|slot| self.model.drop_adapters(LoraSlot(slot)));
        Ok(())
    }

    /// A batch of single tokens; the blocks of sequences that grew together.
    fn step(&self, count: usize, depth: usize) -> ForwardBatch {
        let mut batch = ForwardBatch::empty();
        for s in 0..count {
            let blocks = (0..depth.div_ceil(BLOCK_LEN)).map(|b| (b * count + s) as u32);
            batch.push(&[s as u32 + 3], depth - 1, blocks.collect(), BLOCK_LEN);
            batch.logit_rows.push(s as u32);
        }
        batch
    }

    /// The median of the seconds that a step takes, its tokens chosen on the device.
    fn time(&mut self, batch: &ForwardBatch, warm: usize, steps: usize) -> Result<f64, Failure> {
        let vocab_len = self.shape.config.vocab_len;
        batch.check(vocab_len, BLOCK_LEN, self.blocks)?;
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let (edits, mask) = (Vec::new(), self.mask.clone());
        let pick = Pick { params, edits, seed: 0, position: 0, vocab_len, mask };
        let wanted = vec![Wanted::Token(pick); batch.logit_rows.len()];
        let mut times = Vec::with_capacity(warm + steps);
        let begun = Instant::now();
        while times.len() < warm + steps && (times.len() < 2 || begun.elapsed() < PATIENCE) {
            let start = Instant::now();
            self.model.step(batch, &mut self.kv, &wanted)?;
            times.push(start.elapsed().as_secs_f64());
        }
        Ok(median(&times[warm.min(times.len() - 1)..]))
    }

    /// A row of a pass that is read from memory.
    fn against(&self, what: String, time: f64, tokens: usize, cost: &Cost) -> Row {
        let copied = 100.0 * cost.bytes / time / self.ceiling.copy;
        let ideal = 100.0 * cost.at_least(self.ceiling) / time;
        self.row(what)
            .ms(time * 1e3)
            .tokens(tokens as f64 / time)
            .rate(format!("{} GB/s", digits(cost.bytes / time / 1e9)))
            .part(format!("{copied:.0} % of the copy, {ideal:.0} % of the roofline"))
    }

    fn row(&self, what: impl Into<String>) -> Row {
        Row::new(self.shape.name, what)
    }

    pub fn is_8b(&self) -> bool {
        self.shape.name.starts_with("8b")
    }
}
