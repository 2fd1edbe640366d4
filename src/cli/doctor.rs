//! `hearth doctor`: what this machine offers, what would be used, and whether a model fits.

use std::io::{self, Write};

use hearth_kernels::{Isa, cpu, pool};
use hearth_models::Compute;

use super::common::Common;
use super::{Failure, open};
use crate::config::{CapacityArgs, Config, EngineArgs, MemoryArgs, ModelArgs, RawConfig};
use crate::registry::hub::HubOptions;
use crate::registry::offer::{ModelBounds, Opened};
use crate::registry::plan;

/// Flags that change what would be used.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    capacity: CapacityArgs,
    #[command(flatten)]
    memory: MemoryArgs,
}

impl From<DoctorArgs> for RawConfig {
    fn from(DoctorArgs { model, engine, capacity, memory }: DoctorArgs) -> Self {
        Self { model, engine, capacity, memory, ..Self::default() }
    }
}

pub(super) fn run(common: Common<DoctorArgs>) -> Result<(), Failure> {
    let config = common.validate()?;
    let out = &mut io::stdout().lock();
    let compute = open::compute(&config)?;
    let features = cpu::features();
    let names = |have: bool| {
        let names = features.iter().filter(|f| f.1 == have).map(|f| f.0);
        names.collect::<Vec<_>>().join(" ")
    };
    let isas = Isa::available().iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
    writeln!(out, "program     hearth {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "processor   has {}", names(true))?;
    writeln!(out, "            lacks {}", names(false))?;
    writeln!(out, "kernels     {} (available: {isas})", Isa::best().name())?;
    writeln!(out, "threads     {} (default {})", config.threads, pool::default_threads())?;
    writeln!(out, "device      {}", compute.describe())?;
    let free = plan::free_bytes();
    let told = free.map_or("not told by the system".into(), |free| format!("{} MB", free >> 20));
    writeln!(out, "free memory {told}")?;
    let offer = open::offer(&config, &compute, &HubOptions::from_env(), None)?;
    let told = offer.budget_bytes.map_or("unknown".into(), |bytes| format!("{} MB", bytes >> 20));
    writeln!(out, "budget      {told} for all models")?;
    for planned in &offer.models {
        model(out, &config, &compute, planned)?;
    }
    for (_, why) in &offer.refused {
        writeln!(out, "\nnot offered {why}")?;
    }
    Ok(())
}

/// One model, and what it would take.
fn model(
    out: &mut impl Write,
    config: &Config,
    compute: &Compute,
    planned: &open::Planned,
) -> Result<(), Failure> {
    let offered = &planned.offered;
    let weights_mb = offered.opened.weight_bytes(compute) >> 20;
    let (mb, when) = (offered.bytes.div_ceil(1 << 20), planned.when());
    let (ranks, together) = compute.ranks();
    let each = if ranks > together { " on each device" } else { "" };
    if let Opened::Embedding(model) = &offered.opened {
        let numbers = model.file().config();
        writeln!(out, "\nmodel       {}", model.file().path().display())?;
        writeln!(out, "family      {}, {} layers", numbers.family, numbers.layer_count)?;
        writeln!(out, "weights     {weights_mb} MB")?;
        writeln!(out, "memory      {mb} MB in all, {when}")?;
        writeln!(out, "embeds      {} numbers a text", numbers.hidden_len)?;
    }
    if let (Opened::Text(model), ModelBounds::Text(limits)) = (&offered.opened, &offered.bounds) {
        let numbers = model.file().config();
        let room = compute.kv_room(config.plan.kv_dtype);
        let kv = limits.kv_blocks as u64 * plan::block_bytes(numbers, room);
        let kv = kv * together as u64 / ranks as u64;
        writeln!(out, "\nmodel       {}", model.file().path().display())?;
        writeln!(out, "family      {}, {} layers", numbers.family, numbers.layer_count)?;
        writeln!(out, "weights     {weights_mb} MB{each}")?;
        writeln!(out, "memory      {mb} MB in all{each}, {when}")?;
        writeln!(out, "context     {} tokens of {}", limits.context_len, numbers.context_len)?;
        writeln!(out, "keys+values {} MB{each} for {} blocks", kv >> 20, limits.kv_blocks)?;
        let limit = config.plan.queue_timeout;
        let limit = limit.map_or(String::new(), |t| format!(" for {} s at most", t.as_secs()));
        let (running, waiting) = (limits.running_len, limits.queue_len);
        writeln!(out, "requests    {running} at once, {waiting} waiting{limit}")?;
        let target_ms = config.plan.target_itl.as_millis();
        writeln!(
            out,
            "next token  near {target_ms} ms while prompts are computed, near twice that at most \
             where more of them wait than answers run"
        )?;
    }
    Ok(())
}
